"""Rounds as Argilla 2 datasets, and back: settings and records as its own files on disk.

    write_dataset(folder, tasks, part)   a folder a reviewer, for `rg.Dataset.from_disk`
    read_datasets(path, tasks)           answers from records.json, or rows of `to_datasets`

A reviewer has a dataset of their own, because each has the responses in another order. Argilla's
questions are the same for every record, so a record is what one answer is asked for: an item
("rubrics"), a pair of responses ("preference"), a response and a criterion ("criteria"), a response
and a veto ("vetoes", whose answers read violated, not violated). As in `label_studio`, criteria are
given out only where the overall preference has come back. Text is never Markdown there.

Formats as published, used here without Argilla's own package: `rg.Settings`, `rg.Record` and
`rg.Dataset.from_disk` in https://docs.argilla.io/latest/reference/argilla/settings/settings,
…/reference/argilla/records/records and …/how_to_guides/import_export. Left to others: what may be
given out, and saving (`exchange`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from promedical.review.adjudication_answer import CHOICES, DANGER_KINDS, VERDICTS
from promedical.review.exchange import (
    ExchangeError,
    Returned,
    Task,
    add_returned,
    by_reviewer,
    conversation_text,
    decision_of,
    pairs_of,
    preference_known,
    read_json,
    write_private,
)
from promedical.review.rubric_text import RubricTextError, parse_rubric, rubric_text
from promedical.review.wording import translator
from promedical.rubric import Tier

__all__ = ["Part", "read_datasets", "read_records", "records", "settings", "write_dataset"]

Part = Literal["rubrics", "preference", "criteria", "vetoes"]
Words = Callable[..., str]
Json = dict[str, Any]
DECISIONS = ("accept", "reject")
NAMES = ("part", "assignment", "reviewer", "base")


# ---- settings ----


def settings(part: Part, language: str = "en") -> Json:
    """A dataset's settings, as `rg.Settings.to_json` writes them.

    Args:
        part: which dataset.
        language: of the titles, en or zh.
    """
    t = translator(language)
    fields, questions = _forms(t)[part]
    return {
        "guidelines": t("exchange.guidelines"),
        "questions": questions,
        "fields": fields,
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def _forms(t: Words) -> dict[str, tuple[list[Json], list[Json]]]:
    conversation = _field("conversation", t("exchange.instruction"))
    response = _field("response", t("exchange.one_response"))
    note = _text("note", t("exchange.note"))
    disputed = _labels("disputed", t("exchange.disputed"), _options(t, ("yes", "no")), False)
    kinds = _labels("danger_kind", t("exchange.danger"), _options(t, DANGER_KINDS, "kind_"), False)
    danger = [kinds, _text("danger_text", t("exchange.danger_text"))]
    verdict = t("exchange.verdict")
    return {
        "rubrics": (
            [conversation, _field("reference", t("exchange.reference"), required=False)],
            [
                _text("criteria", t("exchange.rubric_how"), required=True),
                _labels("decision", t("exchange.decision"), _options(t, DECISIONS)),
                _text("reason", t("exchange.reason")),
                disputed,
            ],
        ),
        "preference": (
            [
                conversation,
                _field("first", t("exchange.response", number=1)),
                _field("second", t("exchange.response", number=2)),
            ],
            [_labels("preference", t("exchange.preference"), _options(t, CHOICES))],
        ),
        "criteria": (
            [conversation, response, _field("criterion", t("exchange.criterion"))],
            [_labels("verdict", verdict, _options(t, VERDICTS, "criterion_")), note, disputed],
        ),
        "vetoes": (
            [conversation, response, _field("criterion", t("exchange.veto"))],
            [_labels("verdict", verdict, _options(t, VERDICTS, "veto_")), note, disputed, *danger],
        ),
    }


def _options(t: Words, values: Iterable[str], prefix: str = "") -> dict[str, str]:
    return {value: t(f"exchange.{prefix}{value}") for value in values}


def _field(name: str, title: str, *, required: bool = True) -> Json:
    kind = {"type": "text", "use_markdown": False}
    return {"name": name, "title": title, "required": required, "settings": kind}


def _text(name: str, title: str, *, required: bool = False) -> Json:
    return _field(name, title, required=required)


def _labels(name: str, title: str, options: Mapping[str, str], required: bool = True) -> Json:
    listed = [{"value": v, "text": text, "description": None} for v, text in options.items()]
    kind: Json = {"type": "label_selection", "options": listed}
    kind["visible_options"] = max(len(listed), 3) if len(listed) >= 3 else None
    return {"name": name, "title": title, "required": required, "settings": kind}


# ---- records ----


def records(tasks: Sequence[Task], part: Part, language: str = "en") -> list[Json]:
    """Records as in records.json; what the reviewer had entered so far is a suggestion.

    Args:
        tasks: of one reviewer.
        part: which dataset; "criteria" and "vetoes" leave out assignments without a preference.
        language: of names in a conversation.
    """
    t = translator(language)
    makers = {"rubrics": _of_rubric, "preference": _of_pairs}
    made = []
    for task in tasks:
        if (task.kind == "rubrics") != (part == "rubrics"):
            raise ExchangeError(
                f"assignment {task.assignment}: is of a round of {task.kind}, which has no "
                f"dataset {part!r}"
            )
        entries = makers[part](task) if part in makers else _of_criteria(task, part)
        conversation = conversation_text(task.content["messages"], t)
        for number, (fields, entered, more) in enumerate(entries):
            ours = {
                "part": part,
                "assignment": task.assignment,
                "reviewer": task.reviewer,
                "base": task.base,
            }
            made.append(
                {
                    "id": f"{task.assignment}.{part}.{number}",
                    "fields": {"conversation": conversation, **fields},
                    "metadata": ours | more,
                    "suggestions": {
                        name: {"value": value, "score": None, "agent": "entered so far"}
                        for name, value in entered.items()
                        if value
                    },
                    "responses": {},
                    "vectors": {},
                    "status": "pending",
                    "_server_id": None,
                }
            )
    return made


Entry = tuple[Json, Json, Json]


def _of_rubric(task: Task) -> Iterator[Entry]:
    answer = task.answer
    criteria = answer.get("criteria") or task.content["rubric"]["criteria"]
    entered = {"criteria": rubric_text(criteria), "reason": answer.get("reason")}
    if answer.get("decision"):
        entered["decision"] = "reject" if answer["decision"] == "reject" else "accept"
    if answer.get("disputed"):
        entered["disputed"] = "yes"
    yield {"reference": task.content.get("reference") or "—"}, entered, {}


def _of_pairs(task: Task) -> Iterator[Entry]:
    texts = {r["key"]: r["text"] for r in task.responses}
    given = task.answer.get("preference") or {}
    for a, b in pairs_of(task):
        pair = f"{a}|{b}"
        yield (
            {"first": texts[a], "second": texts[b]},
            {"preference": given.get(pair)},
            {"pair": pair},
        )


def _of_criteria(task: Task, part: Part) -> Iterator[Entry]:
    if not preference_known(task):
        return
    verdicts, disputed = task.answer.get("verdicts") or {}, task.answer.get("disputed") or {}
    for response in task.responses:
        key = response["key"]
        for c in task.content["rubric"]["criteria"]:
            if (c["tier"] == Tier.VETO) != (part == "vetoes"):
                continue
            given = (verdicts.get(key) or {}).get(c["id"]) or {}
            entered = {"verdict": given.get("v"), "note": given.get("note")}
            if (disputed.get(key) or {}).get(c["id"]):
                entered["disputed"] = "yes"
            fields = {"response": response["text"], "criterion": c["text"]}
            yield fields, entered, {"response": key, "criterion": c["id"]}


def write_dataset(
    folder: Path, tasks: Sequence[Task], part: Part, *, language: str = "en"
) -> dict[str, int]:
    """Write a dataset for every reviewer; returns how many records each has."""
    counts = {}
    for reviewer, mine in by_reviewer(tasks).items():
        made = records(mine, part, language)
        own = folder / f"{part}-{reviewer}"
        (own / ".argilla").mkdir(parents=True, exist_ok=True)
        form = settings(part, language)
        dataset = {
            "name": own.name,
            "status": "draft",
            "guidelines": form["guidelines"],
            "allow_extra_metadata": True,
            "distribution": form["distribution"],
        }
        for name, content in (
            (".argilla/settings.json", form),
            (".argilla/dataset.json", dataset),
            ("records.json", made),
        ):
            write_private(own / name, json.dumps(content, ensure_ascii=False, indent=1))
        counts[reviewer] = len(made)
    return counts


# ---- responses ----


def read_datasets(path: Path, tasks: Sequence[Task]) -> tuple[list[Returned], Counter[str]]:
    """Answers in a records.json, or in those of all datasets under a folder.

    Args:
        path: of the file or folder.
        tasks: that may come back, as `open_tasks` gives them.

    Raises:
        ExchangeError: nothing there, not records of ours, or a response that cannot be read.
    """
    files = sorted(path.rglob("records.json")) if path.is_dir() else [path]
    if not files:
        raise ExchangeError(f"{path}: found no records.json, expected a folder of datasets")
    rows: list[Any] = []
    for file in files:
        content = read_json(file)
        if not isinstance(content, list):
            raise ExchangeError(f"{file}: found {type(content).__name__}, expected a list")
        rows += content
    return read_records(rows, tasks, str(path))


def read_records(
    rows: Sequence[Any], tasks: Sequence[Task], name: str = "records"
) -> tuple[list[Returned], Counter[str]]:
    """The answers of records, and how many records have none, by reason.

    Rows may be nested as in records.json or flat as `to_datasets` makes them; where a response has
    a status, it counts if it is submitted.
    """
    known = {task.assignment: task for task in tasks}
    found: dict[str, Returned] = {}
    skipped = Counter[str]()
    for number, row in enumerate(rows):
        where = f"{name}: record {number}"
        ours = _ours(row, where)
        given = _responses(row)
        if not given:
            skipped["without a response"] += 1
        elif ours["assignment"] not in known:
            skipped["not open any more, or of another round"] += 1
        else:
            task = known[ours["assignment"]]
            patch = _patch(task, ours, given, row, where)
            if "preference" in patch:
                # One record a pair: the pairs of an item are put together before they are complete.
                earlier = found.get(task.assignment)
                kept = earlier.patch["preference"] if earlier else {}
                patch["preference"] = {**kept, **patch["preference"]}
                patch["preference_given"] = len(patch["preference"]) == len(pairs_of(task))
            else:
                patch = _with_earlier(found.get(task.assignment), patch)
            add_returned(found, task, ours, patch, 0.0)
    return list(found.values()), skipped


def _with_earlier(earlier: Returned | None, patch: Json) -> Json:
    """A record is one criterion; those of the same response belong together."""
    if earlier is None:
        return patch
    made: Json = {}
    for name, value in patch.items():
        old = earlier.patch.get(name)
        if not isinstance(value, dict) or not isinstance(old, Mapping):
            made[name] = value
            continue
        made[name] = dict(old)
        for key, part in value.items():
            before = old.get(key) or type(part)()
            made[name][key] = {**before, **part} if isinstance(part, dict) else [*before, *part]
    return made


def _ours(row: Any, where: str) -> Json:
    metadata = row.get("metadata") if isinstance(row, dict) else None
    ours = metadata if isinstance(metadata, dict) else row
    if not isinstance(ours, dict) or not all(ours.get(name) is not None for name in NAMES):
        raise ExchangeError(f"{where}: metadata: missing, expected a record that was made here")
    return ours


def _responses(row: Mapping[str, Any]) -> dict[str, str]:
    """Question → the last response that was submitted."""
    found: dict[str, str] = {}
    for name, given in (row.get("responses") or {}).items():
        if given:
            found[name] = str(given[-1].get("value") or "")
    for column, values in row.items():
        question = column.removesuffix(".responses")
        if question == column or not isinstance(values, list) or not values:
            continue
        states = row.get(f"{column}.status") or ["submitted"] * len(values)
        sent = [v for v, s in zip(values, states, strict=True) if s in (None, "submitted")]
        if sent:
            found[question] = str(sent[-1] or "")
    return found


def _patch(
    task: Task, ours: Mapping[str, Any], given: Mapping[str, str], row: Any, where: str
) -> Json:
    part = ours["part"]
    if part == "rubrics":
        draft = task.content["rubric"]["criteria"]
        try:
            criteria = parse_rubric(given.get("criteria") or rubric_text(draft), draft)
        except RubricTextError as error:
            raise ExchangeError(f"{where}: criteria: {error}") from None
        return {
            "decision": decision_of(task, given.get("decision"), criteria),
            "reason": given.get("reason", ""),
            "disputed": given.get("disputed") == "yes",
            "criteria": criteria,
        }
    if part == "preference":
        value = given.get("preference")
        return {"preference": {ours["pair"]: value} if value else {}}
    key, criterion = ours["response"], ours["criterion"]
    verdict = {"v": given.get("verdict"), "note": given.get("note", "")}
    text = given.get("danger_text", "").strip()
    danger = {"id": f"argilla-{row.get('id') or ''}"[-64:], "text": text}
    danger["kind"] = given.get("danger_kind") or "other"
    return {
        "verdicts": {key: {criterion: verdict} if verdict["v"] else {}},
        "disputed": {key: {criterion: True} if given.get("disputed") == "yes" else {}},
        "dangers": {key: [danger] if text else []},
    }
