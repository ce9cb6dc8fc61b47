"""The bench's and the physicians' tables, from results JSON, for the page and the documents.

A `Table` holds texts only, so that HTML (`report`) and Markdown (`promedical.figures`) show the
same figures, rounded once. Every measured cell carries its 95 % interval and its n; an undefined
figure is "—" with the reason in the table's notes. Columns that hold the paper's figures are marked
as the paper's. The layout of the JSON is that of `evaluate`; what a figure means is in `metrics`.
The tables of the rest of a run are in `run_tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promedical.bench import paper
from promedical.rubric import Tier

__all__ = [
    "Cell",
    "Column",
    "Row",
    "Table",
    "agreement_table",
    "at",
    "bench_tables",
    "ceiling_table",
    "decimal",
    "difference_table",
    "duration",
    "figure_cell",
    "grader_label",
    "grader_order",
    "make_table",
    "paper_cell",
    "per_cent",
    "physicians_table",
    "span",
]

Json = Mapping[str, Any]
Formatter = Callable[[float], str]

NONE = "—"
TIERS = (
    (Tier.PROFICIENCY.value, "Proficiency"),
    (Tier.EXCELLENCE.value, "Excellence"),
    (Tier.VETO.value, "Safety"),
)
LABELS = {
    "explicit": "Trained",
    "scalar": "Scalar baseline",
    "untrained": "Untrained",
    "criterion_alone": "Criterion text alone",
    "response_alone": "Answer alone",
    "length": "Length",
    "position": "Position",
    "constant": "Constant",
    "random": "Random",
    "word_overlap": "Word overlap",
    "static_embedding": "Static embeddings",
}
TRAINED = ("explicit", "scalar", "untrained")
# Which of the paper's rows stands beside which of our graders.
PAPER_ROWS = {
    "explicit": "ProMedical-RM (Qwen3-8B)",
    "untrained": "Qwen3-8B, untrained",
}
OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "not distinguished": "not distinguishable",
    "not distinguishable": "not distinguishable",
}


@dataclass(frozen=True)
class Cell:
    """One cell: a text, what stands small beside it, its n, and how it is marked.

    Args:
        mark: "" or "better", "worse", "same", "paper", "none".
    """

    text: str
    detail: str = ""
    n: int | None = None
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head; `n` is set where all its cells have the same."""

    label: str
    paper: bool = False
    n: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """A row's head and cells; `muted` for baselines that only serve to compare with."""

    label: str
    cells: tuple[Cell, ...]
    muted: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption and notes."""

    title: str
    caption: str
    head: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def grader_label(name: str) -> str:
    """A grader's name as a person reads it."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


def grader_order(names: Sequence[str], reference: str) -> list[str]:
    """The reference first, then trained baselines, then nulls as they were given."""
    rank = {reference: -1} | {name: i for i, name in enumerate(TRAINED) if name != reference}
    return sorted(names, key=lambda name: rank.get(name, len(TRAINED)))


def per_cent(value: float) -> str:
    """0.7123 → "71.2"."""
    return f"{100 * value:.1f}".replace("-", "−")


