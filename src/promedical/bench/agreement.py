"""Agreement between physicians, and a grader beside them, on votes a criterion (section 6).

Cohen's κ by pairs of vote columns, Fleiss' κ over all columns, each with raw agreement and
prevalence, because κ alone cannot be read where one label dominates; and the human ceiling: each
physician against the other two where these agree, with the grader on the same items.

    Cohen         κ = (p_o − p_e) / (1 − p_e),  p_o = Σ_kl w_kl p_kl,  p_e = Σ_kl w_kl p_k q_l
    Fleiss        κ = (P̄ − P̄_e) / (1 − P̄_e),  P̄_e = Σ_kl w_kl π_k π_l
                  P_i = Σ_k n_ik (Σ_l w_kl n_il − 1) / (m_i (m_i − 1))
    Gwet          AC1 as Fleiss' κ, but with chance agreement Σ_k π_k (1 − π_k) / (K − 1)
    Krippendorff  α = 1 − (n − 1) Σ_kl o_kl δ²_kl / Σ_kl n_k n_l δ²_kl, from coincidences o_kl

Votes are columns (slots), which need not be the same persons in every row; −1 is no vote, and m_i
is how many an item has. w is the identity except where weights are asked for, which only an ordered
scale allows: w_kl = 1 − (|k − l| / (K − 1))^p, p = 1 linear, p = 2 quadratic.
Fleiss, J. L. (1971), Psychological Bulletin 76, 378–382; with missing votes and AC1: Gwet, K. L.
(2014), Handbook of Inter-Rater Reliability, 4th ed.; Krippendorff, K. (2011), Computing
Krippendorff's Alpha-Reliability.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from promedical.bench import intervals
from promedical.bench.intervals import Bootstrap, Floats, Ints, Statistic
from promedical.bench.metrics import BenchError, LeafKey
from promedical.records import GradedInstruction

__all__ = [
    "Votes",
    "agreement",
    "cohen_kappa",
    "fleiss_kappa",
    "gwet_ac1",
    "human_ceiling",
    "krippendorff_alpha",
    "pair_agreement",
    "votes",
]

Bools = NDArray[np.bool_]
POSITIVE = "Entailment"
Weights = Literal["linear", "quadratic"] | None
ONE_LABEL = "one label only"
NO_PAIR = "no item with two votes"


@dataclass(frozen=True)
class Votes:
    """Every (response, criterion) that physicians voted on.

    Args:
        keys: [items], (instruction id, response id, criterion id).
        instruction: [items], index of the row.
        labels: [items, columns], codes into `names`.
        names: the labels, sorted.
        n_instructions: number of rows.
    """

    keys: tuple[LeafKey, ...]
    instruction: Ints
    labels: Ints
    names: tuple[str, ...]
    n_instructions: int

    def binary(self, positive: str = POSITIVE) -> Votes:
        """The same votes as positive or not."""
        codes = [name == positive for name in self.names]
        labels = np.array(codes, dtype=np.int64)[self.labels]
        names = (f"not {positive}", positive)
        return Votes(self.keys, self.instruction, labels, names, self.n_instructions)


def votes(rows: Sequence[GradedInstruction], *, first: int | None = None) -> Votes:
    """Collect the votes of rows whose criteria were all voted on by equally many physicians.

    Args:
        first: take only so many votes of each item, its first. A bench made by adjudication has
            the independent readers' votes first and the third reader's, where there is one, after
            them.

    Raises:
        BenchError: no votes, or an item with another number of votes than the first.
    """
    keys: list[LeafKey] = []
    instruction: list[int] = []
    given: list[tuple[str, ...]] = []
    for i, row in enumerate(rows):
        for response in row.responses:
            for criterion_id, all_cast in response.votes.items():
                cast = all_cast[:first]
                expected = len(given[0]) if given else first
                if expected is not None and len(cast) != expected:
                    raise BenchError(
                        f"instruction {row.id!r}: response {response.id!r}: criterion "
                        f"{criterion_id!r}: found {len(cast)} votes, expected {expected}"
                    )
                keys.append((row.id, response.id, criterion_id))
                instruction.append(i)
                given.append(cast)
    if not given or len(given[0]) < 2:
        raise BenchError("votes: found none by two or more physicians")
    names = tuple(sorted({label for cast in given for label in cast}))
    code = {name: k for k, name in enumerate(names)}
    labels = np.array([[code[label] for label in cast] for cast in given], dtype=np.int64)
    return Votes(tuple(keys), np.array(instruction, dtype=np.int64), labels, names, len(rows))


def _weights(n_labels: int, weights: Weights) -> Floats:
    """[labels, labels], how much of an agreement two labels are."""
    if weights is None:
        return np.eye(n_labels)
    if weights not in ("linear", "quadratic"):
        raise BenchError(f"weights: found {weights!r}, expected None, 'linear' or 'quadratic'")
    code = np.arange(n_labels)
    apart = np.abs(code[:, None] - code) / max(n_labels - 1, 1)
    return 1.0 - (apart if weights == "linear" else apart**2)


def cohen_kappa(
    a: Ints, b: Ints, n_labels: int, instruction: Ints, n: int, *, weights: Weights = None
) -> Statistic:
    """Cohen's κ of two columns of label codes; undefined if chance agreement is 1.

    Args:
        a, b: [items], label codes; with weights, in the order of the scale.
        n_labels: how many labels the scale has.
        instruction: [items], index of every item's instruction.
        n: number of instructions.
        weights: None for nominal labels; only an ordered scale has others.
    """
    sums = np.zeros((len(a), n_labels * n_labels))
    sums[np.arange(len(a)), a * n_labels + b] = 1
    w = _weights(n_labels, weights)

    def formula(t: Floats) -> Floats:
        table = t.reshape(-1, n_labels, n_labels)
        total = table.sum(axis=(1, 2))
        observed = (table * w).sum(axis=(1, 2)) / total
        rows, columns = table.sum(axis=2), table.sum(axis=1)
        chance = ((rows @ w) * columns).sum(axis=1) / total**2
        return _kappa(observed, chance)

    return intervals.of_sums(
        sums, instruction, n, formula, "items", ONE_LABEL if len(a) else NO_PAIR
    )


def _tallies(labels: Ints, n_labels: int) -> Floats:
    """[items, labels], how many voted so; −1 is no vote."""
    return (labels[:, :, None] == np.arange(n_labels)).sum(axis=1).astype(np.float64)


def _agreeing(tallies: Floats, w: Floats) -> tuple[Floats, Floats]:
    """[items], the share of pairs of votes that agree, and whether there is a pair at all."""
    m = tallies.sum(axis=1)
    paired = m >= 2
    possible = np.where(paired, m * (m - 1), 1.0)
    agreeing = (tallies * (tallies @ w - 1)).sum(axis=1) / possible
    return np.where(paired, agreeing, 0.0), paired.astype(np.float64)


def _over_all(
    labels: Ints,
    n_labels: int,
    instruction: Ints,
    n: int,
    w: Floats,
    chance_of: Callable[[Floats], Floats],
) -> Statistic:
    """A κ over all columns: agreement over items with two votes, prevalence π over all items."""
    tallies = _tallies(labels, n_labels)
    voted = tallies.sum(axis=1) > 0
    tallies, instruction = tallies[voted], instruction[voted]
    agreeing, paired = _agreeing(tallies, w)
    share = tallies / tallies.sum(axis=1, keepdims=True)
    sums = np.column_stack([share, np.ones(len(tallies)), agreeing, paired])

    def formula(t: Floats) -> Floats:
        prevalence = t[:, :n_labels] / t[:, n_labels, None]
        return _kappa(t[:, -2] / t[:, -1], chance_of(prevalence))

    reason = ONE_LABEL if paired.any() else NO_PAIR
    return intervals.of_sums(sums, instruction, n, formula, "items", reason)


def fleiss_kappa(
    labels: Ints, n_labels: int, instruction: Ints, n: int, *, weights: Weights = None
) -> Statistic:
    """Fleiss' κ over all columns; undefined if chance agreement is 1.

    Args:
        labels: [items, columns], label codes, −1 for no vote.
        n_labels, instruction, n, weights: as for `cohen_kappa`.
    """
    w = _weights(n_labels, weights)
    return _over_all(labels, n_labels, instruction, n, w, lambda p: ((p @ w) * p).sum(axis=1))


def gwet_ac1(labels: Ints, n_labels: int, instruction: Ints, n: int) -> Statistic:
    """Gwet's AC1 over all columns, which prevalence moves less than κ.

    Args:
        labels, instruction, n: as for `fleiss_kappa`.
        n_labels: K, the labels the scale has, whether or not all occur; chance depends on it.
    """

    def chance(prevalence: Floats) -> Floats:
        spread: Floats = (prevalence * (1 - prevalence)).sum(axis=1) / max(n_labels - 1, 1)
        return spread

    return _over_all(labels, n_labels, instruction, n, np.eye(n_labels), chance)


def pair_agreement(labels: Ints, n_labels: int, instruction: Ints, n: int) -> Statistic:
    """The share of pairs of votes on one item that agree, mean over items with two votes."""
    agreeing, paired = _agreeing(_tallies(labels, n_labels), np.eye(n_labels))
    keep = paired > 0
    return intervals.mean(agreeing[keep], instruction[keep], n, "items")


def krippendorff_alpha(
    labels: Ints,
    n_labels: int,
    instruction: Ints,
    n: int,
    *,
    level: Literal["nominal", "ordinal"] = "nominal",
) -> Statistic:
    """Krippendorff's α over all columns; undefined if only one label occurs.

    δ²_kl is 1 for two different nominal labels; for ordinal ones it is
    (Σ_{g=k..l} n_g − (n_k + n_l)/2)², so it depends on the votes of the resample.

    Args:
        labels, n_labels, instruction, n: as for `fleiss_kappa`.
        level: "ordinal" only for codes in the order of the scale.
    """
    if level not in ("nominal", "ordinal"):
        raise BenchError(f"level: found {level!r}, expected 'nominal' or 'ordinal'")
    tallies = _tallies(labels, n_labels)
    pairable = tallies.sum(axis=1) >= 2
    tallies, instruction = tallies[pairable], instruction[pairable]
    others = tallies.sum(axis=1) - 1
    together = tallies[:, :, None] * (tallies[:, None, :] - np.eye(n_labels))
    sums = (together / others[:, None, None]).reshape(len(tallies), n_labels * n_labels)

    def apart(n_k: Floats) -> Floats:
        """[resamples, labels, labels], δ²."""
        if level == "nominal":
            return np.broadcast_to(1 - np.eye(n_labels), (len(n_k), n_labels, n_labels))
        # The votes below the middle of a label; the difference of two is δ.
        middle = np.cumsum(n_k, axis=1) - n_k / 2
        squared: Floats = (middle[:, :, None] - middle[:, None, :]) ** 2
        return squared

    def formula(t: Floats) -> Floats:
        coincidences = t.reshape(-1, n_labels, n_labels)
        n_k = coincidences.sum(axis=2)
        distance = apart(n_k)
        seen = (coincidences * distance).sum(axis=(1, 2))
        expected = (n_k[:, :, None] * n_k[:, None, :] * distance).sum(axis=(1, 2))
        alpha: Floats = 1 - (n_k.sum(axis=1) - 1) * seen / expected
        return np.where(expected > 1e-9, alpha, np.nan)

    reason = ONE_LABEL if len(tallies) else NO_PAIR
    return intervals.of_sums(sums, instruction, n, formula, "items", reason)


def _kappa(observed: Floats, chance: Floats) -> Floats:
    possible = 1 - chance
    kappa: Floats = (observed - chance) / possible
    return np.where(possible > 1e-12, kappa, np.nan)


def agreement(cast: Votes, bootstrap: Bootstrap) -> dict[str, Any]:
    """Cohen's κ by pairs of columns and Fleiss' κ, with raw agreement, prevalence beside each."""
    k, where, n = len(cast.names), cast.instruction, cast.n_instructions
    columns = range(cast.labels.shape[1])

    def prevalence(labels: Ints) -> dict[str, float]:
        return {name: float((labels == code).mean()) for code, name in enumerate(cast.names)}

    pairs = []
    agreed = np.zeros(len(cast.labels))
    for a, b in itertools.combinations(columns, 2):
        first, second = cast.labels[:, a], cast.labels[:, b]
        same = (first == second).astype(np.float64)
        agreed += same
        pairs.append(
            {
                "columns": [a + 1, b + 1],
                "cohen_kappa": bootstrap.figure(cohen_kappa(first, second, k, where, n)).to_json(),
                "raw_agreement": bootstrap.figure(
                    intervals.mean(same, where, n, "items")
                ).to_json(),
                "prevalence": [prevalence(first), prevalence(second)],
            }
        )
    all_same = (cast.labels == cast.labels[:, :1]).all(axis=1).astype(np.float64)
    return {
        "labels": list(cast.names),
        "pairs": pairs,
        "fleiss_kappa": bootstrap.figure(fleiss_kappa(cast.labels, k, where, n)).to_json(),
        "raw_agreement": bootstrap.figure(
            intervals.mean(agreed / len(pairs), where, n, "items")
        ).to_json(),
        "unanimous": bootstrap.figure(intervals.mean(all_same, where, n, "items")).to_json(),
        "prevalence": prevalence(cast.labels),
    }


def _where_others_agree(cast: Votes, column: int) -> tuple[Ints, Ints]:
    """Items on which all columns but one give the same label, and that label."""
    others = np.delete(cast.labels, column, axis=1)
    items = np.flatnonzero((others == others[:, :1]).all(axis=1))
    return items, others[items, 0]


@dataclass(frozen=True)
class _Stack:
    """Items with the label the other physicians agree on, over one or all columns."""

    items: Ints
    gold: Bools
    physician: Bools


def human_ceiling(
    cast: Votes,
    graders: Mapping[str, tuple[Floats, Floats]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Each physician against the others where these agree, and every grader on the same items.

    The label is binary. A vote is a yes or no, for which AUROC and balanced accuracy are the same
    number, so a grader's AUROC and balanced accuracy both stand beside the physician's balanced
    accuracy. "all" stacks the items of every column; an item then counts once for every column
    whose others agree on it.

    Args:
        cast: binary votes, label 1 positive.
        graders: name → ([items] raw scores, [items] predicted verdicts 1, 0), NaN where missing.
    """
    if len(cast.names) != 2:
        raise BenchError(f"votes: found labels {list(cast.names)}, expected binary votes")
    parts = []
    for column in range(cast.labels.shape[1]):
        items, gold = _where_others_agree(cast, column)
        parts.append(_Stack(items, gold == 1, cast.labels[items, column] == 1))
    whole = _Stack(*(np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])))
    named = {f"column_{i + 1}": part for i, part in enumerate(parts)} | {"all": whole}
    return {
        name: {
            "physician": _physician(cast, part, bootstrap),
            "graders": {
                grader: _grader(cast, part, s, verdicts, bootstrap)
                for grader, (s, verdicts) in graders.items()
            },
        }
        for name, part in named.items()
    }


