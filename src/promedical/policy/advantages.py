"""How a group's grades become advantages: the paper's way, and two options beyond it.

TRL computes advantages inside its trainer from what reward functions return, so an option is a list
of reward functions with their weights, the first of which is always the reward itself, which grades
once and is logged; the others only read its grades.

    scalar         A = (r − mean) / std in the group, of r = clip(S1 + α·S2, 0, 1+β) − λ·S3 (paper)
    lexicographic  the same of the rank in the group by S3, then S1, then S2: no exchange rate
                   between the tiers, and no veto so heavy that it drowns the rest of the variance
    per_tier       S1, S2 and −S3 normalised in the group one by one, added up with weights, and
                   normalised over the step (TRL's `normalize_then_sum`; GDPO, arXiv 2601.05242)

What is unresolved counts as in the reward, at its worst end, and a failed grading has no advantage.
Here too are the numbers about a group that are logged each step. Left to others: grading and the
reward (`rewards`), soft S1 (`specification`), the loss (TRL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promedical.policy.rewards import Grade, RewardStep, completion_text, violations
from promedical.policy.settings import TierWeights
from promedical.policy.specification import scores_of
from promedical.rubric import Scores

__all__ = ["Advantages", "lexicographic_ranks", "reward_functions", "same_violations"]

RESOLUTION = 1e-6  # of S1, as in `rubric.compare`

# The value of a tier for an answer, larger is better.
TIERS: dict[str, Callable[[Scores], float | None]] = {
    "proficiency": lambda scores: scores.s1,
    "excellence": lambda scores: float(scores.s2),
    "veto": lambda scores: -float(violations(scores)),
}


@dataclass(frozen=True)
class Advantages:
    """Reward functions for TRL, and what its configuration is told about them.

    Args:
        functions: the reward itself first.
        settings: of GRPOConfig.
    """

    functions: list[Any]
    settings: dict[str, Any]


def reward_functions(reward: Any, how: str, weights: TierWeights) -> Advantages:
    """The functions of one of the ways above.

    Args:
        reward: a `RubricReward`, or another reward with `observers` for "scalar".
        how: "scalar", "lexicographic" or "per_tier".
        weights: of the tiers, for "per_tier".
    """
    if how == "scalar":
        return Advantages([reward], {})
    seen = _Seen(reward)
    reward.observers.append(seen)
    if how == "lexicographic":
        ranks = _FromGrades("lexicographic", seen, _ranks)
        # The reward is there to be logged; TRL multiplies it by 0.
        return Advantages([reward, ranks], {"reward_weights": [0.0, 1.0]})
    tiers = [_FromGrades(name, seen, _tier(value)) for name, value in TIERS.items()]
    return Advantages(
        [reward, *tiers],
        {
            "reward_weights": [0.0, *(getattr(weights, name) for name in TIERS)],
            "multi_objective_aggregation": "normalize_then_sum",
        },
    )


def lexicographic_ranks(scores: Sequence[Scores | None]) -> list[float | None]:
    """Each answer's place in its group, from −1 (worse than all others) to 1 (better than all).

    rank_i = (#answers worse than i − #answers better than i) / (n − 1), by (−S3, S1, S2) with an
    abstained veto counted as violated, and S1 on the grid of `rubric.compare`; equal answers have
    the same rank, and a group's ranks sum to 0.

    Args:
        scores: of the group's answers; None where grading failed, which has no rank and is not
            counted among the n.
    """
    keys = [
        None if s is None else (-violations(s), round((s.s1 or 0.0) / RESOLUTION), s.s2)
        for s in scores
    ]
    known = sorted(key for key in keys if key is not None)
    if len(known) < 2:
        return [None if key is None else 0.0 for key in keys]
    below: dict[Any, int] = {}
    above: dict[Any, int] = {}
    for place, key in enumerate(known):
        below.setdefault(key, place)
        above[key] = len(known) - 1 - place
    return [None if key is None else (below[key] - above[key]) / (len(known) - 1) for key in keys]


def same_violations(
    step: RewardStep,
    ids: Sequence[str],
    texts: Sequence[str],
    grades: Sequence[Grade | None],
) -> Mapping[str, float]:
    """An observer that logs the share of groups in which every answer, or none, has a violation.

    In both, S3 says nothing about which answer is the better one; groups without a graded answer
    are left out.
    """
    groups = [
        [violations(grades[i].scores) > 0 for i in members if _graded(grades[i])]  # type: ignore[union-attr]
        for members in _groups(ids)
    ]
    known = [group for group in groups if group]
    if not known:
        return {}
    return {
        "all_violate": math.fsum(all(group) for group in known) / len(known),
        "none_violate": math.fsum(not any(group) for group in known) / len(known),
    }


class _Seen:
    """Keeps the last call's ids, texts and scores."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.scores: list[Scores | None] = []

    def __call__(
        self,
        step: RewardStep,
        ids: Sequence[str],
        texts: Sequence[str],
        grades: Sequence[Grade | None],
    ) -> None:
        soft = self._reward.oracle.specification.soft_s1
        rubrics = self._reward.rubrics
        self.ids, self.texts = list(ids), list(texts)
        self.scores = [
            scores_of(grade, rubrics[key][1], soft_s1=soft)
            if grade is not None and _graded(grade)
            else None
            for key, grade in zip(ids, grades, strict=True)
        ]


class _FromGrades:
    """A reward function of what the reward has just graded."""

    def __init__(
        self,
        name: str,
        seen: _Seen,
        values: Callable[[Sequence[Scores | None]], list[float | None]],
    ) -> None:
        self.__name__ = name
        self._seen = seen
        self._values = values

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        instruction_id: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        if (list(instruction_id), texts) != (self._seen.ids, self._seen.texts):
            raise RuntimeError(f"{self.__name__}: the reward has to be called first")
        found: list[float | None] = [None] * len(texts)
        for members in _groups(instruction_id):
            scores = [self._seen.scores[i] for i in members]
            for index, value in zip(members, self._values(scores), strict=True):
                found[index] = value
        return found


def _ranks(scores: Sequence[Scores | None]) -> list[float | None]:
    return lexicographic_ranks(scores)


def _tier(
    value: Callable[[Scores], float | None],
) -> Callable[[Sequence[Scores | None]], list[float | None]]:
    return lambda scores: [None if s is None else value(s) for s in scores]


def _graded(grade: Grade | None) -> bool:
    """Whether there is a grade that gives a reward, so without a failed judgment."""
    return grade is not None and not grade.scores.unresolved.errors


def _groups(ids: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(ids):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
