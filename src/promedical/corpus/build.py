"""Builds a preference corpus: every stage of section 3, one after the other, resumable.

    OUT/build.json         the recipe of the last run, for whoever looks at the folder later
    OUT/ledger.sqlite      every reply of a model
    OUT/01-ingest/ …       a folder a stage (see `stage`); its number is the stage's, run or not
    OUT/10-export/dataset/ what is shared
    OUT/report.md, .json   the whole way: rows in, dropped and why, rows out, what it cost

A stage is finished when its report is there. Started again, a run goes on after the last finished
stage. A finished stage is run again if its settings, a file that they name, or the rows that it was
made from are others now, and so are those after it as far as their rows change; the ledger answers
what was asked before. Two recipes that read different sources do not share a folder: that is an
error, unless ingest is asked for again by name.

For each stage, the ids that go in are those that come out or are dropped, each once; anything else
is an error (`check_accounts`). Left to others: how a stage is run (`build_stages`), what it will
cost (`build_plan`), the report's words (`build_report`).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promedical.corpus.asked import CountingAsker
from promedical.corpus.build_recipe import ALL_STAGES, BuildRecipe, settings_of
from promedical.corpus.build_report import write_report
from promedical.corpus.build_stages import READ_SPLITS, STAGES, Context, read_splits
from promedical.corpus.overlap import Encoder
from promedical.corpus.stage import REPORT, CorpusError, StageResult, write_stage
from promedical.llm.calls import Asker
from promedical.progress import Stages
from promedical.records import GradedInstruction, read_dataset

__all__ = ["Build", "build", "check_accounts", "folder_of", "funnel_of", "open_asker"]

Rows = Sequence[GradedInstruction]
RECIPE = "build.json"
LOCK = ".lock"


def folder_of(out: Path, name: str) -> Path:
    """The folder of a stage; its number does not depend on which stages run."""
    return out / f"{ALL_STAGES.index(name) + 1:02d}-{name}"


def funnel_of(out: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """What each stage took in, dropped and left, up to the first that is not finished."""
    found: list[dict[str, Any]] = []
    for name in stages:
        report = _report_of(out, name)
        if report is None:
            break
        told = {key: report.get(key) for key in ("rows_in", "reasons", "calls", "seconds")}
        found.append({"stage": name, "rows_out": report["rows"], **told})
    return found


def _report_of(out: Path, name: str) -> dict[str, Any] | None:
    path = folder_of(out, name) / REPORT
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error})") from None
    return report


def check_accounts(name: str, rows: Rows, result: StageResult) -> None:
    """Ids in = ids out + ids dropped, each once.

    Raises:
        CorpusError: what is missing, doubled or new; a fault of the stage, not of the data.
    """
    after = Counter([row.id for row in result.rows] + [d.id for d in result.dropped])
    if name == "ingest":  # rows come into being here, and a dropped one is a line of a file
        read = result.report.get("read", after.total())
        if read != after.total():
            raise CorpusError(f"ingest: {read} rows read, {after.total()} kept or dropped")
        after = Counter(row.id for row in result.rows)
        before = set(after)
    else:
        before = {row.id for row in rows}
    faults = (
        ("lost", sorted(before - set(after))),
        ("there twice", sorted(id for id, n in after.items() if n > 1)),
        ("from nowhere", sorted(set(after) - before)),
    )
    for what, ids in faults:
        if ids:
            raise CorpusError(f"{name}: {len(ids)} rows are {what}: {', '.join(ids[:5])}")


def open_asker(recipe: BuildRecipe) -> Any:
    """The asker of a recipe's engine, with its ledger and budget."""
    recipe.ledger_path.parent.mkdir(parents=True, exist_ok=True)
    budget = recipe.budget_usd or None
    if recipe.engine == "ray":
        from promedical.llm.ray_asker import RayAsker

        return RayAsker(recipe.ledger_path, cluster=recipe.cluster, budget_usd=budget)
    from promedical.llm.client import EndpointAsker

    return EndpointAsker(recipe.ledger_path, budget_usd=budget)


