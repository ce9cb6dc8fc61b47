"""Pictures of every page of the review application, at desktop and phone width.

    python tests/review_screenshots.py FOLDER        (from the checkout, with Chromium installed)

Fills a demo and writes FOLDER/WIDTH-ACCOUNT-PAGE.png for every page that each account may see, and
for an offline pack of each kind; with --readme also the two pictures of the README. `review_pages`
knows the pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from review_pages import packs, pages_of
from review_server import CHROMIUM, serve_in_thread

ROOT = Path(__file__).parent.parent
WIDTHS = (1280, 390)
README = {"reviewer-rubric": "review-rubric.png", "reviewer-criteria": "review-adjudication.png"}


def _few_colours(path: Path) -> None:
    """A third of the size, and nothing to see of it: pages have few colours."""
    from PIL import Image

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true", help="also the two of the README")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    from promedical.review.demo import DATABASE, prepare

    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        prepare(Path(name))[0].close()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with serve_in_thread(str(Path(name) / DATABASE), demo=True) as server:
            for width in WIDTHS:
                for shot, page in pages_of(browser, server, width):
                    page.wait_for_timeout(300)
                    page.screenshot(path=given.folder / f"{width}-{shot}.png", full_page=True)
                    if given.readme and width == WIDTHS[0] and shot in README:
                        page.evaluate("scrollTo(0, 0)")
                        page.screenshot(path=ROOT / "docs" / README[shot])
                        _few_colours(ROOT / "docs" / README[shot])
                for shot, page in packs(browser, server.database, Path(name), width):
                    page.wait_for_timeout(300)
                    page.screenshot(path=given.folder / f"{width}-{shot}.png", full_page=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
