"""GRPO: a real TRL run on a tiny model, with a fake grader; stopping, resuming, no text in logs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import TrainerCallback

from promedical.policy.generate import generate
from promedical.policy.grpo import GrpoRecipe, GrpoResult, train_grpo
from promedical.policy.rewards import Grader, GradingError, RubricReward
from promedical.policy.run_folder import Clock, claim
from promedical.records import GradedInstruction, Message
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.rubric import (
    Criterion,
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Verdict,
    reward,
    score,
)
from tiny_policy import save_tiny_policy
from tiny_reward import tiny_classifier

SECRET = "Mrs Miller of 5 Elm Street"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It has an even number of characters.", 0.7),
        Criterion("p2", Tier.PROFICIENCY, "It has an a.", 0.3),
        Criterion("e1", Tier.EXCELLENCE, "It has a b."),
        Criterion("v1", Tier.VETO, "It has an upper-case letter among its first three."),
    )
)
ROWS = [
    GradedInstruction(f"q{i}", (Message("user", f"{SECRET}, {i}?"),), "test", "none", RUBRIC)
    for i in range(3)
]


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores


class Killed(BaseException):
    """Stands for the signal that ends a process."""


class TextGrader:
    """Judges by the letters of the answer; fails, or is killed, where told to."""

    def __init__(self, fail_at: Sequence[int] = (), kill_at: int | None = None) -> None:
        self.fail_at, self.kill_at = fail_at, kill_at
        self.calls = 0
        self.rewards: list[list[float | None]] = []

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        self.calls += 1
        assert operating_point == "reward"
        if self.calls == self.kill_at:
            raise Killed
        if self.calls in self.fail_at:
            raise RuntimeError(f"cannot read {responses[0]}")
        grades = []
        for text in responses:
            facts = (len(text) % 2 == 0, "a" in text, "b" in text, text[:3] != text[:3].lower())
            verdicts = {
                c.id: Verdict.MET if fact else Verdict.UNMET
                for c, fact in zip(rubric.criteria, facts, strict=True)
            }
            grades.append(FakeGrade(verdicts, score(rubric, verdicts)))
        self.rewards.append([reward(g.scores, GrpoRecipe().reward) for g in grades])
        return grades


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def recipe(tiny: Path, **settings: object) -> GrpoRecipe:
    few = GrpoRecipe(
        model=str(tiny),
        steps=2,
        max_seconds=None,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        save_steps=1,
    )
    return replace(few, **settings)  # type: ignore[arg-type]


def run(tiny: Path, folder: Path, grader: Grader | None = None, **settings: object) -> GrpoResult:
    return train_grpo(
        recipe(tiny, **settings),
        ROWS,
        grader or TextGrader(),
        folder,
        progress=lambda done, total: None,
    )


def test_a_run_trains_logs_and_saves(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    grader = TextGrader()
    with caplog.at_level(logging.DEBUG):
        result = run(tiny, tmp_path / "run", grader, steps=3)

    assert (result.planned_steps, result.done_steps, result.stopped_by) == (3, 3, "steps")
    assert result.resumed_at == 0
    assert [step.step for step in result.history] == [1, 2, 3]
    for step, rewards in zip(result.history, grader.rewards, strict=True):
        assert step.reward.answers == 4
        assert step.reward.groups == 1
        known = [r for r in rewards if r is not None]
        assert step.reward.reward == pytest.approx(sum(known) / 4)
        assert step.reward_std is not None
        assert step.reward.no_signal == (len(set(known)) == 1)
        assert 0 < (step.completion_tokens or 0) <= 8
        assert step.kl is not None
        assert step.cut is not None
    assert result.history[0].kl == pytest.approx(0, abs=1e-6)
    assert any((step.grad_norm or 0) > 0 for step in result.history)

    before = load_file(tiny / "model.safetensors")
    after = load_file(result.policy / "model.safetensors")
    assert any(not torch.allclose(before[name], after[name]) for name in after)
    assert (result.adapter / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    answers = generate(result.policy, ROWS, max_new_tokens=4, device="cpu")
    assert len(answers.texts) == 3

    shown = capfd.readouterr()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for text in (
        caplog.text,
        shown.out,
        shown.err,
        *(w.decode("utf-8", "replace") for w in written),
    ):
        assert SECRET not in text
        assert "Elm Street" not in text

    again = run(tiny, tmp_path / "run", TextGrader(kill_at=1), steps=3)
    assert again == result


def test_with_the_real_grader(tiny: Path, tmp_path: Path) -> None:
    classifier, tokenizer = tiny_classifier(layers=2)
    grader = RubricRewardModel(TreeRewardModel(classifier), tokenizer)
    result = run(tiny, tmp_path / "run", grader, steps=1)
    (step,) = result.history
    assert step.reward.failed == 0
    assert step.reward.reward is not None

    function = RubricReward.from_rows(grader, ROWS)
    texts = ["Rest it.", "", "See a doctor if it hurts."]  # a policy may well say nothing
    found = function([""] * 3, texts, instruction_id=["q0"] * 3)
    grades = grader.grade(ROWS[0].messages, texts, RUBRIC, operating_point="reward")
    assert found == [reward(grade.scores, RewardSpec()) for grade in grades]


def test_a_failed_group_trains_nothing_and_is_counted(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(tiny, tmp_path / "run", TextGrader(fail_at=(1, 2)), beta=0.0)
    assert [step.reward.failed for step in result.history] == [4, 4]
    assert [step.reward.reward for step in result.history] == [None, None]
    before = load_file(tiny / "model.safetensors")
    after = load_file(result.policy / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)
    shown = capfd.readouterr()
    for text in (caplog.text, shown.out, shown.err):
        assert SECRET not in text


def test_trl_reports_nothing_to_its_makers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    sent: list[bool] = []
    monkeypatch.setattr(
        "trl.trainer.base_trainer.send_telemetry",
        lambda *args, **kwargs: sent.append(constants.HF_HUB_DISABLE_TELEMETRY),
    )
    monkeypatch.delenv("CI", raising=False)
    run(tiny, tmp_path / "run", steps=1)
    assert sent == [True]  # called, but switched off
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(tiny: Path, tmp_path: Path) -> None:
    whole = run(tiny, tmp_path / "whole", steps=4, save_steps=2)
    with pytest.raises(Killed):
        run(tiny, tmp_path / "killed", TextGrader(kill_at=4), steps=4, save_steps=2)
    # A checkpoint that was being written when the run was killed.
    (tmp_path / "killed" / "checkpoints" / "checkpoint-3").mkdir()
    resumed = run(tiny, tmp_path / "killed", steps=4, save_steps=2)
    assert resumed.resumed_at == 2
    assert resumed.done_steps == 4
    assert [step.reward for step in resumed.history] == [step.reward for step in whole.history]
    assert [step.loss for step in resumed.history] == [step.loss for step in whole.history]
    expected = load_file(whole.policy / "model.safetensors")
    found = load_file(resumed.policy / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)


def test_killed_after_the_last_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("promedical.policy.grpo.save_merged", killed)
        with pytest.raises(Killed):
            run(tiny, tmp_path / "run")
    result = run(tiny, tmp_path / "run", TextGrader(kill_at=1))
    assert (result.resumed_at, result.done_steps) == (2, 2)
    assert [step.loss is None for step in result.history] == [False, False]


def test_stops_in_time(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = train_grpo(
        recipe(tiny, steps=500, max_seconds=0.5),
        ROWS,
        TextGrader(),
        tmp_path / "run",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.stopped_by == "time"
    assert result.planned_steps == 500
    for more, said in (
        ({"max_seconds": 9.0}, r"ended by time, max_seconds 0\.5\), but max_seconds: found 9\.0"),
        ({"max_seconds": None}, "max_seconds: found None"),
        ({"max_seconds": 0.5, "steps": 501}, "steps: found 501"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tiny, tmp_path / "run", **{"steps": 500, **more})  # type: ignore[arg-type]
    assert run(tiny, tmp_path / "run", steps=500, max_seconds=0.4) == result
    assert 1 <= result.done_steps < 500
    assert result.done_steps == 1 or result.seconds < 0.6
    assert seen[-1] == (result.done_steps, result.done_steps)


def test_the_clock_expects_what_fits() -> None:
    clock = Clock(steps=10, budget=10.0)
    assert clock.expected == 10
    clock.seconds = [3.0]
    assert clock.expected == 3
    clock.seconds = [3.0, 3.0]
    assert not clock.over
    clock.seconds = [3.0, 3.0, 3.0]
    assert clock.over
    clock.seconds = [20.0]
    assert clock.over
    assert Clock(steps=10, budget=None).expected == 10
    clock.seconds, clock.watched = [1.0, 1.0], [4.0, 0.0]
    assert clock.expected == 3  # what a monitor does takes time too


def test_a_monitors_time_is_not_the_steps(tiny: Path, tmp_path: Path) -> None:
    began, ended = [], []

    class Slow(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            began.append(time.monotonic())

        def on_step_end(self, *_: object, **__: object) -> None:
            ended.append(time.monotonic())
            time.sleep(0.5)

    result = train_grpo(
        recipe(tiny, steps=1), ROWS, TextGrader(), tmp_path / "run", callbacks=[Slow()]
    )
    (step,) = result.history
    assert step.seconds < ended[0] - began[0] + 0.4
    assert result.seconds == step.seconds
    assert (step.watching_seconds or 0) >= 0.5


def test_a_folder_knows_what_its_run_is_graded_by(tmp_path: Path) -> None:
    bare = {"recipe": {"beta": 0.1, "steps": 3}, "rows": "x"}
    graded = {**bare, "graded_by": {"asks": "criteria", "reward.grader": "checkpoint:a"}}
    claim(tmp_path, graded)
    claim(tmp_path, {**graded, "recipe": {"beta": 0.1, "steps": 4}})
    for other, said in (
        (
            {**graded, "graded_by": {"asks": "overall"}},
            "asks: found 'criteria', expected 'overall'",
        ),
        ({**graded, "method": "rloo"}, "method: another one"),
        (bare, "graded_by: another one"),
    ):
        with pytest.raises(ValueError, match=rf"run\.json: a run with other settings \({said}\)"):
            claim(tmp_path, other)
    claim(tmp_path / "rloo", {**bare, "method": "rloo"})
    with pytest.raises(ValueError, match="method: another one"):
        claim(tmp_path / "rloo", bare)


def test_lora_in_the_upper_layers_only(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "run", lora_layers=1)
    names = list(load_file(result.adapter / "adapter_model.safetensors"))
    assert names
    assert all(".layers.1." in name for name in names)


def test_bad_input_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: found none"):
        train_grpo(recipe(tiny), [], TextGrader(), tmp_path / "none")
    bare = [replace(ROWS[0], rubric=None)]
    with pytest.raises(RubricError, match="'q0': rubric"):
        train_grpo(recipe(tiny), bare, TextGrader(), tmp_path / "bare")
    with pytest.raises(GradingError, match="8 groups in a row"):
        run(tiny, tmp_path / "fails", TextGrader(fail_at=range(1, 99)), steps=20)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": {"beta": 0.5}, "rows": "x"}))
    with pytest.raises(ValueError, match=r"run\.json.*beta: found 0\.5, expected 0\.04.*rows"):
        run(tiny, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("num_generations", 1),
        ("learning_rate", float("nan")),
        ("temperature", 0.0),
        ("beta", -0.1),
        ("max_seconds", 0.0),
        ("lora_layers", 0),
        ("precision", "float16"),
    ],
)
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: found"):
        GrpoRecipe(**{name: value})  # type: ignore[arg-type]
