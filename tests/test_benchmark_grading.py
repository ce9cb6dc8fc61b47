"""The grading benchmark in small: its contestants agree, and it says where it comes from."""

from __future__ import annotations

import json

import pytest
import torch

from promedical.figures import RENDERERS
from promedical.provenance import check
from promedical.reward_model.tree import paths
from tiny_reward import criteria, load_renderer, row, tiny_classifier


@pytest.fixture(scope="module")
def benchmark(benchmark_script):
    return benchmark_script("grading")


def test_small_run(benchmark, tmp_path):
    out = tmp_path / "grading.json"
    assert benchmark.main(["--small", "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    # This test's own arguments name a folder of this machine; a real result's may not.
    assert all("command" in fault for fault in check(result))
    assert result["settings"]["judgments"] == 1 * 2 * 3
    assert set(result["contestants"]) == {"tree", "kv", "padded, batch 1", "padded, batch 4"}
    assert result["largest_difference"] <= 1e-3
    tree, kv, one = (result["contestants"][n] for n in ("tree", "kv", "padded, batch 1"))
    # A tree reads the question once, the cache once for each answer, padding for each judgment.
    assert tree["tokens_read"] < kv["tokens_read"] < one["tokens_read"]
    best = result["contestants"][result["best_padded"]]
    ratio = result["times_faster"]["than padded"]
    assert ratio == pytest.approx(best["median_s"] / tree["median_s"])
    text = RENDERERS["grading"].render(result)
    assert all(f"{part['tokens_read']:,} |" in text for part in result["contestants"].values())


def test_a_reused_cache_gives_the_scores_of_separate_sequences(benchmark):
    model, tokenizer = tiny_classifier()
    given = row([[]] * 2, (), texts=["Take two, or ask.", "No."])
    asked = [(r, c.text) for r in range(2) for c in criteria(1, 1, 2, name=" or more" * 3)]
    asked += [(r, "Short.") for r in range(2)]
    tree = load_renderer().tree(given.messages, [r.text for r in given.responses], sorted(asked))
    found = benchmark.kv_contestant(model, tokenizer.pad_token_id, [tree]).run()
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([p])).logits[0, 0]) for p in paths(tree)]
    assert found == pytest.approx(alone, abs=1e-4)
    for size in (1, 3):
        padded = benchmark.padded_contestant(model, tokenizer.pad_token_id, [tree], size).run()
        assert padded == pytest.approx(alone, abs=1e-4)


def test_scores_that_differ_stop_the_benchmark(benchmark):
    sound = benchmark.Contestant("tree", lambda: [1.0, 2.0], 1)
    other = benchmark.Contestant("kv", lambda: [1.0, 2.1], 1)
    with pytest.raises(RuntimeError, match="kv: scores differ"):
        benchmark.measure([sound, other], 1, benchmark.random.Random(0))
