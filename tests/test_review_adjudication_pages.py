"""Pages of adjudication: what reaches a reviewer, over HTTP and in Chromium; the lead's pages."""

from __future__ import annotations

import io
import json
import socket
import socketserver
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adjudications import JUDGE, MODELS, answer_of, given, graded, new_round, put, read_all
from promedical.records import to_dict
from promedical.review.adjudication import read_items
from promedical.review.adjudication_answer import blind_of
from promedical.review.consensus import Standing
from promedical.review.tables import Assignment, Round
from promedical.rubric import Verdict
from review_server import *  # noqa: F403
from review_server import Running, add_reviewer
from review_server import client_of as any_client

NOTE = "unmistakable note of the other reader"
DANGER = "unmistakable danger by the other reader"
# Nothing of this may reach a reviewer: who wrote it, where it is from, the judge, another reader.
FORBIDDEN = (
    *MODELS,
    "Quasar",
    "Nimbus",
    JUDGE,
    "Arbiter",
    "row-00",
    "made-up",
    "three tablets",
    NOTE,
    DANGER,
    "Dr Other",
    "other-login",
)
CRITERIA = ("usual adult dose", "with food", "Acknowledges the worry", "double the dose")


def client_of(server: Any, account: Any) -> Any:
    """A client with patience: figures and exports take a while on a busy machine."""
    client = any_client(server, account)
    client.timeout = 120
    return client


def all_met(text: str, criterion: str) -> str:
    return "unmet" if criterion == "harm" else "met"


def contrary(text: str, criterion: str) -> str:
    return {"met": "unmet", "unmet": "met"}[all_met(text, criterion)]


def with_notes(answer: dict[str, Any]) -> dict[str, Any]:
    """The same answer with remarks that would be recognised anywhere."""
    for by_criterion in answer["verdicts"].values():
        for entry in by_criterion.values():
            entry["note"] = NOTE
    keys = list(answer["verdicts"])
    return {**answer, "dangers": {keys[0]: [{"id": "d1", "kind": "other", "text": DANGER}]}}


def finish_with_notes(database: Any, reviewer: str, judge: Any) -> None:
    for assignment, item in given(database, reviewer):
        answer = answer_of(item.content, {}, "first", judge, order=assignment.response_order)
        put(database, assignment, with_notes(answer), base=0, finish=True)


# --- a reviewer's whole session over HTTP ---------------------------------------------------------


def test_a_session_holds_no_model_no_judge_and_no_other_reader(running) -> None:
    database = running.database
    mine = add_reviewer(database, "mine")
    other = add_reviewer(database, "other-login", name="Dr Other")
    new_round(database, [graded(0), graded(1)], [mine.id, other.id])
    client = client_of(running, mine)
    traffic: list[str] = []

    def ask(method: str, path: str, **more: Any) -> Any:
        reply = client.request(method, path, **more)
        headers = "\n".join(f"{k}: {v}" for k, v in reply.headers.items())
        traffic.append(f"{headers}\n{reply.text}")
        return reply

    def save(assignment: Assignment, base: int, answer: Any, finish: bool = False) -> Any:
        body = {
            "base": base,
            "save": uuid.uuid4().hex,
            "answer": answer,
            "seconds": 5,
            "finish": finish,
        }
        return ask("PUT", f"/api/assignments/{assignment.id}", json=body)

    (assignment, item), (later, _) = given(database, mine.id)
    page = f"/adjudications/{assignment.id}"
    asked_first = ask("GET", page)
    assert asked_first.status_code == 200
    for text in CRITERIA:
        assert text not in asked_first.text
    assert "better overall" in asked_first.text

    answer = answer_of(item.content, {}, "first", all_met, order=assignment.response_order)
    stated = {"preference": answer["preference"], "preference_given": True}
    assert save(assignment, 0, {"preference": {}, "preference_given": True}).status_code == 422
    assert save(assignment, 0, stated).json() == {"version": 1, "state": "started"}
    with_criteria = ask("GET", page)
    for text in CRITERIA:
        assert text in with_criteria.text
    assert save(assignment, 0, stated).status_code == 409
    half = {**answer, "verdicts": {}}
    assert save(assignment, 1, half).status_code == 200
    before = ask("GET", page).text

    # What the other reader thinks changes nothing of what this one receives, and nor does a judge.
    finish_with_notes(database, other.id, contrary)
    assert ask("GET", page).text == before
    assert save(assignment, 2, half, finish=True).status_code == 422
    assert save(assignment, 2, answer, finish=True).json()["state"] == "done"
    assert save(assignment, 3, answer).status_code == 423
    for path in (
        page,
        "/",
        f"/next/{item.round_id}",
        "/account",
        "/storage",
        "/static/adjudicate.js",
    ):
        assert ask("GET", path).status_code in (200, 303)
    assert "This item is finished" in ask("GET", page).text

    (theirs,) = [a for a in _assignments(database, item.id) if a.reviewer_id == other.id]
    assert ask("GET", f"/adjudications/{theirs.id}").status_code == 404
    assert save(theirs, 1, answer).status_code == 404
    rounds = f"/adjudication-rounds/{item.round_id}"
    for path in (
        rounds,
        f"{rounds}/live",
        f"{rounds}/items/{item.id}",
        f"{rounds}/bench.zip",
        f"{rounds}/veto_candidates.jsonl",
        "/adjudication-rounds/new",
    ):
        assert ask("GET", path).status_code == 403
    for path in (f"{rounds}/thirds", f"{rounds}/dangers", f"{rounds}/state"):
        assert ask("POST", path).status_code == 403
    assert ask("GET", f"/adjudications/{later.id}").status_code == 200
    assert len(traffic) > 20
    for text in traffic:
        for word in FORBIDDEN:
            assert word not in text


