"""The rows and the reward models of a comparison.

The training side is halved by instruction: one half trains the training judges (with explicit
criteria, scalar, without safety data), the other the gold judge, with another seed, so that what a
policy learns to exploit in one is not in the other for having been in its data (section 7.4). Both
are calibrated on the calibration side; the bench side trains and calibrates nothing.

Left to others: constructing answers (`corpus.degrade`), training (`reward_model.run`), what is done
with judges (`compare`).
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.policy.compare_recipe import CompareError, CompareRecipe, DataSettings
from promedical.progress import Stages
from promedical.records import GradedInstruction, write_dataset

if TYPE_CHECKING:
    from promedical.reward_model.grade import RubricRewardModel

__all__ = ["SIDES", "build_data", "load_judge", "train_judge"]

Move = Callable[[str, int, int], None]

# judge: trains the training judges; gold: trains the gold judge; prompts: the policies' questions.
SIDES = ("judge", "gold", "calibration", "prompts", "bench")
# Apart from each other, and from those of another copy, as in the quickstart.
_SEED = {"train": 0, "calibration": 1}


# --- data -----------------------------------------------------------------------------------------


def build_data(recipe: CompareRecipe, folder: Path, move: Move) -> dict[str, Any]:
    """Write the rows of every side as a dataset of that name.

    Returns:
        Counts, fingerprints and what was left out and why, as JSON types.

    Raises:
        CompareError: too few rows, rows without rubric or graded answers.
        RecordError: a file that cannot be read.
    """
    settings = recipe.data
    make = _from_kqa if settings.rows is None else _from_rows
    train, calibration, bench, left_out = make(recipe, move)
    # Copies of one instruction are other answers to the same question, so they stay together.
    copied = settings.rows is None and settings.copies > 1
    by_question: dict[str, list[GradedInstruction]] = {}
    for row in train:
        by_question.setdefault(row.id.rpartition("#")[0] if copied else row.id, []).append(row)
    halves = _halves(by_question)
    sides = {
        "judge": halves[0],
        "gold": halves[1],
        "calibration": calibration,
        "prompts": [replace(rows[0], responses=()) for _, rows in sorted(by_question.items())],
        "bench": [replace(row, responses=()) for row in bench],
    }
    summary: dict[str, Any] = {"left_out": left_out, "sides": {}}
    for name, rows in sides.items():
        if not rows:
            raise CompareError(f"data: no rows for the {name} side, expected at least one")
        summary["sides"][name] = {
            "instructions": len(rows),
            "responses": sum(len(row.responses) for row in rows),
            "criteria": sum(len(row.rubric.criteria) for row in rows if row.rubric),
            "fingerprint": write_dataset(folder / name, rows),
        }
    return summary


Made = tuple[
    list[GradedInstruction], list[GradedInstruction], list[GradedInstruction], dict[str, int]
]


def _from_kqa(recipe: CompareRecipe, move: Move) -> Made:
    """The embedded corpus, answers constructed by controlled degradation."""
    from transformers import AutoTokenizer

    from promedical.corpus.degrade import degrade
    from promedical.demo.kqa import load_kqa
    from promedical.demo.models import resolve_model

    settings = recipe.data
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.judges.model))
    config = replace(
        settings.degrade,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    kqa = load_kqa()
    sources = {
        "train": kqa.train[: settings.train_instructions],
        "calibration": kqa.calibration[: settings.calibration_instructions],
    }
    bench = kqa.bench[: settings.bench_instructions]
    _check_apart([*sources["train"], *sources["calibration"]], bench)
    built: dict[str, list[GradedInstruction]] = {"train": [], "calibration": []}
    copies = [("train", c) for c in range(settings.copies)] + [("calibration", 0)]
    for number, (side, copy) in enumerate(copies):
        move("constructing answers", number, len(copies))
        made = degrade(
            sources[side],
            split="train" if side == "train" else "calibration",
            seed=recipe.judges.seed + 1000 * copy + _SEED[side],
            config=config,
        )
        built[side] += [
            row if settings.copies == 1 or side != "train" else replace(row, id=f"{row.id}#{copy}")
            for row in made.rows
            if row.responses
        ]
    left_out = {
        "training instructions without statements": settings.copies * len(sources["train"])
        - len(built["train"])
    }
    return *_cut_all(settings, built["train"], built["calibration"], bench), left_out


def _from_rows(recipe: CompareRecipe, move: Move) -> Made:
    """A user's graded rows, divided by instruction."""
    from promedical.reward_model.run import read_rows

    settings = recipe.data
    assert settings.rows is not None
    path = os.path.expandvars(settings.rows)
    if "$" in path:
        raise CompareError(f"data.rows: found {settings.rows!r}, but a variable in it is not set")
    move("reading", 0, 1)
    rows = read_rows(path)
    move("reading", 1, 1)
    usable = [
        row
        for row in rows
        if row.rubric is not None
        and not row.rubric.safety_only
        and len([r for r in row.responses if r.verdicts]) >= 2
    ]
    left_out = {"rows without a rubric or without two graded answers": len(rows) - len(usable)}
    usable.sort(key=lambda row: row.id)
    random.Random(f"{recipe.judges.seed}:sides").shuffle(usable)
    bench, rest = _take(usable, settings.bench_instructions)
    apart, close = _apart(rest, bench)
    left_out["rows too close to the bench side"] = close
    calibration, rest = _take(apart, settings.calibration_instructions)
    train = rest[: settings.train_instructions]
    left_out["rows beyond train_instructions"] = len(rest) - len(train)
    if len(train) < 2:
        raise CompareError(
            f"data.rows: {len(usable)} usable rows leave {len(train)} to train on after "
            f"{len(bench)} for the bench and {len(calibration)} for calibration, expected 2 or more"
        )
    return *_cut_all(settings, train, calibration, bench), left_out


