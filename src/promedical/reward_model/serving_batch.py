"""One thread owns the model: trees of many requests in, packed rows through it, scores back out.

Requests that wait are taken together, oldest first, up to a budget of unique tokens, and packed
into rows (section 7.1). There is no timer: while one batch is scored the next one gathers. When a
row raises, the requests in it are tried again one by one, and a row of one request is halved until
what is at fault is alone: it fails, and nothing else does. A request whose client went away is
skipped. Left to others: HTTP (`serving_app`), how trees are laid
out (`tree`), what scores mean (`grade`, `calibrate`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.serving_metrics import ServingMetrics
from promedical.reward_model.tree import PackedLeaf, PackedRow, Tree, pack

__all__ = [
    "Batcher",
    "RefusedError",
    "RowScorer",
    "StoppedError",
    "TreeScores",
    "row_scorer",
    "unique_tokens",
]

logger = logging.getLogger("promedical.serve")

RowScorer = Callable[[PackedRow], list[float]]

# A guess until the first batch was measured.
FIRST_TOKENS_PER_SECOND = 1000.0
LONGEST_RETRY_S = 60


class StoppedError(RuntimeError):
    """A request that was accepted but not scored, because the worker ended first."""


@dataclass(frozen=True)
class TreeScores:
    """What was found for one request.

    Args:
        values: for each of its trees s of every leaf, NaN where there is none.
        failures: (tree, leaf) → why there is none; it names errors, never a text.
    """

    values: list[list[float]]
    failures: dict[tuple[int, int], str]


class RefusedError(RuntimeError):
    """A request that is not accepted.

    Args:
        reason: "queue_full", "draining" or "failed".
        retry_after: seconds after which it may be worth another try.
    """

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True, eq=False)  # a job equals itself alone, however alike what is asked
class _Job:
    trees: tuple[Tree, ...]
    tokens: int
    scores: Future[TreeScores] = field(default_factory=Future)


def row_scorer(model: TreeRewardModel) -> RowScorer:
    """A row's scores, one for each leaf, as plain numbers."""

    def score(row: PackedRow) -> list[float]:
        with torch.inference_mode():
            scores: list[float] = model.score(row).float().cpu().tolist()
        return scores

    return score


def unique_tokens(tree: Tree) -> int:
    """Tokens of a tree, each counted once."""
    leaves = sum(len(leaf.tokens) for leaf in tree.leaves)
    return len(tree.prompt) + sum(map(len, tree.responses)) + leaves


