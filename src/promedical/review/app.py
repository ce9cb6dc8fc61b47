"""The application: settings in, FastAPI out.

`create_app` opens the database, brings its tables up to date and includes the routers: accounts,
home, rounds, adjudication, and the one endpoint that saves answers. Left to others: starting a
server (`commands`), everything behind a route.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from promedical.review import saves, security
from promedical.review.database import Database
from promedical.review.headers import Guard
from promedical.review.migrate import upgrade
from promedical.review.pages import STATIC, render
from promedical.review.security import Person, current_reviewer, database_of

__all__ = ["ReviewError", "ReviewSettings", "create_app"]

ROUTERS = ("pages_accounts", "pages_home", "pages_rounds", "pages_adjudication", "pages_exchange")


class ReviewError(ValueError):
    """Settings that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class ReviewSettings:
    """How the application runs.

    Args:
        database: path of an SQLite file, or postgresql+psycopg://USER:PASSWORD@HOST/NAME.
        public_url: address that people type, such as https://review.hospital.example; with https
            the cookies are sent over https only.
        idle_hours: hours without a click after which one has to log in again.
        session_hours: hours after a login until the next, in any case.
        invitation_days: days until an invitation ends.
        attempts_per_login: failed logins for one account within 15 minutes until it has to wait.
        attempts_per_address: failed logins from one address within 15 minutes until it has to wait.
        max_body_bytes: largest request.
        demo: show that this is a demo.
    """

    database: str = "promedical-review.sqlite3"
    public_url: str = "http://127.0.0.1:8080"
    idle_hours: float = 8.0
    session_hours: float = 72.0
    invitation_days: float = 14.0
    attempts_per_login: int = 8
    attempts_per_address: int = 40
    max_body_bytes: int = 4_000_000
    demo: bool = False

    def __post_init__(self) -> None:
        if not self.public_url.startswith(("http://", "https://")):
            raise ReviewError(
                f"public_url: found {self.public_url!r}, expected https://… or http://…"
            )
        for name in (
            "idle_hours",
            "session_hours",
            "invitation_days",
            "attempts_per_login",
            "attempts_per_address",
            "max_body_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ReviewError(f"{name}: found {getattr(self, name)}, expected more than 0")

    @property
    def secure(self) -> bool:
        """Whether cookies are for https only."""
        return self.public_url.startswith("https://")


def create_app(settings: ReviewSettings) -> FastAPI:
    """The application over a database that is up to date.

    Raises:
        DatabaseError: the database cannot be opened, or is newer than this program.
    """
    database = Database(settings.database)
    upgrade(database)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        database.close()

    app = FastAPI(
        title="ProMedical review",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.database = database
    # The prefix makes browsers insist on Secure, on this host alone, on every path.
    app.state.cookie = f"__Host-{security.COOKIE}" if settings.secure else security.COOKIE
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.include_router(_saving())
    for name in ROUTERS:
        module = f"promedical.review.{name}"
        if importlib.util.find_spec(module) is not None:
            app.include_router(importlib.import_module(module).router())
    fault = _errors(app)
    app.add_middleware(Guard, settings=settings, fault=fault)
    return app


def _saving() -> APIRouter:
    router = APIRouter()

    @router.put("/api/assignments/{assignment_id}")
    def put_answer(
        request: Request,
        assignment_id: str,
        person: Annotated[Person, Depends(current_reviewer)],
        given: Annotated[dict[str, Any], Body()],
    ) -> Response:
        finish = given.get("finish", False)
        try:
            with database_of(request).write() as session:
                saved = saves.save(
                    session,
                    assignment_id,
                    person.id,
                    base=given.get("base"),  # type: ignore[arg-type]  # saves checks it
                    save_id=given.get("save"),  # type: ignore[arg-type]
                    answer=given.get("answer"),  # type: ignore[arg-type]
                    seconds=given.get("seconds", 0.0),
                    state="done" if finish is True else None,
                )
        except saves.NotYours:
            return JSONResponse({"error": "not_found"}, status_code=404)
        except saves.Closed as error:
            return JSONResponse({"error": "closed", "detail": str(error)}, status_code=423)
        except saves.Conflict as error:
            return JSONResponse(
                {
                    "error": "conflict",
                    "version": error.version,
                    "answer": error.answer,
                    "state": error.state,
                },
                status_code=409,
            )
        except saves.InvalidAnswer as error:
            return JSONResponse({"error": "invalid", "problems": error.problems}, status_code=422)
        return JSONResponse({"version": saved.version, "state": saved.state})

    return router


def _errors(app: FastAPI) -> Callable[[Request], Response]:
    """Errors as pages, or as JSON under /api/, never with a traceback; returns that of a fault."""

    def answer(request: Request, status: int, key: str) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": key}, status_code=status)
        person = getattr(request.state, "person", None)
        return render(request, "error.html", person, status=status, key=key, code=status)

    @app.exception_handler(security.NotLoggedIn)
    def not_logged_in(request: Request, error: Exception) -> Response:
        if request.url.path.startswith("/api/") or request.headers.get("hx-request"):
            return JSONResponse(
                {"error": "not_logged_in"}, status_code=401, headers={"HX-Redirect": "/login"}
            )
        return RedirectResponse("/login", status_code=303)

    @app.exception_handler(security.Forbidden)
    def forbidden(request: Request, error: Exception) -> Response:
        return answer(request, 403, "forbidden")

    @app.exception_handler(security.BadToken)
    def bad_token(request: Request, error: Exception) -> Response:
        return answer(request, 403, "bad_token")

    @app.exception_handler(security.NotFound)
    @app.exception_handler(404)
    def not_found(request: Request, error: Exception) -> Response:
        return answer(request, 404, "not_found")

    @app.exception_handler(405)
    def wrong_method(request: Request, error: Exception) -> Response:
        return answer(request, 405, "not_found")

    # FastAPI's own handler would send back what was given, and with it somebody's text.
    from fastapi.exceptions import RequestValidationError

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: Exception) -> Response:
        return answer(request, 422, "invalid")

    return lambda request: answer(request, 500, "fault")
