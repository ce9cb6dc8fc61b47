"""How fast grading is: trees against padded batches and against a reused KV cache.

    python benchmarks/grading.py                  # the full run, a few minutes on 2 cores
    python benchmarks/grading.py --small --out result.json       # a try, with a tiny random model

The work is K-QA: questions of its bench side, for each of them four answers by physicians (its own
and those to the next questions), and the first criteria of its rubric. Every contestant scores
every (answer, criterion) with the same weights, SmolLM2-135M-Instruct in float32 with the head that
compares Yes and No, in one process, in random order within each repeat. A figure is the median over
repeats, and "judgments" are answers × criteria. Scores are compared: they must agree.

tree       `RubricRewardModel.grade_many`: tokenising, packing, scoring, verdicts
padded     every path as a sequence, sorted by length, in right-padded batches of each size, by
           transformers alone, tokenising not counted; the best size is the one compared with
kv         transformers with the prefix (question, answer) read once into a KV cache, then all its
           criteria as one batch that reuses it, tokenising not counted
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from promedical.demo.kqa import load_kqa
from promedical.provenance import provenance
from promedical.records import GradedInstruction, Response, fingerprint
from promedical.reward_model.grade import GradeRequest, RubricRewardModel
from promedical.reward_model.model import TreeRewardModel, initialise
from promedical.reward_model.render import ensure_pad
from promedical.reward_model.tree import Tree, pack, paths

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "grading.json"
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "smollm2"
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Size:
    """How much work: questions, answers to each, criteria of each, batch sizes, repeats."""

    questions: int = 2
    answers: int = 4
    criteria: int = 8
    batches: tuple[int, ...] = (1, 4, 16)
    repeats: int = 3


SMALL = Size(questions=1, answers=2, criteria=3, batches=(1, 4), repeats=1)


@dataclass(frozen=True)
class Contestant:
    """One way to score everything.

    Args:
        run: gives s of every question's every (answer, criterion), in order.
        tokens: tokens that it reads, padding included.
    """

    name: str
    run: Callable[[], list[float]]
    tokens: int


def the_work(size: Size) -> list[GradedInstruction]:
    """Questions with at least so many criteria, each with its own answer and its neighbours'."""
    rows = [
        row
        for row in load_kqa().bench
        if row.rubric is not None and row.reference and len(row.rubric.criteria) >= size.criteria
    ]
    work = []
    for n, row in enumerate(rows[: size.questions]):
        assert row.rubric is not None
        answers = [rows[(n + i) % len(rows)].reference or "" for i in range(size.answers)]
        # The rubric's first criteria, in its order of tiers; weights are not used here.
        kept = {criterion.id for criterion in row.rubric.criteria[: size.criteria]}
        rubric = row.rubric.restricted_to(kept)
        assert rubric is not None
        work.append(
            GradedInstruction(
                id=row.id,
                messages=row.messages,
                source=row.source,
                licence=row.licence,
                rubric=rubric,
                responses=tuple(
                    Response(f"a{i}", "physician", text) for i, text in enumerate(answers)
                ),
            )
        )
    return work


def small_model() -> tuple[Any, Any]:
    """A tiny random model, for a try."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.15,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config).eval()
    ensure_pad(tokenizer, model)
    return model, tokenizer


def embedded_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with a head that compares Yes and No."""
    from promedical.demo.models import resolve_model

    model, tokenizer = initialise(resolve_model(notify=print))
    return model.eval(), tokenizer


def tree_contestant(grader: RubricRewardModel, work: Sequence[GradedInstruction]) -> Contestant:
    requests = [
        GradeRequest(row.messages, [r.text for r in row.responses], row.rubric, id=row.id)
        for row in work
        if row.rubric is not None
    ]

    def run() -> list[float]:
        results = grader.grade_many(requests)
        return [s for result in results for grade in result.grades for s in grade.raw.values()]

    rows = pack(trees_of(grader, work), grader.max_tokens, share_rows=True)
    return Contestant("tree", run, sum(map(len, rows)))


def trees_of(grader: RubricRewardModel, work: Sequence[GradedInstruction]) -> list[Tree]:
    return [
        grader.renderer.tree(
            row.messages,
            [r.text for r in row.responses],
            [(r, c.text) for r in range(len(row.responses)) for c in row.rubric.criteria],
        )
        for row in work
        if row.rubric is not None
    ]


