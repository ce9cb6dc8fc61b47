"""The doctor: every way agrees on a sound model, and a way that is broken is caught and named."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math

import pytest
import torch

from promedical import cli
from promedical.reward_model import backends, doctor, serve
from promedical.reward_model.doctor import Check, DoctorSettings, Examination, examine, table
from promedical.reward_model.grade import CheckpointError, RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from test_backends import as_vllm, server
from tiny_reward import ARCHITECTURES, tiny_classifier

SERVING = all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "prometheus_client")))
TREES = ("one tree a row", "several trees a row", "trees split over rows")


def saved(folder, architecture: str) -> str:
    model, tokenizer = tiny_classifier(architecture, layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture
def no_server(monkeypatch):
    """For tests of something else, which need not wait for one."""

    def none(*_):
        raise doctor._Skip("not now")

    monkeypatch.setattr(doctor, "_server", none)


def outcomes(found: Examination) -> dict[str, str]:
    return {check.way: check.outcome for check in found.checks}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_agrees_on_a_sound_model(architecture, tmp_path, capsys):
    assert cli.main(["rm", "doctor", saved(tmp_path, architecture)]) == 0
    printed = capsys.readouterr().out
    ways = [line for line in printed.splitlines() if "  " in line]
    found = {line.split("  ")[0]: line.split()[-1] for line in ways}
    for way in (*TREES, "one dense mask over the row", "a stream in another order"):
        assert found[way] == "ok", printed
    for size in (2, 4, 8):
        assert found[f"batches of {size}, padded right"] == "ok"
    assert "bfloat16, several trees a row" in printed
    if SERVING:
        assert found["HTTP server, /v1/grade"] == found["HTTP server, /classify"] == "ok"
    assert "skipped: no address given: --vllm URL" in printed
    assert "hardly differ" not in printed


def test_vllm_is_asked_where_there_is_one(checkpoint):
    grader = RubricRewardModel.from_pretrained(checkpoint)
    reference = doctor._packed(grader, 8192, share=True)

    def checked(url: str) -> Check:
        settings = DoctorSettings(vllm=url, vllm_model="rm")
        ask = functools.partial(doctor._vllm, checkpoint, settings)
        return doctor._checked(grader, "vLLM", 1e-3, ask, reference)

    with server(as_vllm(grader)) as (url, asked):
        assert checked(url).outcome == "ok"
    assert {call["model"] for call in asked} == {"rm"}

    def activated(path, body):
        reply = as_vllm(grader)(path, body)
        for entry in reply["data"]:
            entry["probs"] = [1 / (1 + math.exp(-entry["probs"][0]))]
        return reply

    with server(activated) as (gone, _):
        assert checked(gone).outcome == "differs"
    unreachable = checked(gone)
    assert unreachable.outcome == "differs"
    assert "ConnectError" in unreachable.note


# --- ways that are broken on purpose --------------------------------------------------------------


def test_positions_that_do_not_restart_are_caught(checkpoint, monkeypatch, capsys):
    scored = TreeRewardModel.score

    def shifted(self, row, hidden=None):
        return scored(self, dataclasses.replace(row, position_ids=tuple(range(len(row)))), hidden)

    monkeypatch.setattr(TreeRewardModel, "score", shifted)
    assert cli.main(["rm", "doctor", checkpoint]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line.split("  ")[0] for line in lines if "differs" in line]
    # The server's rows hold several paths, also for /classify; bfloat16's tolerance is wide.
    served = ["HTTP server, /v1/grade", "HTTP server, /classify"] if SERVING else []
    assert [way for way in wrong if not way.startswith("bfloat16")] == [
        *TREES,
        "a stream in another order",
        *served,
    ]


def test_padding_that_is_read_is_caught(checkpoint, monkeypatch, no_server):
    loaded = RubricRewardModel.from_pretrained

    def unpadded(path, **settings):
        grader = loaded(path, **settings)
        grader.model.model.config.pad_token_id = None
        return grader

    monkeypatch.setattr(RubricRewardModel, "from_pretrained", unpadded)
    found = examine(checkpoint)
    assert outcomes(found)["batches of 2, padded right"] == "differs"
    assert outcomes(found)["several trees a row"] == "ok"
    (why,) = {check.note for check in found.checks if check.way.startswith("batches of 8")}
    assert why  # what was raised, or how many verdicts changed


@pytest.mark.skipif(not SERVING, reason="the server's packages are not installed")
def test_a_server_that_answers_otherwise_is_caught(checkpoint, monkeypatch):
    def off_by_a_little(entry, rubric):
        grade = read(entry, rubric)
        return dataclasses.replace(grade, raw={i: s + 0.001 for i, s in grade.raw.items()})

    read = backends._grade_from
    monkeypatch.setattr(backends, "_grade_from", off_by_a_little)
    found = outcomes(examine(checkpoint))
    assert found["HTTP server, /v1/grade"] == "differs"
    assert [way for way, outcome in found.items() if outcome == "differs"] == [
        "HTTP server, /v1/grade"
    ]


def test_judgments_that_fail_are_a_difference(checkpoint, monkeypatch, no_server):
    monkeypatch.setattr(
        RubricRewardModel, "_score", lambda self, row: ["broken" for _ in row.leaves]
    )
    (found,) = [c for c in examine(checkpoint).checks if c.way == "a stream in another order"]
    assert found.outcome == "differs"
    assert "judgments failed, the first: broken" in found.note


# --- ways that are not there ----------------------------------------------------------------------


def test_what_is_not_installed_is_skipped_and_said(checkpoint, monkeypatch):
    def missing(*_, **__):
        raise serve.ServeError("rm serve: uvicorn not installed")

    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(serve, "build", missing)
    monkeypatch.setattr(doctor, "_bfloat16", no_memory)
    found = {check.way: check for check in examine(checkpoint).checks}
    for way in ("HTTP server, /v1/grade", "HTTP server, /classify"):
        assert found[way].outcome == "skipped"
        assert found[way].note == "not available: rm serve: uvicorn not installed"
    assert found["bfloat16, several trees a row"].note == "not enough memory"


def test_the_table_says_what_and_by_how_much():
    printed = table(
        Examination(
            (
                Check("one tree a row", "ok", 2e-6, 1e-4),
                Check("batches of 2", "differs", 0.5, 1e-4, "3 of 9 verdicts change"),
                Check("vLLM", "skipped", None, 0.25, "no address given"),
            ),
            9,
            0.001,
        )
    )
    assert printed.splitlines()[1].split() == ["one", "tree", "a", "row", "2.0e-06", "0.0001", "ok"]
    assert "5.0e-01     0.0001  differs: 3 of 9 verdicts change" in printed
    assert "skipped: no address given" in printed
    assert "hardly differ" in printed


def test_no_checkpoint_is_an_error_in_one_line(tmp_path, capsys):
    assert cli.main(["rm", "doctor", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: cannot be loaded" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        examine(tmp_path)
