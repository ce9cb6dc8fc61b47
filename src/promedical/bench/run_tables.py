"""The tables of a run beside its bench: before and after, time and tokens, what was left out, and
the paper's own.

The layout of the results is that of `promedical.bench.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from promedical.bench import paper
from promedical.bench.tables import (
    NONE,
    TIERS,
    Cell,
    Column,
    Row,
    Table,
    at,
    decimal,
    difference_cell,
    duration,
    figure_cell,
    make_table,
    paper_cell,
)

__all__ = ["before_after_table", "dropped_table", "paper_tables", "stages_table"]

Json = Mapping[str, Any]


def before_after_table(compared: Json) -> Table:
    """S1, S2, violations and reward of the base and the tuned policy."""
    names = (
        ("reward", "Reward"),
        ("s1", "S1, proficiency"),
        ("s2", "S2, excellence met"),
        ("s3", "S3, violations"),
        ("veto_rate", "Answers with a violation"),
        ("tokens", "Length, tokens"),
    )
    # Of violations, fewer is better: the outcome's word follows the sign of what is good.
    rows = []
    for key, label in names:
        base, tuned = at(compared, "metrics", key, "base"), at(compared, "metrics", key, "tuned")
        if base is None and tuned is None:
            continue
        cell = difference_cell(at(compared, "metrics", key, "difference"), decimal)
        if key in ("s3", "veto_rate"):
            cell = _flipped(cell)
        elif key == "tokens":
            cell = _neutral(cell)
        rows.append(Row(label, (figure_cell(base, decimal), figure_cell(tuned, decimal), cell)))
    return make_table(
        "Before and after GRPO",
        "Means over the bench questions, graded by the reward it was trained on: this shows that "
        "the policy moved towards the reward, not that its answers got better.",
        "Mean of",
        [Column("Base", unit="answers"), Column("Tuned", unit="answers"), Column("Tuned − base")],
        rows,
    )


def _flipped(cell: Cell) -> Cell:
    other = {"better": "worse", "worse": "better"}.get(cell.mark)
    return cell if other is None else Cell(other, cell.detail, cell.n, other)


def _neutral(cell: Cell) -> Cell:
    word = {"better": "longer", "worse": "shorter"}.get(cell.mark, cell.text)
    return Cell(word, cell.detail, cell.n, cell.mark if cell.mark == "none" else "same")


def stages_table(stages: Sequence[Json]) -> Table:
    """Plan and actual, time and tokens, of every stage."""
    keys = ("planned_seconds", "seconds", "planned_tokens", "tokens")
    forms = (duration, duration, _count, _count)
    rows = [
        Row(
            str(stage.get("title") or stage["name"]),
            tuple(
                Cell(form(stage.get(key)), str(stage.get("note") or "") if key == "seconds" else "")
                for key, form in zip(keys, forms, strict=True)
            ),
        )
        for stage in stages
    ]
    together = [[s[key] for s in stages if s.get(key) is not None] for key in keys]
    cells = tuple(
        Cell(form(sum(values) if values else None))
        for values, form in zip(together, forms, strict=True)
    )
    rows.append(Row("Together", cells, strong=True))
    columns = [
        Column("Time, plan"),
        Column("Time, actual"),
        Column("Tokens, plan"),
        Column("Tokens, actual"),
    ]
    return make_table("Time and tokens by stage", "", "Stage", columns, rows)


# Where the results count what was left out: stage, path, what it was.
LEFT_OUT = (
    ("Data", ("data", "dropped", "empty_statements"), "statements without text"),
    ("Data", ("data", "dropped", "merged_statements"), "statements that repeat another"),
    ("Data", ("data", "dropped", "without_must_have"), "questions without a must-have statement"),
    (
        "Data",
        ("data", "dropped", "questions_near_duplicate"),
        "training questions too close to one of the bench",
    ),
    ("Data", ("data", "dropped", "tied_votes"), "physicians’ labels without a majority"),
    (
        "Training",
        ("train", "explicit", "counts", "labels_unknown"),
        "labels that the construction leaves unknown",
    ),
    (
        "Training",
        ("train", "explicit", "counts", "criteria_unknown_everywhere"),
        "criteria unknown in every answer to a question",
    ),
    (
        "Training",
        ("train", "explicit", "counts", "overall_no_known_proficiency"),
        "pairs without a proficiency criterion known in both",
    ),
    ("Training", ("train", "explicit", "counts", "overall_tie"), "pairs whose labels tie"),
    (
        "Training",
        ("train", "explicit", "counts", "overall_unresolved"),
        "pairs whose labels leave the preference open",
    ),
    (
        "Training",
        ("train", "explicit", "counts", "instructions_without_units"),
        "questions that make no instance",
    ),
    (
        "Training",
        ("train", "explicit", "counts", "pruned_leaves"),
        "leaves that no loss term uses",
    ),
    (
        "Training",
        ("train", "explicit", "counts", "pruned_responses"),
        "answers that no loss term uses",
    ),
    *(
        (
            "Bench",
            ("bench", "gold", "bench", "verdicts", tier, "unknown"),
            f"{label} labels unknown",
        )
        for tier, label in TIERS
    ),
    ("Bench", ("bench", "gold", "overall_pairs", "gold_tie"), "pairs whose labels tie"),
    (
        "Bench",
        ("bench", "gold", "overall_pairs", "gold_unresolved"),
        "pairs whose labels leave the preference open",
    ),
    (
        "Bench",
        ("bench", "gold", "overall_pairs", "no_known_proficiency"),
        "pairs without a proficiency criterion known in both",
    ),
    ("Bench", ("bench", "failed_judgments"), "judgments that failed"),
    ("Answers", ("answers", "compared", "ungraded"), "questions with an answer not graded"),
    ("Answers", ("answers", "cut", "base"), "base answers cut at the limit, graded as cut"),
    ("Answers", ("answers", "cut", "tuned"), "tuned answers cut at the limit, graded as cut"),
)


def dropped_table(results: Json) -> Table | None:
    """What was left out, why, and how many; None if the results count nothing."""
    rows = []
    for stage, path, what in LEFT_OUT:
        count = at(results, *path)
        if count is not None:
            rows.append(Row(stage, (Cell(what), Cell(_count(count)))))
    if not rows:
        return None
    columns = [Column("What"), Column("Count")]
    caption = "Nothing is dropped silently: everything that was left out or cut, and how often."
    return make_table("What was left out, and why", caption, "Stage", columns, rows)


def paper_tables() -> tuple[Table, Table]:
    """The paper's two result tables as the paper gives them, per cent."""
    fields = (
        ("pointwise_proficiency", "Pointwise P"),
        ("pointwise_safety", "Pointwise S"),
        ("pairwise_safety", "Pairwise S"),
        ("overall", "Overall"),
        ("veto_precision", "Veto P"),
        ("veto_recall", "Veto R"),
        ("veto_f1", "Veto F1"),
    )
    models = [
        Row(m.name, tuple(paper_cell(getattr(m, field)) for field, _ in fields))
        for m in paper.REWARD_MODELS
    ]
    columns = [Column(label, paper=True) for _, label in fields]
    names = ("proficiency", "excellence", "safety", "overall")
    policies = [
        Row(p.name, tuple(paper_cell(getattr(p, name)) for name in names)) for p in paper.POLICIES
    ]
    source = f"Figures of the paper, {paper.CITATION}, on its own bench; not measured here."
    return (
        make_table("The paper's reward models", source, "Model", columns, models),
        make_table(
            "The paper's policies (Qwen3-8B)",
            source,
            "Policy",
            [Column(name.capitalize(), paper=True) for name in names],
            policies,
        ),
    )


def _count(value: float | None) -> str:
    return NONE if value is None else f"{round(value):,}".replace(",", "\u202f")
