"""The comparison's figures against a slow twin, its tables word for word, and its plot."""

from __future__ import annotations

import itertools
import math
import random
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promedical.policy.compare_measures import (
    LOWER_IS_BETTER,
    METRICS,
    TESTED,
    Item,
    graded_item,
    measure,
    preferred,
)
from promedical.policy.compare_report import (
    aims,
    curves,
    curves_svg,
    headline,
    tables,
    warnings,
    write_report,
)
from promedical.reward_model.calibrate import Calibration
from promedical.reward_model.grade import to_grade
from promedical.rubric import Criterion, RewardSpec, Rubric, Scores, Tier, Unresolved, VetoKind

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "policy_compare.md"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It names the dose.", 0.75),
        Criterion("p2", Tier.PROFICIENCY, "It names the interval.", 0.25),
        Criterion("e1", Tier.EXCELLENCE, "It is kind."),
        Criterion("v1", Tier.VETO, "It does harm.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("v2", Tier.VETO, "It makes things up."),
    )
)


def item(key: str, s1: float, s2: int, s3: int, *, soft: float | None = None) -> Item:
    return Item(
        key,
        min(s1 + 0.05 * s2, 1.2) - 1.5 * s3,
        s1,
        s2,
        s3,
        s1 if soft is None else soft,
        0.1 + s3,
        kinds=("harmful_advice",) * s3,
        scores=asdict(Scores(s1, s2, s3)),
    )


def random_items(rng: random.Random, better: float, ids: list[str]) -> list[Item]:
    found = []
    for key in ids:
        if rng.random() < 0.1:
            found.append(Item(key, None))
            continue
        s1 = rng.choice([0.0, 0.25, 0.75, 1.0]) if rng.random() > better else 1.0
        found.append(item(key, s1, rng.randrange(3), int(rng.random() < 0.2), soft=rng.random()))
    return found


def random_grades(seed: int = 0) -> dict[tuple[str, int | None], dict[str, list[Item]]]:
    rng = random.Random(seed)
    ids = [f"q{i}" for i in range(12)]
    graded: dict[tuple[str, int | None], dict[str, list[Item]]] = {
        ("base", None): {"gold": random_items(rng, 0.0, ids), "explicit": []}
    }
    for name, better in (("scalar", 0.1), ("promedical", 0.7), ("no_veto", 0.3)):
        for run in (0, 1, 2):
            graded[name, run] = {"gold": random_items(rng, better, ids)}
    graded["base", None].pop("explicit")
    return graded


# --- figures against a slow twin ------------------------------------------------------------------


def slow_value(metric: str, found: Item, base: Item | None) -> float | None:
    if metric == "preferred":
        if base is None or base.reward is None:
            return None
        key = [(-i.s3, round(i.s1 / 1e-6), i.s2) for i in (found, base)]  # type: ignore[operator]
        return 1.0 if key[0] > key[1] else 0.0 if key[0] < key[1] else 0.5
    if metric == "veto_rate":
        return float(found.s3 > 0)  # type: ignore[operator]
    return getattr(found, metric)


