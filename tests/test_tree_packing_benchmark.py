"""The modes of the tree-packing benchmark run, at a tiny size, and what they write adds up."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from promedical import provenance

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("tree_packing")
    torch.set_num_threads(threads)


def run(benchmark, out: Path, *arguments: str) -> dict:
    benchmark.main([*arguments, "--small", "--out", str(out)])
    result = json.loads(out.read_text())
    assert provenance.check(result) == []
    return result


def test_the_grid_measures_every_cell_or_says_why_not(benchmark, tmp_path):
    found = run(benchmark, tmp_path / "a.json", "--grid", "--threads", "1", "--repeats", "1")
    assert found["left_out"] == []
    assert len(found["cells"]) == 2 * 2 * 2
    for cell in found["cells"]:
        n, k, y = cell["n"], cell["K"], cell["y"]
        assert cell["pairs"] == k * (n // 2) * (n - n // 2)
        assert cell["tokens_tree"] - cell["repeated_tokens"] == 10 + n * y + n * k * 3
        assert (cell["rows"] > 1) == (cell["repeated_tokens"] > 0)
        assert cell["times_trl"] == pytest.approx(cell["trl_s"] / cell["tree_s"])
    assert any(cell["rows"] > 1 for cell in found["cells"])

    none = run(benchmark, tmp_path / "b.json", "--grid", "--threads", "1", "--max-seconds", "0")
    assert len(none["cells"]) + len(none["left_out"]) == 8
    assert none["left_out"]
    assert all(cell["reason"].startswith("time: ") for cell in none["left_out"])


def test_a_try_does_not_overwrite_the_result(benchmark):
    for mode in ("--grid",):
        with pytest.raises(SystemExit):
            benchmark.main([mode, "--small"])
