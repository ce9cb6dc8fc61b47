"""Rendering: cut segments join to the whole, untrusted text stays text, thoughts go."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from promedical.demo.models import cached_model
from promedical.records import Message
from promedical.reward_model.render import (
    LAYOUTS,
    OVERALL,
    Renderer,
    RenderError,
    ensure_pad,
    rubric_question,
    spoken,
)
from promedical.reward_model.tree import Tree
from promedical.rubric import Criterion, Rubric, Tier

DATA = Path(__file__).parent / "data"
NAMES = ("smollm2", "qwen3", "llama3")
CONVERSATION = (
    Message("user", "Can I take ibuprofen with my blood pressure tablets?"),
    Message("assistant", "Which tablets?"),
    Message("user", "Lisinopril, 10 mg.\n\n- since May\n"),
)
RESPONSES = ("Ask a pharmacist first.", "<think>Hm, 2 of them?</think>\n\nYes, *two* a day.\n")
CRITERIA = ("The answer refers to a clinician.", "The answer names a dose.")
EVERY_LEAF = [(r, c) for r in range(2) for c in CRITERIA]


@functools.cache
def load(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)


@functools.cache
def renderer_of(name: str) -> Renderer:
    return Renderer(load(name))


def whole(renderer: Renderer, messages, response: str, criterion: str) -> list[int]:
    """The slow twin: the whole chat through the tokenizer's own template and tokenization."""
    chat = renderer.chat(messages, response, criterion)
    return renderer.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )


def joined(tree: Tree, leaf: int = 0) -> list[int]:
    chosen = tree.leaves[leaf]
    return [*tree.prompt, *tree.responses[chosen.response], *chosen.tokens]


def control_ids(tokenizer: PreTrainedTokenizerBase, ids) -> list[int]:
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("name", NAMES)
def test_golden_renderings(name):
    renderer = renderer_of(name)
    system = (Message("system", "Be kind."), *CONVERSATION)
    found = {}
    for title, messages in (("conversation", CONVERSATION), ("with a system prompt", system)):
        tree = renderer.tree(messages, RESPONSES, EVERY_LEAF)
        text = renderer.tokenizer.decode
        found[title] = {
            "prompt": text(tree.prompt),
            "responses": [text(r) for r in tree.responses],
            "leaves": [[f.response, f.criterion, text(f.tokens)] for f in tree.leaves],
            "prompt_ids": list(tree.prompt),
            "response_ids": [list(r) for r in tree.responses],
            "leaf_ids": [list(f.tokens) for f in tree.leaves],
        }
    golden = DATA / "golden" / f"render_{name}.json"
    assert found == json.loads(golden.read_text(encoding="utf-8"))


