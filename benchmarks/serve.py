"""The server under load: is anything lost, wrong or leaked; and what trees of criteria save.

    python benchmarks/serve.py             # the full run, about 6 minutes on 2 cores
    python benchmarks/serve.py --small --out result.json       # a try, a few seconds

(a) Soak: 64 clients for 60 s against `promedical rm serve` with a tiny model of random weights.
    Of the requests 80 % are /v1/grade and 10 % /classify, each answer compared with the offline
    score (`RubricRewardModel.grade`, 1e-4); 5 % are bad and have to get 422, and with 5 % the
    client goes away early. A request is lost if no answer comes. Resident memory of the server is
    read once a second; its growth is end minus after the warm-up.
(b) Throughput: SmolLM2-135M (random head), 8 clients, a fixed list of 64 responses (8 to each of 8
    conversations), |x| + |y| = 150, |c| = 20, K = 8.
    rubric     a response with its 8 criteria is one request
    one        one request for each response and criterion, a client's one after the other, to the
               same server with --batch-tokens 1, so that every request is a batch of its own
    together   (with --together) the 8 responses of a conversation, 8 criteria each, are one request
    Latency is that of a response (of 8 in `together`): until the last of its criteria is known.
    Their scores are compared. Target: rubric takes at most a quarter of the time of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

import promedical
from promedical.demo.models import resolve_model
from promedical.provenance import provenance
from promedical.records import Message
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel, initialise
from promedical.reward_model.render import Renderer, ensure_pad
from promedical.reward_model.serve import ServeRecipe, build
from promedical.rubric import Criterion, Rubric, Tier

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serve.json"
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "smollm2"
TOLERANCE = 1e-4
TARGETS = {
    "lost": 0,
    "wrong": 0,
    "memory growth at most, MB": 20.0,
    "rubric over one at a time, at most": 0.25,
}
# Of every 20 requests; the others are to /v1/grade and are answered.
KINDS = {3: "classify", 8: "bad", 13: "classify", 18: "leaving"}
COMMON = (
    "the patient should ask a doctor about this dose and take it with water after food if pain "
    "or fever lasts more than two days then stop and call for help because risk is high"
)
WORDS = tuple(COMMON.split())


@dataclass(frozen=True)
class Size:
    """How much is done: lengths are in tokens, template included."""

    clients: int = 64
    seconds: float = 60.0
    warm_up: float = 10.0
    pool: int = 200
    conversations: int = 8
    responses: int = 8
    criteria: int = 8
    x: int = 60
    y: int = 90
    c: int = 20
    throughput_clients: int = 8


# The tiny tokenizer needs more tokens for a sentence.
SMALL = Size(8, 1.5, 0.5, 40, 2, 4, 4, 240, 100, 80, 4)


# --- texts and models -----------------------------------------------------------------------------


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def exact(length: Callable[[str], int], target: int, rng: random.Random) -> str:
    """A text of random words at which `length` is exactly so many tokens."""
    for _ in range(200):
        words = [rng.choice(WORDS).capitalize()]
        while length(" ".join(words)) < target:
            words.append(rng.choice(WORDS))
        if length(" ".join(words)) == target:
            return " ".join(words)
    raise RuntimeError(f"no text of {target} tokens was found")


def rubric_of(texts: Sequence[str]) -> Rubric:
    return Rubric(
        tuple(Criterion(f"c{i}", Tier.PROFICIENCY, t, 1 / len(texts)) for i, t in enumerate(texts))
    )


def body_of(question: str, responses: Sequence[str], rubric: Rubric) -> dict[str, Any]:
    criteria = [asdict(c) | {"tier": c.tier.value} for c in rubric.criteria]
    return {
        "messages": [{"role": "user", "content": question}],
        "responses": list(responses),
        "rubric": {"criteria": criteria},
    }


def tiny_checkpoint(folder: Path, seed: int) -> Path:
    """A model of random weights, small enough that the server and not the model is measured."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config).float().eval()
    ensure_pad(tokenizer, model)
    return saved(model, tokenizer, folder)


def embedded_checkpoint(folder: Path, seed: int) -> Path:
    return saved(*initialise(resolve_model("embedded"), head_init="random", seed=seed), folder)


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RubricRewardModel(TreeRewardModel(model), tokenizer).save_metadata(folder)
    return folder


# --- the server -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    url: str
    pid: int