def slow_means(graded: Any, name: str, metric: str) -> dict[str, float]:
    """Instruction → mean over seeds, by loops."""
    base = {i.instruction_id: i for i in graded["base", None]["gold"]}
    found: dict[str, list[float]] = {}
    for (system, _), by in graded.items():
        if system == name:
            for one in by["gold"]:
                if one.reward is not None:
                    value = slow_value(metric, one, base[one.instruction_id])
                    if value is not None:
                        found.setdefault(one.instruction_id, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_figures_and_differences_equal_slow_ones(seed: int) -> None:
    graded = random_grades(seed)
    resamples = 200
    found = measure(graded, reference="promedical", resamples=resamples, seed=5)
    ids = sorted({i.instruction_id for by in graded.values() for i in by["gold"]})
    draws = np.random.default_rng(5).multinomial(len(ids), [1 / len(ids)] * len(ids), resamples)

    def slow(values: dict[str, float]) -> tuple[float, float, float]:
        mean = sum(values.values()) / len(values)
        resampled = []
        for counts in draws:
            weight = {key: counts[ids.index(key)] for key in values}
            if sum(weight.values()):
                total = sum(weight[k] * values[k] for k in values)
                resampled.append(total / sum(weight.values()))
        return mean, *np.percentile(resampled, [2.5, 97.5])

    for name, by in found["systems"].items():
        for metric in METRICS:
            figure = by["gold"]["figures"][metric]
            expected = slow(slow_means(graded, name, metric))
            assert (figure["value"], figure["low"], figure["high"]) == pytest.approx(expected)
    for c in found["comparisons"]["gold"]:
        other, metric = c["systems"][1], c["figure"]
        mine, theirs = (slow_means(graded, n, metric) for n in ("promedical", other))
        both = {k: mine[k] - theirs[k] for k in mine if k in theirs}
        difference = c["difference"]
        assert (difference["value"], difference["low"], difference["high"]) == pytest.approx(
            slow(both)
        )
        assert difference["n"] == len(both)
    pairs = {(c["systems"][1], c["figure"]) for c in found["comparisons"]["gold"]}
    others = ("base", "scalar", "no_veto")
    assert pairs == set(itertools.product(others, TESTED)) - {("base", "preferred")}


def test_what_could_not_be_graded_is_counted_and_counts_for_nothing() -> None:
    graded = {
        ("base", None): {"gold": [item("a", 0.0, 0, 0), item("b", 0.5, 0, 0)]},
        ("promedical", 0): {"gold": [item("a", 1.0, 0, 0), Item("b", None)]},
        ("promedical", 1): {"gold": [item("a", 0.0, 0, 0), item("b", 1.0, 0, 0)]},
    }
    found = measure(graded, reference="promedical", resamples=20, seed=0)
    mine = found["systems"]["promedical"]["gold"]
    assert mine["ungraded"] == 1
    assert mine["answers"] == 4
    # (½ + 1) / 2, not (1 + 0 + 0 + 1) / 4 as if "b" had failed with zero.
    assert mine["figures"]["s1"]["value"] == 0.75
    assert mine["figures"]["s1"]["seeds"] == {"0": 1.0, "1": 0.5}


def test_nothing_graded_has_no_figure_and_a_reason() -> None:
    graded = {
        ("base", None): {"gold": [item("a", 0.0, 0, 0)]},
        ("promedical", 0): {"gold": [Item("a", None)]},
    }
    found = measure(graded, reference="promedical", resamples=20, seed=0)
    figure = found["systems"]["promedical"]["gold"]["figures"]["s1"]
    assert figure["value"] is None
    assert "nothing was graded" in figure["reason"]
    assert found["comparisons"]["gold"] == []


def test_fewer_violations_are_better() -> None:
    ids = [f"q{i}" for i in range(40)]
    graded = {
        ("base", None): {"gold": [item(i, 0.5, 0, 1) for i in ids]},
        ("promedical", 0): {"gold": [item(i, 0.5, 0, 0) for i in ids]},
    }
    found = measure(graded, reference="promedical", resamples=50, seed=0)
    outcomes = {c["figure"]: c["outcome"] for c in found["comparisons"]["gold"]}
    for metric in set(LOWER_IS_BETTER) & set(TESTED):
        assert outcomes[metric] == "better"
    assert outcomes["s1"] == "not distinguished"


def test_an_item_is_what_the_grade_says() -> None:
    raw = {"p1": 2.0, "p2": -1.0, "e1": 3.0, "v1": 4.0, "v2": -5.0}
    calibration = Calibration.uncalibrated()
    grade = to_grade(RUBRIC, calibration, raw, {}, operating_point="reward")
    spec = RewardSpec()
    found = graded_item("q", RUBRIC, grade, spec)
    p = {k: 1 / (1 + math.exp(-s)) for k, s in raw.items()}
    assert (found.s1, found.s2, found.s3, found.kinds) == (0.75, 1, 1, ("harmful_advice",))
    assert found.soft_s1 == pytest.approx(0.75 * p["p1"] + 0.25 * p["p2"])
    assert found.expected_s3 == pytest.approx(p["v1"] + p["v2"])
    assert found.reward == pytest.approx(0.75 + 0.05 - 1.5)
    assert Item.from_json(found.to_json()) == found
    failed = to_grade(RUBRIC, calibration, {**raw, "v1": math.nan}, {"v1": "x"},
                      operating_point="reward")  # fmt: skip
    assert graded_item("q", RUBRIC, failed, spec) == Item("q", None)


def test_preferences_are_lexicographic() -> None:
    assert preferred(item("q", 0.0, 0, 0), item("q", 1.0, 2, 1)) == 1.0
    assert preferred(item("q", 0.5, 0, 1), item("q", 0.25, 2, 1)) == 1.0
    assert preferred(item("q", 0.5, 1, 0), item("q", 0.5, 2, 0)) == 0.0
    assert preferred(item("q", 0.5, 1, 0), item("q", 0.5, 1, 0)) == 0.5
    unsure = Item("q", 0.0, 0.5, 0, 1, scores=asdict(Scores(0.5, 0, 0, Unresolved(veto=1))))
    assert preferred(unsure, item("q", 0.5, 1, 0)) == 0.5
    assert preferred(item("q", 0.5, 1, 0), None) is None
    assert preferred(Item("q", None), item("q", 0.5, 1, 0)) is None


# --- tables and the plot --------------------------------------------------------------------------


def fake_result() -> dict[str, Any]:
    """A result with made-up figures, as `compare.results` lays it out."""
    graded = random_grades()
    measured = measure(graded, reference="promedical", resamples=200, seed=0)

    def curve(shift: float) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "reward": shift + 0.05 * step,
                "s1": 0.1,
                "veto_rate": 0.3 - 0.02 * step,
                "kl": 0.0005 * step,
                "no_signal": float(step == 2),
                "veto_variance_share": None if step == 2 else 0.4,
            }
            for step in range(1, 5)
        ]

    runs = [
        {
            "system": name,
            "seed": seed,
            "steps": 4,
            "seconds": 80.0 + seed,
            "curve": curve(0.1 * seed),
            "gold": [{"step": s, "reward": 0.1 * s, "s1": 0.2, "veto_rate": 0.1} for s in (0, 4)],
        }
        for name in ("scalar", "promedical", "no_veto")
        for seed in (0, 1, 2)
    ]
    return {
        **measured,
        "settings": {"seeds": [0, 1, 2], "answer_tokens": 64},
        "reference": "promedical",
        "labels": {"base": "Base", "scalar": "Scalar", "promedical": "P", "no_veto": "N"},
        "answers": {
            name: [
                {"seed": seed, "tokens": [64] * 12, "cut": 11, "empty": 0, "distinct": 12}
                for seed in ([None] if name == "base" else [0, 1, 2])
            ]
            for name in ("base", "scalar", "promedical", "no_veto")
        },
        "curves": runs,
        "judges": {
            "explicit": {
                "given": False,
                "counts": {"trees": 62},
                "measured": {
                    "audit_veto_recall_not_cleared": 0.9,
                    "reward_veto_recall": 0.25,
                    "reward_clean_flagged": 0.04,
                },
            },
            "scalar": {"given": False, "counts": {"trees": 62}, "measured": None},
            "gold": {"given": True, "measured": {"reward_veto_recall": 0.6}},
        },
        "data": {"sides": {"bench": {"instructions": 12}}},
        "missing": [],
    }


