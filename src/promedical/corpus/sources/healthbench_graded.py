"""Graded answers with signed criteria (HealthBench's form) → graded instructions.

A row of the file is one answer: `{source, prompt_id, messages, response_id, response_model,
response, criteria: [{text, points, tags?, met, labeller}], score?}`, JSON lines, gzipped. The file
is the user's; nothing of it comes with the package, and no message here quotes it. Criteria map to
the tiers of section 2 by points and wording (`signed_criteria`).

Rows are grouped by conversation, since one prompt id may stand for two texts, and split by the
text of the last user turn, since two conversations may end in the same question. Left to others:
cutting rubrics to a budget (`reward_model.instances`), semantic near-duplicates
(`corpus.overlap`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from promedical.corpus.sources.files import files_of
from promedical.corpus.sources.reading import Raw, Read, Rejected, SourceSettings, read_rows
from promedical.corpus.sources.signed_criteria import (
    AVOIDS,
    Signed,
    Wording,
    axis_of,
    normal,
    to_rubric,
    veto_kind,
    wording,
)
from promedical.records import GradedInstruction, Message, RecordError, Response
from promedical.rubric import Criterion, Tier, Verdict, VetoKind

__all__ = [
    "AVOIDS",
    "HealthBenchGraded",
    "Splits",
    "Wording",
    "healthbench_graded",
    "read_healthbench_graded",
    "split",
    "veto_kind",
    "without_omissions",
    "wording",
]

LICENCE = "see source: non-commercial or unstated, not to be redistributed"


def healthbench_graded(settings: SourceSettings) -> Iterator[Read]:
    """Graded instructions of a file, or of every file in a folder, each read whole.

    An instruction is gathered from many lines, so its "line" is its number in the file.
    """

    def published(path: Path, name: str) -> Iterator[Raw | Rejected]:
        found = read_healthbench_graded(path)
        for fault in found.broken:
            line, _, why = fault.removeprefix(f"{path}: line ").partition(": ")
            field = why.partition(":")[0] if ":" in why else ""
            yield Rejected(name, int(line), field, "broken_row", why)
        for number, row in enumerate(found.rows, start=1):
            yield Raw(name, number, {"row": row})

    def labelled(raw: Raw) -> GradedInstruction:
        row: GradedInstruction = raw.data["row"]
        return replace(
            row, source=settings.label or row.source, licence=settings.licence or row.licence
        )

    for path, name in files_of(settings, (".jsonl", ".json")):
        yield from read_rows(published(path, name), labelled)


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HealthBenchGraded:
    """What the file held.

    Args:
        rows: one graded instruction a conversation.
        counts: what was read, mapped, merged and dropped, by name.
        broken: a sentence for every row that could not be used: file, line, field, what was wrong;
            it never quotes the row.
    """

    rows: tuple[GradedInstruction, ...]
    counts: Mapping[str, int]
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """One line of the file, checked."""

    source: str
    prompt_id: str
    messages: tuple[Message, ...]
    response: Response  # its verdicts are still empty
    criteria: tuple[tuple[str, float, bool, str | None], ...]  # text, points, met, axis


@dataclass
class _Conversation:
    """Answers of one conversation while they are gathered."""

    first: _Answer
    # (text, points) of every criterion in order of appearance, by normalised text
    criteria: dict[str, tuple[str, float, str | None]] = field(default_factory=dict)
    # normalised response text → its response, and normalised criterion → met; None: contradicted
    responses: dict[str, tuple[Response, dict[str, bool | None]]] = field(default_factory=dict)


def read_healthbench_graded(path: str | Path) -> HealthBenchGraded:
    """Read graded answers and map their criteria to tiers.

    A row that cannot be used is reported and left out; so is the second of two labels on one
    (answer, criterion) where they agree. Where they contradict each other there is no label.

    Args:
        path: JSON lines, gzipped or not, one answer a line.

    Raises:
        RecordError: the file is missing, no gzip or text file, or holds no usable row.
    """
    counts: Counter[str] = Counter()
    broken: list[str] = []
    conversations: dict[str, _Conversation] = {}
    seen: dict[str, int] = {}
    for number, line in _lines(Path(path)):
        if not line.strip():
            continue
        counts["rows"] += 1
        try:
            answer = _answer(line)
            if answer.response.id in seen:
                raise RecordError(
                    f"response_id: repeats, it was on line {seen[answer.response.id]}"
                )
        except RecordError as error:
            broken.append(f"{path}: line {number}: {error}")
            continue
        seen[answer.response.id] = number
        key = _key(answer.messages)
        _gather(conversations.setdefault(key, _Conversation(answer)), answer, counts)
    counts["rows_broken"] = len(broken)
    rows = []
    for key, conversation in conversations.items():
        row = _graded(key, conversation, counts)
        if row is not None:
            rows.append(row)
    if not rows:
        first = f"; {broken[0]}" if broken else ""
        raise RecordError(f"{path}: found no usable row of {counts['rows']}{first}")
    counts["instructions"] = len(rows)
    counts["responses"] = sum(len(row.responses) for row in rows)
    return HealthBenchGraded(tuple(rows), dict(counts), tuple(broken))


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (
            path.open("rb") as file,
            io.TextIOWrapper(
                gzip.GzipFile(fileobj=file) if packed else file,
                encoding="utf-8",
            ) as lines,
        ):
            yield from enumerate(lines, start=1)
    except FileNotFoundError:
        raise RecordError(f"{path}: not found, expected gzipped JSON lines") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None
    except UnicodeDecodeError:
        raise RecordError(f"{path}: not UTF-8 text") from None


def _answer(line: str) -> _Answer:
    """A checked line.

    Raises:
        RecordError: names the field; never quotes its content.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError("not JSON") from None
    if not isinstance(data, dict):
        raise RecordError(f"found {type(data).__name__}, expected an object")
    messages = _list(data, "messages")
    turns = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise RecordError(f"{at}: found {type(message).__name__}, expected an object")
        role, content = _string(message, "role", at), _string(message, "content", at, empty=True)
        if role not in ("system", "user", "assistant"):
            raise RecordError(f"{at}.role: expected system, user or assistant")
        turns.append(Message(role, content))
    if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
        raise RecordError("messages: expected a conversation whose last turn is the user's")
    criteria = _list(data, "criteria")
    if not criteria:
        raise RecordError("criteria: found none, expected at least one")
    response = Response(
        id=_string(data, "response_id"),
        model=_string(data, "response_model") if data.get("response_model") else "unknown",
        text=_string(data, "response", empty=True),
    )
    return _Answer(
        _string(data, "source") if data.get("source") else "unknown",
        _string(data, "prompt_id"),
        tuple(turns),
        response,
        tuple(_criterion(entry, f"criteria[{i}]") for i, entry in enumerate(criteria)),
    )


