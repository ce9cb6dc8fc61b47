"""Questions that no side of a build may have, because something is evaluated on them.

METHOD section 6: the bench is disjoint from training. `splits` sees to that for the bench that it
deals itself; a benchmark from elsewhere (the demo's, another corpus') has to be named. A row is
held out if it is a near-duplicate of one of its questions, by the limits that `overlap` sets for
two sides. They are wider than those that join components: they do not chain here, and a row too
many costs less than a question that was trained on.

A build drops them right after de-duplication, before any model is paid for an answer to them;
`splits` looks again, for rows that came another way. Left to others: what is dealt (`splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from promedical.corpus.overlap import LIMITS, Encoder, Limit, normalise, similarity_blocks
from promedical.corpus.stage import CorpusError, Dropped, StageResult
from promedical.records import GradedInstruction, RecordError, read_dataset, read_jsonl

__all__ = ["DEMO", "held_out", "read_held_out", "without_held_out"]

DEMO = "kqa-bench"
_CHUNK = 5_000  # rows compared at once, which bounds memory


def read_held_out(names: Sequence[str]) -> list[GradedInstruction]:
    """The rows of benchmarks, cut down to the question.

    Args:
        names: for each a dataset's folder, a file of JSON lines in the same shape, or `DEMO` for
            the 50 questions of K-QA that the demo's figures are about.

    Raises:
        CorpusError: one that cannot be read.
    """
    rows: list[GradedInstruction] = []
    for name in names:
        try:
            rows += _read(name)
        except (RecordError, OSError) as error:
            raise CorpusError(f"hold_out: {error}") from None
    return [replace(row, reference=None, rubric=None, responses=()) for row in rows]


def _read(name: str) -> list[GradedInstruction]:
    if name == DEMO:
        from promedical.demo.kqa import load_kqa

        return list(load_kqa().physicians)
    path = Path(name).expanduser()
    return read_dataset(path) if path.is_dir() else read_jsonl(path)


def held_out(
    rows: Sequence[GradedInstruction],
    questions: Sequence[GradedInstruction],
    *,
    encoder: Encoder | None = None,
    limit: Limit = LIMITS["question"],
) -> list[Dropped]:
    """Those of the rows that ask what one of the questions asks, in their order.

    Args:
        questions: as `read_held_out` gives them.
        encoder: finds other wordings too; without it only n-grams are compared.
        limit: from which similarity on two questions are the same.

    Returns:
        For each the question it is nearest to and both similarities, reason "held_out".
    """
    held = [(q.id, said) for q in questions if normalise(said := _said(q))]
    if not held:
        return []
    found: list[Dropped] = []
    for first in range(0, len(rows), _CHUNK):
        # A row without a word is like none.
        chunk = [row for row in rows[first : first + _CHUNK] if normalise(_said(row))]
        blocks = similarity_blocks([_said(r) for r in chunk], [said for _, said in held], encoder)
        for start, jaccard, cosine in blocks:
            measures = [(jaccard, limit.jaccard)]
            if cosine is not None:
                measures.append((cosine, limit.cosine))
            over = np.max([values - least for values, least in measures], axis=0)
            for i in np.flatnonzero(over.max(axis=1) >= 0):
                j = int(over[i].argmax())
                detail = {"question": held[j][0], "jaccard": round(float(jaccard[i, j]), 4)}
                if cosine is not None:
                    detail["cosine"] = round(float(cosine[i, j]), 4)
                found.append(Dropped(chunk[start + i].id, "held_out", detail))
    return found


def without_held_out(
    result: StageResult, names: Sequence[str], *, encoder: Encoder | None = None
) -> StageResult:
    """What a stage left, less the rows that are held out; they are dropped with that reason.

    Args:
        names: benchmarks, as of `read_held_out`; without one the result stays as it is.
        encoder: as of `held_out`.

    Raises:
        CorpusError: a benchmark that cannot be read.
    """
    if not names:
        return result
    questions = read_held_out(names)
    dropped = held_out(result.rows, questions, encoder=encoder)
    out = {d.id for d in dropped}
    report = {**result.report, "held_out": {"questions": len(questions), "rows": len(dropped)}}
    return replace(
        result,
        rows=[row for row in result.rows if row.id not in out],
        dropped=[*result.dropped, *dropped],
        report=report,
    )


def _said(row: GradedInstruction) -> str:
    return " ".join(m.content for m in row.messages if m.role == "user")
