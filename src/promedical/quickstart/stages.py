"""The stages of the quickstart: each a function from what earlier stages left to a JSON result.

Nothing is decided here that a stage's own module could decide; this file says what follows what.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.provenance import recipe_hash
from promedical.quickstart.results import before_after, collect, order
from promedical.quickstart.settings import QuickstartError, QuickstartRecipe, plain
from promedical.records import GradedInstruction, read_dataset, write_dataset
from promedical.rubric import VetoKind, reward

if TYPE_CHECKING:
    from promedical.corpus.phrases import Split
    from promedical.demo.kqa import Dropped
    from promedical.reward_model.grade import RawScores, RubricRewardModel
    from promedical.reward_model.trunk import TrunkCache

__all__ = ["STAGES", "TITLES", "Run", "write_json"]

Move = Callable[[str, int, int], None]

# Apart from each other, and from those of another copy.
SEED_OF_SPLIT = {"train": 0, "calibration": 1, "bench": 2}
TITLES = {
    "data": "Data and controlled degradation",
    "train": "Reward model and scalar baseline",
    "bench": "Calibration and bench",
    "grpo": "GRPO",
    "answers": "Answers before and after",
    "report": "Report",
}


class Run:
    """One run's folder, and what its stages share in memory."""

    def __init__(self, recipe: QuickstartRecipe) -> None:
        self.recipe = recipe
        self.out = Path(recipe.out)
        self._cache: TrunkCache | None = None
        self._tokenizer: Any = None

    # -- files ------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder this recipe's, or refuse it.

        Raises:
            QuickstartError: it holds a run with other settings.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        settings = plain(replace(self.recipe, out=""))
        path = self.out / "recipe.json"
        if path.exists():
            if json.loads(path.read_text()) != settings:
                raise QuickstartError(
                    f"{self.out}: holds a run with other settings; choose another --out, or "
                    "remove it to start anew"
                )
            return
        write_json(path, settings)

    def stage_file(self, name: str) -> Path:
        return self.out / "stages" / f"{name}.json"

    def result(self, name: str) -> dict[str, Any]:
        """What a finished stage left."""
        found: dict[str, Any] = json.loads(self.stage_file(name).read_text())["result"]
        return found

    def rows(self, split: str) -> list[GradedInstruction]:
        """The rows of a split, as the data stage wrote them."""
        return read_dataset(self.out / "data" / split)

    # -- models -----------------------------------------------------------------------------

    def base_path(self) -> Path | str:
        from promedical.demo.models import resolve_model

        return resolve_model(self.recipe.model)

    def new_model(self) -> tuple[Any, Any]:
        """The untrained reward model and its tokenizer."""
        from promedical.reward_model.model import TreeRewardModel, initialise

        settings = self.recipe.train
        model, tokenizer = initialise(
            self.base_path(), head_init=settings.head_init, seed=self.recipe.seed
        )
        layers = model.config.num_hidden_layers
        if settings.frozen_layers > layers:
            raise QuickstartError(
                f"train.frozen_layers: found {settings.frozen_layers}, but {self.recipe.model} "
                f"has {layers} layers"
            )
        return TreeRewardModel(model, frozen_layers=settings.frozen_layers), tokenizer

    def cache(self) -> TrunkCache | None:
        """Hidden states of the frozen layers, shared by all reward models of the run."""
        from promedical.reward_model.trunk import TrunkCache

        if not self.recipe.train.frozen_layers:
            return None
        if self._cache is None:
            self._cache = TrunkCache(self.new_model()[0])
        return self._cache

    def forget_cache(self) -> None:
        self._cache = None

    def grader(self, name: str, *, cached: bool = True) -> RubricRewardModel:
        """A reward model of the run: "explicit", "scalar" or "untrained"."""
        from promedical.reward_model.grade import RubricRewardModel
        from promedical.reward_model.model import TreeRewardModel

        settings = self.recipe.train
        cache = self.cache() if cached else None
        if name == "untrained":
            model, tokenizer = self.new_model()
            return RubricRewardModel(model, tokenizer, max_tokens=settings.max_tokens, cache=cache)
        loaded = RubricRewardModel.from_pretrained(
            self.out / "models" / name, max_tokens=settings.max_tokens
        )
        return RubricRewardModel(
            TreeRewardModel(loaded.model.model, frozen_layers=settings.frozen_layers),
            loaded.tokenizer,
            calibration=loaded.calibration,
            max_tokens=settings.max_tokens,
            cache=cache,
        )


