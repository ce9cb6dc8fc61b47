"""The one evaluation call: layout, the perfect and the missing grader, paired differences."""

from __future__ import annotations

import json
import math
import random

import pytest

from promedical.bench.evaluate import GraderScores, evaluate, physicians
from promedical.bench.metrics import BenchError
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier, Verdict

CRITERIA = (
    Criterion("p0", Tier.PROFICIENCY, "first", 0.5),
    Criterion("p1", Tier.PROFICIENCY, "second", 0.5),
    Criterion("e0", Tier.EXCELLENCE, "third"),
    Criterion("v0", Tier.VETO, "fourth"),
    Criterion("v1", Tier.VETO, "fifth"),
)


def rows(prefix: str, n: int) -> list[GradedInstruction]:
    rng = random.Random(prefix)

    def answer(i: int) -> Response:
        verdicts = {c.id: rng.choice((Verdict.MET, Verdict.UNMET)) for c in CRITERIA}
        verdicts["v1"] = rng.choice((Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN))
        return Response(f"r{i}", "m", f"answer {i}", verdicts)

    return [
        GradedInstruction(
            f"{prefix}{i}",
            (Message("user", "q"),),
            "s",
            "MIT",
            Rubric(CRITERIA),
            tuple(answer(j) for j in range(4)),
        )
        for i in range(n)
    ]


BENCH, CALIBRATION = rows("b", 12), rows("c", 6)


def noisy(sd: float, *, over=(*BENCH, *CALIBRATION), seed: int = 0) -> dict:
    rng = random.Random(seed)
    return {
        (r.id, y.id, c.id): (1.0 if y.verdicts.get(c.id) is Verdict.MET else -1.0)
        + rng.gauss(0, sd)
        for r in over
        for y in r.responses
        for c in r.rubric.criteria
    }


def by_response(over=(*BENCH, *CALIBRATION)) -> dict:
    def worth(y: Response) -> float:
        met = {c for c, v in y.verdicts.items() if v is Verdict.MET}
        return len(met & {"p0", "p1"}) + 0.1 * ("e0" in met) - 10 * len(met & {"v0", "v1"})

    return {(r.id, y.id): worth(y) for r in over for y in r.responses}


GRADERS = {
    "explicit": GraderScores(noisy(0.0), by_response()),
    "noise": GraderScores(noisy(1e6, seed=1)),
    "scalar": GraderScores(None, by_response()),
}


@pytest.fixture(scope="module")
def result() -> dict:
    return evaluate(BENCH, CALIBRATION, GRADERS, resamples=300)


FIGURE = {"value", "low", "high", "n", "unit", "instructions", "undefined_resamples", "reason"}


def shape(value: object) -> object:
    """The layout: nested keys, a figure as "figure", a difference as "difference"."""
    if isinstance(value, dict):
        if set(value) == FIGURE:
            return "figure"
        if set(value) == FIGURE | {"first", "second", "outcome"}:
            return "difference"
        return {key: shape(inner) for key, inner in value.items()}
    return None if not isinstance(value, list) else ["…"]


def test_the_layout_is_plain_json_and_does_not_change_unnoticed(result) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    tier = dict.fromkeys(("accuracy", "balanced_accuracy", "auroc", "within_criterion"), "figure")
    tiers = ("proficiency", "excellence", "veto")
    veto = {"precision": "figure", "recall": "figure", "f1": "figure", "unscored": None}
    outcomes = dict.fromkeys(("right", "wrong", "tie", "unresolved", "half_credit_share"))
    diagram = {"bins": ["…"], "n": None, "unscored": None, "ece": "figure"}
    threshold = dict.fromkeys(("value", "rule", "objective", "n", "unscored", "reason"))
    assert shape(result["graders"]["explicit"]) == {
        "kind": None,
        "ranking_source": None,
        "thresholds": dict.fromkeys(tiers, threshold),
        "tiers": dict.fromkeys(tiers, tier | {"unscored": None, "unscored_pairs": None}),
        "veto": {"per_criterion": veto, "per_response": veto},
        "overall": {"accuracy": "figure", "outcomes": outcomes, "source": None},
        "overall_leaf": {"accuracy": "figure", "outcomes": outcomes},
        "reliability": dict.fromkeys(tiers, diagram),
    }
    assert shape(result["differences"]["noise"]) == {
        "overall_accuracy": "difference",
        "overall_leaf_accuracy": "difference",
        "veto_f1": "difference",
        "within_criterion": dict.fromkeys(tiers, "difference"),
        "auroc": dict.fromkeys(tiers, "difference"),
    }
    assert set(result) == {"settings", "gold", "graders", "differences"}


