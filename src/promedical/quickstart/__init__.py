"""The whole method in small, on the embedded corpus and model: the `promedical quickstart` command.

Stages, each with a JSON file of its own, so that a run killed at any moment goes on from the last
finished one:

    data      K-QA → rubrics → controlled degradation → train, calibration and bench rows (7.3)
    train     Explicit Criteria Injection, and the scalar baseline, on the same trees (4)
    bench     thresholds on the calibration split; the models and every null baseline (6)
    grpo      a policy against the reward model at its operating point "reward" (5)
    answers   base and tuned policy answer the bench's questions, graded by that reward
    report    one HTML page

Nothing is decided here that a stage's own module could decide; this file says what follows what.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

from promedical.progress import Stages
from promedical.provenance import code_state
from promedical.quickstart.settings import PRESETS, QuickstartError, QuickstartRecipe
from promedical.quickstart.stages import STAGES, TITLES, Run, write_json

__all__ = ["PRESETS", "QuickstartError", "QuickstartRecipe", "run_quickstart"]


def run_quickstart(recipe: QuickstartRecipe) -> int:
    """Run, or go on with, every stage; print the headline and where the report is.

    Raises:
        QuickstartError: the folder holds a run with other settings, or the splits overlap.
    """
    run = Run(recipe)
    run.claim()
    _quiet()
    show = Stages(len(STAGES))
    for name, stage in STAGES.items():
        path = run.stage_file(name)
        if path.exists():
            show.skipped(TITLES[name], json.loads(path.read_text())["seconds"])
            continue
        started = time.monotonic()
        code = code_state()
        with show.stage(TITLES[name]) as move:
            result = stage(run, move)
        write_json(
            path,
            {
                "result": result,
                "seconds": time.monotonic() - started,
                "peak_memory_gb": _peak_memory_gb(),
                "code": code,
            },
        )
    from promedical.bench.report import headline

    results = json.loads((run.out / "results.json").read_text())
    for line in headline(results):
        print(line)
    print(f"Report: {run.out / 'report.html'}")
    return 0


def _quiet() -> None:
    """Keep libraries' chatter and bars out of the way of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)
