"""Erasure: no byte of an erased item is left in the database's files, and the log stays whole."""

from __future__ import annotations

import datetime as dt
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from promedical.review import accounts, audit_log
from promedical.review.app import ReviewSettings
from promedical.review.database import Database
from promedical.review.migrate import upgrade
from promedical.review.purge import PurgeError, erase_people, purge
from promedical.review.saves import Closed, save
from promedical.review.tables import (
    Assignment,
    AuditEvent,
    Change,
    Invitation,
    Item,
    ItemSecret,
    LoginAttempt,
    LoginSession,
    Reviewer,
    Round,
)
from review_server import (  # noqa: F401
    add_reviewer,
    database_url,
    postgresql_cluster,
    sqlite_url,
)

MARK = "ZYGOMORPHIC-"


def text_of(n: int) -> str:
    """A long text, so that some of it is on overflow pages."""
    return f"{MARK}{n}-" + f"{n}-lorem-ipsum " * 600


def filled(url: str, monkeypatch: pytest.MonkeyPatch, items: int = 4) -> tuple[Database, list[str]]:
    """A database with items, secrets, answers and changes, all of which hold a marked text."""
    monkeypatch.setattr("promedical.review.saves._kind", lambda kind: Anything)
    database = Database(url)
    upgrade(database)
    who = add_reviewer(database, "ann")
    ids = []
    with database.write() as session:
        round_ = Round(kind="rubrics", name="r")
        session.add(round_)
        session.flush()
        for n in range(items):
            content = {"messages": [{"role": "user", "content": text_of(n)}]}
            item = Item(round_id=round_.id, instruction_id=f"q{n}", content=content)
            session.add(item)
            session.flush()
            session.add(ItemSecret(item_id=item.id, content={"judge": text_of(n)}))
            assignment = Assignment(item_id=item.id, reviewer_id=who.id, part="rubric")
            session.add(assignment)
            session.flush()
            ids.append(assignment.id)
    for n, assignment_id in enumerate(ids):
        for version in range(3):
            with database.write() as session:
                save(
                    session,
                    assignment_id,
                    who.id,
                    base=version,
                    save_id=f"save-{n}-{version}",
                    answer={"reason": text_of(n) + str(version)},
                    seconds=1.0,
                )
    return database, ids


class Anything:
    """A kind of round whose answers may be anything."""

    @staticmethod
    def check_answer(content: Any, answer: Any, **given: Any) -> list[str]:
        return []

    @staticmethod
    def on_finished(session: Any, assignment: Any) -> None:
        return None


