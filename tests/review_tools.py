"""Label Studio and Argilla as far as tests need them: they keep what we wrote and add answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

from promedical.review import argilla, label_studio

__all__ = ["Argilla", "LabelStudio"]


def choose(name: str) -> str:
    """What the scripted physician picks for a question."""
    if name.startswith("decision"):
        return "accept"
    if name.startswith("preference"):
        return "second_better"
    return "unmet" if "veto" in name else "met"


class LabelStudio:
    """Label Studio as far as it matters here: it keeps tasks, and adds annotations."""

    after_preference = ("criteria",)

    def write(self, folder: Path, tasks: Any, part: str) -> dict[str, int]:
        return label_studio.write_project(folder, tasks, part)  # type: ignore[arg-type]

    def work(self, folder: Path, edit: str | None = None) -> Path:
        names = controls(folder / "config.xml")
        done = []
        for file in sorted(folder.glob("*.tasks.json")):
            for number, task in enumerate(json.loads(file.read_text())):
                result = [
                    entry
                    for prediction in task.get("predictions", [])
                    for entry in prediction["result"]
                ]
                result += self._results(names, task["data"])
                if edit:
                    value = {"text": [edit]}
                    result.append(entry_of("criteria", "conversation", "textarea", value))
                annotation = {"result": result, "lead_time": 12.5, "updated_at": "2026-01-01"}
                done.append({"id": number, **task, "annotations": [annotation]})
        (folder / "export.json").write_text(json.dumps(done))
        return folder / "export.json"

    def _results(self, names: dict[str, str], data: Any) -> list[Any]:
        found = []
        for name, to in names.items():
            if not name.startswith(("decision", "preference", "criterion_v", "veto_v")):
                continue
            listed = {"preference": "pairs", "criterion": "criteria", "veto": "vetoes"}
            count = len(data.get(listed.get(name.split("_")[0], ""), [None]))
            for index in range(count if "{{idx}}" in name else 1):
                own, target = (n.replace("{{idx}}", str(index)) for n in (name, to))
                found.append(entry_of(own, target, "choices", {"choices": [choose(name)]}))
        return found

    def read(self, path: Path, tasks: Any) -> Any:
        return label_studio.read_project(path, tasks)


def entry_of(name: str, to: str, kind: str, value: Any) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": to, "type": kind, "value": value}


def controls(path: Path) -> dict[str, str]:
    """Name → toName of every control of a configuration, which has to hold together."""
    root = xml.parse(path).getroot()
    names = [e.get("name") for e in root.iter() if e.get("name")]
    assert len(set(names)) == len(names)
    found = {}
    for element in root.iter():
        if element.get("toName"):
            assert element.get("toName") in names
            assert all(e.get("alias") and e.get("value") for e in element)
            found[str(element.get("name"))] = str(element.get("toName"))
    return found


class Argilla:
    """Argilla as far as it matters here: it keeps records, and adds responses."""

    after_preference = ("criteria", "vetoes")

    def write(self, folder: Path, tasks: Any, part: str) -> dict[str, int]:
        return argilla.write_dataset(folder, tasks, part)  # type: ignore[arg-type]

    def work(self, folder: Path, edit: str | None = None) -> Path:
        for file in sorted(folder.rglob("records.json")):
            made = json.loads(file.read_text())
            form = json.loads((file.parent / ".argilla/settings.json").read_text())
            required = [q["name"] for q in form["questions"] if q["required"]]
            for record in made:
                veto = record["metadata"]["part"] == "vetoes"
                answers = {name: s["value"] for name, s in record["suggestions"].items()}
                for name in required:
                    answers.setdefault(name, choose(f"{'veto' if veto else ''}{name}"))
                if edit:
                    answers["criteria"] = edit
                record["responses"] = {
                    name: [{"value": value, "user_id": "somebody"}]
                    for name, value in answers.items()
                }
            file.write_text(json.dumps(made))
        return folder

    def read(self, path: Path, tasks: Any) -> Any:
        return argilla.read_datasets(path, tasks)
