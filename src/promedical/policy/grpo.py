"""GRPO of a policy against a frozen, criterion-wise reward model (section 5), on TRL's trainer.

For every instruction G answers are sampled and graded by its rubric; an answer's advantage is its
reward relative to its group, (r − mean) / std, and the policy moves along it with a KL penalty to
the model it started from. TRL's defaults are not the paper's, so loss, KL coefficient, group size
and scaling are set here one by one.

A run stops after its steps or its time, whichever is first, and goes on from its last checkpoint
when it was killed. Only a LoRA adapter is trained; the merged checkpoint beside it is the one that
others load. Left to others: the reward (`promedical.policy.rewards`), what the reward means
(`promedical.rubric`), full fine-tuning and many GPUs (verl).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from promedical.policy.generate import chat
from promedical.policy.rewards import Grader, RewardStep, RubricReward, read_history, write_history
from promedical.records import GradedInstruction, fingerprint
from promedical.rubric import RewardSpec

__all__ = ["GrpoRecipe", "GrpoResult", "GrpoStep", "train_grpo"]

# Settings that say how long and how often, not what is learnt: they may differ when a run goes on.
_NOT_LEARNT = ("steps", "max_seconds", "save_steps")


@dataclass(frozen=True)
class GrpoRecipe:
    """Settings of a GRPO run; the defaults suit SmolLM2-135M on two CPU cores for three minutes.

    The paper trains all weights of Qwen3-8B with learning rate 1e-6, 8 samples an instruction and
    KL coefficient 0.04; the two last are kept.

    Args:
        model: the policy to start from: "embedded", a folder or a Hub id.
        steps: optimiser steps planned; the rate is constant after warm-up, so that a run that
            stops earlier has trained as it would have.
        max_seconds: time budget over all attempts of a run; a step that would not end within it is
            not begun. None has no limit.
        seed: for shuffling, sampling and the adapter.
        num_generations: G, answers an instruction and step (paper: 8).
        prompts_per_step: instructions a step.
        max_completion_length: limit an answer, in tokens; longer ones are cut, graded as cut, and
            their share is reported.
        temperature: of sampling.
        beta: coefficient of the KL penalty to the starting policy (paper: 0.04).
        learning_rate: for the adapter's weights, which take and need larger steps than the weights
            themselves (paper, all weights: 1e-6).
        warmup_steps: steps over which the rate rises to that.
        max_grad_norm: the gradient's norm is clipped to it.
        lora_rank, lora_alpha: rank r of the update and its scale α; ΔW = (α/r)·B·A.
        lora_layers: adapters only in this many upper layers, and no backward pass through the ones
            below; None adapts all.
        precision: "float32", or "bfloat16" for GPUs.
        save_steps: steps between checkpoints.
        reward: α, β, λ of the reward.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    model: str = "embedded"
    steps: int = 12
    max_seconds: float | None = 120.0
    seed: int = 0
    num_generations: int = 8
    prompts_per_step: int = 1
    max_completion_length: int = 64
    temperature: float = 1.0
    beta: float = 0.04
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_layers: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    save_steps: int = 4
    reward: RewardSpec = field(default_factory=RewardSpec)

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1,
            "num_generations": 2,
            "prompts_per_step": 1,
            "max_completion_length": 1,
            "warmup_steps": 0,
            "lora_rank": 1,
            "lora_alpha": 1,
            "save_steps": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {least} or more")
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected a number > 0")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta: found {self.beta!r}, expected a number ≥ 0")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: found {self.max_seconds!r}, expected > 0 or None")
        if self.lora_layers is not None and self.lora_layers < 1:
            raise ValueError(f"lora_layers: found {self.lora_layers!r}, expected ≥ 1 or None")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"precision: found {self.precision!r}, expected 'float32' or 'bfloat16'"
            )


@dataclass(frozen=True)
class GrpoStep:
    """One optimiser step: what TRL logged, and what the reward saw.

    Args:
        step: from 1.
        seconds: how long it took.
        loss, kl, grad_norm, reward_std: TRL's; the KL is that to the starting policy, and the
            reward's standard deviation is over the step's answers.
        completion_tokens: mean length of the sampled answers.
        cut: share of them that the limit cut.
        reward: what the reward function saw.
    """

    step: int
    seconds: float
    loss: float | None
    kl: float | None
    grad_norm: float | None
    reward_std: float | None
    completion_tokens: float | None
    cut: float | None
    reward: RewardStep


@dataclass(frozen=True)
class GrpoResult:
    """What a run made.

    Args:
        policy: the merged checkpoint, a plain causal language model.
        adapter: the LoRA adapter alone.
        history: one entry a step.
        planned_steps, done_steps: in steps.
        seconds: training time over all attempts, without loading and saving the model.
        stopped_by: what ended it.
        resumed_at: the step an earlier, killed attempt had reached; 0 if there was none.
    """

    policy: Path
    adapter: Path
    history: tuple[GrpoStep, ...]
    planned_steps: int
    done_steps: int
    seconds: float
    stopped_by: Literal["steps", "time"]
    resumed_at: int