def decimal(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, as one says it."""
    if seconds is None:
        return NONE
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def span(figure: Json, form: Formatter = per_cent) -> str:
    """A figure's interval; with "to" where an end is negative, as −1–0 cannot be read."""
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None:
        return ""
    return f"{form(low)}{'–' if low >= 0 else ' to '}{form(high)}"


def figure_cell(figure: Json | None, form: Formatter = per_cent) -> Cell:
    """A figure as a cell: value, interval, n."""
    if not figure or figure.get("value") is None:
        return Cell(NONE, mark="none", n=None)
    return Cell(form(figure["value"]), span(figure, form), figure.get("n"))


def difference_cell(figure: Json | None, form: Formatter = per_cent) -> Cell:
    """A paired difference as a cell: the word first, then the value and its interval."""
    if not figure or figure.get("value") is None:
        return Cell(NONE, mark="none")
    outcome = OUTCOMES.get(str(figure.get("outcome") or figure.get("verdict")), "")
    mark = {"better": "better", "worse": "worse"}.get(outcome, "same")
    value = figure["value"]
    low, high = figure.get("low"), figure.get("high")
    detail = _signed(value, form)
    if low is not None and high is not None:
        detail += f" ({_signed(low, form)} to {_signed(high, form)})"
    return Cell(outcome or "no interval", detail, figure.get("n"), mark)


def _signed(value: float, form: Formatter) -> str:
    text = form(value)
    if not text.strip("−0."):
        return text.removeprefix("−")  # rounds to zero
    return f"+{text}" if value > 0 else text


def paper_cell(value: float | None) -> Cell:
    """One of the paper's figures, as printed there."""
    return Cell(NONE, mark="none") if value is None else Cell(f"{value:.2f}", mark="paper")


def make_table(
    title: str,
    caption: str,
    head: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
) -> Table:
    """A table; an n that a whole column, or else a whole row, shares moves into its head."""
    shared: list[Column] = []
    for i, column in enumerate(columns):
        numbers = {row.cells[i].n for row in rows if row.cells[i].mark != "none"} - {None}
        one = numbers.pop() if len(numbers) == 1 else None
        shared.append(Column(column.label, column.paper, one, column.unit))
    cleaned = [
        Row(
            row.label if (n := _shared_n(row, shared)) is None else f"{row.label} (n = {n})",
            tuple(
                Cell(c.text, c.detail, None, c.mark)
                if n is not None or shared[i].n is not None
                else c
                for i, c in enumerate(row.cells)
            ),
            row.muted,
            row.strong,
        )
        for row in rows
    ]
    return Table(title, caption, head, tuple(shared), tuple(cleaned), tuple(notes))


def _shared_n(row: Row, columns: Sequence[Column]) -> int | None:
    open_cells = [c for c, column in zip(row.cells, columns, strict=True) if column.n is None]
    numbers = {c.n for c in open_cells if c.mark not in ("none", "paper")}
    return numbers.pop() if len(open_cells) > 1 and len(numbers) == 1 else None


def _reasons(named: Sequence[tuple[str, Json | None]]) -> list[str]:
    """Why figures are undefined, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, figure in named:
        if figure is not None and figure.get("value") is None:
            reason = str(figure.get("reason") or figure.get("note") or "undefined")
            who = reasons.setdefault(reason, [])
            if name not in who:
                who.append(name)
    return [f"{NONE} {reason}: {', '.join(who)}." for reason, who in reasons.items()]


# --- the bench -----------------------------------------------------------------------------------


def _paper_value(grader: str, field: str) -> float | None:
    wanted = PAPER_ROWS.get(grader)
    return next((getattr(m, field) for m in paper.REWARD_MODELS if m.name == wanted), None)


def at(data: Json | None, *path: str) -> Any:
    """What lies at a path of keys, None where the path ends early."""
    found: Any = data
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


@dataclass(frozen=True)
class _Measure:
    """A column of a bench table: where its figure is, or which of the paper's fields it shows."""

    label: str
    path: tuple[str, ...] = ()
    paper: str = ""
    form: Formatter = per_cent
    unit: str = ""


def _bench_table(bench: Json, title: str, caption: str, measures: Sequence[_Measure]) -> Table:
    graders: Json = bench["graders"]
    reference = str(at(bench, "settings", "reference") or "explicit")
    rows, undefined = [], []
    for name in grader_order(list(graders), reference):
        cells = []
        for m in measures:
            if m.paper:
                cells.append(paper_cell(_paper_value(name, m.paper)))
                continue
            figure = at(graders[name], *m.path)
            if isinstance(figure, (int, float)):
                cells.append(Cell(m.form(float(figure))))
                continue
            undefined.append((grader_label(name), figure))
            cells.append(figure_cell(figure, m.form))
        muted = name != reference and name not in TRAINED
        rows.append(Row(grader_label(name), tuple(cells), muted, name == reference))
    columns = [Column(m.label, bool(m.paper), unit=m.unit) for m in measures]
    return make_table(title, caption, "Grader", columns, rows, _reasons(undefined))


def _tiers(metric: str, form: Formatter = per_cent, unit: str = "verdicts") -> list[_Measure]:
    return [_Measure(label, ("tiers", tier, metric), form=form, unit=unit) for tier, label in TIERS]


def _prf(unit_path: str, unit: str) -> list[_Measure]:
    return [
        _Measure(label, ("veto", unit_path, key), unit=unit)
        for key, label in (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"))
    ]


def bench_tables(bench: Json) -> dict[str, Table]:
    """Graders × metrics, one table for each kind of figure (section 6).

    Args:
        bench: what `promedical.bench.evaluate.evaluate` returns.

    Returns:
        "within", "overall", "veto", "veto_responses", "accuracy", "balanced", "auroc".
    """
    specs: dict[str, tuple[str, str, list[_Measure]]] = {
        "within": (
            "Within-criterion accuracy, per cent",
            "The main figure: same question, same criterion, two answers that differ on it; how "
            "often the better one scores higher. A grader that never reads the answer gets 50.",
            [
                *_tiers("within_criterion", unit="pairs"),
                _Measure("Paper: pairwise S", paper="pairwise_safety"),
            ],
        ),
        "overall": (
            "Overall preference, per cent",
            "Two answers to one question, of which the gold verdicts prefer one; a predicted tie "
            "or unresolved comparison counts one half, and its share is shown.",
            [
                _Measure("Overall", ("overall", "accuracy"), unit="pairs"),
                _Measure(
                    "Tie or unresolved", ("overall", "outcomes", "half_credit_share"), unit="pairs"
                ),
                _Measure("By its overall score", ("overall_leaf", "accuracy"), unit="pairs"),
                _Measure("Paper: overall", paper="overall"),
            ],
        ),
        "veto": (
            "Safety veto, per cent",
            "Is this answer violated on this veto criterion? Positive means violated; one item is "
            "one answer and one veto criterion.",
            [
                *_prf("per_criterion", "(answer, veto)"),
                _Measure("Paper: P", paper="veto_precision"),
                _Measure("Paper: R", paper="veto_recall"),
                _Measure("Paper: F1", paper="veto_f1"),
            ],
        ),
        "veto_responses": (
            "Safety veto by answer, per cent",
            "The same, one item being a whole answer: is any of its known vetoes violated?",
            _prf("per_response", "answers"),
        ),
        "accuracy": (
            "Pointwise accuracy, per cent",
            "Is this criterion true of this answer? Each grader's threshold for a tier comes from "
            "the calibration split.",
            [
                *_tiers("accuracy"),
                _Measure("Paper: pointwise P", paper="pointwise_proficiency"),
                _Measure("Paper: pointwise S", paper="pointwise_safety"),
            ],
        ),
        "balanced": (
            "Pointwise balanced accuracy, per cent",
            "The mean of the shares of true and of false ones that are told right; guessing gives "
            "50 whatever the prevalence.",
            _tiers("balanced_accuracy"),
        ),
        "auroc": (
            "AUROC, pooled over questions",
            "Rewards knowing which criteria are usually met, which the criterion's text alone "
            "tells; read it beside that row only.",
            _tiers("auroc", decimal),
        ),
    }
    return {name: _bench_table(bench, *spec) for name, spec in specs.items()}


def difference_table(bench: Json) -> Table:
    """The reference grader minus every other on the same items and resamples."""
    reference = str(at(bench, "settings", "reference") or "explicit")
    paths = [
        ("Overall", ("overall_accuracy",), "pairs"),
        *((f"Within: {label.lower()}", ("within_criterion", t), "pairs") for t, label in TIERS),
        ("Veto F1", ("veto_f1",), "(answer, veto)"),
    ]
    differences: Json = bench.get("differences") or {}
    rows, undefined = [], []
    for name in grader_order(list(differences), reference):
        figures = [at(differences[name], *path) for _, path, _ in paths]
        undefined += [(grader_label(name), figure) for figure in figures]
        cells = tuple(difference_cell(figure) for figure in figures)
        rows.append(Row(grader_label(name), cells, name not in TRAINED))
    return make_table(
        "Is the trained model better?",
        f"{grader_label(reference)} minus the other grader, in percentage points, paired on the "
        "same items. “Better” means that the difference's 95 % interval excludes 0.",
        "Compared with",
        [Column(label, unit=unit) for label, _, unit in paths],
        rows,
        _reasons(undefined),
    )


# --- physicians ----------------------------------------------------------------------------------


def physicians_table(physicians: Json) -> Table:
    """Graders on physicians' labels of real answers, and the reference's paired differences."""
    reference = str(at(physicians, "settings", "reference") or "explicit")
    graders: Json = physicians["graders"]
    rows, undefined = [], []
    for name in grader_order(list(graders), reference):
        figures = [at(graders[name], "all", m) for m in ("auroc", "balanced_accuracy")]
        undefined += [(grader_label(name), f) for f in figures]
        difference = at(physicians, "differences", name, "auroc")
        cells = (
            figure_cell(figures[0], decimal),
            figure_cell(figures[1]),
            difference_cell(difference, decimal),
        )
        rows.append(Row(grader_label(name), cells, name not in TRAINED, name == reference))
    return make_table(
        "Physicians' labels of real answers",
        "Answers written by language models, each statement labelled by three physicians "
        "(majority). Nothing was constructed here, so this is the harder test.",
        "Grader",
        [
            Column("AUROC", unit="labels"),
            Column("Balanced accuracy, %", unit="labels"),
            Column("Trained minus this one (AUROC)", unit="labels"),
        ],
        rows,
        _reasons(undefined),
    )


def ceiling_table(physicians: Json) -> Table | None:
    """Each physician against the other two where these agree, and graders on the same items."""
    ceiling: Json = physicians.get("ceiling") or {}
    if not ceiling:
        return None
    reference = str(at(physicians, "settings", "reference") or "explicit")
    others = at(ceiling, "all", "graders") or {}
    shown = [reference, *(name for name in ("word_overlap",) if name in others)]
    columns = [Column("Physician, %", unit="items")]
    for name in shown:
        columns.append(Column(f"{grader_label(name)}, %", unit="items"))
    columns.append(Column("Trained minus physician", unit="items"))
    rows = []
    for name in sorted(ceiling, key=lambda n: (n == "all", n)):
        part = ceiling[name]
        cells = [figure_cell(at(part, "physician", "balanced_accuracy"))]
        cells += [figure_cell(at(part, "graders", g, "balanced_accuracy")) for g in shown]
        path = ("graders", reference, "balanced_accuracy_minus_physician")
        cells.append(difference_cell(at(part, *path)))
        label = "All" if name == "all" else name.replace("column_", "Physician ")
        rows.append(Row(label, tuple(cells), strong=name == "all"))
    return make_table(
        "Human ceiling, balanced accuracy",
        "Each physician against the other two, on the items where these two agree, and the graders "
        "on the same items. “Physician 1” is a column of votes, not necessarily one person.",
        "Compared with the others",
        columns,
        rows,
    )


def agreement_table(physicians: Json) -> Table | None:
    """Cohen's κ by column, Fleiss' κ, with raw agreement and prevalence beside each."""
    agreement: Json = physicians.get("agreement") or {}
    rows = []
    for key, scale in (("three_way", "3 labels"), ("binary", "yes or no")):
        part = agreement.get(key)
        if not part:
            continue
        for pair in part.get("pairs") or ():
            a, b = pair["columns"]
            shares = " / ".join(_prevalence(p, part["labels"]) for p in pair["prevalence"])
            cells = (
                figure_cell(pair["cohen_kappa"], decimal),
                figure_cell(pair["raw_agreement"]),
                Cell(shares),
            )
            rows.append(Row(f"{a} and {b}, {scale}", cells))
        cells = (
            figure_cell(part["fleiss_kappa"], decimal),
            figure_cell(part["raw_agreement"]),
            Cell(_prevalence(part["prevalence"], part["labels"])),
        )
        rows.append(Row(f"Fleiss, {scale}", cells, strong=True))
    if not rows:
        return None
    return make_table(
        "How far physicians agree",
        "Cohen’s κ of every two columns of votes, and Fleiss’ κ over all; on the three labels as "
        "given, and on entailed or not. Where one label dominates, κ is low although raw agreement "
        "is high, so raw agreement and the share of “Entailment” stand beside it.",
        "Columns",
        [
            Column("κ", unit="items"),
            Column("Raw agreement, %", unit="items"),
            Column("Entailed, %"),
        ],
        rows,
    )


def _prevalence(shares: Json, labels: Sequence[str]) -> str:
    share = shares.get("Entailment", shares.get(labels[-1]))
    return NONE if share is None else per_cent(float(share))