@contextmanager
def process(checkpoint: Path, log: Path, *flags: str) -> Iterator[Served]:
    """`promedical rm serve` as a process of its own; it has to end well on SIGTERM."""
    code = "import sys; from promedical.cli import main; sys.exit(main(sys.argv[1:]))"
    source = str(Path(promedical.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, "rm", "serve", str(checkpoint), "--port", "0", *flags]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        ) as server,
    ):
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            if found is None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            yield Served(found[0], server.pid)
            server.send_signal(signal.SIGTERM)
            if server.wait(30) != 0:
                raise RuntimeError(f"the server ended with {server.returncode}")
        finally:
            server.kill()


@contextmanager
def thread(checkpoint: Path, log: Path, *flags: str) -> Iterator[Served]:
    """The same application in a thread of this process: quicker to start, for a try."""
    settings = dict(
        zip([f.strip("-").replace("-", "_") for f in flags[::2]], flags[1::2], strict=True)
    )
    recipe = ServeRecipe(**{name: int(value) for name, value in settings.items()})
    gate = build(RubricRewardModel.from_pretrained(checkpoint), recipe, name=checkpoint.name)
    server = uvicorn.Server(uvicorn.Config(gate, port=0, log_config=None, access_log=False))
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", os.getpid())
    finally:
        server.should_exit = True
        running.join(30)


Serve = Callable[..., Any]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def client(url: str, clients: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)
    )


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50_s": 0.5, "p99_s": 0.99}
    found = {k: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for k, q in at.items()}
    return found | {"mean_s": statistics.fmean(ordered)}


# --- (a) soak -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request with its kind and the offline scores of every (response, criterion)."""

    kind: str
    path: str
    body: dict[str, Any]
    scores: tuple[float, ...] = ()


def cases(grader: RubricRewardModel, count: int, rng: random.Random) -> list[Case]:
    """Requests of many sizes, with what the server has to answer."""
    made = []
    for i in range(count):
        question = sentence(rng, rng.randint(3, 20))
        responses = [sentence(rng, rng.randint(1, 30)) for _ in range(rng.randint(1, 4))]
        rubric = rubric_of([sentence(rng, rng.randint(3, 8)) for _ in range(rng.randint(1, 8))])
        body = body_of(question, responses, rubric)
        messages = [Message("user", question)]
        scores = tuple(s for g in grader.grade(messages, responses, rubric) for s in g.raw.values())
        kind = KINDS.get(i % 20, "grade")
        if kind == "classify":
            ids = [
                [*tree.prompt, *tree.responses[0], *tree.leaves[0].tokens]
                for response in responses
                for c in rubric.criteria
                for tree in [grader.renderer.tree(messages, [response], [(0, c.text)])]
            ]
            made.append(Case(kind, "/classify", {"input": ids, "use_activation": False}, scores))
        elif kind == "bad":
            body["rubric"]["criteria"][0]["weight"] = -float(i + 1)
            made.append(Case(kind, "/v1/grade", body))
        else:
            made.append(Case(kind, "/v1/grade", body, scores))
    return made


def scores_in(path: str, answer: dict[str, Any]) -> list[float]:
    if path == "/classify":
        return [d["probs"][0] for d in answer["data"]]
    return [s for g in answer["grades"] for s in g["raw"].values()]


