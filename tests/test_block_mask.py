"""FlexAttention's block mask against the mask written out, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from promedical.reward_model.attention import dense_mask
from promedical.reward_model.block_mask import BLOCK, bucket, row_block_mask, visible_intervals
from promedical.reward_model.tree import Leaf, PackedRow, Tree, pack
from trees import trees

CPU = torch.device("cpu")


def row_of(forest: list[Tree]) -> PackedRow:
    (row,) = pack(forest, 100_000, share_rows=True)
    return row


def written_out(intervals: torch.Tensor) -> torch.Tensor:
    """Who sees whom, from the intervals."""
    keys = torch.arange(intervals.shape[1])
    return ((intervals[..., :1] <= keys) & (keys < intervals[..., 1:])).any(0)


@settings(max_examples=30)
@given(st.lists(trees(), min_size=1, max_size=3), st.integers(0, 5))
def test_intervals_are_the_dense_mask_and_padding_sees_itself(forest, padding):
    row = row_of(forest)
    visible = written_out(visible_intervals(row, len(row) + padding))
    dense = dense_mask(row, CPU, torch.float32)[0, 0] == 0
    assert torch.equal(visible[: len(row), : len(row)], dense)
    assert torch.equal(visible[len(row) :, len(row) :], torch.eye(padding, dtype=torch.bool))
    assert not visible[: len(row), len(row) :].any()
    assert not visible[len(row) :, : len(row)].any()


@settings(max_examples=8)
@given(
    st.lists(st.tuples(*[st.integers(1, 300)] * 4), min_size=1, max_size=3),
    st.integers(0, 1),
)
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(sizes, extra):
    forest = [
        Tree(
            (1,) * x,
            ((2,) * y, (3,) * z),
            tuple(Leaf(r, k, (4,) * (c // 4 + 1)) for r in range(2) for k in range(2)),
        )
        for x, y, z, c in sizes
    ]
    row = row_of(forest)
    length = bucket(len(row)) + extra * BLOCK
    ours = row_block_mask(row, length, CPU)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert ours.shape == theirs.shape == (1, 1, length, length)
    for which in ("kv", "full_kv", "q", "full_q"):
        count, expected = (getattr(m, f"{which}_num_blocks")[0, 0] for m in (ours, theirs))
        assert torch.equal(count, expected)
        index, wanted = (getattr(m, f"{which}_indices")[0, 0] for m in (ours, theirs))
        for block, size in enumerate(count.tolist()):
            assert index[block, :size].tolist() == wanted[block, :size].tolist()


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 128), (128, 128), (129, 256), (1024, 1024), (1025, 1280), (2049, 2560), (8192, 8192)],
)
def test_buckets(tokens, length):
    assert bucket(tokens) == length


@given(st.integers(1, 100_000))
def test_buckets_are_few_and_pad_little(tokens):
    length = bucket(tokens)
    assert length % BLOCK == 0
    assert 0 <= length - tokens < max(BLOCK, length / 4)
    assert len({bucket(size) for size in range(1, 8193, 64)}) <= 20
