"""What the tree-packing benchmarks run: random trees, their pairs, and jobs to time on a CPU.

Used by `tree_packing.py` and, with other sizes, by its modes in `tree_packing_grid.py` and
`tree_packing_gpu.py`.
"""

from __future__ import annotations

import ctypes
import gc
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
from trl import RewardConfig, RewardTrainer

from promedical.reward_model.attention import score_row
from promedical.reward_model.loss import LossTerms, rubric_loss
from promedical.reward_model.tree import Leaf, PackedRow, Tree

ROOT = Path(__file__).parent.parent
X, Y, C = 200, 400, 40
DISCORDANT = 0.3
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


@dataclass(frozen=True)
class Lengths:
    """Tokens of a conversation, a response and a criterion."""

    x: int = X
    y: int = Y
    c: int = C

    def tree(self, n: int, k: int) -> int:
        """Tokens of a tree with n responses and k criteria."""
        return self.x + n * self.y + n * k * self.c

    @property
    def path(self) -> int:
        return self.x + self.y + self.c


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


def smollm2(**changes: int) -> LlamaForSequenceClassification:
    """A classifier of SmolLM2-135M's shape, random weights, float32, but for some changes."""
    config = LlamaConfig(**SMOLLM2 | changes, num_labels=1, pad_token_id=0)
    return LlamaForSequenceClassification(config).float().train()


def random_tree(
    n: int,
    k: int,
    rng: random.Random,
    lengths: Lengths = Lengths(),
    vocabulary: int = VOCABULARY,
) -> Tree:
    """x → n responses → k criteria each, of these lengths."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(20, vocabulary) for _ in range(count))

    questions = [ids(lengths.c) for _ in range(k)]
    leaves = tuple(Leaf(r, c, questions[c]) for r in range(n) for c in range(k))
    return Tree(ids(lengths.x), tuple(ids(lengths.y) for _ in range(n)), leaves)


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


def even_verdicts(n: int, k: int) -> list[list[bool]]:
    """Verdicts in which every criterion splits the responses evenly: every leaf is in a pair."""
    return [[r < n // 2 for r in range(n)]] * k


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


def trl_trainer(
    model: Any, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], **settings: Any
) -> RewardTrainer:
    """TRL's trainer on token ids, nothing dropped, in the model's own precision.

    Args:
        settings: of TRL's `RewardConfig`.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tokenizers" / "smollm2")
    tokenizer.pad_token = "<|endoftext|>"
    data = Dataset.from_dict(
        {"chosen_ids": [list(a) for a, _ in pairs], "rejected_ids": [list(b) for _, b in pairs]}
    )
    folder = tempfile.mkdtemp()
    plain = {"use_cpu": True, "gradient_checkpointing": False}
    arguments = RewardConfig(
        output_dir=folder,
        max_length=None,
        bf16=False,  # no autocast
        report_to="none",
        disable_tqdm=True,
        **plain | settings,
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
