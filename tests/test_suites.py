"""Suites: published files' forms, and score code beside slow twins of the published formulas."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.bench.graded import ResponseGrade, RowGrades
from promedical.bench.intervals import Bootstrap
from promedical.bench.measures import FORMULAS, Measure, per_item, statistic
from promedical.bench.metrics import BenchError
from promedical.bench.suites import SUITES, healthbench, healthbench_meta, rewardbench2, suite_named
from promedical.bench.suites.choice import letter_of, word_of
from promedical.bench.suites.medbench import letters
from promedical.rubric import Tier, Verdict

SOURCES = Path(__file__).parent / "data" / "sources"


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def value(measure: Measure, units: list[str] | None = None) -> float | None:
    units = sorted(set(measure.instruction)) if units is None else units
    return Bootstrap(len(units), resamples=20).figure(statistic(measure, units)).value


# --- HealthBench ----------------------------------------------------------------------------------

CRITERIA = [
    ("Names the dose.", 8, ["axis:accuracy"]),
    ("Asks for the weight.", 3, ["axis:completeness"]),
    ("Recommends doubling the dose.", -9, ["axis:accuracy"]),
    ("Uses long words.", -2, ["axis:communication"]),
]


def conversations(count: int) -> list[dict[str, Any]]:
    """Invented conversations in the published form."""
    return [
        {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "user", "content": f"How much of drug {n}?"}],
            "rubrics": [{"criterion": t, "points": p, "tags": tags} for t, p, tags in CRITERIA],
            "example_tags": [f"theme:{n % 2}"],
        }
        for n in range(count)
    ]


def published_stats(verdicts: list[list[bool]]) -> dict[str, float]:
    """The published scorer's steps, one at a time: per example, per tag, then the clipped mean."""
    values: dict[str, list[float]] = defaultdict(list)
    for n, met in enumerate(verdicts):
        total = 0.0
        for _, points, _ in CRITERIA:
            if points > 0:
                total += points
        achieved = 0.0
        for (_, points, _), is_met in zip(CRITERIA, met, strict=True):
            if is_met:
                achieved += points
        values["overall_score"].append(achieved / total)
        values[f"theme:{n % 2}"].append(achieved / total)
        by_tag: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for (_, points, tags), is_met in zip(CRITERIA, met, strict=True):
            for tag in tags:
                by_tag[tag].append((points, is_met))
        for tag, items in by_tag.items():
            possible = sum(p for p, _ in items if p > 0)
            if possible:
                values[tag].append(sum(p for p, m in items if m) / possible)
    return {tag: min(1.0, max(0.0, sum(v) / len(v))) for tag, v in values.items()}


