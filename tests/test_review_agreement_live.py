"""Live agreement: against the peers, on K-QA's votes, and the test of the lexicographic rule."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from adjudications import JUDGE, answer_of, graded
from promedical.bench.agreement import votes
from promedical.bench.intervals import Bootstrap
from promedical.demo.kqa import load_kqa
from promedical.records import to_dict
from promedical.review.adjudication import Reading, ReadItem
from promedical.review.adjudication_answer import SCALE, preference_of
from promedical.review.agreement_live import LABELS, leaves_of, lexicographic_test, live_agreement
from promedical.rubric import Preference, Tier, Verdict, compare, score

VERDICT = {"met": Verdict.MET, "unmet": Verdict.UNMET, "cannot_say": Verdict.ABSTAIN}
CHOICES = (*SCALE, "cannot_say")


def reading(reviewer: str, answer: dict[str, Any], part: str = "first", seconds: float = 40.0):
    return Reading(f"{reviewer}-{part}", reviewer, part, True, answer, seconds, ())


def random_items(seed: int, n: int = 8, reviewers: int = 4, agree: float = 0.7) -> list[ReadItem]:
    """Items read by two of several reviewers, whose votes agree more or less often."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n):
        data = to_dict(graded(i))
        content = {
            "messages": data["messages"],
            "rubric": data["rubric"],
            "responses": [{"key": f"k{r}", "text": data["responses"][r]["text"]} for r in (0, 1)],
        }
        truth = {(k, c): rng.choice(LABELS) for k in "01" for c in ("dose", "food", "kind", "harm")}

        def vote(text: str, criterion: str, truth: Any = truth) -> str:
            common = truth["1" if "twice" in text else "0", criterion]
            return str(common if rng.random() < agree else rng.choice(LABELS))

        readings = tuple(
            reading(
                f"p{r}",
                answer_of(content, {}, "first", vote, choice=str(rng.choice(CHOICES))),
                seconds=float(rng.integers(4, 100)),
            )
            for r in rng.choice(reviewers, 2, replace=False)
        )
        secret = {
            "row": {"source": "s", "licence": "MIT", "difficulty": None, "reference": None},
            "judge": JUDGE,
            "responses": {
                f"k{r}": {
                    "id": f"r{r}",
                    "model": "m",
                    "construction": [],
                    "verdicts": [
                        {"criterion": c, "verdict": str(rng.choice([v.value for v in Verdict]))}
                        for c in ("dose", "food", "kind", "harm")
                    ],
                }
                for r in (0, 1)
            },
        }
        specialty = ("rheumatology", None)[i % 2]
        items.append(
            ReadItem(f"i{i}", f"q{i}", "treatment", specialty, content, 2, readings, secret)
        )
    return items


def table(items: list[ReadItem], tier: str | None = None) -> np.ndarray:
    """[leaves, reviewers] of label codes, NaN for no vote; built the slow way."""
    reviewers = sorted({r.reviewer_id for item in items for r in item.readings})
    rows = []
    for item in items:
        for key, criterion in itertools.product(item.keys, item.rubric.criteria):
            if tier not in (None, criterion.tier.value):
                continue
            row = [math.nan] * len(reviewers)
            for r in item.readings:
                v = r.answer["verdicts"][key][criterion.id]["v"]
                row[reviewers.index(r.reviewer_id)] = LABELS.index(v)
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("seed", [1, 2])
def test_figures_are_the_peers(seed) -> None:
    items = random_items(seed)
    shown = live_agreement(items, resamples=20)
    for mode, codes in (("with_cannot_say", [0, 1, 2]), ("without_cannot_say", [0, 1])):
        for tier in (None, *Tier):
            votes_of = table(items, None if tier is None else tier.value)
            votes_of = np.where(np.isin(votes_of, codes), votes_of, math.nan)
            group = shown["criteria"][mode]
            group = group["all"] if tier is None else group["tier"][tier.value]
            alpha = krippendorff.alpha(
                votes_of.T, value_domain=codes, level_of_measurement="nominal"
            )
            assert group["krippendorff_alpha"]["value"] == pytest.approx(alpha)
            paired = votes_of[(~np.isnan(votes_of)).sum(axis=1) >= 2]
            assert group["items"] == len(paired)
            same = [len(set(row[~np.isnan(row)])) == 1 for row in paired]
            assert group["raw_agreement"]["value"] == pytest.approx(np.mean(same))
            cast = paired[~np.isnan(paired)]
            assert group["prevalence"] == pytest.approx(
                {LABELS[c]: float(np.mean(cast == c)) for c in codes}
            )
        votes_of = table(items)
        people = sorted({r.reviewer_id for item in items for r in item.readings})
        for pair in shown["criteria"][mode]["pairs"]:
            a, b = (votes_of[:, people.index(name)] for name in pair["reviewers"])
            both = np.isin(a, codes) & np.isin(b, codes)
            kappa = cohen_kappa_score(a[both], b[both], labels=codes)
            assert pair["cohen_kappa"]["value"] == pytest.approx(kappa, nan_ok=True)
            assert pair["items"] == both.sum()
    assert set(shown["criteria"]["with_cannot_say"]["specialty"]) == {"rheumatology"}
    assert set(shown["criteria"]["with_cannot_say"]["axis"]) == {
        "accuracy",
        "completeness",
        "empathy",
        "safety",
    }


