"""Finished sequences back to trees: what `/classify` is sent shares its prefixes again.

Whoever asks in vLLM's shape sends every path whole: for one conversation with n responses and K
criteria that is n·K sequences which repeat it n·K times and every response K times. Here they
become trees of three levels (section 7.1) that hold as few tokens as such trees can, found by
dynamic programming over the sequences in sorted order. Where a path is cut changes no score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, takewhile

from promedical.reward_model.tree import Leaf, Tree

__all__ = ["MIN_PATH", "shared_trees"]

MIN_PATH = 3  # prompt, response and criterion have a token each
# Sequences that are looked at together; it bounds the work on unkind ones, and the recursion.
GROUP = 64

Path = tuple[int, ...]
# A response: where it ends, and which sequences go on from there.
_Response = tuple[int, int, int]
# A tree: where its prompt ends, and its responses.
_Cuts = tuple[int, tuple[_Response, ...]]
_IMPOSSIBLE = 1 << 60


def shared_trees(paths: Sequence[Sequence[int]]) -> tuple[list[Tree], list[list[list[int]]]]:
    """Trees whose leaves are these sequences, equal ones once.

    Args:
        paths: token ids, each at least `MIN_PATH` of them.

    Returns:
        The trees, and for every leaf of each the indices of the sequences that it stands for.
    """
    asked: dict[Path, list[int]] = {}
    for index, path in enumerate(paths):
        asked.setdefault(tuple(path), []).append(index)
    ordered = sorted(asked)
    trees, places = [], []
    for start in range(0, len(ordered), GROUP):
        group = ordered[start : start + GROUP]
        for prompt_end, responses in _cheapest(group):
            leaves: list[Leaf] = []
            place: list[list[int]] = []
            for r, (end, first, last) in enumerate(responses):
                for path in group[first:last]:
                    leaves.append(Leaf(r, len(leaves), path[end:]))
                    place.append(asked[path])
            root = group[responses[0][1]]
            turns = tuple(group[first][prompt_end:end] for end, first, _ in responses)
            trees.append(Tree(root[:prompt_end], turns, tuple(leaves)))
            places.append(place)
    return trees, places


def _cheapest(paths: Sequence[Path]) -> tuple[_Cuts, ...]:
    """The cuts with the fewest tokens; `paths` are sorted and all different."""
    common = [_common(a, b) for a, b in pairwise(paths)]

    @cache
    def depth(first: int, last: int) -> int:
        """Tokens that all of them share, less than any of them has: a leaf is never empty."""
        return min(*common[first : last - 1], min(map(len, paths[first:last])) - 1)

    def parts(first: int, last: int) -> Iterator[tuple[int, int]]:
        """The sub-ranges that share more than the whole range does."""
        shared = depth(first, last)
        cuts = [k + 1 for k in range(first, last - 1) if common[k] == shared]
        # None where the first sequence is the beginning of all others.
        bounds = [first, *(cuts or [first + 1]), last]
        return pairwise(bounds)

    @cache
    def below(first: int, last: int, start: int) -> tuple[int, tuple[_Response, ...]]:
        """Responses and leaves of a range whose first `start` tokens are in the prompt."""
        if last - first == 1:
            length = len(paths[first])
            cost = length - start if length - start >= 2 else _IMPOSSIBLE
            return cost, ((length - 1, first, last),)
        split = [below(*part, start) for part in parts(first, last)]
        best = sum(c for c, _ in split), tuple(r for _, found in split for r in found)
        end = depth(first, last)
        if end > start:
            rest = sum(len(path) - end for path in paths[first:last])
            best = min(best, (end - start + rest, ((end, first, last),)))
        return best

    @cache
    def whole(first: int, last: int) -> tuple[int, tuple[_Cuts, ...]]:
        """Trees of a range."""
        if last - first == 1:
            length = len(paths[first])
            return length, ((1, ((length - 1, first, last),)),)
        found = [whole(*part) for part in parts(first, last)]
        best = sum(c for c, _ in found), tuple(tree for _, trees in found for tree in trees)
        end = depth(first, last)
        if end >= 1:
            cost, responses = below(first, last, 1)
            best = min(best, (1 + cost, ((1, responses),)))
            split = [below(*part, end) for part in parts(first, last)]
            cost = end + sum(c for c, _ in split)
            best = min(best, (cost, ((end, tuple(r for _, found in split for r in found)),)))
        return best

    return whole(0, len(paths))[1]


def _common(a: Path, b: Path) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
