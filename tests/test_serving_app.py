"""Who may ask, what is logged, what is documented."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest

from promedical.reward_model.grade import RubricRewardModel
from tiny_serving import (
    SECRET,
    ask,
    asking,
    running,
    served,
    tiny_grader,
)

GOLDEN = Path(__file__).parent / "data" / "golden" / "openapi_paths.json"


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader()


# --- who may ask --------------------------------------------------------------------------------


def test_a_token_is_asked_for(grader):
    gate = served(grader, token="s3cret")

    async def go() -> None:
        async with running(gate) as client:
            assert (await client.get("/healthz")).status_code == 200
            for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
                for path in ("/v1/grade", "/classify", "/nowhere"):
                    answer = await client.post(path, json=asking(), headers=header)
                    assert answer.status_code == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                for path in ("/metrics", "/openapi.json"):
                    assert (await client.get(path, headers=header)).status_code == 401
            allowed = {"Authorization": "Bearer s3cret"}
            assert (await client.get("/metrics", headers=allowed)).status_code == 200
            answer = await client.post("/v1/grade", json=asking(), headers=allowed)
            assert answer.status_code == 200

    asyncio.run(go())


# --- what is logged, what is documented ---------------------------------------------------------


def test_no_text_is_logged(grader, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    gate = served(grader)
    planted = asking(SECRET, question=SECRET)
    for c in planted["rubric"]["criteria"]:
        c["text"] = f"{SECRET} {c['id']}"
        c["id"] = f"{SECRET} {c['id']}"

    def broken(*_: object) -> None:
        raise KeyError(SECRET)

    async def go() -> list[str]:
        texts = []
        async with running(gate) as client:
            good = await client.post(f"/v1/grade?why={SECRET}", json=planted)
            assert good.status_code == 200
            for body in (planted | {"rubric": SECRET}, planted | {SECRET: 1}):
                texts.append((await client.post("/v1/grade", json=body)).text)
            texts.append((await client.get(f"/{SECRET}")).text)
            monkeypatch.setattr(grader.renderer, "tree", broken)
            failed = await client.post("/v1/grade", json=planted)
            assert failed.status_code == 500
            assert failed.json()["error"]["message"] == "unforeseen: KeyError"
            texts += [failed.text, (await client.get("/metrics")).text]
        return texts

    for text in [caplog.text, *asyncio.run(go())]:
        assert SECRET not in text
    lines = [r.getMessage() for r in caplog.records if r.name == "promedical.serve"]
    assert re.fullmatch(
        r"/v1/grade status=200 ms=\d+ bytes=\d+ responses=1 judgments=5 tokens=\d+", lines[0]
    )
    assert any("KeyError at" in line for line in lines)
    # httpx logs what *it* asks for; everything else may not hold the text.
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert not [r for r in ours if SECRET in r.getMessage() or SECRET in str(r.exc_info)]


def outline(document: dict) -> dict:
    """Paths, bodies, statuses and field names of an OpenAPI document."""
    found = {
        path: {
            method: {
                "body": operation.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema"),
                "answers": sorted(operation["responses"]),
            }
            for method, operation in methods.items()
        }
        for path, methods in document["paths"].items()
    }
    found["schemas"] = {
        name: sorted(schema.get("properties", {}))
        for name, schema in document["components"]["schemas"].items()
    }
    return found


def test_the_api_is_the_documented_one(grader):
    document = ask(served(grader), "GET", "/openapi.json").json()
    assert outline(document) == json.loads(GOLDEN.read_text())
    # Every reference leads somewhere.
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
