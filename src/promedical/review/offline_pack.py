"""A reviewer's work as one HTML file that needs no server and no network, and its answers back.

    make_packs(database, round_id, folder)    a file a reviewer
    unpack(database, path)                    the answers of a file that a reviewer handed back

The file holds the same templates and scripts as the application; its policy allows exactly these
scripts (by their hashes) and no connection at all. Answers stay in the browser until the reviewer
saves them as JSON lines. Its first line is what the pack was made for (pack, round, reviewer,
assignments with their versions), signed with this installation's key, so that answers are taken
only for what was given out; the reviewer can of course write what they like into their own answers.
Importing a file again changes nothing, a later file of the same pack goes on from the earlier one,
and an answer that was changed online meanwhile is refused.

What a file cannot do: it cannot keep a secret from its holder. In an adjudication the criteria are
encoded and not shown before the overall preference is given, but somebody who takes the file apart
finds them. With `strict` they are left out until the preference has been handed back. Third
readings stay online. Left to others: saving (`exchange`), the page's behaviour (static/offline.js).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from promedical.review import audit_log
from promedical.review.database import Database
from promedical.review.exchange import (
    ExchangeError,
    ImportReport,
    Returned,
    Task,
    bring_in,
    by_reviewer,
    open_tasks,
    write_private,
)
from promedical.review.tables import Assignment, Change, Reviewer, Round, Setting, new_id, now

__all__ = ["FORMAT", "Pack", "make_packs", "read_answers", "render", "unpack"]

FORMAT = "promedical-offline-1"
KEY = "offline_key"
STYLES = {
    "rubrics": ("app.css", "autosave.css", "rubric.css", "offline.css"),
    "adjudication": ("app.css", "autosave.css", "adjudicate.css", "offline.css"),
}
SAVING = ("stores.js", "autosave.js", "versions.js")
EDITOR = ("draft.js", "rubric_changes.js", "rubric_keys.js", "rubric_view.js", "rubric.js")
SCRIPTS = {
    "rubrics": (*SAVING, *EDITOR, "offline.js"),
    "adjudication": (*SAVING, "adjudicate.js", "offline.js"),
}
LONGEST_FILE = 64_000_000


@dataclass(frozen=True)
class Pack:
    """A file that was made.

    Args:
        reviewer: id.
        path: of the file.
        items: in it.
    """

    reviewer: str
    path: Path
    items: int


# ---- out ----


def make_packs(
    database: Database,
    round_id: str,
    folder: Path,
    *,
    reviewer_id: str | None = None,
    strict: bool = False,
) -> tuple[list[Pack], Counter[str]]:
    """Write a file for every reviewer who has open items; and what was left out, by reason.

    Args:
        database: the application's.
        round_id: of an open round.
        folder: for the files, which only their owner may read.
        reviewer_id: only this one's.
        strict: leave the criteria out where the overall preference is not given yet.

    Raises:
        ExchangeError: no such round, or it is closed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with database.write() as session:
        tasks, left_out = open_tasks(session, round_id, reviewer_id)
        round_ = session.get_one(Round, round_id)
        key = _key(session)
        for reviewer, mine in by_reviewer(tasks).items():
            person = session.get_one(Reviewer, reviewer)
            if not person.active:
                left_out["of accounts that are locked"] += len(mine)
                continue
            html = render(session, mine, round_, person, key, strict=strict)
            path = folder / f"promedical-{_slug(round_.name)}-{reviewer}.html"
            write_private(path, html)
            made.append(Pack(reviewer, path, len(mine)))
        audit_log.record(session, "system", "pack.make", f"round:{round_id}")
    return made, left_out


def render(
    session: Session,
    tasks: Sequence[Task],
    round_: Round,
    person: Reviewer,
    key: bytes,
    *,
    strict: bool = False,
) -> str:
    """The file of one reviewer."""
    from promedical.review.pages import environment, page_context

    pack = new_id()
    signed = {
        "format": FORMAT,
        "pack": pack,
        "round": round_.id,
        "kind": round_.kind,
        "reviewer": person.id,
        "made": now().isoformat(timespec="seconds"),
        "assignments": {task.assignment: task.base for task in tasks},
    }
    context = page_context(person.language)
    items = [_item(session, task, context, strict) for task in tasks]
    document = {
        "head": json.dumps(signed | {"signature": _signature(signed, key)}, sort_keys=True),
        "pack": pack,
        "kind": round_.kind,
        "file": f"answers-{_slug(round_.name)}-{person.id}",
        "items": items,
    }
    style = "\n".join(_source(name) for name in STYLES[round_.kind])
    scripts = [_source(name) for name in SCRIPTS[round_.kind]]
    return (
        environment()
        .get_template("offline.html")
        .render(
            context
            | {
                "round": round_,
                "person": person,
                "style": style,
                "scripts": scripts,
                "policy": _policy(style, scripts),
                "pack": document,
                "at": 1,
                "of": 1,
            }
        )
    )