def test_a_perfect_grader_has_one_everywhere_and_is_better_than_noise(result) -> None:
    perfect = result["graders"]["explicit"]
    for row in perfect["tiers"].values():
        for name in ("accuracy", "balanced_accuracy", "auroc", "within_criterion"):
            assert row[name]["value"] == row[name]["low"] == 1
    for unit in perfect["veto"].values():
        assert unit["f1"]["value"] == 1
    assert perfect["overall"]["accuracy"]["value"] == 1
    assert perfect["overall"]["source"] == "verdicts"
    difference = result["differences"]["noise"]
    for shown in (
        difference["overall_accuracy"],
        difference["veto_f1"],
        *difference["within_criterion"].values(),
        *difference["auroc"].values(),
    ):
        assert shown["outcome"] == "better"
        assert shown["value"] == pytest.approx(shown["first"] - shown["second"])


def test_a_scalar_grader_has_no_verdicts_but_ranks(result) -> None:
    scalar = result["graders"]["scalar"]
    assert scalar["kind"] == "scalar"
    assert scalar["thresholds"] == {}
    assert scalar["reliability"] is None
    for row in scalar["tiers"].values():
        assert row["accuracy"]["value"] is None
        assert row["balanced_accuracy"]["reason"] == "the grader gives no verdicts"
        assert row["within_criterion"]["value"] is not None
    assert scalar["veto"]["per_criterion"]["f1"]["value"] is None
    assert scalar["overall"]["source"] == "overall score"
    assert scalar["overall"]["accuracy"] == scalar["overall_leaf"]["accuracy"]
    assert scalar["overall"]["accuracy"]["value"] > 0.9
    assert result["differences"]["scalar"]["veto_f1"]["value"] is None
    assert result["differences"]["scalar"]["overall_accuracy"]["value"] is not None
    assert result["graders"]["noise"]["overall_leaf"] is None
    assert result["differences"]["noise"]["overall_leaf_accuracy"]["value"] is None


def test_counts_of_gold_add_up(result) -> None:
    gold = result["gold"]
    veto = gold["bench"]["verdicts"]["veto"]
    assert gold["bench"]["responses"] == 48
    assert veto["resolved"] + veto["unknown"] == 48 * 2
    pairs = gold["overall_pairs"]
    left = pairs["gold_tie"] + pairs["gold_unresolved"] + pairs["no_known_proficiency"]
    assert pairs["considered"] == 12 * 6 == pairs["used"] + left
    for grader in result["graders"].values():
        outcomes = grader["overall"]["outcomes"]
        assert sum(outcomes[k] for k in ("right", "wrong", "tie", "unresolved")) == pairs["used"]
        assert grader["overall"]["accuracy"]["n"] == pairs["used"]


def test_missing_leaves_are_counted_and_compared_on_what_both_have() -> None:
    scores = noisy(0.0)
    dropped = [key for key in scores if key[0] in ("b0", "b1")]
    holes = {key: math.nan if key in dropped else s for key, s in scores.items()}
    graders = {"explicit": GraderScores(holes), "noise": GRADERS["noise"]}
    shown = evaluate(BENCH, CALIBRATION, graders, resamples=50)
    row, whole = (shown["graders"][name]["tiers"]["proficiency"] for name in graders)
    assert row["unscored"] == 2 * 4 * 2
    assert row["accuracy"]["n"] == whole["accuracy"]["n"] - row["unscored"]
    assert row["accuracy"]["value"] == 1  # what is missing is neither right nor wrong
    assert (
        row["unscored_pairs"] == whole["within_criterion"]["n"] - row["within_criterion"]["n"] > 0
    )
    difference = shown["differences"]["noise"]
    for name in ("within_criterion", "auroc"):
        assert difference[name]["proficiency"]["n"] == row[name]["n"] < whole[name]["n"]
    by_veto = shown["graders"]["explicit"]["veto"]["per_criterion"]
    assert difference["veto_f1"]["n"] == by_veto["f1"]["n"]
    assert by_veto["unscored"] > 0
    assert shown["graders"]["explicit"]["overall"]["outcomes"]["unresolved"] > 0
    assert shown["graders"]["explicit"]["veto"]["per_response"]["unscored"] == 8


def test_thresholds_do_not_depend_on_the_bench() -> None:
    graders = {"explicit": GraderScores(noisy(1.0, seed=3))}
    a = evaluate(BENCH, CALIBRATION, graders, resamples=2)["graders"]["explicit"]
    b = evaluate(BENCH[:5], CALIBRATION, graders, resamples=2)["graders"]["explicit"]
    assert a["thresholds"] == b["thresholds"]


def test_a_tier_that_cannot_be_calibrated_has_no_verdicts() -> None:
    clean = [
        r.with_responses(
            Response(y.id, y.model, y.text, {**y.verdicts, "v0": "unmet", "v1": "unmet"})
            for y in r.responses
        )
        for r in CALIBRATION
    ]
    shown = evaluate(BENCH, clean, {"explicit": GRADERS["explicit"]}, resamples=5)
    grader = shown["graders"]["explicit"]
    reason = "no threshold: only one gold class in calibration"
    assert grader["thresholds"]["veto"]["value"] is None
    assert grader["veto"]["per_response"]["f1"]["reason"] == reason
    assert grader["tiers"]["veto"]["accuracy"]["reason"] == reason
    assert grader["tiers"]["veto"]["auroc"]["value"] == 1
    # A safety verdict that could not be had decides nothing.
    assert grader["overall"]["outcomes"]["right"] == 0


