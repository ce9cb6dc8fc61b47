"""The database: Alembic makes what the tables say, on SQLite and PostgreSQL; files are private."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from promedical.review import audit_log
from promedical.review import database as review_database
from promedical.review.database import Database, DatabaseError
from promedical.review.migrate import alembic_config, upgrade
from promedical.review.tables import AuditEvent, Base, Setting, new_id
from review_server import database_url, postgresql_cluster  # noqa: F401


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "review.sqlite3")
    url: str = request.getfixturevalue("postgresql_cluster").create(empty=True)
    return url


def test_migrations_make_exactly_the_tables(empty_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(empty_url)
    upgrade(database)
    upgrade(database)  # a second start changes nothing
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def test_migrations_can_be_taken_back(database_url: str) -> None:  # noqa: F811
    from alembic import command

    database = Database(database_url)
    upgrade(database)
    config = alembic_config()
    with database.engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    upgrade(database)
    with database.write() as session:
        audit_log.record(session, "system", "a.b", "c")
    database.close()


def test_a_database_of_a_newer_program_is_refused(database_url: str) -> None:  # noqa: F811
    database = Database(database_url)
    upgrade(database)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="does not know"):
        upgrade(database)
    database.close()


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_event SET action = 'x'", "DELETE FROM audit_event"]
)
def test_the_audit_log_only_grows(database_url: str, statement: str) -> None:  # noqa: F811
    database = Database(database_url)
    upgrade(database)
    with database.write() as session:
        audit_log.record(session, "system", "a.b", "c")
    with pytest.raises(DBAPIError, match="only grows"), database.write() as session:
        session.execute(text(statement))
    with database.read() as session:
        assert [e.action for e in session.scalars(select(AuditEvent))] == ["a.b"]
    database.close()


def test_a_changed_or_cut_audit_log_is_noticed(tmp_path: Path) -> None:
    database = Database(tmp_path / "log.sqlite3")
    upgrade(database)
    with database.write() as session:
        for n in range(5):
            audit_log.record(session, "system", "a.b", f"item:{n}")
    with database.read() as session:
        state = audit_log.verify(session)
    assert state.entries == 5
    with database.write() as session:
        session.execute(text("DROP TRIGGER audit_event_no_update"))
        session.execute(text("DROP TRIGGER audit_event_no_delete"))
        session.execute(text("DELETE FROM audit_event WHERE seq = 5"))
    with database.read() as session:
        assert audit_log.verify(session).entries == 4  # the chain alone cannot know
        with pytest.raises(audit_log.AuditLogError, match="removed"):
            audit_log.verify(session, head=state.head)
    with database.write() as session:
        session.execute(text("UPDATE audit_event SET subject = 'item:9' WHERE seq = 2"))
    with database.read() as session, pytest.raises(audit_log.AuditLogError, match="entry 2 was"):
        audit_log.verify(session)
    with database.write() as session:
        session.execute(text("DELETE FROM audit_event WHERE seq = 2"))
    with database.read() as session, pytest.raises(audit_log.AuditLogError, match="2 is missing"):
        audit_log.verify(session)
    database.close()


def test_a_seal_is_of_the_whole_entry_as_sorted_json() -> None:
    entry = {
        "seq": 7,
        "at": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        "actor_id": "r1",
        "action": "a.b",
        "subject": 'item:"é\\1',
        "digest": "d" * 64,
        "previous_hash": "p" * 64,
    }
    plain = {**entry, "at": "2026-01-02T03:04:05.000000+00:00"}
    sealed = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert audit_log._hash(entry) == hashlib.sha256(sealed.encode()).hexdigest()


def test_many_writers_at_once_make_one_chain(database_url: str) -> None:  # noqa: F811
    database = Database(database_url)
    upgrade(database)

    other = Database(database_url)  # as another server has it

    def work(who: int) -> None:
        for n in range(10):
            with (other if who % 2 else database).write() as session:
                audit_log.record(session, f"r{who}", "a.b", f'item:"é\\{n}')

    threads = [threading.Thread(target=work, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert audit_log.verify(session).entries == 60
    database.close()
    other.close()


def test_an_idle_connection_that_was_closed_is_replaced(
    postgresql_cluster: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(review_database, "IDLE_S", 0.0)
    url = postgresql_cluster.create()
    database, other = Database(url), Database(url)
    with database.read() as session:
        mine = session.scalar(text("SELECT pg_backend_pid()"))
    with other.write() as session:
        assert session.scalar(text("SELECT pg_terminate_backend(:pid)"), {"pid": mine})
    with database.read() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != mine
    database.close()
    other.close()


def test_a_write_is_whole_or_nothing(database_url: str) -> None:  # noqa: F811
    database = Database(database_url)
    upgrade(database)

    def half_a_write() -> None:
        with database.write() as session:
            session.add(Setting(name="half", value="x"))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_a_write()
    with database.read() as session:
        assert session.get(Setting, "half") is None
    database.close()


def test_the_file_is_private_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "review.sqlite3"
    database = Database(path)
    upgrade(database)
    with database.read() as session:
        pragmas = {
            name: session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
        files = {f.name: f.stat().st_mode & 0o777 for f in path.parent.iterdir()}
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "secure_delete": 1,
    }
    assert set(files.values()) == {0o600}
    assert "review.sqlite3-wal" in files
    database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "http://x"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(DatabaseError, match="postgresql"):
        Database(url)


def test_a_database_that_does_not_answer_is_one_line_without_the_password() -> None:
    from review_server import free_port

    database = Database(f"postgresql://u:secret@127.0.0.1:{free_port()}/x")
    with pytest.raises(DatabaseError, match="cannot be opened") as caught:
        upgrade(database)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_can_stand_on_a_command_line() -> None:
    # "--reviewer -HYDtGZzddwLNE5f" is read as two options.
    ids = {new_id() for _ in range(500)}
    assert len(ids) == 500
    assert all(re.fullmatch(r"[0-9a-f]{24}", one) for one in ids)
