"""Who is asking, and may they: what every page and endpoint depends on.

    person: Annotated[Person, Depends(current_reviewer)]
    person: Annotated[Person, Depends(require_role("lead"))]

`current_reviewer` also checks the CSRF token of whatever changes something: the header X-CSRF-Token
for JSON, a field `csrf` in a form (`<input type="hidden" name="csrf" value="{{ csrf }}">`; HTMX
sends the header by itself, see `templates/base.html`). Handlers are plain `def` functions, which
FastAPI runs in threads; they take a form's fields by `Annotated[str, Form()]`.

Left to others: making sessions (`sessions`), headers (`headers`), pages for errors (`app`).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from promedical.review.database import Database

__all__ = [
    "BadToken",
    "Forbidden",
    "NotFound",
    "NotLoggedIn",
    "Person",
    "current_reviewer",
    "database_of",
    "require_role",
]

COOKIE = "promedical-review"
SAFE = ("GET", "HEAD", "OPTIONS")
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class NotLoggedIn(Exception):
    """Nobody is logged in; a page leads to the login, an endpoint answers 401."""


class Forbidden(Exception):
    """Somebody is logged in whose role does not allow this."""


class NotFound(Exception):
    """There is no such thing, or it is not this person's; the two look the same."""


class BadToken(Exception):
    """A request that changes something came without this session's CSRF token."""


@dataclass(frozen=True)
class Person:
    """Who is logged in.

    Args:
        id: random, as in exports.
        login: what they type.
        name: what colleagues see.
        role: reviewer, adjudicator or lead.
        language: en or zh.
        csrf: this session's token.
        specialty: or None.
    """

    id: str
    login: str
    name: str
    role: str
    language: str
    csrf: str
    specialty: str | None = None

    @property
    def is_lead(self) -> bool:
        """Whether they see everything and make rounds."""
        return self.role == "lead"


def database_of(request: Request) -> Database:
    """The application's database."""
    database: Database = request.app.state.database
    return database


async def current_reviewer(request: Request) -> Person:
    """Who is logged in.

    Raises:
        NotLoggedIn: nobody, or no longer.
        BadToken: something is to be changed and the CSRF token is missing or another's.
    """
    person = getattr(request.state, "person", None)
    if person is None:
        from promedical.review.sessions import person_of

        token = request.cookies.get(request.app.state.cookie)
        if not token:
            raise NotLoggedIn
        settings = request.app.state.settings
        person = await run_in_threadpool(person_of, database_of(request), token, settings)
        if person is None:
            raise NotLoggedIn
        request.state.person = person
        request.scope["promedical_reviewer"] = person.id
    if request.method not in SAFE:
        await _check_token(request, person.csrf)
    return person


async def _check_token(request: Request, expected: str) -> None:
    given = request.headers.get("x-csrf-token", "")
    if not given and request.headers.get("content-type", "").split(";")[0] in FORMS:
        found = (await request.form()).get("csrf", "")
        given = found if isinstance(found, str) else ""
    if not hmac.compare_digest(given.encode(), expected.encode()):
        raise BadToken


def require_role(*roles: str) -> Callable[[Request], Coroutine[Any, Any, Person]]:
    """A dependency that lets only these roles in; a lead may do what everybody may.

    Args:
        roles: of reviewer, adjudicator, lead.

    Raises (when used):
        Forbidden: another role.
    """

    async def wanted(request: Request) -> Person:
        person = await current_reviewer(request)
        if person.role not in roles and not person.is_lead:
            raise Forbidden
        return person

    return wanted
