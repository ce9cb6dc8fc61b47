"""Rubric rounds in a real browser: a whole round, lost connections, a dead browser, two windows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from promedical.records import from_dict, to_dict
from promedical.review import rounds
from promedical.review.rounds import RoundSettings
from promedical.review.sessions import end_sessions_of, open_session
from promedical.review.tables import Assignment, Change, LoginSession
from promedical.rubric import Tier
from review_server import *  # noqa: F403
from review_server import (
    CHROMIUM,
    Account,
    Running,
    add_reviewer,
    client_of,
    free_port,
    serve_in_thread,
)
from test_review_rounds import draft_row

PageOf = Callable[..., Any]
WAIT = 60_000  # ms; a loaded machine is slow, and a wait that is met ends at once
READY = "[data-rubric-editor][data-ready]"
FIRST = "States the usual adult dose."


class Desk:
    """One reviewer with a round on their desk."""

    def __init__(self, server: Running, size: int = 2, language: str = "en") -> None:
        self.server = server
        self.anna = add_reviewer(server.database, "anna", language=language)
        with server.database.write() as session:
            rows = [draft_row(n) for n in range(size)]
            made = rounds.make_round(session, rows, RoundSettings("Autumn"))
            self.round = made.id
            rounds.assign(session, made.id, [self.anna.id])
            self.ids = [i.assignments[0].id for i in rounds.items_of(session, made.id)]

    def saved(self, at: int = 0) -> Assignment:
        with self.server.database.read() as session:
            return session.get_one(Assignment, self.ids[at])

    def texts(self, at: int = 0) -> list[str]:
        return [c["text"] for c in self.saved(at).answer["criteria"]]

    def changes(self) -> int:
        with self.server.database.read() as session:
            return session.scalar(select(func.count()).select_from(Change)) or 0

    def open(self, page: Any, at: int = 0) -> Any:
        page.set_default_timeout(WAIT)
        page.goto(f"{self.server.url}/rubrics/{self.ids[at]}")
        page.locator(READY).wait_for()
        return page


def first_text(page: Any) -> Any:
    return page.locator(".criterion textarea").first


def wait_state(page: Any, name: str) -> None:
    page.locator(f'#save-state[data-state="{name}"]').wait_for()


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT / 1000
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


# ---- a whole round ----


def test_a_full_round_by_three_reviewers(running: Running, page_of: PageOf, tmp_path: Path) -> None:
    lead = add_reviewer(running.database, "lead", "lead")
    names = ("anna", "bo", "carla")
    people = {name: add_reviewer(running.database, name) for name in names}
    drafts_file = tmp_path / "drafts.jsonl"
    drafts_file.write_text("".join(json.dumps(to_dict(draft_row(n))) + "\n" for n in range(3)))

    page = page_of(running, lead)
    page.set_default_timeout(WAIT)
    page.goto("/")
    page.locator("a[href='/rounds/new']").click()
    page.get_by_label("Name of the round").fill("Autumn")
    page.get_by_label("Drafts (JSON lines)").set_input_files(drafts_file)
    page.get_by_label("How many rubrics").fill("3")
    page.get_by_label("Share that two reviewers get").fill("100")
    for name in names:
        page.get_by_label(name.title()).check()
    page.get_by_role("button", name="Make the round").click()
    page.get_by_text("0 / 6").wait_for()
    round_id = page.url.rpartition("/")[2]

    # All accept what they are shown, but Bo rewords the first criterion, and Carla rejects.
    for name, person in people.items():
        work(page_of(running, person), name)
    page.reload()
    page.get_by_text("6 / 6").wait_for()
    with running.database.read() as session:
        items = rounds.items_of(session, round_id)
        states = sorted(rounds.outcome(item).state for item in items)
    assert states == ["differ"] * 3

    # The lead sees both versions and decides: each time for the first one that is no rejection.
    for item in items:
        page.goto(f"/rounds/{round_id}/items/{item.id}")
        page.get_by_role("button", name="Decide").click()
        page.locator(READY).wait_for()
        assert page.locator(".other").count() == 2
        kept = page.locator(".other", has_not_text="Rejected").first
        kept.get_by_role("button", name="Start from this version").click()
        page.get_by_role("button", name="Accept").click()
        page.wait_for_url(lambda url: "/rubrics/" not in url)

    page.goto(f"/rounds/{round_id}")
    assert page.locator(".figures dd").first.inner_text().startswith("0.0 %")
    page.get_by_role("cell", name="Wording").wait_for()
    lines = client_of(running, lead).get(f"/rounds/{round_id}/gold.jsonl").text.splitlines()
    gold = [from_dict(json.loads(line)) for line in lines]
    assert {row.id for row in gold} == {draft_row(n).id for n in range(3)}
    reworded = [r for r in gold if r.rubric.tier(Tier.PROFICIENCY)[0].text == "Names the top dose."]
    assert len(reworded) >= 1


def work(page: Any, name: str) -> None:
    """Somebody's two items, begun from the start page, with the keyboard alone from there on."""
    page.set_default_timeout(WAIT)
    page.goto("/")
    page.get_by_role("link", name="Begin").click()
    for left in (1, 0):
        page.locator(READY).wait_for()
        here = page.url
        if name == "bo":
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
            page.keyboard.press("Control+A")
            page.keyboard.type("Names the top dose.")
            page.keyboard.press("Escape")
        if name == "carla":
            page.keyboard.press("r")
            page.keyboard.type("The question cannot be answered.")
            page.get_by_role("button", name="Reject", exact=True).click()
        else:
            page.keyboard.press("Control+Enter")
        page.wait_for_url(lambda url, here=here: url != here)
        assert ("/rubrics/" in page.url) == bool(left)
    page.get_by_text("finished every item").or_(page.locator(".notice-good")).first.wait_for()


# ---- connections ----


def test_a_lost_connection_in_the_middle_of_an_edit(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    first_text(page).fill("Names the dose before the line broke.")
    wait_state(page, "saved")
    page.context.set_offline(True)
    first_text(page).fill("Names the dose while there was no line.")
    wait_state(page, "unsent")
    assert "No connection" in page.locator("#save-trouble").inner_text()
    page.locator(".criterion textarea").nth(1).fill("Names one side effect.")
    assert desk.texts()[0] == "Names the dose before the line broke."
    page.context.set_offline(False)
    wait_state(page, "saved")
    assert desk.texts()[:2] == ["Names the dose while there was no line.", "Names one side effect."]
    assert page.locator("#save-trouble").is_hidden()


def test_a_server_that_stops_and_starts_again(sqlite_url: str, page_of: PageOf) -> None:
    port = free_port()
    with serve_in_thread(sqlite_url, port=port) as server:
        desk = Desk(server)
        page = desk.open(page_of(server, desk.anna))
        first_text(page).fill("Names the dose at first.")
        wait_state(page, "saved")
    first_text(page).fill("Names the dose in between.")
    wait_state(page, "unsent")
    # To finish now is to finish when the server is back.
    page.keyboard.press("Control+Enter")
    assert desk.ids[0] in page.url
    with serve_in_thread(sqlite_url, port=port) as server:
        desk.server = server
        page.wait_for_url(lambda url: desk.ids[0] not in url)
        assert desk.saved().state == "done"
        assert desk.texts()[0] == "Names the dose in between."


def test_a_lost_reply_does_not_save_twice(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    lost = []

    def lose_first_reply(route: Any) -> None:
        lost.append(json.loads(route.request.post_data)["save"])
        if len(lost) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/api/assignments/*", lose_first_reply)
    first_text(page).fill("Names the dose once.")
    wait_state(page, "unsent")
    wait_state(page, "saved")
    assert len(lost) == 2
    assert lost[0] == lost[1]
    assert (desk.saved().version, desk.changes()) == (1, 1)


def test_logged_out_in_the_middle_and_in_again(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    with running.database.write() as session:
        end_sessions_of(session, desk.anna.id)
    first_text(page).fill("Names the dose after the session.")
    wait_state(page, "signin")
    with running.database.write() as session:
        token = open_session(session, desk.anna.id, running.app.state.settings)
        assert session.scalar(select(func.count()).select_from(LoginSession)) == 1
    cookie = {"name": running.app.state.cookie, "value": token, "url": running.url}
    page.context.add_cookies([cookie])
    wait_state(page, "saved")
    assert desk.texts()[0] == "Names the dose after the session."


def test_on_to_the_next_item_before_it_was_saved(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    first_text(page).fill("Names the dose in a hurry.")
    page.keyboard.press("Escape")
    page.keyboard.press("]")
    page.wait_for_url(f"**/rubrics/{desk.ids[1]}")
    until(lambda: desk.texts()[0] == "Names the dose in a hurry.", "it was not saved")


# ---- a browser that dies ----


@contextmanager
def own_browser(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """A browser that we start, so that we may kill it, with a profile that outlives it."""
    sync_api = pytest.importorskip("playwright.sync_api")
    (folder / "DevToolsActivePort").unlink(missing_ok=True)
    options = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "--remote-debugging-port=0", f"--user-data-dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until((folder / "DevToolsActivePort").exists, "the browser did not start")
        until(lambda: bool((folder / "DevToolsActivePort").read_text()), "no port")
        port = (folder / "DevToolsActivePort").read_text().split()[0]
        with sync_api.sync_playwright() as playwright:
            yield process, playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_review_rounds_browser import killed_mid_edit, reopened
{"edit": killed_mid_edit, "reopen": reopened}[sys.argv[3]](Path(sys.argv[4]), *sys.argv[5:])
"""


def browser_process(*arguments: str | Path) -> None:
    """In a process of its own: Playwright wants one loop a thread, and another one runs here."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, root / "tests", root / "src", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def killed_mid_edit(folder: Path, url: str, cookie: str, token: str) -> None:
    with own_browser(folder) as (process, browser):
        context = browser.contexts[0]
        context.add_cookies([{"name": cookie, "value": token, "url": url.rsplit("/", 2)[0]}])
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(url)
        page.locator(READY).wait_for()
        page.route("**/api/assignments/*", lambda route: route.abort())
        first_text(page).fill("Names the dose as the browser died.")
        wait_state(page, "unsent")
        page.locator(".criterion textarea").nth(1).fill("Names the last thing typed.")
        page.wait_for_timeout(300)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reopened(folder: Path, url: str, cookie: str, token: str) -> None:
    with own_browser(folder) as (_, browser):
        context = browser.contexts[0]
        context.add_cookies([{"name": cookie, "value": token, "url": url.rsplit("/", 2)[0]}])
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(url)
        page.locator(READY).wait_for()
        assert first_text(page).input_value() == "Names the dose as the browser died."
        wait_state(page, "saved")


def test_a_browser_killed_in_the_middle_of_an_edit(running: Running, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed (Debian: chromium)")
    desk = Desk(running)
    given = (f"{running.url}/rubrics/{desk.ids[0]}", running.app.state.cookie, desk.anna.token)
    browser_process("edit", tmp_path / "profile", *given)
    assert desk.texts()[0] == FIRST
    browser_process("reopen", tmp_path / "profile", *given)
    assert desk.texts()[:2] == [
        "Names the dose as the browser died.",
        "Names the last thing typed.",
    ]


def test_a_page_that_crashes_is_taken_over(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    page.context.route("**/api/assignments/*", lambda route: route.abort())
    first_text(page).fill("Names the dose before the crash.")
    wait_state(page, "unsent")
    page.close(run_before_unload=False)
    other = desk.open(page.context.new_page())
    assert first_text(other).input_value() == "Names the dose before the crash."
    other.context.unroute("**/api/assignments/*")
    wait_state(other, "saved")
    assert desk.texts()[0] == "Names the dose before the crash."


# ---- two windows ----


def test_two_windows_on_one_item_overwrite_nothing(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    one = desk.open(page_of(running, desk.anna))
    two = desk.open(one.context.new_page())
    two.locator("#save-elsewhere").wait_for()
    first_text(one).fill("Names the dose in window one.")
    one.locator(".criterion textarea").nth(1).fill("Names a side effect in window one.")
    wait_state(one, "saved")
    until(lambda: desk.saved().version >= 1, "window one did not save")

    first_text(two).fill("Names the dose in window two.")
    two.locator(".criterion textarea").nth(2).fill("Says to take it at night.")
    dialog = two.locator("dialog.conflict")
    dialog.wait_for()
    assert desk.texts()[0] == "Names the dose in window one."
    # What one window alone changed is chosen beforehand, what both changed has to be.
    use = dialog.get_by_role("button", name="Keep what I chose")
    assert use.is_disabled()
    both = dialog.locator(".conflict-field", has_text="Names the dose in window one.").last
    both.locator("input[value=mine]").check()
    two.keyboard.press("Escape")
    assert dialog.is_visible()
    use.click()
    wait_state(two, "saved")
    expected = [
        "Names the dose in window two.",
        "Names a side effect in window one.",
        "Says to take it at night.",
    ]
    assert desk.texts()[:3] == expected
    assert [t.input_value() for t in two.locator(".criterion textarea").all()[:3]] == expected


def test_all_of_the_other_version(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    one = desk.open(page_of(running, desk.anna))
    two = desk.open(one.context.new_page())
    one.keyboard.press("ArrowDown")
    one.keyboard.press("x")
    wait_state(one, "saved")
    until(lambda: desk.saved().version == 1, "window one did not save")
    first_text(two).fill("Names the dose in window two.")
    two.get_by_role("button", name="Keep all of the other").click()
    wait_state(two, "saved")
    assert desk.saved().version == 1
    assert FIRST not in desk.texts()
    assert two.locator(".criterion").count() == 3


# ---- the editor ----


def test_every_operation_with_the_keyboard(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    press = page.keyboard.press
    press("ArrowDown")
    press("w")
    page.keyboard.type("40")
    press("Enter")
    press("Escape")
    shares = [w.input_value() for w in page.locator(".share input:visible").all()]
    assert shares == ["40", "36", "24"]
    press("Alt+ArrowDown")
    press("n")
    page.keyboard.type("Says that alcohol has to be left out and driving too.")
    press("Escape")
    press("s")
    press("Escape")
    press("d")
    wait_state(page, "saved")
    until(lambda: desk.saved().answer["disputed"] is True, "the flag was not saved")
    answer = desk.saved().answer
    own = [c for c in answer["criteria"] if c["tier"] == "proficiency"]
    assert [c["text"] for c in own] == [
        "Names two common side effects.",
        FIRST,
        "Says that alcohol has to be left out",
        "driving too.",
        "Says to take it with food.",
    ]
    assert sum(c["weight"] for c in own) == pytest.approx(1)
    assert page.locator("[data-do=accept]").inner_text().startswith("Accept with edits")

    for _ in range(12):
        press("u")
    wait_state(page, "saved")
    until(lambda: desk.texts()[0] == FIRST, "undo was not saved")
    assert page.locator("[data-do=accept]").inner_text() == "Accept"
    press("?")
    page.get_by_role("heading", name="Keyboard").wait_for()
    press("Escape")

    press("ArrowDown")
    press("x")
    page.get_by_role("button", name="Put back").click()
    assert page.locator("[data-do=accept]").inner_text() == "Accept"


def test_merging_and_another_tier(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    first_text(page).click()
    card = page.locator(".criterion.current")
    card.get_by_role("button", name="Merge").click()
    page.keyboard.press("Escape")
    card.get_by_label("Tier").select_option("veto")
    card.get_by_label("Kind").select_option("harmful_advice")
    wait_state(page, "saved")
    until(lambda: desk.saved().answer["criteria"][0]["kind"] == "harmful_advice", "not saved")
    made = desk.saved().answer["criteria"][0]
    assert made["text"] == f"{FIRST} Names two common side effects."
    assert (made["tier"], made["weight"], len(made["from"])) == ("veto", None, 2)


def test_what_cannot_be_finished_is_said_and_can_be_mended(
    running: Running, page_of: PageOf
) -> None:
    desk = Desk(running, language="zh")
    page = desk.open(page_of(running, desk.anna))
    first_text(page).fill("")
    page.keyboard.press("Control+Enter")
    fault = page.locator("[data-part=faults]")
    assert "没有文字" in fault.inner_text()
    first_text(page).fill("Short?")
    page.keyboard.press("Control+Enter")
    page.locator("[data-part=faults]", has_text="完整的句子").wait_for()
    assert first_text(page).get_attribute("aria-invalid") == "true"
    first_text(page).fill("Names the dose in a sentence.")
    wait_state(page, "saved")
    assert desk.saved().state == "started"
    assert desk.saved().answer["decision"] is None
    page.keyboard.press("Control+Enter")
    page.wait_for_url(lambda url: desk.ids[0] not in url)
    assert (desk.saved().state, desk.saved().answer["decision"]) == ("done", "accept_with_edits")
    desk.open(page)
    assert page.locator("[data-do=accept]").is_disabled()


def test_hints_about_wording(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    first_text(page).fill("This is as stated above in the answer.")
    page.locator(".criterion-hint", has_text="Points to another text").wait_for()


def test_a_phone_needs_no_sideways_scrolling(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna, width=390))
    first_text(page).click()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    assert page.locator("[data-do=accept]").is_visible()


# ---- who may see what ----


def test_a_reviewer_sees_their_own_work_alone(running: Running) -> None:
    lead = add_reviewer(running.database, "lead", "lead")
    people = [add_reviewer(running.database, f"reader{i}") for i in range(2)]
    with running.database.write() as session:
        made = rounds.make_round(session, [draft_row(1)], RoundSettings("x", double=1.0))
        rounds.assign(session, made.id, [p.id for p in people])
        (item,) = rounds.items_of(session, made.id)
        mine = {a.reviewer_id: a.id for a in item.assignments}
    answer = rounds.first_answer(item.content) | {"reason": "A secret of the other."}
    put = {"base": 0, "save": "save-0001", "answer": answer, "seconds": 1, "finish": False}
    other = client_of(running, people[1])
    assert other.put(f"/api/assignments/{mine[people[1].id]}", json=put).status_code == 200

    client = client_of(running, people[0])
    page = client.get(f"/rubrics/{mine[people[0].id]}")
    assert page.status_code == 200
    assert "secret of the other" not in page.text
    assert mine[people[1].id] not in page.text
    assert client.get(f"/rubrics/{mine[people[1].id]}").status_code == 404
    for path in ("/rounds/new", f"/rounds/{made.id}", f"/rounds/{made.id}/items/{item.id}"):
        assert client.get(path).status_code == 403
        assert client_of(running, lead).get(path).status_code == 200
    assert client.get(f"/rounds/{made.id}/gold.jsonl").status_code == 403
    history = client_of(running, lead).get(f"/rounds/{made.id}/items/{item.id}").text
    assert "A secret of the other." in history


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{]", "line 1: not JSON"),
        (b'{"id": "a"}', "messages: missing"),
        (b"", "none with a rubric"),
    ],
)
def test_a_file_that_holds_no_drafts(running: Running, file: bytes, says: str) -> None:
    lead: Account = add_reviewer(running.database, "lead", "lead")
    reply = client_of(running, lead).post(
        "/rounds",
        data={"name": "x", "csrf": lead.csrf},
        files={"file": ("drafts.jsonl", file)},
    )
    assert reply.status_code == 422
    assert says in reply.text


def test_the_start_page_sends_what_was_left_behind(running: Running, page_of: PageOf) -> None:
    desk = Desk(running)
    page = desk.open(page_of(running, desk.anna))
    page.context.route("**/api/assignments/*", lambda route: route.abort())
    first_text(page).fill("Names the dose before the crash.")
    wait_state(page, "unsent")
    page.close(run_before_unload=False)
    page.context.unroute("**/api/assignments/*")
    start = page.context.new_page()
    with start.expect_response("**/api/assignments/*", timeout=WAIT):
        start.goto("/")
    until(lambda: desk.texts()[0] == "Names the dose before the crash.", "it was not sent")
