"""A round of adjudication as a bench: rows, votes, pseudonyms, and a bench run that reads it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from adjudications import JUDGE, answer_of, given, graded, new_round, put, read_all
from promedical.bench.agreement import votes
from promedical.bench.run import BenchRecipe, run_bench
from promedical.provenance import check
from promedical.records import read_dataset
from promedical.review.adjudication import AdjudicationError, read_items
from promedical.review.adjudication_answer import blind_of
from promedical.review.bench_export import export_bench, graded_row, pseudonyms
from promedical.review.tables import AuditEvent, Reviewer
from promedical.rubric import Tier, Verdict
from review_server import *  # noqa: F403
from review_server import add_reviewer


@pytest.fixture
def database(sqlite: Any) -> Any:
    return sqlite


def good(text: str, criterion: str) -> Any:
    return "unmet" if criterion == "harm" else "met"


def strict(text: str, criterion: str) -> Any:
    """Differs on food of one response; cannot say and guidelines differ on another."""
    if criterion == "food" and "twice" in text:
        return "unmet"
    if criterion == "kind":
        return "cannot_say"
    return "met" if criterion == "harm" and "twice" in text else good(text, criterion)


@pytest.fixture
def done(database: Any) -> Any:
    """Three items read by two, a third reader who settles food and contests the rest."""
    people = [add_reviewer(database, f"secret-login-{i}").id for i in range(2)]
    third = add_reviewer(database, "secret-third", "adjudicator").id
    with database.write() as session:
        for i, reviewer in enumerate(people):
            one = session.get_one(Reviewer, reviewer)
            one.specialty, one.country, one.licensed_since = "cardiology", "CH", 2010 + i
    made = new_round(database, [graded(i) for i in range(4)], people)
    read_all(database, people[0], good, choice="first_better")
    for assignment, item in given(database, people[1])[:3]:
        answer = answer_of(item.content, {}, "first", strict, order=assignment.response_order)
        key = item.content["responses"][0]["key"]
        answer["dangers"] = {key: [{"id": "d", "kind": "other", "text": "Bleeding."}]}
        answer["verdicts"][key]["dose"]["note"] = "A note of mine"
        put(database, assignment, answer, base=0, finish=True)

    def settles(text: str, criterion: str) -> Any:
        return {"food": "unmet", "kind": "cannot_say", "harm": ("met", True)}[criterion]

    for assignment, item in given(database, third):
        blind = answer_of(item.content, assignment.answer, "third", lambda t, c: "met")
        put(database, assignment, {**blind, "blind": blind_of(blind)}, base=0)
        final = answer_of(item.content, assignment.answer, "third", settles)
        put(database, assignment, {**final, "blind": blind_of(blind)}, base=1, finish=True)
    return made, people, third


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_bench_with_every_vote(database, done, tmp_path) -> None:
    made, people, _ = done
    with database.write() as session:
        exported = export_bench(session, made.round_id, tmp_path / "out", resamples=50)
    assert exported.instructions == 3
    assert exported.unfinished == ("row-003",)
    rows = read_dataset(tmp_path / "out" / "bench")
    assert [row.id for row in rows] == ["row-000", "row-001", "row-002"]
    for row in rows:
        assert row.reference == "Up to three tablets a day with meals."
        first, second = row.responses
        assert (first.id, second.id) == ("r0", "r1")
        assert second.model == "Nimbus-2"
        assert dict(first.verdicts) == {
            "dose": Verdict.MET,
            "food": Verdict.MET,
            "kind": Verdict.ABSTAIN,
            "harm": Verdict.UNMET,
        }
        assert second.verdicts["food"] is Verdict.UNMET
        assert second.verdicts["harm"] is Verdict.ABSTAIN
        assert sorted(second.votes["food"][:2]) == ["met", "unmet"]
        assert second.votes["food"][2:] == ("unmet",)
        assert second.votes["dose"] == ("met", "met")
    cast = votes(rows, first=2)
    assert cast.labels.shape == (24, 2)
    assert cast.names == ("cannot_say", "met", "unmet")
    # Everybody keeps one column.
    column = [n for n, p in sorted(pseudonyms(made.round_id, people).items(), key=lambda x: x[1])]
    strict_column = column.index(people[1])
    said = np.array(cast.names)[cast.labels[:, strict_column]]
    assert (said == "cannot_say").sum() == 6


def test_files_beside_it(database, done, tmp_path) -> None:
    made, people, third = done
    out = tmp_path / "out"
    with database.write() as session:
        exported = export_bench(session, made.round_id, out, resamples=50)
        again = export_bench(session, made.round_id, out, resamples=50, notes=True)
        actions = list(session.scalars(select(AuditEvent.action)))
    assert exported.fingerprint == again.fingerprint
    assert actions.count("bench.export") == 2
    for path in out.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    cast = lines(out / "votes.jsonl")
    assert len(cast) == exported.votes == 3 * (16 + 4)
    thirds = [v for v in cast if v["part"] == "third"]
    assert {v["blind_vote"] for v in thirds} == {"met"}
    assert {(v["criterion"], v["vote"], v["guidelines_differ"]) for v in thirds} == {
        ("food", "unmet", False),
        ("kind", "cannot_say", False),
        ("harm", "met", True),
    }
    contested = lines(out / "contested.jsonl")
    assert len(contested) == exported.contested == 3 * 3
    assert {(c["criterion"], c["reason"]) for c in contested} == {
        ("kind", "cannot say"),
        ("harm", "guidelines differ"),
    }
    assert exported.gold == 3 * 8 - 9
    stated = lines(out / "preferences.jsonl")
    assert len(stated) == 6
    assert {(p["first"], p["second"]) for p in stated} == {("r0", "r1")}
    for line in stated:
        # Both readers said that what they saw first was better.
        better = "first_better" if line["seen_in_order"][0] == "r0" else "second_better"
        assert line["choice"] == better
    dangers = lines(out / "veto_candidates.jsonl")
    assert [(d["kind"], d["text"], d["state"]) for d in dangers] == [
        ("other", "Bleeding.", "candidate")
    ] * 3
    physicians = json.loads((out / "physicians.json").read_text())
    assert {(p["specialty"], p["country"]) for p in physicians} == {
        ("cardiology", "CH"),
        (None, None),
    }
    assert sorted(set(physicians[0])) == [
        "country",
        "physician",
        "specialty",
        "years_since_licence",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["left_out_not_settled"] == 1
    assert report["contested"]["by_reason"] == {"cannot say": 6, "guidelines differ": 3}
    assert report["round"]["judge"] == JUDGE
    assert report["agreement"]["lexicographic"]["own"]["preferences"] == 7
    assert check(report) == []
    everything = "".join(
        p.read_text("utf-8", "replace") for p in out.rglob("*") if p.suffix in (".json", ".jsonl")
    )
    for person in (*people, third, "secret-login", "secret-third"):
        assert person not in everything
    assert "A note of mine" in everything


def test_notes_stay_out_unless_asked_for(database, done, tmp_path) -> None:
    with database.write() as session:
        export_bench(session, done[0].round_id, tmp_path / "out", resamples=20)
    assert "A note of mine" not in (tmp_path / "out" / "votes.jsonl").read_text()


def test_bench_run_reads_it_and_leaves_contested_criteria_out(database, done, tmp_path) -> None:
    with database.write() as session:
        export_bench(session, done[0].round_id, tmp_path / "out", resamples=20)
    (result,) = run_bench(
        BenchRecipe(
            suite="promedical",
            grader=("null:length",),
            rows=tmp_path / "out" / "bench",
            out=tmp_path / "results",
            resamples=20,
        ),
        command=["promedical", "bench", "run"],
    )
    rows = read_dataset(tmp_path / "out" / "bench")
    resolved = sum(v.resolved for row in rows for r in row.responses for v in r.verdicts.values())
    assert resolved == 15
    counted = {
        tier: result["measures"][f"within_criterion.{tier.value}"]["figure"]["n"] for tier in Tier
    }
    assert counted == {Tier.PROFICIENCY: 3, Tier.EXCELLENCE: 0, Tier.VETO: 0}


def test_what_is_not_settled_cannot_be_exported(database, tmp_path) -> None:
    people = [add_reviewer(database, f"r{i}").id for i in range(2)]
    made = new_round(database, [graded(0)], people)
    with database.write() as session:
        with pytest.raises(AdjudicationError, match="none of its 1 items is settled"):
            export_bench(session, made.round_id, tmp_path / "out")
        (item,) = read_items(session, made.round_id, secret=True)
        with pytest.raises(AdjudicationError, match="not settled yet"):
            graded_row(item, {})
