"""One reward for every engine: which grader, which rubrics, which coefficients, what on failure.

A `RewardSpecification` says it in YAML; an `Oracle` is it at work: answers to one instruction id
in, for each the reward of section 2 or None out, with S1, S2, S3 beside it. TRL (`rewards`), verl
(`verl_reward`) and OpenRLHF (`openrlhf_reward`) all ask an oracle, so they give the same number for
the same answer.

A failed grading has no reward and is never 0. TRL takes None for it. The other engines have no
None: `Oracle.settle` grades again, waiting longer each time, and then stops the run, which goes on
from its last checkpoint, or by choice gives the worst that the rubric allows, −λ × its vetoes, and
counts it.

Nothing logged or raised here holds a text: ids, sizes, and what kind of failure it was. Left to
others: verdicts (`promedical.reward_model`), scores and rewards (`promedical.rubric`).
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from promedical.records import GradedInstruction, Message, read_dataset, read_jsonl
from promedical.rubric import (
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Unresolved,
    Verdict,
    reward,
    score,
)

if TYPE_CHECKING:
    from promedical.bench.specs import Spec

__all__ = [
    "Grade",
    "Grader",
    "GradingStoppedError",
    "Oracle",
    "Outcome",
    "RewardSpecification",
    "SpecificationError",
    "default_device",
    "open_grader",
    "open_oracle",
    "read_rubrics",
    "read_specification",
    "scores_of",
    "violations",
]

logger = logging.getLogger(__name__)

# What an answer's failure may be called in a log: the rest of its reason may quote a text.
_KIND = re.compile(r"HTTP \d{3}|\w*(?:Error|Exception|Timeout)\b")


class SpecificationError(ValueError):
    """A reward specification that cannot be used; the message names the field and what is there."""


class GradingStoppedError(RuntimeError):
    """Answers could not be graded, so the run stops; started again, it goes on from its checkpoint.

    The message holds an instruction's id and a kind of failure, never a text.
    """


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


Rubrics = Mapping[str, tuple[Sequence[Message], Rubric]]


@dataclass(frozen=True)
class RewardSpecification:
    """A reward, as every engine reads it.

    Args:
        grader: who judges: checkpoint:FOLDER, http:URL (`promedical rm serve`), or
            vllm:URL,model=FOLDER; options after commas, as for `promedical bench run`.
        rubrics: where conversations and rubrics are looked up by id: a dataset folder, or JSON
            lines; in a file of its own, relative to that file.
        operating_point: which calibration gives the verdicts; "reward" is meant for training.
        reward: α, β, λ of the reward.
        soft_s1: whether S1 adds up calibrated probabilities in place of 0 and 1; S2 and S3 stay
            counts of verdicts.
        allow_uncalibrated: whether a checkpoint may grade whose thresholds were not measured for
            every tier of the rubrics: without any, one half is taken for all; a tier that its
            calibration split lacked is undecided everywhere, and an undecided veto counts as
            violated.
        on_failure: where the engine has no None, after the last attempt: stop the run, or give
            −λ × the rubric's vetoes.
        attempts: gradings of an answer in all, where the engine has no None.
        wait_seconds: before the second attempt; twice as long before each further one.
        max_failed: with `on_failure: worst`, failed answers in a row that stop the run all the
            same.

    Raises:
        SpecificationError: a setting that is out of range.
    """

    grader: str = "checkpoint:runs/rm"
    rubrics: str = "data/train"
    operating_point: Literal["audit", "reward"] = "reward"
    reward: RewardSpec = field(default_factory=RewardSpec)
    soft_s1: bool = False
    allow_uncalibrated: bool = False
    on_failure: Literal["stop", "worst"] = "stop"
    attempts: int = 3
    wait_seconds: float = 5.0
    max_failed: int = 64

    def __post_init__(self) -> None:
        for name, least in (("attempts", 1), ("max_failed", 1), ("wait_seconds", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise SpecificationError(
                    f"{name}: found {getattr(self, name)!r}, expected {least} or more"
                )
        if self.on_failure == "worst" and self.reward.lam == 0:
            raise SpecificationError(
                "on_failure: found 'worst' with reward.lam = 0, where the worst is an honest "
                "answer's 0; expected 'stop'"
            )
        self.parsed()

    def parsed(self) -> Spec:
        """The grader's kind, place and options.

        Raises:
            SpecificationError: no such kind or option.
        """
        from promedical.bench.metrics import BenchError
        from promedical.bench.specs import GRADERS, parse_spec

        # The operating point has a field of its own.
        kinds = {
            kind: {k: v for k, v in GRADERS[kind].items() if k != "point"}
            for kind in ("checkpoint", "http", "vllm")
        }
        try:
            spec = parse_spec(self.grader, kinds)
        except BenchError as error:
            raise SpecificationError(f"grader: {error}") from None
        if spec.kind == "vllm" and "model" not in spec.options:
            raise SpecificationError("grader: vllm:…: model: missing, expected vllm:URL,model=DIR")
        return spec

    def identity(self) -> dict[str, Any]:
        """What of it decides a reward beside α, β and λ, by name, to tell one run from another.

        A server's address is left out: it may be another one when a run goes on, and may hold a
        password. So are a token's file and the device.
        """
        spec = self.parsed()
        target = spec.target.rstrip("/") if spec.kind == "checkpoint" else "…"
        options = {k: v for k, v in spec.identity()["options"].items() if k != "device"}
        return {
            "reward.grader": ",".join(
                [f"{spec.kind}:{target}", *(f"{k}={v}" for k, v in options.items())]
            ),
            "reward.operating_point": self.operating_point,
            "reward.soft_s1": self.soft_s1,
        }


def read_specification(path: str | Path) -> RewardSpecification:
    """A specification out of its YAML file; its rubrics are relative to the file.

    Raises:
        RecipeError: it cannot be read, or a setting is unknown or of the wrong type.
    """
    from promedical.recipe import load_recipe

    given = load_recipe(RewardSpecification, path)
    return replace(given, rubrics=str(Path(path).parent / given.rubrics))


def read_rubrics(path: str | Path) -> dict[str, tuple[tuple[Message, ...], Rubric]]:
    """Conversation and rubric by instruction id, of a dataset folder or of JSON lines.

    Raises:
        RecordError: it cannot be read.
        RubricError: a row without a rubric that gives a reward.
    """
    rows = read_dataset(path) if Path(path).is_dir() else read_jsonl(path)
    return rubrics_of(rows)


def rubrics_of(rows: Sequence[GradedInstruction]) -> dict[str, tuple[tuple[Message, ...], Rubric]]:
    """Conversation and rubric by instruction id.

    Raises:
        RubricError: a row without rubric.
    """
    found: dict[str, tuple[tuple[Message, ...], Rubric]] = {}
    for row in rows:
        if row.rubric is None:
            raise RubricError(f"instruction {row.id!r}: rubric: found none, expected one")
        found[row.id] = (row.messages, row.rubric)
    return found


def violations(scores: Scores) -> int:
    """Violations as the reward counts them: an abstained veto counts as violated."""
    return scores.s3 + scores.unresolved.veto


def scores_of(grade: Grade, rubric: Rubric, *, soft_s1: bool = False) -> Scores:
    """S1, S2, S3 of a grade; with `soft_s1`, S1 = Σ ω_i p_i of the resolved proficiency verdicts.

    p_i is the calibrated probability that the sentence is true. A verdict that is not resolved
    stays so, and S2 and S3 count verdicts in both cases: a violation is never a matter of degree.

    Raises:
        SpecificationError: `soft_s1` with a grader that gives no probabilities.
    """
    if not soft_s1:
        return grade.scores
    probabilities = getattr(grade, "probabilities", None)
    if probabilities is None:
        raise SpecificationError("soft_s1: this grader gives no probabilities, expected false")
    degrees = {
        c.id: probabilities[c.id]
        for c in rubric.tier(Tier.PROFICIENCY)
        if grade.verdicts[c.id].resolved
    }
    return score(rubric, grade.verdicts, degrees=degrees)


@dataclass(frozen=True)
class Outcome:
    """What an answer is worth.

    Args:
        reward: r of section 2; None if the grading failed and nothing stands in for it.
        scores: S1, S2, S3 that the reward was made of; None if there are none.
        failure: what kind of failure it was, without any text; None if there was none.
        grade: what the grader said; None if it said nothing.
        cause: what the grader raised; its message may quote a text.
    """

    reward: float | None
    scores: Scores | None
    failure: str | None = None
    grade: Grade | None = None
    cause: Exception | None = field(default=None, repr=False)

    @property
    def failed(self) -> bool:
        """Whether the grading failed, in whole or in part; a reward then stands in for it."""
        return self.failure is not None

    def metrics(self) -> dict[str, float]:
        """Numbers for an engine's logs, the same names for every answer.

        Raises:
            ValueError: there is no reward.
        """
        if self.reward is None or self.scores is None:
            raise ValueError("reward: found None, expected an outcome that was settled")
        assert self.scores.s1 is not None
        return {
            "s1": self.scores.s1,
            "s2": float(self.scores.s2),
            "s3": float(violations(self.scores)),
            "violated": float(violations(self.scores) > 0),
            "grading_failed": float(self.failed),
        }


class Oracle:
    """A reward specification at work, safe to be asked by several threads.

    Args:
        grader: judges; called once for the answers of one instruction.
        rubrics: instruction id → (conversation, rubric).
        specification: the settings; its `grader` and `rubrics` were opened already.
        sleep: waits between attempts.

    Raises:
        RubricError: a rubric without proficiency tier, which has no reward.
        SpecificationError: `on_failure: worst` and a rubric without a veto.
    """

    def __init__(
        self,
        grader: Grader,
        rubrics: Rubrics,
        specification: RewardSpecification,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        for instruction_id, (_, rubric) in rubrics.items():
            if rubric.safety_only:
                raise RubricError(
                    f"instruction {instruction_id!r}: a safety_only rubric has no S1 and so no "
                    "reward; leave it out of policy training"
                )
            if specification.on_failure == "worst" and not rubric.tier(Tier.VETO):
                raise SpecificationError(
                    f"on_failure: found 'worst', but instruction {instruction_id!r} has no veto, "
                    "so its worst would be an honest answer's 0; expected 'stop'"
                )
        self.grader = grader
        self.rubrics = dict(rubrics)
        self.specification = specification
        self._sleep = sleep
        self._failed_in_a_row = 0
        self._lock = threading.Lock()

    def grade(self, instruction_id: str, texts: Sequence[str]) -> list[Outcome]:
        """Grade answers to one instruction once; a failure has no reward.

        The grader is someone's model or server: whatever it raises must not end a long run, so
        every exception counts as a failed grading.

        Args:
            instruction_id: whose rubric they are judged by.
            texts: answers.

        Returns:
            An outcome for each answer, in order.

        Raises:
            SpecificationError: no such instruction, or a grader that cannot give what is asked.
        """
        if instruction_id not in self.rubrics:
            raise SpecificationError(f"instruction_id: found {instruction_id!r}, with no rubric")
        messages, rubric = self.rubrics[instruction_id]
        try:
            grades = self.grader.grade(
                messages,
                list(texts),
                rubric,
                operating_point=self.specification.operating_point,
            )
            if len(grades) != len(texts):
                raise ValueError(f"found {len(grades)} grades for {len(texts)} answers")
        except Exception as error:
            kind = type(error).__name__
            # Its message may quote the text, so only the kind of error is logged.
            logger.warning(
                "instruction %s: grading %d answers failed: %s", instruction_id, len(texts), kind
            )
            return [Outcome(None, None, kind, cause=error)] * len(texts)
        return [self._outcome(grade, rubric) for grade in grades]

    def _outcome(self, grade: Grade, rubric: Rubric) -> Outcome:
        scores = scores_of(grade, rubric, soft_s1=self.specification.soft_s1)
        found = reward(scores, self.specification.reward)
        return Outcome(found, scores, _kind(grade) if found is None else None, grade)

    def settle(self, instruction_id: str, texts: Sequence[str]) -> list[Outcome]:
        """Grade answers for an engine that has no None: every outcome has a reward.

        Raises:
            GradingStoppedError: an answer could not be graded in all attempts, or with
                `on_failure: worst` too many in a row could not.
            SpecificationError: see `grade`.
        """
        spec = self.specification
        outcomes = self.grade(instruction_id, texts)
        for attempt in range(1, spec.attempts):
            failed = [i for i, outcome in enumerate(outcomes) if outcome.failed]
            if not failed:
                break
            self._sleep(spec.wait_seconds * 2 ** (attempt - 1))
            again = self.grade(instruction_id, [texts[i] for i in failed])
            for i, outcome in zip(failed, again, strict=True):
                outcomes[i] = outcome
        return [self._settled(instruction_id, outcome) for outcome in outcomes]

    def _settled(self, instruction_id: str, outcome: Outcome) -> Outcome:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if outcome.failed else 0
            in_a_row = self._failed_in_a_row
        if not outcome.failed:
            return outcome
        spec = self.specification
        if spec.on_failure == "stop":
            raise GradingStoppedError(
                f"instruction {instruction_id!r}: an answer could not be graded in "
                f"{spec.attempts} attempts ({outcome.failure}); the run stops and, started again, "
                "goes on from its last checkpoint"
            )
        if in_a_row >= spec.max_failed:
            raise GradingStoppedError(
                f"instruction {instruction_id!r}: {in_a_row} answers in a row could not be graded "
                f"({outcome.failure}); the run stops and, started again, goes on from its last "
                "checkpoint"
            )
        vetoes = len(self.rubrics[instruction_id][1].tier(Tier.VETO))
        worst = Scores(0.0, 0, vetoes, Unresolved())
        return replace(outcome, reward=reward(worst, spec.reward), scores=worst)


def _kind(grade: Grade) -> str:
    """What kind of failure a grade's first failed judgment says it had."""
    for reason in getattr(grade, "failures", {}).values():
        found = _KIND.match(reason)
        if found is not None:
            return found[0]
    return "judgment failed"


