"""The modes of the tree-packing benchmark run, at a tiny size, and what they write adds up."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from promedical import figures, provenance

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
    text = figures.RENDERERS["tree_packing_grid"].render(found)
    first = found["cells"][0]
    row = next(
        x for x in text.split("\n") if x.startswith(f"| n = {first['n']}, K = {first['K']} |")
    )
    assert f"| {first['times_trl']:.1f} × | {first['times_separate']:.1f} × |" in row
    assert "—" not in text

    none = run(benchmark, tmp_path / "b.json", "--grid", "--threads", "1", "--max-seconds", "0")
    assert len(none["cells"]) + len(none["left_out"]) == 8
    assert none["left_out"]
    assert all(cell["reason"].startswith("time: ") for cell in none["left_out"])
    text = figures.RENDERERS["tree_packing_grid"].render(none)
    assert text.count("—") == 2 * len(none["left_out"])
    assert f"Left out: {len(none['left_out'])} for time." in text


def test_the_gpu_mode_runs_on_a_cpu_at_a_tiny_size(benchmark, tmp_path):
    found = run(benchmark, tmp_path / "a.json", "--gpu", "--repeats", "1")
    losses = list(found["losses_of_the_same_pairs"].values())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    whole, real = found["trees"]["synthetic"], found["trees"]["real discordance, pairwise"]
    both = found["trees"]["real discordance, pairwise + pointwise"]
    assert (whole["pairs"], whole["leaves"]) == (3 * 2, 3 * 2 * 2)
    assert whole["unique_tokens"] == 3 * (12 + 2 * 15 + 4 * 5) == both["unique_tokens"]
    assert whole["rows"] == 2  # three trees of 62 tokens in rows of 150
    assert 0 < real["pairs"] == both["pairs"] < whole["pairs"]
    parameters = found["settings"]["layer_parameters"]
    pairs = 3 * visible(12, 15, 5)
    # LoRA: 4P a unique token; attention 12 · layers · width a visible pair.
    assert whole["operations"] == 4 * parameters * 3 * 62 + 12 * 2 * 32 * pairs
    assert [line["batch"] for line in found["trl"]] == [1, 2, 4]
    if not torch.cuda.is_available():
        assert "no backward pass on a CPU" in whole["flex"]["left_out"]
    first = found["summary"][0]
    assert first["times_trl"] == pytest.approx(
        min(line["s_per_pair"] for line in found["trl"]) * 6 / first["tree_s"]
    )


def visible(x: int, y: int, c: int) -> int:
    """Visible pairs of a tree with two responses and two criteria, counted token by token."""
    prompt = sum(range(1, x + 1))
    response = sum(x + i for i in range(1, y + 1))
    criterion = sum(x + y + i for i in range(1, c + 1))
    return prompt + 2 * response + 4 * criterion


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_estimated(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main(["--gpu", "--out", str(tmp_path / "a.json")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["--grid", "--gpu"])
def test_a_try_does_not_overwrite_the_result(benchmark, mode):
    with pytest.raises(SystemExit):
        benchmark.main([mode, "--small"])
