"""`promedical policy export-verl`: a run for verl 0.9, multi-node GRPO or PPO, ready to start.

verl is configured by Hydra; the overrides written here say every setting that decides what is
learnt, where verl's defaults are not the paper's or may come to differ:

    GRPO   advantage (r − mean) / std in the group, KL to the starting policy in the loss (k3,
           β = 0.04), mean over an answer's tokens, then over answers, as TRL's loss_type "grpo"
    PPO    a critic (GAE, γ = λ = 1), KL in the reward (β = 0.04)

Rows are the corpus export's verl rows without the conversation in `extra_info`: the reward looks it
up by id. Nothing of a row is logged: console and no other logger, no generations dumped. A failed
prompt ends the run (`verl_reward.StopOnFailure`), and `resume_mode: auto` goes on from the last
checkpoint.

Left to others: the number (`specification`), verl itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promedical.corpus.export_formats import SCHEMAS, LeftOut, verl_record
from promedical.policy.engine_export import (
    REWARD_FILE,
    SPECIFICATION,
    EngineRecipe,
    Prompts,
    export_main,
    read_sides,
    script,
    write_private,
    write_run,
)

__all__ = ["export_verl", "main", "overrides", "verl_rows"]

ENGINE = "verl 0.9"

DESCRIPTION = """\
Write a run for verl: Parquet rows, rubrics, the reward's specification, the file that verl loads
the reward from, and run.sh with the command. Start run.sh on the first node of a Ray cluster (or on
one machine); stopped or killed, the same command goes on from the last checkpoint.
"""

REWARD = '''\
"""The reward of this run, as verl loads it; the number comes from reward.yaml beside this file."""

from promedical.policy.verl_reward import StopOnFailure, compute_score

__all__ = ["StopOnFailure", "compute_score"]
'''

HEAD = """\
# GRPO or PPO with a rubric's reward on verl 0.9, written by promedical policy export-verl.
# More than one node: "ray start --head" on the first, "ray start --address=FIRST:6379" on the
# others, then this script on the first; this folder is on a file system that all of them see.
# A reward server's token: $PROMEDICAL_TOKEN where "ray start" runs, or token_file in reward.yaml.
# Stopped or killed, the same command goes on from the last checkpoint."""


def verl_rows(prompts: Prompts, split: str) -> list[dict[str, Any]]:
    """Rows as verl reads them; the conversation is in `prompt` alone."""
    rows = []
    for index, row in enumerate(prompts.rows):
        record = verl_record(row, split=split, index=index)
        assert not isinstance(record, LeftOut)
        record["extra_info"].pop("messages")
        rows.append(record)
    return rows


