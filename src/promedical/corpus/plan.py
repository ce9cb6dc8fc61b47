"""Decides what the phrase banks put into which response, before a word is written.

Section 7.3 of the method: about half of the responses commit a violation, every violation has its
benign twin at the same place in another response of the instruction, and excellence elements their
neutral twins. Kinds and phrases are dealt from decks, so that each is used about equally often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from promedical.corpus.degrade_config import DegradeConfig
from promedical.corpus.layout import Form
from promedical.corpus.phrases import Bank, Element, fill
from promedical.rubric import Rubric, VetoKind

__all__ = [
    "EMPATHY",
    "ORGANISATION",
    "REFERRAL_UNDOES",
    "SEEK",
    "Decks",
    "Inserted",
    "Plan",
    "plan_responses",
]

EMPATHY = "excellence.empathy"
ORGANISATION = "excellence.organisation"
SEEK = "excellence.when_to_seek_care"
# Kinds that a referral in the same response would undo.
REFERRAL_UNDOES = frozenset({VetoKind.MISSED_EMERGENCY, VetoKind.BEYOND_REMIT})


@dataclass(frozen=True)
class Inserted:
    """A bank element in one response: itself or its twin."""

    element: Element
    twin: bool
    place: str  # start | middle | end

    def text(self, topic: str) -> str:
        """The sentence, slot filled."""
        return fill(self.element.twin if self.twin else self.element.text, topic)


@dataclass(frozen=True)
class Plan:
    """What the phrase banks put into one response, and its form."""

    veto: tuple[Inserted, ...] = ()
    manner: tuple[Inserted, ...] = ()
    form: Form = "plain"

    @property
    def kinds(self) -> frozenset[VetoKind]:
        """Kinds that an element or twin in this response is about."""
        return frozenset(VetoKind(i.element.name) for i in self.veto)

    def texts(self, topic: str) -> list[str]:
        """Every sentence the banks put in, slots filled."""
        return [i.text(topic) for i in (*self.veto, *self.manner)]

    def steps(self) -> list[str]:
        """How `Response.construction` names what is put in."""
        named = [("twin" if i.twin else "violation", i) for i in self.veto]
        named += [("manner_twin" if i.twin else "manner", i) for i in self.manner]
        return [f"{name}:{i.element.describe()}:place={i.place}" for name, i in named]

    @property
    def violated(self) -> frozenset[VetoKind]:
        """Kinds that are violated here."""
        return frozenset(VetoKind(i.element.name) for i in self.veto if not i.twin)


class _Deck:
    """Deals items so that each comes up about equally often."""

    def __init__(self, items: Sequence[object], rng: random.Random) -> None:
        self.items, self.rng = list(items), rng
        self.left: list[object] = []

    def deal(self) -> object:
        """The next item; a new shuffled deck when the last one is used up."""
        if not self.left:
            self.left = list(self.items)
            self.rng.shuffle(self.left)
        return self.left.pop()


class Decks:
    """One deck of kinds, and one of elements for each kind and manner."""

    def __init__(self, bank: Bank, rng: random.Random) -> None:
        self.kinds = _Deck(list(bank.veto), rng)
        self.elements = {
            **{k.value: _Deck(v, rng) for k, v in bank.veto.items()},
            **{m: _Deck(v, rng) for m, v in bank.manner.items()},
        }

    # Bounded, so that a rubric with few kinds cannot loop for ever.
    def kind(self, present: frozenset[VetoKind]) -> VetoKind | None:
        """The next kind among those given, or None."""
        for _ in range(20):
            kind = self.kinds.deal()
            assert isinstance(kind, VetoKind)
            if kind in present:
                return kind
        return None

    def element(self, name: str) -> Element:
        """The next phrase of a kind or manner."""
        element = self.elements[name].deal()
        assert isinstance(element, Element)
        return element


def _plan_veto(
    n: int, decks: Decks, present: frozenset[VetoKind], share: float, rng: random.Random
) -> list[list[Inserted]]:
    """Which response gets which violation or twin: half of them violate, each twin elsewhere."""
    plan: list[list[Inserted]] = [[] for _ in range(n)]
    order = rng.sample(range(n), n)
    half = n // 2 if n % 2 == 0 else n // 2 + rng.randrange(2)
    violating, clean = order[:half], order[half:]
    one_kind = decks.kind(present) if rng.random() < 0.5 else None
    for position, response in enumerate(violating):
        kind = one_kind or decks.kind(present)
        if kind is None:
            return plan
        for extra in range(2 if rng.random() < share else 1):
            if extra:
                kind = decks.kind(present - {VetoKind(i.element.name) for i in plan[response]})
                if kind is None:
                    break
            element = decks.element(kind.value)
            place = rng.choice(("start", "middle", "end"))
            twin_in = clean[position % len(clean)]
            taken = {i.element.name for i in plan[response] + plan[twin_in]}
            if extra and kind.value in taken:
                continue
            plan[response].append(Inserted(element, False, place))
            plan[twin_in].append(Inserted(element, True, place))
    return plan


def plan_responses(
    rubric: Rubric, decks: Decks, config: DegradeConfig, rng: random.Random
) -> list[Plan]:
    """What the banks put into each response of one instruction, for the criteria its rubric has."""
    n = config.responses
    present = frozenset(c.kind for c in rubric.criteria if c.kind is not None)
    ids = {c.id for c in rubric.criteria}
    veto = _plan_veto(n, decks, present, config.second_violation_share, rng)
    used = {VetoKind(i.element.name) for inserted in veto for i in inserted}
    manner: list[list[Inserted]] = [[] for _ in range(n)]
    for name, criterion in (("empathy", EMPATHY), ("when_to_seek_care", SEEK)):
        if criterion not in ids or rng.random() >= config.manner_share:
            continue
        if name == "when_to_seek_care" and used & REFERRAL_UNDOES:
            continue
        order = rng.sample(range(n), n)
        for with_it, with_twin in zip(order[: n // 2], order[n // 2 :], strict=False):
            element = decks.element(name)
            late = rng.random() < (0.2 if name == "empathy" else 0.7)
            place = "end" if late else ("start" if name == "empathy" else "middle")
            manner[with_it].append(Inserted(element, False, place))
            manner[with_twin].append(Inserted(element, True, place))
    forms: list[Form] = ["plain"] * n
    if ORGANISATION in ids and rng.random() < config.manner_share:
        order = rng.sample(range(n), n)
        each = rng.choice((1, 1, 2))
        for response in order[:each]:
            forms[response] = "organised"
        for response in order[each : 2 * each]:
            forms[response] = "run_on"
    return [Plan(tuple(v), tuple(m), f) for v, m, f in zip(veto, manner, forms, strict=True)]
