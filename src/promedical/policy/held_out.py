"""Held-out prompts and criteria for the gold judge: what no training side has.

Held out means: no conversation of the training side, and no criterion of proficiency or excellence
that a training rubric has too, the universal ones apart, which every rubric shares by design. All
vetoes stay. What is compared is normalised text; near duplicates are the affair of the splits
(`corpus.splits`, `corpus.overlap`). What is left out is counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from promedical.corpus.banks import UNIVERSAL_IDS
from promedical.corpus.overlap import normalise
from promedical.records import GradedInstruction, read_dataset, read_jsonl
from promedical.rubric import Criterion, Tier

__all__ = ["HeldOutError", "Sample", "held_out", "read_held_out"]


class HeldOutError(ValueError):
    """Rows of which none can be used."""


@dataclass(frozen=True)
class Sample:
    """The held-out prompts.

    Args:
        rows: with rubrics, without responses, by id.
        left_out: reason → number of rows that could not be used.
        criteria_left_out: criteria that a training rubric has too.
    """

    rows: tuple[GradedInstruction, ...]
    left_out: Mapping[str, int]
    criteria_left_out: int


def read_held_out(path: Path | None) -> list[GradedInstruction]:
    """The rows to draw from: a dataset folder, JSON lines, or K-QA's calibration side.

    Raises:
        RecordError: the file cannot be read.
    """
    if path is None:
        from promedical.demo.kqa import load_kqa

        return load_kqa().calibration
    return read_dataset(path) if path.is_dir() else read_jsonl(path)


def held_out(
    rows: Sequence[GradedInstruction],
    training: Sequence[GradedInstruction],
    *,
    prompts: int,
    seed: int = 0,
) -> Sample:
    """Draw the sample, of prompts and criteria that the training side has not.

    Args:
        rows: to draw from.
        training: the rows that the policy is trained on.
        prompts: size of the sample, fewer if there are not so many.
        seed: of the draw.

    Raises:
        HeldOutError: no row is left.
    """
    asked = {_asked(row) for row in training}
    known = {
        normalise(c.text)
        for row in training
        if row.rubric is not None
        for c in row.rubric.criteria
        if _own(c)
    }
    left_out: Counter[str] = Counter()
    shared = 0
    usable: dict[str, GradedInstruction] = {}
    for row in rows:
        if row.rubric is None or row.rubric.safety_only:
            left_out["without a rubric that gives a reward"] += 1
            continue
        if _asked(row) in asked:
            left_out["asked in training too"] += 1
            continue
        if row.id in usable:
            left_out["id repeats"] += 1
            continue
        dropped = {c.id for c in row.rubric.criteria if _own(c) and normalise(c.text) in known}
        shared += len(dropped)
        rubric = row.rubric.restricted_to({c.id for c in row.rubric.criteria} - dropped)
        if rubric is None:
            left_out["no criterion of proficiency of its own"] += 1
            continue
        usable[row.id] = replace(row, rubric=rubric, responses=())
    if not usable:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise HeldOutError(f"held-out prompts: none of {len(rows)} rows can be used ({reasons})")
    drawn = random.Random(seed).sample(sorted(usable), min(prompts, len(usable)))
    return Sample(tuple(usable[i] for i in sorted(drawn)), dict(left_out), shared)


def _own(criterion: Criterion) -> bool:
    """Whether it is a criterion of its question alone, which can be held out."""
    return criterion.tier is not Tier.VETO and criterion.id not in UNIVERSAL_IDS


def _asked(row: GradedInstruction) -> tuple[tuple[str, str], ...]:
    return tuple((m.role, normalise(m.content)) for m in row.messages)
