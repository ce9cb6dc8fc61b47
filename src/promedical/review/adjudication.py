"""Rounds of double-blind adjudication: made, handed out, sent to a third reader, read back.

Section 6 of the method. An item is (instruction, rubric, responses). At least two physicians judge
every criterion of every response, independently and in an order of responses of their own; what
they do not settle goes to an adjudicator who read neither. An item's `content` is all that a
reviewer may ever receive of it; models' names, judges' verdicts and the reference are in
`item_secret`. Left to others: the answer's form (`adjudication_answer`), the rules (`consensus`),
agreement (`agreement_live`), the bench (`bench_export`), pages (`pages_adjudication`).
"""

from __future__ import annotations

import random
import secrets
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from promedical.records import GradedInstruction, RecordError, from_dict, to_dict
from promedical.review import audit_log
from promedical.review.adjudication_answer import (
    ballots_of,
    check_answer,
    dangers_of,
    wanted_criteria,
)
from promedical.review.consensus import Ballot, Consensus, Standing, decide
from promedical.review.tables import Assignment, Item, ItemSecret, Reviewer, Round, new_id, now
from promedical.rubric import Rubric

__all__ = [
    "AdjudicationError",
    "AdjudicationPlan",
    "MadeRound",
    "ReadItem",
    "Reading",
    "assign_thirds",
    "check_answer",
    "dangers",
    "make_round",
    "on_finished",
    "read_items",
    "row_of",
    "seconds_per_criterion",
    "settle_danger",
]

READERS = 2


class AdjudicationError(ValueError):
    """A round that cannot be made or read; the message says what to change."""


@dataclass(frozen=True)
class AdjudicationPlan:
    """How a round is made.

    Args:
        name: as people see it.
        readers: independent first readers an item, at least 2.
        limit: at most so many items, drawn by the seed; 0 for all.
        seed: of the draw, the assignment and the orders.
        judge: name of the judge whose verdicts the rows carry, shown to the lead alone; "" if the
            rows' verdicts are not a judge's and are not to be compared.
    """

    name: str
    readers: int = READERS
    limit: int = 0
    seed: int = 0
    judge: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise AdjudicationError("name: found none, expected a name for the round")
        if self.readers < READERS:
            raise AdjudicationError(
                f"readers: found {self.readers}, expected at least {READERS}: one reader's "
                "judgment is not blind to anything"
            )
        if self.limit < 0:
            raise AdjudicationError(f"limit: found {self.limit}, expected 0 or more")


@dataclass(frozen=True)
class MadeRound:
    """What became of the rows.

    Args:
        round_id: of the round.
        items, assignments: how many.
        left_out: reason → ids of the rows it kept out.
        naming_their_model: responses whose text contains the name of the model that wrote it, so
            that they are not blind; (instruction id, response id).
    """

    round_id: str
    items: int
    assignments: int
    left_out: Mapping[str, tuple[str, ...]]
    naming_their_model: tuple[tuple[str, str], ...]


def make_round(
    session: Session,
    rows: Sequence[GradedInstruction],
    plan: AdjudicationPlan,
    *,
    created_by: str | None = None,
    reviewer_ids: Sequence[str] | None = None,
) -> MadeRound:
    """Make a round and hand its items out, each to `plan.readers` different physicians.

    Args:
        rows: with a rubric and two responses or more; the others are counted by reason.
        created_by: the lead's id.
        reviewer_ids: first readers; every active account with the role reviewer if None.

    Raises:
        AdjudicationError: no usable row, too few reviewers, or an account that is not active.
    """
    rng = random.Random(plan.seed)
    usable, left_out = _usable(rows)
    if plan.limit and len(usable) > plan.limit:
        drawn = sorted(rng.sample(range(len(usable)), plan.limit))
        left_out["beyond the limit"] = [
            row.id for i, row in enumerate(usable) if i not in set(drawn)
        ]
        usable = [usable[i] for i in drawn]
    if not usable:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in left_out.items())
        raise AdjudicationError(f"rows: none can be adjudicated of {len(rows)} ({reasons})")
    readers = _first_readers(session, reviewer_ids, plan.readers)
    round_ = Round(
        id=new_id(),
        kind="adjudication",
        name=plan.name.strip(),
        settings={"readers": plan.readers, "judge": plan.judge, "dangers": {}},
        seed=plan.seed,
        created_by=created_by,
    )
    made = [_item(round_, i, row, plan) for i, row in enumerate(usable)]
    items = [item for item, _ in made]
    # Parents first: these tables are tied by keys alone, which the unit of work does not order.
    for step in ([round_], items, [hidden for _, hidden in made]):
        session.add_all(step)
        session.flush()
    load: Counter[str] = Counter()
    for item in rng.sample(items, len(items)):
        chosen = sorted(readers, key=lambda r: (load[r], rng.random()))[: plan.readers]
        load.update(chosen)
        for reviewer_id in chosen:
            session.add(_assignment(item, reviewer_id, "first", rng))
    session.flush()
    audit_log.record(session, created_by or "system", "round.create", f"round:{round_.id}")
    return MadeRound(
        round_.id,
        len(items),
        load.total(),
        {reason: tuple(ids) for reason, ids in left_out.items()},
        tuple((row.id, r.id) for row in usable for r in row.responses if _names_itself(r)),
    )


