"""Null graders: what a score is worth that never reads the answer, or only skims it (section 6).

| name             | score of (response, criterion)                                      | fit |
|------------------|---------------------------------------------------------------------|-----|
| criterion_alone  | log-odds of a logistic regression on TF-IDF of the criterion's text | yes |
| response_alone   | the same on the response's text; both have one model a tier         | yes |
| length           | number of words of the response                                     | ±   |
| position         | index of the response in its row                                    | ±   |
| constant         | 0                                                                   | no  |
| random           | uniform in [0, 1), from a hash of seed and ids                      | no  |
| word_overlap     | share of the criterion's content words that the response holds      | ±   |
| static_embedding | largest cosine of the criterion with a sentence of the response     | ±   |

± means that only the direction is fitted, one sign a tier: −1 where the AUROC on the training split
is under ½ (for a veto, whose sentence describes a violation, too). Nothing is fitted anywhere else
than on training rows; thresholds come from the calibration split like every grader's.

The overall score of a response is the mean of its oriented leaf scores r = o_c·s over its rubric;
for length and position the feature itself, with the sign that fits the training split's overall
pairs; for random a number of its own. What the scores are worth is left to `evaluate`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from promedical.bench.evaluate import GraderScores
from promedical.bench.intervals import Bootstrap, auroc
from promedical.bench.metrics import (
    BenchError,
    LeafKey,
    Leaves,
    OverallPairs,
    ResponseKey,
    leaves,
    orientation,
    overall_from_scores,
    overall_pairs,
)
from promedical.records import GradedInstruction, Response
from promedical.rubric import Criterion, Tier

__all__ = ["NULL_GRADERS", "Encoder", "null_graders", "word_overlap"]

NULL_GRADERS = (
    "criterion_alone",
    "response_alone",
    "length",
    "position",
    "constant",
    "random",
    "word_overlap",
    "static_embedding",
)

LeafFeature = Callable[[GradedInstruction, Response, Criterion], float]
ResponseFeature = Callable[[GradedInstruction, Response], float]

_WORD = re.compile(r"[^\W_]+(?:[.,]\d+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
# Function words say nothing about what a criterion asks for.
_FUNCTION_WORDS = (
    "a about after all also an and any are as at be because been before but by can could did do "
    "does for from had has have he her his how i if in into is it its may might more most must no "
    "not of on only or other our out over she should so some such than that the their them then "
    "there these they this those through to under up was we were what when which while who will "
    "with would you your"
)
_IGNORED = frozenset(_FUNCTION_WORDS.split())


class Encoder(Protocol):
    """A static text encoder such as `model2vec.StaticModel`."""

    def encode(self, sentences: list[str]) -> NDArray[Any]:
        """[texts, dimensions]."""
        ...


def null_graders(
    train_rows: Sequence[GradedInstruction],
    rows: Sequence[GradedInstruction],
    *,
    encoder: Encoder | None = None,
    seed: int = 0,
) -> dict[str, GraderScores]:
    """Fit every null grader on the training split and score all leaves of other rows.

    Args:
        train_rows: graded rows; no id may also be in `rows`.
        rows: what to score: calibration, bench and physicians' rows together.
        encoder: for static_embedding, which is left out without one.
        seed: of the random grader.

    Returns:
        Name → scores of every (response, criterion) and every response of `rows`.

    Raises:
        BenchError: no training rows, a row without rubric, one in both arguments, or two texts
            under the same instruction and response id.
    """
    shared = {row.id for row in train_rows} & {row.id for row in rows}
    if shared:
        raise BenchError(f"instructions {sorted(shared)[:3]} are in training and scored rows")
    _require_distinct(rows)
    split = _Split(train_rows, leaves(train_rows), overall_pairs(train_rows), rows)
    graders = {
        "criterion_alone": _from_leaves(split, _regression(split, lambda y, c: c.text), True),
        "response_alone": _from_leaves(split, _regression(split, lambda y, c: y.text), True),
        "length": _from_responses(split, lambda row, y: float(len(y.text.split()))),
        "position": _from_responses(split, lambda row, y: float(row.responses.index(y))),
        "constant": _from_leaves(split, lambda row, y, c: 0.0, False),
        "random": GraderScores(
            _leaf_scores(rows, lambda row, y, c: _hash(seed, row.id, y.id, c.id)),
            _response_scores(rows, lambda row, y: _hash(seed, row.id, y.id)),
            False,
        ),
        "word_overlap": _from_leaves(
            split, _directed(split, lambda row, y, c: word_overlap(c.text, y.text)), False
        ),
    }
    if encoder is not None:
        similarity = _similarity([*train_rows, *rows], encoder)
        graders["static_embedding"] = _from_leaves(split, _directed(split, similarity), False)
    return graders


# --- walking rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """Training rows with their items, and the rows to score."""

    train_rows: Sequence[GradedInstruction]
    train: Leaves
    pairs: OverallPairs
    rows: Sequence[GradedInstruction]


def _require_distinct(rows: Sequence[GradedInstruction]) -> None:
    """Scores are kept by id, so one id must not stand for two texts (bench and real answers)."""
    text: dict[ResponseKey, str] = {}
    for row in rows:
        for y in row.responses:
            if text.setdefault((row.id, y.id), y.text) != y.text:
                raise BenchError(
                    f"instruction {row.id!r}: response {y.id!r} has two different texts, "
                    "expected another id for each"
                )


def _leaves_of(
    rows: Sequence[GradedInstruction],
) -> Iterator[tuple[GradedInstruction, Response, Criterion]]:
    for row in rows:
        if row.rubric is None:
            raise BenchError(f"instruction {row.id!r}: rubric: found none, expected one")
        for response in row.responses:
            for criterion in row.rubric.criteria:
                yield row, response, criterion


def _leaf_scores(rows: Sequence[GradedInstruction], of: LeafFeature) -> dict[LeafKey, float]:
    return {(row.id, y.id, c.id): of(row, y, c) for row, y, c in _leaves_of(rows)}


def _response_scores(
    rows: Sequence[GradedInstruction], of: ResponseFeature
) -> dict[ResponseKey, float]:
    return {(row.id, y.id): of(row, y) for row in rows for y in row.responses}


def _from_leaves(split: _Split, s: LeafFeature, log_odds: bool) -> GraderScores:
    """A grader from its leaf scores; overall is the mean of r = o_c·s over the rubric."""
    scores = _leaf_scores(split.rows, s)

    def mean_r(row: GradedInstruction, y: Response) -> float:
        criteria = row.rubric.criteria if row.rubric is not None else ()
        r = [orientation(c.tier) * scores[row.id, y.id, c.id] for c in criteria]
        # fsum, so that equal leaf scores give exactly equal responses.
        return math.fsum(r) / len(r) if r else math.nan

    overall = _response_scores(split.rows, mean_r)
    return GraderScores(scores, overall, log_odds)


# --- features with a fitted direction -------------------------------------------------------------


def _directed(split: _Split, feature: LeafFeature) -> LeafFeature:
    """The feature, negated in tiers where it goes with unmet on the training split."""
    train = split.train
    s = train.scores(_leaf_scores(split.train_rows, feature))
    once = Bootstrap(train.n_instructions, resamples=1)
    signs = {}
    for tier in Tier:
        here = train.of(tier)
        at = train.instruction[here]
        area = auroc(s[here], train.positive[here], at, train.n_instructions, "verdicts")
        value = once.figure(area).value
        signs[tier] = -1 if value is not None and value < 0.5 else 1
    return lambda row, y, c: signs[c.tier] * feature(row, y, c)


def _from_responses(split: _Split, feature: ResponseFeature) -> GraderScores:
    credit = overall_from_scores(split.pairs, _response_scores(split.train_rows, feature)).credit
    sign = -1 if len(credit) and credit.mean() < 0.5 else 1
    directed = _directed(split, lambda row, y, c: feature(row, y))
    return GraderScores(
        _leaf_scores(split.rows, directed),
        _response_scores(split.rows, lambda row, y: sign * feature(row, y)),
        False,
    )


# --- text -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=65_536)
def _words(text: str) -> frozenset[str]:
    """Content words, lower-cased, with a plural's or third person's s cut off."""
    found = (word.lower() for word in _WORD.findall(text))
    return frozenset(
        w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w
        for w in found
        if w not in _IGNORED
    )


def word_overlap(criterion: str, response: str) -> float:
    """Share of the criterion's content words that the response holds; 0 if it has none."""
    wanted = _words(criterion)
    return len(wanted & _words(response)) / len(wanted) if wanted else 0.0


