"""Erasure for good: the content of items with everything answered about them, or who a person is.

An item keeps its row (ids, when it was removed), so that counts stay true. Its salt goes too: the
digests in the audit log can then be matched with no guess, and the log stays whole. Afterwards the
space is overwritten: SQLite zeroes what is deleted, the write-ahead log is cut off and the file
rewritten; PostgreSQL rewrites the tables. Left to others, and said in what is returned: backups,
exported files, packs that were handed out, PostgreSQL's own write-ahead log.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, exists, func, or_, select, text
from sqlalchemy.orm import Session

from promedical.review import accounts, audit_log
from promedical.review.database import Database
from promedical.review.tables import (
    Assignment,
    Base,
    Change,
    Invitation,
    Item,
    ItemSecret,
    LoginAttempt,
    LoginSession,
    Reviewer,
    Round,
    now,
)

__all__ = ["PurgeError", "Purged", "erase_people", "purge"]

# How long to wait for pages that are being read before the write-ahead log is cut off.
PATIENCE = 30.0


class PurgeError(ValueError):
    """Nothing to purge was named, or the overwriting could not be finished; the message says."""


@dataclass(frozen=True)
class Purged:
    """What was removed.

    Args:
        items: items whose content was removed.
        answers: answers about them that held anything.
        changes: changes of those answers.
        unknown: instruction ids that no item has.
        already: items that had been removed before.
    """

    items: int
    answers: int
    changes: int
    unknown: tuple[str, ...] = ()
    already: int = 0


def purge(
    database: Database,
    *,
    instruction_ids: Iterable[str] = (),
    older_than: dt.timedelta | None = None,
    actor: str = "system",
) -> Purged:
    """Remove items by instruction, by age, or both.

    Args:
        database: the application's.
        instruction_ids: every item of these, in every round.
        older_than: every item that nobody has touched for so long: made, assigned and saved before.
        actor: who does it, for the audit log.

    Raises:
        PurgeError: neither was given, or the space could not be overwritten in time (the content
            is removed; the same command tries again).
    """
    wanted = sorted(set(instruction_ids))
    if not wanted and older_than is None:
        raise PurgeError("purge: nothing was named, expected instruction ids or an age")
    if older_than is not None and older_than < dt.timedelta(0):
        raise PurgeError("purge: found a negative age, expected 0 days or more")
    with database.write() as session:
        known = set(
            session.scalars(select(Item.instruction_id).where(Item.instruction_id.in_(wanted)))
        )
        chosen = [Item.instruction_id.in_(wanted)] if wanted else []
        if older_than is not None:
            chosen.append(_untouched_since(now() - older_than))
        items = session.scalars(select(Item).where(or_(*chosen)).with_for_update()).all()
        fresh = [item for item in items if item.removed_at is None]
        counts = [_remove(session, item) for item in fresh]
        for item in fresh:
            audit_log.record(session, actor, "item.purge", f"item:{item.id}")
    overwrite(database)
    return Purged(
        items=len(fresh),
        answers=sum(answers for answers, _ in counts),
        changes=sum(changes for _, changes in counts),
        unknown=tuple(i for i in wanted if i not in known),
        already=len(items) - len(fresh),
    )


def erase_people(database: Database, logins: Iterable[str], *, actor: str = "system") -> list[str]:
    """Remove who people are; their answers stay under their random ids.

    Args:
        database: the application's.
        logins: of the accounts.
        actor: who does it, for the audit log.

    Returns:
        The ids.

    Raises:
        PurgeError: no account has such a login (then nothing was removed), or the space could not
            be overwritten in time (all was removed).
        AccountError: the last lead would be gone.
    """
    found = []
    with database.write() as session:
        for login in logins:
            reviewer_id = accounts.erase_account(session, login, actor=actor)
            if reviewer_id is None:
                raise PurgeError(f"purge: no account has the login {login!r}, nothing was removed")
            found.append(reviewer_id)
    overwrite(database, (Reviewer, Invitation, LoginSession, LoginAttempt))
    return found


def _untouched_since(limit: dt.datetime) -> Any:
    """Items of rounds made before `limit`, with no assignment and no save after it."""
    assignments = select(Assignment.id).where(Assignment.item_id == Item.id)
    late_assignment = exists(assignments.where(Assignment.assigned >= limit))
    late_save = exists(
        select(Change.id)
        .join(Assignment, Assignment.id == Change.assignment_id)
        .where(Assignment.item_id == Item.id, Change.at >= limit)
    )
    old_round = exists(select(Round.id).where(Round.id == Item.round_id, Round.created < limit))
    return old_round & ~late_assignment & ~late_save


def _remove(session: Session, item: Item) -> tuple[int, int]:
    ids = session.scalars(select(Assignment.id).where(Assignment.item_id == item.id)).all()
    of_item = Change.assignment_id.in_(ids)
    changes = session.scalar(select(func.count()).select_from(Change).where(of_item)) or 0
    session.execute(delete(Change).where(of_item))
    session.execute(delete(ItemSecret).where(ItemSecret.item_id == item.id))
    answers = 0
    for assignment in session.scalars(select(Assignment).where(Assignment.item_id == item.id)):
        answers += bool(assignment.answer)
        assignment.answer = {}
        assignment.response_order = []
    item.content = {}
    item.salt = ""
    item.category = item.specialty = None
    item.removed_at = now()
    session.flush()
    return answers, changes


def overwrite(
    database: Database, tables: Sequence[type[Base]] = (Item, ItemSecret, Assignment, Change)
) -> None:
    """Rewrite the tables that had content, so that no removed text is left in the files.

    Args:
        database: the application's; on SQLite the whole file is rewritten.
        tables: those on PostgreSQL.

    Raises:
        PurgeError: somebody has been reading for the whole time we were ready to wait.
    """
    if database.sqlite:
        _overwrite_sqlite(database)
        return
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in tables:
            connection.execute(text(f"VACUUM (FULL) {table.__tablename__}"))


def _overwrite_sqlite(database: Database) -> None:
    # The driver's own connection: VACUUM and a checkpoint cannot be in a transaction.
    raw = database.engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("PRAGMA temp_store = MEMORY")  # no copy in a temporary file
        until = time.monotonic() + PATIENCE
        done = False
        while not done:
            try:
                cursor.execute("VACUUM")
                done = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            except sqlite3.OperationalError:
                done = False  # locked by another process
            if not done and time.monotonic() > until:
                raise PurgeError(
                    f"{database}: the content is removed, but the file could not be overwritten "
                    "because it is being read all the time; run the same command again"
                )
            if not done:
                time.sleep(0.2)
        cursor.execute("PRAGMA temp_store = DEFAULT")
        cursor.close()
    finally:
        raw.close()
