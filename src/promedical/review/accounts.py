"""Accounts: who may come in. Invitations, passwords, and limits on guessing.

An invitation is a link that makes one account, once. A password is kept as an argon2 hash alone.
An attempt to log in is counted in the database before the password is looked at, so that many at
once are counted too. Names stay here: everything that leaves speaks of a reviewer's random id.

Left to others: being logged in (`sessions`), the pages (`pages_accounts`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import secrets
import threading
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from promedical.review import audit_log
from promedical.review.database import Database
from promedical.review.sessions import end_sessions_of, hashed, open_session
from promedical.review.tables import (
    LANGUAGES,
    ROLES,
    Invitation,
    LoginAttempt,
    Reviewer,
    Setting,
    now,
)

if TYPE_CHECKING:
    from promedical.review.app import ReviewSettings

__all__ = [
    "AccountError",
    "accept_invitation",
    "change_password",
    "create_account",
    "erase_account",
    "invite",
    "log_in",
    "open_invitation",
    "set_active",
    "set_profile",
    "set_role",
]

WINDOW = dt.timedelta(minutes=15)
KEPT = dt.timedelta(days=1)
SHORTEST, LONGEST = 12, 200
# What people choose where twelve characters are asked for.
COMMON = (
    "123456789012",
    "passwordpassword",
    "password1234",
    "qwertyuiop12",
    "qwertyuiop123",
    "administrator",
    "letmeinletmein",
    "adminadminadmin",
)
# A hash takes 64 MiB and a core for a moment: a few at once, the others wait.
_AT_ONCE = threading.BoundedSemaphore(3)


class AccountError(ValueError):
    """What was asked of an account cannot be done.

    Args:
        key: of the text that says so, in `wording_core`.
        values: for that text.
    """

    def __init__(self, key: str, **values: object) -> None:
        from promedical.review.wording import translator

        super().__init__(translator("en")(key, **values))
        self.key = key
        self.values = values


@cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@cache
def _nobody() -> str:
    """The hash of a password that nobody has, so that an unknown login takes as long."""
    return _hash(secrets.token_urlsafe(16))


def _hash(password: str) -> str:
    with _AT_ONCE:
        return _hasher().hash(unicodedata.normalize("NFKC", password))


def _matches(password_hash: str, password: str) -> bool:
    with _AT_ONCE:
        try:
            return _hasher().verify(password_hash, unicodedata.normalize("NFKC", password))
        except (VerificationError, InvalidHashError):
            return False


def _login(given: str) -> str:
    return unicodedata.normalize("NFKC", given).strip().casefold()


def check_password(password: str, login: str, name: str) -> None:
    """Refuse a password that is easily guessed: short, common, one character, or a name.

    Raises:
        AccountError: it is.
    """
    normal = unicodedata.normalize("NFKC", password)
    if len(normal) < SHORTEST:
        raise AccountError("core.password_short", shortest=SHORTEST)
    if len(normal) > LONGEST:
        raise AccountError("core.password_long", longest=LONGEST)
    folded = normal.casefold()
    if folded in COMMON or len(set(folded)) < 5:
        raise AccountError("core.password_common")
    parts = [_login(login), *_login(name).split()]
    rest = folded
    for part in parts:
        rest = rest.replace(part, "") if len(part) >= 3 else rest
    if len(rest) < SHORTEST // 2:
        raise AccountError("core.password_name")


def create_account(
    session: Session,
    *,
    login: str,
    name: str,
    password: str,
    role: str,
    specialty: str | None = None,
    country: str | None = None,
    licensed_since: int | None = None,
    language: str = "en",
    actor: str = "system",
) -> Reviewer:
    """Make an account.

    Args:
        session: of `Database.write()`.
        login: what they will type; compared without regard to case.
        name: what colleagues see.
        password: at least 12 characters.
        role: reviewer, adjudicator or lead.
        specialty: such as cardiology, or None.
        country: or None.
        licensed_since: year of the licence, or None.
        language: en or zh.
        actor: who does it, for the audit log.

    Raises:
        AccountError: a login that is taken or empty, an unknown role or language, a year that
            cannot be, or a password that is easily guessed.
    """
    login, name = _login(login), name.strip()
    if not 2 <= len(login) <= 200 or not login.isprintable():
        raise AccountError("core.login_bad")
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise AccountError("core.name_bad")
    if role not in ROLES:
        raise AccountError("core.role_bad")
    check_password(password, login, name)
    if session.scalar(select(Reviewer.id).where(Reviewer.login == login)) is not None:
        raise AccountError("core.login_taken")
    reviewer = Reviewer(login=login, name=name, password_hash=_hash(password), role=role)
    session.add(reviewer)
    set_profile(reviewer, specialty, country, licensed_since, language)
    session.flush()
    audit_log.record(session, actor, "account.create", f"account:{reviewer.id}")
    return reviewer


def set_profile(
    reviewer: Reviewer,
    specialty: str | None,
    country: str | None,
    licensed_since: int | None,
    language: str,
) -> None:
    """Set what a reviewer says about themselves.

    Raises:
        AccountError: an unknown language, a year that cannot be, or something too long.
    """
    if language not in LANGUAGES:
        raise AccountError("core.language_bad")
    if licensed_since is not None and not 1940 <= licensed_since <= now().year:
        raise AccountError("core.year_bad", year=now().year)
    given = [(value or "").strip() for value in (specialty, country)]
    if any(len(value) > 100 or not value.isprintable() for value in given):
        raise AccountError("core.profile_bad")
    reviewer.specialty, reviewer.country = given[0] or None, given[1] or None
    reviewer.licensed_since = licensed_since
    reviewer.language = language


def invite(
    session: Session,
    role: str,
    settings: ReviewSettings,
    *,
    created_by: str | None,
    reviewer_id: str | None = None,
) -> str:
    """Make an invitation, or with `reviewer_id` a link for a new password.

    Returns:
        The link's secret part, which is kept nowhere: `{public_url}/invitation/{token}`.

    Raises:
        AccountError: an unknown role.
    """
    if role not in ROLES:
        raise AccountError("core.role_bad")
    token = secrets.token_urlsafe(24)
    at = now()
    session.add(
        Invitation(
            token_hash=hashed(token),
            role=role,
            reviewer_id=reviewer_id,
            created_by=created_by,
            created=at,
            expires=at + dt.timedelta(days=settings.invitation_days),
        )
    )
    session.flush()
    action, subject = "invitation.create", f"role:{role}"
    if reviewer_id is not None:
        action, subject = "account.reset", f"account:{reviewer_id}"
    audit_log.record(session, created_by or "system", action, subject)
    return token


def open_invitation(session: Session, token: str) -> Invitation:
    """The invitation of a link.

    Raises:
        AccountError: there is none, it was used, or it has ended.
    """
    found = session.scalar(
        select(Invitation).where(Invitation.token_hash == hashed(token)).with_for_update()
    )
    if found is None or found.used_at is not None or now() >= found.expires:
        raise AccountError("core.invitation_gone")
    return found


def accept_invitation(
    session: Session,
    token: str,
    *,
    login: str,
    name: str,
    password: str,
    specialty: str | None = None,
    country: str | None = None,
    licensed_since: int | None = None,
    language: str = "en",
) -> Reviewer:
    """Turn an invitation into an account (or a new password), and use it up.

    Raises:
        AccountError: the invitation is gone, or something given cannot be used; then it stays.
    """
    invitation = open_invitation(session, token)
    if invitation.reviewer_id is not None:
        reviewer = session.get_one(Reviewer, invitation.reviewer_id)
        _set_password(session, reviewer, password)
    else:
        reviewer = create_account(
            session,
            login=login,
            name=name,
            password=password,
            role=invitation.role,
            specialty=specialty,
            country=country,
            licensed_since=licensed_since,
            language=language,
            actor=invitation.created_by or "system",
        )
    invitation.used_at = now()
    session.flush()
    return reviewer


def change_password(session: Session, reviewer_id: str, current: str, new: str) -> None:
    """Change one's own password; every session of the account ends.

    Raises:
        AccountError: `current` is wrong, or `new` is easily guessed.
    """
    reviewer = session.get_one(Reviewer, reviewer_id)
    if not _matches(reviewer.password_hash, current):
        raise AccountError("core.password_wrong")
    _set_password(session, reviewer, new)


def _set_password(session: Session, reviewer: Reviewer, password: str) -> None:
    check_password(password, reviewer.login, reviewer.name)
    reviewer.password_hash = _hash(password)
    end_sessions_of(session, reviewer.id)
    session.flush()
    audit_log.record(session, reviewer.id, "account.password", f"account:{reviewer.id}")


def set_active(session: Session, reviewer_id: str, active: bool, *, actor: str) -> None:
    """Let somebody in again, or out at once; their answers stay.

    Raises:
        AccountError: nobody has this id, or the last lead would be gone.
    """
    reviewer = _known(session, reviewer_id)
    if not active:
        _keep_a_lead(session, reviewer)
        end_sessions_of(session, reviewer_id)
    reviewer.active = active
    session.flush()
    action = "account.activate" if active else "account.deactivate"
    audit_log.record(session, actor, action, f"account:{reviewer_id}")


def set_role(session: Session, reviewer_id: str, role: str, *, actor: str) -> None:
    """Give somebody another role.

    Raises:
        AccountError: nobody has this id, no such role, or the last lead would be gone.
    """
    if role not in ROLES:
        raise AccountError("core.role_bad")
    reviewer = _known(session, reviewer_id)
    if role != "lead":
        _keep_a_lead(session, reviewer)
    reviewer.role = role
    session.flush()
    audit_log.record(session, actor, f"account.role_{role}", f"account:{reviewer_id}")


def erase_account(session: Session, login: str, *, actor: str) -> str | None:
    """Remove who somebody is, and let them in no more; their answers stay under their id.

    Args:
        session: of `Database.write()`; the space is left to `purge.overwrite`.
        login: as typed.
        actor: who does it, for the audit log.

    Returns:
        The id, or None if nobody has this login.

    Raises:
        AccountError: the last lead would be gone.
    """
    reviewer = session.scalar(
        select(Reviewer).where(Reviewer.login == _login(login)).with_for_update()
    )
    if reviewer is None:
        return None
    _keep_a_lead(session, reviewer)
    end_sessions_of(session, reviewer.id)
    session.execute(delete(Invitation).where(Invitation.reviewer_id == reviewer.id))
    login_hash = _keyed(session, reviewer.login)
    session.execute(delete(LoginAttempt).where(LoginAttempt.login_hash == login_hash))
    reviewer.login = f"erased-{reviewer.id}"
    reviewer.name = f"(erased {reviewer.id[:4]})"
    reviewer.password_hash = "-"  # no password has this hash
    reviewer.specialty = reviewer.country = reviewer.licensed_since = None
    reviewer.active = False
    session.flush()
    audit_log.record(session, actor, "account.erase", f"account:{reviewer.id}")
    return reviewer.id


def _known(session: Session, reviewer_id: str) -> Reviewer:
    reviewer = session.get(Reviewer, reviewer_id)
    if reviewer is None:
        raise AccountError("core.person_gone")
    return reviewer


def _keep_a_lead(session: Session, reviewer: Reviewer) -> None:
    leads = session.scalars(
        select(Reviewer.id)
        .where(Reviewer.role == "lead", Reviewer.active.is_(True))
        .with_for_update()
    ).all()
    if list(leads) == [reviewer.id]:
        raise AccountError("core.last_lead")


def log_in(
    database: Database, login: str, password: str, address: str, settings: ReviewSettings
) -> str:
    """Check a login and open a session.

    Args:
        database: the application's.
        login: as typed.
        password: as typed.
        address: of the client, for the limit; a keyed hash of it is kept for a day.
        settings: with the limits.

    Returns:
        The session cookie's value.

    Raises:
        AccountError: login and password do not belong together, the account is not active (the same
            text), or there were too many attempts.
    """
    attempt = _count_attempt(database, _login(login), address, settings)
    with database.read() as session:
        reviewer = session.scalar(select(Reviewer).where(Reviewer.login == _login(login)))
    known = _nobody() if reviewer is None else reviewer.password_hash
    right = _matches(known, password[: LONGEST * 2])
    if reviewer is None or not right or not reviewer.active:
        with database.write() as session:
            subject = "account:-" if reviewer is None else f"account:{reviewer.id}"
            audit_log.record(session, "-", "login.failed", subject)
        raise AccountError("core.login_wrong")
    fresh = _hash(password) if _hasher().check_needs_rehash(known) else None
    with database.write() as session:
        session.get_one(LoginAttempt, attempt).ok = True
        if fresh is not None:
            session.get_one(Reviewer, reviewer.id).password_hash = fresh
        token = open_session(session, reviewer.id, settings)
        audit_log.record(session, reviewer.id, "login.ok", f"account:{reviewer.id}")
    return token


def _count_attempt(database: Database, login: str, address: str, settings: ReviewSettings) -> str:
    """Write an attempt down as failed before the password is looked at, within the limits."""
    at = now()
    with database.write() as session:
        if not database.sqlite:
            session.execute(text("SELECT pg_advisory_xact_lock(7305522)"))
        session.execute(delete(LoginAttempt).where(LoginAttempt.at < at - KEPT))
        login_hash, address_hash = _keyed(session, login), _keyed(session, address)
        last_ok = session.scalar(
            select(func.max(LoginAttempt.at)).where(
                LoginAttempt.login_hash == login_hash, LoginAttempt.ok.is_(True)
            )
        )
        since = at - WINDOW if last_ok is None else max(at - WINDOW, last_ok)
        of_login = _failed(session, LoginAttempt.login_hash == login_hash, since)
        of_address = _failed(session, LoginAttempt.address_hash == address_hash, at - WINDOW)
        if of_login >= settings.attempts_per_login or of_address >= settings.attempts_per_address:
            raise AccountError("core.login_limited", minutes=int(WINDOW.total_seconds() // 60))
        attempt = LoginAttempt(login_hash=login_hash, address_hash=address_hash, at=at, ok=False)
        session.add(attempt)
        session.flush()
        return attempt.id


def _failed(session: Session, where: object, since: dt.datetime) -> int:
    return (
        session.scalar(
            select(func.count())
            .select_from(LoginAttempt)
            .where(where, LoginAttempt.ok.is_(False), LoginAttempt.at > since)  # type: ignore[arg-type]
        )
        or 0
    )


def _keyed(session: Session, value: str) -> str:
    key = session.get(Setting, "hash_key")
    if key is None:
        key = Setting(name="hash_key", value=secrets.token_hex(32))
        session.add(key)
        session.flush()
    return hmac.new(
        key.value.encode(), value.encode("utf-8", "replace"), hashlib.sha256
    ).hexdigest()
