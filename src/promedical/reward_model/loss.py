"""The training loss of Explicit Criteria Injection (section 4).

    r = o_c·s                              o_c = −1 for a veto, else +1
    L_pair  = −log σ(r(y_w) − r(y_l))      the paper's loss
    L_point = BCE(σ(s), criterion met)     identifies "is it satisfied?", which L_pair leaves open

`pair_weighting="unit"`: L = Σ_units w_tier (mean L_pair + μ·mean L_point) / units.
`pair_weighting="pair"`: L = Σ_pairs w_tier L_pair / pairs, the paper's formula and TRL's.

The means are over a unit's whole tree, so each term's weight is fixed before the tree is packed,
and the loss is the same however trees are split over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from promedical.reward_model.instances import TrainingTree
from promedical.reward_model.tree import PackedRow, Packing, pack

__all__ = ["LossTerms", "PairWeighting", "TrainingRow", "pack_training_trees", "rubric_loss"]

PairWeighting = Literal["unit", "pair"]


@dataclass(frozen=True)
class LossTerms:
    """The terms of one row; indices are into the row's leaves.

    Args:
        pairs: (better, worse, orientation o_c, weight).
        points: (leaf, 1 if the sentence is true else 0, weight).
        items: how much the row adds to the divisor of the optimiser step.
    """

    pairs: tuple[tuple[int, int, int, float], ...]
    points: tuple[tuple[int, int, float], ...]
    items: int


@dataclass(frozen=True)
class TrainingRow:
    """A packed row and what the loss takes from it."""

    row: PackedRow
    terms: LossTerms


def pack_training_trees(
    trees: Sequence[TrainingTree],
    max_tokens: int,
    *,
    mu: float = 1.0,
    tier_weights: Mapping[str, float] | None = None,
    pair_weighting: PairWeighting = "unit",
) -> tuple[list[TrainingRow], Packing]:
    """Pack trees into rows of at most `max_tokens` tokens, with the loss terms of each.

    Args:
        mu: weight μ of the pointwise term; "pair" weighting has none.
        tier_weights: w_tier by tier name ("overall" too), 1 where absent.

    Raises:
        ValueError: `pair_weighting` is unknown.
        RowBudgetError: one pair alone exceeds the budget.
    """
    if pair_weighting not in ("unit", "pair"):
        raise ValueError(f"pair_weighting: found {pair_weighting!r}, expected 'unit' or 'pair'")
    weights = {} if tier_weights is None else tier_weights
    with_points = pair_weighting == "unit" and mu > 0
    pairs = [[pair for unit in tree.units for pair in unit.pairs] for tree in trees]
    points = [
        [leaf for unit in tree.units for leaf, _ in unit.points] if with_points else []
        for tree in trees
    ]
    packing = pack([tree.tree for tree in trees], max_tokens, pairs, points)

    pair_terms: dict[tuple[int, int], tuple[int, int, float]] = {}  # → unit, o_c, weight
    point_terms: dict[tuple[int, int], tuple[int, int, float]] = {}  # → unit, target, weight
    for t, tree in enumerate(trees):
        number = 0
        for u, unit in enumerate(tree.units):
            w = weights.get(unit.tier, 1.0)
            for _ in unit.pairs:
                share = w if pair_weighting == "pair" else w / len(unit.pairs)
                pair_terms[t, number] = (u, unit.orientation, share)
                number += 1
            if with_points:
                for leaf, target in unit.points:
                    point_terms[t, leaf] = (u, target, mu * w / len(unit.points))

    rows, counted = [], set()
    for row in packing.rows:
        row_pairs, row_points, items = [], [], 0
        for pair in row.pairs:
            unit_index, orientation, weight = pair_terms[pair.tree, pair.pair]
            row_pairs.append((pair.first, pair.second, orientation, weight))
            key = (pair.tree, pair.pair if pair_weighting == "pair" else unit_index)
            items += key not in counted
            counted.add(key)
        for i, packed in enumerate(row.leaves):
            if (packed.tree, packed.leaf) in point_terms and not packed.repeat:
                unit_index, target, weight = point_terms[packed.tree, packed.leaf]
                row_points.append((i, target, weight))
                items += (packed.tree, unit_index) not in counted
                counted.add((packed.tree, unit_index))
        rows.append(TrainingRow(row, LossTerms(tuple(row_pairs), tuple(row_points), items)))
    return rows, packing


def rubric_loss(scores: Tensor, terms: LossTerms) -> Tensor:
    """A row's summed loss; divide by the `items` of the whole optimiser step.

    Args:
        scores: s of the row's leaves, shape [leaves], log-odds that the sentence is true.

    Returns:
        A scalar; 0 with a gradient path if the row has no term.
    """
    scores = scores.float()
    loss = scores.sum() * 0.0
    if terms.pairs:
        better, worse, orientation, weight = zip(*terms.pairs, strict=True)
        o_c = torch.tensor(orientation, device=scores.device)
        margin = o_c * (scores[list(better)] - scores[list(worse)])
        w = torch.tensor(weight, device=scores.device)
        loss = loss - (w * F.logsigmoid(margin)).sum()
    if terms.points:
        leaf, target, weight = zip(*terms.points, strict=True)
        loss = loss + F.binary_cross_entropy_with_logits(
            scores[list(leaf)],
            torch.tensor(target, dtype=torch.float32, device=scores.device),
            weight=torch.tensor(weight, device=scores.device),
            reduction="sum",
        )
    return loss
