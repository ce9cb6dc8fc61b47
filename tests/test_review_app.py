"""The frame: headers, CSRF, errors without a traceback, the log, wording, home pages."""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from promedical.review import pages, wording
from promedical.review.app import ReviewError, ReviewSettings, create_app
from promedical.review.headers import POLICY
from promedical.review.pace import Pace, judgments_of, paces
from promedical.review.tables import Assignment, Item, LoginSession, Reviewer, Round
from review_server import add_reviewer, sqlite_url  # noqa: F401

BASE = "http://127.0.0.1:8080"
TEMPLATES = Path(pages.__file__).parent / "templates"


@pytest.fixture
def app(sqlite_url: str) -> Iterator[Any]:  # noqa: F811
    made = create_app(ReviewSettings(database=sqlite_url))
    yield made
    made.state.database.close()


def client_of(app: Any, account: Any = None) -> TestClient:
    client = TestClient(app, base_url=BASE, follow_redirects=False, raise_server_exceptions=False)
    if account is not None:
        client.cookies.set(app.state.cookie, account.token, domain="127.0.0.1")
    return client


def test_every_answer_has_the_headers(app: Any) -> None:
    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a patient's text")

    client = client_of(app)
    for path in ("/login", "/", "/nothing", "/static/app.css", "/broken", "/api/x"):
        reply = client.get(path)
        assert reply.headers["content-security-policy"] == POLICY, path
        assert reply.headers["x-content-type-options"] == "nosniff", path
        assert reply.headers["referrer-policy"] == "no-referrer", path
        wanted = "public, max-age=604800" if path.startswith("/static") else "no-store"
        assert reply.headers["cache-control"] == wanted, path
    assert "unsafe" not in POLICY
    assert "http" not in POLICY  # nobody else's address


def test_a_fault_shows_no_traceback_and_logs_no_text(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a patient's text")

    with caplog.at_level(logging.INFO, logger="promedical.review"):
        reply = client_of(app).get("/broken?name=somebody")
    assert reply.status_code == 500
    for leaked in ("Traceback", "RuntimeError", "patient's text", "test_review_app"):
        assert leaked not in reply.text
    assert "A fault of the program" in reply.text
    logged = caplog.text
    assert "fault RuntimeError at test_review_app.py:" in logged
    assert "patient" not in logged
    assert "somebody" not in logged
    assert "GET /broken 500" in logged


def test_the_log_has_ids_and_no_names(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    ann = add_reviewer(app.state.database, "ann@example.org", name="Dr Ann")
    with caplog.at_level(logging.INFO, logger="promedical.review"):
        client_of(app, ann).get("/storage")
        client_of(app).get("/invitation/the-key-to-an-account")
    assert re.search(rf"GET /storage 200 \d+ms {ann.id}", caplog.text)
    assert "the-key" not in caplog.text
    assert "example.org" not in caplog.text


def test_what_changes_something_needs_this_sessions_token(app: Any) -> None:
    database = app.state.database
    ann, bob = add_reviewer(database, "ann"), add_reviewer(database, "bob")
    client = client_of(app, ann)
    for headers in ({}, {"X-CSRF-Token": bob.csrf}, {"X-CSRF-Token": ""}):
        reply = client.put("/api/assignments/x", json={}, headers=headers)
        assert (reply.status_code, reply.json()) == (403, {"error": "bad_token"})
    reply = client.put("/api/assignments/x", json={}, headers={"X-CSRF-Token": ann.csrf})
    assert reply.status_code == 422
    for data in ({}, {"csrf": bob.csrf}, {"csrf": "ü"}):
        assert client.post("/logout", data=data).status_code == 403
    assert client.get("/").status_code == 200
    assert client.post("/logout", data={"csrf": ann.csrf}).status_code == 303


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": BASE}, 303),
        ({}, 303),
    ],
)
def test_forms_of_other_sites_are_refused(app: Any, headers: dict[str, str], status: int) -> None:
    ann = add_reviewer(app.state.database, "ann")
    reply = client_of(app, ann).post("/logout", data={"csrf": ann.csrf}, headers=headers)
    assert reply.status_code == status


