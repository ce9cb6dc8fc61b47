"""Does explicit criteria injection work on real graded answers? Systems trained on one subset.

    GRADED_DATA=… python benchmarks/healthbench.py --dry-run      # tokens and minutes, nothing run
    GRADED_DATA=… python benchmarks/healthbench.py --systems explicit,scalar --seeds 0

The file (`--data`, else $GRADED_DATA or healthbench_graded.jsonl.gz in that folder) has the form
that `corpus.sources.healthbench_graded` reads. It is the user's: results hold figures only, no
text and no id.

The subset is chosen without looking at a label, and is the same for every system: instructions in
the order of a hash, of each the first --responses answers (in the order of a hash) that take at
most --max-tokens tokens together with the conversation; an instruction with fewer than two is left
out. Training rubrics are cut to --max-criteria, criteria on which the answers differ first, since
only they give pairs. Calibration and test rubrics are asked whole.

Each (system, seed) leaves one JSON of scores in --work and is not run again; the figures are made
of all that are there. A finished run is resumed by the same command, a longer list of systems or
seeds adds to it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from healthbench_figures import seed_means, targets
from healthbench_subset import CALIBRATION, TEST, ExperimentError, Subset, subset, token_lengths
from transformers.utils import logging as transformers_logging

from promedical.bench.baselines import null_graders
from promedical.bench.evaluate import GraderScores, evaluate
from promedical.corpus.sources.healthbench_graded import (
    read_healthbench_graded,
    split,
    without_omissions,
)
from promedical.provenance import code_state, portable, provenance, recipe_hash
from promedical.records import GradedInstruction, RecordError, fingerprint
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.instances import (
    Asks,
    Instances,
    overall_question,
    training_trees,
    without_tiers,
)
from promedical.reward_model.loss import pack_training_trees
from promedical.reward_model.model import TreeRewardModel, new_reward_model
from promedical.reward_model.render import Renderer
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.trainer import train
from promedical.reward_model.tree import pack
from promedical.reward_model.trunk import TrunkCache
from promedical.rubric import Criterion, Rubric, Tier

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "healthbench.json"
FILE = "healthbench_graded.jsonl.gz"


@dataclass(frozen=True)
class System:
    """One row of the table: how it is trained, and on which of the rows' criteria.

    Args:
        says: the row's label.
        asks: criteria (and the overall preference), the overall preference alone, or that with the
            whole rubric in the prompt.
        head: initialisation of the head.
        mu: weight of the pointwise term; 0 leaves the pairwise one, still a mean over criteria with
            the tiers' weights.
        trained: False for the language model as it comes.
        rows: training criteria left out, in the rubric and in the overall preference alike.
        share: of the training instructions, the first ones: points of the learning curve.
    """

    says: str
    asks: Asks = "criteria"
    head: Literal["yes_no", "random"] = "yes_no"
    mu: float = 1.0
    trained: bool = True
    rows: Literal["all", "no_veto", "no_omissions"] = "all"
    share: float = 1.0


SYSTEMS = {
    "explicit": System("explicit criteria, pairwise + pointwise"),
    "scalar": System("scalar: overall preference only", asks="overall"),
    "scalar_rubric": System("scalar, the rubric in its prompt", asks="rubric"),
    "untrained": System("explicit criteria, untrained", trained=False),
    "no_safety": System("explicit criteria, no veto in training", rows="no_veto"),
    "no_omissions": System("explicit criteria, no omissions in training", rows="no_omissions"),
    "random_head": System("explicit criteria, head from noise", head="random"),
    "pairwise": System("explicit criteria, pairwise only", mu=0.0),
    "quarter": System("explicit criteria, a quarter of the instructions", share=0.25),
    "half": System("explicit criteria, half of the instructions", share=0.5),
}


def training_rows(system: System, rows: Sequence[GradedInstruction]) -> list[GradedInstruction]:
    """The system's share of the rows, with only the criteria that it is trained on."""
    rows = rows[: math.ceil(system.share * len(rows))]
    if system.rows == "no_omissions":
        return without_omissions(rows)[0]
    if system.rows == "no_veto":
        return without_tiers(rows, {Tier.VETO})[0]
    return list(rows)


# --- running -------------------------------------------------------------------------------------


def instances_of(
    system: System, rows: Sequence[GradedInstruction], renderer: Renderer
) -> Instances:
    """Training trees of the system."""
    return training_trees(
        training_rows(system, rows),
        renderer,
        explicit=system.asks == "criteria",
        rubric_in_prompt=system.asks == "rubric",
    )


def asked_the_rubric(rows: Sequence[GradedInstruction]) -> list[GradedInstruction]:
    """Rows whose one criterion is the overall question with the whole rubric in it."""

    def only(row: GradedInstruction) -> Rubric:
        question = overall_question(row, "rubric")
        return Rubric((Criterion("overall", Tier.PROFICIENCY, question, 1.0),))

    return [
        replace(
            row,
            rubric=only(row),
            responses=tuple(replace(r, verdicts={}) for r in row.responses),
        )
        for row in rows
    ]


