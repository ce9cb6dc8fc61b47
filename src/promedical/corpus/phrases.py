"""Phrase banks: what a constructed response may say besides a physician's statements (section 7.3).

The texts live in `data/*.yaml`. A violation is a sentence that commits one kind of harm; its benign
twin has the same form, place and length and is clean for that kind. Excellence elements come with
neutral twins in the same way. Violations of training, calibration and bench are of different
families, so that a model which only learnt phrasings fails there, and thresholds are fitted on
phrasings the model has not seen. How a response is put together is `degrade`'s affair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from promedical.corpus.statements import STOP_WORDS, words
from promedical.rubric import VetoKind

__all__ = [
    "MANNERS",
    "SPLITS",
    "Bank",
    "BankError",
    "Element",
    "condition_of",
    "fill",
    "load_bank",
    "runs",
    "topic_of",
]

Split = Literal["train", "calibration", "bench"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "bench")
MANNERS = ("empathy", "when_to_seek_care")
FALLBACK_TOPIC = "this"
# Words of a question that read badly where a noun is expected.
_NOT_A_TOPIC = frozenset(
    """
    able about actually after alright also always any anything bad become been before better
    brazil can cause caused causes causing come comes common commonly contribute could day days
    detect difference different disease do doctor does drink drip drug drugs during early eat
    effect effective effects eight every example experience experiencing fast feature feel feeling
    find five found four get getting give given go goes going good happen happens hard have having
    help helps high hour hours how increase increased indicate individuals interval issue just
    kind know last late lead least less level levels like likely little long loss lot low make
    makes many may mean means measure medical medication medications medicine medicines middle
    might minimum month months more morning most much must need needs new night normal now number
    often old once one onset option options other pass people person please possible powder
    prescribed prescription present prevent problem problems quick quickly range recommended
    reduce refers risk safe safely say seem seven should show side sign signs simple since six
    someone something sometimes soon start started starting stay still stop suffer suggested
    symptom symptoms take taken takes taking tell test tested thing things think thought three
    time times together told treat treated treating treatment treatments try two type types usage
    use used uses using usually very wait want way week weeks well what when which while work
    works worse worst would wrong year years yes zero
    """.split()  # noqa: SIM905 (a list of words reads better as text)
)
_NOT_NOUN_ENDINGS = ("ly", "ed", "ing", "ous", "ive", "able", "ible", "ical", "ful", "less")
_ADJECTIVE_ENDINGS = ("al", "ar", "ic", "ary", "id")
_TOPIC_LENGTH = range(4, 19)
_SUFFERED = (
    "symptoms? of|symptoms? like|treatment (?:of|for)|treat|treating|patients? with|people with|"
    "suffer(?:ing|s)? from|relieve|causes? of|diagnos(?:e|is of|ing)|management of|cases of|have|"
    "associated with|cause|causes|caused by|during|episodes? of|therapy for"
)
# Words that need the next one to make sense.
_NOT_ALONE = frozenset(
    ("breast", "foot", "liver", "mouth", "muscle", "pink", "pump", "stomach", "tongue", "vein")
)


class BankError(ValueError):
    """A phrase file that cannot be used; the message names file, kind and family."""


@dataclass(frozen=True)
class Element:
    """One phrasing and its twin.

    Args:
        name: the veto kind's value, or "empathy" or "when_to_seek_care".
        family: which way of saying or doing it.
        number: position in its family, from 1.
        text: makes the criterion true (a violation, an empathic sentence …).
        twin: same form, place and length, makes it false.
        clean: the other veto kinds that `text` leaves clean; all others are unknown.
        twin_clean: the same for `twin`.
    """

    name: str
    family: str
    number: int
    text: str
    twin: str
    clean: frozenset[VetoKind] = frozenset()
    twin_clean: frozenset[VetoKind] = frozenset()

    def describe(self) -> str:
        """How `Response.construction` names it."""
        return f"{self.name}:family={self.family}#{self.number}"


@dataclass(frozen=True)
class Bank:
    """Every phrase of one split.

    Args:
        veto: violations with their benign twins, by kind.
        manner: excellence elements with their neutral twins, by name (`MANNERS`).
        neutral: sentences that state no medical fact and meet no criterion.
        headings: short headings of an organised answer.
    """

    veto: Mapping[VetoKind, tuple[Element, ...]]
    manner: Mapping[str, tuple[Element, ...]]
    neutral: tuple[str, ...]
    headings: tuple[str, ...]

    def elements(self) -> Iterator[Element]:
        """Every element, veto kinds first."""
        for group in (*self.veto.values(), *self.manner.values()):
            yield from group

    def texts(self) -> Iterator[str]:
        """Every sentence of the bank, slots unfilled."""
        for element in self.elements():
            yield element.text
            yield element.twin
        yield from self.neutral


def _read(name: str) -> Any:
    file = resources.files("promedical.corpus").joinpath("data", name)
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _elements(name: str, families: Sequence[Mapping[str, Any]], where: str) -> tuple[Element, ...]:
    found = []
    for family in families:
        try:
            clean = frozenset(VetoKind(k) for k in family.get("clean", ()))
            twin_clean = frozenset(VetoKind(k) for k in family.get("twin_clean", ()))
            for number, (text, twin) in enumerate(family["pairs"], start=1):
                found.append(Element(name, family["family"], number, text, twin, clean, twin_clean))
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(f"{where}: {name}: family {family.get('family')!r}: {error}") from None
    return tuple(found)


@cache
def load_bank(split: Split) -> Bank:
    """The phrase bank of "train", "calibration" or "bench".

    Calibration has violations of its own, and training's excellence elements.

    Raises:
        BankError: an unknown split, or a file that does not hold what it should.
    """
    if split not in SPLITS:
        raise BankError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    name = f"phrases_{split}.yaml"
    veto = _read(name)
    manner = _read("manner.yaml")["bench" if split == "bench" else "train"]
    missing = [kind.value for kind in VetoKind if kind.value not in veto]
    if missing:
        raise BankError(f"{name}: no families for {missing}, expected every veto kind")
    return Bank(
        veto={kind: _elements(kind.value, veto[kind.value], name) for kind in VetoKind},
        manner={m: _elements(m, manner[m], "manner.yaml") for m in MANNERS},
        neutral=tuple(manner["neutral"]),
        headings=tuple(manner["headings"]),
    )


def fill(text: str, topic: str) -> str:
    """A phrase with its slot filled, its first letter a capital."""
    filled = text.replace("{topic}", topic)
    return filled[:1].upper() + filled[1:]


def topic_of(question: str, statements: Sequence[str]) -> str:
    """A noun that question and statements share, or "this".

    Deliberately simple: the word of the question that the most statements hold, with the word after
    it if that is mostly the same, leaving out words that are rarely nouns or read badly alone.
    """
    spelled: dict[str, str] = {}
    follows: dict[str, Counter[str]] = {}
    for text in statements:
        found = re.findall(r"[A-Za-z][A-Za-z-]+|[^\sA-Za-z]", text)
        for position, word in enumerate(found):
            if position:  # A sentence's first word does not tell how it is spelled.
                spelled.setdefault(word.lower(), word)
            after = found[position + 1] if position + 1 < len(found) else "."
            follows.setdefault(word.lower(), Counter())[after.lower()] += 1
    held = Counter(w for text in statements for w in set(words(text)))
    best, most = FALLBACK_TOPIC, 1
    for word in words(question):
        if word.isalpha() and len(word) in _TOPIC_LENGTH and _may_be_noun(word):
            if held[word] <= most:
                continue
            (after, times), *_ = follows[word].most_common(1)
            pair = after.isalpha() and len(after) > 3 and _may_be_noun(after) and times > 1
            if pair and 2 * times >= sum(follows[word].values()):
                best = f"{spelled.get(word, word)} {after}"
            elif word.endswith(_ADJECTIVE_ENDINGS) or word in _NOT_ALONE:
                continue
            else:
                best = spelled.get(word, word)
            most = held[word]
    return best


def _may_be_noun(word: str) -> bool:
    return (
        word not in STOP_WORDS and word not in _NOT_A_TOPIC and not word.endswith(_NOT_NOUN_ENDINGS)
    )


def condition_of(topic: str, statements: Sequence[str]) -> str:
    """The topic if a person can have it, or "this": one does not suffer from a medicine."""
    about = rf"\b(?:{_SUFFERED}) (?:\w+ )?{re.escape(topic)}\b"
    suffered = any(re.search(about, text, re.IGNORECASE) for text in statements)
    return topic if suffered and not topic[:1].isupper() else FALLBACK_TOPIC


def runs(text: str, length: int = 5) -> set[tuple[str, ...]]:
    """Every run of `length` words of a text, to compare banks with each other."""
    found = re.findall(r"[a-z0-9{}]+", text.lower())
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}
