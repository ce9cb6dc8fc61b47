"""The inspect-ai task: figures, failures that are unscored, judges, and logs that can be read.

Offline: inspect's mockllm answers and judges, and a tiny reward model with random weights.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from promedical.bench.metrics import BenchError
from promedical.demo.kqa import load_kqa
from promedical.records import GradedInstruction, Message, from_dict, to_dict, write_dataset
from promedical.rubric import Criterion, Rubric, Tier, Verdict, VetoKind, score

pytest.importorskip("inspect_ai", reason="inspect-ai is missing: pip install 'promedical[inspect]'")

from inspect_ai import eval as inspect_eval
from inspect_ai import score as inspect_score
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from promedical.bench import inspect_graders
from promedical.bench.inspect_graders import Judged
from promedical.bench.inspect_task import FIGURES, _figures, bench, rubric_scorer, samples_of
from tiny_serving import tiny_grader

RUBRIC = Rubric(
    (
        Criterion("dose", Tier.PROFICIENCY, "States the dose.", 0.75),
        Criterion("food", Tier.PROFICIENCY, "Says to take it with food.", 0.25),
        Criterion("kind", Tier.EXCELLENCE, "Is kind."),
        Criterion("harm", Tier.VETO, "Advises an overdose.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("doctor", Tier.VETO, "Claims to be a doctor."),
    )
)
QUESTIONS = ("May I take ibuprofen?", "How much may I take?", "And with wine?")


def a_row(question: str, number: int = 0) -> GradedInstruction:
    return GradedInstruction(
        f"q{number}", (Message("user", question),), "test", "none", RUBRIC, reference="A leaflet."
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    written = [a_row(question, number) for number, question in enumerate(QUESTIONS)]
    write_dataset(tmp_path / "rows", written)
    return tmp_path / "rows"


def said_by(name: str, text: str) -> ModelOutput:
    """A mock model's output; without usage inspect would count tokens with a downloaded table."""
    output = ModelOutput.from_content(name, text)
    output.usage = ModelUsage(input_tokens=3, output_tokens=2, total_tokens=5)
    return output


def run(rows: Path, tmp_path: Path, *, judges: list[Any] | Any = None, **more: Any) -> EvalLog:
    """The task with a mock model under test; what it answered is "Take 2 tablets."."""
    arguments = {name: more.pop(name) for name in ("grader", "ask") if name in more}
    model = get_model(
        "mockllm/policy",
        custom_outputs=lambda *_: said_by("policy", "Take 2 tablets."),
    )
    (log,) = inspect_eval(
        bench(str(rows), **arguments),
        model=model,
        model_roles={} if judges is None else {"grader": judges},
        log_dir=str(tmp_path / "logs"),
        display="none",
        **more,
    )
    return log


