"""Every page of the review application and of an offline pack, for tests that look at all of them.

The database is one that `promedical.review.demo.fill` filled, with K-QA or with other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

__all__ = ["addresses", "packs", "pages_of"]


def addresses(database: Any, ids: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Account → (name, address) of every page it may see."""
    from promedical.review.tables import Assignment, Item, Round

    with database.read() as session:
        rounds = {r.kind: r.id for r in session.query(Round)}

        def first(login: str, part: str, state: str) -> Any:
            found = (
                session.query(Assignment)
                .join(Item)
                .filter(
                    Assignment.reviewer_id == ids[login],
                    Assignment.part == part,
                    Assignment.state == state,
                )
                .order_by(Item.position)
                .first()
            )
            return (found.id, found.item_id)

        rubric, _ = first("reviewer", "rubric", "open")
        rubric_done, rubric_item = first("colleague", "rubric", "done")
        judged, _ = first("reviewer", "first", "open")
        done, item = first("reviewer", "first", "done")
        third, _ = first("adjudicator", "third", "open")
    common = [("home", "/"), ("account", "/account"), ("storage", "/storage")]
    return {
        "nobody": [("login", "/login"), ("not-found", "/nothing")],
        "reviewer": [
            *common,
            ("rubric", f"/rubrics/{rubric}"),
            ("preference", f"/adjudications/{judged}"),
            ("criteria", f"/adjudications/{judged}"),
            ("adjudication-done", f"/adjudications/{done}"),
        ],
        "colleague": [("rubric-done", f"/rubrics/{rubric_done}")],
        "adjudicator": [("home", "/"), ("blind", f"/adjudications/{third}")],
        "lead": [
            ("home", "/"),
            ("people", "/people"),
            ("rubric-round-new", "/rounds/new"),
            ("rubric-round", f"/rounds/{rounds['rubrics']}"),
            ("rubric-history", f"/rounds/{rounds['rubrics']}/items/{rubric_item}"),
            ("adjudication-round-new", "/adjudication-rounds/new"),
            ("adjudication-round", f"/adjudication-rounds/{rounds['adjudication']}"),
            ("votes", f"/adjudication-rounds/{rounds['adjudication']}/items/{item}"),
        ],
    }


def give_preference(page: Any) -> None:
    """Give the overall preference of the item that is open, so that its criteria are shown."""
    if page.locator(".pair").count() == 0:
        return
    for pair in page.locator(".pair").all():
        pair.locator("label").nth(1).click()
    page.locator("[data-go-on]").click()
    page.locator(".criterion").first.wait_for()


def pages_of(
    browser: Any, server: Any, width: int, *, only: Collection[str] | None = None, **options: Any
) -> Iterator[tuple[str, Any]]:
    """("ACCOUNT-PAGE", page) of every page, as who may see it; for a database of `demo.fill`."""
    from promedical.review.app import ReviewSettings
    from promedical.review.sessions import open_session
    from promedical.review.tables import Reviewer

    with server.database.write() as session:
        people = {r.login: r.id for r in session.query(Reviewer)}
        tokens = {n: open_session(session, id, ReviewSettings()) for n, id in people.items()}
    for login, listed in addresses(server.database, people).items():
        context = browser.new_context(
            base_url=server.url, viewport={"width": width, "height": 900}, **options
        )
        if login in tokens:
            cookie = {"name": server.app.state.cookie, "value": tokens[login], "url": server.url}
            context.add_cookies([cookie])
        page = context.new_page()
        for name, address in listed:
            if only is not None and f"{login}-{name}" not in only:
                continue
            page.goto(address)
            if name == "criteria":
                give_preference(page)
            yield f"{login}-{name}", page
        context.close()


def packs(browser: Any, database: Any, folder: Path, width: int) -> Iterator[Any]:
    """(name, page) of an offline pack of each kind."""
    from promedical.review.offline_pack import make_packs
    from promedical.review.tables import Round

    with database.read() as session:
        rounds = {r.kind: r.id for r in session.query(Round)}
    for kind, round_id in rounds.items():
        for pack in make_packs(database, round_id, folder)[0][:1]:
            context = browser.new_context(viewport={"width": width, "height": 900})
            page = context.new_page()
            page.goto(pack.path.as_uri())
            page.locator("#offline-item > *").first.wait_for()
            yield f"offline-{kind}", page
            context.close()
