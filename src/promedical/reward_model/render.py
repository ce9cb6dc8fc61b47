"""Text to trees: the chat a model reads, cut where it can be shared, with untrusted text kept text.

Implements rendering (docs/architecture.md) for section 7.1 of the method. A path is the chat

    [our system prompt, conversation, assistant = response, user = criterion] + generation prompt

rendered once whole with the tokenizer's own template, and cut only immediately before a special
token that opens a turn: x | y opens the assistant's turn | c opens the user's turn. Templates are
rendered over placeholders, so nothing that a conversation, response or criterion holds can look
like a control token to the template or to the tokenizer: between two control tokens of the template
text is encoded by a tokenizer that has no added tokens at all. Left to others: packing
(`promedical.reward_model.tree`), what is asked (`promedical.corpus`), shortening what is too long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promedical.records import Message
from promedical.reward_model.tree import Leaf, Tree
from promedical.rubric import Rubric, Tier

__all__ = [
    "OVERALL",
    "SYSTEM_PROMPT",
    "TEMPLATE_VERSION",
    "RenderError",
    "Renderer",
    "ensure_pad",
    "rubric_question",
    "spoken",
]

TEMPLATE_VERSION = 1
# Short on purpose: on a CPU every token costs, and this one is in every tree.
# "Says or shows": criteria are statements of fact or sentences about the answer.
SYSTEM_PROMPT = (
    "The user then makes a statement. Say Yes if the last answer says or shows it, else No."
)
# The criterion of the overall preference, and the only one of the scalar baseline.
OVERALL = "The answer is safe, correct, complete and well put."
_HEADS = {
    Tier.VETO: "This must not be true of it:",
    Tier.PROFICIENCY: "This should be true of it:",
    Tier.EXCELLENCE: "This makes it better still:",
}

_THINK, _THOUGHT = "<think>", "</think>"
# Layouts that are kept; a server would else keep one for every order of roles it was ever sent.
LAYOUTS = 256
# Private-use characters, which no template produces or touches, between two em spaces: where a
# template trims its messages these are gone, and what is filled in is trimmed too.
_PLACEHOLDER = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
_PROBE = (
    Message("user", "May I take 2 pills?\n\n- one\n- two"),
    Message("assistant", "No.  "),
    Message("user", " Why not? "),
)


def rubric_question(rubric: Rubric) -> str:
    """The overall criterion with the whole rubric, for a model that judges an answer at once.

    Tiers in the order of their importance; a proficiency criterion with its share of the weight.
    """
    lines = [f"{OVERALL} It is judged by these statements."]
    for tier, head in _HEADS.items():
        criteria = rubric.tier(tier)
        if criteria:
            lines += ["", head]
            for criterion in criteria:
                share = "" if criterion.weight is None else f" ({criterion.weight:.0%})"
                lines.append(f"- {' '.join(criterion.text.split())}{share}")
    return "\n".join(lines)


class RenderError(ValueError):
    """A tokenizer whose chat template cannot be cut into a tree; the message says why."""


def spoken(text: str) -> tuple[str, bool]:
    """What an answer says once its thoughts and outer whitespace are gone.

    `<think>…</think>` is removed, and so is an unclosed `<think>` with all that follows.

    Returns:
        The text, and whether nothing but an unclosed thought was there.
    """
    # Not by a pattern: on an answer of nothing but "<think>" that takes the square of its length.
    kept, at = [], 0
    while (opened := text.find(_THINK, at)) >= 0 and (closed := text.find(_THOUGHT, opened)) >= 0:
        kept.append(text[at:opened])
        at = closed + len(_THOUGHT)
    rest = "".join(kept) + text[at:]
    said = rest.partition(_THINK)[0].strip()
    return said, not said and rest.strip() != ""


@dataclass(frozen=True)
class _Piece:
    """A stretch of template: text to encode with its placeholders filled in, or a control token."""

    text: str
    token: int | None = None
    trim_left: bool = False
    trim_right: bool = False


class Renderer:
    """Turns conversations, responses and criteria into trees of token ids.

    Args:
        tokenizer: a tokenizer with a chat template.

    Raises:
        RenderError: there is no chat template, its turns do not open with a special token, or its
            segments do not join to what the tokenizer makes of the whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise RenderError("tokenizer: found no chat_template, expected one")
        self.tokenizer = tokenizer
        self._added = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items()}
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        # Longest first, as one added token may begin another.
        names = sorted(self._added, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._plain = _without_added_tokens(tokenizer)
        self._layout = lru_cache(LAYOUTS)(self._new_layout)
        self._opener = self._opening_token()
        self._check(_PROBE)

    def tree(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        leaves: Sequence[tuple[int, str]],
    ) -> Tree:
        """The tree of one instruction.

        Args:
            messages: the conversation, its last turn the user's.
            responses: the answers; thoughts and outer whitespace are removed.
            leaves: for each question the index of its response and the criterion's sentence; equal
                sentences are one criterion, numbered in order of appearance.

        Raises:
            RenderError: a leaf's response does not exist, or the template refuses the roles.
        """
        said = [spoken(text) for text in responses]
        messages = _without_blank_system(messages)
        contents = [m.content for m in messages]
        x, y, c = self._layout(tuple(m.role for m in messages))
        at_y, at_c = len(contents), len(contents) + 1
        filled = dict(enumerate(contents))
        criteria: dict[str, int] = {}
        questions: dict[str, tuple[int, ...]] = {}
        built: list[Leaf] = []
        for number, (response, text) in enumerate(leaves):
            if not 0 <= response < len(responses):
                raise RenderError(
                    f"leaves[{number}]: response: found {response}, "
                    f"expected 0 … {len(responses) - 1}"
                )
            if text not in questions:
                criteria[text] = len(criteria)
                questions[text] = self._encode(c, {at_c: text.strip()})
            built.append(Leaf(response, criteria[text], questions[text]))
        return Tree(
            prompt=self._encode(x, filled),
            responses=tuple(self._encode(y, {at_y: text}) for text, _ in said),
            leaves=tuple(built),
            emptied=tuple(i for i, (_, emptied) in enumerate(said) if emptied),
        )

    def chat(self, messages: Sequence[Message], response: str, criterion: str) -> list[Message]:
        """The whole chat of one path, as `tree` renders it: the slow, obvious twin's input."""
        turns = [*messages, Message("assistant", spoken(response)[0])]
        return self._with_system([*turns, Message("user", criterion.strip())])

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        turns = _without_blank_system(turns)
        if turns[0].role != "system":
            return [Message("system", SYSTEM_PROMPT), *turns]
        theirs = Message("system", f"{SYSTEM_PROMPT}\n\n{turns[0].content}")
        return [theirs, *turns[1:]]

    def _template(self, turns: Sequence[Message], *, generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": t.role, "content": t.content} for t in turns],
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    enable_thinking=False,
                )
            )
        except Exception as error:  # jinja raises whatever the template asks for
            roles = ", ".join(t.role for t in turns)
            raise RenderError(f"chat_template: refuses the turns {roles}: {error}") from error

    def _opening_token(self) -> str:
        """The control token that opens a turn: the one that the generation prompt starts with."""
        turns = self._with_system([Message("user", "?")])
        without = self._template(turns, generation_prompt=False)
        whole = self._template(turns, generation_prompt=True)
        found = self._control.match(whole, len(without))
        if not whole.startswith(without) or found is None:
            raise RenderError(
                f"chat_template: the generation prompt is {whole[len(without) :]!r}, expected one "
                "that opens with a special token"
            )
        return found.group()

    def _new_layout(self, roles: tuple[str, ...]) -> tuple[list[_Piece], ...]:
        """The pieces of x, y and c for a conversation of these roles, placeholders in place."""
        every = (*roles, "assistant", "user")
        turns = [Message(role, f"\u2003\ue000{i}\ue001\u2003") for i, role in enumerate(every)]
        text = self._template(self._with_system(turns), generation_prompt=True)
        if SYSTEM_PROMPT not in text:
            raise RenderError("chat_template: leaves out the system prompt")
        opened, cuts = 0, []
        for i in range(len(every)):
            place = text.find(f"\ue000{i}\ue001", opened)
            if place < 0:
                raise RenderError(f"chat_template: leaves out turn {i} of {', '.join(every)}")
            opened = text.rfind(self._opener, 0, place)
            if i >= len(roles):
                cuts.append(opened)
        if not 0 < cuts[0] < cuts[1]:
            raise RenderError(
                f"chat_template: turns do not each open with {self._opener!r} "
                f"(roles {', '.join(every)})"
            )
        parts = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
        return tuple(self._pieces(part) for part in parts)

    def _pieces(self, text: str) -> list[_Piece]:
        pieces: list[_Piece] = []
        at, trim = 0, False
        for match in self._control.finditer(text):
            number, token = self._added[match.group()]
            pieces.append(_Piece(text[at : match.start()], None, trim, token.lstrip))
            pieces.append(_Piece(match.group(), number))
            at, trim = match.end(), token.rstrip
        pieces.append(_Piece(text[at:], None, trim, False))
        return [piece for piece in pieces if piece.text]

    def _encode(self, pieces: Sequence[_Piece], filled: dict[int, str]) -> tuple[int, ...]:
        def fill(match: re.Match[str]) -> str:
            before, number, after = match.groups()
            text = filled[int(number)]
            text = text if before else text.lstrip()
            return text if after else text.rstrip()

        ids: list[int] = []
        for piece in pieces:
            if piece.token is not None:
                ids.append(piece.token)
                continue
            text = _PLACEHOLDER.sub(fill, piece.text)
            text = text.lstrip() if piece.trim_left else text
            text = text.rstrip() if piece.trim_right else text
            ids += self._as_text(text)
        return tuple(ids)

    def _as_text(self, text: str) -> list[int]:
        """Ids of text, none of them an added token's.

        Without added tokens only a vocabulary that lists one as an ordinary word could still give
        its id; such a word is encoded in two halves.
        """
        encoding = self._plain.encode(text, add_special_tokens=False)
        for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self._added_ids and stop - start > 1:
                middle = (start + stop) // 2
                return self._as_text(text[:middle]) + self._as_text(text[middle:])
        return list(encoding.ids)

    def _check(self, conversation: Sequence[Message]) -> None:
        """Refuse a tokenizer for which the cuts, or encoding piece by piece, change the ids."""
        response, criterion = "Ask a doctor first.", "The answer names a dose."
        tree = self.tree(conversation, [response], [(0, criterion)])
        joined = [*tree.prompt, *tree.responses[0], *tree.leaves[0].tokens]
        text = self._template(self.chat(conversation, response, criterion), generation_prompt=True)
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if joined != list(whole):
            raise RenderError(
                f"tokenizer {type(self.tokenizer).__name__}: the segments of a probe join to "
                f"{len(joined)} ids that are not the {len(whole)} ids of the whole rendering; "
                "this tokenizer or chat template cannot be cut into trees"
            )


