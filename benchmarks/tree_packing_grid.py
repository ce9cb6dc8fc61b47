"""What tree packing saves over a grid of sizes, on a CPU.

    python benchmarks/tree_packing.py --grid --max-seconds 5400    # what fits in 90 minutes
    python benchmarks/tree_packing.py --grid --small --out result.json      # a try

n = 2 … 8 responses, K = 1 … 32 criteria, |y| = 150 … 1500 tokens, |x| = 200, |c| = 40, for the
model and the synthetic verdicts of `tree_packing.py` (a). No forward or backward pass reads more
than `--max-tokens` tokens: a tree over it is split into rows (what that repeats is stated), and
TRL's batches stay under it. So memory is bounded, and a cell is left out if what is free would not
do, judged by the bytes per token of the rows measured before.

A cell is one tree, forward + backward, measured whole, once. TRL's batch and the separate sequence
are measured for each |y|, median of `--repeats`, and multiplied by the number that a tree needs;
TRL's batch size is the one with the least time per pair. Cells on the axes through the middle of
the grid come first, then the others from small to large, and none starts after `--max-seconds`:
the result lists what was left out, and why.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging
from tree_packing_jobs import (
    ROOT,
    SMOLLM2,
    Job,
    Lengths,
    MemoryWatch,
    even_verdicts,
    pairs_of,
    random_tree,
    separate_job,
    smollm2,
    terms_of,
    tree_job,
    trl_job,
    trl_trainer,
)

from promedical.provenance import provenance
from promedical.reward_model.tree import Packing, pack, paths

RESULT = ROOT / "benchmarks" / "results" / "tree_packing_grid.json"
BATCHES = (1, 2, 4, 8)
SPARE_GB = 2.0  # left to the rest of the machine


@dataclass(frozen=True)
class Grid:
    """The sizes of a run; `middle` is (n, K, |y|)."""

    n: tuple[int, ...]
    k: tuple[int, ...]
    y: tuple[int, ...]
    middle: tuple[int, int, int]
    x: int
    c: int
    max_tokens: int

    def cells(self) -> list[tuple[int, int, int]]:
        """Those on an axis through the middle first, then by tokens."""

        def order(cell: tuple[int, int, int]) -> tuple[bool, int]:
            off = sum(a != b for a, b in zip(cell, self.middle, strict=True))
            return off > 1, Lengths(self.x, cell[2], self.c).tree(cell[0], cell[1])

        return sorted(((n, k, y) for n in self.n for k in self.k for y in self.y), key=order)


FULL = Grid(
    (2, 3, 4, 6, 8), (1, 2, 4, 8, 16, 32), (150, 400, 1500), (4, 8, 400), 200, 40, max_tokens=8192
)
SMALL = Grid((2, 3), (1, 2), (5, 12), (2, 2, 5), 10, 3, max_tokens=50)
TINY = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def timed(job: Job) -> tuple[float, float]:
    """Seconds of forward + backward, and the largest growth of memory in gigabytes."""
    with MemoryWatch() as memory:
        start = time.perf_counter()
        job.run(True)
        took = time.perf_counter() - start
    print(f"{job.name:<24} {took:8.2f} s  {job.tokens / took:7.0f} tokens/s", flush=True)
    return took, memory.peak_gb


def free_gb() -> float:
    """Memory that could be had now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("/proc/meminfo: found no MemAvailable")


def baselines(
    model: Any, lengths: Lengths, max_tokens: int, repeats: int, rng: random.Random
) -> dict[str, Any]:
    """TRL's seconds per pair at its best batch size, and those of one separate sequence."""
    tree = random_tree(2, max(BATCHES), rng, lengths)
    every = paths(tree)
    pairs = [(every[a], every[b]) for a, b in pairs_of(tree, even_verdicts(2, max(BATCHES)))]
    trainer = trl_trainer(model, pairs)
    fitting = [b for b in BATCHES if b == 1 or 2 * b * lengths.path <= max_tokens]
    best: dict[str, Any] = {}
    for batch in fitting:
        runs = [timed(trl_job(trainer, batch)) for _ in range(repeats)]
        each = statistics.median(took for took, _ in runs) / batch
        if not best or each < best["trl_s_per_pair"]:
            best = {"trl_s_per_pair": each, "trl_batch": batch}
            best["trl_peak_gb"] = max(peak for _, peak in runs)
    runs = [timed(separate_job(model, every[0])) for _ in range(repeats)]
    best["separate_s_per_path"] = statistics.median(took for took, _ in runs)
    return best | {"y": lengths.y}


