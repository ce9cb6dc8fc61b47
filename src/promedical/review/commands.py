"""The verbs of `promedical review`: flags in, one call into the library, a few lines out.

Every verb takes `--database` (else $PROMEDICAL_REVIEW_DATABASE, where a password is not in the list
of processes). Output holds ids and counts; a name is printed to nobody. Left to others: serving
(`serve`), the demo (`demo`), packs (`offline_pack`), other tools' formats (`exchange_commands`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promedical.recipe import plain_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from promedical.records import GradedInstruction
    from promedical.review.database import Database
    from promedical.review.tables import Reviewer, Round

__all__ = ["HELP", "VERBS"]

HELP = """\
usage: promedical review VERB [flags]

Physicians correct rubrics and judge answers, in a web application that you run.

  promedical review demo            try it: a filled application on this machine

  promedical review create-lead     the first account
  promedical review serve           the application, until Ctrl-C
  promedical review import ROWS     rows become a round; or make rounds in the application
  promedical review rounds          rounds, their ids, and how far they are
  promedical review export ROUND    what physicians decided: gold rubrics, or a bench

people and data:
  invite         a link that makes an account, or with --for sets a new password
  verify-log     whether the audit log adds up
  purge          remove instructions with all answers, by id or by age; or who a person is

without the server, or with another tool:
  pack, unpack   one HTML file a reviewer that works offline, and its answers back
  label-studio   export to Label Studio and import from it
  argilla        export to Argilla and import from it

  promedical review VERB --help     what a verb does, and its flags
