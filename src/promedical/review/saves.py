"""Saving an answer: nothing is lost, nothing is overwritten unseen, nothing is saved twice.

A save names the version it was made from (`base`) and an id of its own (`save_id`). Assignment,
change and audit entry are written in one transaction, and the reply is sent after its commit. The
same id again gives the same version, so that a client whose reply was lost simply asks again.
Another version than `base` is a conflict, handed back with the current answer.

Left to others: what an answer may be and what follows a finished one. `rounds` and `adjudication`
each have
    check_answer(content, answer, *, finish, before, part) -> list[str]      what is wrong with it
    on_finished(session, assignment) -> None                               in the same transaction
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from promedical.review import audit_log
from promedical.review.tables import Assignment, Change, Item, Round, now

__all__ = [
    "Closed",
    "Conflict",
    "InvalidAnswer",
    "NotYours",
    "SaveError",
    "Saved",
    "changes_between",
    "save",
]

SAVE_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
# Nobody works an hour between two saves; a clock that jumped does.
LONGEST = 3600.0
_CHANGE = Change.metadata.tables["change"]


def _adding(dialect: Any) -> Any:
    """Adds a change, or nothing if its id is there: asking first would take a round trip."""
    add = dialect.insert(_CHANGE).on_conflict_do_nothing(index_elements=["id"])
    return add.returning(_CHANGE.c.id)


_ADD = {"postgresql": _adding(postgresql), "sqlite": _adding(sqlite)}


class SaveError(ValueError):
    """A save that was not accepted; nothing was written."""


class NotYours(SaveError):
    """No such assignment for this reviewer."""


class Closed(SaveError):
    """The assignment is finished, its round closed, or its item removed."""


class InvalidAnswer(SaveError):
    """The answer is not one that can be kept.

    Args:
        problems: a line for each, field first.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Conflict(SaveError):
    """Somebody (another tab) saved meanwhile.

    Args:
        version: the current one.
        answer: the current one.
        state: open, started or done.
    """

    def __init__(self, version: int, answer: dict[str, Any], state: str) -> None:
        super().__init__(f"the answer is at version {version} by now")
        self.version = version
        self.answer = answer
        self.state = state


@dataclass(frozen=True)
class Saved:
    """What was acknowledged.

    Args:
        version: of the answer after this save.
        state: open, started or done.
        repeated: whether this save had been acknowledged before.
    """

    version: int
    state: str
    repeated: bool = False


def save(
    session: Session,
    assignment_id: str,
    reviewer_id: str,
    *,
    base: int,
    save_id: str,
    answer: dict[str, Any],
    seconds: float,
    state: str | None = None,
) -> Saved:
    """Write a reviewer's answer.

    Args:
        session: of `Database.write()`; the caller commits by leaving it before replying.
        assignment_id: whose answer.
        reviewer_id: who is asking; has to be the assignment's own.
        base: version the answer was made from; 0 for the first.
        save_id: the client's id of this save, 8 to 64 of A-Z a-z 0-9 _ -.
        answer: the whole document.
        seconds: spent on it since the last acknowledged save, ≥ 0.
        state: "done" to finish; None to go on later.

    Raises:
        NotYours, Closed, Conflict, InvalidAnswer: as their names say; nothing was written.
    """
    _check_arguments(base, save_id, answer, seconds, state)
    found = session.execute(
        select(Assignment, Item, Round.kind, Round.state)
        .join(Item, Item.id == Assignment.item_id)
        .join(Round, Round.id == Item.round_id)
        .where(Assignment.id == assignment_id, Assignment.reviewer_id == reviewer_id)
        .with_for_update(of=Assignment)
    ).one_or_none()
    if found is None:
        raise NotYours("no such assignment")
    assignment, item, kind, round_state = found
    digest = audit_log.digest_of({"answer": answer, "state": state}, item.salt)
    refusal = _refusal(assignment, item, round_state, base)
    if refusal is not None:
        # A save that was made is refused too when it comes again: its version is old by now.
        repeated = _repeated(session, assignment, save_id, digest)
        if repeated is None:
            raise refusal
        return repeated
    problems = _kind(kind).check_answer(
        item.content,
        answer,
        finish=state == "done",
        before=assignment.answer,
        part=assignment.part,
    )
    if problems:
        raise InvalidAnswer(problems)
    return _write(session, assignment, kind, answer, save_id, digest, seconds, state)


def _refusal(
    assignment: Assignment, item: Item, round_state: str, base: int
) -> Closed | Conflict | None:
    """Why nothing can be saved on this version, whatever the answer."""
    if item.removed_at is not None:
        return Closed("the item was removed")
    if round_state != "open":
        return Closed("the round is closed")
    if assignment.state == "done":
        return Closed("the item is finished")
    if base != assignment.version:
        return Conflict(assignment.version, assignment.answer, assignment.state)
    return None


