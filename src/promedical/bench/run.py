"""One run of the bench: systems on a suite, results as JSON that can be repeated and compared.

    OUT/SUITE/SYSTEM/run.json          what the folder belongs to: system, how asked, data, suite
                     answers.jsonl     a policy's answers (texts; mode 0600)
                     grades.jsonl      a line an instruction: scores, verdicts, failures
                     calibration.jsonl the same on the calibration split
                     items.json        every figure as what its items add, for paired comparisons
                     result.json       figures with intervals, counts, provenance
    OUT/replies.sqlite                 replies of language models, so that none is paid for twice

Killed and started again with the same flags, a run goes on where it was; what failed is asked
again. Left to others: systems (`graders`, `judges`, `policies`), scoring (`suites`), comparing
(`leaderboard`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from promedical.bench import intervals
from promedical.bench.contamination import check_contamination
from promedical.bench.graded import RowGrades, counts_of
from promedical.bench.graders import CheckpointGrader, Grader, HubGrader, NullGrader
from promedical.bench.intervals import Bootstrap
from promedical.bench.judges import JudgeGrader, PairwiseGrader
from promedical.bench.kept import Kept, claim, write_json
from promedical.bench.measures import Measure, statistic
from promedical.bench.metrics import BenchError
from promedical.bench.policies import Policy, policy_of
from promedical.bench.specs import GRADERS, POLICIES, Spec, parse_spec
from promedical.bench.suites import Suite, suite_named
from promedical.bench.suites.certainty import certainty_details
from promedical.bench.suites.suite import Bench, Verdicts
from promedical.bench.verdicts import decided
from promedical.llm.calls import Asker
from promedical.provenance import provenance
from promedical.records import GradedInstruction, Response, fingerprint, read_dataset, read_jsonl

__all__ = ["BenchRecipe", "run_bench"]

FORMAT = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchRecipe:
    """What to measure, and how.

    Args:
        suite: what they are measured on; `promedical bench suites` lists them.
        grader: graders, KIND:WHAT,option=value; with policies the one that grades the answers.
        policy: policies whose answers are measured.
        rows: the suite's file or folder as published; K-QA needs none.
        calibration: a second dataset in the project's form, on which thresholds are fitted.
        out: folder for the results of any number of runs.
        ask: how a grader is asked: about the answer as a whole, with the criteria beside it, or
            criterion by criterion; the most it can if not given.
        limit: only so many instructions, the first; 0 for all.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        budget_usd: what language models may cost in this run; 0 for no limit.
        training: a training set (dataset folder or JSON lines); what the suite's texts share with
            it is reported beside the figures.
    """

    suite: str = "kqa"
    grader: tuple[str, ...] = ()
    policy: tuple[str, ...] = ()
    rows: Path | None = None
    calibration: Path | None = None
    out: Path = Path("bench")
    ask: Literal["question", "criteria", "sub_criteria"] | None = None
    limit: int = 0
    resamples: int = intervals.RESAMPLES
    seed: int = 0
    budget_usd: float = 0.0
    training: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("resamples", 1), ("budget_usd", 0)):
            if getattr(self, name) < least:
                raise BenchError(f"{name}: found {getattr(self, name)}, expected at least {least}")
        if not self.grader and not self.policy:
            raise BenchError("grader, policy: found neither, expected at least one system")


def run_bench(
    recipe: BenchRecipe,
    *,
    asker: Asker | None = None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure every system of a recipe; results are written as soon as they are known.

    Args:
        asker: asks language models; one with a ledger in the recipe's folder if None.
        progress: called with (what, done, total).
        command: argv for the provenance; this process's if None.

    Returns:
        The results, one a system, as in `result.json`.

    Raises:
        BenchError: a suite, system or setting that cannot be used, or a folder of another run.
        LlmError: an endpoint that cannot be used at all.
    """
    suite = suite_named(recipe.suite)
    graders = [parse_spec(text, GRADERS) for text in recipe.grader]
    policies = [parse_spec(text, POLICIES) for text in recipe.policy]
    _check(suite, graders, policies)
    bench = suite.read(recipe.rows, recipe.calibration).first(recipe.limit)
    recipe.out.mkdir(parents=True, exist_ok=True)
    run = _Run(recipe, suite, bench, asker, progress, command, _contamination(recipe, bench))
    try:
        if policies:
            return [run.policy(p, graders[0] if graders else None) for p in policies]
        return [run.grader(g) for g in graders]
    finally:
        run.close()


def _contamination(recipe: BenchRecipe, bench: Bench) -> dict[str, Any] | None:
    """What the suite shares with the training set, if one was given: counts, shares, ids."""
    if recipe.training is None:
        return None
    path = recipe.training
    rows = read_dataset(path) if path.is_dir() else read_jsonl(path)
    found = check_contamination(
        bench.rows, rows, resamples=recipe.resamples, seed=recipe.seed
    ).to_json()
    return found | {"training": {**found["training"], "fingerprint": fingerprint(rows)}}