@dataclass
class Build:
    """A run of a recipe: where it is, and what it has in hand.

    Args:
        recipe: what is built.
        asker: sends the calls; the recipe's own if None.
        encoder: vectors; the embedded ones if None.
        again: stages to run again although they are finished.
    """

    recipe: BuildRecipe
    asker: Asker | None = None
    encoder: Encoder | None = None
    again: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.out = Path(self.recipe.out)
        self._rows: tuple[str, Rows] | None = None  # of which stage, and its rows
        self._opened: Any = None
        for name in self.again:
            if name not in self.recipe.stages:
                raise CorpusError(
                    f"again: found {name!r}, expected some of {', '.join(self.recipe.ordered)}"
                )

    # --- where it is ------------------------------------------------------------------------------

    def report_of(self, name: str) -> dict[str, Any] | None:
        """The report of a stage that is finished; None if it is not."""
        return _report_of(self.out, name)

    def before(self, name: str) -> str | None:
        """The stage that runs before this one."""
        ordered = self.recipe.ordered
        index = ordered.index(name)
        return ordered[index - 1] if index else None

    def parents(self, name: str) -> list[str]:
        """Fingerprints of what goes into a stage."""
        previous = self.before(name)
        if previous is None:
            return []
        report = self.report_of(previous)
        assert report is not None
        return [report["fingerprint"]]

    def stamp(self, name: str) -> dict[str, Any]:
        """What a finished stage is recognised by."""
        stamp = settings_of(getattr(self.recipe, name))
        # These read what other stages kept apart, so their settings are their own too.
        if name in READ_SPLITS and "splits" in self.recipe.stages:
            stamp["splits"] = settings_of(self.recipe.splits)
        if name == "dedup" and self.recipe.splits.hold_out:
            splits = settings_of(self.recipe.splits)
            stamp["hold_out"] = {"names": splits["hold_out"], "files": splits.get("files", {})}
        if name == "export":
            stamp["pairs"] = settings_of(self.recipe.pairs)
            stamp["funnel"] = [(f["stage"], f["rows_in"], f["rows_out"]) for f in self.funnel(name)]
        return json.loads(json.dumps(stamp))

    def why(self, name: str) -> str | None:
        """Why a stage has to be run; None if it is finished and still fits."""
        report = self.report_of(name)
        if report is None:
            return ""
        if name in self.again:
            return "asked for"
        changed = _changed(report.get("recipe", {}), self.stamp(name))
        if changed:
            return f"changed: {', '.join(changed)}"
        if report.get("parents") != self.parents(name):
            return "the rows before it changed"
        return None

    def rows_before(self, name: str) -> Rows:
        """The rows that go into a stage; only the last read ones are kept."""
        previous = self.before(name)
        if previous is None:
            return []
        if self._rows is None or self._rows[0] != previous:
            self._rows = (previous, read_dataset(folder_of(self.out, previous) / "rows"))
        return self._rows[1]

    def funnel(self, until: str | None = None) -> list[dict[str, Any]]:
        """What each finished stage took in, dropped and left."""
        ordered = self.recipe.ordered
        return funnel_of(self.out, ordered if until is None else ordered[: ordered.index(until)])

    # --- running ----------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder locked for this run, and its recipe written down.

        Raises:
            CorpusError: another run is at work in the folder, or it is no build's.
        """
        from filelock import FileLock, Timeout

        _claim(self.out)
        lock = FileLock(self.out / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CorpusError(f"{self.out}: another run is at work there") from None
        try:
            self._refuse_other_sources()
            _write(self.out / RECIPE, _recipe_json(self.recipe))
            yield
        finally:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            lock.release()

    def _refuse_other_sources(self) -> None:
        report = self.report_of("ingest")
        if report is None or "ingest" not in self.recipe.stages or "ingest" in self.again:
            return
        changed = _changed(report.get("recipe", {}), self.stamp("ingest"))
        if changed:
            raise CorpusError(
                f"{self.out}: holds a corpus of other sources (ingest: {', '.join(changed)} "
                "changed); choose another out, or read them again there with --again ingest"
            )

    def run_stage(self, name: str, progress: Any = None) -> StageResult:
        """Run one stage and leave its folder."""
        rows = self.rows_before(name)
        folder = folder_of(self.out, name)
        stage, settings = STAGES[name], getattr(self.recipe, name)
        asker = None
        if stage.calls is not None:
            asker = CountingAsker(self._asker(), self.recipe.max_failed)
        started = time.monotonic()
        context = Context(
            asker=asker,
            encoder=self._encoder(name),
            progress=progress,
            folder=folder,
            split_of=self._split_of(name),
            pairs=self.recipe.pairs,
            funnel=self.funnel(name),
            hold_out=self.recipe.splits.hold_out,
            cluster=self.recipe.cluster if self.recipe.engine == "ray" else None,
        )
        # From here on the stage is not finished, whatever it was before.
        (folder / REPORT).unlink(missing_ok=True)
        result = stage.run(rows, settings, context)
        check_accounts(name, rows, result)
        more: dict[str, Any] = {
            "rows_in": len(rows) if self.before(name) else result.report.get("read", 0),
            "seconds": round(time.monotonic() - started, 1),
        }
        if asker is not None:
            more["calls"] = asker.report()
        result = replace(result, report={**result.report, **more})
        write_stage(folder, result, recipe=self.stamp(name), parents=self.parents(name))
        self._rows = (name, result.rows)
        return result

    def _split_of(self, name: str) -> dict[str, str] | None:
        if name not in READ_SPLITS or "splits" not in self.recipe.stages:
            return None
        return read_splits(folder_of(self.out, "splits"))

    def _asker(self) -> Asker:
        if self.asker is not None:
            return self.asker
        if self._opened is None:
            self._opened = open_asker(self.recipe)
        return self._opened

    def _encoder(self, name: str) -> Encoder | None:
        wants = name in ("rubrics", "splits") or (name == "dedup" and self.recipe.splits.hold_out)
        if self.encoder is None and wants:
            from promedical.demo.models import resolve_encoder

            self.encoder = resolve_encoder()
        return self.encoder


def build(
    recipe: BuildRecipe,
    *,
    asker: Asker | None = None,
    encoder: Encoder | None = None,
    again: Sequence[str] = (),
    show: Stages | None = None,
) -> dict[str, Any]:
    """Run all stages of a recipe, or those that are left of it.

    Args:
        recipe: what is built.
        asker: sends the calls, if not the recipe's own.
        encoder: vectors, if not the embedded ones.
        again: stages to run again although they are finished.
        show: where progress is shown.

    Returns:
        What `report.json` holds.

    Raises:
        CorpusError: the folder is not a build's, another run is at work in it, its sources are
            others, a stage lost a row, or was stopped (budget, server).
    """
    run = Build(recipe, asker, encoder, tuple(again))
    show = Stages(len(recipe.ordered)) if show is None else show
    with run.opened():
        for name in recipe.ordered:
            why = run.why(name)
            if why is None:
                report = run.report_of(name)
                assert report is not None
                show.skipped(name, report.get("seconds") or 0.0)
                continue
            with show.stage(f"{name} (again: {why})" if why else name) as move:
                result = run.run_stage(name, move)
            show.say(f"    {_line(result)}")
        return write_report(run.out, run.funnel(), recipe)


def _line(result: StageResult) -> str:
    reasons = Counter(d.reason for d in result.dropped)
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    return f"{len(result.rows)} rows" + (f"; dropped: {dropped}" if dropped else "")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, by name."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _claim(out: Path) -> None:
    """Make the folder; one that holds something else is left alone."""
    if out.exists() and not out.is_dir():
        raise CorpusError(f"{out}: is a file, expected a folder")
    known = {RECIPE, LOCK, "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    if out.is_dir() and not (out / RECIPE).is_file():
        strange = sorted(p.name for p in out.iterdir() if p.name not in known)
        if strange:
            raise CorpusError(f"{out}: holds {strange[0]!r} and no {RECIPE}, so it is no build's")
    out.mkdir(parents=True, exist_ok=True)


def _recipe_json(recipe: BuildRecipe) -> str:
    told: dict[str, Any] = {
        name: None if getattr(recipe, name) is None else settings_of(getattr(recipe, name))
        for name in recipe.ordered
    }
    told |= {"stages": list(recipe.ordered), "engine": recipe.engine}
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