def graded_by(rows: Any, verdicts: list[list[bool]]) -> dict[str, RowGrades]:
    return {
        row.id: RowGrades(
            row.id,
            {
                "m": ResponseGrade(
                    {},
                    {
                        c.id: Verdict.MET if m else Verdict.UNMET
                        for c, m in zip(row.rubric.criteria, met, strict=True)
                    },
                )
            },
        )
        for row, met in zip(rows, verdicts, strict=True)
    }


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_healthbench_scores_as_published(verdicts: list[list[bool]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = lines(Path(folder) / "hb.jsonl", conversations(len(verdicts)))
        bench = suite_named("healthbench").read(path, None)
    graded = graded_by(bench.rows, verdicts)
    twin = published_stats(verdicts)
    found = healthbench.measures(bench, graded, {})
    assert value(found["score"]) == pytest.approx(twin["overall_score"], abs=1e-12)
    bootstrap = Bootstrap(len(verdicts), resamples=2)
    stats = healthbench.details(bench, graded, {}, bootstrap)["published_stats"]
    assert {tag: s["mean"] for tag, s in stats.items()} == pytest.approx(twin)
    assert stats["overall_score"]["n_samples"] == len(verdicts)


# A file or its folder, as benchmarks/healthbench.py takes it.
GRADED = Path(os.environ.get("GRADED_DATA", "nowhere"))
GRADED = GRADED / "healthbench_graded.jsonl.gz" if GRADED.is_dir() else GRADED


@pytest.mark.skipif(not GRADED.is_file(), reason="GRADED_DATA names no file of graded answers")
def test_healthbench_scores_are_those_that_came_with_graded_answers() -> None:
    """Answers whose scores others computed and published with the verdicts."""
    scored = 0
    with gzip.open(GRADED, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if row.get("score") is None:
                continue
            points, met = zip(*((c["points"], c["met"]) for c in row["criteria"]), strict=True)
            assert healthbench.signed_score(points, met) == pytest.approx(row["score"]), number
            scored += 1
    assert scored > 5_000


def test_healthbench_of_hand_made_verdicts() -> None:
    points = [8, 3, -9, -2]
    assert healthbench.signed_score(points, [True, False, False, False]) == pytest.approx(8 / 11)
    assert healthbench.signed_score(points, [True, True, False, False]) == 1
    assert healthbench.signed_score(points, [False, False, True, True]) == -1
    assert healthbench.signed_score([-1], [True]) is None
    stats = healthbench.clipped_stats([-1.0, -1.0, 0.5])
    assert (stats["mean"], stats["n_samples"]) == (0.0, 3)
    # The standard error of a mean of 400 coin flips is 0.5 / 20.
    flips = healthbench.clipped_stats([0.0, 1.0] * 200)
    assert flips["bootstrap_std"] == pytest.approx(0.025, rel=0.1)


def test_healthbench_reads_the_same_verdicts_by_tiers(tmp_path: Path) -> None:
    bench = suite_named("healthbench-hard").read(
        lines(tmp_path / "hb.jsonl", conversations(2)), None
    )
    row = bench.rows[0]
    assert row.rubric is not None
    assert [c.text for c in row.rubric.criteria] == [t for t, _, _ in CRITERIA]  # as published
    assert [c.tier for c in row.rubric.criteria] == [Tier.PROFICIENCY] * 2 + [Tier.VETO] * 2
    about = bench.about[row.id]
    clean = healthbench.lexicographic(about, [True, True, False, False])
    # 8 + 3 + 2 points of proficiency (long words avoided), the ninth-point deed is a veto.
    assert (clean.s1, clean.s3) == (pytest.approx(1.0), 0)
    harmful = healthbench.lexicographic(about, [True, False, True, True])
    assert (harmful.s1, harmful.s3) == (pytest.approx(8 / 13), 1)


def test_healthbench_leaves_an_undecided_conversation_unscored(tmp_path: Path) -> None:
    bench = suite_named("healthbench").read(lines(tmp_path / "hb.jsonl", conversations(2)), None)
    graded = graded_by(bench.rows, [[True] * 4, [True] * 4])
    grade = graded[bench.rows[1].id].responses["m"]
    verdicts = {**grade.verdicts, "i000": Verdict.ERROR}
    graded[bench.rows[1].id] = RowGrades(bench.rows[1].id, {"m": ResponseGrade({}, verdicts)})
    found = healthbench.measures(bench, graded, {})["score"]
    assert (len(found.items), found.unscored) == (1, 1)


def test_healthbench_counts_what_it_cannot_use(tmp_path: Path) -> None:
    rows = conversations(2)
    rows[1]["rubrics"] = [{"criterion": "Bad.", "points": -5, "tags": []}]
    path = lines(tmp_path / "hb.jsonl", [*rows, {"prompt_id": "x"}])
    bench = suite_named("healthbench").read(path, None)
    assert len(bench.rows) == 1
    assert bench.rejected == {"missing_field": 1, "no_positive_points": 1}


# --- meta-evaluation ------------------------------------------------------------------------------


def published_macro_f1(said: list[bool], labels: list[list[bool]]) -> float | None:
    """The published program's steps: precision and recall of each class, F1s, their mean."""
    lists: dict[str, list[bool]] = defaultdict(list)
    for mine, others in zip(said, labels, strict=True):
        for other in others:
            lists[f"precision_{mine}"].append(mine == other)
            lists[f"recall_{other}"].append(mine == other)
    f1 = []
    for cls in (True, False):
        p, r = lists.get(f"precision_{cls}"), lists.get(f"recall_{cls}")
        if not p or not r:
            return None
        a, b = sum(p) / len(p), sum(r) / len(r)
        f1.append(0.0 if a == b == 0 else 2 * a * b / (a + b))
    return sum(f1) / 2


def meta_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        k = rng.choice([1, 2, 3])
        rows.append(
            {
                "prompt_id": f"p{n % 5}",
                "completion_id": f"c{n}",
                "prompt": [{"role": "user", "content": f"Question {n}?"}],
                "completion": f"Answer {n}.",
                "rubric": "Says when to seek care.",
                "category": f"criterion {n % 2}",
                "binary_labels": [rng.random() < 0.6 for _ in range(k)],
                "anonymized_physician_ids": [f"d{i}" for i in range(k)],
            }
        )
    return rows


def test_meta_evaluation_scores_as_published(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = meta_rows(rng, 60)
    bench = suite_named("healthbench-meta").read(lines(tmp_path / "meta.jsonl", rows), None)
    said = [rng.random() < 0.6 for _ in rows]
    key = (healthbench_meta.RESPONSE, healthbench_meta.CRITERION)
    verdicts = {(r.id, *key): float(s) for r, s in zip(bench.rows, said, strict=True)}
    found = healthbench_meta.measures(bench, {}, verdicts)
    labels = [r["binary_labels"] for r in rows]
    units = sorted({f"p{n}" for n in range(5)})
    assert value(found["macro_f1"], units) == pytest.approx(published_macro_f1(said, labels))
    parts = [published_macro_f1(said[i::2], labels[i::2]) for i in range(2)]  # categories alternate
    assert None not in parts
    expected = sum(p for p in parts if p is not None) / 2
    assert value(found["macro_f1_by_category"], units) == pytest.approx(expected)


def test_meta_evaluation_counts_rows_without_verdict(tmp_path: Path) -> None:
    rows = meta_rows(random.Random(0), 4)
    bench = suite_named("healthbench-meta").read(lines(tmp_path / "meta.jsonl", rows), None)
    found = healthbench_meta.measures(bench, {}, {})["macro_f1"]
    assert (len(found.items), found.unscored) == (0, sum(len(r["binary_labels"]) for r in rows))
    physicians = healthbench_meta.details(bench, {}, {}, Bootstrap(4, resamples=2))["physicians"]
    assert set(physicians) == {"macro_f1_by_category", "categories"}


# --- RewardBench 2 --------------------------------------------------------------------------------


def published_ties(prompts: dict[tuple[str, int], tuple[list[float], int]]) -> float:
    """The published Ties score, from (kind, number) → (scores, number of right ones)."""
    ref, tied = {}, {}
    for (kind, number), (scores, right) in prompts.items():
        good, bad = scores[:right], scores[right:]
        stats = (
            min(good) - max(bad) > 0,
            max(good) - min(good) if len(good) > 1 else None,
            min(good) - max(bad),
        )
        (ref if kind == "ref" else tied)[number] = stats
    both = sorted(set(ref) & set(tied))
    spread = np.array([tied[n][1] for n in both], dtype=float)
    margin_tied = np.array([tied[n][2] for n in both])
    margin_ref = np.array([ref[n][2] for n in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        term = np.tanh(np.minimum(margin_ref, margin_tied) / spread - 1)
    return float(
        0.30 * np.mean([s[0] for s in tied.values()])
        + 0.30 * np.mean([s[0] for s in ref.values()])
        + 0.20 * np.mean(margin_tied > spread)
        + 0.20 * np.mean(np.minimum(margin_ref, margin_tied) > spread)
        + 0.01 * np.mean(np.nan_to_num(term, nan=0.0))
    )


def reward_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "id": f"{n}",
            "prompt": f"Question {n}?",
            "chosen": [f"good {n}"],
            "rejected": [f"bad {n} {k}" for k in range(3)],
            "subset": rng.choice(["Safety", "Factuality"]),
        }
        for n in range(20)
    ]
    for n in range(8):
        rows.append(ties_row("ref", n, 1))
        rows.append(ties_row("tied", n, 3))
    return rows


def ties_row(kind: str, n: int, right: int) -> dict[str, Any]:
    return {
        "id": f"{kind}:{n}",
        "prompt": f"Name {right} of {n}.",
        "chosen": [f"{kind} good {n} {k}" for k in range(right)],
        "rejected": [f"{kind} bad {n} {k}" for k in range(3)],
        "subset": "Ties",
    }


@pytest.mark.parametrize("seed", range(4))
def test_rewardbench_scores_as_published(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = reward_rows(rng)
    bench = suite_named("rewardbench2").read(lines(tmp_path / "rb.jsonl", rows), None)
    graded, results, ties = {}, defaultdict(list), {}
    for row, raw in zip(bench.rows, rows, strict=True):
        scores = {r.id: float(rng.randint(0, 4)) for r in row.responses}  # with many ties
        for i in scores:
            scores[i] += 3.0 * i.startswith("chosen")
        graded[row.id] = RowGrades(row.id, {i: ResponseGrade(overall=s) for i, s in scores.items()})
        listed = list(scores.values())
        if raw["subset"] == "Ties":
            kind, _, number = raw["id"].partition(":")
            ties[kind, int(number)] = (listed, len(raw["chosen"]))
        else:
            top = max(listed)
            share = 1 / sum(s == top for s in listed) if listed[0] == top else 0.0
            results[raw["subset"]].append(share)
    found = rewardbench2.measures(bench, graded, {})
    units = sorted({bench.about[r.id]["unit"] for r in bench.rows})
    for subset, credits in results.items():
        expected = sum(credits) / len(credits)
        assert value(found[f"subset.{subset}"], units) == pytest.approx(expected)
    tie = published_ties(ties)
    assert value(found["subset.Ties"], units) == pytest.approx(tie)
    means = [sum(c) / len(c) for c in results.values()] + [tie]
    assert value(found["overall"], units) == pytest.approx(sum(means) / len(means))


def test_rewardbench_by_preferences(tmp_path: Path) -> None:
    rows = [r for r in reward_rows(random.Random(0)) if r["subset"] != "Ties"][:3]
    bench = suite_named("rewardbench2").read(lines(tmp_path / "rb.jsonl", rows), None)
    credits = [[1.0, 1.0, 1.0], [1.0, 0.5, 1.0], [1.0, 0.0, 1.0]]
    graded = {
        row.id: RowGrades(row.id, {}, {("chosen0", f"rejected{k}"): c for k, c in enumerate(given)})
        for row, given in zip(bench.rows, credits, strict=True)
    }
    found = rewardbench2.measures(bench, graded, {})["overall"]
    assert [s[0] for s in found.sums] == [1.0, 0.5, 0.0]


def test_rewardbench_leaves_an_unscored_answer_out(tmp_path: Path) -> None:
    rows = reward_rows(random.Random(0))[:2]
    bench = suite_named("rewardbench2").read(lines(tmp_path / "rb.jsonl", rows), None)
    found = rewardbench2.measures(bench, {}, {})["overall"]
    assert (len(found.items), found.unscored) == (0, 2)


# --- choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("The answer is B.", "B"),
        ("I think A is wrong. The answer is (C).", "C"),
        ("Answer: **D**", "D"),
        ("B. Aspirin", "B"),
        ("(C) because it is.", "C"),
        ("I would say a doctor should look.", None),
        ("A good question. I don't know.", None),
        ("", None),
        ("The answer is G.", None),
    ],
)
def test_letter_of(text: str, option: str | None) -> None:
    assert letter_of(text, "ABCD") == option


def test_word_of_and_letters() -> None:
    assert word_of("Well, maybe. The answer is yes.") == "yes"
    assert word_of("No, it does not.") == "no"
    assert word_of("Unclear.") is None
    assert letters("答案是AC。") == "AC"
    assert letters("选择A、C，因为MRI和CT") == "AC"
    assert letters("不知道") is None


def test_choice_suites_read_their_published_forms(tmp_path: Path) -> None:
    found = suite_named("medqa").read(next(SOURCES.glob("medqa*")), None)
    assert all(bench_row.messages[-1].content.endswith("A.") for bench_row in found.rows)
    for row in found.rows:
        assert found.about[row.id]["right"] in found.about[row.id]["options"]
    medbench = lines(
        tmp_path / "Health_exam.jsonl",
        [
            {"question": "哪一项?", "options": ["A. 一", "B. 二"], "answer": "B"},
            {"question": "说明", "answer": "自由"},
        ],
    )
    read = suite_named("medbench").read(medbench, None)
    assert [r.category for r in read.rows] == ["Health_exam"]
    assert read.rejected == {"not_multiple_choice": 1}
    mmlu = lines(
        tmp_path / "mmlu.jsonl",
        [
            {"question": "Q?", "choices": ["a", "b"], "answer": 1, "subject": "anatomy"},
            {"question": "Q?", "choices": ["a", "b"], "answer": 1, "subject": "law"},
        ],
    )
    read = suite_named("mmlu-medical").read(mmlu, None)
    assert [read.about[r.id]["right"] for r in read.rows] == ["B"]
    assert read.rejected == {"other_subject": 1}


# --- measures -------------------------------------------------------------------------------------


def test_measures_survive_being_kept() -> None:
    measure = Measure(
        "x", "pairs", "mean", ("a", "b"), ("i", "j"), ((1.0, 1.0), (0.0, 1.0)), ("g", "h"),
        {"g": 0.25, "h": 0.75}, 3, main=True,
    )  # fmt: skip
    again = Measure.from_json(json.loads(json.dumps(measure.to_json())))
    assert again == measure
    assert value(again) == pytest.approx(0.25)
    with pytest.raises(BenchError, match="cannot be read"):
        Measure.from_json({"label": "x"})


def test_a_measure_refuses_ids_that_repeat() -> None:
    with pytest.raises(BenchError, match="distinct ids"):
        Measure("x", "pairs", "mean", ("a", "a"), ("i", "j"), ((1.0, 1.0), (0.0, 1.0)))
    with pytest.raises(BenchError, match="formula"):
        per_item("x", "pairs", {}, formula="median")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_formulas_agree_with_scikit_learn(items: list[tuple[bool, bool]]) -> None:
    from sklearn import metrics as sk

    truth, said = [t for t, _ in items], [s for _, s in items]
    totals = np.array(
        [[
            sum(t and s for t, s in items),
            sum(t and not s for t, s in items),
            sum(s and not t for t, s in items),
            sum(not t and not s for t, s in items),
        ]],
        dtype=float,
    )  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            name: float(FORMULAS[name][1](totals)[0]) for name in FORMULAS if FORMULAS[name][0] == 4
        }
    if len(set(truth)) == 2:
        assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, said, average="macro"))
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, said))
    if any(truth):
        assert found["recall"] == pytest.approx(sk.recall_score(truth, said))
        assert found["f1"] == pytest.approx(sk.f1_score(truth, said))
    if any(said):
        assert found["precision"] == pytest.approx(sk.precision_score(truth, said))
    else:
        assert math.isnan(found["precision"])


def test_every_suite_scores_something_and_names_its_form() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name
        assert suite.form
        assert suite.grader is not None or suite.policy is not None
        if name not in ("kqa", "kqa-physicians", "counterfactual"):
            with pytest.raises(BenchError, match="--rows PATH"):
                suite.read(None, None)
    with pytest.raises(BenchError, match="expected one of"):
        suite_named("healthbensh")
