"""Metrics and intervals: against scikit-learn, slow obvious twins, and their invariants."""

from __future__ import annotations

import itertools
import json
import math
import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from promedical.bench import intervals
from promedical.bench.intervals import Bootstrap, Difference, Figure
from promedical.bench.metrics import (
    BenchError,
    Threshold,
    fit_thresholds,
    leaves,
    overall_from_scores,
    overall_from_verdicts,
    overall_pairs,
    reliability,
    response_vetoes,
    within_credit,
    within_pairs,
)
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Preference, Rubric, Tier, Verdict, compare, score

PROFICIENCY, EXCELLENCE, VETO = Tier.PROFICIENCY, Tier.EXCELLENCE, Tier.VETO
GOLD = {"+": Verdict.MET, "-": Verdict.UNMET, "?": Verdict.ABSTAIN}


def row(name: str, *answers: str, tiers: str = "ppev") -> GradedInstruction:
    """An instruction whose answers are verdict strings, one sign a criterion: + met, - unmet, ?."""
    n = tiers.count("p")
    of = {"p": PROFICIENCY, "e": EXCELLENCE, "v": VETO}
    criteria = tuple(
        Criterion(f"{t}{i}", of[t], f"criterion {i}", 1 / n if t == "p" else None)
        for i, t in enumerate(tiers)
    )
    responses = tuple(
        Response(
            f"r{i}",
            "model",
            f"answer {i}",
            {c.id: GOLD[g] for c, g in zip(criteria, a, strict=True)},
        )
        for i, a in enumerate(answers)
    )
    rubric = Rubric(criteria, safety_only=n == 0)
    return GradedInstruction(name, (Message("user", "q"),), "s", "MIT", rubric, responses)


@st.composite
def graded_rows(draw: st.DrawFn) -> list[GradedInstruction]:
    tiers = draw(st.sampled_from(["ppev", "pev", "ppeevv"]))
    answer = st.text("+-?", min_size=len(tiers), max_size=len(tiers))
    answers = draw(st.lists(st.lists(answer, min_size=1, max_size=4), min_size=1, max_size=5))
    return [row(f"q{i}", *a, tiers=tiers) for i, a in enumerate(answers)]


def perfect(rows: list[GradedInstruction]) -> dict[tuple[str, str, str], float]:
    gold = leaves(rows)
    return {key: float(m) for key, m in zip(gold.keys, gold.positive, strict=True)}


# --- statistics and the bootstrap -----------------------------------------------------------------


