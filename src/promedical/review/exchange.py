"""Work that leaves the application and comes back: open tasks out, answers in.

What `label_studio`, `argilla` and `offline_pack` have in common. A `Task` is one reviewer's part of
one item, with what this reviewer may see and nothing else: other models' names, judges and other
reviewers are not in it. Third readings stay in the application, because the other two judgments are
shown only after a blind one was locked. Answers come back through `saves.save` under ids made of
the answer itself, so that importing a file twice changes nothing, and an answer that was changed
online meanwhile is refused, not overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from promedical.review import adjudication_answer, audit_log, drafts, saves
from promedical.review.database import Database
from promedical.review.tables import Assignment, Item, Round

__all__ = [
    "ExchangeError",
    "ImportReport",
    "Returned",
    "Task",
    "add_returned",
    "bring_in",
    "by_reviewer",
    "conversation_text",
    "decision_of",
    "is_complete",
    "joined",
    "open_tasks",
    "pairs_of",
    "preference_known",
    "read_json",
    "save_id_of",
    "write_private",
]

# Parts of an answer that are kept by response.
BY_RESPONSE = ("verdicts", "disputed", "dangers")


class ExchangeError(ValueError):
    """A file that cannot be read or made; the message names it, and where in it."""


@dataclass(frozen=True)
class Task:
    """One reviewer's open part of one item.

    Args:
        assignment: its id.
        reviewer: the reviewer's id, a pseudonym.
        round: the round's id.
        kind: "rubrics" or "adjudication".
        base: version of the answer.
        order: keys of the responses, as this reviewer sees them.
        content: of the item.
        answer: so far.
    """

    assignment: str
    reviewer: str
    round: str
    kind: str
    base: int
    order: tuple[str, ...]
    content: Mapping[str, Any]
    answer: Mapping[str, Any]

    @property
    def responses(self) -> list[dict[str, Any]]:
        """The responses in this reviewer's order."""
        by_key = {r["key"]: r for r in self.content.get("responses", [])}
        return [by_key[key] for key in (self.order or by_key)]


@dataclass(frozen=True)
class Returned:
    """An answer that came back.

    Args:
        assignment: whose part.
        reviewer: the pseudonym it was given out to.
        base: version it was made from.
        patch: parts of the answer; the others stay as they are.
        seconds: spent on it.
        finish: whether the reviewer finished it.
        save_id: of this save; made of its content if "".
    """

    assignment: str
    reviewer: str
    base: int
    patch: Mapping[str, Any]
    seconds: float = 0.0
    finish: bool = False
    save_id: str = ""


@dataclass
class ImportReport:
    """What became of the answers of a file.

    Args:
        saved: assignments whose answer is new.
        repeated: assignments whose answer had been imported before.
        refused: (assignment, reason); nothing was written for it.
        skipped: entries that hold no answer, by reason.
    """

    saved: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [f"{len(self.saved)} saved", f"{len(self.repeated)} imported before"]
        parts += [f"{count} {reason}" for reason, count in sorted(self.skipped.items())]
        parts.append(f"{len(self.refused)} refused")
        return ", ".join(parts)


def open_tasks(
    session: Session, round_id: str, reviewer_id: str | None = None
) -> tuple[list[Task], Counter[str]]:
    """Every part of a round that may be given out, by reviewer and position; and what is left out.

    Args:
        session: any.
        round_id: of an open round.
        reviewer_id: only this reviewer's.

    Raises:
        ExchangeError: no such round, or it is closed.
    """
    found = session.get(Round, round_id)
    if found is None:
        raise ExchangeError(f"round {round_id!r}: there is none with this id")
    if found.state != "open":
        raise ExchangeError(f"round {round_id!r}: it is closed, expected an open one")
    query = (
        select(Assignment, Item)
        .join(Item, Item.id == Assignment.item_id)
        .where(Item.round_id == round_id)
        .order_by(Assignment.reviewer_id, Item.position, Assignment.id)
    )
    if reviewer_id is not None:
        query = query.where(Assignment.reviewer_id == reviewer_id)
    tasks, left_out = [], Counter[str]()
    for assignment, item in session.execute(query):
        reason = _left_out(assignment, item)
        if reason:
            left_out[reason] += 1
            continue
        tasks.append(
            Task(
                assignment=assignment.id,
                reviewer=assignment.reviewer_id,
                round=round_id,
                kind=found.kind,
                base=assignment.version,
                order=tuple(assignment.response_order or ()),
                content=item.content,
                answer=assignment.answer or {},
            )
        )
    return tasks, left_out


def _left_out(assignment: Assignment, item: Item) -> str:
    if item.removed_at is not None:
        return "removed"
    if assignment.state == "done":
        return "finished already"
    return "third readings, which stay online" if assignment.part == "third" else ""