def _similarity(rows: Sequence[GradedInstruction], encoder: Encoder) -> LeafFeature:
    """Largest cosine of the criterion with a sentence of the response; −1 for an empty response."""
    sentences = {
        y.text: [s for s in _SENTENCE_END.split(y.text) if s.strip()]
        for row in rows
        for y in row.responses
    }
    criteria = {c.text for _, _, c in _leaves_of(rows)}
    texts = sorted(criteria.union(*sentences.values()))
    if not texts:
        return lambda row, y, c: -1.0
    vectors = np.asarray(encoder.encode(texts), dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms > 0, norms, 1)
    at = {text: i for i, text in enumerate(texts)}
    matrices = {text: vectors[[at[s] for s in found]] for text, found in sentences.items() if found}

    def similarity(row: GradedInstruction, y: Response, c: Criterion) -> float:
        if y.text not in matrices:
            return -1.0
        return float((matrices[y.text] @ vectors[at[c.text]]).max())

    return similarity


def _hash(*parts: object) -> float:
    """Uniform in [0, 1), the same in every run and whatever else is scored."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# --- regressions on one text ----------------------------------------------------------------------


def _log_odds(texts: Sequence[str], met: Sequence[bool], asked: Sequence[str]) -> dict[str, float]:
    """Logistic regression on TF-IDF of words and word pairs: text → log-odds of met.

    A training text may occur many times with different labels. With one class in training the text
    cannot matter and every score is 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(set(met)) < 2:
        return dict.fromkeys(asked, 0.0)
    weights: dict[tuple[str, bool], int] = {}
    for text, label in zip(texts, met, strict=True):
        weights[text, label] = weights.get((text, label), 0) + 1
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=1)
    try:
        features = vectorizer.fit_transform([text for text, _ in weights])
    except ValueError:  # no text holds a word
        return dict.fromkeys(asked, 0.0)
    model = LogisticRegression(C=1.0, max_iter=1000)
    model.fit(features, [label for _, label in weights], sample_weight=list(weights.values()))
    distinct = sorted(set(asked))
    if not distinct:
        return {}
    return dict(
        zip(distinct, model.decision_function(vectorizer.transform(distinct)).tolist(), strict=True)
    )


def _regression(split: _Split, text_of: Callable[[Response, Criterion], str]) -> LeafFeature:
    """One regression a tier, fitted on one text of every resolved training leaf."""
    train = split.train
    text = {(row.id, y.id, c.id): text_of(y, c) for row, y, c in _leaves_of(split.train_rows)}
    fitted: dict[Tier, dict[str, float]] = {}
    for tier in Tier:
        at = np.flatnonzero(train.of(tier))
        asked = [text_of(y, c) for _, y, c in _leaves_of(split.rows) if c.tier is tier]
        fitted[tier] = _log_odds(
            [text[train.keys[i]] for i in at], train.positive[at].tolist(), asked
        )
    return lambda row, y, c: fitted[c.tier][text_of(y, c)]
