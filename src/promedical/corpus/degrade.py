"""Controlled degradation: responses whose labels follow from how they were made (section 7.3).

From a physician's answer and its statements come several responses an instruction, in two styles:
*assembled* from statements, and *edited* from the physician's own sentences. Statements are left out
and replaced, or changed into near misses; violations and manner elements come from the phrase banks,
each with its twin in another response. A label is met, unmet or abstain, and abstain wherever the
construction does not decide it:

- a statement is met if it is said; unmet if it was left out with its whole group, or changed;
- an inserted violation is violated for its kind, its twin is not; another kind counts as not violated
  only if every veto element in the response leaves it clean and nothing was changed that could breach
  it; a response without veto elements is unknown for every kind;
- manner criteria are decided only where the element or its neutral twin was put in.

Each instruction is built several times, and one construction chosen so that length says nothing
about S1 or S3. Left to others: phrases, grouping, near misses and layout (the modules of these
names), pairs and the overall preference.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from promedical.corpus.layout import Form, as_sentence, lay_out, reword
from promedical.corpus.nearmiss import NearMiss, near_misses
from promedical.corpus.phrases import Bank, Element, Split, fill, load_bank, topic_of
from promedical.corpus.statements import (
    Alignment,
    align,
    content_words,
    coverage,
    group_statements,
    rarity,
    sentences,
    stem,
    words,
)
from promedical.records import GradedInstruction, Response
from promedical.rubric import Criterion, Tier, Verdict, VetoKind

__all__ = ["DegradeConfig", "DegradeError", "DegradeResult", "degrade"]

MODEL = "constructed"
EMPATHY, ORGANISATION, SEEK = (
    "excellence.empathy",
    "excellence.organisation",
    "excellence.when_to_seek_care",
)
# A replacement may hold at most this share of a criterion's content words, or of its distinctive ones.
REPLACEMENT_OVERLAP = 0.5
# Kinds that a changed drug, number or direction could breach.
_CHANGED_MAY_BREACH = frozenset(
    {VetoKind.SEVERE_HALLUCINATION, VetoKind.HARMFUL_ADVICE, VetoKind.MISSED_EMERGENCY}
)
# Kinds that a referral in the same response would undo.
_REFERRAL_UNDOES = frozenset({VetoKind.MISSED_EMERGENCY, VetoKind.BEYOND_REMIT})
_SEEK = re.compile(
    r"doctor|physician|provider|clinic|surgeon|specialist|hospital|emergenc|urgent|ambulance|911|"
    r"112|seek|medical (?:attention|help|care|advice)|consult|professional|pharmacist|nurse|"
    r"dentist|examin|visit|appointment|immediate|care team|checked",
    re.IGNORECASE,
)
_EMPATHIC = re.compile(
    r"sorry|understand|worr|feel|anxi|concern|afraid|fear|stress|hope|thank|comfort|alone",
    re.IGNORECASE,
)


class DegradeError(ValueError):
    """Rows or settings that cannot be used; the message names the row or the setting."""


def estimate_tokens(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: 1.35 a word, and one a line break."""
    return math.ceil(1.35 * len(text.split())) + text.count("\n")


