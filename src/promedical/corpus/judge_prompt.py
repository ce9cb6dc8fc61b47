"""What a judge is asked about a response, and how its reply is read (section 3, step 7).

The rules in `prompts/judge.md` answer the paper's known judge errors: leniency on medical risk,
ambiguous opening sentences, specialised definitions, disclaimers. A judge reads "met / not_met" on
what a response should do and "violated / not_violated" on what it must not do, because a veto's
"met" is misread; here both become the method's verdict, true of the response or not.

Conversation, response and criteria are others' text, fenced as everywhere (`fence`); criteria are
JSON, a line each. Left to others: who is asked, and panels (`judge`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promedical.corpus.fence import MARK, block, conversation, quoted, render, unquoted
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Tier, Verdict

__all__ = ["Judgment", "Reading", "judge_messages", "read_reply", "reply_schema"]

# What JSON leaves as it is and yet ends a line for some readers.
_BREAKS = re.compile("[\x85\u2028\u2029]")
CANNOT_SAY = "cannot_say"
# The judge's words for: the sentence is true of the response, it is not.
WORDS: Mapping[bool, tuple[str, str]] = {
    True: ("violated", "not_violated"),
    False: ("met", "not_met"),
}


@dataclass(frozen=True, slots=True)
class Judgment:
    """One judge's verdict on one criterion.

    Args:
        evidence: what the judge quoted; it may hold text of the response.
        why: for an error what was wrong with the reply, "" otherwise.
    """

    verdict: Verdict
    evidence: str = ""
    why: str = ""


@dataclass(frozen=True)
class Reading:
    """A reply as verdicts.

    Args:
        judgments: criterion id → judgment, one for each criterion that was asked about.
        unknown: entries whose id was not asked about.
    """

    judgments: Mapping[str, Judgment]
    unknown: int = 0


def judge_messages(
    row: GradedInstruction, response: Response, criteria: Sequence[Criterion], *, single: bool
) -> tuple[Message, ...]:
    """The prompt: the rules, then conversation, response and criteria, each fenced.

    The criteria come last, so that the calls of one response share all that stands before them.

    Args:
        single: ask about exactly one criterion, with a shorter form of reply.
    """
    places = {
        "conversation": conversation(row.messages),
        "response": block("response", response.text),
        "criteria": block("criteria", "\n".join(_as_json(c) for c in criteria)),
        "verdicts": " | ".join(_words_for(criteria)),
    }
    if single:
        return (*render("judge", {}), *render("judge_criterion", places))
    return (
        *render("judge", {}),
        *render("judge_response", {**places, "count": str(len(criteria))}),
    )


def reply_schema(criteria: Sequence[Criterion], *, single: bool) -> dict[str, Any]:
    """JSON schema of the reply; ids are free text, so that one wrong id spoils no other verdict."""
    verdict = {
        "evidence": {"type": "string"},
        "verdict": {"type": "string", "enum": list(_words_for(criteria))},
    }
    if single:
        return _closed(verdict)
    entry = _closed({"criterion": {"type": "string"}, **verdict})
    return _closed({"verdicts": {"type": "array", "items": entry}})


def read_reply(data: Any, criteria: Sequence[Criterion], *, single: bool) -> Reading:
    """Verdicts of a reply that satisfies its schema.

    A criterion that is missing, repeated, or answered with the words of the other type is an error;
    the others stand.
    """
    if single:
        (criterion,) = criteria
        return Reading({criterion.id: _judgment(criterion, [data])})
    given: dict[str, list[Mapping[str, Any]]] = {}
    for entry in data["verdicts"]:
        given.setdefault(entry["criterion"].strip(), []).append(entry)
    # An id with space around it, or one that quoting changed, is still found.
    judgments = {
        c.id: _judgment(c, [entry for id in _spellings(c) for entry in given.pop(id, [])])
        for c in criteria
    }
    return Reading(judgments, sum(map(len, given.values())))


def _spellings(criterion: Criterion) -> tuple[str, ...]:
    """The criterion's id as it is, and as the prompt shows it where quoting changes it."""
    id = criterion.id.strip()
    return tuple(dict.fromkeys((id, quoted(id).removeprefix(MARK))))


def _judgment(criterion: Criterion, entries: Sequence[Mapping[str, Any]]) -> Judgment:
    if not entries:
        return Judgment(Verdict.ERROR, why="missing")
    if len(entries) > 1:
        return Judgment(Verdict.ERROR, why="repeated")
    word, evidence = entries[0]["verdict"], unquoted(entries[0]["evidence"])
    if word == CANNOT_SAY:
        return Judgment(Verdict.ABSTAIN, evidence)
    true, false = WORDS[criterion.tier is Tier.VETO]
    if word not in (true, false):
        return Judgment(Verdict.ERROR, evidence, why="wrong_word")
    return Judgment(Verdict.MET if word == true else Verdict.UNMET, evidence)


def _words_for(criteria: Sequence[Criterion]) -> tuple[str, ...]:
    types = sorted({c.tier is Tier.VETO for c in criteria})
    return (*(word for veto in types for word in WORDS[veto]), CANNOT_SAY)


def _as_json(criterion: Criterion) -> str:
    veto = criterion.tier is Tier.VETO
    shown = {"criterion": criterion.id, "type": "violation" if veto else "requirement"}
    if criterion.kind is not None:
        shown["kind"] = criterion.kind.value
    line = json.dumps({**shown, "sentence": criterion.text}, ensure_ascii=False)
    return _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
