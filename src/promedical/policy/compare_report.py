"""What a comparison of policies shows: tables, one plot, and whether the aims were reached.

Made from `results.json` alone (`compare.results`), for the page, for Markdown files and for the
documents. Figures are those of `compare_measures`, rounded once; nothing here is measured.

Left to others: how tables and plots are drawn (`bench.tables`, `bench.plots`, `figures.markdown`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from promedical.bench import plots
from promedical.bench.plots import Series
from promedical.bench.tables import (
    Cell,
    Column,
    Row,
    Table,
    decimal,
    difference_cell,
    duration,
    figure_cell,
    make_table,
    per_cent,
    span,
)
from promedical.policy.compare_data import left_out_lines
from promedical.policy.compare_measures import METRICS, TESTED
from promedical.policy.compare_recipe import ASKS, JUDGES, SYSTEMS

__all__ = ["aims", "curves", "headline", "tables", "write_report"]

Json = Mapping[str, Any]

HERE = Path(__file__).parent
TEMPLATES = (HERE / "templates", HERE.parent / "bench" / "templates")
FORMS = {
    "reward": decimal,
    "s1": per_cent,
    "soft_s1": per_cent,
    "s2": decimal,
    "s3": decimal,
    "veto_rate": per_cent,
    "expected_s3": decimal,
    "preferred": per_cent,
}
SHOWN = ("s1", "soft_s1", "s2", "veto_rate", "expected_s3", "preferred", "reward")
HEADS = {name: f"{said}, %" if FORMS[name] is per_cent else said for name, said in METRICS.items()}
# What the issue asks for: (what is claimed, the other system, figure, what counts as reached).
AIMS = (
    ("ProMedical GRPO is ahead of the base in S1", "base", "s1", ("better",)),
    ("ProMedical GRPO is ahead of implicit scalar GRPO in S1", "scalar", "s1", ("better",)),
    (
        "ProMedical GRPO has no more answers with a violation than the base",
        "base",
        "veto_rate",
        ("better", "not distinguished"),
    ),
    (
        "ProMedical GRPO has no more answers with a violation than implicit scalar GRPO",
        "scalar",
        "veto_rate",
        ("better", "not distinguished"),
    ),
    ("without veto, more answers have a violation", "no_veto", "veto_rate", ("better",)),
)


# --- tables ---------------------------------------------------------------------------------------


def tables(result: Json) -> dict[str, str]:
    """Every table of a comparison as Markdown, by name, for the documents."""
    from promedical.figures import markdown

    made = {name: markdown(table) for name, table in _tables(result).items()}
    return {"aims": "\n".join(f"- {line}" for line in aims(result)), **made}


def _tables(result: Json) -> dict[str, Table]:
    judges = list(dict.fromkeys(j for found in result["systems"].values() for j in found))
    made = {"systems": _systems_table(result, "gold")}
    if result["comparisons"].get("gold"):
        made["differences"] = _differences_table(result, "gold")
    for judge in judges:
        if judge != "gold":
            made[f"systems_{judge}"] = _systems_table(result, judge)
    made["seeds"] = _seeds_table(result)
    if result["curves"]:
        made["training"] = _training_table(result)
    made["judges"] = _judges_table(result)
    return made


def _label(name: str) -> str:
    return SYSTEMS[name].label if name in SYSTEMS else name.replace("_", " ")


def _row_label(result: Json, name: str) -> str:
    seeds = len([a for a in result["answers"].get(name, ()) if a["seed"] is not None])
    return _label(name) + (f" ({seeds} seed{'' if seeds == 1 else 's'})" if seeds else "")


def _systems_table(result: Json, judge: str) -> Table:
    rows = []
    for name, found in result["systems"].items():
        if judge in found:
            figures = found[judge]["figures"]
            cells = tuple(figure_cell(figures[m], FORMS[m]) for m in SHOWN)
            if name == "base":  # against itself: ½ by definition, no measurement
                cells = tuple(
                    Cell("—", mark="none") if m == "preferred" else c
                    for m, c in zip(SHOWN, cells, strict=True)
                )
            rows.append(
                Row(
                    _row_label(result, name),
                    cells,
                    muted=name == "base",
                    strong=name == result["reference"],
                )
            )
    columns = [Column(HEADS[m], unit="instructions") for m in SHOWN]
    by = JUDGES[judge].lower()
    point = {
        "reward": "the operating point of the reward",
        "audit": "the audit operating point, where what is not cleared counts as a violation",
    }[_point(result, judge)]
    caption = (
        f"Answers to held-out instructions, as the {by} sees them at {point}. Means over "
        "instructions of the mean over seeds, 95 % intervals over instructions."
    )
    notes = [
        "Soft S1 and expected violations are sums of calibrated probabilities, so they see what "
        "thresholds hide. Preferred: share of instructions with the better answer than the base by "
        "S3, then S1, then S2, ties and undecided ½.",
        *_counts(result, judge),
    ]
    title = f"Policies, by the {by}"
    return make_table(title, caption, "System", columns, rows, notes)


def _counts(result: Json, judge: str) -> Iterator[str]:
    """What could not be graded, and what decoding did."""
    ungraded = {
        name: found[judge]["ungraded"]
        for name, found in result["systems"].items()
        if judge in found and found[judge]["ungraded"]
    }
    said = ", ".join(f"{_label(name)} {n}" for name, n in ungraded.items())
    yield f"Answers that could not be graded: {said or 'none'}."
    cut = sum(part["cut"] for parts in result["answers"].values() for part in parts)
    total = sum(len(part["tokens"]) for parts in result["answers"].values() for part in parts)
    yield f"{cut} of {total} answers were cut at {result['settings']['answer_tokens']} tokens."


def _differences_table(result: Json, judge: str) -> Table:
    found = result["comparisons"][judge]
    others = list(dict.fromkeys(c["systems"][1] for c in found))
    by_key = {(c["systems"][1], c["figure"]): c for c in found}
    rows = []
    for name in others:
        cells = []
        for metric in TESTED:
            c = by_key.get((name, metric))
            shown = None if c is None else {**c["difference"], "outcome": c["outcome"]}
            cells.append(difference_cell(shown, FORMS[metric]))
        rows.append(Row(f"than {_label(name)}", tuple(cells)))
    reference = _label(result["reference"])
    family = found[0]["family"] if found else 0
    caption = (
        f"{reference} minus the other system, paired over the instructions; “better” means better, "
        "in violations fewer."
    )
    notes = [
        "“Better” and “worse”: the 95 % interval excludes 0 and Holm’s p over the "
        f"{family} tests of this table is at most 0.05."
    ]
    columns = [Column(HEADS[m].removesuffix(", %"), unit="instructions") for m in TESTED]
    return make_table(f"{reference} against the others", caption, reference, columns, rows, notes)


def _seeds_table(result: Json) -> Table:
    shown = ("s1", "soft_s1", "veto_rate", "preferred")
    rows = []
    for name, found in result["systems"].items():
        if name == "base" or "gold" not in found:
            continue
        cells = []
        for metric in shown:
            by_seed = found["gold"]["figures"][metric]["seeds"]
            form = FORMS[metric]
            cells.append(
                Cell(" / ".join(form(v) for v in by_seed.values()) or "—")
                if by_seed
                else Cell("—", mark="none")
            )
        rows.append(Row(_label(name), tuple(cells)))
    return Table(
        "Seed by seed",
        "The gold judge’s figures of every trained policy, in the order of the seeds: how far "
        "apart they are is chance that the intervals do not hold.",
        "System",
        tuple(Column(HEADS[m]) for m in shown),
        tuple(rows),
    )


def _training_table(result: Json) -> Table:
    rows = []
    alarmed = any(run.get("alarms") for run in result["curves"])
    for name in result["labels"]:
        runs = [c for c in result["curves"] if c["system"] == name]
        if not runs:
            continue
        steps = "/".join(str(n) for n in dict.fromkeys(run["steps"] for run in runs))
        seconds = math.fsum(run["seconds"] for run in runs) / len(runs)
        curve = [point for run in runs for point in run["curve"]]
        last = [run["curve"][-1] for run in runs if run["curve"]]
        rows.append(
            Row(
                _label(name),
                (
                    Cell(steps),
                    Cell(duration(seconds)),
                    _mean_cell(last, "kl", "{:.4f}"),
                    _mean_cell(curve, "no_signal", None),
                    _mean_cell(curve, "veto_variance_share", None),
                    _mean_cell(curve, "veto_rate", None),
                    *([_alarms_cell(runs)] if alarmed else []),
                ),
            )
        )
    columns = (
        Column("Steps"),
        Column("Time a run"),
        Column("KL at the end"),
        Column("Groups without signal, %"),
        Column("S3’s share of the variance, %"),
        Column("Training answers with a violation, %"),
        *([Column("Alarms")] if alarmed else []),
    )
    caption = "Means over seeds (and steps, for the last three), as the training judge saw it."
    if alarmed:
        caption = caption.replace("the last three", "the next three") + (
            " Alarms: runs in which the gold judge's watch raised one, and the first step of any."
        )
    return Table("Training", caption, "System", columns, tuple(rows))


def _alarms_cell(runs: Sequence[Json]) -> Cell:
    """In how many runs there was an alarm, and how early."""
    steps = [min(a["step"] for a in run["alarms"]) for run in runs if run.get("alarms")]
    if not steps:
        return Cell("none")
    return Cell(f"{len(steps)} of {len(runs)} runs, from step {min(steps)}")


def _mean_cell(points: Sequence[Json], key: str, form: str | None) -> Cell:
    known = [p[key] for p in points if p.get(key) is not None]
    if not known:
        return Cell("—", mark="none")
    value = math.fsum(known) / len(known)
    return Cell(per_cent(value) if form is None else form.format(value).replace("-", "−"))


def _judges_table(result: Json) -> Table:
    rows = []
    for name, found in result["judges"].items():
        measured = found.get("measured") or {}
        counts = found.get("counts") or {}
        made = "checkpoint given" if found["given"] else f"{counts.get('trees', 0)} instructions"
        cells = [Cell(made)]
        for key in ("audit_veto_recall_not_cleared", "reward_veto_recall", "reward_clean_flagged"):
            value = measured.get(key)
            cells.append(Cell("—", mark="none") if value is None else Cell(per_cent(value)))
        rows.append(Row(JUDGES[name], tuple(cells)))
    columns = (
        Column("Trained on"),
        Column("Veto recall, audit, %"),
        Column("Veto recall, reward, %"),
        Column("Clean answers flagged, %"),
    )
    caption = (
        "On the calibration side, where their thresholds were set. The gold judge has other data "
        "and another seed than the training judges."
    )
    return Table("Judges", caption, "Judge", columns, tuple(rows))


# --- sentences ------------------------------------------------------------------------------------


def aims(result: Json) -> list[str]:
    """What was to be reached and whether it was, with the difference that says so."""
    by_key = {(c["systems"][1], c["figure"]): c for c in result["comparisons"].get("gold", ())}
    lines = []
    for claim, other, figure, reached in AIMS:
        if result["reference"] != "promedical" or other not in result["systems"]:
            continue
        found = by_key.get((other, figure))
        outcome = None if found is None else found["outcome"]
        if found is None or outcome is None:
            lines.append(f"{claim}: not measured.")
            continue
        blind = _blind(result, other) if figure == "veto_rate" else None
        if blind is not None:
            instead = by_key.get((other, "expected_s3"))
            said = "not measured" if instead is None else _difference(instead)
            lines.append(
                f"{claim}: cannot be tested: {blind}. What to read is expected violations "
                f"(fewer are better): {said}."
            )
            continue
        yes = "reached" if outcome in reached else "not reached"
        if figure == "veto_rate" and yes == "reached" and outcome == "not distinguished":
            yes = "not refuted"  # no difference was found, which is no proof that there is none
        said = _difference(found)
        lines.append(f"{claim}: {yes}. {said[0].upper()}{said[1:]}.")
    return lines


def _difference(found: Json) -> str:
    """A paired difference with its interval and p, in words."""
    form, difference = FORMS[found["figure"]], found["difference"]
    value, low, high = (_signed(difference[name], form) for name in ("value", "low", "high"))
    points = " points" if form is per_cent else ""
    p = _p(found["holm"])
    return f"difference {value}{points}, 95 % interval {low} to {high}, Holm’s p {p}"


def _point(result: Json, judge: str) -> str:
    """Whose thresholds a judge decided by; older results, which do not say, by the reward's."""
    settings = result["settings"].get("judges", {})
    return str(settings.get("gold_point", "reward")) if judge == "gold" else "reward"


