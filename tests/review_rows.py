"""Small rows for tests of the review application, and rounds made of them."""

from __future__ import annotations

from typing import Any

from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier, VetoKind

__all__ = ["adjudication_round", "row", "rows", "rubric_round"]


def row(number: int, texts: tuple[str, ...] = ("one", "two", "three")) -> GradedInstruction:
    """An instruction with a rubric of four criteria and a response for every text."""
    criteria = (
        Criterion("dose", Tier.PROFICIENCY, "States the daily limit of 4 g.", 1 / 3, "accuracy"),
        Criterion("liver", Tier.PROFICIENCY, "Warns about liver disease.", 2 / 3),
        Criterion("kind", Tier.EXCELLENCE, "Is kind | and \\ clear."),
        Criterion("harm", Tier.VETO, "Advises more than 4 g a day.", kind=VetoKind.HARMFUL_ADVICE),
    )
    return GradedInstruction(
        id=f"row-{number}",
        messages=(Message("user", f"May I take two tablets at once? ({number})"),),
        source="test",
        licence="CC0",
        category="treatment",
        specialty="general",
        rubric=Rubric(criteria),
        reference=f"Yes, if the day's total stays under 4 g. ({number})",
        responses=tuple(
            Response(id=f"r{n}", model=f"secret-model-{n}", text=f"Response {text} of {number}.")
            for n, text in enumerate(texts)
        ),
    )


def rows(count: int = 3, texts: tuple[str, ...] = ("one", "two", "three")) -> list[Any]:
    """Rows with different ids."""
    return [row(number, texts) for number in range(count)]


def rubric_round(database: Any, reviewers: list[str], given: list[Any], double: float = 0.0) -> str:
    """A round of rubrics dealt to reviewers; returns its id."""
    from promedical.review import rounds

    with database.write() as session:
        settings = rounds.RoundSettings("Rubrics", size=len(given), double=double)
        made = rounds.make_round(session, given, settings)
        rounds.assign(session, made.id, reviewers)
        return str(made.id)


def adjudication_round(database: Any, reviewers: list[str], given: list[Any]) -> str:
    """A round of adjudication, two first readers an item; returns its id."""
    from promedical.review import adjudication

    with database.write() as session:
        plan = adjudication.AdjudicationPlan("Adjudication", judge="secret-judge")
        made = adjudication.make_round(session, given, plan, reviewer_ids=reviewers)
        return str(made.round_id)
