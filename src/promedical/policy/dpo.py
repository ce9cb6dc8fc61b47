"""DPO of a policy on lexicographic pairs (section 5, baseline), on TRL's trainer.

Two answers to one instruction whose verdicts are known make a pair if one is better: fewer
violations, then proficiency, then excellence (`corpus.pairs`); ties and comparisons that are left
open make none, and are counted. Nothing is generated or graded while training.

Prompts are rendered as they are for GRPO, and an answer is its text and the end of the turn, so
that both methods teach the same tokens. A pair that does not fit `max_length` is left out and
counted; TRL would cut it. Left to others: pairs (`corpus.pairs`), the loss (TRL), the folder and
resuming (`run_folder`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from promedical.policy.generate import end_ids, prompt_ids
from promedical.policy.run_folder import (
    Clock,
    batches,
    claim,
    finished_weights,
    first_process,
    last_checkpoint,
    lora_config,
    quiet,
    read_result,
    resolve,
    save_merged,
    saved_weights,
    timed,
    trainer_arguments,
    watch,
    write_result,
)
from promedical.policy.settings import DpoSettings
from promedical.records import GradedInstruction, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DpoRecipe", "DpoResult", "DpoStep", "TokenPair", "token_pairs", "train_dpo"]


@dataclass(frozen=True)
class DpoRecipe(DpoSettings):
    """Settings of a DPO run that is started from Python, or is a part of another run.

    Args:
        model: the policy to start from: "embedded", a folder or a Hub id.
        seed: for shuffling, drawing pairs and the adapter.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    model: str = "embedded"
    seed: int = 0


@dataclass(frozen=True)
class DpoStep:
    """One optimiser step, as TRL logged it.

    Args:
        step: from 1.
        seconds: how long it took, without what a monitor did after it.
        loss, grad_norm: TRL's.
        accuracy: share of the pairs whose chosen answer has the larger implicit reward.
        margin: mean difference of these rewards, β·log-ratio to the starting policy.
        chosen, rejected: mean log-probability of the answers.
    """

    step: int
    seconds: float
    loss: float | None
    grad_norm: float | None
    accuracy: float | None
    margin: float | None
    chosen: float | None
    rejected: float | None


