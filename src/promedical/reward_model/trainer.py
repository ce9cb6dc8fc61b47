"""Training the reward model on packed trees, through `transformers.Trainer`.

Checkpoints, resume, accelerate and loggers are the Trainer's; here are only the rows it reads, the
divisor of the loss, and the finished checkpoint. The loss of section 4 is over the units of the
whole optimiser step, so

    loss of a row on one of N processes = N · Σ terms / (items of the step's rows on all processes)

because accelerate averages gradients over processes and the Trainer only sums micro-batches. It
is then the same however a step is split over micro-batches and processes. Left to others:
settings (`settings`), loss (`loss`), the rows' order (`row_order`), measuring
(`training_metrics`), calibration (`calibrate`), and the whole run (`run`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations

from promedical.reward_model.balance_rows import cost
from promedical.reward_model.instances import Instances
from promedical.reward_model.loss import TrainingRow, pack_training_trees
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.row_order import RowOrder, empty_row
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.training_metrics import EvaluationSet
from promedical.reward_model.tree import PackedRow
from promedical.reward_model.trunk import TrunkCache

__all__ = ["RewardTrainer", "TrainError", "TrainResult", "is_main_process", "remove_steps", "train"]

Progress = Callable[[int, int], None]

# Written last into a checkpoint, once every process has written its part.
WHOLE = "whole"
STEPS = "steps"
ADAPTER = "adapter"


class TrainError(ValueError):
    """Instances, a cache, settings or a folder that a model cannot be trained with."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Args:
        history: a row per logged step: step, loss, learning_rate, seconds.
        counts: trees, rows, leaves, unique tokens, tokens of separate sequences, what was pruned.
        seconds: wall time.
        metrics: a row per measurement on the evaluation split: step and figures by name.
    """

    history: tuple[dict[str, float], ...]
    counts: dict[str, int]
    seconds: float
    metrics: tuple[dict[str, float], ...] = ()


def is_main_process() -> bool:
    """Whether this is the process that writes and prints; the only one unless launched as more."""
    return int(os.environ.get("RANK", "0")) == 0


class RewardTrainer(Trainer):
    """A Trainer whose examples are packed rows and whose loss counts units.

    Args:
        model: a `TreeRewardModel`.
        cache: hidden states after the frozen layers, if there are any.
        order: which rows come next; the Trainer's own random order without it.
        evaluation: what `evaluate` measures on.
    """

    def __init__(
        self,
        model: TreeRewardModel,
        *,
        cache: TrunkCache | None = None,
        order: RowOrder | None = None,
        evaluation: EvaluationSet | None = None,
        **kwargs: Any,
    ):
        super().__init__(model=model, data_collator=_one_row, **kwargs)
        # The loss is divided by the items of the whole step already.
        self.loss_is_scaled_for_ga = True
        self._cache = cache
        self._order = order
        self._evaluation = evaluation

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        mine = float(sum(b["terms"].items for b in batch_samples))
        items = self.accelerator.gather(torch.tensor(mine, device=device)).sum()
        return torch.where(items > 0, items, torch.ones_like(items))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The row's loss over the step's items; see `promedical.reward_model.loss`."""
        # A number, since FSDP's mixed precision rounds a tensor of the arguments to bfloat16.
        divisor = float(num_items_in_batch)
        outputs = model(inputs["row"], inputs["terms"], divisor, self._hidden(inputs["row"]))
        # Gradients are averaged over processes, while the divisor counts the items of all.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _hidden(self, row: PackedRow) -> torch.Tensor | None:
        return None if self._cache is None else self._cache.hidden(row)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):  # type: ignore[no-untyped-def]
        """Figures on the evaluation split, each process scoring its share of the rows."""
        assert self._evaluation is not None
        rows, processes = self._evaluation.rows, self.accelerator.num_processes
        nothing = empty_row().terms
        model = self.model_wrapped
        model.eval()
        scored: list[tuple[tuple[str, ...], float]] = []
        # A forward pass of a sharded model needs every process: the last ones repeat a row.
        for turn in range(-(-len(rows) // processes)):
            number = turn * processes + self.accelerator.process_index
            row = rows[min(number, len(rows) - 1)]
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = model(row, nothing, 1, self._hidden(row))["scores"]
            if number < len(rows):
                scored += zip(self._evaluation.keys[number], scores.tolist(), strict=True)
        gathered = scored if processes == 1 else gather_object(scored)
        figures = self._evaluation.measure(dict(gathered))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self._order or super()._get_train_sampler(train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights that are not trained come from the model that the run starts from."""
        if state_dict is None:
            assert self.model is not None
            kept = {name for name, p in self.model.named_parameters() if p.requires_grad}
            state_dict = {n: t for n, t in self.model.state_dict().items() if n in kept}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: keys are missing on purpose."""

    def _save_checkpoint(self, model, trial) -> None:  # type: ignore[no-untyped-def]
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / WHOLE).touch()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["row", "terms"]  # type: ignore[assignment]


class _Rows(Dataset):
    """Rows by index, and after the last one the empty row."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index] if index < len(self.rows) else empty_row()
        return {"row": row.row, "terms": row.terms}


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
    evaluation: EvaluationSet | None = None,
    progress: Progress | None = None,
    finished: Callable[[TrainResult], None] | None = None,
) -> TrainResult:
    """Train, and save a standard sequence-classification checkpoint in `out`.

    A run that was killed goes on from its last whole checkpoint in `out`/steps if `save_steps` is
    set; a finished one leaves none there. A LoRA adapter is saved in `out`/adapter, and merged
    into the weights in `out` and of `model`.

    Args:
        seed: of the order of the trees.
        cache: hidden states after the frozen layers.
        evaluation: what is measured every `eval_steps` and at the end.
        progress: called with (optimiser steps done, steps in all).
        finished: called with the result before the steps are removed, by one process: who keeps it
            there need not train again if the removal is killed.

    Raises:
        TrainError: there is nothing to train on, the cache is of other frozen weights, there is no
            GPU for FlexAttention, a logger is not installed, an adapter's model is sharded, or
            `out`/steps holds checkpoints of other settings or instances.
    """
    if cache is not None and not cache.same_trunk(model):
        raise TrainError("cache: its frozen layers are not this model's")
    if settings.attention == "flex" and not torch.cuda.is_available():
        raise TrainError(
            "train.attention: found 'flex' on a machine without a GPU, expected 'level': "
            "FlexAttention has no backward pass on a CPU"
        )
    started = time.monotonic()
    rows, packing = pack_training_trees(
        instances.trees, settings.max_tokens, **settings.loss_terms()
    )
    if not rows:
        raise TrainError("instances: found no loss term, expected pairs or known labels")
    steps_folder = Path(out) / STEPS
    args = _arguments(settings, steps_folder, seed, evaluation)
    batch = rows_a_step(settings, rows)
    order = RowOrder(_costs(model, rows, settings), batch, processes=args.world_size, seed=seed)
    args.gradient_accumulation_steps = order.rows_a_process
    resumed = _claim(steps_folder, settings, rows, seed) if settings.save_steps else None
    trainer = RewardTrainer(
        model,
        cache=cache,
        order=order,
        evaluation=evaluation,
        args=args,
        train_dataset=_Rows(rows),
        eval_dataset=None if evaluation is None else _Rows([]),
        callbacks=[_Watch(progress), *_reporters(settings, Path(out))],
    )
    order.epoch = lambda: trainer.state.global_step // order.steps
    trainer.remove_callback(PrinterCallback)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and isinstance(model.model, PeftModel):
        raise TrainError("lora_rank: an adapter cannot be merged into a sharded model; use DDP")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if evaluation is not None and not _measured(trainer):
        trainer.evaluate()
    _save_model(trainer, model, tokenizer, Path(out), sharded=sharded)
    trainer.accelerator.wait_for_everyone()
    counts = dict(instances.counts) | {
        "rows": len(rows),
        "rows_a_step": batch,
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
    log = trainer.state.log_history
    history = tuple(
        {name: entry[name] for name in ("step", "loss", "learning_rate", "seconds")}
        for entry in log
        if "loss" in entry
    )
    metrics = tuple(
        {name.removeprefix("eval_"): value for name, value in entry.items() if name != "epoch"}
        for entry in log
        if any(name.startswith("eval_") for name in entry)
    )
    result = TrainResult(history, counts, time.monotonic() - started, metrics)
    if is_main_process():
        if finished is not None:
            finished(result)
        remove_steps(Path(out))
    return result


def remove_steps(out: Path) -> None:
    """Remove the checkpoints of a run; one that is half removed never counts as whole."""
    for path in sorted((out / STEPS).glob(f"checkpoint-*/{WHOLE}"), key=_step):
        path.unlink()
    shutil.rmtree(out / STEPS, ignore_errors=True)


def _step(mark: Path) -> int:
    """The step of a checkpoint, by its last file."""
    return int(mark.parent.name.removeprefix("checkpoint-"))


def _arguments(
    settings: TrainSettings, folder: Path, seed: int, evaluation: EvaluationSet | None
) -> TrainingArguments:
    """The Trainer's arguments; `gradient_accumulation_steps` follows from the rows."""
    measured = evaluation is not None and settings.eval_steps > 0
    # The Trainer's own writer would put its files among the checkpoints, which are removed.
    report_to = "none" if settings.report_to == "tensorboard" else settings.report_to
    _require_reporter(settings.report_to)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="linear",
        bf16=settings.dtype != "float32",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if measured else "no",
        eval_steps=settings.eval_steps if measured else None,
        seed=seed,
        data_seed=seed,
        report_to=report_to,
        run_name=folder.parent.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    # A row is no batch that could be cut up: a process has one device.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _require_reporter(name: str) -> None:
    if name != "none" and name not in get_available_reporting_integrations():
        raise TrainError(f"report_to: found {name!r}, but {name} is not installed")


def _reporters(settings: TrainSettings, out: Path) -> list[TrainerCallback]:
    if settings.report_to != "tensorboard" or not is_main_process():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(out / "tensorboard")))]


