"""The offline pack: one file, no network, blind, and its answers back once and in order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from promedical.review.exchange import ExchangeError
from promedical.review.offline_pack import make_packs, unpack
from promedical.review.tables import Assignment, Change, Reviewer
from review_rows import adjudication_round, rows, rubric_round
from review_server import *  # noqa: F403
from review_server import add_reviewer


@pytest.fixture
def database(sqlite: Any) -> Any:
    return sqlite


def packs_of(database: Any, round_id: str, folder: Path, **more: Any) -> dict[str, Path]:
    return {p.reviewer: p.path for p in make_packs(database, round_id, folder, **more)[0]}


def document(path: Path) -> dict[str, Any]:
    found = re.search(r'id="offline-pack">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found.group(1))  # type: ignore[no-any-return]


def answers_file(folder: Path, pack: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("\n".join([pack["head"], *map(json.dumps, entries)]) + "\n")
    return path


def entry(assignment: str, version: int, answer: Any, **more: Any) -> dict[str, Any]:
    made = {"assignment": assignment, "version": version, "save": f"uuid-of-{version}"}
    return made | {"answer": answer, "seconds": 10.0 * version, "finish": False} | more


def accepted(item: dict[str, Any], decision: str = "accept") -> dict[str, Any]:
    return {**item["answer"], "decision": decision, "reason": "not usable"}


@pytest.fixture
def rubric_pack(database: Any, tmp_path: Path) -> Any:
    person = add_reviewer(database, "anna")
    round_id = rubric_round(database, [person.id], rows(3))
    return document(packs_of(database, round_id, tmp_path / "out")[person.id])


def test_the_file_is_alone_and_its_policy_allows_exactly_its_scripts(
    database: Any, tmp_path: Path
) -> None:
    people = [add_reviewer(database, name) for name in ("anna", "bo")]
    for round_id in (
        rubric_round(database, [p.id for p in people], rows(4)),
        adjudication_round(database, [p.id for p in people], rows(2)),
    ):
        for path in packs_of(database, round_id, tmp_path / round_id).values():
            assert path.stat().st_mode & 0o077 == 0
            html = path.read_text()
            assert not re.search(r'(?:src|href)="(?!#)', html)
            assert "url(" not in html.split("</style>")[0]
            policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)  # type: ignore[union-attr]
            policy = policy.replace("&#39;", "'")
            inline = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
            style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
            assert len(style) == 1
            assert len(inline) >= 3
            for text in [*inline, *style]:
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                assert f"'sha256-{digest}'" in policy
            assert policy.count("sha256-") == len(inline) + 1
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy


def test_a_pack_holds_only_what_its_reviewer_may_see(database: Any, tmp_path: Path) -> None:
    people = [add_reviewer(database, name) for name in ("anna", "bo")]
    round_id = adjudication_round(database, [p.id for p in people], rows(2))
    for reviewer, path in packs_of(database, round_id, tmp_path / "out").items():
        pack = document(path)
        parts = [base64.b64decode(p).decode() for i in pack["items"] for p in i["parts"].values()]
        everything = path.read_text() + "".join(parts)
        for hidden in ("secret-model", "secret-judge", "Yes, if the day"):
            assert hidden not in everything
        others = [p.id for p in people if p.id != reviewer]
        assert not any(other in everything for other in others)
        # Criteria are in the encoded part alone, and only after the preference.
        assert "Warns about liver disease" not in path.read_text()
        for item in pack["items"]:
            first = base64.b64decode(item["parts"]["preference"]).decode()
            assert "Warns about liver disease" not in first
            assert "Response one of" in first
            assert "liver disease" in base64.b64decode(item["parts"]["criteria"]).decode()


def test_a_strict_pack_has_no_criteria_before_the_preference(database: Any, tmp_path: Path) -> None:
    people = [add_reviewer(database, name) for name in ("anna", "bo")]
    round_id = adjudication_round(database, [p.id for p in people], rows(1))
    anna = people[0].id
    pack = document(packs_of(database, round_id, tmp_path / "1", strict=True)[anna])
    (item,) = pack["items"]
    assert list(item["parts"]) == ["preference"]
    with database.read() as session:
        keys = session.get(Assignment, item["assignment"]).response_order
    preference = {f"{a}|{b}": "tie" for n, a in enumerate(keys) for b in keys[n + 1 :]}
    given = {"preference": preference, "preference_given": True}
    path = answers_file(tmp_path, pack, [entry(item["assignment"], 1, given)])
    assert unpack(database, path).saved == [item["assignment"]]
    pack = document(packs_of(database, round_id, tmp_path / "2", strict=True)[anna])
    assert set(pack["items"][0]["parts"]) == {"preference", "criteria"}
    assert pack["items"][0]["answer"]["preference"] == preference


def test_answers_come_back_once(database: Any, tmp_path: Path, rubric_pack: Any) -> None:
    first, second, _ = rubric_pack["items"]
    entries = [
        entry(first["assignment"], 3, accepted(first), finish=True),
        entry(second["assignment"], 1, accepted(second, "reject")),
    ]
    path = answers_file(tmp_path, rubric_pack, entries)
    report = unpack(database, path)
    assert (len(report.saved), report.refused) == (2, [])
    assert len(unpack(database, path).repeated) == 2
    with database.read() as session:
        done, begun = (session.get(Assignment, i["assignment"]) for i in (first, second))
        assert (done.state, done.version, done.seconds) == ("done", 1, 30.0)
        assert (begun.state, begun.version) == ("started", 1)
        assert session.query(Change).count() == 2


def test_a_later_file_goes_on_and_an_older_one_is_left(
    database: Any, tmp_path: Path, rubric_pack: Any
) -> None:
    item = rubric_pack["items"][0]
    a = item["assignment"]
    early = [entry(a, 2, accepted(item, "reject"))]
    late = [entry(a, 5, accepted(item), finish=True)]
    assert unpack(database, answers_file(tmp_path, rubric_pack, early)).saved == [a]
    assert unpack(database, answers_file(tmp_path, rubric_pack, late)).saved == [a]
    left = unpack(database, answers_file(tmp_path, rubric_pack, early))
    assert sum(left.skipped.values()) == 1
    with database.read() as session:
        found = session.get(Assignment, a)
        assert (found.answer["decision"], found.version, found.seconds) == ("accept", 2, 50.0)


def test_what_was_changed_online_is_not_overwritten(
    database: Any, tmp_path: Path, rubric_pack: Any
) -> None:
    from promedical.review import saves

    item = rubric_pack["items"][0]
    a = item["assignment"]
    with database.write() as session:
        reviewer = session.query(Reviewer).one().id
        more = {"answer": accepted(item, "reject"), "seconds": 1.0}
        saves.save(session, a, reviewer, base=0, save_id="online-1", **more)
    path = answers_file(tmp_path, rubric_pack, [entry(a, 1, accepted(item))])
    assert unpack(database, path).refused == [
        (a, "changed online meanwhile (version 1, not 0)"),
    ]


def test_a_file_that_was_tampered_with_is_refused(
    database: Any, tmp_path: Path, rubric_pack: Any
) -> None:
    item = rubric_pack["items"][0]
    lines = [entry(item["assignment"], 1, accepted(item))]
    head = json.loads(rubric_pack["head"])
    stranger = add_reviewer(database, "carl").id
    for change in ({"reviewer": stranger}, {"signature": "0" * 64}, {"assignments": {"x": 0}}):
        forged = {"head": json.dumps(head | change)}
        with pytest.raises(ExchangeError, match="signature"):
            unpack(database, answers_file(tmp_path, forged, lines))
    lines = [entry("somebody-elses", 1, accepted(item))]
    report = unpack(database, answers_file(tmp_path, rubric_pack, lines))
    assert report.refused == [("somebody-elses", "is not part of this pack")]
    path = tmp_path / "answers.jsonl"
    for text, message in (
        ("", "is empty"),
        ("{}\n", "format"),
        ("nonsense\n", "not JSON"),
        (f"{rubric_pack['head']}\n{{\n", "line 2: not JSON"),
        (f'{rubric_pack["head"]}\n{{"assignment": 3}}\n', "line 2: assignment"),
    ):
        path.write_text(text)
        with pytest.raises(ExchangeError, match=message):
            unpack(database, path)
    with pytest.raises(ExchangeError, match="not found"):
        unpack(database, tmp_path / "nothing.jsonl")


# ---- in a browser, from file://, without any network ----


@pytest.fixture
def offline_page(chromium: Any) -> Any:
    """A page that may reach nothing, and what it tried to reach or complained about."""
    context = chromium.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    context.set_offline(True)
    page = context.new_page()
    page.seen = []
    page.on("request", lambda r: r.url.startswith(("file:", "blob:")) or page.seen.append(r.url))
    page.on("console", lambda m: m.type == "error" and page.seen.append(m.text))
    page.on("pageerror", lambda e: page.seen.append(str(e)))
    yield page
    context.close()


def hand_back(page: Any, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save my answers as a file").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_rubrics_in_a_browser(database: Any, tmp_path: Path, offline_page: Any) -> None:
    person = add_reviewer(database, "anna")
    round_id = rubric_round(database, [person.id], rows(2))
    path = packs_of(database, round_id, tmp_path / "out")[person.id]
    page = offline_page
    page.goto(path.as_uri())
    page.get_by_text("0 of 2 finished.").wait_for()
    box = page.locator(".tier-proficiency textarea").first
    box.click()
    box.fill("States the limit of 4 g for one day.")
    page.locator("[data-state=saved]").wait_for()
    page.reload()  # a crash, or the file opened again tomorrow
    assert box.input_value() == "States the limit of 4 g for one day."
    page.locator("[data-do=accept]").click()
    page.get_by_text("1 of 2 finished.").wait_for()
    page.locator("[data-do=accept]").click()
    page.get_by_text("2 of 2 finished.").wait_for()
    page.get_by_text("your latest answers are not in a file yet").wait_for()
    report = unpack(database, hand_back(page, tmp_path))
    assert (len(report.saved), report.refused) == (2, [])
    page.get_by_text("Your latest answers are in the file you saved.").wait_for()
    assert page.seen == []
    with database.read() as session:
        found = {a.answer["decision"]: a.state for a in session.query(Assignment)}
    assert found == {"accept_with_edits": "done", "accept": "done"}


def test_an_adjudication_in_a_browser(database: Any, tmp_path: Path, offline_page: Any) -> None:
    people = [add_reviewer(database, name) for name in ("anna", "bo")]
    round_id = adjudication_round(database, [p.id for p in people], rows(1, ("one", "two")))
    path = packs_of(database, round_id, tmp_path / "out")[people[0].id]
    page = offline_page
    page.goto(path.as_uri())
    page.locator(".pair").wait_for()
    assert "Warns about liver disease" not in page.content()
    page.locator(".choice-second_better").click()
    page.locator("[data-go-on]").click()
    page.locator(".criterion").first.wait_for()
    assert "Warns about liver disease" in page.content()
    for number in (1, 2):
        page.locator(f"#tab-{number}").click()
        panel = page.locator(f"#panel-{number}")
        for fieldset in panel.locator(".criterion").all():
            veto = fieldset.get_attribute("data-tier") == "veto"
            fieldset.locator(".verdict-unmet" if veto else ".verdict-met").click()
    page.locator("[data-finish]").click()
    page.get_by_text("1 of 1 finished.").wait_for()
    report = unpack(database, hand_back(page, tmp_path))
    assert (len(report.saved), report.refused) == (1, [])
    assert page.seen == []
    with database.read() as session:
        answer = session.query(Assignment).filter_by(state="done").one().answer
    assert set(answer["preference"].values()) == {"second_better"}
    for verdicts in answer["verdicts"].values():
        assert {c: v["v"] for c, v in verdicts.items()} == {
            "dose": "met",
            "liver": "met",
            "kind": "met",
            "harm": "unmet",
        }
