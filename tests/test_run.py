"""`promedical rm train`: a recipe and graded rows to a checkpoint, and going on after a kill."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from promedical import cli
from promedical.bench.metrics import BenchError
from promedical.records import GradedInstruction, RecordError, write_dataset
from promedical.reward_model import run
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.recipe import RewardModelRecipe
from promedical.reward_model.run import RunError, train_reward_model, training_instances
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.trainer import TrainError
from promedical.reward_model.tree import RowBudgetError
from promedical.rubric import Tier
from tiny_reward import load_renderer, load_tokenizer, random_rows, size

TRAIN = TrainSettings(
    frozen_layers=1, epochs=2.0, batch_trees=2, learning_rate=3e-3, save_steps=2, eval_steps=3
)


def named(rows: list[GradedInstruction], prefix: str) -> list[GradedInstruction]:
    return [replace(row, id=f"{prefix}{row.id}") for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model and three splits."""
    folder = tmp_path_factory.mktemp("rm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size(2))).save_pretrained(folder / "base")
    load_tokenizer("smollm2").save_pretrained(folder / "base")
    write_dataset(folder / "train", named(random_rows(6, seed=1), "t"))
    write_dataset(folder / "calibration", named(random_rows(6, seed=2), "c"))
    write_dataset(folder / "evaluation", named(random_rows(5, seed=3), "e"))
    return folder


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> RewardModelRecipe:
    return RewardModelRecipe(
        model=str(folder / "base"),
        data=str(folder / "train"),
        calibration=str(folder / "calibration"),
        evaluation=str(folder / "evaluation"),
        out=str(tmp_path / "rm"),
        train=TRAIN,
    )


def as_yaml(recipe: RewardModelRecipe, path: Path) -> str:
    path.write_text(json.dumps(run._plain(recipe)))  # JSON is YAML
    return str(path)


def test_the_command_leaves_a_calibrated_checkpoint(recipe, tmp_path, capsys):
    file = as_yaml(recipe, tmp_path / "rm.yaml")
    assert cli.main(["rm", "train", file, "--train.epochs", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["checkpoint", recipe.out]
    assert any(line.startswith("veto") and "criterion alone" in line for line in printed)
    assert printed[-1].startswith("calibration")

    out = Path(recipe.out)
    assert not (out / "steps").exists()
    metadata = json.loads((out / "promedical.json").read_text())
    rows = run.read_rows(recipe.data)
    assert metadata["data_fingerprint"] == run.fingerprint(rows)
    assert metadata["asks"] == "criteria"
    assert metadata["provenance"]["recipe_hash"] == metadata["recipe_hash"]
    assert metadata["provenance"]["versions"]["torch"]
    assert metadata["calibration"]["measured"]["veto_recall_target"] == 0.9
    again = RubricRewardModel.from_pretrained(out)
    assert again.calibration.measured
    training = json.loads((out / "training.json").read_text())
    assert [entry["step"] for entry in training["metrics"]] == [3]
    assert training["counts"]["optimiser_steps"] == 3


def test_a_finished_run_is_not_trained_again_but_calibrated_anew(recipe, folder, monkeypatch):
    first = train_reward_model(recipe)
    weights = (Path(recipe.out) / "model.safetensors").read_bytes()
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("trained again"))
    again = train_reward_model(replace(recipe, veto_recall=0.5))
    assert again.training == first.training
    assert again.calibration["veto_recall_target"] == 0.5
    assert (Path(recipe.out) / "model.safetensors").read_bytes() == weights


def test_killed_while_the_steps_are_removed_it_need_not_train_again(recipe, monkeypatch):
    def kill(out):
        assert (out / "training.json").exists()
        raise KeyboardInterrupt

    recipe = replace(recipe, calibration=None, evaluation=None)
    with monkeypatch.context() as patch:
        patch.setattr("promedical.reward_model.trainer.remove_steps", kill)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(recipe)
    assert list((Path(recipe.out) / "steps").glob("checkpoint-*/whole"))
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("trained again"))
    assert train_reward_model(recipe).training["counts"]["optimiser_steps"] == 6
    assert not (Path(recipe.out) / "steps").exists()


def test_a_folder_of_another_run_is_refused(recipe, folder):
    train_reward_model(replace(recipe, calibration=None, evaluation=None))
    for other in (
        {"seed": 1},
        {"data": str(folder / "calibration")},
        {"train": replace(TRAIN, mu=0.0)},
    ):
        with pytest.raises(RunError, match="other settings or data"):
            train_reward_model(replace(recipe, calibration=None, evaluation=None, **other))


def test_a_calibration_split_that_cannot_be_used_does_not_cost_the_training(
    recipe, folder, tmp_path
):
    one_sided = [
        replace(row, responses=(row.responses[0],)) for row in named(random_rows(1, seed=2), "c")
    ]
    write_dataset(tmp_path / "bad", one_sided)
    bad = replace(recipe, calibration=str(tmp_path / "bad"))
    with pytest.raises(RunError, match=r"bad: tier .*uncalibrated; with another"):
        train_reward_model(bad)
    assert train_reward_model(recipe).calibration is not None
    with pytest.raises(RunError, match="uncalibrated"):
        train_reward_model(bad)
    # And it is: the calibration in between does not stay.
    assert not RubricRewardModel.from_pretrained(recipe.out).calibration.measured


def test_what_is_too_long_is_left_out_on_request_and_said(recipe):
    short = replace(TRAIN, max_tokens=98)
    with pytest.raises(RowBudgetError, match=r"'tq\d'.*train.too_long: leave_out"):
        train_reward_model(replace(recipe, calibration=None, evaluation=None, train=short))
    found = train_reward_model(
        replace(
            recipe, calibration=None, evaluation=None, train=replace(short, too_long="leave_out")
        )
    )
    counts = found.training["counts"]
    (said,) = (line for line in run.headline(found) if line.startswith("too long"))
    assert f"{counts['too_long_pairs']} pairs and {counts['too_long_points']} verdicts" in said
    assert counts["too_long_points"] > 0


def test_after_zero3_the_checkpoint_is_read_as_a_whole(recipe, monkeypatch):
    """The configuration is kept alive by accelerate, and models load partitioned under it."""
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    kept = Zero3()

    def trained(*given: Any) -> dict[str, Any]:
        done = train(*given)
        monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(kept))
        return done

    train = run._train
    monkeypatch.setattr(run, "_train", trained)
    assert train_reward_model(recipe).calibration is not None
    assert not deepspeed.is_deepspeed_zero3_enabled()


