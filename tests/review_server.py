"""What tests of the review application share: databases, accounts, a server, a browser.

    from review_server import *    # noqa: F403   fixtures: database, sqlite, running, chromium

`database` (or only its `database_url`) runs a test on SQLite and on PostgreSQL (Debian's
binaries, one cluster a session);
`running` is a server on a free port in a thread; `chromium` a headless browser. `add_reviewer`
makes an account and a session without going through the login.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "Account",
    "Cluster",
    "Running",
    "add_reviewer",
    "chromium",
    "client_of",
    "copied_sqlite",
    "database",
    "database_url",
    "free_port",
    "migrate_database",
    "page_of",
    "postgresql_cluster",
    "running",
    "serve_in_thread",
    "sqlite",
    "sqlite_url",
    "start_chromium",
    "start_postgresql",
]

CHROMIUM = "/usr/bin/chromium"
BINARIES = Path("/usr/lib/postgresql")
INITDB = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A PostgreSQL server of our own.

    Args:
        port: on 127.0.0.1.
        process: the server.
        template: a database whose tables are made, which others are copied from.
    """

    port: int
    process: subprocess.Popen[bytes]
    template: str | None = None

    def create(self, *, empty: bool = False) -> str:
        """A new database, with its tables unless it is to be empty; returns its address."""
        import psycopg

        name = f"review_{secrets.token_hex(6)}"
        template = "template1" if empty else self._with_tables()
        admin = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def _with_tables(self) -> str:
        if self.template is None:
            url = self.create(empty=True)
            migrate_database(url)
            self.template = url.rsplit("/", 1)[-1]
        return self.template


def _binaries() -> Path | None:
    found = sorted(BINARIES.glob("*/bin/postgres")) if BINARIES.is_dir() else []
    if found:
        return found[-1].parent
    program = shutil.which("postgres")
    return None if program is None else Path(program).parent


@contextmanager
def start_postgresql(*options: str) -> Iterator[Cluster]:
    """Start PostgreSQL in a temporary folder; as the user postgres if we are root.

    Args:
        options: for the server, such as "-c", "fsync=off".

    Raises:
        LookupError: there are no binaries, or no user to run them as.
    """
    binaries = _binaries()
    if binaries is None:
        raise LookupError("PostgreSQL's server binaries are not installed")
    run_as: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="promedical-pg-"))
    try:
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                raise LookupError("we are root, and there is no user postgres") from None
            os.chown(folder, user.pw_uid, user.pw_gid)
            run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = folder / "data"
        subprocess.run(
            [binaries / "initdb", "-D", data, *INITDB],
            check=True,
            capture_output=True,
            cwd=folder,
            **run_as,
        )
        port = free_port()
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        process = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-p", str(port), *settings, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **run_as,
        )
        try:
            _wait_for_postgresql(port, process)
            yield Cluster(port, process)
        finally:
            process.send_signal(3)  # SIGQUIT: at once; nothing here is kept
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_postgresql(port: int, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres").close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.05)


# A test module that imports a session's fixture has one of its own; the cluster is shared by all.
CLUSTER = pytest.StashKey[Cluster]()


@pytest.fixture(scope="session")
def postgresql_cluster(request: pytest.FixtureRequest) -> Cluster:
    """One cluster for the whole run; a test makes its own database in it."""
    if _binaries() is None:
        pytest.skip("PostgreSQL's server binaries are not installed (Debian: postgresql)")
    config = request.config
    if CLUSTER not in config.stash:
        stack = ExitStack()
        try:
            config.stash[CLUSTER] = stack.enter_context(start_postgresql("-c", "fsync=off"))
        except LookupError as error:
            pytest.skip(str(error))
        config.add_cleanup(stack.close)
    return config.stash[CLUSTER]


def migrate_database(url: str) -> None:
    """Make the tables, as `serve` does at its start."""
    from promedical.review.database import Database
    from promedical.review.migrate import upgrade

    database = Database(url)
    upgrade(database)
    database.close()


@cache
def _sqlite_template() -> bytes:
    with tempfile.TemporaryDirectory(prefix="promedical-review-") as folder:
        path = Path(folder) / "review.sqlite3"
        migrate_database(str(path))
        return path.read_bytes()


def copied_sqlite(folder: Path) -> str:
    """A database whose tables are made, without the time that making them takes."""
    path = folder / "review.sqlite3"
    path.write_bytes(_sqlite_template())
    return str(path)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind, its tables made."""
    if request.param == "sqlite":
        return copied_sqlite(tmp_path)
    cluster: Cluster = request.getfixturevalue("postgresql_cluster")
    return cluster.create()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A new SQLite database, its tables made."""
    return copied_sqlite(tmp_path)


@pytest.fixture
def database(database_url: str) -> Iterator[Any]:
    """An open one of each kind."""
    from promedical.review.database import Database

    made = Database(database_url)
    yield made
    made.close()


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Any]:
    """An open one on SQLite, for what no kind of database changes."""
    from promedical.review.database import Database

    made = Database(sqlite_url)
    yield made
    made.close()


