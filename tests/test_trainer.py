"""Training: the divisor of the loss, resume after a kill, and what a finished run leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from promedical.reward_model.instances import Instances, training_trees
from promedical.reward_model.loss import pack_training_trees
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.settings import TierWeights, TrainSettings
from promedical.reward_model.trainer import RewardTrainer, TrainError, _Rows, train
from promedical.reward_model.tree import pack, paths
from promedical.reward_model.trunk import TrunkCache
from tiny_reward import (
    MET,
    UNMET,
    criteria,
    load_renderer,
    random_rows,
    row,
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