def _criterion(entry: Any, at: str) -> tuple[str, float, bool, str | None]:
    if not isinstance(entry, dict):
        raise RecordError(f"{at}: found {type(entry).__name__}, expected an object")
    text = _string(entry, "text", at)
    points, met = entry.get("points"), entry.get("met")
    if isinstance(points, bool) or not isinstance(points, int | float) or not math.isfinite(points):
        raise RecordError(f"{at}.points: found {_kind(points)}, expected a finite number")
    if not isinstance(met, bool):
        raise RecordError(f"{at}.met: found {_kind(met)}, expected true or false")
    tags = entry.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RecordError(f"{at}.tags: expected a list of texts")
    return text, float(points), met, axis_of(tags)


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise RecordError(f"{name}: found {_kind(value)}, expected a list")
    return value


def _string(data: Mapping[str, Any], name: str, at: str = "", *, empty: bool = False) -> str:
    value = data.get(name)
    where = f"{at}.{name}" if at else name
    if not isinstance(value, str):
        raise RecordError(f"{where}: found {_kind(value)}, expected text")
    if not empty and not value.strip():
        raise RecordError(f"{where}: empty, expected text")
    return value


def _kind(value: Any) -> str:
    """What was found, without its content."""
    return "nothing" if value is None else type(value).__name__


def _gather(conversation: _Conversation, answer: _Answer, counts: Counter[str]) -> None:
    """Add an answer and its labels to its conversation."""
    name = normal(answer.response.text)
    if name in conversation.responses:
        counts["responses_merged_same_text"] += 1
    _, labels = conversation.responses.setdefault(name, (answer.response, {}))
    asked: set[str] = set()
    for text, points, met, axis in answer.criteria:
        counts["labels"] += 1
        if points == 0:
            counts["labels_dropped_zero_points"] += 1
            continue
        key = normal(text)
        known = conversation.criteria.setdefault(key, (text, points, axis))
        if known[1] != points:
            counts["labels_with_other_points_than_first"] += 1
            if (known[1] > 0) != (points > 0):
                # The other sign would turn the sentence's meaning round.
                counts["labels_dropped_other_sign"] += 1
                continue
        if key in asked:
            counts["duplicate_criteria"] += 1
        asked.add(key)
        if key in labels and labels[key] != met:
            counts["labels_contradicting"] += labels[key] is not None
            labels[key] = None
        else:
            labels[key] = met


