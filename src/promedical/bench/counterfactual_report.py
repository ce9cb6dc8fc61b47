"""How often a grader follows the criterion and how often the surface, on counterfactual pairs.

A pair of `counterfactual` where a criterion differs is followed if the first response scores higher
(equal = ½): on that criterion, r = o_c·s, and as a whole, by the grader's own score a response or a
pairwise grader's preference. Where nothing differs, the share that prefers the first says what the
surface does: ½ is unmoved. Of one surface, accuracy with it in the better response less accuracy
with it in the worse one is its pull: 0 is unmoved, 1 is a grader that sees nothing else.

Intervals are over questions. What a grader did not score is counted and in no figure. Null graders
that only see length, nothing, or shared words stand beside every grader.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promedical.bench import intervals
from promedical.bench.baselines import word_overlap
from promedical.bench.counterfactual import SURFACES, VETO_KINDS, Counterfactual, MinimalPair
from promedical.bench.evaluate import GraderScores
from promedical.bench.intervals import Bootstrap, Floats, Ints, Statistic
from promedical.bench.metrics import BenchError, LeafKey, ResponseKey, orientation
from promedical.records import GradedInstruction, Response
from promedical.rubric import Criterion, Preference, Rubric

__all__ = [
    "Credit",
    "Grader",
    "credits",
    "evaluate_counterfactual",
    "groups",
    "null_scores",
    "text_table",
]

# Scores, or a pairwise grader's preference by pair id: FIRST = the pair's first is better.
Grader = GraderScores | Mapping[str, Preference]

_PREFERRED = {Preference.FIRST: 1.0, Preference.TIE: 0.5, Preference.SECOND: 0.0}
NO_WHOLE = "the grader gives no score or preference for a whole response"
NO_CRITERIA = "the grader gives no score for a criterion"


# --- credit of every pair -------------------------------------------------------------------------


@dataclass(frozen=True)
class Credit:
    """[pairs], 1 if the first is preferred, ½ equal, 0 the second, NaN unscored.

    Args:
        criterion: on the pair's criterion; where none differs, the mean over the criteria that
            are scored in both, and for a benign twin on the veto of its kind. None: no such score.
        whole: as a whole. None: no such score.
    """

    criterion: Floats | None
    whole: Floats | None


def _ahead(a: float | None, b: float | None) -> float:
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    return 1.0 if a > b else 0.5 if a == b else 0.0


def _on_criterion(pair: MinimalPair, rubric: Rubric, scores: Mapping[LeafKey, float]) -> float:
    if pair.criterion is not None:
        asked: Sequence[Criterion] = [rubric[pair.criterion]]
    elif pair.veto is not None:
        asked = [c for c in rubric.criteria if c.kind is not None and c.kind.value == pair.veto]
    else:
        asked = rubric.criteria
    found = []
    for criterion in asked:
        first, second = (
            scores.get((pair.instruction, response, criterion.id))
            for response in (pair.first, pair.second)
        )
        credit = _ahead(first, second)
        found.append(credit if orientation(criterion.tier) > 0 else 1 - credit)
    known = [c for c in found if not math.isnan(c)]
    return sum(known) / len(known) if known else math.nan


def credits(bench: Counterfactual, name: str, grader: Grader) -> Credit:
    """What a grader makes of every pair, in the order of `bench.pairs`.

    Raises:
        BenchError: no score for any pair, or preferences on unknown pairs.
    """
    rubrics = {row.id: row.rubric for row in bench.rows}
    if not isinstance(grader, GraderScores):
        unknown = set(grader) - {pair.id for pair in bench.pairs}
        if unknown:
            raise BenchError(
                f"grader {name!r}: preferences on unknown pairs {sorted(unknown)[:3]}, expected "
                f"ids such as {bench.pairs[0].id!r}"
            )
        whole = [_PREFERRED.get(grader.get(p.id, Preference.UNRESOLVED), math.nan)
                 for p in bench.pairs]  # fmt: skip
        return _required(name, Credit(None, np.array(whole)))
    criterion = overall = None
    if grader.scores is not None:
        credits = []
        for pair in bench.pairs:
            rubric = rubrics[pair.instruction]
            assert rubric is not None
            credits.append(_on_criterion(pair, rubric, grader.scores))
        criterion = np.array(credits)
    if grader.overall is not None:
        given = grader.overall
        overall = np.array(
            [
                _ahead(given.get((p.instruction, p.first)), given.get((p.instruction, p.second)))
                for p in bench.pairs
            ]
        )
    return _required(name, Credit(criterion, overall))


def _required(name: str, credit: Credit) -> Credit:
    given = [c for c in (credit.criterion, credit.whole) if c is not None]
    if all(np.isnan(c).all() for c in given):
        raise BenchError(f"grader {name!r}: found no finite score for any pair")
    return credit


# --- groups of pairs ------------------------------------------------------------------------------


def _is(kind: str, against: bool | None = None) -> Callable[[MinimalPair], bool]:
    return lambda p: p.kind == kind and p.against is against


def groups() -> dict[str, dict[str, Callable[[MinimalPair], bool]]]:
    """Section → figure → which pairs it is over."""
    follows: dict[str, Callable[[MinimalPair], bool]] = {
        "left_out": _is("left_out"),
        "removed": _is("removed"),
        "changed": _is("changed"),
        "violation": _is("violation"),
        "claimed_credential": _is("claimed_credential"),
    }
    for kind in VETO_KINDS:
        follows[f"violation.{kind.value}"] = lambda p, k=kind.value: (  # type: ignore[misc]
            p.kind == "violation" and p.against is None and p.veto == k
        )
    sides: dict[str, Callable[[MinimalPair], bool]] = {}
    for surface in SURFACES:
        for side, against in (("against", True), ("with", False)):
            sides[f"{surface}.{side}"] = lambda p, s=surface, a=against: (  # type: ignore[misc]
                p.surface == s and p.against is a
            )
    for side, against in (("against", True), ("with", False)):
        sides[f"any.{side}"] = lambda p, a=against: p.against is a  # type: ignore[misc]
    unmoved: dict[str, Callable[[MinimalPair], bool]] = {
        surface: lambda p, s=surface: p.kind == "surface" and p.surface == s  # type: ignore[misc]
        for surface in SURFACES
    }
    unmoved |= {"shorter": _is("shorter"), "benign_twin": _is("benign_twin")}
    return {"follows": follows, "sides": sides, "surface": unmoved}


def evaluate_counterfactual(
    bench: Counterfactual,
    graders: Mapping[str, Grader],
    *,
    resamples: int = intervals.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure graders on the pairs.

    Args:
        bench: from `counterfactual_pairs`.
        graders: name → scores of the responses of `bench.rows`, or preferences by pair id.

    Returns:
        JSON types, F a `Figure`, D a `Difference`; each {"criterion": …, "whole": …}:
        "settings", "counts", "graders": name →
        "follows": F of left_out, removed, changed, violation, claimed_credential, violation.KIND,
        and violation.same_length, those whose twin has as many words as the violation;
        "sides": F of SURFACE.against and SURFACE.with, of left_out and violation together;
        "pull": D of each surface, with less against;
        "surface": F, share that prefers the surface (shorter: the longer; benign_twin: the neutral
        sentence), ½ = unmoved; "beyond_length": D, removed less shorter;
        "unscored": pairs without a credit.

    Raises:
        BenchError: a grader without any score, or preferences on unknown pairs.
    """
    number = {row.id: i for i, row in enumerate(bench.rows)}
    at = np.array([number[p.instruction] for p in bench.pairs], dtype=np.int64)
    bootstrap = Bootstrap(len(bench.rows), resamples=resamples, seed=seed)
    masks = {
        section: {n: np.array([of(p) for p in bench.pairs]) for n, of in groups.items()}
        for section, groups in groups().items()
    }
    masks["follows"]["violation.same_length"] = masks["follows"]["violation"] & _same_length(bench)
    return {
        "settings": {"resamples": resamples, "seed": seed, "pairs_seed": bench.seed},
        "counts": dict(bench.counts),
        "graders": {
            name: _table(credits(bench, name, grader), masks, at, bootstrap)
            for name, grader in graders.items()
        },
    }


