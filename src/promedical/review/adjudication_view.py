"""What a reviewer's page of an adjudication may show, made of what is stored, and nothing else.

    preference   the conversation and the responses, in this reader's order; no criterion
    criteria     the criteria too, because the overall preference was saved and is final
    blind        (third reader) the criteria that the first readers did not settle
    revise       (third reader) and the first readers' votes on them, without who they are, because
                 the blind verdicts were saved and are final
    done         as the last stage, for reading

Left to others: the pages themselves (`pages_adjudication`, the offline pack) and what is stored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from promedical.review.adjudication_answer import (
    CHOICES,
    DANGER_KINDS,
    judged,
    pairs_of,
    preference_of,
    wanted_criteria,
)
from promedical.review.consensus import Ballot
from promedical.rubric import Tier, Verdict

__all__ = ["STAGES", "others_of", "stage_of", "view_of"]

STAGES = ("preference", "criteria", "blind", "revise", "done")
SHORT = 900  # characters of a conversation that is shown opened beside the criteria

Others = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def stage_of(answer: Mapping[str, Any], part: str, state: str) -> str:
    """Where a reader is."""
    if state == "done":
        return "done"
    if part == "third":
        return "revise" if answer.get("blind") is not None else "blind"
    return "criteria" if answer.get("preference_given") else "preference"


def others_of(
    votes: Mapping[tuple[str, str], Sequence[Ballot]], assignment_id: str
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """First readers' votes for the third one: numbered in an order that tells nothing.

    Args:
        votes: (response key, criterion id) → first readers' votes.
        assignment_id: the third reader's; its random id gives one order for the whole item.
    """
    readers = sorted({ballot.reader for cast in votes.values() for ballot in cast})
    random.Random(assignment_id).shuffle(readers)
    number = {reader: i for i, reader in enumerate(readers, start=1)}
    return {
        leaf: [
            {
                "number": number[ballot.reader],
                "v": "cannot_say" if ballot.verdict is Verdict.ABSTAIN else ballot.verdict.value,
                "disputed": ballot.disputed,
                "note": ballot.note,
            }
            for ballot in sorted(cast, key=lambda b: number[b.reader])
        ]
        for leaf, cast in votes.items()
    }


def view_of(
    content: Mapping[str, Any],
    *,
    assignment_id: str,
    order: Sequence[str],
    answer: Mapping[str, Any],
    part: str,
    version: int,
    state: str,
    others: Others | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Everything the item's template needs.

    Args:
        content: the item's.
        assignment_id, order, answer, part, version, state: the assignment's.
        others: of `others_of`; shown in the stages that may show them.
        whole: with the criteria although the preference is not saved yet, for a page without a
            server, which hides them until then by itself.
    """
    stage = stage_of(answer, part, state)
    text = {response["key"]: response["text"] for response in content["responses"]}
    wanted = wanted_criteria(content, answer, part)
    by_criterion = {c["id"]: c for c in content["rubric"]["criteria"]}
    seen = others if others is not None and (part, stage) in _OTHERS_SHOWN else {}
    shows_criteria = stage != "preference" or whole
    label = {key: chr(ord("A") + i) for i, key in enumerate(order)}
    length = sum(len(message["content"]) for message in content["messages"])
    return {
        "assignment": assignment_id,
        "version": version,
        "part": part,
        "state": state,
        "stage": stage,
        "answer_json": json.dumps(dict(answer), ensure_ascii=False),
        "messages": content["messages"],
        "conversation_open": stage == "preference" or length <= SHORT,
        "responses": [
            {
                "key": key,
                "label": label[key],
                "text": text[key],
                "tiers": _tiers(
                    key, wanted.get(key, []), by_criterion, seen, answer.get("blind") or {}
                )
                if shows_criteria
                else [],
                "asked": len(wanted.get(key, [])) if shows_criteria else 0,
            }
            for key in order
        ],
        "pairs": [
            {
                "name": f"{a}|{b}",
                "first": label[a],
                "second": label[b],
                "stated": preference_of(answer, a, b) if answer.get("preference_given") else None,
            }
            for a, b in pairs_of(order)
        ],
        "choices": CHOICES,
        "danger_kinds": DANGER_KINDS,
    }


_OTHERS_SHOWN = (("third", "revise"), ("third", "done"))


def _tiers(
    key: str,
    ids: Sequence[str],
    by_criterion: Mapping[str, Mapping[str, Any]],
    others: Others,
    blind: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The criteria by tier, in the rubric's order; weights and axes are not for the reader."""
    groups = []
    for tier in Tier:
        criteria = [
            {
                "id": i,
                "text": by_criterion[i]["text"],
                "others": list(others.get((key, i), ())),
                "mine": judged(blind, key, i),
            }
            for i in ids
            if by_criterion[i]["tier"] == tier.value
        ]
        if criteria:
            groups.append({"tier": tier.value, "criteria": criteria})
    return groups
