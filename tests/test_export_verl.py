"""Runs for verl: the files, the command, and verl's own reading of them where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from engine_runs import SECRET, passed, recipe, write_rows
from promedical.policy.engine_export import EngineRecipe, ExportError, quoted, write_private
from promedical.policy.export_verl import export_verl, main, overrides, verl_rows
from promedical.policy.specification import RewardSpecification, read_rubrics, read_specification
from promedical.rubric import RewardSpec
from tiny_policy import save_tiny_policy

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), layers=1, positions=64)


def arguments(folder: Path) -> list[str]:
    """verl's settings as run.sh passes them."""
    first, second, *rest = passed(folder, "trainer.total_epochs=3")
    assert (first, second) == ("-m", "verl.trainer.main_ppo")
    return rest


def test_every_file_of_a_run(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    sides = export_verl(given)
    folder = Path(given.out)
    assert sorted(path.name for path in folder.iterdir()) == [
        "export.json",
        "promedical_reward.py",
        "reward.yaml",
        "rubrics.jsonl",
        "run.sh",
        "train.parquet",
        "validation.parquet",
    ]
    for path in folder.iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.suffix in (".parquet", ".jsonl", ".yaml")
        assert not text or mode == 0o600, path.name
        assert path.suffix in (".parquet", ".jsonl") or SECRET not in path.read_text()
    assert os.access(folder / "run.sh", os.X_OK)
    assert [row.id for row in sides["train"].rows] == ["q1", "q2", "q3", "q4"]
    report = json.loads((folder / "export.json").read_text())
    assert report["sides"]["train"]["left_out"] == {"no_rubric": 1, "safety_only": 1}
    assert report["sides"]["train"]["prompt_lengths_measured"] is False
    assert report["recipe"]["beta"] == 0.04


def test_rows_hold_the_id_and_the_text_of_the_prompt_alone(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    sides = export_verl(given)
    table = pq.read_table(Path(given.out) / "train.parquet")
    assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    first = table.to_pylist()[0]
    assert first == {
        "data_source": "promedical/test",
        "prompt": [{"role": "user", "content": f"{SECRET} 0"}],
        "ability": "medical",
        "reward_model": {"style": "rule", "ground_truth": "q1"},
        "extra_info": {"split": "train", "index": 0, "instruction_id": "q1", "rubric_id": "q1"},
    }
    assert table.to_pylist() == verl_rows(sides["train"], "train")
    rubrics = read_rubrics(Path(given.out) / "rubrics.jsonl")
    assert sorted(rubrics) == ["q1", "q2", "q3", "q4", "v1"]


def test_the_reward_is_found_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rm").mkdir()
    monkeypatch.chdir(tmp_path)
    reward = RewardSpecification(
        grader="checkpoint:rm,dtype=bfloat16",
        reward=RewardSpec(lam=2.5),
        soft_s1=True,
        on_failure="worst",
        attempts=7,
    )
    given = recipe(tmp_path, reward=reward)
    export_verl(given)
    monkeypatch.chdir("/")
    found = read_specification(Path(given.out) / "reward.yaml")
    assert found.grader == f"checkpoint:{tmp_path / 'rm'},dtype=bfloat16"
    assert found.rubrics == str(Path(given.out) / "rubrics.jsonl")
    assert (found.reward, found.soft_s1, found.on_failure, found.attempts) == (
        RewardSpec(lam=2.5),
        True,
        "worst",
        7,
    )
    text = yaml.safe_load((Path(given.out) / "reward.yaml").read_text())
    assert text["rubrics"] == "rubrics.jsonl"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_policy_is_found_from_anywhere(
    algorithm: str, policy: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(policy.parent)
    given = recipe(tmp_path, model=policy.name, algorithm=algorithm)
    export_verl(given)
    told = arguments(Path(given.out))
    assert f"actor_rollout_ref.model.path={policy}" in told
    assert (f"critic.model.path={policy}" in told) == (algorithm == "ppo")
    assert recipe(tmp_path, model="Qwen/Qwen3-8B").policy == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_command_is_as_it_was(algorithm: str, tmp_path: Path) -> None:
    given = EngineRecipe(
        data=str(write_rows(tmp_path / "many.jsonl", 128)),
        out=str(tmp_path / "run"),
        algorithm=algorithm,  # type: ignore[arg-type]
        nodes=2,
        reward=RewardSpecification(grader="http:http://10.0.0.1:8000"),
        settings={"trainer.project_name": "clinic", "trainer.logger": ["console", "file"]},
    )
    export_verl(given)
    golden = GOLDEN / f"verl-{algorithm}.sh"
    assert (tmp_path / "run" / "run.sh").read_text() == golden.read_text()


def test_the_shell_passes_every_setting_as_it_is(tmp_path: Path) -> None:
    given = recipe(tmp_path, out=str(tmp_path / "my run's"), settings={"+x.y": "a b$HOME'"})
    export_verl(given)
    found = arguments(tmp_path / "my run's")
    wanted = overrides(given, validation=True)
    assert len(found) == len(wanted) + 1
    assert found[-1] == "trainer.total_epochs=3"
    assert "+x.y=a b$HOME'" in found
    assert f"data.train_files={tmp_path / 'my run'}'s/train.parquet".replace(" '", "'") in found
    assert "trainer.logger=[console]" in found
    assert "trainer.total_training_steps=null" in found


def test_the_papers_settings_are_the_defaults() -> None:
    found = overrides(EngineRecipe(), validation=False)
    assert found["actor_rollout_ref.rollout.n"] == 8
    assert found["actor_rollout_ref.actor.kl_loss_coef"] == 0.04
    assert found["actor_rollout_ref.actor.optim.lr"] == 1e-6
    assert found["actor_rollout_ref.model.path"] == "Qwen/Qwen3-8B"
    assert found["trainer.test_freq"] == -1
    assert found["data.val_files"] == "$HERE/train.parquet"
    assert found["reward.num_workers"] == 1  # a checkpoint is loaded by each
    ppo = overrides(EngineRecipe(algorithm="ppo"), validation=False)
    assert ppo["algorithm.kl_ctrl.kl_coef"] == 0.04
    assert ppo["critic.model.path"] == "Qwen/Qwen3-8B"
    lora = overrides(EngineRecipe(lora_rank=64), validation=False)
    assert lora["actor_rollout_ref.model.lora_rank"] == 64


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path: Path, policy: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", 4, question="why " * 40, first="long")
    data = tmp_path / "both.jsonl"
    data.write_text(write_rows(tmp_path / "a.jsonl", 4).read_text() + long.read_text())
    given = recipe(tmp_path, data=str(data), model=str(policy), max_prompt_length=100)
    sides = export_verl(given)
    assert [row.id for row in sides["train"].rows] == ["q1", "q2", "q3", "q4"]
    assert sides["train"].left_out == {"prompt_too_long": 4}
    assert sides["train"].measured


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    for settings, said in (
        ({"num_generations": 1}, "num_generations: found 1 with grpo"),
        ({"prompts_per_step": 3, "gpus_per_node": 7}, "found 24, expected a multiple of the 7"),
        ({"tensor_parallel": 3}, "tensor_parallel: found 3"),
        ({"tokens_per_gpu": 100}, "tokens_per_gpu: found 100"),
        ({"beta": -1.0}, "beta"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"steps": 0}, "steps: found 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"nodes": 0}, "nodes: found 0"),
        ({"reward": RewardSpecification(rubrics="x")}, "reward.rubrics: found 'x'"),
    ):
        with pytest.raises(ExportError, match=said):
            EngineRecipe(**settings)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="prompts_per_step: found 128, but"):
        export_verl(recipe(tmp_path, prompts_per_step=128))
    other = write_rows(tmp_path / "other.jsonl", 1, question="Another text")
    with pytest.raises(ExportError, match="'q1': train and validation differ"):
        export_verl(recipe(tmp_path, validation=str(other)))
    no_veto = write_rows(tmp_path / "no_veto.jsonl", 4, vetoes=0)
    worst = RewardSpecification(on_failure="worst")
    with pytest.raises(ExportError, match="'q1' has no veto"):
        export_verl(recipe(tmp_path, data=str(no_veto), reward=worst))


def test_the_verb_reads_a_recipe_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 4, odd=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"data: {data}\nout: {tmp_path / 'run'}\nprompts_per_step: 4\ngpus_per_node: 2\n"
        "reward: {grader: 'http:http://127.0.0.1:9', on_failure: worst}\n"
    )
    assert main([str(file), "--algorithm", "ppo", "--reward.attempts", "2"]) == 0
    said = capsys.readouterr().out
    assert "train: 4 instructions, left out: 1 no_rubric, 1 safety_only" in said
    assert "no prompt's length was measured" in said
    assert SECRET not in said
    assert read_specification(tmp_path / "run" / "reward.yaml").attempts == 2
    assert "critic.optim.lr" in (tmp_path / "run" / "run.sh").read_text()


def test_a_file_of_text_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["plain", "a b", "$HERE/x y", "k='$HERE/x'", "it's $HOME", "[a]"])
def test_quoting_replaces_here_and_nothing_else(text: str) -> None:
    said = subprocess.run(
        ["bash", "-c", f"HERE=/some/where; printf %s {quoted(text)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == text.replace("$HERE", "/some/where")
    assert shlex.split(quoted(text).replace('"$HERE"', "X"))


# --- with verl itself -----------------------------------------------------------------------------

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="verl is not installed (docs/policy-engines)"
)


def composed(folder: Path, algorithm: str) -> Any:
    """verl's configuration of a run, by Hydra, from the arguments that run.sh passes."""
    import verl
    from hydra import compose, initialize_config_dir

    given = arguments(folder)
    where = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(version_base=None, config_dir=where):
        config = compose("ppo_trainer", overrides=given)
    assert config.algorithm.adv_estimator == {"grpo": "grpo", "ppo": "gae"}[algorithm]
    return config


@needs_verl
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_verl_composes_and_accepts_the_settings(algorithm, lora_rank, tmp_path, policy) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    given = recipe(
        tmp_path,
        model=str(policy),  # verl reads the critic's configuration
        algorithm=algorithm,
        lora_rank=lora_rank,
        nodes=2,
        gpus_per_node=2,
    )
    export_verl(given)
    config = composed(Path(given.out), algorithm)
    assert need_critic(config) == (algorithm == "ppo")
    assert need_reference_policy(config)
    checked = config.copy()
    if lora_rank:  # verl asks vLLM itself about the rank, and that is not installed
        checked.actor_rollout_ref.model.lora_rank = 0
    validate_config(checked, need_reference_policy(config), need_critic(config))
    for part in ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"):
        section = config
        for name in part.split("."):
            section = section[name]
        omega_conf_to_dataclass(section)
    assert config.trainer.nnodes == 2
    assert config.trainer.total_epochs == 3
    assert config.actor_rollout_ref.model.lora_rank == lora_rank


@needs_verl
def test_verl_reads_the_rows(tmp_path: Path, policy: Path, monkeypatch) -> None:
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, model=str(policy))
    export_verl(given)
    config = composed(Path(given.out), "grpo")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    dataset = RLHFDataset([config.data.train_files], tokenizer, config.data)
    assert len(dataset) == 4
    batch = collate_fn([dataset[i] for i in range(4)])
    assert [info["instruction_id"] for info in batch["extra_info"]] == ["q1", "q2", "q3", "q4"]
    assert batch["raw_prompt"][0][0]["content"] == f"{SECRET} 0"
    assert batch["reward_model"][1]["ground_truth"] == "q2"
    assert list(batch["data_source"]) == ["promedical/test"] * 4


