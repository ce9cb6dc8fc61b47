"""The training loss of Explicit Criteria Injection (section 4).

    r = o_c·s                              o_c = −1 for a veto, else +1
    L_pair  = −log σ(r(y_w) − r(y_l))      the paper's loss
    L_point = BCE(σ(s), criterion met)     identifies "is it satisfied?", which L_pair leaves open

`pair_weighting="unit"`: L = Σ_units w_tier (mean L_pair + μ·mean L_point) / units.
`pair_weighting="pair"`: L = Σ_pairs w_tier L_pair / pairs, the paper's formula and TRL's.

With `ties`, two responses with the same verdict on a criterion are compared too, and L_pair is the
negative log-likelihood of a model with three outcomes (`_compared_loss`).

The means are over a unit's whole tree, so each term's weight is fixed before the tree is packed. A
unit counts in the divisor where its terms are, each by its share of the unit's weight. So the loss
and its gradient are the same however trees are packed, accumulated or spread over processes, and a
tree whose rows fall into two optimiser steps counts in each by what that step reads of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from promedical.reward_model.instances import TrainingTree, Unit
from promedical.reward_model.tree import PackedRow, Packing, RowBudgetError, pack

__all__ = [
    "LossTerms",
    "PairWeighting",
    "Ties",
    "TrainingRow",
    "pack_training_trees",
    "rubric_loss",
]

PairWeighting = Literal["unit", "pair"]
Ties = Literal["none", "davidson", "rao_kupper"]


@dataclass(frozen=True)
class LossTerms:
    """The terms of one row; indices are into the row's leaves.

    Args:
        pairs: (better, worse, orientation o_c, weight).
        points: (leaf, 1 if the sentence is true else 0, weight).
        items: how much the row adds to the divisor of the optimiser step; a unit that is split over
            rows adds a part of 1 in each, a row without terms adds 0.
        ties: (one, other, weight); empty if `tie_model` is "none".
        tie_model: how likely a tie is, see `pack_training_trees`.
        nu: the tie parameter ν, above 0.
    """

    pairs: tuple[tuple[int, int, int, float], ...]
    points: tuple[tuple[int, int, float], ...]
    items: float
    ties: tuple[tuple[int, int, float], ...] = ()
    tie_model: Ties = "none"
    nu: float = 1.0


@dataclass(frozen=True)
class TrainingRow:
    """A packed row and what the loss takes from it."""

    row: PackedRow
    terms: LossTerms


@dataclass(frozen=True)
class _Compared:
    """Two leaves compared: the first better (o_c = ±1), or a tie (o_c = 0)."""

    leaves: tuple[int, int]
    orientation: int
    weight: float
    share: float


@dataclass(frozen=True)
class _Point:
    """A leaf with a known label."""

    target: int
    weight: float
    share: float


def pack_training_trees(
    trees: Sequence[TrainingTree],
    max_tokens: int,
    *,
    mu: float = 1.0,
    tier_weights: Mapping[str, float] | None = None,
    pair_weighting: PairWeighting = "unit",
    ties: Ties = "none",
    nu: float = 1.0,
    share_rows: bool = False,
) -> tuple[list[TrainingRow], Packing]:
    """Pack trees into rows of at most `max_tokens` tokens, with the loss terms of each.

    Args:
        mu: weight μ of the pointwise term; "pair" weighting has none.
        tier_weights: w_tier by tier name ("overall" too), 1 where absent.
        ties: the model of ties; the units' own ties (`training_trees(…, ties=True)`) are used with
            "davidson" and "rao_kupper" and count as pairs do, "none" leaves them out.
        nu: the tie parameter ν > 0, fixed: at equal scores a tie has probability ν / (2 + ν).
        share_rows: let several trees share a row, see `promedical.reward_model.tree.pack`.

    Raises:
        ValueError: `pair_weighting` or `ties` is unknown, or `nu` is not above 0.
        RowBudgetError: one pair alone exceeds the budget; the message names the instruction.
    """
    for name, found, known in (
        ("pair_weighting", pair_weighting, get_args(PairWeighting)),
        ("ties", ties, get_args(Ties)),
    ):
        if found not in known:
            raise ValueError(f"{name}: found {found!r}, expected one of {', '.join(known)}")
    if not (nu > 0 and math.isfinite(nu)):
        raise ValueError(f"nu: found {nu}, expected a number above 0")
    compared: list[list[_Compared]] = []
    points: list[dict[int, _Point]] = []
    for tree in trees:
        compared.append([])
        points.append({})
        for unit in tree.units:
            w = 1.0 if tier_weights is None else tier_weights.get(unit.tier, 1.0)
            pairs, single = _unit_terms(unit, w, mu, pair_weighting, ties != "none")
            compared[-1] += pairs
            points[-1] |= single
    try:
        packing = pack(
            [tree.tree for tree in trees],
            max_tokens,
            [[term.leaves for term in terms] for terms in compared],
            points,
            share_rows=share_rows,
        )
    except RowBudgetError as error:
        raise RowBudgetError(
            f"instruction {trees[error.tree].instruction_id!r}: {error}; raise it, or leave out "
            "what is longer with train.too_long: leave_out",
            error.tree,
        ) from None
    return [
        TrainingRow(row, _row_terms(row, compared, points, ties, nu)) for row in packing
    ], packing


def _unit_terms(
    unit: Unit, w: float, mu: float, pair_weighting: PairWeighting, with_ties: bool
) -> tuple[list[_Compared], dict[int, _Point]]:
    """A unit's terms: their weights in the loss, and their shares of the divisor."""
    both = [(pair, unit.orientation) for pair in unit.pairs]
    if with_ties:
        both += [(pair, 0) for pair in unit.ties]
    if pair_weighting == "pair":
        return [_Compared(pair, o_c, w, 1.0) for pair, o_c in both], {}
    labels = unit.points if mu > 0 else ()
    # Each term's part of (mean L_pair + μ·mean L_point), and of the unit's whole.
    of_pair, of_point = 1 / max(1, len(both)), mu / max(1, len(labels))
    whole = of_pair * len(both) + of_point * len(labels)
    return (
        [_Compared(pair, o_c, w * of_pair, of_pair / whole) for pair, o_c in both],
        {leaf: _Point(true, w * of_point, of_point / whole) for leaf, true in labels},
    )


