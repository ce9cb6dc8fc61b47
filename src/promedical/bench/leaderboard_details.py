"""The folded tables of a leaderboard: what a result says beside its figures (`suites.detail`,
`suites.certainty`, contamination), a row or column a system.

Nothing here is compared or tested between systems. Tables of figures and comparisons are left to
`leaderboard`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from promedical.bench.tables import (
    Cell,
    Column,
    Row,
    Table,
    decimal,
    figure_cell,
    make_table,
    per_cent,
)

__all__ = ["detail_tables"]


class Kept(Protocol):
    """A system's result as it was kept."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> Mapping[str, Any]: ...


def detail_tables(group: Sequence[Kept]) -> list[Table]:
    """Every table that at least one of the systems has something for."""
    return [
        *_pulls(group),
        *_certainty(group),
        *_ceiling(group),
        *_contamination(group),
        *_parts(group),
    ]


def _detail(result: Kept, *path: str) -> Any:
    found: Any = result.data["details"]
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


PULLS = (
    ("AUROC: proficiency", ("auroc", "proficiency"), decimal),
    ("AUROC: safety", ("auroc", "veto"), decimal),
    ("Length: ρ of score and words", ("length", "spearman"), decimal),
    ("Length: ρ of gold and words", ("length", "gold_spearman"), decimal),
    ("Longer one preferred where gold ties", ("length", "longer_preferred_at_tie"), per_cent),
    ("Order: same preference both ways", ("position", "consistency"), per_cent),
    ("Order: first shown preferred", ("position", "first_preferred"), per_cent),
)


def _pulls(group: Sequence[Kept]) -> list[Table]:
    """What moves a grader besides the content, and its AUROC."""
    shown = [p for p in PULLS if any((_detail(r, *p[1]) or {}).get("value") is not None
                                     for r in group)]  # fmt: skip
    if not shown:
        return []
    rows = [
        Row(r.name, tuple(figure_cell(_detail(r, *path), form) for _, path, form in shown))
        for r in group
    ]
    return [
        make_table(
            "AUROC, length and order",
            "AUROC rewards knowing which criteria are usually met: read it beside the row of "
            "criterion_alone only. A grader that follows length has a ρ far from the gold’s; 50 is "
            "no bias for the last columns but “same preference”.",
            "System",
            [Column(label) for label, _, _ in shown],
            rows,
        )
    ]


def _certainty(group: Sequence[Kept]) -> list[Table]:
    """What a grader gains by deciding only where it is sure, and recall at a stated precision."""
    columns: list[tuple[str, Any]] = []
    precisions = dict.fromkeys(
        p for r in group for p in (_detail(r, "recall_at_precision") or {})
    )  # fmt: skip
    for precision in precisions:
        label = f"Violations: recall at precision {float(precision):.0%}"
        columns.append((label, lambda r, p=precision: _detail(r, "recall_at_precision", p)))
    for tier, name in (("proficiency", "Proficiency"), ("veto", "Safety")):
        points = dict.fromkeys(
            point["coverage"]
            for r in group
            for point in _detail(r, "abstention", tier, "risk") or ()
        )
        for coverage in points:
            label = f"{name}: errors with {coverage:.0%} decided"
            columns.append((label, lambda r, t=tier, c=coverage: _risk(r, t, c)))
    if not columns:
        return []
    return [
        make_table(
            "Deciding only where it is sure",
            "Errors among the verdicts whose score is farthest from the threshold: a grader whose "
            "confidence means something makes fewer of them where it decides less. Recall at a "
            "precision is taken from the order of the scores on these very answers, and is no "
            "promise for others. Per cent.",
            "System",
            [Column(label) for label, _ in columns],
            [Row(r.name, tuple(figure_cell(of(r)) for _, of in columns)) for r in group],
        )
    ]


def _risk(result: Kept, tier: str, coverage: float) -> Any:
    risk = _detail(result, "abstention", tier, "risk") or ()
    return next((point for point in risk if point["coverage"] == coverage), None)


def _ceiling(group: Sequence[Kept]) -> list[Table]:
    """Each physician against the others where these agree, systems on the same items."""
    shown = [r for r in group if _detail(r, "ceiling", "all")]
    if not shown:
        return []
    parts = [part for part in _detail(shown[0], "ceiling") if part != "all"]
    rows = [
        Row(
            "Physicians, each against the others",
            (figure_cell(_detail(shown[0], "ceiling", "all", "physician", "balanced_accuracy")),),
            muted=True,
        )
    ]
    path = ("ceiling", "all", "graders", "system", "balanced_accuracy")
    rows += [Row(r.name, (figure_cell(_detail(r, *path)),)) for r in shown]
    return [
        make_table(
            "How far physicians get",
            "Balanced accuracy against the label that the other physicians agree on, per cent; "
            "systems on the same items. An item counts once for each physician whose colleagues "
            f"agree on it ({len(parts)} physicians).",
            "Who",
            [Column("Balanced accuracy", unit="items")],
            rows,
        )
    ]


def _contamination(group: Sequence[Kept]) -> list[Table]:
    """Share of instructions that have a text in common with a training set."""
    shown = [r for r in group if _detail(r, "contamination")]
    if not shown:
        return []
    fields = list(_detail(shown[0], "contamination", "figures"))
    rows = [
        Row(
            r.name,
            (
                Cell(str(_detail(r, "contamination", "training", "rows"))),
                *(figure_cell(_detail(r, "contamination", "figures", f)) for f in fields),
            ),
        )
        for r in shown
    ]
    return [
        make_table(
            "Shared with the training set",
            "Per cent of the instructions of which a text shares 13 words in a row or 50 letters "
            "with the training set that --training named, or is a near duplicate.",
            "System",
            [Column("Training rows"), *(Column(f.capitalize()) for f in fields)],
            rows,
        )
    ]


def _parts(group: Sequence[Kept]) -> list[Table]:
    """Accuracy by category, specialty, axis, kind; a part with too little has no figure."""
    tables = []
    groupings = dict.fromkeys(g for r in group for g in (_detail(r, "slices") or {}))
    for grouping in groupings:
        names = dict.fromkeys(
            n for r in group for n in (_detail(r, "slices", grouping, "groups") or {})
        )
        metric = "within_criterion" if grouping in ("axis", "kind") else "accuracy"
        rows = [
            Row(
                part.replace("_", " "),
                tuple(
                    figure_cell(
                        _detail(r, "slices", grouping, "groups", part, "graders", "system", metric)
                    )
                    for r in group
                ),
            )
            for part in names
        ]
        least = next(
            found for r in group if (found := _detail(r, "slices", grouping, "least")) is not None
        )
        what = "Within-criterion accuracy" if metric == "within_criterion" else "Pointwise accuracy"
        tables.append(
            make_table(
                f"By {grouping}",
                f"{what}, per cent. A part with fewer than {least['items']} items of "
                f"{least['instructions']} instructions has no figure; differences between parts "
                "are not tested.",
                grouping.capitalize(),
                [Column(r.name) for r in group],
                rows,
            )
        )
    return tables
