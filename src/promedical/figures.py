"""Render the figures of README and docs from the committed results, and check that they agree.

A document holds blocks between two comments, and what is between them is rendered:

    <!-- figures:quickstart -->
    …
    <!-- /figures -->

    python -m promedical.figures            rewrite every block
    python -m promedical.figures --check    exit 1 and name what differs
    python -m promedical.figures --take runs/quickstart/results.json quickstart
                                            commit a run's results, without texts, first

No number of a document is typed by hand. Results are `benchmarks/results/NAME.json`, each with its
provenance (`promedical.provenance.check`); a block's name says which renderer makes it. The tables
themselves are those of the report (`promedical.bench.tables`, `run_tables`); what was measured is
left to `benchmarks/` and `promedical quickstart`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promedical import (
    application_tables,
    corpus_tables,
    experiment_tables,
    provenance,
    tree_tables,
)
from promedical.bench import run_tables, tables
from promedical.bench.report import headline, without_texts
from promedical.bench.tables import Cell, Column, Row, Table

__all__ = ["RENDERERS", "FiguresError", "check_results", "main", "markdown", "rendered", "take"]

Json = Mapping[str, Any]

BLOCK = re.compile(
    r"^(?P<open>[ \t]*<!-- figures:(?P<name>[\w.-]+) -->)[ \t]*$"
    r"(?P<body>.*?)"
    r"^(?P<close>[ \t]*<!-- /figures -->)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"^[ \t]*<!-- (?:figures:\S+|/figures) -->[ \t]*$", re.MULTILINE)


class FiguresError(ValueError):
    """A block or result that cannot be rendered; the message names file, block and fault."""


@dataclass(frozen=True)
class Renderer:
    """How a block is made: from which result (None: from no file), by which function."""

    render: Callable[[Json], str]
    result: str | None = None


# --- Markdown ------------------------------------------------------------------------------------


def markdown(table: Table, *, rows: Sequence[str] | None = None) -> str:
    """A table as GitHub Markdown, caption above and notes below.

    Args:
        rows: labels to keep; all of them if None.
    """
    kept = [r for r in table.rows if rows is None or r.label in rows]
    lines = [f"**{_escaped(table.title)}.** {_escaped(table.caption)}".rstrip(), ""]
    heads = [_escaped(table.head), *(_head(c) for c in table.columns)]
    lines.append("| " + " | ".join(heads) + " |")
    lines.append("|" + "|".join([":--", *("--:" for _ in table.columns)]) + "|")
    for row in kept:
        label = f"**{_escaped(row.label)}**" if row.strong else _escaped(row.label)
        lines.append("| " + " | ".join([label, *(_cell(c) for c in row.cells)]) + " |")
    if table.notes:
        lines += ["", "<br>".join(f"<sub>{_escaped(note)}</sub>" for note in table.notes)]
    return "\n".join(lines)


def _head(column: Column) -> str:
    label = _escaped(column.label)
    return (
        label if column.n is None else f"{label}<br>n = {column.n} {_escaped(column.unit)}".strip()
    )


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    if cell.mark == "paper":
        text = f"*{text}*"
    if cell.detail:
        text += f" ({_escaped(cell.detail)})" if "(" not in cell.detail else f", {cell.detail}"
    return text if cell.n is None else f"{text}, n = {cell.n}"


def _escaped(text: str) -> str:
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(character, safe)
    return text.replace("\n", " ")


def _ran(result: Json) -> str:
    """One line on where and when the figures were measured."""
    part: Json = result["provenance"]
    machine: Json = part["machine"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores"
    command = " ".join(map(str, part["command"]))
    dirty = ", with uncommitted changes" if part["dirty"] else ""
    stages: Json = part.get("stage_commits") or {}
    earlier = "".join(
        f" ({name} at {str(commit)[:10]})"
        for name, commit in stages.items()
        if commit != part["commit"]
    )
    return _note(
        f"Measured by `{command}` at commit {str(part['commit'])[:10]}{earlier}{dirty}, "
        f"seed {part['seed']}, on {where}, in {tables.duration(part['wall_time_s'])}."
    )


def _note(text: str) -> str:
    return f"<sub>{text}</sub>"


# --- renderers -----------------------------------------------------------------------------------


def _quickstart(result: Json) -> str:
    bench: Json = result["bench"]
    made = tables.bench_tables(bench)
    parts = [made[name] for name in ("within", "overall", "veto")]
    parts.append(tables.difference_table(bench))
    if bench.get("physicians"):
        parts.append(tables.physicians_table(bench["physicians"]))
        parts += [t for t in (tables.ceiling_table(bench["physicians"]),) if t is not None]
    compared = tables.at(result, "answers", "compared")
    if compared:
        parts.append(run_tables.before_after_table(compared))
    if result.get("stages"):
        parts.append(run_tables.stages_table(result["stages"]))
    return "\n\n".join([*(markdown(table) for table in parts), _ran(result)])


def _summary(result: Json) -> str:
    """The trained model beside those it has to beat, for a README."""
    bench: Json = result["bench"]
    made = tables.bench_tables(bench)
    keep = [
        tables.grader_label(name)
        for name in (
            "explicit",
            "untrained",
            "scalar",
            "length",
            "constant",
            "random",
            "word_overlap",
        )
    ]
    measured = [
        (made[name].columns[i], {r.label: r.cells[i] for r in made[name].rows})
        for name, i in (("overall", 0), ("within", 0), ("within", 1), ("within", 2), ("veto", 2))
    ]
    labels = ("Overall", "Within: proficiency", "Within: excellence", "Within: safety", "Veto F1")
    columns = tuple(
        Column(label, False, column.n, column.unit)
        for label, (column, _) in zip(labels, measured, strict=True)
    )
    rows = tuple(
        Row(row.label, tuple(cells[row.label] for _, cells in measured), False, row.strong)
        for row in made["overall"].rows
        if row.label in keep
    )
    caption = "95 % intervals in brackets."
    table = Table("On the bench, per cent", caption, "Grader", columns, rows)
    return f"{markdown(table)}\n\n{_ran(result)}"


def _output(result: Json) -> str:
    """What the command printed last."""
    return "\n".join(["```text", *headline(result), "```"])


def _tree_packing(result: Json) -> str:
    settings: Json = result["settings"]
    targets = [
        f"- {name}: aimed at {aim:g}, measured {result['reached'][name]:.2f}"
        for name, aim in result["targets"].items()
    ]
    how = (
        f"Medians of {settings['repeats']} repeats, {settings['dtype']}, "
        f"{settings['threads']} threads, {settings['layers']} layers, weights "
        f"{settings['weights']}; {settings['scaled']}."
    )
    parts = [
        markdown(tree_tables.real_table(result)),
        markdown(tree_tables.synthetic_table(result)),
        "\n".join(targets),
    ]
    return "\n\n".join([*parts, _note(_escaped(how)) + "<br>" + _ran(result)])


def _serve(result: Json) -> str:
    soak, through = result["soak"], result["throughput"]
    size: Json = result["settings"]
    named = (
        ("rubric", "a response with its whole rubric is one request"),
        ("together", "all responses to a conversation with the rubric are one request"),
        ("one", "one request for each criterion, each a batch of its own"),
    )
    rows = tuple(
        Row(
            said,
            (
                Cell(f"{through[name]['seconds']:.1f}"),
                Cell(f"{through['judgments'] / through[name]['seconds']:.1f}"),
                Cell(
                    f"{through[name]['latency']['p50_s']:.1f} / "
                    f"{through[name]['latency']['p99_s']:.1f}"
                ),
                Cell(f"{through[name].get('share_of_one', 1):.2f}"),
            ),
            False,
            name == "rubric",
        )
        for name, said in named
        if name in through
    )
    table = Table(
        "Throughput",
        f"{size['model']['throughput']}, {size['threads']} threads, {size['dtype']}; "
        f"{size['throughput_clients']} clients, {through['responses']} responses, "
        f"{through['judgments']} judgments.",
        "Requests",
        (
            Column("Seconds"),
            Column("Judgments/s"),
            Column("p50 / p99 of a response, s"),
            Column("Share of the last row's time"),
        ),
        rows,
    )
    told = (
        f"**Under load.** {size['clients']} clients for {soak['seconds']:.0f} s against "
        f"{size['model']['soak']}: {soak['answered_per_s'] * soak['seconds']:,.0f} requests "
        f"answered, {soak['lost']} lost, {soak['wrong']} wrong (largest difference "
        f"from the offline score {soak['largest_difference']:.0e}); memory grew by "
        f"{soak['memory_mb']['growth']:.1f} MB after the warm-up."
    )
    return f"{told}\n\n{markdown(table)}\n\n{_ran(result)}"


def _scale(_: Json) -> str:
    parts = [markdown(table) for table in experiment_tables.scale_tables()]
    return "\n\n".join(["\n".join(experiment_tables.scale_lines()), *parts])


def _healthbench(result: Json) -> str:
    parts = [markdown(table) for table in experiment_tables.healthbench_tables(result)]
    lines = "\n".join(experiment_tables.healthbench_lines(result))
    return "\n\n".join([lines, *parts, _ran(result)])


def _bootstrap(result: Json) -> str:
    seconds = result["seconds"]
    pairs = sum(result["pairs"].values())
    said = (
        f"{result['resamples']:,} resamples of {pairs:,} pairs from {result['instructions']} "
        f"instructions: accuracy on all and on every tier {seconds['accuracy']:.1f} s, AUROC "
        f"{seconds['auroc']:.1f} s, recall at a precision {seconds['recall_at_precision']:.1f} s, "
        f"area under the risk–coverage curve {seconds['aurc']:.1f} s; a permutation test "
        f"{seconds['permutation']:.1f} s."
    )
    return f"{said}\n\n{_ran(result)}"


def _lines(result: Json, *parts: str | Table) -> str:
    shown = [part if isinstance(part, str) else markdown(part) for part in parts]
    return "\n\n".join([*shown, _ran(result)])


def _policy_compare(result: Json) -> str:
    from promedical.policy.compare_report import tables

    return _lines(result, *tables(result).values())


RENDERERS: dict[str, Renderer] = {
    "quickstart": Renderer(_quickstart, "quickstart"),
    "quickstart_summary": Renderer(_summary, "quickstart"),
    "quickstart_output": Renderer(_output, "quickstart"),
    "quickstart_full": Renderer(_quickstart, "quickstart_full"),
    "quickstart_full_summary": Renderer(_summary, "quickstart_full"),
    "tree_packing": Renderer(_tree_packing, "tree_packing"),
    "tree_packing_real": Renderer(
        lambda result: f"{markdown(tree_tables.real_table(result))}\n\n{_ran(result)}",
        "tree_packing",
    ),
    "tree_packing_grid": Renderer(
        lambda r: _lines(r, tree_tables.grid_table(r)), "tree_packing_grid"
    ),
    "grading": Renderer(lambda r: _lines(r, tree_tables.grading_table(r)), "grading"),
    "serve": Renderer(_serve, "serve"),
    "healthbench": Renderer(_healthbench, "healthbench"),
    "llm_calls": Renderer(
        lambda r: _lines(r, "\n".join(corpus_tables.llm_calls_lines(r))), "llm_calls"
    ),
    "dedup": Renderer(lambda r: _lines(r, *corpus_tables.dedup_tables(r)), "dedup"),
    "corpus_scale": Renderer(
        lambda r: _lines(r, corpus_tables.corpus_scale_table(r)), "corpus_scale"
    ),
    "bootstrap": Renderer(_bootstrap, "bootstrap"),
    "audit": Renderer(lambda r: _lines(r, application_tables.audit_line(r)), "audit"),
    "policy_step": Renderer(
        lambda r: _lines(r, application_tables.policy_step_table(r)), "policy_step"
    ),
    "policy_compare": Renderer(_policy_compare, "policy_compare"),
    "review": Renderer(lambda r: _lines(r, *application_tables.review_tables(r)), "review"),
    "scale": Renderer(_scale),
    "paper": Renderer(
        lambda _: "\n\n".join(markdown(table) for table in run_tables.paper_tables())
    ),
}


# --- documents -----------------------------------------------------------------------------------


def rendered(text: str, results: Path, *, where: str) -> str:
    """A document with every block rendered anew.

    Args:
        text: the document.
        results: folder of the result JSONs.
        where: the document's name, for errors.

    Raises:
        FiguresError: an unknown block, a missing or unusable result, or a marker without its pair.
    """
    paired = 2 * sum(1 for _ in BLOCK.finditer(text))
    if len(MARKER.findall(text)) != paired:
        raise FiguresError(
            f"{where}: a figures comment has no partner, expected <!-- figures:NAME --> … "
            "<!-- /figures -->, each on its own line"
        )

    def block(match: re.Match[str]) -> str:
        body = _body(match["name"], results, where=where)
        return f"{match['open']}\n{body}\n{match['close']}"

    return BLOCK.sub(block, text)


def _body(name: str, results: Path, *, where: str) -> str:
    renderer = RENDERERS.get(name)
    if renderer is None:
        raise FiguresError(
            f"{where}: figures:{name}: unknown, expected one of {', '.join(sorted(RENDERERS))}"
        )
    result: Json = {}
    if renderer.result is not None:
        path = results / f"{renderer.result}.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FiguresError(
                f"{where}: figures:{name}: {path.name} not found, expected a committed result"
            ) from None
        except ValueError as error:
            raise FiguresError(f"{where}: figures:{name}: {path.name}: {error}") from None
    try:
        return renderer.render(result)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FiguresError(
            f"{where}: figures:{name}: {type(error).__name__}: {error}; the result is not of the "
            "expected layout"
        ) from error


def check_results(folder: Path) -> list[str]:
    """What committed results lack, as "file: fault"."""
    faults = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            faults.append(f"{path.name}: not JSON ({error})")
            continue
        if not isinstance(result, dict):
            faults.append(f"{path.name}: found a {type(result).__name__}, expected an object")
            continue
        faults += [f"{path.name}: {fault}" for fault in provenance.check(result)]
    return faults


def take(source: Path, target: Path) -> str:
    """Write a run's results, without texts, where documents are rendered from.

    Raises:
        FiguresError: they cannot be read, or their provenance lacks something.
    """
    try:
        result = without_texts(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise FiguresError(f"{source}: {error}") from None
    faults = provenance.check(result)
    if faults:
        raise FiguresError("\n".join(f"{source}: {fault}" for fault in faults))
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(result), indent=1, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")
    return f"{target.name}: taken from {source}"


def _rounded(value: Any) -> Any:
    """Six significant digits, which is more than any interval warrants."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def documents(root: Path) -> Iterator[Path]:
    """Every Markdown file that may hold figures: at the root and under docs and benchmarks."""
    yield from sorted(root.glob("*.md"))
    for folder in ("docs", "benchmarks"):
        yield from sorted((root / folder).rglob("*.md"))


