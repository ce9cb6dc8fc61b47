"""A round of adjudication as a bench in the project's form, with every vote and who cast it.

    OUT/bench/                  rows.parquet, manifest.json: what `promedical bench run --suite
                                promedical --rows OUT/bench` reads
        votes.jsonl             a line a vote: what, by whom, in which part; a third's blind one too
        preferences.jsonl       a line an overall preference, with the order it was seen in
        contested.jsonl         criteria without a gold verdict, and why
        veto_candidates.jsonl   dangers that no rubric covers, with what the lead made of them
        physicians.json         pseudonym, specialty, country, years since licence
        report.json             agreement, the test of the lexicographic rule, counts, provenance

A contested criterion's verdict is `abstain`, so every accuracy figure leaves it out by itself. The
votes of a criterion are the first readers', in one order of persons, then the third one's:
`bench.agreement.votes(rows, first=N)` reads the independent ones. Items that are not settled are
left out and counted. Notes are people's own words and are left out unless asked for. Everything is
readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from promedical.provenance import provenance
from promedical.records import GradedInstruction, fingerprint, write_dataset
from promedical.review import audit_log
from promedical.review.adjudication import (
    AdjudicationError,
    ReadItem,
    dangers,
    read_items,
    row_of,
)
from promedical.review.adjudication_answer import pairs_of, preference_of
from promedical.review.agreement_live import RESAMPLES, live_agreement
from promedical.review.consensus import Ballot, Standing
from promedical.review.tables import Reviewer, Round, now
from promedical.rubric import Verdict

__all__ = ["ExportedBench", "danger_lines", "export_bench", "graded_row", "pseudonyms"]

Json = dict[str, Any]


@dataclass(frozen=True)
class ExportedBench:
    """What was written.

    Args:
        folder: where.
        instructions, responses, votes: how many.
        gold, contested: criteria of responses with and without a gold verdict.
        unfinished: ids of instructions that are not settled and so not in it.
        fingerprint: of the rows.
    """

    folder: Path
    instructions: int
    responses: int
    votes: int
    gold: int
    contested: int
    unfinished: tuple[str, ...]
    fingerprint: str


def pseudonyms(round_id: str, reviewer_ids: Iterable[str]) -> dict[str, str]:
    """Reviewer id → "physician-01", …, in an order that only the round's id decides."""

    def mixed(reviewer: str) -> str:
        return hashlib.sha256(f"{round_id}/{reviewer}".encode()).hexdigest()

    ordered = sorted(set(reviewer_ids), key=mixed)
    return {reviewer: f"physician-{i:02}" for i, reviewer in enumerate(ordered, start=1)}


def graded_row(item: ReadItem, names: Mapping[str, str]) -> GradedInstruction:
    """A settled item as a bench row: gold verdicts, contested ones unknown, and all votes.

    Args:
        names: reviewer id → pseudonym; first readers' votes are in its order.

    Raises:
        AdjudicationError: the item is not settled, or was read without its secret.
    """
    if not item.complete:
        raise AdjudicationError(f"item of {item.instruction_id!r}: not settled yet")
    row = row_of(item)
    found = item.consensus
    responses = [
        replace(
            response,
            verdicts={c.id: found[key, c.id].verdict for c in item.rubric.criteria},
            votes={
                c.id: tuple(_word(b) for b in _in_order(found[key, c.id].ballots, names))
                for c in item.rubric.criteria
            },
        )
        for key, response in zip(item.keys, row.responses, strict=True)
    ]
    # By id: the order of the keys was random.
    return row.with_responses(sorted(responses, key=lambda response: response.id))


def _in_order(ballots: Sequence[Ballot], names: Mapping[str, str]) -> list[Ballot]:
    return sorted(ballots, key=lambda ballot: (ballot.third, names[ballot.reader]))


def _word(ballot: Ballot) -> str:
    return _verdict_word(ballot.verdict)


def _verdict_word(verdict: Verdict) -> str:
    return "cannot_say" if verdict is Verdict.ABSTAIN else verdict.value


