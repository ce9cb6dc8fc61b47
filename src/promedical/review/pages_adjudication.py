"""Pages of double-blind adjudication: a reviewer's item, and the lead's view of a round.

A reviewer's page is made of `adjudication_view.view_of` alone. Only the lead's pages read who wrote
a response, what a judge said, and who voted how. Live figures are calculated when something was
finished since, and kept; the page of a large round asks for them once it is shown. Left to others:
saving (`saves`), the lists of work (`pages_home`).
"""

from __future__ import annotations

import io
import json
import tempfile
import threading
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from promedical.records import GradedInstruction, RecordError, read_jsonl
from promedical.review import audit_log
from promedical.review.adjudication import (
    AdjudicationError,
    AdjudicationPlan,
    MadeRound,
    Reading,
    ReadItem,
    dangers,
    make_round,
    read_items,
    settle_danger,
)
from promedical.review.adjudication_answer import ballots_of
from promedical.review.adjudication_people import hand_on, left_behind
from promedical.review.adjudication_view import others_of, view_of
from promedical.review.agreement_live import live_agreement
from promedical.review.bench_export import danger_lines, export_bench, pseudonyms
from promedical.review.consensus import Ballot, Standing
from promedical.review.pace import TOO_FAST
from promedical.review.pages import render
from promedical.review.security import (
    NotFound,
    Person,
    current_reviewer,
    database_of,
    require_role,
)
from promedical.review.tables import Assignment, Item, Reviewer, Round, now

__all__ = ["router"]

Anyone = Annotated[Person, Depends(current_reviewer)]
Lead = Annotated[Person, Depends(require_role("lead"))]
Json = dict[str, Any]

LIVE_RESAMPLES = 500
# Calculating takes at most about this share of one core while a round is busy.
SHARE = 0.1
# So many finished readings are calculated while the page waits; for more, the page asks afterwards.
AT_ONCE = 100


def router() -> APIRouter:
    """Routes of this module."""
    routes = APIRouter()
    routes.get("/adjudications/{assignment_id}")(item_page)
    routes.get("/adjudication-rounds/new")(new_page)
    routes.post("/adjudication-rounds/new")(new_round)
    routes.get("/adjudication-rounds/{round_id}")(round_page)
    routes.get("/adjudication-rounds/{round_id}/live")(live_part)
    routes.get("/adjudication-rounds/{round_id}/items/{item_id}")(votes_page)
    routes.post("/adjudication-rounds/{round_id}/thirds")(hand_out)
    routes.post("/adjudication-rounds/{round_id}/dangers")(settle)
    routes.post("/adjudication-rounds/{round_id}/state")(set_state)
    routes.get("/adjudication-rounds/{round_id}/bench.zip")(bench_zip)
    routes.get("/adjudication-rounds/{round_id}/veto_candidates.jsonl")(candidates)
    return routes


# --- a reviewer's item ----------------------------------------------------------------------------


def item_page(request: Request, assignment_id: str, person: Anyone) -> Response:
    """One's own part of one item, as far as what is stored allows it to be shown."""
    with database_of(request).read() as session:
        assignment = session.get(Assignment, assignment_id)
        if assignment is None or assignment.reviewer_id != person.id:
            raise NotFound
        item = session.get_one(Item, assignment.item_id)
        if item.removed_at is not None or assignment.part not in ("first", "third"):
            raise NotFound
        others = None
        if assignment.part == "third" and assignment.answer.get("blind") is not None:
            others = others_of(_first_votes(session, assignment), assignment.id)
        closed = session.get_one(Round, item.round_id).state != "open"
        view = view_of(
            item.content,
            assignment_id=assignment.id,
            order=assignment.response_order,
            answer=assignment.answer,
            part=assignment.part,
            version=assignment.version,
            state="done" if closed else assignment.state,
            others=others,
        )
    return render(
        request,
        "adjudication_item.html",
        person,
        view=view,
        next=f"/next/{item.round_id}",
        whole=False,
    )


