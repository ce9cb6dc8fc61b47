"""`promedical policy compare`: policies side by side, from judges to one table and one plot.

    data       training side halved for two judges, calibration, prompts, bench   compare_data
    judges     training judges on one half, the gold judge on the other           compare_judges
    base       the untrained policy's answers, graded
    train      every system with every seed                                       compare_training
    measure    its answers to the bench, graded: same prompts, decoding, graders
    report     figures, paired differences, table, plot                           compare_report

Every stage leaves a JSON file, so that a run killed at any moment goes on from the last finished
one; trainings go on from their own checkpoints. Seeds are done one after the other, all systems of
a seed together, so that a run that is stopped early still compares all systems.

Nothing is decided here that a stage's own module could decide; this file says what follows what.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.policy.compare_recipe import (
    ASKS,
    JUDGES,
    SYSTEMS,
    CompareError,
    CompareRecipe,
    plain_settings,
)
from promedical.progress import Stages
from promedical.provenance import code_state, portable, provenance
from promedical.records import GradedInstruction, read_dataset
from promedical.rubric import RewardSpec

if TYPE_CHECKING:
    from promedical.policy.compare_measures import Item
    from promedical.policy.gold import Judge
    from promedical.policy.rewards import Grader
    from promedical.reward_model.calibrate import OperatingPoint

__all__ = ["Run", "Stage", "compare_policies", "main", "plan_lines", "results", "stages"]

Move = Callable[[str, int, int], None]

DESCRIPTION = """\
Train policies in every way the recipe names, let each answer the same held-out questions, have the
same judges grade the answers, and write one table and one plot (report.html, tables.md, curves.svg,
results.json in the folder of the run). Killed and started again, the same command goes on.
"""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Args:
        name: of its file.
        title: as a person reads it.
        kind: stages of one kind take about as long; what is done says how long the rest will take.
        expected: seconds, by the recipe's costs.
        run: does it, and returns JSON types to keep.
        after: cleans up once the result is kept; done again if a run goes on.
    """

    name: str
    title: str
    kind: str
    expected: float
    run: Callable[[Run, Move], dict[str, Any]]
    after: Callable[[Run], None] | None = None


