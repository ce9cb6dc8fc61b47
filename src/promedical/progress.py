"""Progress a tired person can read: one line a finished stage, one bar with the time left.

On a terminal the bar moves; elsewhere (a log, a CI run) a line is printed now and then instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Stages"]

LOG_EVERY_SECONDS = 30.0


class Stages:
    """Shows the stages of a run one after the other.

    Args:
        total: number of stages.
    """

    def __init__(self, total: int) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.total = total
        self.number = 0

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False)

    def skipped(self, title: str, seconds: float) -> None:
        """Note a stage that an earlier run finished."""
        self.number += 1
        self.say(f"[{self.number}/{self.total}] {title}: done before ({seconds:.0f} s)")

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """Run a stage; call what is given with (what, done, total) as it goes."""
        self.number += 1
        head = f"[{self.number}/{self.total}] {title}"
        started = time.monotonic()
        if self.console.is_terminal:
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            ) as bar:
                task = bar.add_task(head, total=None)
                current = ""

                def move(what: str, done: int, total: int) -> None:
                    nonlocal current
                    if what != current:
                        current = what
                        bar.reset(task, description=f"{head}: {what}", total=total)
                    bar.update(task, completed=done, total=total)

                yield move
        else:
            self.say(f"{head} …")
            last = [started]
            begun: dict[str, float] = {}

            def log(what: str, done: int, total: int) -> None:
                now = time.monotonic()
                begun.setdefault(what, now)
                if now - last[0] >= LOG_EVERY_SECONDS and done:
                    last[0] = now
                    left = (now - begun[what]) / done * (total - done)
                    self.say(f"    {what}: {done}/{total}, about {left:.0f} s left")

            yield log
        self.say(f"{head}: {time.monotonic() - started:.0f} s")
