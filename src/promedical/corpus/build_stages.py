"""How each stage is run: its function, what it asks, and what it would make, for the plan.

A stage takes the rows of the one before and gives a `StageResult`; what else it may need (an asker,
an encoder, the folder of the run) is in `Context`. `imagined` stands in for a stage that has not
run: rows as it would leave them, with invented texts of a typical length, so that the calls of the
stages after it can be counted and weighed. Left to others: the order, folders and resuming
(`build`), the estimates (`build_plan`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from promedical.cluster import ClusterSettings
from promedical.corpus.banks import with_universal
from promedical.corpus.dedup import dedup
from promedical.corpus.degrade_stage import degrade_rows
from promedical.corpus.export import export
from promedical.corpus.hold_out import without_held_out
from promedical.corpus.ingest import ingest
from promedical.corpus.judge import JudgeSettings, judge, judge_calls
from promedical.corpus.overlap import Encoder
from promedical.corpus.pairs import PairsSettings, pairs, write_pairs
from promedical.corpus.respond import RespondSettings, respond, respond_calls, response_ids
from promedical.corpus.rubrics import RubricsSettings, rubrics, rubrics_calls
from promedical.corpus.screen import ScreenSettings, screen, screen_calls
from promedical.corpus.splits import splits
from promedical.corpus.stage import CorpusError, StageResult
from promedical.llm.calls import Asker, Call
from promedical.records import GradedInstruction, Response
from promedical.rubric import Criterion, Rubric, Tier

__all__ = ["READ_SPLITS", "STAGES", "Context", "Stage", "read_splits"]

Rows = Sequence[GradedInstruction]
Move = Callable[[str, int, int], None]

# Tokens of a reply where the endpoint sets no smaller max_tokens; thinking models take more.
REPLY_TOKENS = {"screen": 80, "respond": 800, "rubrics": 1500, "judge": 900}
WORDS_A_TOKEN = 0.75
# Stages that look at which side a row is on, which the splits stage keeps apart from the rows.
READ_SPLITS = ("degrade", "export")


@dataclass(frozen=True)
class Context:
    """What a stage may need besides rows and settings.

    Args:
        asker: sends calls; None for the stages that ask nobody.
        encoder: vectors for exemplars, splits and repeated criteria; None for n-grams alone.
        progress: called with (what, done, total).
        folder: the stage's own, for those that write files of their own.
        split_of: instruction id → split, if the splits stage ran.
        pairs: how responses are compared.
        funnel: what the stages before took in and dropped.
        hold_out: benchmarks whose questions are dropped as soon as rows are distinct.
        cluster: where rows are worked on; None for this machine.
    """

    asker: Asker | None = None
    encoder: Encoder | None = None
    progress: Move | None = None
    folder: Path | None = None
    split_of: Mapping[str, str] | None = None
    pairs: PairsSettings = field(default_factory=PairsSettings)
    funnel: Sequence[Mapping[str, Any]] = ()
    hold_out: Sequence[str] = ()
    cluster: ClusterSettings | None = None

    @property
    def must_ask(self) -> Asker:
        """The asker of a stage that cannot do without."""
        assert self.asker is not None
        return self.asker


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Args:
        run: rows, settings, context → result.
        calls: its first round of calls; None if it asks nobody.
        imagined: rows as it would leave them, for the plan; None if it leaves them as they are.
    """

    run: Callable[[Rows, Any, Context], StageResult]
    calls: Callable[[Rows, Any], list[Call]] | None = None
    imagined: Callable[[Rows, Any], list[GradedInstruction]] | None = None


def _ingest(_: Rows, settings: Any, context: Context) -> StageResult:
    reader = None
    if context.cluster is not None:
        from promedical.corpus.ray_rows import read_sources

        reader = partial(read_sources, cluster=context.cluster)
    return ingest(settings, progress=context.progress, reader=reader)


def _dedup(rows: Rows, settings: Any, context: Context) -> StageResult:
    encoder = context.encoder if settings.encoder == "embedded" else None
    mapped = None
    if context.cluster is not None:
        from promedical.corpus.ray_rows import map_blocks

        mapped = partial(map_blocks, cluster=context.cluster)
    result = dedup(rows, settings, encoder=encoder, progress=context.progress, mapped=mapped)
    # Here and not at the splits alone: after this stage every row costs money.
    return without_held_out(result, context.hold_out, encoder=context.encoder)


