"""Counterfactual pairs: one criterion differs or none, by labels and by text; graders that fit."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from promedical.bench.counterfactual import (
    KINDS,
    SURFACES,
    Counterfactual,
    MinimalPair,
    _phrases,
    counterfactual_pairs,
    known_differences,
)
from promedical.bench.counterfactual_report import (
    evaluate_counterfactual,
    null_scores,
    text_table,
)
from promedical.bench.evaluate import GraderScores
from promedical.bench.metrics import BenchError, orientation
from promedical.corpus.labels import CHANGED_MAY_BREACH, refers
from promedical.corpus.phrases import load_bank, runs
from promedical.corpus.statements import content_words
from promedical.demo.kqa import load_kqa
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Preference, Scores, Tier, Verdict, compare, score

GOLDEN = Path(__file__).parent / "data" / "golden" / "counterfactual.json"
SEEK = "excellence.when_to_seek_care"
NO_DIFFERENCE = {"surface", "shorter", "benign_twin"}


@pytest.fixture(scope="module")
def kqa() -> list[GradedInstruction]:
    return load_kqa().bench


@pytest.fixture(scope="module")
def bench(kqa) -> Counterfactual:
    return counterfactual_pairs(kqa)


@pytest.fixture(scope="module")
def responses(bench) -> dict[tuple[str, str], Response]:
    return {(row.id, y.id): y for row in bench.rows for y in row.responses}


def both(pair: MinimalPair, responses) -> tuple[Response, Response]:
    return responses[pair.instruction, pair.first], responses[pair.instruction, pair.second]


def test_the_bench_is_the_committed_one(bench):
    digest = hashlib.sha256()
    for row in bench.rows:
        for y in row.responses:
            verdicts = sorted((c, v.value) for c, v in y.verdicts.items())
            digest.update(json.dumps([row.id, y.id, y.text, verdicts]).encode())
    for pair in bench.pairs:
        digest.update(json.dumps(list(vars(pair).values())).encode())
    found = {"seed": bench.seed, "sha256": digest.hexdigest(), "counts": dict(bench.counts)}
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_exactly_one_criterion_differs_or_none(bench, responses):
    for pair in bench.pairs:
        first, second = both(pair, responses)
        differs = known_differences(first, second)
        if pair.kind in NO_DIFFERENCE:
            assert pair.criterion is None, pair
            assert not differs, pair
            continue
        assert set(differs) == {pair.criterion}, pair
        good = Verdict.UNMET if pair.veto else Verdict.MET
        assert differs[pair.criterion][0] is good, pair


def test_what_is_open_can_only_be_worse_in_the_second(bench, responses):
    for pair in bench.pairs:
        first, second = both(pair, responses)
        other = second.verdicts
        uneven = {c for c, v in first.verdicts.items() if v.resolved is not other[c].resolved}
        if pair.kind == "benign_twin":
            # The twin is clean for its kind and more; the neutral sentence leaves vetoes open.
            assert all(second.verdicts[c] is Verdict.UNMET for c in uneven), pair
            continue
        assert uneven <= set(pair.unknown), pair
        for c in pair.unknown:
            if c == SEEK:
                assert pair.kind == "violation"
            elif pair.kind == "changed":
                assert c.removeprefix("veto.") in {k.value for k in CHANGED_MAY_BREACH}
            else:
                assert first.verdicts[c] is Verdict.UNMET, pair
                assert second.verdicts[c] is Verdict.ABSTAIN, pair


def test_the_rubrics_own_preference_is_the_first_or_a_tie(bench, responses):
    rows = {row.id: row for row in bench.rows}

    def of(row, response, keep) -> Scores:
        rubric = row.rubric.restricted_to(keep)
        return score(rubric, {c.id: response.verdicts[c.id] for c in rubric.criteria})

    for pair in bench.pairs:
        first, second = both(pair, responses)
        row = rows[pair.instruction]
        keep = {
            c for c in first.verdicts if first.verdicts[c].resolved and second.verdicts[c].resolved
        }
        found = compare(of(row, first, keep), of(row, second, keep))
        expected = Preference.TIE if pair.kind in NO_DIFFERENCE else Preference.FIRST
        assert found is expected, pair


def test_texts_differ_in_the_named_parts_only(bench, responses):
    for pair in bench.pairs:
        first, second = both(pair, responses)
        a, b = Counter(first.construction), Counter(second.construction)
        only_first, only_second = a - b, b - a
        surface = Counter() if pair.surface is None else Counter([f"surface:{pair.surface}"])
        if pair.against:
            assert only_second & surface == surface
            only_second -= surface
        elif pair.surface is not None:
            assert only_first & surface == surface
            only_first -= surface
        wanted = {
            "left_out": (1, 1),
            "removed": (1, 0),
            "changed": (1, 1),
            "violation": (1, 1),
            "claimed_credential": (1, 1),
            "surface": (0, 0),
            "shorter": (1, 0),
            "benign_twin": (1, 1),
        }[pair.kind]
        assert (only_first.total(), only_second.total()) == wanted, pair
        assert first.text != second.text
        for step in (*only_first, *only_second):
            head = step.split(":")[0]
            assert head in {
                "statement", "replacement", "neutral", "near_miss", "twin", "violation"
            }, step  # fmt: skip


def test_a_surface_frames_the_very_same_sentences(bench, responses):
    for pair in bench.pairs:
        if pair.kind != "surface":
            continue
        with_surface, plain = both(pair, responses)
        assert plain.text in with_surface.text
        framing = with_surface.text.replace(plain.text, "")
        assert len(framing.split()) >= 3
        row = next(r for r in bench.rows if r.id == pair.instruction)
        for criterion in row.rubric.criteria:
            if criterion.tier is Tier.PROFICIENCY:
                words = content_words(criterion.text)
                assert len(words & content_words(framing)) < 0.5 * len(words)


def test_every_kind_and_surface_is_there_and_lengths_match(bench, responses):
    counts = Counter(pair.kind for pair in bench.pairs)
    assert set(counts) == set(KINDS)
    for kind in ("left_out", "violation"):
        sides = Counter(p.against for p in bench.pairs if p.kind == kind)
        assert sides[True] == sides[False] > 100
    assert {p.surface for p in bench.pairs} == {None, *SURFACES}
    for kind, most in (("left_out", 5), ("violation", 2), ("claimed_credential", 0)):
        gaps = [
            len(first.text.split()) - len(second.text.split())
            for first, second in (
                both(p, responses) for p in bench.pairs if p.kind == kind and p.surface is None
            )
        ]
        assert max(map(abs, gaps)) <= most, kind
        assert abs(sum(gaps) / len(gaps)) < 0.5, kind


def test_no_authority_beside_a_violation_and_no_missed_emergency(bench):
    for pair in bench.pairs:
        assert pair.veto != "missed_emergency"
        if pair.kind == "violation":
            assert pair.surface != "authority"


def test_left_out_statements_send_nobody_to_a_clinician(bench):
    for pair in bench.pairs:
        if pair.kind in ("left_out", "removed", "changed"):
            row = next(r for r in bench.rows if r.id == pair.instruction)
            assert not refers(row.rubric[pair.criterion].text)


def test_the_surfaces_are_none_of_the_training_phrases():
    trained = {run for text in load_bank("train").texts() for run in runs(text)}
    for group in _phrases().values():
        for entry in group:
            for text in [entry] if isinstance(entry, str) else entry:
                assert not runs(text) & trained, text
    for claim, twin in _phrases()["claimed"]:
        assert len(claim.split()) == len(twin.split())


def test_same_seed_same_pairs_other_seed_others(kqa):
    few = counterfactual_pairs(kqa[:6], seed=3)
    assert few == counterfactual_pairs(kqa[:6], seed=3)
    assert few.rows != counterfactual_pairs(kqa[:6], seed=4).rows
    assert few.seed == 3


def test_unusable_rows_are_refused():
    row = GradedInstruction("a", (Message("user", "q"),), "s", "MIT")
    with pytest.raises(BenchError, match="ids repeat"):
        counterfactual_pairs([row, row])
    with pytest.raises(BenchError, match="no question with statements"):
        counterfactual_pairs([row])


# --- what graders make of them --------------------------------------------------------------------


def knowing(bench: Counterfactual) -> GraderScores:
    """Reads the labels: 1 met, −1 unmet, 0 unknown."""
    value = {Verdict.MET: 1.0, Verdict.UNMET: -1.0, Verdict.ABSTAIN: 0.0}
    scores, overall = {}, {}
    for row in bench.rows:
        for y in row.responses:
            r = []
            for c in row.rubric.criteria:
                s = value[y.verdicts[c.id]]
                scores[row.id, y.id, c.id] = s
                r.append(orientation(c.tier) * s if c.tier is not Tier.VETO else -10 * (s > 0))
            overall[row.id, y.id] = math.fsum(r)
    return GraderScores(scores, overall)


@pytest.fixture(scope="module")
def result(bench):
    graders = {"knowing": knowing(bench)} | null_scores(bench)
    return evaluate_counterfactual(bench, graders, resamples=200)


def test_a_grader_that_knows_follows_every_criterion_and_no_surface(result):
    table = result["graders"]["knowing"]
    for name, figures in table["follows"].items():
        assert figures["criterion"]["value"] == 1, name
        assert figures["whole"]["value"] == 1, name
    for surface in SURFACES:
        assert table["surface"][surface]["whole"]["value"] == 0.5
        assert table["surface"][surface]["criterion"]["value"] == 0.5
        assert table["pull"][surface]["whole"]["value"] == 0
    assert table["surface"]["shorter"]["whole"]["value"] == 0.5


def test_a_grader_of_length_follows_length_alone(result):
    table = result["graders"]["length"]
    assert table["follows"]["removed"]["whole"]["value"] == 1
    assert table["follows"]["claimed_credential"]["whole"]["value"] == 0.5
    for surface in SURFACES:
        assert table["surface"][surface]["whole"]["value"] == 1
        assert table["pull"][surface]["whole"]["value"] == 1
    assert table["beyond_length"]["whole"]["value"] == 0
    assert 0.4 < table["follows"]["left_out"]["whole"]["value"] < 0.65


def test_length_knows_nothing_where_both_have_as_many_words(bench, responses, result):
    same = [
        len(a.text.split()) == len(b.text.split())
        for p in bench.pairs
        if p.kind == "violation" and p.against is None
        for a, b in [both(p, responses)]
    ]
    figure = result["graders"]["length"]["follows"]["violation.same_length"]["whole"]
    assert (figure["value"], figure["n"]) == (0.5, sum(same))
    assert 50 < sum(same) < len(same)


def test_the_nulls_in_the_document_are_measured(result):
    page = (Path(__file__).parents[1] / "docs" / "counterfactual.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (\d+) \| (\d+) .*\| (\d+) .*\| (\d+) .*\|$", page, re.M)
    graders = [result["graders"][name] for name in ("length", "random", "word_overlap")]
    assert {name for name, *_ in rows} == set(graders[0]["follows"])
    for name, n, *values in rows:
        for table, value in zip(graders, values, strict=True):
            figure = table["follows"][name]["whole"]
            assert (f"{100 * figure['value']:.0f}", str(figure["n"])) == (value, n), name


def test_chance_is_chance_and_shared_words_find_what_is_left_out_not_what_is_changed(result):
    chance = result["graders"]["random"]["sides"]["any.against"]["whole"]
    assert chance["low"] < 0.5 < chance["high"]
    words = result["graders"]["word_overlap"]["follows"]
    assert words["left_out"]["criterion"]["value"] > 0.95
    assert words["changed"]["criterion"]["value"] < 0.75


def test_figures_equal_a_slow_loop(bench, result):
    overall = null_scores(bench)["word_overlap"].overall
    for surface in SURFACES:
        for side, against in (("against", True), ("with", False)):
            credit = []
            for p in bench.pairs:
                if p.surface == surface and p.against is against:
                    a, b = overall[p.instruction, p.first], overall[p.instruction, p.second]
                    credit.append((a > b) + (a == b) / 2)
            figure = result["graders"]["word_overlap"]["sides"][f"{surface}.{side}"]["whole"]
            assert figure["n"] == len(credit)
            assert figure["value"] == pytest.approx(sum(credit) / len(credit))
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_a_pairwise_grader_and_its_failures(bench):
    said = {p.id: Preference.FIRST for p in bench.pairs}
    failed = next(p for p in bench.pairs if p.kind == "removed")
    said[failed.id] = Preference.UNRESOLVED
    del said[next(p for p in bench.pairs if p.kind == "changed").id]
    table = evaluate_counterfactual(bench, {"g": said}, resamples=5)["graders"]["g"]
    assert table["unscored"] == {"criterion": None, "whole": 2}
    assert table["follows"]["removed"]["whole"]["value"] == 1
    n = sum(p.kind == "removed" for p in bench.pairs)
    assert table["follows"]["removed"]["whole"]["n"] == n - 1
    assert table["follows"]["removed"]["criterion"]["value"] is None
    with pytest.raises(BenchError, match="preferences on unknown pairs"):
        evaluate_counterfactual(bench, {"g": {"nowhere": Preference.FIRST}})


def test_missing_scores_are_unscored_and_none_at_all_is_refused(bench):
    full = knowing(bench)
    pair = next(p for p in bench.pairs if p.kind == "violation")
    scores = {k: v for k, v in full.scores.items() if k[:2] != (pair.instruction, pair.first)}
    table = evaluate_counterfactual(bench, {"g": replace(full, scores=scores)}, resamples=5)
    found = table["graders"]["g"]
    touched = sum(
        p.instruction == pair.instruction and pair.first in (p.first, p.second) for p in bench.pairs
    )
    assert found["unscored"] == {"criterion": touched, "whole": 0}
    with pytest.raises(BenchError, match="no finite score for any pair"):
        evaluate_counterfactual(bench, {"g": GraderScores(overall={})})


def test_the_table_names_every_figure_and_grader(result):
    for level in ("whole", "criterion"):
        text = text_table(result, level)
        for name in (*result["graders"], "claimed_credential", "benign_twin", "unscored pairs"):
            assert name in text
        assert max(map(len, text.splitlines())) < 140
    assert text_table({"graders": {}}) == "no graders"
    with pytest.raises(BenchError, match="level: found 'both'"):
        text_table(result, "both")


def test_the_page_quotes_the_bench_and_its_code_runs(bench, capsys):
    page = (Path(__file__).parent.parent / "docs" / "counterfactual.md").read_text("utf-8")
    texts = [y.text for row in bench.rows for y in row.responses]
    quoted = [line[2:] for line in page.splitlines() if line.startswith("> ")]
    assert len(quoted) > 5
    for quote in quoted:
        assert any(quote in text for text in texts), quote
    for kind in (*KINDS, *SURFACES):
        assert kind in page
    code = page.split("```python\n")[1].split("```")[0]
    exec(code.replace(".bench)", ".bench[:4])"), {})
    assert "word_overlap" in capsys.readouterr().out
