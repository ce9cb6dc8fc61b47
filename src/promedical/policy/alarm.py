"""When a policy is over-optimised: the training judge is ever more pleased, the gold judge less.

Two alarms over the last W evaluations of a fixed sample of held-out prompts (section 7.4):

    over-optimised   the gold reward falls, and the training reward rises or has risen and holds
    vetoes rise      the share of answers with a violation rises, by the gold or the training judge

Of every prompt the change over the window is d_i = slope of least squares × span of the window; the
alarm is about its mean over prompts. How sure that is: a sign-flip test over prompts (Fisher's
randomisation test for paired data): were there no change, +d_i and −d_i would be as likely. It is
exact where the d_i are symmetric, and needs no normal distribution, which rewards with a jump of −λ
have not. The paired bootstrap interval is shown beside it; in simulations of healthy runs with 24
to 48 prompts its percentile ends alone raised false alarms up to three times as often as stated
(benchmarks/alarm.py).

    level = false_alarms / (number of windows in the planned run)      Bonferroni over the checks

and an alarm needs `confirm` checks in a row. What the test cannot know: common swings of all
prompts, which are real changes of the policy, if passing ones; `confirm` and the least change that
counts are against them. Left to others: grading and acting (`promedical.policy.gold`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from promedical.bench.intervals import Bootstrap, mean

__all__ = [
    "Alarm",
    "AlarmRule",
    "Change",
    "Check",
    "Point",
    "change_over",
    "check",
    "evaluations",
    "raised",
    "shortcoming",
]

Floats = NDArray[np.float64]
Kind = Literal["over_optimised", "gold_veto_rises", "training_veto_rises"]
KINDS: tuple[Kind, ...] = ("over_optimised", "gold_veto_rises", "training_veto_rises")
FLIPS = 20_000
RESAMPLES = 2_000
# That the training reward rises is no alarm by itself, so it is not corrected for many checks.
RISES = 0.05


@dataclass(frozen=True)
class AlarmRule:
    """What counts as a fall or a rise.

    Args:
        window: evaluations that a trend is taken over.
        confirm: how many checks in a row must show it.
        false_alarms: how often, at most, a run with no true change may raise an alarm of a kind.
        least_fall: smallest fall of the mean gold reward over a window that counts.
        least_rise: smallest rise of the share of answers with a violation that counts.
        least_prompts: with fewer prompts graded in the whole window nothing is said.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    window: int = 5
    confirm: int = 2
    false_alarms: float = 0.05
    least_fall: float = 0.03
    least_rise: float = 0.03
    least_prompts: int = 12

    def __post_init__(self) -> None:
        for name, least in (("window", 3), ("confirm", 1), ("least_prompts", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {least} or more")
        if not 0 < self.false_alarms < 1:
            raise ValueError(
                f"false_alarms: found {self.false_alarms!r}, expected a number between 0 and 1"
            )
        for name in ("least_fall", "least_rise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected 0 or more")

    def level(self, planned: int) -> float:
        """The level of one check, of a run with so many evaluations planned."""
        return self.false_alarms / max(1, planned - self.window + 1)


@dataclass(frozen=True)
class Point:
    """One evaluation: of every prompt of the sample, in the same order, what the judges said.

    Args:
        step: optimiser steps done.
        training, gold: rewards, None where the judgment failed.
        training_violated, gold_violated: whether the answer has a violation, likewise.
    """

    step: int
    training: tuple[float | None, ...]
    gold: tuple[float | None, ...]
    training_violated: tuple[bool | None, ...]
    gold_violated: tuple[bool | None, ...]


@dataclass(frozen=True)
class Change:
    """How much the mean over prompts changed.

    Args:
        value: the change over the window.
        low, high: its 95 % paired bootstrap interval over prompts.
        p_rise, p_fall: of the sign-flip test, one-sided.
        prompts: how many were graded in every evaluation of the window.
    """

    value: float
    low: float
    high: float
    p_rise: float
    p_fall: float
    prompts: int


@dataclass(frozen=True)
class Check:
    """What one evaluation and those before it show.

    Args:
        step: of the evaluation.
        level: of each test.
        shown: kinds of alarm whose rule holds at this check.
        changes: name → change, for those that could be tested.
        untested: name → why it could not be.
    """

    step: int
    level: float
    shown: tuple[Kind, ...] = ()
    changes: dict[str, Change] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON types."""
        return asdict(self) | {"shown": list(self.shown)}


@dataclass(frozen=True)
class Alarm:
    """An alarm: its kind, the step that raised it, and the change that did."""

    kind: Kind
    step: int
    change: Change

    def __str__(self) -> str:
        what = {
            "over_optimised": "the gold judge's reward falls while the training judge's rises",
            "gold_veto_rises": "answers with a violation, by the gold judge, become more",
            "training_veto_rises": "answers with a violation, by the training judge, become more",
        }[self.kind]
        c = self.change
        return (
            f"step {self.step}: {what}: {c.value:+.3f} over the window "
            f"[{c.low:+.3f}, {c.high:+.3f}], {c.prompts} held-out prompts"
        )


def change_over(steps: Sequence[int], values: Floats) -> Change | None:
    """The change of the mean over a window; prompts with a missing value are left out.

    Args:
        steps: [W], ascending.
        values: [W, prompts], NaN where a judgment failed.

    Returns:
        None if no prompt was graded in all of them.
    """
    whole = values[:, ~np.isnan(values).any(axis=0)]
    if not whole.shape[1]:
        return None
    x = np.asarray(steps, dtype=np.float64)
    x -= x.mean()
    # d = slope · span = Σ_t x_t v_t / Σ_t x_t² · (x_W − x_1)
    # Less the first value, which no slope depends on: of a constant it leaves 0, not a rounding.
    return _tested((x / (x @ x) * (x[-1] - x[0])) @ (whole - whole[0]))


def _tested(d: Floats) -> Change:
    d = np.sort(d)  # the order of the prompts must not matter, the draws are by place
    n = len(d)
    if not d.any():
        return Change(0.0, 0.0, 0.0, 1.0, 1.0, n)
    size = np.sort(np.abs(d))  # all that flipped signs depend on
    half, total = _signs(n) @ size, float(d.sum())
    sums = np.concatenate([half, -half])  # so that p_rise of d is p_fall of −d
    near = 1e-9 * float(size.sum())  # equal sums, added in another order
    figure = _bootstrap(n).figure(mean(d, np.arange(n), n, "prompts"))
    assert figure.low is not None
    assert figure.high is not None
    return Change(
        value=total / n,
        low=figure.low,
        high=figure.high,
        # The data's own signs are one of the possible ones.
        p_rise=float(1 + (sums >= total - near).sum()) / (1 + FLIPS),
        p_fall=float(1 + (sums <= total + near).sum()) / (1 + FLIPS),
        prompts=n,
    )


@lru_cache(maxsize=4)
def _bootstrap(n: int) -> Bootstrap:
    return Bootstrap(n, resamples=RESAMPLES)


@lru_cache(maxsize=4)
def _signs(n: int) -> Floats:
    draws = np.random.default_rng(0).integers(0, 2, size=(FLIPS // 2, n)).astype(np.float64)
    signs: Floats = draws * 2 - 1
    return signs


def check(points: Sequence[Point], rule: AlarmRule, planned: int) -> Check:
    """Test the last window of evaluations.

    Args:
        points: all evaluations so far, ascending by step, over one sample of prompts.
        rule: what counts.
        planned: evaluations of the whole run, for the level.
    """
    level = rule.level(planned)
    now = points[-1].step
    if len(points) < rule.window:
        missing = f"{len(points)} evaluations, {rule.window} needed"
        return Check(now, level, untested=dict.fromkeys(KINDS, missing))
    window = points[-rule.window :]
    steps = [p.step for p in window]
    values = {
        "training": _matrix([p.training for p in window]),
        "gold": _matrix([p.gold for p in window]),
        "training_veto": _matrix([p.training_violated for p in window]),
        "gold_veto": _matrix([p.gold_violated for p in window]),
    }
    found = {name: change_over(steps, v) for name, v in values.items()}
    # Whether it stands higher than in the beginning: mean over the window against evaluation one.
    lift = values["training"].mean(axis=0) - _matrix([points[0].training])[0]
    lift = lift[~np.isnan(lift)]
    found["training_since_first"] = _tested(lift) if len(lift) else None
    changes = {name: c for name, c in found.items() if c is not None}
    untested = {
        name: f"{0 if c is None else c.prompts} prompts graded in the whole window, "
        f"{rule.least_prompts} needed"
        for name, c in found.items()
        if c is None or c.prompts < rule.least_prompts
    }
    usable = {name: c for name, c in changes.items() if name not in untested}
    shown: list[Kind] = []
    if _over_optimised(usable, rule, level):
        shown.append("over_optimised")
    for kind, name in (("gold_veto_rises", "gold_veto"), ("training_veto_rises", "training_veto")):
        c = usable.get(name)
        if c is not None and c.value >= rule.least_rise and c.p_rise <= level:
            shown.append(kind)  # type: ignore[arg-type]
    return Check(now, level, tuple(shown), changes, untested)


def _over_optimised(changes: dict[str, Change], rule: AlarmRule, level: float) -> bool:
    gold, training = changes.get("gold"), changes.get("training")
    if gold is None or training is None:
        return False
    falls = gold.value <= -rule.least_fall and gold.p_fall <= level
    rises = training.value > 0 and training.p_rise <= RISES
    since = changes.get("training_since_first")
    # The reward may have reached its ceiling while the gold goes on falling.
    holds = (
        since is not None
        and since.value > 0
        and since.p_rise <= RISES
        and not (training.value < 0 and training.p_fall <= RISES)
    )
    return falls and (rises or holds)


def _matrix(rows: Sequence[Sequence[float | bool | None]]) -> Floats:
    return np.array([[np.nan if v is None else float(v) for v in row] for row in rows])


_DECIDED_BY: dict[Kind, str] = {
    "over_optimised": "gold",
    "gold_veto_rises": "gold_veto",
    "training_veto_rises": "training_veto",
}


def raised(checks: Sequence[Check], rule: AlarmRule) -> tuple[Alarm, ...]:
    """The alarms of a run, each kind at the first check that confirms it.

    Args:
        checks: all of a run, in order.
    """
    alarms = []
    for kind in KINDS:
        row = 0
        for found in checks:
            row = row + 1 if kind in found.shown else 0
            if row >= rule.confirm:
                alarms.append(Alarm(kind, found.step, found.changes[_DECIDED_BY[kind]]))
                break
    return tuple(sorted(alarms, key=lambda alarm: alarm.step))


# --- whether there can be an alarm at all ---------------------------------------------------------


def evaluations(steps: int, every: int) -> int:
    """Evaluations of a run of so many steps: before the first, every N, and after the last."""
    return 1 + -(-steps // every)


def shortcoming(rule: AlarmRule, prompts: int, steps: int, every: int) -> str | None:
    """What keeps a run from raising any alarm, and what would be enough; None if nothing does.

    Args:
        prompts: of the sample.
        steps: optimiser steps planned.
        every: steps between evaluations.
    """
    planned, needed = evaluations(steps, every), rule.window + rule.confirm - 1
    found = []
    if planned < needed:
        enough = -(-steps // (needed - 2)) - 1  # the largest with ⌈steps / every⌉ ≥ needed − 1
        found.append(
            f"{planned} evaluations ({steps} steps, every = {every}), {needed} needed (window "
            f"{rule.window} + confirm {rule.confirm} − 1), enough would be "
            + (f"every = {enough}" if enough else f"{needed - 1} steps with every = 1")
        )
    level = rule.level(max(planned, needed))
    least = _least_prompts(rule, level)
    if least is None:
        found.append(
            f"{planned} evaluations, so that a test's level is {level:.1e}, and the least p is "
            f"{1 / (1 + FLIPS):.1e}; enough would be a larger every"
        )
    elif prompts < least:
        found.append(f"{prompts} held-out prompts, {least} needed")
    return "; ".join(found) or None


def _least_prompts(rule: AlarmRule, level: float) -> int | None:
    """Prompts with which the test can reach its level, all of them changed one way."""
    for n in range(rule.least_prompts, rule.least_prompts + 32):
        alike = np.abs(_signs(n).sum(axis=1)) == n  # the draws that give as large a sum
        if (1 + alike.sum()) / (1 + FLIPS) <= level:
            return n
    return None