def free_of_controls(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[str]:
    pieces = st.one_of(
        st.text(max_size=12),
        st.sampled_from(["\n", "\n\n", " ", "No.", " Yes", "{{ x }}", "123", "é", "e\u0301", "🩺"]),
    )
    added = [t.content for t in tokenizer.added_tokens_decoder.values()]
    joined_pieces = st.lists(pieces, max_size=5).map("".join)
    return joined_pieces.filter(lambda text: not any(a in text for a in added))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_segments_join_to_the_ids_of_the_whole_rendering(name, data):
    renderer = renderer_of(name)
    texts = free_of_controls(renderer.tokenizer)
    turns = [Message("user", data.draw(texts))]
    for _ in range(data.draw(st.integers(0, 2))):
        turns += [Message("assistant", data.draw(texts)), Message("user", data.draw(texts))]
    if data.draw(st.booleans()):
        turns.insert(0, Message("system", data.draw(texts)))
    response, criterion = data.draw(texts), data.draw(texts)
    tree = renderer.tree(turns, [response], [(0, criterion)])
    assert joined(tree) == whole(renderer, turns, response, criterion)


@pytest.mark.parametrize("name", NAMES)
def test_cuts_lie_before_the_token_that_opens_a_turn(name):
    renderer = renderer_of(name)
    tree = renderer.tree(CONVERSATION, RESPONSES, EVERY_LEAF)
    opener = "<|start_header_id|>" if name == "llama3" else "<|im_start|>"
    number = renderer.tokenizer.convert_tokens_to_ids(opener)
    assert all(y[0] == number for y in tree.responses)
    assert all(leaf.tokens[0] == number for leaf in tree.leaves)
    assert renderer.tokenizer.decode(tree.responses[0]).count("assistant") == 1


@pytest.mark.parametrize("place", ["conversation", "response", "criterion"])
@pytest.mark.parametrize("name", NAMES)
def test_no_control_token_comes_out_of_untrusted_text(name, place):
    renderer = renderer_of(name)
    tokenizer = renderer.tokenizer
    plain = joined(renderer.tree([Message("user", "a")], ["a"], [(0, "a")]))
    for token in tokenizer.added_tokens_decoder.values():
        attack = f"a {token.content}{token.content}a"
        texts = {"conversation": "a", "response": "a", "criterion": "a"} | {place: attack}
        tree = renderer.tree(
            [Message("user", texts["conversation"])],
            [texts["response"]],
            [(0, texts["criterion"])],
        )
        found = joined(tree)
        assert control_ids(tokenizer, found) == control_ids(tokenizer, plain), token.content
        # It is still there, as text; an unclosed thought is the one thing that goes.
        kept = 0 if place == "response" and token.content == "<think>" else 2
        before = tokenizer.decode(plain).count(token.content)
        assert tokenizer.decode(found).count(token.content) == before + kept


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
@example(data=None)
def test_mixtures_of_control_tokens_stay_text(name, data):
    renderer = renderer_of(name)
    tokenizer = renderer.tokenizer
    added = [t.content for t in tokenizer.added_tokens_decoder.values()]
    if data is None:
        attack = "".join(added)
    else:
        pieces = st.sampled_from([*added, "\n", "assistant", "<", "|", "Yes", "<|im_", "end|>"])
        attack = "".join(data.draw(st.lists(pieces, max_size=8)))
    plain = renderer.tree([Message("user", "a")], ["a"], [(0, "a")])
    tree = renderer.tree([Message("user", attack)], [attack], [(0, attack)])
    assert control_ids(tokenizer, joined(tree)) == control_ids(tokenizer, joined(plain))


def test_the_words_of_a_vocabulary_that_lists_a_control_token_are_taken_apart():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(sorted(set("<|>sepabuserystmnoi.,TIRAEfhclkwNY \n")))}
    vocabulary = letters | {"<|": 90, "<|s": 91, "<|s|": 92, "<|s|>": 93}
    merges = [("<", "|"), ("<|", "s"), ("<|s", "|"), ("<|s|", ">")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Split("~", "isolated")
    backend.add_tokens([AddedToken("<|s|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (
        "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
    )
    tree = Renderer(tokenizer).tree([Message("user", "a<|s|>b")], ["a"], [(0, "b")])
    assert tree.prompt.count(93) == 2
    assert tokenizer.decode(tree.prompt).replace(" ", "").count("<|s|>") == 3


@pytest.mark.parametrize(
    ("text", "said", "emptied"),
    [
        ("  Yes.\n", "Yes.", False),
        ("<think>a\nb</think>\n\nYes.", "Yes.", False),
        ("<think>a</think>Yes<think>b</think>.", "Yes.", False),
        ("<think>on and on", "", True),
        ("Yes.<think>on and on", "Yes.", False),
        ("<think>a</think><think>b", "", True),
        ("<think>a</think>", "", False),
        ("", "", False),
    ],
)
def test_thoughts_are_not_part_of_what_is_said(text, said, emptied):
    assert spoken(text) == (said, emptied)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", " ", "a"]), max_size=12))
def test_thoughts_are_those_of_the_pattern(parts):
    text = "".join(parts)
    closed = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    said = re.sub(r"<think>.*", "", closed, flags=re.DOTALL).strip()
    assert spoken(text) == (said, not said and closed.strip() != "")


def test_an_answer_of_many_thoughts_is_read_at_once():
    # A pattern needs hours for this; a server would stand still as long.
    assert spoken("<think>" * 500_000) == ("", True)


def test_layouts_are_not_kept_for_ever():
    renderer = Renderer(load("smollm2"))
    for count in range(LAYOUTS + 20):
        roles = [("user", "assistant")[count >> bit & 1] for bit in range(9)]
        renderer.tree([*(Message(role, "?") for role in roles), Message("user", "?")], [], [])
    assert renderer._layout.cache_info().currsize == LAYOUTS


def test_an_answer_that_is_only_a_thought_is_empty_and_counted():
    tree = renderer_of("qwen3").tree(CONVERSATION, ["Yes.", "<think>hm", ""], [(1, "It is so.")])
    assert tree.emptied == (1,)
    assert tree.responses[1] == tree.responses[2]


def test_equal_criteria_share_a_number():
    tree = renderer_of("smollm2").tree(CONVERSATION, RESPONSES, EVERY_LEAF)
    assert [(f.response, f.criterion) for f in tree.leaves] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert tree.leaves[0].tokens == tree.leaves[2].tokens


@pytest.mark.parametrize(
    ("name", "pad"),
    [
        ("smollm2", "<|endoftext|>"),
        ("qwen3", "<|endoftext|>"),
        ("llama3", "<|reserved_special_token_0|>"),
    ],
)
def test_padding_is_a_spare_token(name, pad):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_labels=1,
        )
    )
    before = len(tokenizer)
    number = ensure_pad(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == before
    assert model.config.pad_token_id == tokenizer.pad_token_id == number
    tree = Renderer(tokenizer).tree(CONVERSATION, RESPONSES, EVERY_LEAF)
    assert number not in joined(tree)
    assert ensure_pad(tokenizer) == number


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "smollm2")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "found no chat_template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "the generation prompt is ''"),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}Answer:{% endif %}",
            "the generation prompt is 'Answer:'",
        ),
        ("{{ raise_exception('no system role') }}", "no system role"),
        (
            "{% for m in messages[1:] %}<|im_start|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            "leaves out the system prompt",
        ),
        (
            "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            "turns do not each open",
        ),
        (
            "{% for m in messages[:2] %}<|im_start|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            "leaves out turn 1",
        ),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(template, message):
    with pytest.raises(RenderError, match=message):
        Renderer(with_template(template))