def _recall(result: Json, judge: str) -> float | None:
    """Recall of violations on the calibration side, at the point that the judge was used at."""
    measured = result["judges"].get(judge, {}).get("measured") or {}
    name = {"reward": "reward_veto_recall", "audit": "audit_veto_recall_not_cleared"}
    found: float | None = measured.get(name[_point(result, judge)])
    return found


def _blind(result: Json, other: str) -> str | None:
    """Why the gold judge's counts of violations cannot tell two systems apart, or None."""
    recall = _recall(result, "gold")
    if recall is None:
        return "the gold judge's recall of violations at this point is not known"
    if recall == 0:
        return "the gold judge found none of the calibration side's violations at this point"
    rates = [
        result["systems"][name]["gold"]["figures"]["veto_rate"]["value"]
        for name in (result["reference"], other)
    ]
    if rates == [1.0, 1.0]:
        return "the gold judge clears no answer of either at this point"
    return None


def _signed(value: float | None, form: Any) -> str:
    if value is None:
        return "—"
    text: str = form(value)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def _p(value: float | None) -> str:
    if value is None:
        return "—"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def warnings(result: Json) -> list[str]:
    """What a reader has to know before the figures."""
    said = []
    if result["missing"]:
        said.append(f"Not finished: {len(result['missing'])} stages are missing.")
    left_out = left_out_lines(result["data"].get("left_out", {}))
    said += [f"{line[0].upper()}{line[1:]}." for line in left_out]
    for name in result["judges"]:
        recall = _recall(result, name)
        if recall is not None and recall < 0.5:
            point = "audit operating point"
            if _point(result, name) == "reward":
                point = "operating point of the reward"
            said.append(
                f"{JUDGES[name]}: veto recall {per_cent(recall)} % at the {point}, so it misses "
                "most violations; counts of violations say little."
            )
    return said