@needs_verl
def test_verl_loads_the_reward_and_gets_the_number(tmp_path: Path, monkeypatch) -> None:
    import asyncio

    import numpy as np
    import torch
    from tensordict import TensorDict
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager

    from promedical.policy import verl_reward
    from promedical.policy.specification import GradingStoppedError, Oracle
    from test_specification import FakeGrader

    given = recipe(tmp_path, model=str(save_tiny_policy(tmp_path / "policy", layers=1)))
    export_verl(given)
    path = Path(given.out) / "reward.yaml"
    config = composed(Path(given.out), "grpo")
    specification = read_specification(path)
    grader = FakeGrader()
    oracle = Oracle(
        grader, read_rubrics(specification.rubrics), specification, sleep=lambda _: None
    )
    monkeypatch.setitem(verl_reward._opened, str(path), oracle)

    function = get_custom_reward_fn(config)
    assert function is not None
    asked = {"data_source": "promedical/test", "ground_truth": "q1"}
    found = function(solution_str="muumu", extra_info={"instruction_id": "q1"}, **asked)
    assert found["score"] == pytest.approx(0.5 - 1.5)
    with pytest.raises(GradingStoppedError, match="'q1'"):
        function(solution_str="muumc", extra_info={"instruction_id": "q1"}, **asked)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    manager = load_reward_manager(config, tokenizer)
    ids = [*tokenizer("muumu", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    data = DataProto(
        batch=TensorDict(
            {
                "responses": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            },
            batch_size=1,
        ),
        non_tensor_batch={
            "data_source": np.array(["promedical/test"], dtype=object),
            "reward_model": np.array([{"ground_truth": "q1"}], dtype=object),
            "extra_info": np.array([{"instruction_id": "q1"}], dtype=object),
        },
    )
    result = asyncio.get_event_loop().run_until_complete(manager.run_single(data))
    assert result["reward_score"] == pytest.approx(0.5 - 1.5)
    assert result["reward_extra_info"]["s3"] == 1.0
    assert [responses for _, responses in grader.asked][-1] == ["muumu"]


@needs_verl
def test_a_failed_prompt_stops_verls_replay_buffer(tmp_path: Path, monkeypatch) -> None:
    from verl.trainer.ppo.v1 import replay_buffer
    from verl.utils.import_utils import load_extern_object

    from promedical.policy.specification import GradingStoppedError

    given = recipe(tmp_path)
    export_verl(given)
    sampler = composed(Path(given.out), "grpo").trainer.v1.sampler
    chosen: Any = load_extern_object(sampler.custom_sampler.path, sampler.custom_sampler.name)
    buffer = chosen(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=sampler.max_off_policy_threshold,
        max_off_policy_strategy=sampler.max_off_policy_strategy,
        sampler_kwargs={},
        poll_interval=0.01,
        refill_fn=None,
    )
    prompt = {"is_prompt": True, "global_steps": 1}
    held = {
        "a": {**prompt, "status": "finished"},
        "b": {**prompt, "status": "finished"},
        "a_0_0": {"status": "success"},
        "b_0_0": {"status": "success"},
    }
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda: {"train": held})
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
    batch, _ = buffer.sample(1, "train", 2)
    assert sorted(batch.keys) == ["a_0_0", "b_0_0"]
    held["b"]["status"] = "failure"
    # verl's own would go on with what is left.
    own = replay_buffer.ReplayBuffer("sync", {}, 8, "drop", {})
    assert own.sample(1, "train", 2)[0].keys
    with pytest.raises(GradingStoppedError, match="1 prompts failed"):
        buffer.sample(1, "train", 2)
