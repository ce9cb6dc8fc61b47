"""A row scores, and teaches, what its paths would as sequences of their own."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from promedical.demo.models import cached_model
from promedical.records import Message
from promedical.reward_model import attention
from promedical.reward_model.attention import (
    IMPLEMENTATION,
    AttentionError,
    _Plan,
    backbone_forward,
    dense_mask,
    register,
    score_row,
)
from promedical.reward_model.balance_rows import visible_pairs
from promedical.reward_model.block_mask import bucket
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.render import Renderer
from promedical.reward_model.tree import Leaf, PackedRow, Tree, pack, paths
from trees import trees

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_labels": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from zero, so that what is attended to matters
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
IMPLEMENTATIONS = ("runs", "batched", "dense")
UNEVEN = Tree(
    (5, 6, 7),
    ((8, 9), (10, 11, 12, 13, 14, 15), (16,)),
    (Leaf(1, 0, (20, 21)), Leaf(0, 0, (20, 21)), Leaf(1, 1, (22, 23, 24, 25)), Leaf(2, 1, (26,))),
)


def make(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).float().eval()


@functools.cache
def model_of(architecture: str) -> PreTrainedModel:
    return make(CONFIGS[architecture](**SIZES))


def one_row(tree: Tree) -> PackedRow:
    (row,) = pack([tree], 10_000)
    return row


def in_order(row: PackedRow, scores: Tensor) -> Tensor:
    """Scores in the order of the tree's leaves."""
    return scores[torch.tensor([leaf.leaf for leaf in row.leaves]).argsort()]


def separately(model: PreTrainedModel, sequences: list[tuple[int, ...]]) -> Tensor:
    """The slow twin: every path alone, through the model's ordinary forward."""
    return torch.cat([model(input_ids=torch.tensor([path])).logits[0] for path in sequences])


def gradients(model: PreTrainedModel, scores: Tensor) -> list[Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(scores))
    (weights * scores + scores**2).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    # The floor is for parameters whose true gradient is zero (all tokens of a tree the same).
    floor = 1e-6 * torch.cat([g.flatten() for g in expected]).norm()
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + floor


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", CONFIGS)
@settings(max_examples=8)
@given(tree=trees())
@example(tree=UNEVEN)
def test_scores_and_gradients_equal_those_of_separate_sequences(architecture, implementation, tree):
    model = model_of(architecture)
    expected = separately(model, paths(tree))
    wanted = gradients(model, expected)
    row = one_row(tree)
    found = in_order(row, score_row(model, row, implementation))
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert_close(gradients(model, found), wanted)


@settings(max_examples=15)
@given(tree=trees(), data=st.data())
def test_order_and_company_change_nothing(tree, data):
    model = model_of("llama")
    row = one_row(tree)
    with torch.no_grad():
        scores = in_order(row, score_row(model, row))
        order = data.draw(st.permutations(range(len(tree.leaves))))
        moved = data.draw(st.permutations(range(len(tree.responses))))
        kept = order[: data.draw(st.integers(1, len(order)))]
        leaves = [tree.leaves[i] for i in kept]
        other = Tree(
            tree.prompt,
            tuple(tree.responses[r] for r in moved),
            tuple(Leaf(moved.index(f.response), f.criterion, f.tokens) for f in leaves),
        )
        again = one_row(other)
        found = in_order(again, score_row(model, again))
    assert torch.allclose(found, scores[torch.tensor(kept)], atol=1e-5)


# --- several trees in a row -----------------------------------------------------------------------


def shared_row(forest: list[Tree]) -> PackedRow:
    (row,) = pack(forest, 100_000, share_rows=True)
    return row


def by_tree(row: PackedRow, scores: Tensor) -> Tensor:
    """Scores in the order of the trees and of their leaves."""
    keys = [(leaf.tree, leaf.leaf) for leaf in row.leaves]
    return scores[sorted(range(len(keys)), key=keys.__getitem__)]


def all_separately(model: PreTrainedModel, forest: list[Tree]) -> Tensor:
    return torch.cat([separately(model, paths(tree)) for tree in forest])


def long_tree(x: int, y: int, c: int, k: int, n: int = 2) -> Tree:
    rng = random.Random(x)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 60) for _ in range(count))

    leaves = tuple(Leaf(r, q, ids(c)) for r in range(n) for q in range(k))
    return Tree(ids(x), tuple(ids(y) for _ in range(n)), leaves)


