"""`promedical rm serve`: a checkpoint behind HTTP, until SIGTERM.

SIGTERM or Ctrl-C drains: what was accepted is finished and answered, what comes after gets 503, and
the process ends with code 0. A second signal ends it within seconds. Logs go to stderr and hold
routes, statuses and sizes, never a text. Left to others: everything between a request and its
answer (`serving_app` and what it names).
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from promedical.recipe import load_recipe, recipe_parser

if TYPE_CHECKING:
    from promedical.reward_model.grade import RubricRewardModel
    from promedical.reward_model.serving_app import Gate

__all__ = ["ServeError", "ServeRecipe", "build", "main", "serve"]

logger = logging.getLogger("promedical.serve")

TOKEN = "PROMEDICAL_TOKEN"
EXTRA = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
LOCAL = ("127.0.0.1", "::1", "localhost")

DESCRIPTION = """\
Serve a reward model over HTTP: POST /v1/grade, POST /classify (as vLLM's), GET /healthz, /metrics,
/openapi.json. With a token in $PROMEDICAL_TOKEN or --token-file, every request but /healthz must
bear it. SIGTERM finishes what was accepted. No conversation is logged.
"""


class ServeError(ValueError):
    """The server cannot be started; the message says what to change."""


@dataclass(frozen=True)
class ServeRecipe:
    """How to serve.

    Args:
        host: address to listen on; one that other machines reach needs a token.
        port: port to listen on; 0 takes a free one.
        name: what the model is called in answers; the checkpoint's folder if not given.
        token_file: file whose content is the bearer token; $PROMEDICAL_TOKEN if not given.
        allow_without_token: listen to other machines without a token, behind a proxy that asks.
        device: where the model runs, such as cuda; the processor if not given.
        dtype: of the weights; bfloat16 halves the memory and rounds the scores.
        threads: threads of the processor for the model; torch's own choice if not given.
        max_tokens: longest packed row; no single path may be longer.
        batch_tokens: unique tokens scored together; a larger request is a batch of its own.
        max_requests: requests accepted and not yet answered; more get 429.
        max_body_bytes: largest body.
        max_request_tokens: most unique tokens of one request.
        max_judgments: most responses times criteria (or inputs) of one request.
        drain_seconds: how long accepted requests may take after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    token_file: Path | None = None
    allow_without_token: bool = False
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    max_tokens: int = 8192
    batch_tokens: int = 16384
    max_requests: int = 256
    max_body_bytes: int = 4_000_000
    max_request_tokens: int = 65536
    max_judgments: int = 4096
    drain_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ServeError(f"port: found {self.port}, expected 0 to 65535")
        if self.threads is not None and self.threads < 1:
            raise ServeError(f"threads: found {self.threads}, expected at least 1")
        sizes = ("max_tokens", "batch_tokens", "max_requests", "max_body_bytes")
        for name in (*sizes, "max_request_tokens", "max_judgments", "drain_seconds"):
            if getattr(self, name) <= 0:
                raise ServeError(f"{name}: found {getattr(self, name)}, expected more than 0")


def main(argv: Sequence[str]) -> int:
    """`promedical rm serve CHECKPOINT [flags]`; returns the exit code."""
    parser = recipe_parser(
        ServeRecipe,
        prog="promedical rm serve",
        usage="%(prog)s CHECKPOINT [flags]",
        description=DESCRIPTION,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a Hub id")
    recipe = load_recipe(ServeRecipe, None, argv, parser=parser)
    return serve(parser.parse_args(list(argv)).checkpoint, recipe)


def serve(checkpoint: str, recipe: ServeRecipe) -> int:
    """Load a checkpoint and serve it until a signal.

    Returns:
        0, or 1 if something accepted could not be finished in time.

    Raises:
        ServeError: no token for a public address, an address that cannot be listened on, or
            packages that are missing.
        CheckpointError: this is no reward model.
    """
    _check_packages()
    token = read_token(recipe)
    if token is None and recipe.host not in LOCAL and not recipe.allow_without_token:
        raise ServeError(
            f"host: {recipe.host} is reached from other machines, expected a token in ${TOKEN} or "
            "--token-file (or --allow-without-token, behind a proxy that asks for one)"
        )
    bound = _bind(recipe.host, recipe.port)
    with bound:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
        )
        # uvicorn's own lines name addresses and paths; ours have what is needed.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        import torch

        from promedical.reward_model.grade import RubricRewardModel

        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        grader = RubricRewardModel.from_pretrained(
            checkpoint, device=recipe.device, dtype=recipe.dtype, max_tokens=recipe.max_tokens
        )
        name = recipe.name or Path(checkpoint).name or checkpoint
        gate = build(grader, recipe, name=name, token=token)
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        asks = "a token is asked for" if token else "no token is asked for"
        ready = f"promedical: serving {name} at {address}, {asks}"
        return _run(gate, bound, ready, recipe.drain_seconds)


def build(
    grader: RubricRewardModel, recipe: ServeRecipe, *, name: str, token: str | None = None
) -> Gate:
    """The application of a model, ready for any ASGI server."""
    _check_packages()
    from promedical.reward_model.serving_app import create_app
    from promedical.reward_model.serving_batch import Batcher, row_scorer
    from promedical.reward_model.serving_judge import Limits
    from promedical.reward_model.serving_metrics import ServingMetrics

    batcher = Batcher(
        row_scorer(grader.model),
        row_tokens=grader.max_tokens,
        batch_tokens=recipe.batch_tokens,
        max_requests=recipe.max_requests,
        metrics=ServingMetrics(),
    )
    limits = Limits(recipe.max_body_bytes, recipe.max_request_tokens, recipe.max_judgments)
    return create_app(grader, batcher, name=name, limits=limits, token=token)


def read_token(recipe: ServeRecipe) -> str | None:
    """The bearer token, from the file or the environment.

    Raises:
        ServeError: the file cannot be read, or the token is empty or no plain ASCII.
    """
    if recipe.token_file is not None:
        where = str(recipe.token_file)
        try:
            token = recipe.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{where}: cannot be read ({type(error).__name__})") from None
    elif TOKEN in os.environ:
        where, token = f"${TOKEN}", os.environ[TOKEN].strip()
    else:
        return None
    if not is_token(token):
        raise ServeError(f"{where}: expected one word of ASCII characters as the token")
    return token


def is_token(text: str) -> bool:
    """Whether a text can be a bearer token: one word of printable ASCII characters."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _check_packages() -> None:
    missing = [pip for module, pip in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ServeError(
            f"rm serve: {', '.join(missing)} not installed, run: pip install 'promedical[serve]'"
        )


def _bind(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded; uvicorn listens once it is."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServeError(f"{host}:{port}: cannot be listened on: {error.strerror}") from None
    return bound


def _run(gate: Gate, bound: socket.socket, ready: str, drain_seconds: float) -> int:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn, but the first signal drains while still answering 503."""

        unfinished = 0

        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().serve(sockets)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(ready, flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if gate.batcher.draining:
                super().handle_exit(sig, frame)
                return
            gate.batcher.drain()
            self.loop.call_soon_threadsafe(self._start_draining)

        def _start_draining(self) -> None:
            self.draining = asyncio.ensure_future(self._drain())

        async def _drain(self) -> None:
            logger.info("draining: %d accepted requests are finished", gate.batcher.accepted)
            until = self.loop.time() + drain_seconds
            while gate.batcher.accepted and self.loop.time() < until:
                await asyncio.sleep(0.02)
            self.unfinished = gate.batcher.accepted
            self.should_exit = True

    config = uvicorn.Config(
        gate,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    server.run(sockets=[bound])
    logger.info("stopped; %d accepted requests unanswered", server.unfinished)
    return 1 if server.unfinished else 0
