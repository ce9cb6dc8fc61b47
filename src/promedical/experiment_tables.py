"""Tables of `docs/scale.md` and `docs/results.md`.

The first are arithmetic on the paper's setting (`reward_model.scale`), the others come from the
JSON that `benchmarks/healthbench.py` leaves. Markdown is left to `promedical.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promedical.bench.tables import (
    Cell,
    Column,
    Row,
    Table,
    difference_cell,
    duration,
    figure_cell,
    grader_label,
    make_table,
    per_cent,
    span,
)
from promedical.reward_model.scale import (
    PAPER,
    QWEN3_8B,
    Setting,
    memory,
    operations,
    separate_work,
    tree_work,
    trl_work,
)

__all__ = ["healthbench_lines", "healthbench_tables", "scale_lines", "scale_tables"]

Json = Mapping[str, Any]

REAL = 0.3  # share of verdicts in some discordant pair, as in the tree-packing benchmark
RATES = (1e14, 2e14, 4e14)
LENGTHS = (150, 400, 1500)
SETTINGS = (
    ("pairs, every criterion discordant", 1.0, False),
    (f"pairs, {REAL:.0%} discordant".replace("%", " %"), REAL, False),
    ("pairs and verdicts", REAL, True),
)

# --- the paper's setting --------------------------------------------------------------------------


def scale_lines() -> list[str]:
    """The arithmetic of one instruction and of the whole run, in words."""
    s = PAPER
    full, real = (tree_work(s.at(discordant=d)) for d in (1.0, REAL))
    once = s.instructions * s.epochs
    leaves = s.responses * (s.criteria + 1)
    seen = full.visible / once
    weights = full.tokens * QWEN3_8B.layer_parameters * QWEN3_8B.layers * 6
    return [
        f"- The paper's: {s.instructions:,} instructions, {s.responses} responses, {s.criteria} "
        f"criteria, {s.epochs} epochs. Assumed, since it states no lengths: |x| = {s.prompt}, "
        f"|y| = {s.response}, |c| = {s.criterion} tokens, and an overall preference between any "
        "two responses (one criterion more).",
        f"- A tree: |x| + 3·|y| + {leaves}·|c| = {s.prompt} + {s.responses * s.response:,} + "
        f"{leaves * s.criterion:,} = {full.tokens / once:,.0f} tokens; {seen:,.0f} visible pairs.",
        f"- With {100 * REAL:.0f} % of the verdicts in some discordant pair and the pairwise loss "
        f"alone, {real.tokens / once:,.0f} tokens: leaves without a pair are left out.",
        f"- As pairs: {s.pairs:.0f} pairs ({s.pairs - 3:.0f} on criteria, 3 overall), two "
        f"sequences of {s.path} tokens each, {2 * s.pairs * s.path:,.0f} tokens; with "
        f"{100 * REAL:.0f} %: {s.at(discordant=REAL).pairs:.1f} pairs on average.",
        f"- {QWEN3_8B.name}: {QWEN3_8B.parameters:,} parameters as a classifier, of which "
        f"{QWEN3_8B.layers} × {QWEN3_8B.layer_parameters:,} are multiplied with every token. In "
        f"full: {full.tokens:.4g} tokens × 6 × {QWEN3_8B.layers * QWEN3_8B.layer_parameters:.4g} = "
        f"{weights:.3g}, and {full.visible:.4g} visible pairs × 12 × {QWEN3_8B.layers} × "
        f"{QWEN3_8B.width} = {operations(QWEN3_8B, full).attention:.3g} floating-point operations.",
    ]


def scale_tables() -> list[Table]:
    """Operations, hours by rate, response lengths, memory."""
    return [_operations_table(), _hours_table(), _lengths_table(), _memory_table()]


def _count(value: float) -> Cell:
    return Cell(f"{value / 1e6:,.0f}")


def _exa(value: float) -> Cell:
    return Cell(f"{value / 1e18:,.2f}")


def _times(value: float) -> Cell:
    return Cell(f"{value:.1f} ×")


def _operations_table() -> Table:
    rows = []
    for label, discordant, points in SETTINGS:
        setting = PAPER.at(discordant=discordant)
        tree = tree_work(setting, points=points)
        flat = separate_work(setting) if points else trl_work(setting)
        full, lora = (operations(QWEN3_8B, tree, lora=lora) for lora in (False, True))
        theirs = operations(QWEN3_8B, flat)
        cells = (
            _count(tree.tokens),
            _count(flat.tokens),
            _times(flat.tokens / tree.tokens),
            _exa(full.total),
            Cell(f"{100 * full.attention / full.total:.0f} %"),
            _exa(theirs.total),
            _times(theirs.total / full.total),
            _exa(lora.total),
        )
        rows.append(Row(label, cells))
    return Table(
        "Tokens and operations",
        "Millions of tokens and 10¹⁸ floating-point operations of both epochs. Without trees: for "
        "pairs two sequences a pair, for pairs and verdicts a sequence for every (response, "
        "criterion).",
        "Loss",
        (
            Column("Tokens, trees"),
            Column("without"),
            Column("fewer"),
            Column("Operations, trees, full"),
            Column("of which attention"),
            Column("without trees, full"),
            Column("fewer"),
            Column("Trees, LoRA"),
        ),
        tuple(rows),
    )


def _hours_table() -> Table:
    rows = []
    for label, discordant, points in SETTINGS:
        tree = tree_work(PAPER.at(discordant=discordant), points=points)
        for kind, lora in (("full", False), ("LoRA", True)):
            total = operations(QWEN3_8B, tree, lora=lora).total
            cells = tuple(Cell(f"{total / rate / 3600:,.0f}") for rate in RATES)
            rows.append(Row(f"{label}, {kind}", cells))
    return Table(
        "Hours of one device",
        "Operations / (3600 · your measured rate). The columns are divisors, not measurements: "
        "`promedical rm plan` measures yours.",
        "Trees",
        tuple(Column(f"at {rate:.0e} operations a second".replace("+", "")) for rate in RATES),
        tuple(rows),
    )


def _lengths_table() -> Table:
    rows = []
    for length in LENGTHS:
        cells: list[Cell] = []
        for discordant in (1.0, REAL):
            setting: Setting = PAPER.at(discordant=discordant, response=length)
            tree, flat = tree_work(setting), trl_work(setting)
            total = operations(QWEN3_8B, tree).total
            cells += [_exa(total), _times(operations(QWEN3_8B, flat).total / total)]
        rows.append(Row(f"|y| = {length}", tuple(cells)))
    return Table(
        "Other lengths of a response",
        "10¹⁸ operations, pairs alone, all weights trained, and how many times fewer than in pairs "
        "of sequences.",
        "Response",
        (
            Column("Every criterion discordant"),
            Column("fewer"),
            Column(f"{100 * REAL:.0f} % discordant"),
            Column("fewer"),
        ),
        tuple(rows),
    )


def _memory_table() -> Table:
    how: dict[str, dict[str, Any]] = {
        "full, float32 weights, computed in bfloat16, 1 device": {"dtype": "autocast"},
        "full, the same, sharded over 8 devices": {"dtype": "autocast", "shards": 8},
        "LoRA of rank 16, bfloat16 weights, 1 device": {"dtype": "bfloat16", "lora_rank": 16},
    }
    rows = []
    for label, settings in how.items():
        kept = memory(QWEN3_8B, 8192, gradient_checkpointing=True, **settings)
        whole = memory(QWEN3_8B, 8192, **settings)
        parts = (kept.weights, kept.gradients, kept.adam, kept.activations, whole.activations)
        rows.append(Row(label, tuple(Cell(f"{part / 1e9:.1f}") for part in parts)))
    return Table(
        "Memory of a device",
        "GB (10⁹ bytes) for rows of 8,192 tokens, by arithmetic. What a sharded layer takes while "
        "it is gathered is not counted; activations are an estimate, whose formula is in "
        "`reward_model.scale.memory`.",
        "Training",
        (
            Column("Weights"),
            Column("Gradients"),
            Column("Adam"),
            Column("Activations, checkpointed"),
            Column("not checkpointed"),
        ),
        tuple(rows),
    )


# --- real graded answers -------------------------------------------------------------------------

VIEWS = (
    ("wanted", "Wanted"),
    ("unwanted", "Unwanted"),
    ("unwanted_no_omissions", "Unwanted, doing"),
    ("unwanted_omissions", "Unwanted, leaving out"),
    ("proficiency", "Proficiency tier"),
    ("veto", "Veto tier"),
)


def healthbench_lines(result: Json) -> list[str]:
    """What was read and selected, and what of the targets was reached."""
    counts: Json = result["data"]["counts"]
    subset: Json = result["data"]["subset"]
    settings: Json = result["settings"]
    deciles: Json = result["data"]["token_deciles"]
    parts = ", ".join(
        f"{subset[name]['instructions']} {name} instructions with {subset[name]['responses']} "
        "answers"
        for name in ("train", "calibration", "test")
    )
    lines = [
        f"- Read: {counts['rows']:,} answers, {counts['labels']:,} labels, "
        f"{counts['instructions']:,} conversations; {counts['rows_broken']} rows broken, "
        f"{counts.get('labels_contradicting', 0)} labels contradicting, "
        f"{counts.get('labels_dropped_other_sign', 0)} dropped for a second sign of points, "
        f"{counts.get('responses_merged_same_text', 0)} answers merged with an equal one.",
        f"- An answer has {deciles['response'][4]} tokens in the median and "
        f"{deciles['response'][8]} at the ninth decile. Selected, by length and hash alone: "
        f"{parts}; conversation and answer of at most {settings['max_tokens']} tokens.",
        f"- Training: {settings['epochs']:g} epochs, learning rate {settings['learning_rate']:g}, "
        f"{settings['frozen_layers']} layers frozen, rubrics cut to {settings['max_criteria']} "
        "criteria. Calibration and test rubrics are whole.",
        "",
    ]
    for name, target in result["targets"].items():
        if target["value"] is None:
            lines.append(f"- {name}: undefined")
            continue
        said = {True: "reached", False: "**not reached**", None: "undefined"}[target["reached"]]
        over = f"above {per_cent(target['above'])}" if target["above"] else "difference above 0"
        lines.append(f"- {name}: {per_cent(target['value'])} ({span(target)}), {over}: {said}")
    return lines


def healthbench_tables(result: Json) -> list[Table]:
    """Within-criterion accuracy first, then AUROC, overall and veto, differences, and the runs."""
    return [
        _views_table(
            result,
            "within",
            "Within-criterion accuracy",
            "Per cent of pairs of answers with different labels on one criterion whose better "
            "answer scores higher; chance is 50. Mean over seeds, 95 % interval over instructions.",
        ),
        _views_table(
            result,
            "auroc",
            "Pooled AUROC",
            "Per cent; beside it the criterion's text alone, which never reads the answer.",
        ),
        _overall_table(result),
        _differences_table(result),
        _runs_table(result),
        _mapping_table(result),
    ]


def _ordered(result: Json) -> list[str]:
    """Systems as the experiment lists them, then null graders."""
    systems = list(result["systems"])
    return systems + [name for name in result["means"]["graders"] if name not in systems]


def _label(result: Json, name: str) -> str:
    if name in result["systems"]:
        return str(result["systems"][name]["says"])
    if name.endswith("_all"):
        return f"{grader_label(name.removesuffix('_all'))}, fitted on every training answer"
    return grader_label(name)


def _views_table(result: Json, key: str, title: str, caption: str) -> Table:
    graders: Json = result["means"]["graders"]
    rows = [
        Row(
            _label(result, name),
            tuple(figure_cell(graders[name][key].get(view)) for view, _ in VIEWS),
            muted=name not in result["systems"],
            strong=name == result["reference"],
        )
        for name in _ordered(result)
    ]
    unit = "pairs" if key == "within" else "verdicts"
    columns = [Column(label, False, None, unit) for _, label in VIEWS]
    return make_table(title, caption, "Grader", columns, rows)


def _overall_table(result: Json) -> Table:
    graders: Json = result["means"]["graders"]
    paths = (
        ("overall", "accuracy", "Overall accuracy", "pairs"),
        ("overall", "leaf", "by its own overall score", "pairs"),
        ("veto", "precision", "Veto precision", "verdicts"),
        ("veto", "recall", "Veto recall", "verdicts"),
        ("veto", "f1", "Veto F1", "verdicts"),
    )
    rows = [
        Row(
            _label(result, name),
            tuple(figure_cell(graders[name][key][part]) for key, part, _, _ in paths),
            muted=name not in result["systems"],
            strong=name == result["reference"],
        )
        for name in _ordered(result)
    ]
    columns = [Column(label, False, None, unit) for _, _, label, unit in paths]
    caption = "Per cent; thresholds fitted on the calibration split, veto's for F1."
    return make_table("Overall preference and vetoes", caption, "Grader", columns, rows)


def _differences_table(result: Json) -> Table:
    differences: Json = result["means"]["differences"]
    paths = (
        ("within", "wanted", "Within, wanted"),
        ("within", "unwanted", "Within, unwanted"),
        ("auroc", "wanted", "AUROC, wanted"),
        ("auroc", "unwanted", "AUROC, unwanted"),
        ("overall", "accuracy", "Overall"),
    )
    rows = [
        Row(
            _label(result, name),
            tuple(difference_cell(differences[name][key].get(part)) for key, part, _ in paths),
            muted=name not in result["systems"],
        )
        for name in _ordered(result)
        if name in differences
    ]
    caption = (
        f"“{_label(result, result['reference'])}” minus each other grader, on the same resamples; "
        "better or worse where the 95 % interval excludes 0."
    )
    columns = [Column(label) for _, _, label in paths]
    return make_table("Differences", caption, "Against", columns, rows)


def _runs_table(result: Json) -> Table:
    rows = []
    for system in result["systems"].values():
        seeds = list(system["seeds"].values())
        trained = [seed["train"] for seed in seeds if seed["train"] is not None]
        scoring = sum(seed["score_seconds"] for seed in seeds) / len(seeds)
        if trained:
            counts: Json = trained[0]["counts"]
            made = (
                Cell(f"{counts['unique_tokens']:,}"),
                Cell(f"{counts['separate_tokens']:,}"),
                Cell(f"{counts['optimiser_steps']}"),
                Cell(duration(sum(t["seconds"] for t in trained) / len(trained))),
            )
        else:
            made = (Cell("—"),) * 4
        failed = sum(seed["failures"] for seed in seeds)
        last = (Cell(duration(scoring)), Cell(str(failed)))
        rows.append(Row(str(system["says"]), (Cell(str(len(seeds))), *made, *last)))
    return Table(
        "Runs",
        "Tokens an epoch; times are means over seeds, and the frozen layers' work falls to whoever "
        "comes first.",
        "System",
        (
            Column("Seeds"),
            Column("Unique tokens"),
            Column("as separate sequences"),
            Column("Steps"),
            Column("Training"),
            Column("Scoring"),
            Column("Failed judgments"),
        ),
        tuple(rows),
    )


def _mapping_table(result: Json) -> Table:
    counts: Json = result["data"]["counts"]
    kinds = sorted(name for name in counts if name.startswith("criteria_"))
    rows = tuple(
        Row(name.removeprefix("criteria_").replace("_", " "), (Cell(f"{counts[name]:,}"),))
        for name in kinds
    )
    caption = (
        "Criteria of all conversations by the rule that mapped them; the tier is the word before."
    )
    return Table("Mapping", caption, "Rule", (Column("Criteria"),), rows)
