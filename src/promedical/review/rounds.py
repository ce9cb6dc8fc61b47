"""Rubric rounds: drawing drafts, dealing them out, what became of each, and how the round stands.

Section 3, step 6: physicians review 500 rubrics in a round, and the share accepted without an edit
(the paper ends at 96.40 %) shows whether the writer of drafts has learned. An item's content is

    {"messages", "reference", "rubric": {"criteria", "safety_only"}, "universal": [ids], "origin"}

where the criteria that every rubric shares are left out of `rubric` (they are nobody's to correct)
and come back when it is gold. What became of an item (`outcome`) follows from its answers alone:

    open        somebody is not finished yet
    accepted    every reviewer accepted the draft as it is
    corrected   the reviewers' rubric, or the lead's where they differed
    rejected    the rubric cannot be used
    differ      two reviewers differ; the lead sees both and decides (an assignment of part "third")
    disputed    a reviewer says that experts disagree; the lead decides
    contested   the lead says so too: no gold, listed as contested

Left to others: operations on a rubric (`drafts`), saving (`saves`), how a round stands
(`round_figures`), gold rubrics as rows and in the exemplar pool (`gold`), pages (`pages_rounds`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, selectinload

from promedical.corpus.banks import UNIVERSAL_IDS
from promedical.corpus.stratify import Allocation, stratify
from promedical.records import GradedInstruction, fingerprint, to_dict
from promedical.review import audit_log, drafts
from promedical.review.tables import Assignment, Item, Reviewer, Round, new_id
from promedical.rubric import Rubric

__all__ = [
    "DECISIONS",
    "Outcome",
    "RoundError",
    "RoundSettings",
    "assign",
    "check_answer",
    "close_round",
    "decide",
    "first_answer",
    "items_of",
    "make_round",
    "on_finished",
    "outcome",
    "reopen",
    "unassign",
]

DECISIONS = ("accept", "accept_with_edits", "reject")
ANSWER_FIELDS = {"decision", "reason", "disputed", "criteria"}
LONGEST_REASON = 4000


class RoundError(ValueError):
    """A round that cannot be made or changed so; the message says what would be right."""


@dataclass(frozen=True)
class RoundSettings:
    """How a round is drawn and dealt.

    Args:
        name: what people see.
        size: rubrics to draw; all, if there are fewer.
        seed: another seed draws and deals otherwise.
        double: share of the items, 0 to 1, that two reviewers get.
        allocation: "proportional" or "balanced" over categories and specialties.

    Raises:
        RoundError: no name, a size below 1, or a share out of range.
    """

    name: str
    size: int = 500
    seed: int = 0
    double: float = 0.0
    allocation: Allocation = "proportional"

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.name) > 200:
            raise RoundError("name: expected 1 to 200 characters")
        if self.size < 1:
            raise RoundError(f"size: found {self.size}, expected 1 or more")
        if not 0 <= self.double <= 1:
            raise RoundError(f"double: found {self.double}, expected a share of 0 to 1")
        if self.allocation not in ("proportional", "balanced"):
            raise RoundError(
                f"allocation: found {self.allocation!r}, expected proportional or balanced"
            )


# ---- making and dealing ----


def make_round(
    session: Session,
    rows: Sequence[GradedInstruction],
    settings: RoundSettings,
    *,
    created_by: str | None = None,
) -> Round:
    """Draw drafts over categories and specialties and make a round of them.

    Rows without a rubric, or with nothing but the criteria that all rubrics share, are left out;
    `Round.settings` counts them, and holds the drafts' fingerprint. Items come in random order, so
    that a round that ends early is a sample too.

    Args:
        session: of `Database.write()`.
        rows: drafts; ids unique.
        created_by: the lead's id.

    Raises:
        RoundError: no row has a draft to review, or an id repeats.
    """
    repeated = [id for id, n in Counter(row.id for row in rows).items() if n > 1]
    if repeated:
        raise RoundError(f"rows: id {repeated[0]!r} repeats, expected unique ids")
    usable = [row for row in rows if row.rubric is not None and _own(row.rubric)]
    if not usable:
        raise RoundError(
            f"rows: found {len(rows)}, none with a rubric of its own; expected drafts of rubrics"
        )
    drawn = stratify(usable, settings.size, settings.seed, settings.allocation)
    drawn.sort(key=lambda row: _lot(settings.seed, "order", row.id))
    made = Round(
        id=new_id(),
        kind="rubrics",
        name=settings.name.strip(),
        seed=settings.seed,
        created_by=created_by,
        settings={
            "size": settings.size,
            "double": settings.double,
            "allocation": settings.allocation,
            "rows": len(rows),
            "without_draft": len(rows) - len(usable),
            "drawn": len(drawn),
            "fingerprint": fingerprint(rows),
        },
    )
    session.add(made)
    session.flush()
    for position, row in enumerate(drawn):
        session.add(
            Item(
                id=new_id(),
                round_id=made.id,
                instruction_id=row.id,
                position=position,
                category=row.category,
                specialty=row.specialty,
                content=_content(row),
            )
        )
    session.flush()
    audit_log.record(session, created_by or "system", "round.create", f"round:{made.id}")
    return made


def assign(
    session: Session, round_id: str, reviewer_ids: Iterable[str], *, by: str | None = None
) -> int:
    """Deal what has too few reviewers among these, evenly, specialists first; returns how many.

    May be called again: what somebody has stays theirs, and a new colleague gets what is left.

    Raises:
        RoundError: the round is closed or no rubric round, or a reviewer is unknown or inactive.
    """
    round_ = _open_round(session, round_id)
    people = _people(session, reviewer_ids)
    items = items_of(session, round_id)
    doubled = _doubled(round_, items)
    load: Counter[str] = Counter()
    for item in items:
        load.update(a.reviewer_id for a in item.assignments if a.part == "rubric")
    dealt = 0
    for item in items:
        has = {a.reviewer_id for a in item.assignments}
        wanted = 1 + (item.id in doubled)
        for _ in range(wanted - sum(a.part == "rubric" for a in item.assignments)):
            free = [p for p in people if p.id not in has]
            if not free:
                break
            who = min(
                free,
                key=lambda p: (
                    load[p.id],
                    p.specialty is None or p.specialty != item.specialty,
                    _lot(round_.seed, item.instruction_id, p.id),
                ),
            )
            _add_assignment(session, item, who.id, "rubric")
            has.add(who.id)
            load[who.id] += 1
            dealt += 1
    session.flush()
    audit_log.record(session, by or "system", "round.assign", f"round:{round_id}")
    return dealt


def unassign(session: Session, round_id: str, reviewer_id: str, *, by: str | None = None) -> int:
    """Take back what somebody has not begun, so that it can be dealt again; returns how many."""
    _open_round(session, round_id)
    ids = session.scalars(
        select(Assignment.id)
        .join(Item)
        .where(
            Item.round_id == round_id,
            Assignment.reviewer_id == reviewer_id,
            Assignment.state == "open",
            Assignment.version == 0,
        )
    ).all()
    session.execute(delete(Assignment).where(Assignment.id.in_(ids)))
    session.expire_all()
    audit_log.record(session, by or "system", "round.unassign", f"round:{round_id}")
    return len(ids)


def decide(session: Session, item_id: str, lead_id: str) -> Assignment:
    """The lead's own part of an item that is left to them; made if there is none yet.

    Raises:
        RoundError: nothing to decide, or this lead is one of its reviewers.
    """
    item = session.get(Item, item_id)
    if item is None or item.removed_at is not None:
        raise RoundError("no such item")
    _open_round(session, item.round_id)
    for assignment in item.assignments:
        if assignment.part == "third" and assignment.reviewer_id == lead_id:
            return assignment
    if outcome(item).state not in ("differ", "disputed"):
        raise RoundError("the reviewers of this item agree, or are not finished: nothing to decide")
    if any(a.reviewer_id == lead_id for a in item.assignments):
        raise RoundError("you reviewed this item yourself; another lead has to decide")
    made = _add_assignment(session, item, lead_id, "third")
    session.flush()
    audit_log.record(session, lead_id, "item.decide", f"item:{item_id}")
    return made


def reopen(session: Session, assignment_id: str, *, by: str) -> Assignment:
    """Give a finished item back to its reviewer, with the answer it has.

    Raises:
        RoundError: no such assignment, not finished, or its round is closed.
    """
    assignment = session.get(Assignment, assignment_id)
    if assignment is None or assignment.state != "done":
        raise RoundError("no such finished assignment")
    _open_round(session, assignment.item.round_id)
    assignment.state = "started"
    assignment.finished = None
    session.flush()
    audit_log.record(session, by, "assignment.reopen", f"assignment:{assignment_id}")
    return assignment


def close_round(session: Session, round_id: str, *, by: str, state: str = "closed") -> None:
    """End a round, after which nothing more is saved in it; or open it again.

    Raises:
        RoundError: no such round of rubrics, or another state.
    """
    if state not in ("open", "closed"):
        raise RoundError(f"state: found {state!r}, expected open or closed")
    found = session.get(Round, round_id)
    if found is None or found.kind != "rubrics":
        raise RoundError("no such round of rubrics")
    found.state = state
    session.flush()
    audit_log.record(session, by, f"round.{state}", f"round:{round_id}")


def items_of(session: Session, round_id: str) -> list[Item]:
    """The items of a round that were not removed, with their assignments, in order."""
    return list(
        session.scalars(
            select(Item)
            .where(Item.round_id == round_id, Item.removed_at.is_(None))
            .options(selectinload(Item.assignments).selectinload(Assignment.reviewer))
            .order_by(Item.position)
        )
    )


def first_answer(content: Mapping[str, Any]) -> dict[str, Any]:
    """The answer before anybody touched it: the draft, undecided."""
    criteria = drafts.to_json(drafts.opened(content["rubric"]["criteria"]))
    return {"decision": None, "reason": "", "disputed": False, "criteria": criteria}


def _own(rubric: Rubric) -> list[Any]:
    return [c for c in rubric.criteria if c.id not in UNIVERSAL_IDS]


def _content(row: GradedInstruction) -> dict[str, Any]:
    data = to_dict(row)
    criteria = data["rubric"]["criteria"]
    return {
        "messages": data["messages"],
        "reference": data["reference"],
        "rubric": {
            "criteria": [c for c in criteria if c["id"] not in UNIVERSAL_IDS],
            "safety_only": data["rubric"]["safety_only"],
        },
        "universal": [c["id"] for c in criteria if c["id"] in UNIVERSAL_IDS],
        "origin": {name: data[name] for name in ("source", "licence", "difficulty")},
    }


def _add_assignment(session: Session, item: Item, reviewer_id: str, part: str) -> Assignment:
    made = Assignment(
        id=new_id(),
        item_id=item.id,
        reviewer_id=reviewer_id,
        part=part,
        answer=first_answer(item.content),
    )
    item.assignments.append(made)
    return made


def _open_round(session: Session, round_id: str) -> Round:
    found = session.get(Round, round_id)
    if found is None or found.kind != "rubrics":
        raise RoundError("no such round of rubrics")
    if found.state != "open":
        raise RoundError("the round is closed; open it again first")
    return found


def _people(session: Session, ids: Iterable[str]) -> list[Reviewer]:
    found = []
    for id in sorted(set(ids)):
        person = session.get(Reviewer, id)
        if person is None or not person.active:
            raise RoundError(f"reviewer {id!r}: not known, or no longer active")
        found.append(person)
    if not found:
        raise RoundError("reviewers: expected one or more")
    return found


def _doubled(round_: Round, items: Sequence[Item]) -> set[str]:
    order = sorted(items, key=lambda item: _lot(round_.seed, "double", item.instruction_id))
    return {item.id for item in order[: round(round_.settings.get("double", 0.0) * len(items))]}


def _lot(seed: int, *names: str) -> bytes:
    text = "/".join((str(seed), *names))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


# ---- answers ----


def check_answer(
    content: Mapping[str, Any],
    answer: Mapping[str, Any],
    *,
    finish: bool,
    before: Mapping[str, Any],
    part: str,
) -> list[str]:
    """What keeps an answer from being kept, a line each, field first; see `saves`."""
    if set(answer) != ANSWER_FIELDS:
        return [f"answer: expected {', '.join(sorted(ANSWER_FIELDS))}"]
    decision, reason = answer["decision"], answer["reason"]
    found = []
    if decision is not None and decision not in DECISIONS:
        found.append(f"decision: expected none or one of {', '.join(DECISIONS)}")
    if not isinstance(reason, str) or len(reason) > LONGEST_REASON:
        found.append(f"reason: expected at most {LONGEST_REASON} characters")
    if not isinstance(answer["disputed"], bool):
        found.append("disputed: expected true or false")
    draft = content["rubric"]["criteria"]
    # A rejected rubric is not to be used, so what was typed before need not be complete.
    strict = finish and decision != "reject"
    safety_only = bool(content["rubric"].get("safety_only"))
    found += drafts.find_problems(draft, answer["criteria"], finish=strict, safety_only=safety_only)
    if finish and not found:
        found += _decision_problems(draft, answer)
    return found


def _decision_problems(draft: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]) -> list[str]:
    decision = answer["decision"]
    if decision is None:
        return ["decision: expected accept, accept_with_edits or reject"]
    if decision == "reject":
        return [] if answer["reason"].strip() else ["reason: is empty, expected why it is rejected"]
    changed = drafts.edited(drafts.diff(drafts.opened(draft), drafts.from_json(answer["criteria"])))
    if decision == "accept" and changed:
        return ["decision: the rubric was edited, expected accept_with_edits"]
    if decision == "accept_with_edits" and not changed:
        return ["decision: nothing was edited, expected accept"]
    return []


def on_finished(session: Session, assignment: Assignment) -> None:
    """Nothing follows at once from one finished answer; `outcome` looks at all of them."""


@dataclass(frozen=True)
class Outcome:
    """What became of an item; see the module.

    Args:
        state: as listed there.
        criteria: the rubric that counts, None if there is none (yet).
        decided_by: ids of those whose answer it is.
        decided_at: ISO time of the last of them, or None.
        passed: accepted without an edit by all its reviewers; None while they are not finished.
    """

    state: str
    criteria: drafts.Draft | None = None
    decided_by: tuple[str, ...] = ()
    decided_at: str | None = None
    passed: bool | None = None


def outcome(item: Item) -> Outcome:
    """What became of an item."""
    first = sorted((a for a in item.assignments if a.part == "rubric"), key=lambda a: a.id)
    third = [a for a in item.assignments if a.part == "third" and a.state == "done"]
    if not first or any(a.state != "done" for a in first):
        return Outcome("open")
    passed = all(a.answer["decision"] == "accept" for a in first)
    deciding = third or first
    by = tuple(a.reviewer_id for a in deciding)
    at = max(a.finished.isoformat(timespec="seconds") for a in deciding if a.finished)

    def found(state: str, criteria: drafts.Draft | None = None) -> Outcome:
        return Outcome(state, criteria, by, at, passed)

    if any(a.answer["disputed"] for a in deciding):
        return found("contested" if third else "disputed")
    decisions = {a.answer["decision"] for a in deciding}
    if decisions == {"reject"}:
        return found("rejected")
    rubrics = [drafts.from_json(a.answer["criteria"]) for a in deciding]
    if "reject" in decisions or not all(drafts.same_rubric(rubrics[0], r) for r in rubrics[1:]):
        return found("differ")
    return found("accepted" if decisions == {"accept"} else "corrected", rubrics[0])