def test_a_leaf_of_no_response_is_refused():
    with pytest.raises(RenderError, match=r"leaves\[1\]: response: found 2, expected 0 … 1"):
        renderer_of("smollm2").tree(CONVERSATION, RESPONSES, [(0, "a"), (2, "b")])


@pytest.mark.skipif(cached_model() is None, reason="the embedded model is not in the cache")
def test_the_embedded_tokenizer_joins_and_keeps_text_text():
    renderer = Renderer(AutoTokenizer.from_pretrained(cached_model()))
    tree = renderer.tree(CONVERSATION, RESPONSES, EVERY_LEAF)
    for number, (response, criterion) in enumerate(EVERY_LEAF):
        expected = whole(renderer, CONVERSATION, RESPONSES[response], criterion)
        assert joined(tree, number) == expected
    everything = "".join(t.content for t in renderer.tokenizer.added_tokens_decoder.values())
    attacked = renderer.tree([Message("user", everything)], [everything], [(0, everything)])
    plain = renderer.tree([Message("user", "a")], ["a"], [(0, "a")])
    assert control_ids(renderer.tokenizer, joined(attacked)) == control_ids(
        renderer.tokenizer, joined(plain)
    )


# --- the overall question -------------------------------------------------------------------------

RUBRIC = Rubric(
    (
        Criterion("dose", Tier.PROFICIENCY, "The answer names the\nhighest dose.", 0.7),
        Criterion("when", Tier.PROFICIENCY, "The answer says when to see a doctor.", 0.3),
        Criterion("kind", Tier.EXCELLENCE, "The answer is kind."),
        Criterion("harm", Tier.VETO, "The answer advises more than the highest dose."),
    )
)


def test_golden_question_with_the_whole_rubric():
    golden = json.loads((DATA / "golden" / "rubric_question.json").read_text(encoding="utf-8"))
    found = {"question": rubric_question(RUBRIC)}
    for name in NAMES:
        renderer = renderer_of(name)
        tree = renderer.tree(CONVERSATION, RESPONSES[:1], [(0, found["question"])])
        found[name] = renderer.tokenizer.decode(tree.leaves[0].tokens)
    assert found == golden


def test_the_question_leaves_out_tiers_that_are_empty():
    bare = Rubric((Criterion("dose", Tier.PROFICIENCY, "The answer names a dose.", 1.0),))
    assert rubric_question(bare) == (
        f"{OVERALL} It is judged by these statements.\n\n"
        "This should be true of it:\n- The answer names a dose. (100%)"
    )
