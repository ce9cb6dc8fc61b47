"""Agreement between physicians, and a grader beside them, on votes a criterion (section 6).

Cohen's κ by pairs of vote columns, Fleiss' κ over all columns, each with raw agreement and
prevalence, because κ alone cannot be read where one label dominates; and the human ceiling: each
physician against the other two where these agree, with the grader on the same items.

    Cohen   κ = (p_o − p_e) / (1 − p_e),  p_e = Σ_k p_k q_k
    Fleiss  κ = (P̄ − P̄_e) / (1 − P̄_e),  P_i = (Σ_k n_ik² − m) / (m(m−1)),  P̄_e = Σ_k p_k²

Votes are columns (slots), which need not be the same persons in every row. Both κ are unweighted.
Fleiss, J. L. (1971), Psychological Bulletin 76, 378–382.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    "human_ceiling",
    "votes",
]

Bools = NDArray[np.bool_]
POSITIVE = "Entailment"


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


def votes(rows: Sequence[GradedInstruction]) -> Votes:
    """Collect the votes of rows whose criteria were all voted on by equally many physicians.

    Raises:
        BenchError: no votes, or an item with another number of votes than the first.
    """
    keys: list[LeafKey] = []
    instruction: list[int] = []
    given: list[tuple[str, ...]] = []
    for i, row in enumerate(rows):
        for response in row.responses:
            for criterion_id, cast in response.votes.items():
                if given and len(cast) != len(given[0]):
                    raise BenchError(
                        f"instruction {row.id!r}: response {response.id!r}: criterion "
                        f"{criterion_id!r}: found {len(cast)} votes, expected {len(given[0])}"
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


def cohen_kappa(a: Ints, b: Ints, n_labels: int, instruction: Ints, n: int) -> Statistic:
    """Unweighted κ of two columns of label codes; undefined if chance agreement is 1."""
    sums = np.zeros((len(a), n_labels * n_labels))
    sums[np.arange(len(a)), a * n_labels + b] = 1

    def formula(t: Floats) -> Floats:
        table = t.reshape(-1, n_labels, n_labels)
        total = table.sum(axis=(1, 2))
        observed = np.trace(table, axis1=1, axis2=2) / total
        chance = (table.sum(axis=2) * table.sum(axis=1)).sum(axis=1) / total**2
        return _kappa(observed, chance)

    return intervals.of_sums(sums, instruction, n, formula, "items", "one label only")


def fleiss_kappa(labels: Ints, n_labels: int, instruction: Ints, n: int) -> Statistic:
    """Fleiss' κ over all columns; undefined if chance agreement is 1."""
    m = labels.shape[1]
    counts = (labels[:, :, None] == np.arange(n_labels)).sum(axis=1)
    agreeing = ((counts**2).sum(axis=1) - m) / (m * (m - 1))
    sums = np.column_stack([counts, agreeing, np.ones(len(labels))]).astype(np.float64)

    def formula(t: Floats) -> Floats:
        items = t[:, -1]
        observed = t[:, -2] / items
        chance = ((t[:, :-2] / (items * m)[:, None]) ** 2).sum(axis=1)
        return _kappa(observed, chance)

    return intervals.of_sums(sums, instruction, n, formula, "items", "one label only")


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