def _cut_all(
    settings: DataSettings,
    train: Sequence[GradedInstruction],
    calibration: Sequence[GradedInstruction],
    bench: Sequence[GradedInstruction],
) -> tuple[list[GradedInstruction], list[GradedInstruction], list[GradedInstruction]]:
    """Rubrics cut down to the budgets; calibration keeps every veto (the limit is family-wise)."""
    from promedical.reward_model.instances import cut_rubric
    from promedical.rubric import Tier

    def cut(row: GradedInstruction, budget: int, vetoes: int) -> GradedInstruction:
        return cut_rubric(row, max_criteria=budget, min_veto=vetoes)

    def vetoes_of(row: GradedInstruction) -> int:
        return 0 if row.rubric is None else len(row.rubric.tier(Tier.VETO))

    room = settings.max_criteria - settings.min_veto
    budget = settings.bench_criteria
    return (
        [cut(row, settings.max_criteria, settings.min_veto) for row in train],
        [cut(row, room + vetoes_of(row), vetoes_of(row)) for row in calibration],
        list(bench) if budget is None else [cut(r, budget, settings.bench_veto) for r in bench],
    )


def _take(
    rows: Sequence[GradedInstruction], count: int
) -> tuple[list[GradedInstruction], list[GradedInstruction]]:
    return list(rows[:count]), list(rows[count:])


def _halves(
    by_question: Mapping[str, Sequence[GradedInstruction]],
) -> tuple[list[GradedInstruction], list[GradedInstruction]]:
    """The rows of every other question, in an order that does not depend on the rows' own."""
    questions = sorted(by_question)
    random.Random("halves").shuffle(questions)
    middle = (len(questions) + 1) // 2
    first, second = questions[:middle], questions[middle:]
    return (
        [row for question in first for row in by_question[question]],
        [row for question in second for row in by_question[question]],
    )


def _check_apart(train: Sequence[GradedInstruction], bench: Sequence[GradedInstruction]) -> None:
    _, close = _apart(train, bench)
    if close:
        raise CompareError(f"data: {close} instructions of the training side are on the bench too")


def _apart(
    rows: Sequence[GradedInstruction], bench: Sequence[GradedInstruction]
) -> tuple[list[GradedInstruction], int]:
    """Rows that repeat no text of the bench, and how many do.

    Criteria are not compared: one wording of a criterion may rightly be asked of many questions.
    """
    from promedical.corpus.overlap import LIMITS, Limit, find_overlaps
    from promedical.demo.models import resolve_encoder

    never = Limit(jaccard=math.inf, cosine=math.inf)
    found = find_overlaps(
        rows, bench, encoder=resolve_encoder(), limits={**LIMITS, "criterion": never}
    )
    close = {overlap.first for overlap in found.over}
    return [row for row in rows if row.id not in close], len(close)


# --- judges ---------------------------------------------------------------------------------------


def train_judge(recipe: CompareRecipe, name: str, folder: Path, move: Move) -> dict[str, Any]:
    """Train and calibrate a judge, or look at the checkpoint that the recipe names.

    Args:
        folder: of the run; a judge's checkpoint is in `judges/NAME` there.

    Returns:
        "given" (a checkpoint of the recipe's), what calibration measured, and counts.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        RunError: see `reward_model.run.train_reward_model`.
    """
    from promedical.reward_model.recipe import RewardModelRecipe
    from promedical.reward_model.run import train_reward_model

    settings = recipe.judges
    given: str | None = getattr(settings, name)
    out = folder / "judges" / name
    found: dict[str, Any] = {"given": given is not None}
    if given is None:
        result = train_reward_model(
            RewardModelRecipe(
                model=settings.model,
                data=str(folder / "data" / ("gold" if name == "gold" else "judge")),
                calibration=None if name == "scalar" else str(folder / "data" / "calibration"),
                out=str(out),
                seed=settings.seed + (name == "gold"),
                asks="overall" if name == "scalar" else "criteria",
                without=("veto",) if name == "no_safety_data" else (),
                veto_recall=settings.veto_recall,
                clean_violations=settings.clean_violations,
                train=settings.train,
            ),
            show=_Within(move),
        )
        found |= {
            "measured": _without_bins(result.calibration),
            "counts": result.training["counts"],
            "loss": [result.training["history"][i]["loss"] for i in (0, -1)],
        }
    else:
        judge = load_judge(recipe, name, folder)
        found["measured"] = _without_bins(dict(judge.calibration.measured))
    return found


def load_judge(recipe: CompareRecipe, name: str, folder: Path) -> RubricRewardModel:
    """A judge as the grader that rewards and monitors call."""
    given: str | None = getattr(recipe.judges, name)
    path = str(folder / "judges" / name) if given is None else os.path.expandvars(given)
    return _rubric_model(path, "overall" if name == "scalar" else "criteria")


def _rubric_model(path: str, asks: str) -> RubricRewardModel:
    import torch

    from promedical.reward_model.grade import RubricRewardModel

    return RubricRewardModel.from_pretrained(
        path, device="cuda" if torch.cuda.is_available() else None, asks=asks
    )


def _without_bins(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What calibration measured, less the reliability diagrams."""
    if measured is None:
        return None
    return {key: value for key, value in measured.items() if key != "reliability"}


class _Within(Stages):
    """Shows the stages of a training as steps of one of ours."""

    def __init__(self, move: Move) -> None:
        super().__init__(0)
        self._move = move

    def skipped(self, title: str, seconds: float) -> None:
        self._move(title.lower(), 1, 1)

    @contextmanager
    def stage(self, title: str) -> Iterator[Move]:
        yield lambda what, done, total: self._move(f"{title.lower()}: {what}", done, total)
