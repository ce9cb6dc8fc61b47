"""The review application under load: is it quick enough, and is anything lost, even by SIGKILL.

    python benchmarks/review.py             # the full run, about 8 minutes on 2 cores
    python benchmarks/review.py --small --out result.json       # a try, half a minute

100 reviewers, each with rubrics of K-QA to correct: a save every two seconds, which changes a
sentence; the sixth finishes the item, the start page is read, and the next item begins. Reviewers
start spread over two seconds, and a save's latency counts from when it was due, so that waiting is
seen. Server, clients and PostgreSQL share two cores; the clients are a process of their own.
(a) Load, 60 s on SQLite and on PostgreSQL (fsync on): errors, lost saves, 95th percentile.
(b) The same with the server killed by SIGKILL and started again, several times. A client that gets
    no answer sends the same save again, as the browser does. At every restart each save that had
    been acknowledged is looked for in the database, and at the end all of them: version, digest,
    the last answer word for word, and the audit log's chain. A kill of the process is no loss of
    power; for that, SQLite writes with synchronous=FULL and PostgreSQL with fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # how tests start PostgreSQL

TARGETS = {"errors": 0, "lost": 0, "p95 at most, ms": 250}
RETRY = 0.25


@dataclass(frozen=True)
class Size:
    """How large the run is.

    Args:
        reviewers: at once.
        interval: seconds between a reviewer's saves.
        seconds: of a load.
        saves_an_item: the last of which finishes it.
        kills: of the server in part (b), evenly spread.
        killed_seconds: of part (b).
        cores: that server, clients and PostgreSQL share.
    """

    reviewers: int = 100
    interval: float = 2.0
    seconds: float = 60.0
    saves_an_item: int = 6
    kills: int = 4
    killed_seconds: float = 60.0
    cores: int = 2


SMALL = Size(reviewers=12, interval=0.5, seconds=3.0, kills=1, killed_seconds=4.0)


# ---- reviewers and their items ----


def prepare(database: str, size: Size, seed: int) -> dict[str, Any]:
    """Accounts with sessions and a round of rubrics; what the clients need to know of them."""
    from promedical.demo.kqa import load_kqa
    from promedical.review import rounds
    from promedical.review.database import Database
    from promedical.review.migrate import upgrade
    from promedical.review.tables import Assignment
    from review_server import add_reviewer

    kqa = load_kqa()
    sources = [*kqa.train, *kqa.calibration, *kqa.bench]
    longest = max(size.seconds, size.killed_seconds)
    each = int(longest / size.interval / size.saves_an_item) + 2
    rows = [
        replace(sources[n % len(sources)], id=f"item-{n}") for n in range(size.reviewers * each)
    ]
    opened = Database(database)
    upgrade(opened)
    people = [add_reviewer(opened, f"reviewer{n}") for n in range(size.reviewers)]
    with opened.write() as session:
        settings = rounds.RoundSettings("Load", size=len(rows), seed=seed)
        made = rounds.make_round(session, rows, settings)
        rounds.assign(session, made.id, [person.id for person in people])
    with opened.read() as session:
        work: dict[str, list[Any]] = {person.id: [] for person in people}
        for assignment in session.query(Assignment).order_by(Assignment.id):
            work[assignment.reviewer_id].append([assignment.id, assignment.answer])
    opened.close()
    return {
        "reviewers": [{"token": p.token, "csrf": p.csrf, "work": work[p.id]} for p in people],
        "interval": size.interval,
        "saves_an_item": size.saves_an_item,
        "seed": seed,
    }


def digest(answer: Any) -> str:
    """SHA-256 of a JSON document."""
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()


# ---- the clients, a process of their own ----


class Clients:
    """All reviewers of a plan.

    Args:
        plan: of `prepare`, with "url", "cookie", "seconds" and "retry".
        journal: file to which every acknowledgement is written at once, a line each.
    """

    def __init__(self, plan: dict[str, Any], journal: Path) -> None:
        self.plan = plan
        self.journal = journal.open("w")
        self.latencies: list[float] = []
        self.pages: list[float] = []
        self.errors: list[str] = []
        self.retries = 0

    async def run(self) -> None:
        """Everybody, until the time is over and their last save is acknowledged."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self.plan["url"], limits=limits, timeout=20, trust_env=False
        ) as http:
            begin = time.perf_counter() + 0.5
            people = self.plan["reviewers"]
            step = self.plan["interval"] / len(people)
            await asyncio.gather(
                *(self._person(http, n, p, begin + n * step) for n, p in enumerate(people))
            )
        self.journal.close()

    async def _person(
        self, http: httpx.AsyncClient, number: int, person: dict[str, Any], begin: float
    ) -> None:
        rng = random.Random(f"{self.plan['seed']}:{number}")
        headers = {
            "X-CSRF-Token": person["csrf"],
            "Cookie": f"{self.plan['cookie']}={person['token']}",
        }
        due, end = begin, begin + self.plan["seconds"]
        for assignment, answer in person["work"]:
            version = 0
            for nth in range(self.plan["saves_an_item"]):
                if due >= end:
                    return
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                finish = nth == self.plan["saves_an_item"] - 1
                criterion = rng.choice(answer["criteria"])
                criterion["text"] = f"{criterion['text'].rstrip('.')} ({nth})."
                if finish:
                    answer["decision"] = "accept_with_edits"
                body = {
                    "base": version,
                    "save": secrets.token_urlsafe(16),
                    "answer": answer,
                    "seconds": self.plan["interval"],
                    "finish": finish,
                }
                saved = await self._save(http, assignment, body, headers)
                self.latencies.append(time.perf_counter() - due)
                if saved is None:
                    return
                version = saved
                entry = [assignment, body["save"], version, digest(answer)]
                self.journal.write(json.dumps(entry) + "\n")
                self.journal.flush()
                due += self.plan["interval"]
            await self._read_page(http, headers)

    async def _save(
        self, http: httpx.AsyncClient, assignment: str, body: Any, headers: dict[str, str]
    ) -> int | None:
        """The version that was acknowledged; None after an error, which is noted."""
        content = json.dumps(body).encode()
        headers = headers | {"Content-Type": "application/json"}
        while True:
            try:
                reply = await http.put(
                    f"/api/assignments/{assignment}", content=content, headers=headers
                )
            except httpx.TransportError as error:
                fault = type(error).__name__
            else:
                if reply.status_code == 200:
                    return int(reply.json()["version"])
                fault = f"HTTP {reply.status_code}"
                if reply.status_code < 500:
                    self.errors.append(fault)
                    return None
            if not self.plan["retry"]:
                self.errors.append(fault)
                return None
            self.retries += 1
            await asyncio.sleep(RETRY)

    async def _read_page(self, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
        started = time.perf_counter()
        try:
            reply = await http.get("/", headers=headers)
        except httpx.TransportError as error:
            if not self.plan["retry"]:
                self.errors.append(f"page: {type(error).__name__}")
            return
        if reply.status_code != 200:
            self.errors.append(f"page: HTTP {reply.status_code}")
        self.pages.append(time.perf_counter() - started)


def run_clients(folder: Path) -> int:
    """The clients' process: `plan.json` in, `acknowledged.jsonl` and `clients.json` out."""
    clients = Clients(json.loads((folder / "plan.json").read_text()), folder / "acknowledged.jsonl")
    asyncio.run(clients.run())
    found = {
        "latencies": clients.latencies,
        "pages": clients.pages,
        "errors": clients.errors,
        "retries": clients.retries,
    }
    (folder / "clients.json").write_text(json.dumps(found))
    return 0


# ---- the server, killed and started ----


class Server:
    """The application in a process of its own.

    Args:
        database: of the application.
        port: on 127.0.0.1.
    """

    def __init__(self, database: str, port: int) -> None:
        self.database = database
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; returns the seconds until it answers."""
        started = time.perf_counter()
        flags = ("--database", self.database, "--port", str(self.port))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "promedical", "review", "serve", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/login", trust_env=False).status_code == 200:
                    return time.perf_counter() - started
            if self.process.poll() is not None or time.perf_counter() - started > 300:
                raise RuntimeError("the server did not start")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """As an administrator stops it."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def database_of(kind: str, folder: Path) -> Iterator[str]:
    """An empty database of a kind."""
    if kind == "sqlite":
        yield str(folder / "review.sqlite3")
        return
    from review_server import start_postgresql

    with start_postgresql() as cluster:
        yield cluster.create()


# ---- measuring ----


def acknowledged(folder: Path) -> list[tuple[str, str, int, str]]:
    """What clients have been told is saved, so far."""
    path = folder / "acknowledged.jsonl"
    text = path.read_text() if path.exists() else ""
    return [tuple(json.loads(line)) for line in text.split("\n")[:-1]]  # type: ignore[misc]


def lost(database: str, entries: Sequence[tuple[str, str, int, str]], *, at_rest: bool) -> int:
    """Acknowledged saves that are not in the database as they were acknowledged.

    Args:
        database: read directly.
        entries: of `acknowledged`.
        at_rest: nobody saves any more, so that there may be no save that nobody was told of, and
            answers and audit log are compared as well.
    """
    from promedical.review import audit_log
    from promedical.review.database import Database
    from promedical.review.tables import Assignment, Change

    opened = Database(database)
    try:
        with opened.read() as session:
            kept = {
                c.id: (c.assignment_id, c.version)
                for c in session.query(Change.id, Change.assignment_id, Change.version)
            }
            missing = sum(kept.get(save) != (a, version) for a, save, version, _ in entries)
            if not at_rest:
                return missing
            last: dict[str, tuple[int, str]] = {}
            for a, _, version, answer in entries:
                last[a] = max(last.get(a, (0, "")), (version, answer))
            for assignment in session.query(Assignment).where(Assignment.version > 0):
                expected = (assignment.version, digest(assignment.answer))
                missing += last.get(assignment.id) != expected
            missing += abs(len(kept) - len(entries))
            audit_log.verify(session)
            return missing
    finally:
        opened.close()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    named = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {f"{name}_ms": round(1000 * value, 1) for name, value in named.items()}


def measure(kind: str, size: Size, seed: int, kills: int) -> dict[str, Any]:
    """One load on one kind of database."""
    seconds = size.killed_seconds if kills else size.seconds
    with tempfile.TemporaryDirectory() as name, database_of(kind, Path(name)) as database:
        folder = Path(name)
        plan = prepare(database, size, seed)
        with running(Server(database, free_port())) as server:
            more = {"url": server.url, "cookie": "promedical-review", "seconds": seconds}
            (folder / "plan.json").write_text(json.dumps(plan | more | {"retry": kills > 0}))
            clients = subprocess.Popen(
                [sys.executable, __file__, "--clients", name], stdin=subprocess.DEVNULL
            )
            try:
                restarts = kill_repeatedly(server, folder, seconds, kills)
                if clients.wait(4 * seconds + 120):
                    raise RuntimeError("the clients failed")
            finally:
                clients.kill()
        found = json.loads((folder / "clients.json").read_text())
        told = acknowledged(folder)
        result = {
            "saves": len(told),
            "saves_per_s": round(len(told) / seconds, 1),
            "errors": len(found["errors"]),
            "faults": sorted(set(found["errors"]))[:5],
            "lost": lost(database, told, at_rest=True) + sum(r["lost"] for r in restarts),
        }
        if kills:
            return result | {"sent_again": found["retries"], "restarts": restarts}
        return result | {
            "latency": percentiles(found["latencies"]),
            "start_page": {"read": len(found["pages"])} | percentiles(found["pages"]),
        }


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that answers, and is gone afterwards in any case."""
    try:
        server.start()
        yield server
        server.stop()
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


def kill_repeatedly(
    server: Server, folder: Path, seconds: float, kills: int
) -> list[dict[str, float]]:
    """Kill and start the server while clients save; what was lost each time."""
    restarts: list[dict[str, float]] = []
    while kills and not acknowledged(folder):  # clients need a moment to start
        time.sleep(0.05)
    begun = time.perf_counter()
    for nth in range(kills):
        # Off the beat of the saves, and never in the last moments.
        due = seconds * (nth + 0.7) / (kills + 0.4)
        time.sleep(max(0.0, begun + due - time.perf_counter()))
        server.kill()
        told = acknowledged(folder)
        back = server.start()
        missing = lost(server.database, told, at_rest=False)
        restarts.append({"acknowledged": len(told), "lost": missing, "back_s": round(back, 2)})
    return restarts


def free_port() -> int:
    """A port that nobody listens on."""
    from review_server import free_port as port

    return int(port())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a try, with other figures")
    parser.add_argument("--only", choices=("sqlite", "postgresql"), help="one kind of database")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/review.json")
    parser.add_argument("--clients", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target was missed."""
    options, started = parse(argv), time.perf_counter()
    if options.clients is not None:
        return run_clients(options.clients)
    from promedical.provenance import provenance

    size = SMALL if options.small else Size()
    cores = sorted(os.sched_getaffinity(0))[: size.cores]
    os.sched_setaffinity(0, cores)  # children too
    kinds = (options.only,) if options.only else ("sqlite", "postgresql")
    settings = asdict(size) | {"small": options.small, "cores_used": len(cores)}
    result: dict[str, Any] = {"settings": settings, "targets": TARGETS, "load": {}, "killed": {}}
    for kind in kinds:
        for part, kills in (("load", 0), ("killed", size.kills)):
            found = measure(kind, size, options.seed, kills)
            result[part][kind] = found
            print(json.dumps({f"{part}, {kind}": found}), flush=True)
    every = [*result["load"].values(), *result["killed"].values()]
    result["reached"] = {
        "errors": sum(found["errors"] for found in every),
        "lost": sum(found["lost"] for found in every),
        "p95 at most, ms": max(f["latency"]["p95_ms"] for f in result["load"].values()),
    }
    packages = ("fastapi", "uvicorn", "sqlalchemy", "psycopg", "httpx")
    result["server_versions"] = {name: metadata.version(name) for name in packages}
    result["provenance"] = provenance(seed=options.seed, recipe=settings, started=started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({"targets": TARGETS, "reached": result["reached"]}, indent=1))
    return int(any(result["reached"][name] > limit for name, limit in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
