"""The recipe of `promedical policy compare`: which systems, which data, which judges, how long.

A system is a name of `SYSTEMS`: what trains it, on which judge, and what of the reward is left out
(section 5, baselines and ablations) or changed (options beyond the paper). What they share
(prompts, decoding, graders) is said once. Free of heavy imports.

Left to others: the settings of one training (`settings`), those of a reward model's
(`reward_model.settings`), and what is done with all this (`compare`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from promedical.corpus.degrade_config import DegradeConfig
from promedical.policy.settings import DpoSettings, OnlineSettings
from promedical.reward_model.settings import TrainSettings
from promedical.rubric import RewardSpec

__all__ = [
    "ASKS",
    "JUDGES",
    "SYSTEMS",
    "CompareError",
    "CompareRecipe",
    "Costs",
    "DataSettings",
    "JudgeSettings",
    "System",
    "SystemName",
]

SystemName = Literal[
    "base",
    "dpo",
    "rloo",
    "scalar",
    "scalar_rubric",
    "promedical",
    "no_veto",
    "no_bonus_margin",
    "no_safety_data",
    "lexicographic",
    "per_tier",
    "soft_s1",
]
JudgeName = Literal["explicit", "scalar", "scalar_rubric", "no_safety_data", "gold"]
JUDGES: dict[str, str] = {
    "explicit": "Training judge (explicit criteria)",
    "scalar": "Implicit scalar judge",
    "scalar_rubric": "Scalar judge with the rubric in its prompt",
    "no_safety_data": "Training judge without safety data",
    "gold": "Gold judge",
}
# What judges without verdicts are asked instead of criteria; they have no thresholds.
ASKS: dict[str, Literal["overall", "rubric"]] = {"scalar": "overall", "scalar_rubric": "rubric"}


class CompareError(ValueError):
    """A recipe, folder, checkpoint or rows that cannot be compared with."""


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Args:
        label: as a person reads it.
        method: what trains it; "base" is the policy as it is.
        judge: whose verdicts are the reward; DPO has pairs with known verdicts instead.
        ablation: what the reward leaves out.
        advantages: how a group's grades become advantages.
        soft: whether S1 is Σ ω_i p_i of the calibrated probabilities, with hard S3.
        of: the system that it is an ablation or an option of, for the paired comparison.
    """

    label: str
    method: Literal["base", "grpo", "dpo", "rloo"]
    judge: JudgeName | None = None
    ablation: Literal["no_veto", "no_bonus_margin"] | None = None
    advantages: Literal["scalar", "lexicographic", "per_tier"] = "scalar"
    soft: bool = False
    of: str | None = None

    def reward(self, spec: RewardSpec) -> RewardSpec:
        """The reward's parameters, less what this system leaves out."""
        if self.ablation == "no_veto":
            return replace(spec, lam=0.0, ablation="no_veto")
        if self.ablation == "no_bonus_margin":
            return replace(spec, beta=0.0, ablation="no_bonus_margin")
        return spec


# "Without explicit criteria" is the implicit scalar judge: the same data, and no criterion asked.
SYSTEMS: dict[str, System] = {
    "base": System("Base", "base"),
    "dpo": System("DPO, lexicographic pairs", "dpo"),
    "rloo": System("RLOO", "rloo", "explicit"),
    "scalar": System("Implicit scalar + GRPO", "grpo", "scalar"),
    "scalar_rubric": System("Scalar with rubric + GRPO", "grpo", "scalar_rubric"),
    "promedical": System("ProMedical GRPO", "grpo", "explicit"),
    "no_veto": System("without veto", "grpo", "explicit", ablation="no_veto", of="promedical"),
    "no_bonus_margin": System(
        "without bonus margin", "grpo", "explicit", ablation="no_bonus_margin", of="promedical"
    ),
    "no_safety_data": System("without safety data", "grpo", "no_safety_data", of="promedical"),
    "lexicographic": System(
        "lexicographic advantages", "grpo", "explicit", advantages="lexicographic", of="promedical"
    ),
    "per_tier": System(
        "tiers normalised one by one", "grpo", "explicit", advantages="per_tier", of="promedical"
    ),
    "soft_s1": System("soft S1, hard S3", "grpo", "explicit", soft=True, of="promedical"),
}


