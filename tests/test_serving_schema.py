"""Requests that cannot be used are refused by the name of their field, and never quoted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.reward_model import serving_schema as schema
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serving_schema import (
    ClassifyRequest,
    ErrorAnswer,
    GradeRequest,
    RequestError,
    parse,
    rubric_of,
)
from tiny_serving import (
    SECRET,
    ask,
    asking,
    served,
    tiny_grader,
)

JSON_TYPE = {"Content-Type": "application/json; charset=utf-8"}


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader()


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
    answer = ask(served(grader), "POST", "/v1/grade", content=content, headers=JSON_TYPE)
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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"responses": 10**400}, "responses"),
        ({"responses": [1] * 200_000}, "responses[0]"),
        ({"messages": [1] * 200_000}, "messages[0]"),
        ({"rubric": {"criteria": [1] * 1000}}, "body"),
        ({f"x{i}": 1 for i in range(1000)}, "body"),
    ],
)
def test_faults_beyond_number_are_not_described_one_by_one(change, field, monkeypatch):
    described = []
    fault = schema._fault
    monkeypatch.setattr(schema, "_fault", lambda *a: described.append(a) or fault(*a))
    body = json.dumps(asking() | change).encode()
    assert refused(lambda: parse(GradeRequest, body)) == field
    classify = json.dumps({"input": [1, *["a"] * 200_000]}).encode()
    assert refused(lambda: parse(ClassifyRequest, classify)) == "input"
    assert len(described) <= schema.MANY_FAULTS


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

    answer = ask(
        served(grader, max_body_bytes=500), "POST", "/v1/grade", content=pieces(), headers=JSON_TYPE
    )
    assert answer.status_code == 413  # without a content-length too


def test_unknown_paths_methods_and_types(grader):
    assert ask(served(grader), "POST", "/v1/grade", content=b"{}").status_code == 415
    assert ask(served(grader), "GET", "/nowhere").status_code == 404
    assert ask(served(grader), "GET", "/v1/grade").status_code == 405
