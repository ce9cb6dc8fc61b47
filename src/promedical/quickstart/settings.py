"""Settings of the quickstart: its recipe, the presets of `--fast` and `--full`, and its plan."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from promedical.corpus.degrade_config import DegradeConfig
from promedical.policy.grpo import GrpoRecipe
from promedical.reward_model.settings import TrainSettings

__all__ = ["PLAN", "PRESETS", "QuickstartError", "QuickstartRecipe", "plain"]

# What the default run may take on two cores: minutes, and tokens read (train, bench) or written
# (GRPO, answers). Printed beside what it took.
PLAN: dict[str, tuple[float, int]] = {
    "data": (0.5, 0),
    "train": (6.0, 93_000),
    "bench": (8.0, 330_000),
    "grpo": (2.0, 1_500),
    "answers": (3.0, 7_500),
    "report": (0.1, 0),
}
# What `--fast` and `--full` change.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "mode": "fast",
        "train_instructions": 10,
        "bench_instructions": 10,
        "calibration_instructions": 8,
        "physicians_answers": 8,
        "answer_tokens": 32,
        "grpo": {"steps": 2, "max_completion_length": 32},
    },
    "full": {
        "mode": "full",
        "train_instructions": 125,
        "copies": 2,
        "train": {"epochs": 1.5, "save_steps": 20},
        "grpo": {"steps": 16, "max_seconds": None},
    },
}


class QuickstartError(ValueError):
    """A folder that holds another run, or settings that do not fit together."""


@dataclass(frozen=True)
class QuickstartRecipe:
    """Settings of the whole run; the defaults fit 20 minutes on two CPU cores.

    Args:
        mode: what the report calls the run; `--fast` and `--full` set it with much else.
        out: folder of the run.
        model: "embedded" (SmolLM2-135M-Instruct), a folder or a Hub id.
        seed: of everything that is random.
        train_instructions: how many training instructions are used.
        bench_instructions: how many of the bench's.
        calibration_instructions: how many of the calibration split's.
        physicians_answers: how many of the answers that physicians labelled.
        copies: how many times every training instruction is degraded anew.
        max_criteria: criteria a rubric is cut down to, at least `min_veto` of them vetoes.
        min_veto: see there.
        veto_recall: recall that the audit operating point keeps on the calibration split.
        clean_violations: share of clean answers that the reward operating point may flag.
        answer_tokens: longest answer before and after, in tokens.
        degrade: of the constructed responses.
        train: of both reward models.
        grpo: of the policy.
    """

    mode: Literal["default", "fast", "full"] = "default"
    out: str = "runs/quickstart"
    model: str = "embedded"
    seed: int = 0
    train_instructions: int = 56
    bench_instructions: int = 49
    calibration_instructions: int = 25
    physicians_answers: int = 50
    copies: int = 1
    max_criteria: int = 6
    min_veto: int = 2
    veto_recall: float = 0.9
    clean_violations: float = 0.05
    answer_tokens: int = 80
    degrade: DegradeConfig = field(default_factory=DegradeConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    grpo: GrpoRecipe = field(default_factory=GrpoRecipe)

    def __post_init__(self) -> None:
        for name in (
            "train_instructions",
            "bench_instructions",
            "calibration_instructions",
            "physicians_answers",
            "copies",
            "answer_tokens",
        ):
            if getattr(self, name) < 1:
                raise QuickstartError(f"{name}: found {getattr(self, name)!r}, expected 1 or more")
        if self.max_criteria <= self.min_veto:
            raise QuickstartError(
                f"max_criteria: found {self.max_criteria}, expected more than min_veto = "
                f"{self.min_veto}"
            )


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON types, without functions, which are no settings."""
    found = {k: v for k, v in asdict(settings).items() if not callable(v)}
    found |= {
        f.name: plain(getattr(settings, f.name))
        for f in fields(settings)
        if is_dataclass(getattr(settings, f.name))
    }
    kept: dict[str, Any] = json.loads(json.dumps(found))
    return kept
