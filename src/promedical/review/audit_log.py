"""The audit log: who did what to which id, and when. It only grows, and each entry seals the last.

    hash_n = SHA-256(JSON of action, actor, at, digest, hash_{n-1}, seq, subject)

An entry holds ids, an action and a digest, never content, so that erasing content leaves the log
whole. A digest is made with the item's salt, which is erased with the item: afterwards it cannot be
tested against a guess. Triggers in the database (`migrations/`) refuse to change or remove entries.
The chain shows every change of an entry inside it; that the end was cut off is seen only against a
hash kept elsewhere, which `promedical review verify-log --head` prints and takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from promedical.review.tables import AuditEvent, now

__all__ = ["AuditLogError", "LogState", "digest_of", "record", "verify"]

FIRST = "0" * 64
SEALED = ("seq", "at", "actor_id", "action", "subject", "digest", "previous_hash")
_LAST = select(AuditEvent.seq, AuditEvent.hash).order_by(AuditEvent.seq.desc()).limit(1)
_ADD = AuditEvent.metadata.tables["audit_event"].insert()
# One call, so that the lock on the chain is held for one round trip and the commit, not for four.
_APPEND = text(
    "SELECT promedical_audit(:at, :actor_id, :action, :subject, :digest, :head, :middle, :tail)"
)


class AuditLogError(ValueError):
    """The audit log does not add up; the message names the entry."""


@dataclass(frozen=True)
class LogState:
    """A log that adds up.

    Args:
        entries: how many there are.
        head: hash of the last, or 64 zeros.
    """

    entries: int
    head: str


def digest_of(document: Any, salt: str = "") -> str:
    """SHA-256 of a JSON document and a salt, in hexadecimal."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


def record(session: Session, actor_id: str, action: str, subject: str, *, digest: str = "") -> None:
    """Add an entry in this session's transaction; call it last, other writers wait from here on.

    Args:
        session: of `Database.write()`.
        actor_id: a reviewer's id, or "system" for the command line, or "-" for nobody known.
        action: a verb with a dot, such as "assignment.save".
        subject: ids, such as "assignment:Xy…"; never content.
        digest: of what was written, by `digest_of` with the item's salt.
    """
    session.flush()
    # Without the unit of work: every save comes through here.
    connection = session.connection()
    entry: dict[str, Any] = {
        "at": now(),
        "actor_id": actor_id,
        "action": action,
        "subject": subject,
        "digest": digest,
    }
    if connection.dialect.name == "postgresql":
        # The database finds the last entry and puts its hash and the new number between these.
        head, middle, tail = _pieces(entry)
        connection.execute(_APPEND, {**entry, "head": head, "middle": middle, "tail": tail})
        return
    last = connection.execute(_LAST).first()
    seq, previous = (1, FIRST) if last is None else (last.seq + 1, last.hash)
    entry |= {"seq": seq, "previous_hash": previous}
    connection.execute(_ADD, {**entry, "hash": _hash(entry)})


def verify(session: Session, *, head: str | None = None) -> LogState:
    """Recompute the whole chain.

    Args:
        session: any.
        head: a hash that was the log's last once and has to be in it still, or None.

    Raises:
        AuditLogError: an entry that was changed, is missing or out of place, or `head` is gone.
    """
    previous, count, seen = FIRST, 0, head in (None, FIRST)
    for entry in session.scalars(
        select(AuditEvent).order_by(AuditEvent.seq).execution_options(yield_per=1000)
    ):
        count += 1
        if entry.seq != count:
            raise AuditLogError(f"audit log: entry {count} is missing, found {entry.seq} there")
        if entry.previous_hash != previous:
            raise AuditLogError(f"audit log: entry {count} does not follow the one before it")
        if entry.hash != _hash({name: getattr(entry, name) for name in SEALED}):
            raise AuditLogError(f"audit log: entry {count} was changed after it was written")
        previous = entry.hash
        seen = seen or previous == head
    if not seen:
        raise AuditLogError(
            f"audit log: the hash {head} is not in it; entries at its end were removed, or it is "
            "another log"
        )
    return LogState(count, previous)


def _hash(entry: Mapping[str, Any]) -> str:
    head, middle, tail = _pieces(entry)
    sealed = f"{head}{entry['previous_hash']}{middle}{entry['seq']}{tail}"
    return hashlib.sha256(sealed.encode()).hexdigest()


def _pieces(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """What is sealed, as JSON in the order of its keys, without previous hash and number."""
    first = {name: entry[name] for name in ("action", "actor_id")}
    first |= {"at": entry["at"].isoformat(timespec="microseconds"), "digest": entry["digest"]}
    before = json.dumps(first, separators=(",", ":"))
    after = json.dumps({"subject": entry["subject"]}, separators=(",", ":"))
    return f'{before[:-1]},"previous_hash":"', '","seq":', f",{after[1:]}"