def _usable(
    rows: Sequence[GradedInstruction],
) -> tuple[list[GradedInstruction], dict[str, list[str]]]:
    left_out: dict[str, list[str]] = defaultdict(list)
    usable = []
    seen: set[str] = set()
    for row in rows:
        if row.rubric is None:
            left_out["without a rubric"].append(row.id)
        elif len(row.responses) < 2:
            left_out["with fewer than two responses"].append(row.id)
        elif row.id in seen:
            left_out["with an id that repeats"].append(row.id)
        else:
            seen.add(row.id)
            usable.append(row)
    return usable, left_out


def _names_itself(response: Any) -> bool:
    name = response.model.rsplit("/", 1)[-1].strip().lower()
    return len(name) > 2 and name != "physician" and name in response.text.lower()


def _first_readers(session: Session, reviewer_ids: Sequence[str] | None, wanted: int) -> list[str]:
    active = set(session.scalars(select(Reviewer.id).where(Reviewer.active)))
    if reviewer_ids is None:
        chosen = set(
            session.scalars(select(Reviewer.id).where(Reviewer.active, Reviewer.role == "reviewer"))
        )
    else:
        chosen = set(reviewer_ids)
        if chosen - active:
            raise AdjudicationError(
                f"reviewers: {len(chosen - active)} are no active accounts, expected ids of "
                "active ones"
            )
    if len(chosen) < wanted:
        raise AdjudicationError(
            f"reviewers: found {len(chosen)}, expected at least {wanted}, because every item is "
            f"read by {wanted} of them"
        )
    return sorted(chosen)


def _item(
    round_: Round, position: int, row: GradedInstruction, plan: AdjudicationPlan
) -> tuple[Item, ItemSecret]:
    data = to_dict(row)
    # Keys are random and sorted, so neither they nor their order says who wrote what.
    keys = sorted(secrets.token_hex(9) for _ in row.responses)
    mixed = secrets.SystemRandom().sample(data["responses"], len(keys))
    of = dict(zip(keys, mixed, strict=True))
    item = Item(
        id=new_id(),
        round_id=round_.id,
        instruction_id=row.id,
        position=position,
        category=row.category,
        specialty=row.specialty,
        content={
            "messages": data["messages"],
            "rubric": data["rubric"],
            "responses": [{"key": key, "text": of[key]["text"]} for key in keys],
        },
    )
    hidden = {k: data[k] for k in ("source", "licence", "difficulty", "reference")}
    written = {key: {k: v for k, v in of[key].items() if k != "text"} for key in keys}
    content = {"row": hidden, "responses": written, "judge": plan.judge}
    return item, ItemSecret(item_id=item.id, content=content)


def _assignment(
    item: Item,
    reviewer_id: str,
    part: str,
    rng: random.Random,
    answer: dict[str, Any] | None = None,
) -> Assignment:
    keys = [response["key"] for response in item.content["responses"]]
    return Assignment(
        id=new_id(),
        item_id=item.id,
        reviewer_id=reviewer_id,
        part=part,
        response_order=rng.sample(keys, len(keys)),
        answer=answer or {},
    )


# --- the third reader -----------------------------------------------------------------------------


def on_finished(session: Session, assignment: Assignment) -> None:
    """After an answer was finished: ask a third reader if the first ones did not settle it all."""
    if assignment.part != "first":
        return
    # Two first readers may finish at the same moment; the second one has to see the first.
    item = session.get_one(Item, assignment.item_id, with_for_update=True, populate_existing=True)
    _assign_third(session, item, session.get_one(Round, item.round_id))


def assign_thirds(session: Session, round_id: str) -> int:
    """Hand every item that waits for a third reader to one, as far as there are any.

    Returns:
        How many were handed out.
    """
    round_ = session.get_one(Round, round_id)
    items = session.scalars(
        select(Item)
        .where(Item.round_id == round_id, Item.removed_at.is_(None))
        .order_by(Item.position)
        .with_for_update()
    ).all()
    return sum(_assign_third(session, item, round_) for item in items)


