"""The verbs of `promedical data`: flags in, one call into the library, a few lines out.

`build` runs a recipe; a stage's own verb runs that stage alone, from a folder or a file of rows to
a folder, with the recipe's section for it and flags over that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["HELP", "VERBS"]

HELP = """\
usage: promedical data VERB [flags]

From instructions to graded preference data. Most people need the first two lines:

  promedical data build RECIPE --plan     what it will ask, cost and take; nothing is sent
  promedical data build RECIPE            all stages; killed and started again, it goes on

stages, each also a verb (promedical data STAGE [RECIPE] --in ROWS --out FOLDER):
  ingest         read the sources; what cannot be used is listed with file, line and reason
  dedup          drop instructions that ask again what another asked
  screen         sort by difficulty and specialty, keep 5 to 9, draw a sample        asks a model
  respond        answers from several models                                          asks models
  rubrics        a rubric for every instruction, checked                              asks a model
  judge          a verdict for every answer and criterion                             asks models
  splits         train, calibration and bench without a shared question
  degrade        answers with known faults, made from the rubric's own statements
  pairs          which answer is better, and what decided it
  export         preference data for TRL, verl, OpenRLHF, RewardBench 2; dataset card

and:
  report OUT                  a build's way so far: rows in, dropped and why, cost
  rubric-health ROWS          criteria that tell no answers apart, repeats, length
  audit-judge GOLD JUDGED     a judge's verdicts beside gold ones
  purge LEDGER                remove kept replies, by record or age

  promedical data VERB --help    what a verb does, and its flags
