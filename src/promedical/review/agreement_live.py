"""Agreement in a round of adjudication while it goes on: among physicians, and with a judge.

Section 6. Votes of finished first readings alone count: a third reader judges what the others did
not settle, so their votes would bias every figure. Criterion verdicts are nominal: raw agreement,
unweighted Fleiss' and Cohen's κ, Krippendorff's α and Gwet's AC1, once with "cannot say" as a label
of its own and once with such votes left out, prevalence beside each. Only the overall preference is
ordered, so only there κ is weighted, and α ordinal. Intervals are by bootstrap over instructions.

The lexicographic rule is tested, not assumed: the preference that a reader stated before any
criterion was shown, against `compare` on that reader's own verdicts, and on the gold ones.

Left to others: the coefficients (`promedical.bench.agreement`), pages (`pages_adjudication`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promedical.bench import intervals
from promedical.bench.agreement import (
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    pair_agreement,
)
from promedical.bench.intervals import Bootstrap, Ints, Statistic
from promedical.review.adjudication import Reading, ReadItem, seconds_per_criterion
from promedical.review.adjudication_answer import (
    CHOICES,
    SCALE,
    VERDICTS,
    ballots_of,
    pairs_of,
    preference_of,
)
from promedical.rubric import Preference, Rubric, Scores, Tier, Verdict, compare, score

__all__ = ["LABELS", "Leaves", "leaves_of", "lexicographic_test", "live_agreement"]

Json = dict[str, Any]
Bools = NDArray[np.bool_]

LABELS = tuple(VERDICTS)  # met, unmet, cannot_say; for a veto met means violated
CANNOT_SAY = LABELS.index("cannot_say")
RESAMPLES = 1_000
_TIER_ORDER = {tier.value: number for number, tier in enumerate(Tier)}
_CODE = {verdict: code for code, verdict in enumerate(VERDICTS.values())}
_SIDE = {"first_better_much": "first", "first_better": "first", "tie": "tie"} | {
    "second_better": "second",
    "second_better_much": "second",
    "cannot_say": "cannot_say",
}


@dataclass(frozen=True)
class Leaves:
    """Every criterion of every response that a first reader has judged.

    Args:
        instruction: [leaves], index of the item.
        labels: [leaves, reviewers], codes into `LABELS`, −1 for no vote.
        disputed: [leaves, reviewers], whether the vote carries "guidelines differ".
        judge: [leaves], the judge's code, −1 where it has no met, unmet or abstain.
        gold: [leaves], code of the gold verdict, −1 where there is none.
        reviewers: their ids, sorted.
        tier, axis, specialty, category: [leaves].
        n_instructions: number of items.
    """

    instruction: Ints
    labels: Ints
    disputed: Bools
    judge: Ints
    gold: Ints
    reviewers: tuple[str, ...]
    tier: NDArray[np.object_]
    axis: NDArray[np.object_]
    specialty: NDArray[np.object_]
    category: NDArray[np.object_]
    n_instructions: int


def leaves_of(items: Sequence[ReadItem]) -> Leaves:
    """Collect the votes of a round, as far as they are in.

    Args:
        items: with their secret, if a judge is to be compared.
    """
    reviewers = tuple(sorted({r.reviewer_id for item in items for r in item.firsts}))
    column = {reviewer: i for i, reviewer in enumerate(reviewers)}
    rows: list[tuple[int, str, str | None, str | None, str | None, int, int]] = []
    labels: list[list[int]] = []
    flags: list[list[bool]] = []
    for number, item in enumerate(items):
        if not item.firsts:
            continue
        found = item.consensus
        judged = _judge(item)
        for key in item.keys:
            for criterion in item.rubric.criteria:
                leaf = (key, criterion.id)
                cast = [-1] * len(reviewers)
                flag = [False] * len(reviewers)
                for ballot in found[leaf].ballots:
                    if not ballot.third:
                        cast[column[ballot.reader]] = _CODE[ballot.verdict]
                        flag[column[ballot.reader]] = ballot.disputed
                gold = found[leaf].gold
                labels.append(cast)
                flags.append(flag)
                rows.append(
                    (
                        number,
                        criterion.tier.value,
                        criterion.axis,
                        item.specialty,
                        item.category,
                        judged.get(leaf, -1),
                        -1 if gold is None else _CODE[gold],
                    )
                )
    numbers = list(zip(*rows, strict=True)) if rows else [()] * 7
    at, judge, gold_codes = (np.array(numbers[i], dtype=np.int64) for i in (0, 5, 6))
    tier, axis, specialty, category = (np.array(values, dtype=object) for values in numbers[1:5])
    shape = (len(rows), len(reviewers))
    return Leaves(
        instruction=at,
        labels=np.array(labels, dtype=np.int64).reshape(shape),
        disputed=np.array(flags, dtype=np.bool_).reshape(shape),
        judge=judge,
        gold=gold_codes,
        reviewers=reviewers,
        tier=tier,
        axis=axis,
        specialty=specialty,
        category=category,
        n_instructions=len(items),
    )


def _judge(item: ReadItem) -> dict[tuple[str, str], int]:
    """(response key, criterion id) → code of the judge's verdict; a failed judgment is none."""
    if not item.secret.get("judge"):
        return {}
    return {
        (key, entry["criterion"]): _CODE[Verdict(entry["verdict"])]
        for key, written in item.secret["responses"].items()
        for entry in written.get("verdicts") or ()
        if Verdict(entry["verdict"]) is not Verdict.ERROR
    }


