"""How much work a training run is: tokens, floating-point operations, memory. Arithmetic alone.

Operations are those the result needs, so recomputation is not counted (section 7.1):

    weights     tokens · P_layer · (6 · trained layers + 2 · frozen layers); LoRA: 4 in place of 6
    attention   visible pairs · 4 · width · (3 · trained layers + frozen layers)

A token costs 2P forward, 2P backward to the layer below and 2P for the gradient of P, which a LoRA
run does not compute; the lowest layers, if frozen, have no backward pass at all. A visible pair
costs 2·width for its score and 2·width for its value, twice that backward. Embeddings are looked
up; the adapter, the head and the norms are too small to count.

Here too is the paper's setting in closed form, by which `docs/scale.md` is made. What it assumes
is in `Setting`. Left to others: counting a real data set, and rates (`plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "PAPER",
    "QWEN3_8B",
    "Memory",
    "ModelShape",
    "Operations",
    "Setting",
    "Work",
    "memory",
    "operations",
    "separate_work",
    "tree_work",
    "trl_work",
]


@dataclass(frozen=True)
class ModelShape:
    """What of a model the arithmetic needs.

    Args:
        name: for people.
        layers: number of decoder layers.
        layer_parameters: of one layer.
        other_parameters: embeddings, last norm and head.
        hidden, intermediate: widths of the residual stream and of the feed-forward layer.
        width: query heads × head dimension.
        kv_width: key heads × head dimension.
    """

    name: str
    layers: int
    layer_parameters: int
    other_parameters: int
    hidden: int
    intermediate: int
    width: int
    kv_width: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer_parameters + self.other_parameters


# Qwen/Qwen3-8B as a classifier with one label; a test counts these on its configuration.
QWEN3_8B = ModelShape("Qwen3-8B", 36, 192_946_432, 622_338_048, 4096, 12288, 4096, 1024)


@dataclass(frozen=True)
class Work:
    """What a model has to read.

    Args:
        tokens: that go through the weights.
        visible: query–key pairs that attention computes.
    """

    tokens: float
    visible: float

    def times(self, factor: float) -> Work:
        """The same work so many times."""
        return Work(self.tokens * factor, self.visible * factor)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of forward and backward pass."""

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.weights + self.attention


def operations(
    shape: ModelShape, work: Work, *, lora: bool = False, frozen_layers: int = 0
) -> Operations:
    """Operations to train on so much work; see the module's formulas.

    Args:
        lora: an adapter is trained, the weights are not.
        frozen_layers: lowest layers without a backward pass.

    Raises:
        ValueError: `frozen_layers` is not between 0 and the number of layers.
    """
    trained = _trained_layers(shape, frozen_layers)
    per_layer = (4 if lora else 6) * trained + 2 * frozen_layers
    return Operations(
        work.tokens * shape.layer_parameters * per_layer,
        work.visible * 4 * shape.width * (3 * trained + frozen_layers),
    )


def _trained_layers(shape: ModelShape, frozen_layers: int) -> int:
    if not 0 <= frozen_layers <= shape.layers:
        raise ValueError(f"frozen_layers: found {frozen_layers}, expected 0 to {shape.layers}")
    return shape.layers - frozen_layers


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while it trains.

    Args:
        weights, gradients, adam: divided by the devices where they are sharded.
        activations: an estimate for the longest row; see `memory`.
    """

    weights: float
    gradients: float
    adam: float
    activations: float

    @property
    def total(self) -> float:
        """All four."""
        return self.weights + self.gradients + self.adam + self.activations


def memory(
    shape: ModelShape,
    row_tokens: int,
    *,
    dtype: str = "float32",
    lora_rank: int = 0,
    frozen_layers: int = 0,
    gradient_checkpointing: bool = False,
    shards: int = 1,
) -> Memory:
    """Bytes that training takes: exact for weights, gradients and Adam, estimated for activations.

    Activations of a token in a trained layer: its input and that of the feed-forward part, each
    before and after the norm (4·hidden), query and attention output (2·width), key and value
    (2·kv_width), and four of the feed-forward part (4·intermediate). With gradient checkpointing a
    layer keeps its input alone (hidden), one layer at a time all of it.

    Args:
        row_tokens: of the longest row; a row is a micro-batch.
        dtype: as in `TrainSettings`: "autocast" keeps weights, gradients and Adam in float32 and
            computes in bfloat16; "bfloat16" holds all in it, but an adapter is float32.
        lora_rank: of the adapter on every linear layer; 0 trains the weights.
        shards: devices over which FSDP or ZeRO-3 divides weights, gradients and Adam.
    """
    trained_layers = _trained_layers(shape, frozen_layers)
    held = 2 if dtype == "bfloat16" else 4
    computed = 4 if dtype == "float32" else 2
    if lora_rank:
        trained, kept = lora_rank * _adapter_widths(shape) * trained_layers, 4
    else:
        frozen = shape.layer_parameters * frozen_layers
        embeddings = shape.other_parameters if frozen_layers else 0
        trained, kept = shape.parameters - frozen - embeddings, held
    adapter = 4 * trained if lora_rank else 0
    whole = (
        4 * shape.hidden + 2 * shape.width + 2 * shape.kv_width + 4 * shape.intermediate
    ) * computed
    a_token = whole * trained_layers
    if gradient_checkpointing:
        a_token = shape.hidden * computed * max(0, trained_layers - 1) + whole
    return Memory(
        (shape.parameters * held + adapter) / shards,
        trained * kept / shards,
        2 * trained * kept / shards,
        float(a_token * row_tokens),
    )


def _adapter_widths(shape: ModelShape) -> int:
    """Σ over a layer's seven matrices of rows + columns: what one rank of an adapter adds."""
    query_and_output = 2 * (shape.hidden + shape.width)
    key_and_value = 2 * (shape.hidden + shape.kv_width)
    return query_and_output + key_and_value + 3 * (shape.hidden + shape.intermediate)