class Batcher:
    """Accepts requests, batches their trees, and gives each its own scores.

    Args:
        score_row: the model; called from the worker's thread alone.
        row_tokens: longest packed row.
        batch_tokens: unique tokens taken into one batch; a larger request is a batch of its own.
        max_requests: how many may be accepted and not yet answered.
        metrics: where it counts.
    """

    def __init__(
        self,
        score_row: RowScorer,
        *,
        row_tokens: int,
        batch_tokens: int,
        max_requests: int,
        metrics: ServingMetrics,
    ) -> None:
        self.metrics = metrics
        self.accepted = 0
        self.draining = False
        self.failed = False
        self._score_row = score_row
        self._row_tokens, self._batch_tokens = row_tokens, batch_tokens
        self._max_requests = max_requests
        self._queue: deque[_Job] = deque()
        self._queued_tokens = 0
        self._rate = FIRST_TOKENS_PER_SECOND
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="promedical-model", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def drain(self) -> None:
        """Accept nothing more; what was accepted is finished."""
        self.draining = True

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what waits, end the worker, and say whether it ended in time.

        What is left after `timeout` seconds is failed, so that nobody waits for ever.
        """
        self.draining = True
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        done = not self._thread.is_alive()
        self._fail_waiting("the server stopped")
        return done

    @contextmanager
    def slot(self) -> Iterator[None]:
        """A place among the accepted requests, for as long as one is dealt with.

        Raises:
            RefusedError: there is none, or the server is going down.
        """
        with self._changed:
            if self.failed:
                raise RefusedError("failed", LONGEST_RETRY_S)
            if self.draining:
                raise RefusedError("draining", LONGEST_RETRY_S)
            if self.accepted >= self._max_requests:
                seconds = math.ceil(self._queued_tokens / self._rate)
                raise RefusedError("queue_full", min(max(seconds, 1), LONGEST_RETRY_S))
            self.accepted += 1
            self.metrics.accepted.set(self.accepted)
        try:
            yield
        finally:
            with self._changed:
                self.accepted -= 1
                self.metrics.accepted.set(self.accepted)

    def submit(self, trees: Sequence[Tree]) -> Future[TreeScores]:
        """Queue a request's trees.

        Returns:
            A future of its scores; cancelling it takes the request out of the queue. It raises
            `StoppedError` if the worker ended first.
        """
        job = _Job(tuple(trees), sum(map(unique_tokens, trees)))
        with self._changed:
            if self._stopping or self.failed:
                job.scores.set_exception(StoppedError("the server stopped"))
                return job.scores
            self._queue.append(job)
            self._count(job.tokens)
            self._changed.notify()
        job.scores.add_done_callback(lambda scores: self._forget(job) if scores.cancelled() else ())
        return job.scores

    def _forget(self, job: _Job) -> None:
        """Take a cancelled job out of the queue now: its place is given to the next client."""
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._count(-job.tokens)

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        self.metrics.queue_tokens.set(self._queued_tokens)
        self.metrics.queue_requests.set(len(self._queue))

    def _run(self) -> None:
        batch: list[_Job] = []
        try:
            while batch := self._take():
                self._score(batch)
        except BaseException as error:  # a bug here must not leave clients waiting
            logger.error("the model's thread ended: %s", type(error).__name__)
            self.failed = True
            for job in batch:
                if not job.scores.done():
                    job.scores.set_exception(StoppedError("the model's thread ended"))
        finally:
            self._fail_waiting("the model's thread ended")

    def _fail_waiting(self, why: str) -> None:
        with self._changed:
            while self._queue:
                job = self._queue.popleft()
                self._count(-job.tokens)
                if job.scores.set_running_or_notify_cancel():
                    job.scores.set_exception(StoppedError(why))

    def _take(self) -> list[_Job]:
        """Waiting requests up to the budget, oldest first; none when the worker is to end."""
        batch: list[_Job] = []
        room = self._batch_tokens
        with self._changed:
            while True:
                while self._queue and (not batch or self._queue[0].tokens <= room):
                    job = self._queue.popleft()
                    self._count(-job.tokens)
                    if job.scores.set_running_or_notify_cancel():
                        batch.append(job)
                        room -= job.tokens
                if batch or self._stopping:
                    return batch
                self._changed.wait()

    def _score(self, batch: Sequence[_Job]) -> None:
        tokens, started = sum(job.tokens for job in batch), time.perf_counter()
        trees = [tree for job in batch for tree in job.trees]
        alone = len(batch) == 1
        values, failures, raised = self._score_trees(trees, halve=alone)
        # Counted before it is answered: whoever has an answer finds it in /metrics.
        seconds = time.perf_counter() - started
        self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_requests.observe(len(batch))
        self.metrics.batch_seconds.observe(seconds)
        at = 0
        again: list[_Job] = []
        for job in batch:
            own = range(at, at + len(job.trees))
            at += len(job.trees)
            if not alone and any(index in raised for index in own):
                again.append(job)
                continue
            why = {(t - own.start, i): reason for (t, i), reason in failures.items() if t in own}
            job.scores.set_result(TreeScores([values[t] for t in own], why))
        if again:
            self.metrics.failures.labels("batch").inc()
            logger.warning("a batch failed; %d of its requests are tried alone", len(again))
        for job in again:
            self._score([job])

    def _score_trees(
        self, trees: Sequence[Tree], *, halve: bool
    ) -> tuple[list[list[float]], dict[tuple[int, int], str], set[int]]:
        """Scores, why there is none, by (tree, leaf), and the trees in rows that raised.

        Args:
            halve: halve a row that raises until what is at fault is alone.
        """
        values = [[math.nan] * len(tree.leaves) for tree in trees]
        failures: dict[tuple[int, int], str] = {}
        raised: set[int] = set()
        waiting = [[list(range(len(tree.leaves))) for tree in trees]]
        while waiting:
            for row in pack(trees, self._row_tokens, points=waiting.pop(), share_rows=True):
                found, reason = self._score_or_reason(row)
                for leaf, s in zip(row.leaves, found, strict=bool(found)):
                    values[leaf.tree][leaf.leaf] = s
                    if not math.isfinite(s):
                        failures[leaf.tree, leaf.leaf] = f"the model's score is {s}"
                if found:
                    continue
                raised |= {leaf.tree for leaf in row.leaves}
                if halve and len(row.leaves) > 1:
                    middle = len(row.leaves) // 2
                    waiting += [
                        _chosen(trees, part) for part in (row.leaves[:middle], row.leaves[middle:])
                    ]
                else:
                    failures |= {(leaf.tree, leaf.leaf): reason for leaf in row.leaves}
        return values, failures, raised

    def _score_or_reason(self, row: PackedRow) -> tuple[list[float], str]:
        try:
            return self._score_row(row), ""
        except Exception as error:  # its message may hold anything; its type does not
            return [], f"the model failed: {type(error).__name__}"


def _chosen(trees: Sequence[Tree], leaves: Sequence[PackedLeaf]) -> list[list[int]]:
    """For each tree which of its leaves are among these."""
    chosen: list[list[int]] = [[] for _ in trees]
    for leaf in leaves:
        chosen[leaf.tree].append(leaf.leaf)
    return chosen
