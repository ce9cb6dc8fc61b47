"""A run that is killed 20 times: nothing that was committed is asked again, nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from killed_run import calls, run
from misbehaving_server import MisbehavingServer, Request, Says
from promedical.llm.ledger import Ledger

CALLS, SLOTS, KILLS = 1000, 32, 20
PATIENCE_SECONDS = 600.0


def answer(request: Request) -> Says:
    number = int(request.prompt)
    return Says(json.dumps({"number": number * number}), extra={"reasoning": f"{number}²"})


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer(answer, latency=0.02) as running:
        yield running


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    # One process imports everything once; each run is a fork of it, and starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", "jsonschema", "killed_run"])
    return context


def test_killed_at_twenty_moments(
    server: MisbehavingServer,
    context: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
) -> None:
    rng = random.Random(4)
    ledger, out = tmp_path / "killed.db", tmp_path / "killed.json"
    keys = {call.key: call.messages[0].content for call in calls(server.url, CALLS, SLOTS)}
    committed: set[str] = set()
    seen = 0
    for _ in range(KILLS):
        process = start(context, server, ledger, out)
        # Kills are spread over the run: even if nothing were lost, 20 × 45 < 1,000.
        wait_for(server, seen + rng.randint(1, 45), process)
        time.sleep(rng.uniform(0, 0.03))
        assert process.is_alive()
        process.kill()
        process.join()
        committed, seen = asked_and_kept(server, ledger, keys, committed, seen)
    process = start(context, server, ledger, out)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0
    asked_and_kept(server, ledger, keys, committed, seen)
    assert CALLS <= len(server.requests) <= CALLS + KILLS * SLOTS

    before = len(server.requests)
    whole = tmp_path / "whole.json"
    process = start(context, server, tmp_path / "whole.db", whole)
    process.join(PATIENCE_SECONDS)
    assert len(server.requests) == before + CALLS
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    assert len(json.loads(whole.read_text())) == CALLS


def start(
    context: multiprocessing.context.ForkServerContext,
    server: MisbehavingServer,
    ledger: Path,
    out: Path,
) -> BaseProcess:
    process = context.Process(target=run, args=(server.url, CALLS, SLOTS, ledger, out))
    process.start()
    return process


def wait_for(server: MisbehavingServer, requests: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(server.requests) < requests:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def asked_and_kept(
    server: MisbehavingServer, path: Path, keys: dict[str, str], committed: set[str], seen: int
) -> tuple[set[str], int]:
    """Check that none of the committed was asked since; give back what is committed now."""
    asked = {request.prompt for request in server.requests[seen:]}
    assert not asked & committed
    with Ledger(path) as ledger:
        now = {keys[key] for key in ledger.has(keys)}
    assert committed <= now
    assert now <= {request.prompt for request in server.requests}
    return now, len(server.requests)
