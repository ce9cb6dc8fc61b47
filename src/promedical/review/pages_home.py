"""The first page after the login: a reviewer's work, and for the lead all rounds and what is odd.

Left to others: a round's own pages (`pages_rounds`, `pages_adjudication`), people
(`pages_accounts`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from promedical.review.pace import paces
from promedical.review.pages import render
from promedical.review.security import NotFound, Person, current_reviewer, database_of
from promedical.review.tables import Assignment, AuditEvent, Change, Item, Reviewer, Round

__all__ = ["item_address", "round_address", "router"]

Anyone = Annotated[Person, Depends(current_reviewer)]


@dataclass(frozen=True)
class Work:
    """A reviewer's part of a round.

    Args:
        round: the round.
        items: (assignment id, position from 1, specialty, state, part) in order.
        done: how many are finished.
        next_id: assignment to go on with, or None if all are finished.
    """

    round: Round
    items: list[tuple[str, int, str | None, str, str]]
    done: int
    next_id: str | None


@dataclass(frozen=True)
class Progress:
    """A round as the lead sees it.

    Args:
        round: the round.
        items: not removed.
        assigned: assignments of them.
        done: finished ones.
        reviewers: people who have any.
    """

    round: Round
    items: int
    assigned: int
    done: int
    reviewers: int


def router() -> APIRouter:
    """Routes of this module."""
    routes = APIRouter()
    routes.get("/")(home)
    routes.get("/rounds-live")(rounds_live)
    routes.get("/next/{round_id}")(next_item)
    routes.get("/storage")(storage)
    return routes


def item_address(kind: str, assignment_id: str) -> str:
    """Where a reviewer works on an item."""
    return f"/{'rubrics' if kind == 'rubrics' else 'adjudications'}/{assignment_id}"


def round_address(kind: str, round_id: str) -> str:
    """Where the lead sees a round."""
    return f"/{'rounds' if kind == 'rubrics' else 'adjudication-rounds'}/{round_id}"


def home(request: Request, person: Anyone) -> Response:
    """One's work; for a lead also every round."""
    with database_of(request).read() as session:
        work = _work(session, person.id)
        rounds = _progress(session) if person.is_lead else []
        fast = _too_fast(session) if person.is_lead else []
    return render(
        request,
        "home.html",
        person,
        work=work,
        rounds=rounds,
        fast=fast,
        item_address=item_address,
        round_address=round_address,
    )


def rounds_live(request: Request, person: Anyone) -> Response:
    """The lead's table of rounds alone, which the page asks for again every few seconds."""
    if not person.is_lead:
        raise NotFound
    with database_of(request).read() as session:
        rounds = _progress(session)
    return render(request, "_rounds.html", person, rounds=rounds, round_address=round_address)


def next_item(request: Request, round_id: str, person: Anyone) -> Response:
    """On to the first item of a round that one has not finished; home if there is none."""
    with database_of(request).read() as session:
        work = [w for w in _work(session, person.id) if w.round.id == round_id]
    if not work or work[0].next_id is None:
        return RedirectResponse("/", status_code=303)
    return RedirectResponse(item_address(work[0].round.kind, work[0].next_id), status_code=303)


def storage(request: Request, person: Anyone) -> Response:
    """What is stored where, and how it is removed."""
    database = database_of(request)
    tables = (Reviewer, Round, Item, Assignment, Change, AuditEvent)
    with database.read() as session:
        counts = {
            table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0
            for table in tables
        }
    where = "SQLite" if database.sqlite else "PostgreSQL"
    # A path tells about the machine; the lead knows it from the command that started the server.
    name = Path(database.path).name if database.path else database.url.database
    settings = request.app.state.settings
    return render(
        request, "storage.html", person, counts=counts, kind=where, name=name, settings=settings
    )


def _work(session: Session, reviewer_id: str) -> list[Work]:
    # Not whole assignments: their answers are most of what the database holds.
    found = session.execute(
        select(Item.round_id, Assignment.id, Item.specialty, Assignment.state, Assignment.part)
        .join(Item, Item.id == Assignment.item_id)
        .join(Round, Round.id == Item.round_id)
        .where(Assignment.reviewer_id == reviewer_id, Item.removed_at.is_(None))
        .order_by(Round.created, Round.id, Item.position, Assignment.id)
    ).all()
    items: dict[str, list[Any]] = defaultdict(list)
    for round_id, assignment_id, specialty, state, part in found:
        number = len(items[round_id]) + 1
        items[round_id].append((assignment_id, number, specialty, state, part))
    rounds = {r.id: r for r in session.scalars(select(Round).where(Round.id.in_(items)))}
    work = []
    for round_id, entries in items.items():
        open_ids = [e[0] for e in entries if e[3] != "done"]
        done = len(entries) - len(open_ids)
        going = bool(open_ids) and rounds[round_id].state == "open"
        work.append(Work(rounds[round_id], entries, done, open_ids[0] if going else None))
    return sorted(work, key=lambda w: (w.next_id is None, w.round.state != "open"))


def _progress(session: Session) -> list[Progress]:
    done = func.sum(case((Assignment.state == "done", 1), else_=0))
    figures = session.execute(
        select(
            Item.round_id,
            func.count(Item.id.distinct()),
            func.count(Assignment.id),
            done,
            func.count(Assignment.reviewer_id.distinct()),
        )
        .outerjoin(Assignment, Assignment.item_id == Item.id)
        .where(Item.removed_at.is_(None))
        .group_by(Item.round_id)
    ).all()
    by_round = {row[0]: row[1:] for row in figures}
    rounds = session.scalars(select(Round).order_by(Round.state.desc(), Round.created.desc()))
    return [Progress(r, *(int(n or 0) for n in by_round.get(r.id, (0, 0, 0, 0)))) for r in rounds]


def _too_fast(session: Session) -> list[tuple[str, float]]:
    names = dict(session.execute(select(Reviewer.id, Reviewer.name)).tuples().all())
    return [
        (names[who], pace.seconds)
        for who, pace in paces(session).items()
        if pace.too_fast and pace.seconds is not None
    ]