def by_reviewer(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Reviewer id → tasks, in order."""
    found: defaultdict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        found[task.reviewer].append(task)
    return dict(found)


def pairs_of(task: Task) -> list[tuple[str, str]]:
    """The pairs of responses that this reviewer compares, in their order."""
    return adjudication_answer.pairs_of([r["key"] for r in task.responses])


def preference_known(task: Task) -> bool:
    """Whether the overall preference has been given, so that the criteria may be shown."""
    return bool(task.answer.get("preference_given"))


def decision_of(task: Task, decision: str | None, criteria: list[dict[str, Any]]) -> str | None:
    """A reviewer's decision where the tool asks for "accept" or "reject" alone.

    Whether something was edited is seen from the criteria, as `rounds.check_answer` sees it.
    """
    if decision not in ("accept", "accept_with_edits"):
        return decision
    draft = drafts.opened(task.content["rubric"]["criteria"])
    changed = drafts.edited(drafts.diff(draft, drafts.from_json(criteria)))
    return "accept_with_edits" if changed else "accept"


def is_complete(task: Task, patch: Mapping[str, Any]) -> bool:
    """Whether an adjudication's answer has everything with this patch, so that it is finished."""
    answer = joined(task.answer, patch)
    wanted = adjudication_answer.wanted_criteria(task.content, task.answer, "first")
    missing = adjudication_answer.missing_verdicts(answer, wanted)
    return bool(answer.get("preference_given")) and not missing


def conversation_text(messages: Sequence[Mapping[str, str]], t: Callable[..., str]) -> str:
    """A conversation as plain text; one turn of a user alone is only its text."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    turns = (f"{t('exchange.role_' + m['role'])}:\n{m['content']}" for m in messages)
    return "\n\n".join(turns)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ExchangeError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExchangeError(f"{path}: not found, expected a file that was exported") from None
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path}: not JSON ({type(error).__name__})") from None


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read; it appears whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(staging, path)


def joined(before: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """An answer with parts of it replaced; what is kept by response, response by response."""
    made = {**before, **patch}
    for name in BY_RESPONSE:
        if isinstance(before.get(name), Mapping) and isinstance(patch.get(name), Mapping):
            made[name] = {**before[name], **patch[name]}
    return made


def add_returned(
    found: dict[str, Returned],
    task: Task,
    ours: Mapping[str, Any],
    patch: Mapping[str, Any],
    seconds: float,
) -> None:
    """Add a part of an answer to those that a file holds, by assignment.

    Args:
        found: assignment → what came back so far.
        task: of the assignment.
        ours: with "reviewer" and "base", as they were given out.
        patch: the part.
        seconds: spent on it.
    """
    before = found.get(task.assignment)
    whole = joined(before.patch if before else {}, patch)
    finish = is_complete(task, whole) if task.kind == "adjudication" else bool(whole["decision"])
    found[task.assignment] = Returned(
        task.assignment,
        str(ours["reviewer"]),
        int(ours["base"]),
        whole,
        seconds + (before.seconds if before else 0.0),
        finish,
    )


def save_id_of(origin: str, returned: Returned) -> str:
    """An id that the same answer to the same version always has."""
    document = [origin, returned.assignment, returned.base, returned.patch, returned.finish]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{origin[:16]}-{digest[:40]}"


def bring_in(database: Database, origin: str, answers: Sequence[Returned]) -> ImportReport:
    """Save answers that came back, each in a transaction of its own, as their reviewers.

    Args:
        database: the application's.
        origin: where from, such as "label-studio"; part of the saves' ids.
        answers: what came back.
    """
    report = ImportReport()
    for returned in answers:
        try:
            repeated = _bring_in(database, origin, returned)
        except saves.Conflict as error:
            reason = f"changed online meanwhile (version {error.version}, not {returned.base})"
            report.refused.append((returned.assignment, reason))
        except saves.SaveError as error:
            report.refused.append((returned.assignment, str(error)))
        else:
            (report.repeated if repeated else report.saved).append(returned.assignment)
    with database.write() as session:
        audit_log.record(session, "system", f"import.{origin}", f"answers:{len(answers)}")
    return report


def _bring_in(database: Database, origin: str, returned: Returned) -> bool:
    """Save one answer; whether it was there already."""
    save_id = returned.save_id or save_id_of(origin, returned)
    with database.write() as session:
        assignment = session.get(Assignment, returned.assignment)
        if assignment is None or assignment.reviewer_id != returned.reviewer:
            raise saves.NotYours("no such assignment of this reviewer")
        before = assignment.answer or {}
        answer = joined(before, returned.patch)
        base = returned.base
        first: dict[str, Any] = {
            name: answer[name] for name in ("preference", "preference_given") if name in answer
        }
        new = first.get("preference_given") and not before.get("preference_given")
        # The overall preference is saved before what was judged after it, as online.
        if new and answer.get("verdicts") and session.get(saves.Change, save_id) is None:
            base = saves.save(
                session,
                returned.assignment,
                returned.reviewer,
                base=base,
                save_id=f"{save_id[:58]}-pref",
                answer={**before, **first},
                seconds=0.0,
            ).version
        return saves.save(
            session,
            returned.assignment,
            returned.reviewer,
            base=base,
            save_id=save_id,
            answer=answer,
            seconds=min(max(returned.seconds, 0.0), saves.LONGEST),
            state="done" if returned.finish else None,
        ).repeated
