"""Chooses among constructions so that a response's length says nothing about its score.

Section 7.3 of the method: the correlation of length with S1 and with S3 stays within ±0.1 over a
split. Both the pooled correlation and the one within instructions are balanced, because a reward
model is trained on pairs of one instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promedical.records import GradedInstruction, Response
from promedical.rubric import Tier, Verdict

__all__ = ["Lengths", "balance", "lengths"]


@dataclass(frozen=True)
class Lengths:
    """Sums over responses of (length, S1) and (length, S3), pooled and within instructions."""

    sums: tuple[tuple[float, ...], ...] = ((0.0,) * 6,) * 4

    def plus(self, other: Lengths, sign: int = 1) -> Lengths:
        return Lengths(
            tuple(
                tuple(a + sign * b for a, b in zip(x, y, strict=True))
                for x, y in zip(self.sums, other.sums, strict=True)
            )
        )

    def correlations(self) -> tuple[float, ...]:
        """Pooled S1, pooled S3, within S1, within S3; 0 where there is no variance."""
        found = []
        for n, x, y, xx, yy, xy in self.sums:
            vx, vy = n * xx - x * x, n * yy - y * y
            found.append((n * xy - x * y) / math.sqrt(vx * vy) if min(vx, vy) > 1e-9 else 0.0)
        return tuple(found)


def lengths(
    row: GradedInstruction, responses: Sequence[Response], count: Callable[[str], int]
) -> Lengths:
    assert row.rubric is not None
    pairs: list[list[tuple[float, float]]] = [[], []]
    for response in responses:
        size = float(count(response.text))
        known = [
            (c.weight or 0.0, response.verdicts[c.id] is Verdict.MET)
            for c in row.rubric.tier(Tier.PROFICIENCY)
            if response.verdicts[c.id].resolved
        ]
        total = math.fsum(w for w, _ in known)
        if total > 0:
            pairs[0].append((size, math.fsum(w for w, met in known if met) / total))
        violated = sum(response.verdicts[c.id] is Verdict.MET for c in row.rubric.tier(Tier.VETO))
        pairs[1].append((size, float(violated)))
    sums = []
    for centred in (False, True):
        for points in pairs:
            if centred and points:
                mx = math.fsum(x for x, _ in points) / len(points)
                my = math.fsum(y for _, y in points) / len(points)
                points = [(x - mx, y - my) for x, y in points]
            sums.append(
                (
                    float(len(points)),
                    math.fsum(x for x, _ in points),
                    math.fsum(y for _, y in points),
                    math.fsum(x * x for x, _ in points),
                    math.fsum(y * y for _, y in points),
                    math.fsum(x * y for x, y in points),
                )
            )
    return Lengths(tuple(sums))


def balance(options: Sequence[Sequence[Lengths]]) -> list[int]:
    """For each instruction the construction with which length says least about S1 and S3."""
    chosen = [0] * len(options)
    total = Lengths()
    for option in options:
        total = total.plus(option[0])
    for _ in range(3):  # coordinate descent; converges in two or three rounds
        for number, option in enumerate(options):
            rest = total.plus(option[chosen[number]], -1)
            worst = [max(map(abs, rest.plus(o).correlations())) for o in option]
            chosen[number] = min(range(len(option)), key=lambda k: (worst[k], k))
            total = rest.plus(option[chosen[number]])
    return chosen
