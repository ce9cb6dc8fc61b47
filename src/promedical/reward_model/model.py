"""The reward model: any causal language model with one number read at a criterion's last token.

A checkpoint is a plain `AutoModelForSequenceClassification` with one label (section 4, Head), so
that TRL, vLLM and OpenRLHF load it. Here: its initialisation from a language model, and
`TreeRewardModel`, the module that trainers wrap, whose forward takes a packed row and gives its
loss. Lower layers may be frozen; their output for a row is then computed once and kept, and shared
between models that start from the same weights. With LoRA only an adapter on the other layers, and
the head, are trained. Rows come from `tree`, attention from `attention`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from promedical.reward_model.attention import (
    Implementation,
    backbone_forward,
    head_scores,
    score_row,
    unsupported,
)
from promedical.reward_model.loss import LossTerms, rubric_loss
from promedical.reward_model.render import ensure_pad
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.tree import PackedRow

__all__ = [
    "HeadInit",
    "TreeRewardModel",
    "initialise",
    "new_reward_model",
    "with_lora",
    "yes_no_ids",
]

HeadInit = Literal["yes_no", "random"]


def yes_no_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the first token of "Yes" and of "No" where an assistant's turn begins.

    Taken in context, because many tokenizers merge a word differently after a line break.

    Raises:
        ValueError: the two share their first token, so their difference says nothing.
    """
    turn = [{"role": "user", "content": "?"}]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prefix = str(
        tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )
    start = ids(prefix)
    found = []
    for word in ("Yes", "No"):
        whole = ids(prefix + word)
        if whole[: len(start)] != start or len(whole) == len(start):
            raise ValueError(f"{word!r} merges with the generation prompt; use head_init='random'")
        found.append(whole[len(start)])
    yes, no = found
    if yes == no:
        raise ValueError(f"'Yes' and 'No' both start with token {yes}; use head_init='random'")
    return yes, no


