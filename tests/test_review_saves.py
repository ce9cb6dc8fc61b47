"""Saving an answer: idempotent, no silent overwrite, whole or nothing, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from promedical.review import audit_log, saves
from promedical.review.app import ReviewSettings, create_app
from promedical.review.database import Database
from promedical.review.saves import (
    Closed,
    Conflict,
    InvalidAnswer,
    NotYours,
    SaveError,
    changes_between,
    save,
)
from promedical.review.tables import Assignment, AuditEvent, Change, Item, Round, now
from review_server import add_reviewer, database_url, postgresql_cluster  # noqa: F401


class Kind:
    """A kind of round that refuses the answer {"bad": …} and remembers what it was asked."""

    asked: list[dict[str, Any]]
    finished: list[str]

    @classmethod
    def check_answer(cls, content: Any, answer: Any, **more: Any) -> list[str]:
        cls.asked.append({"content": content, "answer": answer, **more})
        return ["bad: expected nothing"] if "bad" in answer else []

    @classmethod
    def on_finished(cls, session: Any, assignment: Assignment) -> None:
        cls.finished.append(assignment.id)
        if assignment.answer.get("explode"):
            raise RuntimeError


class Desk:
    """One round with one item of Ann's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.app = create_app(ReviewSettings(database=url))
        self.database = self.app.state.database
        self.ann = add_reviewer(self.database, "ann")
        self.bob = add_reviewer(self.database, "bob")
        with self.database.write() as session:
            round_ = Round(kind="rubrics", name="r")
            session.add(round_)
            session.flush()
            item = Item(round_id=round_.id, instruction_id="q", content={"n": 1})
            session.add(item)
            session.flush()
            assignment = Assignment(item_id=item.id, reviewer_id=self.ann.id, part="rubric")
            session.add(assignment)
            session.flush()
            self.round, self.item, self.id = round_.id, item.id, assignment.id

    def save(
        self,
        base: int,
        save_id: str,
        answer: Any = None,
        *,
        database: Database | None = None,
        **more: Any,
    ) -> saves.Saved:
        settings = {"seconds": 2.0, "reviewer_id": self.ann.id, "assignment_id": self.id} | more
        with (database or self.database).write() as session:
            return save(
                session,
                base=base,
                save_id=save_id,
                answer={} if answer is None else answer,
                **settings,
            )

    def state(self) -> tuple[Assignment, list[Change], int]:
        with self.database.read() as session:
            changes = session.scalars(select(Change).order_by(Change.version)).all()
            events = session.scalar(select(func.count()).select_from(AuditEvent)) or 0
            return session.get_one(Assignment, self.id), list(changes), events


@pytest.fixture
def desk(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:  # noqa: F811
    monkeypatch.setattr(saves, "_kind", lambda kind: Kind)
    Kind.asked, Kind.finished = [], []
    made = Desk(database_url)
    yield made
    made.database.close()


def test_a_save_writes_answer_change_and_event_together(desk: Desk) -> None:
    assert desk.save(0, "save-one", {"a": 1}).version == 1
    assert desk.save(1, "save-two", {"a": 2}, seconds=3.5).version == 2
    assignment, changes, events = desk.state()
    assert (assignment.version, assignment.answer, assignment.state) == (2, {"a": 2}, "started")
    assert assignment.seconds == 5.5
    assert assignment.started is not None
    assert assignment.finished is None
    assert [c.id for c in changes] == ["save-one", "save-two"]
    assert changes[0].entries == [{"what": "added", "path": "a", "from": None, "to": 1}]
    assert changes[1].entries == [{"what": "changed", "path": "a", "from": 1, "to": 2}]
    assert events == 2
    with desk.database.read() as session:
        event = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc())).first()
        item = session.get_one(Item, desk.item)
        audit_log.verify(session)
    assert event is not None
    assert (event.actor_id, event.action) == (desk.ann.id, "assignment.save")
    assert event.digest == audit_log.digest_of({"answer": {"a": 2}, "state": None}, item.salt)


def test_a_retry_changes_nothing(desk: Desk) -> None:
    desk.save(0, "save-one", {"a": 1})
    before = desk.state()
    again = desk.save(0, "save-one", {"a": 1})
    assert (again.version, again.repeated) == (1, True)
    desk.save(1, "save-two", {"a": 2})
    assert desk.save(0, "save-one", {"a": 1}).version == 1  # also when others came in between
    assert desk.save(2, "save-one", {"a": 1}).version == 1  # and on the version that is there now
    assignment, changes, events = desk.state()
    assert (assignment.answer, len(changes), events) == ({"a": 2}, 2, before[2] + 1)


