"""The gold judge's watch without a trainer: the best, failures, held-out prompts, judges."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from letter_grader import HELD, OTHER, ROWS, RUBRIC, TextGrader, asked
from promedical.policy.alarm import AlarmRule, shortcoming
from promedical.policy.gold import GoldError, GoldSettings, GoldWatch, judge_of, judge_with
from promedical.policy.held_out import HeldOutError, Sample, held_out, read_held_out
from promedical.policy.monitor import Monitor, MonitorSettings, open_monitor
from promedical.policy.recipe import PolicyRecipe
from promedical.policy.rewards import RubricReward
from promedical.recipe import load_recipe
from promedical.records import GradedInstruction
from promedical.rubric import Criterion, RewardSpec, Rubric, Scores, Tier

SETTINGS = GoldSettings("none:", prompts=12, every=2, max_new_tokens=6)

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


def test_a_run_killed_after_its_alarm_stops_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = AlarmRule(window=3, confirm=1, least_prompts=2, false_alarms=0.9)
    settings: dict[str, Any] = {"rule": rule, "on_alarm": "stop", "every": 10}
    state = SimpleNamespace(global_step=0, max_steps=40, is_world_process_zero=True)
    args = SimpleNamespace(fsdp=None)

    def begun(step: int) -> tuple[GoldWatch, Any]:
        watch, _ = told_watch(tmp_path, monkeypatch, lambda _: [0.1] * 3, **settings)
        tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
        rises = dict.fromkeys(["h0", "h1", "h2"])
        # More violations at every evaluation, of every prompt but the last.
        watch.gold = lambda rows: {
            name: Scores(0.1, 0, int(n < len(watch.lines.lines))) for n, name in enumerate(rises)
        }
        state.global_step = step
        watch.begin(args, state, Policy(), tokenizer)
        return watch, tokenizer

    watch, tokenizer = begun(0)
    control = SimpleNamespace(should_training_stop=False)
    for step in (10, 20):
        assert not control.should_training_stop
        state.global_step = step
        watch.step_end(state, control, Policy(), tokenizer)
    assert control.should_training_stop
    assert watch.stopped
    assert [alarm.kind for alarm in watch.alarms] == ["gold_veto_rises"]

    again, tokenizer = begun(20)
    control = SimpleNamespace(should_training_stop=False)
    state.global_step = 21  # no evaluation is due
    again.step_end(state, control, Policy(), tokenizer)
    assert control.should_training_stop
    assert [line["step"] for line in again.lines.lines] == [0, 10, 20]
    earlier, _ = begun(10)
    assert earlier.alarms == ()
    assert not (tmp_path / "alarms.json").exists()


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


def test_a_watch_whose_alarm_cannot_fire_is_refused_or_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = SimpleNamespace(global_step=0, max_steps=24, is_world_process_zero=True)
    why = (
        "gold: no alarm can be raised: 2 evaluations (24 steps, every = 50), 6 needed (window 5 + "
        "confirm 2 − 1), enough would be every = 5; 3 held-out prompts, 12 needed"
    )

    def begin(folder: str, **settings: Any) -> None:
        watch, _ = told_watch(tmp_path / folder, monkeypatch, lambda _: [0.1] * 3, **settings)
        monitor = Monitor(
            tmp_path / folder, rubrics={}, spec=RewardSpec(), gold=watch, for_alarms=True
        )
        tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
        monitor.begin(SimpleNamespace(fsdp=None), state, Policy(), tokenizer)

    with pytest.raises(GoldError, match=re.escape(why)):
        begin("stop", every=50, on_alarm="stop")
    assert not (tmp_path / "stop").exists()
    begin("warn", every=50)
    assert why in caplog.text
    caplog.clear()
    rule = AlarmRule(window=3, confirm=1, least_prompts=2, false_alarms=0.9)
    begin("fires", every=5, on_alarm="stop", rule=rule)
    assert "alarm" not in caplog.text


def test_recipes_with_a_gold_judge_can_raise_its_alarm() -> None:
    found = []
    for path in sorted((Path(__file__).parent.parent / "recipes" / "policy").glob("*.yaml")):
        if path.name.split("-")[0] not in ("grpo", "rloo", "dpo", "scalar"):
            continue
        recipe = load_recipe(PolicyRecipe, path)
        if recipe.monitor is not None and recipe.monitor.gold is not None:
            gold = recipe.monitor.gold
            assert shortcoming(gold.rule, gold.prompts, recipe.train.steps, gold.every) is None
            found.append(path.stem)
    assert found == ["grpo-qwen3-8b-lora"]


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


def test_a_gold_judge_is_on_the_gpu_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from promedical.reward_model.grade import RubricRewardModel

    placed: list[str | None] = []

    def load(path: str, *, device: str | None = None, **_: Any) -> TextGrader:
        placed.append(device)
        return TextGrader()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(RubricRewardModel, "from_pretrained", load)
    judge_of("checkpoint:rm,point=audit", tmp_path)
    judge_of("checkpoint:rm,device=cpu", tmp_path)
    assert placed == ["cuda", "cpu"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompts", 0), ("every", 0), ("max_new_tokens", 0), ("batch_size", 0), ("budget_usd", -1.0),
     ("on_alarm", "shout")],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: found"):
        GoldSettings("http://x", **{name: value})
