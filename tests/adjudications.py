"""Rows, rounds and answers that the tests of adjudication share."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from promedical.records import GradedInstruction, Message, Response
from promedical.review import saves
from promedical.review.adjudication import AdjudicationPlan, MadeRound, make_round
from promedical.review.adjudication_answer import blind_of, pairs_of, wanted_criteria
from promedical.review.tables import Assignment, Item
from promedical.rubric import Criterion, Rubric, Tier, Verdict, VetoKind

MODELS = ("vendor-a/Quasar-70B", "Nimbus-2")
JUDGE = "Arbiter-XL"


def rubric() -> Rubric:
    """Two of proficiency, one bonus, one veto."""
    return Rubric(
        (
            Criterion("dose", Tier.PROFICIENCY, "States the usual adult dose.", 0.6, "accuracy"),
            Criterion("food", Tier.PROFICIENCY, "Says to take it with food.", 0.4, "completeness"),
            Criterion("kind", Tier.EXCELLENCE, "Acknowledges the worry.", axis="empathy"),
            Criterion(
                "harm",
                Tier.VETO,
                "Advises to double the dose if pain goes on.",
                kind=VetoKind.HARMFUL_ADVICE,
                axis="safety",
            ),
        )
    )


def graded(n: int, *, responses: int = 2, judged: bool = True) -> GradedInstruction:
    """An instruction with responses and a judge's verdicts."""
    verdicts = dict.fromkeys(("dose", "food", "kind"), Verdict.MET) | {"harm": Verdict.UNMET}
    return GradedInstruction(
        id=f"row-{n:03}",
        messages=(Message("user", f"How much of drug number {n} may I take for my knee?"),),
        source="made-up",
        licence="CC0-1.0",
        rubric=rubric(),
        reference="Up to three tablets a day with meals.",
        category="treatment",
        specialty=("rheumatology", "pharmacy")[n % 2],
        responses=tuple(
            Response(
                f"r{i}",
                MODELS[i % 2] if i < 2 else f"Model-{i}",
                f"Take tablet {n} {'twice' if i else 'once'} a day, with a meal. Text {i}.",
                verdicts if judged else {},
            )
            for i in range(responses)
        ),
    )


def new_round(
    database: Any, rows: Sequence[GradedInstruction], reviewers: Sequence[str], **plan: Any
) -> MadeRound:
    """A round, committed."""
    with database.write() as session:
        return make_round(
            session,
            rows,
            AdjudicationPlan(plan.pop("name", "Pilot"), judge=plan.pop("judge", JUDGE), **plan),
            reviewer_ids=list(reviewers),
        )


Judgment = Callable[[str, str], str | tuple[str, bool]]


def answer_of(
    content: Mapping[str, Any],
    before: Mapping[str, Any],
    part: str,
    judge: Judgment,
    *,
    order: Sequence[str] = (),
    choice: str = "first_better",
) -> dict[str, Any]:
    """A whole answer; `judge(response text, criterion id)` gives a vote, or it and the flag."""
    text = {r["key"]: r["text"] for r in content["responses"]}
    verdicts: dict[str, Any] = {}
    disputed: dict[str, Any] = {}
    for key, ids in wanted_criteria(content, before, part).items():
        for criterion in ids:
            vote = judge(text[key], criterion)
            v, flag = vote if isinstance(vote, tuple) else (vote, False)
            verdicts.setdefault(key, {})[criterion] = {"v": v, "note": ""}
            if flag:
                disputed.setdefault(key, {})[criterion] = True
    answer = {"verdicts": verdicts, "disputed": disputed, "dangers": {}}
    if part == "third":
        return {**answer, "asked": before["asked"], "blind": None}
    keys = list(order) or [r["key"] for r in content["responses"]]
    preference = {f"{a}|{b}": choice for a, b in pairs_of(keys)}
    return {**answer, "preference": preference, "preference_given": True}


def put(
    database: Any, assignment: Assignment, answer: Mapping[str, Any], **more: Any
) -> saves.Saved:
    """Save as the endpoint does."""
    with database.write() as session:
        return saves.save(
            session,
            assignment.id,
            assignment.reviewer_id,
            base=more.pop("base"),
            save_id=uuid.uuid4().hex,
            answer=dict(answer),
            seconds=more.pop("seconds", 30.0),
            state="done" if more.pop("finish", False) else None,
        )


def given(database: Any, reviewer_id: str) -> list[tuple[Assignment, Item]]:
    """A reviewer's open assignments with their items."""
    with database.read() as session:
        return [
            (a, i)
            for a, i in session.execute(
                select(Assignment, Item)
                .join(Item, Item.id == Assignment.item_id)
                .where(Assignment.reviewer_id == reviewer_id, Assignment.state != "done")
                .order_by(Item.position)
            ).all()
        ]


def read_all(
    database: Any, reviewer_id: str, judge: Judgment, *, choice: str = "first_better", **more: Any
) -> int:
    """Finish everything that a reviewer was given; a third reader does not change their mind."""
    mine = given(database, reviewer_id)
    for assignment, item in mine:
        answer = answer_of(
            item.content,
            assignment.answer,
            assignment.part,
            judge,
            order=assignment.response_order,
            choice=choice,
        )
        base = assignment.version
        if assignment.part == "third":
            answer = {**answer, "blind": blind_of(answer)}
            base = put(database, assignment, answer, base=base, **more).version
        put(database, assignment, answer, base=base, finish=True, **more)
    return len(mine)
