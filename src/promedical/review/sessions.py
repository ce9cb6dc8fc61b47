"""Being logged in: a random cookie whose hash is kept, an end when idle, an end in any case.

A login always makes a new session, so that a cookie known beforehand is worth nothing. Left to
others: whether a password is right (`accounts`), the cookie's attributes (`pages_accounts`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, select
from sqlalchemy.orm import Session

from promedical.review.database import Database
from promedical.review.security import Person
from promedical.review.tables import LoginSession, Reviewer, now

if TYPE_CHECKING:
    from promedical.review.app import ReviewSettings

__all__ = ["end_session", "end_sessions_of", "hashed", "open_session", "person_of"]

# last_seen is written at most this often, so that reading a page is not a write.
SEEN_STEP = dt.timedelta(seconds=60)

_WHOSE = (
    select(
        Reviewer.id,
        Reviewer.login,
        Reviewer.name,
        Reviewer.role,
        Reviewer.language,
        Reviewer.specialty,
        Reviewer.active,
        LoginSession.csrf,
        LoginSession.last_seen,
        LoginSession.expires,
    )
    .join(Reviewer, Reviewer.id == LoginSession.reviewer_id)
    .where(LoginSession.token_hash == bindparam("given"))
)


def hashed(token: str) -> str:
    """SHA-256 of a random token; tokens are long, so that no slower hash is needed."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def open_session(session: Session, reviewer_id: str, settings: ReviewSettings) -> str:
    """Begin a session; returns the cookie's value. Sessions that ended are removed."""
    token = secrets.token_urlsafe(32)
    at = now()
    idle = at - dt.timedelta(hours=settings.idle_hours)
    session.execute(
        delete(LoginSession).where((LoginSession.expires <= at) | (LoginSession.last_seen <= idle))
    )
    session.add(
        LoginSession(
            token_hash=hashed(token),
            reviewer_id=reviewer_id,
            csrf=secrets.token_urlsafe(24),
            created=at,
            last_seen=at,
            expires=at + dt.timedelta(hours=settings.session_hours),
        )
    )
    session.flush()
    return token


def end_session(session: Session, token: str) -> None:
    """Log out."""
    session.execute(delete(LoginSession).where(LoginSession.token_hash == hashed(token)))


def end_sessions_of(session: Session, reviewer_id: str) -> None:
    """Log somebody out everywhere."""
    session.execute(delete(LoginSession).where(LoginSession.reviewer_id == reviewer_id))


def person_of(database: Database, token: str, settings: ReviewSettings) -> Person | None:
    """Whose session a cookie is, or None if it is nobody's or has ended."""
    at = now()
    # Every request asks this, so it takes columns alone, without a session around them.
    with database.glance() as connection:
        found = connection.execute(_WHOSE, {"given": hashed(token)}).one_or_none()
    if found is None:
        return None
    idle = dt.timedelta(hours=settings.idle_hours)
    if not found.active or at >= found.expires or at - found.last_seen >= idle:
        return None
    if at - found.last_seen >= SEEN_STEP:
        with database.write() as session:
            current = session.get(LoginSession, hashed(token))
            if current is not None:
                current.last_seen = at
    return Person(
        id=found.id,
        login=found.login,
        name=found.name,
        role=found.role,
        language=found.language,
        csrf=found.csrf,
        specialty=found.specialty,
    )