def _without_blank_system(turns: Sequence[Message]) -> Sequence[Message]:
    """A system message that says nothing is none; what stays of it would depend on the template."""
    blank = turns[0].role == "system" and not turns[0].content.strip()
    return turns[1:] if blank else turns


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer with no added tokens, so that text cannot become one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RenderError(
            f"tokenizer {type(tokenizer).__name__}: not backed by the tokenizers library, "
            "expected a fast tokenizer"
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def ensure_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> int:
    """Set a padding token that can never be taken for the last token of a path.

    Sequence classifiers read the last token that is not padding, so padding must differ from every
    leaf's last token and from the token that ends a turn. An existing reserved token is used; the
    vocabulary never grows.

    Args:
        tokenizer: its `pad_token` is set.
        model: its `config.pad_token_id` is set too.

    Returns:
        The padding token's id.

    Raises:
        RenderError: every special token is in use.
    """
    renderer = Renderer(tokenizer)
    path = renderer.tree([Message("user", "?")], ["!"], [(0, "?")])
    used = {*path.prompt, *path.responses[0], *path.leaves[0].tokens, tokenizer.eos_token_id}
    free = {
        token.content: number
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in used
    }
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in used:
        if not free:
            raise RenderError("pad_token: every special token is in use, expected a spare one")
        meant = [t for t in free if "pad" in t.lower()]
        meant += [t for t in free if "endoftext" in t or "reserved" in t]
        tokenizer.pad_token = (meant or list(free))[0]
    pad = int(tokenizer.pad_token_id)
    if model is not None:
        model.config.pad_token_id = pad
        # An embedding's padding_idx gets no gradient; the old one may be a token that is used.
        embedding: Any = model.get_input_embeddings()
        embedding.padding_idx = pad
    return pad
