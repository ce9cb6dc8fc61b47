"""The verbs of `promedical review` for work outside of the application: pack, unpack, label-studio,
argilla.

Output holds ids and counts. Left to others: the formats (`offline_pack`, `label_studio`,
`argilla`), the rest of the command line (`commands`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from promedical.review.exchange import ExchangeError, ImportReport

__all__ = ["VERBS"]

TOOL = """\
Rounds to and from {name}.

  promedical review {verb} export ROUND --out FOLDER [--part PART]
  promedical review {verb} import ROUND FILE

A round of rubrics has one part. An adjudication has "preference" (the default), and after those
answers were imported {parts}: the criteria are not given out before. Each reviewer gets {what} of
their own. What is imported is saved as that reviewer's answer; importing again changes nothing, and
what was changed in the application meanwhile is not overwritten.
"""


def _report(report: ImportReport, name: str) -> int:
    print(f"{name}: {report}")
    for assignment, reason in report.refused:
        print(f"  refused: {assignment}: {reason}")
    return 2 if report.refused else 0


def _left_out(left_out: Mapping[str, int]) -> None:
    for reason, count in sorted(left_out.items()):
        print(f"left out: {count} {reason}")


def _pack(argv: Sequence[str]) -> int:
    from promedical.review.commands import _open, _parser, _round
    from promedical.review.offline_pack import make_packs
    from promedical.review.tables import Reviewer

    parser = _parser(
        "pack",
        "ROUND --out FOLDER [--reviewer ID] [--strict] [--database DATABASE]",
        "Write one HTML file for every reviewer with open items of a round. It works without "
        "server and network; hand it to that person alone.",
    )
    parser.add_argument("round", metavar="ROUND", help="id or name of a round")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--reviewer", metavar="ID", help="only this one's")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="leave an adjudication's criteria out until the overall preference came back",
    )
    given = parser.parse_args(list(argv))
    with _open(given.database) as database:
        with database.read() as session:
            round_id = _round(session, given.round).id
            if given.reviewer is not None and session.get(Reviewer, given.reviewer) is None:
                raise ExchangeError(f"reviewer: found {given.reviewer!r}, expected an account's id")
        packs, left_out = make_packs(
            database,
            round_id,
            Path(given.out),
            reviewer_id=given.reviewer,
            strict=given.strict,
        )
    for pack in packs:
        print(f"{pack.path}: {pack.items} items")
    _left_out(left_out)
    if not packs:
        print("nobody has open items")
    return 0


def _unpack(argv: Sequence[str]) -> int:
    from promedical.review.commands import _open, _parser
    from promedical.review.offline_pack import unpack

    parser = _parser(
        "unpack",
        "FILE … [--database DATABASE]",
        "Save the answers of files that reviewers handed back. Doing it again changes nothing.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    given = parser.parse_args(list(argv))
    code = 0
    with _open(given.database) as database:
        for name in given.files:
            code = max(code, _report(unpack(database, Path(name)), name))
    return code


# ---- other tools ----


def _tool(
    verb: str,
    name: str,
    what: str,
    parts: Sequence[str],
    write: Callable[..., dict[str, int]],
    read: Callable[..., Any],
) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        from promedical.review.commands import _open, _parser, _round

        parser = _parser(
            verb,
            "(export ROUND --out FOLDER [--part PART] | import ROUND FILE) [--database DATABASE]",
            TOOL.format(name=name, verb=verb, what=what, parts=" and ".join(map(repr, parts))),
        )
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("direction", choices=["export", "import"])
        parser.add_argument("round", metavar="ROUND")
        parser.add_argument("file", nargs="?", metavar="FILE", help="that the tool exported")
        parser.add_argument("--out", metavar="FOLDER")
        parser.add_argument("--part", choices=["preference", *parts], default="preference")
        parser.add_argument("--language", choices=["en", "zh"], default="en")
        given = parser.parse_args(list(argv))
        wanted = given.out if given.direction == "export" else given.file
        if wanted is None:
            missing = "--out FOLDER" if given.direction == "export" else "FILE"
            parser.error(f"{given.direction}: {missing} is missing")
        with _open(given.database) as database:
            with database.read() as session:
                given.round = _round(session, given.round).id
            if given.direction == "export":
                return _export(database, given, Path(wanted), write)
            return _import(database, verb, given.round, Path(wanted), read)

    return run


def _export(
    database: Any, given: argparse.Namespace, folder: Path, write: Callable[..., dict[str, int]]
) -> int:
    from promedical.review.exchange import open_tasks

    with database.read() as session:
        tasks, left_out = open_tasks(session, given.round)
    part = "rubrics" if tasks and tasks[0].kind == "rubrics" else given.part
    counts = write(folder, tasks, part, language=given.language)
    for reviewer, count in counts.items():
        print(f"{reviewer}: {count}")
    _left_out(left_out)
    if not any(counts.values()):
        print("nothing to give out" + ("; import the preference first" if counts else ""))
    return 0


def _import(database: Any, verb: str, round_id: str, path: Path, read: Callable[..., Any]) -> int:
    from promedical.review.exchange import bring_in, open_tasks

    with database.read() as session:
        tasks, _ = open_tasks(session, round_id)
    answers, skipped = read(path, tasks)
    report = bring_in(database, verb, answers)
    report.skipped += Counter(skipped)
    return _report(report, str(path))


def _label_studio(argv: Sequence[str]) -> int:
    from promedical.review.label_studio import read_project, write_project

    run = _tool(
        "label-studio",
        "Label Studio (as JSON)",
        "a project",
        ["criteria"],
        write_project,
        read_project,
    )
    return run(argv)


def _argilla(argv: Sequence[str]) -> int:
    from promedical.review.argilla import read_datasets, write_dataset

    run = _tool(
        "argilla", "Argilla 2", "a dataset", ["criteria", "vetoes"], write_dataset, read_datasets
    )
    return run(argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "pack": _pack,
    "unpack": _unpack,
    "label-studio": _label_studio,
    "argilla": _argilla,
}
