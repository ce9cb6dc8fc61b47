"""Trains one system of a comparison with one seed, and keeps what happened at every step.

What tells the systems apart is in `compare_recipe.SYSTEMS`: the method, the judge, the reward's
parameters, how grades become advantages. Everything else (prompts, steps, rates, lengths) is the
same for all. While it trains, the gold judge looks at the same few held-out questions every few
steps. Left to others: the trainings themselves (`grpo`, `rloo`, `dpo`), the looks (`gold`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.policy.compare_recipe import ASKS, SYSTEMS
from promedical.policy.settings import DpoSettings, OnlineSettings
from promedical.records import GradedInstruction
from promedical.rubric import Scores

if TYPE_CHECKING:
    from promedical.policy.compare import Run
    from promedical.policy.gold import Judge

__all__ = ["remembering", "train_policy"]

Move = Callable[[str, int, int], None]

# What of a step is kept for the plot and the tables; of a look, what both judges give.
KEPT = (
    "reward",
    "s1",
    "s2",
    "s3",
    "veto_rate",
    "unresolved_rate",
    "veto_variance_share",
    "no_signal",
    "failed",
)
LOOKED = ("reward", "s1", "s2", "s3", "veto_rate", "failed")


def train_policy(run: Run, system: str, seed: int, move: Move) -> dict[str, Any]:
    """Train a policy, or go on with it; its merged weights are in `policy/` of its folder.

    Returns:
        "steps", "seconds", "stopped_by", "curve" (a dict a step), "gold" and "held_out" (a dict a
        look: the gold judge and the training judge on the same answers), "alarms" (kind and step of
        each that the looks raised).
    """
    train = _offline if SYSTEMS[system].method == "dpo" else _online
    found = train(run, system, seed, move)
    return found | _looks(run.policy_folder(system, seed))


def _online(run: Run, system: str, seed: int, move: Move) -> dict[str, Any]:
    """GRPO or RLOO against a judge."""
    from promedical.policy.gold import judge_with
    from promedical.policy.grpo import GrpoRecipe, train_grpo
    from promedical.policy.implicit import ImplicitReward
    from promedical.policy.rewards import RubricReward
    from promedical.policy.rloo import train_rloo

    made, recipe = SYSTEMS[system], run.recipe
    assert made.judge is not None
    rows = run.rows("prompts")
    spec = made.reward(recipe.reward)
    judge = run.judge(made.judge)
    reward: Any
    if made.judge in ASKS:  # it gives no verdicts, so only the gold judge looks
        reward, own = ImplicitReward(judge, rows, ASKS[made.judge]), None
    else:
        reward = RubricReward.from_rows(judge, rows, spec, soft_s1=made.soft)
        own = judge_with(judge) if recipe.watch_own else None
    settings = replace(_own(OnlineSettings, recipe.online), advantages=made.advantages)
    folder = run.policy_folder(system, seed)
    result = (train_grpo if made.method == "grpo" else train_rloo)(
        GrpoRecipe(**_arguments(settings), model=recipe.model, seed=seed, reward=spec),
        rows,
        None,
        folder,
        reward=reward,
        callbacks=_watch(run, folder, own),
        progress=partial(move, "steps"),
    )
    return {
        "steps": result.done_steps,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "curve": [
            {
                "step": step.step,
                **{name: getattr(step.reward, name) for name in KEPT},
                "kl": step.kl,
                "entropy": step.entropy,
                "tokens": step.completion_tokens,
                "cut": step.cut,
                "seconds": step.seconds,
                "grading_seconds": step.grading_seconds,
            }
            for step in result.history
        ],
    }


def _offline(run: Run, system: str, seed: int, move: Move) -> dict[str, Any]:
    """DPO on the pairs of the training judges' half, whose verdicts are known."""
    from promedical.policy.dpo import DpoRecipe, train_dpo

    recipe = run.recipe
    rows = run.rows("judge")
    folder = run.policy_folder(system, seed)
    result = train_dpo(
        DpoRecipe(**_arguments(_own(DpoSettings, recipe.dpo)), model=recipe.model, seed=seed),
        rows,
        folder,
        callbacks=_watch(run, folder, None),
        progress=partial(move, "steps"),
    )
    return {
        "steps": result.done_steps,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "counts": result.counts,
        "curve": [
            {
                "step": step.step,
                "loss": step.loss,
                "accuracy": step.accuracy,
                "margin": step.margin,
                "seconds": step.seconds,
            }
            for step in result.history
        ],
    }


def _own(cls: type[Any], settings: Any) -> Any:
    """Settings as the class that has no model, seed and reward of its own."""
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


def _arguments(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


# --- the gold judge's looks -----------------------------------------------------------------------


def _watch(run: Run, folder: Path, own: Judge | None) -> list[Any]:
    """The callback of the looks, or none; without a training judge of its own gold looks alone."""
    from promedical.policy.gold import GoldSettings, GoldWatch, judge_with
    from promedical.policy.held_out import Sample
    from promedical.policy.monitor import Monitor

    recipe = run.recipe
    if not recipe.watch_every:
        return []
    if run.gold_judge is None:
        run.gold_judge = remembering(judge_with(run.judge("gold"), recipe.point("gold")))
    gold = run.gold_judge
    watch = GoldWatch(
        GoldSettings(
            judge="gold judge of the comparison",
            prompts=recipe.watch_prompts,
            every=recipe.watch_every,
            max_new_tokens=recipe.answer_tokens,
            batch_size=recipe.batch_size,
            keep_best=False,  # every system is measured after the same number of steps
        ),
        Sample(tuple(run.rows("watched")), {}, 0),  # drawn, and what is left out counted, with data
        training=gold if own is None else own,
        gold=gold,
        spec=recipe.reward,
        folder=folder / "watch",
    )
    return [Monitor(folder / "watch", rubrics={}, spec=recipe.reward, gold=watch).callback()]


def remembering(judge: Judge) -> Judge:
    """A judge that grades an answer to a question once: the first look is the base's every time."""
    known: dict[tuple[str, str], Scores | None] = {}

    def judged(rows: Sequence[GradedInstruction]) -> Mapping[str, Scores | None]:
        new = [row for row in rows if _key(row) not in known]
        if new:
            graded = judge(new)
            known.update({_key(row): graded[row.id] for row in new})
        return {row.id: known[_key(row)] for row in rows}

    return judged


def _key(row: GradedInstruction) -> tuple[str, str]:
    (response,) = row.responses
    return row.id, response.text


def _looks(folder: Path) -> dict[str, Any]:
    """What each look found, without the prompts' own figures, and what it was alarmed by."""
    from promedical.policy.step_lines import read_lines

    lines = read_lines(folder / "watch" / "gold.jsonl")
    raised = folder / "watch" / "alarms.json"  # there only if there are any
    alarms = json.loads(raised.read_text(encoding="utf-8")) if raised.exists() else []
    return {
        "alarms": [{"kind": alarm["kind"], "step": alarm["step"]} for alarm in alarms],
    } | {
        name: [{"step": line["step"], **{key: line[who][key] for key in LOOKED}} for line in lines]
        for name, who in (("gold", "gold"), ("held_out", "training"))
    }
