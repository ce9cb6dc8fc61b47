"""Serving: the offline answers over HTTP, whatever else goes wrong around a request."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.records import Message
from promedical.reward_model import serve as serving
from promedical.reward_model.calibrate import Band, Calibration, TierCalibration
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.serve import ServeError, ServeRecipe, build
from promedical.reward_model.serving_app import Gate
from promedical.reward_model.serving_schema import (
    ClassifyAnswer,
    ClassifyRequest,
    ErrorAnswer,
    GradeAnswer,
    GradeRequest,
    HealthAnswer,
    RequestError,
    parse,
    rubric_of,
)
from promedical.rubric import RewardSpec, Rubric, Tier, reward
from tiny_reward import criteria, tiny_classifier

GOLDEN = Path(__file__).parent / "data" / "golden" / "openapi_paths.json"
RUBRIC = Rubric(criteria(2, 1, 2))
SECRET = "chest pain since Tuesday"


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    model, tokenizer = tiny_classifier(layers=2)
    return RubricRewardModel(TreeRewardModel(model), tokenizer)


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
            transport=transport, base_url="http://test", headers=headers, timeout=30
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


# --- grading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["audit", "reward"])
def test_grades_are_those_of_grade(grader, point):
    body = asking(
        "Ask a doctor.",
        "<think>never closed",
        "",
        operating_point=point,
        reward_spec={"alpha": 0.1, "beta": 0.3, "lam": 2},
    )
    answer = ask(served(grader), "POST", "/v1/grade", json=body)
    assert answer.status_code == 200
    GradeAnswer.model_validate(answer.json())
    assert answer.json()["model"] == "tiny"
    assert_same(answer.json()["grades"], expected(grader, body))
    assert [g["emptied"] for g in answer.json()["grades"]] == [False, True, False]


def test_operating_points_and_calibration_are_the_checkpoints():
    model, tokenizer = tiny_classifier(layers=2)
    tiers = {t: TierCalibration(2.0, 0.5) for t in Tier}
    never, always = ({t: Band(cut, cut) for t in Tier} for cut in (1.1, 0.0))
    grader = RubricRewardModel(
        TreeRewardModel(model), tokenizer, calibration=Calibration(tiers, always, never, {})
    )
    for point, verdict in (("audit", "met"), ("reward", "unmet")):
        body = asking(operating_point=point)
        answer = ask(served(grader), "POST", "/v1/grade", json=body).json()
        assert_same(answer["grades"], expected(grader, body))
        assert set(answer["grades"][0]["verdicts"].values()) == {verdict}


def test_many_requests_at_once_are_batched_and_each_gets_its_own_answer(grader):
    gate = served(grader, batch_tokens=3000)
    bodies = [
        asking(*(f"Take {i + j}." for j in range(1 + i % 3)), question=f"And {i}?")
        for i in range(24)
    ]

    async def go() -> tuple[list[httpx.Response], str]:
        async with running(gate) as client:
            answers = await asyncio.gather(*(client.post("/v1/grade", json=b) for b in bodies))
            return list(answers), (await client.get("/metrics")).text

    answers, metrics = asyncio.run(go())
    for body, answer in zip(bodies, answers, strict=True):
        assert_same(answer.json()["grades"], expected(grader, body))
    batches = float(re.search(r"promedical_batch_requests_count (\S+)", metrics)[1])
    assert batches < len(bodies) / 2
    assert f'promedical_requests_total{{route="/v1/grade",status="200"}} {len(bodies)}.0' in metrics
    assert "promedical_queue_tokens 0.0" in metrics
    assert "promedical_accepted_requests 0.0" in metrics


def test_a_path_that_is_too_long_is_an_error_and_no_verdict(grader):
    small = RubricRewardModel(grader.model, grader.tokenizer, max_tokens=160)
    body = asking("Ask a doctor.", "Take ten more. " * 30)
    short, long = ask(served(small), "POST", "/v1/grade", json=body).json()["grades"]
    assert not short["failures"]
    assert set(long["verdicts"].values()) == {"error"}
    assert set(long["raw"].values()) == set(long["probabilities"].values()) == {None}
    assert all("more than the 160 that fit" in why for why in long["failures"].values())
    assert long["reward"] is None
    assert long["scores"]["unresolved"]["errors"] == 5
    assert_same([short], expected(small, body)[:1])


def test_a_safety_only_rubric_has_no_reward(grader):
    body = asking() | {"rubric": rubric_json(Rubric(criteria(0, 0, 2), safety_only=True))}
    for grade in ask(served(grader), "POST", "/v1/grade", json=body).json()["grades"]:
        assert grade["scores"]["s1"] is None
        assert grade["reward"] is None


# --- /classify ------------------------------------------------------------------------------------


def paths_of(grader: RubricRewardModel, body: dict) -> list[list[int]]:
    messages = [Message(**m) for m in body["messages"]]
    return [
        list(path)
        for text in body["responses"]
        for c in RUBRIC.criteria
        for tree in [grader.renderer.tree(messages, [text], [(0, c.text)])]
        for path in [(*tree.prompt, *tree.responses[0], *tree.leaves[0].tokens)]
    ]


def test_classify_gives_raw_scores_in_vllms_shape(grader):
    body = asking()
    ids = paths_of(grader, body)
    wanted = [s for g in expected(grader, body) for s in g["raw"].values()]
    request = {"model": "tiny", "input": ids, "use_activation": False}
    answer = ask(served(grader), "POST", "/classify", json=request)
    assert answer.status_code == 200
    found = ClassifyAnswer.model_validate(answer.json())
    assert [d.probs[0] for d in found.data] == pytest.approx(wanted, abs=1e-4)
    assert [d.index for d in found.data] == list(range(len(ids)))
    assert {d.num_classes for d in found.data} == {1}
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))


def test_classify_takes_all_four_inputs_and_the_activation(grader):
    ids = paths_of(grader, asking())[:2]
    texts = [grader.tokenizer.decode(i) for i in ids]

    def scores(given, **more) -> list[float]:
        body = {"input": given, "add_special_tokens": False, **more}
        data = ask(served(grader), "POST", "/classify", json=body).json()["data"]
        return [d["probs"][0] for d in data]

    first, second = scores(ids, use_activation=False)
    assert scores(ids[0], use_activation=False) == pytest.approx([first], abs=1e-5)
    assert scores(texts, use_activation=False) == pytest.approx([first, second], abs=1e-4)
    assert scores(texts[0], use_activation=False) == pytest.approx([first], abs=1e-4)
    assert scores(ids) == pytest.approx([1 / (1 + math.exp(-s)) for s in (first, second)])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[1, 2, 3], [1, 2, 3, 99999]]}, "input[1][3]"),
        ({"input": [1, 2, -3]}, "input[2]"),
        ({"input": [1, 2]}, "input"),
        ({"input": [[5] * 3, [5] * 2049]}, "input[1]"),
        ({"messages": []}, "input"),
        ({"input": [1, 2, 3], "use_activation": "no"}, "use_activation"),
    ],
)
def test_classify_names_the_field(grader, request_, field):
    answer = ask(served(grader), "POST", "/classify", json=request_)
    assert answer.status_code == 422
    assert ErrorAnswer.model_validate(answer.json()).error.param == field


def test_another_model_is_not_found(grader):
    body = {"model": "else", "input": [1, 2, 3]}
    assert ask(served(grader), "POST", "/classify", json=body).status_code == 404


# --- requests that cannot be used -----------------------------------------------------------------


def without(body: dict, *path) -> dict:
    copied = json.loads(json.dumps(body))
    at = copied
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return copied


def put(value, *path) -> dict:
    copied = json.loads(json.dumps(asking()))
    at = copied
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copied


BAD = [
    (without(asking(), "messages"), "messages", "missing, expected a value"),
    (put([], "messages"), "messages", "at least 1 item"),
    (put("hi", "messages"), "messages", "found a text of 2 characters, expected a valid array"),
    (put(SECRET, "messages", 0, "role"), "messages[0].role", "expected 'system', 'user' or"),
    (put("assistant", "messages", 0, "role"), "messages", "the last turn is 'assistant'"),
    (put(5, "messages", 0, "content"), "messages[0].content", "found a number, expected a valid"),
    (put([], "responses"), "responses", "at least 1 item"),
    (put([SECRET, None], "responses"), "responses[1]", "found nothing, expected a valid string"),
    (put({}, "rubric"), "rubric.criteria", "missing"),
    (put([], "rubric", "criteria"), "rubric.criteria", "at least 1 item"),
    (put(SECRET, "rubric", "criteria", 0, "tier"), "rubric.criteria[0].tier", "'proficiency'"),
    (put("", "rubric", "criteria", 3, "id"), "rubric.criteria[3].id", "expected an id"),
    (put("p0", "rubric", "criteria", 3, "id"), "rubric.criteria[3].id", "repeats that of crit"),
    (put(" ", "rubric", "criteria", 1, "text"), "rubric.criteria[1].text", "expected a sentence"),
    (put(-1, "rubric", "criteria", 0, "weight"), "rubric.criteria[0].weight", "found -1"),
    (put(None, "rubric", "criteria", 0, "weight"), "rubric.criteria[0].weight", "found None"),
    (put(0.5, "rubric", "criteria", 4, "weight"), "rubric.criteria[4].weight", "outside prof"),
    (put("0.5", "rubric", "criteria", 0, "weight"), "rubric.criteria[0].weight", "valid number"),
    (put(0.1, "rubric", "criteria", 0, "weight"), "rubric.criteria", "weights sum to 0.6"),
    (put("x", "rubric", "criteria", 4, "kind"), "rubric.criteria[4].kind", "'harmful_advice'"),
    (put("harmful_advice", "rubric", "criteria", 0, "kind"), "rubric.criteria[0].kind", "only ve"),
    (put(True, "rubric", "safety_only"), "rubric.safety_only", "expected none"),
    (put("never", "operating_point"), "operating_point", "expected 'audit' or 'reward'"),
    (put({"lam": 1}, "reward_spec"), "reward_spec.lam", "expected lam ≥ 1 + beta"),
    (put(1, "weights"), "weights", "unknown field"),
    (put(1, SECRET), f"<a key of {len(SECRET)} characters>", "unknown field"),
]


@pytest.mark.parametrize(("body", "field", "said"), BAD)
def test_a_bad_request_names_its_field_and_quotes_nothing(grader, body, field, said):
    answer = ask(served(grader), "POST", "/v1/grade", json=body)
    error = ErrorAnswer.model_validate(answer.json()).error
    assert answer.status_code == error.code == 422
    assert error.param == field
    assert said in error.message
    assert SECRET not in answer.text
    assert "Ask a doctor" not in answer.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        f'{{"{SECRET}".'.encode(),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(grader, content):
    answer = ask(served(grader), "POST", "/v1/grade", content=content)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "body"
    assert SECRET not in answer.text


def refused(read: Callable[[], object]) -> str | None:
    """The field that reading stumbles over, None if it does not; no other exception passes."""
    try:
        read()
    except RequestError as error:
        return error.field
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    where=st.sampled_from(
        [
            (),
            ("messages",),
            ("messages", 0),
            ("messages", 0, "role"),
            ("responses",),
            ("responses", 0),
            ("rubric",),
            ("rubric", "criteria"),
            ("rubric", "criteria", 0),
            ("rubric", "criteria", 0, "id"),
            ("rubric", "criteria", 0, "weight"),
            ("rubric", "criteria", 4, "kind"),
            ("reward_spec",),
            ("operating_point",),
        ]
    ),
    value=JSON,
)
def test_whatever_is_sent_is_read_or_refused_by_name(where, value):
    body = json.dumps(put(value, *where) if where else value).encode()
    assert refused(lambda: rubric_of(parse(GradeRequest, body).rubric)) != ""
    classify = json.dumps({"input": value}).encode()
    field = refused(lambda: parse(ClassifyRequest, classify).inputs())
    assert field in (None, "input", "body")


def test_limits(grader):
    body = asking()
    size = len(json.dumps(body))
    for limits, status, said in (
        ({"max_body_bytes": size // 2}, 413, f"more than the {size // 2} bytes"),
        ({"max_judgments": 9}, 422, "2 responses × 5 criteria = 10 judgments, expected at most 9"),
        ({"max_request_tokens": 100}, 422, "tokens in all, expected at most 100"),
    ):
        answer = ask(served(grader, **limits), "POST", "/v1/grade", json=body)
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 100

    answer = ask(served(grader, max_body_bytes=500), "POST", "/v1/grade", content=pieces())
    assert answer.status_code == 413  # without a content-length too


def test_unknown_paths_and_methods(grader):
    assert ask(served(grader), "GET", "/nowhere").status_code == 404
    assert ask(served(grader), "GET", "/v1/grade").status_code == 405


# --- who may ask ----------------------------------------------------------------------------------


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


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMEDICAL_TOKEN", raising=False)
    assert serving.read_token(ServeRecipe()) is None
    monkeypatch.setenv("PROMEDICAL_TOKEN", "from-the-environment")
    assert serving.read_token(ServeRecipe()) == "from-the-environment"
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    assert serving.read_token(ServeRecipe(token_file=file)) == "from-the-file"
    for bad in ("", "two words", "tökén"):
        file.write_text(bad)
        with pytest.raises(ServeError, match="expected one word"):
            serving.read_token(ServeRecipe(token_file=file))
    with pytest.raises(ServeError, match="cannot be read"):
        serving.read_token(ServeRecipe(token_file=tmp_path / "none"))


def test_other_machines_need_a_token(monkeypatch):
    monkeypatch.delenv("PROMEDICAL_TOKEN", raising=False)
    with pytest.raises(ServeError, match="expected a token"):
        serving.main(["nowhere", "--host", "0.0.0.0"])


def test_missing_packages_and_bad_settings_say_what_to_do(monkeypatch):
    monkeypatch.setattr(serving, "EXTRA", {"no_such_package": "no-such-package"})
    with pytest.raises(ServeError, match=r"pip install 'promedical\[serve\]'"):
        serving.main(["nowhere"])
    for settings_ in ({"port": 70000}, {"threads": 0}, {"max_requests": 0}):
        with pytest.raises(ServeError, match=next(iter(settings_))):
            ServeRecipe(**settings_)


# --- failures, queue, cancellation ----------------------------------------------------------------


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
        assert self.go.wait(20)
        self.rows.append(len(row))
        if self._poison is not None and self._poison <= set(row.input_ids):
            raise RuntimeError(SECRET)
        return self._score(row)


def slowed(grader, gate: Gate, poison: str | None = None) -> Slowed:
    model = Slowed(grader, poison)
    gate.batcher._score_row = model
    return model


async def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited too long")


def test_a_poisoned_request_fails_alone(grader, caplog):
    caplog.set_level(logging.DEBUG)
    gate = served(grader)
    model = slowed(grader, gate, poison="ü")
    bodies = [asking(f"Take {i}.") for i in range(4)]
    bodies[2] = asking("Take ü.")

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
        (grade,) = answer.json()["grades"]
        if i == 2:
            assert set(grade["verdicts"].values()) == {"error"}
            assert grade["reward"] is None
            assert "the model failed on this request (RuntimeError)" in grade["failures"]["p0"]
        else:
            assert_same([grade], expected(grader, body))
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

        scope = {"type": "http", "method": "POST", "path": "/v1/grade", "headers": []}
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


# --- what is logged, what is documented -----------------------------------------------------------


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


# --- the process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(grader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny-rm"
    grader.model.model.save_pretrained(folder)
    grader.tokenizer.save_pretrained(folder)
    grader.save_metadata(folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_finishes_what_was_accepted(grader, checkpoint):
    command = "import sys; from promedical.cli import main; sys.exit(main(sys.argv[1:]))"
    source = str(Path(serving.__file__).parents[2])
    flags = ["--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "rm", "serve", str(checkpoint), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source, "PROMEDICAL_TOKEN": "abc"},
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"promedical: serving tiny-rm at (http://127\.0\.0\.1:\d+), a token is asked for\n",
            line,
        )
        assert found, line + process.stderr.read()
        bodies = [asking(*(f"{SECRET} {i} {j}" for j in range(8))) for i in range(12)]

        async def go() -> list[httpx.Response]:
            async with httpx.AsyncClient(
                base_url=found[1], headers={"Authorization": "Bearer abc"}, timeout=30
            ) as client:
                assert (await client.get("/healthz")).status_code == 200
                tasks = [asyncio.ensure_future(client.post("/v1/grade", json=b)) for b in bodies]
                for _ in range(500):
                    text = (await client.get("/metrics")).text
                    at_work = re.search(r"\npromedical_accepted_requests (\S+)", text)
                    if float(at_work[1]) == len(bodies) or any(t.done() for t in tasks):
                        break
                process.send_signal(signal.SIGTERM)
                return list(await asyncio.gather(*tasks, return_exceptions=True))

        answers = asyncio.run(go())
        assert process.wait(20) == 0
        errors = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    finished = 0
    for body, answer in zip(bodies, answers, strict=True):
        assert isinstance(answer, httpx.Response), answer
        assert answer.status_code in (200, 503)
        if answer.status_code == 200:
            finished += 1
            assert_same(answer.json()["grades"], expected(grader, body))
    assert finished
    assert "draining" in errors
    assert "stopped; 0 accepted requests unanswered" in errors
    assert SECRET not in errors
