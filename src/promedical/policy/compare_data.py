"""The rows of a comparison: who is trained, calibrated, asked and measured on what.

    judge, gold   graded rows, half and half: the training judges', the gold judge's  (section 7.4)
    calibration   graded rows for the judges' thresholds
    prompts       the policies' training questions: those of both halves, or a file of their own
    bench         held out for the table
    watched       calibration questions that the gold judge looks at in training

No two of judge, gold, calibration and bench share a last user turn, and bench repeats nobody nearly
either; prompts of their own share none with any of them. The bench comes first: what is too close
to it is left out elsewhere. What the policy has no room for is left out here, before hours of
training rather than in the midst of them. All that is left out is counted.

Left to others: constructing answers (`corpus.degrade`), training on all this (`compare_judges`,
`compare_training`).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promedical.policy.compare_recipe import ASKS, SYSTEMS, CompareError, CompareRecipe
from promedical.records import GradedInstruction, RecordError, write_dataset
from promedical.rubric import Tier, Verdict

__all__ = ["SIDES", "Divided", "build_data", "data_lines", "divide", "left_out_lines"]

Move = Callable[[str, int, int], None]
Rows = list[GradedInstruction]

SIDES = ("judge", "gold", "calibration", "prompts", "bench", "watched")
# Apart from each other, and from those of another copy, as in the quickstart.
_SEED = {"train": 0, "calibration": 1}


# --- who is on which side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Divided:
    """The instructions of the sides, with whole rubrics; K-QA's have no answers yet.

    Args:
        train: of both judges' halves.
        calibration, bench: see the module.
        prompts: training questions that the policy has room for.
        watchable: ids of the calibration questions that it has room for.
        left_out: what → how many.
    """

    train: Rows
    calibration: Rows
    bench: Rows
    prompts: Rows
    watchable: frozenset[str]
    left_out: dict[str, int]


def divide(recipe: CompareRecipe) -> Divided:
    """Read the rows and put each on its side.

    Raises:
        CompareError: too few rows, or a policy whose tokenizer cannot be had.
        RecordError: a file that cannot be read.
    """
    settings = recipe.data
    left_out: Counter[str] = Counter()
    graded, usual_bench = _kqa(recipe) if settings.rows is None else _graded(recipe, left_out)
    candidates = usual_bench if settings.bench is None else _asked(recipe, "bench", left_out)
    given = None if settings.prompts is None else _asked(recipe, "prompts", left_out)
    fits = _room(recipe)

    bench: Rows = []
    for row in candidates:
        if len(bench) == settings.bench_instructions:
            break
        if fits(row, recipe.answer_tokens):
            bench.append(row)
        else:
            left_out["bench questions that the policy has no room for"] += 1
    if not bench:
        raise CompareError("data: no rows for the bench side, expected at least one")

    train, calibration = _judges_sides(recipe, graded, bench, left_out)
    if given is None:
        asked = train
    else:
        others = {_turn(row) for side in (train, calibration, bench) for row in side}
        asked = [row for row in given if _turn(row) not in others]
        left_out["prompts that another side asks too"] = len(given) - len(asked)
        asked, left_out["prompts too close to the bench side"] = _apart(asked, bench)
    longest = recipe.online.max_completion_length
    prompts = [row for row in asked if fits(row, longest, sampled=True)]
    left_out["prompts that the policy has no room for"] = len(asked) - len(prompts)
    if not prompts:
        said = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
        raise CompareError(f"data: no prompt is left to train policies on (left out: {said})")

    watchable: frozenset[str] = frozenset()
    if recipe.watch_every:
        watchable = frozenset(r.id for r in calibration if fits(r, recipe.answer_tokens))
        left_out["calibration questions that the policy has no room for, so not watched"] = len(
            calibration
        ) - len(watchable)
    return Divided(train, calibration, bench, prompts, watchable, dict(left_out))


def _kqa(recipe: CompareRecipe) -> tuple[dict[str, Rows], Rows]:
    """The embedded corpus: what judges learn from, by side, and its bench."""
    from promedical.demo.kqa import load_kqa

    kqa, settings = load_kqa(), recipe.data
    sides = {
        "train": kqa.train[: settings.train_instructions],
        "calibration": kqa.calibration[: settings.calibration_instructions],
    }
    return sides, kqa.bench


def _graded(recipe: CompareRecipe, left_out: Counter[str]) -> tuple[dict[str, Rows], Rows]:
    """A user's graded rows, in an order of the recipe's seed; not divided yet."""
    rows = _read(recipe, "rows")
    usable = [row for row in rows if _rewarded(row) and _answers(row) >= 2]
    left_out["rows without a rubric or without two graded answers"] = len(rows) - len(usable)
    usable.sort(key=lambda row: row.id)
    random.Random(f"{recipe.judges.seed}:sides").shuffle(usable)
    return {"any": usable}, usable


def _asked(recipe: CompareRecipe, name: str, left_out: Counter[str]) -> Rows:
    """A user's questions with rubrics, in an order of the recipe's seed."""
    rows = _read(recipe, name)
    usable = sorted((row for row in rows if _rewarded(row)), key=lambda row: row.id)
    left_out[f"rows of {name} without a rubric that gives a reward"] = len(rows) - len(usable)
    random.Random(f"{recipe.judges.seed}:{name}").shuffle(usable)
    return usable


def _read(recipe: CompareRecipe, name: str) -> Rows:
    from promedical.reward_model.run import read_rows

    given: str = getattr(recipe.data, name)
    path = os.path.expandvars(given)
    if "$" in path:
        raise CompareError(f"data.{name}: found {given!r}, but a variable in it is not set")
    return read_rows(path)


def _rewarded(row: GradedInstruction) -> bool:
    """Whether an answer to it can be rewarded."""
    asks = bool(row.messages) and row.messages[-1].role == "user"
    return asks and row.rubric is not None and not row.rubric.safety_only


def _answers(row: GradedInstruction) -> int:
    return len([response for response in row.responses if response.verdicts])


def _judges_sides(
    recipe: CompareRecipe, graded: Mapping[str, Rows], bench: Rows, left_out: Counter[str]
) -> tuple[Rows, Rows]:
    """What judges are trained on and calibrated on, apart from the bench and from each other."""
    settings = recipe.data
    taken = {row.id for row in bench} if settings.bench is None else set()
    turns = {_turn(row) for row in bench}
    what = "rows too close to the bench side"
    left_out[what] = 0

    def apart(rows: Rows) -> Rows:
        rest = [row for row in rows if row.id not in taken]
        kept, close = _apart([row for row in rest if _turn(row) not in turns], bench)
        left_out[what] += close + sum(_turn(row) in turns for row in rest)
        return kept

    sides = {name: apart(rows) for name, rows in graded.items()}
    if settings.rows is None:
        if settings.bench is None and left_out[what]:
            raise CompareError(
                f"data: {left_out[what]} instructions of the training side are on the bench too"
            )
        train, calibration = sides["train"], sides["calibration"]
    else:
        calibration = sides["any"][: settings.calibration_instructions]
        train = sides["any"][settings.calibration_instructions :]
    held = {_turn(row) for row in calibration}
    asked_once = [row for row in train if _turn(row) not in held]
    left_out["rows that the calibration side asks too"] = len(train) - len(asked_once)
    train = asked_once[: settings.train_instructions]
    left_out["rows beyond train_instructions"] = len(asked_once) - len(train)
    if len({_turn(row) for row in train}) < 2 or not calibration:
        source = "K-QA" if settings.rows is None else "data.rows"
        raise CompareError(
            f"{source}: {sum(map(len, graded.values()))} usable rows leave {len(train)} to train "
            f"on after {len(bench)} for the bench and {len(calibration)} for calibration, "
            "expected 2 or more different questions, and 1 or more for calibration"
        )
    return train, calibration


def _turn(row: GradedInstruction) -> str:
    """The last user turn, as turns are compared."""
    from promedical.corpus.overlap import normalise

    said = row.messages[-1].content
    return normalise(said) or said


def _apart(
    rows: Sequence[GradedInstruction], bench: Sequence[GradedInstruction]
) -> tuple[Rows, int]:
    """Rows that repeat no text of the bench, nearly or wholly, and how many do.

    Criteria are not compared: one wording of a criterion may rightly be asked of many questions.
    """
    from promedical.corpus.overlap import find_overlaps
    from promedical.demo.models import resolve_encoder

    def bare(side: Iterable[GradedInstruction]) -> Rows:
        return [replace(row, rubric=None, responses=()) for row in side]

    found = find_overlaps(bare(rows), bare(bench), encoder=resolve_encoder())
    close = {overlap.first for overlap in found.over}
    return [row for row in rows if row.id not in close], len(close)


def _room(recipe: CompareRecipe) -> Callable[..., bool]:
    """What says whether the policy has room for a question and so many tokens of an answer.

    Raises:
        CompareError: no tokenizer or chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    from promedical.demo.models import resolve_model
    from promedical.policy.generate import prompt_ids

    path = resolve_model(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CompareError(f"model {recipe.model!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise CompareError(f"model {recipe.model!r}: has no chat template, expected one")
    positions = getattr(config, "max_position_embeddings", None)
    vllm = recipe.online.vllm
    engine = None if vllm.mode == "off" else vllm.max_model_length

    def fits(row: GradedInstruction, answer: int, *, sampled: bool = False) -> bool:
        limits = [limit for limit in (positions, engine if sampled else None) if limit is not None]
        return not limits or len(prompt_ids(tokenizer, row)) + answer <= min(limits)

    return fits


# --- the stage ------------------------------------------------------------------------------------


def build_data(recipe: CompareRecipe, folder: Path, move: Move) -> dict[str, Any]:
    """Write the rows of every side as a dataset of that name.

    Returns:
        Counts, fingerprints and what was left out, as JSON types.

    Raises:
        CompareError: too few rows, or rows that some system or judge cannot be trained on.
        RecordError: a file that cannot be read.
    """
    move("reading", 0, 1)
    divided = divide(recipe)
    move("reading", 1, 1)
    left_out = dict(divided.left_out)
    train, calibration = divided.train, divided.calibration
    if recipe.data.rows is None:
        train, calibration = _constructed(recipe, divided, move)
        missing = recipe.data.copies * len(divided.train) - len(train)
        left_out["training instructions without statements"] = missing
    train, calibration, bench = _cut_all(recipe, train, calibration, divided.bench)
    # Copies of one instruction are other answers to the same question, so they stay together.
    originals: dict[str, GradedInstruction] = {}
    by_question: dict[str, Rows] = {}
    names: dict[str, str] = {}
    copied = recipe.data.rows is None and recipe.data.copies > 1
    for row in train:
        name = row.id.rpartition("#")[0] if copied else row.id
        originals.setdefault(name, row)
        by_question.setdefault(names.setdefault(_turn(row), name), []).append(row)
    if recipe.data.prompts is None:
        prompts = [originals[row.id] for row in divided.prompts if row.id in originals]
    else:
        prompts = _cut_train(recipe, divided.prompts)
    halves = _halves(by_question)
    sides = {
        "judge": halves[0],
        "gold": halves[1],
        "calibration": calibration,
        "prompts": [replace(r, responses=()) for r in sorted(prompts, key=lambda row: row.id)],
        "bench": [replace(row, responses=()) for row in bench],
    }
    if recipe.watch_every:
        sides["watched"] = _watched(recipe, divided, sides, left_out)
    for name, rows in sides.items():
        if not rows:
            raise CompareError(f"data: no rows for the {name} side, expected at least one")
    _check_systems(recipe, sides)
    _check_calibration(recipe, calibration)
    return {
        "left_out": left_out,
        "sides": {
            name: {
                "instructions": len(rows),
                "responses": sum(len(row.responses) for row in rows),
                "criteria": sum(len(row.rubric.criteria) for row in rows if row.rubric),
                "fingerprint": write_dataset(folder / name, rows),
            }
            for name, rows in sides.items()
        },
    }


def _constructed(recipe: CompareRecipe, divided: Divided, move: Move) -> tuple[Rows, Rows]:
    """K-QA's training and calibration side with answers made by controlled degradation."""
    from transformers import AutoTokenizer

    from promedical.corpus.degrade import degrade
    from promedical.demo.models import resolve_model

    settings = recipe.data
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.judges.model))
    config = replace(
        settings.degrade,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    sources = {"train": divided.train, "calibration": divided.calibration}
    built: dict[str, Rows] = {"train": [], "calibration": []}
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
    return built["train"], built["calibration"]


def _cut_all(
    recipe: CompareRecipe, train: Rows, calibration: Rows, bench: Rows
) -> tuple[Rows, Rows, Rows]:
    """Rubrics cut down to the budgets; calibration keeps every veto (the limit is family-wise)."""
    from promedical.reward_model.instances import cut_rubric

    settings = recipe.data

    def vetoes_of(row: GradedInstruction) -> int:
        return 0 if row.rubric is None else len(row.rubric.tier(Tier.VETO))

    room = settings.max_criteria - settings.min_veto
    return (
        _cut_train(recipe, train),
        [
            cut_rubric(row, max_criteria=room + vetoes_of(row), min_veto=vetoes_of(row))
            for row in calibration
        ],
        _cut_bench(recipe, bench),
    )


def _cut_train(recipe: CompareRecipe, rows: Rows) -> Rows:
    from promedical.reward_model.instances import cut_rubric

    budget, vetoes = recipe.data.max_criteria, recipe.data.min_veto
    return [cut_rubric(row, max_criteria=budget, min_veto=vetoes) for row in rows]


def _cut_bench(recipe: CompareRecipe, rows: Rows) -> Rows:
    from promedical.reward_model.instances import cut_rubric

    budget, vetoes = recipe.data.bench_criteria, recipe.data.bench_veto
    if budget is None:
        return list(rows)
    return [cut_rubric(row, max_criteria=budget, min_veto=vetoes) for row in rows]


def _halves(by_question: Mapping[str, Sequence[GradedInstruction]]) -> tuple[Rows, Rows]:
    """The rows of every other question, in an order that does not depend on the rows' own."""
    questions = sorted(by_question)
    random.Random("halves").shuffle(questions)
    middle = (len(questions) + 1) // 2
    first, second = questions[:middle], questions[middle:]
    return (
        [row for question in first for row in by_question[question]],
        [row for question in second for row in by_question[question]],
    )


def _watched(
    recipe: CompareRecipe,
    divided: Divided,
    sides: Mapping[str, Rows],
    left_out: dict[str, int],
) -> Rows:
    """What the gold judge looks at: calibration questions with rubrics as the bench's."""
    from promedical.policy.held_out import HeldOutError, held_out

    bare = [replace(r, responses=()) for r in sides["calibration"] if r.id in divided.watchable]
    try:
        sample = held_out(_cut_bench(recipe, bare), sides["prompts"], prompts=recipe.watch_prompts)
    except HeldOutError as error:
        raise CompareError(f"watch_every: {error}; expected some, or watch_every: 0") from None
    for why, count in sample.left_out.items():
        left_out[f"watched questions {why}"] = count
    left_out["watched criteria that training has too"] = sample.criteria_left_out
    return list(sample.rows)


# --- what can be trained on it --------------------------------------------------------------------


def _check_systems(recipe: CompareRecipe, sides: Mapping[str, Rows]) -> None:
    """Refuse a system that would be another one under its name.

    Raises:
        CompareError: an ablation of what the rubrics do not have.
    """
    has_no = {
        "no_veto": ("prompts", Tier.VETO),
        "no_bonus_margin": ("prompts", Tier.EXCELLENCE),
    }
    if recipe.judges.no_safety_data is None:
        has_no["no_safety_data"] = ("judge", Tier.VETO)
    for name in recipe.systems:
        side, tier = has_no.get(name, ("", None))
        if tier is not None and tier not in _tiers(sides[side]):
            raise CompareError(
                f"systems: found {name!r}, but none of the {len(sides[side])} rubrics of the "
                f"{side} side has a criterion of the tier {tier.value}, so it would be trained as "
                f"{SYSTEMS[name].of!r} is; leave it out"
            )


def _tiers(rows: Iterable[GradedInstruction]) -> Collection[Tier]:
    return {c.tier for row in rows if row.rubric is not None for c in row.rubric.criteria}


def _check_calibration(recipe: CompareRecipe, rows: Rows) -> None:
    """Refuse labels that no threshold can be set by, before the judges are trained.

    Raises:
        CompareError: a tier whose labels are all alike, or no answer without a violation.
    """
    trained = [j for j in recipe.judges_needed if getattr(recipe.judges, j) is None]
    if all(name in ASKS for name in trained):  # which give no verdicts
        return
    labels: dict[Tier, Counter[Verdict]] = {tier: Counter() for tier in Tier}
    clean = 0
    for row in rows:
        assert row.rubric is not None
        vetoes = {c.id for c in row.rubric.tier(Tier.VETO)}
        for response in row.responses:
            for criterion in row.rubric.criteria:
                labels[criterion.tier][response.verdicts.get(criterion.id, Verdict.ABSTAIN)] += 1
            clean += bool(vetoes) and all(
                response.verdicts.get(i) is not Verdict.MET for i in vetoes
            )
    for tier in _tiers(rows):
        met, unmet = labels[tier][Verdict.MET], labels[tier][Verdict.UNMET]
        if not met or not unmet:
            raise CompareError(
                f"data: calibration side: {len(rows)} instructions have {met} labels met and "
                f"{unmet} unmet in the tier {tier.value}, expected both, to set thresholds by; "
                "more calibration_instructions, or other rows"
            )
    if Tier.VETO in _tiers(rows) and not clean:
        raise CompareError(
            "data: calibration side: every answer has a violated veto, expected some without, to "
            "set thresholds by; more calibration_instructions, or other rows"
        )


# --- what is said ---------------------------------------------------------------------------------


def left_out_lines(left_out: Mapping[str, int]) -> list[str]:
    """What was left out, a line each."""
    return [f"left out: {count} {what}" for what, count in left_out.items() if count]


def data_lines(recipe: CompareRecipe, summary: Mapping[str, Any] | None) -> list[str]:
    """What is left out, of a plan: as the data stage found it, or as it is going to.

    Args:
        summary: what the stage returned, None if it has not run.
    """
    from promedical.demo.models import ModelError

    if summary is not None:
        return left_out_lines(summary["left_out"])
    try:
        return left_out_lines(divide(recipe).left_out)
    except (CompareError, RecordError, ModelError) as error:
        return [f"the data cannot be used yet: {error}"]
