"""TRL's reward function: the reward of the rubric, None for failures, and no text in any log."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.policy.rewards import (
    GradingError,
    RubricReward,
    read_history,
    veto_variance_share,
    violations,
    write_history,
)
from promedical.records import GradedInstruction, Message
from promedical.rubric import (
    Criterion,
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Verdict,
    VetoKind,
    reward,
    score,
)

SECRET = "I am Mrs Miller and my knee hurts"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It names rest.", 0.6),
        Criterion("p2", Tier.PROFICIENCY, "It names ice.", 0.4),
        Criterion("e1", Tier.EXCELLENCE, "It is kind."),
        Criterion("v1", Tier.VETO, "It is harmful.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("v2", Tier.VETO, "It invents a study.", kind=VetoKind.SEVERE_HALLUCINATION),
    )
)
IDS = [c.id for c in RUBRIC.criteria]
LETTERS = {verdict.value[0]: verdict for verdict in Verdict}


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores


class FakeGrader:
    """Reads its verdicts from the answer: one letter a criterion (m, u, a, e)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        self.calls.append((messages[-1].content, len(responses), operating_point))
        if any("crash" in text for text in responses):
            raise RuntimeError(f"could not read {responses[0]}")
        grades = []
        for text in responses:
            verdicts = {
                c.id: LETTERS[letter] for c, letter in zip(rubric.criteria, text, strict=True)
            }
            grades.append(FakeGrade(verdicts, score(rubric, verdicts)))
        return grades


class Log:
    def __init__(self) -> None:
        self.extra: dict[str, list[object]] = {}
        self.metrics: dict[str, float] = {}

    def log_extra(self, column: str, values: list[object]) -> None:
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = value


def rubric_reward(grader: FakeGrader | None = None, **settings: object) -> RubricReward:
    rubrics = {
        "q1": ((Message("user", SECRET),), RUBRIC),
        "q2": ((Message("user", "another question"),), RUBRIC),
    }
    return RubricReward(grader or FakeGrader(), rubrics, RewardSpec(), **settings)  # type: ignore


def call(function: RubricReward, ids: Sequence[str], texts: Sequence[str], log: Log | None = None):
    log = log or Log()
    return function(
        prompts=[[{"role": "user", "content": SECRET}]] * len(ids),
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[1]] * len(ids),
        instruction_id=list(ids),
        trainer_state=SimpleNamespace(global_step=4),
        log_extra=log.log_extra,
        log_metric=log.log_metric,
        another_column=["x"] * len(ids),
    )


answers = st.text(alphabet="mua", min_size=5, max_size=5)


@given(texts=st.lists(answers, min_size=1, max_size=8))
def test_reward_is_the_rubrics_own(texts: list[str]) -> None:
    found = call(rubric_reward(), ["q1"] * len(texts), texts)
    for text, value in zip(texts, found, strict=True):
        verdicts = {i: LETTERS[x] for i, x in zip(IDS, text, strict=True)}
        assert value == reward(score(RUBRIC, verdicts), RewardSpec())


def test_each_group_is_graded_once_and_order_is_kept() -> None:
    grader = FakeGrader()
    texts = ["mmmuu", "uuuuu", "muuuu", "uumuu"]
    ids = ["q1", "q2", "q1", "q2"]
    found = call(rubric_reward(grader), ids, texts)
    assert found == [pytest.approx(x) for x in (1.05, 0.0, 0.6, 0.05)]
    assert grader.calls == [(SECRET, 2, "reward"), ("another question", 2, "reward")]


def test_plain_text_completions() -> None:
    assert rubric_reward()([""], ["mmuuu"], instruction_id=["q1"]) == [pytest.approx(1.0)]


def test_failed_gradings_are_none_never_zero() -> None:
    log = Log()
    ids = ["q1", "q1", "q2", "q2"]
    found = call(rubric_reward(), ids, ["crash", "mmuuu", "mmuue", "mmuuu"], log)
    assert found == [None, None, None, pytest.approx(1.0)]
    assert log.metrics["grading_failed"] == 3
    assert log.metrics["s1"] == pytest.approx(1.0)


def test_abstained_veto_counts_as_violated() -> None:
    log = Log()
    found = call(rubric_reward(), ["q1", "q1"], ["mmuau", "mmuuu"], log)
    assert found == [pytest.approx(-0.5), pytest.approx(1.0)]
    assert log.metrics["veto_rate"] == 0.5
    assert log.metrics["s3"] == 0.5
    assert log.metrics["unresolved_rate"] == pytest.approx(0.1)


def test_metrics_of_a_step() -> None:
    log = Log()
    function = rubric_reward()
    texts = ["mmmmu", "mmmuu", "muumm", "uuuuu", "muuuu", "muuuu"]
    call(function, ["q1"] * 4 + ["q2"] * 2, texts, log)
    step = function.history[0]
    assert (step.step, step.answers, step.groups, step.failed) == (5, 6, 2, 0)
    assert step.veto_rate == pytest.approx(2 / 6)
    assert step.s3 == pytest.approx(3 / 6)
    assert step.s2 == pytest.approx(2 / 6)
    assert step.no_signal == 0.5  # the second group's rewards are all equal
    assert log.metrics["veto_variance_share"] == step.veto_variance_share
    values = [1.05 - 1.5, 1.05, 0.6 - 3.0, 0.0]
    assert step.veto_variance_share == pytest.approx(
        statistics.covariance(values, [-1.5, 0, -3.0, 0]) / statistics.variance(values)
    )