@dataclass(frozen=True)
class Account:
    """Somebody with a session.

    Args:
        id: of the reviewer.
        login: what they type.
        token: the session cookie's value.
        csrf: the session's token.
    """

    id: str
    login: str
    token: str
    csrf: str


def add_reviewer(
    database: Any,
    login: str,
    role: str = "reviewer",
    *,
    name: str | None = None,
    specialty: str | None = None,
    language: str = "en",
    settings: Any = None,
) -> Account:
    """An account with an open session, without the time a password's hash takes; it has none."""
    from promedical.review.app import ReviewSettings
    from promedical.review.sessions import hashed, open_session
    from promedical.review.tables import LoginSession, Reviewer

    with database.write() as session:
        reviewer = Reviewer(
            login=login,
            name=name or login.title(),
            password_hash="-",
            role=role,
            specialty=specialty,
            language=language,
        )
        session.add(reviewer)
        session.flush()
        token = open_session(session, reviewer.id, settings or ReviewSettings())
        csrf = session.get_one(LoginSession, hashed(token)).csrf
        return Account(reviewer.id, login, token, csrf)


@dataclass
class Running:
    """A server that answers.

    Args:
        url: of it.
        app: the application, whose database is `app.state.database`.
    """

    url: str
    app: Any

    @property
    def database(self) -> Any:
        """The application's database."""
        return self.app.state.database


@contextmanager
def serve_in_thread(database: str, *, port: int = 0, **settings: Any) -> Iterator[Running]:
    """The application on a port of 127.0.0.1 until the block ends."""
    import uvicorn

    from promedical.review.app import ReviewSettings, create_app

    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    app = create_app(ReviewSettings(database=database, public_url=url, **settings))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server ended at its start"
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(url, app)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def running(sqlite_url: str) -> Iterator[Running]:
    """A server over a new SQLite database."""
    with serve_in_thread(sqlite_url) as server:
        yield server


def client_of(server: Running, account: Account | None = None) -> Any:
    """An `httpx.Client` that is logged in as somebody and sends their CSRF token."""
    import httpx

    if account is None:
        return httpx.Client(base_url=server.url, trust_env=False)
    return httpx.Client(
        base_url=server.url,
        cookies={server.app.state.cookie: account.token},
        headers={"X-CSRF-Token": account.csrf},
        trust_env=False,
    )


@contextmanager
def start_chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser for a module; while it is open, its thread can run no asyncio.run."""
    pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed (Debian: chromium)")
    with start_chromium() as browser:
        yield browser


@pytest.fixture
def page_of(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`page_of(server, account, width=1280)`: a page of a new browser context, logged in."""
    contexts = []

    def open_page(server: Running, account: Account | None = None, **options: Any) -> Any:
        width = options.pop("width", 1280)
        context = chromium.new_context(
            base_url=server.url, viewport={"width": width, "height": 900}, **options
        )
        contexts.append(context)
        if account is not None:
            cookie = {"name": server.app.state.cookie, "value": account.token, "url": server.url}
            context.add_cookies([cookie])
        return context.new_page()

    yield open_page
    for context in contexts:
        context.close()
