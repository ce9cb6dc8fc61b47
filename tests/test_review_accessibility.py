"""axe-core finds no serious or critical fault in any page, light or dark, wide or narrow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import promedical.review
from promedical.review.demo import fill
from review_pages import packs, pages_of
from review_rows import row, rows
from review_server import *  # noqa: F403
from review_server import serve_in_thread

SERIOUS = ("serious", "critical")
FOLDER = Path(promedical.review.__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("axe") / "review.sqlite3"
    with serve_in_thread(str(path), demo=True) as running:
        fill(running.database, sample=(rows(4), [row(n) for n in range(6)]))
        yield running


@pytest.fixture(scope="module")
def axe() -> Any:
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


def faults(axe: Any, page: Any) -> list[str]:
    """Rule, element and what is wrong, of every serious fault."""
    # Preloading fetches style sheets and media again, half of the time, for two rules alone: on
    # `orientation` in CSS and on audio that plays by itself. Pages have neither, see below.
    options = {"resultTypes": ["violations"], "preload": False}
    found = axe.run(page, options=options).response["violations"]
    return [
        f"{fault['id']}: {node['target']}: {node.get('failureSummary', '')[:200]}"
        for fault in found
        if fault["impact"] in SERIOUS
        for node in fault["nodes"][:3]
    ]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_no_page_has_a_serious_fault(
    server: Any, chromium: Any, axe: Any, width: int, scheme: str
) -> None:
    found = {}
    for name, page in pages_of(chromium, server, width, color_scheme=scheme):
        if problems := faults(axe, page):
            found[name] = problems
    assert found == {}


def test_no_offline_pack_has_a_serious_fault(
    server: Any, chromium: Any, axe: Any, tmp_path: Path
) -> None:
    found = {
        name: faults(axe, page) for name, page in packs(chromium, server.database, tmp_path, 390)
    }
    assert found == {"offline-rubrics": [], "offline-adjudication": []}


def test_no_page_has_what_is_not_looked_for() -> None:
    parts = [p for p in FOLDER.rglob("*") if p.suffix in {".css", ".html", ".js"}]
    assert len(parts) > 20
    for part in parts:
        assert not re.search(r"orientation\s*:|<audio|<video", part.read_text()), part
