"""Training: the divisor of the loss, resume after a kill, and what a finished run leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from promedical.reward_model import trainer as trainer_module
from promedical.reward_model.instances import Instances, training_trees
from promedical.reward_model.loss import pack_training_trees
from promedical.reward_model.model import TreeRewardModel, new_reward_model
from promedical.reward_model.settings import TierWeights, TrainSettings
from promedical.reward_model.trainer import RewardTrainer, TrainError, _Rows, train
from promedical.reward_model.tree import pack, paths
from promedical.reward_model.trunk import TrunkCache
from tiny_reward import (
    MET,
    UNMET,
    VOCABULARY,
    criteria,
    load_renderer,
    load_tokenizer,
    random_rows,
    row,
    size,
    tiny_classifier,
)

SETTINGS = TrainSettings(
    frozen_layers=1, epochs=2.0, batch_trees=2, learning_rate=3e-3, warmup_ratio=0.0
)


def instances(count=6, seed=0):
    return training_trees(random_rows(count, seed=seed), load_renderer())


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(out, *, settings=SETTINGS, found=None, seed=0, **kwargs):
    """Train a fresh tiny model; the model, its tokenizer and the result."""
    model, tokenizer = tiny_classifier(layers=2)
    wrapped = TreeRewardModel(model, frozen_layers=settings.frozen_layers)
    found = instances() if found is None else found
    return wrapped, tokenizer, train(wrapped, tokenizer, found, settings, out, seed=seed, **kwargs)


# --- learning -------------------------------------------------------------------------------------


def test_the_loss_goes_down_and_the_verdicts_are_learned(tmp_path):
    """Two answers that differ in one word, over and over: a separable problem."""
    asked = criteria(1, 0, 1)
    texts = ["Take one, it is safe.", "Take forty, it is safe."]
    rows = [
        row([[MET, UNMET], [UNMET, MET]], asked, name=f"drug {i}", texts=texts) for i in range(4)
    ]
    found = training_trees(rows, load_renderer(), overall=False)
    settings = replace(SETTINGS, frozen_layers=0, epochs=15.0, learning_rate=5e-3)
    model, _, result = run(tmp_path, settings=settings, found=found)
    losses = [entry["loss"] for entry in result.history]
    assert losses[0] > 0.8
    assert losses[-1] < 0.2 * losses[0]
    assert [entry["step"] for entry in result.history] == list(range(1, 31))
    assert all(entry["learning_rate"] > 0 for entry in result.history[:-1])
    model.eval()
    (packed,) = pack([found.trees[0].tree], 10_000)
    with torch.no_grad():
        scores = dict(zip((f.leaf for f in packed.leaves), model.score(packed), strict=True))
    for unit in found.trees[0].units:
        for leaf, true in unit.points:
            assert (scores[leaf] > 0) == bool(true)


@pytest.mark.parametrize(("batch", "weighting"), [(1, "unit"), (4, "unit"), (3, "pair")])
def test_one_step_has_the_gradient_of_the_loss_over_all_its_rows(batch, weighting, tmp_path):
    """Also where the last step of an epoch holds fewer rows than the others."""
    rows, _ = pack_training_trees(
        instances(5).trees,
        400,
        pair_weighting=weighting,
        tier_weights={"veto": 2.0},
    )
    assert len(rows) > 5
    model, _ = tiny_classifier(layers=2)
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for p in tree_model.parameters() if p.grad is not None])
            return super().step(closure)

    tree_model = TreeRewardModel(model, frozen_layers=1)
    trained = [p for p in tree_model.parameters() if p.requires_grad]
    trainer = RewardTrainer(
        tree_model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=batch,
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
        ),
        train_dataset=_Rows(rows),
        optimizers=(Spy(trained, lr=0.0), None),
    )
    trainer.train()
    assert len(seen) == -(-len(rows) // batch)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    reference = TreeRewardModel(copy.deepcopy(model), frozen_layers=1)
    for number, found in enumerate(seen):
        part = rows[number * batch : (number + 1) * batch]
        items = max(1, sum(r.terms.items for r in part))
        reference.zero_grad(set_to_none=True)
        loss = sum(reference(r.row, r.terms, items)["loss"] for r in part)
        loss.backward()
        expected = [p.grad for p in reference.parameters() if p.grad is not None]
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
        assert logged[number] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)


# --- resume ---------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    settings = replace(SETTINGS, save_steps=2)
    whole, _, expected = run(tmp_path / "whole", settings=settings)
    assert expected.counts["optimiser_steps"] == 6

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(out, settings=settings, progress=stop)
    assert sorted(p.name for p in (out / "steps").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    # A kill may also hit while a checkpoint is being written: that one is passed over.
    (out / "steps" / "checkpoint-5").mkdir()
    (out / "steps" / "checkpoint-5" / "model.safetensors").write_bytes(b"half of it")

    steps = []
    again, _, result = run(
        out, settings=settings, progress=lambda done, total: steps.append((done, total))
    )
    assert min(steps)[0] >= 4
    assert set(steps) >= {(5, 6), (6, 6)}
    for name, mine in weights(again).items():
        assert torch.equal(mine, weights(whole)[name]), name
    # The history is the whole run's, not only that of the second half.
    for mine, theirs in zip(result.history, expected.history, strict=True):
        assert {k: mine[k] for k in ("step", "loss", "learning_rate")} == {
            k: theirs[k] for k in ("step", "loss", "learning_rate")
        }
    seconds = [entry["seconds"] for entry in result.history]
    assert seconds == sorted(seconds)
    assert not (out / "steps").exists()


def test_checkpoints_of_another_run_are_refused_not_taken_over(tmp_path):
    settings = replace(SETTINGS, save_steps=1)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings=settings, progress=stop)
    for other in (
        {"settings": replace(settings, learning_rate=1e-3)},
        {"settings": settings, "seed": 1},
        {"settings": settings, "found": instances(5)},
    ):
        with pytest.raises(TrainError, match="steps: found checkpoints of other settings"):
            run(tmp_path, **other)
    run(tmp_path, settings=settings)


def test_a_second_run_in_the_same_folder_starts_anew(tmp_path):
    settings = replace(SETTINGS, save_steps=1)
    run(tmp_path, settings=settings)
    again, _, result = run(tmp_path, settings=replace(settings, learning_rate=1e-4))
    fresh, _, expected = run(tmp_path / "fresh", settings=replace(settings, learning_rate=1e-4))
    assert len(result.history) == len(expected.history)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True)
    )


# --- the finished checkpoint ----------------------------------------------------------------------


def test_the_saved_checkpoint_scores_as_the_trained_model(tmp_path):
    """In plain transformers, separate sequences padded into one batch."""
    model, _, _ = run(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    tree = instances(1, seed=9).trees[0].tree
    (packed,) = pack([tree], 10_000)
    model.eval()
    with torch.no_grad():
        scores = model.score(packed)
        batch = tokenizer.pad({"input_ids": [list(p) for p in paths(tree)]}, return_tensors="pt")
        found = loaded(**batch).logits[:, 0]
    for leaf, s in zip(packed.leaves, scores, strict=True):
        assert float(found[leaf.leaf]) == pytest.approx(float(s), abs=1e-4)


def test_frozen_layers_and_the_cache(tmp_path):
    """Frozen weights stay as they were; with what they compute kept, training is the same."""
    before = weights(tiny_classifier(layers=2)[0])
    plain, _, _ = run(tmp_path / "plain")
    start = TreeRewardModel(tiny_classifier(layers=2)[0], frozen_layers=1)
    cache = TrunkCache(start)
    cached, _, result = run(tmp_path / "cached", cache=cache)
    assert cache.computed_tokens == result.counts["unique_tokens"]
    after = weights(plain.model)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == (".layers.0." not in name and "embed_tokens" not in name), name
        assert torch.allclose(after[name], weights(cached.model)[name], atol=1e-5), name
    with pytest.raises(TrainError, match="cache: its frozen layers"):
        run(tmp_path / "x", settings=replace(SETTINGS, frozen_layers=0), cache=cache)


def test_counts(tmp_path):
    found = instances()
    _, _, whole = run(tmp_path / "whole", found=found)
    _, _, split = run(tmp_path / "split", found=found, settings=replace(SETTINGS, max_tokens=250))
    separate = sum(len(p) for tree in found.trees for p in paths(tree.tree))
    for result in (whole, split):
        assert result.counts.items() >= found.counts.items()
        assert result.counts["separate_tokens"] == separate
        assert result.seconds >= result.history[-1]["seconds"]
    assert whole.counts["rows"] == len(found.trees)
    assert whole.counts["split_trees"] == whole.counts["repeated_tokens"] == 0
    assert whole.counts["unique_tokens"] < separate / 2
    assert split.counts["split_trees"] > 0
    assert (
        split.counts["unique_tokens"]
        == whole.counts["unique_tokens"] + split.counts["repeated_tokens"]
    )


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(TrainError, match="found no loss term"):
        run(tmp_path, found=Instances((), {}))


def test_settings_are_checked():
    for name, value in (
        ("epochs", 0),
        ("learning_rate", float("nan")),
        ("mu", -1),
        ("max_tokens", 0),
        ("warmup_ratio", 1.0),
    ):
        with pytest.raises(ValueError, match=f"{name}: found"):
            replace(SETTINGS, **{name: value})
    with pytest.raises(ValueError, match="veto: found -1"):
        TierWeights(veto=-1)


def test_the_trainer_is_transformers_own():
    assert issubclass(RewardTrainer, Trainer)
    assert RewardTrainer.train is Trainer.train


# --- precision, memory, adapters ------------------------------------------------------------------


def language_model(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size(2))).save_pretrained(folder)
    load_tokenizer("smollm2").save_pretrained(folder)
    return folder


def gradients(settings, folder, *, seed=0):
    """Gradient of the first row's loss under some settings, by name."""
    model, _ = new_reward_model(folder, settings, seed=seed)
    rows, _ = pack_training_trees(instances(2).trees, 10_000)
    enabled = settings.dtype != "float32"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = model.train()(rows[0].row, rows[0].terms, rows[0].terms.items)["loss"]
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_model_of_another_build_is_refused(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    load_tokenizer("smollm2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found GPT2ForSequenceClassification, expected a decoder"):
        new_reward_model(tmp_path, replace(SETTINGS, head_init="random"))


def test_a_model_that_reads_no_trees_trains_with_bfloat16_weights_too(tmp_path):
    settings = replace(SETTINGS, frozen_layers=0, dtype="bfloat16")
    model, _ = new_reward_model(language_model(tmp_path), settings)
    (packed,) = pack([instances(1).trees[0].tree], 10_000)
    in_a_tree = model.score(packed)
    model.config.sliding_window = 8  # which Llama does not heed, but trees would
    with pytest.warns(UserWarning, match="sliding window"):
        apart = model.score(packed)
    assert apart.dtype == torch.float32
    assert torch.allclose(apart, in_a_tree, atol=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a GPU")
def test_flex_attention_is_not_trained_without_a_gpu(tmp_path):
    settings = replace(SETTINGS, attention="flex")
    model, tokenizer = new_reward_model(language_model(tmp_path), settings)
    assert model.implementation == "flex"
    with pytest.raises(TrainError, match=r"train\.attention: found 'flex' .* expected 'level'"):
        train(model, tokenizer, instances(1), settings, tmp_path / "out")


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = language_model(tmp_path)
    for frozen in (0, 1):
        plain = replace(SETTINGS, frozen_layers=frozen)
        loss, expected = gradients(plain, folder)
        again, found = gradients(replace(plain, gradient_checkpointing=True), folder)
        assert again == loss
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert torch.allclose(grad, expected[name], atol=1e-7), name


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
def test_bfloat16_is_near_float32(dtype, tmp_path):
    folder = language_model(tmp_path)
    whole = replace(SETTINGS, frozen_layers=0)
    loss, expected = gradients(whole, folder)
    rough, found = gradients(replace(whole, dtype=dtype), folder)
    assert rough != loss
    assert rough == pytest.approx(loss, rel=0.05)
    dtypes = {name: grad.dtype for name, grad in found.items()}
    assert dtypes["model.score.weight"] == torch.float32
    body = torch.float32 if dtype == "autocast" else torch.bfloat16
    assert {d for name, d in dtypes.items() if "score" not in name} == {body}
    mine, theirs = (
        torch.cat([g[n].flatten().float() for n in expected]) for g in (found, expected)
    )
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.98


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_every_precision_trains_and_its_checkpoint_loads(dtype, lora_rank, tmp_path):
    settings = replace(SETTINGS, dtype=dtype, lora_rank=lora_rank, epochs=1.0)
    model, tokenizer = new_reward_model(language_model(tmp_path / "base"), settings)
    before = weights(model)
    result = train(model, tokenizer, instances(), settings, tmp_path / "out")
    assert all(0 < entry["loss"] < 10 for entry in result.history)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 1
    after = weights(model)
    head = next(p for name, p in before.items() if "score" in name)
    assert not torch.equal(after["model.score.weight"], head)
    if lora_rank:
        assert all(p.dtype == torch.float32 for n, p in before.items() if "lora_" in n)
        assert not any("lora_" in name for name in after)
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_an_adapter_leaves_frozen_layers_alone_and_merges_to_the_same_scores(tmp_path):
    settings = replace(SETTINGS, lora_rank=2, lora_alpha=8.0)
    folder = language_model(tmp_path / "base")
    model, tokenizer = new_reward_model(folder, settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".layers.1." in name or "score" in name for name in trained)
    assert len([name for name in trained if "lora_A" in name]) == 7
    start = weights(new_reward_model(folder, SETTINGS)[0])
    train(model, tokenizer, instances(), settings, tmp_path / "out")
    (packed,) = pack([instances(1, seed=9).trees[0].tree], 10_000)
    base, _ = new_reward_model(folder, SETTINGS)
    adapted = PeftModel.from_pretrained(base.model, tmp_path / "out" / "adapter")
    with torch.no_grad():
        merged = model.eval().score(packed)
        apart = TreeRewardModel(adapted, frozen_layers=1).eval().score(packed)
    assert torch.allclose(merged, apart, atol=1e-5)
    for name, weight in model.named_parameters():
        moved = not torch.equal(weight, start[name])
        linear = ".layers.1." in name and "norm" not in name
        assert moved == (linear or "score" in name), name
    drawn = [weights(new_reward_model(folder, settings, seed=seed)[0]) for seed in (1, 1, 2)]
    name = next(name for name in trained if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


# --- how much a step holds ------------------------------------------------------------------------


def test_a_batch_can_be_said_in_pairs(tmp_path):
    found = instances(8)
    rows, _ = pack_training_trees(found.trees, 8192)
    pairs = sum(len(row.terms.pairs) for row in rows)
    wanted = round(2.5 * pairs / len(rows))
    _, _, result = run(tmp_path, settings=replace(SETTINGS, batch_pairs=wanted), found=found)
    assert result.counts["rows_a_step"] in (2, 3)
    steps = result.counts["optimiser_steps"] / SETTINGS.epochs
    assert pairs / steps == pytest.approx(wanted, rel=0.35)
    with pytest.raises(ValueError, match="batch_pairs: found 0"):
        replace(SETTINGS, batch_pairs=0)


def test_shared_rows_and_ties_reach_the_loss(tmp_path):
    found = training_trees(random_rows(6), load_renderer(), ties=True)
    _, _, alone = run(tmp_path / "a", found=found)
    shared = replace(SETTINGS, share_rows=True, max_tokens=1200)
    _, _, together = run(tmp_path / "b", found=found, settings=shared)
    assert together.counts["rows"] < alone.counts["rows"]
    assert together.counts["unique_tokens"] == alone.counts["unique_tokens"]
    _, _, tied = run(tmp_path / "c", found=found, settings=replace(SETTINGS, ties="davidson"))
    assert tied.history[0]["loss"] != alone.history[0]["loss"]


def test_tensorboard_gets_a_folder_that_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "get_available_reporting_integrations", list)
    with pytest.raises(TrainError, match="report_to: found 'tensorboard'"):
        run(tmp_path, settings=replace(SETTINGS, report_to="tensorboard"))
