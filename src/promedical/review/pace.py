"""How long a reviewer takes for a criterion, so that a lead sees who cannot have been reading.

The time of a finished item over the judgments it asks for: the criteria of its draft rubric, or
criteria times responses. The median over a reviewer's items is theirs; under two seconds it is
shown to the lead with a mark. Nobody is judged by it automatically.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from promedical.review.tables import Assignment, Item

__all__ = ["TOO_FAST", "Pace", "judgments_of", "paces"]

TOO_FAST = 2.0


@dataclass(frozen=True)
class Pace:
    """How much and how fast.

    Args:
        assigned: items in all.
        done: items finished.
        seconds: median seconds a criterion over finished items, or None before the first.
    """

    assigned: int
    done: int
    seconds: float | None

    @property
    def too_fast(self) -> bool:
        """Whether the median is under two seconds."""
        return self.seconds is not None and self.seconds < TOO_FAST


def judgments_of(content: Mapping[str, Any]) -> int:
    """Judgments that an item asks for, at least 1."""
    criteria = len((content.get("rubric") or {}).get("criteria") or [])
    return max(1, criteria * max(1, len(content.get("responses") or [])))


def paces(session: Session) -> dict[str, Pace]:
    """The pace of every reviewer who was given an item, by id."""
    assigned = dict(
        session.execute(
            select(Assignment.reviewer_id, func.count()).group_by(Assignment.reviewer_id)
        )
        .tuples()
        .all()
    )
    times: dict[str, list[float]] = defaultdict(list)
    done: dict[str, int] = defaultdict(int)
    finished = (
        select(Assignment.reviewer_id, Assignment.seconds, Item.content, Item.removed_at)
        .join(Item, Item.id == Assignment.item_id)
        .where(Assignment.state == "done")
    )
    for reviewer_id, seconds, content, removed_at in session.execute(finished):
        done[reviewer_id] += 1
        if removed_at is None:
            times[reviewer_id].append(seconds / judgments_of(content))
    return {
        who: Pace(count, done[who], median(times[who]) if times[who] else None)
        for who, count in assigned.items()
    }