def _assignments(database: Any, item_id: str) -> list[Assignment]:
    from sqlalchemy import select

    with database.read() as session:
        return list(session.scalars(select(Assignment).where(Assignment.item_id == item_id)))


def test_a_third_reader_sees_the_others_only_after_their_own_is_final(running) -> None:
    database = running.database
    first = add_reviewer(database, "first-login", name="Dr First")
    other = add_reviewer(database, "other-login", name="Dr Other")
    third = add_reviewer(database, "third", "adjudicator")
    new_round(database, [graded(0)], [first.id, other.id])
    read_all(database, first.id, all_met)
    finish_with_notes(database, other.id, contrary)
    client = client_of(running, third)
    ((assignment, item),) = given(database, third.id)
    page = f"/adjudications/{assignment.id}"
    blind = client.get(page).text
    assert "Two readers differ here" in blind
    for word in (*FORBIDDEN, "Reader 1", "Dr First", "first-login", first.id, other.id):
        assert word not in blind
    answer = answer_of(item.content, assignment.answer, "third", all_met)
    put(database, assignment, {**answer, "blind": blind_of(answer)}, base=0)
    shown = client.get(page).text
    assert shown.count("Reader 1") == shown.count("Reader 2") == 8
    assert NOTE in shown
    for word in FORBIDDEN:
        assert (word in shown) == (word == NOTE)
    for word in ("Dr First", "first-login", first.id, other.id):
        assert word not in shown


# --- in a real browser ----------------------------------------------------------------------------


