"""Takes an instruction apart for controlled degradation: statements, groups, answer, fillers.

Section 7.3 of the method: a left-out must-have is replaced by an on-topic sentence that states none
of the criteria. Such sentences are statements of the most similar other questions, and neutral
sentences of the phrase bank. What is said where is `construct`'s affair.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from promedical.corpus.layout import as_sentence
from promedical.corpus.phrases import Bank, condition_of, fill, topic_of
from promedical.corpus.statements import (
    Alignment,
    align,
    content_words,
    coverage,
    group_statements,
    rarity,
    sentences,
)
from promedical.records import GradedInstruction
from promedical.rubric import Criterion, Tier

__all__ = ["Source", "is_statement", "question_of", "statements_of", "take_apart", "word_count"]

# A replacement holds less than this share of every criterion's content words, plain and weighted.
REPLACEMENT_OVERLAP = 0.5
# Statements of similar questions to choose replacements from.
FILLERS = 40
# Shorter sentences of an answer ("No.") say nothing without the question.
LEAST_WORDS = 4


def word_count(text: str) -> int:
    """Words between spaces."""
    return len(text.split())


def is_statement(criterion: Criterion) -> bool:
    """Whether a criterion is a statement of the question, not one that every rubric shares."""
    return criterion.tier is not Tier.VETO and not criterion.id.startswith("excellence.")


def question_of(row: GradedInstruction) -> str:
    """All that the user said."""
    return " ".join(m.content for m in row.messages if m.role == "user")


def statements_of(row: GradedInstruction) -> tuple[Criterion, ...]:
    """The criteria of a row that are statements."""
    return () if row.rubric is None else tuple(c for c in row.rubric.criteria if is_statement(c))


@dataclass(frozen=True)
class Source:
    """An instruction taken apart."""

    row: GradedInstruction
    criteria: tuple[Criterion, ...]  # its statements
    texts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    contents: tuple[frozenset[str], ...]
    weights: Mapping[str, float]
    topic: str  # what the question is about, for neutral sentences
    condition: str  # the same if a person can have it, else "this", for the other phrases
    answer: tuple[str, ...]
    alignment: tuple[Alignment, ...]
    neutral: tuple[str, ...]  # sentences of the bank that state none of the criteria
    fillers: tuple[str, ...]  # statements of similar questions that state none of the criteria
    lower: frozenset[str]  # words that are no names: the split's texts write them small
    group_of: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def close_to(self, text: str, threshold: float = REPLACEMENT_OVERLAP) -> list[int]:
        """The statements of whose content words a text holds at least this share."""
        held = content_words(text)
        return [
            i
            for i, c in enumerate(self.contents)
            if max(coverage(c, held), coverage(c, held, self.weights)) >= threshold
        ]

    def states_a_criterion(self, text: str) -> bool:
        """Whether a text comes too close to a criterion to stand in for nothing."""
        return bool(self.close_to(text))


def _lower_case_words(rows: Sequence[GradedInstruction], bank: Bank) -> frozenset[str]:
    """Words that are no names: in lower case somewhere, or first in a sentence without names."""
    texts = [t for r in rows for t in (r.reference or "", *(c.text for c in statements_of(r)))]
    small = {w for t in (*texts, *bank.texts()) for w in re.findall(r"(?<![\w-])[a-z]+", t)}
    plain = [*bank.neutral, *(t for g in bank.manner.values() for e in g for t in (e.text, e.twin))]
    return frozenset(small | {t.split()[0].lower() for t in plain}) - {"i", "i'm"}


def _editable(reference: str) -> tuple[str, ...]:
    """The sentences of an answer, or none if it holds lists: an item means nothing by itself."""
    if re.search(r"^\s*(?:[-*•]|\d+[.)]\s)", reference, re.MULTILINE):
        return ()
    return tuple(s for s in sentences(reference) if word_count(s) >= LEAST_WORDS)


def _by_likeness(
    number: int, about: Sequence[frozenset[str]], rare: Mapping[str, float]
) -> list[int]:
    """The other rows, the most similar first: shared rare words, long texts discounted."""

    def likeness(other: int) -> float:
        size = math.fsum(rare[w] for w in about[other])
        return math.fsum(rare[w] for w in about[number] & about[other]) / math.sqrt(max(1.0, size))

    others = [other for other in range(len(about)) if other != number]
    return sorted(others, key=lambda other: (-likeness(other), other))


def take_apart(rows: Sequence[GradedInstruction], bank: Bank) -> list[Source]:
    """Each row's statements, groups, answer and fillers from the other rows."""
    lower = _lower_case_words(rows, bank)
    about = [
        content_words(
            f"{question_of(r)} {r.reference or ''}" + " ".join(c.text for c in statements_of(r))
        )
        for r in rows
    ]
    held = Counter(w for words_ in about for w in words_)
    rare = {w: math.log((1 + len(rows)) / n) for w, n in held.items()}
    sources = []
    for number, row in enumerate(rows):
        criteria = statements_of(row)
        texts = tuple(as_sentence(c.text) for c in criteria)
        groups = tuple(group_statements(texts))
        answer = _editable(row.reference or "")
        topic = topic_of(question_of(row), [*texts, *answer])
        source = Source(
            row=row,
            criteria=criteria,
            texts=texts,
            groups=groups,
            contents=tuple(content_words(t) for t in texts),
            weights=rarity(texts),
            topic=topic,
            condition=condition_of(topic, [*texts, *answer]),
            answer=answer,
            alignment=tuple(align(texts, answer)),
            neutral=(),
            fillers=(),
            lower=lower,
            group_of={i: g for g in groups for i in g},
        )
        pool: list[str] = []
        for other in _by_likeness(number, about, rare):
            for criterion in statements_of(rows[other]):
                text = as_sentence(criterion.text)
                if not source.states_a_criterion(text) and text not in pool:
                    pool.append(text)
            if len(pool) >= FILLERS:
                break
        neutral = [fill(t, source.topic) for t in bank.neutral]
        neutral = [t for t in neutral if not source.states_a_criterion(t)]
        sources.append(replace(source, fillers=tuple(pool), neutral=tuple(neutral)))
    return sources
