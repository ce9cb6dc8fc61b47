"""The command line: a thin layer over the library, and where errors become one line.

Each command imports what it needs when it runs, so that `promedical --help` answers at once. A
user's error ends with exit code 2 and one line on stderr; Ctrl-C with 130. A traceback is a bug.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import promedical

__all__ = ["main"]

HELP = """\
usage: promedical COMMAND [flags]

Align medical language models with physicians' criteria.

commands:
  quickstart     from physicians' answers to an aligned model and a report, on this machine
  data VERB      a corpus of graded answers: build, its stages, report, purge
  score FILE     S1, S2, S3, reward and preference for rows whose verdicts are known
  review VERB    physicians in the loop: rounds on rubrics, double-blind adjudication
  rm VERB        a reward model: train, plan, doctor, serve
  policy VERB    a policy against the rubric: probe, grpo, dpo, rloo, compare, export
  audit FILE     what is violated in answers, how sure that is, and what to look at
  bench VERB     measure graders and policies on suites, and compare them: run, report

  promedical COMMAND --help    what a command does, and its flags
  promedical --version

Research use only: no medical device, and a clinician has to read what a model writes.
"""

# Each has HELP and VERBS, verb → function of the arguments.
VERBS_OF = {
    "data": "promedical.corpus.commands",
    "review": "promedical.review.commands",
    "rm": "promedical.reward_model.commands",
    "policy": "promedical.policy.commands",
    "bench": "promedical.bench.commands",
}
COMMANDS = ("quickstart", "data", "score", "review", "rm", "policy", "audit", "bench")

QUICKSTART = """\
Run the whole method in small on the demo corpus: data, controlled degradation, reward model,
bench, GRPO, before and after, report. Killed and started again with the same flags, it goes on
from the last finished stage.
"""

SCORE = """\
Read rows with rubrics and verdicts (JSON lines, or a dataset folder), and print for every response
S1, S2, S3 and reward, and for every pair of responses which is better.

One row, on one line of the file:
  {"id": "q1", "messages": [{"role": "user", "content": "May I take both?"}],
   "rubric": {"criteria": [
     {"id": "dose", "tier": "proficiency", "text": "States the daily limit.", "weight": 1.0},
     {"id": "kind", "tier": "excellence", "text": "Is kind."},
     {"id": "harm", "tier": "veto", "text": "Advises more than the daily limit.",
      "kind": "harmful_advice"}]},
   "responses": [{"id": "a", "text": "…",
     "verdicts": {"dose": "met", "kind": "unmet", "harm": "abstain"}}]}

A verdict says whether the sentence is true: met, unmet, abstain (cannot say), error (the judgment
failed). A veto that is met is a violation, and one that is not decided never counts as safe.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0, 2 for a user's error, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        goes_on = arguments[:1] in (["quickstart"], ["data"])
        again = "; the same command goes on from the last finished stage" if goes_on else ""
        print(f"\npromedical: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output stopped (head, less): no error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except Exception as error:
        # The package's own errors are about what the user gave it; any other one is our bug.
        if not type(error).__module__.startswith("promedical."):
            raise
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"promedical: error: {message}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(f"promedical {promedical.__version__}")
        return 0
    try:
        if command == "quickstart":
            return _quickstart(rest)
        if command == "score":
            return _score(rest)
        if command == "audit":
            from promedical.audit.commands import main as audit

            return audit(rest)
        if command in VERBS_OF:
            return _verb(command, rest)
    except SystemExit as stop:  # argparse after printing a command's help
        return int(stop.code or 0)
    return _unknown("command", command, list(COMMANDS), "promedical --help")


def _unknown(what: str, found: str, known: Sequence[str], help_: str) -> int:
    from difflib import get_close_matches

    near = get_close_matches(found, known, 1, 0.0)[0]
    return _fail(f"unknown {what} {found!r}, did you mean {near!r}? See {help_}")


def _verb(command: str, argv: list[str]) -> int:
    """A command with verbs: its module has their HELP and VERBS."""
    commands = import_module(VERBS_OF[command])
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(commands.HELP, end="")
        return 0
    if argv[0] not in commands.VERBS:
        return _unknown("verb", argv[0], list(commands.VERBS), f"promedical {command} --help")
    return int(commands.VERBS[argv[0]](argv[1:]))


def _quickstart(argv: list[str]) -> int:
    from promedical import quickstart
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        quickstart.QuickstartRecipe,
        presets=quickstart.PRESETS,
        prog="promedical quickstart",
        usage="%(prog)s [--fast | --full] [--out DIR] [--recipe FILE] [flags]",
        description=QUICKSTART,
    )
    recipe = load_recipe(
        quickstart.QuickstartRecipe, None, argv, presets=quickstart.PRESETS, parser=parser
    )
    return quickstart.run_quickstart(recipe)


def _score(argv: list[str]) -> int:
    from promedical.recipe import load_recipe, recipe_parser
    from promedical.records import read_dataset, read_jsonl
    from promedical.rubric import RewardSpec
    from promedical.scoring import as_json, as_text, score_rows

    parser = recipe_parser(
        RewardSpec,
        prog="promedical score",
        usage="%(prog)s FILE [--json] [flags]",
        description=SCORE,
    )
    parser.add_argument("rows", metavar="FILE", help="JSON lines, or a dataset folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    spec = load_recipe(RewardSpec, None, argv, parser=parser)
    given: argparse.Namespace = parser.parse_args(argv)
    path = Path(given.rows)
    rows = read_dataset(path) if path.is_dir() else read_jsonl(path)
    scored, left_out = score_rows(rows, spec)
    if given.json:
        print(json.dumps(as_json(scored, left_out, spec), indent=2, ensure_ascii=False))
    else:
        print(as_text(scored, left_out, spec))
    return 0