class Wire:
    """Passes a browser's connections on to the server, and keeps every byte that comes back."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.streams: list[bytearray] = []
        wire = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                wire.connect(self.request)

        self.proxy = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.running = Running(f"http://127.0.0.1:{self.proxy.server_address[1]}", server.app)

    def connect(self, browser: socket.socket) -> None:
        """Pass one connection on, both ways."""
        port = int(self.server.url.rsplit(":", 1)[1])
        kept = bytearray()
        self.streams.append(kept)
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            asking = threading.Thread(target=_pass_on, args=(browser, upstream, None), daemon=True)
            asking.start()
            _pass_on(upstream, browser, kept)

    def received(self) -> str:
        """All that the browser received so far, headers and bodies."""
        return "\n".join(bytes(kept).decode("utf-8", "replace") for kept in self.streams)


def _pass_on(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    try:
        while data := source.recv(65536):
            if kept is not None:
                kept += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # either side has gone


@pytest.fixture
def wire(running: Running) -> Iterator[Callable[[], Wire]]:
    """Makes a `Wire` to the server, one for every browser that is listened to."""
    made: list[Wire] = []

    def make() -> Wire:
        made.append(Wire(running))
        return made[-1]

    yield make
    for one in made:
        one.proxy.shutdown()
        one.proxy.server_close()


@pytest.fixture
def browser_page(page_of: Any) -> Any:
    """`page_of` with patience, for a busy machine."""

    def open_page(*args: Any, **more: Any) -> Any:
        page = page_of(*args, **more)
        page.context.set_default_timeout(120_000)
        return page

    return open_page


def faults_of(page: Any) -> list[str]:
    """Errors of scripts and of the content policy on a page, as they come."""
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    return faults


def test_an_adjudication_with_a_conflict_in_chromium(running, browser_page, wire) -> None:
    database = running.database
    one = add_reviewer(database, "one")
    two = add_reviewer(database, "other-login", name="Dr Other")
    third = add_reviewer(database, "third", "adjudicator")
    lead = add_reviewer(database, "lead", "lead")
    made = new_round(database, [graded(0)], [one.id, two.id])

    # The first reader: keyboard alone, from the start page on.
    seen = wire()
    page = browser_page(seen.running, one)
    faults = faults_of(page)
    page.goto("/")
    page.click(f"a[href='/adjudications/{given(database, one.id)[0][0].id}'].primary")
    assert page.locator(".criterion").count() == 0
    assert page.locator("[data-go-on]").is_disabled()
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    page.wait_for_selector(".criterion.current")
    for key in "mmmnmmm":
        page.keyboard.press(key)
    assert page.locator("[data-tally]").inner_text() == "7 of 8 judged"
    page.click("[data-finish]")
    assert "1 criteria still need" in page.locator(".dock-problem").inner_text()
    page.keyboard.press("m")  # no word of a veto
    assert page.locator("[data-tally]").inner_text() == "7 of 8 judged"
    page.keyboard.press("n")
    page.keyboard.press("Enter")  # the button has the focus
    page.wait_for_url("**/")

    # The second one: by mouse, against the first; the connection is lost in between.
    page2 = browser_page(running, two, width=390)
    page2.goto(f"/adjudications/{given(database, two.id)[0][0].id}")
    page2.check("input[value=first_better_much]")
    page2.click("[data-go-on]")
    page2.wait_for_selector(".criterion.current")
    page2.context.set_offline(True)
    boxes = page2.locator(".panel:visible .criterion")
    for i, value in enumerate(("met", "unmet", "cannot_say", "unmet")):
        boxes.nth(i).locator(f"input[value={value}]").check()
    boxes.nth(1).locator(".flag input").check()
    boxes.nth(1).locator(".note-box summary").click()
    boxes.nth(1).locator("[data-note]").fill(NOTE)
    page2.locator(".panel:visible .danger-add").click()
    page2.locator("[data-danger-text]").fill(DANGER)
    page2.wait_for_selector("#save-trouble:not([hidden])")
    page2.context.set_offline(False)
    page2.wait_for_selector("#save-state[data-state=saved]")
    page2.locator("[role=tab]").nth(1).click()
    boxes = page2.locator(".panel:visible .criterion")
    for i, value in enumerate(("met", "met", "met", "unmet")):
        boxes.nth(i).locator(f"input[value={value}]").check()
    page2.click("[data-finish]")
    page2.wait_for_url("**/")

    # What the first reader's browser receives now is still without it.
    page.goto("/")
    page.goto(f"/adjudications/{_assignments_of(database, one.id)[0].id}")
    assert page.locator(".criterion input:enabled").count() == 0
    page.wait_for_load_state("networkidle")
    received = seen.received()
    for expected in ("usual adult dose", '{"version":', "This item is finished", "window.Review"):
        assert expected in received
    for word in FORBIDDEN:
        assert word not in received
    assert faults == []

    # The third reader: blind first, then the two; revises one, keeps the other.
    seen3 = wire()
    page3 = browser_page(seen3.running, third)
    faults = faults_of(page3)
    page3.goto("/")
    page3.click(".primary >> nth=0")
    page3.wait_for_selector(".criterion.current")
    assert page3.locator(".criterion").count() == 2
    assert page3.locator(".others").count() == 0
    page3.keyboard.press("c")
    page3.keyboard.press("m")
    blind = seen3.received()
    assert "Two readers differ here" in blind
    for word in FORBIDDEN:
        assert word not in blind
    page3.keyboard.press("Enter")
    page3.wait_for_selector(".others")
    assert page3.locator(".others li").count() == 4
    assert "Guidelines differ here" in page3.locator(".others").nth(0).inner_text()
    assert NOTE in page3.locator(".others").nth(0).inner_text()
    assert "Cannot say" in page3.locator(".mine").nth(0).inner_text()
    page3.locator(".criterion").nth(0).locator("input[value=met]").check()
    page3.click("[data-finish]")
    page3.wait_for_url("**/")
    received = seen3.received()
    assert NOTE in received
    for word in FORBIDDEN:
        assert word not in received or word == NOTE
    assert faults == []

    with database.read() as session:
        (item,) = read_items(session, made.round_id)
    assert item.complete
    (food,) = [
        c for (_, c_id), c in item.consensus.items() if c_id == "food" and len(c.ballots) == 3
    ]
    assert (food.standing, food.gold) == (Standing.ADJUDICATED, Verdict.MET)
    assert food.ballots[2].blind is Verdict.ABSTAIN
    assert sum(b.disputed for b in food.ballots) == 1

    # And the lead sees it all.
    page4 = browser_page(running, lead)
    page4.goto(f"/adjudication-rounds/{made.round_id}")
    text = page4.locator("main").inner_text()
    for word in ("Krippendorff’s α", "Gwet’s AC1", DANGER, "Items settled\n1 of 1"):
        assert word in text
    page4.click(f"a[href$='/items/{item.id}'] >> nth=0")
    text = page4.locator("main").inner_text()
    for word in (*MODELS, JUDGE, "Dr Other", NOTE, "blind: Cannot say", "Settled by a third"):
        assert word in text


def _assignments_of(database: Any, reviewer_id: str) -> list[Assignment]:
    from sqlalchemy import select

    with database.read() as session:
        return list(
            session.scalars(select(Assignment).where(Assignment.reviewer_id == reviewer_id))
        )


def test_a_page_that_died_before_its_preference_arrived_goes_on(running, browser_page) -> None:
    database = running.database
    one = add_reviewer(database, "one")
    two = add_reviewer(database, "two")
    new_round(database, [graded(0, responses=3)], [one.id, two.id])
    ((assignment, _),) = given(database, one.id)
    page = browser_page(running, one)
    page.goto(f"/adjudications/{assignment.id}")
    assert page.locator(".pair").count() == 3
    page.route("**/api/**", lambda route: route.abort())
    for key in "130":
        page.keyboard.press(key)
    page.click("[data-go-on]")
    page.wait_for_selector("#save-state[data-state=unsent]")
    page.close()
    again = page.context.new_page()
    again.goto(f"/adjudications/{assignment.id}")
    again.wait_for_selector(".criterion.current")
    assert again.locator(".stated").count() == 3
    assert again.locator(".criterion").count() == 12


# --- the lead's pages -----------------------------------------------------------------------------


def as_file(*rows: Any) -> dict[str, Any]:
    text = "".join(json.dumps(to_dict(row)) + "\n" for row in rows)
    return {"rows": ("rows.jsonl", text.encode(), "application/jsonl")}


def test_the_lead_makes_a_round_of_a_file(running) -> None:
    database = running.database
    lead = add_reviewer(database, "lead", "lead")
    reviewers = [add_reviewer(database, f"r{i}").id for i in range(3)]
    client = client_of(running, lead)
    assert "Who reads first" in client.get("/adjudication-rounds/new").text
    form = {"name": "Pilot", "readers": "2", "limit": "0", "judge": JUDGE, "csrf": lead.csrf}

    def make(files: Any, **changed: Any) -> Any:
        data = {**form, "reviewers": reviewers, **changed}
        return client.post("/adjudication-rounds/new", data=data, files=files)

    for files, changed, problem in (
        (as_file(graded(0)), {"name": " "}, "name: found none"),
        (as_file(graded(0)), {"reviewers": reviewers[:1]}, "found 1, expected at least 2"),
        (as_file(graded(0)), {"readers": "1"}, "expected at least 2"),
        (as_file(graded(0, responses=1)), {}, "none can be adjudicated"),
        ({"rows": ("my.jsonl", b"{nonsense", "text/plain")}, {}, "my.jsonl: line 1: not JSON"),
    ):
        reply = make(files, **changed)
        assert reply.status_code == 400
        assert problem in reply.text.replace("&#39;", "'")
    reply = make(as_file(graded(0), graded(1), graded(2, responses=1)))
    assert reply.status_code == 303
    page = client.get(reply.headers["location"])
    assert "2 items were handed out as 4 readings" in page.text
    assert "1 rows were left out: fewer than two responses" in page.text
    assert "handed out" not in client.get(reply.headers["location"]).text
    assert "Nothing is judged by two yet" in page.text


def test_the_lead_follows_and_closes_a_round(running) -> None:
    database = running.database
    lead = add_reviewer(database, "lead", "lead")
    one = add_reviewer(database, "one")
    other = add_reviewer(database, "other-login", name="Dr Other", language="zh")
    made = new_round(database, [graded(0), graded(1)], [one.id, other.id])
    client = client_of(running, lead)
    rounds = f"/adjudication-rounds/{made.round_id}"
    assert client.get(f"{rounds}/bench.zip").status_code == 404
    assert client.get("/adjudication-rounds/none").status_code == 404
    read_all(database, one.id, all_met, seconds=4.0)
    finish_with_notes(database, other.id, contrary)
    page = client.get(rounds).text
    assert 'hx-get="/adjudication-rounds/' in page
    assert "2 items wait for a third reader" in page
    assert 'class="pill warn">fast' in page
    add_reviewer(database, "third", "adjudicator")
    assert client.post(f"{rounds}/thirds").status_code == 303
    live = client.get(f"{rounds}/live").text
    assert "<html" not in live
    assert "wait for a third reader" not in live
    candidates = [
        json.loads(line) for line in client.get(f"{rounds}/veto_candidates.jsonl").text.splitlines()
    ]
    assert [c["text"] for c in candidates] == [DANGER, DANGER]
    assert "Dr Other" not in str(candidates)
    danger = page.split('name="danger" value="')[1].split('"')[0]
    assert client.post(f"{rounds}/dangers", data={"danger": danger, "state": "taken"}).is_redirect
    assert (
        client.post(f"{rounds}/dangers", data={"danger": "x", "state": "taken"}).status_code == 404
    )
    assert "Taken for the veto bank" in client.get(rounds).text
    third = _third(database)
    read_all(database, third, all_met)
    packed = client.get(f"{rounds}/bench.zip")
    names = zipfile.ZipFile(io.BytesIO(packed.content)).namelist()
    assert {"bench/rows.parquet", "votes.jsonl", "physicians.json", "report.json"} <= set(names)
    assert client.post(f"{rounds}/state", data={"state": "closed"}).is_redirect
    with database.read() as session:
        assert session.get_one(Round, made.round_id).state == "closed"
    assert "hx-get" not in client.get(f"{rounds}/live").text
    assert client.post(f"{rounds}/state", data={"state": "gone"}).status_code == 404


def test_the_page_of_a_large_round_does_not_wait_for_its_figures(running, monkeypatch) -> None:
    database = running.database
    lead = add_reviewer(database, "lead", "lead")
    people = [add_reviewer(database, name).id for name in ("one", "other")]
    made = new_round(database, [graded(0), graded(1)], people)
    client = client_of(running, lead)
    rounds = f"/adjudication-rounds/{made.round_id}"
    read_all(database, people[0], all_met)
    monkeypatch.setattr("promedical.review.pages_adjudication.AT_ONCE", 1)
    page = client.get(rounds).text
    assert "being calculated" in page
    assert 'hx-trigger="load, every 15s"' in page
    assert page.count("1 of 2</td>") == 2  # the items' own lines are there
    live = client.get(f"{rounds}/live").text
    assert "Calculated at" in live
    assert 'hx-trigger="every 15s"' in live
    page = client.get(rounds).text
    assert "Calculated at" in page
    assert "load, " not in page
    # What was finished since: older figures meanwhile, but the lines as they are.
    read_all(database, people[1], all_met)
    page = client.get(rounds).text
    assert "Calculated at" in page
    assert 'hx-trigger="load, every 15s"' in page
    assert page.count("2 of 2</td>") == 2
    assert client.post(f"{rounds}/state", data={"state": "closed"}).is_redirect
    assert 'hx-trigger="load"' in client.get(rounds).text


def _third(database: Any) -> str:
    from sqlalchemy import select

    with database.read() as session:
        return str(
            session.scalars(
                select(Assignment.reviewer_id).where(Assignment.part == "third").distinct()
            ).one()
        )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_in_both_languages(running, language) -> None:
    database = running.database
    lead = add_reviewer(database, "lead", "lead", language=language)
    one, two = (add_reviewer(database, n, language=language) for n in ("one", "two"))
    third = add_reviewer(database, "third", "adjudicator", language=language)
    made = new_round(database, [graded(0)], [one.id, two.id])
    ((assignment, item),) = given(database, one.id)
    word = {"en": "overall", "zh": "总体"}[language]
    client = client_of(running, one)
    assert word in client.get(f"/adjudications/{assignment.id}").text
    read_all(database, one.id, all_met)
    assert client.get(f"/adjudications/{assignment.id}").status_code == 200
    finish_with_notes(
        database, two.id, lambda t, c: "cannot_say" if c == "kind" else contrary(t, c)
    )
    ((asked, _),) = given(database, third.id)
    thirds = client_of(running, third)
    assert thirds.get(f"/adjudications/{asked.id}").status_code == 200
    read_all(database, third.id, lambda t, c: "cannot_say")
    assert thirds.get(f"/adjudications/{asked.id}").status_code == 200
    leads = client_of(running, lead)
    rounds = f"/adjudication-rounds/{made.round_id}"
    for path in (rounds, f"{rounds}/items/{item.id}", "/adjudication-rounds/new"):
        reply = leads.get(path)
        assert reply.status_code == 200
        assert ("裁定" in reply.text or "评审" in reply.text) == (language == "zh")
