"""Whatever a model or an import writes is shown as text: in every page, and in the offline pack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promedical.records import GradedInstruction, Message, Response
from promedical.review.demo import fill
from promedical.review.tables import Assignment, Reviewer, Round
from promedical.rubric import Criterion, Rubric, Tier, Verdict, VetoKind
from review_pages import packs, pages_of
from review_server import *  # noqa: F403
from review_server import serve_in_thread

RUN = "window.hacked = 1"
HOSTILE = "\n".join(
    (
        f"<script>{RUN}</script>",
        f"</script></textarea></template></title></style><script>{RUN}</script>",
        f"<img src=x onerror='{RUN}'><svg onload='{RUN}'>",
        f'"\'><b onmouseover="{RUN}" autofocus onfocus="{RUN}">',
        f"<a href=\"javascript:{RUN}\">a</a><iframe srcdoc='<script>parent.hacked=1</script>'>",
        "<form action='https://elsewhere.example'><button>go</button></form>",
        "<link rel=stylesheet href=https://elsewhere.example/a.css><base href=//elsewhere.example>",
        "<meta http-equiv=refresh content='0;url=https://elsewhere.example'>",
        f"<div hx-get='/people' hx-trigger='load' hx-on::load='{RUN}'></div>",
        "{{ 7*7 }} {% raw %} ${7*7} #{7*7} <%= 7*7 %> &lt;script&gt; %s {0} {name}",
        "<!-- ]]> \\u003cscript\\u003e \u2028 \u2029 \u202egnp.exe \u2066 \u0600\u0301\u0301\u0301",
    )
)
SHORT = f"Says <script>{RUN}</script> <img src=x onerror='{RUN}'> clearly."
LONG = "Donaudampfschifffahrtsgesellschaft" * 50
# What would be there if one of them had been taken for HTML.
TAKEN = (
    "img[src=x], svg[onload], iframe, base, a[href^='javascript:'], [onerror], [onmouseover], "
    "[hx-get='/people'], form[action^='https://elsewhere'], link[href*='elsewhere'], "
    "meta[http-equiv=refresh]"
)
INNER = """() => {
  const fields = [...document.querySelectorAll("textarea")].map((field) => field.value);
  return document.body.innerText + fields.join("\\n");
}"""


def hostile_row(number: int, responses: int = 0) -> GradedInstruction:
    criteria = (
        # The script of the demo edits the first one, which has to stay a sentence of usual length.
        Criterion(f"a{HOSTILE[:150]}", Tier.PROFICIENCY, SHORT, 0.25, HOSTILE[:90]),
        Criterion("e", Tier.PROFICIENCY, f"One. {HOSTILE}", 0.25),
        Criterion("b", Tier.PROFICIENCY, f"Two. {LONG}", 0.5),
        Criterion("c", Tier.EXCELLENCE, f"Three. {HOSTILE}"),
        Criterion("d", Tier.VETO, f"Four. {HOSTILE}", kind=VetoKind.HARMFUL_ADVICE),
    )
    verdicts = {c.id: Verdict.UNMET for c in criteria}
    return GradedInstruction(
        id=f"row-{number}{HOSTILE[:80]}",
        source=HOSTILE[:60],
        licence="CC0",
        messages=(
            Message("user", HOSTILE),
            Message("assistant", LONG),
            Message("user", f"Instruction {number} {HOSTILE}"),
        ),
        category=HOSTILE[:120],
        specialty=LONG[:120],
        rubric=Rubric(criteria),
        reference=f"Reference. {HOSTILE}",
        responses=tuple(
            Response(f"r{n}", f"model-{n}", f"Answer {n}. {HOSTILE} {LONG}", verdicts)
            for n in range(responses)
        ),
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("hostile") / "review.sqlite3"
    with serve_in_thread(str(path)) as running:
        drafts = [hostile_row(n) for n in range(4)]
        fill(running.database, sample=(drafts, [hostile_row(n, 3) for n in range(6)]))
        with running.database.write() as session:
            for round_ in session.query(Round):
                round_.name = f"{HOSTILE[:150]}"
            for reviewer in session.query(Reviewer):
                reviewer.name = f"{reviewer.login} {HOSTILE[:120]}"
                reviewer.country = HOSTILE[:90]
            for assignment in session.query(Assignment).filter_by(state="done"):
                assignment.answer = with_notes(assignment.answer)
        yield running


def with_notes(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with hostile text wherever a reviewer may write."""
    if "criteria" in answer:
        return {**answer, "reason": HOSTILE}
    verdicts = {
        key: {c: {**given, "note": HOSTILE} for c, given in by_criterion.items()}
        for key, by_criterion in answer["verdicts"].items()
    }
    dangers = {key: [{"id": "d1", "kind": "other", "text": HOSTILE}] for key in verdicts}
    return {**answer, "verdicts": verdicts, "dangers": dangers}


def watch(page: Any, origin: str) -> list[str]:
    """What a page does that it must not: requests elsewhere, dialogs, errors."""
    seen: list[str] = []
    allowed = (origin, "file:", "blob:", "data:")
    page.on("request", lambda r: r.url.startswith(allowed) or seen.append(r.url))
    page.on("dialog", lambda d: (seen.append(f"dialog {d.message}"), d.dismiss()))
    page.on("pageerror", lambda e: seen.append(str(e)))
    return seen


def faults(page: Any, seen: list[str], *, shows: bool) -> list[str]:
    """What is wrong with a page that holds the text above."""
    page.wait_for_timeout(50)
    text = page.evaluate(INNER)
    found = list(seen)
    if page.evaluate("window.hacked") is not None:
        found.append("a script of the text ran")
    if taken := page.locator(TAKEN).count():
        found.append(f"{taken} elements are made of the text")
    if " 49 " in text:
        found.append("a template in the text was computed")
    if shows and f"<script>{RUN}</script>" not in text:
        found.append("the text is not shown as it is")
    # Nothing is so long that a phone has to scroll sideways.
    if (width := page.evaluate("document.scrollingElement.scrollWidth")) > 391:
        found.append(f"{width} pixels wide, expected 390")
    return found


# Pages that hold nothing of an instruction, a response or an answer.
PLAIN = ("nobody-", "lead-rubric-round-new", "lead-adjudication-round-new")


def test_every_page_shows_it_as_text(server: Any, chromium: Any) -> None:
    visited, found, seen = 0, {}, {}
    for name, page in pages_of(chromium, server, 390):
        if page not in seen:
            seen[page] = watch(page, server.url)
            page.reload()
        if problems := faults(page, seen[page], shows=not name.startswith(PLAIN)):
            found[name] = problems
        visited += 1
    assert found == {}
    assert visited > 18


def test_an_offline_pack_shows_it_as_text(server: Any, chromium: Any, tmp_path: Path) -> None:
    found = {}
    for name, page in packs(chromium, server.database, tmp_path, 390):
        seen = watch(page, "file:")
        page.reload()
        page.locator("#offline-item > *").first.wait_for()
        found[name] = faults(page, seen, shows=True)
    assert found == {"offline-rubrics": [], "offline-adjudication": []}
