"""A policy's training that is killed with SIGKILL goes on to the same weights: GRPO, RLOO, DPO.

The killed process is a real one, forked from this one; what it leaves on disk is all that survives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from promedical.policy import run_folder
from promedical.policy.dpo import DpoRecipe, train_dpo
from promedical.policy.grpo import GrpoRecipe, train_grpo
from promedical.policy.rloo import train_rloo
from test_grpo import ROWS, TextGrader
from test_kill import die, killed
from tiny_policy import save_tiny_policy
from tiny_reward import random_rows

STEPS = 4

Progress = Callable[[int, int], None]
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def grpo(tiny: Path, out: Path, *, grader: Any = None, progress: Progress | None = None) -> Any:
    """A group of two instructions in two backward passes, with an adapter."""
    recipe = GrpoRecipe(
        model=str(tiny),
        steps=STEPS,
        max_seconds=None,
        num_generations=4,
        prompts_per_step=2,
        micro_batch=4,
        max_completion_length=8,
        learning_rate=1e-2,
        warmup_steps=3,
        save_steps=2,
        advantages="lexicographic",
        overlap=2,
    )
    return train_grpo(recipe, ROWS, grader or TextGrader(), out, progress=progress)


def rloo(tiny: Path, out: Path, *, grader: Any = None, progress: Progress | None = None) -> Any:
    """All weights, so that the reference model has to be the starting policy again."""
    recipe = GrpoRecipe(
        model=str(tiny),
        steps=STEPS,
        max_seconds=None,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        lora_rank=0,
        save_steps=2,
    )
    return train_rloo(recipe, ROWS, grader or TextGrader(), out, progress=progress)


def dpo(tiny: Path, out: Path, *, grader: Any = None, progress: Progress | None = None) -> Any:
    recipe = DpoRecipe(model=str(tiny), epochs=2, learning_rate=1e-2, max_length=400, save_steps=2)
    return train_dpo(recipe, random_rows(5), out, progress=progress)


TRAIN: dict[str, Train] = {"grpo": grpo, "rloo": rloo, "dpo": dpo}


class Deadly(TextGrader):
    """Dies when it is asked for the n-th time, which is in the middle of a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def grade(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls + 1 == self.at:
            die()
        return super().grade(*args, **kwargs)


def within_a_step(train: Train, tiny: Path, out: Path) -> None:
    train(tiny, out, grader=Deadly(5 if train is grpo else 3))


def between_checkpoints(train: Train, tiny: Path, out: Path) -> None:
    train(tiny, out, progress=lambda done, total: die() if done == 3 else None)


def while_the_optimiser_is_written(train: Train, tiny: Path, out: Path) -> None:
    save = torch.save

    def half(found: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(found, path, *args, **kwargs)
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half
    train(tiny, out)


def just_before_the_checkpoint_is_whole(train: Train, tiny: Path, out: Path) -> None:
    save = run_folder.Clock.save

    def never(self: run_folder.Clock, path: Path) -> None:
        if path.parent.name == "checkpoint-4":
            die()
        save(self, path)

    run_folder.Clock.save = never  # type: ignore[method-assign]
    train(tiny, out)


def while_the_finished_policy_is_saved(train: Train, tiny: Path, out: Path) -> None:
    replace = os.replace

    def never(source: Any, target: Any) -> None:
        if Path(target).name == "policy":
            die()
        replace(source, target)

    os.replace = never
    train(tiny, out)


# Method, when it is killed, and the step that the run then goes on from.
KILLS = (
    ("grpo", within_a_step, 2),
    ("grpo", while_the_optimiser_is_written, 0),
    ("grpo", just_before_the_checkpoint_is_whole, 2),
    ("grpo", while_the_finished_policy_is_saved, 4),
    ("rloo", within_a_step, 2),
    ("dpo", between_checkpoints, 2),
    ("dpo", while_the_finished_policy_is_saved, 4),
)


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    found = {}
    for name, train in TRAIN.items():
        out = tmp_path_factory.mktemp(name)
        found[name] = out, train(tiny, out)
    return found


@pytest.mark.parametrize(
    ("name", "kill", "resumed"), KILLS, ids=[f"{name}-{kill.__name__}" for name, kill, _ in KILLS]
)
def test_the_weights_are_bit_for_bit_those_of_the_run_that_was_not_killed(
    name: str, kill: Any, resumed: int, unbroken: Any, tiny: Path, tmp_path: Path
) -> None:
    expected, whole = unbroken[name]
    out = tmp_path / "run"
    killed(lambda: kill(TRAIN[name], tiny, out))
    found = TRAIN[name](tiny, out)
    assert found.resumed_at == resumed
    assert found.done_steps == whole.done_steps == STEPS
    weights = "policy/model.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()
    assert learnt(out) == learnt(expected)
    assert not (out / "checkpoints").exists()


def learnt(out: Path) -> list[dict[str, Any]]:
    """The history without the times."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]