def test_only_the_preference_is_weighted_and_ordinal() -> None:
    items = random_items(3, n=40)
    shown = live_agreement(items, resamples=20)["preference"]
    reviewers = sorted({r.reviewer_id for item in items for r in item.readings})
    rows = np.full((len(items), len(reviewers)), math.nan)
    for i, item in enumerate(items):
        for r in item.readings:
            choice = preference_of(r.answer, "k0", "k1")
            if choice in SCALE:
                rows[i, reviewers.index(r.reviewer_id)] = SCALE.index(choice)
    alpha = krippendorff.alpha(rows.T, value_domain=[0, 1, 2, 3, 4], level_of_measurement="ordinal")
    assert shown["ordered"]["krippendorff_alpha_ordinal"]["value"] == pytest.approx(alpha)
    assert shown["pairs"]
    for pair in shown["pairs"]:
        a, b = (rows[:, reviewers.index(name)] for name in pair["reviewers"])
        both = ~np.isnan(a) & ~np.isnan(b)
        for weights in ("linear", "quadratic"):
            kappa = cohen_kappa_score(a[both], b[both], labels=range(5), weights=weights)
            value = pair[f"cohen_kappa_{weights}"]["value"]
            assert (math.nan if value is None else value) == pytest.approx(kappa, nan_ok=True)
    criteria = live_agreement(items, resamples=20)["criteria"]
    assert not any("linear" in name or "ordinal" in name for name in _names(criteria))


