"""A packed row's visibility as FlexAttention's `BlockMask` (section 7.1), for GPUs.

FlexAttention computes a row in one call and leaves out every block of 128 × 128 query–key pairs in
which nothing is visible. What a token sees is an interval of the row for each level: its own
segment up to itself, its parent, its parent's parent. From these intervals the visible pairs of
every block are counted without ever making the mask, so memory grows with tokens × blocks.

Here FlexAttention has run on a CPU only, not compiled and without a backward pass, which it lacks
there: values and masks are tested, speed is not known. Left to others: `attention`, which calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from promedical.reward_model.tree import PackedRow

__all__ = ["BLOCK", "BlockMask", "bucket", "flex", "row_block_mask", "visible_intervals"]

BLOCK = 128


def bucket(tokens: int) -> int:
    """Length a row is padded to: a multiple of 128 with at most an eighth, or 127, of padding.

    Compiled kernels are made anew for every length, so there should be few: eight up to 1,024 and
    then four for each doubling.
    """
    step = BLOCK
    while tokens > 8 * step:
        step *= 2
    return -(-tokens // step) * step


def visible_intervals(row: PackedRow, length: int) -> Tensor:
    """Which keys a token sees, as (start, stop) for own segment, parent and its parent.

    Args:
        length: of the padded row; padding sees itself, for a row of the mask without any key would
            give NaN gradients.

    Returns:
        int32, [3, length, 2]; (0, 0) where a token has no such ancestor.
    """
    found = torch.zeros(3, length, 2, dtype=torch.int32)
    itself = torch.arange(length, dtype=torch.int32)
    found[0] = torch.stack([itself, itself + 1], dim=1)
    for segment in row.segments:
        held = slice(segment.start, segment.stop)
        found[0, held, 0] = segment.start
        parent, level = segment.parent, 1
        while parent >= 0:
            above = row.segments[parent]
            found[level, held] = torch.tensor([above.start, above.stop], dtype=torch.int32)
            parent, level = above.parent, level + 1
    return found


def row_block_mask(row: PackedRow, length: int, device: torch.device) -> BlockMask:
    """Who sees whom in a row padded to `length` tokens, a multiple of 128."""
    intervals = visible_intervals(row, length)
    # Visible pairs of each block: overlap of every token's intervals with every block of keys.
    first = torch.arange(0, length, BLOCK, dtype=torch.int32)
    start, stop = intervals[..., :1], intervals[..., 1:]
    overlap = torch.minimum(stop, first + BLOCK) - torch.maximum(start, first)
    pairs = overlap.clamp_(min=0).sum(0).unflatten(0, (-1, BLOCK)).sum(1)  # [blocks, blocks]
    whole = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & ~whole, device),
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(intervals.to(device)),
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries takes, and which, those first; [1, 1, …]."""
    count = chosen.sum(-1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None].to(device), order[None, None].contiguous().to(device)


def _mask_mod(intervals: Tensor) -> Callable[..., Tensor]:
    start, stop = intervals[..., 0].contiguous(), intervals[..., 1].contiguous()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (start[0, query] <= key) & (key < stop[0, query])
        parent = (start[1, query] <= key) & (key < stop[1, query])
        grandparent = (start[2, query] <= key) & (key < stop[2, query])
        return own | parent | grandparent

    return visible


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any]:
    kernel: Any = flex_attention
    compiled: Callable[..., Any] = torch.compile(kernel, dynamic=False)
    return kernel if device_type == "cpu" else compiled


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention over a padded row, compiled except on a CPU (where it has no backward pass).

    Args:
        query: [1, heads, length, d]; `key` and `value` may have fewer heads that divide these.
    """
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _kernel(query.device.type)(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out