def settings_of(system: System, options: argparse.Namespace) -> TrainSettings:
    """How the system is trained; all but head and loss is the same for all."""
    return TrainSettings(
        head_init=system.head,
        mu=system.mu,
        frozen_layers=options.frozen_layers,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_trees=options.batch_trees,
        max_tokens=options.row_tokens,
        dtype=options.dtype,
    )


def run_system(
    system: System,
    seed: int,
    data: Subset,
    options: argparse.Namespace,
    model_path: Path | str,
    cache: TrunkCache | None,
    out: Path,
) -> dict[str, Any]:
    """Train a system, score calibration and test rows, and forget the weights.

    Returns:
        "criteria" and "overall" scores as lists, counts, seconds and losses.
    """
    settings = settings_of(system, options)
    model, tokenizer = new_reward_model(model_path, settings, seed=seed)
    found: dict[str, Any] = {"train": None}
    if system.trained:
        instances = instances_of(system, data.train, Renderer(tokenizer))
        folder = out.with_suffix("")
        result = train(
            model,
            tokenizer,
            instances,
            settings,
            folder,
            seed=seed,
            cache=cache,
            progress=_progress(f"{out.stem}: step"),
        )
        shutil.rmtree(folder, ignore_errors=True)  # scores are what is kept
        found["train"] = {
            "counts": result.counts,
            "seconds": result.seconds,
            "loss": [row["loss"] for row in result.history],
        }
    if torch.cuda.is_available():
        model.to("cuda")
    started = time.perf_counter()
    grader = RubricRewardModel(model, tokenizer, max_tokens=options.row_tokens, cache=cache)
    whole = system.asks == "rubric"
    scored = grader.score_rows(
        asked_the_rubric(data.held) if whole else data.held,
        criteria=system.asks != "overall",
        overall=not whole,
        progress=_progress(f"{out.stem}: scored"),
    )
    criteria = [[*key, s] for key, s in scored.criteria.items()]
    return found | {
        "criteria": [] if whole else criteria,
        "overall": [[i, r, s] for i, r, _, s in criteria]
        if whole
        else [[*key, s] for key, s in scored.overall.items()],
        "failures": len(scored.failures),
        "emptied": scored.emptied,
        "scored_tokens": scored.tokens,
        "score_seconds": time.perf_counter() - started,
    }


def _progress(what: str) -> Callable[[int, int], None]:
    said = [0.0]

    def tell(done: int, of: int) -> None:
        if time.monotonic() - said[0] > 20 or done == of:
            said[0] = time.monotonic()
            print(f"  {what} {done}/{of}", flush=True)

    return tell