@dataclass(frozen=True)
class DataSettings:
    """What is trained and measured on.

    Args:
        rows: graded rows in place of K-QA: a JSON lines file or a dataset folder; variables such
            as $GRADED_ROWS are filled in. They are divided by last user turn, with the recipe's
            seed. Rows with fewer than two graded answers are left out.
        prompts: rows whose questions the policies are trained on, in place of the training side's;
            they need a rubric and no answers. What another side asks too is left out.
        bench: rows held out for the table, in place of K-QA's bench or a part of `rows`; they need
            a rubric and no answers. May be the same as `prompts` or `rows`, the bench first.
        train_instructions: of the training side, which the two judges share half and half, and
            whose questions are the policies' prompts unless `prompts` has others.
        calibration_instructions: for the judges' thresholds, and the gold judge's watch.
        bench_instructions: held out for the table.
        copies: how often K-QA's training side is degraded anew.
        max_criteria: criteria that a training rubric is cut down to, `min_veto` of them vetoes.
        min_veto: see there.
        bench_criteria: criteria that a bench rubric is cut down to, `bench_veto` of them vetoes;
            the same for every system. All of them if not given.
        bench_veto: see there.
        degrade: of K-QA's constructed answers.
    """

    rows: str | None = None
    prompts: str | None = None
    bench: str | None = None
    train_instructions: int = 125
    calibration_instructions: int = 25
    bench_instructions: int = 49
    copies: int = 1
    max_criteria: int = 6
    min_veto: int = 2
    bench_criteria: int | None = 8
    bench_veto: int = 3
    degrade: DegradeConfig = field(default_factory=DegradeConfig)

    def __post_init__(self) -> None:
        least = {"train_instructions": 2, "calibration_instructions": 1, "bench_instructions": 1}
        for name, value in (least | {"copies": 1}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {value} or more")
        if self.max_criteria <= self.min_veto:
            raise ValueError(
                f"max_criteria: found {self.max_criteria}, expected more than min_veto = "
                f"{self.min_veto}"
            )
        if self.bench_criteria is not None and self.bench_criteria <= self.bench_veto:
            raise ValueError(
                f"bench_criteria: found {self.bench_criteria}, expected more than bench_veto = "
                f"{self.bench_veto}"
            )


@dataclass(frozen=True)
class JudgeSettings:
    """The reward models: checkpoints that are there, or how to train them.

    Args:
        model: what they are trained from.
        explicit, scalar, scalar_rubric, no_safety_data, gold: a trained checkpoint in place of
            training one; the gold judge's must come from other data than the training judge's.
        gold_point: whose thresholds the gold judge decides by, on the bench and while it watches.
            At "reward" it flags few clean answers, and a weak judge then finds no violation at all;
            at "audit" it keeps its recall, what it does not clear counts as a violation and leaves
            preferences undecided, and a weak judge then clears no answer.
        seed: of the training judges; the gold judge's is one more.
        veto_recall: recall that the audit operating point keeps on the calibration split.
        clean_violations: share of clean answers that the reward operating point may flag.
        dtype: of their weights where they judge; "bfloat16" takes half the memory of a GPU.
            Thresholds are set in float32 all the same.
        train: how all of them are trained.
    """

    model: str = "embedded"
    explicit: str | None = None
    scalar: str | None = None
    scalar_rubric: str | None = None
    no_safety_data: str | None = None
    gold: str | None = None
    gold_point: Literal["audit", "reward"] = "reward"
    seed: int = 0
    veto_recall: float = 0.9
    clean_violations: float = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: TrainSettings = field(default_factory=lambda: TrainSettings(save_steps=10))

    def __post_init__(self) -> None:
        others = [getattr(self, name) for name in JUDGES if name != "gold"]
        if self.gold is not None and self.gold in others:
            raise ValueError(
                f"gold: found {self.gold!r}, which is a training judge too; expected another "
                "checkpoint, trained on other data"
            )


@dataclass(frozen=True)
class Costs:
    """What a plan expects, in seconds; the defaults were measured with SmolLM2-135M on two cores.

    Args:
        degrade: constructing one instruction's answers.
        judge_tree: training a judge on one instruction, once; a scalar one takes a third of it.
        judge_row: calibrating on one instruction.
        step: one step of GRPO or RLOO.
        dpo_pair: one pair of DPO.
        load: loading, merging and saving a policy.
        answer: generating one answer on the bench.
        grade: grading one answer, by one judge.
        watch: one answer to a watched question, generated and graded.
    """

    degrade: float = 0.2
    judge_tree: float = 3.6
    judge_row: float = 2.0
    step: float = 20.0
    dpo_pair: float = 2.0
    load: float = 6.0
    answer: float = 0.5
    grade: float = 0.5
    watch: float = 1.5


@dataclass(frozen=True)
class CompareRecipe:
    """Settings of a whole comparison.

    Args:
        out: folder of the run; killed and started again, it goes on there.
        model: the policy that all systems start from: "embedded", a folder or a Hub id.
        systems: which are compared; "base" is always among them.
        seeds: every system but the base is trained once with each.
        reference: the system that the others are compared with in pairs.
        graders: judges that grade every system's answers; the tables show the gold judge's first.
        answer_tokens: longest answer on the bench, in tokens; decoding is greedy.
        batch_size: bench answers generated at a time.
        watch_every: steps between two looks of the gold judge while training; 0 for none.
        watch_prompts: calibration questions that it looks at.
        watch_own: whether a system's own judge grades the same answers, to see the two part.
        keep_policies: whether merged weights stay after they were measured; adapters, and weights
            that were trained without one (`lora_rank: 0`), always do.
        data: what is trained and measured on.
        judges: the reward models.
        online: how GRPO and RLOO train.
        dpo: how DPO trains, on the training judges' half of the data.
        reward: α, β, λ of the reward; ablations change them as they say.
        costs: what the plan expects.
        bootstrap: resamples of the instructions.
    """

    out: str = "runs/policy-compare"
    model: str = "embedded"
    systems: tuple[SystemName, ...] = ("base", "dpo", "rloo", "scalar", "promedical", "no_veto")
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: SystemName = "promedical"
    graders: tuple[JudgeName, ...] = ("gold", "explicit")
    answer_tokens: int = 64
    batch_size: int = 50
    watch_every: int = 0
    watch_prompts: int = 8
    watch_own: bool = True
    keep_policies: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    judges: JudgeSettings = field(default_factory=JudgeSettings)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    dpo: DpoSettings = field(default_factory=lambda: DpoSettings(pairs_per_instruction=2))
    reward: RewardSpec = field(default_factory=RewardSpec)
    costs: Costs = field(default_factory=Costs)
    bootstrap: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("answer_tokens", 1), ("batch_size", 1), ("watch_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {least} or more")
        for name in ("systems", "seeds", "graders"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{name}: found {list(given)!r}, expected some, each once")
        if "base" not in self.systems:
            raise ValueError(f"systems: found {list(self.systems)!r}, expected 'base' among them")
        if "gold" not in self.graders or set(self.graders) & ASKS.keys():
            raise ValueError(
                f"graders: found {list(self.graders)!r}, expected 'gold' among them, and no scalar "
                "judge, which gives no verdicts"
            )
        if self.reference not in self.systems:
            raise ValueError(
                f"reference: found {self.reference!r}, expected one of {list(self.systems)!r}"
            )

    @property
    def judges_needed(self) -> tuple[str, ...]:
        """The gold judge, and those that the systems train on."""
        wanted = {SYSTEMS[name].judge for name in self.systems} | set(self.graders)
        return tuple(name for name in JUDGES if name in wanted)

    def point(self, judge: str) -> Literal["audit", "reward"]:
        """Whose thresholds a judge decides by: a training judge's are those of its reward."""
        return self.judges.gold_point if judge == "gold" else "reward"

    def trained(self) -> list[tuple[str, int]]:
        """(system, seed) of every policy that is trained, seed by seed.

        Every seed is finished before the next begins, so that a run that had to stop early still
        compares all systems.
        """
        return [(name, seed) for seed in self.seeds for name in self.systems if name != "base"]


def plain_settings(recipe: CompareRecipe) -> dict[str, Any]:
    """What a run's folder is claimed for: all settings but the folder itself and the costs."""
    from promedical.quickstart.settings import plain

    found = plain(replace(recipe, out="", costs=Costs()))
    del found["costs"]
    return found
