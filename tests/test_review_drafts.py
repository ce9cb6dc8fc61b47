"""Draft rubrics: weights, provenance, diff and its inverse, what may be kept and what may not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.review import drafts
from promedical.review.drafts import DraftError, Edit
from promedical.rubric import Tier, VetoKind

TIERS = [tier.value for tier in Tier]
KINDS = [kind.value for kind in VetoKind]


def criterion(id: str, tier: str = "proficiency", weight: float | None = None, **more: Any) -> dict:
    text = more.pop("text", f"Names the dose of drug {id} for adults.")
    return {
        "id": id,
        "tier": tier,
        "axis": None,
        "kind": None,
        "text": text,
        "weight": weight,
    } | more


DRAFT = drafts.opened(
    [
        criterion("a", weight=0.5, axis="accuracy"),
        criterion("b", weight=0.3),
        criterion("c", weight=0.2),
        criterion("e", "excellence", axis="empathy"),
        criterion("v", "veto", kind="harmful_advice"),
    ]
)


def weights(draft: drafts.Draft) -> dict[str, float]:
    return {c.id: c.weight for c in draft if c.weight is not None}


@st.composite
def draft_rubrics(draw: st.DrawFn) -> drafts.Draft:
    tiers = draw(st.lists(st.sampled_from(TIERS), min_size=1, max_size=7))
    return drafts.opened(
        criterion(
            f"d{i}",
            tier,
            draw(st.floats(0, 10)) if tier == "proficiency" else None,
            kind=draw(st.sampled_from([None, *KINDS])) if tier == "veto" else None,
            axis=draw(st.sampled_from([None, "accuracy"])),
        )
        for i, tier in enumerate(tiers)
    )


def step(draft: drafts.Draft, lot: random.Random, number: int) -> drafts.Draft:
    """One random operation, such as a person may do."""
    ids = [c.id for c in draft]
    new = f"n{number}"
    if not ids:
        return drafts.add(draft, lot.choice(TIERS), new)
    c = lot.choice(draft)
    doing = lot.randrange(8)
    if doing == 0:
        return drafts.edit(draft, c.id, text=f"Says {number}.")
    if doing == 1:
        return drafts.edit(draft, c.id, tier=lot.choice(TIERS))
    if doing == 2 and c.weight is not None:
        return drafts.edit(draft, c.id, weight=lot.choice([0, 0.25, 1, lot.random()]))
    if doing == 3:
        return drafts.add(draft, lot.choice(TIERS), new, after=lot.choice([None, c.id]))
    if doing == 4:
        return drafts.remove(draft, c.id)
    if doing == 5:
        return drafts.split(draft, c.id, [(f"{new}x", "One."), (f"{new}y", "Two.")])
    peers = [o.id for o in draft if o.tier == c.tier and o.id != c.id]
    if doing == 6 and peers:
        return drafts.merge(draft, c.id, lot.choice(peers), new)
    return drafts.move(draft, c.id, lot.choice([-1, 1]))


@st.composite
def sessions(draw: st.DrawFn) -> list[drafts.Draft]:
    """The states that a draft goes through in somebody's hands."""
    lot = random.Random(draw(st.integers(0, 2**32)))
    states = [draw(draft_rubrics())]
    for number in range(draw(st.integers(0, 9))):
        states.append(step(states[-1], lot, number))
    return states


@given(sessions())
def test_weights_always_sum_to_one(states: list[drafts.Draft]) -> None:
    for draft in states:
        shares = weights(draft)
        assert set(shares) == {c.id for c in draft if c.tier == "proficiency"}
        assert all(0 <= w <= 1 for w in shares.values())
        assert not shares or math.isclose(math.fsum(shares.values()), 1, abs_tol=1e-9)


@given(sessions())
def test_every_criterion_names_where_it_comes_from(states: list[drafts.Draft]) -> None:
    known = {c.id for c in states[0]}
    for draft in states:
        for c in draft:
            assert set(c.sources) <= known
            assert len(set(c.sources)) == len(c.sources)
            assert c.sources == (c.id,) if c.id in known else c.id not in c.sources


