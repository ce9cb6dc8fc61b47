"""The verbs of `promedical rm`: flags in, one call into the library, a few lines out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["HELP", "VERBS"]

HELP = """\
usage: promedical rm VERB [flags]

Train, plan, check and serve a reward model.

verbs:
  train RECIPE        train, calibrate and save a checkpoint; started again, it goes on
  plan RECIPE         tokens, operations, memory and hours, before anything is trained
  doctor CHECKPOINT   whether every way of scoring on this machine gives the same scores
  serve CHECKPOINT    an HTTP server that grades

  promedical rm VERB --help    what a verb does, and its flags
"""


def _train(argv: Sequence[str]) -> int:
    from promedical.reward_model.run import main

    return main(argv)


def _plan(argv: Sequence[str]) -> int:
    from promedical.reward_model.plan import main

    return main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from promedical.reward_model.doctor import main

    return main(argv)


def _serve(argv: Sequence[str]) -> int:
    from promedical.reward_model.serve import main

    return main(argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "doctor": _doctor,
    "serve": _serve,
}
