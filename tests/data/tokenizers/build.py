"""Builds the small tokenizers beside this file: real control tokens and chat templates of SmolLM2,
Qwen3 and Llama-3 over a byte-level BPE trained on a few sentences.

    python tests/data/tokenizers/build.py

The Qwen3 and Llama-3 templates are those that TRL ships, which are the models' published ones; the
SmolLM2 template is the one in the model's GGUF file. Control tokens keep their `special` flags
(Qwen3's <think> and <tool_call> are added tokens that are not special).
"""

from pathlib import Path

import trl
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "Can I take two tablets of ibuprofen with my blood pressure medicine?",
    "No. Ask a doctor or a pharmacist before you take ibuprofen with blood pressure tablets.",
    "The answer tells the person to see a doctor. The answer names a dose. Yes or no?",
    "Then the user makes a claim about the last answer. Reply Yes if true, else No.",
    "system user assistant\n\n think tool call response",
    "- one\n- two\n\n1. first\n2. second\n",
]


def base(split: str | None, normalizer: normalizers.Normalizer | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        byte_level
        if split is None
        else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def save(name: str, tokenizer: Tokenizer, added: dict[str, bool], template: str, **names: str):
    tokenizer.add_tokens(
        [AddedToken(t, special=special, normalized=False) for t, special in added.items()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    fast.save_pretrained(HERE / name)


def main() -> None:
    save(
        "smollm2",
        base(None, None),
        dict.fromkeys(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<filename>"], True
        ),
        SMOLLM2_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    save(
        "qwen3",
        base(QWEN_SPLIT, normalizers.NFC()),
        dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"], True)
        | dict.fromkeys(
            [
                "<tool_call>",
                "</tool_call>",
                "<tool_response>",
                "</tool_response>",
                "<think>",
                "</think>",
            ],
            False,
        ),
        (TEMPLATES / "qwen3.jinja").read_text(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    save(
        "llama3",
        base(LLAMA_SPLIT, None),
        dict.fromkeys(
            [
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|reserved_special_token_1|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
            ],
            True,
        ),
        (TEMPLATES / "llama3.jinja").read_text(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


if __name__ == "__main__":
    main()
