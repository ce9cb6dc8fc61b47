"""Controlled degradation: every label follows from the construction, and length says nothing."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promedical.corpus.degrade import DegradeConfig, DegradeError, DegradeResult, degrade
from promedical.corpus.degrade_config import estimate_tokens
from promedical.corpus.dissect import is_statement, take_apart
from promedical.corpus.layout import as_sentence, reword
from promedical.corpus.nearmiss import KINDS, near_misses
from promedical.corpus.phrases import load_bank
from promedical.corpus.statements import group_statements
from promedical.demo.kqa import load_kqa
from promedical.records import GradedInstruction, Response, fingerprint
from promedical.rubric import Rubric, Tier, Verdict, VetoKind

CONFIG = DegradeConfig(candidates=3)


@pytest.fixture(scope="module")
def train() -> DegradeResult:
    return degrade(load_kqa().train[:40], split="train", seed=3, config=CONFIG)


@pytest.fixture(scope="module")
def bench() -> DegradeResult:
    return degrade(load_kqa().bench, split="bench", seed=3, config=CONFIG)


def _plain(text: str) -> str:
    """A text without what layout may change."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


@cache
def _wordings(text: str) -> set[str]:
    """A sentence in each of the wordings that it may be given."""
    whole = as_sentence(text)
    return {_plain(whole)} | {_plain(reword(whole, random.Random(k))) for k in range(40)}


def _steps(response: Response, head: str) -> list[str]:
    return [s.split(":", 1)[1] for s in response.construction if s.startswith(head + ":")]


def _responses(result: DegradeResult) -> list[tuple[GradedInstruction, Response]]:
    return [(row, r) for row in result.rows for r in row.responses]


def test_every_criterion_has_a_label_and_no_response_is_over_budget(
    train: DegradeResult, bench: DegradeResult
) -> None:
    for result in (train, bench):
        for row, response in _responses(result):
            assert row.rubric is not None
            assert list(response.verdicts) == [c.id for c in row.rubric.criteria]
            assert Verdict.ERROR not in response.verdicts.values()
            assert estimate_tokens(response.text) <= CONFIG.max_tokens
            assert response.text.strip()


def test_statements_follow_from_the_construction(
    train: DegradeResult, bench: DegradeResult
) -> None:
    seen: Counter[str] = Counter()
    for row, response in _responses(train) + _responses(bench):
        if "style:assembled" not in response.construction:
            continue
        assert row.rubric is not None
        criteria = [c for c in row.rubric.criteria if is_statement(c)]
        said = set(_steps(response, "statement"))
        missed = {s.split(":")[0] for s in _steps(response, "near_miss")}
        text = _plain(response.text)
        for group in group_statements([as_sentence(c.text) for c in criteria]):
            ids = [criteria[i].id for i in group]
            for i in group:
                verdict = response.verdicts[criteria[i].id]
                if criteria[i].id in said:
                    assert verdict is Verdict.MET
                    assert any(wording in text for wording in _wordings(criteria[i].text))
                    seen["met"] += 1
                elif set(ids) & said or (set(ids) & missed) - {criteria[i].id}:
                    assert verdict is Verdict.ABSTAIN
                    seen["partly"] += 1
                else:  # the whole group absent; abstain only if a phrase comes close to it
                    assert verdict in (Verdict.UNMET, Verdict.ABSTAIN)
                    seen[f"absent.{verdict.value}"] += 1
    assert seen["met"] > 200
    assert seen["absent.abstain"] < 0.05 * seen["absent.unmet"]


def test_near_misses_differ_and_are_unmet(train: DegradeResult, bench: DegradeResult) -> None:
    found = 0
    for row, response in _responses(train) + _responses(bench):
        assert row.rubric is not None
        for step in _steps(response, "near_miss"):
            target, kind, change = step.split(":", 2)
            old, new = change.split("->")
            assert kind in KINDS
            assert old != new
            if target.startswith("sentence="):
                continue
            found += 1
            assert response.verdicts[target] is not Verdict.MET
            text = _plain(response.text)
            assert not any(wording in text for wording in _wordings(row.rubric[target].text))
    assert found > 30


def test_edited_responses_keep_the_physicians_sentences(train: DegradeResult) -> None:
    seen: Counter[Verdict] = Counter()
    for row, response in _responses(train):
        if "style:edited" not in response.construction:
            continue
        assert row.reference is not None
        source = take_apart([row], load_bank("train"))[0]
        kept = {int(s) for s in _steps(response, "sentence")}
        changed = {int(s.split(":")[0].split("=")[1]) for s in _steps(response, "near_miss")}
        for s in kept:
            assert _plain(source.answer[s]) in _plain(response.text)
        for i, criterion in enumerate(source.criteria):
            verdict = response.verdicts[criterion.id]
            seen[verdict] += 1
            alignment = source.alignment[i]
            if verdict is Verdict.MET:
                assert kept & set(alignment.holding)
                assert not changed & set(alignment.touching)
            elif verdict is Verdict.UNMET:
                assert alignment.touching, "a statement not found in the answer is unknown"
                for j in source.group_of[i]:
                    assert not kept & set(source.alignment[j].touching)
    assert min(seen[v] for v in (Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN)) > 10