@st.composite
def scored_items(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    n = draw(st.integers(1, 5))
    size = draw(st.integers(2, 25))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    # Few distinct scores, so that ties occur.
    scores = rng.integers(0, 6, size).astype(float)
    return scores, rng.random(size) < 0.5, rng.integers(0, n, size), n


def drawn(counts: np.ndarray, instruction: np.ndarray) -> np.ndarray:
    """The slow twin's resample: item indices, every item as often as its instruction was drawn."""
    return np.repeat(np.arange(len(instruction)), counts[instruction].astype(int))


@settings(max_examples=10, deadline=None)
@given(scored_items())
def test_statistics_equal_scikit_learn_on_every_resample(items) -> None:
    scores, positive, instruction, n = items
    predicted = scores >= 3
    bootstrap = Bootstrap(n, resamples=3)
    area = intervals.auroc(scores, positive, instruction, n, "x").values(bootstrap.counts)
    balanced = intervals.balanced_accuracy(positive, predicted, instruction, n, "x").values(
        bootstrap.counts
    )
    veto = {
        name: s.values(bootstrap.counts)
        for name, s in intervals.precision_recall_f1(
            positive, predicted, instruction, n, "x"
        ).items()
    }
    credit = intervals.mean(scores / 6, instruction, n, "x").values(bootstrap.counts)
    for b, counts in enumerate(bootstrap.counts):
        at = drawn(counts, instruction)
        y, p, s = positive[at], predicted[at], scores[at]
        assert (math.isnan(credit[b])) == (len(at) == 0)
        if len(at):
            assert credit[b] == pytest.approx((s / 6).mean())
        if y.any() and not y.all():
            assert area[b] == pytest.approx(sk.roc_auc_score(y, s))
            assert balanced[b] == pytest.approx(sk.balanced_accuracy_score(y, p))
        else:
            assert math.isnan(area[b])
            assert math.isnan(balanced[b])
        if p.any():
            assert veto["precision"][b] == pytest.approx(sk.precision_score(y, p))
        else:
            assert math.isnan(veto["precision"][b])
        if y.any():
            assert veto["recall"][b] == pytest.approx(sk.recall_score(y, p))
        if y.any() or p.any():
            assert veto["f1"][b] == pytest.approx(sk.f1_score(y, p))


def slow_interval(seed: int, n: int, resamples: int, metric) -> tuple[float, float]:
    """A loop that draws the instructions, repeats their items, and asks for the metric again."""
    rng = np.random.default_rng(seed)
    values = [metric(rng.multinomial(n, [1 / n] * n)) for _ in range(resamples)]
    low, high = np.percentile([v for v in values if not math.isnan(v)], [2.5, 97.5])
    return float(low), float(high)


def test_interval_and_paired_difference_equal_a_slow_loop() -> None:
    rng = np.random.default_rng(5)
    n, size = 7, 60
    instruction = rng.integers(0, n, size)
    positive = rng.random(size) < 0.4
    a, b = (positive + rng.normal(0, sd, size) for sd in (0.5, 2.0))
    bootstrap = Bootstrap(n, resamples=30, seed=3)

    def area(s: np.ndarray, counts: np.ndarray) -> float:
        at = drawn(counts, instruction)
        return float(sk.roc_auc_score(positive[at], s[at]))

    first, second = (intervals.auroc(s, positive, instruction, n, "x") for s in (a, b))
    figure = bootstrap.figure(first)
    assert figure.value == pytest.approx(sk.roc_auc_score(positive, a))
    low, high = slow_interval(3, n, 30, lambda c: area(a, c))
    assert (figure.low, figure.high) == pytest.approx((low, high))
    difference = bootstrap.difference(first, second)
    low, high = slow_interval(3, n, 30, lambda c: area(a, c) - area(b, c))
    assert (difference.figure.low, difference.figure.high) == pytest.approx((low, high))
    assert difference.figure.value == pytest.approx(difference.first - difference.second)


def test_better_means_that_the_interval_excludes_zero() -> None:
    def outcome(low: float | None, high: float | None) -> str | None:
        value = None if low is None else (low + high) / 2
        return Difference(Figure(value, low, high, 5, "x"), None, None).outcome

    assert outcome(0.01, 0.2) == "better"
    assert outcome(-0.2, -0.01) == "worse"
    assert outcome(0.0, 0.2) == "not distinguished"
    assert outcome(-0.1, 0.2) == "not distinguished"
    assert outcome(None, None) is None


def test_a_grader_is_not_better_than_itself_and_resamples_are_whole_instructions() -> None:
    instruction = np.array([0, 0, 0, 1, 1, 1])
    credit = intervals.mean(np.array([1, 1, 1, 0, 0, 0.0]), instruction, 2, "pairs")
    bootstrap = Bootstrap(2, resamples=500)
    same = bootstrap.difference(credit, credit)
    assert (same.figure.value, same.figure.low, same.figure.high) == (0, 0, 0)
    assert same.outcome == "not distinguished"
    assert set(credit.values(bootstrap.counts)) == {0.0, 0.5, 1.0}
    assert (bootstrap.counts.sum(axis=1) == 2).all()


def test_a_figure_that_is_undefined_says_why() -> None:
    one_class = intervals.auroc(
        np.array([1.0, 2]), np.array([True, True]), np.array([0, 0]), 1, "x"
    )
    figure = Bootstrap(1).figure(one_class)
    assert (figure.value, figure.low, figure.high, figure.n) == (None, None, None, 2)
    assert figure.reason == "only one gold class"
    assert str(figure) == "—"
    assert json.loads(json.dumps(figure.to_json(), allow_nan=False))["value"] is None


def test_resamples_without_both_classes_are_counted_and_left_out() -> None:
    area = intervals.auroc(np.array([1.0, 2]), np.array([False, True]), np.array([0, 1]), 2, "x")
    figure = Bootstrap(2, resamples=400).figure(area)
    assert figure.value == figure.low == figure.high == 1
    assert 120 < figure.undefined_resamples < 280  # half of the draws hold one instruction only


def test_the_bootstrap_is_its_seed_and_refuses_nonsense() -> None:
    assert (Bootstrap(5, seed=1).counts == Bootstrap(5, seed=1).counts).all()
    assert (Bootstrap(5, seed=1).counts != Bootstrap(5, seed=2).counts).any()
    with pytest.raises(ValueError, match="n_instructions: found 0"):
        Bootstrap(0)
    with pytest.raises(ValueError, match=r"confidence: found 95"):
        Bootstrap(3, confidence=95)


# --- leaves ---------------------------------------------------------------------------------------


def test_only_resolved_gold_counts_and_the_rest_is_counted() -> None:
    gold = leaves([row("a", "+-?-", "??++"), row("b", "+++?")])
    assert gold.n_responses == 3
    assert gold.unknown == {PROFICIENCY: 2, EXCELLENCE: 1, VETO: 1}
    assert len(gold.keys) == 12 - 4
    assert gold.positive[gold.index["a", "r1", "v3"]]
    assert set(gold.instruction) == {0, 1}


def test_rows_that_cannot_be_evaluated_are_named() -> None:
    with pytest.raises(BenchError, match="rows: found none"):
        leaves([])
    with pytest.raises(BenchError, match="'a' occurs twice"):
        leaves([row("a", "+-+-"), row("a", "+-+-")])
    bare = GradedInstruction("bare", (Message("user", "q"),), "s", "MIT")
    with pytest.raises(BenchError, match="'bare': rubric: found none"):
        leaves([bare])


def test_scores_that_are_missing_or_not_finite_are_unscored_and_never_a_verdict() -> None:
    rows = [row("a", "+-+-", "-+-+")]
    gold = leaves(rows)
    scores = perfect(rows)
    scores["a", "r0", "p0"] = math.nan
    scores["a", "r0", "v3"] = math.inf
    del scores["a", "r1", "e2"]
    s = gold.scores(scores)
    verdicts = gold.verdicts(s, dict.fromkeys(Tier, Threshold(0.5, "f1", 1.0, 1, 0)))
    missing = [gold.index[k] for k in (("a", "r0", "p0"), ("a", "r0", "v3"), ("a", "r1", "e2"))]
    assert np.isnan(s[missing]).all()
    assert np.isnan(verdicts[missing]).all()
    assert np.isnan(verdicts).sum() == 3


# --- thresholds -----------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(graded_rows(), st.integers(0, 1000))
def test_thresholds_reach_the_best_of_all_cuts_and_take_the_highest(rows, seed) -> None:
    gold = leaves(rows)
    s = np.random.default_rng(seed).integers(-3, 4, len(gold.keys)).astype(float)
    for tier, fitted in fit_thresholds(gold, s).items():
        here = gold.of(tier)
        y, x = gold.positive[here], s[here]
        if y.all() or not y.any():
            assert fitted.value is None
            assert fitted.reason
            continue
        measure = sk.f1_score if tier is VETO else sk.balanced_accuracy_score
        by_cut = {cut: measure(y, x >= cut) for cut in np.arange(-3.5, 4)}
        best = max(by_cut.values())
        assert fitted.objective == pytest.approx(best)
        assert measure(y, x >= fitted.value) == pytest.approx(best)
        highest = max(cut for cut, value in by_cut.items() if value >= best - 1e-12)
        assert ((x >= fitted.value) == (x >= highest)).all()


def test_a_threshold_separates_neighbouring_floats() -> None:
    gold = leaves([row("a", "++++", "----")])
    low = 1.0
    high = float(np.nextafter(low, 2))
    s = np.where(gold.positive, high, low)
    for fitted in fit_thresholds(gold, s).values():
        assert fitted.objective == 1
        assert low < fitted.value <= high


# --- within-criterion pairs -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(graded_rows(), st.integers(0, 1000))
def test_within_criterion_pairs_equal_a_slow_loop(rows, seed) -> None:
    rng = random.Random(seed)
    gold = leaves(rows)
    scores = {key: float(rng.randint(0, 3)) for key in gold.keys if rng.random() > 0.1}
    expected: dict[Tier, list[float]] = {tier: [] for tier in Tier}
    for r in rows:
        for c in r.rubric.criteria:
            for a, b in itertools.combinations(r.responses, 2):
                if {a.verdicts[c.id], b.verdicts[c.id]} != {Verdict.MET, Verdict.UNMET}:
                    continue
                met, unmet = (a, b) if a.verdicts[c.id] is Verdict.MET else (b, a)
                s_met, s_unmet = (scores.get((r.id, y.id, c.id), math.nan) for y in (met, unmet))
                nan = math.isnan(s_met) or math.isnan(s_unmet)
                # The better response of a veto is the one that does not violate it, and r = −s, so
                # the score of the sentence must be higher where it is true, in every tier.
                expected[c.tier].append(
                    math.nan if nan else float(s_met > s_unmet) + 0.5 * (s_met == s_unmet)
                )
    pairs = within_pairs(gold)
    credit = within_credit(gold, pairs, gold.scores(scores))
    for tier in Tier:
        mine = credit[pairs.of(tier)]
        assert len(mine) == len(expected[tier])
        assert np.nansum(mine) == np.nansum(expected[tier])
        assert np.isnan(mine).sum() == np.isnan(expected[tier]).sum()


def test_the_better_response_of_a_veto_pair_is_the_clean_one() -> None:
    gold = leaves([row("a", "++++", "----")])
    pairs = within_pairs(gold)
    for better, worse, tier in zip(pairs.better, pairs.worse, pairs.tier, strict=True):
        clean_or_met = "r1" if tier is VETO else "r0"
        assert gold.keys[better][1] == clean_or_met
        assert gold.keys[worse][1] != clean_or_met


@settings(max_examples=40, deadline=None)
@given(graded_rows())
def test_a_grader_that_never_reads_the_response_gets_exactly_half(rows) -> None:
    gold = leaves(rows)
    pairs = within_pairs(gold)
    s = gold.scores({key: 0.1 * zlib.crc32(key[2].encode()) for key in gold.keys})
    assert (within_credit(gold, pairs, s) == 0.5).all()
    right = gold.scores(perfect(rows))
    assert (within_credit(gold, pairs, right) == 1).all()
    assert (within_credit(gold, pairs, -right) == 0).all()


def test_a_response_score_is_oriented_for_vetoes() -> None:
    gold = leaves([row("a", "+++-", "---+")])
    s = gold.scores_of_responses({("a", "r0"): 2.0, ("a", "r1"): -1.0})
    assert (within_credit(gold, within_pairs(gold), s) == 1).all()


# --- overall --------------------------------------------------------------------------------------


def slow_overall(rows, predicted) -> tuple[list[float], dict[str, int]]:
    """Every pair on its own, straight from section 6."""
    credits, left = [], {"tie": 0, "no_known": 0}
    for r in rows:
        for a, b in itertools.combinations(r.responses, 2):
            known = {
                c.id
                for c in r.rubric.criteria
                if a.verdicts[c.id].resolved and b.verdicts[c.id].resolved
            }
            rubric = r.rubric.restricted_to(known)
            if rubric is None:
                left["no_known"] += 1
                continue
            gold = compare(*(score(rubric, {c: y.verdicts[c] for c in known}) for y in (a, b)))
            if gold is Preference.TIE:
                left["tie"] += 1
                continue
            guess = compare(
                *(score(rubric, {c: predicted(r.id, y.id, c) for c in known}) for y in (a, b))
            )
            decided = guess in (Preference.FIRST, Preference.SECOND)
            credits.append(float(guess is gold) if decided else 0.5)
    return credits, left


@settings(max_examples=50, deadline=None)
@given(graded_rows(), st.integers(0, 1000))
def test_overall_accuracy_equals_a_slow_loop(rows, seed) -> None:
    rng = random.Random(seed)
    gold = leaves(rows)
    guess = {key: rng.choice([0.0, 1.0, 1.0, math.nan]) for key in gold.keys}

    def predicted(*key: str) -> Verdict:
        if math.isnan(guess[key]):
            return Verdict.ERROR
        return Verdict.MET if guess[key] else Verdict.UNMET

    pairs = overall_pairs(rows)
    outcomes = overall_from_verdicts(gold, pairs, np.array([guess[k] for k in gold.keys]))
    credits, left = slow_overall(rows, predicted)
    assert outcomes.credit.tolist() == credits
    assert (pairs.gold_ties, pairs.no_known_proficiency) == (left["tie"], left["no_known"])
    assert pairs.considered == len(credits) + sum(left.values())
    assert pairs.gold_unresolved == 0
    assert outcomes.ties + outcomes.unresolved == credits.count(0.5)
    right = overall_from_verdicts(gold, pairs, gold.positive.astype(float))
    assert (right.credit == 1).all()


def test_one_more_violation_decides_and_a_missing_safety_verdict_leaves_it_open() -> None:
    rows = [row("a", "+++-", "+-+-", "++++")]
    gold, pairs = leaves(rows), overall_pairs(rows)
    assert list(zip(pairs.better, pairs.worse, strict=True)) == [
        (("a", "r0"), ("a", "r1")),
        (("a", "r0"), ("a", "r2")),
        (("a", "r1"), ("a", "r2")),
    ]
    verdicts = gold.positive.astype(float)
    verdicts[gold.index["a", "r0", "v3"]] = math.nan
    outcomes = overall_from_verdicts(gold, pairs, verdicts)
    assert outcomes.credit.tolist() == [0.5, 0.5, 1.0]
    assert outcomes.counts == {
        "right": 1,
        "wrong": 0,
        "tie": 0,
        "unresolved": 2,
        "half_credit_share": 2 / 3,
    }


def test_overall_scores_a_response() -> None:
    pairs = overall_pairs([row("a", "+++-", "+-+-", "++++")])
    outcomes = overall_from_scores(pairs, {("a", "r0"): 1.0, ("a", "r1"): 1.0})
    assert outcomes.credit.tolist() == [0.5, 0.5, 0.5]
    assert (outcomes.ties, outcomes.unresolved) == (1, 2)
    outcomes = overall_from_scores(
        pairs, {("a", f"r{i}"): s for i, s in enumerate((2.0, 1.0, 3.0))}
    )
    assert outcomes.credit.tolist() == [1, 0, 0]


# --- veto by response, reliability ----------------------------------------------------------------


def test_a_response_violates_if_any_known_veto_does() -> None:
    rows = [row("a", "+-+", "+--", "+??", "+?-", tiers="pvv")]
    gold = leaves(rows)
    vetoes = response_vetoes(gold)
    assert vetoes.positive.tolist() == [True, False, False]
    assert vetoes.left_out == 1
    verdicts = gold.positive.astype(float)
    assert vetoes.predicted(verdicts).tolist() == [1, 0, 0]
    verdicts[gold.index["a", "r1", "v1"]] = math.nan
    verdicts[gold.index["a", "r0", "v1"]] = math.nan
    flags = vetoes.predicted(verdicts)
    assert flags[0] == 1
    assert math.isnan(flags[1])


def test_reliability_bins_are_of_equal_mass_and_ece_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(f"q{i}", *("".join(rng.choice(list("+-"), 4)) for _ in range(5))) for i in range(30)
    ]
    gold = leaves(rows)
    s = rng.normal(0, 2, len(gold.keys))
    data, ece = reliability(gold, s, PROFICIENCY)
    assert [b["n"] for b in data["bins"]] == [20] * 15
    p, y = 1 / (1 + np.exp(-s[gold.of(PROFICIENCY)])), gold.positive[gold.of(PROFICIENCY)]
    order = np.argsort(p)
    slow = sum(
        len(part) / len(p) * abs(p[part].mean() - y[part].mean()) for part in np.split(order, 15)
    )
    assert Bootstrap(30, resamples=20).figure(ece).value == pytest.approx(slow)


def test_equal_probabilities_share_a_bin_and_extreme_scores_do_not_overflow() -> None:
    gold = leaves([row("a", "+-+-", "-+-+")])
    data, ece = reliability(gold, np.zeros(len(gold.keys)), PROFICIENCY)
    assert [(b["n"], b["confidence"], b["met"]) for b in data["bins"]] == [(4, 0.5, 0.5)]
    assert Bootstrap(1, resamples=5).figure(ece).value == 0
    s = np.where(gold.positive, 1e5, -1e5)
    data, ece = reliability(gold, s, PROFICIENCY)
    assert Bootstrap(1, resamples=5).figure(ece).value == 0
    s[:] = np.nan
    assert reliability(gold, s, PROFICIENCY)[0] == {"bins": [], "n": 0, "unscored": 4}
