"""Around a request: failures, a full queue, a client that leaves, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import math

import httpx
import pytest

from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serving_schema import (
    HealthAnswer,
)
from tiny_serving import (
    SECRET,
    ask,
    asking,
    assert_same,
    expected,
    paths_of,
    running,
    served,
    slowed,
    tiny_grader,
    until,
)


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader()


def test_a_poisoned_request_fails_alone(grader, caplog):
    caplog.set_level(logging.DEBUG)
    gate = served(grader)
    model = slowed(grader, gate, poison="ü")
    bodies = [asking(f"Take {i}.") for i in range(4)]
    bodies[2] = asking("Take ü.", "Take nothing.")

    async def go() -> tuple[list[httpx.Response], httpx.Response, str]:
        async with running(gate) as client:
            first = asyncio.ensure_future(client.post("/v1/grade", json=asking("First.")))
            await until(model.started.is_set)
            rest = [asyncio.ensure_future(client.post("/v1/grade", json=b)) for b in bodies]
            await until(lambda: len(gate.batcher._queue) == 4)
            model.go.set()
            await first
            answers = list(await asyncio.gather(*rest))
            ids = paths_of(grader, bodies[2])
            classified = await client.post("/classify", json={"input": ids})
            return answers, classified, (await client.get("/metrics")).text

    answers, classified, metrics = asyncio.run(go())
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        grades, wanted = answer.json()["grades"], expected(grader, body)
        if i == 2:  # and in it only the response at fault
            assert set(grades[0]["verdicts"].values()) == {"error"}
            assert set(grades[0]["failures"].values()) == {"the model failed: RuntimeError"}
            assert grades[0]["reward"] is None
            assert_same(grades[1:], wanted[1:])
        else:
            assert_same(grades, wanted)
    assert classified.status_code == 500
    assert 'promedical_failures_total{kind="batch"} 1.0' in metrics
    assert 'promedical_failures_total{kind="judgment"} 5.0' in metrics
    for text in (caplog.text, metrics, classified.text, *(a.text for a in answers)):
        assert SECRET not in text


def test_a_score_that_is_no_number_is_an_error(grader):
    gate = served(grader)
    score = gate.batcher._score_row
    gate.batcher._score_row = lambda row: [math.nan, *score(row)[1:]]
    body = asking("Ask a doctor.")
    (grade,) = ask(gate, "POST", "/v1/grade", json=body).json()["grades"]
    failed = [k for k, v in grade["verdicts"].items() if v == "error"]
    assert len(failed) == 1
    assert grade["failures"] == {failed[0]: "the model's score is nan"}
    assert grade["raw"][failed[0]] is None


def test_the_queue_is_bounded(grader):
    gate = served(grader, max_requests=3)
    model = slowed(grader, gate)

    async def go() -> None:
        async with running(gate) as client:
            taken = [asyncio.ensure_future(client.post("/v1/grade", json=asking()))]
            await until(model.started.is_set)
            taken += [asyncio.ensure_future(client.post("/v1/grade", json=asking())) for _ in "ab"]
            await until(lambda: len(gate.batcher._queue) == 2)
            for path in ("/v1/grade", "/classify"):
                answer = await client.post(path, json=asking())
                assert answer.status_code == 429
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
                assert answer.json()["error"]["type"] == "queue_full"
            assert (await client.get("/healthz")).status_code == 200
            model.go.set()
            assert [a.status_code for a in await asyncio.gather(*taken)] == [200] * 3
            assert (await client.post("/v1/grade", json=asking())).status_code == 200
            text = (await client.get("/metrics")).text
            assert 'promedical_rejected_total{reason="queue_full"} 2.0' in text

    asyncio.run(go())


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(grader):
    gate = served(grader)
    model = slowed(grader, gate)

    async def go() -> None:
        async with running(gate) as client:
            first = asyncio.ensure_future(client.post("/v1/grade", json=asking()))
            await until(model.started.is_set)
            gate.batcher.drain()
            late = await client.post("/v1/grade", json=asking())
            assert late.status_code == 503
            assert "Retry-After" in late.headers
            health = await client.get("/healthz")
            assert health.status_code == 503
            assert HealthAnswer.model_validate(health.json()).status == "draining"
            model.go.set()
            assert_same((await first).json()["grades"], expected(grader, asking()))

    asyncio.run(go())


def test_a_client_that_goes_away_leaves_the_queue(grader, caplog):
    caplog.set_level(logging.INFO)
    gate = served(grader)
    model = slowed(grader, gate)
    left = asyncio.Event()
    body = json.dumps(asking("Never read.")).encode()

    async def leaver() -> list[dict]:
        """An ASGI client that sends its body and disconnects."""
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])
        sent: list[dict] = []

        async def receive() -> dict:
            part = next(parts, None)
            if part is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return part

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/grade"}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
        await gate(scope | {"raw_path": b"/v1/grade", "server": ("test", 80)}, receive, send)
        return sent

    async def go() -> str:
        async with running(gate) as client:
            first = asyncio.ensure_future(client.post("/v1/grade", json=asking()))
            await until(model.started.is_set)
            gone = asyncio.ensure_future(leaver())
            await until(lambda: len(gate.batcher._queue) == 1)
            left.set()
            assert (await gone)[0]["status"] == 499
            # At once, not when the model comes to it: clients that come and go may be many.
            assert not gate.batcher._queue
            assert gate.batcher._queued_tokens == 0
            model.go.set()
            assert (await first).status_code == 200
            return (await client.get("/metrics")).text

    metrics = asyncio.run(go())
    assert len(model.rows) == 1  # the second request was never scored
    assert "promedical_cancelled_total 1.0" in metrics
    assert "promedical_accepted_requests 0.0" in metrics


def test_a_dead_worker_is_seen_and_nobody_waits(grader):
    gate = served(grader)

    def die(row) -> list[float]:
        raise SystemExit

    gate.batcher._score_row = die

    async def go() -> None:
        async with running(gate) as client:
            answer = await client.post("/v1/grade", json=asking())
            assert set(answer.json()["grades"][0]["verdicts"].values()) == {"error"}
            await until(lambda: gate.batcher.failed)
            assert (await client.get("/healthz")).json()["status"] == "failed"
            assert (await client.post("/v1/grade", json=asking())).status_code == 503

    asyncio.run(go())