def overrides(recipe: EngineRecipe, *, validation: bool) -> dict[str, Any]:
    """verl's settings of a run, by Hydra's names; $HERE is the run's folder.

    Args:
        validation: whether there are rows to validate on; verl wants a file in any case.
    """
    side = "validation" if validation else "train"
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    found: dict[str, Any] = {
        "data.train_files": "$HERE/train.parquet",
        "data.val_files": f"$HERE/{side}.parquet",
        "data.train_batch_size": recipe.prompts_per_step,
        "data.max_prompt_length": recipe.max_prompt_length,
        "data.max_response_length": recipe.max_completion_length,
        "data.filter_overlong_prompts": True,
        "data.truncation": "error",
        "data.shuffle": True,
        "data.seed": recipe.seed,
        "+data.apply_chat_template_kwargs.enable_thinking": False,
        "actor_rollout_ref.model.path": recipe.policy,
        f"{actor}.optim.lr": recipe.learning_rate,
        # One update a step, of all its answers: the policy that is updated drew them.
        f"{actor}.ppo_mini_batch_size": recipe.prompts_per_step,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": recipe.tokens_per_gpu,
        f"{actor}.clip_ratio": 0.2,
        f"{actor}.entropy_coeff": 0,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": recipe.num_generations,
        f"{rollout}.temperature": recipe.temperature,
        f"{rollout}.top_p": 1.0,
        f"{rollout}.tensor_model_parallel_size": recipe.tensor_parallel,
        f"{rollout}.gpu_memory_utilization": recipe.gpu_memory_utilization,
        **(_grpo(recipe) if recipe.algorithm == "grpo" else _ppo(recipe)),
        **_lora(recipe),
        "reward.custom_reward_function.path": f"$HERE/{REWARD_FILE}",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.specification": f"$HERE/{SPECIFICATION}",
        # Every worker would load a checkpoint of its own; a server is asked by several.
        "reward.num_workers": 1 if recipe.reward.parsed().kind == "checkpoint" else 8,
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",
        "trainer.v1.sampler.custom_sampler.path": f"$HERE/{REWARD_FILE}",
        "trainer.v1.sampler.custom_sampler.name": "StopOnFailure",
        "trainer.nnodes": recipe.nodes,
        "trainer.n_gpus_per_node": recipe.gpus_per_node,
        "trainer.total_epochs": recipe.epochs,
        "trainer.total_training_steps": recipe.steps,
        "trainer.save_freq": recipe.save_steps,
        "trainer.test_freq": recipe.save_steps if validation else -1,
        "trainer.val_before_train": validation,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": "$HERE/checkpoints",
        "trainer.project_name": "promedical",
        "trainer.experiment_name": recipe.algorithm,
        # Nothing of a conversation, and nothing to anyone else's server.
        "trainer.logger": ["console"],
        "trainer.log_val_generations": 0,
        "trainer.rollout_data_dir": None,
        "trainer.validation_data_dir": None,
    }
    return found | dict(recipe.settings)


def _grpo(recipe: EngineRecipe) -> dict[str, Any]:
    actor = "actor_rollout_ref.actor"
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        f"{actor}.use_kl_loss": True,
        f"{actor}.kl_loss_coef": recipe.beta,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.loss_agg_mode": "seq-mean-token-mean",
    }


def _ppo(recipe: EngineRecipe) -> dict[str, Any]:
    return {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": 1.0,
        "algorithm.lam": 1.0,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_ctrl.kl_coef": recipe.beta,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "critic.model.path": recipe.policy,
        "critic.optim.lr": recipe.critic_learning_rate,
        "critic.ppo_max_token_len_per_gpu": recipe.tokens_per_gpu,
    }


def _lora(recipe: EngineRecipe) -> dict[str, Any]:
    if not recipe.lora_rank:
        return {}
    return {
        "actor_rollout_ref.model.lora_rank": recipe.lora_rank,
        "actor_rollout_ref.model.lora_alpha": recipe.lora_alpha,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "actor_rollout_ref.rollout.load_format": "safetensors",
    }


def export_verl(recipe: EngineRecipe) -> dict[str, Prompts]:
    """Write a run's folder.

    Returns:
        The sides, with what was left out of each and why.

    Raises:
        ExportError: no instruction is left, or a setting cannot be used.
        RecordError: a dataset cannot be read.
    """
    sides = read_sides(recipe)
    given = overrides(recipe, validation="validation" in sides)
    lines = [HEAD]
    if recipe.nodes > 1:
        lines.append("export RAY_ADDRESS=${RAY_ADDRESS:-auto}")
    arguments = [[f"{name}={_value(value)}"] for name, value in given.items()]
    command = script(lines, "python3 -m verl.trainer.main_ppo", arguments)
    folder = write_run(recipe, ENGINE, sides, reward_file=REWARD, command=command)
    for name, prompts in sides.items():
        _write_rows(folder / f"{name}.parquet", verl_rows(prompts, name))
    return sides


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_private(path, "")
    schema = SCHEMAS["verl"]
    number = schema.get_field_index("extra_info")
    bare = [f for f in schema.field(number).type if f.name != "messages"]
    schema = schema.set(number, pa.field("extra_info", pa.struct(bare)))
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def _value(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_value(item) for item in value) + "]"
    return str(value)


def main(argv: Sequence[str]) -> int:
    """`promedical policy export-verl RECIPE [flags]`; returns the exit code."""
    return export_main(argv, "export-verl", DESCRIPTION, export_verl)
