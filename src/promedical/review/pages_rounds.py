"""Pages of rubric rounds: a reviewer's item; for the lead a round, an item's history, decisions.

A reviewer is sent their own assignment and nothing of anybody else's; the lead who decides is sent
the reviewers' versions as A and B. Texts of others are data in the page, which scripts set as text.
Left to others: what happens (`rounds`, `gold`), figures (`round_figures`), saving (`app`, `saves`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Form, Request, UploadFile
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, RedirectResponse, Response

from promedical.corpus.banks import universal_criteria
from promedical.records import GradedInstruction, RecordError, from_dict, to_dict
from promedical.review import audit_log, drafts, gold, rounds
from promedical.review.pages import render
from promedical.review.round_figures import figures
from promedical.review.rounds import RoundError, RoundSettings
from promedical.review.security import (
    NotFound,
    Person,
    current_reviewer,
    database_of,
    require_role,
)
from promedical.review.tables import Assignment, Change, Item, Reviewer, Round

__all__ = ["item_data", "router"]

Anyone = Annotated[Person, Depends(current_reviewer)]
Lead = Annotated[Person, Depends(require_role("lead"))]
STATES = ("open", "accepted", "corrected", "rejected", "differ", "disputed", "contested")
PAGE = 100
FIELDS = ("decision", "reason", "disputed")


def router() -> APIRouter:
    """Routes of this module."""
    routes = APIRouter()
    routes.get("/rubrics/{assignment_id}")(item_page)
    routes.post("/api/rubric-hints")(hints)
    routes.get("/rounds/new")(new_round)
    routes.post("/rounds")(make_round)
    routes.get("/rounds/{round_id}")(round_page)
    routes.get("/rounds/{round_id}/live")(round_live)
    routes.get("/rounds/{round_id}/gold.jsonl")(gold_lines)
    routes.post("/rounds/{round_id}/assign")(assign)
    routes.post("/rounds/{round_id}/unassign/{reviewer_id}")(unassign)
    routes.post("/rounds/{round_id}/state")(set_state)
    routes.get("/rounds/{round_id}/items/{item_id}")(history_page)
    routes.post("/rounds/{round_id}/items/{item_id}/decide")(decide)
    routes.post("/rounds/{round_id}/assignments/{assignment_id}/reopen")(reopen)
    return routes


# ---- a reviewer's item ----


def item_page(request: Request, assignment_id: str, person: Anyone) -> Response:
    """The editor of one rubric."""
    with database_of(request).read() as session:
        assignment = session.get(Assignment, assignment_id)
        if assignment is None or assignment.reviewer_id != person.id:
            raise NotFound
        item = assignment.item
        round_ = item.round
        if round_.kind != "rubrics" or item.removed_at is not None:
            raise NotFound
        mine = _own_items(session, round_.id, person.id)
        data = item_data(assignment)
    at = mine.index(assignment_id)
    data["done"] = data["done"] or round_.state != "open"
    data["addresses"] = {
        "previous": f"/rubrics/{mine[at - 1]}" if at else None,
        "next": f"/rubrics/{mine[at + 1]}" if at + 1 < len(mine) else None,
        "done": f"/next/{round_.id}",
        "hints": "/api/rubric-hints",
    }
    return render(
        request, "rubric_item.html", person, round=round_, at=at + 1, of=len(mine), data=data
    )


def item_data(assignment: Assignment) -> dict[str, Any]:
    """What the editor of an assignment is given, here and in the offline pack (rubric.js)."""
    item = assignment.item
    content = item.content
    shared = set(content.get("universal") or ())
    return {
        "assignment": assignment.id,
        "version": assignment.version,
        "answer": assignment.answer or rounds.first_answer(content),
        "done": assignment.state == "done",
        "draft": drafts.to_json(drafts.opened(content["rubric"]["criteria"])),
        "content": {
            "messages": content["messages"],
            "reference": content.get("reference"),
            "safety_only": bool(content["rubric"].get("safety_only")),
            "shared": [
                {"tier": c.tier.value, "text": c.text}
                for c in universal_criteria()
                if c.id in shared
            ],
        },
        "others": _others(item) if assignment.part == "third" else [],
        "addresses": {"previous": None, "next": None, "done": None, "hints": None},
    }


def hints(person: Anyone, given: Annotated[dict[str, Any], Body()]) -> Response:
    """What may keep a judge from deciding each of some sentences, as codes."""
    texts = given.get("texts")
    if not isinstance(texts, list) or len(texts) > drafts.MOST_CRITERIA:
        return JSONResponse({"error": "invalid"}, status_code=422)
    wanted = [t[: drafts.LONGEST_TEXT] if isinstance(t, str) else "" for t in texts]
    found = [list(dict.fromkeys(fault.code for fault in drafts.hints(t))) for t in wanted]
    return JSONResponse({"hints": found})


def _own_items(session: Session, round_id: str, reviewer_id: str) -> list[str]:
    return list(
        session.scalars(
            select(Assignment.id)
            .join(Item)
            .where(
                Item.round_id == round_id,
                Item.removed_at.is_(None),
                Assignment.reviewer_id == reviewer_id,
            )
            .order_by(Item.position, Assignment.id)
        )
    )


def _others(item: Item) -> list[dict[str, Any]]:
    """The reviewers' answers, in an order that is the same for every lead and names nobody."""
    first = sorted((a for a in item.assignments if a.part == "rubric"), key=lambda a: a.id)
    return [
        {
            "decision": a.answer["decision"],
            "reason": a.answer["reason"],
            "disputed": a.answer["disputed"],
            "criteria": a.answer["criteria"],
        }
        for a in first
        if a.state == "done"
    ]


