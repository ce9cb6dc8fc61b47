"""A build on a Ray cluster of two nodes comes out as on one machine, also when some of it dies."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from misbehaving_server import Behaviour, MisbehavingServer, Request, Says, Status
from promedical.cluster import ClusterError, ClusterSettings
from promedical.corpus.build import build
from promedical.corpus.build_recipe import BuildRecipe
from promedical.corpus.dedup import _facts_of
from promedical.corpus.ingest import IngestSettings, ingest
from promedical.corpus.ray_rows import map_blocks, read_sources
from promedical.corpus.sources import SourceSettings
from promedical.corpus.stage import CorpusError
from promedical.llm import ray_asker
from promedical.llm.calls import Call, Endpoint, Failure, LlmError, Reply
from promedical.llm.client import EndpointAsker
from promedical.llm.ledger import Ledger
from promedical.llm.ray_asker import RayAsker, _divisible, _share
from promedical.recipe import load_recipe
from promedical.records import Message
from scripted_models import HashedWords, scripted, write_questions, write_recipe
from test_build import Said, outcome
from two_nodes import TwoNodes

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'promedical[ray]'",
)
STAGE_OF = {"sorter": "screen", "first": "respond", "second": "respond", "writer": "rubrics"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        import ray

        yield running
        ray.shutdown()


def settings_of(nodes: TwoNodes, **more: Any) -> ClusterSettings:
    return ClusterSettings(nodes.address, **{"actors": 2, "calls_per_block": 4, **more})


def answer(request: Request) -> Says:
    """What the scripted models say, from what arrives at their server."""
    body = request.body
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    messages = tuple(Message(m["role"], m["content"]) for m in body["messages"])
    stage = STAGE_OF.get(body["model"], "judge")
    call = Call(f"{stage}/x", Endpoint(body["model"], "http://x/v1"), messages, schema)
    return Says(scripted(call))


def recipe_at(folder: Path, server: MisbehavingServer, **changes: Any) -> BuildRecipe:
    folder.mkdir()
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("http://127.0.0.1:9/v1", server.url))
    recipe = load_recipe(BuildRecipe, path)
    # Later rounds would take the cluster's time and show nothing new.
    assert recipe.rubrics is not None
    assert recipe.judge is not None
    return replace(
        recipe,
        rubrics=replace(recipe.rubrics, retries=0),
        judge=replace(recipe.judge, rounds=1),
        **changes,
    )


def run(recipe: BuildRecipe) -> None:
    build(recipe, encoder=HashedWords(), show=Said())


def left(out: Path) -> dict[str, Any]:
    """What a build left, less what says where its questions are."""
    found = outcome(out)
    for name, report in found.items():
        if isinstance(report, dict):
            found[name] = {k: v for k, v in report.items() if k not in ("recipe", "parents")}
    return {name: told for name, told in found.items() if not name.endswith("report.json")}


def calls_of(server: MisbehavingServer, count: int, **more: Any) -> list[Call]:
    endpoint = Endpoint("m", server.url, concurrency=8, **more)
    return [Call(f"c{n}", endpoint, (Message("user", f"question {n}"),)) for n in range(count)]


def when(met: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something once, as soon as a condition is met."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not met() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# --- without a cluster ----------------------------------------------------------------------------


def test_limits_are_divided_and_none_is_exceeded() -> None:
    endpoint = Endpoint("m", "http://x/v1", concurrency=10, requests_per_minute=9, max_tokens=100)
    calls = [Call("a", endpoint, (Message("user", "?"),))]
    assert _divisible(calls) == 9
    assert _divisible([replace(calls[0], endpoint=replace(endpoint, concurrency=3))]) == 3
    # One call takes 106 tokens of the minute: a share below that would let it through alone.
    limited = replace(endpoint, tokens_per_minute=450)
    assert _divisible([replace(calls[0], endpoint=limited)]) == 4
    assert _divisible([replace(calls[0], endpoint=replace(endpoint, tokens_per_minute=9))]) == 1
    for actors in range(1, 10):
        share = _share(endpoint, actors)
        assert actors * share.concurrency <= endpoint.concurrency
        assert share.requests_per_minute * actors == pytest.approx(9)
        assert replace(calls[0], endpoint=share).key == calls[0].key


@pytest.mark.parametrize("name", ["actors", "calls_per_block", "rows_per_block", "cpus_per_actor"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ClusterError, match=f"cluster: {name}: found 0"):
        ClusterSettings(**{name: 0})


def in_this_process(
    settings: ClusterSettings, blocks: Sequence[Any], work: Any, arguments: Any, *, actors: int
) -> Iterator[tuple[int, Any]]:
    """`each_block` without Ray: all is pickled there and back, and blocks come in disorder."""
    worker = work(**arguments)
    for number, block in reversed(list(enumerate(blocks))):
        for result in worker(pickle.loads(pickle.dumps(block))):
            yield number, pickle.loads(pickle.dumps(result))


def test_both_askers_give_the_same_replies_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field by field, so that one that a reply gets later cannot be forgotten on its way."""
    monkeypatch.setattr(ray_asker, "workers", lambda settings, wanted: wanted)
    monkeypatch.setattr(ray_asker, "each_block", in_this_process)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    def behave(request: Request) -> Behaviour:
        first, *later = request.body["messages"]
        kind = first["content"].split()[0]
        repaired = len(later) > 0
        return {
            "plain": Says("answer"),
            "cut": Says("half an ans", "length"),
            "filtered": Says("partly", "content_filter"),
            "thinking": Says("<think>hm</think>so"),
            "reasoning": Says("so", extra={"reasoning_content": "well"}),
            "uncounted": Says("answer", usage=None),
            "data": Says('{"n": 1}'),
            "data_cut": Says('{"n": 1}', "length"),
            "mended": Says('{"n": 2}' if repaired else '{"n": "two"}', "stop"),
            "wrong": Says('{"m": 2}'),
            "refused": Status(400),
            "empty": Says(""),
        }[kind]

    with MisbehavingServer(behave) as server:
        endpoint = Endpoint("m", server.url, concurrency=4, usd_per_million_out=1000.0)
        with_schema = ("data", "data_cut", "mended", "wrong")
        free = (
            "plain",
            "cut",
            "filtered",
            "thinking",
            "reasoning",
            "uncounted",
            "refused",
            "empty",
        )
        calls = [
            Call(
                kind,
                endpoint,
                (Message("user", f"{kind} question"),),
                schema if kind in with_schema else None,
            )
            for kind in free + with_schema
        ]
        calls.append(replace(calls[1], id="the same again"))
        local = EndpointAsker(tmp_path / "local.sqlite", progress=False)
        ray = RayAsker(
            tmp_path / "ray.sqlite", cluster=ClusterSettings(calls_per_block=5), progress=False
        )
        for _ in ("asked", "from the ledger"):
            here, there = local.ask(calls), ray.ask(calls)
            assert [told(here[c.id]) for c in calls] == [told(there[c.id]) for c in calls]
        finished = {id: r.finish for id, r in there.items() if isinstance(r, Reply)}
        assert (finished["cut"], finished["filtered"]) == ("length", "content_filter")
        assert {r.kind for r in there.values() if isinstance(r, Failure)} == {
            *("truncated", "schema", "http", "empty")
        }
        local.close()
        ray.close()


