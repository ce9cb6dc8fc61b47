"""Train, calibration and bench sides that share no instruction, nor a near-duplicate of one.

For step 8 of section 3. Near-duplicate questions are joined to components (`near`), and whole
components go to one side, so that nothing on one side is over a limit with anything on another. The
largest go first, each to the side that needs it most, by the target shares overall and within every
category; so a component larger than a side cannot end up in it if another has room.

Then the sides are compared with each other by other code (`overlap.find_overlaps`), all of them
where that is affordable, else a sample whose size is reported. What it finds over a limit is
joined, and the split is made again; a split that still fails is refused. Rows that ask what a
benchmark from elsewhere asks go to no side; a build has dropped them before, if it de-duplicates.
Left to others: what counts as that (`hold_out`), which rows are worth having (`dedup`, `screen`).

    reasons   held_out
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promedical.corpus.hold_out import DEMO, held_out, read_held_out
from promedical.corpus.near import Move, components
from promedical.corpus.overlap import LIMITS, Encoder, Limit, Overlap, find_overlaps
from promedical.corpus.stage import CorpusError, StageResult
from promedical.records import GradedInstruction

__all__ = ["SIDES", "SplitsSettings", "by_side", "check_splits", "splits"]

SIDES = ("train", "calibration", "bench")
# Components chain: a is near b, b near c. `overlap`'s limits, set on a few hundred questions, chain
# too far among many of one template ("What are the symptoms of …?"): on mixed public questions they
# join 41 % of 20,000 to one component. 4-grams alone at 0.40 join 16 % of 5,000, at 0.50 6 % and at
# 0.60 1.5 % of 10,000; the cosine alone at 0.80 joins 9 %, at 0.90 4 % and at 0.92 2 % of 40,000.
# The price: a question asked twice in other words can be under these. For a few hundred rows take
# `overlap.LIMITS`.
SPLIT_LIMIT = Limit(jaccard=0.60, cosine=0.90)
_TRIES = 3  # splits made before one that fails its check is refused


@dataclass(frozen=True)
class SplitsSettings:
    """Settings of the splits stage.

    Args:
        train, calibration, bench: target shares of the rows; they sum to 1.
        seed: the same rows, settings and seed give the same sides, in whatever order they come.
        jaccard: from which similarity of 4-grams on two questions belong together.
        cosine: the same for the cosine of embeddings, where there is an encoder.
        check_pairs: the most pairs of questions of two sides that the check compares.
        hold_out: benchmarks whose questions, and near-duplicates of them, are dropped (a build
            does that at its stage dedup already): folders of datasets, JSON lines, or "kqa-bench",
            on whose 50 questions the demo is evaluated.

    Raises:
        CorpusError: a setting out of its range.
    """

    train: float = 0.9
    calibration: float = 0.05
    bench: float = 0.05
    seed: int = 0
    jaccard: float = SPLIT_LIMIT.jaccard
    cosine: float = SPLIT_LIMIT.cosine
    check_pairs: int = 100_000_000
    hold_out: tuple[str, ...] = (DEMO,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hold_out", tuple(self.hold_out))
        for name in SIDES:
            if not 0 <= getattr(self, name) <= 1:
                raise CorpusError(f"{name}: found {getattr(self, name)!r}, expected 0 to 1")
        total = math.fsum(getattr(self, name) for name in SIDES)
        if abs(total - 1) > 1e-6:
            raise CorpusError(f"train, calibration, bench: sum to {total:g}, expected 1")
        for name in ("jaccard", "cosine"):
            if not getattr(self, name) > 0:
                raise CorpusError(f"{name}: found {getattr(self, name)!r}, expected more than 0")
        if self.check_pairs < 1:
            raise CorpusError(f"check_pairs: found {self.check_pairs!r}, expected at least 1")

    @property
    def limit(self) -> Limit:
        """From which similarity on two questions belong together."""
        return Limit(self.jaccard, self.cosine)

    @property
    def shares(self) -> dict[str, float]:
        """Side → target share, without the sides that are to be empty."""
        return {name: getattr(self, name) for name in SIDES if getattr(self, name) > 0}


def splits(
    rows: Sequence[GradedInstruction],
    settings: SplitsSettings,
    *,
    encoder: Encoder | None = None,
    progress: Move | None = None,
) -> StageResult:
    """Deal rows to sides.

    Args:
        rows: ids unique.
        settings: shares, limits, seed.
        encoder: adds the semantic measure; without it only n-grams are compared.
        progress: called with (what, done, total).

    Returns:
        The rows less those held out; apart: "splits", each row's side and component, which
        `by_side` reads.

    Raises:
        CorpusError: ids that repeat, sides that overlap after all, or a benchmark that cannot be
            read.
    """
    ids = [row.id for row in rows]
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise CorpusError(f"rows: id {repeated[0]!r} repeats, expected unique ids")
    benchmarks = read_held_out(settings.hold_out)
    dropped = held_out(rows, benchmarks, encoder=encoder)
    out = {d.id for d in dropped}
    rows = [row for row in rows if row.id not in out]
    ids = [row.id for row in rows]
    component = components(
        [_question(row) for row in rows], settings.limit, encoder=encoder, progress=progress
    )
    joined_by_check = 0
    for _ in range(_TRIES):
        side_of = _assign(rows, component, settings)
        check, over = _checked(rows, side_of, settings, encoder)
        if not over:
            break
        joined_by_check += len(over)
        component = _join(ids, component, over)
    else:
        raise CorpusError(
            f"splits: {len(over)} pairs of questions on two sides are over the limit, such as "
            f"{over[0].first!r} and {over[0].second!r}"
        )
    records = [
        {"id": i, "split": side_of[i], "component": int(c)}
        for i, c in zip(ids, component, strict=True)
    ]
    report = _report(rows, side_of, component, settings)
    report |= {"encoder": encoder is not None, "joined_by_check": joined_by_check, "check": check}
    report["held_out"] = {"questions": len(benchmarks), "rows": len(dropped)}
    return StageResult(rows, dropped, report, {"splits": records})


def by_side(
    rows: Sequence[GradedInstruction], records: Sequence[Mapping[str, Any]]
) -> dict[str, list[GradedInstruction]]:
    """The rows of each side, in order.

    Args:
        records: what `splits` keeps apart as "splits".

    Raises:
        CorpusError: a row without a side, or a side that is none of `SIDES`.
    """
    side_of = {record["id"]: record["split"] for record in records}
    sides: dict[str, list[GradedInstruction]] = {name: [] for name in SIDES}
    for row in rows:
        side = side_of.get(row.id)
        if side not in sides:
            raise CorpusError(f"row {row.id!r}: split: found {side!r}, expected one of {SIDES}")
        sides[side].append(row)
    return sides


def check_splits(
    sides: Mapping[str, Sequence[GradedInstruction]],
    settings: SplitsSettings,
    *,
    encoder: Encoder | None = None,
) -> tuple[dict[str, Any], list[Overlap]]:
    """Compare the questions of every two sides, without the index that made them.

    Returns:
        For "SIDE/SIDE": pairs compared, pairs there are, how many are over the limit, and the
        largest similarities seen; and the pairs over the limit.
    """
    rng = random.Random(f"{settings.seed}:check")
    report: dict[str, Any] = {}
    over: list[Overlap] = []
    for a, b in itertools.combinations(sides, 2):
        first, second = _affordable(sides[a], sides[b], settings.check_pairs, rng)
        found = find_overlaps(
            [_question_alone(row) for row in first],
            [_question_alone(row) for row in second],
            encoder=encoder,
            limits={**LIMITS, "question": settings.limit},
        )
        over += found.over
        report[f"{a}/{b}"] = {
            "compared": found.compared["question"],
            "of": len(sides[a]) * len(sides[b]),
            "over_limit": len(found.over),
            "largest_jaccard": max((o.jaccard for o in found.closest), default=None),
            "largest_cosine": max(
                (o.cosine for o in found.closest if o.cosine is not None), default=None
            ),
        }
    return report, over


def _question(row: GradedInstruction) -> str:
    """What `overlap` compares as the question: all that the user said."""
    return " ".join(m.content for m in row.messages if m.role == "user")


def _question_alone(row: GradedInstruction) -> GradedInstruction:
    # References and criteria would be compared too: they follow their question, and are many.
    return replace(row, reference=None, rubric=None, responses=())


# --- dealing --------------------------------------------------------------------------------------


def _assign(
    rows: Sequence[GradedInstruction], component: NDArray[np.int64], settings: SplitsSettings
) -> dict[str, str]:
    """Row id → side, the components dealt one by one, the largest first.

    Each goes where it lowers Σ (count − target)² / target most, taken over the categories and over
    all rows; the latter weighs as much as all categories together.
    """
    shares = settings.shares
    members: dict[int, list[GradedInstruction]] = {}
    for row, number in zip(rows, component.tolist(), strict=True):
        members.setdefault(number, []).append(row)
    order = sorted(members.values(), key=lambda group: (-len(group), _lot(group, settings.seed)))
    totals = Counter(row.category for row in rows)
    counts = {side: Counter[str | None]() for side in shares}
    dealt = Counter[str]()
    side_of: dict[str, str] = {}
    for group in order:
        adds = Counter(row.category for row in group)

        def cost(side: str, adds: Counter[str | None] = adds, n: int = len(group)) -> float:
            share = shares[side]
            within = (_growth(counts[side][c], share * totals[c], k) for c, k in adds.items())
            overall = _growth(dealt[side], share * len(rows), n)
            return math.fsum(within) + len(totals) * overall

        best = min(shares, key=cost)
        counts[best] += adds
        dealt[best] += len(group)
        side_of |= {row.id: best for row in group}
    return side_of


def _growth(count: float, target: float, added: float) -> float:
    """((count + added − target)² − (count − target)²) / target."""
    return added * (2 * (count - target) + added) / target


def _lot(group: Sequence[GradedInstruction], seed: int) -> str:
    """A component's place among those of its size; it does not depend on the order of rows."""
    smallest = min(row.id for row in group)
    return hashlib.sha256(f"{seed}:{smallest}".encode("utf-8", "surrogatepass")).hexdigest()


