"""The arithmetic of a training run against counting on real trees and real models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config

from promedical.reward_model.balance_rows import cost, visible_pairs
from promedical.reward_model.model import TreeRewardModel, with_lora
from promedical.reward_model.scale import (
    PAPER,
    QWEN3_8B,
    ModelShape,
    Setting,
    Work,
    memory,
    operations,
    separate_work,
    tree_work,
    trl_work,
)
from promedical.reward_model.tree import Leaf, Tree, pack, paths
from tiny_reward import tiny_classifier

SHAPE = ModelShape("tiny", 4, 1000, 500, 16, 32, 16, 8)


def tree_of(setting: Setting, discordant: int, points: bool) -> Tree:
    """One tree of the setting, with `discordant` of its criteria in use."""
    asked = setting.criteria if points else discordant
    leaves = tuple(
        Leaf(r, c, (5,) * setting.criterion)
        for r in range(setting.responses)
        for c in range(asked + setting.overall)
    )
    answers = ((3,) * setting.response,) * setting.responses
    return Tree((2,) * setting.prompt, answers, leaves)


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("discordant", [1, 2])
def test_the_closed_form_is_what_counting_a_tree_gives(points: bool, discordant: int) -> None:
    setting = Setting(3, 4, 2, 7, 11, 5, discordant=discordant / 2, epochs=2)
    (row,) = pack([tree_of(setting, discordant, points)], 10_000)
    work = tree_work(setting, points=points)
    assert work.tokens == pytest.approx(6 * len(row))
    assert work.visible == pytest.approx(6 * visible_pairs(row))


def test_sequences_are_counted_as_they_are_read() -> None:
    setting = Setting(3, 4, 2, 7, 11, 5, discordant=1.0)
    lengths = [len(path) for path in paths(tree_of(setting, 2, True))]
    assert separate_work(setting).tokens == 3 * sum(lengths)
    assert separate_work(setting).visible == 3 * sum(n * (n + 1) / 2 for n in lengths)
    # Two criteria that split four answers evenly, four pairs each; six pairs of answers.
    assert setting.pairs == 2 * 4 + 6
    assert trl_work(setting).tokens == 3 * 2 * 14 * (7 + 11 + 5)


def test_trees_without_a_discordant_criterion_are_left_out() -> None:
    setting = Setting(1, 2, 2, 100, 50, 10, discordant=0.5, overall=False)
    # A quarter of the trees has none; half the leaves of the others is in a pair, on average.
    assert tree_work(setting).tokens == pytest.approx(0.75 * 200 + 2 * 10)


def test_operations_are_those_that_rows_are_balanced_by() -> None:
    (row,) = pack([tree_of(PAPER.at(response=30), 7, True)], 100_000)
    work = Work(len(row), visible_pairs(row))
    for full in (True, False):
        theirs = cost(row, parameters=4000, layers=4, width=16, full=full)
        assert operations(SHAPE, work, lora=not full).total == theirs


def test_frozen_layers_have_no_backward_pass() -> None:
    work = Work(10, 100)
    whole, half = operations(SHAPE, work), operations(SHAPE, work, frozen_layers=2)
    assert half.weights == whole.weights * (6 * 2 + 2 * 2) / (6 * 4)
    assert half.attention == whole.attention * (3 * 2 + 2) / (3 * 4)
    with pytest.raises(ValueError, match="expected 0 to 4"):
        operations(SHAPE, work, frozen_layers=5)


def test_qwen3_8b_has_this_shape() -> None:
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_labels=1,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == QWEN3_8B.parameters
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert layer == QWEN3_8B.layer_parameters


@pytest.mark.parametrize(("frozen", "rank"), [(0, 0), (1, 0), (0, 3), (2, 3)])
def test_memory_of_weights_gradients_and_adam_is_that_of_the_model(frozen: int, rank: int) -> None:
    model, _ = tiny_classifier(layers=3)
    config = model.config
    layers = model.base_model.layers
    a_layer = sum(p.numel() for p in layers[0].parameters())
    shape = ModelShape(
        "tiny",
        3,
        a_layer,
        sum(p.numel() for p in model.parameters()) - 3 * a_layer,
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size,
        config.hidden_size // 2,
    )
    model.requires_grad_(True)
    adapted = with_lora(model, rank=rank, alpha=1.0, frozen_layers=frozen) if rank else model
    wrapped = TreeRewardModel(adapted, frozen_layers=frozen)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    found = memory(shape, 10, lora_rank=rank, frozen_layers=frozen)
    small = 2 * config.hidden_size  # head and last norm, which are trained beside the layers
    assert found.gradients / 4 == pytest.approx(trained, abs=small)
    assert found.adam == 2 * found.gradients
    assert found.weights >= 4 * shape.parameters
    sharded = memory(shape, 10, lora_rank=rank, frozen_layers=frozen, shards=2)
    assert (sharded.weights, sharded.adam) == (found.weights / 2, found.adam / 2)
    assert sharded.activations == found.activations
    checkpointed = memory(shape, 10, frozen_layers=frozen, gradient_checkpointing=True)
    assert (checkpointed.activations < found.activations) == (frozen < 2)  # no gain on one layer
