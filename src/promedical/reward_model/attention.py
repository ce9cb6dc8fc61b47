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
needs only p = e^(s − ℓ) and o), so gradients add up. Elsewhere each level is one batched
scaled-dot-product call with a small mask of its own.

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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from promedical.reward_model.tree import PackedRow

__all__ = [
    "IMPLEMENTATION",
    "AttentionError",
    "backbone_forward",
    "dense_mask",
    "register",
    "score_row",
    "unsupported",
]

IMPLEMENTATION = "promedical_tree"
ACCEPTED = (IMPLEMENTATION, "eager", "sdpa", "flex_attention")

# "level" is "runs" on a CPU and "batched" elsewhere.
Implementation = Literal["level", "runs", "batched", "dense"]


class AttentionError(ValueError):
    """A model, attention implementation or row that tree attention cannot be right for."""


@dataclass(frozen=True)
class _Level:
    """One batched attention call: `batch` items of `length` queries, each with `keys` keys.

    Args:
        queries: row index of every query, [batch * length]; padding repeats an item's first.
        keys: row index of every key, [batch * keys]; padding repeats an item's first.
        mask: additive, [batch, 1, length, keys]; None where the call is plain causal.
        kept: which of the flat queries are no padding, in row order of the level.
    """

    batch: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    kept: Tensor


@dataclass(frozen=True)
class _Runs:
    """The same attention as calls over slices of the row, nothing masked, nothing repeated.

    Args:
        own: segments that attend to themselves, (start, stop).
        above: everything below a segment attends to it, (query start, stop, key start, stop).
        leaves: slice of the row that holds the criteria, which attend to themselves as one batch.
        batch: number of criteria.
        padded: index into the criteria's tokens that pads them to one length; None if they have it.
        real: which of the padded tokens are real; None with `padded`.
    """

    own: tuple[tuple[int, int], ...]
    above: tuple[tuple[int, int, int, int], ...]
    leaves: tuple[int, int]
    batch: int
    padded: Tensor | None
    real: Tensor | None


class _Plan:
    """How a row attends, built once a forward and used by every layer."""

    def __init__(
        self, row: PackedRow, device: torch.device, dtype: torch.dtype, implementation: str
    ) -> None:
        self.calls = 0
        by_runs = implementation == "runs" or (implementation == "level" and device.type == "cpu")
        self.runs = _runs(row) if by_runs else None
        depths = sorted({segment.depth for segment in row.segments})
        self.levels = (
            [_level(row, depth, device, dtype) for depth in depths] if self.runs is None else []
        )


def _chain(row: PackedRow, segment: int) -> list[int]:
    """A segment's ancestors, root first."""
    above: list[int] = []
    parent = row.segments[segment].parent
    while parent >= 0:
        above.insert(0, parent)
        parent = row.segments[parent].parent
    return above


def _level(row: PackedRow, depth: int, device: torch.device, dtype: torch.dtype) -> _Level:
    own = [i for i, s in enumerate(row.segments) if s.depth == depth]
    queries = [_tokens(row, [i]) for i in own]
    keys = [_tokens(row, [*_chain(row, i), i]) for i in own]
    length, width = max(map(len, queries)), max(map(len, keys))
    mask = None
    if len(own) > 1 or length != width:
        visible = torch.zeros(len(own), length, width, dtype=torch.bool)
        for b in range(len(own)):
            shared = len(keys[b]) - len(queries[b])
            causal = torch.ones(len(queries[b]), len(keys[b]), dtype=torch.bool).tril(shared)
            visible[b, : len(queries[b]), : len(keys[b])] = causal
            # A padding query with nothing to see would give NaN gradients; it sees one key.
            visible[b, len(queries[b]) :, 0] = True
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        mask = mask[:, None].to(device)
    kept = [b * length + j for b, own_tokens in enumerate(queries) for j in range(len(own_tokens))]

    def index(rows: list[list[int]], size: int) -> Tensor:
        flat = [t for held in rows for t in held + [held[0]] * (size - len(held))]
        return torch.tensor(flat, device=device)

    return _Level(
        len(own),
        index(queries, length),
        index(keys, width),
        mask,
        torch.tensor(kept, device=device),
    )


def _tokens(row: PackedRow, segments: list[int]) -> list[int]:
    return [t for i in segments for t in range(row.segments[i].start, row.segments[i].stop)]


def _runs(row: PackedRow) -> _Runs:
    segments = row.segments
    leaves = [s for s in segments if s.depth == 2]
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
    first, length = leaves[0].start, max(s.length for s in leaves)
    padded = real = None
    if any(s.length != length for s in leaves):
        padded = torch.tensor(
            [s.start - first + min(j, s.length - 1) for s in leaves for j in range(length)]
        )
        real = torch.tensor([j < s.length for s in leaves for j in range(length)])
    own = tuple((s.start, s.stop) for s in segments if s.depth < 2)
    return _Runs(own, above, (first, leaves[-1].stop), len(leaves), padded, real)


