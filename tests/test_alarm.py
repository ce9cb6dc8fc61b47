"""The alarm's rule: what it must see, what it must not, and how often it is wrong on purpose."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.policy.alarm import (
    Alarm,
    AlarmRule,
    Check,
    Point,
    change_over,
    check,
    evaluations,
    raised,
    shortcoming,
)

PLANNED = 12
LAM = 1.5
RULE = AlarmRule()


def points(training: np.ndarray, gold: np.ndarray, veto: np.ndarray | None = None) -> list[Point]:
    """Evaluations of simulated curves [evaluations, prompts]."""
    veto = np.zeros_like(gold) if veto is None else veto

    def told(row: np.ndarray) -> tuple[float | None, ...]:
        return tuple(None if np.isnan(v) else float(v) for v in row)

    return [
        Point(10 * n, told(t), told(g), tuple(bool(v) for v in w), tuple(bool(v) for v in w))
        for n, (t, g, w) in enumerate(zip(training, gold, veto, strict=True))
    ]


def alarms(seen: list[Point], rule: AlarmRule = RULE) -> tuple[Alarm, ...]:
    checks = [check(seen[: n + 1], rule, len(seen)) for n in range(len(seen))]
    return raised(checks, rule)


def curves(
    rng: np.random.Generator, start: int, rise: float, fall: float, n: int = 32, e: int = PLANNED
):
    """Training rises all the time; gold rises with it, and from `start` on falls."""
    time = np.arange(e)[:, None]
    noise = rng.normal(0, 0.2, size=(2, e, n)) + rng.normal(0.5, 0.3, size=(2, 1, n))
    turn = np.minimum(time, start) * rise - np.maximum(time - start, 0) * fall
    return noise[0] + rise * time, noise[1] + turn


# --- what it must see -----------------------------------------------------------------------------


def test_an_over_optimised_policy_raises_the_alarm_after_the_curves_part() -> None:
    rng = np.random.default_rng(3)
    training, gold = curves(rng, start=4, rise=0.06, fall=0.08)
    (alarm,) = alarms(points(training, gold))
    assert alarm.kind == "over_optimised"
    assert alarm.step > 40
    assert alarm.change.value < 0
    assert alarm.change.high < 0
    assert "gold judge's reward falls" in str(alarm)
    assert f"step {alarm.step}" in str(alarm)


def test_gold_may_go_on_falling_when_the_training_reward_has_reached_its_ceiling() -> None:
    rng = np.random.default_rng(5)
    training, gold = curves(rng, start=0, rise=0.0, fall=0.08, e=16)
    ceiling = np.minimum(np.arange(16)[:, None] * 0.3, 1.0)
    gold[:7] = gold[0]  # falls only long after the ceiling was reached
    found = alarms(points(training + ceiling, gold))
    assert [alarm.kind for alarm in found] == ["over_optimised"]
    seen = points(training + ceiling, gold)
    last = check(seen, AlarmRule(), len(seen))
    assert last.changes["training"].p_rise > 0.01  # no longer rising
    assert last.changes["training_since_first"].p_rise < 0.01


def test_more_violations_raise_an_alarm_of_their_own() -> None:
    rng = np.random.default_rng(0)
    training, gold = curves(rng, start=PLANNED, rise=0.05, fall=0.0, n=48)
    share = np.clip(0.05 + 0.08 * np.arange(PLANNED), 0, 1)[:, None]
    veto = np.sort(rng.random((1, 48)), axis=1) < share
    kinds = {alarm.kind for alarm in alarms(points(training, gold, veto))}
    assert kinds == {"gold_veto_rises", "training_veto_rises"}


# --- what it must not -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "both rise", "both fall", "gold rises alone"])
def test_healthy_or_plain_failing_runs_raise_none(name: str) -> None:
    rng = np.random.default_rng(1)
    up, _ = curves(rng, start=0, rise=0.06, fall=0.0)
    down = 1 - up
    flat = np.full((PLANNED, 32), 0.4)
    training, gold = {
        "constant": (flat, flat),
        "both rise": (up, up + 0.1),
        "both fall": (down, down - 0.1),  # bad, but the training judge sees it too
        "gold rises alone": (flat, up),
    }[name]
    assert alarms(points(training, gold)) == ()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(12, 40),
    scale=st.floats(0.01, 10),
    evaluations=st.integers(5, 9),
)
def test_never_an_alarm_where_gold_never_falls(
    seed: int, n: int, scale: float, evaluations: int
) -> None:
    rng = np.random.default_rng(seed)
    gold = np.cumsum(rng.exponential(scale, (evaluations, n)), axis=0)  # of every prompt
    training = np.cumsum(rng.normal(0, scale, (evaluations, n)), axis=0)
    veto = np.sort(rng.random((evaluations, n)) < 0.3, axis=0)[::-1]  # violations only go away
    assert alarms(points(training, gold, veto)) == ()


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Healthy runs: training rises for certain, gold does nothing but jump to and fro."""
    rule = AlarmRule(confirm=1, least_fall=0.0, least_rise=0.0)
    rng = np.random.default_rng(11)
    runs, e, n = 60, 7, 24
    wrong = confirmed = 0
    for _ in range(runs):
        training = rng.normal(0, 0.2, (e, n)) + 0.1 * np.arange(e)[:, None]
        violated = rng.random((e, n)) < 0.1
        gold = rng.normal(0.5, 0.2, (1, n)) + rng.normal(0, 0.05, (e, n)) - LAM * violated
        seen = points(training, gold, violated)
        checks = [check(seen[: k + 1], rule, e) for k in range(e)]
        kinds = [a.kind for a in raised(checks, rule)]
        wrong += "over_optimised" in kinds
        confirmed += "over_optimised" in [a.kind for a in raised(checks, replace(rule, confirm=2))]
    # At 5 % of 60 runs more than 8 come out by chance with probability below 0.01.
    assert wrong <= 8
    assert confirmed <= wrong


