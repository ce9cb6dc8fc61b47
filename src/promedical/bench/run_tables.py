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


def before_after_table(before_after: Json) -> Table:
    """S1, S2, violations and reward of the base and the tuned policy."""
    names = (
        ("reward", "Reward"),
        ("s1", "S1, proficiency"),
        ("s2", "S2, excellence met"),
        ("s3", "S3, violations"),
        ("veto_rate", "Answers with a violation"),
    )
    # Of violations, fewer is better: the outcome's word follows the sign of what is good.
    rows = []
    for key, label in names:
        base, tuned = at(before_after, "base", key), at(before_after, "tuned", key)
        if base is None and tuned is None:
            continue
        cell = difference_cell(at(before_after, "difference", key), decimal)
        if key in ("s3", "veto_rate"):
            cell = _flipped(cell)
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


def stages_table(stages: Sequence[Json]) -> Table:
    """Plan and actual, time and tokens, of every stage."""
    rows = []
    for stage in stages:
        status = str(stage.get("status") or "done")
        tokens = (stage.get("planned_tokens"), stage.get("actual_tokens"))
        cells = (
            Cell(duration(stage.get("planned_s"))),
            Cell(duration(stage.get("actual_s")), "" if status == "done" else status),
            Cell(_count(tokens[0])),
            Cell(_count(tokens[1])),
        )
        rows.append(Row(str(stage["name"]), cells))
    total = [
        sum(float(s.get(key) or 0) for s in stages)
        for key in ("planned_s", "actual_s", "planned_tokens", "actual_tokens")
    ]
    cells = (
        Cell(duration(total[0])),
        Cell(duration(total[1])),
        Cell(_count(total[2])),
        Cell(_count(total[3])),
    )
    rows.append(Row("Together", cells, strong=True))
    columns = [
        Column("Time, plan"),
        Column("Time, actual"),
        Column("Tokens, plan"),
        Column("Tokens, actual"),
    ]
    return make_table("Time and tokens by stage", "", "Stage", columns, rows)


def dropped_table(dropped: Sequence[Json]) -> Table:
    """What was left out, why, and how many."""
    rows = [
        Row(str(d.get("stage", "")), (Cell(str(d.get("what", ""))), Cell(_count(d.get("count")))))
        for d in dropped
    ]
    caption = "Nothing is dropped silently; this is all that was."
    return make_table(
        "What was left out, and why", caption, "Stage", [Column("What"), Column("Count")], rows
    )


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


def _count(value: int | float | None) -> str:
    return NONE if value is None else f"{round(value):,}".replace(",", "\u202f")
