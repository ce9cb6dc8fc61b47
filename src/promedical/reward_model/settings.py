"""How to train a reward model: the recipe's section, free of heavy imports.

Defaults are for SmolLM2-135M on two CPU cores. The paper's (section 4): Qwen3-8B or
Llama-3-8B-Instruct, 2 epochs, batch 64, learning rate 5e-6, 8192 tokens, pairwise loss only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["TierWeights", "TrainSettings"]


@dataclass(frozen=True)
class TierWeights:
    """w_tier of the loss.

    Args:
        proficiency, excellence, veto, overall: weight of a unit of that tier, ≥ 0; vetoes count
            double by default, since they are the hardest to learn and come first.
    """

    proficiency: float = 1.0
    excellence: float = 1.0
    veto: float = 2.0
    overall: float = 1.0

    def __post_init__(self) -> None:
        for name in ("proficiency", "excellence", "veto", "overall"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number ≥ 0")


@dataclass(frozen=True)
class TrainSettings:
    """How to train a reward model.

    Args:
        head_init: "yes_no" starts from the logit of Yes minus that of No, "random" from noise.
        frozen_layers: how many of the lowest layers (and the embeddings) are not trained; what
            they compute is then computed once.
        epochs: passes over the trees.
        batch_trees: packed rows an optimiser step; a row is one tree unless it had to be split.
        learning_rate: peak of a linear schedule.
        warmup_ratio: share of the steps in which the rate rises to it.
        weight_decay: AdamW's.
        max_grad_norm: the gradient's norm is clipped to it.
        max_tokens: row budget; a longer tree is split and its prefix repeated.
        mu: weight μ of the pointwise term.
        pair_weighting: "unit" (mean over criteria) or "pair" (the paper's mean over pairs).
        tier_weights: weight of each tier's units.
        save_steps: optimiser steps between checkpoints to resume from; 0 for none.
    """

    head_init: Literal["yes_no", "random"] = "yes_no"
    frozen_layers: int = 20
    epochs: float = 1.0
    batch_trees: int = 2
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 8192
    mu: float = 1.0
    pair_weighting: Literal["unit", "pair"] = "unit"
    tier_weights: TierWeights = field(default_factory=TierWeights)
    save_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_trees", "learning_rate", "max_grad_norm", "max_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number > 0")
        for name in ("frozen_layers", "warmup_ratio", "weight_decay", "mu", "save_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number ≥ 0")
        # From 1 on the Trainer would take it for a number of steps.
        if self.warmup_ratio >= 1:
            raise ValueError(f"warmup_ratio: found {self.warmup_ratio!r}, expected less than 1")
