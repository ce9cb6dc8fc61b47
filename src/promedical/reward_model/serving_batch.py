"""One thread owns the model: trees of many requests in, packed rows through it, scores back out.

Requests that wait are taken together, oldest first, up to a budget of unique tokens, and packed
into rows (section 7.1). There is no timer: while one batch is scored the next one gathers. When a
row raises, the requests in it are tried again one by one, so that only the one at fault fails. A
request whose client went away is skipped. Left to others: HTTP (`serving_app`), how trees are laid
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
from promedical.reward_model.tree import PackedRow, Tree, pack

__all__ = ["Batcher", "RefusedError", "RowScorer", "ScoringError", "row_scorer", "unique_tokens"]

logger = logging.getLogger("promedical.serve")

RowScorer = Callable[[PackedRow], list[float]]
TreeScores = list[list[float]]

# A guess until the first batch was measured.
FIRST_TOKENS_PER_SECOND = 1000.0
LONGEST_RETRY_S = 60


class ScoringError(RuntimeError):
    """The model failed on one request, tried alone; the message names the error, never a text."""


class RefusedError(RuntimeError):
    """A request that is not accepted.

    Args:
        reason: "queue_full", "draining" or "failed".
        retry_after: seconds after which it may be worth another try.
    """

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
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
            A future of one list a tree with one score a leaf, NaN where the model gave none;
            cancelling it takes the request out of the queue. It raises `ScoringError` if the
            model failed on this request alone.
        """
        job = _Job(tuple(trees), sum(map(unique_tokens, trees)))
        with self._changed:
            if self._stopping or self.failed:
                job.scores.set_exception(ScoringError("the server stopped"))
                return job.scores
            self._queue.append(job)
            self._count(job.tokens)
            self._changed.notify()
        return job.scores

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
                    job.scores.set_exception(ScoringError("the model's thread ended"))
        finally:
            self._fail_waiting("the model's thread ended")

    def _fail_waiting(self, why: str) -> None:
        with self._changed:
            while self._queue:
                job = self._queue.popleft()
                self._count(-job.tokens)
                if job.scores.set_running_or_notify_cancel():
                    job.scores.set_exception(ScoringError(why))

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
        scores, broken = self._score_trees([tree for job in batch for tree in job.trees])
        at = 0
        again: list[_Job] = []
        for job in batch:
            own = range(at, at + len(job.trees))
            at += len(job.trees)
            if not any(index in broken for index in own):
                job.scores.set_result([scores[index] for index in own])
            elif len(batch) > 1:
                again.append(job)
            else:
                job.scores.set_exception(ScoringError(next(broken[i] for i in own if i in broken)))
        if again:
            self.metrics.failures.labels("batch").inc()
            logger.warning("a batch failed; %d of its requests are tried alone", len(again))
        seconds = time.perf_counter() - started
        self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_requests.observe(len(batch))
        self.metrics.batch_seconds.observe(seconds)
        for job in again:
            self._score([job])

    def _score_trees(self, trees: Sequence[Tree]) -> tuple[TreeScores, dict[int, str]]:
        """Scores of every leaf, and why for each tree that a row failed with."""
        scores: TreeScores = [[math.nan] * len(tree.leaves) for tree in trees]
        broken: dict[int, str] = {}
        try:
            rows = pack(trees, self._row_tokens, share_rows=True).rows
        except Exception as error:
            return scores, dict.fromkeys(range(len(trees)), type(error).__name__)
        for row in rows:
            try:
                found = self._score_row(row)
            except Exception as error:  # its message may hold anything; its type does not
                broken |= dict.fromkeys((leaf.tree for leaf in row.leaves), type(error).__name__)
                continue
            for leaf, s in zip(row.leaves, found, strict=True):
                scores[leaf.tree][leaf.leaf] = s
        return scores, broken
