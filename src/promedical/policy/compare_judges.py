"""The reward models of a comparison: how they are trained, calibrated and loaded.

The training judges (with explicit criteria, scalar, without safety data) have one half of the
training side, the gold judge the other and another seed, so that what a policy learns to exploit in
one is not in the other for having been in its data (section 7.4). All are calibrated on the
calibration side; the bench side trains and calibrates nothing.

Left to others: the rows (`compare_data`), training (`reward_model.run`), what is done with judges
(`compare`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.policy.compare_recipe import ASKS, CompareRecipe
from promedical.progress import Stages

if TYPE_CHECKING:
    from promedical.reward_model.grade import RubricRewardModel

__all__ = ["load_judge", "train_judge"]

Move = Callable[[str, int, int], None]


def train_judge(recipe: CompareRecipe, name: str, folder: Path, move: Move) -> dict[str, Any]:
    """Train and calibrate a judge, or look at the checkpoint that the recipe names.

    Args:
        folder: of the run; a judge's checkpoint is in `judges/NAME` there.

    Returns:
        "given" (a checkpoint of the recipe's), what calibration measured, and counts.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        RunError: see `reward_model.run.train_reward_model`.
    """
    from promedical.reward_model.recipe import RewardModelRecipe
    from promedical.reward_model.run import train_reward_model

    settings = recipe.judges
    given: str | None = getattr(settings, name)
    out = folder / "judges" / name
    found: dict[str, Any] = {"given": given is not None}
    if given is None:
        result = train_reward_model(
            RewardModelRecipe(
                model=settings.model,
                data=str(folder / "data" / ("gold" if name == "gold" else "judge")),
                calibration=None if name in ASKS else str(folder / "data" / "calibration"),
                out=str(out),
                seed=settings.seed + (name == "gold"),
                asks=ASKS.get(name, "criteria"),
                without=("veto",) if name == "no_safety_data" else (),
                veto_recall=settings.veto_recall,
                clean_violations=settings.clean_violations,
                train=settings.train,
            ),
            show=_Within(move),
        )
        found |= {
            "measured": _without_bins(result.calibration),
            "counts": result.training["counts"],
            "loss": [result.training["history"][i]["loss"] for i in (0, -1)],
        }
    else:
        judge = load_judge(recipe, name, folder)
        found["measured"] = _without_bins(dict(judge.calibration.measured))
    return found


def load_judge(recipe: CompareRecipe, name: str, folder: Path) -> RubricRewardModel:
    """A judge as the grader that rewards and monitors call."""
    import torch

    from promedical.reward_model.grade import RubricRewardModel

    given: str | None = getattr(recipe.judges, name)
    return RubricRewardModel.from_pretrained(
        str(folder / "judges" / name) if given is None else os.path.expandvars(given),
        device="cuda" if torch.cuda.is_available() else None,
        dtype=recipe.judges.dtype,
        asks=ASKS.get(name, "criteria"),
    )


def _without_bins(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What calibration measured, less the reliability diagrams."""
    if measured is None:
        return None
    return {key: value for key, value in measured.items() if key != "reliability"}


class _Within(Stages):
    """Shows the stages of a training as steps of one of ours."""

    def __init__(self, move: Move) -> None:
        super().__init__(0)
        self._move = move

    def skipped(self, title: str, seconds: float) -> None:
        self._move(title.lower(), 1, 1)

    @contextmanager
    def stage(self, title: str) -> Iterator[Move]:
        yield lambda what, done, total: self._move(f"{title.lower()}: {what}", done, total)