class Tally:
    """What became of the requests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.largest = 0.0
        self.faults: list[str] = []

    def fault(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.faults = [*self.faults, what][:5]

    def take(self, case: Case, answer: httpx.Response, seconds: float) -> None:
        self.counts[case.kind] += 1
        self.seconds.append(seconds)
        wanted = 422 if case.kind == "bad" else 200
        if answer.status_code != wanted:
            self.fault("wrong", f"{case.kind}: status {answer.status_code}")
        elif wanted == 200:
            found = scores_in(case.path, answer.json())
            same = len(found) == len(case.scores)
            difference = max(
                (abs(a - b) for a, b in zip(found, case.scores, strict=same)), default=0.0
            )
            self.largest = max(self.largest, difference)
            self.counts["compared scores"] += len(found)
            if not same or not difference <= TOLERANCE:
                self.fault("wrong", f"{case.kind}: differs by {difference}")


async def one_client(
    http: httpx.AsyncClient, cases: Sequence[Case], tally: Tally, rng: Any, end: float
) -> None:
    while time.perf_counter() < end:
        case = rng.choice(cases)
        started = time.perf_counter()
        asked = asyncio.ensure_future(http.post(case.path, json=case.body))
        if case.kind == "leaving":
            await asyncio.wait([asked], timeout=rng.uniform(0, 0.05))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            tally.counts["leaving"] += 1
            continue
        try:
            answer = await asked
        except httpx.HTTPError as error:
            tally.fault("lost", f"{case.kind}: {type(error).__name__}")
            continue
        if answer.status_code == 429:
            tally.counts["told to wait"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            continue
        tally.take(case, answer, time.perf_counter() - started)


async def under_load(
    served: Served, cases: Sequence[Case], size: Size, seed: int
) -> dict[str, Any]:
    tally, memory = Tally(), []
    started = time.perf_counter()
    async with client(served.url, size.clients) as http:

        async def watch() -> None:
            while True:
                memory.append((time.perf_counter() - started, resident_mb(served.pid)))
                await asyncio.sleep(min(1.0, size.seconds / 10))

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(
            *(
                one_client(http, cases, tally, random.Random(f"{seed} {i}"), started + size.seconds)
                for i in range(size.clients)
            )
        )
        watching.cancel()
        took = time.perf_counter() - started
        metrics = (await http.get("/metrics")).text
    warm = [mb for at, mb in memory if at >= size.warm_up]
    answered = len(tally.seconds)
    return {
        "seconds": took,
        "requests": dict(tally.counts),
        "lost": tally.counts["lost"],
        "wrong": tally.counts["wrong"],
        "faults": tally.faults,
        "largest_difference": tally.largest,
        "answered_per_s": answered / took,
        "latency": quantiles(tally.seconds),
        "requests_a_batch": number(metrics, "promedical_batch_requests_sum")
        / number(metrics, "promedical_batch_requests_count"),
        "accepted_at_the_end": number(metrics, "promedical_accepted_requests"),
        "memory_mb": {
            "after_warm_up": warm[0],
            "end": warm[-1],
            "growth": warm[-1] - warm[0],
            "samples": [round(mb, 1) for _, mb in memory],
        },
    }


def number(metrics: str, name: str) -> float:
    found = re.search(rf"(?m)^{name} (\S+)$", metrics)
    assert found is not None, name
    return float(found[1])


def soak(folder: Path, serve: Serve, size: Size, seed: int) -> dict[str, Any]:
    checkpoint = tiny_checkpoint(folder / "tiny", seed)
    grader = RubricRewardModel.from_pretrained(checkpoint)
    prepared = cases(grader, size.pool, random.Random(seed))
    with serve(checkpoint, folder / "soak.log", "--threads", "1") as served:
        return asyncio.run(under_load(served, prepared, size, seed))


# --- (b) throughput -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A fixed list of responses to conversations, and the criteria asked about each."""

    questions: tuple[str, ...]
    responses: tuple[tuple[str, ...], ...]
    criteria: tuple[str, ...]


def work(renderer: Renderer, size: Size, rng: random.Random) -> Work:
    """Texts whose segments have exactly the lengths asked for."""

    def tree(question: str, response: str, criterion: str) -> Any:
        return renderer.tree([Message("user", question)], [response], [(0, criterion)])

    questions = tuple(
        exact(lambda t: len(tree(t, "?", "?").prompt), size.x, rng)
        for _ in range(size.conversations)
    )
    responses = tuple(
        tuple(
            exact(lambda t, q=q: len(tree(q, t, "?").responses[0]), size.y, rng)
            for _ in range(size.responses)
        )
        for q in questions
    )
    criteria = tuple(
        exact(lambda t: len(tree("?", "?", t).leaves[0].tokens), size.c, rng)
        for _ in range(size.criteria)
    )
    return Work(questions, responses, criteria)


async def timed(
    served: Served,
    clients: int,
    jobs: Sequence[Callable[[httpx.AsyncClient], Awaitable[list[float]]]],
) -> dict[str, Any]:
    """Work a list of jobs off with so many clients; every job gives its scores."""
    waiting = list(enumerate(jobs))[::-1]
    scores: dict[int, list[float]] = {}
    seconds: list[float] = []
    async with client(served.url, clients) as http:
        await jobs[0](http)  # warm-up
        before = number((await http.get("/metrics")).text, "promedical_batch_tokens_sum")

        async def worker() -> None:
            while waiting:
                index, job = waiting.pop()
                begun = time.perf_counter()
                scores[index] = await job(http)
                seconds.append(time.perf_counter() - begun)

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(clients)))
        took = time.perf_counter() - started
        after = number((await http.get("/metrics")).text, "promedical_batch_tokens_sum")
    flat = [s for index in sorted(scores) for s in scores[index]]
    return {
        "seconds": took,
        "latency": quantiles(seconds),
        "tokens_read": int(after - before),
        "scores": flat,
    }


