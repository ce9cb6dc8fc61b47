"""All results in a folder as one page and one Markdown file, a table a suite.

Systems stand in one table where suite, data and, for policies, the grader are the same; else they
get a table each, since their figures are not comparable. Beside every table: paired comparisons on
the items that both systems have, permutation tests corrected by Holm over all comparisons of that
table (`comparisons`); figures that others published, in columns marked as theirs; judgments that
failed or were abstained from; what is needed to repeat it. The page has no script and needs no
network. What figures mean is left to the suites.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promedical.bench import comparisons
from promedical.bench.intervals import Bootstrap
from promedical.bench.leaderboard_details import detail_tables
from promedical.bench.measures import Measure, paired
from promedical.bench.metrics import BenchError
from promedical.bench.run_tables import paper_tables
from promedical.bench.tables import (
    Cell,
    Column,
    Row,
    Table,
    decimal,
    difference_cell,
    figure_cell,
    make_table,
    paper_cell,
    per_cent,
)

__all__ = ["Board", "boards", "read_results", "render_html", "render_markdown", "write_leaderboard"]

Json = Mapping[str, Any]
TEMPLATES = Path(__file__).parent / "templates"
NONE = Cell("—", mark="none")


@dataclass(frozen=True)
class Result:
    """One system's result as it was kept."""

    folder: Path
    data: Json
    units: tuple[str, ...]
    measures: Mapping[str, Measure]

    @property
    def name(self) -> str:
        return str(self.data["system"]["name"])


@dataclass(frozen=True)
class Board:
    """Systems that can be compared, and their tables.

    Args:
        title: the suite's, with what else the systems share.
        tables: the leaderboard first.
        more: tables that are folded.
        notes: what has to be known to read them.
        comparisons: as JSON types.
    """

    title: str
    slug: str
    tables: tuple[Table, ...]
    more: tuple[Table, ...]
    notes: tuple[str, ...]
    comparisons: tuple[Json, ...]


