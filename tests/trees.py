"""Random trees of token ids, for the tests of packing and of attention."""

from __future__ import annotations

from hypothesis import strategies as st

from promedical.reward_model.tree import Leaf, Tree

TOKENS = range(3, 60)


def runs(longest: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Token ids of one segment."""
    return st.lists(st.sampled_from(TOKENS), min_size=1, max_size=longest).map(tuple)


@st.composite
def trees(draw: st.DrawFn, *, longest: int = 9, responses: int = 4, criteria: int = 4) -> Tree:
    """A tree with at least one leaf, its leaves in any order."""
    count = draw(st.integers(1, responses))
    questions = draw(st.lists(runs(longest), min_size=1, max_size=criteria))
    every = [(r, c) for r in range(count) for c in range(len(questions))]
    asked = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    return Tree(
        draw(runs(longest)),
        tuple(draw(runs(longest)) for _ in range(count)),
        tuple(Leaf(r, c, questions[c]) for r, c in asked),
    )


def possible_pairs(tree: Tree) -> list[tuple[int, int]]:
    """Every pair of leaves that share a criterion."""
    leaves = tree.leaves
    return [
        (a, b)
        for a in range(len(leaves))
        for b in range(a + 1, len(leaves))
        if leaves[a].criterion == leaves[b].criterion
    ]