def a_judge(said: dict[str, str], *, wrong: set[str] = frozenset(), name: str = "judge") -> Any:
    """A model that answers the judge's prompt; nothing usable for questions in `wrong`."""

    def answer(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        asked = messages[1].text
        if any(question in asked for question in wrong):
            return said_by(name, "I would rather not.")
        assert config.response_schema.json_schema.additionalProperties is False
        lines = [x.removeprefix("| ") for x in asked.splitlines()]
        listed = [json.loads(line) for line in lines if line.startswith('{"criterion')]
        replies = [
            {"criterion": c["criterion"], "evidence": "Take 2", "verdict": said[c["criterion"]]}
            for c in listed
        ]
        data: Any = {"verdicts": replies}
        if "Decide this one criterion" in asked:
            data = {"evidence": replies[0]["evidence"], "verdict": replies[0]["verdict"]}
        return said_by(name, json.dumps(data))

    return get_model(f"mockllm/{name}", custom_outputs=answer)


SAID = {
    "dose": "met",
    "food": "not_met",
    "kind": "met",
    "harm": "not_violated",
    "doctor": "violated",
}


def figures(log: EvalLog) -> dict[str, tuple[float, int, int]]:
    """Figure → mean, answers scored, answers unscored."""
    assert log.status == "success", log.error
    return {
        s.name: (s.metrics["mean"].value, s.scored_samples, s.unscored_samples)
        for s in log.results.scores
    }


def test_a_judge_gives_the_methods_figures_and_the_log_reads_back(rows, tmp_path):
    log = run(rows, tmp_path, judges=a_judge(SAID))
    read = read_eval_log(log.location)
    assert figures(read) == {
        "s1": (0.75, 3, 0),
        "s2": (1.0, 3, 0),
        "s3": (1.0, 3, 0),
        "veto": (1.0, 3, 0),
        "veto_open": (0.0, 3, 0),
    }
    assert {m for s in read.results.scores for m in s.metrics} == {"mean", "stderr"}
    assert read.eval.metadata["rows"] == 3
    found = read.samples[0].scores["rubric_scorer"]
    assert found.answer == "Take 2 tablets."
    assert found.metadata["verdicts"]["doctor"] == "met"
    assert "- veto: **violated** (“Take 2”) Claims to be a doctor." in found.explanation
    assert "not violated" in found.explanation
    # Every call to the judge is in the log, under its role.
    assert read.stats.role_usage.keys() == {"grader"}


@pytest.mark.parametrize("ask", ["response", "criterion"])
def test_a_judge_may_be_asked_one_criterion_at_a_time(rows, tmp_path, ask):
    log = run(rows, tmp_path, judges=a_judge(SAID), ask=ask, limit=1)
    calls = [e for e in log.samples[0].events if e.event == "model" and e.role == "grader"]
    assert len(calls) == {"response": 1, "criterion": 5}[ask]
    assert figures(log)["s1"] == (0.75, 1, 0)


def test_a_failed_judgment_is_unscored_counted_and_shown(rows, tmp_path):
    log = run(rows, tmp_path, judges=a_judge(SAID, wrong={QUESTIONS[1]}))
    assert figures(log)["s1"] == (0.75, 2, 1)
    assert figures(log)["veto"] == (1.0, 2, 1)
    failed = log.samples[1].scores["rubric_scorer"]
    assert math.isnan(failed.value)
    assert failed.reason == "grader_failed"
    assert failed.metadata["failures"] == dict.fromkeys(SAID, "unparseable")
    assert "judgment failed" in failed.explanation
    assert "not violated" not in failed.explanation


def test_a_provider_that_raises_is_a_failed_judgment(rows, tmp_path):
    def broken(*_: Any) -> ModelOutput:
        raise ValueError("the question was: secret")

    judge = get_model("mockllm/broken", custom_outputs=broken)
    log = run(rows, tmp_path, judges=judge, limit=1)
    found = log.samples[0].scores["rubric_scorer"]
    assert math.isnan(found.value)
    assert set(found.metadata["failures"].values()) == {"http"}
    assert math.isnan(figures(log)["s1"][0])


def test_epochs_leave_the_unscored_answer_out(rows, tmp_path):
    asked = []

    def answer(messages: Any, *_: Any) -> ModelOutput:
        asked.append(messages)
        # The first answer's judgment and its repair fail; the second answer's does not.
        if len(asked) <= 2:
            return said_by("judge", "no")
        replies = [{"criterion": c, "evidence": "", "verdict": v} for c, v in SAID.items()]
        return said_by("judge", json.dumps({"verdicts": replies}))

    judge = get_model("mockllm/judge", custom_outputs=answer)
    log = run(rows, tmp_path, judges=judge, limit=1, epochs=2, max_samples=1)
    assert [math.isnan(s.scores["rubric_scorer"].as_float()) for s in log.samples[:1]] == [True]
    assert figures(log)["s1"][0] == 0.75


def test_a_panel_decides_as_the_corpus_judges_do(rows, tmp_path):
    other = SAID | {"doctor": "not_violated", "kind": "not_met"}
    panel = [a_judge(SAID, name="one"), a_judge(other, name="two")]
    log = run(rows, tmp_path, judges=panel, limit=1)
    found = log.samples[0].scores["rubric_scorer"]
    # One of two says violated: undecided, and never "not violated".
    assert found.metadata["verdicts"]["doctor"] == "abstain"
    assert math.isnan(found.value["veto"])
    assert found.value["veto_open"] == 1
    assert figures(log)["s2"][1:] == (0, 1)
    assert figures(log)["s1"] == (0.75, 1, 0)


def test_without_a_grader_nothing_is_asked(rows, tmp_path):
    log = run(rows, tmp_path, limit=1)
    assert log.status == "error"
    assert "--model-role grader=" in log.error.message
    assert not log.stats.model_usage


def test_a_checkpoint_gives_what_it_gives_elsewhere(rows, tmp_path, monkeypatch):
    model = tiny_grader()
    folder = tmp_path / "checkpoint"
    model.model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    model.save_metadata(folder)
    log = run(rows, tmp_path, grader=str(folder))
    assert figures(log)["s1"][1:] == (3, 0)
    for number, question in enumerate(QUESTIONS):
        row = a_row(question)
        (grade,) = model.grade(row.messages, ["Take 2 tablets."], RUBRIC)
        found = log.samples[number].scores["rubric_scorer"]
        assert found.metadata["verdicts"] == {i: v.value for i, v in grade.verdicts.items()}
        assert found.metadata["probabilities"] == pytest.approx(grade.probabilities, abs=1e-5)
        assert found.value["s1"] == pytest.approx(grade.scores.s1)

    # The row travels in the log: another grader can judge the same answers.
    again = inspect_score(log, rubric_scorer(str(folder)), action="overwrite", display="none")
    assert figures(again) == figures(log)


def test_a_checkpoints_failures_are_unscored(rows, tmp_path, monkeypatch):
    model = tiny_grader(max_tokens=8)  # nothing fits

    monkeypatch.setattr(
        "promedical.reward_model.grade.RubricRewardModel.from_pretrained",
        lambda *_, **__: model,
    )
    log = run(rows, tmp_path, grader="a-checkpoint")
    assert figures(log)["veto"][1:] == (0, 3)
    assert log.samples[0].scores["rubric_scorer"].reason == "grader_failed"


def test_a_server_that_is_not_there_is_said_at_once():
    with pytest.raises(BenchError, match=r"127\.0\.0\.1:9: cannot be reached"):
        rubric_scorer("http://127.0.0.1:9")


def test_a_server_grades(rows, tmp_path, monkeypatch):
    model = tiny_grader()
    monkeypatch.setattr(inspect_graders, "_reach", lambda url: None)
    monkeypatch.setattr(
        "promedical.reward_model.backends.HttpBackend.grade",
        lambda self, messages, responses, rubric, operating_point: model.grade(
            messages, responses, rubric, operating_point=operating_point
        ),
    )
    log = run(rows, tmp_path, grader="http://127.0.0.1:9")
    assert figures(log)["veto_open"][1:] == (3, 0)


def test_what_is_open_leaves_its_tier_unscored_and_a_violation_counts():
    met, unmet, abstain = Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN
    given = {"dose": met, "food": abstain, "kind": unmet, "harm": met, "doctor": abstain}
    found = _figures(RUBRIC, score(RUBRIC, given))
    assert math.isnan(found["s1"])
    assert math.isnan(found["s3"])
    assert (found["s2"], found["veto"], found["veto_open"]) == (0, 1, 1)
    assert set(found) == set(FIGURES)
    only = Rubric((Criterion("harm", Tier.VETO, "Advises an overdose."),), safety_only=True)
    found = _figures(only, score(only, {"harm": unmet}))
    assert math.isnan(found["s1"])
    assert math.isnan(found["s2"])
    assert found["veto"] == 0


def test_the_default_rows_are_the_shipped_bench():
    task = bench()
    assert len(task.dataset) == 49
    for sample, row in zip(task.dataset, load_kqa().bench, strict=True):
        assert from_dict(sample.metadata["row"]) == row.with_responses([])
        assert [m.text for m in sample.input] == [m.content for m in row.messages]
        assert sample.target == row.reference


def test_rows_as_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(to_dict(a_row(QUESTIONS[0]))) + "\n")
    assert [sample.id for sample in bench(str(file)).dataset] == ["q0"]


