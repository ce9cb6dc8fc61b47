"""The answer document of an adjudication: its form, what may change in it, and the votes it holds.

    first reader  {"preference": {"KEY|KEY": CHOICE}, "preference_given": bool,
                   "verdicts": {KEY: {CRITERION: {"v": met|unmet|cannot_say, "note": TEXT}}},
                   "disputed": {KEY: {CRITERION: true}},
                   "dangers": {KEY: [{"id", "kind", "text"}]}}
    third reader  {"asked": {KEY: [CRITERION]}, "verdicts", "disputed", "dangers" as above,
                   "blind": null or {"verdicts", "disputed"} of before the others' were shown}

KEY is a response's opaque key. In "A|B" first means A. Two things are final once saved: the overall
preference, because the criteria are shown after it (`preference_given`), and a third reader's blind
verdicts, because the others' are shown after them. What is stored decides what a page may show, so
no page can be asked for more. Left to others: making and reading rounds (`adjudication`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promedical.review.consensus import Ballot
from promedical.rubric import Verdict, VetoKind

__all__ = [
    "CHOICES",
    "DANGER_KINDS",
    "SCALE",
    "VERDICTS",
    "ballots_of",
    "blind_of",
    "check_answer",
    "dangers_of",
    "judged",
    "missing_verdicts",
    "pairs_of",
    "preference_of",
    "wanted_criteria",
]

Json = Mapping[str, Any]

# In the order of the scale; cannot_say is not on it.
SCALE = ("first_better_much", "first_better", "tie", "second_better", "second_better_much")
CHOICES = (*SCALE, "cannot_say")
VERDICTS = {"met": Verdict.MET, "unmet": Verdict.UNMET, "cannot_say": Verdict.ABSTAIN}
DANGER_KINDS = (*(kind.value for kind in VetoKind), "other")
LONGEST_TEXT = 4_000
MOST_DANGERS = 20

_FIELDS = {
    "first": ("preference", "preference_given", "verdicts", "disputed", "dangers"),
    "third": ("asked", "verdicts", "disputed", "dangers", "blind"),
}


def pairs_of(keys: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of responses that a reader compares, in the order they are shown in."""
    return list(itertools.combinations(keys, 2))


def preference_of(answer: Json, a: str, b: str) -> str | None:
    """A reader's choice between two responses, first meaning `a`; None if there is none."""
    given = answer.get("preference") or {}
    if f"{a}|{b}" in given:
        choice: str = given[f"{a}|{b}"]
        return choice
    turned = given.get(f"{b}|{a}")
    return SCALE[-1 - SCALE.index(turned)] if turned in SCALE else turned


def wanted_criteria(content: Json, before: Json, part: str) -> dict[str, list[str]]:
    """Response key → ids of the criteria that this reader judges."""
    if part == "third":
        return {key: list(ids) for key, ids in (before.get("asked") or {}).items()}
    ids = [criterion["id"] for criterion in content["rubric"]["criteria"]]
    return {response["key"]: list(ids) for response in content["responses"]}


def judged(answer: Json, key: str, criterion_id: str) -> str | None:
    """met, unmet, cannot_say, or None."""
    entry = (answer.get("verdicts") or {}).get(key, {}).get(criterion_id) or {}
    value: str | None = entry.get("v")
    return value


def missing_verdicts(answer: Json, wanted: Mapping[str, Sequence[str]]) -> int:
    """How many criteria have no verdict yet."""
    return sum(judged(answer, key, c) is None for key, ids in wanted.items() for c in ids)


def blind_of(answer: Json) -> dict[str, Any]:
    """What a third reader's verdicts are at this moment, to be kept as the blind ones."""
    return {"verdicts": answer.get("verdicts") or {}, "disputed": answer.get("disputed") or {}}


def ballots_of(answer: Json, reader: str, part: str) -> dict[tuple[str, str], Ballot]:
    """The votes of a finished answer: (response key, criterion id) → vote."""
    found = {}
    blind = answer.get("blind") or {}
    for key, verdicts in (answer.get("verdicts") or {}).items():
        for criterion_id, entry in verdicts.items():
            if entry.get("v") not in VERDICTS:
                continue
            before = judged(blind, key, criterion_id)
            found[key, criterion_id] = Ballot(
                reader,
                VERDICTS[entry["v"]],
                _flag(answer, key, criterion_id),
                part == "third",
                entry.get("note") or "",
                None if before is None else VERDICTS[before],
                _flag(blind, key, criterion_id),
            )
    return found


def _flag(answer: Json, key: str, criterion_id: str) -> bool:
    return bool((answer.get("disputed") or {}).get(key, {}).get(criterion_id))


# --- checking -------------------------------------------------------------------------------------


def check_answer(
    content: Json, answer: Json, *, finish: bool, before: Json, part: str
) -> list[str]:
    """What is wrong with an answer; nothing if it may be saved.

    Args:
        content: the item's, as the reviewer may see it.
        answer: what is to be saved.
        finish: whether it is to be final, so that everything has to be there.
        before: what is stored now.
        part: "first" or "third".
    """
    if part not in _FIELDS:
        return [f"part: found {part!r}, expected first or third"]
    problems = [f"{name}: unknown field" for name in answer if name not in _FIELDS[part]]
    keys = [response["key"] for response in content["responses"]]
    wanted = wanted_criteria(content, before, part)
    problems += _verdict_problems(answer, wanted)
    problems += _danger_problems(answer, keys, finish)
    problems += (
        _first_problems(answer, before, keys, finish)
        if part == "first"
        else _third_problems(answer, before, wanted, finish)
    )
    missing = 0 if problems else missing_verdicts(answer, wanted)
    if finish and missing:
        problems.append(f"verdicts: {missing} criteria have no verdict yet")
    return problems


