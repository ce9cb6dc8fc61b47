"""Advantages: ranks against pairwise comparison, what TRL makes of them, what is logged."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from promedical.policy.advantages import (
    TIERS,
    lexicographic_ranks,
    reward_functions,
    same_violations,
)
from promedical.policy.grpo import GrpoRecipe, train_grpo
from promedical.policy.rewards import RubricReward
from promedical.policy.rloo import train_rloo
from promedical.policy.settings import TierWeights
from promedical.rubric import (
    Preference,
    RewardSpec,
    Scores,
    Unresolved,
    Verdict,
    compare,
    reward,
    score,
)
from test_grpo import ROWS, RUBRIC, FakeGrade, TextGrader
from tiny_policy import save_tiny_policy

SCORES = st.builds(
    Scores,
    st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-9, 1.0]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.builds(Unresolved, st.sampled_from([0.0, 0.25]), st.integers(0, 1), st.integers(0, 1)),
)
GROUPS = st.lists(SCORES | st.none(), min_size=1, max_size=8)


def at_worst(scores: Scores) -> Scores:
    """Everything unresolved taken as the reward takes it."""
    return Scores(scores.s1, scores.s2, scores.s3 + scores.unresolved.veto)


def net_wins(group: list[Scores | None]) -> list[float | None]:
    """The slow twin: compare every answer with every other one."""
    known = [s for s in group if s is not None]
    found: list[float | None] = []
    for mine in group:
        if mine is None:
            found.append(None)
            continue
        outcomes = [compare(at_worst(mine), at_worst(other)) for other in known]
        wins = outcomes.count(Preference.FIRST) - outcomes.count(Preference.SECOND)
        found.append(wins / (len(known) - 1) if len(known) > 1 else 0.0)
    return found


@given(GROUPS)
def test_ranks_are_the_wins_less_the_losses(group: list[Scores | None]) -> None:
    found = lexicographic_ranks(group)
    assert found == pytest.approx(net_wins(group))
    assert sum(rank for rank in found if rank is not None) == pytest.approx(0)
    assert all(-1 <= rank <= 1 for rank in found if rank is not None)


@given(GROUPS, st.randoms())
def test_ranks_go_with_the_answers(group: list[Scores | None], rng: Any) -> None:
    order = list(range(len(group)))
    rng.shuffle(order)
    shuffled = lexicographic_ranks([group[i] for i in order])
    assert shuffled == [lexicographic_ranks(group)[i] for i in order]


@given(SCORES, SCORES)
def test_a_violation_less_is_always_the_higher_rank(a: Scores, b: Scores) -> None:
    worse = Scores(a.s1, a.s2, at_worst(b).s3 + 1)
    first, second = lexicographic_ranks([b, worse])
    assert first is not None
    assert second is not None
    assert first > second


def test_the_scalar_reward_is_alone_and_ranks_come_with_weight_0_for_it() -> None:
    function = RubricReward.from_rows(TextGrader(), ROWS)
    assert reward_functions(function, "scalar", TierWeights()).functions == [function]
    assert function.observers == []
    ranks = reward_functions(function, "lexicographic", TierWeights())
    assert ranks.settings == {"reward_weights": [0.0, 1.0]}
    texts = ["ab", "a", "Xb", "zz"]
    for part in ranks.functions:
        found = part([""] * 4, texts, instruction_id=["q0"] * 4)
    scores = [grade_of(text).scores for text in texts]
    assert found == pytest.approx(net_wins(list(scores)))
    with pytest.raises(RuntimeError, match="the reward has to be called first"):
        ranks.functions[1]([""], ["other"], instruction_id=["q0"])


def test_soft_s1_breaks_ties_of_ranks_too() -> None:
    class Sure(TextGrader):
        """Sees a longer answer as the more likely to be right."""

        def grade(self, messages: Any, responses: Any, rubric: Any, **more: Any) -> Any:
            made = super().grade(messages, responses, rubric, **more)
            for grade, text in zip(made, responses, strict=True):
                sure = {key: min(1.0, len(text) / 10) for key in grade.verdicts}
                object.__setattr__(grade, "probabilities", sure)
            return made

    texts = ["cc", "cccc", "cccccc"]
    for soft, expected in ((False, [0.0, 0.0, 0.0]), (True, [-1.0, 0.0, 1.0])):
        function = RubricReward.from_rows(Sure(), ROWS, soft_s1=soft)
        for part in reward_functions(function, "lexicographic", TierWeights()).functions:
            found = part([""] * 3, texts, instruction_id=["q0"] * 3)
        assert found == pytest.approx(expected)


def grade_of(text: str) -> FakeGrade:
    (grade,) = TextGrader().grade((), [text], RUBRIC, operating_point="reward")
    return grade


class Trained:
    """A tiny run, with each step's answers and the advantages that TRL made of their grades."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.advantages: list[list[float]] = []
        self.texts: list[list[str]] = []
        made = GRPOTrainer._generate_and_score_completions
        seen = self

        def kept(trainer: Any, inputs: Any) -> Any:
            output = made(trainer, inputs)
            seen.advantages.append(output["advantages"].tolist())
            return output

        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", kept)
        self.grader = _Kept(self.texts)