def _names(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {n for v in value.values() for n in _names(v)}
    return {n for v in value for n in _names(v)} if isinstance(value, list) else set()


def test_rates_of_a_reviewer() -> None:
    items = random_items(4)
    shown = live_agreement(items, resamples=20)["reviewers"]
    for reviewer, row in shown.items():
        mine = [r for item in items for r in item.readings if r.reviewer_id == reviewer]
        said = [e["v"] for r in mine for by in r.answer["verdicts"].values() for e in by.values()]
        assert row["verdicts"] == len(said)
        assert row["cannot_say"]["value"] == pytest.approx(Counter(said)["cannot_say"] / len(said))
        assert row["items"] == len(mine)
        assert row["seconds_per_criterion"] == pytest.approx(
            np.median([r.seconds / 8 for r in mine])
        )


def test_the_judge_stands_beside_the_physicians() -> None:
    items = random_items(5)
    shown = live_agreement(items, resamples=20)["judge"]
    said, voted, gold = [], [], []
    without = 0
    for item in items:
        for key, criterion in itertools.product(item.keys, item.rubric.criteria):
            written = item.secret["responses"][key]["verdicts"]
            (verdict,) = [e["verdict"] for e in written if e["criterion"] == criterion.id]
            if verdict == "error":
                without += 1
                continue
            label = "cannot_say" if verdict == "abstain" else verdict
            for r in item.readings:
                said.append(label)
                voted.append(r.answer["verdicts"][key][criterion.id]["v"])
            found = item.consensus[key, criterion.id].gold
            if found is not None:
                gold.append(label == found.value)
    against = shown["physicians"]["with_cannot_say"]["all"]
    assert against["cohen_kappa"]["value"] == pytest.approx(cohen_kappa_score(said, voted))
    assert against["raw_agreement"]["value"] == pytest.approx(np.mean(np.equal(said, voted)))
    assert shown["gold"]["raw_agreement"]["value"] == pytest.approx(np.mean(gold))
    assert shown["without_verdict"] == without
    assert against["physicians"]["fleiss_kappa"]["n"] > 0


def test_the_lexicographic_rule_is_tested_on_what_each_reader_said() -> None:
    items = random_items(6, n=30)
    shown = lexicographic_test(items, Bootstrap(len(items), resamples=20))["own"]
    table_: Counter[tuple[str, str]] = Counter()
    right = []
    for item in items:
        for r in item.readings:
            scores = [
                score(
                    item.rubric,
                    {c: VERDICT[e["v"]] for c, e in r.answer["verdicts"][key].items()},
                )
                for key in ("k0", "k1")
            ]
            outcome = compare(*scores)
            choice = preference_of(r.answer, "k0", "k1")
            side = choice if choice in ("tie", "cannot_say") else choice.split("_")[0]
            table_[side, outcome.value] += 1
            if side != "cannot_say" and outcome is not Preference.UNRESOLVED:
                right.append(side == outcome.value)
    counted = {(a, b): n for a, row in shown["table"].items() for b, n in row.items() if n}
    assert counted == dict(table_)
    assert shown["agreement"]["value"] == pytest.approx(np.mean(right))
    assert shown["preferences"] == 60


def test_the_rule_is_confirmed_by_readers_who_follow_it() -> None:
    items = []
    for item in random_items(7, n=12):
        readings = []
        for r in item.readings:
            verdicts = r.answer["verdicts"]
            for entries in verdicts.values():
                for entry in entries.values():
                    entry["v"] = "unmet" if entry["v"] == "cannot_say" else entry["v"]
            scores = [
                score(item.rubric, {c: VERDICT[e["v"]] for c, e in verdicts[key].items()})
                for key in ("k0", "k1")
            ]
            said = {"first": "second_better", "second": "first_better_much", "tie": "tie"}
            # Stated with the second response first: the order must not matter.
            choice = said[compare(*scores).value]
            answer = {**r.answer, "preference": {"k1|k0": choice}}
            readings.append(reading(r.reviewer_id, answer))
        items.append(ReadItem(**{**_fields(item), "readings": tuple(readings)}))
    shown = lexicographic_test(items, Bootstrap(12, resamples=20))["own"]
    assert (shown["agreement"]["value"], shown["cohen_kappa"]["value"]) == (1.0, 1.0)


def _fields(item: ReadItem) -> dict[str, Any]:
    names = ReadItem.__dataclass_fields__
    return {name: getattr(item, name) for name in names}


def kqa_items() -> list[ReadItem]:
    """K-QA's answers and three physicians' labels, as if they had been adjudicated here."""
    words = {"Entailment": "met", "Neutral": "unmet", "Contradiction": "cannot_say"}
    items = []
    for row in load_kqa().physicians:
        data = to_dict(row)
        (response,) = row.responses
        labelled = [c for c in data["rubric"]["criteria"] if c["id"] in response.votes]
        content = {
            "messages": data["messages"],
            "rubric": {"safety_only": False, "criteria": labelled},
            "responses": [{"key": "k", "text": response.text}],
        }
        readings = tuple(
            reading(
                f"p{slot}",
                {"verdicts": {"k": {c: {"v": words[v[slot]]} for c, v in response.votes.items()}}},
            )
            for slot in range(3)
        )
        items.append(ReadItem(row.id, row.id, None, None, content, 3, readings))
    return items


def test_all_399_statements_of_kqa() -> None:
    items = kqa_items()
    cast = votes(load_kqa().physicians)
    leaves = leaves_of(items)
    assert leaves.labels.shape == cast.labels.shape == (399, 3)
    shown = live_agreement(items, resamples=100)["criteria"]["with_cannot_say"]
    alpha = krippendorff.alpha(cast.labels.T, level_of_measurement="nominal")
    assert shown["all"]["krippendorff_alpha"]["value"] == pytest.approx(alpha)
    # irrCAC 0.4.4 on the same votes: tests/data/irrcac.json.
    assert shown["all"]["fleiss_kappa"]["value"] == pytest.approx(0.71886844407, abs=1e-9)
    assert shown["all"]["gwet_ac1"]["value"] == pytest.approx(0.803951689648, abs=1e-9)
    for pair in shown["pairs"]:
        a, b = (cast.labels[:, int(name[1])] for name in pair["reviewers"])
        assert pair["cohen_kappa"]["value"] == pytest.approx(cohen_kappa_score(a, b))
    assert list(shown["tier"]) == ["proficiency", "excellence"]


def test_a_round_that_nobody_has_read_yet_has_no_figures() -> None:
    items = [ReadItem(**{**_fields(item), "readings": ()}) for item in random_items(8, n=3)]
    shown = live_agreement(items, resamples=10)
    assert shown["criteria"]["with_cannot_say"]["all"]["fleiss_kappa"]["value"] is None
    assert shown["reviewers"] == {}
    assert shown["progress"]["complete"] == 0
    assert shown["standings"]["veto"] == {"pending": 6}
    assert shown["judge"] is None
    assert live_agreement([], resamples=10)["progress"]["items"] == 0