def test_every_violation_has_its_twin_in_another_response(
    train: DegradeResult, bench: DegradeResult
) -> None:
    for result in (train, bench):
        for row in result.rows:
            violations, twins = Counter(), Counter()
            violating = 0
            for response in row.responses:
                here = _steps(response, "violation")
                violating += bool(here)
                assert len(here) <= 2
                violations.update(here)
                twins.update(_steps(response, "twin"))
                assert not {v.split("#")[0] for v in here} & {
                    t.split("#")[0] for t in _steps(response, "twin")
                }
            assert violations == twins  # same element, same place
            assert violating == CONFIG.responses // 2


def test_veto_labels_follow_from_the_phrases(train: DegradeResult, bench: DegradeResult) -> None:
    for result, split in ((train, "train"), (bench, "bench")):
        known = {e.describe(): e for g in load_bank(split).veto.values() for e in g}
        for row, response in _responses(result):
            assert row.rubric is not None
            put = [(known[s.split(":place")[0]], False) for s in _steps(response, "violation")]
            put += [(known[s.split(":place")[0]], True) for s in _steps(response, "twin")]
            violated = {e.name for e, twin in put if not twin}
            for criterion in row.rubric.tier(Tier.VETO):
                assert criterion.kind is not None
                verdict = response.verdicts[criterion.id]
                assert (verdict is Verdict.MET) == (criterion.kind.value in violated)
                if verdict is Verdict.UNMET:
                    for element, twin in put:
                        clean = element.twin_clean if twin else element.clean
                        assert criterion.kind in clean or (twin and element.name == criterion.kind)
                    assert put
                    changed = bool(_steps(response, "near_miss"))
                    assert not changed or criterion.kind not in (
                        VetoKind.SEVERE_HALLUCINATION,
                        VetoKind.HARMFUL_ADVICE,
                        VetoKind.MISSED_EMERGENCY,
                    )


def test_manner_labels_follow_from_the_elements(train: DegradeResult) -> None:
    seen: Counter[str] = Counter()
    for _, response in _responses(train):
        for name in ("empathy", "when_to_seek_care"):
            verdict = response.verdicts[f"excellence.{name}"]
            put = any(s.startswith(name) for s in _steps(response, "manner"))
            twin = any(s.startswith(name) for s in _steps(response, "manner_twin"))
            assert not (put and twin)
            if put:
                assert verdict is Verdict.MET
            elif verdict is Verdict.UNMET:
                assert twin
            elif verdict is Verdict.MET:  # the twin of a missed emergency sends people to care
                assert any(s.startswith("missed_emergency") for s in _steps(response, "twin"))
            seen[f"{name}.{verdict.value}"] += 1
        form = _steps(response, "form")[0]
        expected = {"organised": Verdict.MET, "run_on": Verdict.UNMET, "plain": Verdict.ABSTAIN}
        assert response.verdicts["excellence.organisation"] is expected[form]
        seen[form] += 1
    assert seen["empathy.met"] > 20
    assert seen["empathy.unmet"] > 20
    assert seen["organised"] > 10


def test_length_predicts_neither_s1_nor_s3(train: DegradeResult, bench: DegradeResult) -> None:
    for result in (train, bench):
        sizes, s1, s3 = [], [], []
        for row, response in _responses(result):
            assert row.rubric is not None
            known = [
                (c.weight or 0.0, response.verdicts[c.id] is Verdict.MET)
                for c in row.rubric.tier(Tier.PROFICIENCY)
                if response.verdicts[c.id].resolved
            ]
            weight = sum(w for w, _ in known)
            sizes.append(estimate_tokens(response.text))
            s1.append(sum(w for w, met in known if met) / weight if weight else np.nan)
            s3.append(
                sum(response.verdicts[c.id] is Verdict.MET for c in row.rubric.tier(Tier.VETO))
            )
        x, y = np.array(sizes), np.array(s1)
        of_s1 = np.corrcoef(x[~np.isnan(y)], y[~np.isnan(y)])[0, 1]
        of_s3 = np.corrcoef(x, s3)[0, 1]
        assert abs(of_s1) <= 0.1
        assert abs(of_s3) <= 0.1
        assert result.counts["correlation.length_s1"] == pytest.approx(of_s1, abs=1e-3)
        assert result.counts["correlation.length_s3"] == pytest.approx(of_s3, abs=1e-3)
        assert abs(result.counts["correlation.length_s1.within"]) <= 0.1
        assert abs(result.counts["correlation.length_s3.within"]) <= 0.1


def test_counts_add_up(train: DegradeResult) -> None:
    counts = train.counts
    assert counts["instructions"] == counts["instructions.used"] == 40
    assert counts["responses"] == 40 * CONFIG.responses
    for tier in Tier:
        labels = sum(counts.get(f"labels.{tier.value}.{v.value}", 0) for v in Verdict)
        assert labels == counts[f"criteria.{tier.value}"] * CONFIG.responses
        assert 0 < counts[f"criteria.{tier.value}.discordant"] <= counts[f"criteria.{tier.value}"]
    assert counts["steps.twin"] == sum(
        n for name, n in counts.items() if name.startswith("steps.violation.")
    )


