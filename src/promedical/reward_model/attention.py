"""Attention over a packed row, level by level, as if every root-to-leaf path were alone.

Implements the attention of section 7.1 of the method. In a row of `promedical.reward_model.tree` a
token may look at its own segment up to itself and at its ancestors. One mask over the whole row
would compute every invisible query–key pair too, so the row is taken level by level. `register`
puts this into transformers' attention interface under the name "promedical_tree"; without a row it
behaves as "sdpa", so a model set to it stays an ordinary model.

On a CPU no mask, no padding and no copy of a shared key is needed: every segment attends to itself
causally, everything below a segment attends to all of it in one call, and such partial results
over disjoint sets of keys S merge exactly through their log-sum-exp,

    o = Σ_S e^(ℓ_S − ℓ) o_S,   ℓ = log Σ_S e^ℓ_S.

Given the merged o and ℓ, the backward pass of each call is right as it is (the gradient of a key
needs only p = e^(s − ℓ) and o), so gradients add up. Elsewhere each level is a few batched
scaled-dot-product calls, one for items of about one size, with a small mask of their own. "flex" is
FlexAttention on the whole row (`block_mask`); which is faster on a GPU is still to be measured.

`implementation="dense"` is the slow, obvious twin: one 4-D mask over the row. Models that cannot
take a tree (sliding windows, linear layers) are scored as separate sequences, and it is said.
Left to others: rows (`tree`), the loss and which layers are trained (`model`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from promedical.reward_model.block_mask import BlockMask, bucket, flex, row_block_mask
from promedical.reward_model.tree import PackedRow, Segment

__all__ = [
    "IMPLEMENTATION",
    "AttentionError",
    "backbone_forward",
    "dense_mask",
    "head_scores",
    "register",
    "score_row",
    "unsupported",
]

IMPLEMENTATION = "promedical_tree"
ACCEPTED = (IMPLEMENTATION, "eager", "sdpa", "flex_attention")

# "level" is "runs" on a CPU and "batched" elsewhere.
Implementation = Literal["level", "runs", "batched", "flex", "dense"]


class AttentionError(ValueError):
    """A model, attention implementation or row that tree attention cannot be right for."""


@dataclass(frozen=True)
class _Group:
    """One batched attention call: `batch` items of `length` queries, each with `keys` keys.

    Args:
        queries: row index of every query, [batch * length]; padding repeats an item's first.
        keys: row index of every key, [batch * keys]; padding repeats an item's first.
        mask: additive, [batch, 1, length, keys]; None where the call is plain causal.
    """

    batch: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Leaves:
    """Criteria of about one length, which attend to themselves as one batch.

    Args:
        batch: number of criteria.
        tokens: where their tokens are in the row, [batch * length]; padding repeats the last.
        real: which of these are no padding; None if all are.
        at: where the real ones are in the row.
    """

    batch: int
    tokens: slice | Tensor
    real: Tensor | None
    at: slice | Tensor


@dataclass(frozen=True)
class _Runs:
    """The same attention as calls over slices of the row, nothing masked, nothing repeated.

    Args:
        own: segments that attend to themselves, (start, stop).
        above: everything below a segment attends to it, (query start, stop, key start, stop).
        leaves: the criteria, by length.
    """

    own: tuple[tuple[int, int], ...]
    above: tuple[tuple[int, int, int, int], ...]
    leaves: tuple[_Leaves, ...]


class _Plan:
    """How a row attends, built once a forward and used by every layer.

    Args:
        kept: where each token of the row is found in the groups' outputs, one after the other.
    """

    def __init__(
        self, row: PackedRow, device: torch.device, dtype: torch.dtype, implementation: str
    ) -> None:
        self.calls = 0
        self.runs: _Runs | None = None
        self.block_mask: BlockMask | None = None
        self.groups: list[_Group] = []
        self.kept: Tensor | None = None
        if implementation == "flex":
            self.block_mask = row_block_mask(row, bucket(len(row)), device)
        elif implementation == "runs" or (implementation == "level" and device.type == "cpu"):
            self.runs = _runs(row)
        else:
            self.groups, self.kept = _groups(row, device, dtype)


def _chain(row: PackedRow, segment: int) -> list[int]:
    """A segment's ancestors, root first."""
    above: list[int] = []
    parent = row.segments[segment].parent
    while parent >= 0:
        above.insert(0, parent)
        parent = row.segments[parent].parent
    return above


