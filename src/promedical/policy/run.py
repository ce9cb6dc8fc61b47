"""`promedical policy grpo|rloo|dpo`: from a recipe to a trained policy (section 5).

    data      rows with rubrics, cut and counted                   this file, corpus
    reward    who grades, and what a grade is worth                specification, rewards, implicit
    monitor   what is written at every step; the gold judge        monitor
    train     the policy                                           grpo, rloo, dpo

A run that was killed goes on from its last whole checkpoint with the same trajectory; a finished
one is not run again. On several devices the command is started by `accelerate launch -m promedical
policy grpo RECIPE`; every process runs this file, the first one writes. Nothing is decided here
that a module's own function could decide.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from promedical.policy.recipe import Method, PolicyRecipe, RecipeConflictError, check_method
from promedical.progress import Stages
from promedical.records import GradedInstruction, read_dataset, read_jsonl

__all__ = ["PolicyResult", "PolicyRunError", "headline", "main", "policy_rows", "train_policy"]

Move = Callable[[str, int, int], None]

DESCRIPTION = {
    "grpo": """\
Train a policy by GRPO: groups of answers are sampled, graded criterion by criterion by a frozen
reward model, and the policy moves towards what is better than its group.
""",
    "rloo": """\
Train a policy by RLOO (a baseline): as GRPO, with the mean of a group's other answers as baseline.
""",
    "dpo": """\
Train a policy by DPO (a baseline) on pairs of responses whose verdicts are known, the better one
being the one with fewer violations, then the more proficient, then the more excellent.
""",
}
AGAIN = """\
Started again after a kill, the same command goes on where it was. On several devices:
  accelerate launch --config_file recipes/accelerate/deepspeed-zero3-8gpu.yaml \\
     -m promedical policy VERB RECIPE
"""


class PolicyRunError(ValueError):
    """A folder, a model or rows that cannot be used for this training."""


@dataclass(frozen=True)
class PolicyResult:
    """What a run left.

    Args:
        out: folder of the run; `policy/` in it is the checkpoint.
        method: how it was trained.
        trained: `GrpoResult` or `DpoResult`.
        rows: instructions trained on.
        left_out: instructions that were not, by reason.
    """

    out: Path
    method: Method
    trained: Any
    rows: int
    left_out: dict[str, int]


def main(argv: Sequence[str], method: Method) -> int:
    """Run `promedical policy METHOD` with these flags."""
    from promedical.policy.run_folder import first_process
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        PolicyRecipe,
        prog=f"promedical policy {method}",
        usage="%(prog)s RECIPE [flags]",
        description=DESCRIPTION[method] + AGAIN,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    path = parser.parse_known_args(list(argv))[0].file
    given = load_recipe(PolicyRecipe, path, argv, parser=parser)
    result = train_policy(
        replace(given, method=method), show=Stages(3) if first_process() else None
    )
    if first_process():
        print("\n".join(headline(result)))
    return 0


def train_policy(recipe: PolicyRecipe, *, show: Stages | None = None) -> PolicyResult:
    """Train a policy as a recipe says, or go on with it.

    Args:
        show: where progress is printed; nowhere if not given.

    Raises:
        RecipeConflictError: settings of another method.
        PolicyRunError: rows or a model that cannot be used, or a folder that holds another run.
        RecordError, RubricError: rows that cannot be read.
        SpecificationError, CheckpointError, BackendError, GoldError: a judge that cannot be used.
        GradingError: the grader failed again and again.
    """
    check_method(recipe)
    _refuse_sharded()
    show = show or _Silent()
    out = Path(recipe.out)
    with show.stage("Data") as move:
        rows, left_out = policy_rows(recipe, move)
    with show.stage("Reward"):
        reward = (
            None if recipe.method == "dpo" and recipe.monitor is None else _reward(recipe, rows)
        )
        callbacks = [] if recipe.monitor is None else [_monitor(recipe, rows, reward, out)]
    with show.stage("Training") as move:
        train = _dpo if recipe.method == "dpo" else _online
        try:
            trained = train(recipe, rows, reward, callbacks, partial(move, "steps"))
        except ValueError as error:
            if type(error).__module__.startswith("promedical."):
                raise
            raise PolicyRunError(str(error)) from error
    return PolicyResult(out, recipe.method, trained, len(rows), left_out)


def _refuse_sharded() -> None:
    """Refuse, before hours of training, a way of saving that would leave no weights.

    Raises:
        PolicyRunError: FSDP would save shards.
    """
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FULL" not in kind:
        raise PolicyRunError(
            f"fsdp_state_dict_type: found {kind!r}, expected FULL_STATE_DICT, or ZeRO-3 "
            "(recipes/accelerate/deepspeed-zero3-8gpu.yaml)"
        )


# --- data -----------------------------------------------------------------------------------------


def policy_rows(
    recipe: PolicyRecipe, move: Move | None = None
) -> tuple[list[GradedInstruction], dict[str, int]]:
    """The rows of a recipe, and how many were left out by reason.

    Raises:
        PolicyRunError: none is left.
        RecordError: they cannot be read.
    """
    from promedical.reward_model.instances import cut_rubric

    if move is not None:
        move("rows", 0, 1)
    given = _kqa(recipe) if recipe.data == "kqa" else _read(recipe.data)
    left_out: Counter[str] = Counter()
    lengths = _prompt_lengths(recipe)
    kept: list[GradedInstruction] = []
    for row in given:
        reason = _unfit(row) or lengths(row)
        if reason is not None:
            left_out[reason] += 1
            continue
        if recipe.max_criteria is not None:
            row = cut_rubric(
                row,
                max_criteria=recipe.max_criteria,
                min_veto=recipe.min_veto,
                seed=recipe.seed,
            )
        kept.append(row)
    if not kept:
        raise PolicyRunError(
            f"{recipe.data}: no instruction is left of {len(given)} ({dict(left_out)}), expected "
            "conversations that end with the user, with a rubric that has a proficiency tier"
        )
    return kept, dict(left_out)


def _read(path: str) -> list[GradedInstruction]:
    return read_jsonl(path) if Path(path).is_file() else read_dataset(path)


def _kqa(recipe: PolicyRecipe) -> list[GradedInstruction]:
    """K-QA's training side, for DPO with constructed responses, always the same for a seed."""
    from promedical.corpus.degrade import degrade
    from promedical.demo.kqa import load_kqa

    if recipe.method != "dpo":  # which samples its own answers
        return load_kqa().train
    return list(degrade(load_kqa().train, split="train", seed=recipe.seed).rows)