def headline(result: Json) -> list[str]:
    """A few lines for the terminal."""
    lines = []
    for name, found in result["systems"].items():
        figures = found.get("gold", {}).get("figures")
        if figures is None:
            continue
        parts = []
        seen = ("veto_rate", "violations")
        if not _recall(result, "gold"):
            seen = ("expected_s3", "expected violations")
        for metric, said in (("s1", "S1"), seen, ("preferred", "preferred")):
            figure = figures[metric]
            if figure["value"] is None or (name == "base" and metric == "preferred"):
                continue
            form = FORMS[metric]
            unit = " %" if form is per_cent else ""
            parts.append(f"{said} {form(figure['value'])}{unit} ({span(figure, form)})")
        lines.append(f"{_label(name):<52} {'  '.join(parts)}")
    return [*lines, *aims(result), *warnings(result)]


# --- the plot -------------------------------------------------------------------------------------

PANELS = (
    ("curve", "reward", "Training reward", "Each system’s own reward; a scalar judge’s score has "
     "another unit and is not drawn."),
    ("gold", "reward", "Gold judge: reward", "Fixed held-out questions, the gold judge’s reward."),
    ("gold", "s1", "Gold judge: S1", "The same answers."),
    ("curve", "veto_rate", "Training: answers with a violation", "As the training judge counts."),
    ("gold", "veto_rate", "Gold judge: answers with a violation", "As the gold judge counts."),
)  # fmt: skip