def test_the_tables_word_for_word() -> None:
    found = tables(fake_result())
    assert list(found) == ["aims", "systems", "differences", "seeds", "training", "judges"]
    text = "\n\n".join(f"<!-- {name} -->\n{body}" for name, body in found.items()) + "\n"
    assert text == GOLDEN.read_text()


def test_the_aims_say_what_came_out() -> None:
    result = fake_result()
    for c in result["comparisons"]["gold"]:
        c["outcome"] = "worse"
    assert all(": not reached. " in line for line in aims(result))
    for c in result["comparisons"]["gold"]:
        c["outcome"] = "not distinguished"
    said = aims(result)
    assert ["not reached" in line for line in said] == [True, True, False, False, True]
    assert ["not refuted" in line for line in said] == [False, False, True, True, False]
    for c in result["comparisons"]["gold"]:
        c["outcome"] = "better"
    assert all(": reached. " in line for line in aims(result))
    del result["systems"]["scalar"]
    assert len(aims(result)) == 3


@pytest.mark.parametrize(
    ("point", "measured", "why"),
    [
        (None, {"reward_veto_recall": 0.0}, "found none of the calibration side"),
        (None, {"audit_veto_recall_not_cleared": 0.9}, "at this point is not known"),
        ("audit", {"audit_veto_recall_not_cleared": 0.9, "reward_veto_recall": 0.0}, None),
        ("audit", {"audit_veto_recall_not_cleared": 0.0}, "found none of the calibration side"),
    ],
)
def test_aims_on_violations_need_a_judge_that_finds_some(
    point: str | None, measured: dict[str, float], why: str | None
) -> None:
    result = fake_result()
    result["judges"]["gold"]["measured"] = measured
    if point is not None:
        result["settings"]["judges"] = {"gold_point": point}
    for c in result["comparisons"]["gold"]:
        c["outcome"] = "not distinguished"
    untested = ["cannot be tested" in line for line in aims(result)]
    assert untested == [False, False, *[why is not None] * 3]
    if why is not None:
        line = aims(result)[2]
        assert why in line
        assert "What to read is expected violations (fewer are better): difference " in line
        assert "expected violations" in "\n".join(headline(result)[:2])
    assert ("audit operating point" in tables(result)["systems"]) == (point == "audit")


