"""Rubric rounds: drawing and dealing, answers, what becomes of an item, figures, gold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from promedical.corpus.banks import UNIVERSAL_IDS, with_universal
from promedical.corpus.exemplars import read_pool
from promedical.records import GradedInstruction, Message, fingerprint, read_dataset, read_manifest
from promedical.review import drafts, gold, rounds, saves
from promedical.review.database import Database
from promedical.review.round_figures import figures, wilson
from promedical.review.rounds import RoundError, RoundSettings
from promedical.review.tables import Assignment, AuditEvent, Item, Round
from promedical.rubric import Criterion, Rubric, Tier, VetoKind
from review_server import *  # noqa: F403
from review_server import add_reviewer

SPECIALTIES = ("cardiology", "neurology")


def draft_row(n: int, *, universal: bool = True, own_veto: bool = False) -> GradedInstruction:
    criteria = [
        Criterion(f"p{n}.1", Tier.PROFICIENCY, "States the usual adult dose.", 0.5, "accuracy"),
        Criterion(f"p{n}.2", Tier.PROFICIENCY, "Names two common side effects.", 0.3),
        Criterion(f"p{n}.3", Tier.PROFICIENCY, "Says to take it with food.", 0.2),
        Criterion(f"e{n}.1", Tier.EXCELLENCE, "Explains why in plain words.", axis="insight"),
    ]
    if own_veto:
        text = "Advises to double the dose if pain goes on."
        criteria.append(Criterion("v1", Tier.VETO, text, kind=VetoKind.HARMFUL_ADVICE))
    rubric = Rubric(tuple(criteria))
    return GradedInstruction(
        id=f"row-{n:03}",
        messages=(Message("user", f"How much of drug number {n} may I take?"),),
        source="made-up",
        licence="CC0-1.0",
        rubric=with_universal(rubric) if universal else rubric,
        reference="Up to three tablets a day with meals.",
        category="treatment_and_medication" if n % 3 else "medical_knowledge",
        specialty=SPECIALTIES[n % 2],
        difficulty=6,
    )


class Table:
    """A round with its people, and what they do in it."""

    def __init__(self, database: Database, people: int = 2, size: int = 6, **settings: Any) -> None:
        self.database = database
        self.lead = add_reviewer(database, "lead", "lead").id
        self.people = [add_reviewer(database, f"reader{i}").id for i in range(people)]
        rows = [draft_row(n) for n in range(size)]
        with database.write() as session:
            made = rounds.make_round(session, rows, RoundSettings("First", **settings))
            self.round = made.id
            rounds.assign(session, made.id, self.people)

    def items(self) -> list[Item]:
        with self.database.read() as session:
            return rounds.items_of(session, self.round)

    def finish(self, item: Item, who: int | str, decision: str, **change: Any) -> None:
        """`edit`: a function on the draft."""
        reviewer = self.people[who] if isinstance(who, int) else who
        seconds = change.pop("seconds", 60.0)
        with self.database.write() as session:
            a = session.scalars(
                select(Assignment).where(
                    Assignment.item_id == item.id, Assignment.reviewer_id == reviewer
                )
            ).one()
            answer = rounds.first_answer(item.content) | {"decision": decision}
            if edit := change.pop("edit", None):
                answer["criteria"] = drafts.to_json(edit(drafts.from_json(answer["criteria"])))
            saves.save(
                session,
                a.id,
                reviewer,
                base=a.version,
                save_id=f"save-{a.id}-{a.version}",
                answer=answer | change,
                seconds=seconds,
                state="done",
            )

    def outcome(self, at: int) -> rounds.Outcome:
        return rounds.outcome(self.items()[at])


def retext(at: int, text: str) -> Any:
    return lambda draft: drafts.edit(draft, draft[at].id, text=text)


# ---- making ----


def test_a_round_is_a_stratified_sample_that_a_seed_repeats(database: Database) -> None:
    rows = [draft_row(n) for n in range(30)]
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        with database.write() as session:
            made = rounds.make_round(session, rows, RoundSettings(name, size=12, seed=seed))
        with database.read() as session:
            drawn.append([i.instruction_id for i in rounds.items_of(session, made.id)])
            if seed == 1:
                items = rounds.items_of(session, made.id)
                strata = Counter((i.category, i.specialty) for i in items)
                assert sorted(strata.values()) == [2, 2, 4, 4]
            assert session.get_one(Round, made.id).settings["fingerprint"] == fingerprint(rows)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != sorted(drawn[0])


def test_content_leaves_out_what_every_rubric_shares(sqlite: Database) -> None:
    with sqlite.write() as session:
        made = rounds.make_round(session, [draft_row(1)], RoundSettings("x"))
    with sqlite.read() as session:
        content = rounds.items_of(session, made.id)[0].content
    ids = [c["id"] for c in content["rubric"]["criteria"]]
    assert ids == ["p1.1", "p1.2", "p1.3", "e1.1"]
    assert set(content["universal"]) == UNIVERSAL_IDS
    assert content["origin"] == {"source": "made-up", "licence": "CC0-1.0", "difficulty": 6.0}


def test_rows_without_a_draft_are_counted_and_none_is_an_error(sqlite: Database) -> None:
    bare = GradedInstruction("bare", (Message("user", "?"),), "s", "l")
    with sqlite.write() as session:
        made = rounds.make_round(session, [draft_row(1), bare], RoundSettings("x"))
        assert made.settings["without_draft"] == 1
        with pytest.raises(RoundError, match="none with a rubric"):
            rounds.make_round(session, [bare], RoundSettings("x"))
        with pytest.raises(RoundError, match="'row-001' repeats"):
            rounds.make_round(session, [draft_row(1)] * 2, RoundSettings("x"))


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"double": 1.2}, {"name": " "}, {"allocation": "random"}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(RoundError, match=next(iter(wrong))):
        RoundSettings(**({"name": "x"} | wrong))


def test_items_are_dealt_evenly_some_to_two(sqlite: Database) -> None:
    table = Table(sqlite, people=3, size=20, double=0.5)
    items = table.items()
    assert Counter(len(i.assignments) for i in items) == {1: 10, 2: 10}
    load = Counter(a.reviewer_id for i in items for a in i.assignments)
    assert set(load.values()) == {10}
    assert all(len({a.reviewer_id for a in i.assignments}) == len(i.assignments) for i in items)
    with sqlite.write() as session:
        assert rounds.assign(session, table.round, table.people) == 0


def test_specialists_get_their_own_field_where_the_load_allows(sqlite: Database) -> None:
    people = [add_reviewer(sqlite, s, specialty=s).id for s in SPECIALTIES]
    with sqlite.write() as session:
        made = rounds.make_round(session, [draft_row(n) for n in range(20)], RoundSettings("x"))
        rounds.assign(session, made.id, people)
        items = rounds.items_of(session, made.id)
    own = sum(people[SPECIALTIES.index(i.specialty)] == i.assignments[0].reviewer_id for i in items)
    assert own >= 14


def test_what_somebody_has_not_begun_can_go_to_another(sqlite: Database) -> None:
    table = Table(sqlite, people=2, size=6)
    mine = [i for i in table.items() if i.assignments[0].reviewer_id == table.people[0]]
    table.finish(mine[0], 0, "accept")
    with sqlite.write() as session:
        assert rounds.unassign(session, table.round, table.people[0]) == 2
        assert rounds.assign(session, table.round, [table.people[1]]) == 2
    load = Counter(i.assignments[0].reviewer_id for i in table.items())
    assert load == {table.people[0]: 1, table.people[1]: 5}


# ---- answers ----


def check(finish: bool = True, **change: Any) -> list[str]:
    content = rounds._content(draft_row(1))
    answer = rounds.first_answer(content) | change
    return rounds.check_answer(content, answer, finish=finish, before={}, part="rubric")


def test_an_untouched_answer_may_be_kept_and_accepted() -> None:
    assert check(finish=False) == []
    assert check(decision="accept") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decision": None}, "decision: expected accept"),
        ({"decision": "maybe"}, "decision: expected none or one of"),
        ({"decision": "accept_with_edits"}, "nothing was edited"),
        ({"decision": "reject"}, "reason: is empty"),
        ({"decision": "accept", "reason": 3}, "reason"),
        ({"decision": "accept", "disputed": "yes"}, "disputed"),
        ({"decision": "accept", "criteria": []}, "at least one in the tier of proficiency"),
        ({"decision": "accept", "note": "x"}, "answer: expected"),
    ],
)
def test_answers_that_cannot_be_finished(change: dict[str, Any], says: str) -> None:
    assert says in check(**change)[0]


def test_an_edited_rubric_is_not_accepted_as_it_is() -> None:
    content = rounds._content(draft_row(1))
    before = drafts.from_json(rounds.first_answer(content)["criteria"])
    after = drafts.to_json(retext(1, "Names three common side effects.")(before))
    assert "the rubric was edited" in check(decision="accept", criteria=after)[0]
    assert check(decision="accept_with_edits", criteria=after) == []
    assert check(decision="reject", reason="Wrong question.", criteria=after) == []


# ---- outcomes ----


def test_one_reviewer_decides_alone(sqlite: Database) -> None:
    table = Table(sqlite, people=1, size=4)
    items = table.items()
    assert table.outcome(0).state == "open"
    table.finish(items[0], 0, "accept")
    table.finish(items[1], 0, "accept_with_edits", edit=lambda d: drafts.remove(d, d[2].id))
    table.finish(items[2], 0, "reject", reason="The question has no answer.")
    table.finish(items[3], 0, "accept", disputed=True)
    found = [table.outcome(at) for at in range(4)]
    assert [o.state for o in found] == ["accepted", "corrected", "rejected", "disputed"]
    assert [o.passed for o in found] == [True, False, False, True]
    assert found[0].decided_by == (table.people[0],)


def test_two_who_say_the_same_agree_and_others_go_to_the_lead(database: Database) -> None:
    table = Table(database, people=2, size=3, double=1.0)
    items = table.items()
    for who in (0, 1):
        table.finish(items[0], who, "accept")
        table.finish(items[1], who, "accept_with_edits", edit=retext(0, "States the top dose."))
    table.finish(items[2], 0, "accept_with_edits", edit=lambda d: drafts.remove(d, d[0].id))
    assert table.outcome(2).state == "open"
    with database.write() as session, pytest.raises(RoundError, match="nothing to decide"):
        rounds.decide(session, items[2].id, table.lead)
    table.finish(items[2], 1, "accept")
    assert [table.outcome(at).state for at in range(3)] == ["accepted", "corrected", "differ"]

    with database.write() as session:
        third = rounds.decide(session, items[2].id, table.lead)
        assert rounds.decide(session, items[2].id, table.lead).id == third.id
        with pytest.raises(RoundError, match="another lead"):
            rounds.decide(session, items[2].id, table.people[0])
    table.finish(items[2], table.lead, "accept")
    decided = table.outcome(2)
    assert (decided.state, decided.decided_by) == ("accepted", (table.lead,))
    # The lead's word settles the rubric; it was not accepted by all of its reviewers.
    assert decided.passed is False


def test_what_is_disputed_and_stays_so_is_contested(sqlite: Database) -> None:
    table = Table(sqlite, people=1, size=1)
    (item,) = table.items()
    table.finish(item, 0, "accept", disputed=True)
    with sqlite.write() as session:
        rounds.decide(session, item.id, table.lead)
    table.finish(item, table.lead, "accept", disputed=True)
    assert table.outcome(0).state == "contested"
    assert gold.collect(table.items()).left_out == {"contested": 1}


def test_reopened_and_closed(sqlite: Database) -> None:
    table = Table(sqlite, people=1, size=2)
    first, second = table.items()
    table.finish(first, 0, "accept")
    with sqlite.write() as session:
        a = rounds.reopen(session, first.assignments[0].id, by=table.lead)
        assert (a.state, a.version) == ("started", 1)
    table.finish(first, 0, "accept_with_edits", edit=lambda d: drafts.remove(d, d[3].id))
    assert table.outcome(0).state == "corrected"
    with sqlite.write() as session:
        rounds.close_round(session, table.round, by=table.lead)
    with pytest.raises(saves.Closed):
        table.finish(second, 0, "accept")
    with sqlite.write() as session, pytest.raises(RoundError, match="closed"):
        rounds.assign(session, table.round, table.people)
    with sqlite.read() as session:
        actions = session.scalars(select(AuditEvent.action).order_by(AuditEvent.seq)).all()
    assert actions == [
        "round.create",
        "round.assign",
        "assignment.finish",
        "assignment.reopen",
        "assignment.finish",
        "round.closed",
    ]


# ---- figures ----


def test_figures_of_a_round(sqlite: Database) -> None:
    table = Table(sqlite, people=2, size=4)
    items = table.items()
    who = [table.people.index(i.assignments[0].reviewer_id) for i in items]
    table.finish(items[0], who[0], "accept", seconds=4.0)
    table.finish(items[1], who[1], "accept", seconds=100.0)
    table.finish(
        items[2],
        who[2],
        "accept_with_edits",
        edit=lambda d: drafts.edit(drafts.remove(d, d[2].id), d[0].id, text="States the top dose."),
        seconds=200.0,
    )
    found = figures(table.items())
    assert (found.items, found.judged, found.passed, found.reviews_done) == (4, 3, 2, 3)
    assert found.rate == pytest.approx(2 / 3)
    assert found.states == {"accepted": 2, "corrected": 1, "open": 1}
    assert found.seconds == 100.0
    # The weights that grew when one was removed are nobody's edit.
    assert found.edits == {
        ("proficiency", "", "removed"): 1,
        ("proficiency", "accuracy", "text"): 1,
    }
    assert sum(f.done for f in found.reviewers) == 3
    assert all(f.assigned == 2 for f in found.reviewers)


def test_a_reviewer_who_clicks_through_is_seen(sqlite: Database) -> None:
    table = Table(sqlite, people=1, size=2)
    for item in table.items():
        table.finish(item, 0, "accept", seconds=4.0)
    (reviewer,) = figures(table.items()).reviewers
    assert reviewer.per_criterion == pytest.approx(1.0)
    assert reviewer.too_fast


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (482, 500), (1, 2)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


# ---- gold ----


def test_gold_goes_into_the_pool_and_a_dataset(sqlite: Database, tmp_path: Path) -> None:
    table = Table(sqlite, people=1, size=3)
    items = table.items()
    table.finish(items[0], 0, "accept")
    table.finish(items[1], 0, "accept_with_edits", edit=retext(1, "Names three side effects."))
    found = gold.collect(table.items())
    assert [g.state for g in found.rubrics] == ["accepted", "corrected"]
    assert found.left_out == {"open": 1}
    unchanged = next(draft_row(n) for n in range(3) if draft_row(n).id == items[0].instruction_id)
    assert found.rubrics[0].row == unchanged

    with sqlite.read() as session:
        fingerprint_ = gold.write_gold(
            found, session.get_one(Round, table.round), tmp_path / "gold"
        )
    assert fingerprint(read_dataset(tmp_path / "gold")) == fingerprint_
    manifest = read_manifest(tmp_path / "gold")
    assert manifest["recipe"]["states"] == {"accepted": 1, "corrected": 1}
    assert manifest["parents"] == [fingerprint([draft_row(n) for n in range(3)])]

    assert gold.to_pool(found, tmp_path / "pool").version == 1
    assert gold.to_pool(found, tmp_path / "pool").version == 2
    pool = read_pool(tmp_path / "pool")
    assert {e.reviewer for e in pool.exemplars} == {f"reviewer:{table.people[0]}"}
    texts = {c.text for e in pool.exemplars for c in e.row.rubric.criteria}
    assert "Names three side effects." in texts
    assert not UNIVERSAL_IDS & {c.id for e in pool.exemplars for c in e.row.rubric.criteria}


@pytest.mark.parametrize("drop", [False, True])
def test_a_shared_veto_comes_back_when_the_rubrics_own_is_removed(
    sqlite: Database, drop: bool
) -> None:
    with sqlite.write() as session:
        made = rounds.make_round(session, [draft_row(1, own_veto=True)], RoundSettings("x"))
        who = add_reviewer_id(session)
        rounds.assign(session, made.id, [who])
    with sqlite.read() as session:
        (item,) = rounds.items_of(session, made.id)
    draft = drafts.from_json(item.assignments[0].answer["criteria"])
    kept = drafts.remove(draft, "v1") if drop else draft
    row = gold.gold_row(item, rounds.Outcome("corrected", kept, (who,), "2026-11-22T00:00:00"))
    harm = [c.id for c in row.rubric.tier(Tier.VETO) if c.kind is VetoKind.HARMFUL_ADVICE]
    assert harm == (["veto.harmful_advice"] if drop else ["v1"])
    assert len(row.rubric.tier(Tier.VETO)) == len(VetoKind)


def add_reviewer_id(session: Any) -> str:
    from promedical.review.tables import Reviewer

    person = Reviewer(login="solo", name="Solo", password_hash="-", role="reviewer")
    session.add(person)
    session.flush()
    return person.id


def test_a_row_without_shared_criteria_stays_without() -> None:
    row = draft_row(1, universal=False)
    item = Item(
        instruction_id=row.id,
        category=row.category,
        specialty=row.specialty,
        content=json.loads(json.dumps(rounds._content(row))),
    )
    what = rounds.Outcome(
        "accepted", drafts.opened(item.content["rubric"]["criteria"]), ("r",), "2026-11-22"
    )
    assert gold.gold_row(item, what) == row