def _items(row: PackedRow) -> list[list[int]]:
    """Segments that attend as one item: a prompt, a response, or criteria of one response.

    Criteria go together, although they do not see each other, so that the conversation and the
    response above them are copied once; but not more than doubles the pairs to compute.
    """
    items: list[list[int]] = []
    tokens = 0
    for i, segment in enumerate(row.segments):
        tokens += segment.length
        siblings = segment.depth == 2 and row.segments[i - 1].parent == segment.parent
        if siblings and tokens <= segment.position:
            items[-1].append(i)
        else:
            items.append([i])
            tokens = segment.length
    return items


def _about(size: int) -> int:
    """Number of a size's class; sizes of one class differ by less than a quarter, or are small."""
    return math.floor(math.log(max(size, 16), 1.25))


def _groups(
    row: PackedRow, device: torch.device, dtype: torch.dtype
) -> tuple[list[_Group], Tensor]:
    """The row's items in groups of about one size, and where each token's output is found."""
    alike: dict[tuple[bool, int, int], list[list[int]]] = {}
    for item in _items(row):
        length, shared = sum(row.segments[i].length for i in item), row.segments[item[0]].position
        alike.setdefault((shared > 0, _about(length), _about(shared + length)), []).append(item)
    kept = torch.empty(len(row), dtype=torch.long)
    done = 0
    groups = []
    for (masked, *_), items in sorted(alike.items()):
        queries = [_tokens(row, item) for item in items]
        keys = [_tokens(row, [*_chain(row, item[0]), *item]) for item in items]
        length, width = max(map(len, queries)), max(map(len, keys))
        for b, own in enumerate(queries):
            kept[own] = torch.arange(len(own)) + (done + b * length)
        done += len(items) * length
        # A prompt sees itself only: causal, and its padding comes after all that matters.
        mask = _visible(row, items, length, width) if masked else None
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
            mask = mask[:, None].to(device)
        flat = [
            torch.tensor([t for held in rows for t in held + [held[0]] * (size - len(held))])
            for rows, size in ((queries, length), (keys, width))
        ]
        groups.append(_Group(len(items), flat[0].to(device), flat[1].to(device), mask))
    return groups, kept.to(device)


def _visible(row: PackedRow, items: list[list[int]], length: int, width: int) -> Tensor:
    """Who sees whom in each item, [items, length, width]."""
    visible = torch.zeros(len(items), length, width, dtype=torch.bool)
    for b, item in enumerate(items):
        shared, done = row.segments[item[0]].position, 0
        for size in (row.segments[i].length for i in item):
            own = slice(done, done + size)
            visible[b, own, :shared] = True
            visible[b, own, shared + done : shared + done + size].fill_(True).tril_()
            done += size
        # A padding query with nothing to see would give NaN gradients; it sees one key.
        visible[b, done:, 0] = True
    return visible


def _tokens(row: PackedRow, segments: list[int]) -> list[int]:
    return [t for i in segments for t in range(row.segments[i].start, row.segments[i].stop)]


def _runs(row: PackedRow) -> _Runs:
    segments = row.segments
    below: dict[int, list[list[int]]] = {}
    for i, segment in enumerate(segments):
        for ancestor in _chain(row, i):
            runs = below.setdefault(ancestor, [])
            if runs and runs[-1][1] == segment.start:
                runs[-1][1] = segment.stop
            else:
                runs.append([segment.start, segment.stop])
    above = tuple(
        (start, stop, segments[i].start, segments[i].stop)
        for i, runs in sorted(below.items())
        for start, stop in runs
    )
    own = tuple((s.start, s.stop) for s in segments if s.depth < 2)
    return _Runs(own, above, _leaves([s for s in segments if s.depth == 2]))


