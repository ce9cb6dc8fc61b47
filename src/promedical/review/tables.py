"""The tables of the review application: people, rounds, items, answers, and who did what.

Sections 3.6 and 6 of the method. Answers are JSON documents that the pages write whole
(`promedical.review.saves`); `change` and `audit_event` only grow. What a reviewer may never
receive (which model wrote a response, what a judge said) is in `item_secret`, a table of its own,
so that no page for reviewers reads it by accident. Left to others: the connection (`database`), the
form of contents and answers (`rounds`, `adjudication`), migrations (`migrations/`).
"""

from __future__ import annotations

import datetime as dt
import secrets
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

__all__ = [
    "Assignment",
    "AuditEvent",
    "Base",
    "Change",
    "Invitation",
    "Item",
    "ItemSecret",
    "LoginAttempt",
    "LoginSession",
    "Reviewer",
    "Round",
    "Setting",
    "UtcTime",
    "new_id",
    "now",
]

ROLES = ("reviewer", "adjudicator", "lead")
LANGUAGES = ("en", "zh")
KINDS = ("rubrics", "adjudication")
PARTS = ("rubric", "first", "third")
STATES = ("open", "started", "done")


def new_id() -> str:
    """A random id that tells nothing: 24 hexadecimal digits.

    Not `token_urlsafe`: one id in 64 would begin with "-", and a command line takes that for an
    option (`--reviewer -HYDt…`), as a spreadsheet takes it for a formula.
    """
    return secrets.token_hex(12)


def now() -> dt.datetime:
    """The present, in UTC."""
    return dt.datetime.now(dt.UTC)


class UtcTime(TypeDecorator[dt.datetime]):
    """A time with its zone, on SQLite too, which keeps none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> Any:
        """Refuse a time without a zone, write UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone, expected UTC")
        return value.astimezone(dt.UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> dt.datetime | None:
        """Read UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


Document = JSON(none_as_null=True)


class Base(DeclarativeBase):
    """Every table; constraints have names, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    quoted = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({quoted})", name=column)


class Setting(Base):
    """What the installation itself remembers, such as the key of its hashes."""

    __tablename__ = "setting"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Reviewer(Base):
    """A person with an account; exports know the id alone."""

    __tablename__ = "reviewer"
    __table_args__ = (_one_of("role", ROLES), _one_of("language", LANGUAGES))

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    login: Mapped[str] = mapped_column(String(200), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    password_hash: Mapped[str] = mapped_column(String(300))
    role: Mapped[str] = mapped_column(String(20))
    specialty: Mapped[str | None] = mapped_column(String(100))
    country: Mapped[str | None] = mapped_column(String(100))
    licensed_since: Mapped[int | None] = mapped_column(Integer)
    language: Mapped[str] = mapped_column(String(5), default="en")
    active: Mapped[bool] = mapped_column(Boolean, default=True)
    created: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)


class Invitation(Base):
    """A link that makes one account, once, for some days; only the link's hash is kept.

    With `reviewer_id` it is for that account instead, whose password it sets anew.
    """

    __tablename__ = "invitation"
    __table_args__ = (_one_of("role", ROLES),)

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    reviewer_id: Mapped[str | None] = mapped_column(ForeignKey("reviewer.id"))
    created_by: Mapped[str | None] = mapped_column(ForeignKey("reviewer.id"))
    created: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    expires: Mapped[dt.datetime] = mapped_column(UtcTime)
    used_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)


