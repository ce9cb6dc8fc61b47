"""Rows about Mrs Miller, and a grader that judges by an answer's letters; fails where told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promedical.records import GradedInstruction, Message
from promedical.rubric import Criterion, Rubric, Scores, Tier, Verdict, VetoKind, score

SECRET = "Mrs Miller of 5 Elm Street"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It has an even number of characters.", 0.7),
        Criterion("p2", Tier.PROFICIENCY, "It has an a.", 0.3),
        Criterion("e1", Tier.EXCELLENCE, "It has a b."),
        Criterion("v1", Tier.VETO, "It has an upper case letter.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("v2", Tier.VETO, "It is empty."),
    )
)
OTHER = Rubric((Criterion("q", Tier.PROFICIENCY, "It is odd.", 1.0), *RUBRIC.criteria[2:]))


def asked(name: str, rubric: Rubric = RUBRIC) -> GradedInstruction:
    return GradedInstruction(name, (Message("user", f"{SECRET}, {name}?"),), "t", "none", rubric)


ROWS = [asked(f"q{i}") for i in range(3)]
HELD = [asked(f"h{i}", OTHER) for i in range(14)]


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores


class Killed(BaseException):
    """Stands for the signal that ends a process."""


class TextGrader:
    """Judges by the letters of the answer; fails, or is killed, where told to."""

    def __init__(self, kill_at: int | None = None, fail: Callable[[str], bool] | None = None):
        self.kill_at, self.fail = kill_at, fail
        self.calls = 0

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        assert operating_point == "reward"
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        if self.fail is not None and self.fail(messages[-1].content):
            raise RuntimeError(f"cannot read {responses[0]}")
        grades = []
        for text in responses:
            facts = {
                "p1": len(text) % 2 == 0,
                "q": len(text) % 2 == 1,
                "p2": "a" in text,
                "e1": "b" in text,
                "v1": text[:3] != text[:3].lower(),
                "v2": not text,
            }
            verdicts = {
                c.id: Verdict.MET if facts[c.id] else Verdict.UNMET for c in rubric.criteria
            }
            grades.append(FakeGrade(verdicts, score(rubric, verdicts)))
        return grades
