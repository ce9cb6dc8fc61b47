"""Pages for coming in and going out: login, invitation, one's own account, people.

The forms of somebody who is not logged in yet carry a token that has to equal a cookie's (SameSite
strict), so that no other site can log somebody in. Left to others: what an account is (`accounts`),
whose session a cookie is (`sessions`).
"""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from sqlalchemy import select
from starlette.responses import RedirectResponse, Response

from promedical.review import accounts, audit_log
from promedical.review.accounts import AccountError
from promedical.review.pace import paces
from promedical.review.pages import language_of, render
from promedical.review.security import (
    BadToken,
    NotFound,
    NotLoggedIn,
    Person,
    current_reviewer,
    database_of,
    require_role,
)
from promedical.review.sessions import end_session, open_session
from promedical.review.tables import LANGUAGES, ROLES, Reviewer, now
from promedical.review.wording import translator

__all__ = ["router"]

FORM_COOKIE = "promedical-review-form"
LANGUAGE_COOKIE = "promedical-language"

Lead = Annotated[Person, Depends(require_role("lead"))]
Anyone = Annotated[Person, Depends(current_reviewer)]
Field = Annotated[str, Form()]


def router() -> APIRouter:
    """Routes of this module."""
    routes = APIRouter()
    routes.get("/login")(login_page)
    routes.post("/login")(log_in)
    routes.post("/logout")(log_out)
    routes.get("/invitation/{token}")(invitation_page)
    routes.post("/invitation/{token}")(accept)
    routes.get("/account")(account_page)
    routes.post("/account")(save_account)
    routes.post("/account/password")(save_password)
    routes.get("/people")(people_page)
    routes.post("/people/invite")(invite)
    routes.post("/people/{reviewer_id}/{deed}")(change_person)
    return routes


# ---- coming in ----


def login_page(request: Request) -> Response:
    """The start page."""
    return _outside(request, "login.html", login="")


def log_in(request: Request, login: Field = "", password: Field = "", csrf: Field = "") -> Response:
    """Check a login; a new session takes the place of an old one."""
    _check_form_token(request, csrf)
    state = request.app.state
    address = request.client.host if request.client else "-"
    try:
        token = accounts.log_in(state.database, login, password, address, state.settings)
    except AccountError as error:
        return _outside(request, "login.html", error, status=400, login=login)
    old = request.cookies.get(state.cookie)
    if old:
        with state.database.write() as session:
            end_session(session, old)
    return _logged_in(request, token)


def log_out(request: Request, person: Anyone) -> Response:
    """End the session."""
    token = request.cookies.get(request.app.state.cookie, "")
    with database_of(request).write() as session:
        end_session(session, token)
        audit_log.record(session, person.id, "logout", f"account:{person.id}")
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(
        request.app.state.cookie, path="/", secure=request.app.state.settings.secure, httponly=True
    )
    return response


def invitation_page(request: Request, token: str) -> Response:
    """What an invitation's link shows; looking at it does not use it up."""
    try:
        with database_of(request).read() as session:
            invitation = accounts.open_invitation(session, token)
    except AccountError as error:
        return _outside(request, "invitation_gone.html", error, status=404)
    return _invitation(request, invitation)


def accept(
    request: Request,
    token: str,
    csrf: Field = "",
    login: Field = "",
    name: Field = "",
    password: Field = "",
    again: Field = "",
    specialty: Field = "",
    country: Field = "",
    licensed_since: Field = "",
) -> Response:
    """Make the account of an invitation, and log it in."""
    _check_form_token(request, csrf)
    database = database_of(request)
    given = {"login": login, "name": name, "specialty": specialty, "country": country}
    given["licensed_since"] = licensed_since
    try:
        with database.read() as session:
            invitation = accounts.open_invitation(session, token)
    except AccountError as error:
        return _outside(request, "invitation_gone.html", error, status=404)
    try:
        if password != again:
            raise AccountError("core.password_twice")
        year = _year(licensed_since)
        with database.write() as session:
            reviewer = accounts.accept_invitation(
                session,
                token,
                login=login,
                name=name,
                password=password,
                specialty=specialty,
                country=country,
                licensed_since=year,
                language=language_of(request),
            )
            cookie = open_session(session, reviewer.id, request.app.state.settings)
            audit_log.record(session, reviewer.id, "login.ok", f"account:{reviewer.id}")
    except AccountError as error:
        return _invitation(request, invitation, error, given)
    return _logged_in(request, cookie)


def _invitation(
    request: Request,
    invitation: Any,
    error: AccountError | None = None,
    given: dict[str, str] | None = None,
) -> Response:
    empty = {"login": "", "name": "", "specialty": "", "country": "", "licensed_since": ""}
    return _outside(
        request,
        "invitation.html",
        error,
        status=200 if error is None else 400,
        role=invitation.role,
        reset=invitation.reviewer_id is not None,
        given=given or empty,
        shortest=accounts.SHORTEST,
        year=now().year,
    )


def _logged_in(request: Request, token: str) -> Response:
    settings = request.app.state.settings
    response = RedirectResponse("/", status_code=303)
    response.set_cookie(
        request.app.state.cookie,
        token,
        max_age=int(settings.session_hours * 3600),
        path="/",
        secure=settings.secure,
        httponly=True,
        samesite="lax",
    )
    return response


