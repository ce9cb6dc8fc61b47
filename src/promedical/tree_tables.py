"""Tables of what trees save, in training and in grading.

Made from the JSON that `benchmarks/tree_packing.py` (with `--grid` too) and `benchmarks/grading.py`
leave. Markdown is left to `promedical.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promedical.bench.tables import Cell, Column, Row, Table

__all__ = ["grading_table", "grid_table", "real_table", "synthetic_table"]

Json = Mapping[str, Any]


def _seconds(value: float) -> Cell:
    return Cell(f"{value:.2f}")


def _times(value: float) -> Cell:
    return Cell(f"{value:.1f} ×")


def real_table(result: Json) -> Table:
    """Pairwise on pruned trees against TRL; pairwise + pointwise against separate sequences."""
    settings: Json = result["settings"]
    rows = []
    for line in result["real_discordance"]:
        for way, said in (("train", "forward + backward"), ("forward", "forward")):
            part = line[way]
            cells = (
                Cell(str(sum(line["pairs_of_trees"]))),
                _seconds(part["pairwise_tree_s"]),
                _seconds(part["pairwise_trl_s"]),
                _times(part["pairwise_times_trl"]),
                _seconds(part["pairwise_and_pointwise_tree_s"]),
                _seconds(part["pairwise_and_pointwise_separate_s"]),
                _times(part["pairwise_and_pointwise_times_separate"]),
            )
            rows.append(Row(f"n = {line['n']}, K = {line['K']}, {said}", cells))
    trees = len(result["real_discordance"][0]["pairs_of_trees"])
    return Table(
        "Real discordance",
        f"{100 * settings['discordant']:.0f} % of the verdicts are in some discordant pair. "
        f"Pairwise loss: {trees} pruned trees against TRL's RewardTrainer on the same pairs. "
        "Pairwise and pointwise loss: one whole tree against every (answer, criterion) as a "
        "sequence of its own.",
        "Tree",
        (
            Column("Pairs"),
            Column("Trees, s"),
            Column("TRL, s"),
            Column("Faster"),
            Column("Whole tree, s"),
            Column("Separate, s"),
            Column("Faster"),
        ),
        tuple(rows),
    )


def synthetic_table(result: Json) -> Table:
    """Every criterion splits the answers evenly: seconds of one tree and times faster."""
    lengths: Json = result["settings"]["lengths"]
    rows = []
    for line in result["synthetic"]:
        forward, train = line["forward"], line["train"]
        # Memory is compared at the same number of criteria a step: TRL's batch of all the pairs.
        whole = result["measured"].get(f"trl b={line['pairs']}, train")
        cells = (
            _times(line["token_ratio_trl"]),
            _seconds(forward["tree_s"]),
            _times(forward["times_trl"]),
            _times(forward["times_separate"]),
            _seconds(train["tree_s"]),
            _times(train["times_trl"]),
            _times(train["times_separate"]),
            Cell(f"{train['tree_peak_gb']:.1f} / {train['trl_peak_gb']:.1f}"),
            Cell("—" if whole is None else f"{whole['peak_gb']:.1f}"),
        )
        rows.append(Row(f"n = {line['n']}, K = {line['K']}", cells))
    return Table(
        "Synthetic",
        "Every criterion splits the answers evenly; "
        + ", ".join(f"|{name}| = {count}" for name, count in lengths.items())
        + " tokens. TRL at its best batch size of 1, 2, 4, 8. “Bound” is the ratio of tokens.",
        "Tree",
        (
            Column("Bound, TRL"),
            Column("Forward, s"),
            Column("than TRL"),
            Column("than separate"),
            Column("Forward + backward, s"),
            Column("than TRL"),
            Column("than separate"),
            Column("Peak GB, tree / TRL’s best batch"),
            Column("Peak GB, TRL with all pairs in one batch"),
        ),
        tuple(rows),
    )


def grid_table(result: Json) -> Table:
    """Times faster than TRL and than separate sequences, one row for each n and K."""
    settings: Json = result["settings"]
    cells = {(c["n"], c["K"], c["y"]): c for c in result["cells"]}

    def faster(n: int, k: int, y: int, than: str) -> Cell:
        cell = cells.get((n, k, y))
        return Cell("—") if cell is None else _times(cell[f"times_{than}"])

    rows = tuple(
        Row(
            f"n = {n}, K = {k}",
            tuple(faster(n, k, y, than) for y in settings["y"] for than in ("trl", "separate")),
        )
        for n in settings["n"]
        for k in settings["k"]
    )
    columns = [
        (Column(f"than TRL, |y| = {y}"), Column(f"than separate, |y| = {y}")) for y in settings["y"]
    ]
    repeated = sum(c["repeated_tokens"] > 0 for c in result["cells"])
    notes = [
        f"{settings['dtype']}, {settings['threads']} threads, {settings['layers']} layers, weights "
        f"{settings['weights']}; {settings['timed']}.",
        f"{repeated} of the {len(cells)} trees are over {settings['max_tokens']:,} tokens and take "
        "several rows, which repeats their beginnings.",
    ]
    reasons = [cell["reason"].split(":")[0] for cell in result["left_out"]]
    if reasons:
        counted = ", ".join(f"{reasons.count(r)} for {r}" for r in sorted(set(reasons)))
        notes.append(f"Left out: {counted}.")
    return Table(
        "Sizes",
        "How many times faster a tree is, forward + backward, with the pairwise loss: than TRL’s "
        "RewardTrainer on the same pairs at its best batch size, and than every (answer, "
        "criterion) as a sequence of its own. Every criterion splits the answers evenly; "
        f"|x| = {settings['x']}, |c| = {settings['c']}.",
        "Tree",
        tuple(column for pair in columns for column in pair),
        rows,
        tuple(notes),
    )


def grading_table(result: Json) -> Table:
    """Judgments a second, and how many times faster trees are than each other way."""
    settings: Json = result["settings"]
    tree = result["contestants"]["tree"]
    said = {"tree": "Trees, packed (grade_many)", "kv": "KV cache of each question and answer"}
    rows = []
    for name, part in result["contestants"].items():
        label = said.get(name, name.replace("padded", "transformers, padded"))
        best = " (best)" if name == result["best_padded"] else ""
        cells = (
            Cell(f"{part['judgments_per_s']:.1f}"),
            _seconds(part["median_s"]),
            Cell(f"{part['tokens_read']:,}"),
            _times(part["median_s"] / tree["median_s"]),
        )
        rows.append(Row(label + best, cells, False, name == "tree"))
    lengths = ", ".join(f"|{k}| = {v:.0f}" for k, v in settings["mean_tokens"].items())
    return Table(
        "Grading",
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads: "
        f"{settings['questions']} questions × {settings['answers']} answers × "
        f"{settings['criteria']} criteria; mean tokens {lengths}.",
        "Way",
        (
            Column("Judgments/s"),
            Column("Seconds"),
            Column("Tokens read"),
            Column("Trees are faster"),
        ),
        tuple(rows),
        (
            f"Medians of {settings['repeats']} repeats; largest difference of a score "
            f"{result['largest_difference']:.0e}.",
        ),
    )