class Run:
    """The folder of a run, and the judges that its stages share in memory."""

    def __init__(self, recipe: CompareRecipe) -> None:
        self.recipe = recipe
        self.out = Path(recipe.out)
        self._judges: dict[str, Grader] = {}
        self.gold_judge: Judge | None = None  # remembers what it graded, for all trainings
        # judge → (instruction, answer) → its grade: policies often answer alike.
        self.graded: dict[str, dict[tuple[str, str], Item]] = {}

    def claim(self) -> None:
        """Make the folder this recipe's, or refuse it.

        Raises:
            CompareError: it holds a run with other settings.
        """
        settings = plain_settings(self.recipe)
        path = self.out / "recipe.json"
        if path.exists():
            held = json.loads(path.read_text())
            differing = sorted(k for k in settings.keys() | held if held.get(k) != settings.get(k))
            if differing:
                raise CompareError(
                    f"{self.out}: holds a run with other settings ({', '.join(differing)}); choose "
                    "another --out, or remove it to start anew"
                )
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def stage_file(self, name: str) -> Path:
        return self.out / "stages" / f"{name}.json"

    def kept(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left: result, seconds and code; None if it is not finished."""
        path = self.stage_file(name)
        return json.loads(path.read_text()) if path.exists() else None

    def rows(self, side: str) -> list[GradedInstruction]:
        """The rows of a side, as the data stage wrote them."""
        return read_dataset(self.out / "data" / side)

    def judge(self, name: str) -> Grader:
        """A judge, loaded once; of those that train alone, only the last stays in memory."""
        from promedical.policy.compare_judges import load_judge

        if name not in self._judges:
            done = self._judges.keys() - {"gold", *self.recipe.graders}
            for other in done:
                del self._judges[other]
            if done:
                _free_memory()
            self._judges[name] = load_judge(self.recipe, name, self.out)
        return self._judges[name]

    def policy_folder(self, system: str, seed: int) -> Path:
        return self.out / "policies" / f"{system}-{seed}"


# --- stages ---------------------------------------------------------------------------------------


def stages(recipe: CompareRecipe) -> list[Stage]:
    """All stages of a recipe, in order, with the time that each is expected to take."""
    costs, data = recipe.costs, recipe.data
    half = data.train_instructions * data.copies / 2
    judges = recipe.judges
    measured = data.bench_instructions * (costs.answer + costs.grade * len(recipe.graders))
    building = data.train_instructions * data.copies + data.calibration_instructions
    found = [Stage("data", "Data", "data", 10 + building * costs.degrade, _data)]
    for name in recipe.judges_needed:
        share = 1 / 3 if name in ASKS else 1.0
        seconds = data.calibration_instructions * costs.judge_row
        if getattr(judges, name) is None:
            seconds += half * judges.train.epochs * costs.judge_tree * share
        kind = "judge, scalar" if name in ASKS else "judge"
        found.append(Stage(f"judge-{name}", JUDGES[name], kind, seconds, partial(_judge, name)))
    found.append(
        Stage("measure-base", "Base: answers and grades", "measure", measured,
              partial(_measure, "base", None))
    )  # fmt: skip
    for system, seed in recipe.trained():
        label = f"{SYSTEMS[system].label}, seed {seed}"
        method = SYSTEMS[system].method
        found.append(
            Stage(
                f"train-{system}-{seed}",
                f"{label}: training",
                "train dpo" if method == "dpo" else "train",
                _training_seconds(recipe, method),
                partial(_train, system, seed),
            )
        )
        found.append(
            Stage(
                f"measure-{system}-{seed}",
                f"{label}: answers and grades",
                "measure",
                measured,
                partial(_measure, system, seed),
                after=partial(_forget, system, seed),
            )
        )
    found.append(Stage("report", "Report", "report", 20.0, _report))
    return found


def _training_seconds(recipe: CompareRecipe, method: str) -> float:
    costs = recipe.costs
    if method == "dpo":
        each = recipe.dpo.pairs_per_instruction or 5  # what four constructed answers give
        half = recipe.data.train_instructions * recipe.data.copies / 2
        return costs.load + recipe.dpo.epochs * half * each * costs.dpo_pair
    looks = 0
    if recipe.watch_every:
        looks = 1 + recipe.online.steps // recipe.watch_every
    return (
        costs.load + recipe.online.steps * costs.step + looks * recipe.watch_prompts * costs.watch
    )


def _data(run: Run, move: Move) -> dict[str, Any]:
    from promedical.policy.compare_data import build_data

    return build_data(run.recipe, run.out / "data", move)


def _judge(name: str, run: Run, move: Move) -> dict[str, Any]:
    from promedical.policy.compare_judges import train_judge

    return train_judge(run.recipe, name, run.out, move)


def _train(system: str, seed: int, run: Run, move: Move) -> dict[str, Any]:
    from promedical.policy.compare_training import train_policy

    return train_policy(run, system, seed, move)


def _measure(system: str, seed: int | None, run: Run, move: Move) -> dict[str, Any]:
    """A policy's answers to the bench, and what every grader says of them.

    Answers are kept in a file that only its owner may read; the stage's own file holds numbers.
    """
    from promedical.demo.models import resolve_model
    from promedical.policy.generate import generate

    recipe = run.recipe
    bench = run.rows("bench")
    path = (
        resolve_model(recipe.model) if seed is None else run.policy_folder(system, seed) / "policy"
    )
    answers = generate(
        path,
        bench,
        max_new_tokens=recipe.answer_tokens,
        batch_size=recipe.batch_size,
        seed=0,
        progress=partial(move, "answers"),
    )
    name = system if seed is None else f"{system}-{seed}"
    _write_private(
        run.out / "answers" / f"{name}.jsonl",
        "".join(
            json.dumps({"id": row.id, "text": text}, ensure_ascii=False) + "\n"
            for row, text in zip(bench, answers.texts, strict=True)
        ),
    )
    graded = {
        judge: [
            item.to_json()
            for item in grade_answers(
                run.judge(judge),
                bench,
                answers.texts,
                recipe.reward,
                point=recipe.point(judge),
                known=run.graded.setdefault(judge, {}),
                progress=partial(move, f"grading, {JUDGES[judge].lower()}"),
            )
        ]
        for judge in recipe.graders
    }
    return {
        "graded": graded,
        "tokens": list(answers.tokens),
        "cut": answers.cut_count,
        "empty": sum(not text for text in answers.texts),
        "distinct": len(set(answers.texts)),
    }


def grade_answers(
    grader: Grader,
    rows: Sequence[GradedInstruction],
    texts: Sequence[str],
    spec: RewardSpec,
    *,
    point: OperatingPoint,
    known: dict[tuple[str, str], Item] | None = None,
    progress: Callable[[int, int], None],
) -> list[Item]:
    """Every answer graded; one that fails is kept as ungraded.

    Args:
        spec: ProMedical's, for the item's reward.
        point: whose thresholds decide the verdicts.
        known: (instruction, answer) → what this grader said of it before; what is new is added.
    """
    from promedical.policy.compare_measures import Item, graded_item

    known = {} if known is None else known
    items = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        assert row.rubric is not None
        item = known.get((row.id, text))
        if item is None:
            try:
                (grade,) = grader.grade(row.messages, [text], row.rubric, operating_point=point)
                item = known[row.id, text] = graded_item(row.id, row.rubric, grade, spec)
            except (RuntimeError, ValueError):  # a failure is no verdict: counted, not guessed
                item = Item(row.id, None)
        items.append(item)
        progress(number, len(rows))
    return items


def _forget(system: str, seed: int, run: Run) -> None:
    """Remove the merged weights of a policy that was measured, where an adapter has them too."""
    folder = run.policy_folder(system, seed)
    if not run.recipe.keep_policies and (folder / "adapter").is_dir():
        shutil.rmtree(folder / "policy", ignore_errors=True)


def _report(run: Run, move: Move) -> dict[str, Any]:
    from promedical.policy.compare_report import write_report

    found = results(run)
    write_json(run.out / "results.json", found)
    write_report(run.out, found)
    return {"report": "report.html"}


# --- results --------------------------------------------------------------------------------------


def results(run: Run) -> dict[str, Any]:
    """Everything that is finished, measured: what the tables and the plot are made of.

    Raises:
        CompareError: the base is not measured yet.
    """
    from promedical.policy.compare_measures import Item, measure

    recipe = run.recipe
    kept = {stage.name: run.kept(stage.name) for stage in stages(recipe)}
    finished = {name: found for name, found in kept.items() if found is not None}
    if "measure-base" not in finished:
        raise CompareError(f"{run.out}: the base is not measured yet, nothing to report on")
    graded: dict[tuple[str, int | None], dict[str, list[Item]]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    wanted: list[tuple[str, int | None]] = [("base", None), *recipe.trained()]
    for system, seed in wanted:
        found = finished.get(f"measure-{system}" if seed is None else f"measure-{system}-{seed}")
        if found is None:
            continue
        result = found["result"]
        graded[system, seed] = {
            judge: [Item.from_json(item) for item in items]
            for judge, items in result["graded"].items()
        }
        answers.setdefault(system, []).append(
            {"seed": seed, **{k: result[k] for k in ("tokens", "cut", "empty", "distinct")}}
        )
    in_order = [name for name in recipe.systems if name in answers]
    measured = measure(
        {key: graded[key] for name in in_order for key in graded if key[0] == name},
        reference=recipe.reference,
        resamples=recipe.bootstrap,
        seed=0,
    )
    trained = {
        f"{system}-{seed}": finished[f"train-{system}-{seed}"]["result"]
        for system, seed in recipe.trained()
        if f"train-{system}-{seed}" in finished
    }
    data = finished["data"]["result"]
    return {
        "settings": _portable_settings(recipe),
        "reference": recipe.reference,
        "labels": {name: SYSTEMS[name].label for name in in_order},
        **measured,
        "answers": answers,
        "curves": [
            {"system": system, "seed": seed, **trained[f"{system}-{seed}"]}
            for system, seed in recipe.trained()
            if f"{system}-{seed}" in trained
        ],
        "judges": {
            name: finished[f"judge-{name}"]["result"]
            for name in recipe.judges_needed
            if f"judge-{name}" in finished
        },
        "data": data,
        "stages": [
            {"name": stage.name, "seconds": finished[stage.name]["seconds"]}
            for stage in stages(recipe)
            if stage.name in finished and stage.name != "report"
        ],
        "missing": [
            s.name for s in stages(recipe) if s.name not in finished and s.kind != "report"
        ],
        "provenance": provenance(
            seed=recipe.seeds[0],
            recipe=_portable_settings(recipe),
            data_fingerprint=data["sides"]["bench"]["fingerprint"],
        )
        | _code(finished),
    }


def _portable_settings(recipe: CompareRecipe) -> dict[str, Any]:
    """The settings with paths that mean the same on another machine."""
    found = plain_settings(recipe)
    for section, names in (
        ("judges", ("model", *JUDGES)),
        ("data", ("rows", "prompts", "bench")),
    ):
        for name in names:
            value = found[section][name]
            if value is not None and Path(value).exists():
                found[section][name] = portable(value)
    if Path(found["model"]).exists():
        found["model"] = portable(found["model"])
    return found


def _code(finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Commit, dirty flag and time of all stages: a run may have gone on with other code."""
    commits = [stage["code"]["commit"] for stage in finished.values()]
    dirty = [stage["code"]["dirty"] for stage in finished.values()]
    return {
        "commit": commits[-1],
        "commits": list(dict.fromkeys(commits)),
        "dirty": any(dirty) if None not in dirty else None,
        "wall_time_s": round(sum(stage["seconds"] for stage in finished.values()), 2),
    }


# --- running --------------------------------------------------------------------------------------


def compare_policies(recipe: CompareRecipe) -> dict[str, Any]:
    """Run, or go on with, every stage, and return the results.

    Raises:
        CompareError: the folder holds a run with other settings, or data and checkpoints that
            cannot be used.
    """
    from promedical.policy.compare_data import left_out_lines

    run = Run(recipe)
    run.claim()
    _quiet()
    listed = stages(recipe)
    show = Stages(len(listed))
    new = False
    for stage in listed:
        kept = run.kept(stage.name)
        # The report is of all other stages: made anew if any of them was.
        if kept is not None and not (stage.kind == "report" and new):
            show.skipped(stage.title, kept["seconds"])
        else:
            new = True
            started = time.monotonic()
            code = code_state()
            with show.stage(stage.title) as move:
                result = stage.run(run, move)
            seconds = time.monotonic() - started
            write_json(
                run.stage_file(stage.name), {"result": result, "seconds": seconds, "code": code}
            )
            if stage.kind == "data":
                for line in left_out_lines(result["left_out"]):
                    show.say(line)
        if stage.after is not None:
            stage.after(run)
    found: dict[str, Any] = json.loads((run.out / "results.json").read_text())
    return found


def plan_lines(recipe: CompareRecipe) -> list[str]:
    """The stages, what each is expected to take and whether it is done, the sum, what is left out.

    Times of a kind of which something is done are those that it took.
    """
    from promedical.bench.tables import duration
    from promedical.policy.compare_data import data_lines

    run = Run(recipe)
    listed = stages(recipe)
    kept = {stage.name: run.kept(stage.name) for stage in listed}
    took: dict[str, list[float]] = {}
    for stage in listed:
        found = kept[stage.name]
        if found is not None:
            took.setdefault(stage.kind, []).append(found["seconds"])
    lines, left = [], 0.0
    for number, stage in enumerate(listed, start=1):
        found = kept[stage.name]
        if found is not None:
            said = f"done in {duration(found['seconds'])}"
        else:
            known = took.get(stage.kind)
            expected = sum(known) / len(known) if known else stage.expected
            left += expected
            said = f"about {duration(expected)}"
        lines.append(f"{number:>3}  {stage.title:<58} {said}")
    done = sum(sum(seconds) for seconds in took.values())
    lines.append(
        f"{recipe.out}: {sum(k is not None for k in kept.values())} of {len(listed)} stages done "
        f"in {duration(done)}, about {duration(left)} left"
    )
    data = kept["data"]
    return [*lines, *data_lines(recipe, None if data is None else data["result"])]


def main(argv: Sequence[str]) -> int:
    """Run `promedical policy compare` with these flags."""
    from promedical.policy.compare_report import headline
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        CompareRecipe,
        prog="promedical policy compare",
        usage="%(prog)s RECIPE [--plan | --report] [flags]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--plan", action="store_true", dest="only plan",
        help="print the stages and what each is expected to take, and run nothing",
    )  # fmt: skip
    what.add_argument(
        "--report", action="store_true", dest="only report",
        help="report on what is finished, and run nothing",
    )  # fmt: skip
    known, _ = parser.parse_known_args(list(argv))
    recipe = load_recipe(CompareRecipe, known.file, argv, parser=parser)
    if getattr(known, "only plan"):
        print("\n".join(plan_lines(recipe)))
        return 0
    if getattr(known, "only report"):
        run = Run(recipe)
        run.claim()
        _report(run, lambda *_: None)
        found = json.loads((run.out / "results.json").read_text())
    else:
        found = compare_policies(recipe)
    print("\n".join(headline(found)))
    print(f"Report: {Path(recipe.out) / 'report.html'}")
    return 0


def write_json(path: Path, data: Any) -> None:
    """Write under another name and rename, so that a file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(data, indent=1, ensure_ascii=False))
    os.replace(staging, path)


def _write_private(path: Path, text: str) -> None:
    """A file of answers: whole or absent, and for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.unlink(missing_ok=True)
    with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(staging, path)


def _free_memory() -> None:
    """Give what nobody holds any more back to the GPU, where vLLM asks how much is free."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _quiet() -> None:
    """Keep libraries' chatter and bars out of the way of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