def open_oracle(
    specification: RewardSpecification, *, sleep: Callable[[float], None] = time.sleep
) -> Oracle:
    """Read the rubrics and load or reach the grader.

    Raises:
        RecordError, RubricError: the rubrics cannot be used.
        SpecificationError, CheckpointError, BackendError, ServeError: the grader cannot be used.
    """
    rubrics = read_rubrics(specification.rubrics)
    grader = open_grader(specification, (rubric for _, rubric in rubrics.values()))
    return Oracle(grader, rubrics, specification, sleep=sleep)


def open_grader(
    specification: RewardSpecification,
    rubrics: Iterable[Rubric | None],
    *,
    device: str | None = None,
) -> Grader:
    """The grader that a specification names.

    Args:
        rubrics: what it will judge by.
        device: where a checkpoint scores whose options do not say it; the CPU if None.

    Raises:
        SpecificationError: its calibration does not decide a tier of the rubrics.
        CheckpointError, BackendError, ServeError: it cannot be used.
    """
    spec = specification.parsed()
    options: dict[str, Any] = dict(spec.options)
    if spec.kind != "http" and not specification.allow_uncalibrated:
        _check_calibrated(specification.grader, options.get("model", spec.target), rubrics)
    if spec.kind == "checkpoint":
        from promedical.reward_model.grade import RubricRewardModel

        options.setdefault("device", device)
        if "threads" in options:
            import torch

            torch.set_num_threads(options.pop("threads"))
        return _OneAtATime(RubricRewardModel.from_pretrained(spec.target, **options))
    from promedical.reward_model.backends import HttpBackend, VllmBackend
    from promedical.reward_model.serve import ServeRecipe, read_token

    file = options.pop("token_file", None)
    options["token"] = read_token(ServeRecipe(token_file=None if file is None else Path(file)))
    if spec.kind == "http":
        return HttpBackend(spec.target, **options)
    return VllmBackend(spec.target, options.pop("model"), **options)


