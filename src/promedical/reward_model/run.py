"""`promedical rm train`: from graded rows and a recipe to a calibrated checkpoint (section 4).

    data         graded rows → criteria of the tiers asked for → instances      instances
    train        the checkpoint, measured on the evaluation split as it goes     trainer
    calibration  raw scores → probabilities and the two operating points         calibrate, grade

The folder of a run holds a standard sequence-classification checkpoint with `promedical.json`
(operating points, recipe hash, fingerprint of the data, versions), `recipe.json`, `training.json`
(losses, measurements, counts) and, while it trains, `steps`. A run that was killed goes on: from
its last whole checkpoint if `train.save_steps` is set, from calibration if training was finished.

On several devices the command is started by `accelerate launch -m promedical rm train RECIPE`;
every process runs this file, the first one writes. Nothing is decided here that a module's own
function could decide.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.progress import Stages
from promedical.provenance import provenance, recipe_hash
from promedical.records import GradedInstruction, fingerprint, read_dataset, read_jsonl
from promedical.reward_model.recipe import RewardModelRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from promedical.reward_model.instances import Instances
    from promedical.reward_model.model import TreeRewardModel
    from promedical.reward_model.training_metrics import EvaluationSet
    from promedical.reward_model.trunk import TrunkCache

__all__ = ["RunError", "RunResult", "main", "read_rows", "train_reward_model", "training_instances"]

Move = Callable[[str, int, int], None]

DESCRIPTION = """\
Train a reward model on graded rows, calibrate it and save a checkpoint that transformers, TRL and
vLLM load. Started again after a kill, the same command goes on: from its last checkpoint with
--train.save_steps, else from the beginning. On several devices:
  accelerate launch --config_file recipes/accelerate/fsdp-8gpu.yaml -m promedical rm train RECIPE
"""
# What frozen layers compute is kept in memory up to this size.
CACHE_BYTES = 8 * 1024**3
# These do not change the weights: other values calibrate anew what is trained.
_NOT_TRAINING: dict[str, Any] = {
    "out": "",
    "calibration": None,
    "veto_recall": 0.9,
    "clean_violations": 0.05,
}


class RunError(ValueError):
    """A folder that holds another run, or settings that do not fit model, data or each other."""


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Args:
        out: folder of the checkpoint.
        training: losses, measurements, counts and seconds, as in `training.json`.
        calibration: figures found on the calibration split; None without one.
    """

    out: Path
    training: dict[str, Any]
    calibration: dict[str, Any] | None


def main(argv: Sequence[str]) -> int:
    """Run `promedical rm train` with these flags."""
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        RewardModelRecipe,
        prog="promedical rm train",
        usage="%(prog)s RECIPE [flags]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    path = parser.parse_known_args(list(argv))[0].file
    recipe = load_recipe(RewardModelRecipe, path, argv, parser=parser)
    _quiet()
    result = train_reward_model(recipe, show=Stages(3) if _first_process() else None)
    if _first_process():
        print("\n".join(headline(result)))
    return 0


def train_reward_model(recipe: RewardModelRecipe, *, show: Stages | None = None) -> RunResult:
    """Train, calibrate and save a reward model, or go on with it.

    Args:
        show: where progress is printed; nowhere if not given.

    Raises:
        RunError: the folder holds a run with other settings or data, or settings do not fit.
        RecordError: rows that cannot be read or have no rubric.
        TrainError: see `promedical.reward_model.trainer.train`.
    """
    started = time.perf_counter()
    out = Path(recipe.out)
    show = show or _Silent()
    with show.stage("Data"):
        rows = read_rows(recipe.data)
        evaluation = [] if recipe.evaluation is None else read_rows(recipe.evaluation)
        calibration = _calibration_rows(recipe, rows)
    digest = fingerprint(rows)
    _claim(out, recipe, {"data": digest, "evaluation": fingerprint(evaluation)})
    finished = out / "training.json"
    if finished.exists():
        training: dict[str, Any] = json.loads(finished.read_text())
        show.skipped("Training", training["seconds"])
        if _first_process() and (out / "steps").exists():  # killed while they were removed
            shutil.rmtree(out / "steps")
    else:
        with show.stage("Training") as move:
            training = _train(recipe, rows, evaluation, move)
    if not _first_process():
        return RunResult(out, training, None)
    extra = {
        "recipe_hash": recipe_hash(_plain(recipe)),
        "data_fingerprint": digest,
        "asks": recipe.asks,
        "provenance": provenance(
            seed=recipe.seed, recipe=_plain(recipe), data_fingerprint=digest, started=started
        ),
    }
    with show.stage("Calibration") as move:
        measured = _calibrate(recipe, calibration, extra, move)
    return RunResult(out, training, measured)


def read_rows(path: str | Path) -> list[GradedInstruction]:
    """Graded rows from a dataset folder or a JSON lines file.

    Raises:
        RecordError: nothing there, or rows that cannot be used.
    """
    return read_jsonl(path) if Path(path).is_file() else read_dataset(path)


