"""`promedical policy export-openrlhf`: a run for OpenRLHF 0.11, GRPO or PPO, ready to start.

OpenRLHF is configured by flags; those written here say every setting that decides what is learnt:

    GRPO   group_norm: (r − mean) / std in the group, KL to the starting policy in the loss (k3,
           β = 0.04), mean over an answer's tokens, then over answers
    PPO    a critic (GAE, γ = λ = 1), KL in the reward (k1, β = 0.04)

OpenRLHF clips rewards, by default to ±10; here the range is the reward's own, so that nothing is
clipped that a violation costs. It cannot hand `enable_thinking` to a chat template, so a policy
whose template thinks by default (Qwen3) needs a copy with another one. And its trainer logs an
answer of every step with its prompt: `train.py`, which run.sh starts, sets Ray's workers up to
withhold that text.

Left to others: the number (`specification`), OpenRLHF itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from promedical.corpus.export_formats import LeftOut, openrlhf_record
from promedical.policy.engine_export import (
    REWARD_FILE,
    SPECIFICATION,
    EngineRecipe,
    ExportError,
    Prompts,
    export_main,
    read_sides,
    script,
    write_private,
    write_run,
)
from promedical.rubric import Tier

__all__ = ["arguments", "export_openrlhf", "main"]

ENGINE = "OpenRLHF 0.11"
STARTER = "train.py"

DESCRIPTION = """\
Write a run for OpenRLHF: JSON lines of prompts and ids, rubrics, the reward's specification, the
file that OpenRLHF loads the reward from, and run.sh with the command. Start run.sh on the first
node of a Ray cluster (or on one machine); stopped or killed, the same command goes on from the last
checkpoint.
"""

REWARD = '''\
"""The reward of this run, as OpenRLHF loads it; the number comes from reward.yaml beside this."""

from pathlib import Path

from promedical.policy import openrlhf_reward

reward_func = openrlhf_reward.reward_func(
    str(Path(__file__).resolve().parent / {specification!r}), {model!r}
)
'''

START = '''\
"""OpenRLHF's trainer, with workers that withhold the text of conversations from their logs."""

from promedical.policy.openrlhf_start import start

if __name__ == "__main__":
    start()
