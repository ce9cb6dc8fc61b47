"""What tree packing saves: trees against separate sequences and against TRL's RewardTrainer.

    python benchmarks/tree_packing.py              # the full run, 11 minutes a repeat on 2 cores
    python benchmarks/tree_packing.py --layers 3 --repeats 1 --out result.json      # a try

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
import ctypes
import gc
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from promedical.provenance import provenance
from promedical.reward_model.attention import score_row
from promedical.reward_model.loss import LossTerms, rubric_loss
from promedical.reward_model.tree import Leaf, PackedRow, Tree, pack, paths

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tree_packing.json"
X, Y, C = 200, 400, 40
RESPONSES, CRITERIA, BATCHES = (2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8)
DISCORDANT, REAL_K, REAL_TREES = 0.3, 8, 3
VOCABULARY = 49152
SMOLLM2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TARGETS = {
    "n=2,K=8 times TRL": 5.5,
    "n=4,K=8 times TRL": 11.0,
    "n=2,K=8 over K=1 at most": 1.6,
}


@dataclass(frozen=True)
class Job:
    """One thing to time: `run` does it once, forward only or with the backward pass."""

    name: str
    run: Callable[[bool], float]
    tokens: int


@dataclass(frozen=True)
class Measure:
    """Seconds of every repeat and the largest growth of memory, for one job and direction."""

    seconds: tuple[float, ...]
    peak_gb: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def random_tree(n: int, k: int, rng: random.Random) -> Tree:
    """x → n responses → k criteria each, of the lengths above."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(20, VOCABULARY) for _ in range(count))

    questions = [ids(C) for _ in range(k)]
    leaves = tuple(Leaf(r, c, questions[c]) for r in range(n) for c in range(k))
    return Tree(ids(X), tuple(ids(Y) for _ in range(n)), leaves)


def pairs_of(tree: Tree, verdicts: Sequence[Sequence[bool]]) -> list[tuple[int, int]]:
    """Every (met, unmet) pair of leaves, given the verdict of each criterion on each response."""
    at = {(f.response, f.criterion): i for i, f in enumerate(tree.leaves)}
    return [
        (at[a, c], at[b, c])
        for c, met in enumerate(verdicts)
        for a in range(len(met))
        for b in range(len(met))
        if met[a] and not met[b]
    ]


def real_verdicts(n: int, k: int, rng: random.Random) -> list[list[bool]]:
    """Verdicts of which 30 % are in some discordant pair: a criterion divides or it does not."""
    found = []
    for _ in range(k):
        verdicts = [rng.random() < 0.5] * n
        if rng.random() < DISCORDANT:
            while len(set(verdicts)) == 1:
                verdicts = [rng.random() < 0.5 for _ in range(n)]
        found.append(verdicts)
    return found


def tree_job(name: str, model: Any, row: PackedRow, terms: LossTerms) -> Job:
    def run(backward: bool) -> float:
        loss = rubric_loss(score_row(model, row), terms) / terms.items
        if backward:
            loss.backward()
        return float(loss.detach())

    return Job(name, run, len(row))


def terms_of(row: PackedRow, points: bool = False) -> LossTerms:
    """Pairwise terms as TRL weighs them, and a pointwise term on every leaf if asked."""
    pairs = tuple((p.first, p.second, 1, 1.0) for p in row.pairs)
    single = tuple((i, i % 2, 1.0) for i in range(len(row.leaves))) if points else ()
    return LossTerms(pairs, single, max(1, len(pairs)))


def separate_job(model: Any, path: Sequence[int]) -> Job:
    ids = torch.tensor([path])

    def run(backward: bool) -> float:
        score = model(input_ids=ids, use_cache=False).logits[0, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, torch.tensor(1.0))
        if backward:
            loss.backward()
        return float(loss.detach())

    return Job("separate", run, len(path))


def trl_trainer(model: Any, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> RewardTrainer:
    """TRL's trainer on token ids, nothing dropped, as fast as it goes in float32."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tokenizers" / "smollm2")
    tokenizer.pad_token = "<|endoftext|>"
    data = Dataset.from_dict(
        {"chosen_ids": [list(a) for a, _ in pairs], "rejected_ids": [list(b) for _, b in pairs]}
    )
    folder = tempfile.mkdtemp()
    arguments = RewardConfig(
        output_dir=folder,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    if len(trainer.train_dataset) != len(pairs):
        raise RuntimeError(f"TRL kept {len(trainer.train_dataset)} of {len(pairs)} pairs")
    trainer.current_gradient_accumulation_steps = 1  # else set by `train()`, which is not timed
    return trainer


def trl_job(trainer: RewardTrainer, size: int) -> Job:
    rows = [trainer.train_dataset[i] for i in range(size)]

    def run(backward: bool) -> float:
        batch = trainer.data_collator(rows)
        if backward:
            return float(trainer.training_step(trainer.model, batch))
        return float(trainer.compute_loss(trainer.model, batch).detach())

    tokens = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    return Job(f"trl b={size}", run, tokens)


class MemoryWatch:
    """Largest growth of resident memory inside the `with` block, in gigabytes (10⁹ bytes)."""

    def __enter__(self) -> MemoryWatch:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by the last job counts as this one's
        self.peak_gb, self._start, self._done = 0.0, self._resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak_gb = max(self.peak_gb, (self._resident() - self._start) / 1e9)

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096


def measure(
    jobs: Sequence[Job], model: Any, repeats: int, rng: random.Random
) -> dict[tuple[str, str], Measure]:
    """Time every job forward and forward + backward, interleaved, `repeats` times."""
    todo = [(job, way) for job in jobs for way in ("forward", "train")]
    seconds: dict[tuple[str, str], list[float]] = {(job.name, way): [] for job, way in todo}
    peaks: dict[tuple[str, str], float] = dict.fromkeys(seconds, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that no job pays for making them
    for repeat in range(repeats):
        rng.shuffle(todo)
        for job, way in todo:
            with MemoryWatch() as memory, torch.set_grad_enabled(way == "train"):
                start = time.perf_counter()
                job.run(way == "train")
                took = time.perf_counter() - start
            seconds[job.name, way].append(took)
            peaks[job.name, way] = max(peaks[job.name, way], memory.peak_gb)
            print(
                f"repeat {repeat + 1}/{repeats}  {job.name:<22} {way:<8} {took:8.2f} s  "
                f"{job.tokens / took:7.0f} tokens/s  peak +{memory.peak_gb:.2f} GB",
                flush=True,
            )
    return {key: Measure(tuple(s), peaks[key]) for key, s in seconds.items()}


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run only these jobs, by name")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    options, started = parse(), time.perf_counter()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    config = LlamaConfig(
        **SMOLLM2 | {"num_hidden_layers": options.layers}, num_labels=1, pad_token_id=0
    )
    model = LlamaForSequenceClassification(config).float().train()

    jobs: list[Job] = []
    for n in RESPONSES:
        for k in CRITERIA:
            tree = random_tree(n, k, rng)
            verdicts = [[r < n // 2 for r in range(n)]] * k
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