def _unfit(row: GradedInstruction) -> str | None:
    """Why a row gives no reward, or None."""
    if row.rubric is None:
        return "without a rubric"
    if row.rubric.safety_only:
        return "safety_only, so without a reward"
    return None


def _prompt_lengths(recipe: PolicyRecipe) -> Callable[[GradedInstruction], str | None]:
    """What says of a row why its prompt is too long, or None."""
    from transformers import AutoConfig, AutoTokenizer

    from promedical.policy.generate import prompt_ids
    from promedical.policy.run_folder import resolve

    path = resolve(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        positions = getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise PolicyRunError(f"model {recipe.model!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise PolicyRunError(f"model {recipe.model!r}: has no chat template, expected one")
    answer = 0 if recipe.method == "dpo" else recipe.train.max_completion_length

    def reason(row: GradedInstruction) -> str | None:
        length = len(prompt_ids(tokenizer, row))
        if recipe.max_prompt_length is not None and length > recipe.max_prompt_length:
            return "longer than max_prompt_length"
        if positions is not None and length + answer > positions:
            return "longer than the model's context"
        return None

    return reason


# --- reward and monitor ---------------------------------------------------------------------------


def _reward(recipe: PolicyRecipe, rows: Sequence[GradedInstruction]) -> Any:
    from promedical.policy.implicit import ImplicitReward
    from promedical.policy.rewards import RubricReward
    from promedical.policy.specification import default_device, open_grader

    told = recipe.reward
    _own_gpu()
    if recipe.asks == "criteria":
        return RubricReward.from_rows(
            open_grader(told, (row.rubric for row in rows), device=default_device()),
            rows,
            told.reward,
            operating_point=told.operating_point,
            soft_s1=told.soft_s1,
        )
    return ImplicitReward(_scalar_grader(recipe), rows, recipe.asks)


def _own_gpu() -> None:
    """Make "cuda" this process's GPU, before the reward model is loaded to it."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _scalar_grader(recipe: PolicyRecipe) -> Any:
    """A reward model that was trained on the one question.

    Raises:
        RecipeConflictError: it is not in this process.
        CheckpointError: it cannot be loaded, or was trained on another question.
    """
    from promedical.policy.specification import default_device
    from promedical.reward_model.grade import RubricRewardModel

    spec = recipe.reward.parsed()
    if spec.kind != "checkpoint":
        raise RecipeConflictError(
            f"reward.grader: found {spec.kind}:…, but with asks = {recipe.asks!r} a server would "
            "judge criteria; expected checkpoint:FOLDER"
        )
    options = {"device": default_device(), **spec.options}
    options.pop("threads", None)
    return RubricRewardModel.from_pretrained(spec.target, asks=recipe.asks, **options)


def _monitor(
    recipe: PolicyRecipe, rows: Sequence[GradedInstruction], reward: Any, out: Path
) -> Any:
    from promedical.policy.monitor import open_monitor

    assert recipe.monitor is not None
    found = open_monitor(
        recipe.monitor, out / "monitor", rows, reward=reward, judged_by=recipe.reward.grader
    )
    return found.callback()


# --- training -------------------------------------------------------------------------------------


def _online(
    recipe: PolicyRecipe,
    rows: Sequence[GradedInstruction],
    reward: Any,
    callbacks: Sequence[Any],
    progress: Callable[[int, int], None],
) -> Any:
    from promedical.policy.grpo import GrpoRecipe, train_grpo
    from promedical.policy.rloo import train_rloo

    settings = GrpoRecipe(
        **_values(recipe.train),
        model=recipe.model,
        seed=recipe.seed,
        reward=recipe.reward.reward,
    )
    train = train_grpo if recipe.method == "grpo" else train_rloo
    return train(
        settings,
        rows,
        None,
        recipe.out,
        reward=reward,
        callbacks=callbacks,
        graded_by={"asks": recipe.asks, **recipe.reward.identity()},
        progress=progress,
    )


def _dpo(
    recipe: PolicyRecipe,
    rows: Sequence[GradedInstruction],
    reward: Any,
    callbacks: Sequence[Any],
    progress: Callable[[int, int], None],
) -> Any:
    from promedical.policy.dpo import DpoRecipe, train_dpo

    settings = DpoRecipe(**_values(recipe.dpo), model=recipe.model, seed=recipe.seed)
    return train_dpo(settings, rows, recipe.out, callbacks=callbacks, progress=progress)


def _values(settings: Any) -> dict[str, Any]:
    """A dataclass's fields as they are, sections included."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


# --- what is said ---------------------------------------------------------------------------------


def headline(result: PolicyResult) -> list[str]:
    """A few lines on what a run did."""
    trained = result.trained
    lines = [
        f"policy     {trained.policy}",
        f"trained    {trained.done_steps} of {trained.planned_steps} steps by {result.method} on "
        f"{result.rows} instructions in {trained.seconds:.0f} s (ended by {trained.stopped_by})",
    ]
    lines += [f"left out   {count} {reason}" for reason, count in result.left_out.items()]
    if result.method == "dpo":
        first, last = trained.history[0], trained.history[-1]
        return [
            *lines,
            f"pairs      {json.dumps(trained.counts)}",
            f"loss       {_shown(first.loss)} → {_shown(last.loss)}; pairs ranked rightly "
            f"{_shown(last.accuracy)}",
        ]
    for name in ("reward", "s1", "s2", "s3", "veto_rate", "veto_variance_share", "no_signal"):
        values = [getattr(step.reward, name) for step in trained.history]
        if any(value is not None for value in values):
            lines.append(f"{name:<19} {_shown(values[0])} → {_shown(values[-1])}")
    grading = sum(step.grading_seconds or 0.0 for step in trained.history)
    failed = sum(step.reward.failed for step in trained.history)
    lines.append(
        f"grading             {grading / trained.seconds:.0%} of the time; {failed} failed"
    )
    return lines


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


class _Silent(Stages):
    """Prints nothing."""

    def __init__(self) -> None:
        super().__init__(0)
        self.console.quiet = True