def _repeated(session: Session, assignment: Assignment, save_id: str, digest: str) -> Saved | None:
    """What was acknowledged when this save came before, or None if it never did."""
    earlier = session.get(Change, save_id)
    if earlier is None:
        return None
    if earlier.assignment_id != assignment.id or earlier.digest != digest:
        raise InvalidAnswer([f"save: the id {save_id!r} was used for another save"])
    return Saved(earlier.version, assignment.state, repeated=True)


def _write(
    session: Session,
    assignment: Assignment,
    kind: str,
    answer: dict[str, Any],
    save_id: str,
    digest: str,
    seconds: float,
    state: str | None,
) -> Saved:
    at = now()
    entries = changes_between(assignment.answer, answer)
    if state == "done":
        entries.append({"what": "finished", "path": "", "from": None, "to": None})
    change = {
        "id": save_id,
        "assignment_id": assignment.id,
        "reviewer_id": assignment.reviewer_id,
        "version": assignment.version + 1,
        "at": at,
        "entries": entries,
        "digest": digest,
        "seconds": seconds,
    }
    connection = session.connection()
    if connection.execute(_ADD[connection.dialect.name], change).first() is None:
        repeated = _repeated(session, assignment, save_id, digest)
        assert repeated is not None
        return repeated
    assignment.answer = answer
    assignment.version += 1
    assignment.seconds += seconds
    assignment.started = assignment.started or at
    assignment.state = state or "started"
    assignment.finished = at if state == "done" else None
    session.flush()
    if state == "done":
        _kind(kind).on_finished(session, assignment)
    action = "assignment.finish" if state == "done" else "assignment.save"
    audit_log.record(
        session, assignment.reviewer_id, action, f"assignment:{assignment.id}", digest=digest
    )
    return Saved(assignment.version, assignment.state)


def _kind(kind: str) -> Any:
    """The module that knows this kind of round."""
    if kind == "rubrics":
        from promedical.review import rounds

        return rounds
    from promedical.review import adjudication

    return adjudication


def _check_arguments(base: Any, save_id: Any, answer: Any, seconds: Any, state: Any) -> None:
    problems = []
    if not isinstance(base, int) or isinstance(base, bool) or base < 0:
        problems.append("base: expected a version, a whole number from 0")
    if not isinstance(save_id, str) or not SAVE_ID.fullmatch(save_id):
        problems.append("save: expected an id of 8 to 64 characters A-Z a-z 0-9 _ -")
    if not isinstance(answer, dict):
        problems.append("answer: expected an object")
    numeric = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not numeric or not math.isfinite(seconds) or not 0 <= seconds <= LONGEST:
        problems.append(f"seconds: expected a number from 0 to {LONGEST:.0f}")
    if state not in (None, "done"):
        problems.append("state: expected nothing or 'done'")
    if problems:
        raise InvalidAnswer(problems)


def changes_between(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    """What changed between two documents, as `{"what", "path", "from", "to"}`.

    `what` is added, removed, changed or moved; `path` has slashes. Entries of a list that have an
    "id" are compared with the entry of that id, and their order by itself ("moved", ids as values).
    """
    if before == after and type(before) is type(after):
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return _changes_of_keys(before, after, path)
    old, new = _by_id(before), _by_id(after)
    if old is None or new is None:
        return [{"what": "changed", "path": path, "from": before, "to": after}]
    found = _changes_of_keys(old, new, path)
    kept_before = [i for i in old if i in new]
    kept_after = [i for i in new if i in old]
    if kept_before != kept_after:
        found.append({"what": "moved", "path": path, "from": kept_before, "to": kept_after})
    return found


def _changes_of_keys(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for key in [*before, *(k for k in after if k not in before)]:
        at = f"{path}/{key}" if path else str(key)
        if key not in after:
            found.append({"what": "removed", "path": at, "from": before[key], "to": None})
        elif key not in before:
            found.append({"what": "added", "path": at, "from": None, "to": after[key]})
        else:
            found += changes_between(before[key], after[key], at)
    return found


def _by_id(value: Any) -> dict[str, Any] | None:
    """A list of things with ids as a mapping, or None if it is no such list."""
    if not isinstance(value, list) or not value:
        return None if not isinstance(value, list) else {}
    if not all(isinstance(v, Mapping) and isinstance(v.get("id"), str) for v in value):
        return None
    by_id = {v["id"]: v for v in value}
    return by_id if len(by_id) == len(value) else None
