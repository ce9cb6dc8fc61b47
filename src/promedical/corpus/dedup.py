"""Drop instructions that ask again what an earlier one asked (METHOD.md section 3, step 1).

Exact duplicates first: the whole conversation with case, spaces and punctuation put aside. Then
near-duplicates: the cosine of the conversations' vectors is at least `threshold`, and the guard
(`promedical.corpus.meaning_guard`) finds nothing that makes them two questions. Of alike rows the
first in input order is kept. A dropped row names the kept row that it was compared with itself, so
there are no chains; the result does not depend on batch sizes or the number of processes.

Vectors: the embedded encoder's words are weighted by a / (a + p), p their share of all words
(Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings"), because with
plain means "What are the symptoms of …?" makes all its questions alike. Any other encoder's vectors
are taken as they are.

Left to others: the search for alike vectors (`promedical.corpus.cells`), overlap between two sides
of a split (`promedical.corpus.overlap`).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from sys import intern
from typing import Any

import numpy as np

from promedical.corpus.cells import Neighbours, Whole, nearest_earlier, whole
from promedical.corpus.meaning_guard import Facts, Vocabulary, differs, facts
from promedical.corpus.overlap import Encoder, normalise
from promedical.corpus.spelling import corrections, respelt
from promedical.corpus.stage import CorpusError, Dropped, StageResult
from promedical.records import GradedInstruction

__all__ = ["DedupSettings", "dedup"]

Progress = Callable[[str, int, int], None]
# Like `map`, with one list of texts after the other; the results in their order.
Mapped = Callable[[Callable[[Sequence[str]], list[Facts]], Sequence[Any]], Iterator[list[Facts]]]
SLIP_RATIO = 8.0  # a word this much rarer than one a slip away is taken for that one
CHUNK = 2048  # texts that a process reads the facts of at once


@dataclass(frozen=True)
class DedupSettings:
    """How alike two instructions must be for the later one to go.

    Args:
        encoder: "embedded" (static word vectors), or a sentence-transformers model's name or path.
        threshold: smallest cosine of two near-duplicates, in (0, 1].
        guard: keep rows apart whose doses, ages, negations, sides, sex, drugs, … differ.
        neighbours: of the alike rows before a row, how many are looked at.
        smoothing: a in the weight a / (a + p) of a word of the embedded encoder; 0 for plain means.
        rare: an unshared word in at most this share of the rows makes another question.
        unshared: share of the words' weight that two near-duplicates need not share.
        semantic: false to drop exact duplicates only.
        batch: rows encoded or compared at once; no influence on the result.
        workers: threads that compare vectors, and processes that read the facts that the guard
            compares.
    """

    encoder: str = "embedded"
    threshold: float = 0.70
    guard: bool = True
    neighbours: int = 32
    smoothing: float = 1e-3
    rare: float = 0.001
    unshared: float = 0.12
    semantic: bool = True
    batch: int = 1024
    workers: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("threshold", 0, 1), ("rare", -1e-9, 1), ("unshared", -1e-9, 1)):
            value = getattr(self, name)
            if not low < value <= high:
                raise CorpusError(f"dedup: {name}: found {value!r}, expected {low:g} to {high}")
        for name in ("neighbours", "batch", "workers"):
            if getattr(self, name) < 1:
                raise CorpusError(
                    f"dedup: {name}: found {getattr(self, name)!r}, expected at least 1"
                )
        if self.smoothing < 0:
            raise CorpusError(f"dedup: smoothing: found {self.smoothing!r}, expected 0 or more")


def dedup(
    rows: Sequence[GradedInstruction],
    settings: DedupSettings = DedupSettings(),
    *,
    encoder: Encoder | None = None,
    progress: Progress | None = None,
    mapped: Mapped | None = None,
) -> StageResult:
    """Keep the first of every set of rows that ask the same.

    Args:
        rows: ids have to be unique; the conversation is all that is compared.
        encoder: used instead of the one that the settings name.
        progress: called with (what, done, total).
        mapped: reads the facts that the guard compares elsewhere, instead of `settings.workers`.

    Returns:
        Dropped rows have the reason "duplicate" and the detail `duplicate_of` (a kept row's id),
        `similarity` (the cosine; 1.0 for exact) and `kind` ("exact" or "semantic"). The report
        counts by kind, and pairs that the guard kept apart by reason.

    Raises:
        CorpusError: ids that repeat, settings out of range, or an encoder that cannot be had.
    """
    say = progress or (lambda what, done, total: None)
    ids = [row.id for row in rows]
    if len(set(ids)) != len(ids):
        twice = next(i for i, n in Counter(ids).items() if n > 1)
        raise CorpusError(f"dedup: row {twice!r}: found twice, expected unique ids")
    texts = ["\n".join(m.content for m in row.messages) for row in rows]
    say("exact duplicates", 0, len(rows))
    first, plain = _exact(rows, texts)
    distinct = [i for i, j in enumerate(first) if i == j]
    # row → (kept row, similarity)
    merged: dict[int, tuple[int, float]] = {}
    report: dict[str, Any] = {"distinct": len(distinct), "encoder": settings.encoder}
    if settings.semantic and len(distinct) > 1:
        found, counts = _semantic(
            [texts[i] for i in distinct],
            [plain[i] for i in distinct],
            settings,
            encoder,
            say,
            mapped,
        )
        merged = {distinct[i]: (distinct[j], s) for i, (j, s) in found.items()}
        report |= counts
    kept: list[GradedInstruction] = []
    dropped: list[Dropped] = []
    kinds: Counter[str] = Counter()
    for i, row in enumerate(rows):
        root, similarity = merged.get(first[i], (first[i], 1.0))
        if root == i:
            kept.append(row)
            continue
        kind = "exact" if root == first[i] else "semantic"
        kinds[kind] += 1
        detail = {"duplicate_of": ids[root], "similarity": round(similarity, 4), "kind": kind}
        dropped.append(Dropped(row.id, "duplicate", detail))
    return StageResult(kept, dropped, {"kinds": dict(sorted(kinds.items())), **report})


# --- exact ----------------------------------------------------------------------------------------

# What `normalise` puts aside and yet means something: a decimal point, a minus sign, arrows.
_SIGN = re.compile(r"[0-9↑↓±]")  # quick: most texts have none
_SIGNS = re.compile(r"\d+[.,]\d+|(?<![\w)])[-−]\d+|[↑↓±]")


def _exact(rows: Sequence[GradedInstruction], texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """The first row with the same conversation for each row, and the normalised texts."""
    seen: dict[tuple[Any, ...], int] = {}
    first: list[int] = []
    plain: list[str] = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        flat = normalise(text)
        turns: tuple[Any, ...] = ()
        if len(row.messages) > 1:
            turns = tuple((m.role, normalise(m.content)) for m in row.messages)
        # A text without a word is compared as it stands.
        signs = tuple(_SIGNS.findall(text)) if _SIGN.search(text) else ()
        key = (flat or text, turns, signs)
        first.append(seen.setdefault(key, i))
        plain.append(flat)
    return first, plain


# --- semantic -------------------------------------------------------------------------------------


def _semantic(
    texts: Sequence[str],
    plain: Sequence[str],
    settings: DedupSettings,
    encoder: Encoder | None,
    say: Progress,
    mapped: Mapped | None,
) -> tuple[dict[int, tuple[int, float]], dict[str, Any]]:
    """Later row → (kept row, cosine), and counts for the report."""
    order = np.array([zlib.crc32(text.encode()) for text in plain])
    counts: Counter[str] = Counter(word for text in plain for word in text.split())
    # Any slip for the vectors, which only say where to look; clear ones for the guard.
    loose, clear = corrections(counts, ratio=1), corrections(counts, ratio=SLIP_RATIO)
    vectors = _encode([_spelt(text, text, loose) for text in plain], order, settings, encoder, say)
    near = nearest_earlier(
        vectors,
        least=settings.threshold,
        count=settings.neighbours,
        block=settings.batch,
        order=order,
        threads=settings.workers,
        progress=say,
    )
    read: list[Facts] = []
    vocabulary = None
    if settings.guard:
        spelt = [_spelt(text, flat, clear) for text, flat in zip(texts, plain, strict=True)]
        read = _read(spelt, settings, say, mapped)
        rows = Counter(word for f in read for word in f.words)
        vocabulary = Vocabulary(rows, len(read), rare=settings.rare, unshared=settings.unshared)
    merged, reasons, saved = _keep_first(vectors, near, read, vocabulary, settings, say)
    return merged, {
        "alike_pairs": len(near.indices),
        "compared_pairs": near.compared,
        "kept_apart_pairs": dict(sorted(reasons.items())),
        "rows_kept_by_guard": saved,
    }


def _spelt(text: str, flat: str, slips: Mapping[str, str]) -> str:
    return text if slips.keys().isdisjoint(flat.split()) else respelt(text, slips)


def _keep_first(
    vectors: Whole,
    near: Neighbours,
    read: Sequence[Facts],
    vocabulary: Vocabulary | None,
    settings: DedupSettings,
    say: Progress,
) -> tuple[dict[int, tuple[int, float]], Counter[str], int]:
    """Go through the rows in order; each is compared with the kept rows behind its neighbours.

    A neighbour that was dropped stands for the row it duplicates, which then has to be alike
    itself. All are looked at, most alike first: the guard may refuse the nearest and not the next.
    """
    merged: dict[int, tuple[int, float]] = {}
    reasons: Counter[str] = Counter()
    saved = 0
    size = len(vectors)
    starts = near.starts.tolist()
    for i in range(size):
        if i % 65_536 == 0:
            say("deciding", i, size)
        if starts[i] == starts[i + 1]:
            continue
        roots: dict[int, float] = {}
        for j in near.indices[starts[i] : starts[i + 1]].tolist():
            root = merged[j][0] if j in merged else j
            if root not in roots:
                roots[root] = vectors.cosine(i, root)
        refused = False
        for root, cosine in sorted(roots.items(), key=lambda pair: (-pair[1], pair[0])):
            if cosine < settings.threshold:
                break
            reason = differs(read[i], read[root], vocabulary) if read else None
            if reason is None:
                merged[i] = (root, cosine)
                break
            reasons[reason] += 1
            refused = True
        saved += refused and i not in merged
    say("deciding", size, size)
    return merged, reasons, saved


def _read(
    texts: Sequence[str], settings: DedupSettings, say: Progress, mapped: Mapped | None
) -> list[Facts]:
    """The facts of every text, in this process, in several, or elsewhere."""
    out: list[Facts] = []
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    reading = mapped(_facts_of, chunks) if mapped else _mapped(chunks, settings.workers)
    for read in reading:
        if mapped or settings.workers > 1:
            # Strings from another process are new objects; one each for a word is enough.
            read = [_interned(f) for f in read]
        out += read
        say("reading facts", len(out), len(texts))
    return out


def _mapped(chunks: Sequence[Sequence[str]], workers: int) -> Iterator[list[Facts]]:
    if workers == 1 or len(chunks) < 2:
        yield from map(_facts_of, chunks)
        return
    # Not fork: threads of BLAS and of the tokenizer may hold locks at this moment.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_facts_of, chunks)


def _facts_of(texts: Sequence[str]) -> list[Facts]:
    return [facts(text) for text in texts]


def _interned(f: Facts) -> Facts:
    return Facts(
        f.quantities,
        f.ages,
        f.durations,
        f.numbers,
        tuple(map(intern, f.negations)),
        tuple(map(intern, f.sides)),
        tuple(map(intern, f.words)),
    )


# --- vectors --------------------------------------------------------------------------------------


def _encode(
    plain: Sequence[str],
    order: np.ndarray,
    settings: DedupSettings,
    encoder: Encoder | None,
    say: Progress,
) -> Whole:
    model = encoder if encoder is not None else _load(settings.encoder)
    model = _weighted(model, plain, order, settings.smoothing)
    parts: list[Whole] = []
    # Rounded part by part, so that there is never a float matrix of all rows.
    for start in range(0, len(plain), 32_768):
        say("encoding", start, len(plain))
        texts = list(plain[start : start + 32_768])
        parts.append(whole(np.asarray(_vectors(model, texts, settings.batch))))
    say("encoding", len(plain), len(plain))
    return Whole(
        np.concatenate([p.values for p in parts]), np.concatenate([p.squares for p in parts])
    )


def _vectors(model: Any, texts: list[str], batch: int) -> Any:
    if hasattr(model, "embedding"):  # a StaticModel, which would cut long texts
        return model.encode(texts, max_length=None, batch_size=batch)
    return model.encode(texts)


def _load(name: str) -> Any:
    if name == "embedded":
        from promedical.demo.models import resolve_encoder

        return resolve_encoder()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise CorpusError(
            f"dedup: encoder: {name!r} needs sentence-transformers: "
            "pip install sentence-transformers, or use encoder: embedded"
        ) from None
    return SentenceTransformer(name)


def _weighted(model: Any, plain: Sequence[str], order: np.ndarray, smoothing: float) -> Any:
    """A static model whose frequent words weigh less; any other model unchanged."""
    if not smoothing or not hasattr(model, "embedding") or model.weights is not None:
        return model
    from model2vec import StaticModel

    sample = [plain[i] for i in np.argsort(order, kind="stable")[:100_000]]
    counts = np.zeros(len(model.tokens))
    for start in range(0, len(sample), 8192):
        for ids in model.tokenize(sample[start : start + 8192]):
            np.add.at(counts, ids, 1)
    shares = counts / max(1.0, counts.sum())
    weights = (smoothing / (smoothing + shares)).astype(np.float32)
    return StaticModel(
        model.embedding, model.tokenizer, normalize=True, weights=weights, max_length=None
    )
