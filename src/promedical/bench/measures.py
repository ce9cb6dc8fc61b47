"""Figures as what every item adds: kept on disk, so that systems can be compared long after.

A `Measure` is a figure of one system on one suite, written down as sums an item (a pair, a verdict,
an answer) with the item's id and its instruction. From that come the figure with its interval here,
and the paired tests between systems that were run on different days (`leaderboard`): only items
that both have are compared. Formulas have names, since functions cannot be kept. Items may be in
groups: then the formula is taken in every group, and the groups' values are averaged, or summed
with weights, as several published scores are.

No text is kept, only ids. How intervals and tests are made is left to `intervals` and
`comparisons`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from promedical.bench import intervals
from promedical.bench.comparisons import Paired, paired_of_sums
from promedical.bench.intervals import Bootstrap, Floats, Formula, Ints, Statistic
from promedical.bench.metrics import BenchError

__all__ = ["FORMULAS", "Measure", "confusion", "paired", "per_item", "statistic"]

Base = Callable[[Floats], Floats]


def _mean(t: Floats) -> Floats:
    value: Floats = t[..., 0] / t[..., 1]
    return value


def _clipped_mean(t: Floats) -> Floats:
    value: Floats = np.clip(t[..., 0] / t[..., 1], 0, 1)
    return value


def _precision(t: Floats) -> Floats:
    value: Floats = t[..., 0] / (t[..., 0] + t[..., 2])
    return value


def _recall(t: Floats) -> Floats:
    value: Floats = t[..., 0] / (t[..., 0] + t[..., 1])
    return value


def _f1(t: Floats) -> Floats:
    tp, fn, fp = t[..., 0], t[..., 1], t[..., 2]
    value: Floats = np.where(tp + fn > 0, 2 * tp / (2 * tp + fn + fp), np.nan)
    return value


def _macro_f1(t: Floats) -> Floats:
    tp, fn, fp, tn = (t[..., i] for i in range(4))
    both = (2 * tp / (2 * tp + fn + fp) + 2 * tn / (2 * tn + fn + fp)) / 2
    return np.where((tp + fn > 0) & (tn + fp > 0), both, np.nan)


def _balanced(t: Floats) -> Floats:
    tp, fn, fp, tn = (t[..., i] for i in range(4))
    value: Floats = (tp / (tp + fn) + tn / (tn + fp)) / 2
    return value


# name → (columns, totals [..., columns] → values [...])
FORMULAS: Mapping[str, tuple[int, Base]] = {
    "mean": (2, _mean),
    "clipped_mean": (2, _clipped_mean),
    "precision": (4, _precision),
    "recall": (4, _recall),
    "f1": (4, _f1),
    "macro_f1": (4, _macro_f1),
    "balanced_accuracy": (4, _balanced),
}


@dataclass(frozen=True)
class Measure:
    """One figure of one system.

    Args:
        label: what a table's column says.
        unit: what an item is, such as "pairs".
        formula: a key of `FORMULAS`.
        items: [items], ids, unique; the same item has the same id for every system.
        instruction: [items], id of the instruction that it belongs to.
        sums: [items, columns], what it adds.
        group: [items], or None where there are no groups.
        weights: group → weight; None averages the groups that are defined.
        unscored: items of the suite that the system gave nothing usable for.
        main: whether the leaderboard shows and compares it first.
        percent: whether it is a share; else it is shown as a number.
        better: "higher" or "lower".
        note: what has to be known to read it.
    """

    label: str
    unit: str
    formula: str
    items: tuple[str, ...]
    instruction: tuple[str, ...]
    sums: tuple[tuple[float, ...], ...]
    group: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    unscored: int = 0
    main: bool = False
    percent: bool = True
    better: str = "higher"
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            raise BenchError(
                f"measure {self.label!r}: formula: found {self.formula!r}, expected one of "
                f"{', '.join(FORMULAS)}"
            )
        lengths = {len(self.items), len(self.instruction), len(self.sums)}
        if self.group is not None:
            lengths.add(len(self.group))
        if len(lengths) != 1 or len(set(self.items)) != len(self.items):
            raise BenchError(
                f"measure {self.label!r}: found lists of {sorted(lengths)} entries and "
                f"{len(set(self.items))} distinct ids, expected one id for each"
            )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads again."""
        return {
            **{k: v for k, v in vars(self).items() if k not in ("sums", "extra")},
            "sums": [list(s) for s in self.sums],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measure:
        """A measure as it was kept.

        Raises:
            BenchError: it is none.
        """
        try:
            given = dict(data)
            group = given.pop("group", None)
            return cls(
                **given
                | {
                    "items": tuple(given["items"]),
                    "instruction": tuple(given["instruction"]),
                    "sums": tuple(tuple(float(v) for v in s) for s in given["sums"]),
                    "group": None if group is None else tuple(group),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"measure: cannot be read ({error!r})") from None


def per_item(
    label: str,
    unit: str,
    values: Mapping[str, tuple[str, float]],
    *,
    formula: str = "mean",
    **more: Any,
) -> Measure:
    """A mean over items.

    Args:
        values: item id → (instruction id, value).
        more: further fields of `Measure`.
    """
    return Measure(
        label,
        unit,
        formula,
        tuple(values),
        tuple(where for where, _ in values.values()),
        tuple((float(value), 1.0) for _, value in values.values()),
        **more,
    )


def confusion(positive: bool, predicted: bool) -> tuple[float, float, float, float]:
    """One item's (tp, fn, fp, tn)."""
    return (
        float(positive and predicted),
        float(positive and not predicted),
        float(not positive and predicted),
        float(not positive and not predicted),
    )


def statistic(measure: Measure, instructions: Sequence[str]) -> Statistic:
    """The measure over these instructions, in the bootstrap's order."""
    if not measure.items:
        return intervals.undefined(measure.unit, "no items")
    groups = _groups(measure, measure)
    sums = _expanded(measure, range(len(measure.items)), groups)
    at = _places(measure.instruction, instructions)
    formula = _formula(measure, groups)
    return intervals.of_sums(sums, at, len(instructions), formula, measure.unit, _reason(measure))


def paired(first: Measure, second: Measure, instructions: Sequence[str]) -> Paired:
    """Two systems' measure over the items that both have.

    Raises:
        BenchError: two different measures.
    """
    if (first.formula, first.weights) != (second.formula, second.weights):
        raise BenchError(f"measures {first.label!r} and {second.label!r}: not the same figure")
    of_second = {item: i for i, item in enumerate(second.items)}
    both = [(i, of_second[item]) for i, item in enumerate(first.items) if item in of_second]
    groups = _groups(first, second)
    a = _expanded(first, [i for i, _ in both], groups)
    b = _expanded(second, [j for _, j in both], groups)
    at = _places([first.instruction[i] for i, _ in both], instructions)
    formula = _formula(first, groups)
    n = len(instructions)
    return paired_of_sums(a, b, at, n, formula, first.unit, "no item that both have")


def figure(measure: Measure, bootstrap: Bootstrap, instructions: Sequence[str]) -> dict[str, Any]:
    """The figure with its interval, as JSON types."""
    return bootstrap.figure(statistic(measure, instructions)).to_json()


def _reason(measure: Measure) -> str:
    return "only one gold class" if FORMULAS[measure.formula][0] == 4 else "no items"


def _groups(a: Measure, b: Measure) -> tuple[str, ...]:
    """The groups of a measure, and of a system's beside it, in a fixed order."""
    if a.weights is not None:
        return tuple(sorted(a.weights))
    return tuple(sorted({*(a.group or ("",)), *(b.group or ("",))}))


def _places(found: Sequence[str], instructions: Sequence[str]) -> Ints:
    number = {name: i for i, name in enumerate(instructions)}
    try:
        return np.array([number[name] for name in found], dtype=np.int64)
    except KeyError as error:
        raise BenchError(f"instruction {error}: not among the suite's instructions") from None


def _expanded(measure: Measure, chosen: Sequence[int], groups: Sequence[str]) -> Floats:
    """[items, groups × columns], an item's sums in the columns of its group."""
    width = FORMULAS[measure.formula][0]
    place = {group: i for i, group in enumerate(groups)}
    table = np.zeros((len(chosen), width * len(groups)))
    for row, i in enumerate(chosen):
        start = width * place[measure.group[i] if measure.group is not None else groups[0]]
        table[row, start : start + width] = measure.sums[i]
    return table


def _formula(measure: Measure, groups: Sequence[str]) -> Formula:
    width, base = FORMULAS[measure.formula]
    if measure.group is None:
        return base
    weights = measure.weights

    def over_groups(totals: Floats) -> Floats:
        values = base(totals.reshape(len(totals), len(groups), width))
        if weights is not None:
            return values @ np.array([weights[g] for g in groups])
        known = ~np.isnan(values)
        value: Floats = np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)
        return value

    return over_groups
