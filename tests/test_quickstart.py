"""The quickstart end to end on a tiny random model: every stage, resuming, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from promedical import cli
from promedical.corpus.degrade_config import DegradeConfig
from promedical.policy.grpo import GrpoRecipe
from promedical.quickstart import (
    PRESETS,
    QuickstartError,
    QuickstartRecipe,
    run_quickstart,
    stages,
)
from promedical.quickstart.results import collect
from promedical.recipe import load_recipe
from promedical.records import read_dataset
from promedical.reward_model import doctor
from promedical.reward_model.settings import TrainSettings
from promedical.rubric import Tier
from tiny_policy import save_tiny_policy


class _Encoder:
    """Hashes words into a few numbers: an encoder where no weights are at hand."""

    def encode(self, sentences: list[str]) -> np.ndarray:
        vectors = np.zeros((len(sentences), 64), dtype=np.float32)
        for vector, sentence in zip(vectors, sentences, strict=True):
            for word in sentence.lower().split():
                vector[sum(map(ord, word)) % 64] += 1
        return vectors


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> QuickstartRecipe:
    model = save_tiny_policy(tmp_path_factory.mktemp("model"), layers=2, positions=4096)
    return QuickstartRecipe(
        out=str(tmp_path_factory.mktemp("runs") / "tiny"),
        model=str(model),
        train_instructions=4,
        calibration_instructions=6,
        bench_instructions=4,
        answer_tokens=6,
        degrade=DegradeConfig(candidates=1, max_tokens=700),  # tokens are bytes here
        train=TrainSettings(frozen_layers=1, learning_rate=1e-3),
        grpo=GrpoRecipe(steps=1, num_generations=2, max_completion_length=4, max_seconds=None),
    )


def _run_tiny(recipe: QuickstartRecipe) -> None:
    """A run of the tiny recipe; the overlap check is told apart from real embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promedical.demo.models.resolve_encoder", lambda: _Encoder())
        patch.setattr("promedical.corpus.overlap.LIMITS", {})
        assert run_quickstart(recipe) == 0


@pytest.fixture(scope="module")
def finished(recipe: QuickstartRecipe) -> Path:
    _run_tiny(recipe)
    return Path(recipe.out)


def test_every_stage_leaves_its_result_and_the_report_is_one_page(finished: Path) -> None:
    names = [path.stem for path in sorted((finished / "stages").iterdir())]
    assert names == sorted(stages.STAGES)
    results = json.loads((finished / "results.json").read_text())
    assert results["data"]["overlap"]["over_limit"] == 0
    assert set(results["train"]) == {"explicit", "scalar", "tokens"}
    assert {"explicit", "untrained", "scalar", "word_overlap", "random"} <= set(
        results["bench"]["graders"]
    )
    assert results["bench"]["failed_judgments"] == 0
    assert results["grpo"]["done_steps"] == 1
    assert len(results["answers"]["answers"]["tuned"]) == 4
    page = (finished / "report.html").read_text()
    assert page.lstrip().startswith("<!doctype html>") or page.lstrip().startswith(
        "<!DOCTYPE html>"
    )
    assert not re.search(r'(?:src|href)="https?://', page)


def test_the_doctor_finds_nothing_wrong_with_its_checkpoint(finished: Path) -> None:
    found = doctor.examine(finished / "models" / "explicit")
    assert [check for check in found.checks if check.outcome == "differs"] == []
    skipped = {check.way for check in found.checks if check.outcome == "skipped"}
    assert len(found.checks) - len(skipped) >= 8, skipped
    assert found.spread > 0.01


