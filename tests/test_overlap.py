"""Overlap between sides, against a slow twin, and K-QA's own sides."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.corpus.banks import with_universal
from promedical.corpus.overlap import LIMITS, Limit, find_overlaps, normalise
from promedical.demo.kqa import load_kqa
from promedical.demo.models import cached_encoder, resolve_encoder
from promedical.records import GradedInstruction, Message
from promedical.rubric import Criterion, Rubric, Tier

WORDS = ("lisinopril", "eczema", "headache", "vaccination", "sunburn")
ANY = {name: Limit(jaccard=0.0, cosine=2.0) for name in LIMITS}


def row(row_id, question, reference=None, statements=()):
    criteria = tuple(
        Criterion(f"s{i}", Tier.PROFICIENCY, text, weight=1 / len(statements))
        for i, text in enumerate(statements)
    )
    rubric = with_universal(Rubric(criteria)) if criteria else None
    return GradedInstruction(
        id=row_id,
        messages=(Message("user", question),),
        source="test",
        licence="none",
        rubric=rubric,
        reference=reference,
    )


def slow_jaccard(a: str, b: str) -> float:
    def grams(text):
        padded = " " + " ".join(re.findall(r"\w+|[<>≤≥=%+]", text.casefold())) + " "
        return {padded[i : i + 4] for i in range(max(1, len(padded) - 3))}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


words = st.text(alphabet="ab c<.É", min_size=1, max_size=12).filter(normalise)


@given(st.lists(words, min_size=1, max_size=5), st.lists(words, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_jaccard_equals_the_obvious_way(first, second):
    a = [row(f"a{i}", text) for i, text in enumerate(first)]
    b = [row(f"b{i}", text) for i, text in enumerate(second)]
    report = find_overlaps(a, b, limits=ANY)
    got = {(o.first, o.second): o.jaccard for o in report.over}
    assert got == {
        (f"a{i}", f"b{j}"): pytest.approx(slow_jaccard(x, y), abs=1e-4)
        for i, x in enumerate(first)
        for j, y in enumerate(second)
    }
    assert report.compared["question"] == len(first) * len(second)
    assert report.closest[0].jaccard == max(got.values())


def test_equal_text_but_for_case_and_punctuation_is_an_overlap():
    report = find_overlaps([row("a", "Is Flu  contagious?")], [row("b", "is flu contagious")])
    (overlap,) = report.over
    assert (overlap.field, overlap.first, overlap.second) == ("question", "a", "b")
    assert overlap.jaccard == 1.0
    assert overlap.cosine is None


def test_answers_and_statements_are_compared_but_universal_criteria_are_not():
    a = row("a", "One?", "Rest and drink enough water.", ["Rest is advised.", "Drink water daily."])
    b = row("b", "Quite other", "Rest, and drink enough water!", ["Rest is advised"])
    report = find_overlaps([a], [b])
    assert sorted(o.field for o in report.over) == ["criterion", "reference"]
    assert report.compared == {"question": 1, "reference": 1, "criterion": 2}


def test_more_rows_than_a_block(monkeypatch):
    monkeypatch.setattr("promedical.corpus.overlap._BLOCK", 2)
    a = [row(f"a{i}", f"{word}") for i, word in enumerate(WORDS)]
    report = find_overlaps(a, [row("b", a[4].messages[0].content)])
    assert [(o.first, o.second, o.jaccard) for o in report.over] == [("a4", "b", 1.0)]


class Directions:
    """An encoder for which only the first letter counts."""

    def encode(self, sentences):
        return np.array([[3.0, 0.0] if s.startswith("a") else [0.0, 2.0] for s in sentences])


def test_the_encoder_finds_other_wordings():
    a, b = [row("a", "alpha one")], [row("b", "another thing"), row("c", "zeta")]
    assert not find_overlaps(a, b).over
    report = find_overlaps(a, b, encoder=Directions())
    assert [(o.second, o.cosine) for o in report.over] == [("b", 1.0)]


def test_nothing_to_compare():
    report = find_overlaps([], [row("b", "Question")])
    assert report.over == ()
    assert report.closest == ()
    assert report.compared == {"question": 0, "reference": 0, "criterion": 0}


def sides():
    kqa = load_kqa()
    bench = kqa.bench + kqa.physicians
    return [
        (kqa.train, bench),
        (kqa.calibration, bench),
        (kqa.train, kqa.calibration),
    ]


def test_the_demo_corpus_has_no_overlap_between_its_sides():
    for first, second in sides():
        report = find_overlaps(first, second)
        assert report.over == ()
        assert report.compared["question"] == len(first) * len(second)


@pytest.mark.skipif(cached_encoder() is None, reason="the embedded encoder is not in the cache")
def test_the_demo_corpus_has_no_overlap_by_meaning_either():
    encoder = resolve_encoder()
    for first, second in sides():
        report = find_overlaps(first, second, encoder=encoder)
        assert report.over == ()
        assert all(overlap.cosine is not None for overlap in report.closest)
