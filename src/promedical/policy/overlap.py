"""Grading while the step goes on: each part of a step's answers as soon as it is there.

TRL asks for rewards when all answers of a step have been generated and their log-probabilities
computed. Here the groups are generated in parts, and a part is graded in a thread of its own while
the next one is generated and while log-probabilities are computed; when TRL asks, the grades are
there or nearly so. A grade is the same, whenever it is made. This is worth it where the grader
computes elsewhere (a server, another GPU); two cores that are busy have nothing to overlap.

Answers are sampled part by part, so other answers are drawn than without parts, and a run's parts
may not change. Left to others: grading itself, the reward (`rewards`), TRL's trainers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from promedical.policy.rewards import Grade, Grader
from promedical.records import Message
from promedical.rubric import Rubric

__all__ = ["Ahead", "grading_ahead"]


class Ahead:
    """A grader that may be told of answers before it is asked for their grades.

    All grading is done in one thread, in the order of the asking.

    Args:
        grader: who grades.
    """

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._begun: dict[Any, list[Future[Sequence[Grade]]]] = {}

    def begin(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: Any,
    ) -> None:
        """Begin to grade what `grade` will be asked for with the same arguments."""
        key = _key(messages, responses, rubric, operating_point)
        future = self._submit(messages, responses, rubric, operating_point)
        self._begun.setdefault(key, []).append(future)

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: Any = "audit",
    ) -> Sequence[Grade]:
        """One grade an answer, in order; what was begun is waited for."""
        key = _key(messages, responses, rubric, operating_point)
        begun = self._begun.get(key)
        if begun:
            future = begun.pop(0)
            if not begun:
                del self._begun[key]
        else:
            future = self._submit(messages, responses, rubric, operating_point)
        return future.result()

    def forget(self) -> int:
        """Drop what was begun and not asked for; how many groups that were."""
        left = sum(len(futures) for futures in self._begun.values())
        self._begun.clear()
        return left

    def _submit(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        operating_point: Any,
    ) -> Future[Sequence[Grade]]:
        return self._thread.submit(
            self.grader.grade,
            messages,
            list(responses),
            rubric,
            operating_point=operating_point,
        )


def grading_ahead(
    trainer_class: Any,
    ahead: Ahead,
    rubrics: Mapping[str, tuple[Sequence[Message], Rubric]],
    operating_point: Any,
    parts: int,
) -> Any:
    """TRL's GRPO or RLOO trainer that generates in parts, and has each graded at once.

    Args:
        trainer_class: GRPOTrainer or RLOOTrainer of TRL 1.16, of which two methods are extended.
        ahead: the grader that the reward asks later.
        rubrics: instruction id → (conversation, rubric).
        operating_point: the reward's.
        parts: how many.
    """

    class GradingAhead(trainer_class):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            ahead.forget()
            self._ids_of_step = [row["instruction_id"] for row in inputs]
            return super()._generate_and_score_completions(inputs)

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **named: Any) -> Any:
            ids: list[str] = self._ids_of_step
            answers: list[Any] = []
            logprobs: list[Any] | None = None
            alone = True
            for first, last in cuts(ids, parts):
                made = super()._generate_single_turn(prompt_ids[first:last], *rest, **named)
                alone = not isinstance(made, tuple)  # RLOO gives no log-probabilities
                part, of_part = (made, None) if alone else made
                answers += part
                if of_part is not None:
                    logprobs = [*(logprobs or []), *of_part]
                self._begin(ids[first:last], part)
            return answers if alone else (answers, logprobs)

        def _begin(self, ids: Sequence[str], answers: Sequence[Any]) -> None:
            texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
            for key in dict.fromkeys(ids):
                messages, rubric = rubrics[key]
                group = [text for text, own in zip(texts, ids, strict=True) if own == key]
                ahead.begin(messages, group, rubric, operating_point=operating_point)

    GradingAhead.__name__ = trainer_class.__name__
    return GradingAhead


def cuts(ids: Sequence[str], parts: int) -> list[tuple[int, int]]:
    """Where to cut a step's answers into at most so many parts, never within a group.

    Args:
        ids: the instruction of each answer, group after group.

    Returns:
        (first, last + 1) of each part.
    """
    starts = [i for i, key in enumerate(ids) if i == 0 or key != ids[i - 1]]
    parts = min(parts, len(starts))
    bounds = [starts[len(starts) * n // parts] for n in range(parts)] + [len(ids)]
    return list(itertools.pairwise(bounds))


def _key(
    messages: Sequence[Message], responses: Sequence[str], rubric: Rubric, operating_point: Any
) -> Any:
    return tuple(messages), tuple(responses), rubric, operating_point