def _outside(
    request: Request,
    template: str,
    error: AccountError | None = None,
    *,
    status: int = 200,
    **context: Any,
) -> Response:
    """A page for somebody who is not logged in, with its form token and language cookie."""
    settings = request.app.state.settings
    token = request.cookies.get(FORM_COOKIE) or secrets.token_urlsafe(24)
    language = language_of(request)
    text = None if error is None else translator(language)(error.key, **error.values)
    response = render(
        request, template, status=status, form_token=token, error_text=text, **context
    )
    attributes: dict[str, Any] = {"path": "/", "secure": settings.secure}
    response.set_cookie(FORM_COOKIE, token, httponly=True, samesite="strict", **attributes)
    if request.query_params.get("language") in LANGUAGES:
        response.set_cookie(
            LANGUAGE_COOKIE, language, max_age=365 * 86400, samesite="lax", **attributes
        )
    return response


def _check_form_token(request: Request, given: str) -> None:
    expected = request.cookies.get(FORM_COOKIE, "")
    if not expected or not hmac.compare_digest(given.encode(), expected.encode()):
        raise BadToken


def _year(given: str) -> int | None:
    text = given.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) == 4):
        raise AccountError("core.year_bad", year=now().year)
    return int(text)


# ---- one's own account ----


def account_page(request: Request, person: Anyone) -> Response:
    """One's own account."""
    return _account(request, person)


def save_account(
    request: Request,
    person: Anyone,
    specialty: Field = "",
    country: Field = "",
    licensed_since: Field = "",
    language: Field = "en",
) -> Response:
    """Change what one says about oneself, and the language."""
    try:
        year = _year(licensed_since)
        with database_of(request).write() as session:
            reviewer = session.get_one(Reviewer, person.id)
            accounts.set_profile(reviewer, specialty, country, year, language)
            session.flush()
            audit_log.record(session, person.id, "account.profile", f"account:{person.id}")
    except AccountError as error:
        return _account(request, person, error)
    return RedirectResponse("/account?saved=1", status_code=303)


def save_password(
    request: Request, person: Anyone, current: Field = "", password: Field = "", again: Field = ""
) -> Response:
    """Change one's own password; every other session of the account ends."""
    database = database_of(request)
    try:
        if password != again:
            raise AccountError("core.password_twice")
        with database.write() as session:
            accounts.change_password(session, person.id, current, password)
            token = open_session(session, person.id, request.app.state.settings)
    except AccountError as error:
        return _account(request, person, error)
    return _logged_in(request, token)


def _account(request: Request, person: Person, error: AccountError | None = None) -> Response:
    with database_of(request).read() as session:
        reviewer = session.get(Reviewer, person.id)
    if reviewer is None:
        raise NotLoggedIn
    t = translator(person.language)
    saved = error is None and "saved" in request.query_params
    return render(
        request,
        "account.html",
        person,
        status=200 if error is None else 400,
        account=reviewer,
        year=now().year,
        shortest=accounts.SHORTEST,
        error_text=None if error is None else t(error.key, **error.values),
        notice=t("core.profile_saved") if saved else None,
    )


# ---- people ----


def people_page(request: Request, person: Lead) -> Response:
    """Everybody, for the lead: who they are, how much they did, and how fast."""
    return _people(request, person)


def invite(request: Request, person: Lead, role: Field = "reviewer") -> Response:
    """Make an invitation and show its link, once."""
    settings = request.app.state.settings
    try:
        with database_of(request).write() as session:
            token = accounts.invite(session, role, settings, created_by=person.id)
    except AccountError as error:
        return _people(request, person, error)
    return _people(request, person, link=_link(request, token), link_role=role)


def change_person(
    request: Request, reviewer_id: str, deed: str, person: Lead, role: Field = ""
) -> Response:
    """Let somebody in or out, give another role, or make a link for a new password."""
    link = None
    try:
        with database_of(request).write() as session:
            if deed in ("activate", "deactivate"):
                accounts.set_active(session, reviewer_id, deed == "activate", actor=person.id)
            elif deed == "role":
                accounts.set_role(session, reviewer_id, role, actor=person.id)
            elif deed == "reset":
                reviewer = session.get(Reviewer, reviewer_id)
                if reviewer is None:
                    raise NotFound
                token = accounts.invite(
                    session,
                    reviewer.role,
                    request.app.state.settings,
                    created_by=person.id,
                    reviewer_id=reviewer_id,
                )
                link = _link(request, token)
            else:
                raise NotFound
    except AccountError as error:
        return _people(request, person, error)
    if link is not None:
        return _people(request, person, link=link, link_role="")
    return RedirectResponse("/people", status_code=303)


def _link(request: Request, token: str) -> str:
    return f"{request.app.state.settings.public_url.rstrip('/')}/invitation/{token}"


def _people(
    request: Request,
    person: Person,
    error: AccountError | None = None,
    *,
    link: str | None = None,
    link_role: str = "",
) -> Response:
    with database_of(request).read() as session:
        everybody = session.scalars(
            select(Reviewer).order_by(Reviewer.active.desc(), Reviewer.name)
        ).all()
        speed = paces(session)
    return render(
        request,
        "people.html",
        person,
        status=200 if error is None else 400,
        people=everybody,
        paces=speed,
        roles=ROLES,
        link=link,
        link_role=link_role,
        days=request.app.state.settings.invitation_days,
        year=now().year,
        error_text=None
        if error is None
        else translator(person.language)(error.key, **error.values),
    )