def _leaves(criteria: list[Segment]) -> tuple[_Leaves, ...]:
    """Criteria in batches of about one length; a slice of the row if they all have the same."""
    if len({s.length for s in criteria}) == 1:
        whole = slice(criteria[0].start, criteria[-1].stop)
        return (_Leaves(len(criteria), whole, None, whole),)
    alike: dict[int, list[Segment]] = {}
    for segment in criteria:
        alike.setdefault(_about(segment.length), []).append(segment)
    found = []
    for _, held in sorted(alike.items()):
        length = max(s.length for s in held)
        tokens = torch.tensor([s.start + min(j, s.length - 1) for s in held for j in range(length)])
        real = torch.tensor([j < s.length for s in held for j in range(length)])
        found.append(_Leaves(len(held), tokens, real, tokens[real]))
    return tuple(found)


class _RunAttention(torch.autograd.Function):
    """Attention by runs; query [1, heads, tokens, d], key and value [1, kv heads, tokens, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: _Runs, scale: float
    ) -> Tensor:
        # Parts are merged in single precision, so that a merge adds no rounding of its own.
        out = torch.empty_like(query.transpose(1, 2), dtype=torch.float32)
        out = out.transpose(1, 2)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        for start, stop in runs.own:
            held = slice(start, stop)
            out[:, :, held], lse[:, :, held] = _flash(
                query[:, :, held], key[:, :, held], value[:, :, held], True, scale
            )
        for leaves in runs.leaves:
            q, k, v = (_batch(states[0], leaves) for states in (query, key, value))
            for whole, found in zip((out, lse), _flash(q, k, v, True, scale), strict=True):
                _put(whole[0], found, leaves)
        for start, stop, first, last in runs.above:
            held, seen = slice(start, stop), slice(first, last)
            part, part_lse = _flash(
                query[:, :, held], key[:, :, seen], value[:, :, seen], False, scale
            )
            share = torch.sigmoid(part_lse - lse[:, :, held])  # e^ℓ' / (e^ℓ + e^ℓ')
            out[:, :, held].lerp_(part.float(), share[..., None])
            lse[:, :, held] = torch.logaddexp(lse[:, :, held], part_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        runs, scale = ctx.runs, ctx.scale
        grads = [torch.zeros_like(states) for states in (query, key, value)]
        for leaves in runs.leaves:
            # Padding gets a zero gradient and, through an infinite ℓ, zero attention.
            q, k, v, o = (_batch(states[0], leaves) for states in (query, key, value, out))
            g, ends = _batch(grad[0], leaves, 0.0), _batch(lse[0], leaves, math.inf)
            parts = _flash_backward(g, q, k, v, o, ends, True, scale)
            for whole, part in zip(grads, parts, strict=True):
                _put(whole[0], part, leaves)
        calls = [(start, stop, start, stop, True) for start, stop in runs.own]
        calls += [(*run, False) for run in runs.above]
        for start, stop, first, last, causal in calls:
            held, seen = slice(start, stop), slice(first, last)
            parts = _flash_backward(
                grad[:, :, held],
                query[:, :, held],
                key[:, :, seen],
                value[:, :, seen],
                out[:, :, held],
                lse[:, :, held],
                causal,
                scale,
            )
            for whole, part, where in zip(grads, parts, (held, seen, seen), strict=True):
                whole[:, :, where] += part
        return (*grads, None, None)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, [batch, heads, queries, d] and [batch, heads, queries]."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads: tuple[Tensor, Tensor, Tensor] = op(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    return grads


def _batch(states: Tensor, leaves: _Leaves, fill: float | None = None) -> Tensor:
    """The criteria's states, of [heads, tokens, …], as [criteria, heads, length, …], padded."""
    held = states[:, leaves.tokens]
    if fill is not None and leaves.real is not None:
        real = leaves.real.view(-1, *[1] * (states.dim() - 2))
        held = held.masked_fill(~real, fill)
    return held.unflatten(1, (leaves.batch, -1)).transpose(0, 1)


