"""Writes responses from a plan: assembled from statements, or edited from the physician's answer.

Section 7.3 of the method. Every sentence is a `Piece` that remembers which statements it says,
touches or denies; `labels` reads the labels off these, and nothing else decides a label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from promedical.corpus.degrade_config import DegradeConfig, DegradeError
from promedical.corpus.dissect import Source, question_of, word_count
from promedical.corpus.labels import CHANGED_MAY_BREACH, label, refers
from promedical.corpus.layout import lay_out, reword
from promedical.corpus.nearmiss import NearMiss, near_misses
from promedical.corpus.phrases import Bank
from promedical.corpus.plan import REFERRAL_UNDOES, Plan
from promedical.corpus.statements import content_words, coverage, stem, words
from promedical.records import Response
from promedical.rubric import Tier

__all__ = ["MODEL", "Piece", "construct"]

MODEL = "constructed"
# A near miss may not come this close to another criterion than its own.
NEAR_MISS_OVERLAP = 0.5
# Fewer sentences than this make neither a list nor a run-on sentence.
LEAST_ITEMS = 2
# A careful estimate for planning; what counts is `DegradeConfig.count_tokens`.
TOKENS_A_WORD = 1.42


@dataclass(frozen=True)
class Piece:
    """One sentence of a response and what it does."""

    text: str
    step: str
    role: str  # statement | near_miss | sentence | replacement | neutral | veto | manner
    free: bool = False  # whether a connective may stand before it
    says: frozenset[int] = frozenset()  # statements it says
    touches: frozenset[int] = frozenset()  # statements it says in part, or says changed
    denies: frozenset[int] = frozenset()  # statements whose only mention it changes


def allowed(text: str, plan: Plan) -> bool:
    """Whether a sentence may stand beside the plan's violations without undoing them."""
    return not (plan.kinds & REFERRAL_UNDOES) or not refers(text)


def _fill_in(
    source: Source, plan: Plan, like: int, used: set[str], rng: random.Random
) -> Piece | None:
    """A sentence of about `like` words that states none of the criteria."""
    pools = [("replacement", source.fillers), ("neutral", source.neutral)]
    if rng.random() < 0.35:
        pools.reverse()
    for role, pool in pools:
        free = [t for t in pool if t not in used and allowed(t, plan)]
        if free:
            free.sort(key=lambda t: (abs(word_count(t) - like), t))
            text = rng.choice(free[:6])
            used.add(text)
            return Piece(text, role, role, free=True)
    return None


def _near_miss(
    source: Source, text: str, own: frozenset[int], rng: random.Random
) -> NearMiss | None:
    """A change of the text that does not happen to state a criterion, or None."""
    taken = f"{question_of(source.row)} {source.row.reference} {' '.join(source.texts)}"
    before = content_words(text)
    weights = source.weights
    for miss in near_misses(text, rng, taken=taken):
        after = content_words(miss.text)
        gained = [
            i
            for i, c in enumerate(source.contents)
            if i not in own
            and coverage(c, after, weights) > coverage(c, before, weights)
            and coverage(c, after) >= NEAR_MISS_OVERLAP
        ]
        if not gained:
            return miss
    return None