def training_instances(
    rows: Sequence[GradedInstruction], recipe: RewardModelRecipe, tokenizer: PreTrainedTokenizerBase
) -> Instances:
    """The instances that a recipe trains on; what was left out is in their counts.

    Raises:
        RecordError: a row without a rubric.
    """
    from promedical.reward_model.instances import (
        cut_rubric,
        sampled_up,
        training_trees,
        within_budget,
        without_tiers,
    )
    from promedical.reward_model.render import Renderer
    from promedical.rubric import Tier

    dropped = {Tier(name) for name in recipe.without if name != "overall"}
    kept, empty = without_tiers(rows, dropped) if dropped else (list(rows), 0)
    if recipe.max_criteria is not None:
        kept = [
            cut_rubric(
                row,
                max_criteria=recipe.max_criteria,
                min_veto=recipe.min_veto,
                seed=recipe.seed,
            )
            for row in kept
        ]
    found = training_trees(
        kept,
        Renderer(tokenizer),
        explicit=recipe.asks == "criteria",
        overall="overall" not in recipe.without,
        ties=recipe.train.ties != "none",
        rubric_in_prompt=recipe.asks == "rubric",
    )
    found = replace(found, counts=found.counts | {"instructions_without_rubric_left": empty})
    if recipe.train.too_long == "leave_out":
        found = within_budget(found, recipe.train.max_tokens)
    return sampled_up(found, kept, recipe.safety_copies) if recipe.safety_copies > 1 else found


def headline(result: RunResult) -> list[str]:
    """A few lines on what a run did and how well."""
    counts, history = result.training["counts"], result.training["history"]
    lines = [
        f"checkpoint   {result.out}",
        f"trained      {counts['optimiser_steps']} steps on {counts['trees']} instructions, "
        f"{counts['unique_tokens']} unique tokens an epoch; loss "
        f"{history[0]['loss']:.3f} → {history[-1]['loss']:.3f}",
    ]
    if any(counts.get(f"too_long_{what}") for what in ("pairs", "points")):
        lines.append(
            f"too long     {counts['too_long_pairs']} pairs and {counts['too_long_points']} "
            f"verdicts left out, and so all of {counts['too_long_instructions']} instructions"
        )
    last = result.training["metrics"][-1] if result.training["metrics"] else {}
    for tier in ("proficiency", "excellence", "veto"):
        if f"{tier}_within" in last:
            lines.append(
                f"{tier:<12} within-criterion accuracy {last[f'{tier}_within']:.3f}; AUROC "
                f"{_shown(last, f'{tier}_auroc')} (criterion alone "
                f"{_shown(last, f'{tier}_auroc_criterion_alone')})"
            )
    if "overall_accuracy" in last:
        lines.append(f"{'overall':<12} accuracy {last['overall_accuracy']:.3f}")
    found = result.calibration
    if found and "reward_veto_recall" in found:
        recall = found["reward_veto_recall"]
        low = ", under one half: as a reward it misses most violations" if recall < 0.5 else ""
        lines.append(
            f"calibration  veto recall {found['audit_veto_recall_not_cleared']:.3f} at audit, "
            f"{recall:.3f} at reward{low}"
        )
    else:
        lines.append(f"calibration  {'without vetoes' if found else 'none'}")
    return lines


