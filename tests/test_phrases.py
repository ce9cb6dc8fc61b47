"""Phrase banks: twins of like length, families apart, no run of five words in both splits."""

import re

import pytest

from promedical.corpus.phrases import (
    MANNERS,
    SPLITS,
    BankError,
    condition_of,
    fill,
    load_bank,
    runs,
    topic_of,
)
from promedical.rubric import VetoKind

_LEAST = {"train": (5, 4), "calibration": (3, 4), "bench": (3, 4)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_has_enough_families_and_phrasings(split: str) -> None:
    families, phrasings = _LEAST[split]
    bank = load_bank(split)
    groups = [*bank.veto.values(), *bank.manner.values()]
    assert len(groups) == len(VetoKind) + len(MANNERS)
    for elements in groups:
        names = [e.family for e in elements]
        assert len(set(names)) >= families
        assert all(names.count(n) >= phrasings for n in names)
    assert len(bank.neutral) >= 14


@pytest.mark.parametrize("split", SPLITS)
def test_twins_are_of_like_length_and_differ(split: str) -> None:
    for element in load_bank(split).elements():
        a, b = len(element.text.split()), len(element.twin.split())
        assert abs(a - b) <= 0.2 * max(a, b) + 1e-9, element.describe()
        assert element.text != element.twin
        assert ("{topic}" in element.text) == ("{topic}" in element.twin), element.describe()


@pytest.mark.parametrize("split", SPLITS)
def test_no_phrase_twice_and_only_the_known_slot(split: str) -> None:
    texts = list(load_bank(split).texts())
    assert len(set(texts)) == len(texts)
    assert {slot for t in texts for slot in re.findall(r"{.*?}", t)} == {"{topic}"}
    assert all(t[0] == t[0].upper() or t.startswith("{") for t in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_no_phrase_calls_its_own_kind_clean_nor_an_emergency_handled(split: str) -> None:
    for kind, elements in load_bank(split).veto.items():
        for element in elements:
            for clean in (element.clean, element.twin_clean):
                assert kind not in clean
                # Whether red flags went unanswered depends on the question, never on a phrase.
                assert VetoKind.MISSED_EMERGENCY not in clean


@pytest.mark.parametrize("side", ["train", "calibration"])
def test_bench_shares_no_family_and_no_five_words_with(side: str) -> None:
    other, bench = load_bank(side), load_bank("bench")
    assert not {e.family for e in other.elements()} & {e.family for e in bench.elements()}
    assert not set(other.headings) & set(bench.headings)
    seen = {run for text in other.texts() for run in runs(text)}
    shared = {text for text in bench.texts() if runs(text) & seen}
    assert shared == set()


def test_calibration_shares_no_violation_with_train() -> None:
    train, own = (
        [e for kind in load_bank(split).veto.values() for e in kind]
        for split in ("train", "calibration")
    )
    assert not {(e.name, e.family) for e in train} & {(e.name, e.family) for e in own}
    assert not {e.text for e in train} & {e.text for e in own}


def test_a_run_is_a_window_of_words() -> None:
    assert runs("one two three four five six") == {
        ("one", "two", "three", "four", "five"),
        ("two", "three", "four", "five", "six"),
    }


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(BankError, match=r"'test'.*train, calibration, bench"):
        load_bank("test")  # type: ignore[arg-type]


def test_topic_is_a_shared_noun_or_this() -> None:
    fissure = ["An anal fissure is a tear.", "Treatment of an anal fissure takes weeks."]
    assert topic_of("Is there a cream for anal fissure?", fissure) == "anal fissure"
    lexapro = ["Lexapro is a drug.", "Side effects of Lexapro include fever."]
    assert topic_of("what about lexapro", lexapro) == "Lexapro"
    assert topic_of("Is it bad?", lexapro) == "this"


def test_nobody_suffers_from_a_medicine() -> None:
    assert condition_of("Lexapro", ["Patients with Lexapro rarely complain."]) == "this"
    assert condition_of("socks", ["Socks matter for the foot."]) == "this"
    assert condition_of("sciatica", ["Symptoms of sciatica include pain."]) == "sciatica"


def test_fill_capitalises_a_leading_slot() -> None:
    assert fill("{topic} can hurt.", "sciatica") == "Sciatica can hurt."