def live_agreement(
    items: Sequence[ReadItem],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Json:
    """Every figure of a round as JSON types; F is a `Figure` in JSON.

    Args:
        items: of `read_items(…, secret=True)`.
        resamples, seed: of the bootstrap.

    Returns:
        "progress": items and readings;
        "criteria": mode ("with_cannot_say", "without_cannot_say") → {"all": group, "tier",
            "axis", "specialty", "category": name → group, "pairs": [pair]}, a group having
            items, raw_agreement, fleiss_kappa, krippendorff_alpha, gwet_ac1 F and prevalence, a
            pair reviewers, cohen_kappa instead of Fleiss' and each one's prevalence;
        "preference": the same over overall preferences, and weighted figures;
        "reviewers": id → how much they cannot say, how often guidelines differ, seconds;
        "judge": None, or the judge against physicians, and them on the same criteria;
        "lexicographic": `lexicographic_test`;
        "standings": standing → criteria, by tier.
    """
    cast = leaves_of(items)
    bootstrap = Bootstrap(max(len(items), 1), resamples=resamples, seed=seed)
    return {
        "settings": {"resamples": resamples, "seed": seed, "confidence": bootstrap.confidence},
        "progress": _progress(items),
        "criteria": {
            mode: _criteria(cast, with_cannot_say, bootstrap)
            for mode, with_cannot_say in (("with_cannot_say", True), ("without_cannot_say", False))
        },
        "preference": _preferences(items, bootstrap),
        "reviewers": _reviewers(cast, items, bootstrap),
        "judge": _judge_figures(cast, bootstrap) if (cast.judge >= 0).any() else None,
        "lexicographic": lexicographic_test(items, bootstrap),
        "standings": _standings(items),
    }


def _progress(items: Sequence[ReadItem]) -> Json:
    parts = Counter((r.part, r.done) for item in items for r in item.readings)
    return {
        "items": len(items),
        "complete": sum(item.complete for item in items),
        "first": {"done": parts["first", True], "open": parts["first", False]},
        "third": {"done": parts["third", True], "open": parts["third", False]},
        "waiting_for_third": sum(
            bool(item.unsettled()) and not item.thirds_given for item in items
        ),
    }


def _standings(items: Sequence[ReadItem]) -> Json:
    counts: dict[str, Counter[str]] = {tier.value: Counter() for tier in Tier}
    for item in items:
        tier_of = {c.id: c.tier.value for c in item.rubric.criteria}
        for (_, criterion_id), found in item.consensus.items():
            counts[tier_of[criterion_id]][found.standing.value] += 1
    return {tier: dict(count) for tier, count in counts.items()}


# --- criteria -------------------------------------------------------------------------------------


def _mode(labels: Ints, with_cannot_say: bool) -> tuple[Ints, tuple[str, ...]]:
    """Labels and their names; without cannot say such a vote is no vote."""
    if with_cannot_say:
        return labels, LABELS
    return np.where(labels == CANNOT_SAY, -1, labels), LABELS[:CANNOT_SAY]


def _criteria(cast: Leaves, with_cannot_say: bool, bootstrap: Bootstrap) -> Json:
    labels, names = _mode(cast.labels, with_cannot_say)

    def group(keep: Bools) -> Json:
        return _group(labels[keep], names, cast.instruction[keep], bootstrap)

    def groups(values: NDArray[np.object_]) -> Json:
        present = {v for v in values if v is not None}
        found = sorted(present, key=lambda v: (_TIER_ORDER.get(v, 0), v))
        return {name: group(values == name) for name in found}

    return {
        "all": group(np.ones(len(labels), dtype=np.bool_)),
        "tier": groups(cast.tier),
        "axis": groups(cast.axis),
        "specialty": groups(cast.specialty),
        "category": groups(cast.category),
        "pairs": _pairs(labels, names, cast.instruction, cast.reviewers, bootstrap),
    }


def _prevalence(labels: Ints, names: Sequence[str]) -> dict[str, float | None]:
    votes = labels[labels >= 0]
    return {n: float((votes == k).mean()) if len(votes) else None for k, n in enumerate(names)}


def _figures(statistics: Mapping[str, Statistic], bootstrap: Bootstrap) -> Json:
    return {name: figure.to_json() for name, figure in bootstrap.figures(statistics).items()}


def _group(labels: Ints, names: Sequence[str], where: Ints, bootstrap: Bootstrap) -> Json:
    paired = (labels >= 0).sum(axis=1) >= 2
    given = (labels[paired], len(names), where[paired], bootstrap.n_instructions)
    statistics = {
        "raw_agreement": pair_agreement(*given),
        "fleiss_kappa": fleiss_kappa(*given),
        "krippendorff_alpha": krippendorff_alpha(*given),
        "gwet_ac1": gwet_ac1(*given),
    }
    return {
        "items": int(paired.sum()),
        **_figures(statistics, bootstrap),
        "prevalence": _prevalence(labels[paired], names),
    }


def _pairs(
    labels: Ints,
    names: Sequence[str],
    where: Ints,
    reviewers: Sequence[str],
    bootstrap: Bootstrap,
    more: Callable[[Ints, Ints, Ints], Mapping[str, Statistic]] | None = None,
) -> list[Json]:
    """Two reviewers at a time, on what both judged."""
    found = []
    for (i, first), (j, second) in itertools.combinations(enumerate(reviewers), 2):
        both = (labels[:, i] >= 0) & (labels[:, j] >= 0)
        if not both.any():
            continue
        a, b, at = labels[both, i], labels[both, j], where[both]
        n, k = bootstrap.n_instructions, len(names)
        two = np.column_stack([a, b])
        statistics = {
            "raw_agreement": intervals.mean((a == b).astype(np.float64), at, n, "items"),
            "cohen_kappa": cohen_kappa(a, b, k, at, n),
            "krippendorff_alpha": krippendorff_alpha(two, k, at, n),
            "gwet_ac1": gwet_ac1(two, k, at, n),
            **(more(a, b, at) if more is not None else {}),
        }
        found.append(
            {
                "reviewers": [first, second],
                "items": int(both.sum()),
                **_figures(statistics, bootstrap),
                "prevalence": [_prevalence(a, names), _prevalence(b, names)],
            }
        )
    return found


# --- the overall preference -----------------------------------------------------------------------


def _preferences(items: Sequence[ReadItem], bootstrap: Bootstrap) -> Json:
    """Nominal figures over all choices; weighted and ordinal ones over the scale alone."""
    reviewers = tuple(sorted({r.reviewer_id for item in items for r in item.firsts}))
    column = {reviewer: i for i, reviewer in enumerate(reviewers)}
    rows, where = [], []
    for number, item in enumerate(items):
        # "First" is the response with the smaller key, which is random.
        for a, b in pairs_of(sorted(item.keys)):
            cast = [-1] * len(reviewers)
            for reading in item.firsts:
                choice = preference_of(reading.answer, a, b)
                if choice is not None:
                    cast[column[reading.reviewer_id]] = CHOICES.index(choice)
            if max(cast, default=-1) >= 0:
                rows.append(cast)
                where.append(number)
    labels = np.array(rows, dtype=np.int64).reshape(len(rows), len(reviewers))
    at, n = np.array(where, dtype=np.int64), bootstrap.n_instructions
    ordered = np.where(labels == CHOICES.index("cannot_say"), -1, labels)
    paired = (ordered >= 0).sum(axis=1) >= 2
    given = (ordered[paired], len(SCALE), at[paired], n)
    weighted = {
        "raw_agreement": pair_agreement(*given),
        "fleiss_kappa_linear": fleiss_kappa(*given, weights="linear"),
        "fleiss_kappa_quadratic": fleiss_kappa(*given, weights="quadratic"),
        "krippendorff_alpha_ordinal": krippendorff_alpha(*given, level="ordinal"),
    }

    def weighted_pair(a: Ints, b: Ints, pair_at: Ints) -> dict[str, Statistic]:
        k = len(SCALE)
        return {
            "cohen_kappa_linear": cohen_kappa(a, b, k, pair_at, n, weights="linear"),
            "cohen_kappa_quadratic": cohen_kappa(a, b, k, pair_at, n, weights="quadratic"),
        }

    return {
        "all_choices": _group(labels, CHOICES, at, bootstrap),
        "ordered": {
            "items": int(paired.sum()),
            **_figures(weighted, bootstrap),
            "prevalence": _prevalence(ordered[paired], SCALE),
        },
        "pairs": _pairs(ordered, SCALE, at, reviewers, bootstrap, weighted_pair),
    }


# --- the method's rule ----------------------------------------------------------------------------


def _scores(rubric: Rubric, verdicts: Mapping[tuple[str, str], Verdict], key: str) -> Scores:
    return score(rubric, {c.id: verdicts[key, c.id] for c in rubric.criteria})


def _rule(
    item: ReadItem, verdicts: Mapping[tuple[str, str], Verdict]
) -> dict[tuple[str, str], Preference]:
    """(smaller key, larger key) → what the lexicographic rule makes of verdicts."""
    rubric = item.rubric
    scores = {key: _scores(rubric, verdicts, key) for key in item.keys}
    return {(a, b): compare(scores[a], scores[b]) for a, b in pairs_of(sorted(item.keys))}


def lexicographic_test(items: Sequence[ReadItem], bootstrap: Bootstrap) -> Json:
    """Blind overall preferences against the lexicographic rule (section 2).

    Returns:
        "own": with the rule on the reader's own verdicts, "gold": on the gold ones of items that
        are complete. Each has
        "table": preference → outcome of the rule → how often;
        "agreement" F: of those where the reader chose and the rule decided, tie being a choice;
        "direction" F: of those where neither says tie;
        "cohen_kappa" F: over first, tie, second.
    """
    own: list[tuple[int, str, str]] = []
    gold: list[tuple[int, str, str]] = []
    for number, item in enumerate(items):
        found = item.consensus if item.complete and item.firsts else None
        agreed = (
            None if found is None else _rule(item, {leaf: c.verdict for leaf, c in found.items()})
        )
        for reading in item.firsts:
            mine = _rule(item, _own_verdicts(reading))
            for (a, b), outcome in mine.items():
                choice = preference_of(reading.answer, a, b)
                if choice is None:
                    continue
                own.append((number, _SIDE[choice], outcome.value))
                if agreed is not None:
                    gold.append((number, _SIDE[choice], agreed[a, b].value))
    return {"own": _rule_figures(own, bootstrap), "gold": _rule_figures(gold, bootstrap)}


def _own_verdicts(reading: Reading) -> dict[tuple[str, str], Verdict]:
    votes = ballots_of(reading.answer, reading.reviewer_id, reading.part)
    return {leaf: ballot.verdict for leaf, ballot in votes.items()}


def _rule_figures(compared: Sequence[tuple[int, str, str]], bootstrap: Bootstrap) -> Json:
    sides = ("first", "tie", "second")
    table = {said: {outcome.value: 0 for outcome in Preference} for said in (*sides, "cannot_say")}
    for _, said, outcome in compared:
        table[said][outcome] += 1
    decided = [(i, s, o) for i, s, o in compared if s in sides and o in sides]
    strict = [(i, s, o) for i, s, o in decided if "tie" not in (s, o)]
    n = bootstrap.n_instructions

    def share(kept: Sequence[tuple[int, str, str]]) -> Statistic:
        right = np.array([s == o for _, s, o in kept], dtype=np.float64)
        at = np.array([i for i, _, _ in kept], dtype=np.int64)
        return intervals.mean(right, at, n, "preferences")

    a, b = (np.array([sides.index(c[x]) for c in decided], dtype=np.int64) for x in (1, 2))
    at = np.array([i for i, _, _ in decided], dtype=np.int64)
    statistics = {
        "agreement": share(decided),
        "direction": share(strict),
        "cohen_kappa": cohen_kappa(a, b, len(sides), at, n),
    }
    return {"table": table, "preferences": len(compared), **_figures(statistics, bootstrap)}


# --- reviewers, and the judge ---------------------------------------------------------------------


def _reviewers(cast: Leaves, items: Sequence[ReadItem], bootstrap: Bootstrap) -> Json:
    seconds = seconds_per_criterion(items)
    done = Counter(r.reviewer_id for item in items for r in item.readings if r.done)
    shown: Json = {}
    for i, reviewer in enumerate(cast.reviewers):
        voted = cast.labels[:, i] >= 0
        at = cast.instruction[voted]
        n = bootstrap.n_instructions
        cannot = (cast.labels[voted, i] == CANNOT_SAY).astype(np.float64)
        flagged = cast.disputed[voted, i].astype(np.float64)
        statistics = {
            "cannot_say": intervals.mean(cannot, at, n, "verdicts"),
            "guidelines_differ": intervals.mean(flagged, at, n, "verdicts"),
        }
        shown[reviewer] = {"verdicts": int(voted.sum()), **_figures(statistics, bootstrap)}
    for reviewer in seconds:
        shown.setdefault(reviewer, {"verdicts": 0})
        shown[reviewer] |= {"items": done[reviewer], "seconds_per_criterion": seconds[reviewer]}
    return shown


def _judge_figures(cast: Leaves, bootstrap: Bootstrap) -> Json:
    """The judge against physicians' votes and gold, and physicians on the same criteria."""
    has = cast.judge >= 0

    def against(keep: Bools, with_cannot_say: bool) -> Json:
        labels, names = _mode(cast.labels[keep], with_cannot_say)
        judge = _mode(cast.judge[keep][:, None], with_cannot_say)[0][:, 0]
        leaf, reviewer = np.nonzero((labels >= 0) & (judge >= 0)[:, None])
        a, b = judge[leaf], labels[leaf, reviewer]
        at, n = cast.instruction[keep][leaf], bootstrap.n_instructions
        statistics = {
            "raw_agreement": intervals.mean((a == b).astype(np.float64), at, n, "votes"),
            "cohen_kappa": cohen_kappa(a, b, len(names), at, n),
        }
        return {
            **_figures(statistics, bootstrap),
            "prevalence": [_prevalence(a, names), _prevalence(b, names)],
            "physicians": _group(labels, names, cast.instruction[keep], bootstrap),
        }

    modes = (("with_cannot_say", True), ("without_cannot_say", False))
    tiers = {tier.value: has & (cast.tier == tier.value) for tier in Tier}
    settled = has & (cast.gold >= 0)
    right = (cast.judge[settled] == cast.gold[settled]).astype(np.float64)
    at, n = cast.instruction[settled], bootstrap.n_instructions
    of_gold = {
        "raw_agreement": intervals.mean(right, at, n, "gold verdicts"),
        "cohen_kappa": cohen_kappa(cast.judge[settled], cast.gold[settled], len(LABELS), at, n),
    }
    return {
        "verdicts": int(has.sum()),
        "without_verdict": int((~has).sum()),
        "physicians": {
            mode: {"all": against(has, with_it)}
            | {"tier": {t: against(keep, with_it) for t, keep in tiers.items() if keep.any()}}
            for mode, with_it in modes
        },
        "gold": _figures(of_gold, bootstrap),
    }