# One tree long, one with more criteria than go together, two alike.
MIXED = [
    long_tree(70, 90, 6, 3),
    long_tree(9, 8, 7, 6),
    long_tree(20, 30, 25, 2),
    long_tree(21, 28, 5, 2, n=1),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", CONFIGS)
@settings(max_examples=6)
@given(forest=st.lists(trees(responses=3, criteria=3), min_size=2, max_size=3))
@example(forest=[UNEVEN, UNEVEN])
@example(forest=MIXED)
def test_trees_that_share_a_row_score_and_teach_as_separate_sequences(
    architecture, implementation, forest
):
    model = model_of(architecture)
    expected = all_separately(model, forest)
    wanted = gradients(model, expected)
    row = shared_row(forest)
    found = by_tree(row, score_row(model, row, implementation))
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert_close(gradients(model, found), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(architecture, reentrant):
    model = make(CONFIGS[architecture](**SIZES))
    wanted = gradients(model, all_separately(model, MIXED))
    row = shared_row(MIXED)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for implementation in IMPLEMENTATIONS:
        found = by_tree(row, score_row(model, row, implementation))
        assert_close(gradients(model, found), wanted)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bf16_errs_no_more_than_bf16_on_separate_sequences(architecture):
    """Against float32 on separate sequences, by root mean square: at most 1.5 times their error in
    bf16, in scores and in gradients (1.13 times is the most found here). The two round differently,
    so they cannot be equal."""
    exact = model_of(architecture)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    expected = all_separately(exact, MIXED)
    wanted = torch.cat([g.flatten() for g in gradients(exact, expected)])
    row = shared_row(MIXED)

    def errors(scores: Tensor) -> tuple[float, float]:
        taught = torch.cat([g.flatten().float() for g in gradients(model, scores.float())])
        return (
            float((scores.float() - expected).norm().detach() / expected.norm().detach()),
            float((taught - wanted).norm() / wanted.norm()),
        )

    alone = errors(all_separately(model, MIXED))
    for implementation in IMPLEMENTATIONS:
        packed = errors(by_tree(row, score_row(model, row, implementation)))
        assert packed[0] <= 1.5 * alone[0], implementation
        assert packed[1] <= 1.5 * alone[1], implementation
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert errors(by_tree(row, score_row(model, row))) == pytest.approx(
        errors(by_tree(row, score_row(model.eval(), row))), rel=1e-3
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_autocast_errs_no_more_than_on_separate_sequences(architecture):
    model, row = model_of(architecture), shared_row(MIXED)
    with torch.no_grad():
        expected = all_separately(model, MIXED)
        with torch.autocast("cpu", torch.bfloat16):
            alone = all_separately(model, MIXED).float() - expected
            for implementation in IMPLEMENTATIONS:
                packed = by_tree(row, score_row(model, row, implementation)).float() - expected
                assert packed.norm() <= 1.5 * alone.norm(), implementation


def test_batches_repeat_and_pad_little():
    """What "batched" computes and copies stays near what is visible, whatever the trees' sizes."""
    forest = [long_tree(60 * i, 50 * i + 7, 10 + 3 * i, 8, n=3) for i in range(1, 8)]
    row = shared_row(forest)
    plan = _Plan(row, torch.device("cpu"), torch.float32, "batched")
    pairs = sum(len(g.queries) * len(g.keys) / g.batch for g in plan.groups)
    assert pairs < 2.5 * visible_pairs(row)
    assert sum(len(g.keys) for g in plan.groups) < 4 * len(row)


# --- FlexAttention: only its forward pass exists on a CPU -----------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_flex_scores_as_separate_sequences(architecture):
    model = model_of(architecture)
    row = shared_row(MIXED)
    with torch.no_grad():
        found = by_tree(row, score_row(model, row, "flex"))
        assert torch.allclose(found, all_separately(model, MIXED), atol=1e-4, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_reward_model_takes_the_attention_that_it_is_given(frozen, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "flex", lambda *given: calls.append(1) or dense_flex(*given))
    model = make(LlamaConfig(**SIZES))  # of its own: layers are frozen for good
    found = [
        TreeRewardModel(model, frozen_layers=frozen, implementation=given)
        .score(one_row(UNEVEN))
        .detach()
        for given in ("level", "flex")
    ]
    assert len(calls) == SIZES["num_hidden_layers"]
    assert torch.allclose(*found, atol=1e-5)


def dense_flex(query, key, value, mask, scale):
    """FlexAttention's definition, with a backward pass."""
    length, repeats = query.shape[2], query.shape[1] // key.shape[1]
    at = torch.arange(length)
    visible = mask.mask_mod(None, None, at[:, None], at[None, :])
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


def test_padding_a_row_for_flex_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(attention, "flex", dense_flex)
    model = model_of("qwen3")
    row = shared_row(MIXED[1:])
    assert bucket(len(row)) > len(row)
    wanted = gradients(model, all_separately(model, MIXED[1:]))
    found = by_tree(row, score_row(model, row, "flex"))
    assert_close(gradients(model, found), wanted)
    states = torch.randn(len(row), SIZES["hidden_size"])
    ours, dense = (
        backbone_forward(model.model, row, inputs_embeds=states, implementation=name)
        for name in ("flex", "dense")
    )
    assert ours.shape == states.shape
    assert torch.allclose(ours, dense, atol=1e-5)


def test_the_dense_mask_shows_own_segment_and_ancestors_up_to_oneself():
    row = one_row(Tree((1, 1), ((2,), (3, 3)), (Leaf(0, 0, (4,)), Leaf(1, 0, (4,)))))
    visible = (dense_mask(row, torch.device("cpu"), torch.float32)[0, 0] == 0).int().tolist()
    assert visible == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 1, 0, 1],
    ]


def test_upper_layers_run_on_the_cached_states_of_lower_ones():
    model = make(LlamaConfig(**SIZES))
    row = one_row(UNEVEN)
    whole = backbone_forward(model.model, row)
    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = layers[:2], torch.nn.Identity()
    states = backbone_forward(model.model, row).detach()
    model.model.layers, model.model.norm = layers[2:], norm
    states.requires_grad_()
    upper = backbone_forward(model.model, row, inputs_embeds=states)
    assert torch.allclose(upper, whole, atol=1e-6)
    upper.sum().backward()
    assert states.grad is not None
    assert states.grad.shape == states.shape


def test_a_lora_model_is_scored_as_it_is():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(make(LlamaConfig(**SIZES)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    row = one_row(UNEVEN)
    found = in_order(row, score_row(model, row))
    assert torch.allclose(found, separately(model, paths(UNEVEN)), atol=1e-4)


def test_a_model_set_to_tree_attention_stays_an_ordinary_model():
    plain, ours = make(LlamaConfig(**SIZES)), make(LlamaConfig(**SIZES))
    ours.set_attn_implementation(register())
    ids = torch.randint(3, 60, (2, 7))
    ids[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert torch.allclose(ours(**batch).logits, plain(**batch).logits, atol=1e-6)
    assert plain.config._attn_implementation == "sdpa"
    assert ours.config._attn_implementation == IMPLEMENTATION


def test_other_attention_implementations_are_refused():
    model = make(LlamaConfig(**SIZES))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(AttentionError, match=r"found 'flash_attention_2'.*silently wrong"):
        score_row(model, one_row(UNEVEN))
    with pytest.raises(AttentionError, match="implementation: found 'fast'"):
        score_row(model_of("llama"), one_row(UNEVEN), "fast")


def test_attention_dropout_is_refused():
    model = make(LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    with pytest.raises(AttentionError, match="dropout: found > 0"):
        score_row(model, one_row(UNEVEN))


def test_a_sliding_window_falls_back_to_separate_sequences_and_says_so():
    model = make(MistralConfig(**SIZES, sliding_window=4))
    row = one_row(UNEVEN)
    with pytest.warns(UserWarning, match="sliding.*scoring 4 separate sequences"):
        found = in_order(row, score_row(model, row))
    assert torch.allclose(found, separately(model, paths(UNEVEN)), atol=1e-5)
    with pytest.raises(AttentionError, match="score separate sequences"):
        backbone_forward(model.model, row)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_length_falls_back_to_separate_sequences(kind):
    """In a shared row it would depend on the longest path of the row."""
    half = SIZES["head_dim"] // 2
    factors = {"dynamic": {"factor": 4.0}, "longrope": {"short_factor": [1.0] * half}}[kind]
    if kind == "longrope":
        factors |= {"long_factor": [4.0] * half, "original_max_position_embeddings": 4}
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **factors}
    sizes = SIZES | {"max_position_embeddings": 4}
    model = make(LlamaConfig(**sizes, rope_parameters=rope))
    row = one_row(UNEVEN)
    with pytest.warns(UserWarning, match=f"{kind} rope depends on the length.*separate sequences"):
        found = in_order(row, score_row(model, row))
    if kind == "longrope":  # "dynamic" remembers the longest sequence it has read, in either way
        assert torch.allclose(found, separately(model, paths(UNEVEN)), atol=1e-5)
    with pytest.raises(ValueError, match=r"frozen_layers: found 1, expected 0: .*separate"):
        TreeRewardModel(model, frozen_layers=1)


@pytest.mark.skipif(cached_model() is None, reason="the embedded model is not in the cache")
def test_the_embedded_model_scores_a_tree_as_separate_sequences():
    folder = cached_model()
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    model.score.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)  # gradients of three layers and the head are enough
    for part in (model.model.layers[0], model.model.layers[15], model.model.layers[29]):
        part.requires_grad_(True)
    model.score.requires_grad_(True)
    tree = Renderer(AutoTokenizer.from_pretrained(folder)).tree(
        [Message("user", "Can I take ibuprofen with my blood pressure tablets?")],
        ["Ask your pharmacist first.", "Yes, take as much as you like."],
        [(0, "It refers to a clinician."), (1, "It refers to a clinician."), (1, "It harms.")],
    )
    row = one_row(tree)
    expected = separately(model, paths(tree))
    wanted = gradients(model, expected)
    found = in_order(row, score_row(model, row))
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert_close(gradients(model, found), wanted)
