"""The monitor in a real TRL run: figures, resuming, a gold judge, the alarm, the best; no text."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from promedical.policy.alarm import AlarmRule
from promedical.policy.degenerate import is_refusal, repeated_share, repeats, words
from promedical.policy.generate import generate
from promedical.policy.gold import GoldError, GoldSettings, GoldWatch, judge_of, judge_with
from promedical.policy.grpo import GrpoRecipe, GrpoResult, train_grpo
from promedical.policy.held_out import HeldOutError, Sample, held_out, read_held_out
from promedical.policy.monitor import Monitor, MonitorSettings, open_monitor, seen, summary
from promedical.policy.rewards import RubricReward
from promedical.policy.step_lines import StepLines, StepLinesError, read_lines
from promedical.records import GradedInstruction, Message
from promedical.rubric import (
    Criterion,
    RewardSpec,
    Rubric,
    Scores,
    Tier,
    Verdict,
    VetoKind,
    score,
)
from tiny_policy import save_tiny_policy

SECRET = "Mrs Miller of 5 Elm Street"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It has an even number of characters.", 0.7),
        Criterion("p2", Tier.PROFICIENCY, "It has an a.", 0.3),
        Criterion("e1", Tier.EXCELLENCE, "It has a b."),
        Criterion("v1", Tier.VETO, "It has an upper case letter.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("v2", Tier.VETO, "It is empty."),
    )
)
OTHER = Rubric((Criterion("q", Tier.PROFICIENCY, "It is odd.", 1.0), *RUBRIC.criteria[2:]))


def asked(name: str, rubric: Rubric = RUBRIC) -> GradedInstruction:
    return GradedInstruction(name, (Message("user", f"{SECRET}, {name}?"),), "t", "none", rubric)


ROWS = [asked(f"q{i}") for i in range(3)]
HELD = [asked(f"h{i}", OTHER) for i in range(14)]


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores


class Killed(BaseException):
    """Stands for the signal that ends a process."""


class TextGrader:
    """Judges by the letters of the answer; fails, or is killed, where told to."""

    def __init__(self, kill_at: int | None = None, fail: Callable[[str], bool] | None = None):
        self.kill_at, self.fail = kill_at, fail
        self.calls = 0

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        assert operating_point == "reward"
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        if self.fail is not None and self.fail(messages[-1].content):
            raise RuntimeError(f"cannot read {responses[0]}")
        grades = []
        for text in responses:
            facts = {
                "p1": len(text) % 2 == 0,
                "q": len(text) % 2 == 1,
                "p2": "a" in text,
                "e1": "b" in text,
                "v1": text[:3] != text[:3].lower(),
                "v2": not text,
            }
            verdicts = {
                c.id: Verdict.MET if facts[c.id] else Verdict.UNMET for c in rubric.criteria
            }
            grades.append(FakeGrade(verdicts, score(rubric, verdicts)))
        return grades


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


# --- the watch without a trainer ------------------------------------------------------------------


class Policy:
    """A stand-in for a model: saves a number."""

    training = True

    def __init__(self) -> None:
        self.number = 0

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "number").write_text(str(self.number))


def told_watch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    gold: Callable[[int], Sequence[float | None]],
    **settings: Any,
) -> tuple[GoldWatch, Callable[[int], None]]:
    """A watch whose judges say what they are told, by step; gives it and its evaluation."""
    now = [0]
    sample = Sample(tuple(HELD[:3]), {}, 0)
    monkeypatch.setattr(
        "promedical.policy.gold.answer_with",
        lambda model, tokenizer, rows, **_: SimpleNamespace(
            texts=["It is fine."] * len(rows), tokens=[3] * len(rows), cut_count=0
        ),
    )

    def judged(rows: Sequence[GradedInstruction]) -> dict[str, Scores | None]:
        given = gold(now[0])
        return {
            row.id: None if s is None else Scores(s, 0, 0)
            for row, s in zip(rows, given, strict=True)
        }

    watch = GoldWatch(
        replace(SETTINGS, **settings), sample, training=judged, gold=judged, spec=RewardSpec(),
        folder=folder,
    )  # fmt: skip
    policy = Policy()
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)

    def evaluate(step: int) -> None:
        now[0] = policy.number = step
        watch.evaluate(step, policy, tokenizer, 5)
        assert policy.training

    return watch, evaluate


def best_step(watch: GoldWatch) -> int:
    note = json.loads((watch.best / "best.json").read_text())
    assert (watch.best / "number").read_text() == str(note["step"])
    return int(note["step"])


def test_the_best_is_kept_by_gold_and_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {0: 0.2, 5: 0.6, 10: 0.4, 15: 0.7, 18: 0.8, 20: 0.5}
    gold = lambda step: [values[step]] * 3  # noqa: E731
    watch, evaluate = told_watch(tmp_path, monkeypatch, gold)
    watch.resume(0)
    for step in (0, 5, 10):
        evaluate(step)
    assert best_step(watch) == 5
    watch.saved(SimpleNamespace(global_step=10))
    evaluate(15)
    evaluate(18)
    assert best_step(watch) == 18

    # Killed; the last checkpoint is that of step 10: what came after is forgotten.
    again, evaluate = told_watch(tmp_path, monkeypatch, gold)
    again.resume(10)
    assert best_step(again) == 5
    assert [line["step"] for line in again.lines.lines] == [0, 5, 10]
    evaluate(15)
    evaluate(18)
    assert best_step(again) == 18
    again.saved(SimpleNamespace(global_step=18))
    evaluate(20)
    assert best_step(again) == 18
    last, _ = told_watch(tmp_path, monkeypatch, gold)
    last.resume(18)
    assert best_step(last) == 18
    assert not (tmp_path / "best-before").exists()


def test_failed_judgments_are_counted_and_never_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {0: [0.2, 0.9, 0.1], 2: [None, 0.8, 0.2], 4: [None, None, None], 6: [0.9, None, 0.05]}
    watch, evaluate = told_watch(tmp_path, monkeypatch, lambda step: given[step])  # type: ignore
    watch.resume(0)
    for step in given:
        evaluate(step)
    lines = watch.lines.lines
    assert [line["gold"]["failed"] for line in lines] == [0, 1, 3, 1]
    assert [line["gold"]["reward"] for line in lines if line["step"] != 4] == pytest.approx(
        [0.4, 0.5, 0.475]
    )
    assert lines[2]["gold"]["reward"] is None
    # At step 2 the mean is higher, but the prompts that both have gained nothing.
    assert [line["best"] for line in lines] == [True, False, False, True]
    assert "could not grade 3" in caplog.text


def test_a_judge_that_breaks_down_ends_no_training_but_begins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gold(step: int) -> list[float]:
        if step != 0:
            raise ConnectionError("no route to Elm Street")
        return [0.1] * 3

    watch, evaluate = told_watch(tmp_path / "a", monkeypatch, gold)
    watch.resume(0)
    evaluate(0)
    evaluate(5)
    assert watch.lines.lines[1]["gold"]["failed"] == 3
    assert "the gold judge failed: ConnectionError" in caplog.text
    assert "Elm Street" not in caplog.text
    watch, evaluate = told_watch(tmp_path / "b", monkeypatch, gold)
    watch.resume(0)
    with pytest.raises(GoldError, match="training judge: ConnectionError; nothing was trained"):
        evaluate(7)


def test_all_processes_stop_when_the_first_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from promedical.policy.gold import _first_says

    assert _first_says(True) is True
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def broadcast(values: list[bool], src: int) -> None:
        assert src == 0
        values[0] = True  # what the first process holds

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert _first_says(False) is True


def test_answers_are_kept_only_if_asked_for_and_for_the_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, evaluate = told_watch(tmp_path / "a", monkeypatch, lambda step: [0.1] * 3)
    watch.resume(0)
    evaluate(0)
    assert not (tmp_path / "a" / "answers").exists()
    watch, evaluate = told_watch(
        tmp_path / "b", monkeypatch, lambda step: [0.1] * 3, keep_answers=True
    )
    watch.resume(0)
    evaluate(0)
    path = tmp_path / "b" / "answers" / "step-0.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text().splitlines()[0]) == {"id": "h0", "text": "It is fine."}


def test_another_runs_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = told_watch(tmp_path, monkeypatch, lambda step: [0.1] * 3)
    watch.resume(0)
    other, _ = told_watch(tmp_path, monkeypatch, lambda step: [0.1] * 3, judge="http://x")
    with pytest.raises(GoldError, match=r"sample\.json: a run with other judge"):
        other.resume(0)


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = told_watch(tmp_path, monkeypatch, lambda step: [0.1] * 3)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, max_steps=2)
    with pytest.raises(GoldError, match="sharded"):
        watch.begin(SimpleNamespace(fsdp=["full_shard"]), state, Policy(), None)


# --- held out -------------------------------------------------------------------------------------


def test_held_out_means_no_prompt_and_no_criterion_of_training() -> None:
    shared = Rubric(
        (
            Criterion("a", Tier.PROFICIENCY, "it has an  EVEN number of characters", 0.5),
            Criterion("b", Tier.PROFICIENCY, "It names a dose.", 0.5),
            Criterion("v1", Tier.VETO, "It has an upper case letter."),
        )
    )
    only_shared = Rubric((Criterion("a", Tier.PROFICIENCY, RUBRIC.criteria[0].text, 1.0),))
    rows = [
        asked("q1"),
        asked("mixed", shared),
        asked("shared", only_shared),
        replace(asked("none"), rubric=None),
        *HELD,
        HELD[0],
    ]
    found = held_out(rows, ROWS, prompts=100)
    assert {row.id for row in found.rows} == {"mixed", *(row.id for row in HELD)}
    assert found.left_out == {
        "asked in training too": 1,
        "no criterion of proficiency of its own": 1,
        "without a rubric that gives a reward": 1,
        "id repeats": 1,
    }
    mixed = next(row for row in found.rows if row.id == "mixed")
    assert mixed.rubric is not None
    assert [(c.id, c.weight) for c in mixed.rubric.criteria] == [("b", 1.0), ("v1", None)]
    # The bonus "It has a b." is in training's rubrics too, the vetoes stay.
    assert [c.id for c in found.rows[0].rubric.criteria] == ["q", "v1", "v2"]  # type: ignore
    assert found.criteria_left_out == 1 + 1 + len(HELD)
    fewer = held_out(rows, ROWS, prompts=5, seed=1)
    assert fewer == held_out(list(reversed(rows)), ROWS, prompts=5, seed=1)
    assert len(fewer.rows) == 5
    with pytest.raises(HeldOutError, match=r"none of 3 rows can be used \(3 asked in training too"):
        held_out(ROWS, ROWS, prompts=5)


def test_kqa_is_the_default() -> None:
    assert len(read_held_out(None)) == 25


# --- judges ---------------------------------------------------------------------------------------


def test_a_judge_that_raises_or_fails_gives_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from promedical.records import Response

    rows = [row.with_responses([Response("p", "p", "abc")]) for row in HELD[:2]]
    judged = judge_with(TextGrader(fail=lambda text: "h0" in text))(rows)
    assert judged["h0"] is None
    assert judged["h1"] == Scores(1.0, 1, 0)
    assert "RuntimeError" in caplog.text
    assert "Elm Street" not in caplog.text
    assert "abc" not in caplog.text


def test_a_gold_judge_by_name(tmp_path: Path) -> None:
    with pytest.raises(GoldError, match="gold judge: system: found 'nonsense'"):
        judge_of("nonsense", tmp_path)
    reward = RubricReward.from_rows(TextGrader(), ROWS)
    settings = MonitorSettings(GoldSettings(f"checkpoint:{tmp_path}/rm/"))
    with pytest.raises(GoldError, match="is the training judge itself"):
        open_monitor(
            settings, tmp_path, ROWS, reward=reward, judged_by=f"checkpoint:{tmp_path}/rm,dtype=x"
        )
    with pytest.raises(GoldError, match="no training judge"):
        open_monitor(settings, tmp_path, ROWS)


def test_a_language_model_as_the_gold_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fake_asker import FakeAsker
    from promedical.llm.calls import Call, Failure
    from promedical.records import Response
    from scripted_models import scripted

    def answer(call: Call) -> str | Failure:
        return (
            Failure(call, "timeout", "") if "h1?" in call.messages[-1].content else scripted(call)
        )

    monkeypatch.setattr("promedical.llm.client.EndpointAsker", lambda *a, **k: FakeAsker(answer))
    judge = judge_of("judge:m@http://127.0.0.1:9/v1", tmp_path)
    found = judge([row.with_responses([Response("p", "p", "Rest it.")]) for row in HELD[:4]])
    assert set(found) == {"h0", "h1", "h2", "h3"}
    assert found["h1"] is None  # a failed judgment is no verdict
    given = [scores for name, scores in found.items() if name != "h1"]
    assert all(scores is not None and scores.s1 in (0.0, 1.0) for scores in given)


def test_a_real_checkpoint_as_the_gold_judge(tmp_path: Path) -> None:
    from promedical.records import Response
    from promedical.reward_model.grade import RubricRewardModel
    from tiny_reward import tiny_classifier

    model, tokenizer = tiny_classifier(layers=2)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = [row.with_responses([Response("p", "p", "Rest it.")]) for row in HELD[:2]]
    judged = judge_of(f"checkpoint:{tmp_path / 'rm'}", tmp_path)(rows)
    grader = RubricRewardModel.from_pretrained(tmp_path / "rm")
    (grade,) = grader.grade(rows[0].messages, ["Rest it."], OTHER, operating_point="reward")
    assert judged["h0"] == grade.scores
    assert judged == judge_with(grader)(rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompts", 0), ("every", 0), ("max_new_tokens", 0), ("batch_size", 0), ("budget_usd", -1.0),
     ("on_alarm", "shout")],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: found"):
        GoldSettings("http://x", **{name: value})


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
