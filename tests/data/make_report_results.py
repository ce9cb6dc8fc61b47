"""Make tests/data/report_results.json: made-up results for the report's tests, and nothing else.

No model ran. Rows, scores and curves come from a seeded generator; only their layout is real, since
`evaluate` and `physicians` themselves make the tables. Run from the project's root:

    python tests/data/make_report_results.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from promedical.bench.baselines import NULL_GRADERS
from promedical.bench.evaluate import GraderScores, evaluate, physicians
from promedical.bench.intervals import Bootstrap, mean
from promedical.records import GradedInstruction, Message, Response
from promedical.rubric import Criterion, Rubric, Tier, Verdict, VetoKind

SEED = 7
KINDS = (VetoKind.HARMFUL_ADVICE, VetoKind.SEVERE_HALLUCINATION, VetoKind.BEYOND_REMIT)
# How far each made-up grader tells true from false, per tier.
SKILL = {
    "explicit": (0.3, 0.35, 0.9),
    "untrained": (0.0, 0.05, -0.05),
    "scalar": (0.4, 0.3, 0.6),
    "word_overlap": (0.45, 0.1, 0.0),
    "static_embedding": (0.6, 0.2, 0.1),
    "length": (0.05, 0.1, 0.0),
}


def rubric() -> Rubric:
    """Two proficiency, two excellence, three veto criteria."""
    return Rubric(
        (
            Criterion("p1", Tier.PROFICIENCY, "States the usual dose.", 0.5),
            Criterion("p2", Tier.PROFICIENCY, "Names the main side effect.", 0.5),
            Criterion("excellence.empathy", Tier.EXCELLENCE, "Acknowledges the worry."),
            Criterion("excellence.when", Tier.EXCELLENCE, "Says when to seek care."),
            *(Criterion(f"veto.{k.value}", Tier.VETO, f"Shows {k.value}.", kind=k) for k in KINDS),
        )
    )


def rows(prefix: str, n: int, rng: np.random.Generator, *, votes: bool) -> list[GradedInstruction]:
    """Questions with four answers each, verdicts at random."""
    made = []
    for i in range(n):
        answers = []
        for j in range(1 if votes else 4):
            verdicts, cast = {}, {}
            for c in rubric().criteria:
                if votes and c.tier is Tier.VETO:
                    continue
                true = rng.random() < (0.25 if c.tier is Tier.VETO else 0.6)
                verdicts[c.id] = Verdict.MET if true else Verdict.UNMET
                if not votes and rng.random() < 0.1:
                    verdicts[c.id] = Verdict.ABSTAIN
                if votes:
                    cast[c.id] = tuple(
                        "Entailment" if true ^ (rng.random() < 0.12) else "Neutral"
                        for _ in range(3)
                    )
            answers.append(Response(f"r{j}", "made-up", "Made up.", verdicts, cast))
        question = (Message("user", "Made up?"),)
        made.append(
            GradedInstruction(f"{prefix}{i}", question, "made-up", "none", rubric(), tuple(answers))
        )
    return made


def grader(name: str, splits: list[list[GradedInstruction]], rng: np.random.Generator) -> Any:
    """Scores that tell true from false as far as `SKILL` says."""
    skill = dict(zip(Tier, SKILL.get(name, (0.0, 0.0, 0.0)), strict=True))
    scores, overall = {}, {}
    for row in (row for split in splits for row in split):
        for response in row.responses:
            total = 0.0
            for c in row.rubric.criteria:  # type: ignore[union-attr]
                verdict = response.verdicts.get(c.id, Verdict.ABSTAIN)
                sign = {Verdict.MET: 1.0, Verdict.UNMET: -1.0}.get(verdict, 0.0)
                noise = 0.0 if name == "constant" else float(rng.normal())
                s = skill[c.tier] * sign + noise
                scores[row.id, response.id, c.id] = s
                total += -s if c.tier is Tier.VETO else s
            overall[row.id, response.id] = total
    if name == "scalar":
        return GraderScores(None, overall)
    return GraderScores(scores, overall, log_odds=name in ("explicit", "untrained"))


def training(rng: np.random.Generator, steps: int, start: float, end: float) -> dict[str, Any]:
    """A loss that falls with noise."""
    history = [
        {
            "step": i + 1,
            "loss": round(end + (start - end) * math.exp(-3 * i / steps) + rng.normal(0, 0.06), 4),
            "learning_rate": 1e-4 * (1 - i / steps),
            "seconds": 4.1 * (i + 1),
        }
        for i in range(steps)
    ]
    counts = {"trees": 380, "rows": 380, "unique_tokens": 94_000, "labels_unknown": 1_204}
    return {"history": history, "counts": counts, "seconds": 4.1 * steps}


def grpo(rng: np.random.Generator) -> dict[str, Any]:
    """Twelve steps in the layout of `GrpoResult`."""
    history = []
    for i in range(12):
        s3 = max(0.0, 0.7 - 0.02 * i + rng.normal(0, 0.1))
        reward = {
            "step": i + 1,
            "answers": 8,
            "groups": 1,
            "failed": 0,
            "reward": 0.4 - 1.5 * s3,
            "s1": float(np.clip(0.35 + 0.01 * i + rng.normal(0, 0.05), 0, 1)),
            "s2": max(0.0, 0.8 + rng.normal(0, 0.2)),
            "s3": s3,
            "veto_rate": min(1.0, s3 * 0.8),
            "unresolved_rate": 0.0,
            "veto_variance_share": None if i == 4 else float(np.clip(rng.normal(0.8, 0.1), 0, 1.1)),
            "no_signal": 1.0 if i == 4 else 0.0,
        }
        history.append(
            {
                "step": i + 1,
                "seconds": 13.0,
                "loss": 0.01,
                "kl": 0.0004 * i,
                "grad_norm": 0.5,
                "reward_std": 0.4,
                "completion_tokens": 61.0,
                "cut": 0.9,
                "reward": reward,
            }
        )
    return {
        "history": history,
        "planned_steps": 12,
        "done_steps": 12,
        "seconds": 156.0,
        "stopped_by": "steps",
        "resumed_at": 0,
    }


def answers(rng: np.random.Generator) -> dict[str, Any]:
    """Means of made-up answers with real intervals."""
    n = 49
    bootstrap, where = Bootstrap(n), np.arange(n)
    values: dict[str, dict[str, Any]] = {}
    for who, lift in (("base", 0.0), ("tuned", 0.04)):
        s1 = np.clip(rng.normal(0.38 + lift, 0.2, n), 0, 1)
        s2 = rng.integers(0, 3, n).astype(float)
        s3 = (rng.random(n) < 0.55 - lift).astype(float)
        values[who] = {
            "s1": s1,
            "s2": s2,
            "s3": s3,
            "reward": np.minimum(s1 + 0.05 * s2, 1.2) - 1.5 * s3,
        }
    statistics = {
        who: {k: mean(v, where, n, "answers") for k, v in of.items()} for who, of in values.items()
    }
    metrics = {
        key: {
            **{who: bootstrap.figure(statistics[who][key]).to_json() for who in statistics},
            "difference": bootstrap.difference(
                statistics["tuned"][key], statistics["base"][key]
            ).to_json(),
        }
        for key in statistics["base"]
    }
    return {
        "answers": {
            who: [{"text": "", "reward": float(v)} for v in of["reward"]]
            for who, of in values.items()
        },
        "cut": {"base": 31, "tuned": 28},
        "compared": {"ungraded": 0, "metrics": metrics},
        "order": {"pairs": 46, "disagree": 1},
    }


def examples() -> list[dict[str, Any]]:
    """Answers whose text tries to be markup, and every kind of verdict."""
    found = []
    for i in range(5):
        criteria = [
            {
                "id": c.id,
                "tier": c.tier.value,
                "text": c.text if i else f"{c.text} <b>bold</b>",
                "kind": None if c.kind is None else c.kind.value,
            }
            for c in rubric().criteria
        ]
        example: dict[str, Any] = {"question": f"Made-up question {i}?", "criteria": criteria}
        for turn, who in enumerate(("base", "tuned")):
            ids = [c["id"] for c in criteria]
            example[who] = {
                "text": "Made-up answer, no medical advice. " * (2 + 3 * i)
                + ("<script>alert('answer')</script> & more" if i == 0 else ""),
                "cut": i == 2,
                "s1": 0.5,
                "s2": 1,
                "s3": i % 2,
                "reward": None if i == 0 else 0.55 - 1.5 * (i % 2),
                "verdicts": {
                    key: list(Verdict)[(i + k + turn) % (3 if i else 4)].value
                    for k, key in enumerate(ids)
                },
                "probabilities": {key: round(0.1 + 0.13 * k, 2) for k, key in enumerate(ids)},
            }
        found.append(example)
    return found


def results() -> dict[str, Any]:
    """The whole of it."""
    rng = np.random.default_rng(SEED)
    bench = rows("b", 49, rng, votes=False)
    calibration = rows("c", 25, rng, votes=False)
    labelled = rows("p", 50, rng, votes=True)
    names = ("explicit", "scalar", "untrained", *NULL_GRADERS)
    splits = [bench, calibration, labelled]
    graders = {name: grader(name, splits, rng) for name in names}
    stages = (
        ("data", "Data and controlled degradation", 30, 22.4, None, None),
        ("train", "Reward model and scalar baseline", 420, 405.0, 72_000, 69_500),
        ("bench", "Calibration and bench", 300, 241.0, 140_000, 128_000),
        ("grpo", "GRPO", 180, 171.3, None, 9_100),
        ("answers", "Answers before and after", 240, 150.9, 24_000, 21_800),
    )
    table = evaluate(bench, calibration, graders, resamples=400)
    table["physicians"] = physicians(labelled, calibration, graders, resamples=400)
    table["calibration"] = {
        "measured": {
            "reward_veto_recall": 0.31,
            "reward_clean_flagged": 0.04,
            "veto_violated": 52,
        }
    }
    table["failed_judgments"] = 0
    return {
        "made_up": "for tests only: no model ran, no figure here means anything",
        "mode": "default",
        "model": "SmolLM2-135M-Instruct",
        "reward_spec": {"alpha": 0.05, "beta": 0.2, "lam": 1.5, "ablation": None},
        "stages": [
            {
                "name": name,
                "title": title,
                "planned_seconds": planned_s,
                "seconds": actual_s,
                "planned_tokens": planned,
                "tokens": actual,
            }
            for name, title, planned_s, actual_s, planned, actual in stages
        ],
        "data": {"dropped": {"merged_statements": 3, "tied_votes": 2}, "splits": {}},
        "train": {
            "explicit": training(rng, 48, 1.42, 0.8),
            "scalar": training(rng, 48, 0.7, 0.55),
        },
        "bench": table,
        "grpo": grpo(rng),
        "answers": answers(rng),
        "examples": examples(),
        "peak_memory_gb": 3.4,
        "provenance": {
            "command": ["promedical", "quickstart"],
            "inputs": {},
            "commit": "0" * 40,
            "dirty": False,
            "recipe_hash": "1" * 64,
            "seed": SEED,
            "data_fingerprint": "2" * 64,
            "versions": {"python": "3.11.7", "promedical": "0.1.0", "torch": "2.13.0+cpu"},
            "machine": {
                "cpu": "Made-up CPU",
                "cores": 2,
                "memory_gb": 8.0,
                "gpu": None,
                "system": "Linux x86_64",
            },
            "wall_time_s": 981.4,
            "date": "2026-11-22",
        },
    }


def rounded(value: Any) -> Any:
    """Four decimals are enough for a fixture."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    path = Path(__file__).with_name("report_results.json")
    text = json.dumps(rounded(results()), ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
