"""What a reward model is worth while it is trained: figures per tier on an evaluation split.

For each tier that the split has (section 6): within-criterion accuracy, pointwise AUROC with the
AUROC of the criterion's text alone beside it, the mean margin r(better) − r(worse), and the
expected calibration error of σ(s); and the accuracy of the overall question's own score. A scalar
model (`asks` not "criteria") has one score a response, which stands for each criterion, and no
calibration error. Definitions are the bench's; intervals, thresholds and every other table are left
to `promedical.bench.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from promedical.bench import metrics
from promedical.bench.intervals import Floats, Statistic, auroc
from promedical.bench.metrics import Leaves, OverallPairs, WithinPairs
from promedical.records import GradedInstruction
from promedical.reward_model.instances import Asks, overall_question
from promedical.reward_model.render import Renderer
from promedical.reward_model.tree import PackedRow, Tree, pack
from promedical.rubric import Tier

__all__ = ["EvaluationSet", "evaluation_set"]

# (instruction, response, criterion), or (instruction, response) for the overall question.
Key = tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """The evaluation split as rows to score, and what its scores are measured against.

    Args:
        rows: packed rows.
        keys: for each row, what its leaves ask.
        left_out: leaves whose path is longer than a row; they count as unscored.
        gold, pairs, overall: the bench's item sets.
        null: per tier the AUROC of the criterion's text alone, fitted on the training rows; None
            where it is undefined.
        scalar: whether the model has one score a response.
    """

    rows: tuple[PackedRow, ...]
    keys: tuple[tuple[Key, ...], ...]
    left_out: int
    gold: Leaves
    pairs: WithinPairs
    overall: OverallPairs
    null: Mapping[Tier, float | None]
    scalar: bool = False

    def measure(self, scores: Mapping[Key, float]) -> dict[str, float]:
        """Figures by name; one that is undefined (no such pairs, one class alone) is left out.

        Args:
            scores: raw s of every key.
        """
        whole = {(key[0], key[1]): s for key, s in scores.items() if len(key) == 2}
        leaf = {(key[0], key[1], key[2]): s for key, s in scores.items() if len(key) == 3}
        s = self.gold.scores_of_responses(whole) if self.scalar else self.gold.scores(leaf)
        found: dict[str, float | None] = {}
        for tier in Tier:
            found |= {f"{tier.value}_{k}": v for k, v in self._of_tier(tier, s).items()}
        outcomes = metrics.overall_from_scores(self.overall, whole)
        if whole and len(outcomes.credit):
            found["overall_accuracy"] = float(outcomes.credit.mean())
        found["unscored"] = float(np.isnan(s).sum())
        return {name: value for name, value in found.items() if value is not None}

    def _of_tier(self, tier: Tier, s: Floats) -> dict[str, float | None]:
        here = self.pairs.of(tier)
        credit = metrics.within_credit(self.gold, self.pairs, s)[here]
        gap = s[self.pairs.better[here]] - s[self.pairs.worse[here]]
        found = {
            "within": _mean(credit),
            "margin": _mean(metrics.orientation(tier) * gap),
            "auroc": _auroc(self.gold, s, tier),
            "auroc_criterion_alone": self.null[tier],
        }
        if not self.scalar:
            found["ece"] = _value(metrics.reliability(self.gold, s, tier)[1], self.gold)
        return found


def evaluation_set(
    rows: Sequence[GradedInstruction],
    train_rows: Sequence[GradedInstruction],
    renderer: Renderer,
    *,
    max_tokens: int,
    asks: Asks = "criteria",
) -> EvaluationSet:
    """Lay an evaluation split out for scoring.

    Args:
        rows: graded rows; no id may also be in `train_rows`.
        train_rows: what the criterion-alone null grader is fitted on.
        max_tokens: longest row.
        asks: what the model is asked, as in `promedical.reward_model.recipe`.

    Raises:
        BenchError: no rows, one without a rubric, an id that occurs twice or is in both.
    """
    gold = metrics.leaves(rows)
    trees: list[Tree] = []
    keys: list[list[Key]] = []
    left_out = 0
    for row in rows:
        assert row.rubric is not None  # `leaves` has looked
        asked: list[tuple[int, str]] = []
        named: list[Key] = []
        question = overall_question(row, asks)
        for number, response in enumerate(row.responses):
            if asks == "criteria":
                known = [
                    c for c in row.rubric.criteria if (row.id, response.id, c.id) in gold.index
                ]
                asked += [(number, c.text) for c in known]
                named += [(row.id, response.id, c.id) for c in known]
            asked.append((number, question))
            named.append((row.id, response.id))
        tree = renderer.tree(row.messages, [r.text for r in row.responses], asked)
        fits = [
            len(tree.prompt) + len(tree.responses[leaf.response]) + len(leaf.tokens) <= max_tokens
            for leaf in tree.leaves
        ]
        left_out += fits.count(False)
        if any(fits):
            leaves = tuple(leaf for leaf, fit in zip(tree.leaves, fits, strict=True) if fit)
            trees.append(replace(tree, leaves=leaves))
            keys.append([key for key, fit in zip(named, fits, strict=True) if fit])
    packed = pack(trees, max_tokens).rows
    return EvaluationSet(
        packed,
        tuple(tuple(keys[leaf.tree][leaf.leaf] for leaf in row.leaves) for row in packed),
        left_out,
        gold,
        metrics.within_pairs(gold),
        metrics.overall_pairs(rows),
        _criterion_alone(train_rows, rows, gold),
        scalar=asks != "criteria",
    )


def _criterion_alone(
    train_rows: Sequence[GradedInstruction], rows: Sequence[GradedInstruction], gold: Leaves
) -> dict[Tier, float | None]:
    """AUROC per tier of a grader that reads the criterion's text and nothing else."""
    from promedical.bench.baselines import null_graders

    # The other null graders come with it; without the answers' text they cost nothing.
    bare = [
        replace(row, responses=tuple(replace(r, text=".") for r in row.responses))
        for row in train_rows
    ]
    scores = null_graders(bare, rows)["criterion_alone"].scores
    assert scores is not None
    s = gold.scores(scores)
    return {tier: _auroc(gold, s, tier) for tier in Tier}


def _auroc(gold: Leaves, s: Floats, tier: Tier) -> float | None:
    here = gold.of(tier) & ~np.isnan(s)
    area = auroc(
        s[here], gold.positive[here], gold.instruction[here], gold.n_instructions, "verdicts"
    )
    return _value(area, gold)


def _value(statistic: Statistic, gold: Leaves) -> float | None:
    value = float(statistic.values(np.ones((1, gold.n_instructions)))[0])
    return None if np.isnan(value) else value


def _mean(values: Floats) -> float | None:
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if len(scored) else None