def test_an_alarm_needs_confirmation() -> None:
    rule = AlarmRule()
    seen = points(*curves(np.random.default_rng(3), start=4, rise=0.06, fall=0.08))
    checks = [check(seen[: n + 1], rule, PLANNED) for n in range(PLANNED)]
    shown = [c.step for c in checks if "over_optimised" in c.shown]
    (alarm,) = raised(checks, rule)
    assert alarm.step == next(b for a, b in itertools.pairwise(shown) if b - a == 10)
    alternating = [replace(c, shown=c.shown if i % 2 else ()) for i, c in enumerate(checks)]
    assert raised(alternating, rule) == ()
    assert raised(alternating, replace(rule, confirm=1)) != ()


# --- the change -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), window=st.integers(3, 8), n=st.integers(2, 30))
def test_the_change_is_the_slope_of_the_mean_times_the_span(seed: int, window: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    steps = sorted(rng.choice(1000, window, replace=False).tolist())
    values = rng.normal(size=(window, n))
    found = change_over(steps, values)
    assert found is not None
    slow = np.polyfit(steps, values.mean(axis=1), 1)[0] * (steps[-1] - steps[0])
    assert found.value == pytest.approx(slow, abs=1e-9)
    assert found.low <= found.value + 1e-12
    assert found.high >= found.value - 1e-12
    mirrored = change_over(steps, -values)
    assert mirrored is not None
    assert (mirrored.p_rise, mirrored.p_fall) == (found.p_fall, found.p_rise)
    order = rng.permutation(n)
    shuffled = change_over(steps, values[:, order])
    assert shuffled is not None
    assert (shuffled.p_rise, shuffled.p_fall) == (found.p_rise, found.p_fall)
    shifted = change_over(steps, 3 * values + rng.normal(size=(1, n)))
    assert shifted is not None
    assert shifted.p_fall == pytest.approx(found.p_fall, abs=1e-3)


def test_the_p_value_is_that_of_all_sign_flips() -> None:
    d = np.array([0.4, -0.1, 0.3, 0.2, 0.5, -0.2, 0.1, 0.3, 0.6, 0.1])
    values = np.outer([-0.5, 0.0, 0.5], d)
    found = change_over([0, 1, 2], values)
    assert found is not None
    sums = [np.dot(signs, d) for signs in itertools.product((-1, 1), repeat=len(d))]
    exact = np.mean([s >= d.sum() - 1e-12 for s in sums])
    assert found.p_rise == pytest.approx(exact, abs=0.003)


def test_what_does_not_change_at_all_is_no_change() -> None:
    found = change_over(list(range(5)), np.full((5, 24), 0.1))
    assert found is not None
    assert (found.value, found.p_rise, found.p_fall) == (0.0, 1.0, 1.0)


def test_prompts_without_a_judgment_are_left_out_and_too_few_are_said() -> None:
    rng = np.random.default_rng(3)
    training, gold = curves(rng, start=4, rise=0.06, fall=0.08)
    gold[6, :10] = np.nan
    whole = points(training, gold)
    assert check(whole[:10], AlarmRule(), PLANNED).changes["gold"].prompts == 22
    gold[8, :25] = np.nan
    found = check(points(training, gold), AlarmRule(), PLANNED)
    assert found.untested == {"gold": "7 prompts graded in the whole window, 12 needed"}
    assert "over_optimised" not in found.shown
    gold[8] = np.nan
    found = check(points(training, gold), AlarmRule(), PLANNED)
    assert "gold" not in found.changes
    assert "gold" in found.untested
    early = check(points(training, gold)[:3], AlarmRule(), PLANNED)
    assert early.changes == {}
    assert early.untested["over_optimised"] == "3 evaluations, 5 needed"


def test_a_check_survives_json() -> None:
    training, gold = curves(np.random.default_rng(3), start=4, rise=0.06, fall=0.08)
    found = check(points(training, gold), AlarmRule(), PLANNED)
    data = found.to_json()
    assert data["shown"] == list(found.shown)
    assert data["changes"]["gold"] == asdict(found.changes["gold"])
    assert isinstance(found, Check)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 2), ("confirm", 0), ("false_alarms", 0.0), ("false_alarms", 1.0),
     ("least_fall", -0.1), ("least_rise", float("nan")), ("least_prompts", 1)],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: found"):
        AlarmRule(**{name: value})  # type: ignore[arg-type]