# ---- the lead's pages ----


def new_round(request: Request, person: Lead, error: str | None = None) -> Response:
    """The form for a new round."""
    with database_of(request).read() as session:
        people = _reviewers(session)
    return render(
        request,
        "rubric_round_new.html",
        person,
        status=200 if error is None else 422,
        people=people,
        error=error,
    )


async def make_round(
    request: Request,
    person: Lead,
    file: UploadFile,
    name: Annotated[str, Form()],
    size: Annotated[int, Form()] = 500,
    seed: Annotated[int, Form()] = 0,
    double: Annotated[float, Form()] = 0.0,
    allocation: Annotated[str, Form()] = "proportional",
    reviewers: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """Make a round of an uploaded file of drafts, and deal it."""
    from starlette.concurrency import run_in_threadpool

    raw = await file.read()

    def make() -> str:
        settings = RoundSettings(name, size, seed, double / 100, allocation)  # type: ignore[arg-type]
        rows = _rows(raw, file.filename or "file")
        with database_of(request).write() as session:
            made = rounds.make_round(session, rows, settings, created_by=person.id)
            if reviewers:
                rounds.assign(session, made.id, reviewers, by=person.id)
            return made.id

    try:
        made = await run_in_threadpool(make)
    except (RoundError, RecordError) as error:
        return await run_in_threadpool(new_round, request, person, str(error))
    return RedirectResponse(f"/rounds/{made}", status_code=303)


def round_page(
    request: Request, round_id: str, person: Lead, state: str = "", page: int = 1
) -> Response:
    """How a round stands, and its items."""
    with database_of(request).read() as session:
        return render(
            request,
            "rubric_round.html",
            person,
            **_round_context(session, round_id),
            **_items_context(session, round_id, state, page),
            people=_reviewers(session),
        )


def round_live(request: Request, round_id: str, person: Lead) -> Response:
    """The figures alone, which the page asks for again every few seconds."""
    with database_of(request).read() as session:
        context = _round_context(session, round_id)
    return render(request, "_rubric_figures.html", person, **context)


def gold_lines(request: Request, round_id: str, person: Lead) -> Response:
    """Gold rubrics as JSON lines, in the shape of datasets."""
    with database_of(request).read() as session:
        _rubric_round(session, round_id)
        found = gold.collect(rounds.items_of(session, round_id))
    with database_of(request).write() as session:
        audit_log.record(session, person.id, "round.export", f"round:{round_id}")
    lines = "".join(json.dumps(to_dict(g.row), ensure_ascii=False) + "\n" for g in found.rubrics)
    headers = {"content-disposition": f'attachment; filename="gold-{round_id}.jsonl"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)


def assign(
    request: Request,
    round_id: str,
    person: Lead,
    reviewers: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """Deal what has too few reviewers."""
    return _then(
        request, round_id, lambda s: rounds.assign(s, round_id, reviewers or [], by=person.id)
    )


def unassign(request: Request, round_id: str, reviewer_id: str, person: Lead) -> Response:
    """Take back what somebody has not begun."""
    return _then(
        request, round_id, lambda s: rounds.unassign(s, round_id, reviewer_id, by=person.id)
    )


def set_state(
    request: Request, round_id: str, person: Lead, state: Annotated[str, Form()]
) -> Response:
    """Close a round, or open it again."""
    return _then(
        request, round_id, lambda s: rounds.close_round(s, round_id, by=person.id, state=state)
    )


def history_page(
    request: Request, round_id: str, item_id: str, person: Lead, error: str | None = None
) -> Response:
    """What became of an item: every version against the draft, and every change."""
    with database_of(request).read() as session:
        round_ = _rubric_round(session, round_id)
        item = _item(session, round_id, item_id)
        what = rounds.outcome(item)
        return render(
            request,
            "rubric_history.html",
            person,
            status=200 if error is None else 409,
            round=round_,
            item=item,
            outcome=what,
            versions=[_version(item, a) for a in _in_order(item)],
            changes=_changes(session, item),
            shown=_by_tier(what.criteria),
            decidable=what.state in ("differ", "disputed"),
            error=error,
        )


def decide(request: Request, round_id: str, item_id: str, person: Lead) -> Response:
    """To the lead's own part of an item on which reviewers differ."""
    try:
        with database_of(request).write() as session:
            _item(session, round_id, item_id)
            made = rounds.decide(session, item_id, person.id).id
    except RoundError as error:
        return history_page(request, round_id, item_id, person, str(error))
    return RedirectResponse(f"/rubrics/{made}", status_code=303)


def reopen(request: Request, round_id: str, assignment_id: str, person: Lead) -> Response:
    """Give a finished item back to its reviewer."""
    with database_of(request).read() as session:
        assignment = session.get(Assignment, assignment_id)
        if assignment is None or assignment.item.round_id != round_id:
            raise NotFound
        item_id = assignment.item_id
    try:
        with database_of(request).write() as session:
            rounds.reopen(session, assignment_id, by=person.id)
    except RoundError as error:
        return history_page(request, round_id, item_id, person, str(error))
    return RedirectResponse(f"/rounds/{round_id}/items/{item_id}", status_code=303)


def _then(request: Request, round_id: str, change: Any) -> Response:
    """Do something to a round and show it; what cannot be done is said on its page."""
    try:
        with database_of(request).write() as session:
            _rubric_round(session, round_id)
            change(session)
    except RoundError as error:
        person = request.state.person
        with database_of(request).read() as session:
            return render(
                request,
                "rubric_round.html",
                person,
                status=409,
                **_round_context(session, round_id),
                **_items_context(session, round_id, "", 1),
                people=_reviewers(session),
                error=str(error),
            )
    return RedirectResponse(f"/rounds/{round_id}", status_code=303)


def _rubric_round(session: Session, round_id: str) -> Round:
    found = session.get(Round, round_id)
    if found is None or found.kind != "rubrics":
        raise NotFound
    return found


def _item(session: Session, round_id: str, item_id: str) -> Item:
    found = session.get(Item, item_id)
    if found is None or found.round_id != round_id or found.removed_at is not None:
        raise NotFound
    return found


def _reviewers(session: Session) -> Sequence[Reviewer]:
    return session.scalars(
        select(Reviewer).where(Reviewer.active).order_by(Reviewer.name, Reviewer.id)
    ).all()


def _round_context(session: Session, round_id: str) -> dict[str, Any]:
    round_ = _rubric_round(session, round_id)
    found = figures(rounds.items_of(session, round_id))
    waiting = found.states.get("differ", 0) + found.states.get("disputed", 0)
    ready = found.states.get("accepted", 0) + found.states.get("corrected", 0)
    return {
        "round": round_,
        "figures": found,
        "waiting": waiting,
        "gold": ready,
        "most_edits": max(found.edits.values(), default=1),
        "error": None,
    }


def _items_context(session: Session, round_id: str, state: str, page: int) -> dict[str, Any]:
    listed = [(item, rounds.outcome(item)) for item in rounds.items_of(session, round_id)]
    if state in STATES:
        listed = [(item, what) for item, what in listed if what.state == state]
    page = max(1, min(page, -(-len(listed) // PAGE)))
    return {
        "listed": listed[(page - 1) * PAGE : page * PAGE],
        "state": state if state in STATES else "",
        "states": STATES,
        "page": page,
        "pages": max(1, -(-len(listed) // PAGE)),
    }


def _in_order(item: Item) -> list[Assignment]:
    return sorted(item.assignments, key=lambda a: (a.part == "third", a.id))


def _version(item: Item, assignment: Assignment) -> dict[str, Any]:
    """One reviewer's rubric against the draft."""
    before = drafts.opened(item.content["rubric"]["criteria"])
    answer = assignment.answer or rounds.first_answer(item.content)
    after = drafts.from_json(answer["criteria"])
    edits = [e for e in drafts.diff(before, after) if e.what in drafts.COUNTED]
    names = {c.id: c.text for c in (*after, *before)}
    return {
        "assignment": assignment,
        "answer": answer,
        "edits": [(e, names.get(e.criterion, "")) for e in edits],
    }


def _changes(session: Session, item: Item) -> list[dict[str, Any]]:
    """Every acknowledged save of an item, newest first: who, when, and each change's two sides."""
    found = session.execute(
        select(Change, Reviewer.name)
        .join(Assignment, Assignment.id == Change.assignment_id)
        .join(Reviewer, Reviewer.id == Change.reviewer_id)
        .where(Assignment.item_id == item.id)
        .order_by(Change.at.desc(), Change.version.desc())
    ).all()
    texts = {c["id"]: c["text"] for c in item.content["rubric"]["criteria"]}
    for assignment in item.assignments:
        texts |= {c["id"]: c["text"] for c in assignment.answer.get("criteria") or ()}
    shown = []
    for change, name in found:
        echoes = _echoes(change.entries)
        entries = [_entry(e, texts) for e in change.entries if e["path"] not in echoes]
        shown.append({"change": change, "name": name, "entries": entries, "followed": len(echoes)})
    return shown


def _echoes(entries: Sequence[dict[str, Any]]) -> set[str]:
    """Paths of the weights that only followed others."""
    weights = {
        e["path"]: (e["from"], e["to"])
        for e in entries
        if e["path"].endswith("/weight") and e["from"] is not None and e["to"] is not None
    }
    scale = drafts.common_scale(list(weights.values()))
    return {path for path, (old, new) in weights.items() if drafts.follows(old, new, scale)}


def _entry(entry: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """A change for reading: which field, of which criterion, from what to what."""
    path = entry["path"]
    field = path.rpartition("/")[2] if path in FIELDS or path.count("/") == 2 else ""
    of = path.split("/")[1] if path.startswith("criteria/") else ""
    plain = {"what": entry["what"], "field": field, "of": texts.get(of, of) if field else ""}
    if entry["what"] == "moved":
        return plain | {"field": "order", "before": None, "after": None}
    return plain | {"before": _side(entry["from"]), "after": _side(entry["to"])}


def _side(value: Any) -> Any:
    """One side of a change; of a whole criterion its text."""
    if isinstance(value, dict):
        return value.get("text") or "…"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _by_tier(criteria: drafts.Draft | None) -> list[tuple[str, list[drafts.DraftCriterion]]]:
    tiers = ("proficiency", "excellence", "veto")
    return [(tier, [c for c in criteria or () if c.tier == tier]) for tier in tiers]


def _rows(raw: bytes, name: str) -> list[GradedInstruction]:
    """Rows of an uploaded file; faults name the line and never quote it."""
    found = []
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise RecordError(f"{name}: not UTF-8 text, expected JSON lines") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(from_dict(json.loads(line)))
        except RecordError as error:
            raise RecordError(f"{name}: line {number}: {error}") from None
        except (ValueError, RecursionError):
            raise RecordError(f"{name}: line {number}: not JSON") from None
    return found