"""

EXTRA = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "jinja2": "jinja2",
    "sqlalchemy": "sqlalchemy",
    "alembic": "alembic",
    "argon2": "argon2-cffi",
    "multipart": "python-multipart",
}


NOT_REACHED = "not reached: backups, exported files, offline packs, PostgreSQL's write-ahead log"


class ReviewCommandError(ValueError):
    """A command that cannot be run as given; the message says what to change."""


def _needs_packages(verb: Callable[[Sequence[str]], int]) -> Callable[[list[str]], int]:
    def checked(argv: list[str]) -> int:
        missing = [pip for name, pip in EXTRA.items() if importlib.util.find_spec(name) is None]
        if missing:
            raise ReviewCommandError(
                f"review: {', '.join(missing)} not installed, run: pip install 'promedical[review]'"
            )
        return verb(argv)

    return checked


def _parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    parser = plain_parser(
        prog=f"promedical review {verb}", usage=f"%(prog)s {usage}", description=description
    )
    parser.add_argument(
        "--database",
        metavar="DATABASE",
        help="SQLite file or postgresql+psycopg://…; $PROMEDICAL_REVIEW_DATABASE if not given, "
        "else promedical-review.sqlite3 here",
    )
    return parser


@contextmanager
def _open(given: str | None, *, new: bool = False) -> Iterator[Database]:
    """The database, up to date; a file that does not exist is made only where that makes sense."""
    from promedical.review.database import Database
    from promedical.review.migrate import upgrade
    from promedical.review.serve import database_setting, make_room

    setting = database_setting(given)
    if not new and "://" not in setting and not Path(setting).expanduser().is_file():
        raise ReviewCommandError(
            f"{setting}: no such database; name it with --database, or make one with "
            "promedical review create-lead"
        )
    make_room(setting)
    database = Database(setting)
    try:
        upgrade(database)
        yield database
    finally:
        database.close()


def _serve(argv: Sequence[str]) -> int:
    from promedical.review.serve import main

    return main(argv)


def _demo(argv: Sequence[str]) -> int:
    from promedical.review.demo import main

    return main(argv)


# ---- people ----


def _create_lead(argv: Sequence[str]) -> int:
    from promedical.review.accounts import create_account

    parser = _parser(
        "create-lead",
        "--login LOGIN --name NAME [--password-file FILE] [--database DATABASE]",
        "Make the account of a lead, who makes rounds and invites the others. The password is "
        "asked for, twice, unless a file has it on its first line.",
    )
    parser.add_argument("--login", required=True, help="what you will type, such as an address")
    parser.add_argument("--name", required=True, help="what colleagues see")
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    parser.add_argument("--password-file", metavar="FILE")
    given = parser.parse_args(list(argv))
    password = _password(given.password_file)
    with _open(given.database, new=True) as database, database.write() as session:
        reviewer = create_account(
            session,
            login=given.login,
            name=given.name,
            password=password,
            role="lead",
            language=given.language,
        )
        reviewer_id = reviewer.id
    print(f"lead {reviewer_id}; next: promedical review serve")
    return 0


def _password(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8").split("\n", 1)[0]
    if not sys.stdin.isatty():
        raise ReviewCommandError(
            "create-lead: there is no terminal to ask for the password, expected --password-file"
        )
    from getpass import getpass

    password = getpass("Password (12 characters or more): ")
    if getpass("The same again: ") != password:
        raise ReviewCommandError("create-lead: the two passwords are not the same")
    return password


def _invite(argv: Sequence[str]) -> int:
    from promedical.review.accounts import invite
    from promedical.review.app import ReviewSettings

    parser = _parser(
        "invite",
        "[--role ROLE | --for LOGIN] --public-url URL [--database DATABASE]",
        "Print a link that makes one account, or sets the password of an account anew. It works "
        "once. The lead's page People does the same.",
    )
    parser.add_argument("--role", choices=["reviewer", "adjudicator", "lead"], default="reviewer")
    parser.add_argument("--for", dest="login", metavar="LOGIN", help="an account there is")
    parser.add_argument("--public-url", default="http://127.0.0.1:8080", help="of the server")
    parser.add_argument("--days", type=float, default=14.0, help="until it ends")
    given = parser.parse_args(list(argv))
    settings = ReviewSettings(public_url=given.public_url, invitation_days=given.days)
    with _open(given.database, new=True) as database, database.write() as session:
        role, reviewer_id = given.role, None
        if given.login is not None:
            reviewer = _people(session, [given.login])[0]
            role, reviewer_id = reviewer.role, reviewer.id
        token = invite(session, role, settings, created_by=None, reviewer_id=reviewer_id)
    print(f"{settings.public_url.rstrip('/')}/invitation/{token}")
    return 0


def _people(session: Any, logins: Sequence[str]) -> list[Reviewer]:
    """Accounts by login; `all` is every active reviewer."""
    from sqlalchemy import select

    from promedical.review.tables import Reviewer

    if list(logins) == ["all"]:
        active = select(Reviewer).where(Reviewer.active.is_(True), Reviewer.role == "reviewer")
        return list(session.scalars(active.order_by(Reviewer.created, Reviewer.id)))
    found = []
    for login in logins:
        wanted = login.strip().casefold()
        reviewer = session.scalar(select(Reviewer).where(Reviewer.login == wanted))
        if reviewer is None:
            raise ReviewCommandError(f"login: found {login!r}, expected the login of an account")
        found.append(reviewer)
    return found


# ---- rounds ----


def _import(argv: Sequence[str]) -> int:
    parser = _parser(
        "import",
        "ROWS --kind rubrics|adjudication --name NAME [--assign all | LOGIN …] [flags]",
        "Make a round of rows (JSON lines or a dataset folder). rubrics: rows with draft rubrics, "
        "a sample over categories and specialties. adjudication: rows with a rubric and two "
        "responses or more; verdicts that they carry are kept from reviewers, and compared with "
        "theirs if --judge names whose they are.",
    )
    parser.add_argument("rows", metavar="ROWS", help="JSON lines, or a dataset folder")
    parser.add_argument("--kind", choices=["rubrics", "adjudication"], required=True)
    parser.add_argument("--name", required=True, help="what people see")
    parser.add_argument("--size", type=int, help="items at most; 500 rubrics if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--double", type=float, default=0.0, help="rubrics: share read by two")
    parser.add_argument("--readers", type=int, default=2, help="adjudication: readers an item")
    parser.add_argument("--judge", default="", help="adjudication: whose verdicts the rows carry")
    parser.add_argument(
        "--assign", nargs="+", metavar="LOGIN", default=[], help="reviewers, or: all"
    )
    given = parser.parse_args(list(argv))
    rows = _read_rows(Path(given.rows))
    with _open(given.database, new=True) as database, database.write() as session:
        people = [reviewer.id for reviewer in _people(session, given.assign)]
        make = _import_rubrics if given.kind == "rubrics" else _import_adjudication
        lines = make(session, rows, given, people)
    print("\n".join(lines))
    return 0


def _read_rows(path: Path) -> list[GradedInstruction]:
    from promedical.records import read_dataset, read_jsonl

    return read_dataset(path) if path.is_dir() else read_jsonl(path)


def _import_rubrics(session: Any, rows: Any, given: Any, people: list[str]) -> list[str]:
    from promedical.review.rounds import RoundSettings, assign, make_round

    settings = RoundSettings(
        name=given.name, size=given.size or 500, seed=given.seed, double=given.double
    )
    made = make_round(session, rows, settings)
    dealt = assign(session, made.id, people) if people else 0
    facts = made.settings
    return [
        f"round {made.id}: {facts['drawn']} of {facts['rows']} rows "
        f"({facts['without_draft']} had no draft rubric)",
        f"assignments: {dealt}"
        + ("" if people else "; give them out in the application, or with --assign"),
    ]


def _import_adjudication(session: Any, rows: Any, given: Any, people: list[str]) -> list[str]:
    from promedical.review.adjudication import AdjudicationPlan, make_round

    plan = AdjudicationPlan(
        name=given.name,
        readers=given.readers,
        limit=given.size or 0,
        seed=given.seed,
        judge=given.judge,
    )
    made = make_round(session, rows, plan, reviewer_ids=people or None)
    lines = [f"round {made.round_id}: {made.items} items, {made.assignments} assignments"]
    lines += [f"left out, {reason}: {len(ids)}" for reason, ids in made.left_out.items()]
    if made.naming_their_model:
        named = ", ".join(f"{row}/{response}" for row, response in made.naming_their_model[:10])
        lines.append(
            f"not blind: {len(made.naming_their_model)} responses name the model that wrote them "
            f"({named})"
        )
    return lines


def _rounds(argv: Sequence[str]) -> int:
    from sqlalchemy import case, func, select

    from promedical.review.tables import Assignment, Item, Round

    parser = _parser("rounds", "[--database DATABASE]", "List rounds and how far they are.")
    given = parser.parse_args(list(argv))
    done = func.coalesce(func.sum(case((Assignment.state == "done", 1), else_=0)), 0)
    with _open(given.database) as database, database.read() as session:
        found = session.execute(
            select(Round, func.count(Item.id.distinct()), func.count(Assignment.id), done)
            .outerjoin(Item, (Item.round_id == Round.id) & Item.removed_at.is_(None))
            .outerjoin(Assignment, Assignment.item_id == Item.id)
            .group_by(Round.id)
            .order_by(Round.created)
        ).all()
    for round_, items, assigned, finished in found:
        print(
            f"{round_.id}  {round_.kind:12}  {round_.state:6}  {items:5} items  "
            f"{finished:5} of {assigned} done  {round_.name}"
        )
    if not found:
        print("no rounds; make one with: promedical review import ROWS --kind … --name …")
    return 0


def _round(session: Any, wanted: str) -> Round:
    from sqlalchemy import select

    from promedical.review.tables import Round

    found = session.get(Round, wanted)
    if found is None:
        named = session.scalars(select(Round).where(Round.name == wanted)).all()
        if len(named) != 1:
            what = "no round" if not named else f"{len(named)} rounds"
            raise ReviewCommandError(
                f"round: {what} called {wanted!r}, expected an id of: promedical review rounds"
            )
        found = named[0]
    return found


def _export(argv: Sequence[str]) -> int:
    from promedical.review.audit_log import record

    parser = _parser(
        "export",
        "ROUND --out FOLDER [--pool FOLDER] [--notes] [--database DATABASE]",
        "Write what physicians decided. A round of rubrics: gold rubrics as a dataset, and with "
        "--pool into the exemplar pool that drafts are written from. An adjudication: a bench with "
        "gold verdicts and every vote. Reviewers are random ids.",
    )
    parser.add_argument("round", metavar="ROUND", help="id or name of a round")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--pool", metavar="FOLDER", help="exemplar pool to add gold rubrics to")
    parser.add_argument(
        "--notes", action="store_true", help="adjudication: reviewers' notes too, which are text"
    )
    given = parser.parse_args(list(argv))
    with _open(given.database) as database:
        # Reading and counting take a while: not in a transaction that keeps others from saving.
        with database.read() as session:
            round_ = _round(session, given.round)
            export = _export_rubrics if round_.kind == "rubrics" else _export_adjudication
            lines, digest = export(session, round_, given)
        with database.write() as session:
            record(session, "system", "round.export", f"round:{round_.id}", digest=digest)
    print("\n".join(lines))
    return 0


def _export_rubrics(session: Any, round_: Any, given: Any) -> tuple[list[str], str]:
    from promedical.review.gold import collect, to_pool, write_gold
    from promedical.review.rounds import items_of

    gold = collect(items_of(session, round_.id))
    lines = [f"gold rubrics: {len(gold.rubrics)}"]
    lines += [f"left out, {state}: {count}" for state, count in gold.left_out.items()]
    digest = write_gold(gold, round_, given.out)
    lines.append(f"{given.out}: {digest}")
    if given.pool is not None:
        pool = to_pool(gold, given.pool)
        lines.append(f"{given.pool}: version {pool.version}")
    return lines, digest


def _export_adjudication(session: Any, round_: Any, given: Any) -> tuple[list[str], str]:
    if given.pool is not None:
        raise ReviewCommandError("--pool: only rubrics go into an exemplar pool")
    from promedical.review.bench_export import export_bench

    made = export_bench(session, round_.id, given.out, actor_id=None, notes=given.notes)
    lines = [
        f"bench: {made.instructions} instructions, {made.responses} responses, {made.votes} votes",
        f"verdicts: {made.gold} gold, {made.contested} contested",
    ]
    if made.unfinished:
        lines.append(f"left out, not settled yet: {len(made.unfinished)}")
    lines.append(f"{made.folder}: {made.fingerprint}")
    return lines, made.fingerprint


# ---- the log, and erasure ----


def _verify_log(argv: Sequence[str]) -> int:
    from promedical.review.audit_log import verify

    parser = _parser(
        "verify-log",
        "[--head HASH] [--database DATABASE]",
        "Recompute the audit log's chain of hashes. Keep the hash that it prints somewhere else; "
        "given as --head later, it shows that nothing was cut off since.",
    )
    parser.add_argument("--head", metavar="HASH", help="a hash that this printed once")
    given = parser.parse_args(list(argv))
    with _open(given.database) as database, database.read() as session:
        state = verify(session, head=given.head)
    print(f"{state.entries} entries, all in place; head {state.head}")
    return 0


def _purge(argv: Sequence[str]) -> int:
    import datetime as dt

    from promedical.review.purge import erase_people, purge

    parser = _parser(
        "purge",
        "(--instruction ID … | --older-than-days DAYS | --person LOGIN …) [--yes] "
        "[--database DATABASE]",
        "Remove instructions with all that was answered about them, and overwrite the space. Or "
        "remove who a person is: name, login, password, specialty, country, licence; their answers "
        "stay under a random id. The audit log stays whole. Backups, exported files and offline "
        "packs are not reached.",
    )
    parser.add_argument("--instruction", nargs="+", metavar="ID", default=[])
    parser.add_argument("--older-than-days", type=float, metavar="DAYS", help="untouched so long")
    parser.add_argument("--person", nargs="+", metavar="LOGIN", default=[])
    parser.add_argument("--yes", action="store_true", help="do not ask")
    given = parser.parse_args(list(argv))
    age = None if given.older_than_days is None else dt.timedelta(days=given.older_than_days)
    with _open(given.database) as database:
        if not given.yes and sys.stdin.isatty():
            print("This cannot be undone. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("nothing was removed")
                return 0
        if given.person:
            for reviewer_id in erase_people(database, given.person):
                print(f"who {reviewer_id} is was removed; the answers stay under that id")
        if given.person and not given.instruction and age is None:
            print(NOT_REACHED)
            return 0
        found = purge(database, instruction_ids=given.instruction, older_than=age)
    print(f"removed: {found.items} items, {found.answers} answers, {found.changes} changes")
    if found.already:
        print(f"removed before: {found.already}")
    if found.unknown:
        print(f"no item has: {', '.join(found.unknown)}")
    print(NOT_REACHED)
    return 2 if found.unknown else 0


def _exchange(verb: str) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        from promedical.review import exchange_commands

        chosen: Callable[[Sequence[str]], int] = exchange_commands.VERBS[verb]
        return chosen(argv)

    return run


VERBS: dict[str, Callable[[list[str]], int]] = {
    "serve": _needs_packages(_serve),
    "demo": _needs_packages(_demo),
    "create-lead": _needs_packages(_create_lead),
    "invite": _needs_packages(_invite),
    "import": _needs_packages(_import),
    "rounds": _needs_packages(_rounds),
    "export": _needs_packages(_export),
    "verify-log": _needs_packages(_verify_log),
    "purge": _needs_packages(_purge),
    "pack": _needs_packages(_exchange("pack")),
    "unpack": _needs_packages(_exchange("unpack")),
    "label-studio": _needs_packages(_exchange("label-studio")),
    "argilla": _needs_packages(_exchange("argilla")),
}