def _graded(
    key: str, conversation: _Conversation, counts: Counter[str]
) -> GradedInstruction | None:
    """The conversation's rubric, responses and verdicts."""
    if not conversation.criteria:
        counts["conversations_without_criteria"] += 1
        return None
    mapped = to_rubric([Signed(*entry) for entry in conversation.criteria.values()])
    counts["rubrics_without_proficiency"] += mapped.rubric.safety_only
    counts.update(f"criteria_{how}" for how in mapped.how)
    responses = []
    for response, labels in conversation.responses.values():
        verdicts = {}
        for criterion, negates, text in zip(
            mapped.rubric.criteria, mapped.negated, conversation.criteria, strict=True
        ):
            met = labels.get(text)
            if met is None:
                counts["verdicts_unknown"] += 1
                continue
            verdicts[criterion.id] = Verdict.MET if met is not negates else Verdict.UNMET
        counts["verdicts"] += len(verdicts)
        responses.append(replace(response, verdicts=verdicts))
    first = conversation.first
    return GradedInstruction(
        # One prompt id may stand for two conversations.
        id=f"{first.prompt_id}-{key[:8]}",
        messages=first.messages,
        source=first.source,
        licence=LICENCE,
        rubric=mapped.rubric,
        responses=tuple(responses),
    )


# --- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Three parts of which no two share a last user turn."""

    train: tuple[GradedInstruction, ...]
    calibration: tuple[GradedInstruction, ...]
    test: tuple[GradedInstruction, ...]


def split(
    rows: Sequence[GradedInstruction],
    seed: int,
    *,
    calibration: float = 0.1,
    test: float = 0.2,
) -> Splits:
    """Divide by the normalised text of the last user turn, never by row.

    Args:
        rows: graded instructions.
        seed: of the order in which the texts are dealt out.
        calibration, test: shares of the distinct texts; the rest is for training.

    Raises:
        ValueError: shares that are not positive or leave nothing to train on.
    """
    if not (calibration > 0 and test > 0 and calibration + test < 1):
        raise ValueError(
            f"calibration, test: found {calibration!r} and {test!r}, expected positive shares "
            "that sum to less than 1"
        )

    def dealt(text: str) -> str:
        return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()

    by_text: dict[str, list[GradedInstruction]] = {}
    for row in rows:
        by_text.setdefault(normal(row.messages[-1].content), []).append(row)
    texts = sorted(by_text, key=dealt)
    first = math.ceil(test * len(texts))
    second = first + math.ceil(calibration * len(texts))

    def part(chosen: Sequence[str]) -> tuple[GradedInstruction, ...]:
        return tuple(row for text in chosen for row in by_text[text])

    return Splits(part(texts[second:]), part(texts[first:second]), part(texts[:first]))


def without_omissions(
    rows: Iterable[GradedInstruction],
) -> tuple[list[GradedInstruction], dict[str, int]]:
    """Rows without the criteria that were worded as leaving something out, weights re-normalised.

    Labels on such criteria are the least reliable: a judge has to find that something is absent.

    Returns:
        The rows, and counts of the criteria left out and of rows that had no others.
    """
    kept: list[GradedInstruction] = []
    counts: Counter[str] = Counter()
    for row in rows:
        if row.rubric is None:
            raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
        ids = {c.id for c in row.rubric.criteria if not _is_omission(c)}
        counts["criteria_left_out"] += len(row.rubric.criteria) - len(ids)
        rubric = row.rubric.restricted_to(ids) if ids else None
        if rubric is None:
            counts["instructions_left_out"] += 1
            continue
        kept.append(
            replace(
                row,
                rubric=rubric,
                responses=tuple(
                    replace(r, verdicts={c: v for c, v in r.verdicts.items() if c in ids})
                    for r in row.responses
                ),
            )
        )
    return kept, dict(counts)


def _is_omission(criterion: Criterion) -> bool:
    if criterion.tier is Tier.VETO:
        return criterion.kind is VetoKind.MISSED_EMERGENCY
    if not criterion.text.startswith(AVOIDS):
        return False
    how = wording(criterion.text.removeprefix(AVOIDS))
    return how in (Wording.OMISSION, Wording.MISSED_EMERGENCY)


def _key(messages: Sequence[Message]) -> str:
    """A name for a conversation: a hash over its turns as compared."""
    turns = [[m.role, normal(m.content)] for m in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()
