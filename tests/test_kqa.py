"""The demo corpus: its parts, their labels, and what was left out."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from importlib.resources import files

import pytest

from promedical.corpus.banks import UNIVERSAL_IDS
from promedical.demo.kqa import LABELS, QUESTIONS, load_kqa
from promedical.records import RecordError, fingerprint
from promedical.rubric import Tier, Verdict

DATA = files("promedical.demo") / "data" / "kqa"


@pytest.fixture(scope="module")
def kqa():
    return load_kqa()


def test_the_files_are_those_published():
    readme = DATA.joinpath("README.md").read_text(encoding="utf-8")
    for name in (QUESTIONS, LABELS):
        assert hashlib.sha256(DATA.joinpath(name).read_bytes()).hexdigest() in readme
    assert "Itay Manes" in DATA.joinpath("LICENSE").read_text(encoding="utf-8")


def test_the_parts_account_for_every_question(kqa):
    assert len(kqa.bench) == 49
    assert len(kqa.physicians) == 50
    assert len(kqa.calibration) == 25
    dropped = kqa.dropped
    left_out = dropped.questions_near_duplicate + len(dropped.without_must_have)
    assert len(kqa.train) + len(kqa.calibration) + len(kqa.bench) + left_out == 201
    assert (len(kqa.train), left_out) == (125, 2)
    assert {o.first for o in dropped.near_duplicates}.isdisjoint(r.id for r in kqa.train)
    assert dropped.empty_statements == 3
    assert dropped.merged_statements == 0


def test_no_id_is_on_two_sides(kqa):
    train, calibration, bench, physicians = (
        {row.id for row in part} for part in (kqa.train, kqa.calibration, kqa.bench, kqa.physicians)
    )
    assert train.isdisjoint(calibration)
    assert bench <= physicians
    assert (train | calibration).isdisjoint(physicians)
    assert len(physicians - bench) == 1


def test_statements_are_the_rubric(kqa):
    published = {}
    for line in DATA.joinpath(QUESTIONS).read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        published[data["Question"].strip()] = data
    for row in kqa.train + kqa.calibration + kqa.bench:
        data = published[row.messages[0].content]
        proficiency = row.rubric.tier(Tier.PROFICIENCY)
        must = [" ".join(s.split()) for s in data["Must_have"] if s.strip()]
        nice = [" ".join(s.split()) for s in data["Nice_to_have"] if s.strip()]
        own = [c for c in row.rubric.criteria if c.id not in UNIVERSAL_IDS]
        assert [c.text for c in own] == must + nice
        assert [c.text for c in proficiency] == must
        assert {c.weight for c in proficiency} == {1 / len(must)}
        assert {c.id for c in row.rubric.criteria} >= UNIVERSAL_IDS
        assert row.reference == data["Free_form_answer"].strip()
        assert not row.responses


def test_the_physicians_labels_are_all_there(kqa):
    text = DATA.joinpath(LABELS).read_text(encoding="utf-8")
    published = list(csv.DictReader(text.splitlines(keepends=True)))
    votes = [v for row in kqa.physicians for r in row.responses for v in r.votes.values()]
    assert len(votes) == len(published) == 399
    assert Counter(votes) == Counter((p["label_0"], p["label_1"], p["label_2"]) for p in published)
    verdicts = Counter(
        verdict
        for row in kqa.physicians
        for response in row.responses
        for criterion, verdict in response.verdicts.items()
        if criterion not in UNIVERSAL_IDS
    )
    entailed = sum(p["majority_label"] == "Entailment" for p in published)
    assert verdicts == {Verdict.MET: entailed, Verdict.UNMET: 399 - entailed}
    assert kqa.dropped.tied_votes == 0


def test_what_physicians_were_not_asked_is_unknown(kqa):
    for row in kqa.physicians:
        (response,) = row.responses
        assert set(response.verdicts) == {c.id for c in row.rubric.criteria}
        assert all(response.verdicts[i] is Verdict.ABSTAIN for i in UNIVERSAL_IDS)
        assert math.isclose(sum(c.weight for c in row.rubric.tier(Tier.PROFICIENCY)), 1)


def test_labels_share_ids_with_the_bench(kqa):
    bench = {row.id: {c.id for c in row.rubric.criteria} for row in kqa.bench}
    shared = [
        criterion in bench[row.id]
        for row in kqa.physicians
        if row.id in bench
        for criterion in row.responses[0].votes
    ]
    # Five labelled statements are two published ones joined together.
    assert len(shared) - sum(shared) == 5


def test_loading_twice_gives_the_same_rows_in_lists_of_their_own(kqa):
    again = load_kqa()
    for name in ("train", "calibration", "bench", "physicians"):
        assert fingerprint(getattr(again, name)) == fingerprint(getattr(kqa, name))
    again.train.clear()
    assert load_kqa().train


def write(folder, questions, labels=()):
    columns = [
        "Question",
        "llm_x",
        "answer",
        "claim",
        "category_x",
        *(f"label_{i}" for i in range(3)),
    ]
    folder.joinpath(QUESTIONS).write_text("\n".join(json.dumps(q) for q in questions))
    with folder.joinpath(LABELS).open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(dict(zip(columns, label, strict=True)) for label in labels)
    return folder


def question(text, must, nice=()):
    return {
        "Question": text,
        "Free_form_answer": f"About {text}",
        "Must_have": must,
        "Nice_to_have": list(nice),
    }


def test_what_is_left_out_is_counted(tmp_path):
    loaded = load_kqa(
        write(
            tmp_path,
            [
                question("What is gout?", ["Gout hurts.", " ", "gout  hurts"], ["Gout hurts!"]),
                question("Zebra stripes", [""], ["Nice."]),
                question("Are eggs healthy?", ["Eggs hold protein."]),
                question("are eggs  healthy", ["Quite different statement."]),
            ],
            [
                (
                    *("are eggs healthy?", "m", "Yes.", "Eggs hold protein.", "Must_have"),
                    *("Entailment", "Neutral", "Contradiction"),
                )
            ],
        )
    )
    assert [row.messages[0].content for row in loaded.bench] == ["Are eggs healthy?"]
    assert [row.messages[0].content for row in loaded.calibration] == ["What is gout?"]
    dropped = loaded.dropped
    assert (dropped.empty_statements, dropped.merged_statements) == (2, 2)
    assert dropped.without_must_have == ("Zebra stripes",)
    assert dropped.questions_near_duplicate == 1
    assert dropped.tied_votes == 1
    assert "are eggs  healthy" in {overlap.first_text for overlap in dropped.near_duplicates}
    (response,) = loaded.physicians[0].responses
    assert set(response.verdicts.values()) == {Verdict.ABSTAIN}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Question": " "}, r"line 1: Question: found ' '"),
        ({"Must_have": "one"}, r"line 1: Must_have: found 'one', expected a list"),
        ({"Free_form_answer": None}, r"line 1: Free_form_answer: found None"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    with pytest.raises(RecordError, match=message):
        load_kqa(write(tmp_path, [question("What?", ["That."]) | change]))


def test_a_bad_label_is_named(tmp_path):
    label = ("What?", "m", "Answer", "That.", "Must_have", "Entailment", "Neutral", "maybe")
    with pytest.raises(RecordError, match=r"row 1: label_2: found 'maybe'"):
        load_kqa(write(tmp_path, [question("What?", ["That."])], [label]))
    label = ("What?", "m", "Answer", "That.", "Tier", *["Neutral"] * 3)
    with pytest.raises(RecordError, match=r"row 1: category_x: found 'Tier'"):
        load_kqa(write(tmp_path, [question("What?", ["That."])], [label]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=rf"{QUESTIONS}: not found"):
        load_kqa(tmp_path)
