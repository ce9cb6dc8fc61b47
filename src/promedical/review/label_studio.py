"""Rounds as Label Studio projects, and back: labelling configuration, tasks JSON, annotations.

    write_project(folder, tasks, part)   config.xml and, a reviewer each, REVIEWER.tasks.json
    read_project(path, tasks)            answers from the tasks with annotations that it exports

A reviewer has a project (or a view) of their own, because colleagues' annotations can be read in a
shared one. Rubrics are edited as text (`rubric_text`). An adjudication takes two projects: first
the overall preference, without criteria; then, for assignments whose preference has come back, the
criteria of each response. So the criteria are not shown before the preference there either.

Formats as published, used here without Label Studio's own package: tasks, annotations and
predictions in https://labelstud.io/guide/task_format and https://labelstud.io/guide/predictions,
the tags View, Header, Text, Choices, TextArea in https://labelstud.io/tags and Repeater in
https://labelstud.io/tags/repeater. Left to others: what may be given out, and saving (`exchange`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as xml

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

__all__ = ["Part", "config", "read_project", "read_tasks", "tasks_json", "write_project"]

Part = Literal["rubrics", "preference", "criteria"]
DECISIONS = ("accept", "reject")  # whether something was edited is seen from the text
Words = Callable[..., str]


# ---- labelling configuration ----


def config(part: Part, language: str = "en") -> str:
    """The labelling configuration of a project, as XML.

    Args:
        part: "rubrics", or of an adjudication "preference" or "criteria".
        language: of the labels, en or zh.
    """
    t = translator(language)
    root = xml.Element("View")
    _text(root, t("exchange.instruction"), "conversation")
    builders: dict[str, Callable[[xml.Element, Words], None]] = {
        "rubrics": _rubric_config,
        "preference": _preference_config,
        "criteria": _criteria_config,
    }
    builders[part](root, t)
    xml.indent(root)
    return xml.tostring(root, encoding="unicode") + "\n"


def _rubric_config(root: xml.Element, t: Words) -> None:
    _text(root, t("exchange.reference"), "reference")
    xml.SubElement(root, "Header", value=t("exchange.rubric_how"), size="5")
    _area(root, "criteria", "conversation", rows="16", value="$rubric", required="true")
    decisions = [(value, t(f"exchange.{value}")) for value in DECISIONS]
    _choices(root, "decision", "conversation", decisions, required="true")
    xml.SubElement(root, "Header", value=t("exchange.reason"), size="5")
    _area(root, "reason", "conversation")
    disputed = [("disputed", t("exchange.disputed"))]
    _choices(root, "disputed", "conversation", disputed, choice="multiple")


def _preference_config(root: xml.Element, t: Words) -> None:
    repeat = xml.SubElement(root, "Repeater", on="$responses", indexFlag="{{idx}}")
    xml.SubElement(repeat, "Header", value="$responses[{{idx}}].title", size="4")
    _show(repeat, "response_{{idx}}", "$responses[{{idx}}].text")
    repeat = xml.SubElement(root, "Repeater", on="$pairs", indexFlag="{{idx}}")
    _show(repeat, "pair_{{idx}}", "$pairs[{{idx}}].title")
    options = [(value, t(f"exchange.{value}")) for value in CHOICES]
    _choices(repeat, "preference_{{idx}}", "pair_{{idx}}", options, required="true")


def _criteria_config(root: xml.Element, t: Words) -> None:
    xml.SubElement(root, "Header", value="$title", size="4")
    _show(root, "response", "$response")
    for name, words in (("criterion", "criterion"), ("veto", "veto")):
        listed = "criteria" if name == "criterion" else "vetoes"
        repeat = xml.SubElement(root, "Repeater", on=f"${listed}", indexFlag="{{idx}}")
        to = f"{name}_{{{{idx}}}}"
        _show(repeat, to, f"${listed}[{{{{idx}}}}].text")
        options = [(value, t(f"exchange.{words}_{value}")) for value in VERDICTS]
        _choices(repeat, f"{name}_verdict_{{{{idx}}}}", to, options, required="true")
        _choices(
            repeat,
            f"{name}_disputed_{{{{idx}}}}",
            to,
            [("disputed", t("exchange.disputed"))],
            choice="multiple",
        )
        _area(repeat, f"{name}_note_{{{{idx}}}}", to, placeholder=t("exchange.note"))
    xml.SubElement(root, "Header", value=t("exchange.danger"), size="5")
    kinds = [(kind, t(f"exchange.kind_{kind}")) for kind in DANGER_KINDS]
    _choices(root, "danger_kind", "response", kinds)
    _area(root, "danger_text", "response")


def _text(parent: xml.Element, title: str, name: str) -> None:
    xml.SubElement(parent, "Header", value=title, size="4")
    _show(parent, name, f"${name}")


def _show(parent: xml.Element, name: str, value: str) -> None:
    xml.SubElement(parent, "Text", name=name, value=value, valueType="text")


def _choices(
    parent: xml.Element, name: str, to: str, options: Sequence[tuple[str, str]], **given: str
) -> None:
    attributes = {"choice": "single-radio"} | given
    made = xml.SubElement(parent, "Choices", {"name": name, "toName": to} | attributes)
    for alias, value in options:
        xml.SubElement(made, "Choice", value=value, alias=alias)


def _area(parent: xml.Element, name: str, to: str, **given: str) -> None:
    attributes = {"rows": "2", "editable": "true", "maxSubmissions": "1"} | given
    xml.SubElement(parent, "TextArea", {"name": name, "toName": to} | attributes)


# ---- tasks ----


def tasks_json(tasks: Sequence[Task], part: Part, language: str = "en") -> list[dict[str, Any]]:
    """Tasks in Label Studio's JSON; what the reviewer had entered so far is a prediction.

    Args:
        tasks: of one reviewer.
        part: which project; "criteria" leaves out assignments without an overall preference.
        language: of titles.
    """
    t = translator(language)
    return [made for task in tasks for made in _made(task, part, t)]


def _made(task: Task, part: Part, t: Words) -> Iterator[dict[str, Any]]:
    _check_kind(task, part)
    data: dict[str, Any] = {
        "promedical": {
            "part": part,
            "assignment": task.assignment,
            "reviewer": task.reviewer,
            "base": task.base,
        },
        "conversation": conversation_text(task.content["messages"], t),
    }
    if part == "rubrics":
        criteria = task.answer.get("criteria") or task.content["rubric"]["criteria"]
        data["reference"] = task.content.get("reference") or "—"
        data["rubric"] = rubric_text(criteria)
        yield _with_prediction(data, list(_rubric_result(task.answer, data["rubric"])))
    elif part == "preference":
        titles = {r["key"]: t("exchange.response", number=n) for n, r in _numbered(task)}
        data["responses"] = [
            {"key": r["key"], "title": titles[r["key"]], "text": r["text"]} for r in task.responses
        ]
        data["pairs"] = [
            {"key": f"{a}|{b}", "title": t("exchange.pair", first=titles[a], second=titles[b])}
            for a, b in pairs_of(task)
        ]
        yield _with_prediction(data, list(_preference_result(task.answer, data["pairs"])))
    elif preference_known(task):
        for number, response in _numbered(task):
            one = dict(data)
            one["promedical"] = data["promedical"] | {"response": response["key"]}
            one["title"] = t("exchange.response", number=number)
            one["response"] = response["text"]
            for name, listed in _by_form(task.content["rubric"]["criteria"]).items():
                one[name] = [{"id": c["id"], "text": c["text"]} for c in listed]
            yield _with_prediction(one, list(_criteria_result(task.answer, one)))


def _check_kind(task: Task, part: Part) -> None:
    if (task.kind == "rubrics") != (part == "rubrics"):
        raise ExchangeError(
            f"assignment {task.assignment}: part: found {part!r}, expected "
            + ("'rubrics'" if task.kind == "rubrics" else "'preference' or 'criteria'")
        )


def _numbered(task: Task) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(task.responses, start=1)


def _by_form(criteria: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    return {
        "criteria": [c for c in criteria if c["tier"] != Tier.VETO],
        "vetoes": [c for c in criteria if c["tier"] == Tier.VETO],
    }


def _with_prediction(data: dict[str, Any], result: list[dict[str, Any]]) -> dict[str, Any]:
    task: dict[str, Any] = {"data": data}
    if result:
        task["predictions"] = [{"model_version": "entered-so-far", "score": 1.0, "result": result}]
    return task


def _entry(name: str, to: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": to, "type": kind, "value": value}


def _chosen(name: str, to: str, value: str) -> dict[str, Any]:
    return _entry(name, to, "choices", {"choices": [value]})


def _written(name: str, to: str, text: str) -> dict[str, Any]:
    return _entry(name, to, "textarea", {"text": [text]})


def _rubric_result(answer: Mapping[str, Any], text: str) -> Iterator[dict[str, Any]]:
    if not answer:
        return
    yield _written("criteria", "conversation", text)
    if answer.get("decision"):
        decision = "reject" if answer["decision"] == "reject" else "accept"
        yield _chosen("decision", "conversation", decision)
    if answer.get("reason"):
        yield _written("reason", "conversation", answer["reason"])
    if answer.get("disputed"):
        yield _chosen("disputed", "conversation", "disputed")


def _preference_result(
    answer: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    for index, pair in enumerate(pairs):
        value = (answer.get("preference") or {}).get(pair["key"])
        if value:
            yield _chosen(f"preference_{index}", f"pair_{index}", value)


def _criteria_result(
    answer: Mapping[str, Any], data: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    key = data["promedical"]["response"]
    verdicts = (answer.get("verdicts") or {}).get(key) or {}
    disputed = (answer.get("disputed") or {}).get(key) or {}
    for name, listed in (("criterion", "criteria"), ("veto", "vetoes")):
        for index, criterion in enumerate(data[listed]):
            given, to = verdicts.get(criterion["id"]) or {}, f"{name}_{index}"
            if given.get("v"):
                yield _chosen(f"{name}_verdict_{index}", to, given["v"])
            if given.get("note"):
                yield _written(f"{name}_note_{index}", to, given["note"])
            if disputed.get(criterion["id"]):
                yield _chosen(f"{name}_disputed_{index}", to, "disputed")
    for danger in ((answer.get("dangers") or {}).get(key) or [])[:1]:
        yield _chosen("danger_kind", "response", danger["kind"])
        yield _written("danger_text", "response", danger["text"])


def write_project(
    folder: Path, tasks: Sequence[Task], part: Part, *, language: str = "en"
) -> dict[str, int]:
    """Write config.xml and a file of tasks for every reviewer; returns how many tasks each has."""
    folder.mkdir(parents=True, exist_ok=True)
    write_private(folder / "config.xml", config(part, language))
    counts = {}
    for reviewer, mine in by_reviewer(tasks).items():
        made = tasks_json(mine, part, language)
        text = json.dumps(made, ensure_ascii=False, indent=1)
        write_private(folder / f"{reviewer}.tasks.json", text)
        counts[reviewer] = len(made)
    return counts


# ---- annotations ----


@dataclass(frozen=True)
class _Read:
    """The results of an annotation by control: chosen aliases, written text."""

    chosen: Mapping[str, str]
    written: Mapping[str, str]


def read_project(path: Path, tasks: Sequence[Task]) -> tuple[list[Returned], Counter[str]]:
    """Answers in a file that Label Studio exported as JSON.

    Args:
        path: of the file.
        tasks: that may come back, as `open_tasks` gives them.

    Raises:
        ExchangeError: no such file, not tasks of ours, or an annotation that cannot be read.
    """
    return read_tasks(read_json(path), tasks, str(path))


def read_tasks(
    exported: Any, tasks: Sequence[Task], name: str = "tasks"
) -> tuple[list[Returned], Counter[str]]:
    """The answers of exported tasks, and how many tasks have none, by reason.

    Of several annotations of a task the last that was submitted counts. The responses of one
    assignment are put together, and it is finished once every criterion has its verdict.
    """
    if not isinstance(exported, list):
        raise ExchangeError(f"{name}: found {type(exported).__name__}, expected a list of tasks")
    known = {task.assignment: task for task in tasks}
    found: dict[str, Returned] = {}
    skipped = Counter[str]()
    for number, entry in enumerate(exported):
        where = f"{name}: task {number}"
        ours = _ours(entry, where)
        annotation = _last_annotation(entry)
        if annotation is None:
            skipped["without annotation"] += 1
        elif ours["assignment"] not in known:
            skipped["not open any more, or of another round"] += 1
        else:
            task = known[ours["assignment"]]
            patch = _patch(task, entry["data"], _read(annotation, where), where)
            add_returned(found, task, ours, patch, float(annotation.get("lead_time") or 0.0))
    return list(found.values()), skipped


def _ours(entry: Any, where: str) -> dict[str, Any]:
    data = entry.get("data") if isinstance(entry, dict) else None
    ours = data.get("promedical") if isinstance(data, dict) else None
    names = ("part", "assignment", "reviewer", "base")
    if not isinstance(ours, dict) or not all(name in ours for name in names):
        raise ExchangeError(
            f"{where}: data.promedical: missing, expected a task that was made here"
        )
    return ours


def _last_annotation(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    given = [a for a in entry.get("annotations") or [] if not a.get("was_cancelled")]
    return max(given, key=lambda a: str(a.get("updated_at") or ""), default=None)


def _read(annotation: Mapping[str, Any], where: str) -> _Read:
    chosen: dict[str, str] = {}
    written: dict[str, str] = {}
    for result in annotation.get("result") or []:
        name, value = result.get("from_name"), result.get("value")
        if not isinstance(name, str) or not isinstance(value, dict):
            raise ExchangeError(f"{where}: a result without from_name or value")
        if result.get("type") == "choices":
            chosen[name] = str((value.get("choices") or [""])[0])
        elif result.get("type") == "textarea":
            text = value.get("text")
            written[name] = "\n".join(text) if isinstance(text, list) else str(text or "")
    return _Read(chosen, written)


def _patch(task: Task, data: Mapping[str, Any], read: _Read, where: str) -> dict[str, Any]:
    part = data["promedical"]["part"]
    if part == "rubrics":
        draft = task.content["rubric"]["criteria"]
        try:
            criteria = parse_rubric(read.written.get("criteria", data["rubric"]), draft)
        except RubricTextError as error:
            raise ExchangeError(f"{where}: criteria: {error}") from None
        return {
            "decision": decision_of(task, read.chosen.get("decision"), criteria),
            "reason": read.written.get("reason", ""),
            "disputed": "disputed" in read.chosen,
            "criteria": criteria,
        }
    if part == "preference":
        pairs = {
            pair["key"]: read.chosen.get(f"preference_{index}")
            for index, pair in enumerate(data["pairs"])
        }
        given = {key: value for key, value in pairs.items() if value}
        return {"preference": given, "preference_given": len(given) == len(pairs)}
    return _judged(data, read)


def _judged(data: Mapping[str, Any], read: _Read) -> dict[str, Any]:
    verdicts: dict[str, Any] = {}
    disputed: dict[str, bool] = {}
    for name, listed in (("criterion", "criteria"), ("veto", "vetoes")):
        for index, criterion in enumerate(data[listed]):
            verdict = read.chosen.get(f"{name}_verdict_{index}")
            note = read.written.get(f"{name}_note_{index}", "")
            if verdict:
                verdicts[criterion["id"]] = {"v": verdict, "note": note}
            if f"{name}_disputed_{index}" in read.chosen:
                disputed[criterion["id"]] = True
    key = data["promedical"]["response"]
    text, kind = read.written.get("danger_text", "").strip(), read.chosen.get("danger_kind")
    dangers = [{"id": "label-studio", "kind": kind or "other", "text": text}] if text else []
    return {"verdicts": {key: verdicts}, "disputed": {key: disputed}, "dangers": {key: dangers}}
