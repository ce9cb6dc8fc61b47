"""What makes a training with TRL one that may be killed: its folder, its clock, its checkpoints.

A run's folder holds `run.json` (whose run it is), `checkpoints/` while it lasts, and at the end
`policy/`, `adapter/` for LoRA, `history.jsonl` and `result.json`. A checkpoint is TRL's own
(weights or adapter, optimiser, random numbers, place in the data) completed by what the run has
seen so far; a file written last says that it is whole, and what is not whole is removed on the next
start. All files hold numbers and ids only, weights apart.

Left to others: what is trained (`grpo`, `rloo`, `dpo`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promedical.policy.settings import PolicyTraining

__all__ = [
    "Clock",
    "batches",
    "claim",
    "finished_weights",
    "first_process",
    "last_checkpoint",
    "lora_config",
    "quiet",
    "read_result",
    "renamed",
    "replace_text",
    "resolve",
    "same_order",
    "save_merged",
    "saved_weights",
    "timed",
    "trainer_arguments",
    "watch",
    "write_result",
]

# Settings that say how long, how often and where, not what is learnt: they may differ when a run
# goes on.
NOT_LEARNT = ("steps", "max_seconds", "save_steps", "report_to")
CLOCK = "seconds.json"

# Writes what a run has seen into a checkpoint's folder.
Keep = Callable[[Path], None]


def first_process() -> bool:
    """Whether this is the process that writes; there is one a device."""
    return int(os.environ.get("RANK", "0")) == 0


def resolve(name: str) -> str:
    """A model's folder or Hub id; "embedded" is unpacked once."""
    from promedical.demo.models import resolve_model

    return str(resolve_model(name))


# --- time -----------------------------------------------------------------------------------------


