"""The command line: what it prints, and that no mistake of the user's ends in a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import promedical
from promedical import cli, scoring
from promedical.records import read_jsonl, write_dataset

CRITERIA: list[dict[str, Any]] = [
    {"id": "dose", "tier": "proficiency", "text": "States the daily limit.", "weight": 1.0},
    {"id": "kind", "tier": "excellence", "text": "Is kind."},
    {"id": "harm", "tier": "veto", "text": "Advises more than the daily limit."},
]


def row(name: str, **responses: tuple[str, str, str]) -> dict[str, Any]:
    """A row whose responses have the given verdicts on dose, kind, harm."""
    ids = [c["id"] for c in CRITERIA]
    return {
        "id": name,
        "messages": [{"role": "user", "content": "May I take both?"}],
        "rubric": {"criteria": CRITERIA},
        "responses": [
            {"id": r, "text": "SECRET", "verdicts": dict(zip(ids, v, strict=True))}
            for r, v in responses.items()
        ],
    }


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


GOOD = row(
    "q1",
    good=("met", "unmet", "unmet"),
    open=("met", "met", "abstain"),
    bad=("abstain", "met", "met"),
    failed=("met", "met", "error"),
)


def test_score_prints_scores_and_preferences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unscored = {**row("q2"), "responses": [{"id": "a", "text": ""}]}
    bare = {k: v for k, v in row("q3").items() if k != "rubric"}
    assert cli.main(["score", jsonl(tmp_path, GOOD, unscored, bare)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "q1",
        "  response           S1     S2     S3   reward",
        "  good            1.000      0      0    1.000",
        "  open            1.000      1    0–1   -0.450",
        "  bad       0.000–1.000      1      1   -1.450",
        "  failed          1.000      1    0–1        —  (1 failed)",
        "  good or open: unresolved",
        "  good is better than bad",
        "  good or failed: unresolved",
        "  open or bad: unresolved",
        "  open or failed: unresolved",
        "  bad or failed: unresolved",
        "",
        "1 instructions, 4 responses, 6 pairs: 1 decided, 0 tied, 5 unresolved",
        "left out: 1 responses without verdicts",
        "left out: 1 instructions without a scored response",
        "left out: 1 instructions without a rubric",
        "reward = clip(S1 + 0.05·S2, 0, 1.2) − 1.5·S3; it contradicts the preference in 0 of 1 "
        "decided pairs",
    ]


def test_score_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", jsonl(tmp_path, GOOD), "--json", "--lam", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reward"] == {"alpha": 0.05, "beta": 0.2, "lam": 2.0, "ablation": None}
    opened = found["instructions"][0]["responses"][1]
    assert opened["id"] == "open"
    assert opened["reward"] == pytest.approx(1.05 - 2)
    assert opened["scores"]["unresolved"]["veto"] == 1
    assert found["instructions"][0]["pairs"][1] == {
        "first": "good",
        "second": "bad",
        "preference": "first",
        "reward_disagrees": False,
    }


def test_score_reads_a_dataset_folder_and_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "set", read_jsonl(jsonl(tmp_path, GOOD)))
    (tmp_path / "reward.yaml").write_text("lam: 0\nablation: no_veto\n")
    recipe = str(tmp_path / "reward.yaml")
    assert cli.main(["score", str(tmp_path / "set"), "--recipe", recipe]) == 0
    out = capsys.readouterr().out
    assert "− 0·S3 (ablation: no_veto)" in out
    # Without the veto the reward prefers the answer with the violation.
    assert "good is better than bad\n" in out


def test_score_says_where_reward_and_preference_part() -> None:
    rows = [
        {**row("q", few=("met", "unmet", "unmet"), many=("unmet", "met", "unmet"))},
    ]
    rows[0]["rubric"] = {
        "criteria": [
            {**CRITERIA[0], "weight": 0.02},
            {**CRITERIA[0], "id": "rest", "weight": 0.98},
            *CRITERIA[1:],
        ]
    }
    for response in rows[0]["responses"]:
        response["verdicts"]["rest"] = "unmet"
    scored, left_out = scoring.score_rows(
        [promedical.records.from_dict(_listed(r)) for r in rows], promedical.RewardSpec()
    )
    text = scoring.as_text(scored, left_out, promedical.RewardSpec())
    assert "few is better than many (the reward says the opposite)" in text
    assert "contradicts the preference in 1 of 1 decided pairs" in text


def _listed(data: dict[str, Any]) -> dict[str, Any]:
    for response in data["responses"]:
        verdicts = response["verdicts"].items()
        response["verdicts"] = [{"criterion": k, "verdict": v} for k, v in verdicts]
    return data


def test_score_shows_ids_and_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations may be patients'."""
    for flags in ([], ["--json"]):
        cli.main(["score", jsonl(tmp_path, GOOD), *flags])
        captured = capsys.readouterr()
        assert "SECRET" not in captured.out + captured.err
        assert "May I" not in captured.out + captured.err


