"""`promedical review`: the verbs through the command line, and the server as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from promedical.cli import main
from promedical.records import read_dataset
from promedical.review import commands
from promedical.review.database import Database
from promedical.review.serve import DATABASE, ServeError, ServeRecipe, database_setting, public_url
from promedical.review.tables import Assignment, AuditEvent, Reviewer, now
from review_server import copied_sqlite

GOOD = "four lamps by a canal"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv(DATABASE, copied_sqlite(tmp_path))
    (tmp_path / "password").write_text(GOOD + "\nmore\n")

    def command(*argv: str | Path) -> tuple[int, str, str]:
        code = main(["review", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def rows_file(folder: Path) -> Path:
    def row(n: int) -> dict[str, Any]:
        return {
            "id": f"q{n}",
            "messages": [{"role": "user", "content": f"Question {n}?"}],
            "rubric": {
                "criteria": [
                    {"id": "dose", "tier": "proficiency", "text": "States the dose.", "weight": 1.0}
                ]
            },
            "responses": [
                {"id": name, "text": f"Answer {name}.", "verdicts": {"dose": "met"}, "model": name}
                for name in ("a", "b")
            ],
        }

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(3)))
    return path


def people(run: Run, folder: Path) -> None:
    code, out, _ = run(
        "create-lead", "--login", "Lead", "--name", "L", "--password-file", folder / "password"
    )
    assert (code, out.startswith("lead ")) == (0, True)
    database = Database(os.environ[DATABASE])
    with database.write() as session:
        for name in ("ann", "bob"):
            session.add(Reviewer(login=name, name=name, password_hash="-", role="reviewer"))
    database.close()


def test_from_rows_to_gold_rubrics(run: Run, tmp_path: Path) -> None:
    people(run, tmp_path)
    rows = rows_file(tmp_path)
    given = ("import", rows, "--kind", "rubrics", "--name", "First")
    code, out, _ = run(*given, "--size", "2", "--assign", "ann", "BOB")
    assert code == 0
    assert "2 of 3 rows" in out
    assert "assignments: 2" in out
    code, out, _ = run("rounds")
    assert "rubrics" in out
    assert "0 of 2 done" in out
    database = Database(os.environ[DATABASE])
    with database.write() as session:
        for assignment in session.scalars(select(Assignment)):
            assignment.answer = {**assignment.answer, "decision": "accept"}
            assignment.state, assignment.finished = "done", now()
    code, out, _ = run("export", "First", "--out", tmp_path / "gold", "--pool", tmp_path / "pool")
    assert code == 0
    assert "gold rubrics: 2" in out
    assert len(read_dataset(tmp_path / "gold")) == 2
    with database.read() as session:
        actions = set(session.scalars(select(AuditEvent.action)))
    assert {"round.create", "round.assign", "round.export"} <= actions
    database.close()


def test_rows_become_an_adjudication(run: Run, tmp_path: Path) -> None:
    people(run, tmp_path)
    rows = rows_file(tmp_path)
    code, out, _ = run("import", rows, "--kind", "adjudication", "--name", "Pilot", "--judge", "J")
    assert code == 0
    assert "3 items, 6 assignments" in out
    code, _, err = run("export", "Pilot", "--out", tmp_path / "bench")
    assert code == 2
    assert "settled" in err


def test_mistakes_are_one_line_that_says_what_would_be_right(run: Run, tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    missing = tmp_path / "no.sqlite3"
    for argv, expected in (
        (("rounds", "--database", missing), "no such database"),
        (("import", rows, "--kind", "rubrics", "--name", "x", "--assign", "eve"), "eve"),
        (("import", rows, "--kind", "adjudication", "--name", "x"), "reviewer"),
        (("export", "nothing", "--out", tmp_path / "x"), "no round"),
        (("purge", "--yes"), "nothing was named"),
        (("create-lead", "--login", "a", "--name", "b"), "no terminal"),
        (("verify-log", "--head", "ab"), "not in it"),
        (("verfy-log",), "verify-log"),
        (("rounds", "--database", "mysql://a:secret@b/c"), "postgresql"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), argv
        assert expected in err, argv
        assert err.count("\n") == 1, argv
        assert "secret" not in err
    assert not missing.exists()


def test_the_log_is_verified_and_its_head_kept(run: Run, tmp_path: Path) -> None:
    people(run, tmp_path)
    code, out, _ = run("verify-log")
    assert code == 0
    head = out.split()[-1]
    run("invite", "--role", "lead")
    code, out, _ = run("verify-log", "--head", head)
    assert (code, out.split()[0]) == (0, "2")
    database = Database(os.environ[DATABASE])
    with database.write() as session:
        session.connection().exec_driver_sql("DROP TRIGGER audit_event_no_update")
        session.execute(update(AuditEvent).where(AuditEvent.seq == 1).values(actor_id="x"))
    database.close()
    code, _, err = run("verify-log")
    assert code == 2
    assert "entry 1 was changed" in err


def test_purge_says_what_it_removed_and_what_it_cannot_reach(run: Run, tmp_path: Path) -> None:
    run("import", rows_file(tmp_path), "--kind", "rubrics", "--name", "First")
    code, out, _ = run("purge", "--yes", "--instruction", "q1", "q9")
    assert code == 2  # somebody asked for q9, and it was not there
    assert "removed: 1 items" in out
    assert "no item has: q9" in out
    assert "backups" in out
    assert "Question 1?" not in (tmp_path / "review.sqlite3").read_bytes().decode("latin-1")
    assert run("verify-log")[0] == 0
    assert run("purge", "--yes", "--older-than-days", "30")[1].startswith("removed: 0 items")


def test_purge_of_a_person_says_which_id_the_answers_stay_under(run: Run, tmp_path: Path) -> None:
    people(run, tmp_path)
    code, out, _ = run("purge", "--yes", "--person", "ann")
    assert code == 0
    assert out.startswith("who ")
    assert "backups" in out
    assert run("verify-log")[0] == 0
    code, out, err = run("purge", "--yes", "--person", "ann")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no account has the login 'ann'" in err


def test_a_database_in_no_folder_is_refused_and_a_new_file_announced(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "mistyped" / "review.sqlite3"
    password = ("--password-file", tmp_path / "password")
    for verb in (("serve",), ("create-lead", "--login", "lead", "--name", "L", *password)):
        for name in (str(missing), f"sqlite:///{missing}"):
            code, out, err = run(*verb, "--database", name)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"there is no folder {missing.parent}" in err
    assert not missing.parent.exists()
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    new = tmp_path / "new.sqlite3"
    code, _, err = run("serve", "--port", "0", "--database", new)
    assert (code, err.count("a new database is made")) == (0, 1)
    assert new.is_file()
    assert run("serve", "--port", "0", "--database", new)[2].count("new database") == 0


def test_an_invitation_from_the_command_line(run: Run, tmp_path: Path) -> None:
    people(run, tmp_path)
    code, out, _ = run("invite", "--public-url", "https://review.example/")
    assert code == 0
    assert out.startswith("https://review.example/invitation/")
    assert run("invite", "--for", "ann")[0] == 0
    assert run("invite", "--for", "eve")[0] == 2


def test_without_the_extra_it_says_which(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(commands.EXTRA, "no_such_package", "no-such-package")
    code, _, err = run("rounds")
    assert code == 2
    assert "no-such-package not installed, run: pip install 'promedical[review]'" in err


def test_help_of_every_verb(run: Run) -> None:
    assert run()[0] == 0
    for verb in commands.VERBS:
        code, out, _ = run(verb, "--help")
        assert code == 0, verb
        assert f"review {verb}" in out, verb
        assert verb in commands.HELP


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"host": "::1"}, "http://[::1]:8080"),
        ({"host": "0.0.0.0"}, "expected --public-url"),
        ({"host": "0.0.0.0", "public_url": "https://r.example/"}, "https://r.example"),
        ({"host": "0.0.0.0", "public_url": "http://r.example"}, "not encrypted"),
        ({"public_url": "http://r.example", "plain_http": True}, "http://r.example"),
        ({"public_url": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ({"public_url": "r.example"}, "expected such as https://"),
        ({"public_url": "https://r.example/review"}, "expected no path"),
    ],
)
def test_the_public_address(settings: dict[str, Any], expected: str) -> None:
    recipe = ServeRecipe(**settings)
    if expected.startswith("http"):
        assert public_url(recipe, 8080) == expected
        return
    with pytest.raises(ServeError, match=expected):
        public_url(recipe, 8080)


def test_where_the_database_setting_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATABASE, raising=False)
    assert database_setting(None) == "promedical-review.sqlite3"
    monkeypatch.setenv(DATABASE, "postgresql://x")
    assert database_setting(None) == "postgresql://x"
    assert database_setting("here") == "here"


def test_serve_answers_and_ends_with_sigterm(tmp_path: Path) -> None:
    environment = {**os.environ, DATABASE: copied_sqlite(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "promedical", "review", "serve", "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("promedical: review at http://127.0.0.1:"), line
        url = line.split()[3].rstrip(",")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url + "/login") as reply:
            assert b"Welcome" in reply.read()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "GET /login 200" in err
    assert "Traceback" not in err