def test_the_splits_share_no_instruction_and_keep_to_the_budget(
    finished: Path, recipe: QuickstartRecipe
) -> None:
    rows = {split: read_dataset(finished / "data" / split) for split in stages.SEED_OF_SPLIT}
    ids = [row.id for split in rows.values() for row in split]
    assert len(ids) == len(set(ids))
    for row in (*rows["train"], *rows["bench"]):
        assert row.rubric is not None
        assert len(row.rubric.criteria) <= recipe.max_criteria
        assert len(row.rubric.tier(Tier.VETO)) >= recipe.min_veto
        assert len(row.responses) >= 4
    for row in rows["calibration"]:
        assert row.rubric is not None
        assert len(row.rubric.tier(Tier.VETO)) == 7  # family-wise over the whole bank


def test_a_second_run_does_no_stage_again(
    finished: Path, recipe: QuickstartRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a finished stage ran again")

    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, refuse)
    assert run_quickstart(recipe) == 0


def test_a_killed_run_goes_on_from_the_last_finished_stage(
    finished: Path, recipe: QuickstartRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    report = stages.STAGES["report"]
    for name in list(stages.STAGES):
        if name != "report":
            monkeypatch.setitem(stages.STAGES, name, lambda *_, name=name: ran.append(name))

    def counted(run: stages.Run, move: stages.Move) -> dict:
        ran.append("report")
        return report(run, move)

    monkeypatch.setitem(stages.STAGES, "report", counted)
    (finished / "stages" / "report.json").unlink()  # killed before the report was finished
    (finished / "report.html").unlink()
    assert run_quickstart(recipe) == 0
    assert ran == ["report"]
    assert (finished / "report.html").exists()


def test_sigkill_in_the_middle_of_a_stage_loses_only_that_stage(
    finished: Path, recipe: QuickstartRecipe, tmp_path: Path
) -> None:
    again = replace(recipe, out=str(tmp_path / "killed"))
    process = multiprocessing.get_context("spawn").Process(target=_run_tiny, args=(again,))
    process.start()
    folder = Path(again.out)
    deadline = time.monotonic() + 120
    while not (folder / "models" / "explicit").exists():  # in the middle of training
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()}
    assert set(done) == {"data.json"}

    _run_tiny(again)
    assert {n: (folder / "stages" / n).stat().st_mtime_ns for n in done} == done
    ours, whole = (json.loads((f / "results.json").read_text()) for f in (folder, finished))
    assert ours["bench"]["graders"] == whole["bench"]["graders"]
    assert [s["name"] for s in ours["stages"]] == [s["name"] for s in whole["stages"]]


def test_a_run_that_went_on_with_other_code_says_so(recipe: QuickstartRecipe) -> None:
    def stage(commit: str, dirty: bool) -> dict[str, object]:
        code = {"commit": commit, "dirty": dirty}
        return {"result": {}, "seconds": 1.0, "peak_memory_gb": 1.0, "code": code}

    for codes, dirty in (
        ([("a", False), ("a", False)], False),
        ([("a", False), ("b", False)], False),
        ([("a", True), ("a", False)], True),
    ):
        stage_results = {
            name: stage(*code) for name, code in zip(("train", "bench"), codes, strict=True)
        }
        found = collect(recipe, stage_results, stages.TITLES, [])["provenance"]
        assert found["dirty"] is dirty
        assert found["commit"] == codes[-1][0]
        assert found["stage_commits"] == {
            name: code[0] for name, code in zip(("train", "bench"), codes, strict=True)
        }


def test_a_folder_of_other_settings_is_refused(finished: Path, recipe: QuickstartRecipe) -> None:
    with pytest.raises(QuickstartError, match="other settings"):
        run_quickstart(replace(recipe, seed=1))


def test_the_presets_are_recipes() -> None:
    for name in PRESETS:
        assert load_recipe(QuickstartRecipe, None, [f"--{name}"], presets=PRESETS).mode == name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bench-instructions", "0"], "bench_instructions"),
        (["--max-criteria", "2"], "max_criteria"),
        (["--max-criterai", "2"], "max"),
        (["--train.frozen-layers", "x"], "frozen"),
    ],
)
def test_bad_settings_end_with_exit_code_2_and_no_traceback(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
