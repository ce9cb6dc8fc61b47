"""The browser's draft operations are Python's, number for number."""

from __future__ import annotations

import json
import random
from typing import Any

from promedical.review import drafts
from promedical.review.pages import STATIC
from review_server import *  # noqa: F403

RUN = """(sessions) => sessions.map(([draft, steps]) => {
  const D = Review.draft;
  let now = D.opened(draft);
  const states = [now];
  for (const [name, ...args] of steps) {
    now = D[name](now, ...args);
    states.push(now);
  }
  return { states, diffs: states.map((s) => D.diff(states[0], s)) };
})"""


def in_python(draft: drafts.Draft, name: str, args: list[Any]) -> drafts.Draft:
    if name == "edit":
        return drafts.edit(draft, args[0], **args[1])
    if name == "add":
        return drafts.add(draft, args[0], args[1], **args[2])
    if name == "split":
        return drafts.split(draft, args[0], [tuple(part) for part in args[1]])
    return getattr(drafts, name)(draft, *args)


def random_step(draft: drafts.Draft, lot: random.Random, n: int) -> tuple[str, list[Any]]:
    tiers = ["proficiency", "excellence", "veto"]
    if not draft:
        return "add", [lot.choice(tiers), f"n{n}", {"text": "New."}]
    c = lot.choice(draft)
    peers = [o.id for o in draft if o.tier == c.tier and o.id != c.id]
    options: list[tuple[str, list[Any]]] = [
        ("edit", [c.id, {"text": f"Says {n}."}]),
        ("edit", [c.id, {"axis": lot.choice([None, "accuracy"])}]),
        ("edit", [c.id, {"tier": lot.choice(tiers)}]),
        ("add", [lot.choice(tiers), f"n{n}", {"text": "", "after": c.id}]),
        ("remove", [c.id]),
        ("split", [c.id, [[f"n{n}x", "One."], [f"n{n}y", "Two."]]]),
        ("move", [c.id, lot.choice([-1, 1])]),
        ("move", [c.id, lot.choice([-1, 1])]),
    ]
    if c.tier == "proficiency":
        options += [("edit", [c.id, {"weight": lot.choice([0, 0.35, 1, lot.random()])}])] * 2
    if c.tier == "veto":
        options.append(("edit", [c.id, {"kind": "harmful_advice"}]))
    if peers:
        options.append(("merge", [c.id, lot.choice(peers), f"n{n}"]))
    return lot.choice(options)


def test_both_languages_agree(chromium: Any) -> None:
    page = chromium.new_page()
    for name in ("stores.js", "draft.js"):
        page.add_script_tag(path=STATIC / name)
    sessions, expected, seen = [], [], set()
    for seed in range(50):
        lot = random.Random(seed)
        first = [
            {"id": f"d{i}", "tier": tier, "axis": None, "kind": None, "text": f"States {i}."}
            | {"weight": lot.random() if tier == "proficiency" else None}
            for i, tier in enumerate(lot.choices(["proficiency", "proficiency", "veto"], k=5))
        ]
        states, steps = [drafts.opened(first)], []
        for n in range(12):
            name, args = random_step(states[-1], lot, n)
            steps.append([name, *args])
            states.append(in_python(states[-1], name, args))
        diffs = [[e.to_json() for e in drafts.diff(states[0], s)] for s in states]
        sessions.append([first, steps])
        expected.append({"states": [drafts.to_json(s) for s in states], "diffs": diffs})
        seen |= {e["what"] for edits in diffs for e in edits}
    # Through JSON, as on the wire: there 1 and 1.0 are one number.
    assert page.evaluate(RUN, sessions) == json.loads(json.dumps(expected))
    assert seen == {*drafts.COUNTED, "rescaled", "replaced", "order"}
    page.close()
