"""Settings of policy training, free of heavy imports: what GRPO, RLOO and DPO share, and their own.

The defaults suit SmolLM2-135M on two CPU cores for a few minutes. The paper (section 5) trains all
weights of Qwen3-8B with GRPO: 8 answers a group, KL coefficient 0.04, learning rate 1e-6. Which
model, data and reward a run has is the recipe's (`promedical.policy.recipe`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "DpoSettings",
    "OnlineSettings",
    "PolicyTraining",
    "TierWeights",
    "VllmSettings",
]


@dataclass(frozen=True)
class PolicyTraining:
    """What every trainer of a policy is told.

    Args:
        max_seconds: time budget over all attempts of a run; a step that would not end within it is
            not begun. None has no limit.
        learning_rate: peak, constant after warm-up, so that a run that stops earlier has trained as
            it would have. An adapter's weights take and need larger steps than the weights
            themselves (paper, all weights: 1e-6).
        warmup_steps: steps over which the rate rises to that.
        max_grad_norm: the gradient's norm is clipped to it.
        lora_rank: rank r of the update; 0 trains the weights themselves.
        lora_alpha: its scale α; ΔW = (α/r)·B·A.
        lora_layers: adapters only in this many upper layers, and no backward pass through the ones
            below; None adapts all.
        precision: "float32"; "autocast" computes in bfloat16 with weights and optimiser in float32;
            "bfloat16" holds the weights in it too, which suits LoRA (the adapter stays float32),
            while a full training at 1e-6 would lose most of its steps to rounding.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping it.
        micro_batch: answers (of DPO: pairs) a device takes through one backward pass; None takes
            the step's all at once.
        save_steps: steps between checkpoints.
        report_to: where TRL reports numbers: wandb, tensorboard, trackio, …; nowhere if empty.
    """

    max_seconds: float | None = None
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_layers: int | None = None
    precision: Literal["float32", "autocast", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    save_steps: int = 4
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("lora_rank", 0), ("lora_alpha", 1)):
            at_least(self, name, least)
        at_least(self, "save_steps", 1)
        for name in ("lora_layers", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected ≥ 1 or None")
        for name in ("learning_rate", "max_grad_norm"):
            positive(self, name)
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: found {self.max_seconds!r}, expected > 0 or None")
        if self.lora_layers is not None and not self.lora_rank:
            raise ValueError("lora_layers: expected none with lora_rank = 0, which has no adapter")
        one_of(self, "precision", ("float32", "autocast", "bfloat16"))


@dataclass(frozen=True)
class TierWeights:
    """What each tier's advantage counts where tiers are normalised one by one.

    Args:
        proficiency, excellence, veto: weight ≥ 0 of S1, S2 and −S3, each with unit variance in its
            group; equal ones are those of GDPO (arXiv 2601.05242).
    """

    proficiency: float = 1.0
    excellence: float = 1.0
    veto: float = 1.0

    def __post_init__(self) -> None:
        for name in ("proficiency", "excellence", "veto"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number ≥ 0")


@dataclass(frozen=True)
class VllmSettings:
    """Who generates the answers of a step.

    Args:
        mode: "off" is transformers; "colocate" is vLLM on the training's own GPUs; "server" is a
            vLLM server that gets the weights after every step (trl vllm-serve --model MODEL).
        server_url: of that server.
        memory: share of each GPU's memory that a colocated engine takes.
        tensor_parallel: GPUs that a colocated engine is spread over.
        max_model_length: longest prompt and answer together, in tokens; the model's own if None.
        sleep: whether a colocated engine gives its memory back while the weights are trained.
    """

    mode: Literal["off", "colocate", "server"] = "off"
    server_url: str = "http://127.0.0.1:8000"
    memory: float = 0.3
    tensor_parallel: int = 1
    max_model_length: int | None = None
    sleep: bool = False

    def __post_init__(self) -> None:
        one_of(self, "mode", ("off", "colocate", "server"))
        if not 0 < self.memory < 1:
            raise ValueError(f"memory: found {self.memory!r}, expected between 0 and 1")
        at_least(self, "tensor_parallel", 1)
        if not self.server_url.startswith(("http://", "https://")):
            raise ValueError(f"server_url: found {self.server_url!r}, expected http:// or https://")

    def for_trl(self) -> dict[str, Any]:
        """The same as arguments of TRL's configurations."""
        if self.mode == "off":
            return {"use_vllm": False}
        found: dict[str, Any] = {
            "use_vllm": True,
            "vllm_mode": self.mode,
            "vllm_max_model_length": self.max_model_length,
        }
        if self.mode == "server":
            return found | {"vllm_server_base_url": self.server_url}
        return found | {
            "vllm_gpu_memory_utilization": self.memory,
            "vllm_tensor_parallel_size": self.tensor_parallel,
            "vllm_enable_sleep_mode": self.sleep,
        }