def _item(session: Session, task: Task, context: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    assignment = session.get_one(Assignment, task.assignment)
    item: dict[str, Any] = {"assignment": task.assignment, "answer": dict(task.answer)}
    if task.kind == "rubrics":
        from promedical.review.pages_rounds import item_data

        item["data"] = item_data(assignment)
        item["answer"] = item["data"]["answer"]
        return item
    given = dict(task.answer) if task.answer.get("preference_given") else {}
    item["parts"] = {"preference": _encoded(_fragment(task, {}, context))}
    if given or not strict:
        answer = given or {"preference_given": True}
        item["parts"]["criteria"] = _encoded(_fragment(task, answer, context))
    return item


def _fragment(task: Task, answer: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """The item as the application shows it at this stage."""
    from promedical.review.adjudication_view import view_of
    from promedical.review.pages import environment

    view = view_of(
        task.content,
        assignment_id=task.assignment,
        order=task.order,
        answer=answer,
        part="first",
        version=0,
        state="started",
    )
    template = environment().get_template("_adjudication_item.html")
    return template.render(dict(context) | {"view": view, "next": "", "whole": False})


def _encoded(text: str) -> str:
    """Base64, so that the page's source is no reading matter; it is no protection."""
    return base64.b64encode(text.encode()).decode()


def _source(name: str) -> str:
    from promedical.review.pages import STATIC

    text = (STATIC / name).read_text(encoding="utf-8")
    if name.endswith(".css"):
        # A file that stands alone has no pictures beside it.
        text = re.sub(r'background: url\("[^")]*"\)[^;]*;', "", text)
    if re.search(r"</(script|style)|<!--", text, re.IGNORECASE):
        raise ExchangeError(f"static/{name}: holds what would end an inline script or style")
    return text


def _policy(style: str, scripts: Sequence[str]) -> str:
    hashes = " ".join(_sha256(text) for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_sha256(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "round"


# ---- the signature ----


def _key(session: Session) -> bytes:
    found = session.get(Setting, KEY)
    if found is None:
        found = Setting(name=KEY, value=secrets.token_hex(32))
        session.add(found)
        session.flush()
    return bytes.fromhex(found.value)


def _signature(signed: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


# ---- back ----


def unpack(database: Database, path: Path) -> ImportReport:
    """Save the answers of a file that a reviewer handed back.

    Raises:
        ExchangeError: no such file, no answers of a pack, or a pack that was not made here.
    """
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise ExchangeError(f"{path}: is larger than {LONGEST_FILE} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ExchangeError(f"{path}: not found, expected the answers of an offline pack") from None
    except UnicodeDecodeError:
        raise ExchangeError(f"{path}: is no text, expected the answers of a pack") from None
    with database.write() as session:  # the key is made here if there is none yet
        answers, report = read_answers(session, text, str(path))
    done = bring_in(database, "offline", answers)
    done.refused += report.refused
    done.repeated += report.repeated
    done.skipped += report.skipped
    return done


def read_answers(session: Session, text: str, name: str) -> tuple[list[Returned], ImportReport]:
    """The answers in a file's text, and what in it is not to be saved.

    Raises:
        ExchangeError: a line that cannot be read, or a first line that was not made here.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ExchangeError(f"{name}: is empty, expected the answers of an offline pack")
    head = _head(session, lines[0], name)
    report = ImportReport()
    answers = []
    for number, line in enumerate(lines[1:], start=2):
        entry = _entry(line, f"{name}: line {number}")
        assignment = entry["assignment"]
        if assignment not in head["assignments"]:
            report.refused.append((assignment, "is not part of this pack"))
            continue
        made = _returned(session, head, entry)
        if isinstance(made, str):
            report.skipped[made] += 1
        else:
            answers.append(made)
    return answers, report


def _head(session: Session, line: str, name: str) -> dict[str, Any]:
    head = _object(line, f"{name}: line 1")
    if head.get("format") != FORMAT:
        raise ExchangeError(f"{name}: line 1: format: expected {FORMAT!r}")
    signature = str(head.pop("signature", ""))
    if not hmac.compare_digest(signature.encode(), _signature(head, _key(session)).encode()):
        raise ExchangeError(
            f"{name}: line 1: signature: this pack was not made by this installation, or the line "
            "was changed"
        )
    return head


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ExchangeError(f"{where}: not JSON; is the file complete?") from None
    if not isinstance(found, dict):
        raise ExchangeError(f"{where}: found {type(found).__name__}, expected an object")
    return found


def _entry(line: str, where: str) -> dict[str, Any]:
    entry = _object(line, where)
    for field, kind in (("assignment", str), ("version", int), ("save", str), ("answer", dict)):
        if not isinstance(entry.get(field), kind):
            raise ExchangeError(f"{where}: {field}: missing, or not as a pack writes it")
    return entry


def _returned(session: Session, head: Mapping[str, Any], entry: dict[str, Any]) -> Returned | str:
    """What is to be saved, or why nothing is.

    A save's id names pack and version in the pack, so that what the database has of the same pack
    can be told from what was done online.
    """
    assignment = entry["assignment"]
    mark = f"off-{head['pack']}-"
    digest = hashlib.sha256(entry["save"].encode("utf-8", "replace")).hexdigest()[:16]
    save_id = f"{mark}{entry['version']:06d}-{digest}"
    last = session.scalar(
        select(Change)
        .where(Change.assignment_id == assignment)
        .order_by(Change.version.desc())
        .limit(1)
    )
    base = int(head["assignments"][assignment])
    before = _seconds_before(session, assignment, mark)
    if last is not None and last.id.startswith(mark):
        if last.id[len(mark) :][:6] > f"{entry['version']:06d}":
            return "older than what the same pack had brought already"
        base = last.version
    seconds = entry.get("seconds")
    seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
    return Returned(
        assignment,
        str(head["reviewer"]),
        base,
        entry["answer"],
        max(0.0, seconds - before),
        entry.get("finish") is True,
        save_id,
    )


def _seconds_before(session: Session, assignment: str, mark: str) -> float:
    """Time that earlier files of the pack have brought; a file's own is the pack's whole."""
    found = session.scalars(
        select(Change.seconds).where(
            Change.assignment_id == assignment, Change.id.startswith(mark, autoescape=True)
        )
    )
    return float(sum(found))