def padded_contestant(model: Any, pad: int, trees: Sequence[Tree], size: int) -> Contestant:
    every = [path for tree in trees for path in paths(tree)]
    order = sorted(range(len(every)), key=lambda i: len(every[i]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def run() -> list[float]:
        found = [math.nan] * len(every)
        for batch in batches:
            ids, mask = right_padded([every[i] for i in batch], pad)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
            for i, s in zip(batch, logits.tolist(), strict=True):
                found[i] = s
        return found

    tokens = sum(len(batch) * max(len(every[i]) for i in batch) for batch in batches)
    return Contestant(f"padded, batch {size}", run, tokens)


def kv_contestant(model: Any, pad: int, trees: Sequence[Tree]) -> Contestant:
    """The prefix of each answer once; leaves of one answer follow each other in a tree."""

    def below(tree: Tree, response: int) -> list[tuple[int, ...]]:
        return [leaf.tokens for leaf in tree.leaves if leaf.response == response]

    def run() -> list[float]:
        found: list[float] = []
        for tree in trees:
            for r, response in enumerate(tree.responses):
                found += reused(model, pad, tree.prompt + response, below(tree, r))
        return found

    tokens = 0
    for tree in trees:
        for r, response in enumerate(tree.responses):
            asked = below(tree, r)
            tokens += len(tree.prompt) + len(response) + len(asked) * max(map(len, asked))
    return Contestant("kv", run, tokens)


def reused(
    model: Any, pad: int, prefix: Sequence[int], criteria: Sequence[Sequence[int]]
) -> list[float]:
    """s of every criterion after one prefix, whose keys and values are computed once."""
    with torch.inference_mode():
        cache = DynamicCache()
        model.base_model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(criteria))
        ids, mask = right_padded(criteria, pad)
        whole = torch.cat([torch.ones(len(criteria), len(prefix), dtype=mask.dtype), mask], dim=1)
        out = model.base_model(
            input_ids=ids, attention_mask=whole, past_key_values=cache, use_cache=True
        )
        last = mask.sum(dim=1) - 1
        states = out.last_hidden_state[torch.arange(len(criteria)), last]
        scores: list[float] = model.score(states)[:, 0].tolist()
        return scores


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def measure(
    contestants: Sequence[Contestant], repeats: int, rng: random.Random
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every repeat, and the largest difference between two contestants' scores."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    reference = contestants[0].run()  # warms up, too
    gap = 0.0
    order = list(contestants)
    for repeat in range(repeats):
        rng.shuffle(order)
        for contestant in order:
            start = time.perf_counter()
            found = contestant.run()
            took = time.perf_counter() - start
            seconds[contestant.name].append(took)
            gap = max(gap, *(abs(a - b) for a, b in zip(found, reference, strict=True)))
            if not gap <= TOLERANCE:
                raise RuntimeError(f"{contestant.name}: scores differ by {gap}")
            print(
                f"repeat {repeat + 1}/{repeats}  {contestant.name:<18} {took:7.2f} s  "
                f"{len(found) / took:6.1f} judgments/s",
                flush=True,
            )
    return seconds, gap


def lengths(trees: Sequence[Tree]) -> dict[str, float]:
    """Mean tokens of a prompt, an answer and a criterion."""
    return {
        "x": statistics.mean(len(tree.prompt) for tree in trees),
        "y": statistics.mean(len(y) for tree in trees for y in tree.responses),
        "c": statistics.mean(len(f.tokens) for tree in trees for f in tree.leaves),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tiny random model, little work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, started = parse(argv), time.perf_counter()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    size = SMALL if options.small else Size()
    model, tokenizer = small_model() if options.small else embedded_model()
    plain = copy.deepcopy(model)  # a tree sets the other's attention implementation for good
    grader = RubricRewardModel(TreeRewardModel(model), tokenizer)
    work = the_work(size)
    trees = trees_of(grader, work)
    pad = tokenizer.pad_token_id
    contestants = [
        tree_contestant(grader, work),
        kv_contestant(plain, pad, trees),
        *(padded_contestant(plain, pad, trees, batch) for batch in size.batches),
    ]
    seconds, gap = measure(contestants, size.repeats, random.Random(options.seed))
    judgments = sum(len(tree.leaves) for tree in trees)
    table = {
        c.name: {
            "seconds": seconds[c.name],
            "median_s": statistics.median(seconds[c.name]),
            "judgments_per_s": judgments / statistics.median(seconds[c.name]),
            "tokens_read": c.tokens,
        }
        for c in contestants
    }
    padded = [f"padded, batch {batch}" for batch in size.batches]
    best = min(padded, key=lambda name: table[name]["median_s"])
    settings = {
        "model": "tiny, random" if options.small else "SmolLM2-135M-Instruct, Yes against No",
        "dtype": "float32",
        "threads": options.threads,
        "questions": len(work),
        "answers": size.answers,
        "criteria": size.criteria,
        "judgments": judgments,
        "mean_tokens": lengths(trees),
        "batches": size.batches,
        "repeats": size.repeats,
    }
    result = {
        "provenance": provenance(
            seed=options.seed,
            recipe=settings,
            data_fingerprint=fingerprint(work),
            started=started,
        ),
        "settings": settings,
        "contestants": table,
        "best_padded": best,
        "times_faster": {
            "than padded": table[best]["median_s"] / table["tree"]["median_s"],
            "than kv": table["kv"]["median_s"] / table["tree"]["median_s"],
        },
        "fewer_tokens": {
            "than padded": table[best]["tokens_read"] / table["tree"]["tokens_read"],
            "than kv": table["kv"]["tokens_read"] / table["tree"]["tokens_read"],
        },
        "largest_difference": gap,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({name: result[name] for name in ("best_padded", "times_faster")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