PARTIAL = row("q1", a=("met", "unmet", "unmet"))
del PARTIAL["responses"][0]["verdicts"]["harm"]
UNKNOWN = row("q1", a=("met", "unmet", "maybe"))


@pytest.mark.parametrize(
    ("argv", "rows", "named"),
    [
        (["score"], [], ["FILE", "required"]),
        (["score", "nowhere.jsonl"], [], ["nowhere.jsonl", "not found"]),
        (["score", "."], [], ["manifest.json", "not found"]),
        (["score", "ROWS", "--alpha", "2"], [GOOD], ["alpha", "2.0", "alpha < 1"]),
        (["score", "ROWS", "--alfa", "2"], [GOOD], ["--alfa", "unknown flag", "--alpha"]),
        (["score", "ROWS", "extra"], [GOOD], ["'extra'"]),
        (["score", "ROWS", "--recipe", "no.yaml"], [GOOD], ["no.yaml", "not found"]),
        (["score", "ROWS"], [PARTIAL], ["'q1'", "'a'", "verdicts", "'harm'"]),
        (["score", "ROWS"], [UNKNOWN], ["rows.jsonl", "line 1", "'harm'", "'maybe'"]),
        (["score", "ROWS"], [GOOD, GOOD], ["rows.jsonl", "line 2", "'q1' repeats"]),
        (["scor"], [], ["'scor'", "'score'", "--help"]),
        (["--fast"], [], ["'--fast'"]),
        (["quickstart", "--sed", "1"], [], ["--sed", "--seed"]),
        (["quickstart", "--seed", "x"], [], ["--seed", "'x'", "whole number"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    rows: list[dict[str, Any]],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = jsonl(tmp_path, *rows)
    assert cli.main([path if part == "ROWS" else part for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("promedical: error: ")
    assert captured.err.count("\n") == 1
    for part in named:
        assert part in captured.err


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert cli.main(["score", "rows.jsonl"]) == 2
    assert capsys.readouterr().err == "promedical: error: rows.jsonl: Permission denied\n"


def test_a_bug_is_not_dressed_up_as_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: Any) -> int:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "_score", bug)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["score"])


@pytest.mark.parametrize(("command", "goes_on"), [("quickstart", True), ("score", False)])
def test_ctrl_c_ends_with_130(
    command: str,
    goes_on: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", interrupt)
    assert cli.main([command]) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert ("goes on from the last finished stage" in err) == goes_on


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for part in ("quickstart", "score FILE", "--version", "no medical device"):
        assert part in out


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("score", ["--alpha X", "--json", '"verdicts"']),
        ("quickstart", ["--out", "--seed", "--recipe"]),
    ],
)
def test_each_command_has_help(
    command: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for part in named:
        assert part in out


def test_the_example_in_the_help_can_be_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, rest = cli.SCORE.partition("One row, on one line of the file:\n")
    example, _, _ = rest.partition("\n\n")
    assert cli.main(["score", jsonl(tmp_path, json.loads(example))]) == 0
    assert "1 instructions, 1 responses" in capsys.readouterr().out


def test_the_module_runs_and_brings_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "promedical", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"promedical {promedical.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "promedical.rubric" in imported
    assert not imported & {"torch", "transformers", "numpy", "pyarrow", "yaml", "rich"}


def test_quickstart_gets_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from promedical import quickstart

    got = []
    monkeypatch.setattr(quickstart, "PRESETS", {"fast": {"seed": 5}}, raising=False)
    monkeypatch.setattr(quickstart, "run_quickstart", lambda recipe: got.append(recipe) or 0)
    assert cli.main(["quickstart", "--fast", "--out", "x"]) == 0
    assert got == [quickstart.QuickstartRecipe(out="x", seed=5)]


def test_output_cut_short_by_a_pipe_is_no_error(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": f"q{i}"} for i in range(500)]
    path = jsonl(tmp_path, *rows)
    done = subprocess.run(
        f"{sys.executable} -m promedical score {path} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("q0\n", "")
