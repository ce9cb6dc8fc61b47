"""What many requests ask, as few trees: the first half of grading a stream.

A window takes requests one by one. Those with the same conversation grow one tree; equal answers,
and equal criteria about one answer, are read once (section 7.1). Every leaf knows who asked for it,
and every request what it still waits for. What cannot be rendered, or is longer than the model
reads, fails here, alone. Left to others: rows and scores (`grade`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from promedical.records import Message
from promedical.reward_model.render import Renderer
from promedical.reward_model.tree import Leaf, Tree

__all__ = ["Answered", "Asked", "Place", "Window"]

# Where a score goes: request of the window, response, sentence.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Asked:
    """Every sentence is asked about every answer to one conversation."""

    messages: Sequence[Message]
    responses: Sequence[str]
    texts: Sequence[str]


@dataclass
class Answered:
    """What was found for one `Asked`; `open` counts the questions that wait for their answer.

    Args:
        values: [responses][texts], s, NaN where there is none.
        failures: (response, text) → why there is none.
    """

    values: list[list[float]]
    open: int
    failures: dict[tuple[int, int], str] = field(default_factory=dict)

    def put(self, r: int, k: int, found: float | str) -> None:
        """Take s, or the reason why there is none."""
        self.open -= 1
        if isinstance(found, str):
            self.failures[r, k] = found
        else:
            self.values[r][k] = found


class _GrowingTree:
    """A tree under construction; every leaf knows who asked for it."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt
        self.size = len(prompt)
        self.responses: dict[tuple[int, ...], int] = {}
        self.criteria: dict[tuple[int, ...], int] = {}
        self.leaves: dict[tuple[int, tuple[int, ...]], list[Place]] = {}

    def added(self, response: tuple[int, ...], questions: Iterable[tuple[int, ...]]) -> int:
        """Tokens that this answer with these questions would add."""
        at = self.responses.get(response)
        new = {q for q in questions if at is None or (at, q) not in self.leaves}
        return (len(response) if at is None else 0) + sum(map(len, new))

    def add(self, response: tuple[int, ...], questions: Mapping[Place, tuple[int, ...]]) -> None:
        """Take an answer with its questions, each with where its score has to go."""
        self.size += self.added(response, questions.values())
        at = self.responses.setdefault(response, len(self.responses))
        for place, question in questions.items():
            self.criteria.setdefault(question, len(self.criteria))
            self.leaves.setdefault((at, question), []).append(place)

    def grown(self) -> Tree:
        leaves = (Leaf(at, self.criteria[question], question) for at, question in self.leaves)
        return Tree(self.prompt, tuple(self.responses), tuple(leaves))


class Window:
    """Requests that are scored together.

    Args:
        max_tokens: a tree ends before it is longer; another one goes on with the same prompt.
        max_path: a longer path fails.
        share: whether requests with one conversation share trees.
    """

    def __init__(self, renderer: Renderer, max_tokens: int, max_path: int, share: bool) -> None:
        self.renderer, self.max_tokens, self.max_path = renderer, max_tokens, max_path
        self.share = share
        self.answered: list[Answered] = []
        self._growing: dict[tuple[int, tuple[int, ...]], list[_GrowingTree]] = {}
        self.tokens = 0

    def trees(self) -> tuple[list[Tree], list[list[list[Place]]]]:
        """The trees, and for every leaf of each who asked for it."""
        grown = [tree for trees in self._growing.values() for tree in trees]
        return [tree.grown() for tree in grown], [list(tree.leaves.values()) for tree in grown]

    def add(self, asked: Asked) -> None:
        """Take a request; what cannot be rendered or is too long has failed already."""
        request = len(self.answered)
        questions = [(r, k) for r in range(len(asked.responses)) for k in range(len(asked.texts))]
        answered = Answered(
            [[math.nan] * len(asked.texts) for _ in asked.responses], len(questions)
        )
        self.answered.append(answered)
        for tree, rendered in self._rendered(asked, questions, answered):
            by_response: dict[int, dict[Place, tuple[int, ...]]] = {}
            for (r, k), leaf in zip(rendered, tree.leaves, strict=True):
                length = len(tree.prompt) + len(tree.responses[leaf.response]) + len(leaf.tokens)
                if length > self.max_path:
                    why = f"{length} tokens, more than the {self.max_path} that fit"
                    answered.put(r, k, why)
                else:
                    by_response.setdefault(leaf.response, {})[request, r, k] = leaf.tokens
            for at, asked_about in by_response.items():
                self._plant(request, tree.prompt, tree.responses[at], asked_about)

    def _plant(
        self,
        request: int,
        prompt: tuple[int, ...],
        response: tuple[int, ...],
        questions: Mapping[Place, tuple[int, ...]],
    ) -> None:
        # A tree is cut between answers: that repeats a prompt, where `pack` would repeat answers.
        trees = self._growing.setdefault((-1 if self.share else request, prompt), [])
        if not trees or (
            trees[-1].size + trees[-1].added(response, questions.values()) > self.max_tokens
        ):
            trees.append(_GrowingTree(prompt))
            self.tokens += len(prompt)
        before = trees[-1].size
        trees[-1].add(response, questions)
        self.tokens += trees[-1].size - before

    def _rendered(
        self, asked: Asked, questions: Sequence[tuple[int, int]], answered: Answered
    ) -> Iterator[tuple[Tree, Sequence[tuple[int, int]]]]:
        """Trees that hold these questions; one that cannot be rendered fails alone."""
        if not questions:
            return
        used = sorted({r for r, _ in questions})
        at = {r: i for i, r in enumerate(used)}
        try:
            tree = self.renderer.tree(
                asked.messages,
                [asked.responses[r] for r in used],
                [(at[r], asked.texts[k]) for r, k in questions],
            )
        except Exception as error:  # whatever template and tokenizer raise is about these texts
            if len(questions) == 1:
                answered.put(*questions[0], f"cannot be rendered: {type(error).__name__}: {error}")
                return
        else:
            yield tree, questions
            return
        half = len(questions) // 2
        for part in (questions[:half], questions[half:]):
            yield from self._rendered(asked, part, answered)