def rows_a_step(settings: TrainSettings, rows: Sequence[TrainingRow]) -> int:
    """Rows an optimiser step, over all processes.

    Raises:
        TrainError: `batch_pairs` is set and no row has a pair.
    """
    if settings.batch_pairs is None:
        return settings.batch_trees
    pairs = sum(len(row.terms.pairs) for row in rows)
    if not pairs:
        raise TrainError("batch_pairs: the instances have no pair, use batch_trees")
    return max(1, round(settings.batch_pairs * len(rows) / pairs))


def _costs(
    model: TreeRewardModel, rows: Sequence[TrainingRow], settings: TrainSettings
) -> list[float]:
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = config.num_hidden_layers
    parameters = sum(p.numel() for layer in model.layers for p in layer.parameters())
    full = not settings.lora_rank
    return [cost(r.row, parameters=parameters, layers=layers, width=width, full=full) for r in rows]


def _measured(trainer: Trainer) -> bool:
    """Whether the last step was measured already."""
    return any(
        entry.get("step") == trainer.state.global_step and any(k.startswith("eval_") for k in entry)
        for entry in trainer.state.log_history
    )


def _save_model(
    trainer: Trainer,
    model: TreeRewardModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    sharded: bool,
) -> None:
    """The finished checkpoint, written by one process."""
    state = None
    if sharded:  # gathering needs all of them
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        state = {name.removeprefix("model."): weight for name, weight in whole.items()}
    if isinstance(model.model, PeftModel):
        if is_main_process():
            model.model.save_pretrained(str(out / ADAPTER))
        model.model = model.model.merge_and_unload()
    if is_main_process():
        model.classifier.save_pretrained(out, state_dict=state)
        tokenizer.save_pretrained(out)


def _claim(
    folder: Path, settings: TrainSettings, rows: Sequence[TrainingRow], seed: int
) -> Path | None:
    """Mark a folder of checkpoints as this run's; its last whole checkpoint, if there is one."""
    digest = hashlib.sha256(repr((settings, seed)).encode())
    for row in rows:
        digest.update(repr(row).encode())
    mark = folder / "run.sha256"
    # A kill while a checkpoint is written leaves one without its last file.
    whole = [mark.parent for mark in sorted(folder.glob(f"checkpoint-*/{WHOLE}"), key=_step)]
    if whole and (not mark.exists() or mark.read_text() != digest.hexdigest()):
        raise TrainError(
            f"{folder}: found checkpoints of other settings or instances, expected this run's; "
            "delete the folder or train elsewhere"
        )
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        if not whole:  # else it is there, and another process may be reading it
            mark.write_text(digest.hexdigest())
        for path in folder.glob("checkpoint-*"):
            if path not in whole:
                shutil.rmtree(path)
    return whole[-1] if whole else None
