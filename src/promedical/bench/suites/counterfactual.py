"""Counterfactual minimal pairs as a suite: does a grader follow the criterion or the surface?

The pairs are those of `promedical.bench.counterfactual` from the bench side of K-QA; nothing has
to be given. Main figures: how often the better of two answers that differ in exactly one criterion
gets the higher score, by what differs, and the same where a surface pulls against the criterion. A
grader with scores of criteria is measured on the pair's criterion, another on the answers as a
whole. All figures, the pull of every surface among them, stand in the result's details
(`counterfactual_report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from promedical.bench.counterfactual import Counterfactual, MinimalPair, counterfactual_pairs
from promedical.bench.counterfactual_report import credits, evaluate_counterfactual, groups
from promedical.bench.evaluate import GraderScores
from promedical.bench.graded import Graded
from promedical.bench.intervals import Bootstrap, Floats
from promedical.bench.measures import Measure, per_item
from promedical.bench.metrics import BenchError
from promedical.bench.suites.criteria import scores_of
from promedical.bench.suites.suite import Bench, Suite, Verdicts
from promedical.rubric import Preference

__all__ = ["SUITE"]

FORM = "nothing: it travels with the package"
LABELS = {
    "left_out": "A must-have left out",
    "removed": "A must-have taken out",
    "changed": "A must-have changed",
    "violation": "A violation put in",
    "claimed_credential": "A credential claimed",
}
MAIN = ("left_out", "changed", "violation", "any.against")


@cache
def _pairs() -> Counterfactual:
    from promedical.demo.kqa import load_kqa

    return counterfactual_pairs(load_kqa().bench)


def _read(rows: Path | None, calibration: Path | None) -> Bench:
    for name, given in (("rows", rows), ("calibration", calibration)):
        if given is not None:
            raise BenchError(
                f"--{name}: found {given}, but the pairs are built from K-QA, which travels with "
                "the package"
            )
    pairs: dict[str, list[tuple[str, str]]] = {}
    for pair in _pairs().pairs:
        pairs.setdefault(pair.instruction, []).append((pair.first, pair.second))
    return Bench(
        _pairs().rows,
        pairs={row: list(dict.fromkeys(found)) for row, found in pairs.items()},
        notes=(
            "Answers are assembled from physicians' statements; 50 per cent is chance. Where a "
            "surface pulls against the criterion, a grader that follows the surface is below 50.",
        ),
    )


def _grader(bench: Bench, graded: Graded) -> tuple[Counterfactual, Any]:
    """The pairs of the rows that are asked about, and what the grader gave as scores or choices."""
    wanted = {row.id for row in bench.rows}
    whole = _pairs()
    pairs = tuple(pair for pair in whole.pairs if pair.instruction in wanted)
    asked = Counterfactual(bench.rows, pairs, whole.counts, whole.seed)
    overall = {
        (i, r): response.overall
        for i, row in graded.items()
        for r, response in row.responses.items()
        if response.overall is not None
    }
    scores = scores_of(graded)
    if scores or overall:
        return asked, GraderScores(scores or None, overall or None)
    return asked, {pair.id: _choice(graded, pair) for pair in pairs}


def _nothing(given: Any) -> bool:
    return not isinstance(given, GraderScores) and set(given.values()) <= {Preference.UNRESOLVED}


def _choice(graded: Graded, pair: MinimalPair) -> Preference:
    row = graded.get(pair.instruction)
    credit = math.nan if row is None else row.prefers(pair.first, pair.second)
    if math.isnan(credit):
        return Preference.UNRESOLVED
    return (
        Preference.FIRST if credit > 0.5 else Preference.SECOND if credit < 0.5 else Preference.TIE
    )


def _measures(bench: Bench, graded: Graded, verdicts: Verdicts) -> dict[str, Measure]:
    """How often the criterion is followed, by what differs; and against a surface."""
    asked, given = _grader(bench, graded)
    if _nothing(given):  # every judgment failed: all pairs are unscored
        values: Floats | None = np.full(len(asked.pairs), np.nan)
    else:
        found = credits(asked, "grader", given)
        values = found.whole if found.criterion is None else found.criterion
    assert values is not None
    of = groups()
    sections = {
        **{name: (label, of["follows"][name]) for name, label in LABELS.items()},
        "any.against": ("With a surface against it", of["sides"]["any.against"]),
        "any.with": ("With a surface for it", of["sides"]["any.with"]),
    }
    measures = {}
    for name, (label, belongs) in sections.items():
        chosen = [k for k, pair in enumerate(asked.pairs) if belongs(pair)]
        scored = [k for k in chosen if not np.isnan(values[k])]
        measures[name] = per_item(
            label,
            "pairs",
            {asked.pairs[k].id: (asked.pairs[k].instruction, float(values[k])) for k in scored},
            unscored=len(chosen) - len(scored),
            main=name in MAIN,
        )
    return measures


def _details(
    bench: Bench, graded: Graded, verdicts: Verdicts, bootstrap: Bootstrap
) -> Mapping[str, Any]:
    asked, given = _grader(bench, graded)
    if _nothing(given):
        return {}
    table = evaluate_counterfactual(
        asked, {"system": given}, resamples=bootstrap.resamples, seed=bootstrap.seed
    )
    return {"counterfactual": table["graders"]["system"], "counts": table["counts"]}


SUITE = Suite(
    "counterfactual",
    "Counterfactual minimal pairs",
    FORM,
    _read,
    grader=_measures,
    grader_details=_details,
)
