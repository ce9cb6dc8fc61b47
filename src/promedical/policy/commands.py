"""The verbs of `promedical policy`: flags in, one call into the library, a few lines out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["HELP", "VERBS"]

HELP = """\
usage: promedical policy VERB [flags]

Optimise a policy against a rubric, watch it, and compare.

verbs:
  grpo RECIPE         groups of answers against a reward model; started again, it goes on
  rloo RECIPE         a baseline: the same reward, each answer against the mean of the others
  dpo RECIPE          a baseline: pairs of responses whose verdicts are known
  generate POLICY     answers of a checkpoint or an endpoint to a file of prompts
  probe RECIPE        what answers that say nothing would earn, before anything is trained
  compare RECIPE      policies side by side: same prompts, same decoding, same judges
  export-verl RECIPE      a run for verl: GRPO on many nodes, and PPO
  export-openrlhf RECIPE  a run for OpenRLHF

  promedical policy VERB --help    what a verb does, and its flags
"""


def _grpo(argv: Sequence[str]) -> int:
    from promedical.policy.run import main

    return main(argv, "grpo")


def _rloo(argv: Sequence[str]) -> int:
    from promedical.policy.run import main

    return main(argv, "rloo")


def _dpo(argv: Sequence[str]) -> int:
    from promedical.policy.run import main

    return main(argv, "dpo")


def _generate(argv: Sequence[str]) -> int:
    from promedical.policy.generate_run import main

    return main(argv)


def _probe(argv: Sequence[str]) -> int:
    from promedical.policy.probe import main

    return main(argv)


def _compare(argv: Sequence[str]) -> int:
    from promedical.policy.compare import main

    return main(argv)


def _export_verl(argv: Sequence[str]) -> int:
    from promedical.policy.export_verl import main

    return main(argv)


def _export_openrlhf(argv: Sequence[str]) -> int:
    from promedical.policy.export_openrlhf import main

    return main(argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "dpo": _dpo,
    "generate": _generate,
    "probe": _probe,
    "compare": _compare,
    "export-verl": _export_verl,
    "export-openrlhf": _export_openrlhf,
}