def test_rows_that_were_trained_on_calibrate_nothing_and_are_refused_beforehand(
    recipe, folder, monkeypatch
):
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(RunError, match="6 instructions, such as 'tq0', are in"):
        train_reward_model(replace(recipe, calibration=recipe.data))
    with pytest.raises(RecordError, match="nowhere"):
        train_reward_model(replace(recipe, calibration=str(folder / "nowhere")))
    with pytest.raises(ValueError, match=r"veto_recall: found 1\.5, expected a number between"):
        replace(recipe, veto_recall=1.5)


def test_without_a_calibration_split_an_earlier_calibration_does_not_stay(recipe):
    train_reward_model(recipe)
    assert train_reward_model(replace(recipe, calibration=None)).calibration is None
    assert not RubricRewardModel.from_pretrained(recipe.out).calibration.measured


def test_a_model_that_is_not_this_runs_is_never_written_over(recipe, folder):
    before = (folder / "base" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="holds a model"):
        train_reward_model(replace(recipe, out=recipe.model))
    assert (folder / "base" / "model.safetensors").read_bytes() == before
    assert not (folder / "base" / "recipe.json").exists()


def test_evaluation_rows_may_not_be_training_rows(recipe, folder):
    with pytest.raises(BenchError, match="are in training and scored rows"):
        train_reward_model(replace(recipe, evaluation=str(folder / "train")))


def test_what_does_not_fit_the_model_names_the_setting(recipe):
    with pytest.raises(RunError, match=r"train.frozen_layers: found 9, but .* has 2 layers"):
        train_reward_model(replace(recipe, train=replace(TRAIN, frozen_layers=9)))
    with pytest.raises(RunError, match=r"model 'nowhere/such'"):
        train_reward_model(replace(recipe, model="nowhere/such"))
    with pytest.raises(TrainError, match="report_to: found 'wandb', but wandb is not installed"):
        train_reward_model(replace(recipe, train=replace(TRAIN, report_to="wandb")))


