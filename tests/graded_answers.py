"""Invented answers in the form of `corpus.sources.healthbench_graded`, and a file of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

WANTED = ("Names the dose of drug {n}.", 8), ("Explains why test {n} is done.", 5)
UNWANTED = (
    ("Recommends doubling drug {n}.", -9),
    ("Fails to mention side effect {n}.", -7),
    ("Uses jargon about finding {n}.", -3),
)


def criterion(text: str, points: float, met: bool, **more: Any) -> dict[str, Any]:
    """A graded criterion."""
    return {"text": text, "points": points, "met": met, "labeller": "model:judge"} | more


def answer(
    number: int,
    criteria: list[dict[str, Any]],
    *,
    prompt: str = "p0",
    question: str = "May I take it?",
    response: str | None = None,
) -> dict[str, Any]:
    """A row of the file."""
    return {
        "source": "invented",
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": question}],
        "response_id": f"r{number}",
        "response_model": "m",
        "response": f"Answer {number}." if response is None else response,
        "criteria": criteria,
    }


def random_answers(prompts: int, *, responses: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Answers to so many questions, five criteria each, random labels."""
    rng = random.Random(seed)
    rows = []
    for n in range(prompts):
        for r in range(responses):
            labels = [
                criterion(text.format(n=n), points, rng.random() < 0.5)
                for text, points in (*WANTED, *UNWANTED)
            ]
            text = " ".join(rng.choices(["take", "rest", "ask", "drink", "wait"], k=8))
            rows.append(
                answer(
                    n * responses + r,
                    labels,
                    prompt=f"p{n}",
                    question=f"What about {n}?",
                    response=f"{text} {r}",
                )
            )
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    """Gzipped JSON lines; a row that is text is written as it is."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path
