"""Votes to gold verdicts: the rules as a table, and what must hold for any votes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.review.consensus import Ballot, ConsensusError, Standing, decide
from promedical.rubric import Verdict

MET, UNMET, SAY = Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN
KINDS = [(v, d) for v in (MET, UNMET, SAY) for d in (False, True)]
DIFFER = "differ"


def cast(*first: Verdict | str, third: Verdict | str | None = None) -> list[Ballot]:
    """Votes of readers a, b, …; "differ" is met with the flag that guidelines differ."""
    given = [(vote, False) for vote in first] + ([] if third is None else [(third, True)])
    return [
        Ballot(chr(97 + i), MET if v == DIFFER else Verdict(v), v == DIFFER, is_third)
        for i, (v, is_third) in enumerate(given)
    ]


@st.composite
def ballots(draw: st.DrawFn, thirds: int = 1) -> list[Ballot]:
    firsts = draw(st.lists(st.sampled_from(KINDS), max_size=5))
    third = draw(st.lists(st.sampled_from(KINDS), max_size=thirds)) if len(firsts) >= 2 else []
    given = [(kind, False) for kind in firsts] + [(kind, True) for kind in third]
    return [Ballot(str(i), v, d, is_third) for i, ((v, d), is_third) in enumerate(given)]


@pytest.mark.parametrize(
    ("votes", "standing", "gold", "reason"),
    [
        (cast(), Standing.PENDING, None, ""),
        (cast(MET), Standing.PENDING, None, ""),
        (cast(MET, MET), Standing.AGREED, MET, ""),
        (cast(UNMET, UNMET), Standing.AGREED, UNMET, ""),
        (cast(MET, UNMET), Standing.NEEDS_THIRD, None, ""),
        (cast(MET, SAY), Standing.NEEDS_THIRD, None, ""),
        (cast(UNMET, DIFFER), Standing.NEEDS_THIRD, None, ""),
        (cast(SAY, SAY), Standing.CONTESTED, None, "cannot say"),
        (cast(DIFFER, DIFFER), Standing.CONTESTED, None, "guidelines differ"),
        (cast(SAY, DIFFER), Standing.CONTESTED, None, "guidelines differ"),
        (cast(MET, UNMET, third=UNMET), Standing.ADJUDICATED, UNMET, ""),
        (cast(SAY, UNMET, third=UNMET), Standing.ADJUDICATED, UNMET, ""),
        (cast(DIFFER, MET, third=MET), Standing.ADJUDICATED, MET, ""),
        (cast(MET, UNMET, third=SAY), Standing.CONTESTED, None, "cannot say"),
        (cast(MET, UNMET, third=DIFFER), Standing.CONTESTED, None, "guidelines differ"),
        (cast(SAY, MET, third=UNMET), Standing.CONTESTED, None, "cannot say"),
        (cast(MET, MET, UNMET), Standing.AGREED, MET, ""),
        (cast(MET, MET, UNMET, UNMET), Standing.NEEDS_THIRD, None, ""),
        (cast(MET, SAY, UNMET), Standing.CONTESTED, None, "cannot say"),
        (cast(MET, MET, SAY, UNMET), Standing.NEEDS_THIRD, None, ""),
    ],
)
def test_the_rules(votes, standing, gold, reason) -> None:
    found = decide(votes)
    assert (found.standing, found.gold, found.reason) == (standing, gold, reason)


def test_three_first_readers_are_waited_for_if_three_were_asked() -> None:
    assert decide(cast(MET, MET), first_readers=3).standing is Standing.PENDING
    assert decide(cast(MET, MET, UNMET), first_readers=3).gold is MET


@given(ballots(), st.randoms())
def test_the_order_of_votes_never_matters(votes, random) -> None:
    mixed = list(votes)
    random.shuffle(mixed)
    assert decide(mixed) == decide(votes)


@given(ballots())
def test_every_vote_is_kept_and_gold_is_what_most_of_all_voters_said(votes) -> None:
    found = decide(votes)
    assert Counter(found.ballots) == Counter(votes)
    said = Counter(b.verdict for b in votes if not b.disputed and b.verdict.resolved)
    majority = [v for v, n in said.items() if n * 2 > len(votes)]
    enough = sum(not b.third for b in votes) >= 2
    assert found.gold == (majority[0] if majority and enough else None)
    assert found.verdict is (found.gold or Verdict.ABSTAIN)
    assert (found.gold is None) == (
        found.standing in (Standing.PENDING, Standing.NEEDS_THIRD, Standing.CONTESTED)
    )
    assert bool(found.reason) == (found.standing is Standing.CONTESTED)


@given(ballots(thirds=0))
def test_a_third_is_asked_exactly_when_one_could_settle_it(votes) -> None:
    found = decide(votes)
    outcomes = [decide([*votes, Ballot("third", v, d, True)]) for v, d in KINDS]
    settled = any(o.standing is Standing.ADJUDICATED for o in outcomes)
    if found.standing in (Standing.NEEDS_THIRD, Standing.CONTESTED):
        assert settled == (found.standing is Standing.NEEDS_THIRD)
    assert not any(o.standing is Standing.NEEDS_THIRD for o in outcomes)


@given(ballots())
def test_met_and_unmet_are_treated_alike(votes) -> None:
    other = {MET: UNMET, UNMET: MET, SAY: SAY}
    mirrored = decide([replace(b, verdict=other[b.verdict]) for b in votes])
    found = decide(votes)
    assert mirrored.standing is found.standing
    assert mirrored.verdict is other[found.verdict]


@given(ballots())
def test_a_flag_never_makes_gold(votes) -> None:
    flagged = decide([replace(b, disputed=True) for b in votes])
    assert flagged.gold is None
    # What cannot say and the flag support is the same: nothing.
    unsure = decide([replace(b, verdict=SAY, disputed=False) if b.disputed else b for b in votes])
    assert (unsure.standing, unsure.gold) == (decide(votes).standing, decide(votes).gold)


def test_votes_that_cannot_be_counted_are_named() -> None:
    with pytest.raises(ConsensusError, match="expected each once"):
        decide([Ballot("a", MET), Ballot("a", UNMET)])
    with pytest.raises(ConsensusError, match="expected met, unmet or abstain"):
        Ballot("a", Verdict.ERROR)
    with pytest.raises(ConsensusError, match="expected at least 2"):
        decide([], first_readers=1)