def test_violations_stand_everywhere(train: DegradeResult, bench: DegradeResult) -> None:
    places = Counter(
        s.rsplit("=", 1)[1]
        for _, response in _responses(train) + _responses(bench)
        for s in _steps(response, "violation")
    )
    assert set(places) == {"start", "middle", "end"}
    assert min(places.values()) > 0.2 * sum(places.values())


def test_same_seed_same_rows_whatever_the_hash_seed(bench: DegradeResult) -> None:
    rows = load_kqa().bench[:4]
    config = DegradeConfig(candidates=2)
    here = fingerprint(degrade(rows, split="bench", seed=5, config=config).rows)
    assert here == fingerprint(degrade(rows, split="bench", seed=5, config=config).rows)
    assert here != fingerprint(degrade(rows, split="bench", seed=6, config=config).rows)
    code = (
        "from promedical.corpus.degrade import *; from promedical.demo.kqa import load_kqa;"
        "from promedical.records import fingerprint;"
        "print(fingerprint(degrade(load_kqa().bench[:4], split='bench', seed=5,"
        " config=DegradeConfig(candidates=2)).rows))"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_bench_families_never_in_train(train: DegradeResult, bench: DegradeResult) -> None:
    def families(result: DegradeResult) -> set[str]:
        heads = ("violation", "twin", "manner", "manner_twin")
        return {
            s.split("#")[0]
            for _, response in _responses(result)
            for head in heads
            for s in _steps(response, head)
        }

    assert families(train)
    assert families(bench)
    assert not families(train) & families(bench)


@pytest.mark.parametrize("responses", [5, 6])
def test_more_responses_and_another_counter(responses: int) -> None:
    config = DegradeConfig(
        responses=responses, max_tokens=150, count_tokens=lambda t: len(t) // 4, candidates=1
    )
    result = degrade(load_kqa().train[:8], split="train", seed=1, config=config)
    for row in result.rows:
        assert len(row.responses) == responses
        assert [r.id for r in row.responses] == [f"r{i}" for i in range(responses)]
        assert all(len(r.text) // 4 <= 150 for r in row.responses)
        placed = Counter(bool(_steps(r, "violation")) for r in row.responses)
        assert placed[True] in (responses // 2, (responses + 1) // 2)


def test_rows_without_statements_are_kept_and_counted() -> None:
    rows = load_kqa().train[:3]
    assert rows[0].rubric is not None
    bare = replace(
        rows[0], id="bare", rubric=Rubric(rows[0].rubric.tier(Tier.VETO), safety_only=True)
    )
    result = degrade([bare, *rows], split="train", seed=1, config=DegradeConfig(candidates=1))
    assert [r.id for r in result.rows] == ["bare", *(r.id for r in rows)]
    assert result.rows[0].responses == ()
    assert result.counts["instructions.without_statements"] == 1


def test_bad_settings_and_rows_are_named() -> None:
    rows = load_kqa().train[:2]
    with pytest.raises(DegradeError, match="responses: found 3, expected ≥ 4"):
        DegradeConfig(responses=3)
    with pytest.raises(DegradeError, match=r"near_miss_share: found 1\.5"):
        DegradeConfig(near_miss_share=1.5)
    with pytest.raises(DegradeError, match="ids repeat"):
        degrade([rows[0], rows[0]], split="train", seed=1)
    config = DegradeConfig(max_tokens=60, count_tokens=lambda t: 10 * len(t.split()))
    with pytest.raises(DegradeError, match="phrases alone need"):
        degrade(rows, split="train", seed=1, config=config)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(number=st.integers(0, 400), seed=st.integers(0, 99))
def test_every_near_miss_changes_what_it_says(number: int, seed: int) -> None:
    rows = load_kqa().train
    texts = [c.text for r in rows if r.rubric for c in r.rubric.criteria if is_statement(c)]
    text = as_sentence(texts[number % len(texts)])
    for miss in near_misses(text, random.Random(seed), taken=text):
        assert miss.text != text
        assert miss.kind in KINDS
        assert miss.old in text
        assert miss.new in miss.text


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("It is taken within 48-72 hours.", "unit", "It is taken within 48-72 weeks."),
        ("Flu can cause fever.", "direction", "Flu can prevent fever."),
        ("One common cause is age.", "direction", None),
        ("Use it twice a day.", "frequency", "Use it ten times a day."),
        ("You should not drive.", "negation", "You should drive."),
        ("Rest may help.", "negation", "Rest will not help."),
        ("Type 1 diabetes starts early.", "number", "Type 2 diabetes starts early."),
        ("It was found in 1998.", "number", None),
    ],
)
def test_near_misses_by_example(text: str, kind: str, expected: str | None) -> None:
    made = {m.text for m in near_misses(text, random.Random(0)) if m.kind == kind}
    assert made == (set() if expected is None else {expected})
