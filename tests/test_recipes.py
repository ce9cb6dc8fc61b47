"""Every committed recipe loads through its class, accelerate's configurations through its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from promedical.corpus.build_recipe import BuildRecipe
from promedical.policy.compare_recipe import CompareRecipe
from promedical.policy.engine_export import EngineRecipe
from promedical.policy.recipe import PolicyRecipe, check_method
from promedical.quickstart import QuickstartRecipe
from promedical.recipe import load_recipe
from promedical.reward_model.recipe import RewardModelRecipe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CLASSES: dict[str, type[Any]] = {
    "quickstart": QuickstartRecipe,
    "policy": PolicyRecipe,
    "compare": CompareRecipe,
    "verl": EngineRecipe,
    "openrlhf": EngineRecipe,
    "rm": RewardModelRecipe,
    "ablations": RewardModelRecipe,
    "corpus": BuildRecipe,
}
FILES = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in RECIPES.rglob("*.yaml")
    if path.parent.name != "accelerate"
)


def load(name: str) -> Any:
    folder, _, file = name.rpartition("/")
    kind = folder or file.removesuffix(".yaml").split("-")[0]
    # Of policies there are comparisons too, and ablations are of both kinds of model.
    first = file.split("-")[0]
    if first in ("policy", "compare", "verl", "openrlhf"):
        kind = first
    return load_recipe(CLASSES[kind], RECIPES / name)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_loads_and_says_more_than_the_defaults(name):
    found = load(name)
    if name != "quickstart.yaml" and not name.startswith("corpus/"):  # whose sources must be said
        assert found != type(found)()
    assert not any(
        Path(value).is_absolute() for value in vars(found).values() if isinstance(value, str)
    )


@pytest.mark.parametrize(
    "name", ["policy/verl-grpo-qwen3-8b.yaml", "policy/verl-ppo-qwen3-8b.yaml"]
)
def test_the_papers_values_in_verl(name):
    found = load(name)
    assert (found.num_generations, found.beta, found.learning_rate) == (8, 0.04, 1e-6)
    assert found.algorithm == name.split("-")[1]
    assert (found.reward.operating_point, found.reward.on_failure) == ("reward", "stop")


POLICIES = [name for name in FILES if isinstance(load(name), PolicyRecipe)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_recipe_is_for_its_method_and_writes_to_a_folder_of_its_own(name):
    found = load(name)
    check_method(found)
    stem = Path(name).stem
    assert found.method == (stem.split("-")[0] if stem[:4] in ("rloo", "dpo-") else "grpo")
    assert Path(found.out).name == stem


@pytest.mark.parametrize("name", ["policy/grpo-qwen3-8b.yaml", "policy/grpo-llama3-8b.yaml"])
def test_the_papers_values_of_grpo(name):
    train = load(name).train
    assert (train.num_generations, train.beta, train.learning_rate) == (8, 0.04, 1e-6)
    assert (train.loss_type, train.scale_rewards, train.advantages) == ("grpo", "group", "scalar")
    assert train.lora_rank == 0


def test_a_policys_ablation_differs_from_the_whole_in_one_thing():
    whole = load("policy/grpo-qwen3-8b.yaml")
    for name, wanted in {
        "no-veto": {"lam": 0.0, "ablation": "no_veto"},
        "no-bonus-margin": {"beta": 0.0, "ablation": "no_bonus_margin"},
        "without-safety-data": {},
        "without-criteria": {},
    }.items():
        found = load(f"ablations/policy-{name}.yaml")
        differing = {k for k, v in vars(found).items() if v != vars(whole)[k]} - {"out"}
        assert differing == ({"reward", "asks"} if name == "without-criteria" else {"reward"})
        assert found.reward.reward == replace(whole.reward.reward, **wanted)
        assert (found.reward.grader == whole.reward.grader) == bool(wanted)


@pytest.mark.parametrize("name", ["rm-qwen3-8b.yaml", "rm-llama3-8b.yaml"])
def test_the_papers_values(name):
    train = load(name).train
    assert (train.epochs, train.batch_pairs, train.learning_rate) == (2.0, 64, 5e-6)
    assert (train.max_tokens, train.frozen_layers, train.lora_rank) == (8192, 0, 0)


def test_an_ablation_differs_from_the_whole_in_one_thing():
    whole = vars(load("rm-qwen3-8b.yaml"))
    wanted = {
        "scalar": {"asks": "overall"},
        "scalar-with-rubric": {"asks": "rubric"},
        "without-safety-data": {"without": ("veto",)},
    }
    for name, expected in wanted.items():
        found = vars(load(f"ablations/{name}.yaml"))
        differing = {key: found[key] for key in whole if found[key] != whole[key]}
        differing.pop("out")
        if "asks" in expected:
            assert differing.pop("calibration") is None  # a scalar model gives no verdicts
        assert differing == expected


@pytest.mark.parametrize("name", ["fsdp-8gpu", "deepspeed-zero3-8gpu"])
def test_accelerate_reads_its_configurations(name):
    found = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert isinstance(found, ClusterConfig)
    assert found.num_processes == 8
    if name.startswith("deepspeed"):
        file = ROOT / found.deepspeed_config["deepspeed_config_file"]
        zero = json.loads(file.read_text())
        assert zero["zero_optimization"]["stage"] == 3
        # What the recipe decides is left open here.
        assert zero["gradient_accumulation_steps"] == zero["bf16"]["enabled"] == "auto"
    else:
        assert found.fsdp_config["fsdp_version"] == 2
