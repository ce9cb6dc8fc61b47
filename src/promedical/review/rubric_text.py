"""A rubric as plain text that a physician can edit where there is no form: one criterion a line.

    proficiency | 40 % | accuracy | States the daily limit. | must.1a
    excellence | | empathy | Says that worry is understandable. | nice.2b
    veto | harmful_advice | | Advises more than the daily limit. | veto.3c

Columns: tier; share of proficiency, or a veto's kind; axis; the sentence; the draft's id is
in the last, empty on a line that somebody added. Two lines with one id are a split, and
`must.1a + must.1b` is a merge. A line that begins with # is a remark. For Label Studio and Argilla,
whose forms cannot add, split or merge. Left to others: what a finished rubric needs (`drafts`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from promedical.review import drafts
from promedical.review.drafts import DraftCriterion
from promedical.rubric import Tier

__all__ = ["COLUMNS", "RubricTextError", "parse_rubric", "rubric_text"]

COLUMNS = "tier | share or kind of veto | axis | criterion | id"
_ESCAPES = {"\\": "\\\\", "|": "\\|", "\n": "\\n", "\r": "\\r"}
_UNESCAPED = {"\\": "\\", "|": "|", "n": "\n", "r": "\r"}
# Control characters and line separators that text fields of other tools eat.
_SPECIAL = re.compile(r"[\\|\n\r]|[\x00-\x1f\x7f\x85\u2028\u2029]")


class RubricTextError(ValueError):
    """A line that is no criterion; the message names it."""


def rubric_text(criteria: Sequence[Mapping[str, Any]]) -> str:
    """The criteria of a draft or an answer as text; `parse_rubric` gives the same ones back."""
    return "\n".join([f"# {COLUMNS}", *(_line(c) for c in criteria)])


def _line(c: Mapping[str, Any]) -> str:
    second = "" if c.get("weight") is None else _share(c["weight"])
    if c["tier"] == Tier.VETO:
        second = c.get("kind") or ""
    cells = (c["tier"], second, _escaped(c.get("axis") or ""), _escaped(c["text"]))
    return " | ".join((*cells, _id_cell(c))).strip()


def _id_cell(c: Mapping[str, Any]) -> str:
    sources = list(c.get("from") or [c["id"]])
    own = c["id"] in sources or not c.get("from")
    return _escaped(c["id"] if own and len(sources) == 1 else " + ".join(sources))


def _share(weight: float) -> str:
    return f"{round(100 * weight, 2):g} %"


def _escaped(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        found = match.group()
        return _ESCAPES.get(found) or f"\\u{ord(found):04x}"

    return _SPECIAL.sub(one, text)


def _cells(line: str) -> list[str]:
    """The cells of a line, unescaped; outer spaces are not part of a cell."""
    cells = [""]
    position = 0
    while position < len(line):
        character = line[position]
        following = line[position + 1 : position + 2]
        if character == "\\" and following in _UNESCAPED and following:
            cells[-1] += _UNESCAPED[following]
            position += 2
        elif character == "\\" and re.fullmatch(r"u[0-9a-f]{4}", line[position + 1 : position + 6]):
            cells[-1] += chr(int(line[position + 2 : position + 6], 16))
            position += 6
        elif character == "|":
            cells[-1] = cells[-1].rstrip(" \t")
            cells.append("")
            position = len(line) - len(line[position + 1 :].lstrip(" \t"))
        else:
            cells[-1] += character
            position += 1
    cells[-1] = cells[-1].rstrip(" \t")
    return cells


def parse_rubric(text: str, draft: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The criteria of an answer.

    A share that reads as in the draft's own text is the draft's exact weight, and shares that do
    not sum to 1 are re-normalised; so text that nobody changed is the draft.

    Args:
        text: as `rubric_text` makes it, and as somebody edited it.
        draft: criteria of the item's content.

    Raises:
        RubricTextError: a line that is no criterion, or an id that the draft has not.
    """
    known = {c["id"]: c for c in draft}
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip(" \t\r")
        if stripped and not stripped.startswith("#"):
            lines.append(_parsed(stripped, f"line {number}", known))
    uses = Counter(lines_id for _, lines_id in lines)
    taken = set(known)
    made: list[DraftCriterion] = []
    for criterion, ids in lines:
        if len(ids) == 1 and uses[ids] == 1:
            made.append(replace(criterion, id=ids[0], sources=ids))
            continue
        new = _new_id(taken, ids)
        taken.add(new)
        made.append(replace(criterion, id=new, sources=ids))
    return drafts.to_json(_normalised(tuple(made)))


def _normalised(draft: drafts.Draft) -> drafts.Draft:
    weights = [c.weight for c in draft if c.weight is not None]
    if weights and abs(math.fsum(weights) - 1) <= 1e-9:
        return draft
    return drafts.normalised(draft)


def _new_id(taken: set[str], ids: tuple[str, ...]) -> str:
    stem = ids[0] if ids else "new"
    return next(name for n in range(1, 10_000) if (name := f"{stem}-{n}") not in taken)


def _parsed(
    line: str, where: str, known: Mapping[str, Mapping[str, Any]]
) -> tuple[DraftCriterion, tuple[str, ...]]:
    cells = _cells(line)
    if len(cells) not in (4, 5):
        raise RubricTextError(f"{where}: found {len(cells)} columns, expected {COLUMNS}")
    tier, second, axis, text = cells[0].casefold(), cells[1], cells[2], cells[3]
    ids = tuple(part.strip() for part in (cells[4] if len(cells) == 5 else "").split(" + "))
    ids = tuple(part for part in ids if part)
    if tier not in set(Tier):
        raise RubricTextError(f"{where}: tier: found {cells[0]!r}, expected one of {list(Tier)}")
    for id in ids:
        if id not in known:
            raise RubricTextError(f"{where}: id: {id!r} is not in the draft, expected one, or none")
    weight, kind = None, None
    if tier == Tier.PROFICIENCY:
        weight = _weight(second, where, known.get(ids[0]) if len(ids) == 1 else None)
    elif tier == Tier.VETO:
        kind = second or None
    elif second:
        raise RubricTextError(f"{where}: second column: found {second!r}, expected nothing")
    return DraftCriterion("", tier, text, weight, axis or None, kind), ids


def _weight(text: str, where: str, source: Mapping[str, Any] | None) -> float | None:
    if source is not None and source.get("weight") is not None:
        exact = float(source["weight"])
        if text == _share(exact):
            return exact
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*(%?)", text)
    if match is None:
        raise RubricTextError(f"{where}: share: found {text!r}, expected a percentage such as 25 %")
    value = float(match.group(1).replace(",", "."))
    return value / 100 if match.group(2) or value > 1 else value