def told(result: Reply | Failure) -> dict[str, Any]:
    """Every field of what came of a call, less how long it took."""
    found = {f.name: getattr(result, f.name) for f in fields(result)}
    found["usage"] = replace(result.usage, seconds=0.0)
    return {"type": type(result).__name__, **found}


# --- on two nodes ---------------------------------------------------------------------------------


@needs_ray
def test_a_build_on_two_nodes_is_the_build_of_one_machine(tmp_path: Path, nodes: TwoNodes) -> None:
    with MisbehavingServer(answer, latency=0.01) as server:
        here = recipe_at(tmp_path / "here", server)
        run(here)
        asked = Counter(json.dumps(r.body, sort_keys=True) for r in server.requests)
        there = recipe_at(tmp_path / "there", server, engine="ray", cluster=settings_of(nodes))
        run(there)
    assert left(there.out) == left(here.out)
    # Each call was asked once more, no other was, and every reply is in the driver's ledger.
    assert Counter(json.dumps(r.body, sort_keys=True) for r in server.requests) == {
        body: 2 * times for body, times in asked.items()
    }
    with Ledger(there.ledger_path) as mine, Ledger(here.ledger_path) as theirs:
        for model, stats in theirs.stats().items():
            assert mine.stats()[model].replies == stats.replies
            assert mine.stats()[model].failures == stats.failures
            assert mine.stats()[model].tokens_out == stats.tokens_out


@needs_ray
def test_sources_and_facts_are_read_in_order(tmp_path: Path, nodes: TwoNodes) -> None:
    cluster = settings_of(nodes, rows_per_block=5)
    paths = [write_questions(tmp_path / f"{n}.jsonl", n) for n in (30, 3)]
    sources = tuple(
        SourceSettings("jsonl", path=str(path), licence="CC0-1.0", label=path.stem, limit=limit)
        for path, limit in ((paths[0], 0), (paths[1], 0), (paths[0], 7))
    )
    settings = IngestSettings(sources)
    here = ingest(settings)
    there = ingest(settings, reader=partial(read_sources, cluster=cluster))
    assert there == here
    assert [count["kept"] for count in here.report["sources"].values()] == [31, 4, 0]
    missing = (replace(sources[0], path=str(tmp_path / "missing.jsonl")),)
    with pytest.raises(CorpusError, match=r"missing\.jsonl"):
        [list(rows) for rows in read_sources(missing, cluster=cluster)]
    texts = [[f"{n} mg of drug {n}, {n} times"] * n for n in range(7)]
    assert list(map_blocks(_facts_of, texts, cluster=cluster)) == [_facts_of(t) for t in texts]
    assert list(map_blocks(_facts_of, [], cluster=cluster)) == []


