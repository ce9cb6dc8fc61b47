"""Figures of `benchmarks/healthbench.py`: means over seeds with intervals, by tier and by sign.

`bench.evaluate` measures each seed. Here is what it has no row for: the mean over the seeds of one
system, whose interval still comes from resampling instructions (a seed is no new instruction), and
the criteria by what they were before the mapping: something wanted, or something unwanted. All
figures are oriented so that larger is better: for an unwanted criterion the better answer is the
one that does not do it, whether the criterion became a veto or "The response avoids this: …".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from promedical.bench import intervals, metrics
from promedical.bench.evaluate import GraderScores
from promedical.bench.intervals import Bootstrap, Floats, Statistic
from promedical.corpus.sources.healthbench_graded import AVOIDS, without_omissions
from promedical.records import GradedInstruction
from promedical.rubric import Tier

__all__ = ["VIEWS", "seed_means", "targets"]

# Which criteria a column is about; the first three are the tiers as mapped.
VIEWS = ("proficiency", "veto", "wanted", "unwanted", "unwanted_no_omissions", "unwanted_omissions")

Graders = Mapping[str, Sequence[GraderScores]]  # name → one for each seed


@dataclass(frozen=True)
class _Gold:
    """Items of the test split, the calibration split, and which view each leaf belongs to."""

    leaves: metrics.Leaves
    calibration: metrics.Leaves
    pairs: metrics.WithinPairs
    overall: metrics.OverallPairs
    views: Mapping[str, Any]  # name → [leaves], whether the leaf is in it
    orientation: Floats  # [leaves], o_c


def seed_means(
    test: Sequence[GradedInstruction],
    calibration: Sequence[GradedInstruction],
    graders: Graders,
    reference: str,
    *,
    resamples: int = intervals.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Every grader's figures, the mean of its seeds, and the reference's differences.

    Args:
        test: rows with gold verdicts.
        calibration: rows on which thresholds are fitted.
        graders: name → scores of each seed, over both splits.
        reference: whose paired differences are given.
        resamples, seed: of the bootstrap over instructions.

    Returns:
        "graders": name → seeds, within[view], auroc[view], overall, overall_leaf, veto[precision |
        recall | f1], each a figure in JSON; "differences": name → within[view], auroc[view],
        overall, overall_leaf, reference minus the named grader.
    """
    gold = _gold(test, calibration)
    bootstrap = Bootstrap(len(test), resamples=resamples, seed=seed)
    made = {name: _statistics(gold, seeds) for name, seeds in graders.items()}
    return {
        "graders": {
            name: {"seeds": len(graders[name])}
            | _each(statistics, lambda s: bootstrap.figure(s).to_json())
            for name, statistics in made.items()
        },
        "differences": {
            name: {
                key: {
                    view: bootstrap.difference(made[reference][key][view], of_view).to_json()
                    for view, of_view in statistics[key].items()
                }
                for key in statistics
            }
            for name, statistics in made.items()
            if name != reference
        },
    }


def _each(
    statistics: Mapping[str, Mapping[str, Statistic]], made: Callable[[Statistic], Any]
) -> dict[str, Any]:
    return {key: {view: made(s) for view, s in row.items()} for key, row in statistics.items()}


def _gold(test: Sequence[GradedInstruction], calibration: Sequence[GradedInstruction]) -> _Gold:
    leaves = metrics.leaves(test)
    named: dict[tuple[str, str], set[str]] = {}
    kept_rows, _ = without_omissions(test)
    kept = {
        (row.id, c.id) for row in kept_rows if row.rubric is not None for c in row.rubric.criteria
    }
    for row in test:
        assert row.rubric is not None
        for c in row.rubric.criteria:
            unwanted = c.tier is Tier.VETO or c.text.startswith(AVOIDS)
            views = {c.tier.value, "unwanted" if unwanted else "wanted"}
            if unwanted:
                omission = (row.id, c.id) not in kept
                views.add("unwanted_omissions" if omission else "unwanted_no_omissions")
            named[row.id, c.id] = views
    of = [named[i, c] for i, _, c in leaves.keys]
    return _Gold(
        leaves,
        metrics.leaves(calibration),
        metrics.within_pairs(leaves),
        metrics.overall_pairs(test),
        {view: np.array([view in v for v in of], dtype=np.bool_) for view in VIEWS},
        np.array([metrics.orientation(t) for t in leaves.tier], dtype=np.float64),
    )


