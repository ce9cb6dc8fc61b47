"""The client against a real OpenAI-compatible server: `transformers serve` with the embedded model.

Where that was never downloaded, with a tiny one of random weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from promedical.demo.models import cached_model
from promedical.llm.calls import Call, Endpoint, Failure, Reply
from promedical.llm.client import EndpointAsker
from promedical.records import Message
from tiny_policy import save_tiny_policy

START_SECONDS = 300.0
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_model() or save_tiny_policy(tmp_path_factory.mktemp("served"), positions=2048)


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    start = "from transformers.cli.transformers import main; main()"
    flags = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", start, "serve", str(model), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def call(endpoint: Endpoint, id: str, schema: dict[str, object] | None = None) -> Call:
    return Call(id, endpoint, (Message("user", f"Is water wet? {id}"),), schema)


def test_it_answers_and_is_asked_once(url: str, model: Path, tmp_path: Path) -> None:
    endpoint = Endpoint(
        str(model), url, max_tokens=12, temperature=0.0, seed=1, concurrency=2, timeout_seconds=120
    )
    calls = [call(endpoint, id) for id in ("a", "b", "c")]
    first = EndpointAsker(tmp_path / "l.db", progress=False).ask(calls)
    for reply in first.values():
        assert isinstance(reply, Reply)
        assert reply.text
        assert 0 < reply.usage.tokens_out <= 12
        assert reply.usage.tokens_in > 10
    again = EndpointAsker(tmp_path / "l.db", progress=False).ask(calls)
    texts = [r.text for r in again.values() if isinstance(r, Reply) and r.cached]
    assert texts == [r.text for r in first.values() if isinstance(r, Reply)]


def test_a_reply_that_is_no_json_is_a_failure(url: str, model: Path) -> None:
    endpoint = Endpoint(
        str(model), url, max_tokens=12, json_mode="none", attempts=1, timeout_seconds=120
    )
    failure = EndpointAsker(progress=False).ask([call(endpoint, "a", SCHEMA)])["a"]
    assert isinstance(failure, Failure)
    assert failure.kind in {"truncated", "unparseable"}
