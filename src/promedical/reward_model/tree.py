"""Trees of token ids, and the packed rows a model reads.

Implements section 7.1 of the method: the conversation x, its responses y_1 … y_n and the criteria
c_1 … c_K asked about each form a tree, and one row holds all of it, every token once. In a row

    a key is visible  ⇔  same tree, its segment is the query's own or an ancestor, not after it

and position ids continue from the parent, so every leaf scores as its own sequence would. A tree
over the row budget is split over criteria, then over pairs, the prefix repeated; trees under it may
share a row. Plain tuples of ints, no tensors: `render` makes the trees, `attention` runs the rows,
and which leaves a loss needs is the trainer's to say.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Leaf",
    "PackedLeaf",
    "PackedPair",
    "PackedRow",
    "Packing",
    "RowBudgetError",
    "Segment",
    "Tree",
    "TreeError",
    "pack",
    "paths",
    "tokens_of",
]


class TreeError(ValueError):
    """A tree or a set of pairs that makes no sense; the message names tree, field and value."""


class RowBudgetError(TreeError):
    """One path or one pair alone is longer than a row may be; the message names every size.

    Args:
        tree: index of the tree that holds it.
    """

    def __init__(self, message: str, tree: int = 0) -> None:
        super().__init__(message)
        self.tree = tree


@dataclass(frozen=True)
class Leaf:
    """One question to the model: criterion `criterion` about response `response`.

    Args:
        response: index into the tree's responses.
        criterion: number of the criterion, the same for every response it is asked about.
        tokens: ids of the criterion's turn and the generation prompt.
    """

    response: int
    criterion: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """One instruction as token ids: a prompt, responses below it, leaves below those.

    Args:
        prompt: ids of the conversation x.
        responses: ids of each response's turn y.
        leaves: the questions asked, in any order.
        emptied: responses that were nothing but an unclosed thought and are graded as empty.

    Raises:
        TreeError: an empty segment, or a leaf below a response that does not exist.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    leaves: tuple[Leaf, ...]
    emptied: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise TreeError("prompt: found no tokens, expected at least one")
        for index, response in enumerate(self.responses):
            if not response:
                raise TreeError(f"responses[{index}]: found no tokens, expected at least one")
        for index, leaf in enumerate(self.leaves):
            if not 0 <= leaf.response < len(self.responses):
                raise TreeError(
                    f"leaves[{index}]: response: found {leaf.response}, "
                    f"expected 0 … {len(self.responses) - 1}"
                )
            if not leaf.tokens:
                raise TreeError(f"leaves[{index}]: found no tokens, expected at least one")


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a row: one prompt, response or criterion.

    Args:
        start: index of its first token in the row.
        length: number of tokens.
        parent: index of the parent segment in the row, -1 for a prompt.
        depth: 0 prompt, 1 response, 2 criterion.
        position: position id of its first token.
    """

    start: int
    length: int
    parent: int
    depth: int
    position: int

    @property
    def stop(self) -> int:
        """Index after its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class PackedLeaf:
    """Where a leaf of a tree is found in a row.

    Args:
        tree: index of the tree among those packed.
        leaf: index of the leaf in its tree.
        response: index of its response in its tree.
        criterion: its criterion's number.
        last: index in the row of its last token, the one that is scored.
        repeat: whether an earlier row holds it already (a pointwise term counts it once).
    """

    tree: int
    leaf: int
    response: int
    criterion: int
    last: int
    repeat: bool


@dataclass(frozen=True)
class PackedPair:
    """A pair of leaves, in the one row where it counts.

    Args:
        tree: index of the tree.
        pair: index of the pair among those given for the tree.
        first: index of its first leaf among the row's leaves.
        second: index of its second leaf among the row's leaves.
    """

    tree: int
    pair: int
    first: int
    second: int