def test_somebody_who_is_not_logged_in_needs_the_forms_token(app: Any) -> None:
    client = client_of(app)
    assert client.post("/login", data={"login": "a", "password": "b"}).status_code == 403
    client.get("/login")
    form = {"login": "a", "password": "b", "csrf": "another"}
    assert client.post("/login", data=form).status_code == 403


def test_requests_have_a_largest_size(sqlite_url: str) -> None:  # noqa: F811
    app = create_app(ReviewSettings(database=sqlite_url, max_body_bytes=1000))
    ann = add_reviewer(app.state.database, "ann")
    client = client_of(app, ann)
    headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    reply = client.put("/api/assignments/x", content=b"x" * 1001, headers=headers)
    assert reply.status_code == 413

    def pieces() -> Iterator[bytes]:  # without a length beforehand
        yield b'{"a": "'
        for _ in range(300):
            yield b"x" * 100

    reply = client.put("/api/assignments/x", content=pieces(), headers=headers)
    assert reply.status_code == 413
    assert reply.headers["content-security-policy"] == POLICY
    app.state.database.close()


def test_what_was_sent_is_never_sent_back(app: Any) -> None:
    ann = add_reviewer(app.state.database, "ann")
    client = client_of(app, ann)
    headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    for body in (b'["<script>marked</script>"]', b'{"marked": ', b"marked"):
        reply = client.put("/api/assignments/x", content=body, headers=headers)
        assert reply.status_code in (400, 422)
        assert "marked" not in reply.text
    assert "marked" not in client.get("/<script>marked</script>").text


def test_pages_need_a_login_and_leads_pages_a_lead(app: Any) -> None:
    ann = add_reviewer(app.state.database, "ann")
    for path in ("/", "/account", "/storage", "/people"):
        assert client_of(app).get(path).headers["location"] == "/login"
    assert client_of(app).get("/rounds-live", headers={"HX-Request": "true"}).status_code == 401
    client = client_of(app, ann)
    assert client.get("/people").status_code == 403
    assert client.get("/rounds-live").status_code == 404
    headers = {"X-CSRF-Token": ann.csrf}
    assert client.post("/people/invite", headers=headers).status_code == 403
    assert client.post(f"/people/{ann.id}/role", headers=headers).status_code == 403


def test_no_description_of_the_api_is_served(app: Any) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client_of(app).get(path).status_code == 404


def test_the_start_page_warns_of_patient_data_in_both_languages(app: Any) -> None:
    client = client_of(app)
    assert "by which a patient could be recognised" in client.get("/login").text
    chinese = client.get("/login?language=zh")
    assert "患者" in chinese.text
    assert "患者" in client.get("/login").text  # the cookie remembers
    browser = client_of(app).get("/login", headers={"Accept-Language": "zh-CN,zh;q=0.9"})
    assert 'lang="zh-CN"' in browser.text


def test_a_demo_says_so(sqlite_url: str) -> None:  # noqa: F811
    app = create_app(ReviewSettings(database=sqlite_url, demo=True))
    assert "This is a demo" in client_of(app).get("/login").text
    app.state.database.close()


def with_work(app: Any) -> tuple[Any, Any, str]:
    database = app.state.database
    ann = add_reviewer(database, "ann", name="<i>Ann</i>")
    boss = add_reviewer(database, "boss", "lead")
    rubric = {"criteria": [{"id": str(n)} for n in range(5)]}
    with database.write() as session:
        round_ = Round(kind="rubrics", name="<b>Round</b>")
        session.add(round_)
        session.flush()
        for n in range(4):
            item = Item(
                round_id=round_.id,
                instruction_id=f"q{n}",
                position=n,
                content={"rubric": rubric},
                specialty="<u>x</u>",
            )
            session.add(item)
            session.flush()
            session.add(
                Assignment(
                    item_id=item.id,
                    reviewer_id=ann.id,
                    part="rubric",
                    state="done" if n < 3 else "open",
                    seconds=[5.0, 7.5, 100.0, 0.0][n],
                )
            )
        return ann, boss, round_.id


