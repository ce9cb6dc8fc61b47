"""Figures while training, against their definitions, and what of them reaches the loggers."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from promedical.bench.metrics import BenchError
from promedical.reward_model import trainer
from promedical.reward_model.instances import training_trees
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.training_metrics import EvaluationSet, evaluation_set
from promedical.rubric import Criterion, Tier
from tiny_reward import MET, UNMET, load_renderer, random_rows, row, tiny_classifier

TRAIN_ROWS = [replace(r, id=f"t{r.id}") for r in random_rows(6, seed=11)]
ROWS = random_rows(4, seed=12)
SETTINGS = TrainSettings(
    frozen_layers=0, batch_trees=2, learning_rate=3e-3, warmup_ratio=0.0, eval_steps=2
)


def laid_out(asks="criteria", rows=ROWS, max_tokens=8192) -> EvaluationSet:
    return evaluation_set(rows, TRAIN_ROWS, load_renderer(), max_tokens=max_tokens, asks=asks)


laid_out_once = functools.cache(laid_out)


def keys_of(found: EvaluationSet):
    return [key for keys in found.keys for key in keys]


def r_of(tier: Tier, s: float) -> float:
    return -s if tier is Tier.VETO else s


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_figures_are_those_of_the_definitions(seed):
    found = laid_out_once()
    rng = np.random.default_rng(seed)
    # Few distinct values, so that equal scores occur.
    scores = {key: float(rng.integers(-3, 4)) for key in keys_of(found)}
    figures = found.measure(scores)
    for tier in Tier:
        credit, gaps, s, met = [], [], [], []
        for instruction in ROWS:
            for c in instruction.rubric.tier(tier):
                known = [
                    (scores[instruction.id, y.id, c.id], y.verdicts[c.id] is MET)
                    for y in instruction.responses
                    if y.verdicts[c.id].resolved
                ]
                s += [value for value, _ in known]
                met += [label for _, label in known]
                for (a, true), (b, false) in itertools.permutations(known, 2):
                    if true and not false:
                        better, worse = (b, a) if tier is Tier.VETO else (a, b)
                        gap = r_of(tier, better) - r_of(tier, worse)
                        gaps.append(gap)
                        credit.append((gap > 0) + (gap == 0) / 2)
        assert figures[f"{tier.value}_within"] == pytest.approx(np.mean(credit))
        assert figures[f"{tier.value}_margin"] == pytest.approx(np.mean(gaps))
        assert figures[f"{tier.value}_auroc"] == pytest.approx(roc_auc_score(met, s))
        assert 0 <= figures[f"{tier.value}_ece"] <= 1
        assert 0 <= figures[f"{tier.value}_auroc_criterion_alone"] <= 1
    assert figures["unscored"] == 0


def test_every_known_verdict_and_every_response_is_asked_once():
    found = laid_out()
    asked = keys_of(found)
    assert len(asked) == len(set(asked))
    assert {k for k in asked if len(k) == 3} == set(found.gold.keys)
    assert {k for k in asked if len(k) == 2} == {(r.id, y.id) for r in ROWS for y in r.responses}
    for row_, keys in zip(found.rows, found.keys, strict=True):
        assert len(row_.leaves) == len(keys)


def test_a_scalar_model_stands_for_every_criterion_with_one_score():
    found = laid_out("rubric")
    assert {len(key) for key in keys_of(found)} == {2}
    scores = {key: float(i) for i, key in enumerate(keys_of(found))}
    figures = found.measure(scores)
    for tier in Tier:
        credit = [
            scores[found.gold.keys[b][:2]] > scores[found.gold.keys[w][:2]]
            for b, w in zip(found.pairs.better, found.pairs.worse, strict=True)
            if found.gold.tier[b] is tier
        ]
        assert figures[f"{tier.value}_within"] == pytest.approx(np.mean(credit))
    assert not any(name.endswith("ece") for name in figures)


def test_the_criterion_alone_is_fitted_on_training_rows_and_never_reads_an_answer():
    """Where the text of a criterion tells its verdict, it is the null that must be beaten."""
    asked = (
        Criterion("p0", Tier.PROFICIENCY, "It names aspirin.", 0.5),
        Criterion("p1", Tier.PROFICIENCY, "It names the pharmacist.", 0.5),
    )
    told = [row([[MET, UNMET], [MET, UNMET]], asked, name=f"t{i}") for i in range(2)]
    told.append(row([[MET, UNMET], [MET, MET]], asked, name="e"))
    found = evaluation_set(told[2:], told[:2], load_renderer(), max_tokens=8192)
    # Three met, one unmet; of these pairs two are of different texts and right, one is of one text.
    assert found.null[Tier.PROFICIENCY] == pytest.approx(2.5 / 3)
    assert found.null[Tier.VETO] is None
    figures = found.measure(dict.fromkeys(keys_of(found), 0.0))
    assert not any(name.startswith("veto") for name in figures)
    with pytest.raises(BenchError, match="are in training and scored rows"):
        evaluation_set(told[:1], told[:1], load_renderer(), max_tokens=8192)


def test_what_is_too_long_is_counted_not_scored():
    lengths = [len(p) for p in laid_out().rows]
    found = laid_out(max_tokens=max(lengths) // 8)
    assert found.left_out > 0
    kept = [key for key in keys_of(found) if len(key) == 3]
    figures = found.measure(dict.fromkeys(keys_of(found), 0.0))
    assert figures["unscored"] == len(found.gold.keys) - len(kept)


def test_the_trainer_measures_and_reports_through_its_callbacks(tmp_path, monkeypatch):
    """What tensorboard, trackio and wandb are given is what any callback's on_log is given."""
    seen: list[dict[str, float]] = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setattr(trainer, "_reporters", lambda *_: [Logger()])
    model, tokenizer = tiny_classifier(layers=2)
    found = laid_out()
    trees = training_trees(TRAIN_ROWS, load_renderer())
    wrapped = TreeRewardModel(model)
    result = trainer.train(wrapped, tokenizer, trees, SETTINGS, tmp_path, evaluation=found)
    assert [entry["step"] for entry in result.metrics] == [2, 3]
    reported = [logs for logs in seen if "eval_veto_within" in logs]
    assert [logs["eval_veto_within"] for logs in reported] == [
        entry["veto_within"] for entry in result.metrics
    ]
    # The last measurement is that of the trained weights, whatever the packing.
    wrapped.eval()
    scores = {}
    with torch.no_grad():
        for row_, keys in zip(found.rows, found.keys, strict=True):
            scores |= dict(zip(keys, wrapped.score(row_).tolist(), strict=True))
    last = found.measure(scores)
    for name, value in last.items():
        assert result.metrics[-1][name] == pytest.approx(value, abs=1e-6), name
    assert all(math.isfinite(value) for entry in result.metrics for value in entry.values())
