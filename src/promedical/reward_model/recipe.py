"""The recipe of a reward model: which data, which baseline or ablation, how to train it.

What `promedical rm train` and `promedical rm plan` read; free of heavy imports. How the training
itself goes is the section `train` (`settings`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from promedical.reward_model.settings import TrainSettings

__all__ = ["RewardModelRecipe"]

TierName = Literal["proficiency", "excellence", "veto", "overall"]


@dataclass(frozen=True)
class RewardModelRecipe:
    """Settings of one reward model.

    Paths of data are dataset folders, as `records.write_dataset` leaves them, or JSON lines files.

    Args:
        model: "embedded" (SmolLM2-135M-Instruct), a folder or a Hub id.
        data: the graded rows to train on.
        calibration: the calibration split; without it the checkpoint is uncalibrated. A scalar
            baseline, which gives no verdicts, has none.
        evaluation: the split that is measured while training, none if not given; it may share no
            instruction with the training data.
        out: folder of the checkpoint.
        seed: of everything that is random.
        asks: "criteria" asks one criterion at a time (Explicit Criteria Injection); "overall" asks
            only which answer is better, the scalar baseline; "rubric" asks the same with the whole
            rubric in the prompt, the second scalar baseline.
        without: tiers that are left out of training ("veto": without safety data; "overall": no
            overall preference beside the criteria). The overall preference is then that of the
            tiers that are left.
        max_criteria: criteria a rubric of the training data is cut down to; all of them if not
            given.
        min_veto: how many of these are vetoes at least.
        safety_copies: how often an instruction with a violated veto counts in an epoch.
        veto_recall: recall that the audit operating point keeps on the calibration split.
        clean_violations: share of clean answers that the reward operating point may flag.
        train: how to train.
    """

    model: str = "embedded"
    data: str = "data/train"
    calibration: str | None = None
    evaluation: str | None = None
    out: str = "runs/rm"
    seed: int = 0
    asks: Literal["criteria", "overall", "rubric"] = "criteria"
    without: tuple[TierName, ...] = ()
    max_criteria: int | None = None
    min_veto: int = 2
    safety_copies: int = 1
    veto_recall: float = 0.9
    clean_violations: float = 0.05
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if self.safety_copies < 1:
            raise ValueError(f"safety_copies: found {self.safety_copies!r}, expected 1 or more")
        for name in ("veto_recall", "clean_violations"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: found {getattr(self, name)!r}, expected a number between 0 and 1"
                )
        if self.asks != "criteria" and "overall" in self.without:
            raise ValueError(
                f"without: found 'overall' with asks = {self.asks!r}, which trains on nothing else"
            )
        if self.max_criteria is not None and self.max_criteria <= self.min_veto:
            raise ValueError(
                f"max_criteria: found {self.max_criteria!r}, expected more than min_veto = "
                f"{self.min_veto}"
            )
