"""Balances packed rows over devices, so that no device waits for the others.

Rows of the same length differ in what they cost: one long tree attends to more than many short
ones. `cost` counts a row's floating-point operations, tokens through the weights and visible
query–key pairs through attention (section 7.1 of the method); `assign` deals rows of such costs to
devices, longest first. Left to others: the rows (`tree`), and which rows make a step (`trainer`).
"""

from __future__ import annotations

from collections.abc import Sequence

from promedical.reward_model.tree import PackedRow

__all__ = ["assign", "cost", "visible_pairs"]


def visible_pairs(row: PackedRow) -> int:
    """Query–key pairs that attention has to compute: each token with its ancestors and itself."""
    return sum(s.length * s.position + s.length * (s.length + 1) // 2 for s in row.segments)


def cost(row: PackedRow, *, parameters: float, layers: int, width: int, full: bool = True) -> float:
    """Floating-point operations of a row's forward and backward pass, recomputation not counted.

    Args:
        parameters: P, those a token is multiplied with (embeddings are looked up: not counted).
        layers: number of attention layers.
        width: query heads × head dimension of a layer.
        full: whether P is trained, 6P a token; else (LoRA) no gradient of P is computed, 4P.

    A visible pair takes 2·width for its score and 2·width for its value in each layer, and twice
    that in the backward pass.
    """
    per_token = (6 if full else 4) * parameters
    return per_token * len(row) + 12 * layers * width * visible_pairs(row)


def assign(costs: Sequence[float], devices: int) -> list[list[int]]:
    """Deal rows to devices, as many to each (at most one more), with loads as even as greed gets.

    Rows are taken longest first, `devices` at a time, the longest to the device with least so far.
    The largest and the smallest load then differ by no more than the largest and the smallest
    cost do (than the largest cost, if the rows cannot be dealt out evenly).

    Args:
        costs: cost of each row, at least 0.
        devices: how many there are.

    Returns:
        For every device the indices of its rows, in rising order.

    Raises:
        ValueError: no device, or a negative cost.
    """
    if devices < 1:
        raise ValueError(f"devices: found {devices}, expected at least 1")
    for row, found in enumerate(costs):
        if not found >= 0:
            raise ValueError(f"costs[{row}]: found {found}, expected at least 0")
    longest_first = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    loads = [0.0] * devices
    dealt: list[list[int]] = [[] for _ in range(devices)]
    for start in range(0, len(costs), devices):
        least_first = sorted(range(devices), key=lambda device: (loads[device], device))
        for device, row in zip(least_first, longest_first[start : start + devices], strict=False):
            dealt[device].append(row)
            loads[device] += costs[row]
    return [sorted(rows) for rows in dealt]