def _row_terms(
    row: PackedRow,
    compared: Sequence[Sequence[_Compared]],
    points: Sequence[Mapping[int, _Point]],
    tie_model: Ties,
    nu: float,
) -> LossTerms:
    """The terms that count in a row: its pairs, and its labels unless an earlier row had them."""
    row_pairs, row_ties, row_points, shares = [], [], [], []
    for pair in row.pairs:
        term = compared[pair.tree][pair.pair]
        shares.append(term.share)
        if term.orientation:
            row_pairs.append((pair.first, pair.second, term.orientation, term.weight))
        else:
            row_ties.append((pair.first, pair.second, term.weight))
    for i, leaf in enumerate(row.leaves):
        label = points[leaf.tree].get(leaf.leaf)
        if label is not None and not leaf.repeat:
            shares.append(label.share)
            row_points.append((i, label.target, label.weight))
    return LossTerms(
        tuple(row_pairs), tuple(row_points), math.fsum(shares), tuple(row_ties), tie_model, nu
    )


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
        loss = loss + (w * _compared_loss(margin, terms.tie_model, terms.nu)).sum()
    if terms.ties:
        one, other, weight = zip(*terms.ties, strict=True)
        margin = scores[list(one)] - scores[list(other)]
        w = torch.tensor(weight, device=scores.device)
        loss = loss + (w * _compared_loss(margin, terms.tie_model, terms.nu, tied=True)).sum()
    if terms.points:
        leaf, target, weight = zip(*terms.points, strict=True)
        loss = loss + F.binary_cross_entropy_with_logits(
            scores[list(leaf)],
            torch.tensor(target, dtype=torch.float32, device=scores.device),
            weight=torch.tensor(weight, device=scores.device),
            reduction="sum",
        )
    return loss


def _compared_loss(margin: Tensor, tie_model: Ties, nu: float, *, tied: bool = False) -> Tensor:
    """−log P(first better) or −log P(tie), from margins m = r(first) − r(second), [pairs].

        none        P(better) = σ(m)                                  Bradley–Terry
        davidson    P(better) = e^(m/2) / (e^(m/2) + e^(−m/2) + ν)    P(tie) = ν / (the same)
        rao_kupper  P(better) = σ(m − η),  η = log θ,  θ = 1 + ν      P(tie) = the rest, which is
                                                            (θ² − 1) σ(m − η) σ(−m − η)

    Sources: R. R. Davidson, On extending the Bradley–Terry model to accommodate ties in paired
    comparison experiments, JASA 65 (1970) 317–328; P. V. Rao and L. L. Kupper, Ties in
    paired-comparison experiments, JASA 62 (1967) 194–204; strengths π = e^r in both.
    """
    if tie_model == "davidson":
        log_nu = margin.new_tensor(math.log(nu))
        total = torch.logaddexp(torch.logaddexp(margin / 2, -margin / 2), log_nu)
        return total - (log_nu if tied else margin / 2)
    if tie_model == "rao_kupper":
        eta = math.log1p(nu)
        better = F.softplus(eta - margin)
        if not tied:
            return better
        return better + F.softplus(eta + margin) - math.log(nu * (2 + nu))  # θ² − 1 = ν (2 + ν)
    return -F.logsigmoid(margin)