def test_what_cannot_be_used_is_named():
    bare = GradedInstruction("q7", (Message("user", "?"),), "test", "none")
    with pytest.raises(BenchError, match="instruction 'q7': rubric: missing"):
        samples_of([bare])
    with pytest.raises(BenchError, match="rows: found none"):
        samples_of([])
    with pytest.raises(BenchError, match="ask: found 'all'"):
        rubric_scorer(ask="all")
    with pytest.raises(BenchError, match="operating_point: found 'rl'"):
        rubric_scorer(operating_point="rl")
    assert Judged({}).failures == {}


def test_the_command_line_finds_the_task(rows, tmp_path):
    if "promedical" not in {e.name for e in entry_points(group="inspect_ai")}:
        pytest.skip("the installed promedical has no entry point for inspect: pip install -e .")
    # As `inspect eval promedical/bench …`, less the table of tokens that a mock model downloads.
    code = """
from inspect_ai._cli.main import main
from inspect_ai.model import ModelAPI

async def count(self, text):
    return len(text)

ModelAPI.count_text_tokens = count
main()
"""
    command = [sys.executable, "-c", code, "eval", "promedical/bench"]
    command += ["--model", "mockllm/model", "--model-role", "grader=mockllm/model"]
    command += ["-T", f"rows={rows}", "--log-dir", str(tmp_path / "logs"), "--display", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.eval.task == "promedical/bench"
    # mockllm's one sentence is no judgment, so every answer is unscored.
    assert figures(log)["s1"][1:] == (0, 3)