def job_of(
    bodies: Sequence[dict[str, Any]],
) -> Callable[[httpx.AsyncClient], Awaitable[list[float]]]:
    """Requests one after the other; their scores in order."""

    async def job(http: httpx.AsyncClient) -> list[float]:
        found: list[float] = []
        for body in bodies:
            answer = await http.post("/v1/grade", json=body)
            answer.raise_for_status()
            found += scores_in("/v1/grade", answer.json())
        return found

    return job


def throughput(folder: Path, serve: Serve, size: Size, options: Any) -> dict[str, Any]:
    make = tiny_checkpoint if options.small else embedded_checkpoint
    checkpoint = make(folder / "model", options.seed)
    renderer = Renderer(AutoTokenizer.from_pretrained(checkpoint))
    todo = work(renderer, size, random.Random(options.seed))
    every = rubric_of(todo.criteria)
    pairs = [(q, y) for q, ys in zip(todo.questions, todo.responses, strict=True) for y in ys]
    jobs = {
        "rubric": [job_of([body_of(q, [y], every)]) for q, y in pairs],
        "together": [
            job_of([body_of(q, ys, every)])
            for q, ys in zip(todo.questions, todo.responses, strict=True)
        ],
        "one": [job_of([body_of(q, [y], rubric_of([c])) for c in todo.criteria]) for q, y in pairs],
    }
    found: dict[str, Any] = {}
    threads = ("--threads", str(options.threads))
    whole = ("rubric", "together") if options.together else ("rubric",)
    for flags, names in (((), whole), (("--batch-tokens", "1"), ("one",))):
        with serve(checkpoint, folder / "throughput.log", *threads, *flags) as served:
            for name in names:
                found[name] = asyncio.run(timed(served, size.throughput_clients, jobs[name]))
                print(f"{name}: {found[name]['seconds']:.1f} s", flush=True)
    scores = {name: run.pop("scores") for name, run in found.items()}
    n, k = len(pairs), len(todo.criteria)
    found["responses"], found["judgments"] = n, n * k
    found["largest_difference"] = max(
        abs(a - b) for name in scores for a, b in zip(scores[name], scores["one"], strict=True)
    )
    for name in whole:
        found[name]["share_of_one"] = found[name]["seconds"] / found["one"]["seconds"]
    return found


# --- the run --------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds, tiny models, one process")
    parser.add_argument("--together", action="store_true", help="also 8 responses a request")
    parser.add_argument("--only", choices=("soak", "throughput"), help="one part; nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the model in (b)")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, started = parse(argv), time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    size, serve = (SMALL, thread) if options.small else (Size(), process)
    settings = asdict(size) | {
        "small": options.small,
        "threads": options.threads,
        "dtype": "float32",
        "model": {"soak": "tiny, random weights", "throughput": "SmolLM2-135M, random head"},
    }
    result: dict[str, Any] = {"settings": settings, "targets": TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "throughput":
            result["soak"] = soak(Path(folder), serve, size, options.seed)
            print(json.dumps({k: v for k, v in result["soak"].items() if k != "memory_mb"}))
        if options.only != "soak":
            result["throughput"] = throughput(Path(folder), serve, size, options)
    if options.only:
        print(json.dumps(result[options.only], indent=1))
        return 0
    result["reached"] = {
        "lost": result["soak"]["lost"],
        "wrong": result["soak"]["wrong"],
        "memory growth at most, MB": result["soak"]["memory_mb"]["growth"],
        "rubric over one at a time, at most": result["throughput"]["rubric"]["share_of_one"],
    }
    packages = ("fastapi", "uvicorn", "httpx", "prometheus-client")
    result["server_versions"] = {name: metadata.version(name) for name in packages}
    result["provenance"] = provenance(seed=options.seed, recipe=settings, started=started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({"targets": TARGETS, "reached": result["reached"]}, indent=1))
    right = result["soak"]["lost"] == result["soak"]["wrong"] == 0
    return 0 if right and result["throughput"]["largest_difference"] <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