def test_home_shows_ones_work_as_text(app: Any) -> None:
    ann, _, round_id = with_work(app)
    client = client_of(app, ann)
    page = client.get("/").text
    assert "3 of 4 done" in page
    for tag in ("<b>Round", "<i>Ann", "<u>x"):
        assert tag not in page
    assert "&lt;b&gt;Round" in page
    with app.state.database.read() as session:
        left = session.scalars(select(Assignment.id).where(Assignment.state == "open")).one()
    assert client.get(f"/next/{round_id}").headers["location"] == f"/rubrics/{left}"
    assert client.get("/next/none").headers["location"] == "/"


def test_the_lead_sees_who_was_too_fast(app: Any) -> None:
    ann, boss, _ = with_work(app)
    with app.state.database.read() as session:
        assert paces(session) == {ann.id: Pace(4, 3, 1.5)}
    home = client_of(app, boss).get("/").text
    assert "1.5 seconds a criterion" in home
    assert "1.5 s – under 2 s" in client_of(app, boss).get("/people").text
    assert "too fast" not in client_of(app, ann).get("/").text
    live = client_of(app, boss).get("/rounds-live").text
    assert "3 of 4 done" in live
    assert "<html" not in live


def test_judgments_of_an_item() -> None:
    criteria = {"criteria": [{}, {}, {}]}
    assert judgments_of({"rubric": criteria}) == 3
    assert judgments_of({"rubric": criteria, "responses": [{}, {}]}) == 6
    assert judgments_of({}) == 1
    assert not Pace(1, 1, 2.0).too_fast
    assert not Pace(1, 0, None).too_fast


def test_settings_are_checked() -> None:
    with pytest.raises(ReviewError, match="public_url"):
        ReviewSettings(public_url="review.example")
    with pytest.raises(ReviewError, match="idle_hours"):
        ReviewSettings(idle_hours=0)


# ---- wording and templates ----


def test_both_languages_have_every_text_with_the_same_values() -> None:
    for key, texts in wording.words().items():
        assert set(texts) == set(wording.LANGUAGES), key
        assert all(text.strip() for text in texts.values()), key
        names = [{f[1] for f in string.Formatter().parse(text) if f[1]} for text in texts.values()]
        assert names[0] == names[1], key


def test_every_key_that_a_template_or_page_names_exists() -> None:
    known = wording.words()
    for path in [*TEMPLATES.glob("*.html"), *TEMPLATES.parent.glob("pages_*.py")]:
        for key in re.findall(r"""\bt\(\s*["']([^"']+)["']""", path.read_text("utf-8")):
            if key.endswith(("_", ".")):  # the rest is made of a value
                assert any(k.startswith(key) for k in known), (path.name, key)
            else:
                assert key in known, (path.name, key)


def test_every_reason_of_an_account_error_has_a_text() -> None:
    source = (TEMPLATES.parent / "accounts.py").read_text("utf-8")
    source += (TEMPLATES.parent / "pages_accounts.py").read_text("utf-8")
    keys = set(re.findall(r'AccountError\("([^"]+)"', source))
    assert len(keys) > 10
    assert keys <= set(wording.words())


def test_no_template_has_anything_inline_or_from_elsewhere() -> None:
    for path in TEMPLATES.glob("*.html"):
        if path.name.startswith("offline"):
            continue  # one file without a server; its policy is its own
        text = path.read_text("utf-8")
        assert not re.search(r"<script(?![^>]*\bsrc=)(?![^>]*application/json)", text), path.name
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text), path.name
        assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", text), path.name
        assert "|safe" not in text, path.name


def test_static_addresses_change_with_the_file() -> None:
    assert re.fullmatch(r"/static/app\.css\?v=[0-9a-f]{12}", pages.static("app.css"))


def test_a_session_of_nobody(app: Any) -> None:
    ann = add_reviewer(app.state.database, "ann")
    client = client_of(app, ann)
    with app.state.database.write() as session:
        session.query(LoginSession).delete()
        session.query(Reviewer).delete()
    assert client.get("/account").headers["location"] == "/login"