def _data(run: Run, move: Move) -> dict[str, Any]:
    """Build the three graded splits and prove that they do not overlap."""
    from transformers import AutoTokenizer

    from promedical.corpus.degrade import degrade
    from promedical.corpus.overlap import find_overlaps
    from promedical.demo.kqa import load_kqa
    from promedical.demo.models import resolve_encoder

    recipe = run.recipe
    move("models", 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(run.base_path())
    encoder = resolve_encoder()
    move("models", 1, 1)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    kqa = load_kqa()
    sources: dict[Split, list[GradedInstruction]] = {
        "train": list(kqa.train[: recipe.train_instructions]),
        "calibration": list(kqa.calibration[: recipe.calibration_instructions]),
        "bench": list(kqa.bench[: recipe.bench_instructions]),
    }
    overlaps = find_overlaps(
        [*sources["train"], *sources["calibration"]],
        [*sources["bench"], *kqa.physicians],
        encoder=encoder,
    )
    if overlaps.over:
        raise QuickstartError(
            f"data: {len(overlaps.over)} texts of the training side are on the bench side too"
        )
    summary: dict[str, Any] = {
        "overlap": {"over_limit": 0, "compared": dict(overlaps.compared)},
        "dropped": _dropped(kqa.dropped),
        "splits": {},
    }
    for number, (split, rows) in enumerate(sources.items()):
        move("degrade", number, 3)
        copies = recipe.copies if split == "train" else 1
        built: list[GradedInstruction] = []
        counts: dict[str, Any] = {}
        for copy in range(copies):
            result = degrade(
                rows,
                split=split,
                seed=recipe.seed + 1000 * copy + SEED_OF_SPLIT[split],
                config=replace(recipe.degrade, count_tokens=count_tokens),
            )
            built += [
                row if copies == 1 else replace(row, id=f"{row.id}#{copy}") for row in result.rows
            ]
            counts = result.counts if not copy else counts
        # Calibration keeps every veto: the reward point is family-wise over the whole bank.
        vetoes = len(VetoKind) if split == "calibration" else recipe.min_veto
        cut = [_cut(recipe, row, vetoes) for row in built]
        digest = write_dataset(run.out / "data" / split, cut, recipe=plain(recipe.degrade))
        summary["splits"][split] = {
            "instructions": len(cut),
            "responses": sum(len(r.responses) for r in cut),
            "fingerprint": digest,
            "counts": counts,
        }
    # Only what physicians labelled is asked there.
    labelled = [_only_labelled(row) for row in kqa.physicians[: recipe.physicians_answers]]
    summary["splits"]["physicians"] = {
        "instructions": len(labelled),
        "responses": sum(len(r.responses) for r in labelled),
        "fingerprint": write_dataset(run.out / "data" / "physicians", labelled),
        "counts": {},
    }
    return summary


def _cut(recipe: QuickstartRecipe, row: GradedInstruction, vetoes: int) -> GradedInstruction:
    """A row with as many criteria as the budget and so many vetoes allow."""
    from promedical.reward_model.instances import cut_rubric

    return cut_rubric(
        row,
        max_criteria=recipe.max_criteria + vetoes - recipe.min_veto,
        min_veto=vetoes,
        seed=recipe.seed,
    )


def _only_labelled(row: GradedInstruction) -> GradedInstruction:
    assert row.rubric is not None
    return replace(
        row, rubric=row.rubric.restricted_to({c for r in row.responses for c in r.verdicts})
    )


def _dropped(dropped: Dropped) -> dict[str, int]:
    """Counts of what the corpus left out, by reason."""
    return {
        name: value if isinstance(value, int) else len(value)
        for name, value in ((f.name, getattr(dropped, f.name)) for f in fields(dropped))
    }


def _train(run: Run, move: Move) -> dict[str, Any]:
    """Train the explicit model and the scalar baseline on the same trees and epochs."""
    from promedical.reward_model.instances import training_trees
    from promedical.reward_model.render import Renderer
    from promedical.reward_model.trainer import train

    rows = run.rows("train")
    found: dict[str, Any] = {}
    for name in ("explicit", "scalar"):
        model, tokenizer = run.new_model()
        instances = training_trees(rows, Renderer(tokenizer), explicit=name == "explicit")
        out = run.out / "models" / name
        result = train(
            model,
            tokenizer,
            instances,
            run.recipe.train,
            out,
            seed=run.recipe.seed,
            cache=run.cache(),
            progress=partial(move, name),
        )
        found[name] = {
            "history": list(result.history),
            "counts": result.counts,
            "seconds": result.seconds,
        }
    # Every token is read once an epoch, and by the frozen layers once in all.
    read = sum(part["counts"]["unique_tokens"] for part in found.values())
    return found | {"tokens": round(read * run.recipe.train.epochs)}


def _bench(run: Run, move: Move) -> dict[str, Any]:
    """Calibrate on the calibration split, then measure every grader on the bench."""
    from promedical.bench.baselines import null_graders
    from promedical.bench.evaluate import GraderScores, evaluate, physicians
    from promedical.demo.models import resolve_encoder

    calibration, bench = run.rows("calibration"), run.rows("bench")
    labelled = run.rows("physicians")
    graders: dict[str, GraderScores] = {}
    failures = tokens = 0
    for name in ("explicit", "untrained", "scalar"):
        grader = run.grader(name)
        explicit = name != "scalar"
        scored: dict[str, RawScores] = {}
        for split, rows in (
            ("calibration", calibration),
            ("bench", bench),
            ("physicians", labelled),
        ):
            scored[split] = grader.score_rows(
                rows,
                criteria=explicit,
                overall=True,
                progress=partial(move, f"{name} on {split}"),
            )
            failures += len(scored[split].failures)
            tokens += scored[split].tokens
        if name == "explicit":
            calibrated = grader.calibrated_on(
                calibration,
                scored["calibration"],
                veto_recall=run.recipe.veto_recall,
                clean_violations=run.recipe.clean_violations,
            )
            calibrated.save_metadata(
                run.out / "models" / name, recipe_hash=recipe_hash(plain(run.recipe))
            )
        graders[name] = GraderScores(
            scores=_merged(s.criteria for s in scored.values()) if explicit else None,
            overall=_merged(s.overall for s in scored.values()),
        )
    move("null baselines", 0, 1)
    nulls = null_graders(
        run.rows("train"), [*calibration, *bench, *labelled], encoder=resolve_encoder()
    )
    graders |= nulls
    move("intervals", 0, 1)
    # Thresholds are fitted on what the bench asks: of seven vetoes a few are violated, of the two
    # that are kept many more, and the best F1 threshold follows that share.
    alike = [_cut(run.recipe, row, run.recipe.min_veto) for row in calibration]
    table = evaluate(bench, alike, graders, reference="explicit", seed=run.recipe.seed)
    table["physicians"] = physicians(
        labelled, calibration, graders, reference="explicit", seed=run.recipe.seed
    )
    table["calibration"] = calibrated.calibration.to_json()
    table["failed_judgments"] = failures
    table["tokens"] = tokens
    return table


def _grpo(run: Run, move: Move) -> dict[str, Any]:
    """Optimise the policy against the frozen reward model."""
    from promedical.policy.grpo import train_grpo

    run.forget_cache()  # the policy, its gradients and the reward model share the memory
    grader = run.grader("explicit", cached=False)
    rows = run.rows("train")
    seen: dict[str, GradedInstruction] = {}
    for row in rows:
        seen.setdefault(row.id.split("#")[0], row)
    recipe = replace(run.recipe.grpo, model=run.recipe.model, seed=run.recipe.seed)
    result = train_grpo(
        recipe,
        list(seen.values()),
        grader,
        run.out / "grpo",
        progress=partial(move, "steps"),
    )
    return {
        "history": [asdict(step) for step in result.history],
        "planned_steps": result.planned_steps,
        "done_steps": result.done_steps,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "tokens": round(sum((s.completion_tokens or 0) * s.reward.answers for s in result.history)),
    }


def _answers(run: Run, move: Move) -> dict[str, Any]:
    """Base and tuned policy answer the bench; the reward they were trained on grades both."""
    from promedical.policy.generate import generate

    recipe, spec = run.recipe, run.recipe.grpo.reward
    bench = run.rows("bench")
    grader = run.grader("explicit", cached=False)
    graded: dict[str, list[dict[str, Any]]] = {}
    cut: dict[str, int] = {}
    for name, path in (("base", run.base_path()), ("tuned", run.out / "grpo" / "policy")):
        answers = generate(
            path,
            bench,
            max_new_tokens=recipe.answer_tokens,
            seed=recipe.seed,
            progress=partial(move, f"{name} answers"),
        )
        cut[name] = answers.cut_count
        graded[name] = []
        for number, (row, text) in enumerate(zip(bench, answers.texts, strict=True), start=1):
            assert row.rubric is not None
            (grade,) = grader.grade(row.messages, [text], row.rubric, operating_point="reward")
            graded[name].append(
                {
                    "instruction_id": row.id,
                    "text": text,
                    "tokens": answers.tokens[number - 1],
                    "cut": answers.cut[number - 1],
                    "s1": grade.scores.s1,
                    "s2": grade.scores.s2,
                    "s3": grade.scores.s3 + grade.scores.unresolved.veto,
                    "reward": reward(grade.scores, spec),
                    "verdicts": {k: v.value for k, v in grade.verdicts.items()},
                    "probabilities": {
                        k: None if math.isnan(p) else p for k, p in grade.probabilities.items()
                    },
                }
            )
            move(f"grading {name}", number, len(bench))
    return {
        "answers": graded,
        "cut": cut,
        "compared": before_after(graded, recipe.seed),
        "order": order(graded),
        "tokens": sum(answer["tokens"] for part in graded.values() for answer in part),
    }


def _report(run: Run, move: Move) -> dict[str, Any]:
    """Collect the results, and write `results.json` and `report.html`."""
    from promedical.bench.report import write_report

    finished = {
        name: json.loads(run.stage_file(name).read_text())
        for name in STAGES
        if run.stage_file(name).exists()
    }
    results = collect(run.recipe, finished, TITLES, run.rows("bench"))
    write_json(run.out / "results.json", results)
    write_report(run.out / "report.html", results)
    return {"report": "report.html"}


STAGES: dict[str, Callable[[Run, Move], dict[str, Any]]] = {
    "data": _data,
    "train": _train,
    "bench": _bench,
    "grpo": _grpo,
    "answers": _answers,
    "report": _report,
}


def _merged(parts: Iterable[Mapping[Any, float]]) -> dict[Any, float]:
    merged: dict[Any, float] = {}
    for part in parts:
        merged |= part
    return merged


def write_json(path: Path, data: Any) -> None:
    """Write to a temporary name and rename, so that a file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(data, indent=1, ensure_ascii=False))
    os.replace(staging, path)