def _first_votes(session: Session, assignment: Assignment) -> dict[tuple[str, str], list[Ballot]]:
    """The finished first readers' votes on what this third reader was asked."""
    asked = {(k, c) for k, ids in (assignment.answer.get("asked") or {}).items() for c in ids}
    found: dict[tuple[str, str], list[Ballot]] = defaultdict(list)
    firsts = session.scalars(
        select(Assignment).where(
            Assignment.item_id == assignment.item_id,
            Assignment.part == "first",
            Assignment.state == "done",
        )
    )
    for first in firsts:
        for leaf, ballot in ballots_of(first.answer, first.reviewer_id, "first").items():
            if leaf in asked:
                found[leaf].append(ballot)
    return found


# --- making a round -------------------------------------------------------------------------------


def _reviewers(session: Session) -> list[Reviewer]:
    return list(
        session.scalars(
            select(Reviewer)
            .where(Reviewer.active, Reviewer.role == "reviewer")
            .order_by(Reviewer.name)
        )
    )


def _new(request: Request, person: Person, status: int = 200, **more: Any) -> Response:
    with database_of(request).read() as session:
        reviewers = _reviewers(session)
    given = {"name": "", "readers": 2, "limit": 0, "judge": "", "chosen": None} | more.pop(
        "given", {}
    )
    return render(
        request,
        "adjudication_new.html",
        person,
        status=status,
        reviewers=reviewers,
        given=given,
        problem=more.get("problem"),
    )


def new_page(request: Request, person: Lead) -> Response:
    """The form for a new round."""
    return _new(request, person)


