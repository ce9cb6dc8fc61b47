"""pack, unpack, label-studio and argilla through the command line: there, back, and mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from promedical.cli import main
from promedical.review import saves
from promedical.review.database import Database
from promedical.review.serve import DATABASE
from promedical.review.tables import Assignment, AuditEvent, Round
from review_rows import adjudication_round, rows, rubric_round
from review_server import add_reviewer, copied_sqlite
from review_tools import Argilla, LabelStudio

Run = Callable[..., tuple[int, str, str]]
ALL_SAVED = "2 saved, 0 imported before, 0 refused\n"


@dataclass(frozen=True)
class Installation:
    """A database with a round of each kind, and the command line over it."""

    database: Database
    run: Run
    people: tuple[str, str]
    rubrics: str

    def states(self, kind: str) -> list[str]:
        """Of every assignment of a kind of round."""
        with self.database.read() as session:
            found = session.query(Assignment).join(Assignment.item).all()
            return sorted(a.state for a in found if (a.part == "rubric") == (kind == "rubrics"))


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Installation]:
    url = copied_sqlite(tmp_path)
    monkeypatch.setenv(DATABASE, url)
    database = Database(url)
    people = (add_reviewer(database, "anna").id, add_reviewer(database, "bo").id)
    rubrics = rubric_round(database, list(people), rows(2))
    adjudication_round(database, list(people), rows(1))

    def run(*argv: str | Path) -> tuple[int, str, str]:
        code = main(["review", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    yield Installation(database, run, people, rubrics)
    database.close()


def handed_back(pack: Path, path: Path) -> str:
    """Write the answers of somebody who accepts every rubric of a pack; returns an assignment."""
    found = re.search(r'id="offline-pack">(.*?)</script>', pack.read_text(), re.DOTALL)
    assert found
    document = json.loads(found.group(1))
    lines = [document["head"]]
    for item in document["items"]:
        answer = {**item["answer"], "decision": "accept"}
        made = {"assignment": item["assignment"], "version": 1, "save": "uuid", "answer": answer}
        lines.append(json.dumps(made | {"seconds": 30.0, "finish": True}))
    path.write_text("\n".join(lines) + "\n")
    return str(document["items"][0]["assignment"])


def test_packs_go_out_and_their_answers_come_back_once(here: Installation, tmp_path: Path) -> None:
    code, out, _ = here.run("pack", "Rubrics", "--out", tmp_path / "packs")
    assert code == 0
    packs = sorted((tmp_path / "packs").glob("*.html"))
    assert [f"{path}: 1 items" for path in packs] == sorted(out.splitlines())
    for number, pack in enumerate(packs):
        handed_back(pack, tmp_path / f"{number}.jsonl")
    files = (tmp_path / "0.jsonl", tmp_path / "1.jsonl")
    told = "".join(f"{file}: 1 saved, 0 imported before, 0 refused\n" for file in files)
    assert here.run("unpack", *files)[:2] == (0, told)
    assert here.states("rubrics") == ["done", "done"]
    code, out, _ = here.run("unpack", files[0])
    assert (code, out) == (0, f"{files[0]}: 0 saved, 1 imported before, 0 refused\n")
    # What is finished is not given out again.
    code, out, _ = here.run("pack", here.rubrics, "--out", tmp_path / "again")
    assert (code, out) == (0, "left out: 2 finished already\nnobody has open items\n")
    with here.database.read() as session:
        actions = [action for (action,) in session.query(AuditEvent.action)]
    assert actions.count("pack.make") == 2
    assert actions.count("import.offline") == 3


def test_a_pack_of_one_reviewer_alone(here: Installation, tmp_path: Path) -> None:
    given = ("pack", "Adjudication", "--out", tmp_path, "--strict", "--reviewer", here.people[0])
    assert here.run(*given)[0] == 0
    (path,) = tmp_path.glob("*.html")
    assert here.people[0] in path.name
    code, out, err = here.run("pack", "Adjudication", "--out", tmp_path, "--reviewer", "eve")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "reviewer: found 'eve'" in err


def test_what_was_changed_online_is_listed_and_fails(here: Installation, tmp_path: Path) -> None:
    here.run("pack", "Rubrics", "--out", tmp_path, "--reviewer", here.people[0])
    assignment = handed_back(next(tmp_path.glob("*.html")), tmp_path / "back.jsonl")
    with here.database.write() as session:
        answer = session.get_one(Assignment, assignment).answer
        saves.save(
            session,
            assignment,
            here.people[0],
            base=0,
            save_id="online-1",
            answer={**answer, "reason": "online"},
            seconds=1.0,
        )
    code, out, _ = here.run("unpack", tmp_path / "back.jsonl")
    assert code == 2
    assert f"refused: {assignment}: changed online meanwhile (version 1, not 0)" in out


@pytest.mark.parametrize(
    ("verb", "tool"),
    [("label-studio", LabelStudio()), ("argilla", Argilla())],
    ids=["label-studio", "argilla"],
)
def test_a_tool_gets_each_part_and_gives_it_back(
    here: Installation, tmp_path: Path, verb: str, tool: Any
) -> None:
    out = tmp_path / "rubrics"
    code, said, _ = here.run(verb, "export", "Rubrics", "--out", out)
    assert (code, sorted(said.splitlines())) == (0, sorted(f"{id}: 1" for id in here.people))
    code, said, _ = here.run(verb, "import", "Rubrics", tool.work(out))
    assert (code, said.split(": ")[1]) == (0, ALL_SAVED)
    assert here.states("rubrics") == ["done", "done"]

    (first, *_), second = tool.after_preference, tmp_path / "second"
    code, said, _ = here.run(verb, "export", "Adjudication", "--out", second, "--part", first)
    assert (code, said.splitlines()[-1]) == (0, "nothing to give out; import the preference first")
    assert here.run(verb, "export", "Adjudication", "--out", tmp_path / "first")[0] == 0
    here.run(verb, "import", "Adjudication", tool.work(tmp_path / "first"))
    assert here.states("adjudication") == ["started", "started"]
    for part in tool.after_preference:
        given = (verb, "export", "Adjudication", "--out", second, "--part", part, "--language")
        assert here.run(*given, "zh")[0] == 0
    code, said, _ = here.run(verb, "import", "Adjudication", tool.work(second))
    assert (code, said.split(": ")[1]) == (0, ALL_SAVED)
    assert here.states("adjudication") == ["done", "done"]


def test_mistakes_are_one_line_with_exit_code_2(here: Installation, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "other.jsonl").write_text('{"format": "something else"}\n')
    (tmp_path / "forged.jsonl").write_text(
        '{"format": "promedical-offline-1", "signature": "00", "assignments": {}}\n'
    )
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "cut.json").write_text('[{"data": ')
    (tmp_path / "strange.json").write_text("[{}]")
    (tmp_path / "no-datasets").mkdir()
    out = ("--out", tmp_path / "out")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("pack", "Rubrics"), "--out"),
        (("pack", "nothing", *out), "no round called 'nothing'"),
        (("pack", "Rubrics", "--out", tmp_path / "a-file"), "a-file"),
        (("unpack",), "FILE"),
        (("unpack", tmp_path / "none.jsonl"), "not found"),
        (("unpack", tmp_path / "empty.jsonl"), "is empty"),
        (("unpack", tmp_path / "binary.jsonl"), "is no text"),
        (("unpack", tmp_path / "other.jsonl"), "format: expected"),
        (("unpack", tmp_path / "forged.jsonl"), "signature: this pack was not made by this"),
        (("unpack", tmp_path / "no-datasets"), "no-datasets"),
    ]
    for verb in ("label-studio", "argilla"):
        cases += [
            ((verb, "move", "Rubrics"), "invalid choice"),
            ((verb, "export", "Rubrics"), "export: --out FOLDER is missing"),
            ((verb, "export", "nothing", *out), "no round called 'nothing'"),
            ((verb, "export", "Adjudication", *out, "--part", "dangers"), "invalid choice"),
            ((verb, "import", "Rubrics"), "import: FILE is missing"),
            ((verb, "import", "Rubrics", tmp_path / "none.json"), "not found"),
            ((verb, "import", "Rubrics", tmp_path / "object.json"), "expected a list"),
            ((verb, "import", "Rubrics", tmp_path / "cut.json"), "not JSON"),
            ((verb, "import", "Rubrics", tmp_path / "strange.json"), "missing"),
            ((verb, "import", "Rubrics", tmp_path / "no-datasets"), "no-datasets"),
        ]
    for argv, expected in cases:
        code, said, err = here.run(*argv)
        assert (code, said, err.count("\n")) == (2, "", 1), (argv, said, err)
        assert expected in err, (argv, err)
    assert here.states("rubrics") == ["open", "open"]


def test_a_closed_round_is_not_given_out(here: Installation, tmp_path: Path) -> None:
    with here.database.write() as session:
        session.get_one(Round, here.rubrics).state = "closed"
    for argv in (
        ("pack", "Rubrics"),
        ("label-studio", "export", "Rubrics"),
        ("argilla", "export", "Rubrics"),
    ):
        code, out, err = here.run(*argv, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "it is closed, expected an open one" in err