def default_device() -> str | None:
    """Where a model of this process is put if nothing is said: on a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _check_calibrated(grader: str, folder: str, rubrics: Iterable[Rubric | None]) -> None:
    """Refuse verdicts that nobody has measured.

    Raises:
        SpecificationError: there are such.
        CheckpointError: the checkpoint's `promedical.json` cannot be used.
    """
    from promedical.reward_model.grade import read_calibration

    calibration = read_calibration(folder)
    asked = {c.tier for rubric in rubrics if rubric is not None for c in rubric.criteria}
    missing = [
        tier.value
        for tier in Tier
        if tier in asked and (calibration is None or not calibration.tiers[tier].n)
    ]
    if missing:
        raise SpecificationError(
            f"grader: found {grader!r}, whose thresholds were not measured for {', '.join(missing)}"
            "; expected a reward model that was calibrated on rows with criteria of every tier of "
            "the rubrics (`calibration` in the recipe of `promedical rm train`), or "
            "allow_uncalibrated: true"
        )


class _OneAtATime:
    """A model in this process, which threads take turns at."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._lock = threading.Lock()

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: Literal["audit", "reward"] = "audit",
    ) -> Sequence[Grade]:
        with self._lock:
            return self._grader.grade(messages, responses, rubric, operating_point=operating_point)
