"""How to train a reward model: the recipe's section, free of heavy imports.

Defaults are for SmolLM2-135M on two CPU cores. The paper's (section 4): Qwen3-8B or
Llama-3-8B-Instruct, 2 epochs, batch 64, learning rate 5e-6, 8192 tokens, pairwise loss only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["TierWeights", "TrainSettings"]


@dataclass(frozen=True)
class TierWeights:
    """w_tier of the loss.

    Args:
        proficiency, excellence, veto, overall: weight of a unit of that tier, ≥ 0; vetoes count
            fourfold and the overall preference double by default: they are the hardest to learn,
            and beside the many easy units of the other tiers their gradient is lost.
    """

    proficiency: float = 1.0
    excellence: float = 1.0
    veto: float = 4.0
    overall: float = 2.0

    def __post_init__(self) -> None:
        for name in ("proficiency", "excellence", "veto", "overall"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number ≥ 0")


@dataclass(frozen=True)
class TrainSettings:
    """How to train a reward model.

    The paper's "batch 64" counts criterion-level pairs. A packed row holds many, so a batch is
    counted in rows, over all processes together: `batch_trees` says how many, or `batch_pairs`
    says how many pairs a step should hold on average and the rows follow from the data (rows =
    batch_pairs / mean pairs a row, rounded, at least 1). Both are the same for one process and
    for eight, and so are the steps.

    Args:
        head_init: "yes_no" starts from the logit of Yes minus that of No, "random" from noise.
        frozen_layers: how many of the lowest layers (and the embeddings) are not trained; what
            they compute is then computed once.
        dtype: "float32"; "autocast" computes in bfloat16 with weights and optimiser in float32;
            "bfloat16" holds the weights in it too, which suits LoRA (the adapter stays float32),
            while a full training at 5e-6 would lose most of its steps to rounding.
        attention: "level" computes a tree's attention level by level; "flex" is FlexAttention: its
            backward pass needs a GPU. `benchmarks/tree_packing.py --gpu` says which is faster.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping it.
        lora_rank: rank of the LoRA adapter on every linear layer that is not frozen; 0 trains the
            weights themselves.
        lora_alpha: the adapter counts lora_alpha / lora_rank.
        epochs: passes over the trees.
        batch_trees: packed rows an optimiser step; a row is one tree unless trees share rows or
            one had to be split.
        batch_pairs: pairs an optimiser step on average, in place of batch_trees.
        share_rows: whether several trees share a row up to max_tokens.
        learning_rate: peak of a linear schedule.
        warmup_ratio: share of the steps in which the rate rises to it.
        weight_decay: AdamW's.
        max_grad_norm: the gradient's norm is clipped to it.
        max_tokens: row budget; a longer tree is split and its prefix repeated.
        too_long: "error" stops at a pair or verdict that takes more than max_tokens by itself;
            "leave_out" trains without it, counted.
        mu: weight μ of the pointwise term; 0 with "pair" weighting, which has none.
        pair_weighting: "unit" (mean over criteria) or "pair" (mean over pairs). The paper's loss is
            "pair" with every tier's weight 1.
        ties: what two answers with the same verdict teach: nothing, or that they tie, in the model
            of Davidson or of Rao and Kupper.
        nu: the tie parameter ν: at equal scores a tie has probability ν / (2 + ν).
        tier_weights: weight of each tier's units.
        save_steps: optimiser steps between checkpoints to resume from; 0 for none.
        eval_steps: optimiser steps between measurements on the evaluation split; 0 measures at
            the end alone.
        report_to: where losses and measurements go besides the log.
    """

    head_init: Literal["yes_no", "random"] = "yes_no"
    frozen_layers: int = 20
    dtype: Literal["float32", "autocast", "bfloat16"] = "float32"
    attention: Literal["level", "flex"] = "level"
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    epochs: float = 1.0
    batch_trees: int = 2
    batch_pairs: int | None = None
    share_rows: bool = False
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 8192
    too_long: Literal["error", "leave_out"] = "error"
    mu: float = 1.0
    pair_weighting: Literal["unit", "pair"] = "unit"
    ties: Literal["none", "davidson", "rao_kupper"] = "none"
    nu: float = 1.0
    tier_weights: TierWeights = field(default_factory=TierWeights)
    save_steps: int = 0
    eval_steps: int = 0
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_trees", "learning_rate", "max_grad_norm", "max_tokens")
        for name in (*positive, "lora_alpha", "nu"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number > 0")
        counts = ("frozen_layers", "lora_rank", "save_steps", "eval_steps")
        for name in (*counts, "warmup_ratio", "weight_decay", "mu"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number ≥ 0")
        if self.batch_pairs is not None and self.batch_pairs < 1:
            raise ValueError(f"batch_pairs: found {self.batch_pairs!r}, expected 1 or more")
        if self.pair_weighting == "pair" and self.mu:
            raise ValueError(
                f"mu: found {self.mu!r} beside pair_weighting: pair, which has no pointwise term; "
                "expected 0"
            )
        # From 1 on the Trainer would take it for a number of steps.
        if self.warmup_ratio >= 1:
            raise ValueError(f"warmup_ratio: found {self.warmup_ratio!r}, expected less than 1")

    def loss_terms(self) -> dict[str, Any]:
        """What of them `loss.pack_training_trees` takes, beside the row budget."""
        return {
            "mu": self.mu,
            "tier_weights": asdict(self.tier_weights),
            "pair_weighting": self.pair_weighting,
            "ties": self.ties,
            "nu": self.nu,
            "share_rows": self.share_rows,
        }