def read_results(folder: Path) -> list[Result]:
    """Every result below a folder.

    Raises:
        BenchError: there is none, or one cannot be read.
    """
    found = []
    for path in sorted(folder.glob("*/*/result.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            items = json.loads((path.parent / "items.json").read_text(encoding="utf-8"))
            measures = {n: Measure.from_json(m) for n, m in items["measures"].items()}
            found.append(Result(path.parent, data, tuple(items["units"]), measures))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise BenchError(
            f"{folder}: no results in it, expected SUITE/SYSTEM/result.json from promedical bench "
            "run --out"
        )
    return found


def boards(
    results: Sequence[Result], *, permutations: int = comparisons.PERMUTATIONS
) -> list[Board]:
    """The tables of every group of systems that can be compared."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        data = result.data
        key = (
            data["suite"]["name"],
            data["system"]["kind"],
            json.dumps(data["system"].get("grader")),
            data["data"]["fingerprint"],
        )
        groups.setdefault(key, []).append(result)
    suites = [key[:2] for key in groups]
    return [
        _board(group, suites.count(key[:2]) > 1, permutations, number)
        for number, (key, group) in enumerate(groups.items(), start=1)
    ]


def _board(group: list[Result], several: bool, permutations: int, number: int) -> Board:
    first = group[0].data
    policies = first["system"]["kind"] == "policy"
    title = f"{first['suite']['title']}: {'policies' if policies else 'graders'}"
    if policies and first["system"].get("grader_name"):
        title += f", graded by {first['system']['grader_name']}"
    if several:
        title += f" (data {first['data']['fingerprint'][:8]})"
    names = list(dict.fromkeys(n for r in group for n in r.data["measures"]))
    main = [n for n in names if any(_measure(r, n).get("main") for r in group)]
    ordered = _ordered(group, main)
    found = _comparisons(ordered, main, permutations)
    tables = [
        _figures(f"{title}", _caption(first), ordered, main),
        *_compared(ordered, main, found),
        *_published(ordered, names),
    ]
    rest = [n for n in names if n not in main]
    more = [
        *([_figures("Further figures", "", ordered, rest)] if rest else []),
        *detail_tables(ordered),
        _judged(ordered),
        _repeat(ordered),
    ]
    return Board(
        title,
        f"board-{number}",
        tuple(tables),
        tuple(more),
        tuple(_notes(ordered, main)),
        tuple(found),
    )


def _measure(result: Result, name: str) -> Json:
    found: Json = result.data["measures"].get(name) or {}
    return found


def _ordered(group: list[Result], main: Sequence[str]) -> list[Result]:
    """Best first, by the last of the main figures that every system has, else by name."""
    if not main:
        return sorted(group, key=lambda r: r.name)
    lead = next((n for n in ("overall", *main) if all(_value(r, n) is not None for r in group)),
                main[0])  # fmt: skip
    sign = -1 if _measure(group[0], lead).get("better") != "lower" else 1
    return sorted(group, key=lambda r: (_value(r, lead) is None, sign * (_value(r, lead) or 0)))


def _value(result: Result, name: str) -> float | None:
    value = (_measure(result, name).get("figure") or {}).get("value")
    return None if value is None else float(value)


def _caption(data: Json) -> str:
    rows = data["data"]
    unit = "per cent where a share, with 95 % intervals over instructions"
    rejected = sum(rows["rejected"].values())
    left = f"; {rejected} published rows could not be used" if rejected else ""
    return f"{rows['instructions']} instructions{left}; {unit}."


def _form(measure: Json) -> Any:
    return per_cent if measure.get("percent", True) else decimal


def _figures(title: str, caption: str, group: Sequence[Result], names: Sequence[str]) -> Table:
    columns, notes = [], []
    for name in names:
        m = next(_measure(r, name) for r in group if _measure(r, name))
        less = " (lower is better)" if m["better"] == "lower" else ""
        columns.append(Column(f"{m['label']}{less}", unit=m["figure"]["unit"]))
        if m["note"]:
            notes.append(f"{m['label']}: {m['note']}")
    rows = []
    reasons: dict[str, list[str]] = {}
    for result in group:
        cells = []
        for name in names:
            m = _measure(result, name)
            if not m:
                cells.append(NONE)
                continue
            if m["figure"]["value"] is None:
                reasons.setdefault(str(m["figure"]["reason"]), []).append(
                    f"{result.name}, {m['label']}"
                )
            cells.append(figure_cell(m["figure"], _form(m)))
        muted = result.data["system"]["spec"]["kind"] == "null"
        rows.append(Row(result.name, tuple(cells), muted, result is group[0]))
    notes += [f"— {why}: {'; '.join(who)}." for why, who in reasons.items()]
    return make_table(title, caption, "System", columns, rows, notes)


# --- comparisons ----------------------------------------------------------------------------------


def _comparisons(group: Sequence[Result], main: Sequence[str], permutations: int) -> list[Json]:
    family = {}
    # One order of the units for all: the first system's, then what only others have.
    units = list(dict.fromkeys(u for r in group for u in r.units))
    for a, b in itertools.combinations(group, 2):
        for name in main:
            if name in a.measures and name in b.measures:
                x, y = a.measures[name], b.measures[name]
                if x.weights == y.weights and x.items and y.items:
                    family[a.name, b.name, name] = paired(x, y, units)
    if not family:
        return []
    settings = group[0].data["settings"]
    bootstrap = Bootstrap(len(units), resamples=settings["resamples"], seed=settings["seed"])
    found = comparisons.compare(family, bootstrap, permutations=permutations, seed=settings["seed"])
    return [c.to_json() for c in found]


def _compared(group: Sequence[Result], main: Sequence[str], found: Sequence[Json]) -> list[Table]:
    if not found:
        return []
    by = {(*c["systems"], c["figure"]): c for c in found}
    shown = [n for n in main if any(c["figure"] == n for c in found)]
    measure = {n: next(_measure(r, n) for r in group if _measure(r, n)) for n in shown}
    rows = []
    for a, b in itertools.combinations([r.name for r in group], 2):
        cells = [_difference(by.get((a, b, n)), measure[n]) for n in shown]
        if any(cell is not NONE for cell in cells):
            rows.append(Row(f"{a} − {b}", tuple(cells)))
    family = found[0]["family"]
    drawn = min((c["permutations"] for c in found if not c["exact"]), default=0)
    # The smallest p that can be had at all, after correction.
    few = bool(drawn) and family / (1 + drawn) > comparisons.LEVEL
    notes = [f"{drawn} permutations are too few for {family} comparisons: no p can reach 0.05."]
    return [
        make_table(
            "Is one better than another?",
            "First minus second on the items that both have, with the paired bootstrap’s 95 % "
            "interval and the permutation test’s p after Holm’s correction over all "
            f"{family} comparisons of this table. “Better” means that the interval excludes 0 and "
            "p is at most 0.05.",
            "Systems",
            [Column(measure[n]["label"], unit=measure[n]["figure"]["unit"]) for n in shown],
            rows,
            notes if few else (),
        )
    ]


def _difference(comparison: Json | None, measure: Json) -> Cell:
    if comparison is None:
        return NONE
    difference = {**comparison["difference"], "outcome": comparison["outcome"]}
    cell = difference_cell(difference, _form(measure))
    if measure["better"] == "lower" and cell.mark in ("better", "worse"):
        other = "worse" if cell.mark == "better" else "better"
        cell = replace(cell, text=other, mark=other)
    p = comparison["holm"]
    if p is None or not cell.detail.endswith(")"):
        return cell
    said = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    value, bracket, interval = cell.detail.partition(" (")
    return replace(cell, detail=f"{value}, {said}{bracket}{interval}")


# --- what others published ------------------------------------------------------------------------


def _published(group: Sequence[Result], names: Sequence[str]) -> list[Table]:
    """The first system beside published figures: other models, mostly other data and graders."""
    figures = [p for p in group[0].data["published"] if p["measure"] in names]
    if not figures:
        return []
    systems = list(dict.fromkeys(p["system"] for p in figures))
    measures = [n for n in names if any(p["measure"] == n for p in figures)]
    value = {(p["system"], p["measure"]): p["value"] for p in figures}
    own = [r for r in group if r.data["system"]["spec"]["kind"] != "null"][:3] or group[:1]
    rows = []
    for name in measures:
        m = next(_measure(r, name) for r in group if _measure(r, name))
        scale = 100 if m["percent"] else 1
        ours = [figure_cell(_measure(r, name).get("figure"), _form(m)) for r in own]
        theirs = [
            paper_cell(None if (s, name) not in value else scale * value[s, name]) for s in systems
        ]
        rows.append(Row(m["label"], (*ours, *theirs)))
    columns = [
        *(Column(r.name) for r in own),
        *(Column(f"Published: {s}", paper=True) for s in systems),
    ]
    sources = ", ".join(dict.fromkeys(p["source"] for p in figures))
    return [
        make_table(
            "Beside published figures",
            f"Tinted columns are from {sources}, as printed there, measured with other models and "
            "graders and, where that is its own bench, on other data; none of them is measured "
            "here.",
            "Figure",
            columns,
            rows,
        )
    ]


# --- counts and provenance ------------------------------------------------------------------------


def _judged(group: Sequence[Result]) -> Table:
    rows = []
    for result in group:
        judged = result.data["judgments"]
        answers = result.data["system"].get("answers") or {}
        failures = {**judged["failures"], **(answers.get("failures") or {})}
        unscored = max((m["unscored"] for m in result.data["measures"].values()), default=0)
        cells = [
            Cell(str(judged["scores"] + judged["preferences"])),
            Cell(str(judged["abstained"])),
            Cell(str(judged["failed"] + answers.get("failed", 0))),
            Cell(str(unscored)),
            Cell("; ".join(f"{why} ({n})" for why, n in failures.items()) or "—"),
        ]
        rows.append(Row(result.name, tuple(cells)))
    labels = ("Judgments", "Cannot say", "Failed", "Most unscored in a figure", "Why")
    caption = "A failed judgment is no verdict: it is unscored, and asked again by the next run."
    return make_table(
        "Judgments and failures", caption, "System", [Column(label) for label in labels], rows
    )


def _repeat(group: Sequence[Result]) -> Table:
    rows = []
    for result in group:
        system, origin = result.data["system"], result.data["provenance"]
        spec = system["spec"]
        commit = str(origin.get("commit") or "—")[:10]
        options = ",".join(f"{k}={v}" for k, v in spec["options"].items())
        cells = [
            Cell(f"{spec['kind']}:{spec['target']}" + (f",{options}" if options else "")),
            Cell(str(system.get("ask") or "—")),
            Cell(str((system.get("verdicts") or {}).get("rule") or "—")),
            Cell(f"{commit}{' (changed)' if origin.get('dirty') else ''}"),
            Cell(str(origin["versions"].get("promedical"))),
            Cell(str(origin["seed"])),
            Cell(result.data["data"]["fingerprint"][:12]),
            Cell(str(origin.get("date"))),
        ]
        rows.append(Row(result.name, tuple(cells)))
    labels = ("System", "Asked", "Verdicts", "Commit", "Version", "Seed", "Data", "Date")
    return make_table(
        "To repeat it",
        "Everything is in each system’s result.json: command, versions, recipe, hashes, machine.",
        "Name",
        [Column(label) for label in labels],
        rows,
    )


def _notes(group: Sequence[Result], main: Sequence[str]) -> list[str]:
    notes = list(dict.fromkeys(note for r in group for note in r.data["notes"]))
    human = (group[0].data["details"].get("physicians") or {}).get("macro_f1_by_category")
    if human is not None:
        notes.append(
            f"Physicians against each other on the same rows: macro F1 {per_cent(human)}, mean "
            "over criteria."
        )
    return notes


# --- files ----------------------------------------------------------------------------------------


def render_html(found: Sequence[Board]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    systems = len({row.label for b in found for row in b.tables[0].rows})
    reward_models, policies = paper_tables()
    return environment.get_template("leaderboard.html.jinja").render(
        boards=found, systems=systems, paper=(reward_models, policies)
    )


def render_markdown(found: Sequence[Board]) -> str:
    """The same tables in Markdown."""
    from promedical.figures import markdown

    parts = ["# Bench results"]
    for board in found:
        parts.append(f"## {board.title}")
        parts += [f"- {note}" for note in board.notes]
        parts += [markdown(table) for table in (*board.tables, *board.more)]
    return "\n\n".join(parts) + "\n"


def write_leaderboard(
    folder: Path, out: Path, *, permutations: int = comparisons.PERMUTATIONS
) -> list[Path]:
    """Write report.html, report.md and comparisons.json.

    Raises:
        BenchError: no results, or results that cannot be read.
    """
    found = boards(read_results(folder), permutations=permutations)
    out.mkdir(parents=True, exist_ok=True)
    compared = {board.title: list(board.comparisons) for board in found}
    files = {
        "report.html": render_html(found),
        "report.md": render_markdown(found),
        "comparisons.json": json.dumps(compared, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]
