"""Policies trained in every way side by side: base, DPO, RLOO, scalar and ProMedical GRPO, no veto.

    python benchmarks/policy_compare.py --plan      # stages and expected time, nothing run
    python benchmarks/policy_compare.py             # the short run for two cores, about 55 minutes
    python benchmarks/policy_compare.py --report    # the result of what is finished so far

Runs `promedical policy compare` on a recipe (by default recipes/policy/compare-smollm2-cpu.yaml)
and writes its results, which hold numbers and ids only, to benchmarks/results. Killed and started
again, it goes on. Further flags are those of the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from promedical.policy.compare import main as compare
from promedical.policy.compare_recipe import CompareRecipe
from promedical.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "policy" / "compare-smollm2-cpu.yaml"
RESULT = ROOT / "benchmarks" / "results" / "policy_compare.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and keep its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--result", type=Path, default=RESULT, help="where the result goes")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    known, flags = parser.parse_known_args(argv)
    what = ["--plan"] if known.plan else ["--report"] if known.report else []
    code = compare([str(known.recipe), *what, *flags])
    if not known.plan:
        out = load_recipe(CompareRecipe, known.recipe, flags).out
        known.result.parent.mkdir(parents=True, exist_ok=True)
        # Numbers and ids as they are: `figures.take` keeps what the quickstart's results have.
        known.result.write_bytes((Path(out) / "results.json").read_bytes())
        print(f"{known.result.name}: taken from {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
