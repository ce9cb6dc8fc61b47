"""Rows and a recipe for runs of other engines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from promedical.policy.engine_export import EngineRecipe
from promedical.policy.specification import RewardSpecification
from promedical.records import GradedInstruction, Message, to_dict
from promedical.rubric import Rubric
from tiny_reward import criteria

SECRET = "Mrs Miller has had chest pain since Tuesday"


def write_rows(
    path: Path,
    count: int,
    *,
    question: str = SECRET,
    first: str = "q",
    vetoes: int = 2,
    odd: bool = False,
) -> Path:
    """JSON lines of instructions; with `odd`, also one without rubric and one of vetoes alone."""
    rubric = Rubric(criteria(2, 1, vetoes))
    rows = [_row(f"{first}{i + 1}", f"{question} {i}", rubric) for i in range(count)]
    if odd:
        rows.append(_row("bare", question, None))
        rows.append(_row("safety", question, Rubric(criteria(0, 0, 2), safety_only=True)))
    path.write_text("".join(json.dumps(to_dict(row)) + "\n" for row in rows))
    return path


def passed(folder: Path, *more: str) -> list[str]:
    """What run.sh passes to Python: the script itself is run, with a Python that only tells."""
    stub = folder.parent / "bin"
    stub.mkdir(exist_ok=True)
    (stub / "python3").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (stub / "python3").chmod(0o755)
    told = subprocess.run(
        [folder / "run.sh", *more],
        env={"PATH": f"{stub}:{os.environ['PATH']}"},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.splitlines()


def _row(name: str, question: str, rubric: Rubric | None) -> GradedInstruction:
    return GradedInstruction(name, (Message("user", question),), "test", "none", rubric=rubric)


def recipe(folder: Path, **settings: Any) -> EngineRecipe:
    """A small run, its data written beside it."""
    given: dict[str, Any] = {
        "out": str(folder / "a run"),
        "prompts_per_step": 4,
        "gpus_per_node": 2,
        "reward": RewardSpecification(grader="http:http://127.0.0.1:9"),
    }
    if "data" not in settings:
        given["data"] = str(write_rows(folder / "train.jsonl", 4, odd=True))
        given["validation"] = str(write_rows(folder / "validation.jsonl", 1, first="v"))
    return EngineRecipe(**(given | settings))