def test_one_id_for_two_different_saves_is_refused(desk: Desk) -> None:
    desk.save(0, "save-one", {"a": 1})
    with pytest.raises(InvalidAnswer, match="was used"):
        desk.save(1, "save-one", {"a": 2})
    assert desk.state()[0].answer == {"a": 1}


def test_a_stale_base_is_a_conflict_with_both_versions_known(desk: Desk) -> None:
    desk.save(0, "save-one", {"a": 1})
    with pytest.raises(Conflict) as caught:
        desk.save(0, "save-two", {"a": 2})
    assert (caught.value.version, caught.value.answer) == (1, {"a": 1})
    assert desk.state()[0].answer == {"a": 1}


def test_of_many_at_once_one_wins_and_none_is_lost_unseen(desk: Desk) -> None:
    outcomes: list[Any] = []
    # As another server has it: inside one, writes take turns.
    other = Database(desk.url)

    def one(n: int) -> None:
        database = other if n % 2 else desk.database
        try:
            saved = desk.save(0, f"save-{n:04d}", {"a": n}, database=database)
            outcomes.append(saved.version)
        except Conflict as error:
            outcomes.append(error.answer)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assignment, changes, _ = desk.state()
    assert outcomes.count(1) == 1
    assert [o for o in outcomes if o != 1] == [assignment.answer] * 7
    assert len(changes) == 1
    other.close()


def test_only_ones_own(desk: Desk) -> None:
    with pytest.raises(NotYours):
        desk.save(0, "save-one", reviewer_id=desk.bob.id)
    with pytest.raises(NotYours):
        desk.save(0, "save-one", assignment_id="nothing")


def test_a_finished_item_is_closed(desk: Desk) -> None:
    saved = desk.save(0, "save-one", {"a": 1}, state="done")
    assert (saved.version, saved.state) == (1, "done")
    assert Kind.finished == [desk.id]
    assert Kind.asked[-1] == {
        "content": {"n": 1},
        "answer": {"a": 1},
        "finish": True,
        "before": {},
        "part": "rubric",
    }
    assignment, changes, _ = desk.state()
    assert assignment.finished is not None
    assert changes[0].entries[-1]["what"] == "finished"
    with pytest.raises(Closed, match="finished"):
        desk.save(1, "save-two", {"a": 2})
    assert desk.save(0, "save-one", {"a": 1}, state="done").version == 1  # the retry of it is not


def test_closed_rounds_and_removed_items_take_nothing(desk: Desk) -> None:
    with desk.database.write() as session:
        session.get_one(Round, desk.round).state = "closed"
    with pytest.raises(Closed, match="round"):
        desk.save(0, "save-one")
    with desk.database.write() as session:
        session.get_one(Round, desk.round).state = "open"
        session.get_one(Item, desk.item).removed_at = now()
    with pytest.raises(Closed, match="removed"):
        desk.save(0, "save-one")


def test_what_follows_a_finish_is_in_the_same_transaction(desk: Desk) -> None:
    with pytest.raises(RuntimeError):
        desk.save(0, "save-one", {"explode": True}, state="done")
    assignment, changes, events = desk.state()
    assert (assignment.version, assignment.state, changes, events) == (0, "open", [], 0)


WRONG: tuple[dict[str, Any], ...] = (
    {"base": -1},
    {"base": True},
    {"base": "0"},
    {"base": None},
    {"save_id": "short"},
    {"save_id": "with space in it"},
    {"save_id": "x" * 65},
    {"save_id": None},
    {"answer": []},
    {"answer": {"bad": 1}},
    {"seconds": -1},
    {"seconds": float("nan")},
    {"seconds": float("inf")},
    {"seconds": 3601},
    {"seconds": "2"},
    {"state": "open"},
)


def test_what_cannot_be_kept_is_refused_and_nothing_written(desk: Desk) -> None:
    for wrong in WRONG:
        with pytest.raises(InvalidAnswer) as caught:
            desk.save(**({"base": 0, "save_id": "save-one", "answer": {}} | wrong))
        assert len(caught.value.problems) == 1, wrong
    assert desk.state()[1:] == ([], 0)