def _write(path: Path, data: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def grader_scores(stored: Mapping[str, Any]) -> GraderScores:
    """What `run_system` left, for `bench.evaluate`; a failed judgment stays unscored."""
    criteria = {(i, r, c): s for i, r, c, s in stored["criteria"]}
    return GraderScores(criteria or None, {(i, r): s for i, r, s in stored["overall"]})


# --- the estimate --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Tokens a second: frozen layers, one training pass and one scoring pass of the others."""

    trunk: float
    train: float
    score: float


def measured_rates(model: TreeRewardModel, instances: Instances, max_tokens: int) -> Rates:
    """Rates on this machine, on the packed row of middling length among the first few trees."""
    trees = [tree.tree for tree in instances.trees[:9]]
    rows = sorted(pack(trees, max_tokens), key=len)
    row = rows[len(rows) // 2]
    hidden = None

    def seconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def rate(work: Callable[[], Any]) -> float:
        seconds(work)
        return len(row) / seconds(work)

    trunk = float("inf")
    if model.frozen_layers:
        hidden = model.trunk(row)
        trunk = rate(lambda: model.trunk(row))

    def step() -> None:
        model.score(row, hidden).sum().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    def score() -> None:
        with torch.inference_mode():
            model.score(row, hidden)

    return Rates(trunk, rate(step), rate(score))


def estimate(
    runs: Sequence[tuple[str, int]],
    data: Subset,
    options: argparse.Namespace,
    renderer: Renderer,
    model: TreeRewardModel,
) -> dict[str, Any]:
    """Unique tokens and minutes of every run (system, seed), before anything is run.

    Trunk tokens are counted once for all systems, since their frozen layers are the same.
    """

    def scored_tokens(asks: Asks) -> int:
        trees = []
        for row in data.held:
            assert row.rubric is not None
            texts = [c.text for c in row.rubric.criteria] if asks == "criteria" else []
            texts.append(overall_question(row, asks))
            leaves = [(r, text) for r in range(len(row.responses)) for text in texts]
            trees.append(renderer.tree(row.messages, [y.text for y in row.responses], leaves))
        return sum(len(row) for row in pack(trees, options.row_tokens))

    of_asks = {asks: scored_tokens(asks) for asks in get_args(Asks)}
    tokens: dict[str, int] = {}
    first: Instances | None = None
    names = list(dict.fromkeys(name for name, _ in runs))
    for name in names:
        system = SYSTEMS[name]
        instances = instances_of(system, data.train, renderer)
        first = instances if first is None else first
        rows, _ = pack_training_trees(instances.trees, options.row_tokens, mu=system.mu)
        tokens[name] = sum(len(row.row) for row in rows) if system.trained else 0
    assert first is not None
    rates = measured_rates(model, first, options.row_tokens)
    # The answers are in all of them; only a rubric in the prompt is read by the trunk anew.
    asked = {SYSTEMS[name].asks for name in names}
    trunk_tokens = max(tokens.values()) + max(of_asks[a] for a in asked - {"rubric"} or asked)
    if "rubric" in asked and len(asked) > 1:
        trunk_tokens += tokens["scalar_rubric"] + of_asks["rubric"]
    minutes = {}
    for name in names:
        scored = of_asks[SYSTEMS[name].asks] / rates.score
        seconds = tokens[name] * options.epochs / rates.train + scored
        minutes[name] = round(seconds / 60, 1)
    frozen = trunk_tokens / rates.trunk / 60
    return {
        "train_tokens_an_epoch": tokens,
        "scored_tokens": of_asks,
        "tokens_a_second": {k: round(v) for k, v in asdict(rates).items() if np.isfinite(v)},
        "minutes_a_seed": minutes,
        "minutes_frozen_layers_once": round(frozen, 1),
        "minutes_in_all": round(frozen + sum(minutes[name] for name, _ in runs), 1),
    }


# --- results -------------------------------------------------------------------------------------


def nulls(data: Subset, everything: Sequence[GradedInstruction], encoder: Any) -> dict[str, Any]:
    """Null graders fitted on the subset's training rows; `*_all` on every training answer."""
    graders = dict(null_graders(data.train, data.held, encoder=encoder))
    whole = null_graders(everything, data.held)
    for name in ("criterion_alone", "response_alone"):
        graders[f"{name}_all"] = whole[name]
    return graders


def without_bins(table: Any) -> Any:
    """A table of `bench.evaluate` without the reliability diagrams' bins."""
    if isinstance(table, dict):
        return {key: without_bins(value) for key, value in table.items() if key != "bins"}
    return table


def figures(
    data: Subset,
    stored: Mapping[str, Mapping[int, Mapping[str, Any]]],
    null: Mapping[str, GraderScores],
    resamples: int,
) -> dict[str, Any]:
    """Tables of every seed and of the seeds' means."""
    reference = "explicit" if "explicit" in stored else next(iter(stored))
    by_seed = {}
    for seed in sorted({seed for seeds in stored.values() for seed in seeds}):
        graders = {n: grader_scores(s[seed]) for n, s in stored.items() if seed in s}
        if reference in graders:
            by_seed[str(seed)] = without_bins(
                evaluate(
                    data.test,
                    data.calibration,
                    {**graders, **null},
                    reference=reference,
                    resamples=resamples,
                )
            )
    every = {n: [grader_scores(s) for s in seeds.values()] for n, seeds in stored.items()}
    every |= {name: [grader] for name, grader in null.items()}
    means = seed_means(data.test, data.calibration, every, reference, resamples=resamples)
    return {
        "reference": reference,
        "means": means,
        "targets": targets(means, reference),
        "seeds": by_seed,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="the file; by default what $GRADED_DATA names")
    add("--model", default="embedded", help="embedded, a folder or a Hub id")
    add("--encoder", choices=("embedded", "none"), default="embedded", help="of one null grader")
    add("--systems", default="explicit,scalar", help=f"some of {','.join(SYSTEMS)}, or all")
    add("--seeds", default="0", help="of training, with commas")
    add("--once", default="", help="those of --systems that are trained with the first seed only")
    add("--split-seed", type=int, default=0)
    add("--instructions", type=int, default=160, help="to train on; 0 for all that fit")
    add("--calibration-instructions", type=int, default=40, help="0 for all that fit")
    add("--test-instructions", type=int, default=110, help="0 for all that fit")
    add("--responses", type=int, default=3, help="of each instruction at most; 0 for all")
    add("--max-tokens", type=int, default=400, help="of a conversation and one answer")
    add("--max-criteria", type=int, default=6, help="of a training rubric; 0 for all")
    add("--row-tokens", type=int, default=8192, help="of a packed row")
    add("--frozen-layers", type=int, default=20)
    add("--epochs", type=float, default=1.0)
    add("--learning-rate", type=float, default=TrainSettings.learning_rate)
    add("--dtype", choices=("float32", "autocast"), default="float32", help="autocast on a GPU")
    add("--batch-trees", type=int, default=TrainSettings.batch_trees)
    add("--threads", type=int, default=0, help="0 leaves torch's own choice")
    add("--resamples", type=int, default=2000)
    add("--work", type=Path, default=ROOT / "runs" / "healthbench", help="scores, to resume from")
    add("--out", type=Path, default=RESULT)
    add("--dry-run", action="store_true", help="print the estimate and stop")
    return parser.parse_args(argv)


def data_file(given: Path | None) -> Path:
    """The file of --data, or what $GRADED_DATA names.

    Raises:
        ExperimentError: neither names one.
    """
    named = given or (Path(os.environ["GRADED_DATA"]) if os.environ.get("GRADED_DATA") else None)
    if named is None:
        raise ExperimentError("--data: not given and $GRADED_DATA is not set, expected the file")
    return named / FILE if named.is_dir() else named


def claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this experiment's, or refuse one with other settings."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ExperimentError(f"{work}: holds scores of other settings; choose another --work")
    _write(path, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the figures of all there is.

    Returns:
        0; 2 where the options, the data or the folder cannot be used.
    """
    options, started = parse(argv), time.perf_counter()
    try:
        return _run(options, started)
    except (ExperimentError, RecordError) as error:
        print(f"healthbench: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, started: float) -> int:
    from promedical.demo.models import resolve_encoder, resolve_model

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = list(SYSTEMS) if options.systems == "all" else options.systems.split(",")
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise ExperimentError(f"--systems: found {unknown}, expected some of {list(SYSTEMS)}")
    once = options.once.split(",") if options.once else []
    strange = [name for name in once if name not in names]
    if strange:
        raise ExperimentError(f"--once: found {strange}, expected some of --systems")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = [(n, seed) for seed in seeds for n in names if seed == seeds[0] or n not in once]
    if options.threads:
        torch.set_num_threads(options.threads)
    path = data_file(options.data)
    read = read_healthbench_graded(path)
    for fault in read.broken[:20]:
        print(fault, file=sys.stderr)
    model_path = resolve_model(options.model)
    base, tokenizer = new_reward_model(model_path, settings_of(SYSTEMS["explicit"], options))
    base.to("cuda" if torch.cuda.is_available() else "cpu")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    parts = split(read.rows, options.split_seed, calibration=CALIBRATION, test=TEST)
    data = subset(parts, count, options)
    plan = estimate(runs, data, options, Renderer(tokenizer), base)
    print(json.dumps({"subset": data.counts, "estimate": plan}, indent=1), flush=True)
    if options.dry_run:
        return 0

    what_runs = {"systems", "seeds", "once", "dry_run", "resamples", "encoder"}
    skip = what_runs | {"data", "work", "out", "threads"}
    settings = {k: v for k, v in vars(options).items() if k not in skip}
    settings["model"] = portable(options.model) if Path(options.model).exists() else options.model
    settings["data_fingerprint"] = fingerprint([*data.train, *data.held])
    claim(options.work, settings)
    # On a GPU the frozen layers are cheaper than moving what is kept of them.
    kept = options.frozen_layers and not torch.cuda.is_available()
    cache = TrunkCache(base) if kept else None
    for name, seed in runs:
        out = options.work / f"{name}-{seed}.json"
        if not out.exists():
            print(f"{name}, seed {seed}", flush=True)
            done = run_system(SYSTEMS[name], seed, data, options, model_path, cache, out)
            _write(out, done | {"code": code_state()})
    stored: dict[str, dict[int, Any]] = {}
    for name in SYSTEMS:
        for found in sorted(options.work.glob(f"{name}-*.json")):
            seed = int(found.stem.rpartition("-")[2])
            stored.setdefault(name, {})[seed] = json.loads(found.read_text())
    encoder = resolve_encoder() if options.encoder == "embedded" else None
    result = {
        "settings": settings,
        "data": {
            "file": portable(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "counts": dict(read.counts),
            "token_deciles": token_lengths(read.rows, count),
            "subset": data.counts,
        },
        "systems": {
            name: {
                "says": SYSTEMS[name].says,
                "seeds": {
                    str(seed): {k: v for k, v in s.items() if k not in ("criteria", "overall")}
                    for seed, s in by_seed.items()
                },
            }
            for name, by_seed in stored.items()
        },
    } | figures(data, stored, nulls(data, parts.train, encoder), options.resamples)
    result["provenance"] = provenance(
        seed=seeds[0],
        recipe=settings | {"recipe": recipe_hash(settings)},
        data_fingerprint=settings["data_fingerprint"],
        started=started,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _write(options.out, result)
    print(json.dumps(result["targets"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