class Clock:
    """How long each step took, and whether another fits the budget.

    Args:
        steps: planned.
        budget: in seconds, over all attempts.
        progress: called with (steps done, steps expected within the time) after every step.

    Attributes:
        seconds: of each step done.
        graded: of these, seconds in which the step waited for its rewards.
        watched: seconds between the step's end and the next one's, in which a monitor looks at it;
            the budget is for both.
    """

    def __init__(
        self,
        steps: int,
        budget: float | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.steps = steps
        self.budget = budget
        self.seconds: list[float] = []
        self.graded: list[float] = []
        self.watched: list[float] = []
        self._progress = progress
        self._began = self._ended = 0.0
        self._grading = 0.0

    def begin(self) -> None:
        self._began, self._grading = time.monotonic(), 0.0

    def end(self) -> None:
        """The step is over; what is done about it until `rest` is no part of it."""
        self._ended = time.monotonic()
        self.seconds.append(self._ended - self._began)
        self.graded.append(self._grading)

    def rest(self) -> None:
        """All that follows a step is done."""
        self.watched.append(time.monotonic() - self._ended)
        if self._progress is not None:
            self._progress(len(self.seconds), self.expected)

    @contextmanager
    def grading(self) -> Iterator[None]:
        """Time what the step waits for its rewards."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._grading += time.monotonic() - began

    @property
    def expected(self) -> int:
        """Steps that the budget will have had room for, judging by those done."""
        done, spent = len(self.seconds), math.fsum([*self.seconds, *self.watched])
        if self.budget is None or not done or spent == 0:
            return self.steps
        room = max(0.0, self.budget - spent)
        return min(self.steps, done + int(room * done / spent))

    @property
    def over(self) -> bool:
        return bool(self.seconds) and len(self.seconds) >= self.expected

    def save(self, path: Path) -> None:
        """Write and rename: the file is there or not."""
        told = {"seconds": self.seconds, "graded": self.graded, "watched": self.watched}
        replace_text(path, json.dumps(told))

    def load(self, path: Path) -> None:
        found = json.loads(path.read_text())
        self.seconds, self.graded = list(found["seconds"]), list(found["graded"])
        # A checkpoint of an earlier version has it in `seconds`.
        self.watched = list(found.get("watched", [0.0] * len(self.seconds)))


# --- checkpoints ----------------------------------------------------------------------------------


def timed(clock: Clock) -> Any:
    """The callback that times the steps; the first one, so that what others do is not counted."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end()

    return Timed()


def watch(clock: Clock, keep: Keep) -> Any:
    """The callback that stops in time and completes each checkpoint; it has to be the last one."""
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            clock.rest()
            if _first_says(clock.over):
                control.should_training_stop = True

        def on_save(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            if state.is_world_process_zero:
                folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
                keep(folder)
                # Last: its presence says that the checkpoint is whole.
                clock.save(folder / CLOCK)

    return Watch()


def _first_says(over: bool) -> bool:
    """What the first process found: clocks differ, and all have to stop after the same step."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return over
    from accelerate.utils import broadcast_object_list

    said = [over]
    broadcast_object_list(said, from_process=0)
    return bool(said[0])


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; half-written ones are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / CLOCK).exists():
            found[int(path.name.rsplit("-", 1)[1])] = path
        elif first_process():
            shutil.rmtree(path)
    return found[max(found)] if found else None


def same_order(trainer_class: Any) -> Any:
    """TRL's GRPO or RLOO trainer, whose instructions come in the same order after a kill.

    TRL 1.16 draws each epoch's order from a generator that a resumed run starts anew, so that from
    the second epoch on it would go on in the order of the first. Here an epoch's order follows from
    the seed and its number, which transformers' trainer tells samplers that have `set_epoch`.
    """
    from trl.trainer.utils import RepeatSampler

    class EpochSampler(RepeatSampler):  # type: ignore[misc]
        def set_epoch(self, epoch: int) -> None:
            self.generator.manual_seed((self.seed or 0) + epoch)

    class SameOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            of_trl = super()._get_train_sampler(dataset)
            return EpochSampler(
                of_trl.data_source,
                of_trl.mini_repeat_count,
                of_trl.batch_size,
                of_trl.repeat_count,
                of_trl.shuffle,
                of_trl.seed,
            )

    SameOrder.__name__ = trainer_class.__name__
    return SameOrder


# --- the folder -----------------------------------------------------------------------------------


def claim(output: Path, identity: Mapping[str, Any]) -> None:
    """Say what run this folder is for, or check that it is the same one.

    Args:
        identity: "recipe", the settings (those that are not learnt are left out), "rows", a
            fingerprint, and perhaps "graded_by", what else decides the reward, by name.

    Raises:
        ValueError: it is another one; the message names what differs.
    """
    settings = {k: v for k, v in identity["recipe"].items() if k not in NOT_LEARNT}
    wanted = json.loads(json.dumps({**identity, "recipe": settings}))
    path = output / "run.json"
    if path.exists():
        held = json.loads(path.read_text())
        settled = {}
        for part in ("recipe", "graded_by"):
            if part in held and part in wanted:
                settled[part] = held.pop(part), wanted.pop(part)
        differing = [
            f"{name}: found {was.get(name)!r}, expected {value!r}"
            for was, now in settled.values()
            for name, value in now.items()
            if was.get(name) != value
        ]
        differing += [
            f"{name}: another one" if name != "rows" else "rows: other instructions"
            for name in {**wanted, **held}
            if held.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"{path}: a run with other settings ({'; '.join(differing)}); "
                "use another folder or delete this one"
            )
        return
    if first_process():
        output.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(wanted, indent=2))


def write_result(
    output: Path, summary: Mapping[str, Any], history: Sequence[Any], *, max_seconds: float | None
) -> None:
    """Write what a run came to, and remove its checkpoints; the summary last, as it says "done"."""
    lines = [json.dumps(asdict(step)) + "\n" for step in history]
    replace_text(output / "history.jsonl", "".join(lines))
    told = {**summary, "max_seconds": max_seconds}
    replace_text(output / "result.json", json.dumps(told, indent=2))
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def read_result(
    output: Path, *, steps: int | None, max_seconds: float | None
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """A finished run's summary and its history, or None if it is not finished.

    Args:
        steps, max_seconds: what is asked for now; steps None where the data decide them.

    Raises:
        ValueError: that is more than the run was given, and a finished run does not go on.
    """
    path = output / "result.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    done, planned = summary["done_steps"], summary["planned_steps"]
    given = summary.pop("max_seconds", max_seconds)
    more = None
    if steps is not None and steps > planned:
        more = f"steps: found {steps}"
    elif summary["stopped_by"] == "time" and (max_seconds or math.inf) > (given or math.inf):
        more = f"max_seconds: found {max_seconds}"
    if more is not None:
        raise ValueError(
            f"{path}: finished with {done} of {planned} steps (ended by {summary['stopped_by']}, "
            f"max_seconds {given}), but {more}; a finished run does not go on: use another --out"
        )
    lines = (output / "history.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


@contextmanager
def renamed(target: Path) -> Iterator[Path]:
    """A folder to write to that gets its name when it is whole."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    yield staging
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)


def replace_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is whole or absent."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text)
    os.replace(staging, path)


# --- weights --------------------------------------------------------------------------------------


def lora_config(settings: PolicyTraining, model: Any) -> Any:
    """The adapter of these settings on this model; None where all weights are trained."""
    import torch
    from peft import LoraConfig

    if not settings.lora_rank:
        return None
    layers = int(model.config.num_hidden_layers)
    kept = layers if settings.lora_layers is None else min(settings.lora_layers, layers)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
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
    )