def _assembled(
    source: Source, plan: Plan, groups: Sequence[int], room: int,
    config: DegradeConfig, rng: random.Random,
) -> list[Piece]:  # fmt: skip
    """Statements of the given groups; in place of the others near misses and replacements."""
    pieces: list[Piece] = []
    left = room
    for g in groups:
        members = [i for i in source.groups[g] if allowed(source.texts[i], plan)]
        rng.shuffle(members)
        for i in members[: 1 if rng.random() < 0.5 else 2]:
            if word_count(source.texts[i]) <= left:
                text = reword(source.texts[i], rng) if rng.random() < 0.5 else source.texts[i]
                left -= word_count(text)
                others = frozenset(source.group_of[i]) - {i}
                step = f"statement:{source.criteria[i].id}"
                pieces.append(Piece(text, step, "statement", True, frozenset({i}), others))
    out = [g for g in range(len(source.groups)) if g not in groups]
    must = [g for g in out if any(_proficient(source, i) for i in source.groups[g])]
    order = rng.sample(must, len(must)) + rng.sample([g for g in out if g not in must],
                                                      len(out) - len(must))  # fmt: skip
    order += [rng.randrange(len(source.groups)) for _ in range(8)]  # fill up what is left
    seen: set[int] = set()
    used: set[str] = set()
    may_miss = not plan.kinds & CHANGED_MAY_BREACH
    for g in order:
        i = rng.choice(source.groups[g])
        like = word_count(source.texts[i])
        if left < 6:
            break
        piece = None
        fresh = g in out and g not in seen
        if fresh and may_miss and rng.random() < config.near_miss_share and like <= left + 3:
            miss = _near_miss(source, source.texts[i], frozenset({i}), rng)
            if miss is not None and allowed(miss.text, plan):
                text = reword(miss.text, rng) if rng.random() < 0.5 else miss.text
                others = frozenset(source.group_of[i])
                step = f"near_miss:{source.criteria[i].id}:{miss.describe()}"
                piece = Piece(text, step, "near_miss", True, frozenset(), others - {i},
                               frozenset({i}))  # fmt: skip
        if piece is None:
            piece = _fill_in(source, plan, min(like, left), used, rng)
            if piece is not None and fresh:
                piece = Piece(piece.text, f"{piece.role}:for={source.criteria[i].id}", piece.role,
                               True)  # fmt: skip
        seen.add(g)
        if piece is None:
            break
        if word_count(piece.text) <= left + 3:
            pieces.append(piece)
            left -= word_count(piece.text)
    rng.shuffle(pieces)
    return pieces


def _proficient(source: Source, i: int) -> bool:
    return source.criteria[i].tier is Tier.PROFICIENCY


def _of_sentence(source: Source, s: int) -> tuple[frozenset[int], frozenset[int]]:
    says = frozenset(i for i, a in enumerate(source.alignment) if s in a.holding)
    touches = frozenset(i for i, a in enumerate(source.alignment) if s in a.touching)
    # What is not clearly said may be said in other words: its group is touched as well.
    return says, touches | frozenset(j for i in touches for j in source.group_of[i])


def _edited(
    source: Source, plan: Plan, share: float, room: int, config: DegradeConfig,
    rng: random.Random,
) -> list[Piece]:  # fmt: skip
    """The physician's sentences, some of them left out, replaced, or with a detail changed."""
    usable = [s for s, t in enumerate(source.answer) if allowed(t, plan) and word_count(t) <= room]
    keep, taken = set(), 0
    for s in rng.sample(usable, len(usable)):
        size = word_count(source.answer[s])
        if taken + size <= max(room * share, 12):
            keep.add(s)
            taken += size
    pieces: list[Piece] = []
    left = room - taken
    used: set[str] = set()
    may_miss = not plan.kinds & CHANGED_MAY_BREACH
    for s, text in enumerate(source.answer):
        says, touches = _of_sentence(source, s)
        if s in keep:
            changed = None
            if may_miss and rng.random() < config.near_miss_share:
                changed = _near_miss(source, text, says, rng)
            if changed is not None and changed.kind != "negation":
                gone = {stem(w) for w in words(changed.old)} - {stem(w) for w in words(changed.new)}
                denied = frozenset(i for i in says if gone & source.contents[i])
                step = f"near_miss:sentence={s}:{changed.describe()}"
                pieces.append(Piece(changed.text, step, "near_miss", False, frozenset(),
                                     touches - denied, denied))  # fmt: skip
            else:
                step = f"sentence:{s}"
                pieces.append(Piece(text, step, "sentence", False, says, touches))
        elif left >= 8:
            piece = _fill_in(source, plan, min(word_count(text), left), used, rng)
            if piece is not None and word_count(piece.text) <= left:
                pieces.append(Piece(piece.text, f"{piece.role}:for=sentence={s}", piece.role, True))
                left -= word_count(piece.text)
    while left >= 8:
        piece = _fill_in(source, plan, left, used, rng)
        if piece is None or word_count(piece.text) > left:
            break
        pieces.insert(rng.randrange(len(pieces) + 1), piece)
        left -= word_count(piece.text)
    return pieces


