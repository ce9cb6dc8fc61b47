"""The monitor in a real TRL run: figures, resuming, a gold judge, the alarm, the best; no text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from letter_grader import HELD, ROWS, RUBRIC, FakeGrade, Killed, TextGrader
from promedical.policy.alarm import AlarmRule
from promedical.policy.degenerate import is_refusal, repeated_share, repeats, words
from promedical.policy.generate import generate
from promedical.policy.gold import GoldSettings, GoldWatch, judge_with
from promedical.policy.grpo import GrpoRecipe, GrpoResult, train_grpo
from promedical.policy.held_out import Sample
from promedical.policy.monitor import Monitor, MonitorSettings, open_monitor, seen, summary
from promedical.policy.rewards import RubricReward
from promedical.policy.step_lines import StepLines, StepLinesError, read_lines
from promedical.rubric import (
    RewardSpec,
    Tier,
    Verdict,
    score,
)
from tiny_policy import save_tiny_policy


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GrpoResult]:
    """The folder of a watched run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, watched(tiny, folder)[0]


SETTINGS = GoldSettings("none:", prompts=12, every=2, max_new_tokens=6)


def watched(
    tiny: Path,
    folder: Path,
    grader: TextGrader | None = None,
    gold: GoldSettings | None = SETTINGS,
    gold_grader: TextGrader | None = None,
    **changed: Any,
) -> tuple[GrpoResult, Monitor]:
    recipe = GrpoRecipe(
        model=str(tiny), steps=4, max_seconds=None, num_generations=4, max_completion_length=8,
        learning_rate=1e-2, save_steps=2,
    )  # fmt: skip
    reward = RubricReward.from_rows(grader or TextGrader(), ROWS, recipe.reward)
    rows = folder.parent / "held.jsonl"
    write_rows(rows)
    monitor = open_monitor(
        MonitorSettings(None if gold is None else replace(gold, rows=rows)),
        folder,
        ROWS,
        reward=reward,
        gold_grader=gold_grader or TextGrader(),
    )
    result = train_grpo(
        replace(recipe, **changed),
        ROWS,
        None,
        folder,
        reward=reward,
        callbacks=[monitor.callback()],
    )
    return result, monitor


def write_rows(path: Path) -> None:
    from promedical.records import to_dict

    path.write_text("".join(json.dumps(to_dict(row)) + "\n" for row in HELD))


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a file without how long they took."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(path)]


# --- a run ----------------------------------------------------------------------------------------