def train_grpo(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    grader: Grader,
    output: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> GrpoResult:
    """Train a policy on instructions with rubrics, with the grader as oracle.

    Args:
        recipe: the settings.
        rows: training instructions; only their conversation and rubric are used.
        grader: the frozen reward model, called at the operating point "reward".
        output: folder for `policy/`, `adapter/`, `history.jsonl` and, while the run lasts,
            `checkpoints/`. A finished run is returned as it is, a killed one goes on.
        progress: called with (steps done, steps expected within the time) after every step.

    Raises:
        ValueError: no rows, or the folder holds a run with other settings or other rows.
        RubricError: a row without a rubric that gives a reward.
        GradingError: the grader fails again and again.
    """
    if not rows:
        raise ValueError("rows: found none, expected instructions to train on")
    output = Path(output)
    reward = RubricReward.from_rows(grader, rows, recipe.reward)
    identity = _claim(output, recipe, rows)
    if (output / "result.json").exists():
        return _read_result(output)

    checkpoint = _last_checkpoint(output / "checkpoints")
    clock = _Clock(recipe.steps, recipe.max_seconds, progress)
    if checkpoint is not None:
        reward.history = read_history(checkpoint / _REWARDS)
        clock.seconds = list(json.loads((checkpoint / _CLOCK).read_text()))
    resumed_at = len(clock.seconds)
    with _quiet():
        if checkpoint is not None and clock.over:  # killed after its last step
            logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
            with _renamed(output / "adapter") as folder:
                shutil.copytree(
                    checkpoint,
                    folder,
                    ignore=lambda _, names: [n for n in names if not n.startswith("adapter_")],
                )
        else:
            trainer = _trainer(recipe, rows, reward, clock, output / "checkpoints")
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            logged = trainer.state.log_history
            with _renamed(output / "adapter") as folder:
                trainer.model.save_pretrained(folder)
        _save_merged(recipe.model, output)
    history = _history(logged, reward.history, clock.seconds)
    result = GrpoResult(
        policy=output / "policy",
        adapter=output / "adapter",
        history=history,
        planned_steps=recipe.steps,
        done_steps=len(clock.seconds),
        seconds=math.fsum(clock.seconds),
        stopped_by="steps" if len(clock.seconds) >= recipe.steps else "time",
        resumed_at=resumed_at,
    )
    _write_result(output, result, identity)
    return result


def _trainer(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    reward: RubricReward,
    clock: _Clock,
    folder: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_seed(recipe.seed)  # before the adapter's weights are drawn
    path = _resolve(recipe.model)
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    layers = int(model.config.num_hidden_layers)
    kept = layers if recipe.lora_layers is None else min(recipe.lora_layers, layers)
    batch = recipe.num_generations * recipe.prompts_per_step
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": chat(row), "instruction_id": row.id} for row in rows]
        ),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=0.0,
            # Every linear layer but the head; "all-linear" cannot be limited to some layers.
            target_modules=sorted(
                {
                    name.rsplit(".", 1)[-1]
                    for name, module in model.named_modules()
                    if isinstance(module, torch.nn.Linear)
                    and module is not model.get_output_embeddings()
                }
            ),
            layers_to_transform=None if kept == layers else list(range(layers - kept, layers)),
        ),
        callbacks=[_callback(clock, reward)],
        args=GRPOConfig(
            output_dir=str(folder),
            # The paper's, where TRL's defaults differ or may come to differ.
            loss_type="grpo",
            beta=recipe.beta,
            num_generations=recipe.num_generations,
            scale_rewards="group",
            num_iterations=1,
            use_bias_correction_kl=False,
            # A cut answer teaches too: with a limit this low nearly all are cut.
            mask_truncated_completions=False,
            max_completion_length=recipe.max_completion_length,
            temperature=recipe.temperature,
            chat_template_kwargs={"enable_thinking": False},
            max_steps=recipe.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=recipe.warmup_steps,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.precision == "bfloat16",
            gradient_checkpointing=False,
            save_strategy="steps",
            save_steps=recipe.save_steps,
            save_total_limit=2,
            logging_steps=1,
            log_completions=False,  # would print and store patients' text
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=recipe.seed,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Clock:
    """How long each step took, and whether another fits the budget."""

    def __init__(
        self,
        steps: int,
        budget: float | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.steps = steps
        self.budget = budget
        self.seconds: list[float] = []
        self._progress = progress
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self) -> None:
        self.seconds.append(time.monotonic() - self._began)
        if self._progress is not None:
            self._progress(len(self.seconds), self.expected)

    @property
    def expected(self) -> int:
        """Steps that the budget will have had room for, judging by those done."""
        done, spent = len(self.seconds), math.fsum(self.seconds)
        if self.budget is None or not done or spent == 0:
            return self.steps
        room = max(0.0, self.budget - spent)
        return min(self.steps, done + int(room * done / spent))

    @property
    def over(self) -> bool:
        return bool(self.seconds) and len(self.seconds) >= self.expected


def _callback(clock: _Clock, reward: RubricReward) -> Any:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Watch(TrainerCallback):
        """Stops in time, and completes each checkpoint with the clock and the reward's history."""

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            clock.begin()

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            clock.end()
            if clock.over:
                control.should_training_stop = True

        def on_save(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_history(folder / _REWARDS, reward.history)
            # Written last and renamed: its presence says that the checkpoint is whole.
            staging = folder / f"{_CLOCK}.tmp"
            staging.write_text(json.dumps(clock.seconds))
            os.replace(staging, folder / _CLOCK)

    return Watch()


_REWARDS = "rewards.jsonl"
_CLOCK = "seconds.json"


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; half-written ones are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / _CLOCK).exists():
            found[int(path.name.rsplit("-", 1)[1])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


def _history(
    logged: Sequence[Mapping[str, Any]], rewards: Sequence[RewardStep], seconds: Sequence[float]
) -> tuple[GrpoStep, ...]:
    by_step = {int(entry["step"]): entry for entry in logged if "loss" in entry}
    steps = []
    for seen, took in zip(rewards, seconds, strict=True):
        entry = by_step.get(seen.step, {})
        steps.append(
            GrpoStep(
                step=seen.step,
                seconds=took,
                loss=entry.get("loss"),
                kl=entry.get("kl"),
                grad_norm=entry.get("grad_norm"),
                reward_std=entry.get("reward_std"),
                completion_tokens=entry.get("completions/mean_length"),
                cut=entry.get("completions/clipped_ratio"),
                reward=seen,
            )
        )
    return tuple(steps)


def _save_merged(model: str, output: Path) -> None:
    """Save the starting model with the adapter merged in, as an ordinary checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _resolve(model)
    # Merged into fresh weights: TRL patches the forward of the ones it trains.
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(output / "adapter")).merge_and_unload()
    with _renamed(output / "policy") as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    yield staging
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)


def _resolve(name: str) -> str:
    from promedical.demo.models import resolve_model

    return str(resolve_model(name))


def _claim(output: Path, recipe: GrpoRecipe, rows: Sequence[GradedInstruction]) -> dict[str, Any]:
    """Say what run this folder is for, or check that it is the same one.

    Raises:
        ValueError: it is another one; the message names what differs.
    """
    settings = {k: v for k, v in asdict(recipe).items() if k not in _NOT_LEARNT}
    wanted = {"recipe": settings, "rows": fingerprint(rows)}
    path = output / "run.json"
    if path.exists():
        held = json.loads(path.read_text())
        differing = [
            f"{name}: found {held['recipe'].get(name)!r}, expected {value!r}"
            for name, value in settings.items()
            if held["recipe"].get(name) != value
        ]
        if held["rows"] != wanted["rows"]:
            differing.append("rows: other instructions")
        if differing:
            raise ValueError(
                f"{path}: a run with other settings ({'; '.join(differing)}); "
                "use another folder or delete this one"
            )
        return wanted
    output.mkdir(parents=True, exist_ok=True)
    _replace_text(path, json.dumps(wanted, indent=2))
    return wanted


def _write_result(output: Path, result: GrpoResult, identity: Mapping[str, Any]) -> None:
    lines = [json.dumps(asdict(step)) + "\n" for step in result.history]
    _replace_text(output / "history.jsonl", "".join(lines))
    summary = {k: v for k, v in asdict(result).items() if k not in ("policy", "adapter", "history")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _replace_text(output / "result.json", json.dumps({**summary, "run": digest}, indent=2))
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def _read_result(output: Path) -> GrpoResult:
    summary = json.loads((output / "result.json").read_text())
    summary.pop("run")
    history = []
    for line in (output / "history.jsonl").read_text().splitlines():
        entry = json.loads(line)
        history.append(GrpoStep(**{**entry, "reward": RewardStep(**entry["reward"])}))
    return GrpoResult(
        policy=output / "policy", adapter=output / "adapter", history=tuple(history), **summary
    )


def _replace_text(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text)
    os.replace(staging, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the libraries' bars, hints and telemetry.

    Their output would tear the progress bar, and TRL reports every run to its makers, which is not
    for us to allow on behalf of a clinic.
    """
    from huggingface_hub import constants
    from transformers.utils import logging as hf

    names = ("transformers", "trl", "accelerate", "peft", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    bars, telemetry = hf.is_progress_bar_enabled(), constants.HF_HUB_DISABLE_TELEMETRY
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        hf.disable_progress_bar()
        constants.HF_HUB_DISABLE_TELEMETRY = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            hf.enable_progress_bar()
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry
