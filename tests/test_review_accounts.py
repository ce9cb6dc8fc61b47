"""Accounts, invitations, sessions and limits on guessing, through HTTP, on both databases."""

from __future__ import annotations

import datetime as dt
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher, profiles
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from promedical.review import accounts, audit_log
from promedical.review.accounts import AccountError
from promedical.review.app import ReviewSettings, create_app
from promedical.review.tables import (
    AuditEvent,
    Invitation,
    LoginAttempt,
    LoginSession,
    Reviewer,
    now,
)
from review_server import (  # noqa: F401
    add_reviewer,
    database_url,
    postgresql_cluster,
    sqlite_url,
)

GOOD = "four lamps by a canal"
BASE = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest argon2, so that tests spend no time on it."""
    hasher = PasswordHasher.from_parameters(profiles.CHEAPEST)
    monkeypatch.setattr(accounts, "_hasher", lambda: hasher)


@pytest.fixture
def app(database_url: str) -> Iterator[Any]:  # noqa: F811
    made = create_app(ReviewSettings(database=database_url))
    yield made
    made.state.database.close()


def browser(app: Any, base: str = BASE) -> TestClient:
    return TestClient(app, base_url=base, follow_redirects=False, raise_server_exceptions=False)


def token_in(text: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', text)
    assert found is not None
    return found[1]


def lead(app: Any) -> Reviewer:
    with app.state.database.write() as session:
        return accounts.create_account(
            session, login="Lead@Example.org", name="Dr Lead", password=GOOD, role="lead"
        )


def login(client: TestClient, password: str = GOOD, name: str = "lead@example.org") -> Any:
    csrf = token_in(client.get("/login").text)
    return client.post("/login", data={"login": name, "password": password, "csrf": csrf})


def test_from_an_invitation_to_work_and_out_again(app: Any) -> None:
    lead(app)
    boss = browser(app)
    assert login(boss, name=" LEAD@example.org ").headers["location"] == "/"
    page = boss.get("/people")
    made = boss.post("/people/invite", data={"role": "adjudicator", "csrf": token_in(page.text)})
    link = re.search(r'value="http://127.0.0.1:8080(/invitation/[^"]+)"', made.text)
    assert link is not None

    guest = browser(app)
    for _ in range(3):  # a mail scanner that looks at the link does not use it up
        shown = guest.get(link[1])
        assert shown.status_code == 200
    form = {
        "csrf": token_in(shown.text),
        "login": "ann",
        "name": "Dr Ann",
        "password": GOOD,
        "again": GOOD,
        "specialty": "cardiology",
        "country": "Kenya",
        "licensed_since": "2009",
    }
    done = guest.post(link[1], data=form)
    assert (done.status_code, done.headers["location"]) == (303, "/")
    home = guest.get("/")
    assert "Dr Ann" in home.text
    assert guest.get("/people").status_code == 403
    with app.state.database.read() as session:
        ann = session.scalars(select(Reviewer).where(Reviewer.login == "ann")).one()
        assert (ann.role, ann.specialty, ann.country) == ("adjudicator", "cardiology", "Kenya")
        assert ann.licensed_since == 2009
        assert ann.password_hash.startswith("$argon2id$")
        assert GOOD not in ann.password_hash
        invitation = session.scalars(select(Invitation)).one()
        assert invitation.used_at is not None
        assert link[1].removeprefix("/invitation/") not in invitation.token_hash
    # Once is once, also for somebody who had the page open.
    late = browser(app)
    assert late.get(link[1]).status_code == 404
    again = guest.post(link[1], data={**form, "login": "eve"})
    assert again.status_code == 404

    out = guest.post("/logout", data={"csrf": token_in(home.text)})
    assert out.headers["location"] == "/login"
    assert guest.get("/").headers["location"] == "/login"


def test_an_invitation_ends(app: Any) -> None:
    with app.state.database.write() as session:
        token = accounts.invite(session, "reviewer", app.state.settings, created_by=None)
        session.execute(update(Invitation).values(expires=now() - dt.timedelta(seconds=1)))
    assert browser(app).get(f"/invitation/{token}").status_code == 404
    assert browser(app).get("/invitation/none").status_code == 404


def test_two_people_cannot_use_one_invitation_at_once(app: Any) -> None:
    database = app.state.database
    with database.write() as session:
        token = accounts.invite(session, "reviewer", app.state.settings, created_by=None)
    outcomes: list[str] = []

    def accept(who: str) -> None:
        try:
            with database.write() as session:
                accounts.accept_invitation(session, token, login=who, name=who, password=GOOD)
            outcomes.append("in")
        except AccountError as error:
            outcomes.append(error.key)

    threads = [threading.Thread(target=accept, args=(f"guest{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["core.invitation_gone"] * 3 + ["in"]


def test_a_form_keeps_what_was_typed_but_no_password(app: Any) -> None:
    with app.state.database.write() as session:
        token = accounts.invite(session, "reviewer", app.state.settings, created_by=None)
    guest = browser(app)
    csrf = token_in(guest.get(f"/invitation/{token}").text)
    form = {"csrf": csrf, "login": "ann", "name": "A&B <b>", "password": "short", "again": "short"}
    page = guest.post(f"/invitation/{token}", data=form)
    assert page.status_code == 400
    assert "A&amp;B &lt;b&gt;" in page.text
    assert "at least 12 characters" in page.text
    assert "short" not in page.text.replace("too short", "")
    form |= {"password": GOOD, "again": "other words by a canal"}
    assert "not the same" in guest.post(f"/invitation/{token}", data=form).text
    form |= {"again": GOOD, "licensed_since": "19x9"}
    assert "from 1940" in guest.post(f"/invitation/{token}", data=form).text
    form |= {"licensed_since": "2010"}
    assert guest.post(f"/invitation/{token}", data=form).status_code == 303


@pytest.mark.parametrize(
    ("password", "key"),
    [
        ("elevenchars", "core.password_short"),
        ("passwordpassword", "core.password_common"),
        ("aaaaaaaabbbbbbb", "core.password_common"),
        ("annokafor2026", "core.password_name"),
        ("x" * 150 + "yz12" * 20, "core.password_long"),
    ],
)
def test_passwords_that_are_easily_guessed(password: str, key: str) -> None:
    with pytest.raises(AccountError) as caught:
        accounts.check_password(password, "ann.okafor", "Ann Okafor")
    assert caught.value.key == key


def test_passwords_of_any_script_are_the_same_in_any_form(app: Any) -> None:
    import unicodedata

    password = "Grüße über vier Flüsse"
    with app.state.database.write() as session:
        accounts.create_account(
            session,
            login="kai",
            name="Kai",
            password=unicodedata.normalize("NFD", password),
            role="lead",
        )
    client = browser(app)
    assert login(client, unicodedata.normalize("NFC", password), "kai").status_code == 303


def test_cookies_are_locked_up(app: Any, tmp_path: Path) -> None:
    lead(app)
    cookie = login(browser(app)).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie  # http on this machine
    https = "https://review.example"
    secured = create_app(ReviewSettings(database=str(tmp_path / "s.db"), public_url=https))
    lead(secured)
    client = browser(secured, https)
    reply = login(client)
    cookie = reply.headers["set-cookie"]
    assert cookie.startswith("__Host-promedical-review=")
    assert "Secure" in cookie
    assert "Domain" not in cookie
    assert "Path=/" in cookie
    assert "strict-transport-security" in reply.headers
    with app.state.database.read() as session:
        kept = session.scalars(select(LoginSession)).one()
        assert kept.token_hash not in cookie
    secured.state.database.close()


def test_a_login_makes_a_new_session_and_ends_the_old(app: Any) -> None:
    lead(app)
    client = browser(app)
    client.cookies.set(app.state.cookie, "known-beforehand", domain="127.0.0.1")
    login(client)
    first = client.cookies.get(app.state.cookie, domain="127.0.0.1")
    assert first != "known-beforehand"
    login(client)
    second = client.cookies.get(app.state.cookie, domain="127.0.0.1")
    assert second != first
    thief = browser(app)
    thief.cookies.set(app.state.cookie, str(first), domain="127.0.0.1")
    assert thief.get("/").headers["location"] == "/login"


@pytest.mark.parametrize("field", ["last_seen", "expires"])
def test_sessions_end_when_idle_and_in_any_case(app: Any, field: str) -> None:
    lead(app)
    client = browser(app)
    login(client)
    assert client.get("/").status_code == 200
    past = now() - dt.timedelta(hours=8, seconds=1)
    with app.state.database.write() as session:
        session.execute(update(LoginSession).values({field: past}))
    assert client.get("/").headers["location"] == "/login"
    assert client.put("/api/assignments/x", json={}).status_code == 401


def test_being_seen_is_written_now_and_then(app: Any) -> None:
    lead(app)
    client = browser(app)
    login(client)
    before = now() - dt.timedelta(hours=1)
    with app.state.database.write() as session:
        session.execute(update(LoginSession).values(last_seen=before))
    client.get("/")
    with app.state.database.read() as session:
        assert session.scalars(select(LoginSession.last_seen)).one() > before


def test_guessing_at_one_account_is_slowed_down(app: Any) -> None:
    lead(app)
    client = browser(app)
    for _ in range(app.state.settings.attempts_per_login):
        assert "do not belong together" in login(client, "wrong wrong wrong").text
    assert "Too many attempts" in login(client).text  # the right one too
    assert "Too many attempts" in login(client, "wrong wrong wrong").text
    with app.state.database.write() as session:
        session.execute(update(LoginAttempt).values(at=now() - dt.timedelta(minutes=16)))
    assert login(client).status_code == 303
    with app.state.database.read() as session:
        kept = session.scalars(select(LoginAttempt)).all()
        assert all("lead" not in a.login_hash and "test" not in a.address_hash for a in kept)


def test_a_right_login_starts_the_count_anew(app: Any) -> None:
    lead(app)
    client = browser(app)
    for _ in range(3):
        for _ in range(app.state.settings.attempts_per_login - 1):
            login(client, "wrong wrong wrong")
        assert login(client).status_code == 303


def test_guessing_from_one_address_at_many_accounts(sqlite_url: str) -> None:  # noqa: F811
    app = create_app(ReviewSettings(database=sqlite_url, attempts_per_address=5))
    lead(app)
    client = browser(app)
    for n in range(5):
        login(client, name=f"somebody{n}")
    assert "Too many attempts" in login(client).text
    app.state.database.close()


def test_guesses_at_once_are_all_counted(app: Any) -> None:
    lead(app)
    settings = app.state.settings
    outcomes: list[str] = []

    def guess(n: int) -> None:
        try:
            accounts.log_in(app.state.database, "lead@example.org", f"no {n}", "1.2.3.4", settings)
        except AccountError as error:
            outcomes.append(error.key)

    threads = [threading.Thread(target=guess, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("core.login_wrong") == settings.attempts_per_login
    assert outcomes.count("core.login_limited") == 20 - settings.attempts_per_login


def test_an_unknown_login_looks_like_a_wrong_password(app: Any) -> None:
    lead(app)
    client = browser(app)
    texts = {
        re.sub(r'value="[^"]*"', "", login(client, "wrong", n).text)
        for n in ("lead@example.org", "x")
    }
    assert len(texts) == 1


def test_taking_access_away_ends_it_at_once(app: Any) -> None:
    boss = lead(app)
    ann = add_reviewer(app.state.database, "ann")
    guest = browser(app)
    guest.cookies.set(app.state.cookie, ann.token, domain="127.0.0.1")
    assert guest.get("/").status_code == 200
    client = browser(app)
    login(client)
    csrf = token_in(client.get("/people").text)
    assert client.post(f"/people/{ann.id}/deactivate", data={"csrf": csrf}).status_code == 303
    assert guest.get("/").headers["location"] == "/login"
    last = client.post(f"/people/{boss.id}/deactivate", data={"csrf": csrf})
    assert "only lead" in last.text
    last = client.post(f"/people/{boss.id}/role", data={"csrf": csrf, "role": "reviewer"})
    assert "only lead" in last.text
    client.post(f"/people/{ann.id}/activate", data={"csrf": csrf})
    client.post(f"/people/{ann.id}/role", data={"csrf": csrf, "role": "lead"})
    with app.state.database.read() as session:
        again = session.get_one(Reviewer, ann.id)
        assert (again.active, again.role) == (True, "lead")
        actions = [e.action for e in session.scalars(select(AuditEvent).order_by(AuditEvent.seq))]
        audit_log.verify(session)
    assert actions[-3:] == ["account.deactivate", "account.activate", "account.role_lead"]


def test_a_link_sets_a_new_password_and_ends_sessions(app: Any) -> None:
    boss = lead(app)
    client = browser(app)
    login(client)
    csrf = token_in(client.get("/people").text)
    page = client.post(f"/people/{boss.id}/reset", data={"csrf": csrf})
    link = re.search(r'value="http://127.0.0.1:8080(/invitation/[^"]+)"', page.text)
    assert link is not None
    guest = browser(app)
    form = {"csrf": token_in(guest.get(link[1]).text), "password": "another canal of lamps"}
    form["again"] = form["password"]
    assert guest.post(link[1], data=form).status_code == 303
    assert client.get("/").headers["location"] == "/login"
    assert login(browser(app), form["password"]).status_code == 303
    assert login(browser(app)).status_code == 400


def test_ones_own_account(app: Any) -> None:
    lead(app)
    client, other = browser(app), browser(app)
    login(client)
    login(other)
    csrf = token_in(client.get("/account").text)
    form = {"csrf": csrf, "language": "zh", "specialty": "儿科", "licensed_since": ""}
    assert client.post("/account", data=form).status_code == 303
    page = client.get("/account?saved=1")
    assert 'lang="zh-CN"' in page.text
    assert "已保存" in page.text
    wrong = {"csrf": csrf, "current": "no", "password": GOOD + "s", "again": GOOD + "s"}
    assert client.post("/account/password", data=wrong).status_code == 400
    right = {**wrong, "current": GOOD}
    assert client.post("/account/password", data=right).status_code == 303
    assert client.get("/").status_code == 200  # a new session
    assert other.get("/").headers["location"] == "/login"


def test_names_are_nowhere_in_the_audit_log(app: Any) -> None:
    lead(app)
    client = browser(app)
    login(client)
    login(client, name="lead@example.org", password="my-secret-guess")
    with app.state.database.read() as session:
        kept = str([vars(e) for e in session.scalars(select(AuditEvent))])
    for text in ("Lead", "lead@", "example", "secret", GOOD, "127.0.0.1", "testclient"):
        assert text not in kept
