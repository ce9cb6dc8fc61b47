"""Training on several processes: who reads which row, and the same losses and weights as alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.utils.random import set_seed
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import RandomSampler

import two_processes
from promedical.reward_model.row_order import RowOrder, empty_row

HERE = Path(__file__).parent


def test_two_processes_train_as_one(tmp_path):
    """`accelerate launch`, gloo, CPU: the divisor counts the units of all processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "two_processes.py"), str(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent / 'src'}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two_processes.main(tmp_path / "one")

    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert one["counts"] == two["counts"]
    assert len(one["history"]) == len(two["history"]) >= 4
    for alone, together in zip(one["history"], two["history"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["learning_rate"] == alone["learning_rate"]
    assert [entry["step"] for entry in two["metrics"]] == [2, 4, 6]
    for alone, together in zip(one["metrics"], two["metrics"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("one", "two")]
    for name, mine in weights[0].items():
        assert torch.allclose(mine, weights[1][name], atol=1e-5), name
    assert not (tmp_path / "two" / "steps").exists()


COSTS = st.lists(st.floats(1, 1e6), min_size=1, max_size=30)


@given(COSTS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_a_step_holds_the_same_rows_on_any_number_of_processes(costs, batch, processes, seed, e):
    alone = RowOrder(costs, batch, seed=seed, epoch=lambda: e)
    order = RowOrder(costs, batch, processes=processes, seed=seed, epoch=lambda: e)
    single, dealt = list(alone), list(order)
    assert len(single) == len(alone) == len(costs)
    assert len(dealt) == len(order)
    assert order.steps == alone.steps
    empty = len(costs)
    assert Counter(i for i in dealt if i != empty) == Counter(range(len(costs)))
    # accelerate deals entry k to process k mod N; the Trainer takes so many of each for a step.
    mine = [dealt[p::processes] for p in range(processes)]
    assert len({len(rows) for rows in mine}) == 1
    for step in range(order.steps):
        turns = slice(step * order.rows_a_process, (step + 1) * order.rows_a_process)
        rows = [i for p in range(processes) for i in mine[p][turns] if i != empty]
        assert sorted(rows) == sorted(single[step * batch : (step + 1) * batch])


@pytest.mark.parametrize("epoch", [0, 1])
def test_alone_the_order_is_that_of_the_trainer(epoch):
    generator = torch.Generator().manual_seed(7 + epoch)
    set_seed(123)  # the global generator does not matter
    expected = list(RandomSampler(range(11), generator=generator))
    assert list(RowOrder([1.0] * 11, 4, seed=7, epoch=lambda: epoch)) == expected


def test_long_rows_of_a_step_go_to_different_processes():
    order = RowOrder([9.0, 9.0, 1.0, 1.0], 4, processes=2)
    dealt = list(order)
    for process in range(2):
        assert sorted(order.costs[row] for row in dealt[process::2]) == [1.0, 9.0]


def test_the_empty_row_has_no_term():
    row = empty_row()
    assert (len(row.row), len(row.row.leaves), row.terms.items) == (3, 1, 0)
    assert not row.terms.pairs
    assert not row.terms.points
