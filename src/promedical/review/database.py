"""The connection: SQLite in one private file, or PostgreSQL, by one setting.

`Database.read()` and `Database.write()` give a session for one transaction; a write is committed
when its block ends, before anything is told to a browser. SQLite runs with WAL, full sync, foreign
keys and secure delete. Writes take turns inside the process and wait for other processes. Errors
of the database name no values, which may be somebody's text. Left to others: the tables (`tables`),
bringing them up to date (`migrate`).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.orm import Session

__all__ = ["Database", "DatabaseError"]

BUSY_MS = 20_000
IDLE_S = 5.0
IMMEDIATE = "promedical_immediate"


class DatabaseError(ValueError):
    """A database that cannot be used; the message says which and what to change."""


class Database:
    """A database of the review application.

    Args:
        database: the path of an SQLite file, which is made if there is none, or
            `postgresql+psycopg://USER:PASSWORD@HOST/NAME`.

    Raises:
        DatabaseError: an address of another kind.
    """

    def __init__(self, database: str | Path) -> None:
        self.url = _url(str(database))
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.path = Path(self.url.database or "") if self.sqlite else None
        self.engine = _sqlite(self.url) if self.sqlite else _postgresql(self.url)
        # One writer at a time is SQLite's rule, and the audit log's. Waiting here is immediate;
        # SQLite's own waiting sleeps in growing steps, and on PostgreSQL threads that wait for each
        # other's locks halve the rate of saves. Both are left for other processes.
        self._turn = threading.Lock()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session  # closing it ends the transaction, with nothing kept

    def glance(self) -> Connection:
        """A connection for one statement that changes nothing, without a transaction around it."""
        if self.sqlite:
            return self.engine.connect()
        return self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are all committed when the block ends, or none."""
        with self._turn, self.engine.connect() as plain:
            connection = plain.execution_options(**{IMMEDIATE: True}) if self.sqlite else plain
            with Session(connection, expire_on_commit=False) as session, session.begin():
                yield session

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _url(database: str) -> URL:
    if "://" not in database:
        return URL.create("sqlite", database=str(Path(database).expanduser()))
    try:
        url = make_url(database)
    except ArgumentError:
        raise DatabaseError(
            "database: found an address that cannot be read, expected the path of an SQLite file "
            "or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database:
        return url
    if url.drivername != "postgresql+psycopg":
        raise DatabaseError(
            f"database: found the kind {url.drivername!r}, expected the path of an SQLite file or "
            "postgresql+psycopg://…"
        )
    return url


def _sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made by us, so that nobody else may read it at any moment; -wal and -shm take its mode.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)
    engine = create_engine(
        url, pool_size=16, max_overflow=48, pool_timeout=60, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, record: Any) -> None:
        # The driver's own transactions begin too late for one consistent view; we begin them.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # A read that turns into a write may fail at once; writes therefore begin as writes.
        immediate = connection.get_execution_options().get(IMMEDIATE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    engine = create_engine(
        url,
        pool_size=40,  # as many as there are threads; opening one takes longer than a save
        max_overflow=0,
        pool_timeout=60,
        hide_parameters=True,
    )

    @event.listens_for(engine, "checkin")
    def _on_checkin(connection: Any, record: Any) -> None:
        record.info["since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _on_checkout(connection: Any, record: Any, proxy: Any) -> None:
        # A connection that lay idle may have been closed at the other end. One that was used a
        # moment ago is not asked, which would be a round trip for every save.
        if time.monotonic() - record.info.get("since", math.inf) < IDLE_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise DisconnectionError from None

    return engine
