"""Around every request: what a browser may load, how large it may be, where it may come from, and
one line in the log.

The policy allows scripts, styles, pictures and connections of this server alone, nothing inline, no
frames. What changes something has to come from our own pages (Sec-Fetch-Site, else Origin), beside
the CSRF token. The log has method, route without its query, status, milliseconds and the reviewer's
id; never a text, a name or an address. A fault of ours is logged as its kind and where it happened:
the message of an error may hold what somebody wrote.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from promedical.review.app import ReviewSettings

__all__ = ["POLICY", "Guard"]

logger = logging.getLogger("promedical.review")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "x-robots-tag": "noindex, nofollow",
}
SAFE = ("GET", "HEAD", "OPTIONS")


class TooLarge(Exception):
    """A body larger than allowed."""


class Guard:
    """The middleware; see the module."""

    def __init__(
        self, app: ASGIApp, settings: ReviewSettings, fault: Callable[[Request], Response]
    ) -> None:
        self.app = app
        self.fault = fault
        self.limit = settings.max_body_bytes
        self.own = urlsplit(settings.public_url).netloc
        self.headers = dict(HEADERS)
        if settings.secure:
            self.headers["strict-transport-security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500
        taken = 0
        begun = False
        given = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise TooLarge
            return message

        async def answer(message: Message) -> None:
            # Whoever read the body may have made an answer of their own of TooLarge.
            if taken <= self.limit or begun:
                await with_headers(message)

        async def with_headers(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun = True
                status = message["status"]
                message = {**message, "headers": self._headers(scope, message["headers"])}
            await send(message)

        try:
            length = given.get("content-length", "0")
            if not length.isdigit() or int(length) > self.limit:
                await _refuse(with_headers, 413)
            elif scope["method"] not in SAFE and not self._ours(given):
                await _refuse(with_headers, 403)
            else:
                await self.app(scope, limited, answer)
                if not begun:
                    raise TooLarge
        except TooLarge:
            if not begun:
                await _refuse(with_headers, 413)
        except Exception as error:
            _log_fault(error)
            if not begun:
                await self.fault(Request(scope))(scope, receive, with_headers)
        finally:
            _log(scope, status, time.perf_counter() - started)

    def _headers(self, scope: Scope, given: list[tuple[bytes, bytes]]) -> list[Any]:
        names = {name.lower() for name, _ in given}
        added = dict(self.headers)
        static = scope["path"].startswith("/static/")
        added["cache-control"] = "public, max-age=604800" if static else "no-store"
        return [
            *given,
            *((k.encode(), v.encode()) for k, v in added.items() if k.encode() not in names),
        ]

    def _ours(self, given: dict[str, str]) -> bool:
        site = given.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        origin = given.get("origin")
        if origin is None:
            return True  # no browser; the CSRF token is checked all the same
        return urlsplit(origin).netloc in (given.get("host"), self.own)


async def _refuse(send: Send, status: int) -> None:
    body = b"Request refused."
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log_fault(error: BaseException) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    logger.error("fault %s at %s", type(error).__name__, where)


def _log(scope: Scope, status: int, seconds: float) -> None:
    path = scope["path"]
    if path.startswith("/static/") and status < 400:
        return
    if path.startswith("/invitation/"):
        path = "/invitation/…"  # the rest of it is the key to an account
    route = "".join(c if c.isprintable() else "?" for c in path)[:200]
    person = scope.get("promedical_reviewer", "-")
    logger.info("%s %s %d %.0fms %s", scope["method"], route, status, seconds * 1000, person)
