"""Rows are dealt out evenly in number and cost, and the cost counts what attention sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.reward_model.attention import dense_mask
from promedical.reward_model.balance_rows import assign, cost, visible_pairs
from promedical.reward_model.tree import pack
from trees import trees


@settings(max_examples=100)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_every_row_goes_to_one_device_and_loads_are_even(costs, devices):
    dealt = assign(costs, devices)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    assert {len(rows) for rows in dealt} <= {len(costs) // devices, -(-len(costs) // devices)}
    loads = [sum(costs[row] for row in rows) for rows in dealt]
    even = len(costs) % devices == 0
    allowed = max(costs, default=0) - (min(costs, default=0) if even else 0)
    assert max(loads) - min(loads) <= allowed
    assert dealt == assign(costs, devices)


def test_long_rows_are_spread_where_the_given_order_would_pile_them_up():
    costs = [8.0, 1.0, 7.0, 1.0, 6.0, 1.0, 5.0, 1.0]
    in_order = [sum(costs[device::2]) for device in range(2)]
    balanced = [sum(costs[row] for row in rows) for rows in assign(costs, 2)]
    assert in_order == [26.0, 4.0]
    assert balanced == [15.0, 15.0]


@settings(max_examples=30)
@given(trees())
def test_visible_pairs_are_those_of_the_dense_mask(tree):
    (row,) = pack([tree], 10_000)
    mask = dense_mask(row, torch.device("cpu"), torch.float32)
    assert visible_pairs(row) == int((mask == 0).sum())


@settings(max_examples=10)
@given(trees())
def test_cost_is_linear_in_tokens_and_pairs(tree):
    (row,) = pack([tree], 10_000)
    assert cost(row, parameters=100, layers=0, width=0) == 600 * len(row)
    assert cost(row, parameters=100, layers=0, width=0, full=False) == 400 * len(row)
    assert cost(row, parameters=0, layers=2, width=8) == 12 * 16 * visible_pairs(row)


def test_no_device_and_a_negative_cost_are_refused():
    with pytest.raises(ValueError, match="devices: found 0"):
        assign([1.0], 0)
    with pytest.raises(ValueError, match=r"costs\[1\]: found -2"):
        assign([1.0, -2.0], 2)
    with pytest.raises(ValueError, match=r"costs\[0\]: found nan"):
        assign([float("nan")], 2)