def in_files(folder: Path, mark: str) -> list[str]:
    """Files of a folder that hold a text."""
    found = subprocess.run(
        ["grep", "-rlaF", "--", mark, str(folder)], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def test_an_erased_text_is_in_no_file_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = filled(str(tmp_path / "review.sqlite3"), monkeypatch)
    assert in_files(tmp_path, f"{MARK}2-")
    found = purge(database, instruction_ids=["q2", "nobody"])
    assert (found.items, found.answers, found.changes) == (1, 1, 3)
    assert found.unknown == ("nobody",)
    for mark in (f"{MARK}2-", "2-lorem-ipsum"):
        assert in_files(tmp_path, mark) == []
    assert in_files(tmp_path, f"{MARK}1-")
    with database.read() as session:
        assert audit_log.verify(session).entries == session.scalar(
            select(func.count()).select_from(AuditEvent)
        )
        assert session.scalar(select(func.count()).select_from(Change)) == 9
        item = session.scalars(select(Item).where(Item.instruction_id == "q2")).one()
    assert (item.content, item.salt) == ({}, "")
    assert item.removed_at is not None
    again = purge(database, instruction_ids=["q2"])
    assert (again.items, again.already) == (0, 1)
    database.close()


def test_nothing_of_an_erased_item_is_left_in_the_tables(
    database_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database, ids = filled(database_url, monkeypatch)
    with database.read() as session:
        who = session.get_one(Assignment, ids[0]).reviewer_id
    purge(database, instruction_ids=["q0", "q1", "q2", "q3"])
    with database.read() as session:
        dump = "\n".join(
            str(row)
            for table in Round.metadata.sorted_tables
            for row in session.execute(select(table))
        )
        assert MARK not in dump
        assert audit_log.verify(session).entries > 0
    with pytest.raises(Closed), database.write() as session:
        save(session, ids[0], who, base=3, save_id="save-late", answer={}, seconds=1.0)
    database.close()


def test_postgresql_tables_are_rewritten(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = request.getfixturevalue("postgresql_cluster")
    database, _ = filled(cluster.create(), monkeypatch)

    def nodes() -> list[int]:
        with database.read() as session:
            asked = text("SELECT pg_relation_filenode(t) FROM unnest(ARRAY['item','change']) t")
            return list(session.scalars(asked))

    before = nodes()
    purge(database, instruction_ids=["q0"])
    assert not set(before) & set(nodes())  # other files; the old ones were removed
    database.close()


def test_age_counts_from_the_last_touch(
    database_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database, ids = filled(database_url, monkeypatch)
    year = dt.timedelta(days=365)
    assert purge(database, older_than=year).items == 0
    long_ago = dt.datetime.now(dt.UTC) - 2 * year
    with database.write() as session:
        session.execute(update(Round).values(created=long_ago))
        session.execute(update(Assignment).where(Assignment.id != ids[3]).values(assigned=long_ago))
        trigger = "change_no_update" + (" ON change" if not database.sqlite else "")
        session.execute(text(f"DROP TRIGGER {trigger}"))
        session.execute(update(Change).where(Change.assignment_id.in_(ids[:2])).values(at=long_ago))
    assert purge(database, older_than=year).items == 2  # 2 was saved lately, 3 was assigned lately
    with database.read() as session:
        left = select(Item.instruction_id).where(Item.removed_at.is_(None))
        assert set(session.scalars(left)) == {"q2", "q3"}
    database.close()


def test_naming_nothing_removes_nothing(sqlite_url: str) -> None:  # noqa: F811
    database = Database(sqlite_url)
    upgrade(database)
    with pytest.raises(PurgeError, match="nothing was named"):
        purge(database)
    database.close()


def test_a_salted_digest_cannot_be_matched_after_the_salt_is_gone() -> None:
    answer = {"decision": "accept"}
    assert audit_log.digest_of(answer, "salt") != audit_log.digest_of(answer, "")
    assert audit_log.digest_of(answer, "salt") == audit_log.digest_of(dict(answer), "salt")


PERSON = {
    "login": "zenobia@hospital.example",
    "name": "Zenobia Quillfeather",
    "specialty": "nephrology-of-owls",
    "country": "Ruritania",
}


def one_known(database: Database) -> str:
    """A lead, and somebody with everything an account can have; returns their password's hash."""
    settings = ReviewSettings()
    with database.write() as session:
        add_reviewer_row(session, "lead@x", "lead")
        token = accounts.invite(session, "reviewer", settings, created_by=None)
        made = accounts.accept_invitation(
            session, token, password="four lamps by a canal", licensed_since=1999, **PERSON
        )
        accounts.invite(session, "reviewer", settings, created_by=None, reviewer_id=made.id)
        password_hash = made.password_hash
    accounts.log_in(database, PERSON["login"], "four lamps by a canal", "192.0.2.1", settings)
    return password_hash


def add_reviewer_row(session: Any, login: str, role: str) -> None:
    session.add(Reviewer(login=login, name=login, password_hash="-", role=role))


def test_who_a_person_is_is_in_no_file_and_their_answers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, ids = filled(str(tmp_path / "review.sqlite3"), monkeypatch)
    marks = [one_known(database), *PERSON.values()]
    with database.write() as session:
        who = session.scalars(select(Reviewer).where(Reviewer.login == PERSON["login"])).one().id
        session.execute(update(Assignment).where(Assignment.id == ids[0]).values(reviewer_id=who))
    assert all(in_files(tmp_path, mark) for mark in marks)
    assert erase_people(database, ["Zenobia@Hospital.Example"]) == [who]
    assert {mark: in_files(tmp_path, mark) for mark in marks} == {mark: [] for mark in marks}
    with database.read() as session:
        audit_log.verify(session)
        last = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc())).first()
        assert (last.action, last.subject) == ("account.erase", f"account:{who}")
        assert session.get_one(Assignment, ids[0]).answer["reason"].startswith(MARK)
        person = session.get_one(Reviewer, who)
        assert (person.specialty, person.country, person.licensed_since) == (None, None, None)
        assert not person.active
    database.close()


def test_nothing_that_lets_an_erased_person_in_is_left(
    database_url: str,  # noqa: F811
) -> None:
    database = Database(database_url)
    password_hash = one_known(database)
    erase_people(database, [PERSON["login"]])
    with database.read() as session:
        for table in (LoginSession, Invitation, LoginAttempt):
            left = select(func.count()).select_from(table)
            if table is Invitation:  # the one that was used names nobody
                left = left.where(Invitation.reviewer_id.is_not(None))
            assert session.scalar(left) == 0
        dump = "\n".join(str(row) for row in session.execute(select(Reviewer.__table__)))
    assert not [mark for mark in (password_hash, *PERSON.values()) if mark in dump]
    with pytest.raises(accounts.AccountError, match="do not belong together"):
        accounts.log_in(
            database, PERSON["login"], "four lamps by a canal", "192.0.2.1", ReviewSettings()
        )
    database.close()


def test_an_unknown_login_and_the_last_lead_are_not_erased(sqlite_url: str) -> None:  # noqa: F811
    database = Database(sqlite_url)
    one_known(database)
    with pytest.raises(PurgeError, match="no account has the login 'eve', nothing was removed"):
        erase_people(database, [PERSON["login"], "eve"])
    with pytest.raises(accounts.AccountError, match="only lead"):
        erase_people(database, ["lead@x"])
    with database.read() as session:
        assert set(session.scalars(select(Reviewer.login))) == {PERSON["login"], "lead@x"}
    database.close()
