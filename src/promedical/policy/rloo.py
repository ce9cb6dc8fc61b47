"""RLOO of a policy against the same reward as GRPO (section 5, baseline), on TRL's trainer.

An answer's advantage is its reward less the mean of the other answers of its group (REINFORCE,
leave one out; arXiv 2402.14740), not divided by a deviation, and the KL penalty is part of the
reward instead of the loss. Settings, folder and resuming are GRPO's. Left to others: all but that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from promedical.policy.grpo import GrpoRecipe, GrpoResult, train_online
from promedical.policy.rewards import Grader
from promedical.records import GradedInstruction

__all__ = ["check_rloo", "train_rloo"]


def train_rloo(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    grader: Grader | None,
    output: str | Path,
    *,
    reward: Any = None,
    callbacks: Sequence[Any] = (),
    graded_by: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrpoResult:
    """Train a policy with RLOO; arguments, result and errors as of `grpo.train_grpo`.

    Raises:
        ValueError: a setting that only GRPO has is not as by default.
    """
    check_rloo(recipe)
    return train_online(
        recipe,
        rows,
        grader,
        output,
        reward=reward,
        callbacks=callbacks,
        graded_by=graded_by,
        progress=progress,
        method="rloo",
    )


def check_rloo(settings: Any) -> None:
    """Refuse settings that RLOO has no use for.

    Args:
        settings: `OnlineSettings`.

    Raises:
        ValueError: one of them is set.
    """
    for name, only in (("loss_type", "grpo"), ("scale_rewards", "group")):
        if getattr(settings, name) != only:
            raise ValueError(
                f"{name}: found {getattr(settings, name)!r}, but RLOO has one loss; leave it out"
            )
    if settings.advantages == "per_tier":
        raise ValueError(
            "advantages: found 'per_tier', which only GRPO has; expected 'scalar' or "
            "'lexicographic'"
        )
