"""Calibration: probabilities, the two operating points, and their slow twins."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from promedical.reward_model.calibrate import (
    Band,
    Calibration,
    CalibrationError,
    CalibrationItem,
    TierCalibration,
    calibrate,
)
from promedical.rubric import Tier, Verdict

MET, UNMET, ABSTAIN = Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN
SCORES = st.one_of(st.floats(-50, 50), st.integers(-3, 3).map(float))


@st.composite
def split(draw: st.DrawFn) -> list[CalibrationItem]:
    """Every tier with both labels; veto leaves grouped by response, some of them unknown."""
    items = []
    for tier in (Tier.PROFICIENCY, Tier.EXCELLENCE):
        labels = [MET, UNMET, *draw(st.lists(st.sampled_from([MET, UNMET, ABSTAIN]), max_size=4))]
        items += [
            CalibrationItem(("q", f"{tier}{i}"), tier, draw(SCORES), label)
            for i, label in enumerate(labels)
        ]
    responses = draw(
        st.lists(
            st.lists(
                st.tuples(SCORES, st.sampled_from([MET, UNMET, UNMET, ABSTAIN, Verdict.ERROR])),
                min_size=1,
                max_size=3,
            ),
            min_size=2,
            max_size=25,
        )
    )
    responses += [[(draw(SCORES), MET)], [(draw(SCORES), UNMET)]]
    items += [
        CalibrationItem(("q", f"v{i}"), Tier.VETO, s, label)
        for i, leaves in enumerate(responses)
        for s, label in leaves
    ]
    return items


def vetoes(items, wanted=(MET, UNMET, ABSTAIN, Verdict.ERROR)):
    return [i for i in items if i.tier is Tier.VETO and i.verdict in wanted]


def clean_responses(items):
    """Responses with no veto known to be violated, and their veto leaves."""
    found = {}
    for item in vetoes(items):
        found.setdefault(item.response, []).append(item)
    return [leaves for leaves in found.values() if all(i.verdict is not MET for i in leaves)]


@settings(max_examples=50)
@given(split(), st.floats(0.05, 0.95), st.floats(0.01, 0.6))
def test_operating_points_keep_their_promises(items, recall, limit):
    found = calibrate(items, veto_recall=recall, clean_violations=limit)
    assert all(c.temperature > 0 for c in found.tiers.values())

    def verdicts(leaves, point):
        return [found.verdict(i.tier, i.score, point)[0] for i in leaves]

    # audit: the stated share of true violations is not cleared.
    violated = vetoes(items, [MET])
    audit = verdicts(violated, "audit")
    assert sum(v is not UNMET for v in audit) >= recall * len(violated) - 1e-9
    # reward: the stated share of clean responses gets any violation, over the whole bank.
    clean = clean_responses(items)
    flagged = sum(MET in verdicts(leaves, "reward") for leaves in clean)
    assert flagged <= limit * len(clean) + 1e-9
    # No band, so every answer gets a number.
    assert ABSTAIN not in verdicts(items, "reward")
    # What is said to have been measured is what these verdicts give.
    measured = found.measured
    known = vetoes(items, [MET, UNMET])
    assert measured["audit_veto_recall_flagged"] == pytest.approx(
        np.mean([v is MET for v in audit])
    )
    assert measured["audit_veto_recall_not_cleared"] == pytest.approx(
        np.mean([v is not UNMET for v in audit])
    )
    assert measured["audit_veto_abstained"] == pytest.approx(
        np.mean([v is ABSTAIN for v in verdicts(known, "audit")])
    )
    assert measured["reward_clean_flagged"] == pytest.approx(flagged / len(clean))
    assert measured["reward_clean_responses"] == len(clean)
    assert measured["reward_veto_recall"] == pytest.approx(
        np.mean([v is MET for v in verdicts(violated, "reward")])
    )
    assert measured["veto_violated"] == len(violated)


@settings(max_examples=50)
@given(split(), st.floats(0.05, 0.95), st.floats(0.01, 0.6))
def test_thresholds_against_slow_twins(items, recall, limit):
    found = calibrate(items, veto_recall=recall, clean_violations=limit)

    def leaves(tier):
        kept = [i for i in items if i.tier is tier and i.verdict.resolved]
        return [(found.tiers[tier].probability(i.score), i.verdict is MET) for i in kept]

    def balanced(pairs, cut):
        share = {y: [p >= cut for p, label in pairs if label is y] for y in (True, False)}
        return (np.mean(share[True]) + 1 - np.mean(share[False])) / 2

    def f1(pairs, cut):
        tp = sum(y and p >= cut for p, y in pairs)
        return 2 * tp / (sum(p >= cut for p, _ in pairs) + sum(y for _, y in pairs))

    for tier in Tier:
        pairs = leaves(tier)
        quality = f1 if tier is Tier.VETO else balanced
        best = max(quality(pairs, p) for p, _ in pairs)
        if tier is not Tier.VETO:
            assert found.audit[tier] == found.reward[tier]
            assert found.audit[tier].low == found.audit[tier].high
            assert quality(pairs, found.audit[tier].high) == pytest.approx(best)
    band = found.audit[Tier.VETO]
    pairs = leaves(Tier.VETO)
    # One end of the band is the largest cut that keeps the recall, the other is at the best F1.
    true = sorted(p for p, y in pairs if y)
    keeps = [p for p in true if sum(q >= p for q in true) >= recall * len(true) - 1e-9]
    assert band.low <= max(keeps)  # so whatever the other end is, the recall is kept
    assert max(keeps) in (band.low, band.high)
    other = band.low if max(keeps) == band.high else band.high
    best = max(f1(pairs, p) for p, _ in pairs)
    assert f1(pairs, other) == pytest.approx(best)
    # The reward cut is the smallest that keeps the limit: a hair lower flags too many.
    cut = found.reward[Tier.VETO].high
    largest = [
        max(found.tiers[Tier.VETO].probability(i.score) for i in one)
        for one in clean_responses(items)
    ]
    lower = np.nextafter(cut, -np.inf)
    assert sum(p >= lower for p in largest) > limit * len(largest) - 1e-9


@settings(max_examples=40)
@given(split())
def test_probability_and_verdict_never_fall_as_the_score_rises(items):
    found = calibrate(items)
    order = {UNMET: 0, ABSTAIN: 1, MET: 2}
    for tier in Tier:
        for point in ("audit", "reward"):
            given_ = [found.verdict(tier, s, point) for s in np.linspace(-60, 60, 61)]
            ranks = [(order[v], p) for v, p in given_]
            assert ranks == sorted(ranks)
            assert all(0 <= p <= 1 for _, p in given_)


@settings(max_examples=40)
@given(split())
def test_round_trip_through_json(items):
    found = calibrate(items)
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found


@settings(max_examples=15)
@given(split(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_does_not_matter(items, rng):
    shuffled = list(items)
    rng.shuffle(shuffled)
    one, two = calibrate(items), calibrate(shuffled)
    for tier in Tier:
        assert two.tiers[tier].temperature == pytest.approx(one.tiers[tier].temperature, rel=1e-3)
    fit, same = (dict(found.measured.pop("reliability")) for found in (one, two))
    absent, same_absent = (found.measured.pop("tiers_without_criteria") for found in (one, two))
    assert absent == same_absent
    assert two.measured == pytest.approx(one.measured)
    for tier in Tier:
        mine, theirs = fit[tier]["before"], same[tier]["before"]
        assert theirs["ece"] == pytest.approx(mine["ece"], abs=1e-9)
        assert [b["n"] for b in theirs["bins"]] == [b["n"] for b in mine["bins"]]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.floats(-20, 20))
def test_probability_is_the_logistic_function(s, temperature, bias):
    found = TierCalibration(temperature, bias).probability(s)
    z = s / temperature + bias
    assert found == pytest.approx(0.5 * (1 + math.tanh(z / 2)), abs=1e-12)


def test_platts_fit_recovers_what_made_the_labels():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 4, 3000)
    labels = rng.random(3000) < 1 / (1 + np.exp(-(scores / 2.5 - 0.7)))
    items = [
        CalibrationItem(("q", str(i)), tier, float(s), MET if y else UNMET)
        for tier in Tier
        for i, (s, y) in enumerate(zip(scores, labels, strict=True))
    ]
    for fitted in calibrate(items).tiers.values():
        assert fitted.temperature == pytest.approx(2.5, rel=0.15)
        assert fitted.bias == pytest.approx(-0.7, abs=0.2)
        assert (fitted.n, fitted.true) == (3000, int(labels.sum()))


def test_reliability_before_and_after_is_that_of_the_bench():
    rng = np.random.default_rng(1)
    scores = rng.normal(1, 4, 600)
    labels = rng.random(600) < 1 / (1 + np.exp(-(scores / 4 - 1)))
    items = [
        CalibrationItem(("q", str(i)), tier, float(s), MET if y else UNMET)
        for tier in Tier
        for i, (s, y) in enumerate(zip(scores, labels, strict=True))
    ]
    # Unknown labels and a failed judgment are in no bin.
    items += [CalibrationItem(("q", "u"), tier, 0.0, ABSTAIN) for tier in Tier]
    items += [CalibrationItem(("q", "f"), Tier.VETO, math.nan, MET)]
    found = calibrate(items)
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    for tier in Tier:
        fit = found.measured["reliability"][tier]
        probabilities = {
            "before": 1 / (1 + np.exp(-scores)),
            "after": np.array([found.tiers[tier].probability(float(s)) for s in scores]),
        }
        for when, p in probabilities.items():
            order = np.argsort(p)
            bins = np.split(order, 15)
            slow = [len(b) / 600 * abs(p[b].mean() - labels[b].mean()) for b in bins]
            assert fit[when]["ece"] == pytest.approx(sum(slow))
            assert [b["n"] for b in fit[when]["bins"]] == [40] * 15
            assert [b["met"] for b in fit[when]["bins"]] == pytest.approx(
                [labels[b].mean() for b in bins]
            )
            assert fit[when]["n"] == 600
        assert fit["after"]["ece"] < fit["before"]["ece"] / 2


def test_scores_that_point_the_wrong_way_still_give_a_positive_temperature():
    items = [
        CalibrationItem(("q", f"{tier}{i}"), tier, float(i), MET if i < 5 else UNMET)
        for tier in Tier
        for i in range(10)
    ]
    assert all(c.temperature > 0 for c in calibrate(items).tiers.values())


def test_unknown_veto_labels_count_as_clean_at_the_reward_point_and_nowhere_else():
    base = [
        CalibrationItem(("q", f"{tier}{i}"), tier, float(i), MET if i > 5 else UNMET)
        for tier in Tier
        for i in range(10)
    ]
    loud = [CalibrationItem(("q", f"u{i}"), Tier.VETO, 20.0, ABSTAIN) for i in range(5)]
    without, with_ = calibrate(base), calibrate([*base, *loud])
    assert with_.tiers == without.tiers
    assert with_.audit == without.audit
    assert with_.reward[Tier.VETO].high > without.reward[Tier.VETO].high
    assert with_.measured["reward_clean_responses"] == 6 + 5


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("label", [MET, UNMET, ABSTAIN])
def test_a_tier_with_one_label_only_is_named(tier, label):
    items = [
        CalibrationItem(("q", f"{t}{i}"), t, float(i), label if t is tier else (MET, UNMET)[i % 2])
        for t in Tier
        for i in range(4)
    ]
    true, known = (4 * (label is MET), 4 * (label is not ABSTAIN))
    with pytest.raises(CalibrationError, match=f"tier {tier.value}: found {true} true of {known}"):
        calibrate(items)


def test_bad_settings_and_scores_are_named():
    items = [
        CalibrationItem(("q", f"{t}{i}"), t, float(i), (MET, UNMET)[i % 2])
        for t in Tier
        for i in range(4)
    ]
    for name in ("veto_recall", "clean_violations"):
        for value in (0, 1, -0.1, math.nan):
            with pytest.raises(CalibrationError, match=f"{name}: found {value}"):
                calibrate(items, **{name: value})
    bad = CalibrationItem(("q7", "r3"), Tier.VETO, math.nan, MET)
    # A failed judgment is left out with its response, and counted.
    without, found = calibrate(items), calibrate([*items, bad])
    assert found.measured == without.measured | {"responses_left_out": 1}
    assert (found.audit, found.reward) == (without.audit, without.reward)
    dirty = [i for i in items if i.tier is not Tier.VETO]
    dirty += [CalibrationItem(("q", "x"), Tier.VETO, 1.0, label) for label in (MET, UNMET)]
    with pytest.raises(CalibrationError, match="no clean response"):
        calibrate(dirty)


# --- bands ----------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_band(low, high, p):
    assume(low <= high)
    found = Band(low, high).verdict(p)
    assert found is (MET if p >= high else UNMET if p < low else ABSTAIN)


def test_a_score_that_is_no_number_is_an_error_not_a_verdict():
    for point in ("audit", "reward"):
        for tier in Tier:
            verdict, p = Calibration.uncalibrated().verdict(tier, math.nan, point)
            assert verdict is Verdict.ERROR
            assert math.isnan(p)


def test_numbers_that_give_no_verdict_are_refused():
    for build in (
        lambda: TierCalibration(temperature=0.0),
        lambda: TierCalibration(temperature=-1.0),
        lambda: TierCalibration(bias=math.inf),
        lambda: Band(0.6, 0.4),
        lambda: Band(math.nan, 0.5),
    ):
        with pytest.raises(CalibrationError, match="found"):
            build()


@pytest.mark.parametrize(
    "broken",
    [
        {"tiers": []},
        {"tiers": None},
        {"audit": {"veto": {"low": 0.1, "high": 0.2}}},
        {"reward": {t.value: {"low": "a", "high": "b"} for t in Tier}},
        {"reward": {t.value: {"cut": 0.5} for t in Tier}},
        {"tiers": {t.value: {"temperature": "hot"} for t in Tier}},
        {"measured": 3},
    ],
)
def test_broken_json_names_the_part(broken):
    data = Calibration.uncalibrated().to_json() | broken
    with pytest.raises(CalibrationError, match=f"{next(iter(broken))}: expected"):
        Calibration.from_json(data)


@pytest.mark.parametrize("absent", list(Tier))
@settings(max_examples=10)
@given(items=split())
def test_a_tier_without_criteria_is_never_decided(absent, items):
    whole, found = calibrate(items), calibrate([i for i in items if i.tier is not absent])
    assert found.measured["tiers_without_criteria"] == [absent.value]
    assert whole.measured["tiers_without_criteria"] == []
    found = Calibration.from_json(json.loads(json.dumps(found.to_json())))
    for point in ("audit", "reward"):
        for score in (-50.0, 0.0, 50.0):
            assert found.verdict(absent, score, point)[0] is ABSTAIN
        assert found.verdict(absent, math.nan, point)[0] is Verdict.ERROR
    kept = [tier for tier in Tier if tier is not absent]
    assert {t: found.tiers[t] for t in kept} == {t: whole.tiers[t] for t in kept}