@dataclass(frozen=True)
class OnlineSettings(PolicyTraining):
    """How GRPO and RLOO train: answers are sampled, graded and learnt from, step after step.

    Args:
        steps: optimiser steps planned.
        num_generations: G, answers an instruction and step (paper: 8).
        prompts_per_step: instructions a step, over all devices together.
        max_completion_length: limit an answer, in tokens; longer ones are cut, graded as cut, and
            their share is reported.
        temperature: of sampling.
        beta: coefficient of the KL penalty to the starting policy (paper: 0.04).
        advantages: how a group's grades become advantages. "scalar" is the paper's, of the reward;
            "lexicographic" of the rank in the group by S3, then S1, then S2; "per_tier" normalises
            S1, S2 and −S3 each by itself and adds them up (GRPO only).
        tiers: weights of "per_tier".
        loss_type: GRPO's loss: "grpo" is a mean over tokens, then answers; TRL has others.
        scale_rewards: what GRPO divides rewards by: the group's deviation, the step's, or nothing.
        overlap: parts in which a step's groups are generated; each part is graded while the next is
            being generated and while log-probabilities are computed. 0 grades when all is there.
        vllm: who generates.
    """

    steps: int = 12
    num_generations: int = 8
    prompts_per_step: int = 1
    max_completion_length: int = 64
    temperature: float = 1.0
    beta: float = 0.04
    advantages: Literal["scalar", "lexicographic", "per_tier"] = "scalar"
    tiers: TierWeights = field(default_factory=TierWeights)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    overlap: int = 0
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("steps", 1),
            ("num_generations", 2),
            ("prompts_per_step", 1),
            ("max_completion_length", 1),
            ("overlap", 0),
        ):
            at_least(self, name, least)
        positive(self, "temperature")
        not_negative(self, "beta")
        one_of(self, "advantages", ("scalar", "lexicographic", "per_tier"))
        one_of(self, "loss_type", ("grpo", "dr_grpo", "dapo", "bnpo"))
        one_of(self, "scale_rewards", ("group", "batch", "none"))
        if self.micro_batch is not None and self.answers % self.micro_batch:
            raise ValueError(
                f"micro_batch: found {self.micro_batch}, expected a divisor of the step's "
                f"{self.answers} answers"
            )
        if self.overlap > self.prompts_per_step:
            raise ValueError(
                f"overlap: found {self.overlap}, expected at most prompts_per_step = "
                f"{self.prompts_per_step}"
            )

    @property
    def answers(self) -> int:
        """Answers a step, over all devices."""
        return self.num_generations * self.prompts_per_step


@dataclass(frozen=True)
class DpoSettings(PolicyTraining):
    """How DPO trains: on pairs of answers whose verdicts are known.

    Args:
        epochs: passes over the pairs.
        pairs_per_step: pairs a step, over all devices together.
        beta: how strongly the policy is held to the starting one (TRL's default; the paper states
            none).
        max_length: limit of prompt and answer together, in tokens; a pair with a longer one is left
            out and counted, never cut.
        pairs_per_instruction: the most pairs of one instruction, drawn by the seed; all if None.
        known_only: whose comparisons are over the criteria known in both answers alone
            (`corpus.pairs`).
    """

    epochs: float = 1.0
    pairs_per_step: int = 4
    beta: float = 0.1
    max_length: int = 1024
    pairs_per_instruction: int | None = None
    known_only: Literal["constructed", "always", "never"] = "constructed"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs_per_step", "max_length"):
            at_least(self, name, 1)
        for name in ("epochs", "beta"):
            positive(self, name)
        if self.pairs_per_instruction is not None:
            at_least(self, "pairs_per_instruction", 1)
        one_of(self, "known_only", ("constructed", "always", "never"))
        if self.micro_batch is not None and self.pairs_per_step % self.micro_batch:
            raise ValueError(
                f"micro_batch: found {self.micro_batch}, expected a divisor of pairs_per_step = "
                f"{self.pairs_per_step}"
            )


def at_least(settings: Any, name: str, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ValueError: it is.
    """
    if getattr(settings, name) < least:
        raise ValueError(f"{name}: found {getattr(settings, name)!r}, expected {least} or more")


def positive(settings: Any, name: str) -> None:
    """Refuse what is no number above 0.

    Raises:
        ValueError: it is none.
    """
    if not 0 < getattr(settings, name) < math.inf:
        raise ValueError(f"{name}: found {getattr(settings, name)!r}, expected a number > 0")


def not_negative(settings: Any, name: str) -> None:
    """Refuse what is no number from 0.

    Raises:
        ValueError: it is none.
    """
    if not 0 <= getattr(settings, name) < math.inf:
        raise ValueError(f"{name}: found {getattr(settings, name)!r}, expected a number ≥ 0")


def one_of(settings: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse another word.

    Raises:
        ValueError: it is one.
    """
    if getattr(settings, name) not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}: found {getattr(settings, name)!r}, expected one of {words}")