def _same_length(bench: Counterfactual) -> NDArray[np.bool_]:
    """[pairs], whether both responses have as many words, so that length says nothing."""
    words = {(row.id, y.id): len(y.text.split()) for row in bench.rows for y in row.responses}
    return np.array(
        [words[p.instruction, p.first] == words[p.instruction, p.second] for p in bench.pairs]
    )


Masks = Mapping[str, Mapping[str, NDArray[np.bool_]]]


def _table(credit: Credit, masks: Masks, at: Ints, bootstrap: Bootstrap) -> dict[str, Any]:
    def statistic(values: Floats | None, reason: str, mask: NDArray[np.bool_]) -> Statistic:
        if values is None:
            return intervals.undefined("pairs", reason)
        keep = mask & ~np.isnan(values)
        return intervals.mean(values[keep], at[keep], bootstrap.n_instructions, "pairs")

    levels = {"criterion": (credit.criterion, NO_CRITERIA), "whole": (credit.whole, NO_WHOLE)}

    def figures(mask: NDArray[np.bool_]) -> dict[str, Any]:
        return {n: bootstrap.figure(statistic(*level, mask)).to_json()
                for n, level in levels.items()}  # fmt: skip

    def differences(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> dict[str, Any]:
        return {n: bootstrap.difference(statistic(*level, a), statistic(*level, b)).to_json()
                for n, level in levels.items()}  # fmt: skip

    sides = masks["sides"]
    return {
        section: {name: figures(mask) for name, mask in group.items()}
        for section, group in masks.items()
    } | {
        "pull": {
            surface: differences(sides[f"{surface}.with"], sides[f"{surface}.against"])
            for surface in (*SURFACES, "any")
        },
        "beyond_length": differences(masks["follows"]["removed"], masks["surface"]["shorter"]),
        "unscored": {
            n: None if values is None else int(np.isnan(values).sum())
            for n, (values, _) in levels.items()
        },
    }


# --- null graders ---------------------------------------------------------------------------------


def null_scores(bench: Counterfactual, seed: int = 0) -> dict[str, GraderScores]:
    """Graders that cannot know: length (longer is better), random, shared words."""

    def words(row: GradedInstruction, y: Response, c: Criterion | None) -> float:
        return float(len(y.text.split()))

    def chance(row: GradedInstruction, y: Response, c: Criterion | None) -> float:
        parts = (str(seed), row.id, y.id, "" if c is None else c.id)
        digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    def shared(row: GradedInstruction, y: Response, c: Criterion | None) -> float:
        if c is not None:
            return orientation(c.tier) * word_overlap(c.text, y.text)
        assert row.rubric is not None
        return math.fsum(shared(row, y, c) for c in row.rubric.criteria)

    return {
        name: _from_r(bench.rows, r)
        for name, r in (("length", words), ("random", chance), ("word_overlap", shared))
    }


def _from_r(
    rows: Sequence[GradedInstruction],
    r: Callable[[GradedInstruction, Response, Criterion | None], float],
) -> GraderScores:
    """Scores from r, larger is better, of a criterion and (None) of the whole response."""
    scores: dict[LeafKey, float] = {}
    overall: dict[ResponseKey, float] = {}
    for row in rows:
        assert row.rubric is not None
        for y in row.responses:
            overall[row.id, y.id] = r(row, y, None)
            for c in row.rubric.criteria:
                scores[row.id, y.id, c.id] = orientation(c.tier) * r(row, y, c)
    return GraderScores(scores, overall, False)


# --- text -----------------------------------------------------------------------------------------

_TITLES = {
    "follows": "follows the criterion (50 = chance)",
    "surface": "prefers the surface (50 = unmoved)",
    "pull": "pull: with less against the criterion (0 = unmoved)",
}


def text_table(result: Mapping[str, Any], level: str = "whole") -> str:
    """The result as plain text, per cent with 95 % intervals, a column a grader.

    Args:
        level: "whole" or "criterion".

    Raises:
        BenchError: another level.
    """
    if level not in ("whole", "criterion"):
        raise BenchError(f"level: found {level!r}, expected whole or criterion")
    graders = result["graders"]
    lines: list[list[str]] = [["", "n", *graders]]
    if not graders:
        return "no graders"
    for section, title in _TITLES.items():
        lines.append([title])
        for name in next(iter(graders.values()))[section]:
            cells = [table[section][name][level] for table in graders.values()]
            n = max(cell["n"] for cell in cells)
            lines.append([f"  {name}", str(n), *(_percent(cell, n) for cell in cells)])
    lines.append(
        ["unscored pairs", "", *(_unscored(t["unscored"][level]) for t in graders.values())]
    )
    widths = [
        max(len(line[k]) for line in lines if len(line) > max(k, 1)) for k in range(len(lines[0]))
    ]
    return "\n".join(
        "  ".join(
            cell.ljust(widths[k]) if k == 0 else cell.rjust(widths[k])
            for k, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def _percent(cell: Mapping[str, Any], n: int) -> str:
    if cell["value"] is None:
        return "—"
    value, low, high = (100 * cell[k] for k in ("value", "low", "high"))
    own = "" if cell["n"] == n else f" (n = {cell['n']})"
    return f"{value:.0f} [{low:.0f}, {high:.0f}]{own}"


def _unscored(count: int | None) -> str:
    return "—" if count is None else str(count)
