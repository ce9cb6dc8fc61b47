"""Runs for OpenRLHF: files, command, logs, and OpenRLHF's own reading where it is installed."""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib.util
import json
import logging
import runpy
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_runs import SECRET, passed, recipe, write_rows
from promedical.policy import openrlhf_start, verl_reward
from promedical.policy.engine_export import EngineRecipe, ExportError
from promedical.policy.export_openrlhf import arguments, export_openrlhf, main
from promedical.policy.openrlhf_reward import RunStopped
from promedical.policy.specification import (
    Oracle,
    RewardSpecification,
    read_rubrics,
    read_specification,
)
from promedical.rubric import RewardSpec
from test_specification import FakeGrader
from tiny_policy import save_tiny_policy

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), layers=1, positions=64)


def test_every_file_of_a_run(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    sides = export_openrlhf(given)
    folder = Path(given.out)
    assert sorted(path.name for path in folder.iterdir()) == [
        "export.json",
        "promedical_reward.py",
        "reward.yaml",
        "rubrics.jsonl",
        "run.sh",
        "train.jsonl",
        "train.py",
        "validation.jsonl",
    ]
    for path in folder.iterdir():
        if SECRET in path.read_text():
            assert path.suffix == ".jsonl"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": [{"role": "user", "content": f"{SECRET} 0"}], "label": "q1"}
    assert len(rows) == len(sides["train"].rows) == 4
    assert sides["train"].left_out == {"no_rubric": 1, "safety_only": 1}


def test_the_policy_is_found_from_anywhere(policy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(policy.parent)
    given = recipe(tmp_path, model=policy.name, algorithm="ppo")
    found = arguments(given, export_openrlhf(given))
    assert found["actor.model_name_or_path"] == found["critic.model_name_or_path"] == str(policy)
    assert repr(str(policy)) in (Path(given.out) / "promedical_reward.py").read_text()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_command_is_as_it_was(algorithm: str, tmp_path: Path) -> None:
    given = EngineRecipe(
        data=str(write_rows(tmp_path / "many.jsonl", 128)),
        out=str(tmp_path / "run"),
        algorithm=algorithm,  # type: ignore[arg-type]
        nodes=2,
        reward=RewardSpecification(grader="http:http://10.0.0.1:8000"),
        settings={"actor.max_norm": 0.5, "ds.packing_samples": False},
    )
    export_openrlhf(given)
    golden = GOLDEN / f"openrlhf-{algorithm}.sh"
    assert (tmp_path / "run" / "run.sh").read_text() == golden.read_text()


def test_the_reward_is_clipped_at_nothing_that_a_violation_costs(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "many_vetoes.jsonl", 4, vetoes=9)
    reward = RewardSpecification(
        grader="http:http://127.0.0.1:9", reward=RewardSpec(beta=0.5, lam=2.0)
    )
    given = recipe(tmp_path, data=str(data), reward=reward)
    found = arguments(given, export_openrlhf(given))
    assert found["reward.clip_range"] == [-18.0, 1.5]
    with pytest.raises(ExportError, match="steps: found 7, but OpenRLHF counts passes"):
        export_openrlhf(recipe(tmp_path, steps=7))


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {data}\nout: {tmp_path / 'run'}\nprompts_per_step: 4\n")
    assert main([str(file), "--lora-rank", "8"]) == 0
    assert "train: 4 instructions, left out: none" in capsys.readouterr().out
    assert "--ds.lora.rank 8" in (tmp_path / "run" / "run.sh").read_text()


def loaded(given: EngineRecipe, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The reward file's function, with a grader that reads verdicts from the answer."""
    path = Path(given.out) / "reward.yaml"
    specification = read_specification(path)
    rubrics = read_rubrics(specification.rubrics)
    oracle = Oracle(FakeGrader(**settings), rubrics, specification, sleep=lambda _: None)
    monkeypatch.setitem(verl_reward._opened, str(path), oracle)
    return runpy.run_path(str(Path(given.out) / "promedical_reward.py"))["reward_func"]


def test_the_reward_file_gives_numbers_for_several_answers(
    tmp_path: Path, policy: Path, monkeypatch
) -> None:
    given = recipe(tmp_path, model=str(policy))
    export_openrlhf(given)
    function = loaded(given, monkeypatch)
    answers, labels = ["mmmuu", "muumu", "uuuuu"], ["q1", "q2", "q1"]
    found = function([f"P{a}<|im_end|>" for a in answers], ["P"] * 3, labels)
    assert found["rewards"].tolist() == pytest.approx([1.05, -1.0, 0.0])
    assert found["scores"].tolist() == found["rewards"].tolist()
    logs = {name: value.tolist() for name, value in found["extra_logs"].items()}
    assert logs["s3"] == [0.0, 1.0, 0.0]
    assert logs["grading_failed"] == [0.0, 0.0, 0.0]


def test_the_trainers_sample_is_withheld(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    openrlhf_start.withhold_samples()
    openrlhf_start.withhold_samples()
    target = logging.getLogger("openrlhf.trainer.ppo_trainer")
    assert sum(isinstance(f, openrlhf_start._WithoutSample) for f in target.filters) == 1
    monkeypatch.setattr(target, "propagate", True)
    monkeypatch.setattr(logging.getLogger("openrlhf"), "propagate", True)
    with caplog.at_level(logging.INFO):
        target.info(f"Sample: {[SECRET, 0.5]}")
        target.info("Global step 3: {'reward': 0.5}")
    assert SECRET not in caplog.text
    assert "Sample: text withheld" in caplog.text
    assert "Global step 3" in caplog.text


def test_the_start_prepares_every_worker_and_refuses_other_loggers(monkeypatch) -> None:
    called: list[Any] = []
    fake = ModuleType("ray")
    fake.init = lambda **given: called.append(given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(runpy, "run_module", lambda *a, **k: called.append((a, k, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["train.py", "--train.seed", "3"])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    openrlhf_start.start()
    environment, (module, settings, argv) = called
    hook = environment["runtime_env"]["worker_process_setup_hook"]
    name, _, function = hook.rpartition(".")
    assert getattr(importlib.import_module(name), function) is openrlhf_start.withhold_samples
    assert environment["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert module == ("openrlhf.cli.train_ppo_ray",)
    assert settings == {"run_name": "__main__", "alter_sys": True}
    assert argv == ["openrlhf.cli.train_ppo_ray", "--train.seed", "3"]
    for flag in ("--logger.wandb.key=x", "--logger.tensorboard_dir"):
        with pytest.raises(openrlhf_start.StartError, match="prompts and answers"):
            openrlhf_start.start([flag, "y"])


# --- with OpenRLHF itself -------------------------------------------------------------------------

needs_openrlhf = pytest.mark.skipif(
    importlib.util.find_spec("openrlhf") is None,
    reason="OpenRLHF is not installed (docs/policy-engines)",
)


def source(module: str) -> Path:
    """A file of OpenRLHF, which cannot be imported as a whole without a GPU's packages."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / module


def parsed(given: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What OpenRLHF's own command makes of arguments: its parser and all its checks are run."""
    from datetime import datetime

    path, helper = source("cli/train_ppo_ray.py"), source("utils/config.py").read_text()
    block = ast.parse(path.read_text()).body[-1]
    assert isinstance(block, ast.If)  # if __name__ == "__main__":
    monkeypatch.setitem(sys.modules, "openrlhf", ModuleType("openrlhf"))
    monkeypatch.setitem(sys.modules, "openrlhf.utils", ModuleType("openrlhf.utils"))
    config = ModuleType("openrlhf.utils.config")
    exec(helper, config.__dict__)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.config", config)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray", *given])
    found: list[Any] = []
    names = {"argparse": argparse, "datetime": datetime, "train": found.append, "os": None}
    exec(compile(ast.Module(block.body, []), str(path), "exec"), names)
    return found[0]


@needs_openrlhf
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_openrlhf_accepts_every_flag(algorithm: str, tmp_path: Path, monkeypatch) -> None:
    given = recipe(tmp_path, algorithm=algorithm, lora_rank=8, nodes=2)
    export_openrlhf(given)
    first, *flags = passed(Path(given.out), "--train.seed", "5")
    assert first == str(Path(given.out) / "train.py")
    found = parsed(flags, monkeypatch)
    assert found.train.seed == 5
    assert found.reward.remote_url == [str(Path(given.out) / "promedical_reward.py")]
    assert tuple(found.reward.clip_range) == (-3.0, 1.2)
    assert found.algo.kl.init_coef == 0.04
    assert found.actor.adam.lr == 1e-6
    assert found.rollout.n_samples_per_prompt == 8
    assert found.train.batch_size == 32
    assert (found.critic.model_name_or_path is None) == (algorithm == "grpo")
    assert found.algo.kl.use_loss == (algorithm == "grpo")
    assert found.ckpt.load_enable
    assert found.ds.lora.rank == 8
    # As its train() asserts for colocated models.
    engines = found.vllm.num_engines * found.vllm.tensor_parallel_size
    assert found.actor.num_nodes * found.actor.num_gpus_per_node == engines == 4
    assert found.logger.wandb.key is None
    assert found.logger.tensorboard_dir is None


class Engine:
    """A generating engine that always gives the same tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def generate(self, prompt_token_ids: list[int], *_: Any, **__: Any) -> Any:
        output = SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def executed(given: EngineRecipe, policy: Path, text: str) -> dict[str, Any]:
    """One answer through OpenRLHF's own executor, which loads the reward file and asks it."""
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("openrlhf_agent", source("utils/agent.py"))
    assert spec is not None
    assert spec.loader is not None
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    executor = agent.SingleTurnAgentExecutor([str(Path(given.out) / "promedical_reward.py")])
    row = json.loads((Path(given.out) / "train.jsonl").read_text().splitlines()[0])
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    sampling = SimpleNamespace(max_tokens=64, logprobs=None)
    found: dict[str, Any] = asyncio.run(
        executor.execute(prompt, row["label"], sampling, 4096, tokenizer, Engine(ids))
    )
    return found


@needs_openrlhf
def test_openrlhf_loads_the_reward_and_gets_the_number(
    tmp_path: Path, policy: Path, monkeypatch
) -> None:
    given = recipe(tmp_path, model=str(policy))
    export_openrlhf(given)
    loaded(given, monkeypatch)
    found = executed(given, policy, "muumu")
    assert float(found["reward"]) == pytest.approx(0.5 - 1.5)
    assert float(found["scores"]) == pytest.approx(0.5 - 1.5)
    assert float(found["extra_logs"]["s3"]) == 1.0


@needs_openrlhf
def test_a_failure_gets_through_openrlhf(
    tmp_path: Path, policy: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = recipe(tmp_path, model=str(policy))
    export_openrlhf(given)
    loaded(given, monkeypatch, fails=99)
    # An ordinary exception would be logged and forgotten there.
    with pytest.raises(RunStopped, match=r"'q1'.*ConnectionError"):
        executed(given, policy, "muumu")
    assert SECRET not in "".join(capfd.readouterr())
