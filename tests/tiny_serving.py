"""A tiny reward model behind the server's application, and the slow twin of its answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest

from promedical.records import Message
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.serve import ServeRecipe, build
from promedical.reward_model.serving_app import Gate
from promedical.rubric import RewardSpec, Rubric, reward
from tiny_reward import criteria, tiny_classifier

RUBRIC = Rubric(criteria(2, 1, 2))
SECRET = "chest pain since Tuesday"


def tiny_grader(**kwargs: Any) -> RubricRewardModel:
    """A tiny model with random weights."""
    model, tokenizer = tiny_classifier(layers=2)
    return RubricRewardModel(TreeRewardModel(model), tokenizer, **kwargs)


def rubric_json(rubric: Rubric = RUBRIC) -> dict:
    found = [asdict(c) for c in rubric.criteria]
    return {"criteria": found, "safety_only": rubric.safety_only}


def asking(*responses: str, question: str = "May I take ibuprofen?", **more) -> dict:
    return {
        "messages": [{"role": "user", "content": question}],
        "responses": list(responses or ("Ask a doctor.", "Yes, ten.")),
        "rubric": rubric_json(),
        **more,
    }


@asynccontextmanager
async def running(gate: Gate, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """The application with its worker, and a client of it."""
    async with gate.app.router.lifespan_context(gate.app):
        transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers, timeout=120
        ) as client:
            yield client


def ask(gate: Gate, method: str, path: str, **request) -> httpx.Response:
    async def go() -> httpx.Response:
        async with running(gate) as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def served(grader: RubricRewardModel, *, token: str | None = None, **settings) -> Gate:
    return build(grader, replace(ServeRecipe(), **settings), name="tiny", token=token)


def expected(grader: RubricRewardModel, body: dict) -> list[dict]:
    """The slow, obvious twin: `grade` called here."""
    point = body.get("operating_point", "audit")
    messages = [Message(**m) for m in body["messages"]]
    grades = grader.grade(messages, body["responses"], RUBRIC, operating_point=point)
    return [
        {
            "verdicts": {k: v.value for k, v in g.verdicts.items()},
            "probabilities": g.probabilities,
            "raw": g.raw,
            "scores": asdict(g.scores),
            "reward": reward(g.scores, RewardSpec(**body.get("reward_spec") or {})),
            "failures": g.failures,
            "emptied": g.emptied,
        }
        for g in grades
    ]


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        for numbers in ("raw", "probabilities"):
            assert mine[numbers] == pytest.approx(theirs[numbers], abs=1e-4)
        rest = set(theirs) - {"raw", "probabilities"}
        assert {k: mine[k] for k in rest} == {k: theirs[k] for k in rest}


def paths_of(grader: RubricRewardModel, body: dict) -> list[list[int]]:
    messages = [Message(**m) for m in body["messages"]]
    return [
        list(path)
        for text in body["responses"]
        for c in RUBRIC.criteria
        for tree in [grader.renderer.tree(messages, [text], [(0, c.text)])]
        for path in [(*tree.prompt, *tree.responses[0], *tree.leaves[0].tokens)]
    ]


class Slowed:
    """A model that waits until it is let go, and fails on rows that hold a poisonous token."""

    def __init__(self, grader: RubricRewardModel, poison: str | None = None) -> None:
        self.go, self.started = threading.Event(), threading.Event()
        self.rows: list[int] = []
        self._score = build(grader, ServeRecipe(), name="tiny").batcher._score_row
        self._poison = None
        if poison is not None:
            self._poison = set(grader.renderer._as_text(poison))

    def __call__(self, row) -> list[float]:
        self.started.set()
        assert self.go.wait(120)
        self.rows.append(len(row))
        if self._poison is not None and self._poison <= set(row.input_ids):
            raise RuntimeError(SECRET)
        return self._score(row)


def slowed(grader, gate: Gate, poison: str | None = None) -> Slowed:
    model = Slowed(grader, poison)
    gate.batcher._score_row = model
    return model


async def until(condition) -> None:
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited too long")
