"""The reward model's head, frozen layers and what is kept of them, and the checkpoint's form."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from promedical.records import Message
from promedical.reward_model.instances import training_trees
from promedical.reward_model.loss import pack_training_trees
from promedical.reward_model.model import TreeRewardModel, initialise, yes_no_ids
from promedical.reward_model.render import Renderer
from promedical.reward_model.tree import pack, paths
from promedical.reward_model.trunk import TrunkCache
from tiny_reward import (
    ARCHITECTURES,
    load_renderer,
    load_tokenizer,
    random_rows,
    size,
    tiny_classifier,
)


def language_model(architecture, folder):
    """A tiny causal language model saved with its tokenizer."""
    torch.manual_seed(0)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size(2)))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **size(2), tie_word_embeddings=True))
    model.save_pretrained(folder)
    load_tokenizer(ARCHITECTURES[architecture]).save_pretrained(folder)
    return folder


def trees(count=3, *, seed=0, architecture="llama"):
    found = training_trees(
        random_rows(count, seed=seed), load_renderer(ARCHITECTURES[architecture])
    )
    return [tree.tree for tree in found.trees]


def rows(count=3, *, seed=0, architecture="llama", max_tokens=10_000):
    return list(pack(trees(count, seed=seed, architecture=architecture), max_tokens))


# --- head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_yes_no_head_is_the_difference_of_two_logits(architecture, tmp_path):
    path = language_model(architecture, tmp_path)
    model, tokenizer = initialise(path)
    assert model.dtype == torch.float32
    assert model.config.num_labels == 1
    language = AutoModelForCausalLM.from_pretrained(path).eval()
    yes, no = yes_no_ids(tokenizer)
    tree = trees(1, architecture=architecture)[0]
    (only,) = pack([tree], 10_000)
    with torch.no_grad():
        found = TreeRewardModel(model.eval()).score(only)
        for leaf, s in zip(only.leaves, found, strict=True):
            logits = language(torch.tensor([paths(tree)[leaf.leaf]])).logits[0, -1]
            assert float(s) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-5)


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3"])
def test_yes_and_no_are_taken_where_the_answer_begins(name):
    tokenizer = load_tokenizer(name)
    yes, no = yes_no_ids(tokenizer)
    tree = Renderer(tokenizer).tree([Message("user", "?")], ["!"], [(0, "It is so.")])
    path = [*tree.prompt, *tree.responses[0], *tree.leaves[0].tokens]
    text = tokenizer.decode(path)
    for word, token in (("Yes", yes), ("No", no)):
        whole = tokenizer(text + word, add_special_tokens=False)["input_ids"]
        assert whole[: len(path) + 1] == [*path, token]
        assert word.startswith(tokenizer.decode([token]))


def test_yes_and_no_that_begin_alike_are_refused():
    tokenizer = copy.deepcopy(load_tokenizer("smollm2"))
    encode = tokenizer.__call__

    class Alike:
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, **kwargs):
            return encode(
                text.removesuffix("Yes").removesuffix("No") + "X" * (text[-1] in "so"), **kwargs
            )

    with pytest.raises(ValueError, match="both start with token"):
        yes_no_ids(Alike())


def test_random_head_is_drawn_by_seed(tmp_path):
    path = language_model("llama", tmp_path)
    one, two, other = (
        initialise(path, head_init="random", seed=s)[0].score.weight for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.std().item() == pytest.approx(0.02, rel=0.5)
    with pytest.raises(ValueError, match="head_init: found 'yes'"):
        initialise(path, head_init="yes")


def test_padding_differs_from_every_leafs_last_token(tmp_path):
    model, tokenizer = initialise(language_model("llama", tmp_path))
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in {p[-1] for tree in trees() for p in paths(tree)}


# --- frozen layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_scores_from_the_trunk_are_the_models_scores(architecture, frozen):
    model, _ = tiny_classifier(architecture)
    whole, parted = (
        TreeRewardModel(model),
        TreeRewardModel(copy.deepcopy(model), frozen_layers=frozen),
    )
    for row in rows(2, architecture=architecture):
        with torch.no_grad():
            expected = whole.score(row)
            assert torch.equal(parted.score(row), expected)
            assert torch.equal(parted.score(row, parted.trunk(row)), expected)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    model, _ = tiny_classifier()
    packed, _ = pack_training_trees(
        training_trees(random_rows(1, seed=4), load_renderer()).trees, 10_000
    )
    whole, parted = TreeRewardModel(copy.deepcopy(model)), TreeRewardModel(model, frozen_layers=2)
    for each in (whole, parted):
        each(packed[0].row, packed[0].terms, packed[0].terms.items)["loss"].backward()
    expected = dict(whole.named_parameters())
    frozen = {id(p) for p in parted.frozen_parameters()}
    assert len(frozen) == 1 + 2 * 9
    for name, parameter in parted.named_parameters():
        if id(parameter) in frozen:
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7), name


def test_the_number_of_frozen_layers_is_checked():
    model, _ = tiny_classifier()
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"frozen_layers: found {count}, expected 0 to 3"):
            TreeRewardModel(model, frozen_layers=count)
    with pytest.raises(ValueError, match="there is no trunk"):
        TreeRewardModel(model).trunk(rows(1)[0])


# --- what is kept of them -------------------------------------------------------------------------


@settings(max_examples=4)
@given(st.integers(0, 100), st.sampled_from([200, 10_000]))
def test_the_cache_changes_no_score(seed, max_tokens):
    """Also across rows of one tree and from one tree to another that shares its segments."""
    model = TreeRewardModel(tiny_classifier()[0], frozen_layers=2)
    cache = TrunkCache(model)
    whole = rows(1, seed=seed)
    parts = rows(1, seed=seed, max_tokens=max_tokens)
    with torch.no_grad():
        for row in [*parts, *whole, *parts]:
            hidden = cache.hidden(row)
            assert torch.allclose(hidden, model.trunk(row), atol=1e-5)
            assert torch.allclose(model.score(row, hidden), model.score(row), atol=1e-5)


def test_the_cache_computes_a_known_row_once_and_reads_parts_of_it():
    model = TreeRewardModel(tiny_classifier()[0], frozen_layers=2)
    cache = TrunkCache(model)
    (tree,) = trees(1)
    (row,) = pack([tree], 10_000)
    cache.hidden(row)
    assert cache.computed_tokens == len(row)
    cache.hidden(row)
    (pruned,) = pack([tree], 10_000, points=[[0]])
    assert len(pruned) < len(row)
    cache.hidden(pruned)
    assert cache.computed_tokens == len(row)


def test_the_cache_tells_equal_text_below_another_prompt_apart():
    model = TreeRewardModel(tiny_classifier()[0], frozen_layers=2)
    cache = TrunkCache(model)
    first, second = (
        next(
            iter(
                pack(
                    [
                        load_renderer().tree(
                            [Message("user", asked)], ["Rest."], [(0, "It says rest.")]
                        )
                    ],
                    10_000,
                )
            )
        )
        for asked in ("Is it bad?", "Is it fine?")
    )
    cache.hidden(first)
    assert torch.allclose(cache.hidden(second), model.trunk(second), atol=1e-6)


def test_only_the_same_frozen_weights_may_read_a_cache():
    model, _ = tiny_classifier()
    cache = TrunkCache(TreeRewardModel(model, frozen_layers=2))
    upper, lower = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        upper.score.weight += 1
        lower.base_model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert cache.same_trunk(TreeRewardModel(upper, frozen_layers=2))
    assert not cache.same_trunk(TreeRewardModel(lower, frozen_layers=2))
    assert not cache.same_trunk(TreeRewardModel(copy.deepcopy(model), frozen_layers=1))


# --- checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_plain(architecture, tmp_path):
    """What was read as trees loads without us and scores padded batches the same."""
    model, tokenizer = tiny_classifier(architecture)
    scored = TreeRewardModel(model, frozen_layers=1)
    tree = trees(1, architecture=architecture)[0]
    (row,) = pack([tree], 10_000)
    with torch.no_grad():
        expected = dict(
            zip((leaf.leaf for leaf in row.leaves), scored.score(row).tolist(), strict=True)
        )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "promedical" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    again = AutoTokenizer.from_pretrained(tmp_path)
    for side in ("left", "right"):
        batch = again.pad(
            {"input_ids": [list(p) for p in paths(tree)]}, padding_side=side, return_tensors="pt"
        )
        assert not batch["attention_mask"].all()
        with torch.no_grad():
            found = loaded(**batch).logits[:, 0].tolist()
        assert found == pytest.approx([expected[i] for i in range(len(found))], abs=1e-4)