def initialise(
    path: str | Path,
    *,
    head_init: HeadInit = "yes_no",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A one-label classifier from a causal language model, ready to train.

    Args:
        path: a local checkpoint or a Hub id.
        head_init: "yes_no" makes s the difference of the logits of Yes and No; "random" draws the
            head from N(0, 0.02).
        dtype: of the weights; the head's are float32 in any case.

    Raises:
        ValueError: `head_init` is unknown, Yes and No cannot be told apart, or the model is not
            built as Llama and its like are.
    """
    if head_init not in ("yes_no", "random"):
        raise ValueError(f"head_init: found {head_init!r}, expected 'yes_no' or 'random'")
    tokenizer = AutoTokenizer.from_pretrained(path)
    head = None
    if head_init == "yes_no":
        # First, and forgotten, so that there are never two models in memory.
        yes, no = yes_no_ids(tokenizer)
        language_model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        rows = language_model.get_output_embeddings().weight.detach()
        head = (rows[yes].float() - rows[no].float())[None]
        del language_model, rows
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)
    if not (hasattr(model, "score") and hasattr(model.base_model, "layers")):
        raise ValueError(
            f"{path}: found {type(model).__name__}, expected a decoder with `layers` and a head "
            "named `score`"
        )
    model.score.to(torch.float32)
    with torch.no_grad():
        if head is not None:
            model.score.weight.copy_(head)
        else:
            generator = torch.Generator().manual_seed(seed)
            model.score.weight.normal_(0.0, 0.02, generator=generator)
    ensure_pad(tokenizer, model)
    model.config.use_cache = False
    return model, tokenizer


def with_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, frozen_layers: int = 0, seed: int = 0
) -> PeftModel:
    """A classifier of which an adapter on every linear layer above the frozen ones is trained.

    The head is trained whole and saved with the adapter.

    Args:
        rank: of the adapter.
        alpha: it counts alpha / rank.
        seed: of its initial weights.
    """
    layers: Any = model.base_model.layers
    linear = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    # The adapter is drawn from torch's global generator; the same seed, the same adapter.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="SEQ_CLS",  # which also trains and saves the head
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                target_modules=sorted(linear),
                layers_to_transform=list(range(frozen_layers, len(layers))),
                layers_pattern="layers",
            ),
        )
    return adapted  # type: ignore[return-value]


def new_reward_model(
    path: str | Path, settings: TrainSettings, *, seed: int = 0
) -> tuple[TreeRewardModel, PreTrainedTokenizerBase]:
    """The untrained reward model that settings ask for, and its tokenizer.

    Args:
        path: a local checkpoint or a Hub id.
        seed: of a random head and of a LoRA adapter.

    Raises:
        ValueError: the model has fewer layers than are to be frozen, or see `initialise`.
    """
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model, tokenizer = initialise(path, head_init=settings.head_init, seed=seed, dtype=dtype)
    layers: int = model.config.num_hidden_layers
    if settings.frozen_layers > layers:
        raise ValueError(
            f"train.frozen_layers: found {settings.frozen_layers}, but {path} has {layers} layers"
        )
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained: PreTrainedModel | PeftModel = model
    if settings.lora_rank:
        trained = with_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            frozen_layers=settings.frozen_layers,
            seed=seed,
        )
    made = TreeRewardModel(
        trained, frozen_layers=settings.frozen_layers, implementation=settings.attention
    )
    return made, tokenizer


class TreeRewardModel(nn.Module):
    """A sequence classifier that reads whole trees.

    Args:
        model: `AutoModelForSequenceClassification` with one label, or a PEFT model around it.
        frozen_layers: how many of the lowest decoder layers (and the embeddings) are not trained.
        implementation: of the attention, see `attention.backbone_forward`.

    Raises:
        ValueError: `frozen_layers` is not between 0 and the number of layers, or not 0 for a model
            that cannot read trees (`attention.unsupported`).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        frozen_layers: int = 0,
        implementation: Implementation = "level",
    ) -> None:
        super().__init__()
        self.model = model
        self.implementation = implementation
        # FSDP asks which modules to wrap.
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self.frozen_layers = frozen_layers
        backbone = self._backbone
        count = len(backbone.layers)
        if not 0 <= frozen_layers <= count:
            raise ValueError(f"frozen_layers: found {frozen_layers}, expected 0 to {count}")
        if frozen_layers:
            reason = unsupported(self.config)
            if reason is not None:
                raise ValueError(
                    f"frozen_layers: found {frozen_layers}, expected 0: this "
                    f"{self.config.model_type} scores separate sequences, since {reason}"
                )
            backbone.embed_tokens.requires_grad_(False)
            for layer in backbone.layers[:frozen_layers]:
                layer.requires_grad_(False)

    @property
    def config(self) -> PreTrainedConfig:
        """The classifier's configuration, which DeepSpeed and loggers ask a model for."""
        return self.classifier.config

    @property
    def classifier(self) -> PreTrainedModel:
        """The classifier itself, out of a PEFT model if it is in one."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return inner  # type: ignore[return-value]

    @property
    def _backbone(self) -> Any:
        """The decoder without its head; every architecture has a class of its own."""
        return self.classifier.base_model

    @property
    def layers(self) -> Any:
        """The decoder's layers."""
        return self._backbone.layers

    def frozen_parameters(self) -> list[Tensor]:
        """Parameters of the embeddings and the frozen layers."""
        backbone = self._backbone
        frozen = [backbone.embed_tokens, *backbone.layers[: self.frozen_layers]]
        return [p for module in frozen for p in module.parameters()]

    def trunk(self, row: PackedRow) -> Tensor:
        """Hidden states after the frozen layers, shape [tokens, d], without gradient."""
        if not self.frozen_layers:
            raise ValueError("frozen_layers is 0: there is no trunk")
        with torch.no_grad():
            lower = self._part(0, self.frozen_layers, norm=False)
            return backbone_forward(lower, row, implementation=self.implementation)

    def score(self, row: PackedRow, hidden: Tensor | None = None) -> Tensor:
        """s of every leaf of a row, shape [leaves].

        Args:
            hidden: the row's trunk output, if it is already known.
        """
        head: Any = self.classifier.score
        if not self.frozen_layers:
            if unsupported(self.config) is not None:
                return score_row(self.classifier, row)
            states = backbone_forward(self._backbone, row, implementation=self.implementation)
        else:
            # States may be kept on another device than the one that trains.
            device = next(head.parameters()).device
            hidden = self.trunk(row) if hidden is None else hidden.to(device)
            upper = self._part(self.frozen_layers, None, norm=True)
            states = backbone_forward(
                upper, row, inputs_embeds=hidden, implementation=self.implementation
            )
        last = torch.tensor(row.leaf_ends, device=states.device)
        return head_scores(head, states[last])

    def forward(
        self,
        row: PackedRow,
        terms: LossTerms,
        num_items: Tensor | float,
        hidden: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The row's share of the optimiser step's loss, and its scores.

        The loss is computed here because this forward is the one that DDP and FSDP wrap.
        """
        scores = self.score(row, hidden)
        return {"loss": rubric_loss(scores, terms) / num_items, "scores": scores.detach()}

    def _part(self, start: int, stop: int | None, *, norm: bool) -> nn.Module:
        """The backbone with only some of its layers, sharing their weights."""
        backbone = self._backbone
        part = copy.copy(backbone)
        # A shallow copy of a module shares its dictionary of submodules; this one needs its own.
        part._modules = dict(backbone._modules)
        part._modules["layers"] = nn.ModuleList(backbone.layers[start:stop])
        if not norm:
            part._modules["norm"] = nn.Identity()
        return part
