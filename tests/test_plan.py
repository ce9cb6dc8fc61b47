"""`promedical rm plan`: what it says beforehand is what the training then does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from promedical import cli, provenance
from promedical.records import write_dataset
from promedical.reward_model import plan as planning
from promedical.reward_model.plan import PlanError, Rate, lines, make_plan, model_shape, read_rate
from promedical.reward_model.recipe import RewardModelRecipe
from promedical.reward_model.run import train_reward_model
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.tree import paths
from tiny_reward import load_tokenizer, random_rows, size


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> RewardModelRecipe:
    folder = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size(2))).save_pretrained(folder / "base")
    load_tokenizer("smollm2").save_pretrained(folder / "base")
    write_dataset(folder / "train", random_rows(6, seed=1))
    return RewardModelRecipe(
        model=str(folder / "base"),
        data=str(folder / "train"),
        out=str(folder / "rm"),
        train=TrainSettings(frozen_layers=1, epochs=2.0, max_tokens=900),
    )


@pytest.fixture(autouse=True)
def small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MATRIX", {"cpu": (64, "float32"), "cuda": (64, "bfloat16")})


def test_a_plan_counts_what_training_then_reads(recipe: RewardModelRecipe) -> None:
    plan = make_plan(recipe, measure=False)
    counts = train_reward_model(recipe).training["counts"]
    assert plan.unique_tokens == counts["unique_tokens"]
    assert plan.separate_tokens == counts["separate_tokens"]
    assert (plan.counts["trees"], plan.counts["rows"]) == (counts["trees"], counts["rows"])
    tiers = ("proficiency", "excellence", "veto")
    assert plan.counts["verdicts"] == sum(counts[f"points_{tier}"] for tier in tiers)
    assert plan.counts["pairs"] == sum(counts[f"pairs_{tier}"] for tier in (*tiers, "overall"))


def test_pairs_as_two_sequences_are_counted_slowly(recipe: RewardModelRecipe) -> None:
    from promedical.reward_model.run import read_rows, training_instances

    trees = training_instances(read_rows(recipe.data), recipe, load_tokenizer("smollm2")).trees
    slow = 0
    for tree in trees:
        every = paths(tree.tree)
        slow += sum(len(every[a]) + len(every[b]) for unit in tree.units for a, b in unit.pairs)
    assert make_plan(recipe, measure=False).pair_tokens == slow


def test_epochs_repeat_what_is_trained_but_not_what_is_kept(recipe: RewardModelRecipe) -> None:
    def total(**settings: float) -> float:
        train = replace(recipe.train, **settings)
        return make_plan(replace(recipe, train=train), measure=False).operations.total

    one, two = total(epochs=1.0), total(epochs=2.0)
    assert one < two < 2 * one  # the frozen layer's output is kept
    unfrozen = total(epochs=1.0, frozen_layers=0)
    assert total(epochs=2.0, frozen_layers=0) == pytest.approx(2 * unfrozen)
    assert unfrozen > one


def test_hours_come_from_a_rate_and_there_are_none_without(recipe: RewardModelRecipe) -> None:
    plan = make_plan(recipe, rate=Rate(1e9, "given"), devices=4)
    assert plan.device_hours == pytest.approx(plan.operations.total / 1e9 / 3600)
    without = make_plan(recipe, measure=False)
    assert without.device_hours is None
    assert lines(without)[-1] == "hours       unknown without a rate"


def test_devices_without_a_row_are_in_the_hours(recipe: RewardModelRecipe) -> None:
    plan = make_plan(recipe, rate=Rate(1e3, "given"), devices=8)
    assert plan.rows_a_step == recipe.train.batch_trees
    assert plan.device_hours is not None
    for rows, busy in ((4, 0.5), (8, 1.0), (9, 9 / 16), (1, 1 / 8), (15, 15 / 16)):
        made = replace(plan, rows_a_step=rows)
        assert made.busy == pytest.approx(busy)
        said = lines(made)
        assert f"{plan.device_hours / 8 / busy:.2f} on 8 if all rows are alike" in said[-1]
        (steps,) = (line for line in said if line.startswith("steps"))
        assert ("batch_pairs" in steps) == (busy < 0.75)
    assert not any(line.startswith("steps") for line in lines(replace(plan, devices=1)))


def test_the_rate_is_that_of_a_step_on_this_machine(recipe: RewardModelRecipe) -> None:
    rate = make_plan(recipe).rate
    assert rate is not None
    assert rate.tokens_per_second is not None
    assert rate.matrix_flops_per_second is not None
    assert min(rate.flops_per_second, rate.tokens_per_second, rate.matrix_flops_per_second) > 0


def test_a_model_too_large_for_the_machine_is_planned_without_a_rate(
    recipe: RewardModelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_machine_memory", lambda: 1e3)
    plan = make_plan(recipe)
    assert plan.rate is None
    assert "not measured: a step takes about" in str(plan.no_rate)


def test_the_command_prints_the_plan_and_saves_a_rate_for_others(
    recipe: RewardModelRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", recipe.model, "--data", recipe.data, "--train.frozen_layers", "1"]
    saved = tmp_path / "plan.json"
    assert cli.main(["rm", "plan", *flags, "--save", str(saved)]) == 0
    said = capsys.readouterr().out
    for word in ("tokens", "separate", "in pairs", "operations", "memory", "rate", "hours"):
        assert word in said
    assert "measured here" in said
    result = json.loads(saved.read_text())
    assert provenance.check(result) == []
    assert cli.main(["rm", "plan", *flags, "--rate", str(saved), "--devices", "2"]) == 0
    assert "plan.json: measured here" in capsys.readouterr().out
    assert cli.main(["rm", "plan", *flags, "--rate", "none"]) == 0
    assert "unknown without a rate" in capsys.readouterr().out


def test_what_is_no_rate_is_refused(tmp_path: Path) -> None:
    assert read_rate("3e14").flops_per_second == 3e14
    with pytest.raises(PlanError, match="above 0"):
        read_rate("-1")
    with pytest.raises(PlanError, match="No such file"):
        read_rate(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(PlanError, match="holds no rate"):
        read_rate(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"rate": {"flops_per_second": 5}}')
    with pytest.raises(PlanError, match="says not where it was measured"):
        read_rate(str(tmp_path / "a.json"))


def test_what_cannot_be_planned_is_said(recipe: RewardModelRecipe, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has 2 layers"):
        make_plan(replace(recipe, train=replace(recipe.train, frozen_layers=3)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match="cannot be planned with"):
        model_shape(tmp_path / "empty")
    assert cli.main(["rm", "plan", "--data", str(tmp_path / "nowhere")]) == 2
    base = Path(recipe.model)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(PlanError, match="its tokenizer"):
        make_plan(replace(recipe, model=str(tmp_path / "bare")))
    shutil.copytree(base, tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(PlanError, match="weightless"):
        make_plan(replace(recipe, model=str(tmp_path / "weightless")))
    assert cli.main(["rm", "plan", "--devices", "0"]) == 2