def _assign_third(session: Session, item: Item, round_: Round) -> bool:
    read = _read_item(session, item, round_)
    if read.thirds_given or item.removed_at is not None:
        return False
    asked = read.unsettled()
    if not asked:
        return False
    readers = {reading.reviewer_id for reading in read.readings}
    load = dict(
        session.execute(
            select(Reviewer.id, func.count(Assignment.id))
            .outerjoin(
                Assignment, (Assignment.reviewer_id == Reviewer.id) & (Assignment.part == "third")
            )
            .where(Reviewer.active, Reviewer.role == "adjudicator", Reviewer.id.not_in(readers))
            .group_by(Reviewer.id)
        ).all()  # type: ignore[arg-type]
    )
    if not load:
        return False
    least = min(load.values())
    chosen = secrets.choice(sorted(r for r, n in load.items() if n == least))
    rng = random.Random(secrets.randbits(64))
    session.add(_assignment(item, chosen, "third", rng, {"asked": asked}))
    session.flush()
    return True


# --- reading a round back -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One physician's part of an item.

    Args:
        done: whether it is finished; only then its votes count.
    """

    assignment_id: str
    reviewer_id: str
    part: str
    done: bool
    answer: Mapping[str, Any]
    seconds: float
    order: tuple[str, ...]


@dataclass(frozen=True)
class ReadItem:
    """An item with everything that was said of it. For the lead and for exports alone.

    Args:
        first_readers: how many first readers it was given to.
        secret: of `item_secret`; {} if it was not read.
    """

    id: str
    instruction_id: str
    category: str | None
    specialty: str | None
    content: Mapping[str, Any]
    first_readers: int
    readings: tuple[Reading, ...]
    secret: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The responses' keys."""
        return [response["key"] for response in self.content["responses"]]

    @cached_property
    def rubric(self) -> Rubric:
        """The rubric as the project's type."""
        rubric = from_dict(
            {
                "id": self.instruction_id,
                "messages": [{"role": "user", "content": ""}],
                "rubric": self.content["rubric"],
            }
        ).rubric
        assert rubric is not None
        return rubric

    @property
    def firsts(self) -> list[Reading]:
        """The finished first readings."""
        return [r for r in self.readings if r.part == "first" and r.done]

    @property
    def thirds_given(self) -> bool:
        """Whether a third reader was asked."""
        return any(reading.part == "third" for reading in self.readings)

    @cached_property
    def consensus(self) -> dict[tuple[str, str], Consensus]:
        """(response key, criterion id) → what the votes come to, for every criterion."""
        votes: dict[tuple[str, str], list[Ballot]] = defaultdict(list)
        for reading in self.readings:
            if reading.done:
                for leaf, vote in ballots_of(
                    reading.answer, reading.reviewer_id, reading.part
                ).items():
                    votes[leaf].append(vote)
        wanted = wanted_criteria(self.content, {}, "first")
        return {
            (key, criterion_id): decide(votes[key, criterion_id], first_readers=self.first_readers)
            for key, ids in wanted.items()
            for criterion_id in ids
        }

    def unsettled(self) -> dict[str, list[str]]:
        """Response key → criteria that need a third reader; {} if none or not all have read."""
        if len(self.firsts) < self.first_readers:
            return {}
        asked: dict[str, list[str]] = defaultdict(list)
        for (key, criterion_id), found in self.consensus.items():
            if found.standing is Standing.NEEDS_THIRD:
                asked[key].append(criterion_id)
        return dict(asked)

    @property
    def complete(self) -> bool:
        """Whether every criterion has a gold verdict or is contested."""
        unfinished = (Standing.PENDING, Standing.NEEDS_THIRD)
        return all(found.standing not in unfinished for found in self.consensus.values())


def read_items(session: Session, round_id: str, *, secret: bool = False) -> list[ReadItem]:
    """A round's items as they are now, removed ones left out; never for a reviewer's page.

    Args:
        secret: whether to read `item_secret` too.

    Raises:
        AdjudicationError: no such round of adjudication.
    """
    round_ = session.get(Round, round_id)
    if round_ is None or round_.kind != "adjudication":
        raise AdjudicationError(f"round {round_id!r}: not found, expected a round of adjudication")
    items = session.scalars(
        select(Item)
        .where(Item.round_id == round_id, Item.removed_at.is_(None))
        .order_by(Item.position)
    ).all()
    given: dict[str, list[Assignment]] = defaultdict(list)
    for assignment in session.scalars(
        select(Assignment)
        .join(Item, Item.id == Assignment.item_id)
        .where(Item.round_id == round_id)
    ):
        given[assignment.item_id].append(assignment)
    hidden = {}
    if secret:
        hidden = {
            s.item_id: s.content
            for s in session.scalars(
                select(ItemSecret)
                .join(Item, Item.id == ItemSecret.item_id)
                .where(Item.round_id == round_id)
            )
        }
    return [_as_read(item, round_, given[item.id], hidden.get(item.id, {})) for item in items]


