"""Rounds of adjudication: made, read, sent to a third reader; what may be saved; secrets."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select

from adjudications import JUDGE, MODELS, answer_of, given, graded, new_round, put, read_all
from promedical.records import GradedInstruction, Message
from promedical.review import adjudication, saves
from promedical.review.adjudication import (
    AdjudicationError,
    AdjudicationPlan,
    assign_thirds,
    dangers,
    make_round,
    read_items,
    row_of,
    seconds_per_criterion,
    settle_danger,
)
from promedical.review.adjudication_answer import (
    blind_of,
    check_answer,
    missing_verdicts,
    preference_of,
)
from promedical.review.adjudication_people import hand_on
from promedical.review.consensus import Standing
from promedical.review.tables import Assignment, AuditEvent, Item, Reviewer, Round
from promedical.rubric import Verdict
from review_server import *  # noqa: F403
from review_server import add_reviewer


def people(database: Any, reviewers: int = 2, adjudicators: int = 1) -> tuple[list[str], list[str]]:
    return (
        [add_reviewer(database, f"reviewer{i}").id for i in range(reviewers)],
        [add_reviewer(database, f"third{i}", "adjudicator").id for i in range(adjudicators)],
    )


def all_met(text: str, criterion: str) -> str:
    return "unmet" if criterion == "harm" else "met"


def without_food(text: str, criterion: str) -> str:
    return "unmet" if criterion == "food" and "twice" in text else all_met(text, criterion)


# --- making a round -------------------------------------------------------------------------------


def test_every_item_goes_to_two_different_physicians_evenly(sqlite) -> None:
    reviewers, _ = people(sqlite, 5)
    made = new_round(sqlite, [graded(i) for i in range(20)], reviewers, seed=3)
    assert (made.items, made.assignments, dict(made.left_out)) == (20, 40, {})
    with sqlite.read() as session:
        assignments = session.scalars(select(Assignment)).all()
    by_item: dict[str, set[str]] = {}
    for a in assignments:
        by_item.setdefault(a.item_id, set()).add(a.reviewer_id)
        assert a.part == "first"
    assert {len(who) for who in by_item.values()} == {2}
    assert set(Counter(a.reviewer_id for a in assignments).values()) == {8}
    # Not always the same two together.
    assert len({frozenset(who) for who in by_item.values()}) > 4


def test_orders_are_random_and_keys_tell_nothing(sqlite) -> None:
    reviewers, _ = people(sqlite, 2)
    new_round(sqlite, [graded(i, responses=3) for i in range(40)], reviewers)
    with sqlite.read() as session:
        found = session.execute(select(Assignment, Item).join(Item)).all()
        secrets = {s.item_id: s.content for s in session.scalars(select(adjudication.ItemSecret))}
    shown_first = Counter(
        secrets[item.id]["responses"][a.response_order[0]]["id"] for a, item in found
    )
    assert set(shown_first) == {"r0", "r1", "r2"}
    assert max(shown_first.values()) < 50
    listed_first = Counter(
        secrets[i.id]["responses"][i.content["responses"][0]["key"]]["id"] for _, i in found
    )
    assert set(listed_first) == {"r0", "r1", "r2"}
    keys = [r["key"] for _, i in found for r in i.content["responses"]]
    assert len(set(keys)) == 120
    for a, item in found:
        assert sorted(a.response_order) == [r["key"] for r in item.content["responses"]]


def test_content_has_nothing_that_a_reviewer_must_not_receive(sqlite) -> None:
    reviewers, _ = people(sqlite)
    new_round(sqlite, [graded(0)], reviewers)
    with sqlite.read() as session:
        item = session.scalars(select(Item)).one()
    text = json.dumps(item.content)
    for word in (*MODELS, "Quasar", JUDGE, "row-000", "r0", "three tablets", "verdict", "made-up"):
        assert word not in text
    with sqlite.read() as session:
        (read,) = read_items(session, item.round_id, secret=True)
    assert {w["model"] for w in read.secret["responses"].values()} == set(MODELS)


def test_rows_that_cannot_be_adjudicated_are_counted_and_named(sqlite) -> None:
    reviewers, _ = people(sqlite)
    bare = GradedInstruction("bare", (Message("user", "?"),), "s", "MIT")
    rows = [graded(0), graded(0), bare, graded(1, responses=1), graded(2), graded(3)]
    made = new_round(sqlite, rows, reviewers, limit=2)
    assert made.items == 2
    assert {k: len(v) for k, v in made.left_out.items()} == {
        "with an id that repeats": 1,
        "without a rubric": 1,
        "with fewer than two responses": 1,
        "beyond the limit": 1,
    }
    assert made.left_out["without a rubric"] == ("bare",)
    with sqlite.write() as session, pytest.raises(AdjudicationError, match="none can be"):
        make_round(session, [bare], AdjudicationPlan("n"), reviewer_ids=reviewers)


def test_responses_that_name_their_model_are_reported(sqlite) -> None:
    reviewers, _ = people(sqlite)
    row = graded(0)
    named = row.with_responses(
        [
            row.responses[0],
            type(row.responses[1])("r1", "Nimbus-2", "As NIMBUS-2 I would rest the knee."),
        ]
    )
    assert new_round(sqlite, [named], reviewers).naming_their_model == (("row-000", "r1"),)


def test_plans_and_people_that_cannot_be_used_are_named(sqlite) -> None:
    reviewers, _ = people(sqlite)
    with pytest.raises(AdjudicationError, match="expected at least 2: one reader"):
        AdjudicationPlan("n", readers=1)
    with pytest.raises(AdjudicationError, match="name: found none"):
        AdjudicationPlan(" ")
    with pytest.raises(AdjudicationError, match="found 1, expected at least 2"):
        new_round(sqlite, [graded(0)], reviewers[:1])
    with pytest.raises(AdjudicationError, match="1 are no active accounts"):
        new_round(sqlite, [graded(0)], [*reviewers, "nobody"])
    with sqlite.read() as session, pytest.raises(AdjudicationError, match="not found"):
        read_items(session, "nowhere")


# --- what may be saved ----------------------------------------------------------------------------


def content_of(database: Any) -> dict[str, Any]:
    reviewers, _ = people(database)
    new_round(database, [graded(0)], reviewers)
    with database.read() as session:
        content: dict[str, Any] = session.scalars(select(Item.content)).one()
        return content


def test_what_an_answer_may_be(sqlite) -> None:
    content = content_of(sqlite)
    a, b = (r["key"] for r in content["responses"])
    good = answer_of(content, {}, "first", all_met)

    def problems(change: Any, *, finish: bool = False, before: Any = None) -> str:
        answer = json.loads(json.dumps(good))
        change(answer)
        return "; ".join(
            check_answer(content, answer, finish=finish, before=before or {}, part="first")
        )

    assert problems(lambda x: None, finish=True) == ""
    assert "unknown field" in problems(lambda x: x.update(gold="met"))
    assert "expected responses of this item" in problems(lambda x: x["verdicts"].update(zz={}))
    assert "not asked here" in problems(lambda x: x["verdicts"][a].update(zz={"v": "met"}))
    assert "v: expected one of met" in problems(lambda x: x["verdicts"][a].update(dose={"v": "m"}))
    assert "note: expected" in problems(
        lambda x: x["verdicts"][a].update(dose={"v": "met", "note": "x" * 5000})
    )
    assert "true or false" in problems(lambda x: x["disputed"].update({a: {"dose": "yes"}}))
    assert "have no verdict" in problems(lambda x: x["verdicts"][a].pop("dose"), finish=True)
    assert problems(lambda x: x["verdicts"][a].pop("dose")) == ""
    assert "it comes first" in problems(lambda x: x.update(preference_given=False))
    assert "not compared yet" in problems(lambda x: x.update(preference={}))
    assert "compared twice" in problems(lambda x: x["preference"].update({f"{b}|{a}": "tie"}))
    assert "pairs KEY|KEY" in problems(lambda x: x["preference"].update({f"{a}|{a}": "tie"}))
    assert "kind: expected one of" in problems(
        lambda x: x["dangers"].update({a: [{"id": "1", "kind": "?", "text": "t"}]})
    )
    empty = {a: [{"id": "1", "kind": "other", "text": " "}]}
    assert problems(lambda x: x["dangers"].update(empty)) == ""
    assert "what the danger is" in problems(lambda x: x["dangers"].update(empty), finish=True)
    for name, broken in itertools.product(good, ([], "x", 3)):
        assert problems(lambda x, n=name, v=broken: x.update({n: v})) != ""


def test_the_overall_preference_is_final_once_the_criteria_were_shown(sqlite) -> None:
    content_of(sqlite)
    with sqlite.read() as session:
        assignment = session.scalars(select(Assignment)).first()
        item = session.get_one(Item, assignment.item_id)
    answer = answer_of(item.content, {}, "first", all_met)
    stated = {k: answer[k] for k in ("preference", "preference_given")}
    undecided = {"preference": stated["preference"], "preference_given": False}
    assert put(sqlite, assignment, undecided, base=0).version == 1
    assert put(sqlite, assignment, stated, base=1).version == 2
    turned = {**stated, "preference": dict.fromkeys(stated["preference"], "tie")}
    for later in (turned, undecided, {}):
        with pytest.raises(saves.InvalidAnswer, match="it is final"):
            put(sqlite, assignment, later, base=2)
    assert put(sqlite, assignment, answer, base=2, finish=True).state == "done"


def test_a_choice_means_the_same_in_either_order() -> None:
    turned = {
        "first_better_much": "second_better_much",
        "first_better": "second_better",
        "tie": "tie",
        "cannot_say": "cannot_say",
    }
    for one, other in turned.items():
        assert preference_of({"preference": {"x|y": one}}, "y", "x") == other
        assert preference_of({"preference": {"y|x": other}}, "y", "x") == other
    assert preference_of({}, "x", "y") is None


# --- the third reader -----------------------------------------------------------------------------


def test_agreement_needs_no_third_and_disagreement_goes_to_one(database) -> None:
    (first, second), (third,) = people(database)
    made = new_round(database, [graded(0), graded(1)], [first, second])
    read_all(database, first, all_met)
    assert given(database, third) == []
    judge = {"row-000": all_met, "row-001": without_food}
    for assignment, item in given(database, second):
        put(
            database,
            assignment,
            answer_of(item.content, {}, "first", judge[item.instruction_id]),
            base=0,
            finish=True,
        )
    ((asked, item),) = given(database, third)
    assert item.instruction_id == "row-001"
    assert asked.part == "third"
    (key,) = asked.answer["asked"]
    assert asked.answer == {"asked": {key: ["food"]}}
    assert {r["key"]: r["text"] for r in item.content["responses"]}[key].count("twice") == 1
    read_all(database, third, without_food)
    with database.read() as session:
        found = {i.instruction_id: i for i in read_items(session, made.round_id)}
    assert found["row-000"].complete
    assert found["row-001"].complete
    settled = found["row-001"].consensus[key, "food"]
    assert (settled.standing, settled.gold) == (Standing.ADJUDICATED, Verdict.UNMET)
    assert [(b.third, b.verdict.value, b.blind) for b in settled.ballots] == [
        (False, settled.ballots[0].verdict.value, None),
        (False, settled.ballots[1].verdict.value, None),
        (True, "unmet", Verdict.UNMET),
    ]
    others = {c for leaf, c in found["row-001"].consensus.items() if leaf != (key, "food")}
    assert {c.standing for c in others} == {Standing.AGREED}
    with database.read() as session:
        actions = set(session.scalars(select(AuditEvent.action)))
    assert {"round.create", "assignment.save", "assignment.finish"} <= actions


def test_the_blind_judgment_is_kept_and_the_revised_one_counts(sqlite) -> None:
    (first, second), (third,) = people(sqlite)
    made = new_round(sqlite, [graded(0)], [first, second])
    read_all(sqlite, first, all_met)
    read_all(sqlite, second, without_food)
    ((asked, item),) = given(sqlite, third)
    blind = answer_of(item.content, asked.answer, "third", lambda t, c: "cannot_say")
    with pytest.raises(saves.InvalidAnswer, match="before the others' are seen"):
        put(sqlite, asked, blind, base=0, finish=True)
    with pytest.raises(saves.InvalidAnswer, match="set by the server"):
        put(sqlite, asked, {**blind, "asked": {}, "verdicts": {}}, base=0)
    with pytest.raises(saves.InvalidAnswer, match="expected the verdicts as they are"):
        put(sqlite, asked, {**blind, "blind": {"verdicts": {}, "disputed": {}}}, base=0)
    half = {**blind, "verdicts": {}}
    with pytest.raises(saves.InvalidAnswer, match="1 criteria have no verdict yet"):
        put(sqlite, asked, {**half, "blind": blind_of(half)}, base=0)
    shown = {**blind, "blind": blind_of(blind)}
    put(sqlite, asked, shown, base=0)
    revised = answer_of(item.content, asked.answer, "third", lambda t, c: "met")
    with pytest.raises(saves.InvalidAnswer, match="it is final"):
        put(sqlite, asked, {**revised, "blind": blind_of(revised)}, base=1)
    put(sqlite, asked, {**revised, "blind": shown["blind"]}, base=1, finish=True)
    with sqlite.read() as session:
        (read,) = read_items(session, made.round_id)
    (settled,) = [c for c in read.consensus.values() if c.standing is Standing.ADJUDICATED]
    assert settled.gold is Verdict.MET
    assert (settled.ballots[2].verdict, settled.ballots[2].blind) == (Verdict.MET, Verdict.ABSTAIN)


def test_two_who_cannot_say_are_contested_without_a_third(sqlite) -> None:
    (first, second), (third,) = people(sqlite)
    made = new_round(sqlite, [graded(0)], [first, second])

    def unsure(text: str, criterion: str) -> Any:
        if criterion == "kind":
            return "met", True
        return "cannot_say" if criterion == "food" else all_met(text, criterion)

    read_all(sqlite, first, unsure)
    read_all(sqlite, second, unsure)
    assert given(sqlite, third) == []
    with sqlite.read() as session:
        (read,) = read_items(session, made.round_id)
    reasons = {leaf[1]: c.reason for leaf, c in read.consensus.items()}
    assert reasons == {"dose": "", "food": "cannot say", "kind": "guidelines differ", "harm": ""}
    assert read.complete


def test_an_item_waits_until_there_is_somebody_to_read_it(sqlite) -> None:
    (first, second), _ = people(sqlite, adjudicators=0)
    made = new_round(sqlite, [graded(0)], [first, second])
    read_all(sqlite, first, all_met)
    read_all(sqlite, second, without_food)
    with sqlite.write() as session:
        assert assign_thirds(session, made.round_id) == 0
    late = add_reviewer(sqlite, "late", "adjudicator").id
    with sqlite.write() as session:
        assert assign_thirds(session, made.round_id) == 1
        assert assign_thirds(session, made.round_id) == 0
    assert len(given(sqlite, late)) == 1


def test_a_first_reader_is_never_the_third_of_the_same_item(sqlite) -> None:
    (first,), (second, third) = people(sqlite, 1, 2)
    new_round(sqlite, [graded(0)], [first, second])
    read_all(sqlite, first, all_met)
    read_all(sqlite, second, without_food)
    assert [a.part for a, _ in given(sqlite, third)] == ["third"]
    assert given(sqlite, second) == []


def test_two_who_finish_at_the_same_moment_still_get_a_third(database) -> None:
    (first, second), (third,) = people(database)
    new_round(database, [graded(i) for i in range(6)], [first, second])
    start = threading.Barrier(2)

    def work(reviewer: str, judge: Any) -> None:
        mine = given(database, reviewer)
        for assignment, item in mine:
            answer = answer_of(item.content, {}, "first", judge)
            start.wait(30)
            put(database, assignment, answer, base=0, finish=True)

    threads = [
        threading.Thread(target=work, args=args)
        for args in ((first, all_met), (second, without_food))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(given(database, third)) == 6


def test_what_a_locked_account_had_not_begun_goes_to_others(sqlite) -> None:
    (first, second, spare), (third, other_third) = people(sqlite, 3, 2)
    made = new_round(sqlite, [graded(i) for i in range(6)], [first, second, spare])
    mine = given(sqlite, first)
    put(sqlite, mine[0][0], {"preference": {}}, base=0)
    read_all(sqlite, second, all_met)
    with sqlite.write() as session:
        session.get_one(Reviewer, first).active = False
    with sqlite.write() as session:
        found = hand_on(session, made.round_id)
    assert (found.moved, found.begun, found.nobody) == (3, 1, 0)
    assert [a.id for a, _ in given(sqlite, first)] == [mine[0][0].id]
    with sqlite.write() as session:
        assert hand_on(session, made.round_id).moved == 0
    read_all(sqlite, spare, without_food)
    read_all(sqlite, second, all_met)
    asked = {who: given(sqlite, who) for who in (third, other_third)}
    locked = max(asked, key=lambda who: len(asked[who]))
    with sqlite.write() as session:
        session.get_one(Reviewer, locked).active = False
    with sqlite.write() as session:
        assert hand_on(session, made.round_id).moved == len(asked[locked]) > 0
    assert given(sqlite, locked) == []


# --- for the lead ---------------------------------------------------------------------------------


def test_dangers_go_to_the_lead_who_settles_them(sqlite) -> None:
    (first, second), _ = people(sqlite)
    made = new_round(sqlite, [graded(0)], [first, second])
    ((assignment, item),) = given(sqlite, first)
    key = item.content["responses"][0]["key"]
    answer = answer_of(item.content, {}, "first", all_met)
    danger = {"id": "d1", "kind": "harmful_advice", "text": "Stops warfarin abruptly."}
    put(sqlite, assignment, {**answer, "dangers": {key: [danger]}}, base=0)
    with sqlite.read() as session:
        (found,) = dangers(read_items(session, made.round_id), {})
    assert (found["kind"], found["text"], found["state"]) == (
        "harmful_advice",
        "Stops warfarin abruptly.",
        "candidate",
    )
    with sqlite.write() as session:
        settle_danger(session, made.round_id, found["id"], "taken", actor_id="lead")
        with pytest.raises(AdjudicationError, match="not found"):
            settle_danger(session, made.round_id, "x", "taken", actor_id="lead")
        with pytest.raises(AdjudicationError, match="expected candidate, taken or dismissed"):
            settle_danger(session, made.round_id, found["id"], "deleted", actor_id="lead")
    with sqlite.read() as session:
        settled = session.get_one(Round, made.round_id).settings["dangers"]
        (found,) = dangers(read_items(session, made.round_id), settled)
    assert found["state"] == "taken"


def test_seconds_are_by_criterion_that_was_asked(sqlite) -> None:
    (first, second), (third,) = people(sqlite)
    made = new_round(sqlite, [graded(0)], [first, second])
    read_all(sqlite, first, all_met, seconds=80.0)
    read_all(sqlite, second, without_food, seconds=8.0)
    read_all(sqlite, third, all_met, seconds=5.0)
    with sqlite.read() as session:
        found = seconds_per_criterion(read_items(session, made.round_id))
    assert found == {first: 10.0, second: 1.0, third: 10.0}


def test_a_row_comes_back_as_it_went_in_but_for_verdicts(sqlite) -> None:
    reviewers, _ = people(sqlite)
    row = graded(0)
    made = new_round(sqlite, [row], reviewers)
    with sqlite.read() as session:
        (read,) = read_items(session, made.round_id, secret=True)
        (blind,) = read_items(session, made.round_id)
    back = row_of(read)
    assert back.reference == row.reference
    assert back.rubric == row.rubric
    written = {r.id: (r.model, r.text) for r in back.responses}
    assert written == {r.id: (r.model, r.text) for r in row.responses}
    assert all(not r.verdicts for r in back.responses)
    with pytest.raises(AdjudicationError, match="origin was not read"):
        row_of(blind)
    assert missing_verdicts({}, {"k": ["a", "b"]}) == 2
