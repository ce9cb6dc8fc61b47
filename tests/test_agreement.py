"""κ and the human ceiling: textbook example, scikit-learn, slow twins."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import krippendorff
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
    gwet_ac1,
    human_ceiling,
    krippendorff_alpha,
    pair_agreement,
    votes,
)
from promedical.bench.intervals import Bootstrap
from promedical.bench.metrics import BenchError
from promedical.demo.kqa import load_kqa
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier

sys.path.insert(0, str(Path(__file__).parent / "data"))

from make_irrcac_golden import cases as irrcac_cases
from make_irrcac_golden import values as irrcac_values

IRRCAC = json.loads((Path(__file__).parent / "data" / "irrcac.json").read_text("utf-8"))
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


# --- α, AC1, weighted κ; missing votes ------------------------------------------------------------


def on_all(statistic) -> float:
    """Its value with every instruction drawn once."""
    return float(statistic.values(np.ones((1, 3)))[0])


def ours(labels: np.ndarray, k: int) -> dict[str, float]:
    where = np.arange(len(labels)) % 3
    given = (labels, k, where, 3)
    return {
        "fleiss": on_all(fleiss_kappa(*given)),
        "gwet": on_all(gwet_ac1(*given)),
        "krippendorff": on_all(krippendorff_alpha(*given)),
        "fleiss_linear": on_all(fleiss_kappa(*given, weights="linear")),
        "fleiss_quadratic": on_all(fleiss_kappa(*given, weights="quadratic")),
    }


@pytest.mark.parametrize("name", list(irrcac_cases()))
def test_values_of_irrcac_that_are_kept(name) -> None:
    labels, k = irrcac_cases()[name]
    assert ours(labels, k) == pytest.approx(IRRCAC["values"][name], abs=1e-9)


@pytest.mark.skipif(
    importlib.util.find_spec("irrCAC") is None, reason="irrCAC is not installed: pip --no-deps"
)
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_irrcac_itself_on_votes_with_gaps(seed) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((20, 4)) < 0.3, -1, rng.integers(0, 3, (20, 4)))
    labels = labels[((labels >= 0).sum(axis=1) >= 1)]
    assert ours(labels, 3) == pytest.approx(irrcac_values(labels, 3), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.4]), st.sampled_from(["nominal", "ordinal"]))
def test_alpha_equals_krippendorff_on_every_resample(seed, missing, level) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((15, 4)) < missing, -1, rng.integers(0, 4, (15, 4)))
    labels[0] = [0, 1, 2, 3]
    where = np.arange(15) % 5
    bootstrap = Bootstrap(5, resamples=3)
    got = krippendorff_alpha(labels, 4, where, 5, level=level).values(bootstrap.counts)
    for value, counts in zip(got, bootstrap.counts, strict=True):
        drawn = labels[np.repeat(np.arange(15), counts[where].astype(int))]
        if len(np.unique(drawn[(drawn >= 0).sum(axis=1) >= 2])) < 2 or not (drawn >= 0).any():
            continue
        oracle = krippendorff.alpha(
            reliability_data=np.where(drawn < 0, np.nan, drawn.astype(float)).T,
            value_domain=[0, 1, 2, 3],
            level_of_measurement=level,
        )
        assert value == pytest.approx(oracle, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(columns, st.sampled_from(["linear", "quadratic"]))
def test_weighted_kappa_equals_scikit_learn(labels, weights) -> None:
    where = np.arange(12) % 3
    value = on_all(cohen_kappa(labels[:, 0], labels[:, 1], 3, where, 3, weights=weights))
    oracle = cohen_kappa_score(labels[:, 0], labels[:, 1], labels=[0, 1, 2], weights=weights)
    assert value == pytest.approx(oracle, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(columns)
def test_two_labels_make_every_weight_and_level_one_figure(labels) -> None:
    two = (labels > 0).astype(np.int64)
    found = ours(two, 2)
    assert found["fleiss_linear"] == pytest.approx(found["fleiss"], nan_ok=True)
    assert found["fleiss_quadratic"] == pytest.approx(found["fleiss"], nan_ok=True)
    where = np.arange(12) % 3
    ordinal = on_all(krippendorff_alpha(two, 2, where, 3, level="ordinal"))
    assert ordinal == pytest.approx(found["krippendorff"], nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(columns)
def test_a_column_without_votes_changes_nothing(labels) -> None:
    wider = np.column_stack([labels, np.full(len(labels), -1)])
    assert ours(wider, 3) == pytest.approx(ours(labels, 3), nan_ok=True)
    where = np.arange(12) % 3
    raw = on_all(pair_agreement(wider, 3, where, 3))
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert raw == pytest.approx(np.mean([labels[:, a] == labels[:, b] for a, b in pairs]))


def test_items_without_two_votes_say_so() -> None:
    lonely = np.array([[0, -1], [-1, 1]])
    where = np.zeros(2, dtype=np.int64)
    bootstrap = Bootstrap(1, resamples=5)
    for statistic in (
        fleiss_kappa(lonely, 2, where, 1),
        gwet_ac1(lonely, 2, where, 1),
        krippendorff_alpha(lonely, 2, where, 1),
    ):
        figure = bootstrap.figure(statistic)
        assert (figure.value, figure.reason) == (None, "no item with two votes")
    assert bootstrap.figure(pair_agreement(lonely, 2, where, 1)).reason == "no items"
    empty = np.zeros((0, 2), dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    assert bootstrap.figure(krippendorff_alpha(empty, 2, none, 1)).value is None
    assert bootstrap.figure(cohen_kappa(none, none, 2, none, 1)).reason == "no item with two votes"


def test_only_known_weights_and_levels() -> None:
    with pytest.raises(BenchError, match="expected None, 'linear' or 'quadratic'"):
        cohen_kappa(np.zeros(1, int), np.zeros(1, int), 2, np.zeros(1, int), 1, weights="cubic")
    with pytest.raises(BenchError, match="expected 'nominal' or 'ordinal'"):
        krippendorff_alpha(np.zeros((1, 2), int), 2, np.zeros(1, int), 1, level="interval")


def test_the_first_votes_can_be_read_where_some_items_have_a_third() -> None:
    rows = [voted((E, E), (E, N, N))]
    with pytest.raises(BenchError, match="found 3 votes, expected 2"):
        votes(rows)
    cast = votes(rows, first=2)
    assert cast.labels.tolist() == [[0, 0], [0, 1]]
    with pytest.raises(BenchError, match="found 2 votes, expected 3"):
        votes(rows, first=3)


def test_all_of_kqas_votes_against_the_peers() -> None:
    cast = votes(load_kqa().physicians)
    assert cast.labels.shape == (399, 3)
    alpha = krippendorff.alpha(cast.labels.T, level_of_measurement="nominal")
    where, n = cast.instruction, cast.n_instructions
    bootstrap = Bootstrap(n, resamples=200)
    figure = bootstrap.figure(krippendorff_alpha(cast.labels, 3, where, n))
    assert figure.value == pytest.approx(alpha)
    assert figure.low < figure.value < figure.high
    first = bootstrap.figure(cohen_kappa(cast.labels[:, 0], cast.labels[:, 1], 3, where, n))
    assert first.value == pytest.approx(cohen_kappa_score(cast.labels[:, 0], cast.labels[:, 1]))
