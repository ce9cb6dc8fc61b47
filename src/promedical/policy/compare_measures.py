"""Figures of a comparison of policies: means over the bench, and paired differences (section 6).

An item is the answer of one system, trained with one seed, to one instruction, as one judge graded
it. A system's figure is the mean over instructions of the mean over its seeds, so that a system
with fewer seeds weighs no less; intervals draw whole instructions and say nothing of the chance
between seeds, which stands beside them as the lowest and highest seed. Differences are paired over
the instructions that both systems have graded answers to. What could not be graded is left out and
counted, never zero.

Left to others: grading (`compare`), how it is shown (`compare_report`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from promedical.bench import comparisons, intervals
from promedical.bench.intervals import Bootstrap, Figure
from promedical.policy.rewards import Grade, violations
from promedical.rubric import (
    Preference,
    RewardSpec,
    Rubric,
    Scores,
    Tier,
    Unresolved,
    Verdict,
    compare,
    reward,
)

__all__ = ["LOWER_IS_BETTER", "METRICS", "TESTED", "Item", "graded_item", "measure", "preferred"]

LOWER_IS_BETTER = ("s3", "veto_rate", "expected_s3")
METRICS: dict[str, str] = {
    "reward": "Reward",
    "s1": "S1",
    "soft_s1": "Soft S1",
    "s2": "S2",
    "s3": "Violations an answer",
    "veto_rate": "Answers with a violation",
    "expected_s3": "Expected violations",
    "preferred": "Preferred to the base",
}
# What the paired tests are about; the others are shown without a test.
TESTED = ("s1", "soft_s1", "veto_rate", "expected_s3", "preferred")


@dataclass(frozen=True)
class Item:
    """One graded answer, in numbers.

    Args:
        instruction_id: which instruction.
        reward: of ProMedical's reward, whatever the system was trained on; None if a judgment
            failed, and then nothing else of the item counts.
        s1, s2, s3: of the verdicts; S3 counts an abstained veto as violated.
        soft_s1: Σ ω_i p_i of the calibrated probabilities; None if one is missing.
        expected_s3: Σ p of the vetoes; None if one is missing.
        abstained: criteria without a verdict.
        kinds: of the violations.
        scores: the same verdicts as `promedical.rubric.Scores`, for preferences.
    """

    instruction_id: str
    reward: float | None
    s1: float | None = None
    s2: int | None = None
    s3: int | None = None
    soft_s1: float | None = None
    expected_s3: float | None = None
    abstained: int = 0
    kinds: tuple[str, ...] = ()
    scores: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, numbers and ids only."""
        return asdict(self) | {"kinds": list(self.kinds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Item:
        """The inverse of `to_json`."""
        return cls(**{**data, "kinds": tuple(data["kinds"])})


def graded_item(instruction_id: str, rubric: Rubric, grade: Grade, spec: RewardSpec) -> Item:
    """What of a grade is kept.

    Args:
        spec: ProMedical's, the same for every system.
    """
    value = reward(grade.scores, spec)
    if value is None:
        return Item(instruction_id, None)
    probabilities: Mapping[str, float] = getattr(grade, "probabilities", {})

    def total(tier: Tier) -> float | None:
        terms = [
            (c.weight if tier is Tier.PROFICIENCY else 1.0) * probabilities.get(c.id, math.nan)  # type: ignore[operator]
            for c in rubric.tier(tier)
        ]
        found = math.fsum(terms) if all(map(math.isfinite, terms)) else None
        return found

    vetoes = rubric.tier(Tier.VETO)
    return Item(
        instruction_id,
        value,
        grade.scores.s1,
        grade.scores.s2,
        violations(grade.scores),
        total(Tier.PROFICIENCY),
        total(Tier.VETO),
        sum(v is Verdict.ABSTAIN for v in grade.verdicts.values()),
        tuple(
            c.id if c.kind is None else c.kind.value
            for c in vetoes
            if grade.verdicts[c.id] is not Verdict.UNMET
        ),
        asdict(grade.scores),
    )


def preferred(item: Item, base: Item | None) -> float | None:
    """Credit over the base's answer to the same instruction, by section 2: 1, ½ or 0.

    An unresolved comparison counts ½, as on the bench; None where either has no grade.
    """
    if base is None or item.scores is None or base.scores is None:
        return None
    outcome = compare(_scores(item.scores), _scores(base.scores))
    return {Preference.FIRST: 1.0, Preference.SECOND: 0.0}.get(outcome, 0.5)


def _scores(kept: Mapping[str, Any]) -> Scores:
    return Scores(**{**kept, "unresolved": Unresolved(**kept["unresolved"])})


def measure(
    graded: Mapping[tuple[str, int | None], Mapping[str, Sequence[Item]]],
    *,
    reference: str,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """All figures of all systems by every judge, and the reference against the others.

    Args:
        graded: (system, seed) → judge → one item an instruction; the base has seed None.
        reference: whose differences to the others are tested.
        resamples, seed: of the bootstrap and the permutation tests.

    Returns:
        JSON types: "systems" (name → judge → figures, range over seeds, counts) and "comparisons"
        (judge → list). The tests of one judge are one family.
    """
    judges = list(dict.fromkeys(j for found in graded.values() for j in found))
    systems = list(dict.fromkeys(name for name, _ in graded))
    found: dict[str, Any] = {"systems": {name: {} for name in systems}, "comparisons": {}}
    for judge in judges:
        tables = {
            name: _table(
                {s: by[judge] for (n, s), by in graded.items() if n == name}, graded, judge
            )
            for name in systems
        }
        ids = sorted({i for table in tables.values() for i in table.instructions})
        bootstrap = Bootstrap(len(ids), resamples=resamples, seed=seed)
        index = {key: number for number, key in enumerate(ids)}
        for name, table in tables.items():
            found["systems"][name][judge] = _system(table, index, bootstrap)
        found["comparisons"][judge] = _comparisons(tables, reference, index, bootstrap, seed=seed)
    return found


@dataclass(frozen=True)
class _Values:
    """A system's values by one judge: metric → seed → instruction → value."""

    values: dict[str, dict[int | None, dict[str, float]]]
    items: int
    ungraded: int
    abstained: int
    kinds: dict[str, int]
    instructions: frozenset[str]

    def by_instruction(self, metric: str) -> dict[str, float]:
        """Instruction → mean over the seeds that have a value."""
        collected: dict[str, list[float]] = {}
        for values in self.values[metric].values():
            for key, value in values.items():
                collected.setdefault(key, []).append(value)
        return {key: math.fsum(v) / len(v) for key, v in collected.items()}


def _table(
    by_seed: Mapping[int | None, Sequence[Item]],
    graded: Mapping[tuple[str, int | None], Mapping[str, Sequence[Item]]],
    judge: str,
) -> _Values:
    base = {i.instruction_id: i for i in graded.get(("base", None), {}).get(judge, ())}
    values: dict[str, dict[int | None, dict[str, float]]] = {m: {} for m in METRICS}
    kinds: Counter[str] = Counter()
    items = ungraded = abstained = 0
    for seed, rows in by_seed.items():
        for item in rows:
            items += 1
            if item.reward is None:
                ungraded += 1
                continue
            abstained += item.abstained
            kinds.update(item.kinds)
            for metric, of in _OF.items():
                value = of(item)
                if value is not None:
                    values[metric].setdefault(seed, {})[item.instruction_id] = value
            credit = preferred(item, base.get(item.instruction_id))
            if credit is not None:
                values["preferred"].setdefault(seed, {})[item.instruction_id] = credit
    ids = frozenset(i.instruction_id for rows in by_seed.values() for i in rows)
    return _Values(values, items, ungraded, abstained, dict(sorted(kinds.items())), ids)


_OF: dict[str, Callable[[Item], float | None]] = {
    "reward": lambda i: i.reward,
    "s1": lambda i: i.s1,
    "soft_s1": lambda i: i.soft_s1,
    "s2": lambda i: i.s2,
    "s3": lambda i: i.s3,
    "veto_rate": lambda i: None if i.s3 is None else float(i.s3 > 0),
    "expected_s3": lambda i: i.expected_s3,
}


def _system(table: _Values, index: Mapping[str, int], bootstrap: Bootstrap) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in METRICS:
        values = table.by_instruction(metric)
        figures[metric] = _figure(values, index, bootstrap).to_json() | {
            "seeds": {
                str(seed): math.fsum(of.values()) / len(of)
                for seed, of in table.values[metric].items()
                if of
            }
        }
    return {
        "figures": figures,
        "answers": table.items,
        "ungraded": table.ungraded,
        "abstained": table.abstained,
        "kinds": table.kinds,
    }


def _figure(values: Mapping[str, float], index: Mapping[str, int], bootstrap: Bootstrap) -> Figure:
    if not values:
        return bootstrap.figure(intervals.undefined("instructions", "nothing was graded"))
    where = np.array([index[key] for key in values])
    numbers = np.array(list(values.values()))
    return bootstrap.figure(intervals.mean(numbers, where, len(index), "instructions"))


def _comparisons(
    tables: Mapping[str, _Values],
    reference: str,
    index: Mapping[str, int],
    bootstrap: Bootstrap,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Reference minus other on every tested metric, on the instructions that both have."""
    if reference not in tables:
        return []
    family = {}
    for name, table in tables.items():
        for metric in TESTED:
            if name == reference or (metric == "preferred" and name == "base"):
                continue  # the base against itself is ½ by definition
            mine, theirs = tables[reference].by_instruction(metric), table.by_instruction(metric)
            both = sorted(mine.keys() & theirs.keys())
            if not both:
                continue
            family[reference, name, metric] = comparisons.paired_mean(
                np.array([mine[key] for key in both]),
                np.array([theirs[key] for key in both]),
                np.array([index[key] for key in both]),
                len(index),
                "instructions",
            )
    tested = comparisons.compare(family, bootstrap, seed=seed)
    return [_oriented(c.to_json()) for c in tested]


def _oriented(found: dict[str, Any]) -> dict[str, Any]:
    """ "better" and "worse" as a person means them: fewer violations are better."""
    if found["figure"] in LOWER_IS_BETTER:
        flip = {"better": "worse", "worse": "better"}
        found["outcome"] = flip.get(found["outcome"], found["outcome"])
        difference = found["difference"]
        difference["outcome"] = flip.get(difference["outcome"], difference["outcome"])
    return found
