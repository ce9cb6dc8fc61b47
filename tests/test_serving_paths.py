"""Paths to trees: nothing is lost, nothing is shared wrongly, and fewer tokens are not possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from promedical.reward_model.serving_batch import unique_tokens
from promedical.reward_model.serving_paths import GROUP, MIN_PATH, shared_trees
from promedical.reward_model.tree import paths

PATHS = st.lists(
    st.lists(st.integers(0, 1), min_size=MIN_PATH, max_size=7), min_size=1, max_size=12
)


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [items[0], *part], *rest[i + 1 :]]


def shared(group: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in iter_while_same(group))


def iter_while_same(group: Sequence[Sequence[int]]) -> Iterator[int]:
    for tokens in zip(*group, strict=False):
        if len(set(tokens)) > 1:
            return
        yield tokens[0]


def fewest_tokens(given: list[tuple[int, ...]]) -> int:
    """The slow, obvious twin: every way to make trees, and every way to cut them."""

    def tree(group: list[int]) -> int:
        costs = []
        for prompt in range(1, shared([given[i] for i in group]) + 1):
            for responses in partitions(group):
                cost = prompt
                for members in responses:
                    held = [given[i] for i in members]
                    ends = range(prompt + 1, min(shared(held), min(map(len, held)) - 1) + 1)
                    cost += min(
                        (end - prompt + sum(len(p) - end for p in held) for end in ends),
                        default=10**9,
                    )
                costs.append(cost)
        return min(costs, default=10**9)

    return min(sum(map(tree, groups)) for groups in partitions(range(len(given))))


@given(PATHS)
def test_every_path_is_a_leaf_once(given_paths):
    trees, places = shared_trees(given_paths)
    found = {}
    for tree, place in zip(trees, places, strict=True):
        for path, indices in zip(paths(tree), place, strict=True):
            for index in indices:
                assert index not in found
                found[index] = list(path)
    assert [found[i] for i in range(len(given_paths))] == given_paths


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 5), min_size=1, max_size=4, unique=True))
def test_no_trees_hold_fewer_tokens(given_paths):
    trees, _ = shared_trees(given_paths)
    assert sum(map(unique_tokens, trees)) == fewest_tokens(given_paths)


@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=MIN_PATH, max_size=5).map(tuple),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_no_trees_hold_fewer_tokens_whatever_the_lengths(given_paths):
    trees, _ = shared_trees(given_paths)
    assert sum(map(unique_tokens, trees)) == fewest_tokens(given_paths)


def test_conversations_responses_and_criteria_are_each_read_once():
    x = [[1, 2, 3, 10 + i] * 5 for i in range(2)]
    y = [[4, 20 + i] * 8 for i in range(6)]
    c = [[5, 6, 30 + i] for i in range(4)]
    sent = [[*x[r % 2], *y[r], *question] for r in range(6) for question in c]
    trees, places = shared_trees(sent)
    # Responses share their first token, and criteria their first two; cutting there saves little.
    assert sum(map(unique_tokens, trees)) <= 2 * 20 + 6 * 16 + 6 * 4 * 3
    assert sorted(i for place in places for leaf in place for i in leaf) == list(range(24))


def test_many_and_nested_paths_end():
    sent = [[1] * length for length in range(MIN_PATH, MIN_PATH + 2 * GROUP)]
    trees, places = shared_trees(sent)
    assert sum(len(place) for place in places) == len(sent)
    assert sum(map(unique_tokens, trees)) < sum(map(len, sent))
