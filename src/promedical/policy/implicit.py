"""The implicit scalar reward (section 5, baseline): one score an answer, no criterion asked.

The reward model was trained on the overall preference alone (`asks: overall`), or on the same with
the whole rubric in its question (`asks: rubric`). The reward is its score s as it is: GRPO divides
by the group's deviation, so its scale does not matter. There are no tiers and no verdicts, so what
is logged is the reward and how many scores failed; a failed score is None, never 0.

Left to others: the reward model (`promedical.reward_model`), the explicit reward (`rewards`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from promedical.policy.rewards import (
    GradingError,
    Observer,
    RewardStep,
    completion_text,
    keep_rows_out_of_logs,
)
from promedical.records import GradedInstruction
from promedical.rubric import Criterion, Rubric, RubricError, Tier

__all__ = ["ImplicitReward"]

logger = logging.getLogger(__name__)

ID = "overall"


class ImplicitReward:
    """A TRL reward function that scores answers as a whole.

    Args:
        grader: a reward model or backend whose grades have `raw` scores, trained on that question.
        rows: instructions; their rubrics are read for "rubric" only.
        asks: "overall" or "rubric".
        max_failed_groups: after this many groups in a row that could not be scored, stop.

    Raises:
        RubricError: "rubric", and a row without one.

    Attributes:
        history: one `RewardStep` a call, without tiers.
        observers: as `RubricReward`'s; a grade is always None.
    """

    # TRL names its metrics after this; an instance has no __name__ of its own.
    __name__ = "implicit"

    def __init__(
        self,
        grader: Any,
        rows: Iterable[GradedInstruction],
        asks: Literal["overall", "rubric"] = "overall",
        *,
        max_failed_groups: int = 8,
    ) -> None:
        self.grader = grader
        self.operating_point = "audit"  # there are no verdicts, so no thresholds
        self.rubrics = {row.id: (row.messages, _question(row, asks)) for row in rows}
        self.max_failed_groups = max_failed_groups
        self.history: list[RewardStep] = []
        self.observers: list[Observer] = []
        self._failed_in_a_row = 0
        keep_rows_out_of_logs()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | Sequence[Mapping[str, Any]]],
        completion_ids: Any = None,
        *,
        instruction_id: Sequence[str],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores of a batch, in order; None where scoring failed.

        Raises:
            GradingError: too many groups in a row could not be scored.
        """
        texts = [completion_text(completion) for completion in completions]
        groups: dict[str, list[int]] = {}
        for index, key in enumerate(instruction_id):
            groups.setdefault(key, []).append(index)
        found: list[float | None] = [None] * len(texts)
        for key, members in groups.items():
            scores = self._scores(key, [texts[i] for i in members])
            for index, score in zip(members, scores, strict=True):
                found[index] = score
            self._stop_if_hopeless(key, all(score is None for score in scores))
        step = _summary(groups, found, 1 + getattr(trainer_state, "global_step", 0))
        self.history.append(step)
        told: dict[str, float] = {"grading_failed": float(step.failed), "no_signal": step.no_signal}
        for observer in self.observers:
            told |= observer(step, list(instruction_id), texts, [None] * len(texts)) or {}
        if log_metric is not None:
            for name, value in told.items():
                log_metric(name, float(value))
        return found

    def _scores(self, key: str, texts: list[str]) -> list[float | None]:
        messages, rubric = self.rubrics[key]
        try:
            grades = self.grader.grade(
                messages, texts, rubric, operating_point=self.operating_point
            )
            if len(grades) != len(texts):
                raise ValueError(f"found {len(grades)} grades for {len(texts)} answers")
            raw = [grade.raw.get(ID, math.nan) for grade in grades]
        except Exception as error:  # the grader is someone's model or server
            # Its message may quote the text, so only the kind of error is logged.
            logger.warning(
                "instruction %s: scoring %d answers failed: %s",
                key,
                len(texts),
                type(error).__name__,
            )
            return [None] * len(texts)
        return [float(s) if math.isfinite(s) else None for s in raw]

    def _stop_if_hopeless(self, key: str, failed: bool) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        if self._failed_in_a_row >= self.max_failed_groups:
            raise GradingError(
                f"scoring failed for {self._failed_in_a_row} groups in a row, last for "
                f"instruction {key!r}"
            )


def _question(row: GradedInstruction, asks: str) -> Rubric:
    """A rubric whose one criterion is the question that the model was trained on."""
    from promedical.reward_model.render import OVERALL, rubric_question

    text = OVERALL
    if asks == "rubric":
        if row.rubric is None:
            raise RubricError(f"instruction {row.id!r}: rubric: found none, expected one")
        text = rubric_question(row.rubric)
    return Rubric((Criterion(ID, Tier.EXCELLENCE, text),), safety_only=True)


def _summary(
    groups: Mapping[str, Sequence[int]], scores: Sequence[float | None], step: int
) -> RewardStep:
    known = [score for score in scores if score is not None]
    flat = 0
    for members in groups.values():
        of_group = [s for s in (scores[i] for i in members) if s is not None]
        # Sums in another order differ in the last bits; TRL too takes so small a spread for none.
        flat += len(of_group) < 2 or max(of_group) - min(of_group) < 1e-8
    return RewardStep(
        step=step,
        answers=len(scores),
        groups=len(groups),
        failed=len(scores) - len(known),
        reward=math.fsum(known) / len(known) if known else None,
        s1=None,
        s2=None,
        s3=None,
        veto_rate=None,
        unresolved_rate=None,
        veto_variance_share=None,
        no_signal=flat / len(groups) if groups else 0.0,
    )