class _RunAttention(torch.autograd.Function):
    """Attention by runs; query [1, heads, tokens, d], key and value [1, kv heads, tokens, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: _Runs, scale: float
    ) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        out = out.transpose(1, 2)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        for start, stop in runs.own:
            held = slice(start, stop)
            out[:, :, held], lse[:, :, held] = _flash(
                query[:, :, held], key[:, :, held], value[:, :, held], True, scale
            )
        held = slice(*runs.leaves)
        q, k, v = (_batch(states[0, :, held], runs) for states in (query, key, value))
        for whole, found in zip((out, lse), _flash(q, k, v, True, scale), strict=True):
            whole[0, :, held] = _unbatch(found, runs)
        for start, stop, first, last in runs.above:
            held, seen = slice(start, stop), slice(first, last)
            part, part_lse = _flash(
                query[:, :, held], key[:, :, seen], value[:, :, seen], False, scale
            )
            share = torch.sigmoid(part_lse - lse[:, :, held])  # e^ℓ' / (e^ℓ + e^ℓ')
            out[:, :, held].lerp_(part, share[..., None].to(part.dtype))
            lse[:, :, held] = torch.logaddexp(lse[:, :, held], part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        runs, scale = ctx.runs, ctx.scale
        grads = [torch.zeros_like(states) for states in (query, key, value)]
        held = slice(*runs.leaves)
        # Padding gets a zero gradient and, through an infinite ℓ, zero attention.
        q, k, v, o = (_batch(states[0, :, held], runs) for states in (query, key, value, out))
        g, ends = _batch(grad[0, :, held], runs, 0.0), _batch(lse[0, :, held], runs, math.inf)
        for whole, part in zip(
            grads, _flash_backward(g, q, k, v, o, ends, True, scale), strict=True
        ):
            whole[0, :, held] = _unbatch(part, runs)
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


def _batch(states: Tensor, runs: _Runs, fill: float | None = None) -> Tensor:
    """The criteria's states [heads, tokens, …] as [criteria, heads, length, …], padded."""
    if runs.padded is not None:
        assert runs.real is not None
        states = states.index_select(1, runs.padded)
        if fill is not None:
            real = runs.real.view(-1, *[1] * (states.dim() - 2))
            states = states.masked_fill(~real, fill)
    return states.unflatten(1, (runs.batch, -1)).transpose(0, 1)


def _unbatch(states: Tensor, runs: _Runs) -> Tensor:
    """The inverse of `_batch`."""
    flat = states.transpose(0, 1).flatten(1, 2)
    return flat if runs.real is None else flat[:, runs.real]


def _attend(query: Tensor, key: Tensor, value: Tensor, plan: _Plan, scale: float) -> Tensor:
    """Tree attention; query [1, heads, tokens, d], key and value [1, kv heads, tokens, d]."""
    if plan.runs is not None:
        out: Tensor = _RunAttention.apply(query, key, value, plan.runs, scale)
        return out.transpose(1, 2)
    outputs = []
    for level in plan.levels:

        def take(states: Tensor, index: Tensor, batch: int = level.batch) -> Tensor:
            chosen = states[0].index_select(1, index)
            return chosen.unflatten(1, (batch, -1)).transpose(0, 1)

        out = scaled_dot_product_attention(
            take(query, level.queries),
            take(key, level.keys),
            take(value, level.keys),
            attn_mask=level.mask,
            is_causal=level.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, level.kept))
    return torch.cat(outputs)[None]


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
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return _attend(query, key, value, tree_plan, scale), None


def register() -> str:
    """Make "promedical_tree" known to transformers (again if need be) and return that name."""
    AttentionInterface.register(IMPLEMENTATION, _tree_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    return IMPLEMENTATION


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model cannot read trees, or None if it can."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        other = sorted(set(layer_types) - {"full_attention"})
        return f"it has {', '.join(other)} layers" if other else None
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"its attention has a sliding window of {window}"
    return None


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
        row: the packed row.
        inputs_embeds: states to start from in place of the token embeddings, [tokens, d].
        implementation: "level" takes "runs" (slices, CPU only) on a CPU and "batched" (a masked
            call a level) elsewhere; "dense" is the slow twin with one mask over the row.

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
    inputs: dict[str, Any] = {
        "position_ids": torch.tensor([row.position_ids], device=device),
        "use_cache": False,
    }
    if inputs_embeds is None:
        inputs["input_ids"] = torch.tensor([row.input_ids], device=device)
    else:
        inputs["inputs_embeds"] = inputs_embeds[None]
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
    return hidden


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
    scores: Tensor = inner.score(last)
    return scores[:, 0]


def _path_states(model: PreTrainedModel, path: tuple[int, ...]) -> Tensor:
    """Hidden state of a sequence's last token, [d]."""
    ids = torch.tensor([path], device=next(model.parameters()).device)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return hidden[0, -1]
