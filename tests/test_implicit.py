"""The implicit scalar reward: the score as it is, None for a failure, no tiers, no text in logs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from promedical.policy.grpo import GrpoRecipe, train_grpo
from promedical.policy.implicit import ImplicitReward
from promedical.policy.rewards import GradingError, read_history, write_history
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.render import OVERALL, rubric_question
from promedical.rubric import RubricError
from test_grpo import ROWS, RUBRIC, SECRET
from tiny_policy import save_tiny_policy
from tiny_reward import tiny_classifier


@dataclass(frozen=True)
class Raw:
    raw: dict[str, float]


class Lengths:
    """The longer the better; fails where told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.asked: list[str] = []

    def grade(self, messages: Any, responses: Any, rubric: Any, **_: Any) -> list[Raw]:
        (criterion,) = rubric.criteria
        self.asked.append(criterion.text)
        if self.fails:
            raise RuntimeError(f"cannot read {SECRET}")
        return [
            Raw({"overall": math.nan if text == "?" else float(len(text))}) for text in responses
        ]


def test_a_score_is_the_reward_and_a_failure_none() -> None:
    reward = ImplicitReward(Lengths(), ROWS)
    told: dict[str, float] = {}
    seen: list[Any] = []
    reward.observers.append(lambda *given: seen.append(given))
    found = reward(
        [""] * 5,
        ["abc", [{"role": "assistant", "content": "a"}], "?", "b", "c"],
        instruction_id=["q0", "q0", "q0", "q1", "q1"],
        log_metric=told.__setitem__,
    )
    assert found == [3.0, 1.0, None, 1.0, 1.0]
    (step,) = reward.history
    assert (step.reward, step.failed, step.no_signal) == (1.5, 1, 0.5)
    assert (step.s1, step.s2, step.s3, step.veto_rate) == (None,) * 4
    assert told == {"grading_failed": 1.0, "no_signal": 0.5}
    assert seen[0][3] == [None] * 5


def test_what_the_model_is_asked() -> None:
    plain, whole = Lengths(), Lengths()
    ImplicitReward(plain, ROWS)([""], ["a"], instruction_id=["q0"])
    ImplicitReward(whole, ROWS, "rubric")([""], ["a"], instruction_id=["q0"])
    assert plain.asked == [OVERALL]
    assert whole.asked == [rubric_question(RUBRIC)]
    with pytest.raises(RubricError, match="'q0': rubric: found none"):
        ImplicitReward(whole, [replace(ROWS[0], rubric=None)], "rubric")


def test_it_is_the_score_of_the_overall_question() -> None:
    classifier, tokenizer = tiny_classifier(layers=2)
    model = RubricRewardModel(TreeRewardModel(classifier), tokenizer)
    texts = ["Rest it.", "", "See a doctor if it hurts."]
    found = ImplicitReward(model, ROWS)([""] * 3, texts, instruction_id=["q0"] * 3)
    from promedical.records import Response

    row = ROWS[0].with_responses([Response(str(i), "m", t) for i, t in enumerate(texts)])
    scores = model.score_rows([row], criteria=False, overall=True)
    assert found == pytest.approx([scores.overall["q0", str(i)] for i in range(3)], abs=1e-5)


def test_it_stops_where_nothing_can_be_scored(caplog: pytest.LogCaptureFixture) -> None:
    reward = ImplicitReward(Lengths(fails=True), ROWS, max_failed_groups=3)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert reward([""], ["a"], instruction_id=["q0"]) == [None]
        with pytest.raises(GradingError, match="3 groups in a row"):
            reward([""], ["a"], instruction_id=["q0"])
    assert SECRET not in caplog.text


def test_a_run_with_it(tmp_path: Path) -> None:
    tiny = save_tiny_policy(tmp_path / "tiny")
    recipe = GrpoRecipe(
        model=str(tiny), steps=2, max_seconds=None, num_generations=4, max_completion_length=8
    )
    reward = ImplicitReward(Lengths(), ROWS)
    result = train_grpo(recipe, ROWS, None, tmp_path / "run", reward=reward)
    assert [step.reward for step in result.history] == reward.history
    assert result.history[0].reward_std is not None
    write_history(tmp_path / "h.jsonl", reward.history)
    assert read_history(tmp_path / "h.jsonl") == reward.history
