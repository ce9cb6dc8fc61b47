"""How a rubric round stands: strict pass rate, time, what is edited most, and each reviewer.

Section 3, step 6. The strict pass rate is the share of items that all their reviewers accepted
without an edit, over the items that all of them finished; its interval is Wilson's. An edit is what
a person did, not what re-normalisation did to the other weights (`drafts.diff`). Left to others:
what became of an item (`rounds.outcome`), the page (`pages_rounds`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from promedical.review import drafts
from promedical.review.pace import TOO_FAST
from promedical.review.rounds import outcome
from promedical.review.tables import Assignment, Item

__all__ = ["FigureOfRound", "ReviewerFigure", "figures", "wilson"]


@dataclass(frozen=True)
class ReviewerFigure:
    """How one reviewer of a round stands.

    Args:
        reviewer_id, name: who.
        assigned, done: numbers of items.
        accepted: how many they accepted without an edit.
        seconds: median of an item; None before the first.
        per_criterion: median of seconds an item over its criteria.
    """

    reviewer_id: str
    name: str
    assigned: int
    done: int
    accepted: int
    seconds: float | None
    per_criterion: float | None

    @property
    def too_fast(self) -> bool:
        """Whether the median per criterion is one in which nobody reads."""
        return self.per_criterion is not None and self.per_criterion < TOO_FAST


@dataclass(frozen=True)
class FigureOfRound:
    """How a round stands.

    Args:
        items: not removed.
        states: outcome → number of items.
        reviews, reviews_done: assignments of reviewers.
        passed, judged: items accepted without an edit, of those that all reviewers finished.
        low, high: Wilson's 95 % interval of passed / judged; None before the first.
        seconds: median time of one review; None before the first.
        edits: (tier, axis, kind of edit) → how many criteria, most first.
        edited_reviews: reviews with an edit.
        reviewers: one each, by name.
    """

    items: int
    states: Mapping[str, int]
    reviews: int
    reviews_done: int
    passed: int
    judged: int
    low: float | None
    high: float | None
    seconds: float | None
    edits: Mapping[tuple[str, str, str], int]
    edited_reviews: int
    reviewers: tuple[ReviewerFigure, ...]

    @property
    def rate(self) -> float | None:
        """Strict pass rate."""
        return self.passed / self.judged if self.judged else None


def figures(items: Sequence[Item]) -> FigureOfRound:
    """How a round stands, from its items (`items_of`)."""
    outcomes = [outcome(item) for item in items]
    judged = [o.passed for o in outcomes if o.passed is not None]
    reviews = [(item, a) for item in items for a in item.assignments if a.part == "rubric"]
    done = [(item, a) for item, a in reviews if a.state == "done"]
    edits: Counter[tuple[str, str, str]] = Counter()
    touched = 0
    for item, a in done:
        found = _edits(item, a)
        edits.update(found)
        touched += bool(found)
    low, high = wilson(sum(judged), len(judged)) if judged else (None, None)
    return FigureOfRound(
        items=len(items),
        states=Counter(o.state for o in outcomes),
        reviews=len(reviews),
        reviews_done=len(done),
        passed=sum(judged),
        judged=len(judged),
        low=low,
        high=high,
        seconds=_median([a.seconds for _, a in done]),
        edits=dict(sorted(edits.items(), key=lambda entry: (-entry[1], entry[0]))),
        edited_reviews=touched,
        reviewers=_reviewer_figures(reviews),
    )


def wilson(passed: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), which holds near 0 and 1 too.

    Args:
        passed, n: k of n, n ≥ 1.
        z: 1.96 for 95 %.
    """
    p = passed / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if passed == 0 else middle - half
    return low, 1.0 if passed == n else middle + half


def _edits(item: Item, assignment: Assignment) -> list[tuple[str, str, str]]:
    """(tier, axis, kind of edit), by the draft's tier and axis where there is one."""
    before = drafts.opened(item.content["rubric"]["criteria"])
    after = drafts.from_json(assignment.answer["criteria"])
    by_id = {c.id: c for c in (*after, *before)}
    return [
        (by_id[e.criterion].tier, by_id[e.criterion].axis or "", e.what)
        for e in drafts.diff(before, after)
        if e.what in drafts.COUNTED
    ]


def _reviewer_figures(reviews: Sequence[tuple[Item, Assignment]]) -> tuple[ReviewerFigure, ...]:
    by_person: defaultdict[str, list[tuple[Item, Assignment]]] = defaultdict(list)
    for item, a in reviews:
        by_person[a.reviewer_id].append((item, a))
    found = []
    for id, theirs in by_person.items():
        done = [(item, a) for item, a in theirs if a.state == "done"]
        sizes = [max(1, len(item.content["rubric"]["criteria"])) for item, _ in done]
        found.append(
            ReviewerFigure(
                reviewer_id=id,
                name=theirs[0][1].reviewer.name,
                assigned=len(theirs),
                done=len(done),
                accepted=sum(a.answer["decision"] == "accept" for _, a in done),
                seconds=_median([a.seconds for _, a in done]),
                per_criterion=_median(
                    [a.seconds / n for (_, a), n in zip(done, sizes, strict=True)]
                ),
            )
        )
    return tuple(sorted(found, key=lambda figure: (figure.name, figure.reviewer_id)))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