@dataclass(frozen=True)
class PackedRow:
    """One row: token ids with the segments that say who may see whom.

    The prompts of its trees come first, then all responses (in the order of their prompts), then
    all criteria (in the order of their responses), so that each level is one slice.

    Args:
        input_ids: token ids, [tokens].
        position_ids: positions that continue from the parent, [tokens].
        segments: the runs of tokens, in row order; a parent comes before its children.
        leaves: the row's leaves, in row order.
        pairs: the pairs that count in this row.
    """

    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    leaves: tuple[PackedLeaf, ...]
    pairs: tuple[PackedPair, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def leaf_ends(self) -> tuple[int, ...]:
        """Index of every leaf's last token, the one that is scored, [leaves]."""
        return tuple(leaf.last for leaf in self.leaves)

    @property
    def segment_ids(self) -> tuple[int, ...]:
        """Index of every token's segment, [tokens]."""
        return tuple(i for i, s in enumerate(self.segments) for _ in range(s.length))

    def paths(self) -> list[tuple[int, ...]]:
        """Every root-to-leaf sequence of the row, in the order of its leaves."""
        found: list[tuple[int, ...]] = []
        by_end = {s.stop - 1: i for i, s in enumerate(self.segments)}
        for leaf in self.leaves:
            path: tuple[int, ...] = ()
            at = by_end[leaf.last]
            while at >= 0:
                segment = self.segments[at]
                path = self.input_ids[segment.start : segment.stop] + path
                at = segment.parent
            found.append(path)
        return found

    @property
    def parents(self) -> tuple[int, ...]:
        """Index of every segment's parent segment, -1 for prompts, [segments]."""
        return tuple(s.parent for s in self.segments)


@dataclass(frozen=True)
class Packing:
    """The rows, and what packing pruned and repeated.

    Args:
        rows: the packed rows; iterating over a packing iterates over them.
        pruned_leaves: leaves that no term uses.
        pruned_responses: responses left without a leaf.
        split_trees: trees that took more than one row.
        repeated_leaves: leaves present in more rows than one, counted once for each extra row.
        repeated_tokens: tokens present again because a tree was split.
    """

    rows: tuple[PackedRow, ...]
    pruned_leaves: int = 0
    pruned_responses: int = 0
    split_trees: int = 0
    repeated_leaves: int = 0
    repeated_tokens: int = 0

    def __iter__(self) -> Iterator[PackedRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Part:
    """What one row takes of one tree: some of its leaves (sorted) and some of its pairs."""

    leaves: tuple[int, ...]
    pairs: tuple[int, ...] = ()


# The tree's index, the tree, what a row takes of it, and all its pairs.
_Placed = tuple[int, Tree, _Part, Sequence[tuple[int, int]]]


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """Every root-to-leaf sequence, in the order of the leaves: the slow, obvious twin of a row."""
    return [tree.prompt + tree.responses[f.response] + f.tokens for f in tree.leaves]


def pack(
    trees: Sequence[Tree],
    max_tokens: int,
    pairs: Sequence[Sequence[tuple[int, int]]] | None = None,
    points: Sequence[Iterable[int]] | None = None,
    *,
    share_rows: bool = False,
) -> Packing:
    """Pack trees into rows of at most `max_tokens` tokens, one tree (or part of one) a row.

    Args:
        trees: the trees.
        max_tokens: row budget in tokens.
        pairs: for each tree the pairs of leaves (same criterion) that a pairwise term compares;
            both leaves of a pair always share a row, and each pair counts in exactly one.
        points: for each tree the leaves that a term uses on their own. With neither `pairs` nor
            `points` every leaf is used; with either, unused leaves and responses are pruned.
        share_rows: let several trees share a row, by best-fit decreasing. Rows, and the trees in a
            row, are then in the order of their first tree.

    Raises:
        TreeError: `pairs` or `points` do not fit the trees.
        RowBudgetError: one path, or one pair, alone exceeds the budget.
    """
    for name, given in (("pairs", pairs), ("points", points)):
        if given is not None and len(given) != len(trees):
            raise TreeError(
                f"{name}: found {len(given)} entries, expected one for each of {len(trees)} trees"
            )
    placed: list[_Placed] = []
    pruned_leaves = pruned_responses = split_trees = repeated_leaves = repeated_tokens = 0
    for index, tree in enumerate(trees):
        tree_pairs = () if pairs is None else tuple(pairs[index])
        _check_pairs(index, tree, tree_pairs)
        if pairs is None and points is None:
            used = set(range(len(tree.leaves)))
        else:
            used = {leaf for pair in tree_pairs for leaf in pair}
            used |= _checked_points(index, tree, () if points is None else points[index])
        pruned_leaves += len(tree.leaves) - len(used)
        pruned_responses += len(tree.responses) - len({tree.leaves[i].response for i in used})
        if not used:
            continue
        parts = _split(index, tree, used, tree_pairs, max_tokens)
        placed += [(index, tree, part, tree_pairs) for part in parts]
        split_trees += len(parts) > 1
        repeated_tokens += sum(tokens_of(tree, p.leaves) for p in parts) - tokens_of(tree, used)
    together = [[number] for number in range(len(placed))]
    if share_rows:
        together = _best_fit(
            [tokens_of(tree, part.leaves) for _, tree, part, _ in placed], max_tokens
        )
    rows: list[PackedRow] = []
    seen: dict[int, set[int]] = defaultdict(set)
    for numbers in together:
        rows.append(_row([placed[number] for number in numbers], seen))
        for index, _, part, _ in (placed[number] for number in numbers):
            repeated_leaves += len(seen[index] & set(part.leaves))
            seen[index] |= set(part.leaves)
    return Packing(
        tuple(rows), pruned_leaves, pruned_responses, split_trees, repeated_leaves, repeated_tokens
    )


def _best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Which sizes share a row: largest first, each goes where it leaves least room (best fit).

    Two parts of one tree never meet: `_split` made two because they do not fit in one row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in rising order
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        fitting = bisect_left(room, (sizes[item], 0))
        if fitting < len(room):
            left, row = room.pop(fitting)
        else:
            left, row = budget, len(rows)
            rows.append([])
        rows[row].append(item)
        insort(room, (left - sizes[item], row))
    return sorted(sorted(row) for row in rows)


def _check_pairs(index: int, tree: Tree, pairs: Sequence[tuple[int, int]]) -> None:
    count = len(tree.leaves)
    for number, (a, b) in enumerate(pairs):
        where = f"tree {index}: pairs[{number}]: found leaves ({a}, {b})"
        if not (0 <= a < count and 0 <= b < count) or a == b:
            raise TreeError(f"{where}, expected two different ones of 0 … {count - 1}")
        if tree.leaves[a].criterion != tree.leaves[b].criterion:
            raise TreeError(
                f"{where} of criteria {tree.leaves[a].criterion} and {tree.leaves[b].criterion}, "
                "expected two of one criterion"
            )


def _checked_points(index: int, tree: Tree, points: Iterable[int]) -> set[int]:
    chosen = set(points)
    unknown = sorted(i for i in chosen if not 0 <= i < len(tree.leaves))
    if unknown:
        raise TreeError(
            f"tree {index}: points: found leaves {unknown}, expected some of "
            f"0 … {len(tree.leaves) - 1}"
        )
    return chosen


def tokens_of(tree: Tree, leaves: Iterable[int]) -> int:
    """Tokens of a row that holds these leaves: prompt, their responses, and they themselves."""
    chosen = set(leaves)
    responses = {tree.leaves[i].response for i in chosen}
    return (
        len(tree.prompt)
        + sum(len(tree.responses[r]) for r in responses)
        + sum(len(tree.leaves[i].tokens) for i in chosen)
    )


def _split(
    index: int,
    tree: Tree,
    used: set[int],
    pairs: Sequence[tuple[int, int]],
    max_tokens: int,
) -> list[_Part]:
    """Divide a tree over rows, first fit: whole criteria, and within one too large its pairs."""
    everything = _Part(tuple(sorted(used)), tuple(range(len(pairs))))
    if tokens_of(tree, used) <= max_tokens:
        return [everything]
    atoms: list[_Part] = []
    for criterion in sorted({tree.leaves[i].criterion for i in used}):
        leaves = tuple(i for i in everything.leaves if tree.leaves[i].criterion == criterion)
        own = tuple(p for p, (a, _) in enumerate(pairs) if tree.leaves[a].criterion == criterion)
        if tokens_of(tree, leaves) <= max_tokens:
            atoms.append(_Part(leaves, own))
            continue
        paired = {leaf for p in own for leaf in pairs[p]}
        atoms += [_Part(tuple(sorted(pairs[p])), (p,)) for p in own]
        atoms += [_Part((i,)) for i in leaves if i not in paired]
    rows: list[tuple[set[int], list[int]]] = []
    for atom in atoms:
        if tokens_of(tree, atom.leaves) > max_tokens:
            raise RowBudgetError(_too_long(index, tree, atom.leaves, max_tokens), index)
        for held, numbers in rows:
            if tokens_of(tree, held | set(atom.leaves)) <= max_tokens:
                held |= set(atom.leaves)
                numbers += atom.pairs
                break
        else:
            rows.append((set(atom.leaves), list(atom.pairs)))
    return [_Part(tuple(sorted(held)), tuple(sorted(numbers))) for held, numbers in rows]


def _too_long(index: int, tree: Tree, leaves: Sequence[int], max_tokens: int) -> str:
    what = "one path" if len(leaves) == 1 else "one pair"
    responses = {
        f"response {r}": len(tree.responses[r])
        for r in sorted({tree.leaves[i].response for i in leaves})
    }
    sizes = {"prompt": len(tree.prompt)} | responses
    sizes |= {f"leaf {i}": len(tree.leaves[i].tokens) for i in leaves}
    listed = " + ".join(f"{name} {size}" for name, size in sizes.items())
    return (
        f"tree {index}: {what} takes {listed} = {sum(sizes.values())} tokens, "
        f"expected at most max_tokens = {max_tokens}"
    )


def _row(parts: Sequence[_Placed], seen: Mapping[int, set[int]]) -> PackedRow:
    """Lay parts of trees out as one row, level by level; `seen`: leaves of earlier rows by tree."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []

    def add(tokens: Sequence[int], parent: int) -> int:
        above = segments[parent] if parent >= 0 else None
        position = 0 if above is None else above.position + above.length
        depth = 0 if above is None else above.depth + 1
        segments.append(Segment(len(ids), len(tokens), parent, depth, position))
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        return len(segments) - 1

    prompts = [add(tree.prompt, -1) for _, tree, _, _ in parts]
    responses: dict[tuple[int, int], int] = {}
    for number, (_, tree, part, _) in enumerate(parts):
        for r in sorted({tree.leaves[i].response for i in part.leaves}):
            responses[number, r] = add(tree.responses[r], prompts[number])
    leaves: list[PackedLeaf] = []
    pairs: list[PackedPair] = []
    for number, (index, tree, part, tree_pairs) in enumerate(parts):
        place: dict[int, int] = {}
        for i in sorted(part.leaves, key=lambda i: (tree.leaves[i].response, i)):
            leaf = tree.leaves[i]
            segment = segments[add(leaf.tokens, responses[number, leaf.response])]
            place[i] = len(leaves)
            last, repeat = segment.stop - 1, i in seen.get(index, ())
            leaves.append(PackedLeaf(index, i, leaf.response, leaf.criterion, last, repeat))
        pairs += [
            PackedPair(index, p, place[tree_pairs[p][0]], place[tree_pairs[p][1]])
            for p in part.pairs
        ]
    return PackedRow(tuple(ids), tuple(positions), tuple(segments), tuple(leaves), tuple(pairs))