def _write(source: Source, bank: Bank, plan: Plan, pieces: list[Piece], rng: random.Random) -> str:
    """The text, elements at their places."""
    body = [(p.text, p.free) for p in pieces]
    opening: list[str] = []
    closing: list[str] = []
    for inserted in (*plan.veto, *plan.manner):
        text = inserted.text(source.condition)
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
        small=source.lower,
        rng=rng,
    )


def _share_out(
    source: Source, n: int, rooms: Sequence[float], rng: random.Random
) -> list[list[int]]:
    """Which groups are said in which response: each in about half, must-haves first."""
    said: list[list[int]] = [[] for _ in range(n)]
    left = list(rooms)
    groups = list(range(len(source.groups)))
    rng.shuffle(groups)
    groups.sort(key=lambda g: not any(_proficient(source, i) for i in source.groups[g]))
    for limit in (1, n // 2):  # everyone once before anyone twice
        for g in groups:
            size = min(word_count(source.texts[i]) for i in source.groups[g])
            while sum(g in s for s in said) < limit:
                fits = [r for r in range(n) if left[r] >= size and g not in said[r]]
                if not fits:
                    break
                r = max(fits, key=lambda r: (left[r] + rng.random() * 8, r))
                said[r].append(g)
                left[r] -= size
    return said


def _fitting(
    source: Source, bank: Bank, plan: Plan, pieces: list[Piece], config: DegradeConfig,
    rng: random.Random,
) -> tuple[str, list[Piece]]:  # fmt: skip
    """The text within the token budget, and the pieces it still holds; fillers go first."""
    state = rng.getstate()
    left = list(pieces)
    while True:
        rng.setstate(state)
        text = _write(source, bank, plan, left, rng)
        size = config.count_tokens(text)
        if size <= config.max_tokens:
            return text, left
        if not left:
            raise DegradeError(
                f"instruction {source.row.id!r}: its phrases alone need {size} tokens, "
                f"max_tokens is {config.max_tokens}"
            )
        spare = [p for p in left if p.role in ("neutral", "replacement")] or left
        left.remove(spare[-1])


def construct(
    source: Source, bank: Bank, plans: Sequence[Plan], edited: Sequence[bool],
    config: DegradeConfig, rng: random.Random,
) -> list[Response]:  # fmt: skip
    """All responses of one instruction, built once."""
    n = len(plans)
    words_in_budget = config.max_tokens / TOKENS_A_WORD
    rooms = []
    for plan in plans:
        taken = sum(map(word_count, plan.texts(source.condition)))
        rooms.append(max(16.0, words_in_budget * rng.uniform(0.8, 1.0) - taken))
    shares = [rng.uniform(0.6, 1.0) for _ in plans]
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
        if len(pieces) < LEAST_ITEMS:
            plan = replace(plan, form="plain")
        text, pieces = _fitting(source, bank, plan, pieces, config, rng)
        style = "edited" if is_edited else "assembled"
        steps = (f"style:{style}", f"form:{plan.form}", *(p.step for p in pieces), *plan.steps())
        verdicts = label(source, plan, pieces, is_edited)
        built.append(Response("r", MODEL, text, verdicts, construction=steps))
    rng.shuffle(built)
    return [
        Response(f"r{k}", MODEL, b.text, b.verdicts, {}, b.construction)
        for k, b in enumerate(built)
    ]