def test_changes_are_never_rewritten(desk: Desk) -> None:
    desk.save(0, "save-one", {"a": 1})
    with pytest.raises(DBAPIError, match="only grows"), desk.database.write() as session:
        session.execute(text("UPDATE change SET seconds = 0"))


def test_any_text_comes_back_as_it_was(desk: Desk) -> None:
    odd = "NUL \x00, half a pair \ud83d, 中文, \u2028, <b>"
    desk.save(0, "save-one", {odd: [odd, {"id": odd}]})
    assert desk.state()[0].answer == {odd: [odd, {"id": odd}]}


def test_over_http_each_refusal_has_its_status(desk: Desk) -> None:
    base = "http://127.0.0.1:8080"
    client = TestClient(desk.app, base_url=base, raise_server_exceptions=False)
    client.cookies.set(desk.app.state.cookie, desk.ann.token, domain="127.0.0.1")
    client.headers["X-CSRF-Token"] = desk.ann.csrf
    address = f"/api/assignments/{desk.id}"
    body = {"base": 0, "save": "save-one", "answer": {"a": 1}, "seconds": 1.5, "finish": False}
    for _ in range(2):
        reply = client.put(address, json=body)
        assert (reply.status_code, reply.json()) == (200, {"version": 1, "state": "started"})
    reply = client.put(address, json={**body, "save": "save-two", "answer": {"a": 2}})
    assert reply.status_code == 409
    assert reply.json() == {
        "error": "conflict",
        "version": 1,
        "answer": {"a": 1},
        "state": "started",
    }
    reply = client.put(address, json={**body, "save": "x", "base": "a"})
    assert reply.status_code == 422
    assert len(reply.json()["problems"]) == 2
    assert client.put("/api/assignments/none", json=body).status_code == 404
    done = {**body, "base": 1, "save": "save-end", "finish": True}
    assert client.put(address, json=done).json() == {"version": 2, "state": "done"}
    late = {**body, "base": 2, "save": "save-late"}
    assert client.put(address, json=late).status_code == 423
    for nonsense in (b"[]", b"{", b"\xff", b""):
        reply = client.put(address, content=nonsense, headers={"Content-Type": "application/json"})
        assert reply.status_code in (400, 422), nonsense


def test_every_refusal_is_a_save_error() -> None:
    assert all(issubclass(c, SaveError) for c in (NotYours, Closed, Conflict, InvalidAnswer))


# ---- what changed ----

TEXT = st.text(max_size=3)
ENTRY = st.fixed_dictionaries({"id": st.sampled_from("abcde"), "text": TEXT})
LISTED = st.lists(ENTRY, max_size=4, unique_by=lambda e: e["id"])
DOCUMENT = st.fixed_dictionaries(
    {}, optional={"reason": TEXT, "criteria": LISTED, "flags": st.dictionaries(TEXT, st.booleans())}
)


@given(DOCUMENT, DOCUMENT)
def test_there_are_changes_if_and_only_if_something_changed(before: Any, after: Any) -> None:
    assert (changes_between(before, after) == []) == (before == after)


@given(LISTED, LISTED)
def test_the_changes_of_a_list_rebuild_it(before: list[Any], after: list[Any]) -> None:
    found = changes_between({"c": before}, {"c": after})
    entries = {e["id"]: dict(e) for e in before}
    for change in found:
        if change["path"] == "c":
            continue  # the order
        name, *field = change["path"].split("/")[1:]
        if change["what"] == "removed":
            del entries[name]
        elif change["what"] == "added":
            entries[name] = change["to"]
        else:
            assert entries[name][field[0]] == change["from"]
            entries[name][field[0]] = change["to"]
    assert entries == {e["id"]: e for e in after}


def test_changes_name_ids_moves_and_kinds() -> None:
    before = {"c": [{"id": "a", "t": 1}, {"id": "b"}], "n": 1, "gone": None}
    after = {"c": [{"id": "b"}, {"id": "a", "t": 2}], "n": True, "new": []}
    assert changes_between(before, after) == [
        {"what": "changed", "path": "c/a/t", "from": 1, "to": 2},
        {"what": "moved", "path": "c", "from": ["a", "b"], "to": ["b", "a"]},
        {"what": "changed", "path": "n", "from": 1, "to": True},
        {"what": "removed", "path": "gone", "from": None, "to": None},
        {"what": "added", "path": "new", "from": None, "to": []},
    ]
    assert changes_between({"x": [1]}, {"x": [2]}) == [
        {"what": "changed", "path": "x", "from": [1], "to": [2]}
    ]
