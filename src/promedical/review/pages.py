"""From a template to a page. Everything that comes from outside is escaped, in every template.

    return render(request, "rubric_item.html", person, item=…, criteria=…)

A template extends base.html (blocks: title, main, scripts), and has `t` (wording), `reviewer` (a
`Person` or None), `csrf`, `language`, `static("app.css")`. No inline script or style: the policy
forbids them. `environment()` is the same without a request, for pages that are files.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from starlette.responses import HTMLResponse

from promedical.review.security import Person
from promedical.review.wording import LANGUAGES, translator

__all__ = ["STATIC", "environment", "language_of", "page_context", "render", "static"]

HERE = Path(__file__).parent
STATIC = HERE / "static"


@cache
def environment() -> jinja2.Environment:
    """Templates of the application: autoescape on, and an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def static(name: str) -> str:
    """The address of a file in static/; it changes with the file, so that it may be kept long."""
    return f"/static/{name}?v={hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def page_context(language: str, person: Person | None = None) -> dict[str, Any]:
    """What every template has."""
    return {
        "t": translator(language),
        "language": language,
        "reviewer": person,
        "csrf": "" if person is None else person.csrf,
        "static": static,
        "notice": None,
        "demo": False,
        "here": "",
    }


def language_of(request: Request, person: Person | None = None) -> str:
    """The account's language, else the address's, a cookie's, the browser's, English."""
    if person is not None:
        return person.language
    asked = request.query_params.get("language", "")
    chosen = asked if asked in LANGUAGES else request.cookies.get("promedical-language", "")
    if chosen in LANGUAGES:
        return chosen
    accepted = request.headers.get("accept-language", "")
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def render(
    request: Request,
    template: str,
    person: Person | None = None,
    *,
    status: int = 200,
    **context: Any,
) -> HTMLResponse:
    """A page, in the reader's language.

    Args:
        request: whose.
        template: a file in templates/.
        person: who is logged in, or None.
        status: of the response.
        context: names for the template.
    """
    values = page_context(language_of(request, person), person)
    values |= {"demo": request.app.state.settings.demo, "here": request.url.path}
    text = environment().get_template(template).render(values | context)
    return HTMLResponse(text, status_code=status)
