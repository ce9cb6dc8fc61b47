"""Rubrics as text, Label Studio and Argilla: what goes out comes back, blind, once, in order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.records import to_dict
from promedical.review import argilla, drafts, saves
from promedical.review.database import Database
from promedical.review.exchange import ExchangeError, bring_in, open_tasks
from promedical.review.rubric_text import RubricTextError, parse_rubric, rubric_text
from promedical.review.tables import Assignment, Change
from promedical.rubric import VetoKind
from review_rows import adjudication_round, row, rows, rubric_round
from review_server import *  # noqa: F403
from review_server import add_reviewer
from review_tools import Argilla, LabelStudio

# ---- rubrics as text ----

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.strip)


@st.composite
def criteria(draw: st.DrawFn) -> list[dict[str, Any]]:
    texts = draw(st.lists(TEXTS.filter(bool), min_size=1, max_size=6))
    tiers = [draw(st.sampled_from(["proficiency", "excellence", "veto"])) for _ in texts]
    raw = [draw(st.floats(0.01, 1)) for _ in texts]
    total = math.fsum(w for w, tier in zip(raw, tiers, strict=True) if tier == "proficiency")
    found = []
    for number, (text, tier, weight) in enumerate(zip(texts, tiers, raw, strict=True)):
        kinds = st.sampled_from([None, *(kind.value for kind in VetoKind)])
        found.append(
            {
                "id": f"c.{number}",
                "tier": tier,
                "axis": draw(st.sampled_from([None, "accuracy", "a | b"])),
                "kind": draw(kinds) if tier == "veto" else None,
                "text": text,
                "weight": weight / total if tier == "proficiency" else None,
            }
        )
    return found


@settings(max_examples=150, deadline=None)
@given(criteria())
def test_a_rubric_as_text_is_the_same_rubric(draft: list[dict[str, Any]]) -> None:
    read = parse_rubric(rubric_text(draft), draft)
    assert read == drafts.to_json(drafts.opened(draft))
    assert parse_rubric(rubric_text(read), draft) == read


DRAFT = to_dict(row(1))["rubric"]["criteria"]


def test_lines_that_somebody_edited() -> None:
    text = rubric_text(DRAFT)
    assert (
        text.split("\n")[1]
        == "proficiency | 33.33 % | accuracy | States the daily limit of 4 g. | dose"
    )
    # One more line, half of the weight; one criterion split; the veto gone.
    edited = """
        # a remark
        proficiency | 50 % | accuracy | States the daily limit of 4 g. | dose
        proficiency | 30 | | Warns about liver disease. | liver
        proficiency | 20 % | | Asks about other medicines. |
        excellence | | | Is kind to the person. | kind
        excellence | | | Is clear to the person. | kind
    """
    read = parse_rubric(edited, DRAFT)
    assert [c["id"] for c in read] == ["dose", "liver", "new-1", "kind-1", "kind-2"]
    assert [c["weight"] for c in read] == [0.5, 0.3, 0.2, None, None]
    assert [c["from"] for c in read] == [["dose"], ["liver"], [], ["kind"], ["kind"]]
    assert not drafts.find_problems(DRAFT, read, finish=True)


def test_a_merge_names_both() -> None:
    read = parse_rubric("proficiency | 100 % | | Limit and liver. | dose + liver", DRAFT)
    assert [(c["id"], c["from"]) for c in read] == [("dose-1", ["dose", "liver"])]
    assert rubric_text(read).endswith("dose + liver")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("proficiency | 20 %", "line 1: found 2 columns"),
        ("profound | | | A text. |", "line 1: tier: found 'profound'"),
        ("proficiency | many | | A text. |", "line 1: share: found 'many'"),
        ("excellence | | | A text. | nobody", "line 1: id: 'nobody' is not in the draft"),
        ("excellence | 3 | | A text. |", "line 1: second column"),
    ],
)
def test_a_line_that_is_no_criterion(line: str, message: str) -> None:
    with pytest.raises(RubricTextError, match=message):
        parse_rubric(line, DRAFT)


# ---- the two tools ----


@pytest.fixture
def database(sqlite: Any) -> Any:
    return sqlite


def tasks_of(database: Database, round_id: str) -> Any:
    with database.read() as session:
        return open_tasks(session, round_id)[0]


TOOLS = [LabelStudio(), Argilla()]
both = pytest.mark.parametrize("tool", TOOLS, ids=["label-studio", "argilla"])


@both
def test_a_round_of_rubrics_there_and_back(tool: Any, database: Any, tmp_path: Path) -> None:
    reviewer = add_reviewer(database, "anna")
    round_id = rubric_round(database, [reviewer.id], rows(3))
    tasks = tasks_of(database, round_id)
    assert tool.write(tmp_path / "out", tasks, "rubrics") == {reviewer.id: 3}
    answers, skipped = tool.read(tool.work(tmp_path / "out"), tasks)
    assert (len(answers), len(skipped)) == (3, 0)
    report = bring_in(database, "tool", answers)
    assert (len(report.saved), report.refused) == (3, [])
    assert len(bring_in(database, "tool", answers).repeated) == 3
    with database.read() as session:
        for assignment in session.query(Assignment):
            assert assignment.state == "done"
            assert assignment.answer["decision"] == "accept"
            draft = drafts.opened(assignment.item.content["rubric"]["criteria"])
            assert drafts.from_json(assignment.answer["criteria"]) == draft
        assert session.query(Change).count() == 3


@both
def test_an_edited_rubric_is_accepted_with_edits(tool: Any, database: Any, tmp_path: Path) -> None:
    reviewer = add_reviewer(database, "anna")
    round_id = rubric_round(database, [reviewer.id], rows(1))
    tasks = tasks_of(database, round_id)
    tool.write(tmp_path / "out", tasks, "rubrics")
    path = tool.work(tmp_path / "out", "proficiency | 1 | | States the daily limit clearly. | dose")
    assert len(bring_in(database, "tool", tool.read(path, tasks)[0]).saved) == 1
    with database.read() as session:
        answer = session.query(Assignment).one().answer
    assert answer["decision"] == "accept_with_edits"
    assert [c["id"] for c in answer["criteria"]] == ["dose"]


@both
def test_an_adjudication_asks_for_the_preference_first(
    tool: Any, database: Any, tmp_path: Path
) -> None:
    people = [add_reviewer(database, name) for name in ("anna", "bo")]
    round_id = adjudication_round(database, [p.id for p in people], rows(2))
    tasks = tasks_of(database, round_id)
    for part in tool.after_preference:
        assert set(tool.write(tmp_path / "early", tasks, part).values()) == {0}
    tool.write(tmp_path / "first", tasks, "preference")
    blind(tmp_path / "first", [p.login for p in people])
    assert "liver" not in everything(tmp_path / "first")
    answers, _ = tool.read(tool.work(tmp_path / "first"), tasks)
    assert len(bring_in(database, "tool", answers).saved) == 4

    tasks = tasks_of(database, round_id)
    for part in tool.after_preference:
        tool.write(tmp_path / "second", tasks, part)
    blind(tmp_path / "second", [p.login for p in people])
    answers, _ = tool.read(tool.work(tmp_path / "second"), tasks)
    report = bring_in(database, "tool", answers)
    assert (len(report.saved), report.refused) == (4, [])
    with database.read() as session:
        for assignment in session.query(Assignment):
            assert assignment.state == "done"
            assert len(assignment.answer["verdicts"]) == 3
            for verdicts in assignment.answer["verdicts"].values():
                found = {c: v["v"] for c, v in verdicts.items()}
                assert found == {"dose": "met", "liver": "met", "kind": "met", "harm": "unmet"}


def everything(folder: Path) -> str:
    return "".join(p.read_text() for p in folder.rglob("*") if p.is_file())


def blind(folder: Path, logins: list[str]) -> None:
    """Nothing that a reviewer may not know is in any file, and each is private."""
    found = everything(folder)
    for hidden in ("secret-model", "secret-judge", "Yes, if the day", *(f'"{n}"' for n in logins)):
        assert hidden not in found
    modes = [p.stat().st_mode & 0o077 for p in folder.rglob("*.json") if p.name != "export.json"]
    assert set(modes) == {0}


@both
def test_what_was_changed_online_is_not_overwritten(
    tool: Any, database: Any, tmp_path: Path
) -> None:
    reviewer = add_reviewer(database, "anna")
    round_id = rubric_round(database, [reviewer.id], rows(2))
    tasks = tasks_of(database, round_id)
    tool.write(tmp_path / "out", tasks, "rubrics")
    with database.write() as session:
        online = {**tasks[0].answer, "reason": "written online"}
        ids = (tasks[0].assignment, reviewer.id)
        saves.save(session, *ids, base=0, save_id="online-1", answer=online, seconds=1.0)
    report = bring_in(database, "tool", tool.read(tool.work(tmp_path / "out"), tasks)[0])
    assert report.saved == [tasks[1].assignment]
    assert report.refused == [(tasks[0].assignment, "changed online meanwhile (version 1, not 0)")]
    with database.read() as session:
        assert session.get(Assignment, tasks[0].assignment).answer["reason"] == "written online"


@both
def test_a_file_that_is_not_ours_is_refused(tool: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    with pytest.raises(ExchangeError, match="not found"):
        tool.read(path, [])
    for content, message in (("{", "not JSON"), ("{}", "expected a list"), ("[{}]", "missing")):
        path.write_text(content)
        with pytest.raises(ExchangeError, match=message):
            tool.read(path, [])


def test_flat_rows_as_to_datasets_makes_them(database: Any, tmp_path: Path) -> None:
    reviewer = add_reviewer(database, "anna")
    round_id = rubric_round(database, [reviewer.id], rows(2))
    tasks = tasks_of(database, round_id)
    flat = []
    for number, record in enumerate(argilla.records(tasks, "rubrics")):
        flat.append(
            {
                "id": record["id"],
                **record["fields"],
                **record["metadata"],
                "decision.responses": ["reject", "accept"],
                "decision.responses.users": ["a", "a"],
                "decision.responses.status": ["discarded", "submitted" if number else "draft"],
            }
        )
    answers, skipped = argilla.read_records(flat, tasks)
    assert skipped == {"without a response": 1}
    assert [a.patch["decision"] for a in answers] == ["accept"]
    assert answers[0].assignment == tasks[1].assignment
