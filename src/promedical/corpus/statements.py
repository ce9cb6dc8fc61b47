"""Statements of one question: which cover each other, and which sentence of an answer holds which.

Section 7.3 of the method: statements that cover each other form a group, and a statement is false
only if its whole group is absent. "Cover" is measured on content words (lower case, light
stemming, no stop words): the share of one text's content words that another text holds too, each
word counting one over the number of the question's statements that have it. It errs towards
grouping, because a group that is too large costs labels and one that is too small makes wrong ones.
Left to others: building responses (`construct`) and near misses of a statement (`nearmiss`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = [
    "COVER_THRESHOLD",
    "HOLD_THRESHOLD",
    "STOP_WORDS",
    "TOUCH_THRESHOLD",
    "Alignment",
    "align",
    "content_words",
    "coverage",
    "group_statements",
    "rarity",
    "sentences",
    "words",
]

# Two statements are in one group if one holds at least this share of the other's content words.
COVER_THRESHOLD = 0.45
# A sentence holds a statement from this share on, and touches it from the second one on.
HOLD_THRESHOLD = 0.75
TOUCH_THRESHOLD = 0.4

STOP_WORDS = frozenset(
    """
    a about after all also although am among an and any are as at be because been before being
    both but by can could did do does due during each either especially etc for from further
    furthermore had has have having he her here his how however i if in including into is it its
    itself just known like may me might more most must my of often on one only or other others our
    out over same should since so some such than that the their them then there therefore these
    they this those through to too typically under until up upon us usually very was we well were
    what when where which while who will with within without would you your
    """.split()  # noqa: SIM905 (a list of words reads better as text)
)
# What two texts may differ in without saying anything different.
_SYNONYMS = {
    "healthcare": "doctor", "physician": "doctor", "provider": "doctor", "medicine": "drug",
    "medication": "drug", "people": "patient", "person": "patient", "individual": "patient",
    "medical": "doctor", "consult": "doctor", "immediate": "urgent", "emergency": "urgent",
    "elevat": "high", "increas": "high", "rais": "high", "reduc": "low", "decreas": "low",
    "lower": "low", "higher": "high", "usual": "common", "commonly": "common",
}  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+(?:[.'’-][a-z0-9]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'])|\n+")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|dr|st|approx|no|etc)\.$", re.IGNORECASE)
_SUFFIXES = (
    "ations", "ation", "ments", "ment", "ingly", "ities", "ness", "ings", "ing", "ies", "ied",
    "edly", "ely", "ed", "es", "ly", "s", "e",
)  # fmt: skip


def words(text: str) -> list[str]:
    """The words of a text in order, lower case."""
    return _WORD.findall(text.lower())


def stem(word: str) -> str:
    """A word without its commonest endings; at least four letters stay."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            word = word[: -len(suffix)] + ("y" if suffix in ("ies", "ied", "ities") else "")
            break
    return _SYNONYMS.get(word, word)


@lru_cache(maxsize=65536)  # the same few thousand sentences are compared over and over
def content_words(text: str) -> frozenset[str]:
    """Stems of the words that carry meaning; "not" and "no" are among them."""
    found: set[str] = set()
    for word in words(text):
        if word in STOP_WORDS:
            continue
        found.update(stem(part) for part in re.split(r"[-'’]", word) if part not in STOP_WORDS)
    return frozenset(w for w in found if len(w) > 1 or w.isdigit())


def rarity(texts: Sequence[str]) -> dict[str, float]:
    """The weight of each content word in comparing statements of one question: 1 / their number.

    "Side effects of X include headache" and "… include insomnia" share most words and say different
    things; what they do not share has to outweigh what a whole list of statements shares.
    """
    held = Counter(w for text in texts for w in content_words(text))
    return {w: 1 / n for w, n in held.items()}


def coverage(
    part: Collection[str], whole: Collection[str], weights: Mapping[str, float] | None = None
) -> float:
    """The share of `part`'s content words that `whole` holds, in [0, 1]; 0 for an empty part."""
    weights = {} if weights is None else weights
    total = math.fsum(weights.get(w, 1.0) for w in part)  # fsum: sets have no fixed order
    return math.fsum(weights.get(w, 1.0) for w in part if w in whole) / total if total else 0.0


def group_statements(
    texts: Sequence[str], *, threshold: float = COVER_THRESHOLD
) -> list[tuple[int, ...]]:
    """Statements of one question that cover each other, as groups of positions.

    The groups are the connected components of "one of the two holds at least `threshold` of the
    other's content words", so they partition the positions; order is by first member.
    """
    contents = [content_words(text) for text in texts]
    weights = rarity(texts)
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            cover = max(
                coverage(contents[i], contents[j], weights),
                coverage(contents[j], contents[i], weights),
            )
            if cover >= threshold and group[i] != group[j]:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    members: dict[int, list[int]] = {}
    for position, name in enumerate(group):
        members.setdefault(name, []).append(position)
    return [tuple(m) for m in members.values()]


def sentences(text: str) -> list[str]:
    """The sentences of a text, split at end marks before a capital and at line breaks."""
    found: list[str] = []
    for piece in _SENTENCE_END.split(text):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] = f"{found[-1]} {piece.strip()}"
        elif piece.strip():
            found.append(piece.strip())
    return found


@dataclass(frozen=True)
class Alignment:
    """How a statement stands to the sentences of an answer.

    Args:
        holding: positions of the sentences that hold it (coverage ≥ `HOLD_THRESHOLD`).
        touching: positions of those that hold a part (≥ `TOUCH_THRESHOLD`), holding ones included.
    """

    holding: tuple[int, ...]
    touching: tuple[int, ...]


def align(statements: Sequence[str], answer: Sequence[str]) -> list[Alignment]:
    """For each statement the sentences of the answer that hold or touch it."""
    contents = [content_words(s) for s in answer]
    weights = rarity(statements)
    found = []
    for statement in statements:
        part = content_words(statement)
        shares = [coverage(part, c, weights) for c in contents]
        found.append(
            Alignment(
                tuple(i for i, s in enumerate(shares) if s >= HOLD_THRESHOLD),
                tuple(i for i, s in enumerate(shares) if s >= TOUCH_THRESHOLD),
            )
        )
    return found
