"""Training the reward model on packed trees, through `transformers.Trainer`.

Checkpoints, resume, accelerate and loggers are the Trainer's; here are only the rows it reads, the
divisor of the loss (units of the whole optimiser step, not of a micro-batch) and the finished
checkpoint. Left to others: settings (`settings`), loss (`loss`), calibration (`calibrate`).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from promedical.reward_model.instances import Instances
from promedical.reward_model.loss import TrainingRow, pack_training_trees
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.trunk import TrunkCache

__all__ = ["RewardTrainer", "TrainError", "TrainResult", "train"]

Progress = Callable[[int, int], None]


class TrainError(ValueError):
    """Instances, a cache or a folder that a model cannot be trained with."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Args:
        history: a row per logged step: step, loss, learning_rate, seconds.
        counts: trees, rows, leaves, unique tokens, tokens of separate sequences, what was pruned.
        seconds: wall time.
    """

    history: tuple[dict[str, float], ...]
    counts: dict[str, int]
    seconds: float


class RewardTrainer(Trainer):
    """A Trainer whose examples are packed rows and whose loss counts units.

    Args:
        model: a `TreeRewardModel`.
        cache: hidden states after the frozen layers, if there are any.
    """

    def __init__(self, model: TreeRewardModel, *, cache: TrunkCache | None = None, **kwargs: Any):
        super().__init__(model=model, data_collator=_one_row, **kwargs)
        # The loss is divided by the items of the whole step already.
        self.loss_is_scaled_for_ga = True
        self._cache = cache

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        items = torch.tensor(sum(b["terms"].items for b in batch_samples), device=device)
        return self.accelerator.gather(items).sum().clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The row's loss over the step's items; see `promedical.reward_model.loss`."""
        hidden = None if self._cache is None else self._cache.hidden(inputs["row"])
        outputs = model(inputs["row"], inputs["terms"], num_items_in_batch, hidden)
        # Gradients are averaged over processes, while the divisor counts the items of all.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["row", "terms"]  # type: ignore[assignment]


class _Rows(Dataset):
    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": self.rows[index].row, "terms": self.rows[index].terms}


def _one_row(examples: list[dict[str, Any]]) -> dict[str, Any]:
    (example,) = examples  # a packed row is a whole micro-batch
    return example


class _Watch(TrainerCallback):
    """Stamps logged steps with the time trained so far, and reports progress.

    The stamps are in the Trainer's own log, which its checkpoints keep, so that a run that goes on
    from one has the history of its beginning too.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.started = time.monotonic() - before

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 2)

    def on_substep_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._tell(args, state)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._tell(args, state)

    def _tell(self, args, state) -> None:  # type: ignore[no-untyped-def]
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)


def train(
    model: TreeRewardModel,
    tokenizer: PreTrainedTokenizerBase,
    instances: Instances,
    settings: TrainSettings,
    out: str | Path,
    *,
    seed: int = 0,
    cache: TrunkCache | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, and save a standard sequence-classification checkpoint in `out`.

    A run that was killed goes on from its last whole checkpoint in `out`/steps if `save_steps` is
    set; a finished one leaves none there.

    Args:
        seed: of the order of the trees.
        cache: hidden states after the frozen layers.
        progress: called with (optimiser steps done, steps in all).

    Raises:
        TrainError: there is nothing to train on, the cache is of other frozen weights, or
            `out`/steps holds checkpoints of other settings or instances.
    """
    if cache is not None and not cache.same_trunk(model):
        raise TrainError("cache: its frozen layers are not this model's")
    started = time.monotonic()
    rows, packing = pack_training_trees(
        instances.trees,
        settings.max_tokens,
        mu=settings.mu,
        tier_weights=asdict(settings.tier_weights),
        pair_weighting=settings.pair_weighting,
    )
    if not rows:
        raise TrainError("instances: found no loss term, expected pairs or known labels")
    steps_folder = Path(out) / "steps"
    resumed = _claim(steps_folder, settings, rows, seed) if settings.save_steps else None
    trainer = RewardTrainer(
        model,
        cache=cache,
        args=TrainingArguments(
            output_dir=str(steps_folder),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.batch_trees,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="linear",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if settings.save_steps else "no",
            save_steps=settings.save_steps or 500,
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=_Rows(rows),
        callbacks=[_Watch(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    model.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(steps_folder, ignore_errors=True)
    counts = dict(instances.counts) | {
        "rows": len(rows),
        "unique_tokens": sum(len(r.row) for r in rows),
        "separate_tokens": sum(
            len(t.tree.prompt) + len(t.tree.responses[leaf.response]) + len(leaf.tokens)
            for t in instances.trees
            for leaf in t.tree.leaves
        ),
        "pruned_leaves": packing.pruned_leaves,
        "pruned_responses": packing.pruned_responses,
        "split_trees": packing.split_trees,
        "repeated_tokens": packing.repeated_tokens,
        "optimiser_steps": trainer.state.global_step,
    }
    history = tuple(
        {name: entry[name] for name in ("step", "loss", "learning_rate", "seconds")}
        for entry in trainer.state.log_history
        if "loss" in entry
    )
    return TrainResult(history, counts, time.monotonic() - started)


def _claim(
    folder: Path, settings: TrainSettings, rows: Sequence[TrainingRow], seed: int
) -> Path | None:
    """Mark a folder of checkpoints as this run's; its last whole checkpoint, if there is one."""
    digest = hashlib.sha256(repr((settings, rows, seed)).encode()).hexdigest()
    mark = folder / "run.sha256"
    # The Trainer writes its state last, so a checkpoint without it was cut short.
    whole = sorted(
        (path.parent for path in folder.glob("checkpoint-*/trainer_state.json")),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
    )
    if whole and (not mark.exists() or mark.read_text() != digest):
        raise TrainError(
            f"{folder}: found checkpoints of other settings or instances, expected this run's; "
            "delete the folder or train elsewhere"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    return whole[-1] if whole else None
