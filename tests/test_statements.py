"""Statement groups and alignment: groups partition, cover, and hold nothing that is not covered."""

from hypothesis import given
from hypothesis import strategies as st

from promedical.corpus.statements import (
    COVER_THRESHOLD,
    align,
    content_words,
    coverage,
    group_statements,
    rarity,
    sentences,
    words,
)

_TEXTS = st.lists(
    st.lists(
        st.sampled_from(
            ["fever", "cough", "warfarin", "aspirin", "dose", "rash", "child", "not", "liver"]
        ),
        min_size=1,
        max_size=6,
    ).map(" ".join),
    max_size=7,
)


@given(_TEXTS)
def test_groups_are_the_components_of_covering(texts: list[str]) -> None:
    groups = group_statements(texts)
    assert sorted(i for g in groups for i in g) == list(range(len(texts)))
    contents = [content_words(t) for t in texts]
    weights = rarity(texts)
    reach = {i: {i} for i in range(len(texts))}  # slow twin: closure by repeated union
    for _ in texts:
        for i in reach:
            for j in range(len(texts)):
                covers = max(
                    coverage(contents[i], contents[j], weights),
                    coverage(contents[j], contents[i], weights),
                )
                if covers >= COVER_THRESHOLD:
                    reach[i] |= reach[j]
    assert {frozenset(g) for g in groups} == {frozenset(r) for r in reach.values()}


def test_paraphrases_share_a_group_and_items_of_a_list_do_not() -> None:
    texts = [
        "The dose of Saxenda should not be increased to make up for a missed dose.",
        "An extra dose of Saxenda should not be taken to make up for a missed dose.",
        "Side effects of Saxenda include headache.",
        "Side effects of Saxenda include nausea.",
        "Side effects of Saxenda include fever.",
        "Side effects of Saxenda include insomnia.",
        "Side effects of Saxenda include dizziness.",
        "Side effects of Saxenda include tiredness.",
    ]
    assert group_statements(texts) == [(0, 1), (2,), (3,), (4,), (5,), (6,), (7,)]


def test_a_statement_that_holds_another_shares_its_group() -> None:
    texts = [
        "Herpes can cause proctitis.",
        "Herpes can cause proctitis in people who are immunocompromised.",
        "Honey is not given to infants.",
    ]
    assert group_statements(texts) == [(0, 1), (2,)]


def test_content_words_keep_negation_and_drop_stop_words() -> None:
    assert content_words("The patient should not take 8 tablets") == {
        "patient",
        "not",
        "take",
        "8",
        "tablet",
    }
    assert content_words("of the") == frozenset()
    assert words("Take 2.5 mg, don't stop") == ["take", "2.5", "mg", "don't", "stop"]


def test_coverage_is_a_share_of_the_part() -> None:
    assert coverage({"a", "b"}, {"a", "c", "d"}) == 0.5
    assert coverage({"a", "b"}, {"a"}, {"a": 3.0, "b": 1.0}) == 0.75
    assert coverage(set(), {"a"}) == 0.0


def test_alignment_finds_the_sentence_that_says_a_statement() -> None:
    answer = sentences(
        "Lutein is a carotenoid. It lowers damage to the retina, e.g. In smokers.\n"
        "Ibuprofen 2.4 g is the maximum per day."
    )
    assert len(answer) == 3
    first, second, third = align(
        [
            "The maximum of ibuprofen is 2.4 g per day",
            "Lutein reduces damage to the retina",
            "Vaccines prevent measles",
        ],
        answer,
    )
    assert first.holding == (2,)
    assert 1 in second.touching
    assert third.holding == third.touching == ()
