"""Which vectors are alike: each one's nearest earlier ones, exactly computed within cells.

Vectors are rounded to small integers, so that every product is a whole number below 2^24 and
float32 matrix products of them are exact: the result depends neither on block sizes nor on the
number of threads, and is the same from either side of a pair. Up to `EXACT` vectors every pair is
compared; beyond that vectors are put into the cells of their nearest centroids (spherical k-means
on a sample chosen by content, not by position), and pairs that share a cell are compared.

Left to others: what the vectors stand for, and whether an alike pair is the same
(`promedical.corpus.dedup`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = ["EXACT", "Neighbours", "Whole", "nearest_earlier", "whole"]

T = TypeVar("T")
R = TypeVar("R")

EXACT = 20_000
SAMPLE = 100_000
_PENDING = 12_000_000  # pairs held before they are thinned, which bounds memory
_BITS = 24  # of a row's number in a packed pair; also float32's exact whole numbers
_SCORES = 1 << 15
_TILE = 4096  # columns at once: with a block's rows, 8 MB of products, which a cache holds


@dataclass(frozen=True)
class Whole:
    """Vectors of whole numbers.

    Args:
        values: n × d, int8.
        squares: each vector's squared length, int64.
    """

    values: np.ndarray
    squares: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def cosine(self, i: int, j: int) -> float:
        """Of two vectors; symmetric to the last bit."""
        dot = int(self.values[i].astype(np.int32) @ self.values[j].astype(np.int32))
        square = float(self.squares[i] * self.squares[j])
        return dot / square**0.5 if square else 0.0


@dataclass(frozen=True)
class Neighbours:
    """Each vector's nearest earlier ones, most alike first.

    Args:
        starts: n + 1 offsets into the others.
        indices, cosines: the neighbours of i lie in [starts[i], starts[i + 1]).
        compared: number of pairs whose cosine was computed.
    """

    starts: np.ndarray
    indices: np.ndarray
    cosines: np.ndarray
    compared: int


def whole(vectors: np.ndarray) -> Whole:
    """Round vectors to whole numbers, each with its largest component at a fixed peak.

    Args:
        vectors: n × d floats; a vector of zeros stays one and is like nothing.
    """
    peak = min(127, int((2**_BITS / max(1, vectors.shape[1])) ** 0.5))
    values = np.empty(vectors.shape, dtype=np.int8)
    for start in range(0, len(vectors), 65_536):
        block = np.asarray(vectors[start : start + 65_536], dtype=np.float64)
        largest = np.abs(block).max(axis=1, initial=0.0, keepdims=True)
        values[start : start + len(block)] = np.rint(
            block * (peak / np.where(largest > 0, largest, 1.0))
        )
    squares = np.zeros(len(values), dtype=np.int64)
    for start in range(0, len(values), 65_536):
        block = values[start : start + 65_536].astype(np.int32)
        squares[start : start + len(block)] = (block * block).sum(axis=1)
    return Whole(values, squares)


def nearest_earlier(
    vectors: Whole,
    *,
    least: float,
    count: int,
    cell: int = 800,
    probes: int = 3,
    block: int = 512,
    order: np.ndarray | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Neighbours:
    """For every vector the most alike ones before it.

    Args:
        least: smallest cosine that counts.
        count: neighbours kept for a vector at most.
        cell: vectors for each centroid; decides only beyond `EXACT` vectors, as does the next.
        probes: cells that a vector is in.
        block: vectors compared at once; no influence on the result.
        order: a number for each vector that depends on its content alone; the smallest are the
            sample for the centroids. The vectors' positions if None.
        threads: cells compared at the same time; no influence on the result.
    """
    packed: list[np.ndarray] = []
    pending = compared = done = 0
    cells = list(_cells(vectors, cell, probes, order))
    total = sum(len(c) ** 2 for c in cells)

    def alike(members: np.ndarray) -> tuple[int, np.ndarray, int]:
        return len(members), *_compare(vectors, members, least, count, block)

    for size, found, pairs in _threaded(alike, cells, threads):
        packed.append(found)
        pending += len(found)
        compared += pairs
        if pending > _PENDING:
            packed = [_thin(packed, count)]
            pending = 0
        done += size**2
        if progress is not None and total:
            progress("comparing", done, total)
    return _unpack(_thin(packed, count), len(vectors), compared)


def _threaded(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """In the items' order; only a few results wait to be taken, which bounds memory."""
    if threads == 1:
        yield from map(work, items)
        return
    from threadpoolctl import threadpool_limits

    # numpy lets go of the interpreter while it works; BLAS with threads of its own would wait.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _compare(
    vectors: Whole, members: np.ndarray, least: float, count: int, block: int
) -> tuple[np.ndarray, int]:
    """Pairs of a cell that are alike, packed into one number each: later, distance, earlier.

    Of each later vector only the `count` most alike: where there are many copies of a text, what
    is found is many times what is kept.
    """
    squares = vectors.squares[members]
    values = vectors.values[members].astype(np.float32)
    lengths = np.sqrt(squares).astype(np.float32)
    # The margin is far above float32's rounding; the exact cosine decides below.
    bound = (least - 1e-3) * lengths
    packed = [np.empty(0, dtype=np.int64)]
    compared = 0
    for start in range(0, len(members), block):
        end = min(start + block, len(members))
        found = []
        for left in range(0, end, _TILE):
            right = min(left + _TILE, end)
            dots = values[start:end] @ values[left:right].T
            # Of a flat array: numpy is several times slower where there are two axes.
            high = dots >= bound[start:end, None] * lengths[None, left:right]
            at = np.flatnonzero(high.ravel())
            later, earlier = np.divmod(at, right - left)
            later, earlier, dots = later + start, earlier + left, dots.ravel()[at]
            before = earlier < later
            later, earlier, dots = later[before], earlier[before], dots[before]
            square = (squares[later] * squares[earlier]).astype(np.float64)
            cosine = dots / np.sqrt(np.maximum(square, 1.0))
            alike = cosine >= least
            i, j, cosine = members[later[alike]], members[earlier[alike]], cosine[alike]
            distance = np.rint((1 - np.minimum(cosine, 1.0)) * (_SCORES - 1)).astype(np.int64)
            found.append((i << (_BITS + 15)) | (distance << _BITS) | j)
        packed.append(_thin(found, count))
        compared += (end - start) * (start + end) // 2
    return np.concatenate(packed), compared


