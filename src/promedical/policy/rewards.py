"""The reward of section 2 as a TRL reward function: r = clip(S1 + α·S2, 0, 1+β) − λ·S3.

TRL (1.16) hands over the prompts and completions of a step. Every dataset row carries only an
`instruction_id`; conversation and rubric are looked up by it, all answers to one instruction are
graded together (one packed tree), and their verdicts become rewards in an `Oracle`
(`promedical.policy.specification`), which the other engines ask too. A grading that fails gives
None, which TRL leaves out of the group, never 0, and is counted.

What is logged are ids, verdicts and numbers: conversations may be patients', so no text reaches
TRL's logs from here, and the warning in which TRL prints a whole row is rewritten.

Left to others: grading itself (`promedical.reward_model.grade`), other engines (`verl_reward`,
`openrlhf_reward`) and training (`promedical.policy.grpo`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from promedical.policy.specification import (
    Grade,
    Grader,
    Oracle,
    Outcome,
    RewardSpecification,
    Rubrics,
    open_oracle,
    rubrics_of,
    violations,
)
from promedical.records import GradedInstruction
from promedical.rubric import RewardSpec, Verdict

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
        soft_s1: whether S1 adds up calibrated probabilities, see `specification.scores_of`.

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
        rubrics: Rubrics,
        spec: RewardSpec | None = None,
        *,
        operating_point: Literal["audit", "reward"] = "reward",
        max_failed_groups: int = 8,
        soft_s1: bool = False,
    ) -> None:
        specification = RewardSpecification(
            operating_point=operating_point,
            reward=RewardSpec() if spec is None else spec,
            soft_s1=soft_s1,
        )
        self.oracle = Oracle(grader, rubrics, specification)
        self.max_failed_groups = max_failed_groups
        self.history: list[RewardStep] = []
        self.observers: list[Observer] = []
        self._failed_in_a_row = 0
        keep_rows_out_of_logs()

    @classmethod
    def from_rows(
        cls,
        grader: Grader,
        rows: Iterable[GradedInstruction],
        spec: RewardSpec | None = None,
        **settings: Any,
    ) -> RubricReward:
        """The reward over the rubrics of some rows.

        Raises:
            RubricError: a row without rubric.
        """
        return cls(grader, rubrics_of(list(rows)), spec, **settings)

    @classmethod
    def from_specification(
        cls, specification: RewardSpecification, *, max_failed_groups: int = 8
    ) -> RubricReward:
        """The reward that a specification describes, with TRL's None for every failure.

        Raises:
            ValueError: rubrics or grader cannot be used (see `specification.open_oracle`).
        """
        oracle = open_oracle(specification)
        return cls(
            oracle.grader,
            oracle.rubrics,
            specification.reward,
            operating_point=specification.operating_point,
            max_failed_groups=max_failed_groups,
            soft_s1=specification.soft_s1,
        )

    @property
    def grader(self) -> Grader:
        """Who judges; another may take its place, such as one that has begun already."""
        return self.oracle.grader

    @grader.setter
    def grader(self, grader: Grader) -> None:
        self.oracle.grader = grader

    @property
    def rubrics(self) -> Rubrics:
        """Instruction id → (conversation, rubric)."""
        return self.oracle.rubrics

    @property
    def operating_point(self) -> Literal["audit", "reward"]:
        """Which calibration the grader uses."""
        return self.oracle.specification.operating_point

    @property
    def spec(self) -> RewardSpec:
        """α, β, λ."""
        return self.oracle.specification.reward

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

        outcomes: list[Outcome] = [Outcome(None, None)] * len(texts)
        for key, members in groups.items():
            graded = self.oracle.grade(key, [texts[i] for i in members])
            for index, outcome in zip(members, graded, strict=True):
                outcomes[index] = outcome
            self._stop_if_hopeless(key, graded)

        grades = [outcome.grade for outcome in outcomes]
        step = self._summary(groups, outcomes, 1 + getattr(trainer_state, "global_step", 0))
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
        return [outcome.reward for outcome in outcomes]

    def _stop_if_hopeless(self, key: str, outcomes: Sequence[Outcome]) -> None:
        if not all(outcome.failed for outcome in outcomes):
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.max_failed_groups:
            raise GradingError(
                f"grading failed for {self._failed_in_a_row} groups in a row, last for "
                f"instruction {key!r}: {outcomes[-1].failure}"
            ) from outcomes[-1].cause

    def _summary(
        self, groups: Mapping[str, list[int]], outcomes: Sequence[Outcome], step: int
    ) -> RewardStep:
        scored = [
            (outcome.reward, outcome.scores)
            for outcome in outcomes
            if outcome.reward is not None and outcome.scores is not None
        ]
        verdicts = [v for o in outcomes if o.grade is not None for v in o.grade.verdicts.values()]
        shares = []
        for members in groups.values():
            pairs = [
                (outcome.reward, violations(outcome.scores))
                for outcome in (outcomes[i] for i in members)
                if outcome.reward is not None and outcome.scores is not None
            ]
            shares.append(
                veto_variance_share([r for r, _ in pairs], [v for _, v in pairs], self.spec.lam)
            )
        known = [share for share in shares if share is not None]
        return RewardStep(
            step=step,
            answers=len(outcomes),
            groups=len(groups),
            failed=len(outcomes) - len(scored),
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
