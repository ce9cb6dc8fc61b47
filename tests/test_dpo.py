"""DPO: pairs as tokens, what is left out and counted, the loss, and no text in logs or files."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from promedical.corpus.pairs import PairsSettings, preference_pairs
from promedical.policy.dpo import DpoRecipe, token_pairs, train_dpo
from promedical.policy.settings import DpoSettings
from promedical.records import GradedInstruction
from tiny_policy import save_tiny_policy
from tiny_reward import MET, UNMET, criteria, random_rows, row

SECRET = "Mrs Miller of 5 Elm Street"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def rows(count: int = 4) -> list[GradedInstruction]:
    """Rows with a better and a worse answer, and a third that ties with the better one."""
    asked = criteria(1, 1, 1)
    return [
        row(
            [[MET, MET, UNMET], [MET, MET, MET], [MET, MET, UNMET]],
            asked,
            name=f"{SECRET} {n}",
            texts=[f"Rest, {SECRET}. <|im_end|> {n}", "Take ten.", "Rest."],
        )
        for n in range(count)
    ]


def test_pairs_are_those_of_the_corpus_and_their_tokens_those_of_the_chat(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    given = [*rows(1), *random_rows(4)]
    found, counts = token_pairs(given, DpoSettings(), tokenizer, tokenizer.eos_token_id)
    made = [p for r in given for p in preference_pairs(r, PairsSettings())]
    assert [(p.instruction, p.chosen_id, p.rejected_id) for p in found] == [
        (p.instruction, p.chosen, p.rejected) for p in made
    ]
    assert counts["pairs"] == len(found)
    assert counts["ties"] >= 1
    texts = {r.id: {a.id: a.text for a in r.responses} for r in given}
    for pair in found[-2:]:  # without a control token in them
        whole = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": f"May I take {pair.instruction}?"},
                {"role": "assistant", "content": texts[pair.instruction][pair.chosen_id]},
            ],
            return_dict=True,
        )["input_ids"]
        joined = [*pair.prompt, *pair.chosen]
        assert joined == whole[: len(joined)]
    # What an answer spells out does not end its turn.
    assert found[0].chosen.count(tokenizer.eos_token_id) == 1
    assert found[0].chosen[-1] == tokenizer.eos_token_id


def test_what_is_left_out_is_counted(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    given = [*rows(2), replace(rows(1)[0], id="bare", rubric=None, responses=())]
    every, _ = token_pairs(given, DpoSettings(), tokenizer, 1)
    lengths = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in every]
    found, counts = token_pairs(given, DpoSettings(max_length=max(lengths) - 1), tokenizer, 1)
    assert found == [p for p, n in zip(every, lengths, strict=True) if n < max(lengths)]
    assert counts["pairs_too_long"] + counts["pairs"] == counts["decided.safety"] == 4
    assert counts["pairs_too_long"] == counts["pairs"] == 2
    assert counts["instructions_without_rubric"] == 1
    one = DpoSettings(pairs_per_instruction=1)
    drawn, counts = token_pairs(given, one, tokenizer, 1, seed=3)
    assert (counts["pairs"], counts["pairs_not_drawn"]) == (2, 2)
    assert drawn == token_pairs(given, one, tokenizer, 1, seed=3)[0]


def test_a_run_learns_the_preference_and_tells_nothing(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = DpoRecipe(
        model=str(tiny), epochs=3, pairs_per_step=4, learning_rate=1e-2, save_steps=2, micro_batch=2
    )
    moved: list[tuple[int, int]] = []
    with caplog.at_level(logging.DEBUG):
        result = train_dpo(
            recipe, rows(), tmp_path / "run", progress=lambda *given: moved.append(given)
        )
    assert (result.planned_steps, result.done_steps, result.stopped_by) == (6, 6, "steps")
    assert moved[-1] == (6, 6)
    first, last = result.history[0], result.history[-1]
    # Before the first step policy and reference are the same: −log σ(0).
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.margin == pytest.approx(0, abs=1e-5)
    assert (last.loss or 1) < math.log(2)
    assert last.accuracy == 1
    before = load_file(tiny / "model.safetensors")
    after = load_file(result.policy / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert train_dpo(replace(recipe, max_seconds=9.0), rows(), tmp_path / "run") == result

    shown = capfd.readouterr()
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for text in (
        caplog.text,
        shown.out,
        shown.err,
        *(found.decode("utf-8", "replace") for found in files),
    ):
        assert SECRET not in text


def test_bad_input_is_named(tiny: Path, tmp_path: Path) -> None:
    alike = [replace(rows(1)[0], responses=rows(1)[0].responses[::2])]
    with pytest.raises(ValueError, match=r"no pair is left of 1 instructions .*ties 1"):
        train_dpo(DpoRecipe(model=str(tiny)), alike, tmp_path / "none")
    for name, value in (("epochs", 0.0), ("beta", -1.0), ("pairs_per_step", 0), ("micro_batch", 3)):
        with pytest.raises(ValueError, match=f"{name}: found"):
            DpoRecipe(**{name: value})  # type: ignore[arg-type]
