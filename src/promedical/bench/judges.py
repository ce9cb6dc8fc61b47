"""Language models as graders: verdicts, one rating, or a preference between two answers.

    judge, sub_criteria       the corpus's judge (`corpus.judge`): all criteria of an answer in one
                              call, or one call each (calls=criterion); met 1, unmet 0, cannot say ½
                              as a score, and no verdict
    judge, question|criteria  one rating of the answer on the suite's scale, without or with the
                              rubric's sentences
    pairwise                  two answers in both orders (Zheng et al. 2023, arXiv 2306.05685); a
                              preference that turns with the order is a tie

Gold verdicts are taken off the rows before anything is asked. What failed is kept with its reason.
Prompts are the project's own, in `prompts/`. Left to others: how other people's text is shown in
them (`corpus.fence`), sending and keeping replies (`llm`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from promedical.bench.graded import OVERALL, ResponseGrade, RowGrades
from promedical.bench.graders import asked
from promedical.bench.metrics import BenchError
from promedical.bench.specs import ASKS, Spec, endpoint_of
from promedical.bench.suites.suite import Rating
from promedical.corpus.fence import block, conversation, render
from promedical.corpus.judge import JudgeSettings, judge
from promedical.llm.calls import Asker, Call, Endpoint, Failure, Reply
from promedical.records import GradedInstruction, Response
from promedical.rubric import Rubric, Tier, Verdict

__all__ = ["JudgeGrader", "PairwiseGrader", "compare_call", "rate_call"]

BLOCK = 256  # rows whose calls are made and answered together
_rendered = partial(render, package="promedical.bench")
SCORES = {Verdict.MET: 1.0, Verdict.UNMET: 0.0, Verdict.ABSTAIN: 0.5}


class JudgeGrader:
    """A language model that judges answers.

    Args:
        spec: judge:MODEL@URL; calls=response (the default) or criterion.
        rating: the suite's scale, where it rates.
    """

    by_itself = True

    def __init__(self, spec: Spec, ask: str | None, rating: Rating, asker: Asker) -> None:
        self.endpoint = endpoint_of(spec, temperature=0.0)
        self.ask = asked(ask, ASKS, spec)
        self.rating, self.asker = rating, asker
        self.calls = spec.options.get("calls", "response")
        if self.calls not in ("response", "criterion"):
            raise BenchError(f"calls: found {self.calls!r}, expected response or criterion")

    def grade(self, rows: Sequence[GradedInstruction]) -> Iterator[RowGrades]:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            if self.ask == "sub_criteria":
                yield from self._verdicts(block)
            else:
                yield from self._ratings(block)

    def _verdicts(self, rows: Sequence[GradedInstruction]) -> Iterator[RowGrades]:
        settings = JudgeSettings(endpoints=(self.endpoint,), ask=self.calls, overwrite=True)
        blank = [
            row.with_responses(replace(r, verdicts={}, votes={}) for r in row.responses)
            for row in rows
        ]
        result = judge(blank, settings, asker=self.asker)
        judged = {row.id: row for row in result.rows}
        why = {
            (record["id"], record["response"]): record["errors"]
            for record in result.apart["judgments"]
        }
        for row in rows:
            found = {}
            for r in judged[row.id].responses if row.id in judged else ():
                failed = why.get((row.id, r.id), {})
                found[r.id] = ResponseGrade(
                    {c: SCORES[v] for c, v in r.verdicts.items() if v in SCORES},
                    dict(r.verdicts),
                    None,
                    {
                        c: failed.get(c, "failed")
                        for c, v in r.verdicts.items()
                        if v is Verdict.ERROR
                    },
                )
            yield RowGrades(row.id, found)

    def _ratings(self, rows: Sequence[GradedInstruction]) -> Iterator[RowGrades]:
        with_rubric = self.ask == "criteria"
        calls = {
            (row.id, r.id): rate_call(row, r, self.endpoint, self.rating, with_rubric)
            for row in rows
            for r in row.responses
        }
        replies = self.asker.ask(list(calls.values()), title="rate")
        for row in rows:
            found = {}
            for r in row.responses:
                reply = replies[calls[row.id, r.id].id]
                found[r.id] = (
                    ResponseGrade(failures={OVERALL: reply.kind})
                    if isinstance(reply, Failure)
                    else ResponseGrade(overall=float(reply.data["rating"]))
                )
            yield RowGrades(row.id, found)


class PairwiseGrader:
    """A language model that says which of two answers is better, asked in both orders."""

    by_itself = True

    def __init__(
        self,
        spec: Spec,
        ask: str | None,
        asker: Asker,
        pairs: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        """Args: pairs: row id → the answers to compare; every two of a row if None."""
        self.endpoint = endpoint_of(spec, temperature=0.0)
        self.ask = asked(ask or "question", ASKS[:2], spec)
        self.asker = asker
        self.pairs = pairs

    def grade(self, rows: Sequence[GradedInstruction]) -> Iterator[RowGrades]:
        for start in range(0, len(rows), BLOCK):
            yield from self._block(rows[start : start + BLOCK])

    def _pairs(self, row: GradedInstruction) -> list[tuple[str, str]]:
        if self.pairs is not None:
            return list(self.pairs.get(row.id, ()))
        return list(itertools.combinations([r.id for r in row.responses], 2))

    def _block(self, rows: Sequence[GradedInstruction]) -> Iterator[RowGrades]:
        with_rubric = self.ask == "criteria"
        calls: dict[tuple[str, str, str], Call] = {}
        for row in rows:
            answer = {r.id: r for r in row.responses}
            for a, b in self._pairs(row):
                for x, y in ((a, b), (b, a)):
                    call = compare_call(row, answer[x], answer[y], self.endpoint, with_rubric)
                    calls[row.id, x, y] = call
        replies = self.asker.ask(list(calls.values()), title="compare")
        for row in rows:
            preferences: dict[tuple[str, str], float] = {}
            failed: dict[tuple[str, str], str] = {}
            orders: dict[tuple[str, str], tuple[str, str]] = {}
            for a, b in self._pairs(row):
                both = [replies[calls[row.id, x, y].id] for x, y in ((a, b), (b, a))]
                said = [_said(reply) for reply in both]
                if None in said:
                    broken = next(r for r in both if isinstance(r, Failure))
                    failed[a, b] = broken.kind
                    continue
                forward, backward = (str(s) for s in said)
                orders[a, b] = (forward, backward)
                ahead = {"A": 1.0, "B": 0.0, "tie": 0.5}
                shown_first, shown_second = ahead[forward], 1 - ahead[backward]
                # Only what holds in both orders is a preference.
                preferences[a, b] = shown_first if shown_first == shown_second else 0.5
            yield RowGrades(row.id, {}, preferences, failed, orders)


def _said(reply: Reply | Failure) -> str | None:
    return None if isinstance(reply, Failure) else str(reply.data["better"])


# --- calls ----------------------------------------------------------------------------------------


def rate_call(
    row: GradedInstruction,
    response: Response,
    endpoint: Endpoint,
    rating: Rating,
    with_rubric: bool,
) -> Call:
    """The call that rates one answer."""
    places = _shown(row, with_rubric) | {
        "answer": block("answer", response.text),
        "low": str(rating.low),
        "high": str(rating.high),
    }
    scale = {"type": "integer", "minimum": rating.low, "maximum": rating.high}
    return Call(
        f"rate/{_in_path(row.id)}/{_in_path(response.id)}",
        endpoint,
        _rendered(rating.prompt, places),
        _closed("rating", scale),
    )


def compare_call(
    row: GradedInstruction,
    first: Response,
    second: Response,
    endpoint: Endpoint,
    with_rubric: bool,
) -> Call:
    """The call that compares two answers in one order."""
    places = _shown(row, with_rubric) | {
        "first": block("answer_A", first.text),
        "second": block("answer_B", second.text),
    }
    return Call(
        f"compare/{_in_path(row.id)}/{_in_path(first.id)}/{_in_path(second.id)}",
        endpoint,
        _rendered("compare", places),
        _closed("better", {"type": "string", "enum": ["A", "B", "tie"]}),
    )


def _shown(row: GradedInstruction, with_rubric: bool) -> dict[str, str]:
    """The places that every prompt has: the conversation, and the criteria or nothing."""
    criteria = ""
    if with_rubric:
        listed = block("statements", _listed(row.rubric))
        (message,) = _rendered("criteria", {"statements": listed})
        criteria = f"{message.content}\n\n"
    return {"conversation": conversation(row.messages), "criteria": criteria}


def _listed(rubric: Rubric | None) -> str:
    if rubric is None:
        raise BenchError("rubric: found none, so nothing can be shown beside the question")
    heads = {
        Tier.VETO: "must not be true",
        Tier.PROFICIENCY: "should be true",
        Tier.EXCELLENCE: "makes it better",
    }
    return "\n".join(
        f"- ({head}) {' '.join(c.text.split())}"
        for tier, head in heads.items()
        for c in rubric.tier(tier)
    )


def _in_path(part: str) -> str:
    return part.replace("%", "%25").replace("/", "%2F")


def _closed(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: dict(value)},
        "required": [name],
        "additionalProperties": False,
    }