"""

BUILD = """\
Run every stage of a recipe, in order, into its folder (--out). A finished stage is not run again,
unless its settings or the rows before it changed. Replies of models are kept in a ledger before
they are used, so that nothing is asked twice. docs/corpus.md explains the folder.
"""

DESCRIPTIONS = {
    "ingest": "Read all sources of a recipe's section `ingest`.",
    "dedup": "Drop instructions that ask again what an earlier one asked.",
    "screen": "Have a model sort instructions by category, specialty and difficulty; keep some.",
    "respond": "Have several models answer every instruction.",
    "rubrics": "Have a model write a rubric for every instruction that has none, and check it.",
    "judge": "Have one or several models decide every criterion of every response.",
    "splits": "Deal instructions to train, calibration and bench; near-duplicates stay together.",
    "degrade": "Add responses with known faults to rows whose rubrics are statements of fact.",
    "pairs": "Compare responses: safety first, then proficiency, then excellence.",
    "export": "Write graded rows in the formats of other projects, with a dataset card.",
}


def _build(argv: Sequence[str]) -> int:
    from promedical.corpus.build import Build, build
    from promedical.corpus.build_plan import as_text, plan
    from promedical.corpus.build_recipe import BuildRecipe
    from promedical.corpus.build_report import as_markdown
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        BuildRecipe,
        prog="promedical data build",
        usage="%(prog)s RECIPE [--plan] [--again STAGE …] [flags]",
        description=BUILD,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    parser.add_argument("--plan", action="store_true", help="say what it will take, send nothing")
    parser.add_argument(
        "--again", metavar="STAGE", nargs="+", default=[], help="run these although finished"
    )
    given = parser.parse_known_args(list(argv))[0]
    recipe = load_recipe(BuildRecipe, given.file, argv, parser=parser)
    if given.plan:
        run = Build(recipe, again=tuple(given.again))
        print(as_text(plan(run), run))
        return 0
    report = build(recipe, again=given.again)
    print(as_markdown(report), end="")
    print(f"\nreport: {recipe.out / 'report.md'}")
    return 0


def _stage(name: str, argv: Sequence[str]) -> int:
    """Run one stage alone."""
    from promedical.corpus.build import check_accounts, open_asker
    from promedical.corpus.build_recipe import SECTIONS, BuildRecipe, settings_of
    from promedical.corpus.stage import write_stage
    from promedical.recipe import load_section
    from promedical.records import fingerprint

    parser = _stage_parser(name)
    given = parser.parse_known_args(list(argv))[0]
    path = given.file or given.recipe
    settings = load_section(SECTIONS[name], BuildRecipe, name, path, argv, parser=parser)
    whole = _whole(path, name, given)
    rows = [] if name == "ingest" else read_rows(given.rows)
    if given.plan:
        print(_plan_of(name, rows, settings, whole))
        return 0
    out = Path(given.out)
    started = time.monotonic()
    asker = open_asker(whole) if _asks(name) else None
    try:
        result, calls = _run(name, rows, settings, whole, asker, out, given)
    finally:
        if asker is not None:
            asker.close()
    check_accounts(name, rows, result)
    if name == "export":
        print(json.dumps(result.report["formats"], indent=2, ensure_ascii=False))
        return 0
    write_stage(out, result, recipe=settings_of(settings), parents=[fingerprint(rows)])
    seconds = time.monotonic() - started
    summary = {k: v for k, v in result.summary().items() if k in ("rows", "dropped", "reasons")}
    print(json.dumps({**summary, **({"calls": calls} if calls else {})}, ensure_ascii=False))
    print(f"{out / 'rows'} in {seconds:.0f} s; the whole report: {out / 'report.json'}")
    return 0


def _stage_parser(name: str) -> argparse.ArgumentParser:
    from promedical.corpus.build_recipe import SECTIONS
    from promedical.recipe import recipe_parser

    needs = "" if name == "ingest" else " --in ROWS"
    parser = recipe_parser(
        SECTIONS[name],
        prog=f"promedical data {name}",
        usage=f"%(prog)s [RECIPE]{needs} --out FOLDER [flags]",
        description=DESCRIPTIONS[name],
    )
    help_ = f"the recipe, whose section `{name}` is used"
    parser.add_argument("file", metavar="RECIPE", nargs="?", help=help_)
    if name != "ingest":
        parser.add_argument(
            "--in", dest="rows", metavar="ROWS", required=True,
            help="a stage's folder, a dataset folder, or JSON lines",
        )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the stage is left")
    asks = _asks(name)
    if asks:
        parser.add_argument("--ledger", metavar="FILE", help="with the replies; the recipe's")
        parser.add_argument(
            "--budget-usd", dest="budget", metavar="X", type=float, help="stop when it is spent"
        )
    parser.set_defaults(ledger=None, budget=None, plan=False, splits=None)
    if asks:
        parser.add_argument("--plan", action="store_true", help="what it will take; send nothing")
    if name in ("degrade", "export"):
        parser.add_argument("--splits", metavar="FOLDER", help="of the stage; else all train")
    return parser


def _asks(name: str) -> bool:
    return name in ("screen", "respond", "rubrics", "judge")


def _whole(path: str | None, name: str, given: argparse.Namespace) -> Any:
    """The recipe of which the stage is a part, for its folder, ledger and limits."""
    from dataclasses import replace

    from promedical.corpus.build_recipe import BuildRecipe
    from promedical.recipe import load_recipe

    # A stage with defaults only, so that the other sections need not be there.
    whole = load_recipe(BuildRecipe, path, ["--stages", "pairs"])
    if given.ledger is not None:
        whole = replace(whole, ledger=Path(given.ledger))
    elif path is None:
        whole = replace(whole, ledger=Path(given.out) / "ledger.sqlite")
    return whole if given.budget is None else replace(whole, budget_usd=given.budget)


def _run(
    name: str,
    rows: Sequence[Any],
    settings: Any,
    whole: Any,
    asker: Any,
    out: Path,
    given: argparse.Namespace,
) -> tuple[Any, dict[str, Any] | None]:
    from promedical.corpus.asked import CountingAsker
    from promedical.corpus.build_stages import STAGES, Context, read_splits
    from promedical.corpus.export import export
    from promedical.corpus.stage import StageResult
    from promedical.progress import Stages

    split_of = None if given.splits is None else read_splits(Path(given.splits))
    if name == "export":
        report = export(rows, settings, out, splits=split_of, pairs=whole.pairs)
        return StageResult(rows, (), report), None
    counting = None if asker is None else CountingAsker(asker, whole.max_failed)
    encoder = None
    # Without a recipe nobody has said what is held out; the splits have their default.
    hold_out = whole.splits.hold_out if given.file or given.recipe else ()
    if name in ("rubrics", "splits") or (name == "dedup" and hold_out):
        from promedical.demo.models import resolve_encoder

        encoder = resolve_encoder()
    with Stages(1).stage(name) as move:
        context = Context(
            asker=counting,
            encoder=encoder,
            progress=move,
            folder=out,
            split_of=split_of,
            hold_out=hold_out,
        )
        result = STAGES[name].run(rows, settings, context)
    return result, None if counting is None else counting.report()


def _plan_of(name: str, rows: Sequence[Any], settings: Any, whole: Any) -> str:
    from promedical.corpus.build_stages import REPLY_TOKENS, STAGES
    from promedical.llm.ledger import Ledger
    from promedical.llm.planner import estimate, table

    calls = STAGES[name].calls
    assert calls is not None
    ledger = Ledger(whole.ledger_path) if whole.ledger_path.is_file() else None
    try:
        return table(estimate(calls(rows, settings), REPLY_TOKENS[name], ledger))
    finally:
        if ledger is not None:
            ledger.close()


def read_rows(path: str | Path) -> list[Any]:
    """Rows of a stage's folder, a dataset's folder, or a file of JSON lines.

    Raises:
        CorpusError: the stage is not finished.
        RecordError: see `promedical.records`.
    """
    from promedical.corpus.stage import REPORT, CorpusError
    from promedical.records import read_dataset, read_jsonl

    folder = Path(path)
    if not folder.is_dir():
        return read_jsonl(folder)
    if (folder / "rows").is_dir():
        if not (folder / REPORT).is_file():
            raise CorpusError(f"{folder}: the stage was not finished (no {REPORT})")
        return read_dataset(folder / "rows")
    return read_dataset(folder)


def _report(argv: Sequence[str]) -> int:
    from promedical.corpus.build import funnel_of
    from promedical.corpus.build_recipe import ALL_STAGES
    from promedical.corpus.build_report import as_markdown, ledger_table, summary
    from promedical.corpus.stage import CorpusError

    parser = _parser("report", "OUT [--json]", "Show how far a build is, and what became of rows.")
    parser.add_argument("out", metavar="OUT", help="the build's folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(list(argv))
    out = Path(given.out)
    try:
        stages = json.loads((out / "build.json").read_text(encoding="utf-8"))["stages"]
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{out}: no build.json, expected the folder of a build") from None
    except (ValueError, KeyError):
        raise CorpusError(f"{out / 'build.json'}: is no build's") from None
    report = summary(funnel_of(out, stages), [n for n in ALL_STAGES if n not in stages])
    left = stages[len(report["stages"]) :]
    if given.json:
        print(json.dumps({**report, "left": left}, indent=2, ensure_ascii=False))
        return 0
    print(as_markdown(report), end="")
    print(ledger_table(out / "ledger.sqlite"), end="")
    if left:
        print(f"\nStill to be run: {', '.join(left)}.")
    return 0


def _rubric_health(argv: Sequence[str]) -> int:
    from promedical.corpus.rubric_health import health_table, rubric_health
    from promedical.demo.models import resolve_encoder

    parser = _parser(
        "rubric-health",
        "ROWS [--ngrams] [--json]",
        "Which criteria tell answers apart, which are always or never met, which say the same, and "
        "which go with length.",
    )
    parser.add_argument("rows", metavar="ROWS", help="a stage's folder, a dataset, or JSON lines")
    parser.add_argument("--ngrams", action="store_true", help="find repeats without word vectors")
    parser.add_argument("--most", type=int, default=10, help="to list of each kind (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(list(argv))
    encoder = None if given.ngrams else resolve_encoder()
    health = rubric_health(read_rows(given.rows), encoder=encoder)
    shown = health_table(health, most=given.most)
    print(json.dumps(health.as_json(), indent=2, ensure_ascii=False) if given.json else shown)
    return 0


def _audit_judge(argv: Sequence[str]) -> int:
    from promedical.corpus.audit_judge import as_text, audit_judge

    parser = _parser(
        "audit-judge",
        "GOLD JUDGED [--worst N] [--with-text] [--json]",
        "Compare a judge's verdicts with gold ones: agreement, kappa, errors by tier and axis.",
    )
    parser.add_argument("gold", metavar="GOLD", help="rows with gold verdicts")
    parser.add_argument("judged", metavar="JUDGED", help="the same rows, judged with --overwrite")
    parser.add_argument("--worst", type=int, default=20, help="criteria to list (default: 20)")
    parser.add_argument("--with-text", action="store_true", help="list their sentences too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(list(argv))
    audit = audit_judge(
        read_rows(given.gold),
        read_rows(given.judged),
        worst=given.worst,
        with_text=given.with_text,
    )
    print(json.dumps(audit, indent=2, ensure_ascii=False) if given.json else as_text(audit))
    return 0


def _purge(argv: Sequence[str]) -> int:
    from promedical.corpus.stage import CorpusError
    from promedical.llm.ledger import Ledger

    parser = _parser(
        "purge",
        "LEDGER [--record ID …] [--older-than DAYS]",
        "Remove kept replies for good. The folders of the stages hold texts too: remove those of a "
        "build by removing its folder, or build again without the record.",
    )
    parser.add_argument("ledger", metavar="LEDGER", help="the file, or a build's folder")
    parser.add_argument("--record", metavar="ID", nargs="+", default=[], help="of instructions")
    parser.add_argument("--older-than", metavar="DAYS", type=float, help="by when it was kept")
    given = parser.parse_args(list(argv))
    path = Path(given.ledger)
    path = path / "ledger.sqlite" if path.is_dir() else path
    if not path.is_file():
        raise CorpusError(f"{path}: not found, expected a ledger")
    if not given.record and given.older_than is None:
        raise CorpusError("purge: nothing said, expected --record or --older-than")
    if given.older_than is not None and given.older_than < 0:
        raise CorpusError(f"--older-than: found {given.older_than:g}, expected 0 or more days")
    before = None if given.older_than is None else time.time() - 86_400 * given.older_than
    ids = [pattern for id in given.record for pattern in _calls_of(id)]
    with Ledger(path) as ledger:
        removed = ledger.purge(ids=ids, older_than=before)
    print(f"{removed} replies removed from {path}")
    return 0


def _calls_of(record: str) -> list[str]:
    """Patterns of the calls about a record: STAGE/RECORD and STAGE/RECORD/…"""
    # The judge's ids have slashes of a record's own written as %2F.
    names = dict.fromkeys((record, record.replace("%", "%25").replace("/", "%2F")))
    # A rubric that is written anew is asked for as RECORD#again1.
    return [p for name in names for p in (f"*/{name}", f"*/{name}/*", f"*/{name}#*")]


def _parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    from promedical.recipe import plain_parser

    return plain_parser(
        prog=f"promedical data {verb}", usage=f"%(prog)s {usage}", description=description
    )


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "build": _build,
    **{name: partial(_stage, name) for name in DESCRIPTIONS},
    "report": _report,
    "rubric-health": _rubric_health,
    "audit-judge": _audit_judge,
    "purge": _purge,
}