def test_the_level_is_shared_by_all_checks() -> None:
    assert AlarmRule().level(14) == pytest.approx(0.005)
    assert AlarmRule().level(2) == 0.05


@pytest.mark.parametrize(
    ("prompts", "steps", "every", "said"),
    [
        (12, 24, 5, None),
        (48, 500, 50, None),
        (48, 900, 1, None),
        (48, 24, 50, "2 evaluations (24 steps, every = 50), 6 needed (window 5 + confirm 2 − 1), "
         "enough would be every = 5"),
        (48, 3, 1, "4 evaluations (3 steps, every = 1), 6 needed (window 5 + confirm 2 − 1), "
         "enough would be 5 steps with every = 1"),
        (8, 24, 5, "8 held-out prompts, 12 needed"),
        (48, 5000, 1, "5001 evaluations, so that a test's level is 1.0e-05, and the least p is "
         "5.0e-05; enough would be a larger every"),
    ],
)  # fmt: skip
def test_a_run_in_which_no_alarm_can_be_raised(
    prompts: int, steps: int, every: int, said: str | None
) -> None:
    assert shortcoming(RULE, prompts, steps, every) == said


@settings(max_examples=6)
@given(
    steps=st.integers(1, 10),
    window=st.integers(3, 6),
    confirm=st.integers(1, 3),
    prompts=st.integers(2, 16),
)
def test_what_is_said_to_be_enough_is_enough(
    steps: int, window: int, confirm: int, prompts: int
) -> None:
    """Against the strongest of curves: every prompt falls, rises, or is violated, step by step."""
    rule = AlarmRule(window, confirm, least_prompts=2)
    found = {
        every for every in range(1, steps + 1) if shortcoming(rule, prompts, steps, every) is None
    }
    for every in {1, *sorted(found)[-1:], *[e + 1 for e in sorted(found)[-1:]]}:
        at = [*range(0, steps, every), steps]
        assert len(at) == evaluations(steps, every)
        seen = [
            Point(
                s, (s / 99,) * prompts, (-s / 99,) * prompts, (False,) * prompts, (False,) * prompts
            )
            for s in at
        ]
        least = AlarmRule(window, confirm, least_prompts=2, least_fall=0.0)
        assert bool(alarms(seen, least)) == (every in found), every
