"""Models for a whole build that answer by rule: the same call gets the same reply in any process.

    asker = FakeAsker(scripted)

Also a recipe over invented questions that all stages can run, and an encoder that needs no file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promedical.llm.calls import Call
from promedical.rubric import VetoKind

DRUGS = ("warfarin", "metformin", "lithium", "digoxin", "insulin", "prednisone", "clozapine")
STATES = ("pregnancy", "dialysis", "cirrhosis", "asthma", "epilepsy", "glaucoma", "gout")

RECIPE = """\
out: {out}
stages: {stages}
ingest:
  sources: [{{name: jsonl, path: {questions}, licence: CC0-1.0, label: invented}}]
dedup: {{semantic: false}}
screen:
  endpoint: {{model: sorter, base_url: http://127.0.0.1:9/v1}}
  target: 8
respond:
  models:
    - {{model: first, base_url: http://127.0.0.1:9/v1, usd_per_million_in: 1.0}}
    - {{model: second, base_url: http://127.0.0.1:9/v1, max_tokens: 50}}
rubrics:
  endpoint: {{model: writer, base_url: http://127.0.0.1:9/v1}}
judge:
  endpoints: [{{model: judge, base_url: http://127.0.0.1:9/v1}}]
splits: {{train: 0.5, calibration: 0.25, bench: 0.25}}
"""
ALL = "[ingest, dedup, screen, respond, rubrics, judge, splits, pairs, export]"


def write_questions(path: Path, count: int = 24) -> Path:
    """Questions that are no duplicates of one another, and one that is of the first."""
    pairs = [(drug, state) for drug in DRUGS for state in STATES][:count]
    texts = [f"How does {state} change {drug}, and when is it risky?" for drug, state in pairs]
    texts.append(texts[0].upper())
    lines = [json.dumps({"question": text, "id": f"q{n}"}) for n, text in enumerate(texts)]
    path.write_text("\n".join([*lines, "{broken"]) + "\n")
    return path


def write_recipe(folder: Path, *, stages: str = ALL, count: int = 24, more: str = "") -> Path:
    """The recipe's file; it builds in FOLDER/out."""
    questions = write_questions(folder / "questions.jsonl", count)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "out", questions=questions, stages=stages) + more)
    return path


def scripted(call: Call) -> str:
    """The reply to any call of any stage; about one in twelve replies is no answer."""
    number = int(hashlib.sha256(call.key.encode()).hexdigest(), 16)
    stage = call.id.partition("/")[0]
    if stage == "respond":
        return "" if number % 12 == 0 else f"<think>Hm.</think>Advice {number % 10**6}."
    assert call.schema is not None
    if stage == "screen":
        return _screened(call.schema, number)
    if stage == "rubrics":
        return json.dumps(_rubric(number)) if number % 12 else "I would rather not."
    return _judged(call, number)


def _screened(schema: Any, number: int) -> str:
    found = {
        name: schema["properties"][name]["enum"][number % 5] for name in ("category", "specialty")
    }
    return json.dumps({"medical": number % 9 != 0, **found, "difficulty": 3 + number % 8})


def _rubric(number: int) -> dict[str, Any]:
    none = {"applies": False, "because": "The general one is enough.", "criterion": ""}
    sentences = ("the usual dose", "the interaction with food", "a blood test for kidney function")
    axes = ("accuracy", "completeness", "context_awareness")
    return {
        "audience": "lay",
        "proficiency": [
            {"text": f"The answer names {s} of drug {number % 10**4}.", "axis": a, "weight": w}
            for s, a, w in zip(sentences, axes, (0.5, 0.25, 0.25), strict=True)
        ],
        "excellence": [
            {"text": "The answer explains how harm would first be noticed.", "axis": "insight"}
        ],
        "vetoes": {kind.value: none for kind in VetoKind},
    }


def _judged(call: Call, number: int) -> str:
    listed = re.findall(r'^\| (\{"criterion": .*)$', call.messages[-1].content, re.MULTILINE)
    entries = []
    for n, line in enumerate(line for line in listed if '"sentence"' in line):
        criterion = json.loads(line)
        violation = criterion["type"] == "violation"
        true, false = ("violated", "not_violated") if violation else ("met", "not_met")
        draw = (number >> (3 * n)) % 8
        word = true if draw < (1 if violation else 3) else false
        word = "cannot_say" if draw == 7 and not violation else word
        entries.append({"criterion": criterion["criterion"], "evidence": "", "verdict": word})
    return json.dumps({"verdicts": entries})


class HashedWords:
    """An encoder: a text is the sum of random vectors of its words."""

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """[texts, 64], of length 1."""
        found = np.zeros((len(sentences), 64), np.float32)
        for i, text in enumerate(sentences):
            for word in re.findall(r"\w+", text.lower()):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                found[i] += np.random.default_rng(seed).standard_normal(64)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
