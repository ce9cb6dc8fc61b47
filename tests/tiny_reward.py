"""Tiny, randomly initialised classifiers and graded rows, for the reward model's tests."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from promedical.records import GradedInstruction, Message, Response
from promedical.reward_model.render import Renderer, ensure_pad
from promedical.rubric import Criterion, Rubric, Tier, Verdict

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
ARCHITECTURES = {"llama": "smollm2", "qwen3": "qwen3"}
VOCABULARY = 432

MET, UNMET, ABSTAIN = Verdict.MET, Verdict.UNMET, Verdict.ABSTAIN


def size(layers: int = 3) -> dict[str, int | float]:
    """A configuration small enough for a test, with weights far from zero."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
    }


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """One of the tokenizers in tests/data, padding set; shared, so leave it as it is."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    ensure_pad(tokenizer)
    return tokenizer


@functools.cache
def load_renderer(name: str = "smollm2") -> Renderer:
    """The renderer of that tokenizer."""
    return Renderer(load_tokenizer(name))


def tiny_classifier(
    architecture: str = "llama", *, layers: int = 3, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A one-label classifier in float32 and the tokenizer that fits it."""
    tokenizer = copy.deepcopy(load_tokenizer(ARCHITECTURES[architecture]))
    torch.manual_seed(seed)
    if architecture == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **size(layers)))
    else:
        config = Qwen3Config(num_labels=1, head_dim=8, **size(layers))
        model = Qwen3ForSequenceClassification(config)
    ensure_pad(tokenizer, model)
    return model.eval(), tokenizer


def criteria(
    proficiency: int = 2, excellence: int = 1, veto: int = 1, *, name: str = ""
) -> tuple[Criterion, ...]:
    """That many criteria of each tier, equal weights."""
    return (
        *(
            Criterion(f"p{i}", Tier.PROFICIENCY, f"It names dose {i}{name}.", 1 / proficiency)
            for i in range(proficiency)
        ),
        *(
            Criterion(f"e{i}", Tier.EXCELLENCE, f"It is kind, {i}{name}.")
            for i in range(excellence)
        ),
        *(Criterion(f"v{i}", Tier.VETO, f"It does harm {i}{name}.") for i in range(veto)),
    )


def row(
    verdicts: list[list[Verdict]],
    asked: tuple[Criterion, ...] | None = None,
    *,
    name: str = "q",
    texts: list[str] | None = None,
) -> GradedInstruction:
    """A row with a response for every list of verdicts (one a criterion, in order)."""
    asked = criteria() if asked is None else asked
    texts = [f"Take {i} tablets." for i in range(len(verdicts))] if texts is None else texts
    return GradedInstruction(
        id=name,
        messages=(Message("user", f"May I take {name}?"),),
        source="test",
        licence="none",
        rubric=Rubric(asked, safety_only=not any(c.tier is Tier.PROFICIENCY for c in asked)),
        responses=tuple(
            Response(f"r{i}", "test", text, {c.id: v for c, v in zip(asked, given, strict=True)})
            for i, (text, given) in enumerate(zip(texts, verdicts, strict=True))
        ),
    )


def random_rows(count: int, *, seed: int = 0, responses: int = 3) -> list[GradedInstruction]:
    """Rows with random verdicts, a quarter of them unknown."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        asked = criteria(2, 1, 2, name=f" of {n}")
        verdicts = [
            rng.choices([MET, UNMET, ABSTAIN], [3, 3, 2], k=len(asked)) for _ in range(responses)
        ]
        rows.append(row(verdicts, asked, name=f"q{n}"))
    return rows
