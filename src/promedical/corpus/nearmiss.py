"""Near misses: a statement with one detail changed, so that it no longer says what it said.

Section 7.3 of the method: a drug, number, unit, frequency, direction or negation is changed, and
the result counts as unmet for the statement it was made from. Which responses get one is
`construct`'s affair, as is the check that the result does not happen to state another criterion.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "NearMiss", "near_misses"]

KINDS = ("number", "unit", "frequency", "direction", "drug", "negation")

_UNITS = {
    "hours": "weeks", "hour": "week", "days": "months", "weeks": "hours", "week": "year",
    "months": "hours", "years": "days", "minutes": "weeks", "minute": "day", "mg": "grams",
    "milligrams": "grams", "mcg": "grams", "pounds": "ounces", "degrees": "tenths of a degree",
}  # fmt: skip
_FREQUENCIES = {
    "once": "six times", "twice": "ten times", "daily": "yearly", "weekly": "hourly",
    "always": "never", "never": "always", "often": "hardly ever", "usually": "rarely",
    "commonly": "rarely", "typically": "rarely", "frequently": "rarely", "generally": "rarely",
    "common": "rare", "uncommon": "common", "rare": "common", "rarely": "usually",
    "occasionally": "constantly", "majority": "minority", "most people": "few people",
    "most cases": "very few cases", "most patients": "few patients", "most common": "least common",
}  # fmt: skip
_OPPOSITES = [
    ("increase", "decrease"), ("increases", "decreases"), ("increased", "decreased"),
    ("increasing", "decreasing"), ("reduce", "raise"), ("reduces", "raises"),
    ("reduced", "raised"), ("reducing", "raising"), ("elevated", "lowered"), ("high", "low"),
    ("higher", "lower"), ("before", "after"), ("improve", "worsen"), ("improves", "worsens"),
    ("improvement", "worsening"), ("safe", "unsafe"), ("safely", "only at great risk"),
    ("effective", "ineffective"), ("recommended", "discouraged"), ("positive", "negative"),
    ("over-the-counter", "prescription-only"), ("bacterial", "viral"), ("bacteria", "viruses"),
    ("virus", "bacterium"), ("benign", "malignant"), ("contagious", "non-contagious"),
    ("mild", "severe"), ("temporary", "permanent"), ("temporarily", "permanently"),
    ("adulthood", "childhood"), ("adults", "infants"), ("inhibit", "stimulate"),
    ("inhibits", "stimulates"), ("inhibiting", "stimulating"), ("suppress", "boost"),
    ("hyperthyroidism", "hypothyroidism"), ("acute", "chronic"), ("gradually", "abruptly"),
    ("gradual", "abrupt"), ("slowly", "rapidly"), ("relieve", "aggravate"),
    ("relieves", "aggravates"), ("beneficial", "harmful"), ("harmless", "dangerous"),
    ("upper", "lower"), ("stronger", "weaker"), ("longer", "shorter"), ("more than", "less than"),
    ("below", "above"), ("older", "younger"),  ("approved", "forbidden"),
    ("can help", "will not help"), ("may help", "will not help"), ("necessary", "unnecessary"),
    ("treatable", "untreatable"), ("curable", "incurable"), ("allowed", "forbidden"),
    ("fast", "slow"), ("first-line", "last-line"), ("weight gain", "weight loss"),
    ("diarrhea", "constipation"), ("insomnia", "sleepiness"),
]  # fmt: skip
_BOTH_WAYS = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])} | {
    # The way back of these would change the sentence's grammar or sense.
    "lower": "higher", "raise": "reduce", "can cause": "can prevent", "may cause": "may prevent",
    "might cause": "might prevent", "could cause": "could prevent", "to cause": "to prevent",
    "avoided": "used freely", "hyperthyroidism": "hypothyroidism",
    "only at great risk": "safely", "will not help": "can help", "viruses": "bacteria",
}  # fmt: skip
_NUMBER_WORDS = {
    "two": "nine", "three": "eleven", "four": "thirteen", "five": "fifty", "six": "twenty",
    "seven": "thirty", "eight": "two", "nine": "three", "ten": "forty", "twelve": "three",
    "half": "a tenth",
}  # fmt: skip
DRUGS = (
    "acetaminophen", "albuterol", "amitriptyline", "amlodipine", "amoxicillin", "aspirin",
    "atorvastatin", "azithromycin", "benadryl", "bupropion", "buspirone", "cetirizine",
    "ciprofloxacin", "citalopram", "clindamycin", "codeine", "diazepam", "diphenhydramine",
    "doxycycline", "duloxetine", "escitalopram", "famotidine", "fluconazole", "fluoxetine",
    "gabapentin", "hydrocortisone", "ibuprofen", "imodium", "insulin", "lexapro", "lisinopril",
    "loperamide", "loratadine", "lorazepam", "metformin", "methotrexate", "metoclopramide",
    "metronidazole", "mirtazapine", "morphine", "naproxen", "nitrofurantoin", "omeprazole",
    "ondansetron", "pantoprazole", "prednisone", "propranolol", "robaxin", "saxenda",
    "sertraline", "simvastatin", "tramadol", "trazodone", "tylenol", "valacyclovir",
    "venlafaxine", "warfarin", "wellbutrin", "zolpidem", "terbinafine", "miconazole",
    "chlorhexidine", "levothyroxine",
)  # fmt: skip

_NOT = re.compile(r"\b(is|are|was|should|do|does|may|can|will|could|has|have) not\b|\bcannot\b")
_VERB = re.compile(
    r"\b(is|are|should|can|could|may|might|will|must|has been|have been)\b(?! not)(?!not)"
)
_NEGATED = {
    "can": "cannot", "could": "could not", "may": "will not", "might": "will not",
    "will": "will not", "should": "should not", "must": "must not", "is": "is not",
    "are": "are not", "has been": "has never been", "have been": "have never been",
}  # fmt: skip


@dataclass(frozen=True)
class NearMiss:
    """A changed text.

    Args:
        text: the text with the change.
        kind: one of `KINDS`.
        old, new: what was changed and into what.
    """

    text: str
    kind: str
    old: str
    new: str

    def describe(self) -> str:
        """How `Response.construction` names it."""
        return f"{self.kind}:{self.old}->{self.new}"


def _cased(new: str, old: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _swap(text: str, table: dict[str, str], kind: str) -> Iterator[NearMiss]:
    pattern = (
        r"(?<![\w-])("
        + "|".join(sorted(map(re.escape, table), key=lambda w: -len(w)))
        + r")(?![\w-])"
    )
    for found in re.finditer(pattern, text, re.IGNORECASE):
        old = found[0]
        new = _cased(table[old.lower()], old)
        yield NearMiss(text[: found.start()] + new + text[found.end() :], kind, old, new)


def _multiplied(number: str, factor: int) -> str:
    """ "7-8" times 2 is "14-16"."""
    return re.sub(r"\d+(\.\d+)?", lambda found: f"{float(found[0]) * factor:g}", number)


def _numbers(text: str, rng: random.Random) -> Iterator[NearMiss]:
    for found in re.finditer(r"(?<![\w.\-])\d+(?:\.\d+)?(?:-\d+)?(?![\w]|\.\d)", text):
        old = found[0]
        if re.fullmatch(r"(19|20)\d\d", old) or re.search(r"[Oo]mega $", text[: found.start()]):
            continue
        if re.search(r"[Tt]ype $", text[: found.start()]):
            new = "1" if old == "2" else "2"
        else:
            new = _multiplied(old, rng.choice((2, 3, 4, 10)))
        yield NearMiss(text[: found.start()] + new + text[found.end() :], "number", old, new)
    yield from _swap(text, _NUMBER_WORDS, "number")


def _drugs(text: str, rng: random.Random, taken: str) -> Iterator[NearMiss]:
    pattern = r"\b(" + "|".join(DRUGS) + r")\b(?: \([^)]*\))?"
    for found in re.finditer(pattern, text, re.IGNORECASE):
        free = [d for d in DRUGS if d not in taken.lower()]
        if free:
            new = rng.choice(free).capitalize()
            changed = text[: found.start()] + new + text[found.end() :]
            yield NearMiss(changed, "drug", found[0], new)


def _negations(text: str) -> Iterator[NearMiss]:
    found = _NOT.search(text)
    if found:
        new = "can" if found[0] == "cannot" else found[1]
        changed = text[: found.start()] + new + text[found.end() :]
        yield NearMiss(changed, "negation", found[0], new)
        return
    found = _VERB.search(text)
    if found and not re.search(r"\b(no|not|never|without|nor|unless|if)\b", text, re.IGNORECASE):
        new = _NEGATED[found[0]]
        changed = text[: found.start()] + new + text[found.end() :]
        yield NearMiss(changed, "negation", found[0], new)


def near_misses(text: str, rng: random.Random, *, taken: str = "") -> list[NearMiss]:
    """Every near miss of a text that can be made, in random order, kinds taking turns.

    Args:
        text: one sentence.
        rng: decides order and new values.
        taken: text whose drugs must not be used as a replacement (question, answer, statements).
    """
    makers: dict[str, Callable[[], Iterator[NearMiss]]] = {
        "number": lambda: _numbers(text, rng),
        "unit": lambda: _swap(text, _UNITS, "unit"),
        "frequency": lambda: _swap(text, _FREQUENCIES, "frequency"),
        "direction": lambda: _swap(text, _BOTH_WAYS, "direction"),
        "drug": lambda: _drugs(text, rng, taken + text),
        "negation": lambda: _negations(text),
    }
    piles = []
    for kind in KINDS:
        pile = [m for m in makers[kind]() if m.text != text]
        rng.shuffle(pile)
        piles.append(pile)
    rng.shuffle(piles)
    rounds = max((len(p) for p in piles), default=0)
    return [pile[i] for i in range(rounds) for pile in piles if i < len(pile)]