def _differences(before: str, after: str) -> list[str]:
    """Names of the blocks whose text would change."""
    return [
        old["name"]
        for old, new in zip(BLOCK.finditer(before), BLOCK.finditer(after), strict=True)
        if old["body"] != new["body"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite every block, or check them.

    Returns:
        0; 1 if something differs, is missing or cannot be rendered.
    """
    parser = argparse.ArgumentParser(prog="python -m promedical.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    parser.add_argument(
        "--take", nargs=2, metavar=("RESULTS", "NAME"), help="take a run's results as NAME"
    )
    parser.add_argument("--root", type=Path, help="the project's folder")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root or provenance.project_root() or Path.cwd()
    results = root / "benchmarks" / "results"
    if arguments.take:
        try:
            print(take(Path(arguments.take[0]), results / f"{arguments.take[1]}.json"))
        except FiguresError as error:
            print(error, file=sys.stderr)
            return 2
    faults = check_results(results)
    for path in documents(root):
        name = path.relative_to(root).as_posix()
        before = path.read_text(encoding="utf-8")
        try:
            after = rendered(before, results, where=name)
        except FiguresError as error:
            faults.append(str(error))
            continue
        changed = _differences(before, after)
        if arguments.check:
            faults += [f"{name}: figures:{block} differs from its result" for block in changed]
        elif changed:
            path.write_text(after, encoding="utf-8")
            print(f"{name}: {', '.join(changed)}")
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults and arguments.check:
        print("make figures renders the documents anew", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
