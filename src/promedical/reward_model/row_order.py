"""In which order packed rows are trained on, and which process reads which.

An optimiser step is the next `batch` rows of a random order that depends on seed and epoch alone,
so it holds the same rows whatever the number of processes. Within a step the rows are dealt to the
processes so that their costs are even (`balance_rows`). Where they cannot be dealt out evenly a
process gets the empty row, which costs next to nothing and has no term: every process must run
as many forward passes as the others, and a repeated row would count twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from promedical.reward_model.balance_rows import assign
from promedical.reward_model.loss import LossTerms, TrainingRow
from promedical.reward_model.tree import Leaf, Tree, pack

__all__ = ["RowOrder", "empty_row"]


def empty_row(token: int = 0) -> TrainingRow:
    """A row of three tokens without a loss term."""
    tree = Tree((token,), ((token,),), (Leaf(0, 0, (token,)),))
    (row,) = pack([tree], 3)
    return TrainingRow(row, LossTerms(pairs=(), points=(), items=0))


class RowOrder(Sampler[int]):
    """Indices of rows, one process's after the other's; the empty row is index `len(costs)`.

    Entry k is for process k mod `processes`, as accelerate deals batches out.

    Args:
        costs: of each row.
        batch: rows an optimiser step, over all processes.
        processes: how many there are.
        seed: of the order.
        epoch: says which epoch begins when it is asked.
    """

    def __init__(
        self,
        costs: Sequence[float],
        batch: int,
        *,
        processes: int = 1,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.costs = costs
        self.batch = batch
        self.processes = processes
        self.seed = seed
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch."""
        return -(-len(self.costs) // self.batch)

    @property
    def rows_a_process(self) -> int:
        """Rows of a full step that each process runs, empty ones too."""
        return -(-self.batch // self.processes)

    def __len__(self) -> int:
        full, rest = divmod(len(self.costs), self.batch)
        return self.processes * (full * self.rows_a_process + -(-rest // self.processes))

    def __iter__(self) -> Iterator[int]:
        # Seed and permutation are those of accelerate's seedable random sampler.
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        for start in range(0, len(order), self.batch):
            yield from self._deal(order[start : start + self.batch])

    def _deal(self, step: Sequence[int]) -> Iterator[int]:
        if self.processes == 1:
            yield from step
            return
        dealt = assign([self.costs[row] for row in step], self.processes)
        empty = len(self.costs)
        for turn in range(-(-len(step) // self.processes)):
            for mine in dealt:
                yield step[mine[turn]] if turn < len(mine) else empty
