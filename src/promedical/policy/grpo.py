"""GRPO of a policy against a frozen, criterion-wise reward model (section 5), on TRL's trainer.

For every instruction G answers are sampled and graded by its rubric; an answer's advantage is its
reward relative to its group, (r − mean) / std, and the policy moves along it with a KL penalty to
the model it started from. TRL's defaults are not the paper's, so loss, KL coefficient, group size
and scaling are set here one by one.

A run stops after its steps or its time, whichever is first, and goes on from its last checkpoint
when it was killed. With LoRA an adapter is trained, and the merged checkpoint beside it is the one
that others load. Left to others: the reward (`rewards`), what the reward means
(`promedical.rubric`), other ways to an advantage (`advantages`), grading while generating
(`overlap`), the folder (`run_folder`), many nodes (verl).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from promedical.policy.advantages import Advantages, reward_functions, same_violations
from promedical.policy.generate import chat
from promedical.policy.overlap import Ahead, grading_ahead
from promedical.policy.rewards import Grader, RewardStep, RubricReward, read_history, write_history
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
    same_order,
    save_merged,
    saved_weights,
    timed,
    trainer_arguments,
    watch,
    write_result,
)
from promedical.policy.settings import OnlineSettings
from promedical.records import GradedInstruction, fingerprint
from promedical.rubric import RewardSpec

__all__ = ["GrpoRecipe", "GrpoResult", "GrpoStep", "train_grpo", "train_online"]

REWARDS = "rewards.jsonl"


@dataclass(frozen=True)
class GrpoRecipe(OnlineSettings):
    """Settings of a GRPO or RLOO run that is started from Python, or is a part of another run.

    Args:
        max_seconds: see `OnlineSettings`.
        model: the policy to start from: "embedded", a folder or a Hub id.
        seed: for shuffling, sampling and the adapter.
        reward: α, β, λ of the reward.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    max_seconds: float | None = 120.0
    model: str = "embedded"
    seed: int = 0
    reward: RewardSpec = field(default_factory=RewardSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantages != "scalar" and self.reward.ablation is not None:
            raise ValueError(
                f"advantages: found {self.advantages!r} with ablation {self.reward.ablation!r}, "
                "expected 'scalar': an ablation leaves something out of the scalar reward"
            )


@dataclass(frozen=True)
class GrpoStep:
    """One optimiser step: what TRL logged, and what the reward saw.

    Args:
        step: from 1.
        seconds: how long it took, without what a monitor did after it.
        loss, kl, grad_norm, reward_std: TRL's; the KL is that to the starting policy, and the
            reward's standard deviation is over the step's answers.
        completion_tokens: mean length of the sampled answers.
        cut: share of them that the limit cut.
        reward: what the reward function saw.
        grading_seconds: of `seconds`, those in which the step waited for its rewards.
        watching_seconds: beside `seconds`, those of the callbacks after the step, such as a gold
            judge's evaluation.
        entropy: mean over tokens, in nats.
        all_violate, none_violate: share of groups in which every answer, or none, has a violation.
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
    grading_seconds: float | None = None
    watching_seconds: float | None = None
    entropy: float | None = None
    all_violate: float | None = None
    none_violate: float | None = None


@dataclass(frozen=True)
class GrpoResult:
    """What a run made.

    Args:
        policy: the checkpoint, a plain causal language model; for LoRA the merged one.
        adapter: the LoRA adapter alone; does not exist where the weights themselves were trained.
        history: one entry a step.
        planned_steps, done_steps: in steps.
        seconds: training time over all attempts, without loading and saving the model and without
            a monitor's evaluations.
        stopped_by: what ended it; "callback" is a monitor's alarm.
        resumed_at: the step an earlier, killed attempt had reached; 0 if there was none.
    """

    policy: Path
    adapter: Path
    history: tuple[GrpoStep, ...]
    planned_steps: int
    done_steps: int
    seconds: float
    stopped_by: Literal["steps", "time", "callback"]
    resumed_at: int


def train_grpo(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    grader: Grader | None,
    output: str | Path,
    *,
    reward: Any = None,
    callbacks: Sequence[Any] = (),
    graded_by: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrpoResult:
    """Train a policy on instructions with rubrics, with the grader as oracle.

    Args:
        recipe: the settings.
        rows: training instructions; only their conversation and rubric are used.
        grader: the frozen reward model, called at the operating point "reward".
        output: folder for `policy/`, `adapter/`, `history.jsonl` and, while the run lasts,
            `checkpoints/`. A finished run is returned as it is, a killed one goes on.
        reward: in place of a grader, the reward itself: a `RubricReward` over these rows, or
            another callable with its attributes `history` and `observers`.
        callbacks: transformers' TrainerCallbacks, such as a monitor.
        graded_by: what decides the reward beside the recipe (the grader, …), by name, without
            secrets: it is written down, and a folder that was begun with another is refused.
        progress: called with (steps done, steps expected within the time) after every step.

    Raises:
        ValueError: no rows, the folder holds a run with other settings or other rows, or a finished
            one with less steps or time than the recipe asks for.
        RubricError: a row without a rubric that gives a reward.
        GradingError: the grader fails again and again.
    """
    return train_online(
        recipe,
        rows,
        grader,
        output,
        reward=reward,
        callbacks=callbacks,
        graded_by=graded_by,
        progress=progress,
        method="grpo",
    )


def train_online(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    grader: Grader | None,
    output: str | Path,
    *,
    method: Literal["grpo", "rloo"],
    reward: Any = None,
    callbacks: Sequence[Any] = (),
    graded_by: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrpoResult:
    """What `train_grpo` and `rloo.train_rloo` share; see there."""
    if len(rows) < recipe.prompts_per_step:
        raise ValueError(
            f"rows: found {len(rows) or 'none'}, expected instructions to train on, at least "
            f"prompts_per_step = {recipe.prompts_per_step}"
        )
    output = Path(output)
    if reward is None:
        if grader is None:
            raise ValueError("grader: found none, expected one, or a reward")
        reward = RubricReward.from_rows(grader, rows, recipe.reward)
    identity: dict[str, Any] = {"recipe": asdict(recipe), "rows": fingerprint(rows)}
    if method != "grpo":
        identity["method"] = method
    if graded_by is not None:
        identity["graded_by"] = dict(graded_by)
    claim(output, identity)
    finished = read_result(output, steps=recipe.steps, max_seconds=recipe.max_seconds)
    if finished is not None:
        return _read(output, *finished)

    checkpoint = last_checkpoint(output / "checkpoints")
    clock = Clock(recipe.steps, recipe.max_seconds, progress)
    if checkpoint is not None:
        reward.history = read_history(checkpoint / REWARDS)
        clock.load(checkpoint / "seconds.json")
    resumed_at = len(clock.seconds)
    with quiet():
        if checkpoint is not None and clock.over:  # killed after its last step
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            logged = state["log_history"]
            finished_weights(checkpoint, recipe, output)
        else:
            trainer = _trainer(
                recipe, rows, reward, clock, output / "checkpoints", method, callbacks
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            logged = trainer.state.log_history
            saved_weights(trainer, recipe, output)
        if recipe.lora_rank and first_process():
            save_merged(recipe.model, output)
    history = _history(logged, reward, clock)
    result = GrpoResult(
        policy=output / "policy",
        adapter=output / "adapter",
        history=history,
        planned_steps=recipe.steps,
        done_steps=len(clock.seconds),
        seconds=math.fsum(clock.seconds),
        stopped_by=_stopped_by(clock),
        resumed_at=resumed_at,
    )
    if first_process():
        _write(output, result, identity)
    return result


def _stopped_by(clock: Clock) -> Literal["steps", "time", "callback"]:
    if len(clock.seconds) >= clock.steps:
        return "steps"
    return "time" if clock.over else "callback"


def _trainer(
    recipe: GrpoRecipe,
    rows: Sequence[GradedInstruction],
    reward: Any,
    clock: Clock,
    folder: Path,
    method: Literal["grpo", "rloo"],
    callbacks: Sequence[Any],
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    set_seed(recipe.seed)  # before the adapter's weights are drawn
    path = resolve(recipe.model)
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if same_violations not in reward.observers:
        reward.observers.append(same_violations)
    found = reward_functions(reward, recipe.advantages, recipe.tiers)
    functions = [_Timed(function, clock) for function in found.functions]
    trainer_class = same_order(GRPOTrainer if method == "grpo" else RLOOTrainer)
    if recipe.overlap:
        ahead = Ahead(reward.grader)
        reward.grader = ahead
        trainer_class = grading_ahead(
            trainer_class, ahead, reward.rubrics, reward.operating_point, recipe.overlap
        )
    config = GRPOConfig if method == "grpo" else RLOOConfig
    trainer = trainer_class(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        reward_funcs=functions,
        train_dataset=Dataset.from_list(
            [{"prompt": chat(row), "instruction_id": row.id} for row in rows]
        ),
        peft_config=lora_config(recipe, model),
        # The last one completes each checkpoint with what the others have done to it.
        callbacks=[
            timed(clock),
            *callbacks,
            watch(clock, lambda folder: write_history(folder / REWARDS, reward.history)),
        ],
        args=config(
            **trainer_arguments(recipe, folder, seed=recipe.seed),
            **_sampling(recipe),
            **(_grpo_loss(recipe, found) if method == "grpo" else _rloo_loss(found)),
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sampling(recipe: GrpoRecipe) -> dict[str, Any]:
    """What both trainers are told about a step's answers."""
    spread = batches(recipe.answers, recipe.micro_batch)
    each = spread["per_device_train_batch_size"] * spread["gradient_accumulation_steps"]
    if each % recipe.num_generations:
        raise ValueError(
            f"prompts_per_step: found {recipe.prompts_per_step}, expected a multiple of the number "
            "of devices, as a group is graded on one"
        )
    return {
        **spread,
        "max_steps": recipe.steps,
        "beta": recipe.beta,
        "num_generations": recipe.num_generations,
        "num_iterations": 1,
        # A cut answer teaches too: with a limit this low nearly all are cut.
        "mask_truncated_completions": False,
        "max_completion_length": recipe.max_completion_length,
        "temperature": recipe.temperature,
        "chat_template_kwargs": {"enable_thinking": False},
        "log_completions": False,  # would print and store patients' text
        **recipe.vllm.for_trl(),
    }


def _grpo_loss(recipe: GrpoRecipe, found: Advantages) -> dict[str, Any]:
    """The paper's, where TRL's defaults differ or may come to differ."""
    return {
        "loss_type": recipe.loss_type,
        "scale_rewards": recipe.scale_rewards,
        "use_bias_correction_kl": False,
        **found.settings,
    }


def _rloo_loss(found: Advantages) -> dict[str, Any]:
    return {"normalize_advantages": False, **found.settings}


class _Timed:
    """A reward function whose time is the clock's."""

    def __init__(self, function: Any, clock: Clock) -> None:
        self.__name__ = function.__name__
        self._function, self._clock = function, clock

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        with self._clock.grading():
            values: list[float | None] = self._function(*args, **kwargs)
        return values


def _history(
    logged: Sequence[Mapping[str, Any]], reward: Any, clock: Clock
) -> tuple[GrpoStep, ...]:
    by_step = {int(entry["step"]): entry for entry in logged if "loss" in entry}
    steps = []
    times = zip(clock.seconds, clock.graded, clock.watched, strict=True)
    for seen, (took, graded, watched) in zip(reward.history, times, strict=True):
        entry = by_step.get(seen.step, {})
        steps.append(
            GrpoStep(
                step=seen.step,
                seconds=took,
                loss=entry.get("loss"),
                kl=entry.get("kl"),
                grad_norm=entry.get("grad_norm"),
                reward_std=entry.get(f"rewards/{reward.__name__}/std"),
                completion_tokens=entry.get("completions/mean_length"),
                cut=entry.get("completions/clipped_ratio"),
                reward=seen,
                grading_seconds=graded,
                watching_seconds=watched,
                entropy=entry.get("entropy"),
                all_violate=entry.get("all_violate"),
                none_violate=entry.get("none_violate"),
            )
        )
    return tuple(steps)


def _write(output: Path, result: GrpoResult, identity: Mapping[str, Any]) -> None:
    summary = {k: v for k, v in asdict(result).items() if k not in ("policy", "adapter", "history")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    write_result(
        output,
        {**summary, "run": digest},
        result.history,
        max_seconds=identity["recipe"]["max_seconds"],
    )


def _read(output: Path, summary: dict[str, Any], lines: list[dict[str, Any]]) -> GrpoResult:
    del summary["run"]
    history = [GrpoStep(**{**line, "reward": RewardStep(**line["reward"])}) for line in lines]
    return GrpoResult(
        policy=output / "policy", adapter=output / "adapter", history=tuple(history), **summary
    )
