"""What a suite is: rows read from files as published, and a rule that scores what systems did.

A suite's module has a `Suite`, whose `read` gives a `Bench` (rows of the project's type, and what
of the published rows has no place in them) and whose rules turn a grader's grades, or a policy's
answers and their grades, into measures. Rows that cannot be used are counted by reason. Published
figures stand beside ours, marked with who published them, and are never compared by a test.

Left to others: grading (`promedical.bench.graders`, `judges`), running and keeping (`run`), pages
(`leaderboard`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from promedical.bench.graded import Graded
from promedical.bench.intervals import Bootstrap
from promedical.bench.measures import Measure
from promedical.bench.metrics import BenchError
from promedical.corpus.sources.files import raw_rows
from promedical.corpus.sources.reading import Kept, Raw, Read, SourceSettings, read_rows
from promedical.corpus.stage import CorpusError
from promedical.records import GradedInstruction

__all__ = ["Bench", "Published", "Rating", "Suite", "collected", "of_source", "source_of"]

Verdicts = Mapping[tuple[str, str, str], float]


@dataclass(frozen=True)
class Rating:
    """How a language model is asked for one number about an answer.

    Args:
        prompt: name of the prompt's file in `promedical/bench/prompts`.
        low, high: ends of the scale, whole numbers.
        better: which end is good.
    """

    prompt: str = "rate"
    low: int = 1
    high: int = 10
    better: str = "higher"


@dataclass(frozen=True)
class Bench:
    """A suite's rows.

    Args:
        rows: what is evaluated; ids unique.
        calibration: graded rows on which thresholds are fitted; none of them in `rows`.
        train: gives graded rows on which null graders are fitted, if they are wanted.
        about: row id → what of the published row has no place in it.
        rejected: reason → published rows that could not be used.
        notes: what has to be known to read the figures.
        pairs: row id → the pairs of answers that are compared; every two of a row if None.
    """

    rows: tuple[GradedInstruction, ...]
    calibration: tuple[GradedInstruction, ...] = ()
    train: Callable[[], Sequence[GradedInstruction]] | None = None
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pairs: Mapping[str, Sequence[tuple[str, str]]] | None = None

    def first(self, limit: int) -> Bench:
        """Only the first so many rows; 0 for all."""
        return replace(self, rows=self.rows[:limit]) if limit else self


@dataclass(frozen=True)
class Published:
    """A figure that others published, in the unit of the measure it stands beside.

    Args:
        system: whose it is.
        measure: the measure's name.
        value: a share as a number in [0, 1], where the measure is a share.
        source: who published it.
    """

    system: str
    measure: str
    value: float
    source: str


# What a rule is given: the rows, the grades of each, and decided verdicts (`verdicts.decided`).
GraderRule = Callable[[Bench, Graded, Verdicts], Mapping[str, Measure]]
# The same for a policy: every row has one response, the policy's, or none where it failed.
PolicyRule = Callable[[Bench, Graded, Verdicts], Mapping[str, Measure]]
Details = Callable[[Bench, Graded, Verdicts, Bootstrap], Mapping[str, Any]]


@dataclass(frozen=True)
class Suite:
    """One suite.

    Args:
        name: as on the command line.
        title: as on a page.
        form: what `rows` has to be, in words.
        read: (rows path or None, calibration path or None) → the bench.
        grader: scores a grader; None if the suite has no gold for one.
        policy: scores a policy; None if there is nothing for a policy to answer.
        grades: whether a policy's answers have to be graded by a stated grader.
        rating: how a judge rates answers here when asked about the answer as a whole.
        grader_details, policy_details: more about a result, as JSON types, that no leaderboard
            compares.
        published: figures of others.
    """

    name: str
    title: str
    form: str
    read: Callable[[Path | None, Path | None], Bench]
    grader: GraderRule | None = None
    policy: PolicyRule | None = None
    grades: bool = True
    rating: Rating = Rating()
    grader_details: Details | None = None
    policy_details: Details | None = None
    published: tuple[Published, ...] = ()


def source_of(name: str, path: Path | None, form: str) -> SourceSettings:
    """Where a suite's rows are read from.

    Raises:
        BenchError: no path was given.
    """
    if path is None:
        raise BenchError(f"suite {name!r}: rows: missing, expected --rows PATH: {form}")
    return SourceSettings(name, path=str(path))


def collected(
    settings: SourceSettings,
    to_row: Callable[[Raw], tuple[GradedInstruction, Mapping[str, Any]]],
    formats: tuple[str, ...] = (".jsonl", ".json", ".csv", ".parquet"),
) -> Bench:
    """Rows of a published file, each with what has no place in it.

    Raises:
        BenchError: the file cannot be read, or holds no usable row.
    """
    extras: dict[tuple[str, int], Mapping[str, Any]] = {}

    def one(raw: Raw) -> GradedInstruction:
        row, more = to_row(raw)
        extras[raw.file, raw.line] = more
        return row

    try:
        return _gathered(settings, read_rows(raw_rows(settings, formats), one), extras)
    except CorpusError as error:
        raise BenchError(str(error)) from None


def of_source(
    settings: SourceSettings, read: Callable[[SourceSettings], Any], about: Any = None
) -> Bench:
    """Rows of one of `promedical.corpus.sources`.

    Args:
        about: row → what else is to be known of it.

    Raises:
        BenchError: as `collected`.
    """
    try:
        bench = _gathered(settings, read(settings), {})
    except CorpusError as error:
        raise BenchError(str(error)) from None
    return bench if about is None else replace(bench, about={r.id: about(r) for r in bench.rows})


def _gathered(
    settings: SourceSettings,
    reads: Any,
    extras: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Bench:
    rows: list[GradedInstruction] = []
    about: dict[str, Mapping[str, Any]] = {}
    rejected: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    first = ""
    read: Read
    for read in reads:
        if not isinstance(read, Kept):
            rejected[read.reason] += 1
            first = first or f"{read.file}: line {read.line}: {read.field}: {read.detail}"
            continue
        seen[read.row.id] += 1
        again = seen[read.row.id]
        # One question may be asked twice, with other answers.
        row = read.row if again == 1 else replace(read.row, id=f"{read.row.id}#{again}")
        rows.append(row)
        about[row.id] = extras.get((read.file, read.line), {})
    if not rows:
        raise BenchError(
            f"{settings.path}: no usable row of {rejected.total()}{f'; {first}' if first else ''}"
        )
    return Bench(tuple(rows), about=about, rejected=dict(sorted(rejected.items())))
