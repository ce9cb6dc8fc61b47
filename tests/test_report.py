"""The page: self-contained, honest, escaped, and rendered from whatever parts there are."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.bench import paper, plots, run_tables, tables
from promedical.bench.plots import Bin, Dot, Series
from promedical.bench.report import headline, render_report, write_report
from promedical.bench.story import story
from promedical.rubric import Tier

FIXTURE = Path(__file__).parent / "data" / "report_results.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def page(results: dict[str, Any]) -> str:
    return render_report(results)


class _Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "title", "desc"):
            self.text += data


def test_the_page_is_well_formed_and_needs_nothing_from_outside(page: str) -> None:
    parsed = _Page(page)
    assert parsed.stack == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "img", "object", "embed", "form"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("#", "data:"))
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    anchors = {a["href"][1:] for _, a in parsed.tags if (a.get("href") or "").startswith("#")}
    assert anchors <= {a.get("id") for _, a in parsed.tags}


def test_texts_of_models_and_data_are_shown_as_text(page: str, results: dict[str, Any]) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&#39;answer&#39;)&lt;/script&gt; &amp; more" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    hostile = copy.deepcopy(results)
    evil = '"><img src=x onerror=alert(1)>{{ 7*7 }}</style></svg>'
    hostile["model"] = evil
    hostile["examples"][0]["question"] = evil
    hostile["bench"]["graders"][evil] = hostile["bench"]["graders"]["length"]
    hostile["bench"]["differences"][evil] = hostile["bench"]["differences"]["length"]
    hostile["stages"][0]["title"] = evil
    hostile["provenance"]["command"] = [evil]
    rendered = render_report(hostile)
    assert "<img" not in rendered
    assert "49</style>" not in rendered
    assert _Page(rendered).stack == []


def test_every_plot_has_a_caption_and_a_text_alternative(page: str) -> None:
    parsed = _Page(page)
    drawn = [a for tag, a in parsed.tags if tag == "svg"]
    assert len(drawn) >= 3 + 3 + 1 + 6 + 1  # tiers, reliability, loss, GRPO, rewards
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert len(str(attributes["aria-label"])) > 40
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    assert len(figures) == len(drawn)
    for figure in figures:
        assert re.search(r"<figcaption><strong>.+</strong>.{10,}</figcaption>", figure, re.DOTALL)


def test_a_veto_never_reads_met_or_unmet(results: dict[str, Any]) -> None:
    shown = copy.deepcopy(results)
    for example in shown["examples"]:
        example["criteria"] = [c for c in example["criteria"] if c["tier"] == "veto"]
    text = render_report(shown)
    badges = re.findall(r'<span class="verdict \w+">([^<]+)</span>', text)
    assert set(badges) == {"violated", "not violated", "cannot say", "judgment failed"}


def test_a_failed_judgment_leaves_no_reward(page: str) -> None:
    assert "no reward: a judgment failed" in page


def test_the_honest_words_are_there(page: str) -> None:
    text = _Page(page).text
    for words in (
        "graded by the reward it was trained on",
        "Research use only",
        "no medical device",
        "Few questions and little training",
        "not “safe”",
        "not results of this project",
        "less than half",
    ):
        assert words in text, words


def test_the_papers_figures_are_marked_as_the_papers(results: dict[str, Any]) -> None:
    for name, table in tables.bench_tables(results["bench"]).items():
        for i, column in enumerate(table.columns):
            cells = [row.cells[i] for row in table.rows]
            assert column.paper == column.label.startswith("Paper"), (name, column)
            assert all(c.mark in ("paper", "none") for c in cells) == column.paper
    within = tables.bench_tables(results["bench"])["within"]
    assert [row.cells[-1].text for row in within.rows][:3] == ["87.39", "—", "65.64"]


def test_every_measured_cell_has_an_interval_and_an_n(results: dict[str, Any]) -> None:
    made = tables.bench_tables(results["bench"])
    physicians = results["bench"]["physicians"]
    made["difference"] = tables.difference_table(results["bench"])
    made["physicians"] = tables.physicians_table(physicians)
    made["ceiling"] = tables.ceiling_table(physicians)
    made["before"] = run_tables.before_after_table(results["answers"]["compared"])
    for name, table in made.items():
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if cell.mark in ("none", "paper") or column.label == "Tie or unresolved":
                    continue
                assert cell.detail, (name, row.label, column.label)
                told = column.n is not None or cell.n is not None or "(n = " in row.label
                assert told, (name, row.label, column.label)


def test_an_undefined_figure_is_a_dash_with_its_reason(results: dict[str, Any]) -> None:
    veto = tables.bench_tables(results["bench"])["veto"]
    scalar = next(row for row in veto.rows if row.label == "Scalar baseline")
    assert {c.text for c in scalar.cells[:3]} == {"—"}
    assert any("gives no verdicts" in note and "Scalar" in note for note in veto.notes)


def test_an_n_that_differs_stays_in_its_cell() -> None:
    def row(label: str, *ns: int) -> tables.Row:
        return tables.Row(label, tuple(tables.Cell("1", "0–2", n) for n in ns))

    columns = [tables.Column("a"), tables.Column("b")]
    table = tables.make_table("t", "", "h", columns, [row("x", 5, 7), row("y", 5, 8)])
    assert [c.n for c in table.columns] == [5, None]
    assert [[c.n for c in r.cells] for r in table.rows] == [[None, 7], [None, 8]]
    table = tables.make_table("t", "", "h", columns, [row("x", 4, 4), row("y", 6, 6)])
    assert [r.label for r in table.rows] == ["x (n = 4)", "y (n = 6)"]


def test_fewer_violations_are_better(results: dict[str, Any]) -> None:
    compared = copy.deepcopy(results["answers"]["compared"])
    compared["metrics"]["s3"]["difference"] |= {"value": -0.2, "low": -0.3, "high": -0.1}
    compared["metrics"]["s3"]["difference"]["outcome"] = "worse"
    table = run_tables.before_after_table(compared)
    row = next(r for r in table.rows if r.label.startswith("S3"))
    assert row.cells[2].text == row.cells[2].mark == "better"
    assert row.cells[2].detail == "−0.20 (−0.30 to −0.10)"


def test_words_follow_the_intervals(results: dict[str, Any]) -> None:
    told = copy.deepcopy(results)
    differences = told["bench"]["differences"]
    for name in differences:
        differences[name]["overall_accuracy"]["outcome"] = "better"
    differences["word_overlap"]["overall_accuracy"]["outcome"] = "worse"
    differences["scalar"]["overall_accuracy"]["outcome"] = "not distinguished"
    first = story(told)[0]
    assert first.endswith(
        "It cannot be told apart from the scalar baseline. It is worse than word overlap."
    )
    assert "better than the untrained model" in first


@pytest.mark.parametrize(
    "missing",
    [
        "bench",
        "train",
        "grpo",
        "answers",
        "examples",
        "stages",
        "data",
        "provenance",
        "reward_spec",
    ],
)
def test_a_missing_part_is_not_run(results: dict[str, Any], missing: str) -> None:
    left = {k: v for k, v in results.items() if k != missing}
    rendered = render_report(left)
    assert _Page(rendered).stack == []
    if missing not in ("reward_spec", "data"):
        assert 'class="notrun"' in rendered
    assert 1 <= len(headline(left)) <= 10


def test_nothing_at_all_still_renders() -> None:
    rendered = render_report({})
    assert rendered.count("Not run") >= 6
    assert "Nothing has been measured yet." in rendered


def test_a_wrong_layout_is_named() -> None:
    with pytest.raises(ValueError, match=r"results: bench: .*layout"):
        render_report({"bench": {"no graders": 1}})


def test_null_figures_are_dashes_everywhere(results: dict[str, Any]) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            if {"value", "low", "high"} <= set(value):
                return value | {"value": None, "low": None, "high": None, "reason": "no items"}
            return {k: emptied(v) for k, v in value.items()}
        return [emptied(v) for v in value] if isinstance(value, list) else value

    rendered = render_report(emptied(results))
    assert _Page(rendered).stack == []
    assert "— no items" in rendered
    assert "None" not in _Page(rendered).text.replace("None of this is", "")
    assert not re.search(r"\b(nan|inf)\b", rendered)


def test_headline_is_short_and_aligned(results: dict[str, Any]) -> None:
    lines = headline(results)
    assert len(lines) <= 10
    table = lines[:7]
    assert len({len(line) for line in table}) == 1
    assert max(map(len, lines)) <= 102
    assert lines[-1] == "Small n, little training, research use only: no medical device."


def test_the_page_depends_on_the_results_alone(results: dict[str, Any], tmp_path: Path) -> None:
    written = write_report(tmp_path / "a" / "report.html", results)
    assert written.read_text(encoding="utf-8") == render_report(results)


def test_the_fixture_says_that_it_is_made_up(page: str, results: dict[str, Any]) -> None:
    assert "for tests only" in results["made_up"]
    assert "Made up: for tests only" in page
    del (real := dict(results))["made_up"]
    assert "Made up:" not in render_report(real)


def test_the_papers_tables_are_those_of_the_specification() -> None:
    ours = next(m for m in paper.REWARD_MODELS if m.name == "ProMedical-RM (Qwen3-8B)")
    assert (ours.pointwise_proficiency, ours.overall, ours.veto_f1) == (90.85, 86.55, 89.09)
    # F1 follows from precision and recall up to the paper's own rounding.
    for m in paper.REWARD_MODELS:
        if m.veto_precision and m.veto_recall and m.veto_f1:
            f1 = 2 * m.veto_precision * m.veto_recall / (m.veto_precision + m.veto_recall)
            assert f1 == pytest.approx(m.veto_f1, abs=0.2)
    assert [p.overall for p in paper.POLICIES] == [72.05, 74.20, 73.15, 76.39]


# --- plots ---------------------------------------------------------------------------------------

ys = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf))


@given(st.lists(ys, max_size=300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lines_draw_any_values(values: list[float | None], smooth: bool) -> None:
    series = Series("a <b>", tuple((float(i), y) for i, y in enumerate(values)), smooth=smooth)
    svg = str(plots.lines([series], title="t"))
    assert "nan" not in svg.replace("nan<", "")
    assert "inf" not in svg
    assert _Page(svg).stack == []
    if any(y is not None and math.isfinite(y) for y in values):
        assert "not run" not in svg


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)
)
@settings(max_examples=40, deadline=None)
def test_intervals_lie_inside_the_plot(values: list[tuple[float, float, float]]) -> None:
    rows = [Dot(f"g{i}", v[1], v[0], v[2]) for i, v in enumerate(sorted(t) for t in values)]
    svg = str(plots.intervals(rows, title="t", reference=(0.5, "half")))
    for x in re.findall(r' (?:x1|x2|cx)="([-\d.]+)"', svg):
        assert 0 <= float(x) <= plots.WIDTH
    assert svg.count("<title>") == 1


def test_reliability_says_its_figures() -> None:
    svg = str(
        plots.reliability([Bin(0.2, 0.1, None, None, 4), Bin(0.8, 0.9, 0.7, 1, 9)], title="t")
    )
    assert "Predicted 0.20, observed 0.10 (n = 4)." in svg
    assert svg.count("<circle") == 2


@given(st.lists(st.floats(-3, 2), min_size=1, max_size=80))
@settings(max_examples=40, deadline=None)
def test_dots_draw_every_value_once(values: list[float]) -> None:
    mean = math.fsum(values) / len(values)
    svg = str(plots.dots([("Base", values, Dot("mean", mean, None, None))], title="t", x_label="r"))
    assert svg.count('class="dot c0 soft"') == len(values)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 6))
def test_ticks_enclose_the_range(low: float, width: float, count: int) -> None:
    ticks = plots._ticks(low, low + width, count)
    slack = 1e-6 * width
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= 2 * count + 3


def test_plots_of_nothing_say_not_run() -> None:
    empty = (
        plots.lines([], title="t"),
        plots.intervals([], title="t"),
        plots.reliability([], title="t"),
        plots.dots([], title="t", x_label="r"),
    )
    for svg in empty:
        assert "not run" in svg


def test_tiers_are_named_in_the_methods_order() -> None:
    assert [t for t, _ in tables.TIERS] == [t.value for t in Tier]
