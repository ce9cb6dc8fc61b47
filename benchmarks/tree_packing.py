"""What tree packing saves: trees against separate sequences and against TRL's RewardTrainer.

    python benchmarks/tree_packing.py              # the full run, 11 minutes a repeat on 2 cores
    python benchmarks/tree_packing.py --layers 3 --repeats 1 --out result.json      # a try
    python benchmarks/tree_packing.py --grid --max-seconds 5400    # other sizes: tree_packing_grid
    python benchmarks/tree_packing.py --gpu                        # Qwen3-8B: tree_packing_gpu

The model has the shape of SmolLM2-135M (random weights, float32). Lengths are |x| = 200, |y| = 400,
|c| = 40. All contestants run in one process, in random order within each repeat, and a figure is
the median over repeats; peak memory is the largest growth of resident memory while a job runs.

(a) Synthetic: every criterion splits the n responses evenly, so every leaf is in some pair.
    tree  one row, forward + pairwise loss (+ backward)
    trl   RewardTrainer.compute_loss / training_step on the K·(n/2)² expanded pairs, in batches of
          the best size of 1, 2, 4, 8 that divides their number
    separate  every (y, c) once as a sequence of its own (what a pointwise loss needs)
(b) Real discordance: 30 % of the verdicts are in some discordant pair. The pairwise loss on the
    pruned tree against TRL on its pairs; pairwise + pointwise on the whole tree against separate
    sequences.

TRL's batches are alike in shape, and so are the separate sequences, so their time for a whole tree
is (number of batches) × (time of one), which is exact; the tree is always measured whole. No
optimiser step is timed: it is the same for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging
from tree_packing_jobs import (
    DISCORDANT,
    ROOT,
    SMOLLM2,
    C,
    Job,
    Measure,
    X,
    Y,
    even_verdicts,
    measure,
    pairs_of,
    random_tree,
    real_verdicts,
    separate_job,
    smollm2,
    terms_of,
    tree_job,
    trl_job,
    trl_trainer,
)

from promedical.provenance import provenance
from promedical.reward_model.tree import pack, paths

RESULTS = ROOT / "benchmarks" / "results"
RESPONSES, CRITERIA, BATCHES = (2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8)
REAL_K, REAL_TREES = 8, 3
TARGETS = {
    "n=2,K=8 times TRL": 5.5,
    "n=4,K=8 times TRL": 11.0,
    "n=2,K=8 over K=1 at most": 1.6,
}


def trl_time(found: dict[tuple[str, str], Measure], pairs: int, way: str) -> tuple[float, int]:
    """TRL's seconds for so many pairs, and the batch size that gives them."""
    fitting = [b for b in BATCHES if pairs % b == 0]
    return min((found[f"trl b={b}", way].median * (pairs // b), b) for b in fitting)


def synthetic_table(found: dict[tuple[str, str], Measure]) -> list[dict[str, Any]]:
    table = []
    for n in RESPONSES:
        for k in CRITERIA:
            pairs = k * (n // 2) ** 2
            line: dict[str, Any] = {"n": n, "K": k, "pairs": pairs, "paths": n * k}
            line["tokens_tree"] = X + n * Y + n * k * C
            line["tokens_trl"] = 2 * pairs * (X + Y + C)
            line["token_ratio_trl"] = line["tokens_trl"] / line["tokens_tree"]
            for way in ("forward", "train"):
                tree = found[f"tree n={n} K={k}", way]
                trl, batch = trl_time(found, pairs, way)
                separate = found["separate", way]
                line[way] = {
                    "tree_s": tree.median,
                    "tree_s_repeats": tree.seconds,
                    "tree_peak_gb": tree.peak_gb,
                    "trl_s": trl,
                    "trl_batch": batch,
                    "trl_peak_gb": found[f"trl b={batch}", way].peak_gb,
                    "separate_s": separate.median * n * k,
                    "separate_peak_gb": separate.peak_gb,
                    "times_trl": trl / tree.median,
                    "times_separate": separate.median * n * k / tree.median,
                }
            table.append(line)
    return table


def real_table(
    found: dict[tuple[str, str], Measure], drawn: dict[int, list[int]]
) -> list[dict[str, Any]]:
    """`drawn`: for each n the number of pairs of each tree; a tree without any costs nothing."""
    table = []
    for n, counts in drawn.items():
        line: dict[str, Any] = {"n": n, "K": REAL_K, "pairs_of_trees": counts}
        for way in ("forward", "train"):
            tree = sum(
                found[f"pruned n={n} #{i}", way].median for i, count in enumerate(counts) if count
            )
            trl = sum(trl_time(found, count, way)[0] for count in counts if count)
            both = found[f"both n={n} K={REAL_K}", way].median
            separate = found["separate", way].median * n * REAL_K
            line[way] = {
                "pairwise_tree_s": tree,
                "pairwise_trl_s": trl,
                "pairwise_times_trl": trl / tree,
                "pairwise_and_pointwise_tree_s": both,
                "pairwise_and_pointwise_separate_s": separate,
                "pairwise_and_pointwise_times_separate": separate / both,
            }
        table.append(line)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", action="store_true", help="other sizes: tree_packing_grid.py")
    parser.add_argument("--gpu", action="store_true", help="Qwen3-8B: tree_packing_gpu.py")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run only these jobs, by name")
    parser.add_argument("--out", type=Path, default=RESULTS / "tree_packing.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else list(argv)
    for mode in ("grid", "gpu"):
        if f"--{mode}" in given:
            given.remove(f"--{mode}")
            importlib.import_module(f"tree_packing_{mode}").main(given)
            return
    options, started = parse(given), time.perf_counter()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    model = smollm2(num_hidden_layers=options.layers)

    jobs: list[Job] = []
    for n in RESPONSES:
        for k in CRITERIA:
            tree = random_tree(n, k, rng)
            verdicts = even_verdicts(n, k)
            (row,) = pack([tree], 10**6, [pairs_of(tree, verdicts)])
            jobs.append(tree_job(f"tree n={n} K={k}", model, row, terms_of(row)))
            if (n, k) == (2, 8):
                every = paths(tree)
                expanded = [(every[a], every[b]) for a, b in pairs_of(tree, verdicts)]
    drawn: dict[int, list[int]] = {}
    for n in RESPONSES:
        drawn[n] = []
        for i in range(REAL_TREES):
            tree = random_tree(n, REAL_K, rng)
            pairs = pairs_of(tree, real_verdicts(n, REAL_K, rng))
            drawn[n].append(len(pairs))
            if pairs:
                (row,) = pack([tree], 10**6, [pairs])
                jobs.append(tree_job(f"pruned n={n} #{i}", model, row, terms_of(row)))
        (row,) = pack([tree], 10**6, [pairs], [range(len(tree.leaves))])
        jobs.append(tree_job(f"both n={n} K={REAL_K}", model, row, terms_of(row, points=True)))
    trainer = trl_trainer(model, expanded)
    jobs += [trl_job(trainer, size) for size in BATCHES]
    jobs.append(separate_job(model, every[0]))

    with torch.no_grad():
        named = {job.name: job for job in jobs}
        losses = {name: named[name].run(False) for name in ("tree n=2 K=8", "trl b=8")}
    print(f"losses of the same 8 pairs: {losses}", flush=True)
    if abs(losses["tree n=2 K=8"] - losses["trl b=8"]) > 1e-4:
        raise RuntimeError(f"losses differ: {losses}")
    if options.only:
        jobs = [job for job in jobs if job.name in options.only.split(",")]
    found = measure(jobs, model, options.repeats, rng)
    if options.only:
        return

    synthetic = synthetic_table(found)
    line = {(row["n"], row["K"]): row for row in synthetic}
    reached = {
        "n=2,K=8 times TRL": line[2, 8]["train"]["times_trl"],
        "n=4,K=8 times TRL": line[4, 8]["train"]["times_trl"],
        "n=2,K=8 over K=1 at most": line[2, 8]["train"]["tree_s"] / line[2, 1]["train"]["tree_s"],
    }
    settings = {
        "lengths": {"x": X, "y": Y, "c": C},
        "layers": options.layers,
        "dtype": "float32",
        "threads": options.threads,
        "repeats": options.repeats,
        "discordant": DISCORDANT,
        "weights": "random, in the shape of SmolLM2-135M",
        "scaled": "trl_s and separate_s are the median time of one batch or sequence times their "
        "number (all of one shape); tree_s is measured whole",
    }
    result = {
        "provenance": provenance(seed=options.seed, recipe=settings, started=started),
        "settings": settings,
        "losses_of_the_same_pairs": losses,
        "targets": TARGETS,
        "reached": reached,
        "synthetic": synthetic,
        "real_discordance": real_table(found, drawn),
        "measured": {
            f"{name}, {way}": {"seconds": m.seconds, "peak_gb": m.peak_gb}
            for (name, way), m in found.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({"targets": TARGETS, "reached": reached}, indent=1))


if __name__ == "__main__":
    main()
