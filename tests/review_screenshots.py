"""Pictures of every page of the review application, at desktop and phone width.

    python tests/review_screenshots.py FOLDER        (from the checkout, with Chromium installed)

Fills a demo and writes FOLDER/WIDTH-ACCOUNT-PAGE.png for every page that each account may see, and
for an offline pack of each kind, whole and with nothing pinned. Where something is pinned, -opened
is the screen as the page opens and -scrolled the screen half a page further. zh-… are the main
pages in Chinese (Debian: fonts-noto-cjk). With --readme also the two pictures of the README.
`review_pages` knows the pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from review_pages import packs, pages_of
from review_server import CHROMIUM, serve_in_thread

ROOT = Path(__file__).parent.parent
WIDTHS = (1280, 390)
README = {"reviewer-rubric": "review-rubric.png", "reviewer-criteria": "review-adjudication.png"}
CHINESE = (
    "nobody-login",
    "reviewer-home",
    "reviewer-rubric",
    "reviewer-preference",
    "reviewer-criteria",
    "adjudicator-blind",
    "lead-rubric-round",
    "lead-adjudication-round",
)
# Puts what is pinned to the screen where it is in the text, and says whether there was any.
UNPIN = """() => {
  const pinned = [...document.querySelectorAll("body *")].filter((one) =>
    ["fixed", "sticky"].includes(getComputedStyle(one).position));
  for (const one of pinned) one.style.position = "static";
  return pinned.length > 0;
}"""


def _few_colours(path: Path) -> None:
    """A third of the size, and nothing to see of it: pages have few colours."""
    from PIL import Image

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _take(page: Any, path: Path) -> None:
    """The whole page, and the screen where something is pinned to it."""
    page.wait_for_timeout(300)
    opened = page.screenshot()
    page.mouse.wheel(0, 450)
    page.wait_for_timeout(150)
    scrolled = page.screenshot()
    if page.evaluate(UNPIN):
        path.with_name(f"{path.stem}-opened.png").write_bytes(opened)
        path.with_name(f"{path.stem}-scrolled.png").write_bytes(scrolled)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true", help="also the two of the README")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        _language(browser, given.folder, "en", readme=given.readme)
        _language(browser, given.folder, "zh", only=CHINESE, locale="zh-CN")
        browser.close()
    return 0


def _language(
    browser: Any, folder: Path, language: str, *, readme: bool = False, **options: Any
) -> None:
    from promedical.review.demo import DATABASE, prepare

    prefix = "" if language == "en" else f"{language}-"
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), language=language)[0].close()
        with serve_in_thread(str(Path(name) / DATABASE), demo=True) as server:
            for width in WIDTHS:
                for shot, page in pages_of(browser, server, width, **options):
                    if readme and width == WIDTHS[0] and shot in README:
                        page.wait_for_timeout(300)
                        page.screenshot(path=ROOT / "docs" / README[shot])
                        _few_colours(ROOT / "docs" / README[shot])
                    _take(page, folder / f"{prefix}{width}-{shot}.png")
                for shot, page in packs(browser, server.database, Path(name), width):
                    _take(page, folder / f"{prefix}{width}-{shot}.png")


if __name__ == "__main__":
    sys.exit(main())