@dataclass(frozen=True)
class DegradeConfig:
    """Settings of the generator.

    Args:
        responses: responses an instruction, at least 4.
        max_tokens: the most tokens of one response.
        count_tokens: counts them; by default an estimate from words.
        candidates: constructions tried for an instruction, to balance length.
        edited_share: share of responses made from the physician's own text.
        manner_share: how often an instruction plays each manner criterion.
        near_miss_share: how often a left-out statement becomes a near miss.
        second_violation_share: how often a violating response gets a second violation.

    Raises:
        DegradeError: a setting out of its range.
    """

    responses: int = 4
    max_tokens: int = 120
    count_tokens: Callable[[str], int] = estimate_tokens
    candidates: int = 6
    edited_share: float = 0.35
    manner_share: float = 0.45
    near_miss_share: float = 0.4
    second_violation_share: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("responses", 4), ("max_tokens", 60), ("candidates", 1)):
            if getattr(self, name) < least:
                raise DegradeError(f"{name}: found {getattr(self, name)!r}, expected ≥ {least}")
        for name in (
            "edited_share",
            "manner_share",
            "near_miss_share",
            "second_violation_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise DegradeError(f"{name}: found {getattr(self, name)!r}, expected 0 to 1")


@dataclass(frozen=True)
class DegradeResult:
    """Rows with constructed responses, and what became of everything.

    Args:
        rows: the input rows in order, with responses; rows that could not be used have none.
        counts: how many rows, responses, labels by tier and value, discordant pairs by tier,
            construction steps; and the correlations of length with S1 and S3.
    """

    rows: tuple[GradedInstruction, ...]
    counts: dict[str, float]


@dataclass(frozen=True)
class _Piece:
    """One sentence of a response and what it does."""

    text: str
    step: str
    role: str  # statement | near_miss | sentence | replacement | neutral | veto | manner
    free: bool = False  # whether a connective may stand before it
    says: frozenset[int] = frozenset()  # statements it says
    touches: frozenset[int] = frozenset()  # statements it says in part, or says changed
    denies: frozenset[int] = frozenset()  # statements whose only mention it changes


@dataclass(frozen=True)
class _Inserted:
    """A bank element in one response: itself or its twin."""

    element: Element
    twin: bool
    place: str  # start | middle | end


@dataclass(frozen=True)
class _Plan:
    """What the phrase banks put into one response, and its form."""

    veto: tuple[_Inserted, ...] = ()
    manner: tuple[_Inserted, ...] = ()
    form: Form = "plain"

    @property
    def kinds(self) -> frozenset[VetoKind]:
        """Kinds that an element or twin in this response is about."""
        return frozenset(VetoKind(i.element.name) for i in self.veto)

    @property
    def violated(self) -> frozenset[VetoKind]:
        """Kinds that are violated here."""
        return frozenset(VetoKind(i.element.name) for i in self.veto if not i.twin)


@dataclass(frozen=True)
class _Source:
    """An instruction taken apart."""

    row: GradedInstruction
    criteria: tuple[Criterion, ...]  # its statements
    texts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    contents: tuple[frozenset[str], ...]
    weights: Mapping[str, float]
    topic: str
    answer: tuple[str, ...]
    alignment: tuple[Alignment, ...]
    neutral: tuple[str, ...]  # sentences of the bank that state none of the criteria
    fillers: tuple[str, ...]  # statements of similar questions that state none of the criteria
    group_of: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def states_a_criterion(self, text: str) -> bool:
        """Whether a text comes too close to a criterion to stand in for nothing."""
        held = content_words(text)
        return any(
            coverage(c, held) >= REPLACEMENT_OVERLAP
            or coverage(c, held, self.weights) >= REPLACEMENT_OVERLAP
            for c in self.contents
        )


def _is_statement(criterion: Criterion) -> bool:
    return criterion.tier is not Tier.VETO and not criterion.id.startswith("excellence.")


def _question(row: GradedInstruction) -> str:
    return " ".join(m.content for m in row.messages if m.role == "user")


def _statements(row: GradedInstruction) -> tuple[Criterion, ...]:
    return () if row.rubric is None else tuple(c for c in row.rubric.criteria if _is_statement(c))


def _take_apart(rows: Sequence[GradedInstruction], bank: Bank) -> list[_Source]:
    """Each row's statements, groups, answer and fillers from the other rows."""
    about = [
        content_words(
            f"{_question(r)} {r.reference or ''}" + " ".join(c.text for c in _statements(r))
        )
        for r in rows
    ]
    held = Counter(w for words_ in about for w in words_)
    rare = {w: math.log((1 + len(rows)) / n) for w, n in held.items()}
    sources = []
    for number, row in enumerate(rows):
        criteria = _statements(row)
        texts = tuple(as_sentence(c.text) for c in criteria)
        groups = tuple(group_statements(texts))
        answer = tuple(sentences(row.reference or ""))
        source = _Source(
            row=row,
            criteria=criteria,
            texts=texts,
            groups=groups,
            contents=tuple(content_words(t) for t in texts),
            weights=rarity(texts),
            topic=topic_of(_question(row), [c.text for c in criteria] + list(answer)),
            answer=answer,
            alignment=tuple(align(texts, answer)),
            neutral=(),
            fillers=(),
            group_of={i: g for g in groups for i in g},
        )
        likeness = [
            (math.fsum(rare[w] for w in about[number] & about[other]) / math.sqrt(
                max(1.0, math.fsum(rare[w] for w in about[other]))), -other)
            for other in range(len(rows)) if other != number
        ]  # fmt: skip
        pool: list[str] = []
        for _, negative in sorted(likeness, reverse=True):
            for criterion in _statements(rows[-negative]):
                text = as_sentence(criterion.text)
                if not source.states_a_criterion(text) and text not in pool:
                    pool.append(text)
            if len(pool) >= 40:
                break
        neutral = [fill(t, source.topic) for t in bank.neutral]
        neutral = [t for t in neutral if not source.states_a_criterion(t)]
        sources.append(replace(source, fillers=tuple(pool), neutral=tuple(neutral)))
    return sources


class _Deck:
    """Deals items so that each comes up about equally often."""

    def __init__(self, items: Sequence[object], rng: random.Random) -> None:
        self.items, self.rng = list(items), rng
        self.left: list[object] = []

    def deal(self) -> object:
        if not self.left:
            self.left = list(self.items)
            self.rng.shuffle(self.left)
        return self.left.pop()


class _Decks:
    """One deck of kinds, and one of elements for each kind and manner."""

    def __init__(self, bank: Bank, rng: random.Random) -> None:
        self.kinds = _Deck(list(bank.veto), rng)
        self.elements = {
            **{k.value: _Deck(v, rng) for k, v in bank.veto.items()},
            **{m: _Deck(v, rng) for m, v in bank.manner.items()},
        }

    def kind(self, present: frozenset[VetoKind]) -> VetoKind | None:
        for _ in range(20):
            kind = self.kinds.deal()
            assert isinstance(kind, VetoKind)
            if kind in present:
                return kind
        return None

    def element(self, name: str) -> Element:
        element = self.elements[name].deal()
        assert isinstance(element, Element)
        return element


def _plan_veto(
    n: int, decks: _Decks, present: frozenset[VetoKind], share: float, rng: random.Random
) -> list[list[_Inserted]]:
    """Which response gets which violation or twin: half of them violate, each twin elsewhere."""
    plan: list[list[_Inserted]] = [[] for _ in range(n)]
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
                kind = decks.kind(present - {i.element.name for i in plan[response]})  # type: ignore[operator]
                if kind is None:
                    break
            element = decks.element(kind.value)
            place = rng.choice(("start", "middle", "end"))
            twin_in = clean[position % len(clean)]
            if any(i.element.name == kind.value for i in plan[response] + plan[twin_in]):
                if extra or position < len(clean):
                    continue
            plan[response].append(_Inserted(element, False, place))
            plan[twin_in].append(_Inserted(element, True, place))
    return plan


def _plan(source: _Source, decks: _Decks, config: DegradeConfig, rng: random.Random) -> list[_Plan]:
    """What the banks put into each response of one instruction."""
    n = config.responses
    assert source.row.rubric is not None
    present = frozenset(c.kind for c in source.row.rubric.criteria if c.kind is not None)
    ids = {c.id for c in source.row.rubric.criteria}
    veto = _plan_veto(n, decks, present, config.second_violation_share, rng)
    used = {VetoKind(i.element.name) for inserted in veto for i in inserted}
    manner: list[list[_Inserted]] = [[] for _ in range(n)]
    for name, criterion in (("empathy", EMPATHY), ("when_to_seek_care", SEEK)):
        if criterion not in ids or rng.random() >= config.manner_share:
            continue
        if name == "when_to_seek_care" and used & _REFERRAL_UNDOES:
            continue
        order = rng.sample(range(n), n)
        for with_it, with_twin in zip(order[: n // 2], order[n // 2 :], strict=False):
            element = decks.element(name)
            late = rng.random() < (0.2 if name == "empathy" else 0.7)
            place = "end" if late else ("start" if name == "empathy" else "middle")
            manner[with_it].append(_Inserted(element, False, place))
            manner[with_twin].append(_Inserted(element, True, place))
    forms: list[Form] = ["plain"] * n
    if ORGANISATION in ids and rng.random() < config.manner_share:
        order = rng.sample(range(n), n)
        each = rng.choice((1, 1, 2))
        for response in order[:each]:
            forms[response] = "organised"
        for response in order[each : 2 * each]:
            forms[response] = "run_on"
    return [_Plan(tuple(v), tuple(m), f) for v, m, f in zip(veto, manner, forms, strict=True)]


def _word_count(text: str) -> int:
    return len(text.split())


def _allowed(text: str, plan: _Plan) -> bool:
    """Whether a sentence may stand beside the plan's violations without undoing them."""
    return not (plan.kinds & _REFERRAL_UNDOES) or not _SEEK.search(text)


def _fill_in(
    source: _Source, plan: _Plan, like: int, used: set[str], rng: random.Random
) -> _Piece | None:
    """A sentence of about `like` words that states none of the criteria."""
    pools = [("replacement", source.fillers), ("neutral", source.neutral)]
    if rng.random() < 0.35:
        pools.reverse()
    for role, pool in pools:
        free = [t for t in pool if t not in used and _allowed(t, plan)]
        if free:
            free.sort(key=lambda t: (abs(_word_count(t) - like), t))
            text = rng.choice(free[:6])
            used.add(text)
            return _Piece(text, role, role, free=True)
    return None


def _near_miss(
    source: _Source, text: str, own: frozenset[int], rng: random.Random
) -> NearMiss | None:
    """A change of the text that does not happen to state a criterion, or None."""
    taken = f"{_question(source.row)} {source.row.reference} {' '.join(source.texts)}"
    before = content_words(text)
    weights = source.weights
    for miss in near_misses(text, rng, taken=taken):
        after = content_words(miss.text)
        gained = [
            i
            for i, c in enumerate(source.contents)
            if i not in own
            and coverage(c, after, weights) > coverage(c, before, weights)
            and coverage(c, after) >= REPLACEMENT_OVERLAP
        ]
        if not gained:
            return miss
    return None


def _assembled(
    source: _Source, plan: _Plan, groups: Sequence[int], room: int,
    config: DegradeConfig, rng: random.Random,
) -> list[_Piece]:  # fmt: skip
    """Statements of the given groups; in place of the others near misses and replacements."""
    pieces: list[_Piece] = []
    left = room
    for g in groups:
        members = [i for i in source.groups[g] if _allowed(source.texts[i], plan)]
        rng.shuffle(members)
        for i in members[: 1 if rng.random() < 0.5 else 2]:
            if _word_count(source.texts[i]) <= left:
                text = reword(source.texts[i], rng) if rng.random() < 0.5 else source.texts[i]
                left -= _word_count(text)
                others = frozenset(source.group_of[i]) - {i}
                step = f"statement:{source.criteria[i].id}"
                pieces.append(_Piece(text, step, "statement", True, frozenset({i}), others))
    out = [g for g in range(len(source.groups)) if g not in groups]
    must = [g for g in out if any(_proficient(source, i) for i in source.groups[g])]
    order = rng.sample(must, len(must)) + rng.sample([g for g in out if g not in must],
                                                      len(out) - len(must))  # fmt: skip
    order += [rng.randrange(len(source.groups)) for _ in range(8)]  # fill up what is left
    seen: set[int] = set()
    used: set[str] = set()
    may_miss = not plan.kinds & _CHANGED_MAY_BREACH
    for g in order:
        i = rng.choice(source.groups[g])
        like = _word_count(source.texts[i])
        if left < 6:
            break
        piece = None
        fresh = g in out and g not in seen
        if fresh and may_miss and rng.random() < config.near_miss_share and like <= left + 3:
            miss = _near_miss(source, source.texts[i], frozenset({i}), rng)
            if miss is not None and _allowed(miss.text, plan):
                text = reword(miss.text, rng) if rng.random() < 0.5 else miss.text
                others = frozenset(source.group_of[i])
                step = f"near_miss:{source.criteria[i].id}:{miss.describe()}"
                piece = _Piece(text, step, "near_miss", True, frozenset(), others - {i},
                               frozenset({i}))  # fmt: skip
        if piece is None:
            piece = _fill_in(source, plan, min(like, left), used, rng)
            if piece is not None and fresh:
                piece = _Piece(piece.text, f"{piece.role}:for={source.criteria[i].id}", piece.role,
                               True)  # fmt: skip
        seen.add(g)
        if piece is None:
            break
        if _word_count(piece.text) <= left + 3:
            pieces.append(piece)
            left -= _word_count(piece.text)
    rng.shuffle(pieces)
    return pieces


def _proficient(source: _Source, i: int) -> bool:
    return source.criteria[i].tier is Tier.PROFICIENCY


def _of_sentence(source: _Source, s: int) -> tuple[frozenset[int], frozenset[int]]:
    says = frozenset(i for i, a in enumerate(source.alignment) if s in a.holding)
    touches = frozenset(i for i, a in enumerate(source.alignment) if s in a.touching)
    # What is not clearly said may be said in other words: its group is touched as well.
    return says, touches | frozenset(j for i in touches for j in source.group_of[i])


def _edited(
    source: _Source, plan: _Plan, share: float, room: int, config: DegradeConfig,
    rng: random.Random,
) -> list[_Piece]:  # fmt: skip
    """The physician's sentences, some of them left out, replaced, or with a detail changed."""
    usable = [
        s for s, t in enumerate(source.answer) if _allowed(t, plan) and _word_count(t) <= room
    ]
    keep, taken = set(), 0
    for s in rng.sample(usable, len(usable)):
        size = _word_count(source.answer[s])
        if taken + size <= max(room * share, 12):
            keep.add(s)
            taken += size
    pieces: list[_Piece] = []
    left = room - taken
    used: set[str] = set()
    may_miss = not plan.kinds & _CHANGED_MAY_BREACH
    for s, text in enumerate(source.answer):
        says, touches = _of_sentence(source, s)
        if s in keep:
            changed = None
            if may_miss and rng.random() < config.near_miss_share / 2:
                changed = _near_miss(source, text, says, rng)
            if changed is not None and changed.kind != "negation":
                gone = {stem(w) for w in words(changed.old)} - {stem(w) for w in words(changed.new)}
                denied = frozenset(i for i in says if gone & source.contents[i])
                step = f"near_miss:sentence={s}:{changed.describe()}"
                pieces.append(_Piece(changed.text, step, "near_miss", False, frozenset(),
                                     touches - denied, denied))  # fmt: skip
            else:
                step = f"sentence:{s}"
                pieces.append(_Piece(text, step, "sentence", False, says, touches))
        elif left >= 8:
            piece = _fill_in(source, plan, min(_word_count(text), left), used, rng)
            if piece is not None and _word_count(piece.text) <= left:
                pieces.append(
                    _Piece(piece.text, f"{piece.role}:for=sentence={s}", piece.role, True)
                )
                left -= _word_count(piece.text)
    while left >= 8:
        piece = _fill_in(source, plan, left, used, rng)
        if piece is None or _word_count(piece.text) > left:
            break
        pieces.insert(rng.randrange(len(pieces) + 1), piece)
        left -= _word_count(piece.text)
    return pieces


def _write(
    source: _Source, bank: Bank, plan: _Plan, pieces: list[_Piece], rng: random.Random
) -> str:
    """The text, elements at their places."""
    body = [(p.text, p.free) for p in pieces]
    opening: list[str] = []
    closing: list[str] = []
    for inserted in (*plan.veto, *plan.manner):
        text = inserted.element.twin if inserted.twin else inserted.element.text
        text = fill(text, source.topic)
        if inserted.place == "middle" and len(body) > 1:
            body.insert(rng.randrange(1, len(body)), (text, False))
        else:
            side = closing if inserted.place == "end" else opening
            side.insert(rng.randrange(len(side) + 1), text)
    return lay_out(
        opening,
        [t for t, _ in body],
        closing,
        form=plan.form,
        free=[f for _, f in body],
        headings=bank.headings,
        rng=rng,
    )


def _label_statements(
    source: _Source, pieces: Sequence[_Piece], edited: bool
) -> dict[int, Verdict]:
    """Met if said, unmet if its whole group is absent or it was changed, else unknown."""
    says = frozenset(i for p in pieces for i in p.says)
    denies = frozenset(i for p in pieces for i in p.denies)
    touched = frozenset(i for p in pieces for i in p.touches)
    labels = {}
    for i in range(len(source.texts)):
        others = [j for j in source.group_of[i] if j != i]
        group_touched = any(j in says or j in denies or j in touched for j in others)
        located = not edited or bool(source.alignment[i].touching)
        if i in says and i not in denies:
            # A second sentence that holds it changed makes it contradictory.
            changed = any(p.role == "near_miss" and i in p.touches for p in pieces) and edited
            labels[i] = Verdict.ABSTAIN if changed else Verdict.MET
        elif i in denies and i not in says and i not in touched and not group_touched:
            labels[i] = Verdict.UNMET
        elif i in denies or i in touched or group_touched or not located:
            labels[i] = Verdict.ABSTAIN
        else:
            labels[i] = Verdict.UNMET
    return labels


def _label_veto(plan: _Plan, kind: VetoKind, pieces: Sequence[_Piece]) -> Verdict:
    if kind in plan.violated:
        return Verdict.MET
    if not plan.veto:
        return Verdict.ABSTAIN
    if kind in _CHANGED_MAY_BREACH and any(p.role == "near_miss" for p in pieces):
        return Verdict.ABSTAIN
    for inserted in plan.veto:
        clean = inserted.element.twin_clean if inserted.twin else inserted.element.clean
        if kind not in clean and VetoKind(inserted.element.name) is not kind:
            return Verdict.ABSTAIN
    return Verdict.UNMET


def _label_manner(
    criterion_id: str, plan: _Plan, source: _Source, pieces: Sequence[_Piece]
) -> Verdict:
    if criterion_id == ORGANISATION:
        return {"organised": Verdict.MET, "run_on": Verdict.UNMET}.get(plan.form, Verdict.ABSTAIN)
    name = criterion_id.removeprefix("excellence.")
    if criterion_id == SEEK and any(
        i.twin and i.element.name == VetoKind.MISSED_EMERGENCY.value for i in plan.veto
    ):
        return Verdict.MET  # the twin says when to call for help
    mine = [i for i in plan.manner if i.element.name == name]
    if not mine:
        return Verdict.ABSTAIN
    if any(not i.twin for i in mine):
        return Verdict.MET
    pattern = _SEEK if criterion_id == SEEK else _EMPATHIC
    rest = [p.text for p in pieces]
    rest += [i.element.twin if i.twin else i.element.text for i in plan.veto]
    rest += [
        i.element.twin if i.twin else i.element.text for i in plan.manner if i.element.name != name
    ]
    return Verdict.ABSTAIN if any(pattern.search(t) for t in rest) else Verdict.UNMET


def _labels(
    source: _Source, plan: _Plan, pieces: Sequence[_Piece], edited: bool
) -> dict[str, Verdict]:
    assert source.row.rubric is not None
    stated = _label_statements(source, pieces, edited)
    position = {c.id: i for i, c in enumerate(source.criteria)}
    labels = {}
    for criterion in source.row.rubric.criteria:
        if criterion.kind is not None:
            labels[criterion.id] = _label_veto(plan, criterion.kind, pieces)
        elif criterion.id in position:
            labels[criterion.id] = stated[position[criterion.id]]
        elif criterion.tier is Tier.VETO:
            labels[criterion.id] = Verdict.ABSTAIN
        else:
            labels[criterion.id] = _label_manner(criterion.id, plan, source, pieces)
    return labels


def _share_out(
    source: _Source, n: int, rooms: Sequence[float], rng: random.Random
) -> list[list[int]]:
    """Which groups are said in which response: each in about half, must-haves first."""
    said: list[list[int]] = [[] for _ in range(n)]
    left = list(rooms)
    groups = list(range(len(source.groups)))
    rng.shuffle(groups)
    groups.sort(key=lambda g: not any(_proficient(source, i) for i in source.groups[g]))
    for limit in (1, n // 2):  # everyone once before anyone twice
        for g in groups:
            size = min(_word_count(source.texts[i]) for i in source.groups[g])
            while sum(g in s for s in said) < limit:
                fits = [r for r in range(n) if left[r] >= size and g not in said[r]]
                if not fits:
                    break
                r = max(fits, key=lambda r: (left[r] + rng.random() * 8, r))
                said[r].append(g)
                left[r] -= size
    return said


def _construct(
    source: _Source, bank: Bank, plans: Sequence[_Plan], edited: Sequence[bool],
    config: DegradeConfig, rng: random.Random,
) -> list[Response]:  # fmt: skip
    """All responses of one instruction, built once."""
    n = len(plans)
    most = config.max_tokens / 1.45
    rooms = []
    for plan in plans:
        taken = sum(
            _word_count(i.element.twin if i.twin else i.element.text)
            for i in (*plan.veto, *plan.manner)
        )
        rooms.append(max(16.0, most * rng.uniform(0.72, 1.0) - taken))
    shares = [rng.uniform(0.45, 1.0) for _ in plans]
    said = _share_out(
        source, n, [0.0 if e else r * s for r, s, e in zip(rooms, shares, edited, strict=True)], rng
    )
    built = []
    for plan, is_edited, room, share, groups in zip(
        plans, edited, rooms, shares, said, strict=True
    ):
        if is_edited:
            pieces = _edited(source, plan, share, int(room), config, rng)
        else:
            pieces = _assembled(source, plan, groups, int(room), config, rng)
        state = rng.getstate()
        text = _write(source, bank, plan, pieces, rng)
        while config.count_tokens(text) > config.max_tokens and pieces:
            spare = [p for p in pieces if p.role in ("neutral", "replacement")] or pieces
            pieces.remove(spare[-1])
            rng.setstate(state)
            text = _write(source, bank, plan, pieces, rng)
        if config.count_tokens(text) > config.max_tokens:
            raise DegradeError(
                f"instruction {source.row.id!r}: phrases alone need "
                f"{config.count_tokens(text)} tokens, max_tokens is {config.max_tokens}"
            )
        steps = ["style:edited" if is_edited else "style:assembled", f"form:{plan.form}"]
        steps += [p.step for p in pieces]
        steps += [
            f"{'twin' if i.twin else 'violation'}:{i.element.describe()}:place={i.place}"
            for i in plan.veto
        ]
        steps += [
            f"{'manner_twin' if i.twin else 'manner'}:{i.element.describe()}:place={i.place}"
            for i in plan.manner
        ]
        verdicts = _labels(source, plan, pieces, is_edited)
        built.append(Response("r", MODEL, text, verdicts, construction=tuple(steps)))
    rng.shuffle(built)
    return [
        Response(f"r{k}", MODEL, b.text, b.verdicts, {}, b.construction)
        for k, b in enumerate(built)
    ]


@dataclass(frozen=True)
class _Lengths:
    """Sums over responses of (length, S1) and (length, S3), pooled and within instructions."""

    sums: tuple[tuple[float, ...], ...] = ((0.0,) * 6,) * 4

    def plus(self, other: _Lengths, sign: int = 1) -> _Lengths:
        return _Lengths(
            tuple(
                tuple(a + sign * b for a, b in zip(x, y, strict=True))
                for x, y in zip(self.sums, other.sums, strict=True)
            )
        )

    def correlations(self) -> tuple[float, ...]:
        """Pooled S1, pooled S3, within S1, within S3; 0 where there is no variance."""
        found = []
        for n, x, y, xx, yy, xy in self.sums:
            vx, vy = n * xx - x * x, n * yy - y * y
            found.append((n * xy - x * y) / math.sqrt(vx * vy) if min(vx, vy) > 1e-9 else 0.0)
        return tuple(found)


def _lengths(
    row: GradedInstruction, responses: Sequence[Response], count: Callable[[str], int]
) -> _Lengths:
    assert row.rubric is not None
    pairs: list[list[tuple[float, float]]] = [[], []]
    for response in responses:
        size = float(count(response.text))
        known = [
            (c.weight or 0.0, response.verdicts[c.id] is Verdict.MET)
            for c in row.rubric.tier(Tier.PROFICIENCY)
            if response.verdicts[c.id].resolved
        ]
        total = math.fsum(w for w, _ in known)
        if total > 0:
            pairs[0].append((size, math.fsum(w for w, met in known if met) / total))
        violated = sum(response.verdicts[c.id] is Verdict.MET for c in row.rubric.tier(Tier.VETO))
        pairs[1].append((size, float(violated)))
    sums = []
    for centred in (False, True):
        for points in pairs:
            if centred and points:
                mx = math.fsum(x for x, _ in points) / len(points)
                my = math.fsum(y for _, y in points) / len(points)
                points = [(x - mx, y - my) for x, y in points]
            sums.append(
                (
                    float(len(points)),
                    math.fsum(x for x, _ in points),
                    math.fsum(y for _, y in points),
                    math.fsum(x * x for x, _ in points),
                    math.fsum(y * y for _, y in points),
                    math.fsum(x * y for x, y in points),
                )
            )
    return _Lengths(tuple(sums))


def _balance(options: Sequence[Sequence[_Lengths]]) -> list[int]:
    """For each instruction which construction to take, so that length says least about S1 and S3."""
    chosen = [0] * len(options)
    total = _Lengths()
    for option in options:
        total = total.plus(option[0])
    for _ in range(3):  # coordinate descent; converges in two or three rounds
        for number, option in enumerate(options):
            rest = total.plus(option[chosen[number]], -1)
            worst = [max(map(abs, rest.plus(o).correlations())) for o in option]
            chosen[number] = min(range(len(option)), key=lambda k: (worst[k], k))
            total = rest.plus(option[chosen[number]])
    return chosen


def _count(
    rows: Sequence[GradedInstruction], used: Sequence[int], count: Callable[[str], int]
) -> dict[str, float]:
    """What there is: rows, labels, discordant pairs, steps, correlations."""
    counts: Counter[str] = Counter()
    total = _Lengths()
    for number in used:
        row = rows[number]
        assert row.rubric is not None
        total = total.plus(_lengths(row, row.responses, count))
        for criterion in row.rubric.criteria:
            values = [r.verdicts[criterion.id] for r in row.responses]
            for value in values:
                counts[f"labels.{criterion.tier.value}.{value.value}"] += 1
            met, unmet = values.count(Verdict.MET), values.count(Verdict.UNMET)
            counts[f"pairs.{criterion.tier.value}"] += met * unmet
            counts[f"criteria.{criterion.tier.value}"] += 1
            counts[f"criteria.{criterion.tier.value}.discordant"] += bool(met * unmet)
            if criterion.kind is not None or not _is_statement(criterion):
                name = criterion.kind.value if criterion.kind else criterion.id
                counts[f"pairs.{name}"] += met * unmet
                counts[f"labels.{name}.met"] += met
                counts[f"labels.{name}.unmet"] += unmet
        for response in row.responses:
            counts["tokens"] += count(response.text)
            for step in response.construction:
                head = step.split(":")
                name = ".".join(head[:2]) if head[0] in ("style", "form", "violation") else head[0]
                counts[f"steps.{name}"] += 1
    result: dict[str, float] = {
        "instructions": len(rows),
        "instructions.used": len(used),
        "instructions.without_statements": len(rows) - len(used),
        "responses": sum(len(r.responses) for r in rows),
        **dict(sorted(counts.items())),
    }
    names = ("length_s1", "length_s3", "length_s1.within", "length_s3.within")
    for name, value in zip(names, total.correlations(), strict=True):
        result[f"correlation.{name}"] = round(value, 4)
    return result


def degrade(
    rows: Sequence[GradedInstruction],
    *,
    split: Split,
    seed: int,
    config: DegradeConfig | None = None,
) -> DegradeResult:
    """Build labelled responses for every instruction that has statements.

    Args:
        rows: instructions with rubric and reference; replacements come from the other rows, so pass
            one side of a split at a time.
        split: whose phrase families to use, "train" or "bench".
        seed: the same rows, seed and settings give the same responses.
        config: settings.

    Raises:
        DegradeError: a setting out of range, ids that repeat, or phrases that do not fit.
    """
    config = config or DegradeConfig()
    ids = [row.id for row in rows]
    if len(set(ids)) != len(ids):
        raise DegradeError("rows: ids repeat, expected unique ids")
    bank = load_bank(split)
    used = [n for n, row in enumerate(rows) if _statements(row)]
    sources = _take_apart([rows[n] for n in used], bank)
    decks = _Decks(bank, random.Random(f"{seed}:{split}:decks"))
    options: list[list[list[Response]]] = []
    for source in sources:
        rng = random.Random(f"{seed}:{split}:{source.row.id}")
        plans = _plan(source, decks, config, rng)
        can_edit = len(source.answer) >= 3
        edited = [can_edit and rng.random() < config.edited_share for _ in plans]
        options.append(
            [_construct(source, bank, plans, edited, config, rng) for _ in range(config.candidates)]
        )
    measured = [
        [_lengths(s.row, option, config.count_tokens) for option in group]
        for s, group in zip(sources, options, strict=True)
    ]
    done = list(rows)
    for number, group, pick in zip(used, options, _balance(measured), strict=True):
        done[number] = rows[number].with_responses(group[pick])
    return DegradeResult(tuple(done), _count(done, used, config.count_tokens))