def _thin(packed: list[np.ndarray], count: int) -> np.ndarray:
    """Without repeats, and of each later vector only the most alike pairs."""
    if not packed:
        return np.empty(0, dtype=np.int64)
    pairs = np.sort(np.concatenate(packed))
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]]
    later = pairs >> (_BITS + 15)
    first = np.searchsorted(later, later, side="left")
    return pairs[np.arange(len(pairs)) - first < count]


def _unpack(pairs: np.ndarray, size: int, compared: int) -> Neighbours:
    later = pairs >> (_BITS + 15)
    starts = np.searchsorted(later, np.arange(size + 1), side="left")
    cosines = 1 - ((pairs >> _BITS) & (_SCORES - 1)) / (_SCORES - 1)
    return Neighbours(starts, pairs & ((1 << _BITS) - 1), cosines, compared)


def _cells(
    vectors: Whole, cell: int, probes: int, order: np.ndarray | None
) -> Iterator[np.ndarray]:
    """The members of each cell, in input order."""
    size = len(vectors)
    if size >= 1 << _BITS:
        raise ValueError(f"{size} vectors: at most {(1 << _BITS) - 1} can be compared at once")
    if size <= EXACT:
        yield np.arange(size)
        return
    centroids = _centroids(vectors, max(2, size // cell), order)
    probes = min(probes, len(centroids))
    nearest = np.empty((size, probes), dtype=np.int32)
    for start in range(0, size, 8192):
        alike = _alike(vectors.values[start : start + 8192], centroids)
        # A stable sort: equal similarities have to fall the same way everywhere.
        nearest[start : start + 8192] = _largest(alike, probes)
    flat = nearest.ravel()
    by_cell = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat[by_cell], np.arange(len(centroids) + 1))
    for c in range(len(centroids)):
        yield by_cell[ends[c] : ends[c + 1]] // probes


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Columns of each row's largest values; the first of equal ones."""
    values = values.copy()
    out = np.empty((len(values), count), dtype=np.int32)
    rows = np.arange(len(values))
    for k in range(count):
        out[:, k] = values.argmax(axis=1)
        values[rows, out[:, k]] = -np.inf
    return out


def _alike(values: np.ndarray, centroids: Whole) -> np.ndarray:
    """Cosines up to the row's own length, which does not change their order."""
    dots = values.astype(np.float32) @ centroids.values.astype(np.float32).T
    lengths = np.sqrt(np.maximum(centroids.squares, 1)).astype(np.float32)
    return np.asarray(dots / lengths)


def _centroids(vectors: Whole, count: int, order: np.ndarray | None, rounds: int = 6) -> Whole:
    """Spherical k-means with whole-number sums, so that the same sample gives the same cells."""
    size = len(vectors)
    first = np.arange(size) if order is None else np.argsort(order, kind="stable")
    sample = first[: max(SAMPLE, 32 * count)]
    values = vectors.values[sample]
    centroids = Whole(values[:count], vectors.squares[sample[:count]])
    for _ in range(rounds):
        sums = np.zeros((count, values.shape[1]), dtype=np.int64)
        for start in range(0, len(values), 8192):
            block = values[start : start + 8192]
            nearest = _alike(block, centroids).argmax(axis=1)
            np.add.at(sums, nearest, block.astype(np.int64))
        empty = ~sums.any(axis=1)
        sums[empty] = centroids.values[empty]
        centroids = whole(sums)
    return centroids
