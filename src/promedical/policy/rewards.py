"""The reward of section 2 as a TRL reward function: r = clip(S1 + α·S2, 0, 1+β) − λ·S3.

TRL (1.16) hands over the prompts and completions of a step. Every dataset row carries only an
`instruction_id`; conversation and rubric are looked up by it, all answers to one instruction are
graded together (one packed tree), and their verdicts become rewards through `promedical.rubric`,
the same code that scores the bench. A grading that fails gives None, which TRL leaves out of the
group, never 0, and is counted.

What is logged are ids, verdicts and numbers: conversations may be patients', so no text reaches
TRL's logs from here, and the warning in which TRL prints a whole row is rewritten.

Left to others: grading itself (`promedical.reward_model.grade`) and training
(`promedical.policy.grpo`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from promedical.records import GradedInstruction, Message
from promedical.rubric import RewardSpec, Rubric, RubricError, Scores, Verdict, reward

__all__ = [
    "Grade",
    "Grader",
    "GradingError",
    "Observer",
    "RewardStep",
    "RubricReward",
    "veto_variance_share",
    "violations",
    "write_history",
]

logger = logging.getLogger(__name__)

TRL_LOGGER = "trl.trainer.grpo_trainer"
_ROW_WARNING = "All reward functions returned None"


class GradingError(RuntimeError):
    """Grading failed for so many groups in a row that training on would learn nothing."""


class Grade(Protocol):
    """What a grader says about one answer."""

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """Criterion id → verdict, one for every criterion of the rubric."""

    @property
    def scores(self) -> Scores:
        """The same verdicts added up."""


class Grader(Protocol):
    """Judges every criterion of a rubric on every answer to one conversation."""

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: Literal["audit", "reward"] = "audit",
    ) -> Sequence[Grade]:
        """One grade an answer, in order."""


@dataclass(frozen=True)
class RewardStep:
    """What the reward saw in one call, which with TRL is one generation of groups.

    Args:
        step: optimiser step the answers were generated for, from 1.
        answers: number of answers handed over.
        groups: number of different instructions among them.
        failed: answers without a reward because their grading failed.
        reward, s1, s2, s3: means over the answers that have a reward. S3 counts an abstained veto
            as violated, as the reward does; S1 and S2 count nothing unresolved.
        veto_rate: share of those answers with at least one violation.
        unresolved_rate: share of (answer, criterion) verdicts, failed ones included, that are not
            decided.
        veto_variance_share: see the function of that name, averaged over groups whose rewards
            differ; None if there is none.
        no_signal: share of groups whose rewards do not differ, so that no advantage arises.
    """

    step: int
    answers: int
    groups: int
    failed: int
    reward: float | None
    s1: float | None
    s2: float | None
    s3: float | None
    veto_rate: float | None
    unresolved_rate: float | None
    veto_variance_share: float | None
    no_signal: float


Observer = Callable[
    [RewardStep, Sequence[str], Sequence[str], Sequence[Grade | None]], Mapping[str, float] | None
]


def violations(scores: Scores) -> int:
    """Violations as the reward counts them: an abstained veto counts as violated."""
    return scores.s3 + scores.unresolved.veto


def veto_variance_share(
    rewards: Sequence[float], violated: Sequence[int], lam: float
) -> float | None:
    """How much of a group's reward variance comes from the veto term: Cov(r, −λ·S3) / Var(r).

    r is the sum of the clipped gain and −λ·S3, so the shares of the two terms add up to 1. A share
    above 1 (or below 0) says that the terms work against each other. Near 1, safety drowns the
    other tiers in the advantage.

    Args:
        rewards: r of the group's answers, those that have one.
        violated: S3 of the same answers.
        lam: λ of the reward.

    Returns:
        None if the rewards do not differ (fewer than two, or all equal).
    """
    n = len(rewards)
    # Sums in another order differ in the last bits; TRL too takes so small a spread for none.
    if n < 2 or max(rewards) - min(rewards) < 1e-8:
        return None
    terms = [-lam * v for v in violated]
    mean_r, mean_t = math.fsum(rewards) / n, math.fsum(terms) / n
    covariance = math.fsum((r - mean_r) * (t - mean_t) for r, t in zip(rewards, terms, strict=True))
    return covariance / math.fsum((r - mean_r) ** 2 for r in rewards)


class RubricReward:
    """A TRL reward function that grades answers by their instruction's rubric.

    Dataset rows must have a column `instruction_id`. One callable covers all criteria, because a
    weighted sum of several could not express the clip.

    Args:
        grader: judges; called once a group, at the operating point given.
        rubrics: instruction id → (conversation, rubric).
        spec: α, β, λ of the reward.
        operating_point: which calibration the grader uses; "reward" is meant for training.
        max_failed_groups: after this many groups in a row that could not be graded, stop.

    Raises:
        RubricError: a rubric without proficiency tier, which has no reward.

    Attributes:
        history: one `RewardStep` a call, for plots; see `write_history`.
        observers: each called after every call with its `RewardStep`, and of every answer the
            instruction's id, the text and the grade (None where grading failed). Numbers that it
            returns are logged beside the reward's own; what it raises ends the training.
    """

    # TRL names its metrics after this; an instance has no __name__ of its own.
    __name__ = "rubric"

    def __init__(
        self,
        grader: Grader,
        rubrics: Mapping[str, tuple[Sequence[Message], Rubric]],
        spec: RewardSpec | None = None,
        *,
        operating_point: Literal["audit", "reward"] = "reward",
        max_failed_groups: int = 8,
    ) -> None:
        for instruction_id, (_, rubric) in rubrics.items():
            if rubric.safety_only:
                raise RubricError(
                    f"instruction {instruction_id!r}: a safety_only rubric has no S1 and so no "
                    "reward; leave it out of policy training"
                )
        self.grader = grader
        self.rubrics = dict(rubrics)
        self.spec = RewardSpec() if spec is None else spec
        self.operating_point = operating_point
        self.max_failed_groups = max_failed_groups
        self.history: list[RewardStep] = []
        self.observers: list[Observer] = []
        self._failed_in_a_row = 0
        self._last_error: Exception | None = None
        keep_rows_out_of_logs()

    @classmethod
    def from_rows(
        cls, grader: Grader, rows: Iterable[GradedInstruction], spec: RewardSpec | None = None
    ) -> RubricReward:
        """The reward over the rubrics of some rows.

        Raises:
            RubricError: a row without rubric.
        """
        rubrics: dict[str, tuple[Sequence[Message], Rubric]] = {}
        for row in rows:
            if row.rubric is None:
                raise RubricError(f"instruction {row.id!r}: rubric: found none, expected one")
            rubrics[row.id] = (row.messages, row.rubric)
        return cls(grader, rubrics, spec)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | Sequence[Mapping[str, Any]]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        instruction_id: Sequence[str] | None = None,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of a batch, in order; None where grading failed.

        Args:
            prompts, completion_ids, columns: TRL's, not used.
            completions: answers, as text or as TRL's one-message conversations.
            instruction_id: the dataset column, one id an answer.
            trainer_state: TRL's, for the number of the step.
            log_extra, log_metric: TRL's loggers.

        Raises:
            ValueError: no `instruction_id` column, or an id without a rubric.
            GradingError: too many groups in a row could not be graded.
        """
        if instruction_id is None:
            raise ValueError("column instruction_id: missing in the dataset, expected one id a row")
        texts = [completion_text(completion) for completion in completions]
        groups: dict[str, list[int]] = {}
        for index, key in enumerate(instruction_id):
            if key not in self.rubrics:
                raise ValueError(f"instruction_id: found {key!r}, which has no rubric")
            groups.setdefault(key, []).append(index)

        grades: list[Grade | None] = [None] * len(texts)
        rewards: list[float | None] = [None] * len(texts)
        for key, members in groups.items():
            graded = self._grade(key, [texts[i] for i in members])
            for index, grade in zip(members, graded, strict=True):
                grades[index] = grade
                rewards[index] = None if grade is None else reward(grade.scores, self.spec)
            self._stop_if_hopeless(key, all(rewards[i] is None for i in members))

        step = self._summary(groups, grades, rewards, 1 + getattr(trainer_state, "global_step", 0))
        self.history.append(step)
        for observer in self.observers:
            told = observer(step, list(instruction_id), texts, grades)
            if told and log_metric is not None:
                for name, value in told.items():
                    log_metric(name, float(value))
        if log_extra is not None:
            log_extra("instruction_id", list(instruction_id))
            log_extra("verdicts", [_verdict_line(grade) for grade in grades])
        if log_metric is not None:
            for name in _LOGGED:
                value = getattr(step, name)
                if value is not None:
                    log_metric(name, float(value))
            log_metric("grading_failed", float(step.failed))
        return rewards

    def _grade(self, key: str, texts: list[str]) -> Sequence[Grade | None]:
        """Grades of one group, all None if the grader fails.

        The grader is someone's model or server: whatever it raises must not end a long run, so
        every exception counts as a failed grading.
        """
        messages, rubric = self.rubrics[key]
        try:
            graded = self.grader.grade(
                messages, texts, rubric, operating_point=self.operating_point
            )
            if len(graded) != len(texts):
                raise ValueError(f"found {len(graded)} grades for {len(texts)} answers")
        except Exception as error:
            # Its message may quote the text, so only the kind of error is logged.
            logger.warning(
                "instruction %s: grading %d answers failed: %s",
                key,
                len(texts),
                type(error).__name__,
            )
            self._last_error = error
            return [None] * len(texts)
        return graded

    def _stop_if_hopeless(self, key: str, failed: bool) -> None:
        if not failed:
            self._failed_in_a_row, self._last_error = 0, None
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.max_failed_groups:
            kind = "verdict error" if self._last_error is None else type(self._last_error).__name__
            raise GradingError(
                f"grading failed for {self._failed_in_a_row} groups in a row, last for "
                f"instruction {key!r}: {kind}"
            ) from self._last_error

    def _summary(
        self,
        groups: Mapping[str, list[int]],
        grades: Sequence[Grade | None],
        rewards: Sequence[float | None],
        step: int,
    ) -> RewardStep:
        scored = [
            (value, grade.scores)
            for value, grade in zip(rewards, grades, strict=True)
            if value is not None and grade is not None
        ]
        verdicts = [v for grade in grades if grade is not None for v in grade.verdicts.values()]
        shares = []
        for members in groups.values():
            pairs = [
                (value, violations(grade.scores))
                for value, grade in ((rewards[i], grades[i]) for i in members)
                if value is not None and grade is not None
            ]
            shares.append(
                veto_variance_share([r for r, _ in pairs], [v for _, v in pairs], self.spec.lam)
            )
        known = [share for share in shares if share is not None]
        return RewardStep(
            step=step,
            answers=len(grades),
            groups=len(groups),
            failed=len(grades) - len(scored),
            reward=_mean([value for value, _ in scored]),
            s1=_mean([s.s1 for _, s in scored if s.s1 is not None]),
            s2=_mean([s.s2 for _, s in scored]),
            s3=_mean([violations(s) for _, s in scored]),
            veto_rate=_mean([violations(s) > 0 for _, s in scored]),
            unresolved_rate=_mean([not v.resolved for v in verdicts]),
            veto_variance_share=_mean(known),
            no_signal=1 - len(known) / len(groups) if groups else 0.0,
        )


