"""What every process of `accelerate launch` runs in test_processes: a tiny training, measured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from promedical.reward_model.instances import training_trees
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.settings import TrainSettings
from promedical.reward_model.trainer import is_main_process, train
from promedical.reward_model.training_metrics import evaluation_set
from tiny_reward import load_renderer, random_rows, tiny_classifier

# Three rows a step for two processes: one of them gets an empty row each time.
SETTINGS = TrainSettings(
    frozen_layers=1,
    epochs=2.0,
    batch_trees=3,
    learning_rate=3e-3,
    warmup_ratio=0.0,
    max_tokens=400,
    share_rows=True,
    eval_steps=2,
    save_steps=2,
)


def main(out: Path) -> None:
    model, tokenizer = tiny_classifier(layers=2)
    rows = random_rows(5)
    asked = [replace(row, id=f"e{row.id}") for row in random_rows(3, seed=1)]
    result = train(
        TreeRewardModel(model, frozen_layers=1),
        tokenizer,
        training_trees(rows, load_renderer()),
        SETTINGS,
        out,
        evaluation=evaluation_set(asked, rows, load_renderer(), max_tokens=400),
    )
    if is_main_process():
        (out / "result.json").write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