def _balanced(cast: Votes, part: _Stack, predicted: Bools, keep: Bools) -> Statistic:
    where = cast.instruction[part.items[keep]]
    return intervals.balanced_accuracy(
        part.gold[keep], predicted[keep], where, cast.n_instructions, "items"
    )


def _physician(cast: Votes, part: _Stack, bootstrap: Bootstrap) -> dict[str, Any]:
    right = (part.physician == part.gold).astype(np.float64)
    where = cast.instruction[part.items]
    every = np.ones(len(part.items), dtype=np.bool_)
    statistics = {
        "accuracy": intervals.mean(right, where, cast.n_instructions, "items"),
        "balanced_accuracy": _balanced(cast, part, part.physician, every),
    }
    shown: dict[str, Any] = {k: f.to_json() for k, f in bootstrap.figures(statistics).items()}
    shown["prevalence"] = float(part.gold.mean()) if len(part.gold) else None
    return shown


def _grader(
    cast: Votes, part: _Stack, s: Floats, verdicts: Floats, bootstrap: Bootstrap
) -> dict[str, Any]:
    s, verdicts = s[part.items], verdicts[part.items]
    scored, decided = ~np.isnan(s), ~np.isnan(verdicts)
    predicted = verdicts == 1
    accuracy = intervals.mean(
        (predicted == part.gold)[decided].astype(np.float64),
        cast.instruction[part.items[decided]],
        cast.n_instructions,
        "items",
    )
    auroc = intervals.auroc(
        s[scored],
        part.gold[scored],
        cast.instruction[part.items[scored]],
        cast.n_instructions,
        "items",
    )
    balanced = _balanced(cast, part, predicted, decided)
    difference = bootstrap.difference(balanced, _balanced(cast, part, part.physician, decided))
    return {
        "auroc": bootstrap.figure(auroc).to_json(),
        "accuracy": bootstrap.figure(accuracy).to_json(),
        "balanced_accuracy": bootstrap.figure(balanced).to_json(),
        "balanced_accuracy_minus_physician": difference.to_json(),
        "unscored": int((~scored).sum()),
        "without_verdict": int((~decided).sum()),
    }