def export_bench(
    session: Session,
    round_id: str,
    folder: str | Path,
    *,
    actor_id: str | None = "system",
    notes: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ExportedBench:
    """Write a round's bench; see the module.

    Args:
        session: of `Database.write()`, because the export is recorded; with `actor_id` None it may
            be of `read()`, which keeps nobody from saving meanwhile, and the caller records it.
        folder: made if need be; a bench that is there already is replaced.
        actor_id: who exports.
        notes: whether to write what readers noted, which is free text.
        resamples, seed: of the agreement's bootstrap.

    Raises:
        AdjudicationError: no such round, or nothing of it is settled.
        RecordError: there is something else in the way.
    """
    items = read_items(session, round_id, secret=True)
    settled = [item for item in items if item.complete]
    if not settled:
        raise AdjudicationError(
            f"round: none of its {len(items)} items is settled yet, so there is nothing to export"
        )
    round_ = session.get_one(Round, round_id)
    people = {r.reviewer_id for item in items for r in item.readings if r.done}
    names = pseudonyms(round_id, people)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    target.chmod(0o700)
    rows = [graded_row(item, names) for item in settled]
    recipe = {
        "made_by": "double-blind adjudication",
        "first_readers": round_.settings.get("readers"),
        "gold": "more than half of all votes; otherwise contested",
    }
    write_dataset(target / "bench", rows, recipe=recipe)
    for path in (target / "bench").iterdir():
        path.chmod(0o600)
    votes = [line for item in settled for line in _vote_lines(item, names, notes)]
    contested = [line for item in settled for line in _contested_lines(item)]
    report = _report(items, settled, rows, contested, names, resamples, seed)
    report["round"] = {k: v for k, v in round_.settings.items() if k in ("readers", "judge")}
    _lines(target / "votes.jsonl", votes)
    _lines(target / "preferences.jsonl", (p for i in settled for p in _preference_lines(i, names)))
    _lines(target / "contested.jsonl", contested)
    _lines(target / "veto_candidates.jsonl", danger_lines(items, round_, names))
    _private(target / "physicians.json", _json(_physicians(session, names)))
    _private(target / "report.json", _json(report))
    digest = fingerprint(rows)
    if actor_id is not None:
        audit_log.record(session, actor_id, "bench.export", f"round:{round_id}", digest=digest)
    gold = sum(c.gold is not None for item in settled for c in item.consensus.values())
    return ExportedBench(
        target,
        len(rows),
        sum(len(row.responses) for row in rows),
        len(votes),
        gold,
        len(contested),
        tuple(item.instruction_id for item in items if not item.complete),
        digest,
    )


def _response_ids(item: ReadItem) -> dict[str, str]:
    return {key: written["id"] for key, written in item.secret["responses"].items()}


def _vote_lines(item: ReadItem, names: Mapping[str, str], notes: bool) -> Iterable[Json]:
    ids = _response_ids(item)
    tier = {c.id: c.tier.value for c in item.rubric.criteria}
    for (key, criterion_id), found in item.consensus.items():
        for ballot in _in_order(found.ballots, names):
            line: Json = {
                "instruction": item.instruction_id,
                "response": ids[key],
                "criterion": criterion_id,
                "tier": tier[criterion_id],
                "physician": names[ballot.reader],
                "part": "third" if ballot.third else "first",
                "vote": _word(ballot),
                "guidelines_differ": ballot.disputed,
            }
            if ballot.blind is not None:
                line["blind_vote"] = _verdict_word(ballot.blind)
                line["blind_guidelines_differ"] = ballot.blind_disputed
            if notes and ballot.note:
                line["note"] = ballot.note
            yield line


def _preference_lines(item: ReadItem, names: Mapping[str, str]) -> Iterable[Json]:
    ids = _response_ids(item)
    for reading in sorted(item.firsts, key=lambda r: names[r.reviewer_id]):
        for a, b in pairs_of(sorted(item.keys, key=ids.__getitem__)):
            yield {
                "instruction": item.instruction_id,
                "first": ids[a],
                "second": ids[b],
                "physician": names[reading.reviewer_id],
                "choice": preference_of(reading.answer, a, b),
                "seen_in_order": [ids[key] for key in reading.order],
            }


def _contested_lines(item: ReadItem) -> Iterable[Json]:
    ids = _response_ids(item)
    tier = {c.id: c.tier.value for c in item.rubric.criteria}
    for (key, criterion_id), found in item.consensus.items():
        if found.standing is Standing.CONTESTED:
            yield {
                "instruction": item.instruction_id,
                "response": ids[key],
                "criterion": criterion_id,
                "tier": tier[criterion_id],
                "reason": found.reason,
            }


def danger_lines(
    items: Sequence[ReadItem], round_: Round, names: Mapping[str, str]
) -> Iterable[Json]:
    """Candidates for the veto bank: kind, text, where, by whom, and what the lead made of it."""
    by_item = {item.id: item for item in items}
    for danger in dangers(items, round_.settings.get("dangers") or {}):
        written = by_item[danger["item_id"]].secret["responses"][danger["key"]]
        yield {
            "instruction": danger["instruction_id"],
            "response": written["id"],
            "kind": danger["kind"],
            "text": danger["text"],
            "physician": names.get(danger["reviewer_id"], "not finished"),
            "state": danger["state"],
        }


def _physicians(session: Session, names: Mapping[str, str]) -> list[Json]:
    found = session.scalars(select(Reviewer).where(Reviewer.id.in_(names)))
    year = now().year
    shown = [
        {
            "physician": names[reviewer.id],
            "specialty": reviewer.specialty,
            "country": reviewer.country,
            "years_since_licence": None
            if reviewer.licensed_since is None
            else year - reviewer.licensed_since,
        }
        for reviewer in found
    ]
    return sorted(shown, key=lambda person: str(person["physician"]))


def _report(
    items: Sequence[ReadItem],
    settled: Sequence[ReadItem],
    rows: Sequence[GradedInstruction],
    contested: Sequence[Json],
    names: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Json:
    agreement = live_agreement(items, resamples=resamples, seed=seed)
    return {
        "instructions": len(settled),
        "left_out_not_settled": len(items) - len(settled),
        "gold": sum(c.gold is not None for item in settled for c in item.consensus.values()),
        "contested": {
            "criteria": len(contested),
            "by_reason": dict(Counter(line["reason"] for line in contested)),
            "by_tier": dict(Counter(line["tier"] for line in contested)),
        },
        "agreement": _renamed(agreement, names),
        "provenance": provenance(seed=seed, data_fingerprint=fingerprint(rows)),
    }


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same with pseudonyms in place of ids, in keys and in values."""
    if isinstance(value, Mapping):
        return {names.get(k, k): _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def _json(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _lines(path: Path, lines: Iterable[Json]) -> None:
    _private(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _private(path: Path, text: str) -> None:
    """Write and rename, for the owner's eyes alone."""
    staging = path.with_name(f".{path.name}.new")
    with open(os.open(staging, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(text.encode("utf-8"))
    os.replace(staging, path)
