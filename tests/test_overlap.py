"""Grading ahead: the same grades, in parts that keep groups whole, and no more gradings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.policy.grpo import GrpoRecipe, train_grpo
from promedical.policy.overlap import Ahead, cuts
from promedical.records import Message
from test_grpo import ROWS, RUBRIC, TextGrader
from tiny_policy import save_tiny_policy

ASKED = (Message("user", "?"),)


class Threaded(TextGrader):
    """Notes in which thread it was asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.threads: list[str] = []

    def grade(self, *args: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return super().grade(*args, **kwargs)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 12))
def test_parts_hold_whole_groups(sizes: list[int], parts: int) -> None:
    ids = [f"q{n}" for n, size in enumerate(sizes) for _ in range(size)]
    found = cuts(ids, parts)
    assert [i for first, last in found for i in range(first, last)] == list(range(len(ids)))
    assert len(found) == min(parts, len(sizes))
    for first, last in found:
        assert last > first
        assert not set(ids[first:last]) & {*ids[:first], *ids[last:]}


def test_what_was_begun_is_not_graded_again() -> None:
    grader = Threaded()
    ahead = Ahead(grader)
    ahead.begin(ASKED, ["ab", "b"], RUBRIC, operating_point="reward")
    ahead.begin(ASKED, ["ab", "b"], RUBRIC, operating_point="reward")
    ahead.begin(ASKED, ["never asked"], RUBRIC, operating_point="reward")
    first = ahead.grade(ASKED, ["ab", "b"], RUBRIC, operating_point="reward")
    assert first == ahead.grade(ASKED, ["ab", "b"], RUBRIC, operating_point="reward")
    assert first == TextGrader().grade(ASKED, ["ab", "b"], RUBRIC, operating_point="reward")
    assert len(ahead.grade(ASKED, ["other"], RUBRIC, operating_point="reward")) == 1
    assert (ahead.forget(), ahead.forget()) == (1, 0)
    assert grader.calls == 4


def test_a_failure_is_raised_where_it_is_asked_for() -> None:
    ahead = Ahead(Threaded(fail_at=(1,)))
    ahead.begin(ASKED, ["ab"], RUBRIC, operating_point="reward")
    with pytest.raises(RuntimeError, match="cannot read"):
        ahead.grade(ASKED, ["ab"], RUBRIC, operating_point="reward")


def test_a_run_grades_every_group_once_and_in_its_own_thread(tmp_path: Path) -> None:
    tiny = save_tiny_policy(tmp_path / "tiny")
    recipe = GrpoRecipe(
        model=str(tiny),
        steps=3,
        max_seconds=None,
        num_generations=4,
        prompts_per_step=3,
        max_completion_length=8,
        learning_rate=1e-2,
        overlap=2,
    )
    grader = Threaded(fail_at=(2,))
    result = train_grpo(recipe, ROWS, grader, tmp_path / "run")
    assert grader.calls == 9
    assert all(name.startswith("grading") for name in grader.threads)
    assert [step.reward.failed for step in result.history] == [4, 0, 0]
    assert [step.reward.groups for step in result.history] == [3, 3, 3]
    with pytest.raises(ValueError, match="overlap: found 4, expected at most prompts_per_step = 3"):
        GrpoRecipe(prompts_per_step=3, overlap=4)