def new_round(
    request: Request,
    person: Lead,
    rows: Annotated[UploadFile, File()],
    name: Annotated[str, Form()] = "",
    readers: Annotated[int, Form()] = 2,
    limit: Annotated[int, Form()] = 0,
    judge: Annotated[str, Form()] = "",
    reviewers: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """Make a round of an uploaded file."""
    given = {
        "name": name,
        "readers": readers,
        "limit": limit,
        "judge": judge,
        "chosen": reviewers or [],
    }
    try:
        plan = AdjudicationPlan(name, readers, limit, judge=judge.strip())
        found = _uploaded(rows)
        with database_of(request).write() as session:
            made = make_round(
                session, found, plan, created_by=person.id, reviewer_ids=reviewers or []
            )
    except (AdjudicationError, RecordError) as error:
        return _new(request, person, status=400, given=given, problem=str(error))
    _notices(request)[made.round_id] = made
    return RedirectResponse(f"/adjudication-rounds/{made.round_id}", status_code=303)


def _uploaded(rows: UploadFile) -> list[GradedInstruction]:
    """Rows of an uploaded file; errors name it as the person knows it."""
    with tempfile.TemporaryDirectory(prefix="promedical-") as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(rows.file.read())
        try:
            return read_jsonl(path)
        except RecordError as error:
            raise RecordError(str(error).replace(str(path), rows.filename or "file")) from None


def _notices(request: Request) -> dict[str, MadeRound]:
    """What the lead is told once after a round was made; lost with the process."""
    state = request.app.state
    if not hasattr(state, "adjudication_notices"):
        state.adjudication_notices = {}
    notices: dict[str, MadeRound] = state.adjudication_notices
    return notices


# --- the lead's view of a round -------------------------------------------------------------------


@dataclass
class _Live:
    """The latest figures of the rounds and lines of their items, and what they were made of."""

    kept: dict[str, tuple[Any, float, float, Json]] = field(default_factory=dict)
    lines: dict[str, dict[str, tuple[tuple[Reading, ...], Json]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def _kept_figures(request: Request) -> _Live:
    state = request.app.state
    if not hasattr(state, "adjudication_live"):
        state.adjudication_live = _Live()
    live: _Live = state.adjudication_live
    return live


def _live(request: Request, round_id: str) -> Json:
    """Figures of a round: calculated again if something was finished since, not too often."""
    live = _kept_figures(request)
    database = database_of(request)
    with live.lock:
        with database.read() as session:
            mark = _mark(session, round_id)
            kept = live.kept.get(round_id)
            if kept is not None:
                old_mark, at, took, figures = kept
                if old_mark == mark or time.monotonic() - at < took / SHARE:
                    return figures
            items = read_items(session, round_id, secret=True)
        began = time.monotonic()
        figures = live_agreement(items, resamples=LIVE_RESAMPLES)
        figures["at"] = now().strftime("%H:%M:%S UTC")
        ended = time.monotonic()
        live.kept[round_id] = (mark, ended, ended - began, figures)
        return figures


def _live_at_once(request: Request, round_id: str) -> tuple[Json | None, bool]:
    """The figures for a page that does not wait for a large round, and whether they are late."""
    kept = _kept_figures(request).kept.get(round_id)
    with database_of(request).read() as session:
        mark = _mark(session, round_id)
    if kept is not None and kept[0] == mark:
        return kept[3], False
    if sum(count for state, count, _ in mark if state == "done") <= AT_ONCE:
        return _live(request, round_id), False
    return (None if kept is None else kept[3]), True


def _mark(session: Session, round_id: str) -> Any:
    """What changes when a reading is handed out, finished, or an item removed."""
    found = session.execute(
        select(Assignment.state, func.count(), func.max(Assignment.finished))
        .join(Item, Item.id == Assignment.item_id)
        .where(Item.round_id == round_id, Item.removed_at.is_(None))
        .group_by(Assignment.state)
        .order_by(Assignment.state)
    ).all()
    return tuple(tuple(row) for row in found)


def _round(session: Session, round_id: str) -> Round:
    round_ = session.get(Round, round_id)
    if round_ is None or round_.kind != "adjudication":
        raise NotFound
    return round_


def _names(session: Session) -> dict[str, str]:
    return dict(session.execute(select(Reviewer.id, Reviewer.name)).tuples().all())


def round_page(request: Request, round_id: str, person: Lead) -> Response:
    """A round: progress, agreement, dangers, items, export."""
    with database_of(request).read() as session:
        round_ = _round(session, round_id)
        items = read_items(session, round_id)
        names = _names(session)
        left = left_behind(session, round_id)
    live, late = _live_at_once(request, round_id)
    return render(
        request,
        "adjudication_round.html",
        person,
        round=round_,
        live=live,
        late=late,
        items=_lines(request, round_id, items),
        dangers=dangers(items, round_.settings.get("dangers") or {}),
        names=names,
        left=left,
        begun=sum(assignment.version > 0 for assignment in left),
        made=_notices(request).pop(round_id, None),
        too_fast=TOO_FAST,
    )


def _lines(request: Request, round_id: str, items: Sequence[ReadItem]) -> list[Json]:
    """A line an item; what the votes come to is found again only where a reading changed."""
    live = _kept_figures(request)
    before = live.lines.get(round_id, {})
    lines = {}
    for item in items:
        kept = before.get(item.id)
        fresh = kept is not None and kept[0] == item.readings
        lines[item.id] = kept if kept is not None and fresh else (item.readings, _line(item))
    live.lines[round_id] = lines
    return [line for _, line in lines.values()]


def _line(item: ReadItem) -> Json:
    standings = Counter(found.standing for found in item.consensus.values())
    return {
        "id": item.id,
        "instruction_id": item.instruction_id,
        "specialty": item.specialty,
        "done": sum(reading.done for reading in item.readings),
        "readings": len(item.readings),
        "contested": standings[Standing.CONTESTED],
        "complete": item.complete,
    }


def live_part(request: Request, round_id: str, person: Lead) -> Response:
    """The live figures alone, which the page asks for again."""
    with database_of(request).read() as session:
        round_ = _round(session, round_id)
        names = _names(session)
    return render(
        request,
        "_adjudication_live.html",
        person,
        round=round_,
        live=_live(request, round_id),
        late=False,
        names=names,
        too_fast=TOO_FAST,
    )


def votes_page(request: Request, round_id: str, item_id: str, person: Lead) -> Response:
    """Every vote on one item, for the lead."""
    with database_of(request).read() as session:
        _round(session, round_id)
        found = [i for i in read_items(session, round_id, secret=True) if i.id == item_id]
        names = _names(session)
    if not found:
        raise NotFound
    (item,) = found
    readers = [(r.reviewer_id, names.get(r.reviewer_id, "?"), r.part) for r in item.readings]
    return render(
        request,
        "adjudication_votes.html",
        person,
        round_id=round_id,
        item=item,
        readers=readers,
        responses=[_votes_of(item, key) for key in item.keys],
    )


def _votes_of(item: ReadItem, key: str) -> Json:
    written = item.secret["responses"][key]
    text = next(r["text"] for r in item.content["responses"] if r["key"] == key)
    judged = {e["criterion"]: e["verdict"] for e in written.get("verdicts") or ()}
    criteria = []
    for criterion in item.rubric.criteria:
        consensus = item.consensus[key, criterion.id]
        criteria.append(
            {
                "text": criterion.text,
                "tier": criterion.tier.value,
                "votes": {ballot.reader: ballot for ballot in consensus.ballots},
                "consensus": consensus,
                "judge": judged.get(criterion.id) if item.secret.get("judge") else None,
            }
        )
    return {"id": written["id"], "model": written["model"], "text": text, "criteria": criteria}


# --- what the lead does ---------------------------------------------------------------------------


def _back(round_id: str, anchor: str = "") -> Response:
    return RedirectResponse(f"/adjudication-rounds/{round_id}{anchor}", status_code=303)


def hand_out(request: Request, round_id: str, person: Lead) -> Response:
    """Hand out what waits for a third reader, and what locked accounts had not begun."""
    with database_of(request).write() as session:
        _round(session, round_id)
        hand_on(session, round_id, actor_id=person.id)
    _kept_figures(request).kept.pop(round_id, None)
    return _back(round_id)


def settle(
    request: Request,
    round_id: str,
    person: Lead,
    danger: Annotated[str, Form()] = "",
    state: Annotated[str, Form()] = "",
) -> Response:
    """Take a danger for the veto bank, or dismiss it."""
    with database_of(request).write() as session:
        _round(session, round_id)
        try:
            settle_danger(session, round_id, danger, state, actor_id=person.id)
        except AdjudicationError:
            raise NotFound from None
    return _back(round_id, "#dangers")


def set_state(
    request: Request, round_id: str, person: Lead, state: Annotated[str, Form()] = ""
) -> Response:
    """Close a round, or open it again."""
    if state not in ("open", "closed"):
        raise NotFound
    with database_of(request).write() as session:
        _round(session, round_id).state = state
        session.flush()
        action = "round.open" if state == "open" else "round.close"
        audit_log.record(session, person.id, action, f"round:{round_id}")
    return _back(round_id)


def bench_zip(request: Request, round_id: str, person: Lead) -> Response:
    """The bench of what is settled, as one file."""
    with tempfile.TemporaryDirectory(prefix="promedical-") as folder:
        target = Path(folder) / "bench"
        # Intervals take a while: not in a transaction that would keep others from saving.
        with database_of(request).read() as session:
            _round(session, round_id)
            try:
                made = export_bench(session, round_id, target, actor_id=None)
            except AdjudicationError:
                raise NotFound from None
        with database_of(request).write() as session:
            audit_log.record(
                session, person.id, "bench.export", f"round:{round_id}", digest=made.fingerprint
            )
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in target.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(target))
    return Response(
        packed.getvalue(),
        media_type="application/zip",
        headers={"content-disposition": 'attachment; filename="bench.zip"'},
    )


def candidates(request: Request, round_id: str, person: Lead) -> Response:
    """Candidates for the veto bank, a line each."""
    with database_of(request).write() as session:
        round_ = _round(session, round_id)
        items = read_items(session, round_id, secret=True)
        people = {r.reviewer_id for item in items for r in item.readings}
        lines = list(danger_lines(items, round_, pseudonyms(round_id, people)))
        audit_log.record(session, person.id, "dangers.export", f"round:{round_id}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return Response(
        text,
        media_type="application/x-ndjson",
        headers={"content-disposition": 'attachment; filename="veto_candidates.jsonl"'},
    )
