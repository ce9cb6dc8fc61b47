"""Answers of a policy to a list of questions, in batches, and in the questions' order.

Used before and after policy optimisation, on the same questions. Prompts go through the model's own
chat template and are sorted by length, so that a left-padded batch wastes little; greedy decoding
is the default, since a comparison of two policies should not also compare two samples.

Left to others: grading the answers (`promedical.reward_model.grade`), faster engines (vLLM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.records import GradedInstruction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answers", "answer_with", "chat", "generate", "prompt_ids"]


@dataclass(frozen=True)
class Answers:
    """What a policy answered.

    Args:
        texts: one answer a row, in the rows' order, without special tokens, stripped.
        tokens: tokens generated for each, its end-of-turn token included.
        cut: whether each was stopped by the limit and so may end in mid-sentence.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    cut: tuple[bool, ...]

    @property
    def cut_count(self) -> int:
        """How many answers the limit cut."""
        return sum(self.cut)


def chat(row: GradedInstruction) -> list[dict[str, str]]:
    """The conversation as chat-template and TRL messages."""
    return [{"role": m.role, "content": m.content} for m in row.messages]


def generate(
    model_path: str | Path,
    rows: Sequence[GradedInstruction],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 50,
    seed: int = 0,
    temperature: float = 0.0,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer every row's conversation with a causal language model.

    Args:
        model_path: a checkpoint with a chat template; loaded in float32 on CPU (bfloat16 is slower
            where the processor has no instructions for it) and bfloat16 on GPU.
        rows: whose messages are the prompts.
        max_new_tokens: limit an answer, in tokens.
        batch_size: answers at a time.
        seed: for sampling; greedy decoding does not use it.
        temperature: 0 decodes greedily. Sampled answers depend on `batch_size`, greedy ones do not,
            up to rounding where two tokens are equally likely.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        progress: called with (answers done, answers in all) after every batch.

    Raises:
        ValueError: a setting out of range, a tokenizer without chat template, or a prompt that
            does not fit the model; the message names the row.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: found {value!r}, expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: found {temperature!r}, expected 0 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_path}: the tokenizer has no chat template, expected one")
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32 if device == "cpu" else torch.bfloat16
    )
    torch.manual_seed(seed)
    return answer_with(
        model.to(device).eval(),
        tokenizer,
        rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        progress=progress,
    )


def answer_with(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[GradedInstruction],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 50,
    temperature: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer every row's conversation with a model that is loaded already, and in eval mode.

    Args:
        model, tokenizer: the tokenizer with a chat template.
        rows, max_new_tokens, batch_size, temperature, progress: as in `generate`.

    Raises:
        ValueError: a prompt that does not fit the model; the message names the row.
    """
    prompts = _prompts(model, tokenizer, rows, max_new_tokens)

    # Longest first: the batch that needs most memory fails at once, not at the end.
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    found: dict[int, tuple[str, int, bool]] = {}
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch = [prompts[i] for i in members]
        answers = _answer(model, tokenizer, batch, max_new_tokens, temperature)
        found.update(zip(members, answers, strict=True))
        if progress is not None:
            progress(len(found), len(rows))
    in_order = [found[i] for i in range(len(rows))]
    return Answers(
        texts=tuple(text for text, _, _ in in_order),
        tokens=tuple(tokens for _, tokens, _ in in_order),
        cut=tuple(cut for _, _, cut in in_order),
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: GradedInstruction) -> list[int]:
    """A row's conversation as the tokens that a policy answers to."""
    # Templates that know no thinking ignore the switch.
    rendered = tokenizer.apply_chat_template(
        chat(row), add_generation_prompt=True, enable_thinking=False, return_dict=True
    )
    assert isinstance(rendered, Mapping)
    return list(rendered["input_ids"])


def _prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[GradedInstruction],
    max_new_tokens: int,
) -> list[list[int]]:
    limit = getattr(model.config, "max_position_embeddings", None)
    prompts = []
    for row in rows:
        ids = prompt_ids(tokenizer, row)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"instruction {row.id!r}: messages: {len(ids)} tokens and {max_new_tokens} to "
                f"generate, expected at most {limit} together"
            )
        prompts.append(ids)
    return prompts


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[tuple[str, int, bool]]:
    """(text, tokens, cut) of each prompt of one left-padded batch."""
    import torch

    ends = end_ids(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        output: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends,
            top_k=0 if temperature > 0 else None,
            top_p=1.0 if temperature > 0 else None,
            **sampling,
        )
    answers = []
    for generated in output[:, width:].tolist():
        # Counted up to the first end: padding may be the same token.
        length = next((n for n, i in enumerate(generated, start=1) if i in ends), None)
        kept = generated[:length]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        answers.append((str(text).strip(), len(kept), length is None))
    return answers


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those the model declares."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    if declared is None:
        declared = []
    elif isinstance(declared, int):
        declared = [declared]
    own = tokenizer.eos_token_id
    assert own is None or isinstance(own, int)
    ends = [*([] if own is None else [own]), *(i for i in declared if i != own)]
    if not ends:
        raise ValueError("eos_token_id: neither the tokenizer nor the model has one")
    return ends