'''

HEAD = """\
# GRPO or PPO with a rubric's reward on OpenRLHF 0.11, by promedical policy export-openrlhf.
# More than one node: "ray start --head" on the first, "ray start --address=FIRST:6379" on the
# others, then this script on the first; this folder is on a file system that all of them see.
# A reward server's token: $PROMEDICAL_TOKEN where "ray start" runs, or token_file in reward.yaml.
# Stopped or killed, the same command goes on from the last checkpoint."""


def arguments(recipe: EngineRecipe, sides: dict[str, Prompts]) -> dict[str, Any]:
    """OpenRLHF's flags of a run, without their dashes; True is a flag without a value.

    Args:
        sides: for the largest number of vetoes of a rubric, which bounds the reward.

    Raises:
        ExportError: a setting that OpenRLHF does not have.
    """
    if recipe.steps is not None:
        raise ExportError(
            f"steps: found {recipe.steps}, but OpenRLHF counts passes over the data; "
            "set epochs, or fewer instructions"
        )
    answers = recipe.prompts_per_step * recipe.num_generations
    engines = recipe.gpus // recipe.tensor_parallel
    found: dict[str, Any] = {
        "actor.model_name_or_path": recipe.policy,
        "reward.remote_url": f"$HERE/{REWARD_FILE}",
        "reward.clip_range": _range(recipe, sides),
        "data.prompt_dataset": "$HERE/train.jsonl",
        "data.input_key": "prompt",
        "data.label_key": "label",
        "data.apply_chat_template": True,
        "data.max_len": recipe.max_prompt_length + recipe.max_completion_length,
        "rollout.max_new_tokens": recipe.max_completion_length,
        "rollout.batch_size": recipe.prompts_per_step,
        "rollout.n_samples_per_prompt": recipe.num_generations,
        "rollout.temperature": recipe.temperature,
        "rollout.top_p": 1.0,
        # One update a step, of all its answers: the policy that is updated drew them.
        "train.batch_size": answers,
        "train.max_epochs": 1,
        "train.num_episodes": recipe.epochs,
        "train.dynamic_batch_enable": True,
        "train.max_tokens_per_gpu": recipe.tokens_per_gpu,
        "train.seed": recipe.seed,
        "train.colocate_all": True,
        "actor.adam.lr": recipe.learning_rate,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0,
        "actor.eps_clip": 0.2,
        "actor.gradient_checkpointing_enable": True,
        "actor.num_nodes": recipe.nodes,
        "actor.num_gpus_per_node": recipe.gpus_per_node,
        "ref.num_nodes": recipe.nodes,
        "ref.num_gpus_per_node": recipe.gpus_per_node,
        "vllm.num_engines": engines,
        "vllm.tensor_parallel_size": recipe.tensor_parallel,
        "vllm.gpu_memory_utilization": recipe.gpu_memory_utilization,
        "vllm.enable_sleep": True,
        "ds.enable_sleep": True,
        "ds.zero_stage": 3,
        "ds.packing_samples": True,
        **(_grpo(recipe) if recipe.algorithm == "grpo" else _ppo(recipe)),
        **_lora(recipe),
        **_validation(recipe, sides),
        "ckpt.path": "$HERE/checkpoints",
        "ckpt.output_dir": "$HERE/policy",
        "ckpt.save_steps": recipe.save_steps,
        "ckpt.save_hf": True,
        "ckpt.load_enable": True,
        "ckpt.best_metric_key": "none",
    }
    return found | dict(recipe.settings)


def _range(recipe: EngineRecipe, sides: dict[str, Prompts]) -> list[float]:
    """From the reward of an answer that violates every veto to that of a perfect one."""
    most = max(
        len(row.rubric.tier(Tier.VETO))
        for prompts in sides.values()
        for row in prompts.rows
        if row.rubric is not None
    )
    spec = recipe.reward.reward
    return [-spec.lam * most, 1 + spec.beta]


def _grpo(recipe: EngineRecipe) -> dict[str, Any]:
    return {
        "algo.advantage.estimator": "group_norm",
        "algo.kl.use_loss": True,
        "algo.kl.estimator": "k3",
        "algo.kl.init_coef": recipe.beta,
        "actor.loss_agg_mode": "seq-mean-token-mean",
    }


def _ppo(recipe: EngineRecipe) -> dict[str, Any]:
    return {
        "algo.advantage.estimator": "gae",
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": 1.0,
        "algo.kl.estimator": "k1",
        "algo.kl.init_coef": recipe.beta,
        "actor.loss_agg_mode": "token-mean",
        "critic.model_name_or_path": recipe.policy,
        "critic.adam.lr": recipe.critic_learning_rate,
        "critic.lr_scheduler": "constant",
        "critic.lr_warmup_ratio": 0,
        "critic.num_nodes": recipe.nodes,
        "critic.num_gpus_per_node": recipe.gpus_per_node,
    }


def _lora(recipe: EngineRecipe) -> dict[str, Any]:
    if not recipe.lora_rank:
        return {}
    return {"ds.lora.rank": recipe.lora_rank, "ds.lora.alpha": recipe.lora_alpha}


def _validation(recipe: EngineRecipe, sides: dict[str, Prompts]) -> dict[str, Any]:
    if "validation" not in sides:
        return {}
    return {
        "eval.dataset": "$HERE/validation.jsonl",
        "eval.steps": recipe.save_steps,
        "eval.n_samples_per_prompt": 1,
        "eval.temperature": 0.0,
    }


def export_openrlhf(recipe: EngineRecipe) -> dict[str, Prompts]:
    """Write a run's folder.

    Returns:
        The sides, with what was left out of each and why.

    Raises:
        ExportError: no instruction is left, or a setting cannot be used.
        RecordError: a dataset cannot be read.
    """
    sides = read_sides(recipe)
    flags: list[list[str]] = []
    for name, value in arguments(recipe, sides).items():
        if value is False or value is None:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags.append([f"--{name}", *(str(item) for item in values)])
    lines = [HEAD]
    if recipe.nodes > 1:
        lines.append("export RAY_ADDRESS=${RAY_ADDRESS:-auto}")
    command = script(lines, f'python3 "$HERE"/{STARTER}', flags)
    reward = REWARD.format(specification=SPECIFICATION, model=recipe.policy)
    folder = write_run(recipe, ENGINE, sides, reward_file=reward, command=command)
    (folder / STARTER).write_text(START, encoding="utf-8")
    for name, prompts in sides.items():
        text = ""
        for row in prompts.rows:
            record = openrlhf_record(row)
            assert not isinstance(record, LeftOut)
            text += json.dumps(record, ensure_ascii=False) + "\n"
        write_private(folder / f"{name}.jsonl", text)
    return sides


def main(argv: Sequence[str]) -> int:
    """`promedical policy export-openrlhf RECIPE [flags]`; returns the exit code."""
    return export_main(argv, "export-openrlhf", DESCRIPTION, export_openrlhf)