# --- the paper's setting --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Instructions of one shape.

    Args:
        instructions, responses, criteria: how many; responses and criteria of each instruction.
        prompt, response, criterion: tokens of each, the chat template's included.
        discordant: share of the criteria on which the responses differ; all their verdicts are then
            in some pair, as evenly split as the number allows, and no other verdict is in any.
        overall: whether every pair of responses has an overall preference too (one more criterion).
        epochs: passes over the data.
    """

    instructions: int
    responses: int
    criteria: int
    prompt: int
    response: int
    criterion: int
    discordant: float = 1.0
    overall: bool = True
    epochs: int = 1

    @property
    def pairs(self) -> float:
        """Criterion-level pairs of an instruction, the overall preference's among them."""
        n = self.responses
        split = (n // 2) * (n - n // 2)
        return self.discordant * self.criteria * split + (n * (n - 1) / 2 if self.overall else 0)

    @property
    def path(self) -> int:
        """Tokens of one conversation, response and criterion."""
        return self.prompt + self.response + self.criterion

    def at(self, *, discordant: float | None = None, response: int | None = None) -> Setting:
        """The setting with another share of discordant criteria or length of a response."""
        return replace(
            self,
            discordant=self.discordant if discordant is None else discordant,
            response=self.response if response is None else response,
        )


# 51,990 instructions, 3 responses, 7 criteria, 2 epochs are the paper's; lengths are assumed, since
# the paper states none: those of the tree-packing benchmark.
PAPER = Setting(51_990, 3, 7, prompt=200, response=400, criterion=40, epochs=2)


def tree_work(setting: Setting, *, points: bool = False) -> Work:
    """Trees: every token once; leaves and responses that no loss term uses are left out.

    Args:
        points: whether every verdict has a pointwise term, so that every leaf is used.
    """
    n, k, x, y, c = _sizes(setting)
    asked = float(k) if points else setting.discordant * k
    leaves = n * (asked + setting.overall)
    # Without an overall preference a tree on which no criterion is discordant is left out.
    kept = 1.0
    if not setting.overall and not points:
        kept = 1 - (1 - setting.discordant) ** k
    shared = Work(x + n * y, x * (x + 1) / 2 + n * (y * x + y * (y + 1) / 2))
    asking = Work(c, c * (x + y) + c * (c + 1) / 2).times(leaves)
    a_tree = Work(kept * shared.tokens + asking.tokens, kept * shared.visible + asking.visible)
    return a_tree.times(setting.instructions * setting.epochs)


def trl_work(setting: Setting) -> Work:
    """Pairs as TRL reads them: two whole sequences each."""
    return _sequence(setting).times(2 * setting.pairs * setting.instructions * setting.epochs)


def separate_work(setting: Setting) -> Work:
    """Every (response, criterion) as a sequence of its own, as a pointwise loss needs them."""
    leaves = setting.responses * (setting.criteria + setting.overall)
    return _sequence(setting).times(leaves * setting.instructions * setting.epochs)


def _sequence(setting: Setting) -> Work:
    return Work(setting.path, setting.path * (setting.path + 1) / 2)


def _sizes(setting: Setting) -> tuple[int, int, int, int, int]:
    return (
        setting.responses,
        setting.criteria,
        setting.prompt,
        setting.response,
        setting.criterion,
    )
