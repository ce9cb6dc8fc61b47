"""Packing: every path is kept, nothing over budget, every pair together, every repeat counted."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.reward_model.tree import Leaf, RowBudgetError, Tree, TreeError, pack, paths
from trees import possible_pairs, trees


def tree_of(x: int, ys: list[int], cs: list[tuple[int, int, int]]) -> Tree:
    """A tree with segments of these lengths; leaves are (response, criterion, length)."""
    return Tree(
        (1,) * x,
        tuple((2,) * y for y in ys),
        tuple(Leaf(response, criterion, (3,) * size) for response, criterion, size in cs),
    )


@st.composite
def jobs(draw):
    """Trees, some of their possible pairs, some points, and a budget that fits any one pair."""
    forest = draw(st.lists(trees(), min_size=1, max_size=4))
    pairs, points, need = [], [], 1
    for tree in forest:
        possible = possible_pairs(tree)
        pairs.append(draw(st.lists(st.sampled_from(possible), unique=True)) if possible else [])
        points.append(draw(st.sets(st.integers(0, len(tree.leaves) - 1))))
        need = max([need, *(len(path) for path in paths(tree))])
        for a, b in possible:
            first, second = tree.leaves[a], tree.leaves[b]
            size = len(tree.prompt) + len(first.tokens) + len(second.tokens)
            size += sum(len(tree.responses[r]) for r in {first.response, second.response})
            need = max(need, size)
    return forest, pairs, points, need + draw(st.integers(0, 40))


@settings(max_examples=100)
@given(jobs(), st.booleans())
def test_rows_hold_what_is_used_within_the_budget(job, share_rows):
    forest, pairs, points, budget = job
    packing = pack(forest, budget, pairs, points, share_rows=share_rows)
    copies, counted, terms = Counter(), Counter(), Counter()
    for row in packing:
        assert len(row) <= budget
        assert len(row.position_ids) == len(row.segment_ids) == len(row)
        for leaf, path in zip(row.leaves, row.paths(), strict=True):
            assert path == paths(forest[leaf.tree])[leaf.leaf]
            assert leaf.repeat == ((leaf.tree, leaf.leaf) in copies)
            copies[leaf.tree, leaf.leaf] += 1
            counted[leaf.tree, leaf.leaf] += not leaf.repeat
        for pair in row.pairs:
            ends = row.leaves[pair.first], row.leaves[pair.second]
            assert tuple(e.leaf for e in ends) == pairs[pair.tree][pair.pair]
            terms[pair.tree, pair.pair] += 1
    used = {(t, i) for t, chosen in enumerate(points) for i in chosen}
    used |= {(t, i) for t, chosen in enumerate(pairs) for pair in chosen for i in pair}
    assert set(copies) == used
    assert all(count == 1 for count in counted.values())
    assert terms == Counter((t, p) for t, chosen in enumerate(pairs) for p in range(len(chosen)))
    assert packing.repeated_leaves == sum(copies.values()) - len(used)
    assert packing.pruned_leaves == sum(len(t.leaves) for t in forest) - len(used)
    kept = {(t, forest[t].leaves[i].response) for t, i in used}
    assert packing.pruned_responses == sum(len(t.responses) for t in forest) - len(kept)
    once = sum(len(forest[t].prompt) for t in {t for t, _ in used})
    once += sum(len(forest[t].responses[r]) for t, r in kept)
    once += sum(len(forest[t].leaves[i].tokens) for t, i in used)
    assert packing.repeated_tokens == sum(map(len, packing)) - once


# --- several trees in a row -----------------------------------------------------------------------


def roots(row) -> list[int]:
    """The prompt above every segment."""
    found: list[int] = []
    for i, segment in enumerate(row.segments):
        found.append(found[segment.parent] if segment.parent >= 0 else i)
    return found


@settings(max_examples=50)
@given(jobs())
def test_shared_rows_are_laid_out_in_levels_and_keep_trees_apart(job):
    forest, pairs, points, budget = job
    for row in pack(forest, budget, pairs, points, share_rows=True):
        depths = [segment.depth for segment in row.segments]
        assert depths == sorted(depths)
        assert [s.start for s in row.segments] == [0, *(s.stop for s in row.segments)][:-1]
        root = roots(row)
        # Prompts stand for trees; each level is in their order, leaves in that of their responses.
        for depth in range(3):
            above = [s.parent for s in row.segments if s.depth == depth]
            assert above == sorted(above)
        tree_of_root: dict[int, set[int]] = {}
        by_end = {s.stop: i for i, s in enumerate(row.segments)}
        for leaf in row.leaves:
            tree_of_root.setdefault(root[by_end[leaf.last + 1]], set()).add(leaf.tree)
        assert all(len(held) == 1 for held in tree_of_root.values())
        named = [tree for held in tree_of_root.values() for tree in held]
        assert len(set(named)) == len(named) == depths.count(0)


@settings(max_examples=50)
@given(jobs())
def test_sharing_moves_parts_of_trees_and_changes_nothing_in_them(job):
    forest, pairs, points, budget = job
    alone = pack(forest, budget, pairs, points)
    shared = pack(forest, budget, pairs, points, share_rows=True)
    for name in ("pruned_leaves", "split_trees", "repeated_leaves", "repeated_tokens"):
        assert getattr(shared, name) == getattr(alone, name)
    assert sum(map(len, shared)) == sum(map(len, alone))
    assert len(shared) <= len(alone)

    def parts(packing):
        found = Counter()
        for row in packing:
            for tree in {leaf.tree for leaf in row.leaves}:
                leaves = frozenset(leaf.leaf for leaf in row.leaves if leaf.tree == tree)
                found[tree, leaves, frozenset(p.pair for p in row.pairs if p.tree == tree)] += 1
        return found

    assert parts(shared) == parts(alone)
    assert pack(forest, budget, pairs, points, share_rows=True) == shared


@settings(max_examples=100)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=40), st.integers(60, 120))
def test_waste_is_bounded(sizes, budget):
    """Any two rows hold more than one budget, and all but one are full up to the largest tree."""
    forest = [tree_of(1, [1], [(0, 0, size - 2)]) for size in sizes]
    rows = pack(forest, budget, share_rows=True).rows
    lengths = sorted(map(len, rows))
    assert sum(lengths) == sum(sizes)
    if len(rows) > 1:
        assert lengths[0] + lengths[1] > budget
        assert lengths[1] > budget - max(sizes)


def test_rows_of_many_trees_are_almost_full():
    rng = random.Random(0)
    forest = [tree_of(rng.randint(50, 800), [rng.randint(150, 1500)] * 3, []) for _ in range(200)]
    forest = [
        Tree(
            t.prompt, t.responses, tuple(Leaf(r, c, (3,) * 40) for r in range(3) for c in range(7))
        )
        for t in forest
    ]
    packing = pack(forest, 8192, share_rows=True)
    waste = 1 - sum(map(len, packing)) / (8192 * len(packing))
    assert waste < 0.03  # 0.54 with a tree a row
    assert len(pack(forest, 8192)) == 200


@settings(max_examples=50)
@given(trees())
def test_positions_continue_from_the_parent(tree):
    (row,) = pack([tree], 10_000)
    for segment in row.segments:
        assert row.position_ids[segment.start : segment.stop] == tuple(
            range(segment.position, segment.position + segment.length)
        )
        if segment.parent >= 0:
            parent = row.segments[segment.parent]
            assert segment.position == parent.position + parent.length
            assert parent.stop <= segment.start
        else:
            assert segment.position == 0
    for leaf, end in zip(row.leaves, row.leaf_ends, strict=True):
        assert leaf.last == end
        assert row.position_ids[end] == len(paths(tree)[leaf.leaf]) - 1


def test_without_terms_every_leaf_is_used_and_a_fitting_tree_takes_one_row():
    tree = tree_of(5, [4, 6], [(0, 0, 2), (1, 0, 2), (1, 1, 3)])
    packing = pack([tree], 22)
    assert len(packing) == 1
    assert len(packing.rows[0]) == 22
    assert packing.split_trees == packing.repeated_tokens == packing.pruned_leaves == 0


def test_an_unused_response_goes_and_is_counted():
    tree = tree_of(5, [4, 6, 8], [(0, 0, 2), (1, 0, 2), (2, 0, 2)])
    packing = pack([tree], 100, pairs=[[(0, 1)]])
    assert len(packing.rows[0]) == 5 + 4 + 6 + 2 + 2
    assert (packing.pruned_leaves, packing.pruned_responses) == (1, 1)
    assert pack([tree], 100, pairs=[[]]).rows == ()


def test_a_tree_over_budget_is_split_over_criteria_first():
    tree = tree_of(5, [4, 6], [(r, c, 3) for c in range(3) for r in range(2)])
    packing = pack([tree], 15 + 6, pairs=[[(0, 1), (2, 3), (4, 5)]])
    assert [sorted({f.criterion for f in row.leaves}) for row in packing] == [[0], [1], [2]]
    assert packing.split_trees == 1
    assert packing.repeated_tokens == 2 * 15
    assert packing.repeated_leaves == 0


def test_a_criterion_over_budget_is_split_over_pairs_and_repeats_are_marked():
    tree = tree_of(5, [10, 10, 10], [(0, 0, 2), (1, 0, 2), (2, 0, 2)])
    packing = pack([tree], 29, pairs=[[(0, 1), (0, 2), (1, 2)]])
    assert [[f.leaf for f in row.leaves] for row in packing] == [[0, 1], [0, 2], [1, 2]]
    assert [[f.repeat for f in row.leaves] for row in packing] == [
        [False, False],
        [True, False],
        [True, True],
    ]
    assert packing.repeated_leaves == 3


def test_sizes_are_named_when_one_path_or_pair_cannot_fit():
    tree = tree_of(5, [4, 6], [(0, 0, 2), (1, 0, 3)])
    with pytest.raises(
        RowBudgetError, match=r"one path takes prompt 5 \+ response 1 6 \+ leaf 1 3"
    ):
        pack([tree], 13)
    with pytest.raises(RowBudgetError, match=r"tree 0: one pair takes .* = 20 tokens, .* = 19"):
        pack([tree], 19, pairs=[[(0, 1)]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": []}, "pairs: found 0 entries"),
        ({"points": [[0], [1]]}, "points: found 2 entries"),
        ({"pairs": [[(0, 2)]]}, r"pairs\[0\]: found leaves \(0, 2\) of criteria 0 and 1"),
        ({"pairs": [[(0, 0)]]}, "expected two different ones of 0 … 2"),
        ({"pairs": [[(0, 3)]]}, "expected two different ones of 0 … 2"),
        ({"points": [[0, 7]]}, r"points: found leaves \[7\]"),
    ],
)
def test_terms_that_do_not_fit_the_tree_are_refused(arguments, message):
    tree = tree_of(5, [4, 6], [(0, 0, 2), (1, 0, 2), (1, 1, 2)])
    with pytest.raises(TreeError, match=message):
        pack([tree], 100, **arguments)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((), ((1,),), ()), "prompt: found no tokens"),
        (((1,), ((),), ()), r"responses\[0\]: found no tokens"),
        (((1,), ((1,),), (Leaf(1, 0, (2,)),)), r"leaves\[0\]: response: found 1, expected 0 … 0"),
        (((1,), ((1,),), (Leaf(0, 0, ()),)), r"leaves\[0\]: found no tokens"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(parts, message):
    with pytest.raises(TreeError, match=message):
        Tree(*parts)