@given(sessions())
def test_diff_applied_gives_the_edited_rubric(states: list[drafts.Draft]) -> None:
    edits = drafts.diff(states[0], states[-1])
    assert drafts.apply(states[0], edits) == states[-1]
    assert edits == drafts.diff(states[0], states[-1])
    through_json = [
        Edit(e["what"], e["criterion"], e["from"], e["to"]) for e in (x.to_json() for x in edits)
    ]
    assert drafts.apply(states[0], through_json) == states[-1]
    assert drafts.diff(states[-1], states[-1]) == ()


@given(sessions())
def test_a_state_on_the_way_can_be_saved_and_read_again(states: list[drafts.Draft]) -> None:
    content = drafts.to_json(states[0])
    for draft in states:
        answer = drafts.to_json(draft)
        assert drafts.from_json(answer) == draft
        assert drafts.find_problems(content, answer, finish=False) == []


def test_an_untouched_rubric_has_no_edits() -> None:
    assert drafts.diff(DRAFT, DRAFT) == ()
    assert not drafts.edited(drafts.diff(DRAFT, drafts.from_json(drafts.to_json(DRAFT))))


def test_setting_a_weight_keeps_the_others_proportions() -> None:
    after = drafts.edit(DRAFT, "a", weight=0.75)
    assert weights(after) == pytest.approx({"a": 0.75, "b": 0.15, "c": 0.1})
    found = drafts.diff(DRAFT, after)
    assert [(e.what, e.criterion) for e in found] == [
        ("weight", "a"),
        ("rescaled", "b"),
        ("rescaled", "c"),
    ]


def test_removing_one_rescales_the_rest_which_nobody_edited() -> None:
    after = drafts.remove(DRAFT, "a")
    assert weights(after) == pytest.approx({"b": 0.6, "c": 0.4})
    assert [(e.what, e.criterion) for e in drafts.diff(DRAFT, after)] == [
        ("removed", "a"),
        ("rescaled", "b"),
        ("rescaled", "c"),
    ]


def test_an_added_criterion_has_an_equal_part() -> None:
    after = drafts.add(DRAFT, "proficiency", "n", after="a")
    assert [c.id for c in after] == ["a", "n", "b", "c", "e", "v"]
    assert weights(after)["n"] == pytest.approx(1 / 4)
    assert weights(after)["a"] / weights(after)["b"] == pytest.approx(5 / 3)


def test_split_and_merge_keep_weight_and_provenance() -> None:
    after = drafts.split(DRAFT, "a", [("a1", "One thing."), ("a2", "Another thing.")])
    assert weights(after) == pytest.approx({"a1": 0.25, "a2": 0.25, "b": 0.3, "c": 0.2})
    assert [c.axis for c in after[:2]] == ["accuracy", "accuracy"]
    merged = drafts.merge(after, "a2", "c", "m")
    m = merged[1]
    assert (m.id, m.sources, m.axis) == ("m", ("a", "c"), "accuracy")
    assert m.weight == pytest.approx(0.45)
    assert m.text == "Another thing. Names the dose of drug c for adults."
    assert [(e.what, e.criterion) for e in drafts.diff(DRAFT, merged)] == [
        ("replaced", "a"),
        ("replaced", "c"),
        ("split", "a1"),
        ("merged", "m"),
        ("order", ""),
    ]


def test_another_tier_drops_what_it_does_not_have() -> None:
    after = drafts.edit(drafts.edit(DRAFT, "a", tier="excellence"), "v", tier="proficiency")
    a, v = after[0], after[-1]
    assert (a.weight, v.kind) == (None, None)
    assert v.weight == pytest.approx(1 / 3)
    kinds = {(e.what, e.criterion) for e in drafts.diff(DRAFT, after) if e.what in drafts.COUNTED}
    assert kinds == {("tier", "a"), ("tier", "v"), ("kind", "v")}