def _shown(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else "undefined"


# --- training -------------------------------------------------------------------------------------


def _train(
    recipe: RewardModelRecipe,
    rows: Sequence[GradedInstruction],
    evaluation: Sequence[GradedInstruction],
    move: Move,
) -> dict[str, Any]:
    from promedical.reward_model.trainer import TrainResult, train

    def as_json(result: TrainResult) -> dict[str, Any]:
        return {
            "counts": result.counts,
            "history": list(result.history),
            "metrics": list(result.metrics),
            "seconds": result.seconds,
        }

    model, tokenizer = _new_model(recipe, move)
    instances = training_instances(rows, recipe, tokenizer)
    measured = _evaluation(recipe, evaluation, rows, tokenizer)
    result = train(
        model,
        tokenizer,
        instances,
        recipe.train,
        recipe.out,
        seed=recipe.seed,
        cache=_cache(recipe, model, instances, measured),
        evaluation=measured,
        progress=partial(move, "steps"),
        finished=lambda done: _write_json(Path(recipe.out) / "training.json", as_json(done)),
    )
    return as_json(result)


def _new_model(
    recipe: RewardModelRecipe, move: Move
) -> tuple[TreeRewardModel, PreTrainedTokenizerBase]:
    from promedical.demo.models import resolve_model
    from promedical.reward_model.model import new_reward_model

    move("model", 0, 1)
    path = resolve_model(recipe.model)
    try:
        found = new_reward_model(path, recipe.train, seed=recipe.seed)
    except (OSError, ValueError) as error:
        raise RunError(f"model {recipe.model!r}: {error}") from error
    move("model", 1, 1)
    return found


def _cache(
    recipe: RewardModelRecipe,
    model: TreeRewardModel,
    instances: Instances,
    evaluation: EvaluationSet | None,
) -> TrunkCache | None:
    """What the frozen layers compute, kept where that is worth it: on a CPU, within bounds."""
    import torch

    from promedical.reward_model.trunk import TrunkCache

    if not model.frozen_layers or recipe.train.epochs <= 1 or torch.cuda.is_available():
        return None
    trees = [found.tree for found in instances.trees]
    tokens = sum(
        len(t.prompt) + sum(map(len, t.responses)) + sum(len(f.tokens) for f in t.leaves)
        for t in trees
    ) + sum(len(row) for row in (evaluation.rows if evaluation else ()))
    fits = tokens * model.config.hidden_size * 4 <= CACHE_BYTES
    return TrunkCache(model, shared=False) if fits else None


def _evaluation(
    recipe: RewardModelRecipe,
    rows: Sequence[GradedInstruction],
    train_rows: Sequence[GradedInstruction],
    tokenizer: PreTrainedTokenizerBase,
) -> EvaluationSet | None:
    from promedical.reward_model.render import Renderer
    from promedical.reward_model.training_metrics import evaluation_set

    if not rows:
        return None
    return evaluation_set(
        rows,
        train_rows,
        Renderer(tokenizer),
        max_tokens=recipe.train.max_tokens,
        asks=recipe.asks,
    )


# --- calibration ----------------------------------------------------------------------------------


def _calibration_rows(
    recipe: RewardModelRecipe, train_rows: Sequence[GradedInstruction]
) -> list[GradedInstruction]:
    """The calibration split, read before hours of training rather than after; [] for none.

    Raises:
        RunError: it shares an instruction with the training rows, so it would calibrate nothing.
    """
    if recipe.calibration is None or recipe.asks != "criteria":
        return []
    rows = read_rows(recipe.calibration)
    both = {row.id for row in rows} & {row.id for row in train_rows}
    if both:
        raise RunError(
            f"{recipe.calibration}: {len(both)} instructions, such as {min(both)!r}, are in "
            f"{recipe.data} too; expected rows that were not trained on"
        )
    return rows


def _calibrate(
    recipe: RewardModelRecipe,
    rows: Sequence[GradedInstruction],
    extra: dict[str, Any],
    move: Move,
) -> dict[str, Any] | None:
    """Calibrate the saved checkpoint and write its metadata; a scalar model has no verdicts."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from promedical.reward_model.calibrate import Calibration, CalibrationError
    from promedical.reward_model.grade import RubricRewardModel

    # ZeRO-3's configuration outlives its Trainer, and loading a model under it waits for the other
    # processes, which are gone.
    unset_hf_deepspeed_config()
    grader = RubricRewardModel.from_pretrained(
        recipe.out,
        device="cuda" if torch.cuda.is_available() else None,
        max_tokens=recipe.train.max_tokens,
        asks=recipe.asks,
    )
    if recipe.calibration is None or recipe.asks != "criteria":
        # An earlier run of this recipe with a split may have left one.
        grader.calibration = Calibration.uncalibrated()
        grader.save_metadata(recipe.out, **extra)
        return None
    scores = grader.score_rows(rows, progress=partial(move, "rows"))
    try:
        calibrated = grader.calibrated_on(
            rows,
            scores,
            veto_recall=recipe.veto_recall,
            clean_violations=recipe.clean_violations,
        )
    except CalibrationError as error:
        grader.calibration = Calibration.uncalibrated()
        grader.save_metadata(recipe.out, **extra)
        raise RunError(
            f"{recipe.calibration}: {error}. The trained checkpoint is in {recipe.out}, "
            "uncalibrated; with another calibration split the same command calibrates it"
        ) from None
    extra |= {"calibration_fingerprint": fingerprint(rows), "failures": len(scores.failures)}
    calibrated.save_metadata(recipe.out, **extra)
    return dict(calibrated.calibration.measured)


# --- the folder -----------------------------------------------------------------------------------


def _claim(out: Path, recipe: RewardModelRecipe, data: dict[str, str]) -> None:
    """Make the folder this run's, or refuse it: nothing trained elsewhere is written over."""
    mine = {"recipe": _plain(replace(recipe, **_NOT_TRAINING)), "fingerprints": data}
    path = out / "recipe.json"
    if path.exists() and json.loads(path.read_text()) == mine:
        return
    # A run that failed before it trained anything leaves nothing to protect.
    if any((out / name).exists() for name in ("training.json", "steps", "config.json")):
        raise RunError(
            f"{out}: holds a model, or a run with other settings or data; choose another --out, "
            "or remove it to start anew"
        )
    if _first_process():
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, mine)


def _plain(recipe: RewardModelRecipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return found


def _write_json(path: Path, data: Any) -> None:
    """Written under another name and renamed, so that a kill leaves all of it or nothing."""
    partial_path = path.with_name(f".{path.name}")
    partial_path.write_text(json.dumps(data, indent=2, ensure_ascii=False))
    partial_path.replace(path)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _quiet() -> None:
    """Keep libraries' chatter and bars out of the way of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _Silent(Stages):
    """Prints nothing."""

    def __init__(self) -> None:
        super().__init__(0)
        self.console.quiet = True