def trainer_arguments(settings: PolicyTraining, folder: Path, *, seed: int) -> dict[str, Any]:
    """What all of TRL's configurations are told alike."""
    import torch

    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision != "float32",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def batches(total: int, micro_batch: int | None) -> dict[str, Any]:
    """How a step of so many answers or pairs is spread over devices and backward passes.

    Raises:
        ValueError: it cannot be spread evenly.
    """
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    each = min(micro_batch or total, max(1, total // devices))
    if total % (devices * each):
        raise ValueError(
            f"micro_batch: found {each} on {devices} devices, expected a step of {total} to be "
            "divisible by both together"
        )
    return {
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": total // (devices * each),
    }


def saved_weights(trainer: Any, settings: PolicyTraining, output: Path) -> None:
    """Save what was trained: the adapter, or the weights themselves; all processes take part."""
    name = "adapter" if settings.lora_rank else "policy"
    staging = output / f".{name}.tmp"
    if first_process():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if first_process():
        _only_weights(staging)
        if not any(staging.glob("*.safetensors")):
            raise ValueError(
                f"{staging}: holds no weights; sharded ones are not gathered with FSDP's "
                "SHARDED_STATE_DICT, expected FULL_STATE_DICT, or ZeRO-3"
            )
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(staging, output / name)


def finished_weights(checkpoint: Path, settings: PolicyTraining, output: Path) -> None:
    """The same from the checkpoint of the last step, of a run that was killed after it."""
    if first_process():
        with renamed(output / ("adapter" if settings.lora_rank else "policy")) as folder:
            shutil.copytree(checkpoint, folder)
            _only_weights(folder)


def _only_weights(folder: Path) -> None:
    """Remove what is no part of a checkpoint that others load."""
    for name in ("README.md", CLOCK, "training_args.bin", "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)
    for pattern in ("optimizer*", "scheduler*", "rng_state*", "*.jsonl", "scaler*", "global_step*",
                    "latest", "zero_to_fp32.py"):  # fmt: skip
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_merged(model: str, output: Path) -> None:
    """Save the starting model with the adapter merged in, as an ordinary checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(model)
    # Merged into fresh weights: TRL patches the forward of the ones it trains.
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(output / "adapter")).merge_and_unload()
    with renamed(output / "policy") as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
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