_LOGGED = ("s1", "s2", "s3", "veto_rate", "unresolved_rate", "veto_variance_share", "no_signal")


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The answer's text, from TRL's plain or conversational completion."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)


def write_history(path: str | Path, history: Iterable[RewardStep]) -> None:
    """Write one JSON object a step (JSON lines), numbers only."""
    lines = [json.dumps(asdict(step)) + "\n" for step in history]
    Path(path).write_text("".join(lines))


def read_history(path: str | Path) -> list[RewardStep]:
    """The inverse of `write_history`.

    Raises:
        ValueError: a line that is no such step; the message names file and line.
    """
    known = {f.name for f in fields(RewardStep)}
    history = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            history.append(RewardStep(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: line {number}: {error}, expected an object with {sorted(known)}"
            ) from None
    return history


def keep_rows_out_of_logs() -> None:
    """Rewrite TRL's warning about a row without reward, which would print the row's whole text."""
    target = logging.getLogger(TRL_LOGGER)
    if not any(isinstance(f, _WithoutRow) for f in target.filters):
        target.addFilter(_WithoutRow())


class _WithoutRow(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if _ROW_WARNING in record.getMessage():
            record.msg = f"{_ROW_WARNING} for at least one completion (text withheld)."
            record.args = ()
        return True


def _verdict_line(grade: Grade | None) -> str:
    if grade is None:
        return "grading failed"
    return " ".join(f"{key}={Verdict(value).value}" for key, value in grade.verdicts.items())


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