def short(call: Call, text: str) -> str | None:
    return None if "short" in text else "it is too long"


@needs_ray
def test_repairs_failures_budget_and_a_missing_key(tmp_path: Path, nodes: TwoNodes) -> None:
    def behave(request: Request) -> Behaviour:
        number = int(re.findall(r"\d+", request.prompt)[0])
        if number == 3:
            return Status(400)
        repaired = len(request.body["messages"]) > 1
        return Says(
            "short" if number != 5 or repaired else "long",
            usage={"prompt_tokens": 60, "completion_tokens": 40},
        )

    path = tmp_path / "ledger.sqlite"
    with MisbehavingServer(behave) as server:
        calls = calls_of(server, 40)
        # The ledger has a reply that today's check refuses: it is repaired and not asked again.
        first = EndpointAsker(path, progress=False)
        assert isinstance(first.ask(calls[5:6])["c5"], Reply)
        first.close()
        settings = settings_of(nodes)
        asker = RayAsker(path, cluster=settings, budget_tokens=2000, progress=False)
        results = asker.ask(calls, check=short)
        assert list(results) == [call.id for call in calls]
        failures = Counter(r.kind for r in results.values() if isinstance(r, Failure))
        assert failures["http"] == 1
        # In flight when the budget was reached: at most the endpoint's slots.
        spent = sum(r.usage.tokens_in + r.usage.tokens_out for r in results.values())
        assert spent == asker.spent_tokens
        assert 2000 <= spent <= 2000 + 8 * 100
        assert failures["budget"] == 40 - 1 - spent // 100
        asker.close()
        with_key = [replace(calls[0], endpoint=replace(calls[0].endpoint, api_key_env="NO_KEY"))]
        with_key = [replace(c, sample=1) for c in with_key]
        asker = RayAsker(path, cluster=settings, progress=False)
        with pytest.raises(LlmError, match=r"NO_KEY.*on a worker of the cluster"):
            asker.ask(with_key)
        before = len(server.requests)
        again = asker.ask(calls[:6], check=short)
        assert isinstance(again["c5"], Reply)
        assert again["c5"].text == "short"
        assert len(server.requests) - before == sum(
            not (isinstance(results[c.id], Reply)) for c in calls[:6]
        )
        asker.close()


@needs_ray
def test_a_worker_that_is_killed_changes_nothing(tmp_path: Path, nodes: TwoNodes) -> None:
    block, count = 10, 80
    with MisbehavingServer(lambda r: Says(f"to {r.prompt}", "length"), 1.0) as server:

        def kill() -> None:
            os.kill((nodes.workers(0) + nodes.workers(1))[0], signal.SIGKILL)
            server.latency = 0.01

        asker = RayAsker(
            tmp_path / "ledger.sqlite",
            cluster=settings_of(nodes, calls_per_block=block),
            progress=False,
        )
        calls = calls_of(server, count)
        # A worker has four slots: with more at once both are at work.
        killer = when(lambda: server.most_at_once > 4, kill)
        results = asker.ask(calls)
        killer.join()
        texts = [r.text for r in results.values() if isinstance(r, Reply)]
        assert texts == [f"to question {n}" for n in range(count)]
        assert {r.finish for r in results.values() if isinstance(r, Reply)} == {"length"}
        # What the dead worker had in hand was asked once more, and nothing else.
        assert count < len(server.requests) <= count + block
        assert asker.ledger.stats()["m"].replies == count
        asker.close()


@needs_ray
def test_a_node_that_is_killed_changes_nothing(tmp_path: Path, nodes: TwoNodes) -> None:
    stages = ("ingest", "dedup", "screen", "pairs")
    with MisbehavingServer(answer) as server:
        here = recipe_at(tmp_path / "here", server, stages=stages)
        run(here)
        before, server.most_at_once, server.latency = len(server.requests), 0, 1.0
        there = recipe_at(
            tmp_path / "there", server, stages=stages, engine="ray", cluster=settings_of(nodes)
        )
        had: list[int] = []

        def kill() -> None:
            had.extend(nodes.workers(1))
            nodes.kill_node(1)
            server.latency = 0.01

        # A worker has blocks of four calls: with more at once both are at work.
        killer = when(lambda: server.most_at_once > 4, kill)
        run(there)
        killer.join()
    assert had
    assert left(there.out) == left(here.out)
    # A block that was at work, and at most one whose replies were on their way.
    assert before < len(server.requests) - before <= before + 2 * 4
