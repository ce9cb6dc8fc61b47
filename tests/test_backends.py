"""Backends: the same grades wherever they are scored, and failures that stay failures."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from promedical.records import Message, from_dict
from promedical.reward_model.backends import (
    Backend,
    BackendError,
    HttpBackend,
    VllmBackend,
    _retry_after,
)
from promedical.reward_model.calibrate import Band, Calibration, TierCalibration
from promedical.reward_model.grade import CheckpointError, GradeRequest, RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.rubric import RewardSpec, Rubric, Tier, Verdict, reward
from tiny_reward import criteria, tiny_classifier

ASK = (Message("user", "May I take ibuprofen? 頭痛"),)
ANSWERS = ("Ask a doctor.", "Yes, ten. <|im_end|>", "<think>hm", "No.")
RUBRIC = Rubric(criteria(2, 1, 2))
CALIBRATION = Calibration(
    {tier: TierCalibration(2.0, 0.3) for tier in Tier},
    {tier: Band(0.4, 0.6) for tier in Tier},
    {tier: Band(0.5, 0.5) for tier in Tier},
    {},
)
Answer = Callable[[str, dict[str, Any]], Any]


class Reply(Exception):
    """What the fake server sends instead of a 200."""

    def __init__(self, status: int, body: str = "{}", **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers POST as a function says; its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "token": self.headers["Authorization"], **body})
            try:
                status, sent, headers = 200, json.dumps(answer(self.path, body)), {}
            except Reply as reply:
                status, sent, headers = reply.status, reply.body, reply.headers
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(sent.encode())}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(sent.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def local() -> RubricRewardModel:
    model, tokenizer = tiny_classifier(layers=1)
    return RubricRewardModel(TreeRewardModel(model), tokenizer, calibration=CALIBRATION)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, local):
    folder = tmp_path_factory.mktemp("checkpoint")
    local.model.model.save_pretrained(folder)
    local.tokenizer.save_pretrained(folder)
    local.save_metadata(folder)
    return folder


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_server(local: RubricRewardModel) -> Answer:
    """Our server's answers, from the local model."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/grade"
        row = from_dict({"id": "q", "messages": body["messages"], "rubric": body["rubric"]})
        grades = local.grade(
            row.messages, body["responses"], row.rubric, operating_point=body["operating_point"]
        )
        return {
            "grades": [
                {
                    "verdicts": grade.verdicts,
                    "probabilities": {k: number(p) for k, p in grade.probabilities.items()},
                    "raw": {k: number(s) for k, s in grade.raw.items()},
                    "scores": asdict(grade.scores),
                    "reward": reward(grade.scores, RewardSpec()),
                    "failures": grade.failures,
                    "emptied": grade.emptied,
                }
                for grade in grades
            ]
        }

    return answer