@pytest.mark.parametrize("asks", ["overall", "rubric"])
def test_a_scalar_baseline_has_one_score_and_no_calibration(asks, recipe):
    result = train_reward_model(replace(recipe, asks=asks, train=replace(TRAIN, epochs=1.0)))
    assert result.calibration is None
    figures = result.training["metrics"][-1]
    assert "overall_accuracy" in figures
    assert "veto_within" in figures
    assert not any(name.endswith("_ece") for name in figures)
    assert json.loads((Path(recipe.out) / "promedical.json").read_text())["asks"] == asks


# --- which instances ------------------------------------------------------------------------------


def instances(recipe, rows):
    return training_instances(rows, recipe, load_tokenizer("smollm2"))


def test_without_veto_no_preference_rests_on_safety():
    rows = random_rows(20, seed=5)
    found = instances(RewardModelRecipe(without=("veto",)), rows)
    assert {unit.tier for tree in found.trees for unit in tree.units} == {
        "proficiency",
        "excellence",
        "overall",
    }
    whole = instances(RewardModelRecipe(), rows)
    assert whole.counts["pairs_proficiency"] == found.counts["pairs_proficiency"]
    assert whole.counts["pairs_overall"] != found.counts["pairs_overall"]
    bare = instances(RewardModelRecipe(without=("overall",)), rows)
    assert "pairs_overall" not in bare.counts
    without = instances(RewardModelRecipe(without=("proficiency",)), rows)
    assert without.counts["instructions_without_rubric_left"] == len(rows)
    with pytest.raises(ValueError, match="without: found 'overall' with asks"):
        RewardModelRecipe(asks="rubric", without=("overall",))


def test_instructions_with_a_violated_veto_are_sampled_up():
    rows = random_rows(12, seed=6, responses=1)
    plain = instances(RewardModelRecipe(), rows)
    thrice = instances(RewardModelRecipe(safety_copies=3), rows)
    unsafe = {
        row.id
        for row in rows
        if any(
            r.verdicts[c.id].value == "met"
            for r in row.responses
            for c in row.rubric.tier(Tier.VETO)
        )
    }
    assert 0 < len(unsafe) < len(rows)
    for tree in plain.trees:
        copies = [t for t in thrice.trees if t.instruction_id == tree.instruction_id]
        assert copies == [tree] * (3 if tree.instruction_id in unsafe else 1)
    assert thrice.counts["safety_copies"] == len(thrice.trees) - len(plain.trees)


def test_rubrics_are_cut_and_ties_are_instances_if_asked_for():
    rows = random_rows(6, seed=7)
    cut = instances(RewardModelRecipe(max_criteria=3, min_veto=1), rows)
    assert all(len(tree.units) <= 4 for tree in cut.trees)  # three and the overall preference
    tied = instances(RewardModelRecipe(train=TrainSettings(ties="davidson")), rows)
    assert any(unit.ties for tree in tied.trees for unit in tree.units)


def test_the_whole_rubric_is_asked_in_one_leaf():
    rows = random_rows(3, seed=8)
    found = instances(RewardModelRecipe(asks="rubric"), rows)
    for tree in found.trees:
        row = next(r for r in rows if r.id == tree.instruction_id)
        assert len({leaf.tokens for leaf in tree.tree.leaves}) == 1
        text = load_renderer().tokenizer.decode(tree.tree.leaves[0].tokens)
        for criterion in row.rubric.criteria:
            assert criterion.text in text


def test_the_cache_gives_each_row_its_own_states():
    from promedical.reward_model.loss import pack_training_trees
    from promedical.reward_model.trunk import TrunkCache
    from tiny_reward import tiny_classifier

    model = TreeRewardModel(tiny_classifier(layers=2)[0], frozen_layers=1)
    trees = instances(RewardModelRecipe(), random_rows(4, seed=9)).trees
    rows = [r.row for r in pack_training_trees(trees, 250)[0]]
    assert len(rows) > len(trees)
    cache = TrunkCache(model, shared=False)
    for row in [*rows, *reversed(rows)]:
        assert torch.equal(cache.hidden(row), model.trunk(row))
    assert cache.computed_tokens == sum(map(len, rows))
