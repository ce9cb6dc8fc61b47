"""κ and the human ceiling: textbook example, scikit-learn, slow twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from promedical.bench.agreement import (
    Votes,
    agreement,
    cohen_kappa,
    fleiss_kappa,
    human_ceiling,
    votes,
)
from promedical.bench.intervals import Bootstrap
from promedical.bench.metrics import BenchError
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier

E, N, C = "Entailment", "Neutral", "Contradiction"

# Ten subjects in five categories by fourteen raters: the worked example of the Fleiss κ literature
# (κ = 0.210, P̄ = 0.378, P̄_e = 0.213).
WORKED_EXAMPLE = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def voted(*items: tuple[str, ...]) -> GradedInstruction:
    n = len(items)
    criteria = tuple(Criterion(f"c{i}", Tier.PROFICIENCY, f"s{i}", 1 / n) for i in range(n))
    cast = {f"c{i}": item for i, item in enumerate(items)}
    return GradedInstruction(
        f"q{hash(items)}",
        (Message("user", "q"),),
        "s",
        "MIT",
        Rubric(criteria),
        (Response("r", "m", "a", votes=cast),),
    )


def as_votes(labels: np.ndarray, n_labels: int) -> Votes:
    size = len(labels)
    keys = tuple(("q", "r", str(i)) for i in range(size))
    names = tuple(f"l{k}" for k in range(n_labels))
    return Votes(keys, np.arange(size) % 3, labels, names, 3)


columns = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).integers(0, 3, (12, 3))
)


def test_fleiss_kappa_of_the_worked_example() -> None:
    labels = np.array([np.repeat(np.arange(5), counts) for counts in WORKED_EXAMPLE])
    subjects = np.arange(10)
    statistic = fleiss_kappa(labels, 5, subjects, 10)
    assert Bootstrap(10, resamples=20).figure(statistic).value == pytest.approx(0.210, abs=5e-4)


def test_perfect_agreement_is_one_and_one_label_only_is_undefined() -> None:
    labels = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    bootstrap = Bootstrap(1, resamples=5)
    where = np.zeros(3, dtype=np.int64)
    assert bootstrap.figure(fleiss_kappa(labels, 3, where, 1)).value == pytest.approx(1)
    assert bootstrap.figure(
        cohen_kappa(labels[:, 0], labels[:, 1], 3, where, 1)
    ).value == pytest.approx(1)
    none = bootstrap.figure(fleiss_kappa(np.zeros((3, 3), dtype=np.int64), 3, where, 1))
    assert (none.value, none.reason) == (None, "one label only")


@settings(max_examples=15, deadline=None)
@given(columns)
def test_cohen_kappa_equals_scikit_learn_on_every_resample(labels) -> None:
    where = np.arange(12) % 4
    bootstrap = Bootstrap(4, resamples=4)
    values = cohen_kappa(labels[:, 0], labels[:, 1], 3, where, 4).values(bootstrap.counts)
    for value, counts in zip(values, bootstrap.counts, strict=True):
        at = np.repeat(np.arange(12), counts[where].astype(int))
        oracle = cohen_kappa_score(labels[at, 0], labels[at, 1], labels=[0, 1, 2])
        assert value == pytest.approx(oracle, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(columns, st.permutations([0, 1, 2]))
def test_fleiss_kappa_does_not_depend_on_who_voted(labels, order) -> None:
    # Each item's votes are permuted on their own: columns are slots, not persons.
    mixed = np.array([item[order] if i % 2 else item for i, item in enumerate(labels)])
    where = np.zeros(12, dtype=np.int64)
    a, b = (fleiss_kappa(x, 3, where, 1).values(np.ones((1, 1)))[0] for x in (labels, mixed))
    assert a == pytest.approx(b, nan_ok=True)


def test_agreement_gives_prevalence_and_raw_agreement_beside_each_kappa() -> None:
    rows = [voted((E, E, N), (E, E, E)), voted((N, N, N), (C, N, C))]
    cast = votes(rows)
    shown = agreement(cast, Bootstrap(2, resamples=20))
    assert shown["labels"] == [C, E, N]
    assert [pair["columns"] for pair in shown["pairs"]] == [[1, 2], [1, 3], [2, 3]]
    assert [pair["raw_agreement"]["value"] for pair in shown["pairs"]] == [0.75, 0.75, 0.5]
    assert shown["pairs"][0]["prevalence"] == [{C: 0.25, E: 0.5, N: 0.25}, {C: 0, E: 0.5, N: 0.5}]
    assert shown["raw_agreement"]["value"] == pytest.approx(2 / 3)
    assert shown["unanimous"]["value"] == 0.5
    assert shown["prevalence"] == pytest.approx({C: 2 / 12, E: 5 / 12, N: 5 / 12})
    assert shown["fleiss_kappa"]["n"] == 4
    binary = agreement(cast.binary(), Bootstrap(2, resamples=20))
    assert binary["labels"] == ["not Entailment", "Entailment"]
    assert [pair["raw_agreement"]["value"] for pair in binary["pairs"]] == [1, 0.75, 0.75]


@settings(max_examples=15, deadline=None)
@given(columns, st.integers(0, 100))
def test_ceiling_equals_a_slow_loop(labels, seed) -> None:
    cast = as_votes((labels > 0).astype(np.int64), 2)
    rng = np.random.default_rng(seed)
    s = rng.normal(size=12)
    verdicts = np.where(rng.random(12) < 0.2, np.nan, (s > 0).astype(float))
    shown = human_ceiling(cast, {"g": (s, verdicts)}, Bootstrap(3, resamples=5))
    stacked = []
    for column in range(3):
        others = [c for c in range(3) if c != column]
        items = [i for i in range(12) if len({cast.labels[i, c] for c in others}) == 1]
        stacked += [(cast.labels[i, others[0]], cast.labels[i, column], verdicts[i]) for i in items]
        gold = [cast.labels[i, others[0]] for i in items]
        mine = [cast.labels[i, column] for i in items]
        physician = shown[f"column_{column + 1}"]["physician"]
        assert physician["accuracy"]["n"] == len(items)
        if items:
            assert physician["accuracy"]["value"] == pytest.approx(np.mean(np.equal(gold, mine)))
        if len(set(gold)) == 2:
            oracle = balanced_accuracy_score(gold, mine)
            assert physician["balanced_accuracy"]["value"] == pytest.approx(oracle)
    grader = shown["all"]["graders"]["g"]
    decided = [(g, p, v) for g, p, v in stacked if not math.isnan(v)]
    assert grader["without_verdict"] == len(stacked) - len(decided)
    if len({g for g, _, _ in decided}) == 2:
        gold, physicians, predicted = zip(*decided, strict=True)
        assert grader["balanced_accuracy"]["value"] == pytest.approx(
            balanced_accuracy_score(gold, predicted)
        )
        # The difference is on the items that the grader has a verdict on.
        assert grader["balanced_accuracy_minus_physician"]["second"] == pytest.approx(
            balanced_accuracy_score(gold, physicians)
        )


def test_votes_that_cannot_be_used_are_named() -> None:
    with pytest.raises(BenchError, match="'c1': found 2 votes, expected 3"):
        votes([voted((E, E, N), (E, E))])
    with pytest.raises(BenchError, match="votes: found none"):
        votes([])
    cast = votes([voted((E, N, C))])
    with pytest.raises(BenchError, match="expected binary votes"):
        human_ceiling(cast, {}, Bootstrap(1))
