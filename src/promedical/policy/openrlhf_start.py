"""OpenRLHF's trainer, started so that no conversation reaches a log.

OpenRLHF 0.11's trainer logs one answer of every step together with its prompt, in a Ray worker of
its own. Ray calls `withhold_samples` in every worker before anything else runs there, and the line
is kept with its text withheld. `start` then runs OpenRLHF's own command with the flags it was
given; it is what an exported `train.py` calls.

Left to others: everything else. Loggers beside the console (wandb, tensorboard) get the same text
by another way, so `start` refuses them.
"""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["StartError", "start", "withhold_samples"]

TRAINER = "openrlhf.cli.train_ppo_ray"
LOGGERS = ("openrlhf.trainer.ppo_trainer", "openrlhf.trainer.ppo_trainer_async")
_SAMPLE = "Sample: "


class StartError(ValueError):
    """A flag with which texts of conversations would leave the machine or be logged."""


class _WithoutSample(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(_SAMPLE):
            record.msg, record.args = f"{_SAMPLE}text withheld", ()
        return True


def withhold_samples() -> None:
    """Withhold the text of the trainer's samples from this process's logs."""
    for name in LOGGERS:
        target = logging.getLogger(name)
        if not any(isinstance(f, _WithoutSample) for f in target.filters):
            target.addFilter(_WithoutSample())


def start(argv: list[str] | None = None) -> None:
    """Run OpenRLHF's trainer in a Ray cluster whose workers withhold samples.

    Args:
        argv: its flags; those of the process if None.

    Raises:
        StartError: a logger that would be given texts of conversations.
    """
    import runpy

    import ray

    given = sys.argv[1:] if argv is None else argv
    for flag in given:
        if flag.split("=")[0] in ("--logger.wandb.key", "--logger.tensorboard_dir"):
            raise StartError(
                f"{flag.split('=')[0]}: found it, but OpenRLHF gives that logger prompts and "
                "answers; leave it out"
            )
    withhold_samples()
    passed = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN"}  # OpenRLHF's own defaults
    variables = {name: os.environ.get(name, value) for name, value in passed.items()}
    ray.init(
        runtime_env={
            "env_vars": variables,
            "worker_process_setup_hook": f"{__name__}.withhold_samples",
        }
    )
    sys.argv = [TRAINER, *given]
    runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)