def curves(result: Json) -> list[tuple[str, str, Markup]]:
    """(title, note, drawing) of each panel: means over seeds, at most four systems a panel."""
    trained = [n for n in result["labels"] if any(c["system"] == n for c in result["curves"])]
    made = []
    for kind, key, title, note in PANELS:
        shown = [n for n in trained if (kind, key) != ("curve", "reward") or not _scalar(n)]
        found = {name: _curve(result, name, kind, key) for name in shown}
        drawn = [name for name, points in found.items() if points]
        for start in range(0, len(drawn), 4):
            chosen = drawn[start : start + 4]
            svg = plots.lines(
                [
                    Series(_short(name), tuple(found[name]), colour=i)
                    for i, name in enumerate(chosen)
                ],
                title=title,
            )
            made.append((title, note, svg))
    return made


def _scalar(name: str) -> bool:
    return name in SYSTEMS and SYSTEMS[name].judge in ASKS


def _short(name: str) -> str:
    return {"scalar": "implicit scalar", "promedical": "ProMedical", "rloo": "RLOO"}.get(
        name, name.replace("_", " ")
    )


def _curve(result: Json, name: str, kind: str, key: str) -> list[tuple[float, float | None]]:
    """Mean over the seeds at every step; a step that no seed knows is left out."""
    found: dict[int, list[float]] = {}
    for run in result["curves"]:
        if run["system"] == name:
            for point in run.get(kind) or ():
                if point.get(key) is not None:
                    found.setdefault(int(point["step"]), []).append(float(point[key]))
    return [(step, math.fsum(v) / len(v)) for step, v in sorted(found.items())]


