"""The recipe of a policy: which model, data and reward, how to train it, how to watch it.

What `promedical policy grpo|rloo|dpo` read; free of heavy imports. One file may be read by all
three, as long as nothing in it is another method's: what a method has no use for is an error, never
ignored. Left to others: what the sections mean (`settings`, `specification`, `monitor`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from promedical.policy.monitor import MonitorSettings
from promedical.policy.settings import DpoSettings, OnlineSettings
from promedical.policy.specification import RewardSpecification

__all__ = ["Method", "PolicyRecipe", "RecipeConflictError", "check_method"]

Method = Literal["grpo", "rloo", "dpo"]


class RecipeConflictError(ValueError):
    """Settings that do not go together, or with the method that was asked for."""


@dataclass(frozen=True)
class PolicyRecipe:
    """Settings of one training of a policy.

    Args:
        method: what the recipe is for; the command's verb wins over it.
        model: the policy to start from: "embedded" (SmolLM2-135M-Instruct), a folder or a Hub id.
        data: instructions with rubrics, a dataset folder or JSON lines; "kqa" is the training side
            of the demo corpus, for DPO with constructed responses. DPO needs responses with
            verdicts.
        max_criteria: criteria a rubric is cut down to; all of them if not given.
        min_veto: how many of these are vetoes at least.
        max_prompt_length: instructions with a longer prompt, in tokens, are left out and counted;
            what does not fit the model is left out in any case.
        out: folder of the run.
        seed: of everything that is random.
        asks: what the reward model is asked: "criteria" is ProMedical; "overall" only whether the
            answer is good, the implicit scalar baseline, by a model trained with the same `asks`;
            "rubric" the same with the whole rubric in the question.
        reward: the reward. Its rubrics are those of the data.
        train: how GRPO and RLOO train.
        dpo: how DPO trains.
        monitor: what is written at every step, and the gold judge; nothing if not given.
    """

    method: Method = "grpo"
    model: str = "embedded"
    data: str = "kqa"
    max_criteria: int | None = None
    min_veto: int = 2
    max_prompt_length: int | None = None
    out: str = "runs/policy"
    seed: int = 0
    asks: Literal["criteria", "overall", "rubric"] = "criteria"
    reward: RewardSpecification = field(default_factory=RewardSpecification)
    train: OnlineSettings = field(default_factory=OnlineSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)
    monitor: MonitorSettings | None = None

    def __post_init__(self) -> None:
        if self.max_criteria is not None and self.max_criteria <= self.min_veto:
            raise ValueError(
                f"max_criteria: found {self.max_criteria!r}, expected more than min_veto = "
                f"{self.min_veto}"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(
                f"max_prompt_length: found {self.max_prompt_length!r}, expected ≥ 1 or None"
            )
        if self.reward.rubrics not in (RewardSpecification().rubrics, self.data):
            raise ValueError(
                f"reward.rubrics: found {self.reward.rubrics!r}, but rubrics are those of data = "
                f"{self.data!r}; leave it out"
            )
        if self.reward.on_failure != "stop":
            raise ValueError(
                "reward.on_failure: found 'worst', but TRL leaves an answer out whose grading "
                "failed; it is for engines that cannot"
            )
        if self.asks != "criteria":
            self._check_scalar()
        if self.train.advantages != "scalar" and self.reward.reward.ablation is not None:
            raise ValueError(
                f"train.advantages: found {self.train.advantages!r} with ablation "
                f"{self.reward.reward.ablation!r}, expected 'scalar': an ablation leaves something "
                "out of the scalar reward"
            )

    def _check_scalar(self) -> None:
        """A scalar reward has no tiers, so nothing that is about tiers."""
        if self.train.advantages != "scalar" or self.reward.soft_s1:
            raise ValueError(
                f"asks: found {self.asks!r}, which has no tiers; expected advantages 'scalar' and "
                "no soft_s1"
            )
        if self.reward.reward.ablation is not None:
            raise ValueError(
                f"asks: found {self.asks!r} with ablation {self.reward.reward.ablation!r}, but a "
                "scalar reward has neither veto nor margin"
            )
        if self.monitor is not None:
            raise ValueError(
                f"monitor: it watches tiers, of which asks = {self.asks!r} has none; expected none "
                "(`promedical policy compare` shows a scalar reward beside the gold judge)"
            )


def check_method(recipe: PolicyRecipe) -> None:
    """Refuse a recipe with settings of another method.

    Raises:
        RecipeConflictError: it has some; the message names the section.
    """
    if recipe.method == "dpo":
        if recipe.train != OnlineSettings():
            raise RecipeConflictError(
                "train: is for grpo and rloo; expected dpo's settings in section dpo"
            )
        if recipe.asks != "criteria":
            raise RecipeConflictError(
                f"asks: found {recipe.asks!r}, but DPO learns from pairs and asks no reward model"
            )
        return
    if recipe.dpo != DpoSettings():
        raise RecipeConflictError(f"dpo: is for dpo; expected {recipe.method}'s in section train")
    if recipe.method == "rloo":
        from promedical.policy.rloo import check_rloo

        try:
            check_rloo(recipe.train)
        except ValueError as error:
            raise RecipeConflictError(f"train.{error}") from None