def _read_item(session: Session, item: Item, round_: Round) -> ReadItem:
    given = session.scalars(
        select(Assignment)
        .where(Assignment.item_id == item.id)
        .execution_options(populate_existing=True)
    ).all()
    return _as_read(item, round_, given, {})


def _as_read(
    item: Item, round_: Round, given: Iterable[Assignment], secret: Mapping[str, Any]
) -> ReadItem:
    readings = [
        Reading(
            a.id,
            a.reviewer_id,
            a.part,
            a.state == "done",
            a.answer,
            a.seconds,
            tuple(a.response_order),
        )
        for a in sorted(given, key=lambda a: (a.part != "first", a.id))
    ]
    asked = sum(reading.part == "first" for reading in readings)
    return ReadItem(
        item.id,
        item.instruction_id,
        item.category,
        item.specialty,
        item.content,
        max(asked, round_.settings.get("readers", READERS), READERS),
        tuple(readings),
        secret,
    )


def row_of(item: ReadItem) -> GradedInstruction:
    """The item as the project's row, with what only the lead may know; no verdicts, no votes.

    Raises:
        AdjudicationError: it was read without its secret, or cannot be a row.
    """
    if not item.secret:
        raise AdjudicationError(f"item of {item.instruction_id!r}: its origin was not read")
    written = item.secret["responses"]
    data = {
        "id": item.instruction_id,
        **item.secret["row"],
        "category": item.category,
        "specialty": item.specialty,
        "messages": item.content["messages"],
        "rubric": item.content["rubric"],
        "responses": [
            {**written[r["key"]], "text": r["text"], "verdicts": [], "votes": []}
            for r in item.content["responses"]
        ],
    }
    try:
        return from_dict(data)
    except RecordError as error:
        raise AdjudicationError(f"item of {item.instruction_id!r}: {error}") from None


# --- for the lead ---------------------------------------------------------------------------------


def seconds_per_criterion(items: Iterable[ReadItem]) -> dict[str, float]:
    """Reviewer id → median seconds a criterion over their finished items."""
    spent: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for reading in item.readings:
            if reading.done:
                wanted = wanted_criteria(item.content, reading.answer, reading.part)
                criteria = sum(len(ids) for ids in wanted.values())
                spent[reading.reviewer_id].append(reading.seconds / max(criteria, 1))
    return {reviewer: statistics.median(each) for reviewer, each in spent.items()}


def dangers(items: Iterable[ReadItem], settled: Mapping[str, str]) -> list[dict[str, Any]]:
    """What reviewers called a danger that the rubric does not cover; candidates for the veto bank.

    Args:
        settled: danger id → "taken" or "dismissed", what the lead made of it.
    """
    return [
        {
            "id": f"{reading.assignment_id}.{entry['id']}",
            "item_id": item.id,
            "instruction_id": item.instruction_id,
            "key": key,
            "reviewer_id": reading.reviewer_id,
            "kind": entry["kind"],
            "text": entry["text"].strip(),
            "state": settled.get(f"{reading.assignment_id}.{entry['id']}", "candidate"),
        }
        for item in items
        for reading in item.readings
        for key, entry in dangers_of(reading.answer)
    ]


def settle_danger(
    session: Session, round_id: str, danger_id: str, state: str, *, actor_id: str
) -> None:
    """Keep what the lead made of a danger.

    Raises:
        AdjudicationError: another state, or no such danger in the round.
    """
    if state not in ("candidate", "taken", "dismissed"):
        raise AdjudicationError(f"state: found {state!r}, expected candidate, taken or dismissed")
    round_ = session.get_one(Round, round_id, with_for_update=True)
    known = {danger["id"] for danger in dangers(read_items(session, round_id), {})}
    if danger_id not in known:
        raise AdjudicationError("danger: not found in this round")
    kept = {**(round_.settings.get("dangers") or {}), danger_id: state}
    round_.settings = {**round_.settings, "dangers": kept, "changed": now().isoformat()}
    session.flush()
    audit_log.record(session, actor_id, f"danger.{state}", f"danger:{danger_id}")
