"""Readers who leave a round: what they had not begun goes to others.

An account that is locked keeps what it finished. Its items that were not begun get another first
reader of the same round, or another adjudicator; items that it had begun stay, because two people's
work must not become one reading, and are counted for the lead. Left to others: locking an account
(`accounts`), the first hand-out (`adjudication`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from promedical.review import audit_log
from promedical.review.adjudication import assign_thirds
from promedical.review.tables import Assignment, Item, Reviewer, now

__all__ = ["HandedOn", "hand_on", "left_behind"]


@dataclass(frozen=True)
class HandedOn:
    """What became of the unfinished work of locked accounts.

    Args:
        moved: readings that somebody else has now.
        begun: readings that were begun, and stay.
        nobody: readings for which there is nobody else.
    """

    moved: int
    begun: int
    nobody: int


def left_behind(session: Session, round_id: str) -> list[Assignment]:
    """Unfinished readings of locked accounts in a round."""
    return list(
        session.scalars(
            select(Assignment)
            .join(Item, Item.id == Assignment.item_id)
            .join(Reviewer, Reviewer.id == Assignment.reviewer_id)
            .where(
                Item.round_id == round_id,
                Item.removed_at.is_(None),
                Assignment.state != "done",
                Reviewer.active.is_(False),
            )
            .order_by(Item.position)
        )
    )


def hand_on(session: Session, round_id: str, *, actor_id: str = "system") -> HandedOn:
    """Give what locked accounts had not begun to others, and waiting items to a third reader.

    Args:
        session: of `Database.write()`.
        actor_id: the lead.
    """
    moved = begun = nobody = 0
    for assignment in left_behind(session, round_id):
        if assignment.version > 0:
            begun += 1
            continue
        other = _somebody_else(session, assignment, round_id)
        if other is None:
            nobody += 1
            continue
        assignment.reviewer_id = other
        assignment.assigned = now()
        session.flush()
        moved += 1
    thirds = assign_thirds(session, round_id)
    if moved or thirds:
        audit_log.record(session, actor_id, "readings.hand_on", f"round:{round_id}")
    return HandedOn(moved, begun, nobody)


def _somebody_else(session: Session, assignment: Assignment, round_id: str) -> str | None:
    """Who of those who may has the fewest unfinished readings; None if there is nobody."""
    on_it = select(Assignment.reviewer_id).where(Assignment.item_id == assignment.item_id)
    may = select(Reviewer.id).where(Reviewer.active, Reviewer.id.not_in(on_it))
    if assignment.part == "third":
        may = may.where(Reviewer.role == "adjudicator")
    else:
        may = may.where(
            Reviewer.id.in_(
                select(Assignment.reviewer_id)
                .join(Item, Item.id == Assignment.item_id)
                .where(Item.round_id == round_id, Assignment.part == "first")
            )
        )
    candidates = list(session.scalars(may))
    if not candidates:
        return None
    load: dict[str, int] = dict(
        session.execute(
            select(Assignment.reviewer_id, func.count())
            .where(Assignment.reviewer_id.in_(candidates), Assignment.state != "done")
            .group_by(Assignment.reviewer_id)
        )
        .tuples()
        .all()
    )
    least = min(load.get(one, 0) for one in candidates)
    return secrets.choice(sorted(one for one in candidates if load.get(one, 0) == least))