# --- checking -------------------------------------------------------------------------------------


def _checked(
    rows: Sequence[GradedInstruction],
    side_of: Mapping[str, str],
    settings: SplitsSettings,
    encoder: Encoder | None,
) -> tuple[dict[str, Any], list[Overlap]]:
    sides = by_side(rows, [{"id": i, "split": side} for i, side in side_of.items()])
    used = {name: group for name, group in sides.items() if group}
    return check_splits(used, settings, encoder=encoder)


def _affordable(
    first: Sequence[GradedInstruction],
    second: Sequence[GradedInstruction],
    most: int,
    rng: random.Random,
) -> tuple[Sequence[GradedInstruction], Sequence[GradedInstruction]]:
    """Both sides, or samples of them with at most `most` pairs, the smaller whole if it can be."""
    if len(first) * len(second) <= most:
        return first, second
    small, large = sorted((len(first), len(second)))
    few = min(small, math.isqrt(most))
    many = min(large, most // few)
    sizes = (few, many) if len(first) <= len(second) else (many, few)
    a, b = (
        side if size == len(side) else rng.sample(list(side), size)
        for side, size in zip((first, second), sizes, strict=True)
    )
    return a, b


def _join(
    ids: Sequence[str], component: NDArray[np.int64], over: Sequence[Overlap]
) -> NDArray[np.int64]:
    """Components with the two rows of every overlap in one."""
    at = {i: n for n, i in enumerate(ids)}
    joined = component.copy()
    for overlap in over:
        keep, give = joined[at[overlap.first]], joined[at[overlap.second]]
        joined[joined == give] = keep
    return joined


def _report(
    rows: Sequence[GradedInstruction],
    side_of: Mapping[str, str],
    component: NDArray[np.int64],
    settings: SplitsSettings,
) -> dict[str, Any]:
    counts = Counter(side_of.values())
    by_category: dict[str, Counter[str]] = {}
    for row in rows:
        by_category.setdefault(row.category or "none", Counter())[side_of[row.id]] += 1
    sizes = np.bincount(component)
    sizes = sizes[sizes > 0]
    n = max(len(rows), 1)
    return {
        "sides": {
            name: {
                "rows": counts[name],
                "share": round(counts[name] / n, 6),
                "target": getattr(settings, name),
            }
            for name in SIDES
        },
        "categories": {
            name: {side: tally[side] for side in SIDES}
            for name, tally in sorted(by_category.items())
        },
        "components": {
            "number": len(sizes),
            "of_more_than_one": int((sizes > 1).sum()),
            "rows_in_them": int(sizes[sizes > 1].sum()),
            "largest": int(sizes.max(initial=0)),
            "largest_share": round(int(sizes.max(initial=0)) / n, 6),
        },
        "limit": {"jaccard": settings.jaccard, "cosine": settings.cosine},
    }
