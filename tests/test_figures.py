"""Documents agree with committed results, and a stale or unfounded number is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from promedical import figures
from promedical.bench import run_tables
from promedical.bench.report import headline
from promedical.bench.tables import Cell, Column, Row, Table
from promedical.figures import FiguresError, check_results, main, markdown, rendered, take

FIXTURE = Path(__file__).parent / "data" / "report_results.json"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def project(tmp_path: Path, results: dict[str, Any]) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "quickstart.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    readme = "# T\n\n<!-- figures:quickstart_summary -->\n<!-- /figures -->\n\nend\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    other = "a\n<!-- figures:paper -->\nold\n<!-- /figures -->\n<!-- figures:quickstart -->\n"
    (tmp_path / "docs" / "x.md").write_text(other + "<!-- /figures -->\n", encoding="utf-8")
    return tmp_path


def test_this_projects_documents_and_results_agree() -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("not run from a checkout")
    assert main(["--check", "--root", str(ROOT)]) == 0


def test_check_names_the_stale_blocks_and_changes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (project / "README.md").read_text()
    assert main(["--check", "--root", str(project)]) == 1
    said = capsys.readouterr().err
    assert "README.md: figures:quickstart_summary differs from its result" in said
    assert "docs/x.md: figures:paper differs" in said
    assert "docs/x.md: figures:quickstart differs" in said
    assert (project / "README.md").read_text() == before


def test_rendering_settles_and_keeps_the_rest(project: Path) -> None:
    assert main(["--root", str(project)]) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# T\n\n<!-- figures:quickstart_summary -->\n**On the bench")
    assert text.endswith("<!-- /figures -->\n\nend\n")
    assert main(["--check", "--root", str(project)]) == 0
    assert main(["--root", str(project)]) == 0
    assert (project / "README.md").read_text() == text


def test_one_changed_number_is_found(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(project)])
    path = project / "README.md"
    text = path.read_text()
    assert "67.9 (61.3–73.9)" in text
    path.write_text(text.replace("67.9 (61.3–73.9)", "87.9 (61.3–73.9)"))
    assert main(["--check", "--root", str(project)]) == 1
    err = capsys.readouterr().err
    assert "README.md: figures:quickstart_summary differs" in err
    assert "docs/x.md" not in err


def test_a_result_without_provenance_is_found(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--root", str(project)])
    folder = project / "benchmarks" / "results"
    (folder / "bare.json").write_text("{}")
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    faults = check_results(folder)
    assert [f.split(":")[0] for f in faults] == ["bare.json", "broken.json", "list.json"]
    assert main(["--check", "--root", str(project)]) == 1
    assert "bare.json: provenance: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures:nonsense -->\n<!-- /figures -->\n", "nonsense: unknown, expected one of"),
        ("<!-- figures:paper -->\n", "no partner"),
        ("<!-- /figures -->\n", "no partner"),
        ("<!-- figures:paper -->\n<!-- figures:paper -->\n<!-- /figures -->\n", "no partner"),
        ("<!-- figures:quickstart -->\n<!-- /figures -->\n", "quickstart.json not found"),
    ],
)
def test_a_block_that_cannot_be_rendered_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FiguresError, match=message):
        rendered(text, tmp_path, where="a.md")


def test_a_result_of_another_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text('{"bench": []}')
    text = "<!-- figures:quickstart -->\n<!-- /figures -->\n"
    with pytest.raises(FiguresError, match=r"a\.md: figures:quickstart: .*layout"):
        rendered(text, tmp_path, where="a.md")


def test_markers_within_a_sentence_are_no_blocks(tmp_path: Path) -> None:
    text = "Write `<!-- figures:NAME -->` and `<!-- /figures -->` around it.\n"
    assert rendered(text, tmp_path, where="a.md") == text


def test_markdown_cells_stay_in_their_cells() -> None:
    cells = (Cell("1 | 2", "0–3", 5), Cell("<b>", mark="none"), Cell("9.00", mark="paper"))
    columns = (Column("A", n=None), Column("B", n=4, unit="pairs"), Column("Paper: C", paper=True))
    table = Table("T", "c", "G", columns, (Row("x\ny", cells, strong=True),), ("n1", "n2"))
    assert markdown(table) == (
        "**T.** c\n\n"
        "| G | A | B<br>n = 4 pairs | Paper: C |\n"
        "|:--|--:|--:|--:|\n"
        "| **x y** | 1 \\| 2 (0–3), n = 5 | &lt;b&gt; | *9.00* |\n\n"
        "<sub>n1</sub><br><sub>n2</sub>"
    )


def test_every_row_has_every_column(results: dict[str, Any]) -> None:
    made = [run_tables.before_after_table(results["answers"]["compared"])]
    made += run_tables.paper_tables()
    for table in made:
        lines = [line for line in markdown(table).split("\n") if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert len(lines) == 2 + len(table.rows)


def test_the_commands_last_lines_are_those_of_the_run(results: dict[str, Any]) -> None:
    text = figures.RENDERERS["quickstart_output"].render(results)
    assert text == "\n".join(["```text", *headline(results), "```"])


def tree_packing(results: dict[str, Any]) -> dict[str, Any]:
    """A made-up result in the layout of benchmarks/tree_packing.py."""
    way = {
        "tree_s": 2.0,
        "tree_peak_gb": 1.2,
        "trl_s": 11.0,
        "trl_peak_gb": 3.4,
        "times_trl": 5.5,
        "times_separate": 3.25,
    }
    real = {
        "pairwise_tree_s": 1.0,
        "pairwise_trl_s": 2.0,
        "pairwise_times_trl": 2.0,
        "pairwise_and_pointwise_tree_s": 3.0,
        "pairwise_and_pointwise_separate_s": 9.0,
        "pairwise_and_pointwise_times_separate": 3.0,
    }
    return {
        "provenance": results["provenance"],
        "settings": {
            "lengths": {"x": 200, "y": 400, "c": 40},
            "layers": 30,
            "dtype": "float32",
            "threads": 2,
            "repeats": 3,
            "discordant": 0.3,
            "weights": "random",
            "scaled": "made up",
        },
        "targets": {"n=2,K=8 times TRL": 5.5},
        "reached": {"n=2,K=8 times TRL": 5.873},
        "synthetic": [
            {"n": 2, "K": 8, "pairs": 8, "token_ratio_trl": 6.24, "forward": way, "train": way}
        ],
        "measured": {"trl b=8, train": {"peak_gb": 17.04}},
        "real_discordance": [
            {"n": 2, "K": 8, "pairs_of_trees": [2, 0, 3], "forward": real, "train": real}
        ],
    }


def test_tree_packing_is_rendered(results: dict[str, Any]) -> None:
    text = figures.RENDERERS["tree_packing"].render(tree_packing(results))
    row = (
        "| n = 2, K = 8 | 6.2 × | 2.00 | 5.5 × | 3.2 × | 2.00 | 5.5 × | 3.2 × | 1.2 / 3.4 | 17.0 |"
    )
    assert row in text
    assert "| n = 2, K = 8, forward + backward | 5 | 1.00 | 2.00 | 2.0 × | 3.00 | 9.00" in text
    assert "- n=2,K=8 times TRL: aimed at 5.5, measured 5.87" in text
    assert "30 % of the verdicts" in text
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {9, 11}


def test_paper_figures_say_whose_they_are() -> None:
    text = figures.RENDERERS["paper"].render({})
    assert "not measured here" in text
    assert "*86.55*" in text


def test_taking_a_run_leaves_every_text_behind(
    tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads(json.dumps(results))
    results["answers"]["answers"]["base"][0] |= {"text": "a patient's text", "verdicts": {"x": 1}}
    results["surprise"] = "a patient's text"
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "p").mkdir()
    arguments = ["--root", str(tmp_path / "p"), "--take", str(source), "quickstart"]
    assert main(arguments) == 0
    target = tmp_path / "p" / "benchmarks" / "results" / "quickstart.json"
    assert target.name in capsys.readouterr().out
    text = target.read_text(encoding="utf-8")
    assert "patient's text" not in text
    assert "Made-up" not in text.replace("Made-up CPU", "")
    taken = json.loads(text)
    assert set(taken["answers"]["answers"]["base"][0]) == {"reward"}
    body = figures.RENDERERS["quickstart"].render(taken)
    assert body == figures.RENDERERS["quickstart"].render(results)


def test_a_run_without_provenance_is_not_taken(tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text("{}")
    with pytest.raises(FiguresError, match=r"results\.json: provenance: missing"):
        take(source, tmp_path / "q.json")
    assert not (tmp_path / "q.json").exists()
    with pytest.raises(FiguresError, match=r"absent\.json"):
        take(tmp_path / "absent.json", tmp_path / "q.json")