class LoginSession(Base):
    """Somebody logged in; only the cookie's hash is kept."""

    __tablename__ = "login_session"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    reviewer_id: Mapped[str] = mapped_column(ForeignKey("reviewer.id"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    created: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    last_seen: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    expires: Mapped[dt.datetime] = mapped_column(UtcTime)


class LoginAttempt(Base):
    """An attempt to log in, for the limits; keyed hashes of login and address, kept for a day."""

    __tablename__ = "login_attempt"
    __table_args__ = (Index(None, "login_hash", "at"), Index(None, "address_hash", "at"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    login_hash: Mapped[str] = mapped_column(String(64))
    address_hash: Mapped[str] = mapped_column(String(64))
    at: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    ok: Mapped[bool] = mapped_column(Boolean)


class Round(Base):
    """A round of rubrics to correct, or of responses to adjudicate."""

    __tablename__ = "round"
    __table_args__ = (_one_of("kind", KINDS), _one_of("state", ("open", "closed")))

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(200))
    state: Mapped[str] = mapped_column(String(20), default="open")
    settings: Mapped[dict[str, Any]] = mapped_column(Document, default=dict)
    seed: Mapped[int] = mapped_column(BigInteger, default=0)
    created: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("reviewer.id"))

    items: Mapped[list[Item]] = relationship(back_populates="round", order_by="Item.position")


class Item(Base):
    """One instruction of a round, with its draft rubric, or with its rubric and responses.

    `salt` goes into every digest that the audit log keeps of this item's answers. A purge removes
    it with the answers, and then the digests say nothing about what they were made of.
    """

    __tablename__ = "item"
    __table_args__ = (Index(None, "round_id", "position"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    round_id: Mapped[str] = mapped_column(ForeignKey("round.id"))
    instruction_id: Mapped[str] = mapped_column(String(300), index=True)
    position: Mapped[int] = mapped_column(Integer, default=0)
    category: Mapped[str | None] = mapped_column(String(200))
    specialty: Mapped[str | None] = mapped_column(String(200))
    content: Mapped[dict[str, Any]] = mapped_column(Document)
    salt: Mapped[str] = mapped_column(String(64), default=lambda: secrets.token_hex(16))
    removed_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)

    round: Mapped[Round] = relationship(back_populates="items")
    assignments: Mapped[list[Assignment]] = relationship(back_populates="item")


class ItemSecret(Base):
    """What no reviewer may receive: models' names, judges' verdicts. For leads and exports."""

    __tablename__ = "item_secret"

    item_id: Mapped[str] = mapped_column(ForeignKey("item.id"), primary_key=True)
    content: Mapped[dict[str, Any]] = mapped_column(Document)


class Assignment(Base):
    """One reviewer's part of one item, and their answer so far."""

    __tablename__ = "assignment"
    __table_args__ = (
        UniqueConstraint("item_id", "reviewer_id"),
        Index(None, "reviewer_id", "state"),
        _one_of("part", PARTS),
        _one_of("state", STATES),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    item_id: Mapped[str] = mapped_column(ForeignKey("item.id"))
    reviewer_id: Mapped[str] = mapped_column(ForeignKey("reviewer.id"))
    part: Mapped[str] = mapped_column(String(20))
    response_order: Mapped[list[str]] = mapped_column(Document, default=list)
    state: Mapped[str] = mapped_column(String(20), default="open")
    version: Mapped[int] = mapped_column(Integer, default=0)
    answer: Mapped[dict[str, Any]] = mapped_column(Document, default=dict)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    assigned: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    started: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    finished: Mapped[dt.datetime | None] = mapped_column(UtcTime)

    item: Mapped[Item] = relationship(back_populates="assignments")
    reviewer: Mapped[Reviewer] = relationship()
    changes: Mapped[list[Change]] = relationship(order_by="Change.version")


class Change(Base):
    """One acknowledged save: what changed, from what to what. The id is the client's own."""

    __tablename__ = "change"
    __table_args__ = (UniqueConstraint("assignment_id", "version"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    assignment_id: Mapped[str] = mapped_column(ForeignKey("assignment.id"))
    reviewer_id: Mapped[str] = mapped_column(ForeignKey("reviewer.id"))
    version: Mapped[int] = mapped_column(Integer)
    at: Mapped[dt.datetime] = mapped_column(UtcTime, default=now)
    entries: Mapped[list[dict[str, Any]]] = mapped_column(Document)
    digest: Mapped[str] = mapped_column(String(64))
    seconds: Mapped[float] = mapped_column(Float, default=0.0)


class AuditEvent(Base):
    """Who did what to which id, when, and a digest; never content. Rows are only ever added."""

    __tablename__ = "audit_event"

    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    )
    at: Mapped[dt.datetime] = mapped_column(UtcTime)
    actor_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(300))
    digest: Mapped[str] = mapped_column(String(64))
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
