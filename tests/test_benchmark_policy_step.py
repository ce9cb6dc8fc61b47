"""The benchmark of a GRPO step in small: its parts add up, and it says where it comes from."""

from __future__ import annotations

import json

import pytest

from promedical.provenance import check


def test_small_run(benchmark_script, tmp_path):
    benchmark = benchmark_script("policy_step")
    out = tmp_path / "policy_step.json"
    arguments = ["--small", "--steps", "2", "--threads", "1", "--instructions", "4"]
    variants = ["--variants", "one_by_one", "overlap"]
    assert benchmark.main([*arguments, *variants, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    # This test's own arguments name a folder of this machine; a real result's may not.
    assert all("command" in fault for fault in check(result))
    assert set(result["variants"]) == {"one_by_one", "overlap"}
    for found in result["variants"].values():
        assert len(found["steps"]) == 2
        for step in found["steps"]:
            parts = step["generation"] + step["grading"] + step["rest"]
            assert parts == pytest.approx(step["seconds"])
            assert min(step["generation"], step["grading"], step["rest"]) >= 0
            assert step["grading_share"] == pytest.approx(step["grading"] / step["seconds"])