def _mapping(answer: Json, name: str, problems: list[str]) -> Json:
    value = answer.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{name}: expected an object")
        return {}
    return value


def _verdict_problems(answer: Json, wanted: Mapping[str, Sequence[str]]) -> list[str]:
    problems: list[str] = []
    for name in ("verdicts", "disputed"):
        for key, entries in _mapping(answer, name, problems).items():
            if key not in wanted or not isinstance(entries, Mapping):
                problems.append(f"{name}: expected responses of this item")
                continue
            unknown = [c for c in entries if c not in wanted[key]]
            if unknown:
                problems.append(f"{name}: {len(unknown)} criteria that are not asked here")
            for entry in entries.values():
                problem = _flag_problem(entry) if name == "disputed" else _vote_problem(entry)
                problems += [f"{name}: {problem}"] if problem else []
    return sorted(set(problems))


def _flag_problem(entry: Any) -> str:
    return "" if isinstance(entry, bool) else "expected true or false"


def _vote_problem(entry: Any) -> str:
    if not isinstance(entry, Mapping) or not set(entry) <= {"v", "note"}:
        return "expected objects with v and note"
    if entry.get("v") not in (None, *VERDICTS):
        return f"v: expected one of {', '.join(VERDICTS)}"
    return _text_problem("note", entry.get("note"))


def _text_problem(name: str, text: Any) -> str:
    if text is None or (isinstance(text, str) and len(text) <= LONGEST_TEXT):
        return ""
    return f"{name}: expected a text of at most {LONGEST_TEXT} characters"


def _danger_problems(answer: Json, keys: Sequence[str], finish: bool) -> list[str]:
    problems: list[str] = []
    for key, entries in _mapping(answer, "dangers", problems).items():
        if key not in keys:
            problems.append("dangers: expected responses of this item")
        elif not isinstance(entries, list) or len(entries) > MOST_DANGERS:
            problems.append(f"dangers: expected a list of at most {MOST_DANGERS}")
        else:
            problems += [f"dangers: {p}" for e in entries if (p := _danger_problem(e, finish))]
    return sorted(set(problems))


def _danger_problem(entry: Any, finish: bool) -> str:
    if not isinstance(entry, Mapping) or set(entry) != {"id", "kind", "text"}:
        return "expected objects with id, kind and text"
    if not isinstance(entry["id"], str) or not 0 < len(entry["id"]) <= 64:
        return "id: expected a short text"
    if entry["kind"] not in DANGER_KINDS:
        return f"kind: expected one of {', '.join(DANGER_KINDS)}"
    if not isinstance(entry["text"], str) or (finish and not entry["text"].strip()):
        return "text: expected what the danger is"
    return _text_problem("text", entry["text"])


def _first_problems(answer: Json, before: Json, keys: Sequence[str], finish: bool) -> list[str]:
    problems: list[str] = []
    given = _mapping(answer, "preference", problems)
    pairs = {frozenset(pair) for pair in itertools.combinations(keys, 2)}
    named = [tuple(name.split("|")) for name in given]
    if any(frozenset(pair) not in pairs for pair in named):
        problems.append("preference: expected pairs KEY|KEY of this item's responses")
    elif len({frozenset(pair) for pair in named}) < len(named):
        problems.append("preference: a pair is compared twice")
    if any(choice not in CHOICES for choice in given.values()):
        problems.append(f"preference: expected one of {', '.join(CHOICES)}")
    done = answer.get("preference_given", False)
    if not isinstance(done, bool):
        problems.append("preference_given: expected true or false")
    elif done and len(given) < len(pairs):
        problems.append(f"preference: {len(pairs) - len(given)} pairs are not compared yet")
    elif not done and (finish or answer.get("verdicts")):
        problems.append("preference: it comes first, before any criterion")
    if before.get("preference_given"):
        kept = before.get("preference") or {}
        if not done or dict(given) != dict(kept):
            problems.append("preference: it is final, because the criteria were shown after it")
    return problems


def _third_problems(
    answer: Json, before: Json, wanted: Mapping[str, Sequence[str]], finish: bool
) -> list[str]:
    if answer.get("asked") != before.get("asked"):
        return ["asked: it is set by the server"]
    blind, kept = answer.get("blind"), before.get("blind")
    if kept is not None:
        return [] if blind == kept else ["blind: it is final, because the others' were shown"]
    if blind is None:
        return ["blind: expected your own verdicts before the others' are seen"] if finish else []
    if blind != blind_of(answer):
        return ["blind: expected the verdicts as they are"]
    missing = missing_verdicts(answer, wanted)
    return [f"blind: {missing} criteria have no verdict yet"] if missing else []


def dangers_of(answer: Json) -> Iterable[tuple[str, Json]]:
    """(response key, danger) of every danger that a reader described."""
    for key, entries in (answer.get("dangers") or {}).items():
        for entry in entries:
            if entry.get("text", "").strip():
                yield key, entry
