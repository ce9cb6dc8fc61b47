"""The one row type that carries everything, and its Parquet form.

A `GradedInstruction` starts as an instruction and fills up stage by stage (rubric, responses,
verdicts); preference pairs, trees and bench rows are pure functions of it. On disk a dataset is a
folder with `rows.parquet` (readable by pyarrow and `datasets`) and `manifest.json`, written to a
temporary name and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from promedical.rubric import Criterion, Rubric, RubricError, Verdict

__all__ = [
    "GradedInstruction",
    "Message",
    "RecordError",
    "Response",
    "fingerprint",
    "read_dataset",
    "read_jsonl",
    "read_manifest",
    "write_dataset",
]

SCHEMA_VERSION = 1
ROLES = ("system", "user", "assistant")


class RecordError(ValueError):
    """A row that cannot be used; the message names file, row, field, and what was found."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Raises:
        RecordError: a role other than system, user, assistant, or content that is not text.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RecordError(f"role: found {self.role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise RecordError(f"content: found {type(self.content).__name__}, expected a string")


@dataclass(frozen=True)
class Response:
    """One answer to an instruction, and what is known about it.

    Args:
        id: unique in its instruction.
        model: who wrote it (a model's name, "physician", or the construction's name).
        text: the answer.
        verdicts: criterion id → verdict. `ABSTAIN` stands for a label nobody can know.
        votes: criterion id → each physician's vote as given, where there are votes.
        construction: how a constructed answer was made, a step an entry, such as
            "violation:harmful_advice:family=stop-medication".
    """

    id: str
    model: str
    text: str
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    votes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    construction: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RecordError(f"response id: found {self.id!r}, expected a non-empty string")
        if not isinstance(self.text, str):
            raise RecordError(
                f"response {self.id!r}: text: found {type(self.text).__name__}, expected a string"
            )
        where = f"response {self.id!r}"
        verdicts: dict[str, Verdict] = {}
        for criterion, verdict in self.verdicts.items():
            try:
                verdicts[criterion] = Verdict(verdict)
            except ValueError:
                raise RecordError(
                    f"{where}: verdicts[{criterion!r}]: found {verdict!r}, "
                    "expected met, unmet, abstain or error"
                ) from None
        object.__setattr__(self, "verdicts", verdicts)
        for criterion, votes in self.votes.items():
            _check_texts(votes, f"{where}: votes[{criterion!r}]")
        object.__setattr__(self, "votes", {k: tuple(v) for k, v in self.votes.items()})
        _check_texts(self.construction, f"{where}: construction")
        object.__setattr__(self, "construction", tuple(self.construction))


def _check_texts(values: Any, where: str) -> None:
    # A lone string would pass for a sequence of its characters.
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise RecordError(f"{where}: found {values!r}, expected a list of texts")


@dataclass(frozen=True)
class GradedInstruction:
    """An instruction with its rubric, its responses and their verdicts, as far as they are known.

    Args:
        id: unique in its dataset.
        messages: the conversation; its last turn is the user's.
        source, licence: where it comes from and under which terms.
        reference: a physician's own answer, if there is one.
        category, specialty, difficulty: from screening, difficulty on 0–10.

    Raises:
        RecordError: no messages, a last turn that is not the user's, response ids that repeat, a
            verdict on a criterion that the rubric does not have, or a difficulty outside 0–10.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    licence: str
    rubric: Rubric | None = None
    responses: tuple[Response, ...] = ()
    reference: str | None = None
    category: str | None = None
    specialty: str | None = None
    difficulty: float | None = None

    def __post_init__(self) -> None:
        where = f"instruction {self.id!r}"
        if not isinstance(self.id, str) or not self.id:
            raise RecordError(f"instruction id: found {self.id!r}, expected a non-empty string")
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "responses", tuple(self.responses))
        if not self.messages:
            raise RecordError(f"{where}: messages: found none, expected at least one user turn")
        if self.messages[-1].role != "user":
            raise RecordError(
                f"{where}: messages: the last turn is {self.messages[-1].role!r}, expected 'user'"
            )
        ids = [r.id for r in self.responses]
        if len(set(ids)) != len(ids):
            raise RecordError(f"{where}: responses: ids repeat in {ids}, expected unique ids")
        if self.difficulty is not None:
            # A float in every case, so that 5 and the 5.0 that Parquet gives back are one content.
            difficulty = self.difficulty
            if isinstance(difficulty, bool) or not isinstance(difficulty, (int, float)):
                raise RecordError(f"{where}: difficulty: found {difficulty!r}, expected a number")
            if not 0 <= difficulty <= 10:
                raise RecordError(f"{where}: difficulty: found {difficulty!r}, expected 0 to 10")
            object.__setattr__(self, "difficulty", float(difficulty))
        known = set() if self.rubric is None else {c.id for c in self.rubric.criteria}
        for response in self.responses:
            unknown = (set(response.verdicts) | set(response.votes)) - known
            if unknown:
                raise RecordError(
                    f"{where}: response {response.id!r}: verdicts on unknown criteria "
                    f"{sorted(unknown)}, expected ids of the rubric"
                )

    def with_responses(self, responses: Iterable[Response]) -> GradedInstruction:
        """This row with other responses."""
        return replace(self, responses=tuple(responses))


_TEXT = pa.string()
_SCHEMA = pa.schema(
    [
        ("id", _TEXT),
        ("source", _TEXT),
        ("licence", _TEXT),
        ("category", _TEXT),
        ("specialty", _TEXT),
        ("difficulty", pa.float64()),
        ("messages", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("reference", _TEXT),
        (
            "rubric",
            pa.struct(
                [
                    ("safety_only", pa.bool_()),
                    (
                        "criteria",
                        pa.list_(
                            pa.struct(
                                [
                                    ("id", _TEXT),
                                    ("tier", _TEXT),
                                    ("text", _TEXT),
                                    ("weight", pa.float64()),
                                    ("axis", _TEXT),
                                    ("kind", _TEXT),
                                ]
                            )
                        ),
                    ),
                ]
            ),
        ),
        (
            "responses",
            pa.list_(
                pa.struct(
                    [
                        ("id", _TEXT),
                        ("model", _TEXT),
                        ("text", _TEXT),
                        (
                            "verdicts",
                            pa.list_(pa.struct([("criterion", _TEXT), ("verdict", _TEXT)])),
                        ),
                        (
                            "votes",
                            pa.list_(pa.struct([("criterion", _TEXT), ("votes", pa.list_(_TEXT))])),
                        ),
                        ("construction", pa.list_(_TEXT)),
                    ]
                )
            ),
        ),
    ]
)


def to_dict(row: GradedInstruction) -> dict[str, Any]:
    """The row as plain JSON types, in the order of the Parquet columns."""
    return {
        "id": row.id,
        "source": row.source,
        "licence": row.licence,
        "category": row.category,
        "specialty": row.specialty,
        "difficulty": row.difficulty,
        "messages": [{"role": m.role, "content": m.content} for m in row.messages],
        "reference": row.reference,
        "rubric": None
        if row.rubric is None
        else {
            "safety_only": row.rubric.safety_only,
            "criteria": [
                {
                    "id": c.id,
                    "tier": c.tier.value,
                    "text": c.text,
                    # A float in every case: Parquet gives 1 back as 1.0.
                    "weight": None if c.weight is None else float(c.weight),
                    "axis": c.axis,
                    "kind": None if c.kind is None else c.kind.value,
                }
                for c in row.rubric.criteria
            ],
        },
        "responses": [
            {
                "id": r.id,
                "model": r.model,
                "text": r.text,
                "verdicts": [{"criterion": k, "verdict": v.value} for k, v in r.verdicts.items()],
                "votes": [{"criterion": k, "votes": list(v)} for k, v in r.votes.items()],
                "construction": list(r.construction),
            }
            for r in row.responses
        ],
    }


def from_dict(data: Mapping[str, Any]) -> GradedInstruction:
    """The inverse of `to_dict`.

    Raises:
        RecordError: a field that is missing, unknown, given twice or holds something that cannot
            be used; the message says where in the row.
    """
    _check_fields(data, "", known=_SCHEMA.names, required=("id", "messages"))
    rubric = data.get("rubric")
    return GradedInstruction(
        id=data["id"],
        messages=tuple(_message(m, at) for at, m in _entries(data, "messages")),
        source=_text(data, "source") or "unknown",
        licence=_text(data, "licence") or "unknown",
        category=_text(data, "category"),
        specialty=_text(data, "specialty"),
        difficulty=data.get("difficulty"),
        reference=_text(data, "reference"),
        rubric=None if rubric is None else _rubric(rubric),
        responses=tuple(_response(r, at) for at, r in _entries(data, "responses")),
    )


def _message(data: Any, at: str) -> Message:
    _check_fields(data, at, known=("role", "content"), required=("role", "content"))
    try:
        return Message(data["role"], data["content"])
    except RecordError as error:
        raise RecordError(f"{at}: {error}") from None


def _rubric(data: Any) -> Rubric:
    _check_fields(data, "rubric", known=("safety_only", "criteria"), required=("criteria",))
    safety_only = data.get("safety_only")
    if safety_only is not None and not isinstance(safety_only, bool):
        raise RecordError(f"rubric: safety_only: found {safety_only!r}, expected true or false")
    names = ("id", "tier", "text", "weight", "axis", "kind")
    criteria = []
    for at, entry in _entries(data, "criteria", "rubric: "):
        _check_fields(entry, at, known=names, required=("id", "tier", "text"))
        _text(entry, "axis", at)
        try:
            criteria.append(Criterion(**entry))
        except RubricError as error:
            raise RecordError(f"{at}: {error}") from None
    try:
        return Rubric(tuple(criteria), safety_only=bool(safety_only))
    except RubricError as error:
        raise RecordError(f"rubric: {error}") from None


def _response(data: Any, at: str) -> Response:
    known = ("id", "model", "text", "verdicts", "votes", "construction")
    _check_fields(data, at, known=known, required=("id", "text"))
    try:
        return Response(
            id=data["id"],
            model=_text(data, "model") or "unknown",
            text=data["text"],
            verdicts=_by_criterion(data, "verdicts", "verdict"),
            votes=_by_criterion(data, "votes", "votes"),
            construction=tuple(step for _, step in _entries(data, "construction")),
        )
    except RecordError as error:
        raise RecordError(f"{at}: {error}") from None


def _by_criterion(data: Mapping[str, Any], name: str, value_name: str) -> dict[str, Any]:
    """A list of {criterion, value} objects as a mapping; a criterion given twice is an error."""
    values: dict[str, Any] = {}
    for at, entry in _entries(data, name):
        fields = ("criterion", value_name)
        _check_fields(entry, at, known=fields, required=fields)
        criterion = _text(entry, "criterion", at)
        assert criterion is not None
        if criterion in values:
            raise RecordError(f"{at}: criterion {criterion!r} repeats, expected one entry for each")
        values[criterion] = entry[value_name]
    return values


def _check_fields(data: Any, at: str, *, known: Iterable[str], required: Iterable[str]) -> None:
    where = f"{at}: " if at else ""
    if not isinstance(data, Mapping):
        raise RecordError(f"{where}found {data!r}, expected an object")
    unknown = [str(name) for name in data if name not in set(known)]
    if unknown:
        raise RecordError(f"{where}unknown fields {unknown}, expected some of {list(known)}")
    for name in required:
        if data.get(name) is None:
            raise RecordError(f"{where}{name}: missing, expected a value")


def _entries(data: Mapping[str, Any], name: str, at: str = "") -> list[tuple[str, Any]]:
    """The entries of a list, each with where it is; none if the list is missing or null."""
    entries = data.get(name)
    if entries is None:
        return []
    if not isinstance(entries, (list, tuple)):
        raise RecordError(f"{at}{name}: found {entries!r}, expected a list")
    return [(f"{at}{name}[{number}]", entry) for number, entry in enumerate(entries)]


def _text(data: Mapping[str, Any], name: str, at: str = "") -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        where = f"{at}: " if at else ""
        raise RecordError(f"{where}{name}: found {value!r}, expected text")
    return value


def fingerprint(rows: Iterable[GradedInstruction]) -> str:
    """SHA-256 over the rows' content, independent of the file they are stored in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_content(row))
        digest.update(b"\n")
    return digest.hexdigest()


def _content(row: GradedInstruction) -> bytes:
    return json.dumps(to_dict(row), sort_keys=True, ensure_ascii=False).encode()


def write_dataset(
    folder: str | Path,
    rows: Sequence[GradedInstruction],
    *,
    recipe: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
) -> str:
    """Write rows and their manifest; a reader sees the old dataset, none, or the new one.

    Args:
        folder: where; its parent is made if need be.
        recipe: the settings that made the rows.
        parents: fingerprints of the datasets they were made from.

    Returns:
        The rows' fingerprint.

    Raises:
        RecordError: two rows share an id, a text cannot be written as UTF-8, or there is
            something in the way that is no dataset (it is left alone).
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise RecordError(f"{folder}: id {row.id!r} repeats, expected unique ids")
        seen.add(row.id)
        try:
            _content(row)
        except UnicodeEncodeError as error:
            raise RecordError(f"{folder}: id {row.id!r}: not valid Unicode ({error})") from None
    target = Path(folder)
    if not _replaceable(target):
        raise RecordError(f"{target}: exists and is no dataset, so it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = fingerprint(rows)
    licences: dict[str, int] = {}
    for row in rows:
        licences[row.licence] = licences.get(row.licence, 0) + 1
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": digest,
        "recipe": dict(recipe or {}),
        "parents": list(parents),
        "counts": {
            "instructions": len(rows),
            "responses": sum(len(r.responses) for r in rows),
            "verdicts": sum(len(a.verdicts) for r in rows for a in r.responses),
        },
        "licences": licences,
    }
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        table = pa.Table.from_pylist([to_dict(row) for row in rows], schema=_SCHEMA)
        pq.write_table(table, staging / "rows.parquet")
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (staging / "manifest.json").write_text(text, encoding="utf-8")
        _replace_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return digest


def _replaceable(target: Path) -> bool:
    if not target.exists():
        return True
    is_dataset = all((target / name).is_file() for name in ("manifest.json", "rows.parquet"))
    return is_dataset or (target.is_dir() and not any(target.iterdir()))


def _replace_folder(staging: Path, target: Path) -> None:
    """Move a finished folder to its name; what was there is moved aside first, then removed."""
    if not target.exists():
        os.replace(staging, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.replace(target, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.replace(staging, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
        RecordError: there is none, or its schema version is not this one.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(f"{path}: not found, expected a dataset folder") from None
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise RecordError(f"{path}: found {type(manifest).__name__}, expected an object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(
            f"{path}: schema_version: found {manifest.get('schema_version')!r}, "
            f"expected {SCHEMA_VERSION}"
        )
    return manifest


def read_dataset(folder: str | Path) -> list[GradedInstruction]:
    """Read a dataset and check it against its manifest.

    Raises:
        RecordError: a file that is missing, a row that cannot be used (named), or rows that are
            not those of the manifest.
    """
    manifest = read_manifest(folder)
    path = Path(folder) / "rows.parquet"
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise RecordError(f"{path}: not found, expected the rows of the dataset") from None
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not a Parquet file ({error})") from None
    rows = []
    for number, data in enumerate(table.to_pylist(), start=1):
        try:
            rows.append(from_dict(data))
        except RecordError as error:
            raise RecordError(f"{path}: row {number}: {error}") from None
    if fingerprint(rows) != manifest.get("fingerprint"):
        raise RecordError(f"{path}: the rows are not those of manifest.json (fingerprint differs)")
    return rows


def read_jsonl(path: str | Path) -> list[GradedInstruction]:
    """Read rows from JSON lines in the shape of `to_dict`.

    Verdicts may also be given as a plain object, criterion id → verdict.

    Raises:
        RecordError: the file is missing, an id repeats, or a line cannot be used; the message
            names file and line.
    """
    rows: list[GradedInstruction] = []
    line_of: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RecordError(f"{path}: not found, expected a JSON lines file") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if not isinstance(data, dict):
                raise RecordError(f"found {type(data).__name__}, expected an object")
            row = from_dict(_with_listed_verdicts(data))
            if row.id in line_of:
                raise RecordError(f"id: {row.id!r} repeats, it was on line {line_of[row.id]}")
            line_of[row.id] = number
            rows.append(row)
        except RecordError as error:
            raise RecordError(f"{path}: line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}: line {number}: not JSON ({error})") from None
    return rows


def _with_listed_verdicts(data: dict[str, Any]) -> dict[str, Any]:
    responses = data.get("responses")
    for response in responses if isinstance(responses, list) else ():
        if isinstance(response, dict) and isinstance(response.get("verdicts"), dict):
            response["verdicts"] = [
                {"criterion": k, "verdict": v} for k, v in response["verdicts"].items()
            ]
    return data