def packed(n: int, k: int, lengths: Lengths, max_tokens: int, rng: random.Random) -> Packing:
    tree = random_tree(n, k, rng, lengths)
    return pack([tree], max_tokens, [pairs_of(tree, even_verdicts(n, k))])


def cell_line(
    cell: tuple[int, int, int], packing: Packing, runs: list[tuple[float, float]], base: Any
) -> dict[str, Any]:
    n, k, y = cell
    pairs = k * (n // 2) * (n - n // 2)
    tree_s = sum(took for took, _ in runs)
    trl_s, separate_s = base["trl_s_per_pair"] * pairs, base["separate_s_per_path"] * n * k
    return {
        "n": n,
        "K": k,
        "y": y,
        "pairs": pairs,
        "rows": len(packing),
        "tokens_tree": sum(map(len, packing)),
        "repeated_tokens": packing.repeated_tokens,
        "tree_s": tree_s,
        "tree_peak_gb": max(peak for _, peak in runs),
        "trl_s": trl_s,
        "separate_s": separate_s,
        "times_trl": trl_s / tree_s,
        "times_separate": separate_s / tree_s,
    }


def run_grid(
    model: Any, grid: Grid, repeats: int, max_seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Baselines, cells and what was left out."""
    started = time.perf_counter()
    base = {
        y: baselines(model, Lengths(grid.x, y, grid.c), grid.max_tokens, repeats, rng)
        for y in grid.y
    }
    cells: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    gb_per_token = seconds_per_token = 0.0
    for cell in grid.cells():
        n, k, y = cell
        packing = packed(n, k, Lengths(grid.x, y, grid.c), grid.max_tokens, rng)
        tokens = sum(map(len, packing))
        needed = gb_per_token * max(map(len, packing)) + SPARE_GB
        left = max_seconds - (time.perf_counter() - started)
        if needed > free_gb():
            reason = f"memory: {needed:.1f} GB expected, {free_gb():.1f} GB free"
        elif seconds_per_token * tokens > left:
            reason = f"time: {seconds_per_token * tokens:.0f} s expected, {left:.0f} s left"
        else:
            jobs = [tree_job(f"n={n} K={k} y={y}", model, r, terms_of(r)) for r in packing]
            runs = [timed(job) for job in jobs]
            cells.append(cell_line(cell, packing, runs, base[y]))
            for job, (took, peak) in zip(jobs, runs, strict=True):
                gb_per_token = max(gb_per_token, peak / job.tokens)
                seconds_per_token = max(seconds_per_token, took / job.tokens)
            continue
        left_out.append({"n": n, "K": k, "y": y, "tokens_tree": tokens, "reason": reason})
    return {"baselines": list(base.values()), "cells": cells, "left_out": left_out}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-seconds", type=float, default=5400.0)
    parser.add_argument("--max-tokens", type=int, default=None, help="of a row, and a TRL batch")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=3, help="of TRL's batches and of sequences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, default=RESULT)
    options, started = parser.parse_args(argv), time.perf_counter()
    if options.small and options.out == RESULT:
        parser.error("--small measures nothing worth keeping: give it an --out of its own")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    grid = SMALL if options.small else FULL
    grid = replace(grid, max_tokens=options.max_tokens or grid.max_tokens)
    changes = TINY if options.small else {"num_hidden_layers": options.layers}
    model = smollm2(**changes)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that no cell pays for making them
    found = run_grid(model, grid, options.repeats, options.max_seconds, rng)
    settings = asdict(grid) | {
        "layers": model.config.num_hidden_layers,
        "dtype": "float32",
        "threads": options.threads,
        "baseline_repeats": options.repeats,
        "max_seconds": options.max_seconds,
        "weights": "random, tiny" if options.small else "random, in the shape of SmolLM2-135M",
        "timed": "forward + backward of one tree, once; trl_s and separate_s are the median time "
        "of a pair or sequence times their number (all of one shape)",
    }
    result = {
        "provenance": provenance(seed=options.seed, recipe=settings, started=started),
        "settings": settings,
        **found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(found['cells'])} cells, {len(found['left_out'])} left out → {options.out.name}")
