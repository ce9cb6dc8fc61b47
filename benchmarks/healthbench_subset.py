"""The subset of graded answers that `benchmarks/healthbench.py` trains and measures on.

Chosen by length and by a hash, never by a label; the same for every system.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from promedical.corpus.sources.healthbench_graded import Splits
from promedical.records import GradedInstruction, Response
from promedical.reward_model.instances import cut_rubric

__all__ = ["CALIBRATION", "TEST", "ExperimentError", "Subset", "select", "subset", "token_lengths"]

CALIBRATION, TEST = 0.15, 0.25  # shares of the distinct last user turns


class ExperimentError(ValueError):
    """Options, data or earlier results that the experiment cannot go on with."""


@dataclass(frozen=True)
class Subset:
    """The rows of each split, as every system sees them, and what was left out."""

    train: tuple[GradedInstruction, ...]
    calibration: tuple[GradedInstruction, ...]
    test: tuple[GradedInstruction, ...]
    counts: dict[str, dict[str, int]]

    @property
    def held(self) -> list[GradedInstruction]:
        """Calibration and test rows, which are scored."""
        return [*self.calibration, *self.test]


def select(
    rows: Sequence[GradedInstruction],
    count: Callable[[str], int],
    *,
    instructions: int,
    responses: int,
    max_tokens: int,
    seed: int,
) -> tuple[list[GradedInstruction], dict[str, int]]:
    """The first instructions whose answers are short enough; no label is looked at.

    Args:
        count: tokens of a text.
        instructions, responses: how many of them; 0 for all.
        max_tokens: of conversation and answer together.

    Returns:
        The rows, and counts of what was left out and why.
    """

    def order(name: str) -> str:
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    kept: list[GradedInstruction] = []
    counts: Counter[str] = Counter(candidates=len(rows))
    for row in sorted(rows, key=lambda row: order(row.id)):
        if instructions and len(kept) == instructions:
            counts["instructions_not_needed"] += 1
            continue
        prompt = sum(count(message.content) for message in row.messages)
        short = [r for r in row.responses if prompt + count(r.text) <= max_tokens]
        counts["responses_too_long"] += len(row.responses) - len(short)
        if len(short) < 2:
            counts["instructions_with_fewer_than_two_short_responses"] += 1
            continue
        chosen: list[Response] = sorted(short, key=lambda r: order(f"{row.id}:{r.id}"))
        chosen = chosen[:responses] if responses else chosen
        counts["responses_not_needed"] += len(short) - len(chosen)
        kept.append(row.with_responses(chosen))
    counts["instructions"] = len(kept)
    counts["responses"] = sum(len(row.responses) for row in kept)
    return kept, dict(counts)


def subset(parts: Splits, count: Callable[[str], int], options: argparse.Namespace) -> Subset:
    """Choose from each split, and cut the training rubrics."""
    sizes = {
        "train": options.instructions,
        "calibration": options.calibration_instructions,
        "test": options.test_instructions,
    }
    chosen: dict[str, list[GradedInstruction]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        chosen[name], counts[name] = select(
            getattr(parts, name),
            count,
            instructions=size,
            responses=options.responses,
            max_tokens=options.max_tokens,
            seed=options.split_seed,
        )
        if not chosen[name]:
            raise ExperimentError(
                f"--max-tokens {options.max_tokens}: leaves no instruction of the {name} split "
                "with two answers"
            )
    if options.max_criteria:
        chosen["train"] = [
            cut_rubric(row, max_criteria=options.max_criteria, seed=options.split_seed)
            for row in chosen["train"]
        ]
    return Subset(*(tuple(chosen[name]) for name in sizes), counts=counts)


def token_lengths(
    rows: Sequence[GradedInstruction], count: Callable[[str], int]
) -> dict[str, list[int]]:
    """Deciles of the whole file's lengths in tokens: conversation, answer, criterion."""
    lengths = {
        "conversation": [sum(count(m.content) for m in row.messages) for row in rows],
        "response": [count(r.text) for row in rows for r in row.responses],
        "criterion": [count(c.text) for row in rows if row.rubric for c in row.rubric.criteria],
    }
    at = np.arange(0.1, 1, 0.1)
    return {name: np.quantile(v, at).astype(int).tolist() for name, v in lengths.items()}