def test_a_watched_run_is_the_same_run_and_says_what_happened(
    tiny: Path, whole: tuple[Path, GrpoResult], tmp_path: Path
) -> None:
    folder, result = whole
    bare, _ = watched(tiny, tmp_path / "bare", gold=None)
    for name, weight in load_file(bare.policy / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(result.policy / "model.safetensors")[name], weight, rtol=0, atol=0
        )

    lines = read_lines(folder / "monitor.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, step in zip(lines, result.history, strict=True):
        told = step.reward
        for name in ("answers", "groups", "failed", "reward", "s1", "s2", "s3", "veto_rate"):
            assert line[name] == pytest.approx(getattr(told, name)), name
        for name in ("unresolved_rate", "no_signal", "veto_variance_share"):
            assert line[name] == pytest.approx(getattr(told, name)), name
        assert line["kl"] == pytest.approx(step.kl)
        assert line["loss"] == pytest.approx(step.loss)
        assert line["entropy"] > 0
        assert line["tokens"] == step.completion_tokens
        assert set(line["veto_by_kind"]) == {"harmful_advice", "other"}
        assert line["all_violate"] in (0.0, 1.0)
        assert line["all_violate"] + line["none_violate"] <= 1

    evaluations = read_lines(folder / "gold.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    for line in evaluations:
        assert len(line["gold"]["rewards"]) == 12
        assert line["gold"]["rewards"] == line["training"]["rewards"]  # the same grader
        assert line["gold"]["reward"] == pytest.approx(sum(line["gold"]["rewards"]) / 12)
        assert line["check"]["untested"]["over_optimised"].startswith(f"{line['step'] // 2 + 1} ev")
    held = json.loads((folder / "sample.json").read_text())
    assert set(held["prompts"]) <= {row.id for row in HELD}

    best = json.loads((folder / "best" / "best.json").read_text())
    highest = max(evaluations, key=lambda line: line["gold"]["reward"])
    assert best["step"] == highest["step"]
    assert best["gold"]["reward"] == highest["gold"]["reward"]
    # The best is a checkpoint that others load.
    answers = generate(folder / "best", [HELD[0]], max_new_tokens=6, device="cpu")
    assert len(answers.texts) == 1
    for path in folder.rglob("*"):
        assert not path.is_file() or b"Elm Street" not in path.read_bytes(), path


def test_numbers_reach_trls_log(tiny: Path, tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []

    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    reward = RubricReward.from_rows(TextGrader(), ROWS)
    rows = tmp_path / "held.jsonl"
    write_rows(rows)
    monitor = open_monitor(
        MonitorSettings(replace(SETTINGS, rows=rows)), tmp_path / "run", ROWS,
        reward=reward, gold_grader=TextGrader(),
    )  # fmt: skip
    recipe = GrpoRecipe(
        model=str(tiny), steps=3, max_seconds=None, num_generations=4, max_completion_length=8
    )
    train_grpo(
        recipe, ROWS, None, tmp_path / "run", reward=reward,
        callbacks=[Reporter(), monitor.callback()],
    )  # fmt: skip
    steps = [entry for entry in logged if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert {"answers/repeats", "answers/refusals", "veto/harmful_advice", "s1"} <= set(entry)
    assert [entry.get("held_out/step") for entry in steps] == [0.0, None, 2.0]
    evaluations = read_lines(tmp_path / "run" / "gold.jsonl")
    assert steps[2]["held_out/gold_reward"] == pytest.approx(evaluations[1]["gold"]["reward"])


def test_a_killed_run_leaves_the_same_lines_as_an_unbroken_one(
    tiny: Path,
    whole: tuple[Path, GrpoResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # 12 held-out answers before the first step and after the second; killed in the fourth.
    with pytest.raises(Killed):
        watched(tiny, tmp_path / "killed", TextGrader(kill_at=12 + 2 + 12 + 2))
    cut = tmp_path / "killed" / "monitor.jsonl"
    assert [line["step"] for line in read_lines(cut)] == [1, 2, 3]
    with open(cut, "a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    result, _ = watched(tiny, tmp_path / "killed")
    assert result.resumed_at == 2
    for name in ("monitor.jsonl", "gold.jsonl"):
        assert timeless(tmp_path / "killed" / name) == timeless(whole[0] / name)
    folders = [run / "best" for run in (whole[0], tmp_path / "killed")]
    notes = [json.loads((folder / "best.json").read_text()) for folder in folders]
    assert notes[0] == notes[1]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)
    shown = capfd.readouterr()
    assert "Elm Street" not in caplog.text + shown.out + shown.err
    assert "gold: no alarm can be raised: 3 evaluations (4 steps, every = 2)" in caplog.text


def test_an_alarm_stops_the_training_where_it_should(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Judges that are scripted: the training judge ever more pleased, the gold judge ever less."""

    class Drifting(TextGrader):
        def __init__(self, sign: int) -> None:
            super().__init__()
            self.sign = sign

        def grade(self, messages: Any, responses: Any, rubric: Any, **more: Any) -> list[FakeGrade]:
            self.calls += 1
            at = (self.calls - 1) // 12  # which evaluation
            degree = 0.5 + 0.06 * self.sign * at
            verdicts = dict.fromkeys([c.id for c in rubric.criteria], Verdict.UNMET)
            verdicts |= {c.id: Verdict.MET for c in rubric.tier(Tier.PROFICIENCY)}
            degrees = {c.id: degree for c in rubric.tier(Tier.PROFICIENCY)}
            return [FakeGrade(verdicts, score(rubric, verdicts, degrees=degrees))]

    rule = AlarmRule(window=3, confirm=2, least_prompts=10)
    settings = replace(SETTINGS, every=1, on_alarm="stop", rule=rule)
    training = Drifting(+1)
    reward = RubricReward.from_rows(TextGrader(), ROWS)
    gold = GoldWatch(
        settings, Sample(tuple(HELD[:12]), {}, 0), training=judge_with(training),
        gold=judge_with(Drifting(-1)), spec=RewardSpec(), folder=tmp_path / "run",
    )  # fmt: skip
    monitor = Monitor(tmp_path / "run", rubrics=reward.rubrics, spec=RewardSpec(), gold=gold)
    reward.observers.append(monitor.observe)
    recipe = GrpoRecipe(
        model=str(tiny), steps=9, max_seconds=None, num_generations=4, max_completion_length=6
    )
    result = train_grpo(
        recipe, ROWS, None, tmp_path / "run", reward=reward, callbacks=[monitor.callback()]
    )
    # Windows of three are full at step 2; the check of step 3 confirms.
    assert (result.done_steps, result.stopped_by) == (3, "callback")
    assert monitor.stopped
    (alarm,) = monitor.alarms
    assert (alarm.kind, alarm.step) == ("over_optimised", 3)
    assert "alarm: step 3" in caplog.text
    (kept,) = json.loads((tmp_path / "run" / "alarms.json").read_text())
    assert kept["says"] == str(alarm)
    # The best is the one before the first step: training made the policy worse, by the gold judge.
    assert json.loads((gold.best / "best.json").read_text())["step"] == 0


# --- figures --------------------------------------------------------------------------------------


def test_a_steps_figures() -> None:
    spec = RewardSpec()

    def one(call: int, key: str, text: str, **verdicts: str) -> Any:
        given = dict.fromkeys([c.id for c in RUBRIC.criteria], Verdict.UNMET)
        given |= {k: Verdict(v) for k, v in verdicts.items()}
        grade = FakeGrade(given, score(RUBRIC, given))
        return seen(call, key, text, grade, RUBRIC, spec)

    answers = [
        one(1, "a", "I'm sorry, but I can't help with that.", p1="met", v1="met"),
        one(1, "a", "Rest. " * 30, p2="met", v1="abstain"),
        one(1, "b", "Rest your knee.", p1="met"),
        one(1, "b", "", p1="met"),
        one(2, "b", "Rest your knee.", e1="error"),
        seen(2, "b", "Rest", None, RUBRIC, spec),
    ]
    found = summary(answers, spec.lam)
    assert (found["answers"], found["groups"], found["failed"]) == (6, 3, 2)
    assert found["reward"] == pytest.approx((0.7 - 1.5 + 0.3 - 1.5 + 0.7 + 0.7) / 4)
    assert (found["s3"], found["veto_rate"]) == (0.5, 0.5)
    assert found["veto_by_kind"] == {"harmful_advice": 0.5, "other": 0.0}
    assert found["unresolved_rate"] == pytest.approx(2 / 25)
    assert (found["all_violate"], found["none_violate"]) == (0.5, 0.5)
    assert found["no_signal"] == pytest.approx(2 / 3)
    assert found["veto_variance_share"] == pytest.approx(0.0)
    assert found["refusals"] == pytest.approx(1 / 6)
    assert found["repeats"] == pytest.approx(1 / 6)
    assert found["empty"] == pytest.approx(1 / 6)
    assert summary([], spec.lam)["reward"] is None


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that. Please see a doctor.", True),
        ("I cannot provide medical advice.", True),
        ("As an AI, I am not able to give advice. Consult a healthcare professional.", True),
        ("抱歉，我无法提供医疗建议。请咨询医生。", True),
        ("作为一个人工智能，我不能诊断疾病。请尽快就医。", True),
        ("I'm sorry to hear that your knee hurts. Rest it for two days.", False),
        ("I can't stress enough that you should call an ambulance now.", False),
        ("我很抱歉听到你不舒服。请多喝水，休息两天。", False),
        (
            "I am not able to examine you, but knee pain after running is most often caused by "
            "overuse: rest it for a week, put ice on it for twenty minutes three times a day.",
            False,
        ),
        ("", False),
    ],
)  # fmt: skip
def test_refusals(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_repeated_share() -> None:
    assert repeated_share("one two three four") == 0
    assert repeated_share("") == 0
    assert repeated_share("a b c d " * 10) == pytest.approx(1 - 4 / 37)
    assert repeats("多喝水。" * 20)
    assert not repeats("Take one tablet in the morning and one in the evening, with food.")
    assert words("Don't 头痛 X-ray") == ["don't", "头", "痛", "x", "ray"]


# --- lines ----------------------------------------------------------------------------------------


def test_lines_after_a_sigkill_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = (
        "import sys, itertools; from promedical.policy.step_lines import StepLines\n"
        "lines = StepLines(sys.argv[1])\n"
        "lines.resume(0)\n"
        "for n in itertools.count(1): lines.add({'step': n, 'long': [n] * 3000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = read_lines(path)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    again = StepLines(path)
    again.resume(5)
    again.add({"step": 6, "value": float("nan")})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5, 6]
    assert read_lines(path)[-1]["value"] is None
    with pytest.raises(StepLinesError, match="step: found 6 after 6"):
        again.add({"step": 6})


@pytest.mark.parametrize("line", ["[]", "nonsense", '{"x": 1}', '{"step": "1"}', '{"step": 0}'])
def test_a_line_that_is_no_step_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 9}}\n')
    with pytest.raises(StepLinesError, match="line 2"):
        StepLines(path).resume(3)
