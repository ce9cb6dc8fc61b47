"""Where a GRPO step's time goes on a CPU, and what grading takes of it.

    python benchmarks/policy_step.py                  # the full run, about half an hour on 2 cores
    python benchmarks/policy_step.py --small --out result.json    # a try, with a tiny random model

Every variant trains the policy of recipes/policy/grpo-smollm2.yaml on the same instructions for
some steps, the first of which is not counted, against the same reward model, in its shape but
untrained: what grading takes depends on its size, not on what it has learnt. A step's seconds are
those of the trainer's callbacks, from its begin to its end; "generation" is sampling the answers,
"grading" what the step waits for its rewards, and the rest are log-probabilities, the loss, its
gradient and the optimiser. A figure is the median over steps. On a busy machine wall times mean
little; the shares of CPU time, of all threads together, hold there too (while grading overlaps with
something else, a part's CPU time has the other's in it).

recipe        as the recipe has it: the group of G answers and all criteria are one tree
one_by_one    the same, every answer graded by itself, so its question is read G times
short         answers of at most 64 tokens, as in the quickstart
two_prompts   two instructions a step
overlap       the same, each group graded in a thread while the step goes on
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from promedical.policy.grpo import GrpoRecipe, GrpoStep, train_grpo
from promedical.policy.recipe import PolicyRecipe
from promedical.policy.run import policy_rows
from promedical.provenance import provenance
from promedical.recipe import load_recipe
from promedical.records import GradedInstruction, fingerprint
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.model import TreeRewardModel, initialise

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "policy" / "grpo-smollm2.yaml"
RESULT = ROOT / "benchmarks" / "results" / "policy_step.json"
FIGURES = (
    "seconds",
    "generation",
    "grading",
    "rest",
    "grading_share",
    "cpu_seconds",
    "grading_cpu_share",
    "generation_cpu_share",
    "tokens",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "one_by_one": {},
    "short": {"max_completion_length": 64},
    "two_prompts": {"prompts_per_step": 2},
    "overlap": {"prompts_per_step": 2, "overlap": 2},
}


class OneByOne:
    """A grader that is asked about one answer at a time."""

    def __init__(self, grader: Any) -> None:
        self.grader = grader

    def grade(self, messages: Any, responses: Sequence[str], rubric: Any, **how: Any) -> list[Any]:
        return [
            grade
            for response in responses
            for grade in self.grader.grade(messages, [response], rubric, **how)
        ]


class Meter:
    """Wall and CPU seconds of a step and of its parts; CPU is of all threads together."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            for key, value in (
                (name, time.monotonic() - wall),
                (f"{name}_cpu", time.process_time() - cpu),
            ):
                self._parts[key] = self._parts.get(key, 0.0) + value

    def callback(self) -> Any:
        from transformers import TrainerCallback

        meter = self

        class Metered(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                meter._parts = {"cpu": -time.process_time()}

            def on_step_end(self, *_: Any, **__: Any) -> None:
                meter._parts["cpu"] += time.process_time()
                meter.steps.append(meter._parts)

        return Metered()


class Metered:
    """A grader whose work is metered; in a thread of its own it is only so much CPU time."""

    def __init__(self, grader: Any, meter: Meter) -> None:
        self.grader, self.meter = grader, meter

    def grade(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.part("graded"):
            return self.grader.grade(*args, **kwargs)


@contextmanager
def generation_metered(meter: Meter) -> Iterator[None]:
    """Meter the calls in which TRL samples answers."""
    from trl import GRPOTrainer

    sample = GRPOTrainer._generate_single_turn

    def metered(*args: Any, **kwargs: Any) -> Any:
        with meter.part("generation"):
            return sample(*args, **kwargs)

    GRPOTrainer._generate_single_turn = metered
    try:
        yield
    finally:
        GRPOTrainer._generate_single_turn = sample


def measure(
    recipe: GrpoRecipe, rows: Sequence[GradedInstruction], grader: Any, folder: Path
) -> dict[str, Any]:
    """Train for the recipe's steps and say where their time went."""
    shutil.rmtree(folder, ignore_errors=True)
    meter = Meter()
    with generation_metered(meter):
        result = train_grpo(
            recipe, rows, Metered(grader, meter), folder, callbacks=[meter.callback()]
        )
    shutil.rmtree(folder)
    steps = [of_step(step, parts) for step, parts in zip(result.history, meter.steps, strict=True)]
    counted = steps[1:] or steps
    figures = {name: statistics.median(step[name] for step in counted) for name in FIGURES}
    return {
        "settings": {k: v for k, v in asdict(recipe).items() if k != "model"},
        "steps": steps,
        **figures,
    }


def of_step(step: GrpoStep, parts: dict[str, float]) -> dict[str, Any]:
    grading = step.grading_seconds or 0.0
    return {
        "seconds": step.seconds,
        "generation": parts["generation"],
        "grading": grading,
        "rest": step.seconds - parts["generation"] - grading,
        "grading_share": grading / step.seconds,
        "cpu_seconds": parts["cpu"],
        "grading_cpu_share": parts["graded_cpu"] / parts["cpu"],
        "generation_cpu_share": parts["generation_cpu"] / parts["cpu"],
        "tokens": step.completion_tokens,
        "cut": step.cut,
    }


def small_models(folder: Path) -> tuple[str, RubricRewardModel]:
    """Tiny random ones, for a try."""
    import sys

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_policy import save_tiny_policy
    from tiny_reward import tiny_classifier

    path = save_tiny_policy(folder / "policy", positions=4096)
    classifier, tokenizer = tiny_classifier()
    return str(path), RubricRewardModel(TreeRewardModel(classifier), tokenizer)


def embedded_models() -> tuple[str, RubricRewardModel]:
    from promedical.demo.models import resolve_model

    path = resolve_model(notify=print)
    model, tokenizer = initialise(path)
    return str(path), RubricRewardModel(TreeRewardModel(model.eval()), tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="a try, with a tiny random model")
    parser.add_argument(
        "--steps", type=int, default=6, help="of each variant, the first not counted"
    )
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--instructions", type=int, default=40, help="of the training side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    told = load_recipe(PolicyRecipe, RECIPE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, grader = small_models(folder) if given.small else embedded_models()
        rows, _ = policy_rows(replace(told, model=path))
        rows = rows[: given.instructions]
        recipe = GrpoRecipe(
            **{f.name: getattr(told.train, f.name) for f in fields(told.train)}, model=path
        )
        recipe = replace(recipe, steps=given.steps, save_steps=given.steps + 1, max_seconds=None)
        if given.small:
            recipe = replace(recipe, max_completion_length=8, num_generations=2)
        found = {}
        for variant in given.variants:
            changed = dict(VARIANTS[variant])
            if given.small:
                changed.pop("max_completion_length", None)
            asked = OneByOne(grader) if variant == "one_by_one" else grader
            found[variant] = measure(replace(recipe, **changed), rows, asked, folder / "run")
            told_now = found[variant]
            print(
                f"{variant:<12} {told_now['seconds']:6.2f} s a step: generation "
                f"{told_now['generation']:.2f}, grading {told_now['grading']:.2f} "
                f"({told_now['grading_share']:.1%}, of CPU time "
                f"{told_now['grading_cpu_share']:.1%}), rest {told_now['rest']:.2f}; "
                f"{told_now['tokens']:.0f} tokens an answer",
                flush=True,
            )
    result = {
        "model": "tiny" if given.small else "embedded",
        "threads": given.threads,
        "criteria": statistics.mean(len(row.rubric.criteria) for row in rows if row.rubric),
        "instructions": len(rows),
        "variants": found,
        "provenance": provenance(
            seed=recipe.seed,
            recipe={k: v for k, v in asdict(recipe).items() if k != "model"},
            data_fingerprint=fingerprint(rows),
            started=started,
        ),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
