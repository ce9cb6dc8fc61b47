"""What keeps two alike questions apart, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.corpus.meaning_guard import (
    REASONS,
    Facts,
    Vocabulary,
    differs,
    facts,
    is_slip,
    one_slip_keys,
)
from promedical.corpus.spelling import corrections, respelt

SAME = [
    ("Take 500 mg of metformin", "take 0.5 g Glucophage"),
    ("Is 1,000 mcg safe?", "Is 1 mg safe?"),
    ("5 mg/dl", "50 mg/l"),
    ("a temperature of 98.6 °F", "a temperature of 37 °C"),
    ("pain for two weeks", "pain for 14 days"),
    ("my 2-year-old", "my 24 month old"),
    ("Can I take paracetamol?", "Could I please take Tylenol?"),
    ("Which hypertension drugs are there?", "Which high blood pressure medications are there?"),
    ("What are the symptoms of gout?", "What are the sypmtoms of gout"),
    ("type II diabetes", "Type 2 diabetes"),
    ("Is it right? I have gout.", "I have gout. Right?"),
    ("Hello doctor, I have gout. Thanks!", "I have gout"),
    ("服用阿莫西林500毫克", "服用阿莫西林0.5克"),
    ("发烧三天怎么办", "发热3天该如何处理"),
    ("对乙酰氨基酚可以吃吗", "请问扑热息痛能吃吗"),
    ("高血压的症状有哪些", "高血压都有什么表现?"),
    # "Is there or not" and "can one or not" ask; they deny nothing.
    ("孩子有没有发烧", "孩子是否发烧"),
    ("这个药有没有副作用", "这个药有副作用吗"),
    ("感冒能不能吃阿莫西林", "感冒可以吃阿莫西林吗"),
]
DIFFERENT = [
    ("dose", "Take 5 mg daily", "Take 50 mg daily"),
    ("dose", "Take 5 mg daily", "Take 5 g daily"),
    ("dose", "glucose of 90 mg/dl", "glucose of 90 mg/l"),
    ("age", "a 45-year-old man", "a 54-year-old man"),
    ("age", "a man aged 45", "a man"),
    ("duration", "cough for 3 days", "cough for 3 weeks"),
    ("duration", "for several days", "for several weeks"),
    ("number", "score of 7", "score of 8"),
    ("negation", "I have fever", "I do not have fever"),
    ("negation", "with no fever but cough", "with fever but no cough"),
    ("negation", "Is it safe?", "Is it unsafe?"),
    ("side", "pain in the left knee", "pain in the right knee"),
    ("side", "left knee and right hip", "right knee and left hip"),
    ("drug", "Can I take ibuprofen?", "Can I take naproxen?"),
    ("drug", "Can I take prednisone?", "Can I take prednisolone?"),
    ("sex", "a woman with gout", "a man with gout"),
    ("pregnancy", "Is ibuprofen safe?", "Is ibuprofen safe? I am pregnant."),
    ("life stage", "asthma in children", "asthma in adults"),
    ("course", "acute hepatitis", "chronic hepatitis"),
    ("order", "before meals", "after meals"),
    ("direction", "hyperkalemia", "hypokalemia"),
    ("direction", "increased potassium", "decreased potassium"),
    ("route", "oral vancomycin", "intravenous vancomycin"),
    ("designation", "hepatitis B", "hepatitis C"),
    ("designation", "type 1 diabetes", "type 2 diabetes"),
    ("aspect", "What causes gout?", "What are the treatments for gout?"),
    ("topic", "dysphagia", "dysphasia"),
    ("sex", "a woman and her male child, male", "a woman and her male child, female"),
    ("sex", "He is a man, his doctor a woman", "She is a woman, her doctor a man"),
    ("course", "Proteus syndrome", "Proteus-like syndrome"),
    ("side", "weak right wrist, strong left wrist", "weak left wrist, strong right wrist"),
    ("dose", "服用5毫克", "服用50毫克"),
    ("age", "患者30岁", "患者60岁"),
    ("duration", "咳嗽三天", "咳嗽三周"),
    ("negation", "有发热", "没有发热"),
    ("negation", "这个药有没有副作用", "这个药没有副作用"),
    ("negation", "有没有没有副作用的药", "有没有副作用的药"),
    ("side", "左侧胸痛", "右侧胸痛"),
    ("drug", "口服阿莫西林", "口服头孢氨苄"),
    ("sex", "女性患者", "男性患者"),
    ("pregnancy", "感冒能吃药吗", "怀孕感冒能吃药吗"),
    ("life stage", "儿童哮喘", "成人哮喘"),
    ("course", "急性胃炎", "慢性胃炎"),
    ("order", "饭前服用", "饭后服用"),
    ("aspect", "痛风的症状", "痛风的治疗"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same(a, b):
    assert differs(facts(a), facts(b)) is None


@pytest.mark.parametrize(("reason", "a", "b"), DIFFERENT)
def test_different(reason, a, b):
    assert differs(facts(a), facts(b)) == reason
    assert reason in REASONS


def test_only_a_vocabulary_knows_topics():
    a, b = facts("What is scurvy?"), facts("What is rickets?")
    common = {"scurvy": 500, "ricket": 500, "water": 500}
    assert differs(a, b) is None
    assert differs(a, b, Vocabulary({}, 1000)) == "topic"
    assert differs(a, b, Vocabulary(common, 1000)) == "wording"
    assert differs(a, b, Vocabulary(common, 1000, unshared=1.0)) is None


def test_a_slip_in_a_rare_word_is_forgiven_two_words_are_not():
    one, other = facts("deletion of 7p"), facts("deletion of 7q")
    assert differs(one, other, Vocabulary({}, 1000)) == "topic"
    a, b = facts("What is scurvy?"), facts("What is scruvy?")
    assert differs(a, b, Vocabulary({"scurvy": 4, "scruvy": 1}, 1000)) is None
    assert differs(a, b, Vocabulary({"scurvy": 4, "scruvy": 4}, 1000)) == "topic"


def test_facts_of_a_text():
    found = facts(
        "A 30-year-old woman has had pain in her left knee for 2 days, no fever; 5 mg of Advil"
    )
    assert found == Facts(
        quantities=((5.0, "mg"),),
        ages=(360.0,),
        durations=((48.0, "h"),),
        negations=("fever",),
        sides=("left knee",),
        words=("fever", "ibuprofen", "knee", "mostly she", "pain", "woman"),
    )


PIECES = st.sampled_from(
    [word for row in DIFFERENT for text in row[1:] for word in text.split()]
    + ["no", "left", "5", "mg", "/", "两", "周", "typo", "tpyo", "unsafe", "safe", "°", "²", "٣"]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=12).map(" ".join), st.text(max_size=30))


@given(TEXTS, TEXTS)
def test_symmetric(a, b):
    x, y = facts(a), facts(b)
    vocabulary = Vocabulary(dict.fromkeys(x.words, 3), 100)
    assert differs(x, y) == differs(y, x)
    assert differs(x, y, vocabulary) == differs(y, x, vocabulary)


@given(TEXTS)
def test_a_text_is_itself(text):
    assert differs(facts(text), facts(" " + text + " ?")) is None


@pytest.mark.parametrize(
    ("a", "b", "slip"),
    [
        ("gout", "gotu", True),
        ("gout", "gut", True),
        ("gout", "goout", True),
        ("gout", "goat", True),
        ("strong", "trying", False),
        ("gout", "gout", False),
        ("abcd", "badc", False),
    ],
)
def test_a_slip_is_one_letter(a, b, slip):
    assert is_slip(a, b) is is_slip(b, a) is slip
    assert not slip or not one_slip_keys(a).isdisjoint(one_slip_keys(b))


def test_misspelt_words_are_found_from_the_texts_alone():
    counts = {"gout": 90, "asthma": 50, "astmha": 2, "asthme": 40, "sjogren": 1, "metfromin": 2}
    found = corrections(counts, ratio=8)
    assert found == {"astmha": "asthma", "metfromin": "metformin"}
    # Listed words are never taken for slips, however rare.
    assert (
        corrections({"prednisone": 1000, "prednisolone": 1, "ileum": 1, "ilium": 99}, ratio=1) == {}
    )
    assert respelt("Astmha, 5 mg of METFROMIN?", found) == "asthma, 5 mg of metformin?"
    assert respelt("Gout, 5 mg", found) == "Gout, 5 mg"
