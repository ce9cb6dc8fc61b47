"""Tables of `docs/corpus.md`: what the corpus benchmarks measured.

They come from the JSON that `benchmarks/{llm_calls,dedup,corpus_scale}.py` leave. Markdown is left
to `promedical.figures`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from promedical.bench.tables import Cell, Column, Row, Table

__all__ = ["corpus_scale_table", "dedup_tables", "llm_calls_lines"]

Json = Mapping[str, Any]

SYSTEMS = {
    "guarded": "Ours, with the guard",
    "unguarded": "Ours, without it",
    "semhash": "SemHash",
    "minhash": "MinHash LSH",
}


def llm_calls_lines(result: Json) -> list[str]:
    """Rate of calls and replay of a ledger, in words."""
    rate, replay, settings = result["rate"], result["replay"], result["settings"]
    cpu = statistics.median(r["cpu_ms_a_call"] for r in rate["repetitions"])
    return [
        f"**Calls.** {settings['calls']:,} calls to a server that answers after "
        f"{1000 * settings['latency']:.0f} ms, {settings['slots']} slots: "
        f"{_percent(rate['share_of_ideal'])} of the ideal {rate['ideal_calls_per_s']:.0f} calls/s "
        f"(median of {settings['repetitions']}; aim "
        f"{_percent(result['targets']['share of the ideal rate, at least'])}), "
        f"{cpu:.1f} ms of computing a call. The machine's load was "
        f"{result['load_at_start']:.1f} when it began.",
        "",
        f"**Replay.** {replay['entries']:,} calls answered by a ledger of "
        f"{replay['ledger_mb']:.0f} MB in {replay['replay_seconds']:.0f} s "
        f"(aim {result['targets']['replay at most, s']:.0f} s).",
    ]


def dedup_tables(result: Json) -> list[Table]:
    """Found, lost, time and memory: of ours on all rows, then beside the peers, then by edit."""
    whole = result["systems"]["guarded"]
    aims = result["targets"]
    rows = [_dedup_row("guarded", whole)]
    rows += [
        _dedup_row(name, found)
        for name, found in result["side_by_side"].items()
        if found["cost"]["rows"] != whole["cost"]["rows"] or name != "guarded"
    ]
    columns = (
        Column("Rows"),
        Column("Found"),
        Column("Lost"),
        Column("Questions merged"),
        Column("Minutes (computing)"),
        Column("Memory, GB"),
    )
    note = (
        "Found: rows that ask the same and end with their question. Lost: rows whose meaning was "
        "changed and that end with another meaning. Questions merged: distinct questions of the "
        f"file that end with another. Aims: found {_percent(aims['found at least'])}, lost "
        f"{_percent(aims['lost at most'], 1)} at most, {aims['minutes at most']:.0f} minutes, "
        f"{aims['memory at most, GB']:.0f} GB."
    )
    systems = Table(
        "De-duplication",
        "The half of the families on which nothing was chosen.",
        "System",
        columns,
        tuple(rows),
        (note,),
    )
    return [systems, _by_edit(result)]


def _dedup_row(name: str, found: Json) -> Row:
    cost, report = found["cost"], found["report"]
    cells = (
        Cell(f"{cost['rows']:,}"),
        Cell(_percent(report["found"]["all"]["share"], 1)),
        Cell(_percent(report["lost"]["all"]["share"], 2)),
        Cell(f"{report['base']['merged']:,} of {report['base']['distinct']:,}"),
        Cell(f"{cost['minutes']:.1f} ({cost['cpu_minutes']:.1f})"),
        Cell(f"{cost['memory_gb']:.1f}"),
    )
    return Row(SYSTEMS.get(name, name), cells, False, name == "guarded")


def _by_edit(result: Json) -> Table:
    """What the guard does to each edit: on all rows, and with and without it on the same fewer."""
    whole = result["systems"]["guarded"]["report"]
    few = {n: result["side_by_side"].get(n, {}).get("report") for n in ("guarded", "unguarded")}

    def cell(report: Json | None, said: str, edit: str) -> Cell:
        found = None if report is None else report[said].get(edit)
        return Cell("—" if found is None else _percent(found["share"], 2))

    rows = [
        Row(
            f"{edit}: {said}",
            (
                Cell(f"{counts['rows']:,}"),
                Cell(_percent(counts["share"], 2)),
                cell(few["guarded"], said, edit),
                cell(few["unguarded"], said, edit),
            ),
            False,
            False,
        )
        for said in ("found", "lost")
        for edit, counts in whole[said].items()
        if edit != "all"
    ]
    return Table(
        "By edit",
        "Share of the rows of each edit; with and without the guard on the same fewer rows.",
        "Edit",
        (Column("Rows"), Column("All rows"), Column("Fewer, guarded"), Column("Fewer, unguarded")),
        tuple(rows),
    )


def corpus_scale_table(result: Json) -> Table:
    """The way of a file of instructions through the stages that ask no model."""
    rows = []
    for stage in result["funnel"]:
        dropped = ", ".join(
            f"{n:,} {name.replace('_', ' ')}" for name, n in stage["reasons"].items()
        )
        cells = (
            Cell(f"{stage['rows_in']:,}"),
            Cell(dropped or "—"),
            Cell(f"{stage['rows_out']:,}"),
            Cell(f"{stage['seconds']:,.0f}"),
        )
        rows.append(Row(stage["stage"], cells, False, False))
    languages = ", ".join(
        f"{n:,} {name}" for name, n in result["reports"]["ingest"]["languages"].items()
    )
    sides = ", ".join(
        f"{side['rows']:,} {name}" for name, side in result["reports"]["splits"]["sides"].items()
    )
    return Table(
        "A file of real instructions",
        f"Languages: {languages}. Sides: {sides}. Peak memory {result['peak_memory_gb']:.1f} GB.",
        "Stage",
        (Column("Rows in"), Column("Dropped"), Column("Rows out"), Column("Seconds")),
        tuple(rows),
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
