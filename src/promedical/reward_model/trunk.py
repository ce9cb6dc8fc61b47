"""Keeps what frozen layers compute, so that no segment goes through them twice.

With frozen lower layers the hidden states of a segment depend on its tokens and its ancestors'
only. They are computed once for each path and shared by epochs, by the scalar baseline (whose
trees hold the same conversations and responses) and by grading. Memory: tokens × d × 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.tree import PackedRow

__all__ = ["TrunkCache"]


class TrunkCache:
    """Hidden states after the frozen layers, by path of segments.

    Args:
        model: whose frozen layers are run; only models with the same frozen weights may read.
        shared: whether rows that hold the same path share it. Not shared, a row's states never
            depend on which rows came before it, not in the last bit, so that a run that is killed
            and goes on ends with the same weights.
    """

    def __init__(self, model: TreeRewardModel, *, shared: bool = True) -> None:
        self.model = model
        self.shared = shared
        self._states: dict[tuple[tuple[int, ...], ...], Tensor] = {}
        self._rows: dict[tuple[tuple[tuple[int, ...], ...], ...], Tensor] = {}
        self.computed_tokens = 0

    def hidden(self, row: PackedRow) -> Tensor:
        """The row's trunk output, shape [tokens, d]."""
        if not self.shared:
            key = tuple(_segment_paths(row))
            if key not in self._rows:
                self._rows[key] = self.model.trunk(row)
                self.computed_tokens += len(row)
            return self._rows[key]
        paths = _segment_paths(row)
        if any(path not in self._states for path in paths):
            states = self.model.trunk(row)
            self.computed_tokens += len(row)
            for path, segment in zip(paths, row.segments, strict=True):
                self._states[path] = states[segment.start : segment.stop].clone()
        return torch.cat([self._states[path] for path in paths])

    def same_trunk(self, other: TreeRewardModel) -> bool:
        """Whether another model's frozen layers hold the same weights, bit for bit."""
        if other.frozen_layers != self.model.frozen_layers:
            return False
        mine, theirs = self.model.frozen_parameters(), other.frozen_parameters()
        return all(torch.equal(a, b.to(a.device)) for a, b in zip(mine, theirs, strict=True))


def _segment_paths(row: PackedRow) -> list[tuple[tuple[int, ...], ...]]:
    paths: list[tuple[tuple[int, ...], ...]] = []
    for segment in row.segments:
        tokens = row.input_ids[segment.start : segment.stop]
        above = paths[segment.parent] if segment.parent >= 0 else ()
        paths.append((*above, tokens))
    return paths