def _put(whole: Tensor, states: Tensor, leaves: _Leaves) -> None:
    """The inverse of `_batch`, into [heads, tokens, …]."""
    flat = states.transpose(0, 1).flatten(1, 2)
    whole[:, leaves.at] = (flat if leaves.real is None else flat[:, leaves.real]).to(whole.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, plan: _Plan, scale: float) -> Tensor:
    """Tree attention; query [1, heads, tokens, d], key and value [1, kv heads, tokens, d]."""
    if plan.block_mask is not None:
        return flex(query, key, value, plan.block_mask, scale).transpose(1, 2)
    if plan.runs is not None:
        out: Tensor = _RunAttention.apply(query, key, value, plan.runs, scale)
        return out.transpose(1, 2)
    assert plan.kept is not None
    heads, outputs = query.shape[1], []
    for group in plan.groups:
        q, k, v = (
            states[0].index_select(1, index).unflatten(1, (group.batch, -1)).transpose(0, 1)
            for states, index in (
                (query, group.queries),
                (key, group.keys),
                (value, group.keys),
            )
        )
        if group.mask is not None:
            # With a mask, CUDA's fast kernels take no grouped heads.
            k, v = (states.repeat_interleave(heads // k.shape[1], dim=1) for states in (k, v))
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=group.mask,
            is_causal=group.mask is None,
            scale=scale,
            enable_gqa=heads != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.kept)[None]


def _tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_plan: _Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer; without a plan it is its "sdpa"."""
    if tree_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
        raise AttentionError("this layer has a sliding window or soft cap; a tree cannot take it")
    if kwargs.get("dropout"):
        raise AttentionError("attention dropout: found > 0, expected 0 (it would differ per path)")
    tree_plan.calls += 1
    # Under autocast rotary embeddings leave query and key in float32, and value is in bfloat16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return _attend(query, key, value, tree_plan, scale), None


def register() -> str:
    """Make "promedical_tree" known to transformers (again if need be) and return that name."""
    AttentionInterface.register(IMPLEMENTATION, _tree_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    return IMPLEMENTATION


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model cannot read trees, or None if it can."""
    stretched = _rope_types(config) & {"dynamic", "longrope"}
    if stretched:
        # A path would be turned by the length of the row that it happens to share.
        return f"its {', '.join(sorted(stretched))} rope depends on the length of what it reads"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        other = sorted(set(layer_types) - {"full_attention"})
        return f"it has {', '.join(other)} layers" if other else None
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"its attention has a sliding window of {window}"
    return None


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Kinds of rotary embedding: one for the model, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if part.get("rope_type")}


def _adopt(config: PreTrainedConfig) -> None:
    """Switch a model to our attention, which without a row is its "sdpa"; for good, because
    gradient checkpointing calls it again during the backward pass."""
    found = config._attn_implementation
    if found not in ACCEPTED:
        raise AttentionError(
            f"attn_implementation: found {found!r}, expected one of {', '.join(ACCEPTED)}; "
            "FlashAttention reads restarting positions as packed sequences and is silently wrong"
        )
    reason = unsupported(config)
    if reason is not None:
        raise AttentionError(f"{config.model_type}: {reason}; score separate sequences instead")
    register()
    if found != IMPLEMENTATION:
        config._attn_implementation = IMPLEMENTATION


