"""Calls to language models: does the client keep a slow endpoint busy, and how fast is a replay.

    python benchmarks/llm_calls.py             # the full run, about 4 minutes on 2 idle cores
    python benchmarks/llm_calls.py --small --out result.json       # a try, a few seconds

(a) Rate: `EndpointAsker` with a new ledger on disk and 64 slots asks an endpoint of 200 ms latency
    (a server in its own process that answers every request after exactly that), with a JSON schema.
    The ideal rate is slots / latency. The time is that of the whole `ask`: keys, ledger,
    connections, requests, parsing, validation, commits. Each repetition has new calls. `bare` is
    the same server and slots with a client that does nothing but write and read bytes, so that a
    machine or server that could not do better is told from a slow client.
    Target: the median repetition reaches 95 % of the ideal rate.
(b) Replay: a ledger of 250,000 replies answers 250,000 calls through `ask`: the keys are made from
    prompts of about 600 characters, every reply is read, parsed and checked. Target: 60 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from promedical.llm.calls import Call, Endpoint, Reply, Usage
from promedical.llm.client import EndpointAsker
from promedical.llm.ledger import Kept, Ledger
from promedical.provenance import provenance
from promedical.records import Message

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "llm_calls.json"
TARGETS = {"share of the ideal rate, at least": 0.95, "replay at most, s": 60.0}
SCHEMA = {
    "type": "object",
    "properties": {
        "met": {"type": "boolean"},
        "reason": {"type": "string"},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["met", "reason", "score"],
    "additionalProperties": False,
}
ANSWER = json.dumps({"met": True, "reason": "It names the dose and the warning. " * 5, "score": 7})
QUESTION = "What should a patient with a new prescription know about the dose and its risks? " * 7


@dataclass(frozen=True)
class Size:
    """How much is done.

    Calls are a multiple of slots: the empty slots of a last wave are nobody's overhead.
    """

    calls: int = 12_800
    repetitions: int = 3
    slots: int = 64
    latency: float = 0.2
    entries: int = 250_000


SMALL = Size(calls=160, repetitions=2, slots=16, entries=2000)


# --- the server, in its own process ---------------------------------------------------------------


class Answering(asyncio.Protocol):
    """Answers every request on a kept-alive connection after `latency` seconds."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        message = {"role": "assistant", "content": ANSWER}
        body = json.dumps(
            {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 150, "completion_tokens": 60},
            }
        ).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.answer = f"HTTP/1.1 200 OK\r\n{head}".encode() + body
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if found:
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(rest) >= length:
                self.buffer = rest[length:]
                asyncio.get_running_loop().call_later(self.latency, self._write)

    def _write(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.answer)


async def serve(latency: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(latency), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def served(latency: float) -> Iterator[int]:
    """The server's port."""
    command = [sys.executable, __file__, "--serve", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


# --- (a) ------------------------------------------------------------------------------------------


def calls_of(endpoint: Endpoint, name: str, number: int) -> list[Call]:
    return [
        Call(f"{name}{i}", endpoint, (Message("user", f"{QUESTION}{name}{i}"),), SCHEMA)
        for i in range(number)
    ]


async def bare(port: int, size: Size) -> float:
    """Seconds of the same requests, written and read as bytes."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": QUESTION}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    left = size.calls

    async def slot() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(slot() for _ in range(size.slots)))
    return time.perf_counter() - started


def rate(folder: Path, size: Size) -> dict[str, Any]:
    ideal = size.slots / size.latency
    found: list[dict[str, float]] = []
    with served(size.latency) as port:
        endpoint = Endpoint("m", f"http://127.0.0.1:{port}/v1", concurrency=size.slots)
        asker = EndpointAsker(folder / "rate.db", progress=False)
        asker.ask(calls_of(endpoint, "warm", size.slots))  # imports, certificates
        for repetition in range(size.repetitions):
            calls = calls_of(endpoint, f"r{repetition}-", size.calls)
            cpu, started = time.process_time(), time.perf_counter()
            replies = asker.ask(calls)
            seconds = time.perf_counter() - started
            cpu = time.process_time() - cpu
            answered = sum(isinstance(r, Reply) and not r.cached for r in replies.values())
            if answered != size.calls:
                raise RuntimeError(f"{answered} of {size.calls} calls were answered")
            found.append(
                {
                    "seconds": seconds,
                    "calls_per_s": size.calls / seconds,
                    "share_of_ideal": size.calls / seconds / ideal,
                    "cpu_ms_a_call": 1000 * cpu / size.calls,
                }
            )
            print(json.dumps(found[-1]), flush=True)
        asker.close()
        seconds = asyncio.run(bare(port, size))
    return {
        "ideal_calls_per_s": ideal,
        "repetitions": found,
        "share_of_ideal": statistics.median(f["share_of_ideal"] for f in found),
        "bare": {"seconds": seconds, "share_of_ideal": size.calls / seconds / ideal},
    }


# --- (b) ------------------------------------------------------------------------------------------


def replay(folder: Path, size: Size) -> dict[str, Any]:
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1")
    path = folder / "replay.db"
    started = time.perf_counter()
    with Ledger(path) as ledger:
        for start in range(0, size.entries, 5000):
            names = range(start, min(start + 5000, size.entries))
            ledger.put([_entry(call) for call in _numbered(endpoint, names)])
    written = time.perf_counter() - started
    calls = _numbered(endpoint, range(size.entries))
    asker = EndpointAsker(path, progress=False)
    started = time.perf_counter()
    replies = asker.ask(calls, check=lambda _, data: None if data["met"] else "not met")
    seconds = time.perf_counter() - started
    asker.close()
    cached = sum(isinstance(r, Reply) and r.cached for r in replies.values())
    if cached != size.entries:
        raise RuntimeError(f"{cached} of {size.entries} replies came from the ledger")
    return {
        "entries": size.entries,
        "ledger_mb": path.stat().st_size / 1e6,
        "write_seconds": written,
        "replay_seconds": seconds,
        "entries_per_s": size.entries / seconds,
    }


def _numbered(endpoint: Endpoint, numbers: Sequence[int]) -> list[Call]:
    return [
        Call(f"judge/q{i}/a", endpoint, (Message("user", f"{QUESTION}{i}"),), SCHEMA)
        for i in numbers
    ]


def _entry(call: Call) -> Kept:
    return Kept(call.key, call.id, "m", ANSWER, "", "stop", Usage(150, 60, 0.0, 0.2, 1))


# --- the run --------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds")
    parser.add_argument("--only", choices=("rate", "replay"), help="one part; nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--serve", type=float, metavar="LATENCY", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, started = parse(argv), time.perf_counter()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return 0
    size = SMALL if options.small else Size()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "settings": asdict(size) | {"small": options.small},
        "targets": TARGETS,
        "load_at_start": load,
        "clients": {name: metadata.version(name) for name in ("openai", "jsonschema")},
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "replay":
            result["rate"] = rate(Path(folder), size)
        if options.only != "rate":
            result["replay"] = replay(Path(folder), size)
    if options.only:
        print(json.dumps(result[options.only], indent=1))
        return 0
    result["reached"] = {
        "rate": result["rate"]["share_of_ideal"] >= TARGETS["share of the ideal rate, at least"],
        "replay": result["replay"]["replay_seconds"] <= TARGETS["replay at most, s"],
    }
    # Nothing is drawn; the field is required.
    result["provenance"] = provenance(seed=0, recipe=asdict(size), started=started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"reached": result["reached"], "replay": result["replay"]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
