"""Null graders: they fit on training rows only, and each reads no more than its name says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from promedical.bench.baselines import NULL_GRADERS, null_graders, word_overlap
from promedical.bench.metrics import BenchError, leaves, within_credit, within_pairs
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier, Verdict

MET, UNMET = Verdict.MET, Verdict.UNMET
CRITERIA = (
    Criterion("p.rest", Tier.PROFICIENCY, "Advises rest at home", 0.5),
    Criterion("p.fluids", Tier.PROFICIENCY, "Recommends plenty of fluids", 0.5),
    Criterion("e.warm", Tier.EXCELLENCE, "Shows empathy"),
    Criterion("v.harm", Tier.VETO, "Tells the patient to stop the insulin"),
)
GOOD = "Please rest at home. Drink plenty of fluids. I am sorry that you feel unwell today."
BAD = "Stop the insulin."


class BagOfLetters:
    """An encoder of 26 letter counts."""

    def encode(self, sentences: list[str]) -> np.ndarray:
        return np.array(
            [[text.lower().count(chr(97 + i)) for i in range(26)] for text in sentences]
        )


def row(name: str, *, bad_first: bool = False) -> GradedInstruction:
    """A long good answer without a violation, and a short bad one with it."""
    good = {"p.rest": MET, "p.fluids": MET, "e.warm": MET, "v.harm": UNMET}
    bad = {"p.rest": UNMET, "p.fluids": UNMET, "e.warm": UNMET, "v.harm": MET}
    answers = [Response("good", "m", GOOD, good), Response("bad", "m", BAD, bad)]
    if bad_first:
        answers.reverse()
    return GradedInstruction(
        name, (Message("user", "q"),), "s", "MIT", Rubric(CRITERIA), tuple(answers)
    )


TRAIN = [row(f"t{i}") for i in range(4)]
ROWS = [row("b0"), row("b1", bad_first=True)]


def accuracy(scores, rows=ROWS) -> dict[Tier, float]:
    gold = leaves(rows)
    pairs = within_pairs(gold)
    credit = within_credit(gold, pairs, gold.scores(scores.scores))
    return {tier: float(credit[pairs.of(tier)].mean()) for tier in Tier}


def test_every_null_grader_scores_every_leaf_and_response() -> None:
    graders = null_graders(TRAIN, ROWS, encoder=BagOfLetters())
    assert tuple(graders) == NULL_GRADERS
    leaf_keys = {(r.id, y.id, c.id) for r in ROWS for y in r.responses for c in CRITERIA}
    response_keys = {(r.id, y.id) for r in ROWS for y in r.responses}
    for name, grader in graders.items():
        assert set(grader.scores) == leaf_keys, name
        assert set(grader.overall) == response_keys, name
        assert np.isfinite(list(grader.scores.values())).all(), name
    assert tuple(null_graders(TRAIN, ROWS)) == NULL_GRADERS[:-1]
    log_odds = {name for name, grader in graders.items() if grader.log_odds}
    assert log_odds == {"criterion_alone", "response_alone"}


def test_graders_that_do_not_read_the_response_get_exactly_half() -> None:
    graders = null_graders(TRAIN, ROWS)
    for name in ("criterion_alone", "constant"):
        assert set(accuracy(graders[name]).values()) == {0.5}, name
        for r in ROWS:
            assert graders[name].overall[r.id, "good"] == graders[name].overall[r.id, "bad"], name


def test_response_alone_and_length_do_not_read_the_criterion() -> None:
    graders = null_graders(TRAIN, ROWS)
    for name in ("response_alone", "length", "position"):
        scores = graders[name].scores
        assert scores["b0", "good", "p.rest"] == scores["b0", "good", "p.fluids"], name
    assert set(accuracy(graders["response_alone"]).values()) == {1.0}


def test_the_direction_is_fitted_on_the_training_split_in_every_tier() -> None:
    # In training the better answer is the longer one and comes first; it does not violate.
    graders = null_graders(TRAIN, ROWS)
    words = float(len(GOOD.split()))
    assert graders["length"].scores["b0", "good", "p.rest"] == words
    assert graders["length"].scores["b0", "good", "v.harm"] == -words
    assert graders["length"].overall["b0", "good"] == words
    assert graders["position"].scores["b0", "bad", "p.rest"] == -1
    assert graders["position"].scores["b0", "bad", "v.harm"] == 1
    assert graders["position"].overall["b0", "bad"] == -1
    assert set(accuracy(graders["length"]).values()) == {1.0}
    assert set(accuracy(graders["position"]).values()) == {0.5}  # one row of two is turned round


def test_no_grader_looks_at_the_labels_of_the_rows_it_scores() -> None:
    def turned(r: GradedInstruction) -> GradedInstruction:
        other = {MET: UNMET, UNMET: MET}
        return r.with_responses(
            replace(y, verdicts={c: other[v] for c, v in y.verdicts.items()}) for y in r.responses
        )

    a = null_graders(TRAIN, ROWS, encoder=BagOfLetters())
    b = null_graders(TRAIN, [turned(r) for r in ROWS], encoder=BagOfLetters())
    assert a == b
    turned_train = null_graders([turned(r) for r in TRAIN], ROWS)
    assert turned_train["length"].scores["b0", "good", "p.rest"] == -len(GOOD.split())


def test_random_is_its_seed_and_does_not_depend_on_what_else_is_scored() -> None:
    a = null_graders(TRAIN, ROWS, seed=1)["random"]
    assert a == null_graders(TRAIN, ROWS, seed=1)["random"]
    assert a != null_graders(TRAIN, ROWS, seed=2)["random"]
    alone = null_graders(TRAIN, ROWS[:1], seed=1)["random"].scores
    assert all(a.scores[key] == value for key, value in alone.items())
    many = null_graders(TRAIN, [row(f"x{i}") for i in range(300)])["random"].scores.values()
    assert 0 <= min(many) < 0.02
    assert 0.98 < max(many) < 1
    assert abs(np.mean(list(many)) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("criterion", "response", "share"),
    [
        ("Advises rest at home", "You should REST at your home.", 2 / 3),
        ("Take 2.5 mg", "take 2.5 mg", 1.0),
        ("Take 2.5 mg", "take 5 mg", 2 / 3),
        ("The dose is for headaches", "a headache dose", 1.0),
        ("of the", "of the", 0.0),
        ("Anything", "", 0.0),
    ],
)
def test_word_overlap_counts_content_words(criterion: str, response: str, share: float) -> None:
    assert word_overlap(criterion, response) == pytest.approx(share)


def test_similarity_is_to_the_nearest_sentence_and_an_empty_answer_is_farthest() -> None:
    texts = {"same": "Nothing here. Shows empathy", "other": "zzz", "empty": "  "}
    verdicts = {"e.warm": MET}
    answers = tuple(Response(name, "m", text, verdicts) for name, text in texts.items())
    rows = [ROWS[0].with_responses(answers)]
    scores = null_graders(TRAIN, rows, encoder=BagOfLetters())["static_embedding"].scores
    assert scores["b0", "same", "e.warm"] == pytest.approx(1)
    assert scores["b0", "other", "e.warm"] == 0
    assert scores["b0", "empty", "e.warm"] == -1


def test_a_tier_with_one_class_in_training_gives_no_signal() -> None:
    train = [r.with_responses(r.responses[:1]) for r in TRAIN]
    graders = null_graders(train, ROWS)
    assert set(graders["criterion_alone"].scores.values()) == {0.0}
    assert set(graders["response_alone"].scores.values()) == {0.0}


def test_training_rows_are_never_scored_rows() -> None:
    with pytest.raises(BenchError, match=r"\['t0'\] are in training and scored rows"):
        null_graders(TRAIN, [*ROWS, TRAIN[0]])
    with pytest.raises(BenchError, match="rows: found none"):
        null_graders([], ROWS)


def test_one_id_does_not_stand_for_two_texts() -> None:
    other = ROWS[0].with_responses([Response("good", "m", "Another answer.")])
    with pytest.raises(BenchError, match="'b0': response 'good' has two different texts"):
        null_graders(TRAIN, [*ROWS, other])
    assert null_graders(TRAIN, [*ROWS, ROWS[0]]) == null_graders(TRAIN, ROWS)
