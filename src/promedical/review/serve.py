"""`promedical review serve`: the application on an address, until SIGTERM.

One process with threads; the database is brought up to date first. Cookies are for https alone when
people reach it by https, and a plain http address that other machines reach has to be asked for.
Logs go to stderr and hold routes, statuses, times and random ids. Left to others: the application
(`app`), the other verbs (`commands`).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from promedical.recipe import load_recipe, recipe_parser

__all__ = [
    "DATABASE",
    "ServeError",
    "ServeRecipe",
    "database_setting",
    "main",
    "make_room",
    "serve",
]

DATABASE = "PROMEDICAL_REVIEW_DATABASE"
LOCAL = ("127.0.0.1", "::1", "localhost")

DESCRIPTION = """\
Serve the review application. The first time:

  promedical review create-lead --login you@hospital.example --name "Your Name"
  promedical review serve

and open the address it prints. For colleagues on other machines, put a proxy with TLS before it and
say --public-url https://review.hospital.example, or give --certificate and --key. SIGTERM or Ctrl-C
finishes what was begun.
"""


class ServeError(ValueError):
    """The server cannot be started; the message says what to change."""


@dataclass(frozen=True)
class ServeRecipe:
    """How to serve.

    Args:
        database: path of an SQLite file, or postgresql+psycopg://USER:PASSWORD@HOST/NAME;
            $PROMEDICAL_REVIEW_DATABASE if not given, else promedical-review.sqlite3 here.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        public_url: address that people type, if it is not the one listened on.
        plain_http: let people on other machines come by http, without encryption.
        certificate: file with the TLS certificate chain, to serve https directly.
        key: file with its private key.
        idle_hours: hours without a click after which one has to log in again.
        session_hours: hours after a login until the next, in any case.
        invitation_days: days until an invitation ends.
        attempts_per_login: failed logins for one account within 15 minutes until it has to wait.
        attempts_per_address: failed logins from one address within 15 minutes until it has to wait.
        max_body_bytes: largest request.
    """

    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str | None = None
    plain_http: bool = False
    certificate: Path | None = None
    key: Path | None = None
    idle_hours: float = 8.0
    session_hours: float = 72.0
    invitation_days: float = 14.0
    attempts_per_login: int = 8
    attempts_per_address: int = 40
    max_body_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ServeError(f"port: found {self.port}, expected 0 to 65535")
        if (self.certificate is None) != (self.key is None):
            raise ServeError("certificate and key: expected both or neither")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ServeError(f"{path}: no such file")


def database_setting(given: str | None) -> str:
    """The database as given, else of the environment, else the file in this folder."""
    return given or os.environ.get(DATABASE) or "promedical-review.sqlite3"


def make_room(setting: str) -> None:
    """Say that a new SQLite file is made where there is none, but make no folder for it.

    Args:
        setting: path of an SQLite file, or an address.

    Raises:
        ServeError: its folder does not exist, so that the path is likely mistyped.
    """
    if "://" in setting and not setting.startswith("sqlite:///"):
        return
    path = Path(setting.removeprefix("sqlite:///")).expanduser()
    if path.exists():
        return
    if not path.parent.is_dir():
        raise ServeError(
            f"{setting}: there is no folder {path.parent}; make it, or name the database with "
            f"--database or ${DATABASE}"
        )
    print(f"promedical: {setting}: there is none yet, a new database is made", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """`promedical review serve [flags]`; returns the exit code."""
    parser = recipe_parser(
        ServeRecipe,
        prog="promedical review serve",
        usage="%(prog)s [--recipe FILE] [flags]",
        description=DESCRIPTION,
    )
    return serve(load_recipe(ServeRecipe, None, argv, parser=parser))


def serve(recipe: ServeRecipe, *, demo: bool = False, ready: str | None = None) -> int:
    """Serve until a signal.

    Args:
        recipe: the settings.
        demo: mark every page as a demo.
        ready: what to print once it answers; a line with the address if None.

    Raises:
        ServeError: an address that cannot be listened on, or that would be readable on the way; a
            database in a folder that does not exist.
        DatabaseError: the database cannot be used.
    """
    import uvicorn

    from promedical.review.app import ReviewSettings, create_app

    database = database_setting(recipe.database)
    make_room(database)
    bound = _bind(recipe.host, recipe.port)
    with bound:
        settings = ReviewSettings(
            database=database,
            public_url=public_url(recipe, bound.getsockname()[1]),
            idle_hours=recipe.idle_hours,
            session_hours=recipe.session_hours,
            invitation_days=recipe.invitation_days,
            attempts_per_login=recipe.attempts_per_login,
            attempts_per_address=recipe.attempts_per_address,
            max_body_bytes=recipe.max_body_bytes,
            demo=demo,
        )
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        app = create_app(settings)
        line = ready or f"promedical: review at {settings.public_url}, {app.state.database}"
        tls: dict[str, Any] = {}
        if recipe.certificate is not None and recipe.key is not None:
            tls = {"ssl_certfile": str(recipe.certificate), "ssl_keyfile": str(recipe.key)}
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=10,
            **tls,
        )

        class Server(uvicorn.Server):
            """uvicorn, which says so once it answers, and for which a signal is no failure."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                print(line, flush=True)

            def handle_exit(self, sig: int, frame: Any) -> None:
                self.force_exit = self.should_exit  # the second one does not wait
                self.should_exit = True

        Server(config).run(sockets=[bound])
    return 0


def public_url(recipe: ServeRecipe, port: int) -> str:
    """The address that people type.

    Raises:
        ServeError: other machines reach it, and nobody said how, or only without encryption.
    """
    scheme = "http" if recipe.certificate is None else "https"
    if recipe.public_url is None:
        if recipe.host not in LOCAL:
            raise ServeError(
                f"host: {recipe.host} is reached from other machines, expected --public-url with "
                "the address that people type, such as https://review.hospital.example"
            )
        host = f"[{recipe.host}]" if ":" in recipe.host else recipe.host
        return f"{scheme}://{host}:{port}"
    parts = urlsplit(recipe.public_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServeError(
            f"public_url: found {recipe.public_url!r}, expected such as https://review.example"
        )
    if parts.path.strip("/") or parts.query:
        raise ServeError(
            f"public_url: found {recipe.public_url!r}, expected no path: the application has to be "
            "at the root of its own host name"
        )
    if parts.scheme == "http" and parts.hostname not in LOCAL and not recipe.plain_http:
        raise ServeError(
            f"public_url: {recipe.public_url} is not encrypted, so that passwords and answers can "
            "be read on the way; expected https://…, or --plain-http on a network of your own"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServeError(f"{host}:{port}: cannot be listened on: {error.strerror}") from None
    return bound