def test_moving_stays_within_the_tier() -> None:
    after = drafts.move(drafts.move(DRAFT, "a", 1), "a", 1)
    assert [c.id for c in after] == ["b", "c", "a", "e", "v"]
    assert drafts.move(after, "a", 1) == after
    moved = [e for e in drafts.diff(DRAFT, after) if e.what == "moved"]
    assert [e.criterion for e in moved] == ["a"]


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        (lambda: drafts.edit(DRAFT, "zz", text="x"), "'zz': not in the draft"),
        (lambda: drafts.edit(DRAFT, "e", weight=0.5), "expected none in the tier excellence"),
        (lambda: drafts.edit(DRAFT, "a", weight=1.5), "a share of 0 to 1"),
        (lambda: drafts.edit(DRAFT, "a", weight=math.nan), "a share of 0 to 1"),
        (lambda: drafts.edit(DRAFT, "a", name="x"), "no field 'name'"),
        (lambda: drafts.merge(DRAFT, "a", "e", "m"), "two of one tier"),
        (lambda: drafts.split(DRAFT, "a", [("n", "x")]), "two or more"),
        (lambda: drafts.split(DRAFT, "a", [("n", "x"), ("n", "y")]), "the id is taken"),
        (lambda: drafts.add(DRAFT, "veto", "a"), "the id is taken"),
    ],
)
def test_what_a_draft_does_not_allow(operation: Any, says: str) -> None:
    with pytest.raises(DraftError, match=says):
        operation()


def test_same_rubric_looks_at_what_is_said() -> None:
    renamed = drafts.split(DRAFT, "a", [("x", DRAFT[0].text), ("y", "Names the interval.")])
    other = drafts.split(DRAFT, "a", [("p", "Names the  interval."), ("q", DRAFT[0].text)])
    assert drafts.same_rubric(renamed, other)
    assert not drafts.same_rubric(DRAFT, renamed)
    assert not drafts.same_rubric(DRAFT, drafts.edit(DRAFT, "a", weight=0.51))


def problems(change: dict[str, Any], finish: bool = True) -> list[str]:
    answer = drafts.to_json(DRAFT)
    answer[0] = answer[0] | change
    return drafts.find_problems(drafts.to_json(DRAFT), answer, finish=finish)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tier": "bonus"}, "tier"),
        ({"kind": "harmful_advice"}, "kind"),
        ({"weight": None}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": -0.1}, "weight"),
        ({"weight": True}, "weight"),
        ({"text": 3}, "text"),
        ({"text": "x" * 2001}, "text"),
        ({"axis": 3}, "axis"),
        ({"from": ["b"]}, "its own id"),
        ({"id": "n", "from": ["nowhere"]}, "ids of the draft"),
        ({"id": "b", "from": ["b"]}, "twice"),
        ({"extra": 1}, "expected an object with"),
    ],
)
def test_an_answer_of_the_wrong_form_is_refused_even_as_a_draft(change: dict, says: str) -> None:
    found = problems(change, finish=False)
    assert len(found) >= 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": " "}, "is empty"),
        ({"text": "Good answer"}, "too_short"),
        ({"text": "Does the answer name the dose?"}, "question"),
        ({"weight": 0.9}, "sum to 1.4"),
    ],
)
def test_an_unfinished_text_or_weight_may_be_kept_but_not_finished(change: dict, says: str) -> None:
    assert problems(change, finish=False) == []
    assert says in problems(change)[0]


def test_wording_that_the_draft_had_is_the_reviewers_to_judge() -> None:
    draft = drafts.opened([criterion("a", weight=1, text="Short?")])
    as_json = drafts.to_json(draft)
    assert drafts.find_problems(as_json, as_json, finish=True) == []


def test_a_rubric_without_proficiency_has_to_be_meant() -> None:
    only_veto = drafts.to_json(DRAFT[-1:])
    content = drafts.to_json(DRAFT)
    assert drafts.find_problems(content, only_veto, finish=True) == [
        "criteria: expected at least one in the tier of proficiency"
    ]
    assert drafts.find_problems(content, only_veto, finish=True, safety_only=True) == []


def test_a_finished_draft_is_a_rubric() -> None:
    rubric = drafts.to_rubric(drafts.edit(DRAFT, "b", text="  Names\n the   dose. "))
    assert rubric["b"].text == "Names the dose."
    assert rubric["v"].kind is VetoKind.HARMFUL_ADVICE
    assert [c.id for c in rubric.criteria] == ["a", "b", "c", "e", "v"]


def test_hints_say_what_a_judge_cannot_decide() -> None:
    assert [f.code for f in drafts.hints("This is mentioned above in the answer.")] == [
        "not_self_contained",
        "not_self_contained",
    ]
    assert drafts.hints("") == []
    assert drafts.hints("States that ibuprofen can raise blood pressure.") == []