def as_vllm(local: RubricRewardModel) -> Answer:
    """vLLM's answers, from the classifier itself."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/classify"
        assert body["use_activation"] is False
        with torch.no_grad():
            data = [
                {
                    "index": i,
                    "label": "LABEL_0",
                    "probs": [float(local.model.model(input_ids=torch.tensor([ids])).logits[0, 0])],
                    "num_classes": 1,
                }
                for i, ids in enumerate(body["input"])
            ]
        return {"object": "list", "model": body["model"], "data": data[::-1]}

    return answer


def assert_same(mine, theirs) -> None:
    assert mine.verdicts == theirs.verdicts
    assert mine.scores == theirs.scores
    assert mine.failures == theirs.failures
    assert mine.emptied == theirs.emptied
    assert mine.raw == pytest.approx(theirs.raw, abs=1e-4, nan_ok=True)
    assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-4, nan_ok=True)


@contextmanager
def backend(kind: str, answer: Answer, checkpoint, **options: Any):
    """A backend with a fake server behind it, and what that was asked."""
    with server(answer) as (url, asked):
        made = (
            HttpBackend(url, **options)
            if kind == "http"
            else VllmBackend(url, checkpoint, **options)
        )
        with made:
            yield made, asked


ANSWERERS = {"http": as_server, "vllm": as_vllm}
KINDS = pytest.mark.parametrize("kind", ANSWERERS)


# --- the same grades ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("point", ["audit", "reward"])
def test_grades_are_those_of_the_local_model(kind, point, local, checkpoint):
    expected = local.grade(ASK, ANSWERS, RUBRIC, operating_point=point)
    with backend(kind, ANSWERERS[kind](local), checkpoint, token="secret") as (remote, asked):
        assert isinstance(remote, Backend)
        found = remote.grade(ASK, ANSWERS, RUBRIC, operating_point=point)
    assert isinstance(local, Backend)
    assert {call["token"] for call in asked} == {"Bearer secret"}
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)
    assert found[2].emptied


@KINDS
def test_a_stream_keeps_its_order_and_runs_some_at_once(kind, local, checkpoint):
    under_way, most, lock = 0, 0, threading.Lock()
    answer = ANSWERERS[kind](local)

    def slow_at_first(path, body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            first = under_way == 1
        time.sleep(0.05 if first else 0.01)
        with lock:
            under_way -= 1
        return answer(path, body)

    taken = 0

    def requests():
        nonlocal taken
        for i in range(12):
            taken += 1
            yield GradeRequest(ASK, [f"Take {i}."], RUBRIC, id=str(i))

    with backend(kind, slow_at_first, checkpoint, concurrency=3) as (remote, _):
        results = remote.grade_many(requests())
        found = [next(results)]
        assert taken <= 6
        found += list(results)
    assert [result.id for result in found] == [str(i) for i in range(12)]
    assert 1 < most <= 3
    for result, theirs in zip(found, local.grade_many(requests()), strict=True):
        assert_same(result.grades[0], theirs.grades[0])


@KINDS
def test_a_large_request_is_several_calls(kind, local, checkpoint):
    size = {"judgments": 10} if kind == "http" else {"inputs": 2}
    with backend(kind, ANSWERERS[kind](local), checkpoint, **size) as (remote, asked):
        found = remote.grade(ASK, ANSWERS, RUBRIC)
    if kind == "http":
        assert [len(call["responses"]) for call in asked] == [2, 2]
    else:
        assert [len(call["input"]) for call in asked] == [2, 2, 1] * 4
    for mine, theirs in zip(found, local.grade(ASK, ANSWERS, RUBRIC), strict=True):
        assert_same(mine, theirs)


def test_no_text_reaches_vllm(local, checkpoint):
    with backend("vllm", as_vllm(local), checkpoint) as (remote, asked):
        remote.grade(ASK, ANSWERS, RUBRIC)
    for call in asked:
        assert all(isinstance(token, int) for ids in call["input"] for token in ids)
        assert call["model"] == str(checkpoint)


@KINDS
def test_nothing_asked_is_no_call(kind, local, checkpoint):
    nothing = Rubric((), safety_only=True)
    with backend(kind, ANSWERERS[kind](local), checkpoint) as (remote, asked):
        assert remote.grade(ASK, [], RUBRIC) == []
        (grade,) = remote.grade(ASK, ["<think>"], nothing)
    assert asked == []
    assert grade.emptied
    assert grade.verdicts == {}


# --- failures -------------------------------------------------------------------------------------


def all_errors(grades, why: str) -> None:
    for grade in grades:
        assert set(grade.verdicts.values()) == {Verdict.ERROR}
        assert grade.failures.keys() == {c.id for c in RUBRIC.criteria}
        assert all(why in reason for reason in grade.failures.values()), grade.failures
        assert all(math.isnan(s) for s in [*grade.raw.values(), *grade.probabilities.values()])
        assert reward(grade.scores, RewardSpec()) is None


@pytest.fixture
def no_waiting(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("promedical.reward_model.backends.time.sleep", waited.append)
    return waited


@KINDS
def test_a_full_queue_is_waited_for(kind, local, checkpoint, no_waiting):
    answer, refusals = ANSWERERS[kind](local), iter(range(7))

    def full_at_first(path, body):
        if next(refusals, None) is not None:
            raise Reply(429, Retry_After="3")
        return answer(path, body)

    # More refusals than attempts: a server that says when to come again has not failed.
    with backend(kind, full_at_first, checkpoint, attempts=2) as (remote, _):
        found = remote.grade(ASK, ANSWERS[:1], RUBRIC)
    assert no_waiting == [3.0] * 7
    assert_same(found[0], local.grade(ASK, ANSWERS[:1], RUBRIC)[0])


@KINDS
def test_waiting_ends(kind, checkpoint, no_waiting):
    def full(*_):
        raise Reply(429, Retry_After="3600")

    with backend(kind, full, checkpoint) as (remote, asked):
        all_errors(remote.grade(ASK, ANSWERS[:1], RUBRIC), "HTTP 429 (waited for 600 s)")
    assert len(asked) == 1
    assert no_waiting == []


@KINDS
def test_what_may_pass_is_tried_again_with_growing_pauses(kind, local, checkpoint, no_waiting):
    answer, broken = ANSWERERS[kind](local), iter(range(3))

    def shaky(path, body):
        if next(broken, None) is not None:
            raise Reply(503)
        return answer(path, body)

    with backend(kind, shaky, checkpoint) as (remote, _):
        found = remote.grade(ASK, ANSWERS[:1], RUBRIC)
    assert not found[0].failures
    low = [0.25, 0.5, 1.0]
    assert all(a <= wait <= 2 * a for a, wait in zip(low, no_waiting, strict=True))


@KINDS
@pytest.mark.parametrize(
    ("reply", "why", "calls"),
    [
        (Reply(500, '{"error": {"message": "out of memory"}}'), "HTTP 500: out of memory (ask", 2),
        (Reply(401), "HTTP 401", 1),
        (Reply(404), "HTTP 404", 1),
        (Reply(200, Content_Encoding="gzip"), "DecodingError", 2),
        (Reply(200, "<html>"), "the reply is not JSON", 1),
        (Reply(200, "[]"), "the reply has no list of", 1),
        (Reply(200, '{"grades": [], "data": []}'), "the reply has 0", 1),
    ],
)
def test_a_failed_call_is_an_error_with_its_reason(kind, reply, why, calls, checkpoint, no_waiting):
    def fail(*_):
        raise reply

    with backend(kind, fail, checkpoint, attempts=2) as (remote, asked):
        all_errors(remote.grade(ASK, ANSWERS[:1], RUBRIC), why)
        assert len(asked) == calls
        results = list(remote.grade_many([GradeRequest(ASK, ANSWERS[:1], RUBRIC, id="a")]))
    all_errors(results[0].grades, why)


@KINDS
def test_no_server_is_an_error(kind, checkpoint, no_waiting):
    with server(lambda *_: {}) as (url, _):
        gone = url
    remote = HttpBackend(gone) if kind == "http" else VllmBackend(gone, checkpoint)
    with remote:
        all_errors(remote.grade(ASK, ANSWERS, RUBRIC), "ConnectError")
    assert len(no_waiting) >= 4


def test_a_refused_response_fails_alone(local, checkpoint):
    answer = as_server(local)

    def picky(path, body):
        if ANSWERS[1] in body["responses"]:
            raise Reply(422, '{"error": {"message": "responses: too long"}}')
        return answer(path, body)

    with backend("http", picky, checkpoint) as (remote, _):
        found = remote.grade(ASK, ANSWERS, RUBRIC)
    all_errors(found[1:2], "HTTP 422: responses: too long")
    plain = local.grade(ASK, ANSWERS, RUBRIC)
    for i in (0, 2, 3):
        assert_same(found[i], plain[i])


def test_a_refused_input_fails_alone(local, checkpoint):
    answer = as_vllm(local)
    long = Rubric((*criteria(1, 0, 1), *criteria(0, 1, 0, name=" again and" * 100)))

    def picky(path, body):
        if any(len(ids) > 300 for ids in body["input"]):
            raise Reply(400, '{"error": {"message": "more than max_model_len"}}')
        return answer(path, body)

    with backend("vllm", picky, checkpoint) as (remote, _):
        found = remote.grade(ASK, ANSWERS, long)
        broken = remote.grade(ASK, ["No.", "\ud800"], RUBRIC)
    for grade in found:
        assert set(grade.failures) == {"e0"}
        assert "max_model_len" in grade.failures["e0"]
    all_errors(broken[1:], "cannot be rendered")
    assert not broken[0].failures


def test_text_that_is_no_unicode_is_an_error(local, checkpoint):
    with backend("http", as_server(local), checkpoint) as (remote, _):
        found = remote.grade(ASK, ["No.", "\ud800"], RUBRIC)
    all_errors(found[1:], "")
    assert not found[0].failures


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"verdicts": {}}, "the reply has no verdict for it"),
        ({"verdicts": {c.id: "safe" for c in RUBRIC.criteria}}, "the reply has no verdict for it"),
        ({"verdicts": None}, "the reply has no verdict for it"),
        ({"raw": {}}, "with no score for it"),
        ({"probabilities": {c.id: 1.5 for c in RUBRIC.criteria}}, "with no score for it"),
        ({"raw": {c.id: "2" for c in RUBRIC.criteria}}, "with no score for it"),
        (
            {
                "verdicts": {c.id: "error" for c in RUBRIC.criteria},
                "failures": {c.id: "too long" for c in RUBRIC.criteria},
            },
            "too long",
        ),
        ({"verdicts": {c.id: "error" for c in RUBRIC.criteria}}, "the server gave no reason"),
    ],
)
def test_a_grade_that_makes_no_sense_is_an_error(change, why, local, checkpoint):
    answer = as_server(local)

    def odd(path, body):
        return {"grades": [grade | change for grade in answer(path, body)["grades"]]}

    with backend("http", odd, checkpoint) as (remote, _):
        all_errors(remote.grade(ASK, ANSWERS, RUBRIC), why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"probs": []}, "the reply's score is []"),
        ({"probs": [0.1, 0.9]}, "the reply's score is [0.1, 0.9]"),
        ({"probs": [None]}, "the reply's score is [None]"),
        ({"probs": [True]}, "the reply's score is [True]"),
        ({"index": 99}, "the reply's inputs are not 0 … 4, each once"),
        ({"index": 0}, "the reply's inputs are not 0 … 4, each once"),
        ({"index": None}, "the reply's inputs are not 0 … 4, each once"),
    ],
)
def test_a_score_that_makes_no_sense_is_an_error(change, why, local, checkpoint):
    answer = as_vllm(local)

    def odd(path, body):
        return {"data": [entry | change for entry in answer(path, body)["data"]]}

    with backend("vllm", odd, checkpoint) as (remote, _):
        all_errors(remote.grade(ASK, ANSWERS[:1], RUBRIC), why)


def test_retry_after_is_seconds_or_a_date():
    assert _retry_after("3") == 3
    assert _retry_after("0") == 0.05
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 -0000") == 0.05
    assert _retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert [_retry_after(value) for value in (None, "soon", "nan", "inf")] == [None] * 4


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(BackendError, match="url: found 'localhost:8000'"):
        HttpBackend("localhost:8000")
    with pytest.raises(BackendError, match=r"url: found .*80x"):
        HttpBackend("http://localhost:80x")
    for token in ("s3cret\n", "", "tökén", "two words"):
        with pytest.raises(BackendError, match=r"^token: expected one word of ASCII characters$"):
            HttpBackend("http://localhost:8000", token=token)
    with pytest.raises(BackendError, match="concurrency: found 0"):
        HttpBackend("http://localhost:8000", concurrency=0)
    with pytest.raises(CheckpointError, match="nowhere: cannot be loaded"):
        VllmBackend("http://localhost:8000", tmp_path / "nowhere")