def dense_mask(row: PackedRow, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Who sees whom over the whole row, additive, [1, 1, tokens, tokens]."""
    count = len(row.segments)
    related = torch.eye(count, dtype=torch.bool)
    for i in range(count):
        related[i, _chain(row, i)] = True
    owner = torch.tensor(row.segment_ids)
    positions = torch.tensor(row.position_ids)
    visible = related[owner][:, owner] & (positions[:, None] >= positions[None, :])
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    return mask[None, None].to(device)


def backbone_forward(
    backbone: nn.Module,
    row: PackedRow,
    inputs_embeds: Tensor | None = None,
    implementation: Implementation = "level",
) -> Tensor:
    """Run a decoder (without its head) over a row.

    Args:
        backbone: a transformers decoder such as `LlamaModel`, or one with only some of its layers;
            its attention implementation is set to "promedical_tree" and stays so.
        row: the packed row, of one tree or several.
        inputs_embeds: states to start from in place of the token embeddings, [tokens, d].
        implementation: "level" takes "runs" (slices, CPU only) on a CPU and "batched" (masked
            calls, level by level) elsewhere; "flex" is FlexAttention on a row padded to a bucket,
            with a backward pass on GPUs only; "dense" is the slow twin, one mask over the row.

    Returns:
        Hidden states, [tokens, d].

    Raises:
        AttentionError: the model cannot read trees, or runs another attention implementation.
    """
    config: PreTrainedConfig = backbone.config  # type: ignore[assignment]
    _adopt(config)
    weight = next(backbone.parameters())
    states = weight if inputs_embeds is None else inputs_embeds
    device, dtype = states.device, states.dtype
    padding = bucket(len(row)) - len(row) if implementation == "flex" else 0
    inputs: dict[str, Any] = {
        "position_ids": torch.tensor([row.position_ids + (0,) * padding], device=device),
        "use_cache": False,
    }
    if inputs_embeds is None:
        ids = row.input_ids + row.input_ids[:1] * padding
        inputs["input_ids"] = torch.tensor([ids], device=device)
    else:
        inputs["inputs_embeds"] = pad(inputs_embeds, (0, 0, 0, padding))[None]
    if implementation == "dense":
        return backbone(attention_mask=dense_mask(row, device, dtype), **inputs)[0][0]
    if implementation not in get_args(Implementation):
        raise AttentionError(
            f"implementation: found {implementation!r}, expected one of "
            f"{', '.join(get_args(Implementation))}"
        )
    plan = _Plan(row, device, dtype, implementation)
    # A 4-D mask is passed through as it is; this one only stops transformers from making its own.
    no_mask = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    hidden: Tensor = backbone(attention_mask=no_mask, tree_plan=plan, **inputs)[0][0]
    layers = len(backbone.layers)  # type: ignore[arg-type]
    if plan.calls < layers:
        raise AttentionError(
            f"{config.model_type}: tree attention ran in {plan.calls} of {layers} layers; "
            "this architecture does not use transformers' attention interface"
        )
    return hidden[: len(row)]


def score_row(
    model: PreTrainedModel, row: PackedRow, implementation: Implementation = "level"
) -> Tensor:
    """Raw scores s(x, y, c) of a row's leaves, [leaves].

    A model whose layers cannot read trees is run on every path as a sequence of its own, with a
    warning.

    Args:
        model: an `AutoModelForSequenceClassification` with one label, also inside a PEFT model.
        row: the packed row.
        implementation: as in `backbone_forward`.
    """
    given: Any = model
    inner = given.get_base_model() if hasattr(given, "get_base_model") else given
    reason = unsupported(inner.config)
    if reason is not None:
        warnings.warn(
            f"{inner.config.model_type}: {reason}; scoring {len(row.leaves)} separate sequences "
            "in place of a tree",
            stacklevel=2,
        )
        last = torch.stack([_path_states(inner, path) for path in row.paths()])
    else:
        hidden = backbone_forward(inner.base_model, row, implementation=implementation)
        last = hidden[torch.tensor(row.leaf_ends, device=hidden.device)]
    return head_scores(inner.score, last)


def head_scores(head: nn.Module, states: Tensor) -> Tensor:
    """s from the states of the leaves' last tokens, [leaves], in the type of the head's weights.

    Autocast is off here: bfloat16 would round s to 1 in 256.
    """
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = head(states.to(next(head.parameters()).dtype))
    return scores[:, 0]


def _path_states(model: PreTrainedModel, path: tuple[int, ...]) -> Tensor:
    """Hidden state of a sequence's last token, [d]."""
    ids = torch.tensor([path], device=next(model.parameters()).device)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return hidden[0, -1]
