"""Training that is killed with SIGKILL goes on to the very same weights.

The killed process is a real one, forked from this one; what it leaves on disk is all that survives.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from promedical.reward_model.instances import training_trees
from promedical.reward_model.model import TreeRewardModel, with_lora
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.trainer import TrainResult, train
from tiny_reward import load_renderer, random_rows, tiny_classifier

SETTINGS = TrainSettings(
    frozen_layers=1,
    epochs=2.0,
    batch_trees=2,
    learning_rate=3e-3,
    warmup_ratio=0.0,
    max_tokens=400,
    share_rows=True,
    save_steps=2,
)


def run(out: Path, settings: TrainSettings = SETTINGS, **kwargs: Any) -> TrainResult:
    model, tokenizer = tiny_classifier(layers=2)
    found = training_trees(random_rows(5), load_renderer())
    if settings.lora_rank:
        model = with_lora(model, rank=settings.lora_rank, alpha=8.0, frozen_layers=1)
    wrapped = TreeRewardModel(model, frozen_layers=1)
    return train(wrapped, tokenizer, found, settings, out, **kwargs)


def killed(task: Callable[[], None]) -> None:
    """Run a task in a process that has to die by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def between_checkpoints(out: Path, settings: TrainSettings) -> None:
    run(out, settings, progress=lambda done, total: die() if done == 5 else None)


def while_the_optimiser_is_written(out: Path, settings: TrainSettings) -> None:
    """Half of the fourth step's optimizer.pt reaches the disk."""
    save = torch.save

    def half(found: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(found, path, *args, **kwargs)
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half
    run(out, settings)


def while_the_weights_are_written(out: Path, settings: TrainSettings) -> None:
    """The same for a checkpoint's weights, which come first."""
    save = safetensors.torch.save_file

    def half(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(tensors, path, *args, **kwargs)
        if "checkpoint-4" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    safetensors.torch.save_file = half
    run(out, settings)


def just_before_the_checkpoint_is_whole(out: Path, settings: TrainSettings) -> None:
    touch = Path.touch

    def never(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.parent.name == "checkpoint-4":
            die()
        touch(path, *args, **kwargs)

    Path.touch = never  # type: ignore[method-assign]
    run(out, settings)


def while_the_finished_model_is_saved(out: Path, settings: TrainSettings) -> None:
    from transformers import PreTrainedModel

    def begin(self: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        die()

    PreTrainedModel.save_pretrained = begin  # type: ignore[method-assign]
    run(out, settings)


KILLS = (
    (between_checkpoints, 4),
    (while_the_optimiser_is_written, 2),
    (while_the_weights_are_written, 2),
    (just_before_the_checkpoint_is_whole, 2),
    (while_the_finished_model_is_saved, 6),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("whole")
    result = run(out)
    assert result.counts["optimiser_steps"] >= 6
    return out, result


@pytest.mark.parametrize(("kill", "whole"), KILLS, ids=[kill.__name__ for kill, _ in KILLS])
def test_the_weights_are_bit_for_bit_those_of_the_run_that_was_not_killed(
    kill, whole, uninterrupted, tmp_path
):
    killed(lambda: kill(tmp_path, SETTINGS))
    assert (tmp_path / "steps" / f"checkpoint-{whole}" / "whole").exists()
    steps: list[int] = []
    result = run(tmp_path, progress=lambda done, total: steps.append(done))
    assert min(steps, default=whole) >= whole
    expected, history = uninterrupted
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()
    for mine, theirs in zip(result.history, history.history, strict=True):
        assert (mine["step"], mine["loss"]) == (theirs["step"], theirs["loss"])
    assert not (tmp_path / "steps").exists()


def test_killed_twice_and_with_an_adapter(tmp_path):
    settings = replace(SETTINGS, lora_rank=2)
    run(tmp_path / "whole", settings)
    out = tmp_path / "killed"
    killed(lambda: while_the_optimiser_is_written(out, settings))
    killed(lambda: between_checkpoints(out, settings))
    run(out, settings)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"
    assert "score" in adapter["modules_to_save"]
