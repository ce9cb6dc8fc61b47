"""How sure a grader is, and how far physicians get: three tables beside a suite's figures.

    abstention            risk against coverage a tier, where thresholds were fitted (`abstention`)
    recall_at_precision   of violations, the best recall that a cut of the stated precision reaches;
                          it describes the order of the scores and promises nothing for new answers
    ceiling               each physician against the others where these agree, and the grader on the
                          same items, where rows carry the single votes (`agreement`)

Kept in `result.json` under "details"; what cannot be had is left out. Definitions are left to the
modules named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from promedical.bench import agreement, intervals, metrics
from promedical.bench.abstention import abstention_curve
from promedical.bench.graded import Graded
from promedical.bench.intervals import Bootstrap, Floats
from promedical.bench.metrics import BenchError, Leaves, Threshold
from promedical.bench.suites.criteria import scores_of
from promedical.bench.suites.suite import Bench, Verdicts
from promedical.rubric import Tier

__all__ = ["PRECISIONS", "certainty_details"]

PRECISIONS = (0.5, 0.8, 0.9)
COVERAGES = (0.25, 0.5, 0.75, 1.0)
SYSTEM = "system"


def certainty_details(
    bench: Bench,
    graded: Graded,
    verdicts: Verdicts,
    thresholds: Mapping[str, Mapping[str, Any]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The three tables.

    Args:
        verdicts: (instruction, response, criterion) → 1 met, 0 unmet, as the grader decided.
        thresholds: tier → `Threshold` as JSON; empty where the grader decided by itself.
        bootstrap: over the bench's rows.

    Returns:
        JSON types, each key only where it can be had; a ceiling that cannot be, with the reason.
    """
    given = scores_of(graded)
    if not given:
        return {}
    gold = metrics.leaves(bench.rows)
    s = gold.scores(given)
    decided = np.array([verdicts.get(key, math.nan) for key in gold.keys], dtype=np.float64)
    found: dict[str, Any] = {}
    if thresholds:
        cuts = {Tier(name): Threshold(**given) for name, given in thresholds.items()}
        found["abstention"] = {
            tier.value: abstention_curve(gold, s, cuts, tier, bootstrap, coverages=COVERAGES)
            for tier in Tier
            if gold.of(tier).any()
        }
    violated = _recall_at_precision(gold, s, bootstrap)
    if violated:
        found["recall_at_precision"] = violated
    if any(response.votes for row in bench.rows for response in row.responses):
        found["ceiling"] = _ceiling(bench, gold, s, decided, bootstrap)
    return found


def _recall_at_precision(gold: Leaves, s: Floats, bootstrap: Bootstrap) -> dict[str, Any]:
    keep = gold.of(Tier.VETO) & ~np.isnan(s)
    if not gold.positive[keep].any():
        return {}
    return {
        str(precision): bootstrap.figure(
            intervals.recall_at_precision(
                s[keep],
                gold.positive[keep],
                gold.instruction[keep],
                "(answer, veto)",
                precision=precision,
            )
        ).to_json()
        for precision in PRECISIONS
    }


def _ceiling(
    bench: Bench, gold: Leaves, s: Floats, decided: Floats, bootstrap: Bootstrap
) -> dict[str, Any]:
    try:
        cast = agreement.votes(bench.rows).binary()
    except BenchError as error:  # a third reader has judged some of the items only
        return {"reason": str(error)}
    at = np.array([gold.index.get(key, -1) for key in cast.keys], dtype=np.int64)

    def on_votes(values: Floats) -> Floats:
        return np.where(at < 0, np.nan, values[at])

    own = {SYSTEM: (on_votes(s), on_votes(decided))}
    return agreement.human_ceiling(cast, own, bootstrap)