def _screen(rows: Rows, settings: ScreenSettings, context: Context) -> StageResult:
    return screen(rows, settings, asker=context.must_ask)


def _respond(rows: Rows, settings: RespondSettings, context: Context) -> StageResult:
    return respond(rows, settings, asker=context.must_ask)


def _rubrics(rows: Rows, settings: RubricsSettings, context: Context) -> StageResult:
    return rubrics(rows, settings, asker=context.must_ask, encoder=context.encoder)


def _judge(rows: Rows, settings: JudgeSettings, context: Context) -> StageResult:
    return judge(rows, settings, asker=context.must_ask)


def _splits(rows: Rows, settings: Any, context: Context) -> StageResult:
    return splits(rows, settings, encoder=context.encoder, progress=context.progress)


def _degrade(rows: Rows, settings: Any, context: Context) -> StageResult:
    return degrade_rows(rows, settings, split_of=context.split_of)


def _pairs(rows: Rows, settings: PairsSettings, context: Context) -> StageResult:
    result = pairs(rows, settings)
    if context.folder is not None:
        context.folder.mkdir(parents=True, exist_ok=True)
        write_pairs(context.folder, result.rows, settings)
    return result


def _export(rows: Rows, settings: Any, context: Context) -> StageResult:
    assert context.folder is not None
    report = export(
        rows,
        settings,
        context.folder / "dataset",
        splits=context.split_of,
        pairs=context.pairs,
        funnel=context.funnel,
    )
    return StageResult(rows, (), report)


def read_splits(folder: Path) -> dict[str, str]:
    """Instruction id → split, as the splits stage left it.

    Raises:
        CorpusError: a line that says no split.
    """
    path = folder / "splits.jsonl"
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        if not isinstance(record.get("split"), str):
            raise CorpusError(f"{path}: line {number}: split: missing, expected a split's name")
        found[record["id"]] = record["split"]
    return found


# --- what a stage would make ----------------------------------------------------------------------


def _sampled(rows: Rows, settings: ScreenSettings) -> list[GradedInstruction]:
    # How many are of the wanted difficulty nobody knows beforehand: all, at most.
    return list(rows[: settings.target] if settings.target else rows)


def _answered(rows: Rows, settings: RespondSettings) -> list[GradedInstruction]:
    made = []
    for row in rows:
        new = [
            # The id makes texts, and so the calls about them, different.
            Response(id, model.model, f"{id} {_filler(min(model.max_tokens or 800, 800))}")
            for id, model, _ in response_ids(settings)
            if id not in {r.id for r in row.responses}
        ]
        made.append(row.with_responses((*row.responses, *new)))
    return made


def _with_rubric(rows: Rows, settings: RubricsSettings) -> list[GradedInstruction]:
    count = (settings.min_proficiency + settings.max_proficiency) // 2
    bonus = (settings.min_excellence + settings.max_excellence) // 2
    text = _filler(25)  # tokens of a criterion
    criteria = [Criterion(f"p{n}", Tier.PROFICIENCY, text, 1 / count) for n in range(count)]
    criteria += [Criterion(f"e{n}", Tier.EXCELLENCE, text) for n in range(bonus)]
    rubric = Rubric(tuple(criteria))
    rubric = with_universal(rubric) if settings.universal else rubric
    return [row if row.rubric is not None else replace(row, rubric=rubric) for row in rows]


def _filler(tokens: int) -> str:
    """Text of about so many tokens."""
    return "words " * max(1, round(tokens * WORDS_A_TOKEN))


STAGES: dict[str, Stage] = {
    "ingest": Stage(_ingest),
    "dedup": Stage(_dedup),
    "screen": Stage(_screen, screen_calls, _sampled),
    "respond": Stage(_respond, respond_calls, _answered),
    "rubrics": Stage(_rubrics, rubrics_calls, _with_rubric),
    "judge": Stage(_judge, judge_calls),
    "splits": Stage(_splits),
    "degrade": Stage(_degrade),
    "pairs": Stage(_pairs),
    "export": Stage(_export),
}
