"""What the quickstart reports: before and after with intervals, and all results in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from promedical.provenance import provenance
from promedical.quickstart.settings import PLAN, QuickstartRecipe, plain
from promedical.records import GradedInstruction
from promedical.rubric import Preference, Scores, compare

__all__ = ["before_after", "collect", "order"]


def before_after(graded: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """Means of base and tuned with intervals, and the paired difference, over questions."""
    import numpy as np

    from promedical.bench.intervals import Bootstrap, mean

    both = [
        (b, t)
        for b, t in zip(graded["base"], graded["tuned"], strict=True)
        if b["reward"] is not None and t["reward"] is not None
    ]
    n = len(both)
    bootstrap, index = Bootstrap(n, seed=seed), np.arange(n)
    found: dict[str, Any] = {"ungraded": len(graded["base"]) - n, "metrics": {}}
    metrics: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "reward": lambda a: a["reward"],
        "s1": lambda a: a["s1"],
        "s2": lambda a: a["s2"],
        "s3": lambda a: a["s3"],
        "veto_rate": lambda a: a["s3"] > 0,
        "tokens": lambda a: a["tokens"],
    }
    for metric, of in metrics.items():
        values = {
            name: np.array([float(of(pair[i])) for pair in both])
            for i, name in enumerate(("base", "tuned"))
        }
        statistics = {k: mean(v, index, n, "answer") for k, v in values.items()}
        found["metrics"][metric] = {
            **{name: bootstrap.figure(s).to_json() for name, s in statistics.items()},
            "difference": bootstrap.difference(statistics["tuned"], statistics["base"]).to_json(),
        }
    return found


def order(graded: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """How often the reward orders base and tuned answer otherwise than `compare` does."""
    pairs = disagree = 0
    for base, tuned in zip(graded["base"], graded["tuned"], strict=True):
        if base["reward"] is None or tuned["reward"] is None:
            continue
        a, b = (Scores(x["s1"], x["s2"], x["s3"]) for x in (base, tuned))
        by_reward = (base["reward"] > tuned["reward"]) - (base["reward"] < tuned["reward"])
        by_order = {Preference.FIRST: 1, Preference.SECOND: -1, Preference.TIE: 0}[compare(a, b)]
        pairs += 1
        disagree += by_reward != by_order
    return {"pairs": pairs, "disagree": disagree}


def collect(
    recipe: QuickstartRecipe,
    finished: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
    bench: Sequence[GradedInstruction],
) -> dict[str, Any]:
    """Every finished stage's result in the layout of `promedical.bench.report`.

    Args:
        finished: stage → {"result", "seconds", "peak_memory_gb", "code"}, in order.
        titles: stage → what a person reads.
        bench: the rows whose questions the policies answered.
    """
    results = {name: stage["result"] for name, stage in finished.items()}
    plan = PLAN if recipe.mode == "default" else None
    data = results.get("data", {"splits": {"bench": {"fingerprint": None}}})
    return {
        "mode": recipe.mode,
        "model": "SmolLM2-135M-Instruct" if recipe.model == "embedded" else recipe.model,
        "reward_spec": asdict(recipe.grpo.reward),
        "stages": [
            {
                "name": name,
                "title": titles[name],
                "seconds": stage["seconds"],
                "planned_seconds": plan[name][0] * 60 if plan else None,
                "planned_tokens": plan[name][1] if plan else None,
                "tokens": stage["result"].get("tokens"),
            }
            for name, stage in finished.items()
        ],
        "peak_memory_gb": max(
            (stage["peak_memory_gb"] for stage in finished.values()), default=None
        ),
        **results,
        "examples": _examples(bench, results) if "answers" in results else [],
        "provenance": provenance(
            seed=recipe.seed,
            recipe=plain(replace(recipe, out="")),
            data_fingerprint=data["splits"]["bench"]["fingerprint"],
        )
        | _code(finished),
    }


def _code(finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Commit, dirty flag and time of all stages: a run may have gone on with other code."""
    states = {name: stage["code"] for name, stage in finished.items()}
    commits = {name: state["commit"] for name, state in states.items()}
    dirty = [state["dirty"] for state in states.values()]
    return {
        "commit": list(commits.values())[-1] if commits else None,
        # None: not a git checkout, there is no commit to differ from.
        "dirty": any(dirty) if None not in dirty else None,
        "stage_commits": commits,
        "wall_time_s": round(sum(stage["seconds"] for stage in finished.values()), 2),
    }


def _examples(
    bench: Sequence[GradedInstruction], results: Mapping[str, Any], count: int = 5
) -> list[dict[str, Any]]:
    """The first few questions with the tuned policy's answer, verdict by verdict."""
    rows = {row.id: row for row in bench}
    shown = []
    answers = results["answers"]["answers"]
    for base, tuned in list(zip(answers["base"], answers["tuned"], strict=True))[:count]:
        row = rows[tuned["instruction_id"]]
        assert row.rubric is not None
        shown.append(
            {
                "question": row.messages[-1].content,
                "base": base,
                "tuned": tuned,
                "criteria": [
                    {
                        "id": c.id,
                        "tier": c.tier.value,
                        "text": c.text,
                        "kind": None if c.kind is None else c.kind.value,
                    }
                    for c in row.rubric.criteria
                ],
            }
        )
    return shown