def _mean(parts: Sequence[Statistic]) -> Statistic:
    """The mean of a statistic over seeds, on the same resamples."""
    first = parts[0]

    def values(counts: Floats) -> Floats:
        found: Floats = np.mean([part.values(counts) for part in parts], axis=0)
        return found

    return Statistic(values, first.n, first.unit, first.instructions, first.reason)


def _statistics(gold: _Gold, seeds: Sequence[GraderScores]) -> dict[str, dict[str, Statistic]]:
    parts = [_of_seed(gold, grader) for grader in seeds]
    return {
        key: {view: _mean([part[key][view] for part in parts]) for view in row}
        for key, row in parts[0].items()
    }


def _of_seed(gold: _Gold, grader: GraderScores) -> dict[str, dict[str, Statistic]]:
    leaves, n = gold.leaves, gold.leaves.n_instructions
    if grader.scores is not None:
        s = leaves.scores(grader.scores)
    else:
        assert grader.overall is not None
        s = leaves.scores_of_responses(grader.overall)
    credit = metrics.within_credit(leaves, gold.pairs, s)
    r = s * gold.orientation
    good = leaves.positive == (gold.orientation > 0)
    within, auroc = {}, {}
    for view, of_view in gold.views.items():
        paired = of_view[gold.pairs.better] & ~np.isnan(credit)
        within[view] = intervals.mean(credit[paired], gold.pairs.instruction[paired], n, "pairs")
        keep = of_view & ~np.isnan(r)
        auroc[view] = intervals.auroc(r[keep], good[keep], leaves.instruction[keep], n, "verdicts")
    rows = {"within": within, "auroc": auroc}
    return rows | {"overall": _overall(gold, grader, s), "veto": _veto(gold, grader, s)}


def _verdicts(gold: _Gold, grader: GraderScores, s: Floats) -> Floats | None:
    if grader.scores is None:
        return None
    fitted = metrics.fit_thresholds(gold.calibration, gold.calibration.scores(grader.scores))
    return gold.leaves.verdicts(s, fitted)


def _overall(gold: _Gold, grader: GraderScores, s: Floats) -> dict[str, Statistic]:
    """Of the verdicts where there are any, else of the one score a response ("leaf")."""

    def mean(outcomes: metrics.OverallOutcomes) -> Statistic:
        where, n = gold.overall.instruction, gold.leaves.n_instructions
        return intervals.mean(outcomes.credit, where, n, "pairs")

    leaf = (
        intervals.undefined("pairs", "the grader gives no score a response")
        if grader.overall is None
        else mean(metrics.overall_from_scores(gold.overall, grader.overall))
    )
    verdicts = _verdicts(gold, grader, s)
    if verdicts is None:
        return {"accuracy": leaf, "leaf": leaf}
    outcomes = metrics.overall_from_verdicts(gold.leaves, gold.overall, verdicts)
    return {"accuracy": mean(outcomes), "leaf": leaf}


def _veto(gold: _Gold, grader: GraderScores, s: Floats) -> dict[str, Statistic]:
    verdicts = _verdicts(gold, grader, s)
    if verdicts is None:
        none = intervals.undefined("verdicts", "the grader gives no verdicts")
        return {"precision": none, "recall": none, "f1": none}
    keep = gold.leaves.of(Tier.VETO) & ~np.isnan(verdicts)
    return intervals.precision_recall_f1(
        gold.leaves.positive[keep],
        verdicts[keep] == 1,
        gold.leaves.instruction[keep],
        gold.leaves.n_instructions,
        "verdicts",
    )


def targets(means: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """What the experiment was to show, and whether it did (an interval excludes chance or 0)."""
    own = means["graders"][reference]
    found: dict[str, Any] = {}

    def note(name: str, figure: Mapping[str, Any], above: float) -> None:
        low = figure["low"]
        found[name] = {
            "value": figure["value"],
            "low": low,
            "high": figure["high"],
            "above": above,
            "reached": None if low is None else low > above,
        }

    for view in ("wanted", "unwanted"):
        note(f"within-criterion accuracy, {view} criteria", own["within"][view], 0.5)
        for other in ("response_alone", "length"):
            if other in means["differences"]:
                difference = means["differences"][other]["within"][view]
                note(f"within-criterion accuracy, {view} criteria: {other}", difference, 0.0)
        if "criterion_alone" in means["differences"]:
            difference = means["differences"]["criterion_alone"]["auroc"][view]
            note(f"pooled AUROC, {view} criteria: criterion_alone", difference, 0.0)
    for other in ("scalar", "scalar_rubric"):
        if other in means["differences"]:
            difference = means["differences"][other]["overall"]["accuracy"]
            note(f"overall accuracy: {other}", difference, 0.0)
    return found