def test_what_cannot_be_evaluated_is_named() -> None:
    with pytest.raises(BenchError, match="reference: found 'best', expected one of"):
        evaluate(BENCH, CALIBRATION, GRADERS, "best")
    with pytest.raises(BenchError, match=r"\['b0'\] are in bench and calibration split"):
        evaluate(BENCH, [*CALIBRATION, BENCH[0]], GRADERS)
    only_bench = GraderScores(noisy(0.0, over=BENCH))
    with pytest.raises(BenchError, match="'explicit': scores on the calibration split: found no"):
        evaluate(BENCH, CALIBRATION, {"explicit": only_bench})
    elsewhere = GraderScores(noisy(0.0), {("x", "y"): 1.0})
    with pytest.raises(BenchError, match="'explicit': overall: found no finite score"):
        evaluate(BENCH, CALIBRATION, {"explicit": elsewhere})
    with pytest.raises(BenchError, match="neither scores nor overall"):
        GraderScores()


# --- physicians -----------------------------------------------------------------------------------

STATEMENTS = (
    Criterion("s0", Tier.PROFICIENCY, "first", 0.5),
    Criterion("s1", Tier.PROFICIENCY, "second", 0.5),
    Criterion("s2", Tier.EXCELLENCE, "third"),
)


def labelled(n: int) -> list[GradedInstruction]:
    """Answers that three physicians voted on; the third says Neutral a little too often."""
    rng = random.Random(0)
    out = []
    for i in range(n):
        verdicts, votes = {}, {}
        for c in STATEMENTS:
            truth = rng.choice(("Entailment", "Neutral", "Contradiction"))
            third = "Neutral" if rng.random() < 0.3 else truth
            votes[c.id] = (truth, truth, third)
            verdicts[c.id] = Verdict.MET if truth == "Entailment" else Verdict.UNMET
        answer = Response("real", "gpt", "text", verdicts, votes)
        out.append(
            GradedInstruction(
                f"k{i}", (Message("user", "q"),), "k", "MIT", Rubric(STATEMENTS), (answer,)
            )
        )
    return out


def test_physicians_table_ceiling_and_agreement() -> None:
    real = labelled(20)
    every = [*CALIBRATION, *real]
    graders = {
        "explicit": GraderScores(noisy(0.0, over=every)),
        "noise": GraderScores(noisy(1e6, over=every)),
        "scalar": GraderScores(None, by_response(over=every)),
    }
    shown = physicians(real, CALIBRATION, graders, resamples=100)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert set(shown) == {"settings", "gold", "graders", "differences", "agreement", "ceiling"}
    perfect = shown["graders"]["explicit"]
    assert set(perfect) == {"kind", "thresholds", "all", "proficiency", "excellence"}
    assert perfect["all"]["auroc"]["n"] == 60
    assert perfect["all"]["auroc"]["value"] == perfect["all"]["balanced_accuracy"]["value"] == 1
    assert shown["graders"]["scalar"]["all"]["auroc"]["value"] is not None
    assert shown["graders"]["scalar"]["all"]["balanced_accuracy"]["value"] is None
    assert shown["differences"]["noise"]["auroc"]["outcome"] == "better"
    assert shown["differences"]["scalar"]["balanced_accuracy"]["value"] is None
    ceiling = shown["ceiling"]
    assert set(ceiling) == {"column_1", "column_2", "column_3", "all"}
    assert ceiling["column_3"]["physician"]["accuracy"]["n"] == 60
    assert ceiling["column_3"]["physician"]["balanced_accuracy"]["value"] < 1
    assert ceiling["column_3"]["graders"]["explicit"]["balanced_accuracy"]["value"] == 1
    assert ceiling["column_1"]["physician"]["balanced_accuracy"]["value"] == 1
    difference = ceiling["all"]["graders"]["explicit"]["balanced_accuracy_minus_physician"]
    assert difference["value"] > 0
    kappas = [p["cohen_kappa"]["value"] for p in shown["agreement"]["three_way"]["pairs"]]
    assert kappas[0] == pytest.approx(1)
    assert kappas[1] == kappas[2] < 1


def test_physicians_rows_must_have_votes_and_their_own_calibration() -> None:
    with pytest.raises(BenchError, match="votes: found none"):
        physicians(BENCH, CALIBRATION, {"explicit": GRADERS["explicit"]})
    with pytest.raises(BenchError, match=r"\['c0'\] are in both sets of rows"):
        physicians([CALIBRATION[0]], CALIBRATION, {"explicit": GRADERS["explicit"]})
    with pytest.raises(BenchError, match="reference"):
        physicians(labelled(2), CALIBRATION, {"other": GRADERS["explicit"]})
