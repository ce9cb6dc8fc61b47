"""The client against a server that misbehaves: what each behaviour comes to, and how often it asks.

That nothing is lost when the process is killed: test_llm_kill.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from misbehaving_server import (
    Behaviour,
    Cut,
    Drip,
    Hang,
    MisbehavingServer,
    Request,
    Reset,
    Says,
    Status,
)
from promedical.llm import client
from promedical.llm.call_progress import Tally
from promedical.llm.calls import Call, Check, Endpoint, Failure, LlmError, Reply
from promedical.llm.client import EndpointAsker
from promedical.llm.exchange import Trouble, read_answer, retry_after
from promedical.llm.ledger import Ledger
from promedical.records import Message

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}},
    "required": ["score"],
    "additionalProperties": False,
}
IDS = {"type": "array", "items": {"type": "object", "required": ["id"]}}
GOOD = Says('{"score": 7}')
PATIENT = "Mrs Example has had chest pain"


def endpoint(server: MisbehavingServer | None, **settings: Any) -> Endpoint:
    url = server.url if server is not None else "http://127.0.0.1:9/v1"
    return Endpoint("m", url, **{"timeout_seconds": 20.0, "attempts": 3, **settings})


def call(of: Endpoint, id: str = "a", prompt: str | None = None, schema: Any = SCHEMA) -> Call:
    return Call(id, of, (Message("user", prompt or f"{PATIENT} {id}"),), schema)


def asker(ledger: Path | None = None, **settings: Any) -> EndpointAsker:
    return EndpointAsker(ledger, **{"progress": False, "backoff_seconds": 0.01, **settings})


def ask_one(
    behave: Callable[[Request], Behaviour],
    *,
    schema: Any = SCHEMA,
    check: Check | None = None,
    **settings: Any,
) -> tuple[Reply | Failure, list[Request]]:
    with MisbehavingServer(behave) as server:
        one = call(endpoint(server, **settings), schema=schema)
        return asker().ask([one], check=check)["a"], server.requests


def first(*behaviours: Behaviour) -> Callable[[Request], Behaviour]:
    """These in turn, and then good answers."""
    return lambda r: behaviours[r.number - 1] if r.number <= len(behaviours) else GOOD


# --- the key --------------------------------------------------------------------------------------


@given(
    messages=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=3),
    schema=st.none() | st.dictionaries(st.text(), st.integers() | st.text(), max_size=3),
    body=st.dictionaries(st.text(), st.booleans() | st.floats(allow_nan=False), max_size=3),
    sample=st.integers(0, 5),
)
def test_a_key_is_the_hash_of_the_json(
    messages: list[tuple[str, str]], schema: Any, body: dict[str, Any], sample: int
) -> None:
    of = Endpoint("m", "http://127.0.0.1:9/v1", temperature=0.5, extra_body=body)
    one = Call("a", of, tuple(Message(*m) for m in messages), schema, sample)
    content = {
        "endpoint": of.identity(),
        "messages": [list(m) for m in messages],
        "schema": schema,
        "sample": sample,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert one.key == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- what is sent ---------------------------------------------------------------------------------


def test_a_request_has_the_sampling_the_schema_and_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    reply, requests = ask_one(
        first(),
        api_key_env="SOME_KEY",
        temperature=0.5,
        top_p=0.9,
        max_tokens=50,
        seed=3,
        extra_body={"reasoning_effort": "high"},
    )
    assert isinstance(reply, Reply)
    assert reply.data == {"score": 7}
    assert (reply.usage.tokens_in, reply.usage.tokens_out, reply.usage.attempts) == (10, 5, 1)
    assert requests[0].headers["authorization"] == "Bearer sk-secret"
    assert not {"x-stainless-os", "x-stainless-arch"} & requests[0].headers.keys()
    assert requests[0].body == {
        "model": "m",
        "messages": [{"role": "user", "content": f"{PATIENT} a"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 50,
        "seed": 3,
        "reasoning_effort": "high",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": SCHEMA},
        },
    }


@pytest.mark.parametrize(
    ("mode", "expected"), [("object", {"type": "json_object"}), ("none", None)]
)
def test_json_modes(mode: str, expected: object) -> None:
    _, requests = ask_one(first(), json_mode=mode)
    assert requests[0].body.get("response_format") == expected


def test_no_key_is_sent_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    _, requests = ask_one(first())
    assert "sk-of-somebody-else" not in json.dumps(dict(requests[0].headers))


# --- behaviours: (what the server does, what comes out, requests) ---------------------------------

PASSING = {
    "429 without Retry-After": Status(429),
    "500": Status(500),
    "503 with a page": Status(503, {"content-type": "text/html"}, b"<html>busy</html>"),
    "connection reset": Reset(),
    "cut in the middle": Cut(),
    "body is not JSON": Status(200, {}, b'{"choices": [{"mess'),
    "body is no completion": Status(200, {}, b'{"choices": []}'),
}


@pytest.mark.parametrize("name", PASSING)
def test_trouble_that_passes_is_tried_again(name: str) -> None:
    reply, requests = ask_one(first(PASSING[name], PASSING[name]))
    assert isinstance(reply, Reply)
    assert reply.data == {"score": 7}
    assert reply.usage.attempts == len(requests) == 3


@pytest.mark.parametrize(
    ("behaviour", "kind", "detail", "requests"),
    [
        (Status(429), "http", "429 (some_code)", 3),
        (Status(500), "http", "500", 3),
        (Status(400), "http", "400", 1),
        (Reset(), "connection", "", 3),
        (Cut(), "connection", "", 3),
        (Status(200, {}, b"[]"), "http", "not a chat completion", 3),
        (Says(""), "empty", "no text", 1),
        (Says(None), "empty", "no text", 1),
        (Says("<think>what if"), "empty", "no text", 1),
        (Says('{"score": 7', finish="length"), "truncated", "max_tokens", 1),
        (Says('{"score": 7'), "unparseable", "not JSON", 2),
        (Says('{"score": "high"}'), "schema", "properties/score/type", 2),
        (Says('{"score": 7, "score": 8}'), "unparseable", "repeats a key", 2),
        (Says("x" * 10_000_000), "too_large", "2,000,000", 1),
        (Says("x" * 10_000_000, chunked=True), "too_large", "2,000,000", 1),
    ],
)
def test_trouble_that_lasts_is_a_failure(
    behaviour: Behaviour, kind: str, detail: str, requests: int
) -> None:
    failure, sent = ask_one(lambda _: behaviour)
    assert isinstance(failure, Failure)
    assert (failure.kind, len(sent), failure.usage.attempts) == (kind, requests, requests)
    assert detail in failure.detail
    assert PATIENT not in failure.detail


@pytest.mark.parametrize("behaviour", [Hang(), Drip()])
def test_a_server_that_hangs_is_given_up(behaviour: Behaviour) -> None:
    failure, sent = ask_one(lambda _: behaviour, timeout_seconds=0.4, attempts=2)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.detail, len(sent)) == ("timeout", "no reply within 0.4 s", 2)


def test_ten_megabytes_are_not_read() -> None:
    with MisbehavingServer(lambda _: Says("x" * 10_000_000, chunked=True)) as server:
        asker().ask([call(endpoint(server))])
        time.sleep(0.1)
        assert server.sent_bytes < 10_000_000


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected_by_all_calls(form: str) -> None:
    after = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2))
    slow = Status(429, {"retry-after": after})
    with MisbehavingServer(lambda r: slow if r.number == 1 else GOOD) as server:
        of = endpoint(server, concurrency=1)
        replies = asker().ask([call(of, "a"), call(of, "b")])
    assert all(isinstance(r, Reply) for r in replies.values())
    waited = server.requests[1].at - server.requests[0].at
    assert waited >= 0.99 if form == "seconds" else waited > 0.2
    assert len(server.requests) == 3


def test_waiting_doubles_up_to_a_bound_with_full_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    monkeypatch.setattr(client.random, "uniform", uniform)
    monkeypatch.setattr(client, "LONGEST_BACKOFF", 3.0)
    with MisbehavingServer(lambda _: Status(500)) as server:
        asker(backoff_seconds=0.5).ask([call(endpoint(server, attempts=6))])
    assert drawn == [(0, 0.5), (0, 1.0), (0, 2.0), (0, 3.0), (0, 3.0)]


def test_retry_after_forms() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    forms = {
        "3": 3.0,
        "0.5": 0.5,
        "-1": 0.0,
        "Thu, 01 Jan 2026 12:00:30 GMT": 30.0,
        "Thu, 01 Jan 2026 11:00:00 GMT": 0.0,
        "soon": None,
        "nan": None,
        "": None,
    }
    assert {f: retry_after({"retry-after": f}, now) for f in forms} == forms


def test_a_server_that_asks_to_wait_for_hours_ends_the_run() -> None:
    with pytest.raises(LlmError, match="asks to wait 86,400 s"):
        ask_one(lambda _: Status(429, {"retry-after": "86400"}))


# --- repair and check -----------------------------------------------------------------------------


def test_a_faulty_reply_is_shown_to_the_model_once(tmp_path: Path) -> None:
    behave = first(Says('{"score": 70}'))
    with MisbehavingServer(behave) as server:
        one = call(endpoint(server))
        reply = asker(tmp_path / "l.db").ask([one])["a"]
        shown = server.requests[1].body["messages"]
        assert [m["role"] for m in shown] == ["user", "assistant", "user"]
        assert shown[1]["content"] == '{"score": 70}'
        assert "70 is greater than the maximum of 10" in shown[2]["content"]
        assert isinstance(reply, Reply)
        assert (reply.usage.tokens_in, reply.usage.attempts) == (20, 2)
        # Kept under the key of the call as it was asked.
        again = asker(tmp_path / "l.db").ask([one])["a"]
    assert isinstance(again, Reply)
    assert (again.cached, again.data) == (True, {"score": 7})
    assert len(server.requests) == 2


def test_duplicate_ids_are_for_the_check() -> None:
    def once_each(_: Call, data: Any) -> str | None:
        twice = [id for id, n in Counter(d["id"] for d in data).items() if n > 1]
        return f"{len(twice)} ids are there twice" if twice else None

    twice, once = Says('[{"id": "x"}, {"id": "x"}]'), Says('[{"id": "x"}]')
    failure, sent = ask_one(lambda _: twice, schema=IDS, check=once_each)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.detail, len(sent)) == ("check", "1 ids are there twice", 2)
    reply, _ = ask_one(lambda r: twice if r.number == 1 else once, schema=IDS, check=once_each)
    assert isinstance(reply, Reply)
    assert reply.data == [{"id": "x"}]


def test_what_is_kept_has_to_pass_todays_check(tmp_path: Path) -> None:
    with MisbehavingServer(lambda r: Says('{"score": 8}') if r.number > 1 else GOOD) as server:
        one = call(endpoint(server))
        asker(tmp_path / "l.db").ask([one])
        no_seven: Check = lambda _, d: "not 7" if d["score"] == 7 else None  # noqa: E731
        reply = asker(tmp_path / "l.db").ask([one], check=no_seven)["a"]
    assert isinstance(reply, Reply)
    assert (reply.data, reply.cached, len(server.requests)) == ({"score": 8}, False, 2)
    assert server.requests[1].body["messages"][1]["content"] == '{"score": 7}'


@pytest.mark.parametrize("where", ["reasoning_content", "reasoning", "text"])
def test_reasoning_is_kept_apart(where: str) -> None:
    says = (
        Says('<think>because</think>{"score": 7}')
        if where == "text"
        else Says('{"score": 7}', extra={where: "because"})
    )
    reply, _ = ask_one(lambda _: says)
    assert isinstance(reply, Reply)
    assert (reply.text, reply.reasoning, reply.data) == ('{"score": 7}', "because", {"score": 7})


def test_free_text_is_taken_as_it_is() -> None:
    reply, requests = ask_one(lambda _: Says(" half an ans", finish="length"), schema=None)
    assert isinstance(reply, Reply)
    assert (reply.text, reply.data, reply.finish) == ("half an ans", None, "length")
    assert "response_format" not in requests[0].body


def test_that_a_text_was_cut_is_kept(tmp_path: Path) -> None:
    with MisbehavingServer(lambda _: Says("half an ans", finish="length")) as server:
        one = call(endpoint(server), schema=None)
        found = [asker(tmp_path / "l.db").ask([one])["a"] for _ in range(2)]
    assert [(r.finish, r.cached) for r in found if isinstance(r, Reply)] == [
        ("length", False),
        ("length", True),
    ]


def test_answers_of_other_shapes_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    answer = read_answer({"choices": [{"message": {"content": parts}}]})
    assert (answer.text, answer.tokens_in) == ("ab", None)
    for wrong in (None, [], {}, {"choices": [{}]}, {"choices": [{"message": 3}]}, "page"):
        with pytest.raises(Trouble):
            read_answer(wrong)


# --- what ends a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_ends_the_run_at_once(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    body = json.dumps({"error": {"message": "no sk-secret " + PATIENT, "code": "sk-secret"}})
    behave = lambda r: GOOD if r.number == 1 else Status(status, {}, body.encode())  # noqa: E731
    with MisbehavingServer(behave) as server:
        of = endpoint(server, api_key_env="SOME_KEY", concurrency=1)
        with pytest.raises(LlmError, match=str(status)) as caught:
            asker(tmp_path / "l.db").ask([call(of, f"c{i}") for i in range(50)])
    assert len(server.requests) == 2
    assert "sk-secret" not in str(caught.value)
    assert PATIENT not in str(caught.value)
    assert Ledger(tmp_path / "l.db").stats()["m"].replies == 1


def test_nothing_answers() -> None:
    with pytest.raises(LlmError, match=r"nothing answers at http://127\.0\.0\.1:9/v1"):
        asker().ask([call(endpoint(None))])


def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    for settings, message in [
        ({"api_key_env": "SOME_KEY"}, "SOME_KEY"),
        ({"json_mode": "yes"}, "json_mode"),
        ({"concurrency": 0}, "concurrency"),
    ]:
        with pytest.raises(LlmError, match=message):
            asker().ask([call(endpoint(None, **settings))])
    with pytest.raises(LlmError, match="unique"):
        asker().ask([call(endpoint(None)), call(endpoint(None))])


def test_within_an_event_loop_it_says_so() -> None:
    import asyncio

    async def inside() -> None:
        asker().ask([call(endpoint(None))])

    with pytest.raises(LlmError, match="another thread"):
        asyncio.run(inside())


# --- counting, limits, budget ---------------------------------------------------------------------


def test_one_key_is_sent_once_and_two_models_are_asked_together() -> None:
    with MisbehavingServer(lambda r: Says(r.body["model"])) as server:
        one = Endpoint("one", server.url)
        two = Endpoint("two", server.url)
        calls = [
            call(one, "a", "same", None),
            call(two, "b", "same", None),
            call(one, "c", "same", None),
        ]
        replies = asker().ask(calls)
    assert len(server.requests) == 2
    assert list(replies) == ["a", "b", "c"]
    assert [r.text for r in replies.values() if isinstance(r, Reply)] == ["one", "two", "one"]
    assert [r.usage.attempts for r in replies.values()] == [1, 1, 0]
    assert [r.call.id for r in replies.values()] == ["a", "b", "c"]


def test_no_more_slots_than_allowed_and_all_of_them() -> None:
    with MisbehavingServer(first(), latency=0.05) as server:
        of = endpoint(server, concurrency=8)
        asker().ask([call(of, f"c{i}") for i in range(40)])
    assert server.most_at_once == 8


def test_requests_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promedical.llm.client.LIMIT_PERIOD_SECONDS", 1.0)
    with MisbehavingServer(first()) as server:
        of = endpoint(server, requests_per_minute=5)
        start = time.monotonic()
        asker().ask([call(of, f"c{i}") for i in range(12)])
    at = [r.at - start for r in server.requests]
    assert at[5] >= 1.0
    assert at[10] >= 2.0


def test_tokens_per_minute_count_what_the_server_counted() -> None:
    with MisbehavingServer(first()) as server:
        # A call takes 15 tokens in truth, and about 80 as long as that is not known.
        of = endpoint(server, tokens_per_minute=150, max_tokens=30, concurrency=1)
        start = time.monotonic()
        asker().ask([call(of, f"c{i}") for i in range(4)])
    assert time.monotonic() - start < 50.0


def test_the_budget_ends_a_run_cleanly(tmp_path: Path) -> None:
    with MisbehavingServer(first(), latency=0.02) as server:
        of = endpoint(server, concurrency=4, usd_per_million_in=1e5, usd_per_million_out=1e5)
        calls = [call(of, f"c{i}") for i in range(40)]
        spender = asker(tmp_path / "l.db", budget_usd=15.0)  # a call takes 1.50
        results = spender.ask(calls)
        kinds = Counter(getattr(r, "kind", "reply") for r in results.values())
        assert list(results) == [c.id for c in calls]
        assert kinds.keys() == {"reply", "budget"}
        assert 10 <= kinds["reply"] <= 13  # those in flight ended
        assert spender.spent_usd == pytest.approx(1.5 * kinds["reply"])
        assert len(server.requests) == kinds["reply"]
        # What was paid for is there; no budget is needed for it.
        free = asker(tmp_path / "l.db", budget_tokens=0).ask(calls)
        assert sum(isinstance(r, Reply) for r in free.values()) == kinds["reply"]
        assert len(server.requests) == kinds["reply"]


def test_failures_are_accounted_for_and_asked_again(tmp_path: Path) -> None:
    with MisbehavingServer(lambda _: Says("no json", usage=None)) as server:
        one = call(endpoint(server))
        for _ in range(2):
            assert isinstance(asker(tmp_path / "l.db").ask([one])["a"], Failure)
        assert len(server.requests) == 4
    stats = Ledger(tmp_path / "l.db").stats()["m"]
    assert (stats.replies, stats.failures, stats.attempts) == (0, {"unparseable": 2}, 4)
    assert stats.tokens_out == 2 * 2 * 2  # estimated: 7 characters


def test_progress_says_rate_cost_errors_and_time_left() -> None:
    tally = Tally("judge", 5350, cached=100, answered=4995, failed=5, usd=1.5)
    tally.started = time.monotonic() - 1000  # so long that a pause of this machine is nothing
    assert tally.line() == "5.0/s, 1.50 USD, 5 failed, 100 cached, about 50 s left"
    tally.retries, tally.answered = 3, 29_995
    assert tally.line() == "30.0/s, 1.50 USD, 5 failed, 3 retries, 0 repairs, 100 cached"


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []

    def look(tally: Tally) -> None:
        seen.append((tally.done, tally.total))
        assert "failed" in tally.line()

    with MisbehavingServer(first()) as server:
        calls = [call(endpoint(server), f"c{i}") for i in range(3)]
        asker(progress=look).ask(calls, title="screen")
    assert seen[-1] == (3, 3)


def test_a_check_that_raises_is_heard(tmp_path: Path) -> None:
    def broken(_: Call, __: Any) -> str | None:
        raise ZeroDivisionError

    with MisbehavingServer(first()) as server, pytest.raises(ZeroDivisionError):
        asker(tmp_path / "l.db").ask([call(endpoint(server))], check=broken)


def test_interrupted_what_came_is_kept(tmp_path: Path) -> None:
    """Ctrl-C after some replies: KeyboardInterrupt, and those replies are there."""
    with MisbehavingServer(lambda r: GOOD if r.number <= 5 else Hang()) as server:
        of = endpoint(server, concurrency=2)

        def interrupt() -> None:
            while len(server.requests) < 7:
                time.sleep(0.01)
            time.sleep(0.1)
            signal_self()

        # Workers of pytest-xdist ignore SIGINT; a command does not.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                asker(tmp_path / "l.db").ask([call(of, f"c{i}") for i in range(20)])
            thread.join()
        finally:
            signal.signal(signal.SIGINT, before)
    assert Ledger(tmp_path / "l.db").stats()["m"].replies == 5


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- secrets --------------------------------------------------------------------------------------


def test_the_key_and_the_text_are_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-never-to-be-seen"
    monkeypatch.setenv("SOME_KEY", key)
    monkeypatch.setattr(logging.root, "level", logging.DEBUG)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.root.addHandler(handler)
    behave = first(Status(500), Says('{"score": 99}'), Says("no"), Status(429), Reset())
    try:
        with MisbehavingServer(behave) as server:
            of = endpoint(server, api_key_env="SOME_KEY", concurrency=2)
            one = asker(tmp_path / "l.db", progress=True)
            results = one.ask([call(of, f"c{i}") for i in range(6)], title="screen")
            assert all(r.headers["authorization"] == f"Bearer {key}" for r in server.requests)
            # While it is open, so that the log (-wal) is among the files.
            files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
            one.close()
    finally:
        logging.root.removeHandler(handler)
    assert files.keys() == {"l.db", "l.db-wal", "l.db-shm"}
    assert modes == {0o600}
    assert not any(key.encode() in content for content in files.values())
    assert not any(PATIENT.encode() in content for content in files.values())
    shown = capsys.readouterr()
    assert "6/6" in shown.err
    printed = log.getvalue() + shown.err + shown.out + repr(one) + repr(vars(one)) + repr(of)
    assert key not in printed
    assert key not in repr(results)
    assert PATIENT not in log.getvalue() + shown.err + shown.out