def _check(suite: Suite, graders: Sequence[Spec], policies: Sequence[Spec]) -> None:
    if policies:
        if suite.policy is None:
            raise BenchError(f"suite {suite.name!r} measures graders: give --grader alone")
        if suite.grades and len(graders) != 1:
            raise BenchError(
                f"suite {suite.name!r}: found {len(graders)} graders, expected one that grades "
                "the policies' answers: --grader KIND:WHAT"
            )
        if not suite.grades and graders:
            raise BenchError(f"suite {suite.name!r} scores by itself: give --policy alone")
    elif suite.grader is None:
        raise BenchError(f"suite {suite.name!r} measures policies: give --policy KIND:WHAT")
    names = [slug(spec.name) for spec in policies or graders]
    if len(set(names)) != len(names):
        raise BenchError(f"systems: names repeat in {names}; set name=… in one of them")


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "system"


@dataclass
class _Run:
    recipe: BenchRecipe
    suite: Suite
    bench: Bench
    given: Asker | None
    progress: Progress | None
    command: Sequence[str] | None
    contamination: Mapping[str, Any] | None = None
    own: Any = None
    fitted: dict[Any, Any] = field(default_factory=dict)

    # -- systems ----------------------------------------------------------------------------

    def asker(self) -> Asker:
        if self.given is not None:
            return self.given
        if self.own is None:
            from promedical.llm.client import EndpointAsker

            self.own = EndpointAsker(
                self.recipe.out / "replies.sqlite", budget_usd=self.recipe.budget_usd or None
            )
        return self.own  # type: ignore[no-any-return]

    def close(self) -> None:
        if self.own is not None:
            self.own.close()

    def make(self, spec: Spec) -> Grader:
        ask = self.recipe.ask
        if spec.kind in ("checkpoint", "http", "vllm"):
            return CheckpointGrader(spec, ask)
        if spec.kind == "hub":
            return HubGrader(spec, ask)
        if spec.kind == "null":
            return NullGrader(spec, ask, self.bench, self.fitted)
        if spec.kind == "pairwise":
            return PairwiseGrader(spec, ask, self.asker(), self.bench.pairs)
        return JudgeGrader(spec, ask, self.suite.rating, self.asker())

    def grader(self, spec: Spec) -> dict[str, Any]:
        """Measure a grader."""
        started = time.perf_counter()
        folder = self._folder(spec, {"grader": spec.identity()})
        grader = self.make(spec)
        graded = self._graded(grader, self.bench.rows, folder / "grades.jsonl", spec.name)
        calibrated = {}
        if self.bench.calibration and not grader.by_itself and grader.ask == "sub_criteria":
            path = folder / "calibration.jsonl"
            calibrated = self._graded(grader, self.bench.calibration, path, spec.name)
        # Without scores of criteria there is nothing to calibrate.
        split = self.bench.calibration if calibrated else ()
        verdicts, how = decided(
            self.bench.rows, graded, split, calibrated, by_itself=grader.by_itself
        )
        assert self.suite.grader is not None
        measures = self.suite.grader(self.bench, graded, verdicts)
        about = {"kind": "grader", "spec": spec.identity(), "ask": grader.ask, "verdicts": how}
        return self._write(folder, spec, about, self.bench, measures, graded, verdicts, started)

    def policy(self, spec: Spec, grader: Spec | None) -> dict[str, Any]:
        """Measure a policy."""
        started = time.perf_counter()
        judged_by = None if grader is None else grader.identity()
        folder = self._folder(spec, {"policy": spec.identity(), "grader": judged_by})
        answers = self._answers(policy_of(spec, self.asker_if(spec)), folder, spec.name)
        rows = tuple(
            row.with_responses([Response(slug(spec.name), spec.name, answers[row.id]["text"])])
            if "text" in answers[row.id]
            else row.with_responses([])
            for row in self.bench.rows
        )
        bench = replace(self.bench, rows=rows)
        graded: dict[str, RowGrades] = {}
        about: dict[str, Any] = {"kind": "policy", "spec": spec.identity()}
        if grader is not None:
            judge = self.make(grader)
            answered = [row for row in rows if row.responses]
            title = f"{spec.name} graded"
            graded = self._graded(judge, answered, folder / "grades.jsonl", title)
            about |= {"grader": judged_by, "grader_name": grader.name, "ask": judge.ask}
        verdicts, _ = decided(rows, graded, (), {}, by_itself=True)
        assert self.suite.policy is not None
        measures = self.suite.policy(bench, graded, verdicts)
        failures = [a["failure"] for a in answers.values() if "failure" in a]
        about["answers"] = {
            "answered": len(rows) - len(failures),
            "failed": len(failures),
            "failures": {why: failures.count(why) for why in sorted(set(failures))},
            "cut": sum(bool(a.get("cut")) for a in answers.values()),
        }
        return self._write(folder, spec, about, bench, measures, graded, verdicts, started)

    def asker_if(self, spec: Spec) -> Asker:
        """The asker, opened only where it is needed."""
        return self.asker() if spec.kind == "endpoint" else self.given  # type: ignore[return-value]

    # -- folders ----------------------------------------------------------------------------

    def _folder(self, spec: Spec, system: Mapping[str, Any]) -> Path:
        folder = self.recipe.out / slug(self.suite.name) / slug(spec.name)
        claim(
            folder,
            {
                "format": FORMAT,
                "suite": self.suite.name,
                "name": spec.name,
                "ask": self.recipe.ask,
                "data": fingerprint(self.bench.rows),
                "calibration": fingerprint(self.bench.calibration),
                **system,
            },
        )
        return folder

    def _graded(
        self, grader: Grader, rows: Sequence[GradedInstruction], path: Path, title: str
    ) -> dict[str, RowGrades]:
        kept = Kept(path)
        found = {i: RowGrades.from_json(line) for i, line in kept.lines.items()}
        todo = [row for row in rows if row.id not in found or found[row.id].failed]
        done = len(rows) - len(todo)
        for grades in grader.grade(todo) if todo else ():
            kept.add(grades.to_json())
            found[grades.id] = grades
            done += 1
            if self.progress is not None:
                self.progress(title, done, len(rows))
        return {row.id: found[row.id] for row in rows if row.id in found}

    def _answers(self, policy: Policy, folder: Path, title: str) -> dict[str, dict[str, Any]]:
        kept = Kept(folder / "answers.jsonl")
        todo = [row for row in self.bench.rows if "text" not in kept.lines.get(row.id, {})]
        done = len(self.bench.rows) - len(todo)
        for answer in policy.answer(todo) if todo else ():
            kept.add(answer)
            done += 1
            if self.progress is not None:
                self.progress(f"{title} answers", done, len(self.bench.rows))
        lost = {"failure": "no answer came"}
        return {row.id: kept.lines.get(row.id, lost) for row in self.bench.rows}

    # -- results ----------------------------------------------------------------------------

    def _write(
        self,
        folder: Path,
        spec: Spec,
        about: Mapping[str, Any],
        bench: Bench,
        measures: Mapping[str, Measure],
        graded: Mapping[str, RowGrades],
        verdicts: Verdicts,
        started: float,
    ) -> dict[str, Any]:
        policy = about["kind"] == "policy"
        details = self.suite.policy_details if policy else self.suite.grader_details
        units = list(dict.fromkeys(
            bench.about.get(row.id, {}).get("unit", row.id) for row in bench.rows
        ))  # fmt: skip
        bootstrap = Bootstrap(len(units), resamples=self.recipe.resamples, seed=self.recipe.seed)
        more = {} if details is None else dict(details(bench, graded, verdicts, bootstrap))
        if not policy and len(units) == len(bench.rows):
            cuts = about["verdicts"].get("thresholds", {})
            more |= certainty_details(bench, graded, verdicts, cuts, bootstrap)
        if self.contamination is not None:
            more["contamination"] = self.contamination
        result = {
            "format": FORMAT,
            "suite": {"name": self.suite.name, "title": self.suite.title},
            "system": {"name": spec.name, **about},
            "data": {
                "fingerprint": fingerprint(self.bench.rows),
                "instructions": len(bench.rows),
                "responses": sum(len(row.responses) for row in bench.rows),
                "calibration_instructions": len(bench.calibration),
                "rejected": dict(bench.rejected),
            },
            "measures": {
                name: {
                    "label": m.label,
                    "main": m.main,
                    "percent": m.percent,
                    "better": m.better,
                    "unscored": m.unscored,
                    "note": m.note,
                    "figure": bootstrap.figure(statistic(m, units)).to_json(),
                }
                for name, m in measures.items()
            },
            "judgments": counts_of(graded.values()),
            "details": more,
            "notes": list(bench.notes),
            "published": [asdict(p) for p in self.suite.published],
            "settings": {"resamples": self.recipe.resamples, "seed": self.recipe.seed},
            "provenance": provenance(
                seed=self.recipe.seed,
                recipe=self.recipe,
                data_fingerprint=fingerprint(self.bench.rows),
                command=self.command,
                started=started,
            ),
        }
        kept = {name: m.to_json() for name, m in measures.items()}
        write_json(folder / "items.json", {"units": units, "measures": kept})
        write_json(folder / "result.json", result)
        loaded: dict[str, Any] = json.loads(json.dumps(result))
        return loaded
