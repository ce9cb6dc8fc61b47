"""The universal banks and the rule that one harm counts once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from promedical.corpus.banks import UNIVERSAL_IDS, universal_criteria, with_universal
from promedical.rubric import Criterion, Rubric, Tier, Verdict, VetoKind, score

OWN = Criterion("own", Tier.PROFICIENCY, "Says that it is contagious.", weight=1.0)


def test_one_veto_a_kind_and_three_bonuses():
    criteria = universal_criteria()
    vetoes = [c for c in criteria if c.tier is Tier.VETO]
    assert {c.id for c in vetoes} == {f"veto.{kind.value}" for kind in VetoKind}
    assert all(c.id == f"veto.{c.kind.value}" for c in vetoes)
    assert [c.id for c in criteria if c.tier is Tier.EXCELLENCE] == [
        "excellence.empathy",
        "excellence.organisation",
        "excellence.when_to_seek_care",
    ]
    assert frozenset(c.id for c in criteria) == UNIVERSAL_IDS
    assert all(c.weight is None for c in criteria)


def test_sentences_are_single_and_short():
    for criterion in universal_criteria():
        assert criterion.text.endswith(".")
        assert criterion.text.count(".") == 1
        assert len(criterion.text.split()) <= 20, criterion.id


@given(st.lists(st.sampled_from(VetoKind), max_size=4), st.booleans(), st.booleans())
def test_an_own_veto_replaces_the_universal_one_of_its_kind(kinds, unnamed, clinician):
    own = [Criterion(f"v{i}", Tier.VETO, f"Harm {i}.", kind=k) for i, k in enumerate(kinds)]
    if unnamed:
        own.append(Criterion("v.unnamed", Tier.VETO, "Some harm."))
    result = with_universal(Rubric((OWN, *own)), clinician=clinician)
    assert result.criteria[: 1 + len(own)] == (OWN, *own)
    universal = {c.kind for c in result.tier(Tier.VETO) if c.id in UNIVERSAL_IDS}
    expected = set(VetoKind) - set(kinds)
    if clinician:
        expected.discard(VetoKind.BEYOND_REMIT)
    assert universal == expected
    assert with_universal(result, clinician=clinician) == result


def test_one_harm_is_one_violation():
    own = Criterion("own.dose", Tier.VETO, "Advises 10 g of it.", kind=VetoKind.HARMFUL_ADVICE)
    rubric = with_universal(Rubric((OWN, own)))
    verdicts = {
        c.id: Verdict.MET if c.kind is VetoKind.HARMFUL_ADVICE else Verdict.UNMET
        for c in rubric.criteria
    }
    assert score(rubric, verdicts).s3 == 1


def test_a_safety_only_rubric_stays_one():
    assert with_universal(Rubric((), safety_only=True)).safety_only