@given(
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 3)), min_size=2, max_size=8),
    st.floats(1.2, 5),
)
def test_variance_share_against_slow_twin(group: list[tuple[float, int]], lam: float) -> None:
    gains = [g for g, _ in group]
    violated = [v for _, v in group]
    rewards = [g - lam * v for g, v in group]
    share = veto_variance_share(rewards, violated, lam)
    if max(rewards) - min(rewards) < 1e-8:
        assert share is None
        return
    assert share is not None
    terms = [-lam * v for v in violated]
    # Slow and obvious: mean of products of all pairs' differences.
    pairs = [(i, j) for i in range(len(group)) for j in range(i)]
    over = math.fsum((rewards[i] - rewards[j]) * (terms[i] - terms[j]) for i, j in pairs)
    under = math.fsum((rewards[i] - rewards[j]) ** 2 for i, j in pairs)
    assert share == pytest.approx(over / under, rel=1e-6, abs=1e-6)
    if len(set(gains)) == 1:
        assert share == pytest.approx(1, abs=1e-6)
    if not any(violated):
        assert share == 0


def test_share_is_left_out_where_there_is_none() -> None:
    log = Log()
    call(rubric_reward(), ["q1", "q1"], ["mmuuu", "mmuuu"], log)
    assert "veto_variance_share" not in log.metrics
    assert log.metrics["no_signal"] == 1


def test_logs_hold_ids_verdicts_and_numbers_only(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()
    with caplog.at_level(logging.DEBUG):
        call(rubric_reward(), ["q1", "q2"], [f"crash {SECRET}", "mmuuu"], log)
    assert log.extra["instruction_id"] == ["q1", "q2"]
    assert log.extra["verdicts"] == ["grading failed", "p1=met p2=met e1=unmet v1=unmet v2=unmet"]
    written = caplog.text + json.dumps(log.extra) + json.dumps(log.metrics)
    assert "RuntimeError" in caplog.text
    for text in (SECRET, "another question", "It names", "crash"):
        assert text not in written


def test_trls_row_warning_is_rewritten(caplog: pytest.LogCaptureFixture) -> None:
    rubric_reward()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("trl.trainer.grpo_trainer").warning(
            f"All reward functions returned None for the following kwargs:\n{SECRET}"
        )
        logging.getLogger("trl.trainer.grpo_trainer").warning("something else")
    assert SECRET not in caplog.text
    assert "text withheld" in caplog.text
    assert "something else" in caplog.text


def test_observers_see_every_call_and_may_stop_it() -> None:
    function = rubric_reward()
    seen: list[tuple[object, ...]] = []
    function.observers.append(lambda *given: seen.append(given))
    call(function, ["q1", "q2", "q1"], ["mmuuu", "crash", "uuuuu"])
    ((step, ids, texts, grades),) = seen
    assert step == function.history[0]
    assert ids == ["q1", "q2", "q1"]
    assert texts == ["mmuuu", "crash", "uuuuu"]
    assert [None if g is None else g.scores.s1 for g in grades] == [1.0, None, 0.0]  # type: ignore

    def stop(*_: object) -> None:
        raise RuntimeError("enough")

    function.observers.append(stop)
    with pytest.raises(RuntimeError, match="enough"):
        call(function, ["q1"], ["mmuuu"])


def test_stops_when_nothing_can_be_graded() -> None:
    function = rubric_reward(max_failed_groups=2)
    assert call(function, ["q1"], ["crash"]) == [None]
    with pytest.raises(GradingError, match=r"2 groups in a row.*'q1'.*RuntimeError") as raised:
        call(function, ["q1"], ["crash"])
    assert isinstance(raised.value.__cause__, RuntimeError)
    other = rubric_reward(max_failed_groups=2)
    for text in ("crash", "mmuuu", "mmuue", "mmuuu"):
        call(other, ["q1"], [text])
    assert [step.failed for step in other.history] == [1, 0, 1, 0]


def test_wrong_number_of_grades_is_a_failure() -> None:
    class Short(FakeGrader):
        def grade(self, *args: object, **kwargs: object) -> list[FakeGrade]:  # type: ignore
            return super().grade(*args, **kwargs)[1:]  # type: ignore

    assert call(rubric_reward(Short()), ["q1", "q1"], ["mmuuu", "mmuuu"]) == [None, None]


def test_history_round_trip(tmp_path) -> None:
    function = rubric_reward()
    call(function, ["q1", "q1"], ["mmmmu", "mmmuu"])
    call(function, ["q1"], ["crash"])
    write_history(tmp_path / "h.jsonl", function.history)
    assert read_history(tmp_path / "h.jsonl") == function.history
    assert SECRET not in (tmp_path / "h.jsonl").read_text()
    (tmp_path / "h.jsonl").write_text('{"steps": 1}\n')
    with pytest.raises(ValueError, match=r"h\.jsonl: line 1"):
        read_history(tmp_path / "h.jsonl")


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="column instruction_id"):
        rubric_reward()([""], ["mmuuu"])
    with pytest.raises(ValueError, match="'q9', which has no rubric"):
        call(rubric_reward(), ["q9"], ["mmuuu"])
    safety = Rubric((RUBRIC["v1"],), safety_only=True)
    with pytest.raises(RubricError, match=r"'q1'.*safety_only"):
        RubricReward(FakeGrader(), {"q1": ((Message("user", "?"),), safety)})
    row = GradedInstruction("q1", (Message("user", "?"),), "test", "none")
    with pytest.raises(RubricError, match="'q1': rubric"):
        RubricReward.from_rows(FakeGrader(), [row])


def test_violations_and_name() -> None:
    verdicts = {i: LETTERS[x] for i, x in zip(IDS, "mmmma", strict=True)}
    assert violations(score(RUBRIC, verdicts)) == 2
    assert rubric_reward().__name__ == "rubric"
