"""A JSON-lines file with one line a step that stays true to a run which is killed and goes on.

A line is appended when its step is over. A run that goes on from a checkpoint cuts the file to the
steps that the checkpoint has seen, so that a step that is trained again is never there twice; half
a line, of a process that was killed while writing, is cut too. Lines hold numbers and ids.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["StepLines", "StepLinesError"]


class StepLinesError(ValueError):
    """A file that holds something else; the message names the line."""


class StepLines:
    """The file, and its lines as they were written.

    Args:
        path: made when the first line is added.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Keep the lines up to a step, of a run that goes on from there (0: a new run).

        Raises:
            StepLinesError: a line other than the last that is no step.
        """
        self.lines = [line for line in read_lines(self.path) if line["step"] <= step]
        if self.path.exists():
            staging = self.path.with_name(f".{self.path.name}.tmp")
            staging.write_text("".join(_line(entry) for entry in self.lines), encoding="utf-8")
            os.replace(staging, self.path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the line of a step that comes after all others.

        Raises:
            StepLinesError: it does not.
        """
        last = self.lines[-1]["step"] if self.lines else -1
        if line["step"] <= last:
            raise StepLinesError(
                f"{self.path}: step: found {line['step']} after {last}, expected a later one"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = _line(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
        self.lines.append(json.loads(text))


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none if there is no file.

    Raises:
        StepLinesError: a line other than the last that is no step, or steps that do not ascend.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    # What follows the last line break is half a line, even where it happens to be JSON.
    whole = content.split(b"\n")[:-1]
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(whole, start=1):
        try:
            entry = json.loads(text)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            raise StepLinesError(
                f"{path}: line {number}: found no step, expected a JSON object with one"
            ) from None
        if not isinstance(step, int) or (lines and step <= lines[-1]["step"]):
            raise StepLinesError(
                f"{path}: line {number}: step: found {step!r}, expected one that ascends"
            )
        lines.append(entry)
    return lines


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