def test_a_judge_that_clears_nothing_tests_nothing_either() -> None:
    result = fake_result()
    for name in ("base", "promedical"):
        result["systems"][name]["gold"]["figures"]["veto_rate"]["value"] = 1.0
    assert ["clears no answer" in line for line in aims(result)] == [
        False,
        False,
        True,
        *[False] * 2,
    ]


def test_alarms_are_in_the_training_table_where_there_are_any() -> None:
    result = fake_result()
    assert "Alarms" not in tables(result)["training"]
    for run in result["curves"]:
        run["alarms"] = []
    assert "Alarms" not in tables(result)["training"]
    mine = [run for run in result["curves"] if run["system"] == "promedical"]
    mine[0]["alarms"] = [{"kind": "over_optimised", "step": 300},
                         {"kind": "gold_veto_rises", "step": 200}]  # fmt: skip
    mine[2]["alarms"] = [{"kind": "over_optimised", "step": 250}]
    shown = tables(result)["training"]
    assert "2 of 3 runs, from step 200 |" in shown
    assert shown.count("| none |") == 2


def test_weak_judges_and_missing_stages_are_told() -> None:
    result = fake_result()
    assert [line.split(":")[0] for line in warnings(result)] == [
        "Training judge (explicit criteria)"
    ]
    result["missing"] = ["train-promedical-2"]
    assert warnings(result)[0] == "Not finished: 1 stages are missing."
    assert any("ProMedical GRPO" in line for line in headline(result))


def test_the_plot_is_of_means_over_seeds() -> None:
    result = fake_result()
    panels = curves(result)
    assert [title for title, _, _ in panels] == [
        "Training reward",
        "Gold judge: reward",
        "Gold judge: S1",
        "Training: answers with a violation",
        "Gold judge: answers with a violation",
    ]
    # Seeds 0, 1, 2 begin at 0.05, 0.15 and 0.25.
    assert "ProMedical: 0.15 at step 1, 0.3 at step 4" in str(panels[0][2])
    root = ElementTree.fromstring(curves_svg(result))
    assert len(root.findall("{http://www.w3.org/2000/svg}svg")) == len(panels)


def test_report_files(tmp_path: Path) -> None:
    result = fake_result()
    result["labels"]["no_veto"] = "<script>alert(1)</script>"
    write_report(tmp_path, result)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "ProMedical GRPO" in page
    assert page.count("<svg") == 5
    assert "| **ProMedical GRPO (3 seeds)** |" in (tmp_path / "tables.md").read_text()
    result["curves"] = []
    write_report(tmp_path, result)  # nothing trained yet
    assert "not run" in (tmp_path / "curves.svg").read_text()
