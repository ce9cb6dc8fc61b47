"""What a round yields: gold rubrics as dataset rows and as exemplars for the next round's drafts.

Section 3, step 6: corrected rubrics go back into the pool that rubric generation draws from. Only
items that were accepted or corrected count; everything else is counted by what became of it. A row
is the instruction with its gold rubric, the criteria that every rubric shares back in their place.
Reviewers are named by their random ids. A pool's and a dataset's versions are their own (pool.json
counts up, a manifest has a fingerprint and its parent's). Left to others: how an item is decided
(`rounds`), the pool's form (`corpus.exemplars`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promedical.corpus.banks import UNIVERSAL_IDS, with_universal
from promedical.corpus.exemplars import PARTS, Exemplar, Pool, add_gold
from promedical.records import GradedInstruction, Message, write_dataset
from promedical.review import drafts
from promedical.review.rounds import Outcome, outcome
from promedical.review.tables import Item, Round
from promedical.rubric import Criterion, Rubric, VetoKind

__all__ = ["Gold", "GoldRubric", "collect", "gold_row", "to_pool", "write_gold"]

GOLD = ("accepted", "corrected")
_BEYOND = f"veto.{VetoKind.BEYOND_REMIT.value}"


@dataclass(frozen=True)
class GoldRubric:
    """A rubric that physicians accepted or corrected.

    Args:
        row: instruction and rubric.
        state: accepted or corrected.
        reviewers: random ids of those whose rubric it is.
        reviewed_at: ISO time.
    """

    row: GradedInstruction
    state: str
    reviewers: tuple[str, ...]
    reviewed_at: str


@dataclass(frozen=True)
class Gold:
    """What a round yields.

    Args:
        rubrics: in the order of the round.
        left_out: what became of the others → how many.
    """

    rubrics: tuple[GoldRubric, ...]
    left_out: Mapping[str, int]


def collect(items: Sequence[Item]) -> Gold:
    """The gold rubrics among items of a round (`rounds.items_of`)."""
    found: list[GoldRubric] = []
    left_out: dict[str, int] = {}
    for item in items:
        what = outcome(item)
        if what.state not in GOLD:
            left_out[what.state] = left_out.get(what.state, 0) + 1
            continue
        assert what.decided_at is not None
        row = gold_row(item, what)
        found.append(GoldRubric(row, what.state, what.decided_by, what.decided_at))
    return Gold(tuple(found), left_out)


def gold_row(item: Item, what: Outcome) -> GradedInstruction:
    """The instruction with the rubric that counts.

    Args:
        what: the item's outcome, which has criteria.
    """
    assert what.criteria is not None
    content = item.content
    own = drafts.to_rubric(what.criteria, safety_only=bool(content["rubric"].get("safety_only")))
    origin = content.get("origin") or {}
    return GradedInstruction(
        id=item.instruction_id,
        messages=tuple(Message(m["role"], m["content"]) for m in content["messages"]),
        source=origin.get("source") or "unknown",
        licence=origin.get("licence") or "unknown",
        reference=content.get("reference"),
        category=item.category,
        specialty=item.specialty,
        difficulty=origin.get("difficulty"),
        rubric=_with_shared(own, content),
    )


def to_pool(gold: Gold, folder: str | Path) -> Pool:
    """Put gold rubrics into an exemplar pool, as its next version.

    Raises:
        CorpusError: the pool that is there cannot be read.
    """
    entries = [
        Exemplar(
            _without_shared(g.row),
            reviewer=" ".join(f"reviewer:{id}" for id in g.reviewers),
            reviewed_at=g.reviewed_at[:10],
            reviewed=PARTS,
        )
        for g in gold.rubrics
    ]
    return add_gold(folder, entries)


def write_gold(gold: Gold, round_: Round, folder: str | Path) -> str:
    """Write gold rubrics as a dataset; its manifest names round and drafts.

    Returns:
        The rows' fingerprint.

    Raises:
        RecordError: something is in the way that is no dataset.
    """
    recipe: dict[str, Any] = {
        "what": "gold rubrics of a review round",
        "round": round_.id,
        "seed": round_.seed,
        "states": {state: sum(g.state == state for g in gold.rubrics) for state in GOLD},
        "left_out": dict(gold.left_out),
    }
    parents = [p for p in [round_.settings.get("fingerprint")] if p]
    return write_dataset(folder, [g.row for g in gold.rubrics], recipe=recipe, parents=parents)


def _with_shared(own: Rubric, content: Mapping[str, Any]) -> Rubric:
    """The shared criteria that the draft had, those of a kind that its own veto took over among
    them: if the reviewer removed that veto, the shared one applies again."""
    had = set(content.get("universal") or ())
    if not had:
        return own
    kinds = {c.get("kind") for c in content["rubric"]["criteria"]}
    clinician = _BEYOND not in had and VetoKind.BEYOND_REMIT.value not in kinds
    full = with_universal(own, clinician=clinician)
    taken_over = {f"veto.{kind}" for kind in kinds if kind}
    return _cut(full, lambda c: c.id not in UNIVERSAL_IDS or c.id in had | taken_over)


def _without_shared(row: GradedInstruction) -> GradedInstruction:
    assert row.rubric is not None
    return replace(row, rubric=_cut(row.rubric, lambda c: c.id not in UNIVERSAL_IDS))


def _cut(rubric: Rubric, keep: Any) -> Rubric:
    kept: tuple[Criterion, ...] = tuple(c for c in rubric.criteria if keep(c))
    return Rubric(kept, safety_only=rubric.safety_only)
