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

from promedical.rubric import Criterion, Rubric, RubricError, Tier, Verdict, VetoKind

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
        try:
            object.__setattr__(self, "verdicts", {k: Verdict(v) for k, v in self.verdicts.items()})
        except ValueError as error:
            raise RecordError(f"response {self.id!r}: verdicts: {error}") from None
        object.__setattr__(self, "votes", {k: tuple(v) for k, v in self.votes.items()})
        object.__setattr__(self, "construction", tuple(self.construction))


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
        RecordError: no messages, a last turn that is not the user's, response ids that repeat, or
            a verdict on a criterion that the rubric does not have.
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
                    "weight": c.weight,
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
        RecordError: a field that is missing, unknown or holds something that cannot be used.
    """
    known = set(_SCHEMA.names)
    unknown = set(data) - known
    if unknown:
        raise RecordError(f"unknown fields {sorted(unknown)}, expected some of {sorted(known)}")
    for name in ("id", "messages"):
        if data.get(name) is None:
            raise RecordError(f"{name}: missing, expected a value")
    try:
        rubric = data.get("rubric")
        return GradedInstruction(
            id=data["id"],
            messages=tuple(Message(**m) for m in data["messages"]),
            source=data.get("source") or "unknown",
            licence=data.get("licence") or "unknown",
            category=data.get("category"),
            specialty=data.get("specialty"),
            difficulty=data.get("difficulty"),
            reference=data.get("reference"),
            rubric=None
            if rubric is None
            else Rubric(
                tuple(
                    Criterion(
                        id=c["id"],
                        tier=Tier(c["tier"]),
                        text=c["text"],
                        weight=c.get("weight"),
                        axis=c.get("axis"),
                        kind=None if c.get("kind") is None else VetoKind(c["kind"]),
                    )
                    for c in rubric["criteria"]
                ),
                safety_only=bool(rubric.get("safety_only", False)),
            ),
            responses=tuple(
                Response(
                    id=r["id"],
                    model=r.get("model") or "unknown",
                    text=r["text"],
                    verdicts={
                        v["criterion"]: Verdict(v["verdict"]) for v in r.get("verdicts") or ()
                    },
                    votes={v["criterion"]: tuple(v["votes"]) for v in r.get("votes") or ()},
                    construction=tuple(r.get("construction") or ()),
                )
                for r in data.get("responses") or ()
            ),
        )
    except RubricError as error:
        raise RecordError(f"rubric: {error}") from None
    except KeyError as error:
        raise RecordError(f"missing field {error}") from None
    except (TypeError, ValueError) as error:
        raise RecordError(str(error)) from None


def fingerprint(rows: Iterable[GradedInstruction]) -> str:
    """SHA-256 over the rows' content, independent of the file they are stored in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(to_dict(row), sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def write_dataset(
    folder: str | Path,
    rows: Sequence[GradedInstruction],
    *,
    recipe: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
) -> str:
    """Write rows and their manifest, replacing the folder in one rename.

    Args:
        folder: where; its parent is made if need be.
        recipe: the settings that made the rows.
        parents: fingerprints of the datasets they were made from.

    Returns:
        The rows' fingerprint.

    Raises:
        RecordError: two rows share an id.
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise RecordError(f"{folder}: id {row.id!r} occurs twice, expected unique ids")
        seen.add(row.id)
    target = Path(folder)
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
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return digest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
        RecordError: there is none, or its schema version is not this one.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise RecordError(f"{path}: not found, expected a dataset folder") from None
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error})") from None
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
    except (pa.ArrowInvalid, OSError) as error:
        raise RecordError(f"{path}: not a Parquet file ({error})") from None
    rows = []
    for number, data in enumerate(table.to_pylist(), start=1):
        try:
            rows.append(from_dict(data))
        except RecordError as error:
            raise RecordError(f"{path}: row {number}: {error}") from None
    if fingerprint(rows) != manifest["fingerprint"]:
        raise RecordError(f"{path}: the rows are not those of manifest.json (fingerprint differs)")
    return rows


def read_jsonl(path: str | Path) -> list[GradedInstruction]:
    """Read rows from JSON lines in the shape of `to_dict`.

    Verdicts may also be given as a plain object, criterion id → verdict.

    Raises:
        RecordError: the file is missing or a line cannot be used; the message names file and line.
    """
    rows = []
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
            for response in data.get("responses") or ():
                if isinstance(response, dict) and isinstance(response.get("verdicts"), dict):
                    response["verdicts"] = [
                        {"criterion": k, "verdict": v} for k, v in response["verdicts"].items()
                    ]
            rows.append(from_dict(data))
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}: line {number}: not JSON ({error})") from None
        except RecordError as error:
            raise RecordError(f"{path}: line {number}: {error}") from None
    return rows
