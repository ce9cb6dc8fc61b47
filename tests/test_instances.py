"""Graded rows → units: labels, pairs, overall preferences, the cut to a budget, the counts."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.records import GradedInstruction, RecordError
from promedical.reward_model.instances import (
    OVERALL,
    OVERALL_TIER,
    cut_rubric,
    overall_pairs,
    training_trees,
)
from promedical.rubric import Criterion, Preference, Rubric, Tier, Verdict, compare, score
from tiny_reward import ABSTAIN, MET, UNMET, criteria, load_renderer, random_rows, row

VERDICTS = st.sampled_from([MET, UNMET, ABSTAIN, Verdict.ERROR])


@st.composite
def graded(draw: st.DrawFn) -> GradedInstruction:
    """A row with one to four responses and random verdicts, some of them missing."""
    asked = criteria(draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(0, 3)))
    n = draw(st.integers(0, 4))
    verdicts = draw(
        st.lists(
            st.lists(VERDICTS, min_size=len(asked), max_size=len(asked)), min_size=n, max_size=n
        )
    )
    return row(verdicts, asked)


def twin_overall(instruction: GradedInstruction) -> dict[tuple[int, int], str]:
    """Outcome of every pair of responses, from the definition in section 7.3."""
    found = {}
    for i, j in itertools.combinations(range(len(instruction.responses)), 2):
        a, b = instruction.responses[i].verdicts, instruction.responses[j].verdicts
        known = [c for c in instruction.rubric.criteria if a[c.id].resolved and b[c.id].resolved]
        total = sum(c.weight for c in known if c.tier is Tier.PROFICIENCY)
        if not total:
            found[i, j] = "no_known_proficiency"
            continue
        cut = Rubric(
            tuple(
                Criterion(c.id, c.tier, c.text, None if c.weight is None else c.weight / total)
                for c in known
            )
        )
        scores = [score(cut, {c.id: v[c.id] for c in known}) for v in (a, b)]
        found[i, j] = compare(*scores).value
    return found


@given(graded())
def test_overall_pairs_are_those_of_compare_over_known_criteria(instruction):
    expected = twin_overall(instruction)
    pairs, counts = overall_pairs(instruction)
    wanted = [ij for ij, outcome in expected.items() if outcome == Preference.FIRST.value]
    wanted += [ij[::-1] for ij, outcome in expected.items() if outcome == Preference.SECOND.value]
    assert sorted(pairs) == sorted(wanted)
    assert len(pairs) + sum(counts.values()) == len(expected)
    for outcome in ("tie", "unresolved", "no_known_proficiency"):
        assert counts[f"overall_{outcome}"] == list(expected.values()).count(outcome)


def test_a_missing_label_is_unknown():
    instruction = row([[MET, MET, MET, UNMET], [UNMET, MET, MET, UNMET]])
    first, second = instruction.responses
    without = dict(first.verdicts)
    del without["p0"]
    bare = GradedInstruction(
        **{
            **vars(instruction),
            "responses": (type(first)("r0", "test", "Take 0.", without), second),
        }
    )
    assert overall_pairs(instruction)[0] == [(0, 1)]
    assert overall_pairs(bare) == ([], {"overall_tie": 1})


def test_a_row_without_rubric_is_refused():
    bare = GradedInstruction("q", row([]).messages, "test", "none")
    for call in (
        overall_pairs,
        lambda r: cut_rubric(r, max_criteria=3),
        lambda r: training_trees([r], load_renderer()),
    ):
        with pytest.raises(RecordError, match=r"'q'.*rubric"):
            call(bare)


# --- cutting to a budget --------------------------------------------------------------------------


@given(graded(), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3))
def test_cut_rubric(instruction, min_veto, more, seed):
    budget = min_veto + more
    cut = cut_rubric(instruction, max_criteria=budget, min_veto=min_veto, seed=seed)
    before, after = instruction.rubric, cut.rubric
    assert len(after.criteria) == min(budget, len(before.criteria))
    assert len(after.tier(Tier.VETO)) >= min(min_veto, len(before.tier(Tier.VETO)))
    assert math.fsum(c.weight for c in after.tier(Tier.PROFICIENCY)) == pytest.approx(1)
    kept = [c.id for c in after.criteria]
    assert kept == [c.id for c in before.criteria if c.id in kept]
    for mine, theirs in zip(cut.responses, instruction.responses, strict=True):
        assert mine.verdicts == {c: v for c, v in theirs.verdicts.items() if c in kept}
        assert (mine.id, mine.text) == (theirs.id, theirs.text)
    assert cut == cut_rubric(instruction, max_criteria=budget, min_veto=min_veto, seed=seed)


def test_cut_rubric_prefers_what_gives_pairs_then_what_is_known():
    asked = criteria(4, 0, 3)
    #         p0    p1     p2       p3       v0     v1   v2
    one = [ABSTAIN, MET, ABSTAIN, MET, UNMET, ABSTAIN, UNMET]
    two = [ABSTAIN, MET, ABSTAIN, UNMET, UNMET, ABSTAIN, MET]
    instruction = row([one, two], asked)
    kept = {
        tuple(c.id for c in cut_rubric(instruction, max_criteria=n, min_veto=1).rubric.criteria)
        for n in (2, 3, 4)
    }
    assert ("p3", "v2") in kept
    assert ("p1", "p3", "v0", "v2") in kept


def test_cut_rubric_draws_by_seed_and_refuses_a_budget_without_room():
    instruction = row([[MET] * 12], criteria(10, 0, 2))
    drawn = {cut_rubric(instruction, max_criteria=5, seed=s).rubric for s in range(8)}
    assert len(drawn) > 1
    with pytest.raises(RecordError, match=r"max_criteria: found 2.*min_veto = 2"):
        cut_rubric(instruction, max_criteria=2, min_veto=2)


# --- training trees -------------------------------------------------------------------------------


def leaf_of(instruction, tree, response, text):
    """Index of the leaf that asks `text` about a response."""
    alone = load_renderer().tree(
        instruction.messages, [r.text for r in instruction.responses], [(response, text)]
    )
    wanted = alone.leaves[0].tokens
    (found,) = [
        i
        for i, leaf in enumerate(tree.leaves)
        if leaf.response == response and leaf.tokens == wanted
    ]
    return found


@given(graded())
def test_units_hold_every_known_label_and_every_discordant_pair(instruction):
    found = training_trees([instruction], load_renderer())
    wanted, unknown = {}, 0
    for c in instruction.rubric.criteria:
        known = {
            i: r.verdicts[c.id] is MET
            for i, r in enumerate(instruction.responses)
            if r.verdicts[c.id].resolved
        }
        unknown += len(instruction.responses) - len(known)
        # The better response is the one that meets it, or does not commit the violation.
        pairs = {
            (i, j)
            for i, j in itertools.permutations(known, 2)
            if known[i] != known[j] and known[i] == (c.tier is not Tier.VETO)
        }
        if known:
            wanted[c.text] = (c.tier.value, known, pairs)
    overall, _ = overall_pairs(instruction)
    if overall:
        wanted[OVERALL] = (OVERALL_TIER, {}, set(overall))

    if not wanted:
        assert not found.trees
        assert found.counts["instructions_without_units"] == 1
        return
    (trained,) = found.trees
    assert trained.instruction_id == instruction.id
    assert len(trained.units) == len(wanted)
    for unit, (text, (tier, known, pairs)) in zip(trained.units, wanted.items(), strict=True):
        responses = {i for pair in pairs for i in pair} | set(known)
        at = {i: leaf_of(instruction, trained.tree, i, text) for i in responses}
        assert unit.tier == tier
        assert unit.orientation == (-1 if tier == "veto" else 1)
        assert set(unit.points) == {(at[i], int(true)) for i, true in known.items()}
        assert sorted(unit.pairs) == sorted((at[i], at[j]) for i, j in pairs)
    assert found.counts.get("labels_unknown", 0) == unknown


@given(st.integers(0, 50))
def test_counts_add_up(seed):
    rows = random_rows(4, seed=seed)
    found = training_trees(rows, load_renderer())
    counts = found.counts
    units = [unit for tree in found.trees for unit in tree.units]
    tiers = [tier.value for tier in Tier]
    labels = sum(len(r.rubric.criteria) * len(r.responses) for r in rows)
    assert counts["trees"] == len(found.trees)
    assert counts["units"] == len(units)
    assert counts["leaves"] == sum(len(tree.tree.leaves) for tree in found.trees)
    assert labels == counts.get("labels_unknown", 0) + sum(
        counts.get(f"points_{tier}", 0) for tier in tiers
    )
    for tier in [*tiers, OVERALL_TIER]:
        mine = [unit for unit in units if unit.tier == tier]
        assert counts.get(f"pairs_{tier}", 0) == sum(len(unit.pairs) for unit in mine)
        assert counts.get(f"points_{tier}", 0) == sum(len(unit.points) for unit in mine)
    considered = sum(math.comb(len(r.responses), 2) for r in rows)
    left_out = ("tie", "unresolved", "no_known_proficiency")
    assert considered == counts.get("pairs_overall", 0) + sum(
        counts.get(f"overall_{why}", 0) for why in left_out
    )


def test_the_scalar_baseline_asks_the_overall_question_only():
    rows = random_rows(6, seed=3)
    scalar = training_trees(rows, load_renderer(), explicit=False)
    both = training_trees(rows, load_renderer())
    bare = training_trees(rows, load_renderer(), overall=False)
    assert scalar.counts["pairs_overall"] == both.counts["pairs_overall"] > 0
    assert {unit.tier for tree in scalar.trees for unit in tree.units} == {OVERALL_TIER}
    assert all(not unit.points for tree in scalar.trees for unit in tree.units)
    assert OVERALL_TIER not in {unit.tier for tree in bare.trees for unit in tree.units}
    texts = {leaf.tokens for tree in scalar.trees for leaf in tree.tree.leaves}
    assert len(texts) == 1


def test_abstentions_alone_give_no_instance():
    found = training_trees([row([[ABSTAIN] * 4, [ABSTAIN] * 4])], load_renderer())
    assert found.trees == ()
    assert found.counts == {
        "labels_unknown": 8,
        "criteria_unknown_everywhere": 4,
        "overall_no_known_proficiency": 1,
        "instructions_without_units": 1,
        "trees": 0,
    }


def test_responses_with_the_same_verdict_are_ties_if_asked_for():
    rows = random_rows(6, seed=4)
    plain, with_ties = (training_trees(rows, load_renderer(), ties=ties) for ties in (False, True))
    found = 0
    for before, after in zip(plain.trees, with_ties.trees, strict=True):
        assert after.tree == before.tree
        for old, unit in zip(before.units, after.units, strict=True):
            assert (old.ties, old.points, old.pairs) == ((), unit.points, unit.pairs)
            target = dict(unit.points)
            compared = {frozenset(pair) for pair in (*unit.pairs, *unit.ties)}
            if unit.tier == OVERALL_TIER:
                assert unit.ties == ()
                continue
            assert len(compared) == len(unit.pairs) + len(unit.ties) == math.comb(len(target), 2)
            assert all(target[a] == target[b] for a, b in unit.ties)
            found += len(unit.ties)
    assert found == sum(n for name, n in with_ties.counts.items() if name.startswith("ties_")) > 0
