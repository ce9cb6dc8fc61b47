"""`promedical policy grpo|rloo|dpo`: a recipe and rows in, a policy out; conflicts are said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from letter_grader import TextGrader
from promedical.demo.models import ModelError
from promedical.policy.commands import HELP, VERBS
from promedical.policy.recipe import PolicyRecipe, RecipeConflictError, check_method
from promedical.policy.run import PolicyRunError, headline, policy_rows, train_policy
from promedical.policy.settings import DpoSettings, OnlineSettings, VllmSettings
from promedical.policy.specification import RewardSpecification, SpecificationError
from promedical.recipe import RecipeError
from promedical.records import GradedInstruction, Message, to_dict
from promedical.reward_model.calibrate import Calibration
from promedical.reward_model.grade import CheckpointError, RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.rubric import Criterion, RewardSpec, Rubric, Tier
from tiny_policy import save_tiny_policy
from tiny_reward import random_rows, tiny_classifier

SECRET = "Mrs Miller of 5 Elm Street"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model, a scalar reward model, and rows."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_policy(folder / "policy")
    for name, asks in (("rm", "criteria"), ("scalar", "overall")):
        model, tokenizer = tiny_classifier(layers=2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        grader = RubricRewardModel(
            TreeRewardModel(model), tokenizer, calibration=Calibration.uncalibrated()
        )
        grader.save_metadata(folder / name, asks=asks)
    rows = [replace(r, messages=(Message("user", f"{SECRET}?"),)) for r in random_rows(5)]
    veto = Rubric((Criterion("v", Tier.VETO, "It does harm."),), safety_only=True)
    unfit = [
        GradedInstruction("bare", rows[0].messages, "test", "none"),
        GradedInstruction("safety", rows[0].messages, "test", "none", rubric=veto),
        replace(rows[0], id="long", messages=(Message("user", "long " * 400),)),
    ]
    lines = [json.dumps(to_dict(row)) + "\n" for row in [*rows, *unfit]]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def recipe(models: Path, out: Path, **settings: Any) -> PolicyRecipe:
    found = PolicyRecipe(
        model=str(models / "policy"),
        data=str(models / "rows.jsonl"),
        out=str(out),
        reward=RewardSpecification(grader=f"checkpoint:{models / 'rm'}", allow_uncalibrated=True),
        train=OnlineSettings(
            steps=2, num_generations=4, max_completion_length=8, learning_rate=1e-2
        ),
    )
    return replace(found, **settings)


def test_the_command_trains_says_what_it_did_and_does_not_train_twice(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "method": "grpo",
                "model": str(models / "policy"),
                "data": str(models / "rows.jsonl"),
                "reward": {
                    "grader": f"checkpoint:{models / 'rm'}",
                    "soft_s1": True,
                    "allow_uncalibrated": True,
                },
                "train": {"steps": 9, "num_generations": 4, "max_completion_length": 8},
            }
        )
    )
    flags = [str(file), "--out", str(tmp_path / "run"), "--train.steps", "2"]
    assert VERBS["grpo"](flags) == 0
    told = capfd.readouterr()
    assert "trained    2 of 2 steps by grpo on 5 instructions" in told.out
    for line in ("1 without a rubric", "1 safety_only", "1 longer than the model's context"):
        assert f"left out   {line}" in told.out
    assert "% of the time; 0 failed" in told.out
    weights = tmp_path / "run" / "policy" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert VERBS["grpo"](flags) == 0
    assert weights.stat().st_mtime_ns == before
    again = capfd.readouterr()
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for text in (*told, *again, *(found.decode("utf-8", "replace") for found in files)):
        assert SECRET not in text
    for other, said in (
        (["--train.beta", "0.5"], r"run\.json: a run with other settings \(beta: found 0\.04"),
        (["--no-reward.soft-s1"], r"\(reward\.soft_s1: found True, expected False\)"),
        (["--reward.operating_point", "audit"], r"\(reward\.operating_point: found 'reward'"),
        (
            ["--reward.grader", f"checkpoint:{models / 'rm'},dtype=bfloat16"],
            r"\(reward\.grader: found 'checkpoint:.*rm', expected 'checkpoint:.*rm,dtype=bfloat16'",
        ),
        (["--train.steps", "3"], r"result\.json: finished with 2 of 2 steps .* steps: found 3"),
    ):
        with pytest.raises(PolicyRunError, match=said):
            VERBS["grpo"]([*flags, *other])
    with pytest.raises(PolicyRunError, match=r"\(method: another one\)"):
        VERBS["rloo"](flags)
    assert weights.stat().st_mtime_ns == before


def test_a_reward_model_that_was_not_calibrated_trains_nothing(
    models: Path, tmp_path: Path
) -> None:
    given = recipe(models, tmp_path / "run")
    with pytest.raises(SpecificationError, match="thresholds were not measured for proficiency"):
        train_policy(replace(given, reward=replace(given.reward, allow_uncalibrated=False)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asks", ["criteria", "overall"])
def test_a_reward_model_is_on_the_gpu_if_there_is_one(
    asks: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from promedical.policy import run

    placed: list[str | None] = []

    def load(path: str, *, device: str | None = None, **_: Any) -> TextGrader:
        placed.append(device)
        return TextGrader()

    monkeypatch.setattr(RubricRewardModel, "from_pretrained", load)
    given = recipe(models, tmp_path, asks=asks)
    cpu = replace(given, reward=replace(given.reward, grader=f"{given.reward.grader},device=cpu"))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for chosen in (given, cpu):
            run._reward(chosen, random_rows(1))
    assert placed == ["cuda", "cpu", None, "cpu"]


def test_dpo_and_the_scalar_reward(models: Path, tmp_path: Path) -> None:
    dpo = recipe(
        models,
        tmp_path / "dpo",
        method="dpo",
        train=OnlineSettings(),
        dpo=DpoSettings(max_length=400, pairs_per_step=8),
    )
    result = train_policy(dpo)
    assert result.trained.counts["pairs"] > 0
    assert any(line.startswith("pairs ") for line in headline(result))
    scalar = recipe(
        models,
        tmp_path / "scalar",
        asks="overall",
        reward=RewardSpecification(grader=f"checkpoint:{models / 'scalar'}"),
    )
    result = train_policy(scalar)
    assert result.trained.history[0].reward.reward is not None
    assert result.trained.history[0].reward.s1 is None
    with pytest.raises(CheckpointError, match="asks: found 'criteria', expected 'overall'"):
        train_policy(
            replace(
                scalar,
                out=str(tmp_path / "other"),
                reward=RewardSpecification(grader=f"checkpoint:{models / 'rm'}"),
            )
        )


def test_rows_are_cut_and_short_enough(models: Path, tmp_path: Path) -> None:
    rows, left_out = policy_rows(recipe(models, tmp_path, max_criteria=3))
    assert {len(row.rubric.criteria) for row in rows if row.rubric} == {3}
    assert sum(left_out.values()) == 3
    with pytest.raises(PolicyRunError, match="no instruction is left of 8"):
        policy_rows(recipe(models, tmp_path, max_prompt_length=5))
    with pytest.raises(ModelError, match="no such folder"):
        policy_rows(recipe(models, tmp_path, model=str(tmp_path / "nothing")))


def test_kqa_is_the_training_side_with_answers_for_dpo_alone() -> None:
    tokenized = PolicyRecipe(model=str(Path(__file__).parent / "data" / "tokenizers" / "smollm2"))
    from promedical.demo.kqa import load_kqa
    from promedical.policy import run

    assert [row.id for row in run._kqa(tokenized)] == [row.id for row in load_kqa().train]
    assert all(not row.responses for row in run._kqa(tokenized))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another method's section": (
        {"method": "dpo", "train": OnlineSettings(steps=3)},
        "train: is for grpo and rloo",
    ),
    "dpo's section": ({"dpo": DpoSettings(beta=0.2)}, "dpo: is for dpo; expected grpo's"),
    "a reward model for dpo": ({"method": "dpo", "asks": "overall"}, "asks: found 'overall', but"),
    "a loss for rloo": (
        {"method": "rloo", "train": OnlineSettings(loss_type="dapo")},
        r"train\.loss_type: found 'dapo', but RLOO has one loss",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_of_another_method(name: str) -> None:
    settings, message = WRONG[name]
    with pytest.raises(RecipeConflictError, match=message):
        check_method(PolicyRecipe(**settings))


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "rubrics": ({"reward": RewardSpecification(rubrics="elsewhere")}, r"reward\.rubrics: found"),
    "worst": ({"reward": RewardSpecification(on_failure="worst")}, r"reward\.on_failure: found"),
    "tiers of a scalar": (
        {"asks": "overall", "train": OnlineSettings(advantages="lexicographic")},
        "asks: found 'overall', which has no tiers",
    ),
    "an ablation of a scalar": (
        {
            "asks": "rubric",
            "reward": RewardSpecification(reward=RewardSpec(lam=0.0, ablation="no_veto")),
        },
        "asks: found 'rubric' with ablation 'no_veto'",
    ),
    "an ablation of ranks": (
        {
            "train": OnlineSettings(advantages="lexicographic"),
            "reward": RewardSpecification(reward=RewardSpec(lam=0.0, ablation="no_veto")),
        },
        r"train\.advantages: found 'lexicographic' with ablation",
    ),
    "criteria": ({"max_criteria": 2}, "max_criteria: found 2, expected more than min_veto"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_settings_that_do_not_go_together(name: str) -> None:
    settings, message = CONFLICTS[name]
    with pytest.raises(ValueError, match=message):
        PolicyRecipe(**settings)


def test_a_scalar_reward_is_not_behind_a_server(models: Path, tmp_path: Path) -> None:
    served = recipe(
        models,
        tmp_path / "run",
        asks="overall",
        reward=RewardSpecification(grader="http:http://127.0.0.1:9"),
    )
    with pytest.raises(RecipeConflictError, match=r"reward\.grader: found http:…"):
        train_policy(served)


def test_what_vllm_is_told() -> None:
    assert VllmSettings().for_trl() == {"use_vllm": False}
    assert VllmSettings("server", "http://host:1").for_trl() == {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_max_model_length": None,
        "vllm_server_base_url": "http://host:1",
    }
    colocated = VllmSettings("colocate", memory=0.5, sleep=True).for_trl()
    assert colocated["vllm_gpu_memory_utilization"] == 0.5
    assert colocated["vllm_enable_sleep_mode"] is True
    from dataclasses import fields

    from trl import GRPOConfig, RLOOConfig

    for config in (GRPOConfig, RLOOConfig):
        assert set(colocated) <= {f.name for f in fields(config)}


def test_every_verb_is_in_the_help() -> None:
    assert all(f"  {verb} " in HELP for verb in VERBS)
    with pytest.raises(RecipeError, match=r"train\.step: unknown"):
        VERBS["grpo"](["--train.step", "2"])