@dataclass(frozen=True)
class DpoResult:
    """What a run made.

    Args:
        policy: the checkpoint, a plain causal language model; for LoRA the merged one.
        adapter: the LoRA adapter alone; does not exist where the weights themselves were trained.
        history: one entry a step.
        counts: pairs and what was left out, by reason.
        planned_steps, done_steps: in steps.
        seconds: training time over all attempts, without loading and saving the model and without
            a monitor's evaluations.
        stopped_by: what ended it; "callback" is a monitor's alarm.
        resumed_at: the step an earlier, killed attempt had reached; 0 if there was none.
    """

    policy: Path
    adapter: Path
    history: tuple[DpoStep, ...]
    counts: dict[str, int]
    planned_steps: int
    done_steps: int
    seconds: float
    stopped_by: Literal["steps", "time", "callback"]
    resumed_at: int


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids.

    Args:
        instruction, chosen_id, rejected_id: what it was made of.
        prompt, chosen, rejected: token ids; the answers end with the end of the turn.
    """

    instruction: str
    chosen_id: str
    rejected_id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass
class _Limits:
    """How long a pair may be: prompt and longer answer together, in tokens."""

    length: int
    counts: Counter[str] = field(default_factory=Counter)

    def fits(self, pair: TokenPair) -> bool:
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > self.length:
            self.counts["pairs_too_long"] += 1
        return longest <= self.length


def token_pairs(
    rows: Sequence[GradedInstruction],
    settings: DpoSettings,
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    *,
    seed: int = 0,
) -> tuple[list[TokenPair], dict[str, int]]:
    """The lexicographic pairs of all rows as token ids, and counts of what was left out.

    Args:
        rows: instructions with rubrics, and responses with verdicts.
        settings: which pairs, how many, how long.
        tokenizer: the policy's.
        end: the token that ends an answer.
        seed: for drawing pairs where an instruction may have only so many.
    """
    from promedical.corpus.pairs import PairsSettings, preference_pairs

    limits = _Limits(settings.max_length)
    counts = limits.counts
    found: list[TokenPair] = []
    for row in rows:
        if row.rubric is None:
            counts["instructions_without_rubric"] += 1
            continue
        made = preference_pairs(row, PairsSettings(settings.known_only), counts)
        prompt = tuple(prompt_ids(tokenizer, row))
        texts = {r.id: r.text for r in row.responses}
        fitting = [
            pair
            for pair in (
                TokenPair(
                    row.id,
                    p.chosen,
                    p.rejected,
                    prompt,
                    _answer(tokenizer, texts[p.chosen], end),
                    _answer(tokenizer, texts[p.rejected], end),
                )
                for p in made
            )
            if limits.fits(pair)
        ]
        most = settings.pairs_per_instruction
        if most is not None and len(fitting) > most:
            counts["pairs_not_drawn"] += len(fitting) - most
            fitting = random.Random(f"{seed}:{row.id}").sample(fitting, most)
        found += fitting
    counts["pairs"] = len(found)
    return found, {name: counts[name] for name in sorted(counts)}


def train_dpo(
    recipe: DpoRecipe,
    rows: Sequence[GradedInstruction],
    output: str | Path,
    *,
    callbacks: Sequence[Any] = (),
    progress: Callable[[int, int], None] | None = None,
) -> DpoResult:
    """Train a policy on the lexicographic pairs of graded responses.

    Args:
        recipe: the settings.
        rows: instructions with rubrics, and responses with verdicts.
        output: folder as of `grpo.train_grpo`: a finished run is returned as it is, a killed one
            goes on.
        callbacks: transformers' TrainerCallbacks, such as a monitor.
        progress: called with (steps done, steps expected within the time) after every step.

    Raises:
        ValueError: no pair is left, the folder holds a run with other settings or other rows, or a
            finished one that ended by time with less of it than the recipe gives.
    """
    from transformers import AutoTokenizer

    output = Path(output)
    identity = {"recipe": asdict(recipe), "rows": fingerprint(rows), "method": "dpo"}
    claim(output, identity)
    # Its steps follow from the data and the epochs, which are the run's own.
    finished = read_result(output, steps=None, max_seconds=recipe.max_seconds)
    if finished is not None:
        return _read(output, *finished)
    with quiet():
        model = _model(recipe)
        tokenizer = AutoTokenizer.from_pretrained(resolve(recipe.model))
        end = end_ids(model, tokenizer)[0]
        pairs, counts = token_pairs(rows, recipe, tokenizer, end, seed=recipe.seed)
        if not pairs:
            raise ValueError(
                f"rows: no pair is left of {len(rows)} instructions ({_told(counts)}), expected "
                "responses with different verdicts"
            )
        steps = math.ceil(len(pairs) * recipe.epochs / recipe.pairs_per_step)
        checkpoint = last_checkpoint(output / "checkpoints")
        clock = Clock(steps, recipe.max_seconds, progress)
        if checkpoint is not None:
            clock.load(checkpoint / "seconds.json")
        resumed_at = len(clock.seconds)
        if checkpoint is not None and clock.over:  # killed after its last step
            logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
            finished_weights(checkpoint, recipe, output)
        else:
            trainer = _trainer(
                recipe, model, tokenizer, pairs, clock, output / "checkpoints", callbacks
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            logged = trainer.state.log_history
            saved_weights(trainer, recipe, output)
        if recipe.lora_rank and first_process():
            save_merged(recipe.model, output)
    done = len(clock.seconds)
    result = DpoResult(
        policy=output / "policy",
        adapter=output / "adapter",
        history=_history(logged, clock.seconds),
        counts=counts,
        planned_steps=steps,
        done_steps=done,
        seconds=math.fsum(clock.seconds),
        stopped_by="steps" if done >= steps else "time" if clock.over else "callback",
        resumed_at=resumed_at,
    )
    if first_process():
        _write(output, result, identity)
    return result


def _model(recipe: DpoRecipe) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(recipe.seed)  # before the adapter's weights are drawn
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(resolve(recipe.model), dtype=dtype)


def _trainer(
    recipe: DpoRecipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenPair],
    clock: Clock,
    folder: Path,
    callbacks: Sequence[Any],
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class TokenPairTrainer(DPOTrainer):  # type: ignore[misc]
        """Takes pairs that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    trainer = TokenPairTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt_ids": list(pair.prompt),
                    "chosen_ids": list(pair.chosen),
                    "rejected_ids": list(pair.rejected),
                }
                for pair in pairs
            ]
        ),
        peft_config=lora_config(recipe, model),
        callbacks=[timed(clock), *callbacks, watch(clock, lambda folder: None)],
        args=DPOConfig(
            **trainer_arguments(recipe, folder, seed=recipe.seed),
            **batches(recipe.pairs_per_step, recipe.micro_batch),
            max_steps=clock.steps,
            loss_type=["sigmoid"],
            beta=recipe.beta,
            max_length=None,  # what does not fit was left out
            remove_unused_columns=False,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _answer(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> tuple[int, ...]:
    # A control token that an answer spells out stays text.
    encoded = tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)
    return (*encoded["input_ids"], end)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _history(logged: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> tuple[DpoStep, ...]:
    by_step = {int(entry["step"]): entry for entry in logged if "loss" in entry}
    return tuple(
        DpoStep(
            step=step,
            seconds=took,
            loss=entry.get("loss"),
            grad_norm=entry.get("grad_norm"),
            accuracy=entry.get("rewards/accuracies"),
            margin=entry.get("rewards/margins"),
            chosen=entry.get("logps/chosen"),
            rejected=entry.get("logps/rejected"),
        )
        for step, took in enumerate(seconds, start=1)
        for entry in (by_step.get(step, {}),)
    )


def _write(output: Path, result: DpoResult, identity: Mapping[str, Any]) -> None:
    summary = {k: v for k, v in asdict(result).items() if k not in ("policy", "adapter", "history")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    write_result(
        output,
        {**summary, "run": digest},
        result.history,
        max_seconds=identity["recipe"]["max_seconds"],
    )


def _read(output: Path, summary: dict[str, Any], lines: list[dict[str, Any]]) -> DpoResult:
    del summary["run"]
    return DpoResult(
        policy=output / "policy",
        adapter=output / "adapter",
        history=tuple(DpoStep(**line) for line in lines),
        **summary,
    )
