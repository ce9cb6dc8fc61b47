"""Generation: the questions' order, whatever the batches, and answers cut at the limit counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from promedical.policy.generate import Answers, chat, generate
from promedical.records import GradedInstruction, Message
from tiny_policy import save_tiny_policy

QUESTIONS = [
    "Hi?",
    "My knee hurts when I climb stairs, why?",
    "x",
    "Is it safe to fly?",
    "And this?",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def rows(questions: list[str]) -> list[GradedInstruction]:
    return [
        GradedInstruction(f"q{i}", (Message("user", text),), "test", "none")
        for i, text in enumerate(questions)
    ]


def one_by_one(path: Path, questions: list[str], limit: int) -> list[tuple[str, int, bool]]:
    """The slow, obvious version: argmax of the whole sequence, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    answers = []
    for question in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) - start < limit and (len(ids) == start or ids[-1] != 1):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        cut = ids[-1] != 1
        new = ids[start:]
        answers.append((tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), cut))
    return answers


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, tuple[str, int, bool]]:
    return dict(zip(QUESTIONS, one_by_one(tiny, QUESTIONS, 10), strict=True))


@settings(max_examples=6, deadline=None)
@given(batch_size=st.integers(1, 6), order=st.permutations(QUESTIONS))
def test_greedy_answers_do_not_depend_on_batches(
    tiny: Path, expected: dict[str, tuple[str, int, bool]], batch_size: int, order: list[str]
) -> None:
    found = generate(tiny, rows(order), max_new_tokens=10, batch_size=batch_size, device="cpu")
    answers = list(zip(found.texts, found.tokens, found.cut, strict=True))
    assert answers == [expected[question] for question in order]


def test_cut_answers_are_counted(tiny: Path) -> None:
    found = generate(tiny, rows(QUESTIONS), max_new_tokens=1, batch_size=2, device="cpu")
    assert found.tokens == (1,) * 5
    assert found.cut_count == sum(found.cut) == 5
    assert Answers(("a", "b"), (3, 4), (True, False)).cut_count == 1


def test_ends_at_the_end_of_turn_though_padding_is_the_same_token(tiny: Path) -> None:
    """The tiny model's end of turn is made likely, so that some answers end early."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ending = tiny.parent / "ending"
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight.abs().sum(0) * 0.2
    model.save_pretrained(ending)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(ending)
    found = generate(ending, rows(QUESTIONS), max_new_tokens=30, batch_size=5, device="cpu")
    assert found.cut_count < 5
    answers = list(zip(found.texts, found.tokens, found.cut, strict=True))
    assert answers == one_by_one(ending, QUESTIONS, 30)


def test_sampling_follows_the_seed(tiny: Path) -> None:
    def sample(seed: int) -> tuple[str, ...]:
        return generate(
            tiny,
            rows(QUESTIONS),
            max_new_tokens=8,
            batch_size=5,
            seed=seed,
            temperature=1.0,
            device="cpu",
        ).texts

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_progress_reaches_the_end(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        tiny,
        rows(QUESTIONS),
        max_new_tokens=2,
        batch_size=2,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert generate(tiny, [], max_new_tokens=2, device="cpu") == Answers((), (), ())


def test_bad_input_is_named(tiny: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: found 0"):
        generate(tiny, rows(["x"]), max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        generate(tiny, rows(["x"]), batch_size=0)
    with pytest.raises(ValueError, match="temperature: found -1"):
        generate(tiny, rows(["x"]), temperature=-1)
    with pytest.raises(ValueError, match=r"'q1': messages: \d+ tokens and 8 to generate"):
        generate(tiny, rows(["x", "long " * 200]), max_new_tokens=8, device="cpu")


def test_chat_keeps_every_turn() -> None:
    turns = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    row = GradedInstruction("q", (*turns, Message("user", "v")), "test", "none")
    assert [m["content"] for m in chat(row)] == ["s", "u", "a", "v"]
    assert chat(row)[0] == {"role": "system", "content": "s"}