class _Kept(TextGrader):
    def __init__(self, texts: list[list[str]]) -> None:
        super().__init__(fail_at=(3,))
        self.texts = texts

    def grade(self, messages: Any, responses: Any, rubric: Any, **more: Any) -> Any:
        self.texts.append(list(responses))
        return super().grade(messages, responses, rubric, **more)


def recipe(tiny: Path, how: str) -> GrpoRecipe:
    return GrpoRecipe(
        model=str(tiny),
        steps=2,
        max_seconds=None,
        num_generations=4,
        prompts_per_step=2,
        max_completion_length=8,
        learning_rate=1e-2,
        advantages=how,  # type: ignore[arg-type]
        tiers=TierWeights(1.0, 0.5, 2.0),
    )


def normalised(values: list[float], eps: float = 1e-4) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (deviation + eps) for value in values]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("how", ["scalar", "lexicographic", "per_tier"])
def test_trl_makes_of_them_what_is_said(
    how: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Trained(monkeypatch)
    result = train_grpo(recipe(tiny, how), ROWS, seen.grader, tmp_path / "run")
    assert [step.reward.failed for step in result.history] == [0, 4]
    groups = [[grade_of(text).scores for text in texts] for texts in seen.texts]
    groups[2] = []  # its grading failed
    spec = GrpoRecipe().reward
    for step, found in enumerate(seen.advantages):
        expected: list[float] = []
        for group in groups[2 * step : 2 * step + 2]:
            if how == "per_tier":
                weighted = [0.0] * len(group)
                for name, value in TIERS.items():
                    weight = getattr(TierWeights(1.0, 0.5, 2.0), name)
                    tier = [value(s) or 0.0 for s in group]
                    for i, v in enumerate(normalised(tier) if tier else []):
                        weighted[i] += weight * v
                expected += weighted
            else:
                values = [
                    rank if how == "lexicographic" else reward(s, spec) or 0.0
                    for s, rank in zip(group, net_wins(list(group)), strict=True)
                ]
                expected += normalised([v or 0.0 for v in values]) if values else []
        if how == "per_tier":
            expected = normalised(expected)
        # TRL shuffles a step's answers, and what failed has no advantage.
        expected += [0.0] * (8 - len(expected))
        assert sorted(found) == pytest.approx(sorted(expected), abs=1e-5)
    assert all(step.reward_std is not None for step in result.history)


def test_rloo_takes_ranks_but_no_tiers(tiny: Path, tmp_path: Path) -> None:
    result = train_rloo(recipe(tiny, "lexicographic"), ROWS, TextGrader(), tmp_path / "run")
    assert result.done_steps == 2
    with pytest.raises(ValueError, match="advantages: found 'per_tier', which only GRPO has"):
        train_rloo(recipe(tiny, "per_tier"), ROWS, TextGrader(), tmp_path / "tiers")


def test_an_ablation_is_of_the_scalar_reward() -> None:
    spec = RewardSpec(lam=0.0, ablation="no_veto")
    with pytest.raises(ValueError, match="advantages: found 'per_tier' with ablation 'no_veto'"):
        GrpoRecipe(advantages="per_tier", reward=spec)


def test_groups_in_which_all_or_none_violate_are_counted() -> None:
    def grade(violated: bool, failed: bool = False) -> FakeGrade:
        verdict = Verdict.MET if violated else Verdict.UNMET
        verdicts = dict.fromkeys(["p1", "p2", "e1"], Verdict.ERROR if failed else Verdict.MET)
        verdicts["v1"] = verdict
        return FakeGrade(verdicts, score(RUBRIC, verdicts))

    ids = ["a", "a", "b", "b", "c", "c", "d", "d"]
    grades = [
        *(grade(True), grade(True)),
        *(grade(False), grade(False)),
        *(grade(True), grade(False)),
        *(None, grade(True, failed=True)),
    ]
    step: Any = None
    found = same_violations(step, ids, [""] * 8, grades)
    assert found == pytest.approx({"all_violate": 1 / 3, "none_violate": 1 / 3})
    assert same_violations(step, ["d"], [""], [None]) == {}
