"""What tree packing saves on one GPU, with the shape of Qwen3-8B and random weights in bfloat16.

    python benchmarks/tree_packing.py --gpu               # LoRA, gradient checkpointing; 80 GB
    python benchmarks/tree_packing.py --gpu --full        # every weight trained
    python benchmarks/tree_packing.py --gpu --small --out result.json   # a try, also on a CPU

Instructions have |x| = 200, |y| = 400, |c| = 40, n = 4 responses and K = 8 criteria. Several trees
share a row (best fit, `--row-tokens`). Forward + backward of all rows is timed after a first pass
that compiles and allocates, for "level" and for "flex"; no optimiser step, it is the same for all.

TRL's RewardTrainer trains the same model on the expanded pairs, in batches of 1, 2, 4, … up to what
fits in memory; its time is that of its best batch size, per pair, times the pairs (all of one
shape). Synthetic: every criterion splits the responses evenly. Real discordance: 30 % of the
criteria divide the responses; the pruned trees against TRL's pairs, and pairwise + pointwise on
whole trees.

Floating-point operations of the trees: 6P (full) or 4P (LoRA) per unique token, P the weights of
the decoder layers, and attention on visible pairs; recomputation is not counted. They are divided
by the time and by the rate of an 8192³ bfloat16 matrix product measured in this run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForSequenceClassification
from transformers.utils import logging as transformers_logging
from tree_packing_jobs import (
    DISCORDANT,
    ROOT,
    Lengths,
    even_verdicts,
    pairs_of,
    random_tree,
    real_verdicts,
    terms_of,
    trl_trainer,
)

from promedical.provenance import provenance
from promedical.reward_model.attention import Implementation, score_row
from promedical.reward_model.balance_rows import cost
from promedical.reward_model.loss import rubric_loss
from promedical.reward_model.tree import PackedRow, Packing, Tree, pack, paths

RESULT = ROOT / "benchmarks" / "results" / "tree_packing_gpu.json"
IMPLEMENTATIONS: tuple[Implementation, ...] = ("level", "flex")
AIMS = {"times TRL, synthetic": 8.0, "share of the matrix rate": 0.45}
QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 49152,  # the tokenizer that TRL is given has ids up to here
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Setup:
    """The sizes of a run."""

    n: int = 4
    k: int = 8
    lengths: Lengths = Lengths()  # noqa: RUF009  frozen
    trees: int = 32
    row_tokens: int = 8192
    matrix: int = 8192
    largest_batch: int = 128


SMALL = Setup(2, 2, Lengths(12, 15, 5), trees=3, row_tokens=150, matrix=128, largest_batch=4)


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat and the peak of allocated memory, in gigabytes (10⁹ bytes)."""

    seconds: tuple[float, ...]
    peak_gb: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(run: Callable[[], None], device: torch.device, repeats: int) -> Timing:
    """Time `run`, after a first call that is not timed (compilation, allocation)."""
    cuda = device.type == "cuda"

    def once() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = tuple(once() for _ in range(repeats))
    return Timing(seconds, torch.cuda.max_memory_allocated() / 1e9 if cuda else None)


