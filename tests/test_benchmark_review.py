"""The review benchmark in small: nothing is lost, also by SIGKILL, and a loss is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from promedical.provenance import check


@pytest.fixture(scope="module")
def benchmark(benchmark_script: Any) -> Any:
    return benchmark_script("review")


def test_small_run(benchmark: Any, tmp_path: Path) -> None:
    out = tmp_path / "review.json"
    arguments = ["--small", "--only", "sqlite", "--out", str(out)]
    # How quick it is, a machine that runs tests cannot say; errors and losses it can.
    benchmark.TARGETS["p95 at most, ms"] = 60_000
    assert benchmark.main(arguments) == 0
    result = json.loads(out.read_text())
    assert all("command" in fault for fault in check(result))
    load, killed = result["load"]["sqlite"], result["killed"]["sqlite"]
    assert load["errors"] == load["lost"] == killed["errors"] == killed["lost"] == 0
    assert load["saves"] == 12 * 6
    assert load["latency"]["p95_ms"] >= load["latency"]["p50_ms"] > 0
    assert killed["saves"] == 12 * 8
    assert killed["sent_again"] > 0
    assert [r["acknowledged"] > 0 for r in killed["restarts"]] == [True]


def test_a_lost_save_is_noticed(benchmark: Any, tmp_path: Path) -> None:
    from promedical.review import rounds, saves
    from promedical.review.database import Database
    from promedical.review.migrate import upgrade
    from promedical.review.tables import Assignment
    from review_rows import rows, rubric_round
    from review_server import add_reviewer

    path = str(tmp_path / "review.sqlite3")
    database = Database(path)
    upgrade(database)
    person = add_reviewer(database, "anna")
    rubric_round(database, [person.id], rows(1))
    with database.write() as session:
        assignment = session.query(Assignment).one()
        answer = rounds.first_answer(assignment.item.content)
        more = {"answer": answer, "seconds": 1.0}
        saves.save(session, assignment.id, person.id, base=0, save_id="save-one", **more)
        told = (assignment.id, "save-one", 1, benchmark.digest(answer))
    database.close()
    assert benchmark.lost(path, [told], at_rest=True) == 0
    never = (told[0], "save-two", 2, told[3])
    assert benchmark.lost(path, [told, never], at_rest=False) == 1
    other = (*told[:3], benchmark.digest({"reason": "another answer"}))
    assert benchmark.lost(path, [other], at_rest=True) == 1
    assert benchmark.lost(path, [], at_rest=True) == 2  # a save and an answer nobody was told of
