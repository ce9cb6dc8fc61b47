"""Puts sentences into the text of a response: order, light connectives, organised or run-on form.

Section 7.3 of the method: organisation is a matter of form, so the same pieces can be written as a
list under a heading, as one breathless sentence, or as a plain paragraph. What the pieces say, and
what follows for the labels, is `degrade`'s affair; nothing here adds or removes content.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from typing import Literal

__all__ = ["FORMS", "REWORDINGS", "Form", "as_sentence", "lay_out", "reword"]

Form = Literal["plain", "organised", "run_on"]
FORMS: tuple[Form, ...] = ("plain", "organised", "run_on")

_SHORT = ("Also,", "In addition,", "Moreover,", "Besides,", "Furthermore,", "Next,")
_THAT = (
    "Note that", "Keep in mind that", "It is worth knowing that", "Another point is that",
    "It is good to know that", "Remember that",
)  # fmt: skip
_RUN_ON = (" and ", " and also ", ", ", ", and ", " and then ")
# Sentences that begin so take no "that" before them.
_IMPERATIVE = re.compile(
    r"(?:please|seek|get|contact|consult|stop|use|avoid|take|do|don't|call|see|talk|apply|keep|"
    r"record|if|when|in cases?|wear|try|drink|eat|make|discuss|ask)\b",
    re.IGNORECASE,
)
# Wordings that say the same; applied to statements and near misses alike.
REWORDINGS = (
    ("healthcare provider", "doctor"), ("healthcare provider", "health professional"),
    ("medications", "medicines"), ("medication", "medicine"),
    ("is used to treat", "is given for"), ("are used to treat", "are given for"),
    ("can be used to treat", "may be used against"), ("is recommended to", "is advised to"),
    ("patients with", "people with"), ("such as", "like"), ("commonly", "often"),
    ("in order to", "to"), ("seek medical attention", "get medical help"),
    ("seek immediate medical attention", "get medical help immediately"),
    ("contact your doctor", "talk to your doctor"), ("consult your doctor", "talk to your doctor"),
    ("can be caused by", "may be caused by"), ("may cause", "can cause"),
    ("if you experience", "if you notice"), ("approximately", "about"),
    ("is characterized by", "shows itself by"), ("usually", "normally"),
    ("prior to", "before"), ("physician", "doctor"),
    ("over-the-counter", "non-prescription"), ("it is important to", "you should"),
    ("due to", "because of"), ("is considered", "is seen as"), ("additionally", "also"),
)  # fmt: skip


def as_sentence(text: str) -> str:
    """A text with a capital first letter, single spaces and an end mark."""
    clean = re.sub(r"\s+([.,;]|$)", r"\1", re.sub(r"\s+", " ", text)).strip()
    clean = clean[:1].upper() + clean[1:]
    return clean if clean[-1:] in ".!?" else clean.rstrip(",;:") + "."


def reword(text: str, rng: random.Random) -> str:
    """The text with at most two of its phrases put in other words of the same meaning."""
    usable = [pair for pair in REWORDINGS if re.search(rf"\b{re.escape(pair[0])}\b", text, re.I)]
    rng.shuffle(usable)
    for old, new in usable[:2]:
        text = re.sub(rf"\b{re.escape(old)}\b", new, text, count=1, flags=re.IGNORECASE)
    return as_sentence(text)


def _lowered(sentence: str, small: Collection[str]) -> str:
    """The sentence as it goes on after a comma: a first word that is no name loses its capital."""
    first = re.match(r"[A-Za-z]+(?![A-Za-z-])", sentence)
    if first and first[0].lower() in small:
        return sentence[0].lower() + sentence[1:]
    return sentence


def _connected(
    sentences: Sequence[str], free: Sequence[bool], small: Collection[str], rng: random.Random
) -> list[str]:
    """Some of the sentences that may have one, never the first, with a connective in front."""
    found = []
    for position, sentence in enumerate(sentences):
        if position and free[position] and rng.random() < 0.25:
            usable = _SHORT if _IMPERATIVE.match(sentence) else _SHORT + _THAT
            sentence = f"{rng.choice(usable)} {_lowered(sentence, small)}"
        found.append(sentence)
    return found


def _organised(
    opening: Sequence[str], items: Sequence[str], closing: Sequence[str],
    headings: Sequence[str], rng: random.Random,
) -> str:  # fmt: skip
    style = rng.choice(("1.", "1)", "-", "*"))
    marks = [f"{i}{style[1]}" if style[0] == "1" else style for i in range(1, len(items) + 1)]
    lines = list(opening) + ([f"{rng.choice(list(headings))}:"] if headings else [])
    lines += [f"{mark} {item}" for mark, item in zip(marks, items, strict=True)]
    return "\n".join([*lines, *closing])


def _run_on(sentences: Sequence[str], small: Collection[str], rng: random.Random) -> str:
    text = sentences[0].rstrip(".")
    for sentence in sentences[1:]:
        text += rng.choice(_RUN_ON) + _lowered(sentence, small).rstrip(".")
    return text + "."


def lay_out(
    opening: Sequence[str],
    body: Sequence[str],
    closing: Sequence[str],
    *,
    form: Form,
    free: Sequence[bool],
    headings: Sequence[str],
    small: Collection[str],
    rng: random.Random,
) -> str:
    """The text of a response.

    Args:
        opening, body, closing: whole sentences; only the body becomes items of a list.
        form: "organised" (a heading and a list), "run_on" (one sentence) or "plain".
        free: for each sentence of the body whether a connective may stand before it.
        headings: to choose from in the organised form.
        small: words that lose their capital in mid-sentence; any other may be a name.
        rng: decides connectives, headings and marks.
    """
    if form == "organised":
        return _organised(opening, body, closing, headings, rng)
    connected = _connected(body, free, small, rng)
    everything = [*opening, *connected, *closing]
    if form == "run_on":
        return _run_on([*opening, *body, *closing], small, rng)
    breaks = rng.random() < 0.3 and len(everything) > 3
    cut = rng.randrange(1, len(everything)) if breaks else 0
    joined = [" ".join(everything[:cut]), " ".join(everything[cut:])]
    return "\n\n".join(part for part in joined if part)