def matrix_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    return 2 * size**3 / timed(run, device, 10).median


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, rank: int) -> Any:
    """A classifier with random weights, made on the device; with LoRA on every linear layer."""
    config = Qwen3Config(**shape, num_labels=1, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = Qwen3ForSequenceClassification(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    if rank:
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            modules_to_save=["score"],
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def layer_parameters(model: Any) -> int:
    """P: weights of the decoder layers, which every token is multiplied with; not LoRA's own."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".layers." in name and "lora" not in name
    )


def tree_pass(
    model: Any, rows: Sequence[PackedRow], points: bool, implementation: Implementation
) -> Callable[[], None]:
    """Forward + backward of every row, as a step that accumulates them."""
    terms = [terms_of(row, points) for row in rows]
    items = sum(t.items for t in terms)

    def run() -> None:
        for row, row_terms in zip(rows, terms, strict=True):
            (rubric_loss(score_row(model, row, implementation), row_terms) / items).backward()
        model.zero_grad(set_to_none=False)

    return run


def measure_trees(
    model: Any, packing: Packing, points: bool, setup: Setup, options: Any, device: torch.device
) -> dict[str, Any]:
    """Time, memory and operations of the packed trees, for every implementation that can run."""
    config, rows = model.config, packing.rows
    operations = sum(
        cost(
            row,
            parameters=layer_parameters(model),
            layers=config.num_hidden_layers,
            width=config.num_attention_heads * config.head_dim,
            full=options.full,
        )
        for row in rows
    )
    found: dict[str, Any] = {
        "rows": len(rows),
        "unique_tokens": sum(map(len, rows)) - packing.repeated_tokens,
        "repeated_tokens": packing.repeated_tokens,
        "row_fill": sum(map(len, rows)) / (len(rows) * setup.row_tokens),
        "leaves": sum(len(row.leaves) for row in rows),
        "pairs": sum(len(row.pairs) for row in rows),
        "leaves_of_largest_row": max(len(row.leaves) for row in rows),
        "operations": operations,
    }
    for name in IMPLEMENTATIONS:
        if name == "flex" and device.type == "cpu":
            found[name] = {"left_out": "FlexAttention has no backward pass on a CPU"}
            continue
        taken = timed(tree_pass(model, rows, points, name), device, options.repeats)
        found[name] = asdict(taken) | {
            "median_s": taken.median,
            "tokens_per_s": found["unique_tokens"] / taken.median,
            "operations_per_s": operations / taken.median,
        }
        print(f"trees {name:<8} {taken.median:8.3f} s  peak {taken.peak_gb} GB", flush=True)
    return found


def measure_trl(
    model: Any, pairs: list[Any], setup: Setup, options: Any, device: torch.device
) -> list[dict[str, Any]]:
    """TRL's training step at every batch size that fits, per pair."""
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = trl_trainer(
        model,
        pairs,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=options.checkpointing,
        **checkpointing if options.checkpointing else {},
    )
    found: list[dict[str, Any]] = []
    size = 1
    while size <= min(setup.largest_batch, len(pairs)):
        rows = [trainer.train_dataset[i] for i in range(size)]

        def run(rows: list[Any] = rows) -> None:
            trainer.training_step(trainer.model, trainer.data_collator(rows))
            trainer.model.zero_grad(set_to_none=False)

        try:
            taken = timed(run, device, options.repeats)
        except torch.cuda.OutOfMemoryError:
            found.append({"batch": size, "left_out": "out of memory"})
            torch.cuda.empty_cache()
            break
        found.append(asdict(taken) | {"batch": size, "s_per_pair": taken.median / size})
        print(f"trl b={size:<4} {taken.median:8.3f} s  peak {taken.peak_gb} GB", flush=True)
        size *= 2
    return found


def workloads(setup: Setup, vocabulary: int, rng: random.Random) -> dict[str, Any]:
    """Trees, their pairs and whether every leaf has a pointwise term, by name."""
    trees = [
        random_tree(setup.n, setup.k, rng, setup.lengths, vocabulary) for _ in range(setup.trees)
    ]
    even = [pairs_of(tree, even_verdicts(setup.n, setup.k)) for tree in trees]
    real = [pairs_of(tree, real_verdicts(setup.n, setup.k, rng)) for tree in trees]
    return {
        "synthetic": (trees, even, False),
        "real discordance, pairwise": (trees, real, False),
        "real discordance, pairwise + pointwise": (trees, real, True),
    }


def pack_workload(
    trees: Sequence[Tree], pairs: Sequence[Any], points: bool, setup: Setup
) -> Packing:
    every = [range(len(tree.leaves)) for tree in trees] if points else None
    return pack(trees, setup.row_tokens, pairs, every, share_rows=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="train every weight, not LoRA")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--row-tokens", type=int, default=None)
    parser.add_argument("--trees", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, default=RESULT)
    options, started = parser.parse_args(argv), time.perf_counter()
    if options.small and options.out == RESULT:
        parser.error("--small measures nothing worth keeping: give it an --out of its own")
    if not torch.cuda.is_available() and not options.small:
        sys.exit("no CUDA device was found: nothing is measured, and nothing is estimated")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformers_logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    setup = SMALL if options.small else Setup()
    setup = replace(
        setup,
        trees=options.trees or setup.trees,
        row_tokens=options.row_tokens or setup.row_tokens,
    )
    shape = TINY if options.small else QWEN3_8B
    rate = matrix_rate(setup.matrix, device, dtype)
    print(f"matrix product {setup.matrix}³: {rate / 1e12:.1f} Tflop/s", flush=True)
    model = make_model(shape, device, dtype, 0 if options.full else options.lora_rank)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if not options.full:
            model.enable_input_require_grads()

    jobs = workloads(setup, min(shape["vocab_size"], TINY["vocab_size"]), rng)
    trees, even, _ = jobs["synthetic"]
    same = check_losses(model, trees[0], even[0], device, options)
    found = {
        name: measure_trees(model, pack_workload(*job, setup), job[2], setup, options, device)
        for name, job in jobs.items()
    }
    expanded = [
        (every[a], every[b])
        for tree, pairs in zip(trees, even, strict=True)
        for every in (paths(tree),)
        for a, b in pairs
    ]
    trl = measure_trl(model, expanded[: setup.largest_batch], setup, options, device)
    summary = summarise(found, trl, rate)
    settings = asdict(setup) | {
        "model": "tiny" if options.small else "random weights in the shape of Qwen3-8B",
        "layer_parameters": layer_parameters(model),
        "trained": "all" if options.full else f"LoRA, rank {options.lora_rank}, all linear layers",
        "gradient_checkpointing": options.checkpointing,
        "dtype": str(dtype).removeprefix("torch."),
        "discordant": DISCORDANT,
        "repeats": options.repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "small": options.small,
    }
    result = {
        "provenance": provenance(seed=options.seed, recipe=settings, started=started),
        "settings": settings,
        "matrix_rate": rate,
        "losses_of_the_same_pairs": same,
        "aims": AIMS,
        "summary": summary,
        "trees": found,
        "trl": trl,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(summary, indent=1))


def check_losses(
    model: Any, tree: Tree, pairs: list[tuple[int, int]], device: torch.device, options: Any
) -> dict[str, float]:
    """The mean pairwise loss of one tree, by every implementation and on separate sequences."""
    (row,) = pack([tree], 10**6, [pairs])
    terms = terms_of(row)
    with torch.no_grad():
        found = {
            name: float(rubric_loss(score_row(model, row, name), terms)) / terms.items
            for name in IMPLEMENTATIONS
        }
        scores = torch.stack(
            [
                model(input_ids=torch.tensor([path], device=device)).logits[0, 0].float()
                for path in paths(tree)
            ]
        )
        margins = torch.stack([scores[a] - scores[b] for a, b in pairs])
        found["separate"] = float(-torch.nn.functional.logsigmoid(margins).mean())
    # bfloat16 rounds differently in every order of summation; a wrong mask errs far more.
    allowed = 0.05 if device.type == "cuda" else 1e-4
    if max(found.values()) - min(found.values()) > allowed:
        raise RuntimeError(f"losses differ by more than {allowed}: {found}")
    return found


def summarise(
    found: dict[str, Any], trl: list[dict[str, Any]], rate: float
) -> list[dict[str, Any]]:
    """For each workload and implementation: times TRL, share of the matrix rate, peak memory."""
    best = min((t for t in trl if "s_per_pair" in t), key=lambda t: t["s_per_pair"], default=None)
    lines = []
    for name, measured in found.items():
        for implementation in IMPLEMENTATIONS:
            tree = measured[implementation]
            if "left_out" in tree:
                continue
            line = {
                "workload": name,
                "implementation": implementation,
                "tree_s": tree["median_s"],
                "share_of_matrix_rate": tree["operations_per_s"] / rate,
                "tree_peak_gb": tree["peak_gb"],
            }
            if best is not None and not name.endswith("pointwise"):  # TRL has no pointwise term
                # TRL's batch with as many leaves as the largest row, or the largest below that.
                alike = [
                    t
                    for t in trl
                    if "peak_gb" in t and 2 * t["batch"] <= measured["leaves_of_largest_row"]
                ]
                line |= {
                    "trl_s": best["s_per_pair"] * measured["pairs"],
                    "trl_batch": best["batch"],
                    "times_trl": best["s_per_pair"] * measured["pairs"] / tree["median_s"],
                    "trl_peak_gb_at_its_best": best["peak_gb"],
                    "trl_peak_gb_at_as_many_leaves": alike[-1]["peak_gb"] if alike else None,
                    "trl_leaves_there": 2 * alike[-1]["batch"] if alike else None,
                }
            lines.append(line)
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