def curves_svg(result: Json) -> str:
    """All panels in one drawing, two side by side, which stands alone in light and in dark."""
    panels = curves(result)
    if not panels:
        panels = [("Training", "", plots.lines([], title="Training"))]
    width, gap, head = 360, 24, 24
    sizes = [int(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1]) for _, _, svg in panels]  # type: ignore[index]
    parts, top = [], 8
    for start in range(0, len(panels), 2):
        pair = list(zip(panels[start : start + 2], sizes[start : start + 2], strict=True))
        for column, ((title, _, svg), height) in enumerate(pair):
            left = column * (width + gap) + 8
            inner = str(svg).replace(
                '<svg class="plot"',
                f'<svg class="plot" x="{left}" y="{top + head}" width="{width}" height="{height}"',
                1,
            )
            name = Markup.escape(title)
            parts.append(f'<text class="head" x="{left + 2}" y="{top + 15}">{name}</text>{inner}')
        top += head + max(height for _, height in pair) + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + gap + 16} {top}" '
        f'role="img" aria-label="Training of the policies">\n<style>{_style()}</style>\n'
        f'<rect width="100%" height="100%" fill="var(--card)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _style() -> str:
    """The page's colours and the rules of its plots."""
    css = (HERE.parent / "bench" / "templates" / "report.css").read_text(encoding="utf-8")
    variables = re.findall(r"--[\w-]+:\s*#[0-9a-fA-F]+;", css.partition("@media")[0])
    dark = css.partition("prefers-color-scheme: dark")[2].partition("}")[0]
    in_dark = re.findall(r"--[\w-]+:\s*#[0-9a-fA-F]+;", dark)
    rules = [line.strip() for line in css.splitlines() if line.strip().startswith(".plot ")]
    return (
        f"svg {{ {' '.join(variables)} font-family: system-ui, sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {' '.join(in_dark)} }} }} "
        ".head { font-size: 13px; font-weight: 600; fill: var(--ink); } " + " ".join(rules)
    )


# --- files ----------------------------------------------------------------------------------------


def write_report(folder: str | Path, result: Json) -> None:
    """Write `report.html`, `tables.md` and `curves.svg`."""
    folder = Path(folder)
    made = tables(result)
    text = ["# Policies compared", made.pop("aims"), *warnings(result), *made.values()]
    _write(folder / "tables.md", "\n\n".join(text) + "\n")
    _write(folder / "curves.svg", curves_svg(result))
    _write(folder / "report.html", _page(result))


def _page(result: Json) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = _tables(result)
    main = [made.pop(name) for name in ("systems", "differences") if name in made]
    return environment.get_template("compare.html.jinja").render(
        systems=len(result["systems"]),
        seeds=len(result["settings"]["seeds"]),
        instructions=result["data"]["sides"]["bench"]["instructions"],
        aims=aims(result),
        warnings=warnings(result),
        main=main,
        more=list(made.values()),
        plots=curves(result),
        curves_note="Means over the seeds.",
    )


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
