"""`promedical review demo`: the application filled with the shipped sample, ready to be tried.

A database in a folder of its own, four accounts whose passwords are printed once, and two rounds
made of K-QA: rubrics to review, and answers to adjudicate (constructed from physicians' answers by
`promedical.corpus.degrade`, so that their labels are known and stand in for a judge's). The account
"colleague" has done its part by a script, and "reviewer" some, so that the lead's pages show
figures; those answers are invented. Nothing is loaded from anywhere, and the server listens on
127.0.0.1 alone. Left to others: the server for real work (`commands`).
"""

from __future__ import annotations

import random
import secrets
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from promedical.records import GradedInstruction
from promedical.review import accounts, adjudication, drafts, rounds, saves
from promedical.review.adjudication_answer import pairs_of
from promedical.review.database import Database
from promedical.review.migrate import upgrade
from promedical.review.tables import Assignment, Item, ItemSecret, Reviewer, new_id
from promedical.rubric import Tier

__all__ = ["ACCOUNTS", "DemoError", "DemoRecipe", "fill", "main", "prepare"]

DESCRIPTION = """\
Try the review application: a rubric round and an adjudication made of the shipped K-QA sample,
demo accounts with passwords that are printed once, on 127.0.0.1. Needs no network. Do not enter
anything about real patients. Without --folder everything is in a temporary folder, removed at the
end.
"""
DATABASE = "demo.sqlite3"
SEED = 20240126
RUBRICS = 12
ADJUDICATED = 6
RESPONSES = 3
# Criteria of an adjudicated rubric by tier; K-QA's have up to 30, too many to try something out.
CRITERIA = {Tier.PROFICIENCY: 3, Tier.EXCELLENCE: 2, Tier.VETO: 2}
DONE_RUBRICS, DONE_ADJUDICATIONS = 2, 3  # what "reviewer" has done already

# login → (name, role, specialty)
ACCOUNTS = {
    "lead": ("Demo Lead", "lead", None),
    "reviewer": ("Demo Reviewer", "reviewer", "internal medicine"),
    "colleague": ("Demo Colleague", "reviewer", "general practice"),
    "adjudicator": ("Demo Adjudicator", "adjudicator", "internal medicine"),
}


class DemoError(ValueError):
    """A demo that cannot be started; the message says what to change."""


@dataclass(frozen=True)
class DemoRecipe:
    """How the demo runs.

    Args:
        folder: where its database is kept; a temporary one by default.
        port: on 127.0.0.1; the next free one if it is taken.
        language: of the accounts, en or zh.
    """

    folder: str | None = None
    port: int = 8080
    language: str = "en"

    def __post_init__(self) -> None:
        if self.language not in ("en", "zh"):
            raise DemoError(f"language: found {self.language!r}, expected en or zh")
        if not 0 <= self.port < 65536:
            raise DemoError(f"port: found {self.port}, expected 0 to 65535")


# ---- filling ----


Sample = tuple[list[GradedInstruction], list[GradedInstruction]]


def fill(
    database: Database, *, language: str = "en", sample: Sample | None = None
) -> dict[str, str]:
    """Put accounts, both rounds and some finished work into an empty database.

    Args:
        database: with its tables and nothing in them.
        language: of the accounts.
        sample: drafts of rubrics, and rows with responses to adjudicate; K-QA's by default.

    Returns:
        Login → password.
    """
    rubrics, adjudicated = sample or _sample()
    passwords = {login: _password() for login in ACCOUNTS}
    with database.write() as session:
        ids = {
            login: accounts.create_account(
                session,
                login=login,
                name=name,
                password=passwords[login],
                role=role,
                specialty=specialty,
                language=language,
            ).id
            for login, (name, role, specialty) in ACCOUNTS.items()
        }
        readers = [ids["reviewer"], ids["colleague"]]
        settings = rounds.RoundSettings("K-QA: rubrics", size=RUBRICS, seed=SEED, double=0.5)
        made = rounds.make_round(session, rubrics, settings, created_by=ids["lead"])
        rounds.assign(session, made.id, readers, by=ids["lead"])
        plan = adjudication.AdjudicationPlan("K-QA: answers", seed=SEED, judge="construction")
        adjudication.make_round(
            session, adjudicated, plan, created_by=ids["lead"], reviewer_ids=readers
        )
    _work(database, ids["colleague"], 1, None, None)
    _work(database, ids["reviewer"], 2, DONE_RUBRICS, DONE_ADJUDICATIONS)
    return passwords


def _sample() -> Sample:
    """Drafts of rubrics, and instructions with constructed responses."""
    from promedical.corpus.degrade import degrade
    from promedical.demo.kqa import load_kqa

    kqa = load_kqa()
    rng = random.Random(SEED)
    drawn = rng.sample(kqa.calibration, RUBRICS)
    made = degrade(kqa.bench[: 2 * ADJUDICATED], split="bench", seed=SEED).rows
    usable = [row for row in made if len(row.responses) >= RESPONSES and row.rubric is not None]
    return drawn, [_cut(row) for row in usable[:ADJUDICATED]]


def _cut(row: GradedInstruction) -> GradedInstruction:
    """A row with few responses and criteria, those on which the responses differ first."""
    assert row.rubric is not None
    responses = row.responses[:RESPONSES]
    kept: set[str] = set()
    for tier, count in CRITERIA.items():
        known = {
            c.id: len({r.verdicts[c.id] for r in responses if r.verdicts[c.id].resolved})
            for c in row.rubric.tier(tier)
        }
        kept |= set(sorted(known, key=lambda id: -known[id])[:count])
    rubric = row.rubric.restricted_to(kept)
    assert rubric is not None
    cut = tuple(
        replace(r, verdicts={c: v for c, v in r.verdicts.items() if c in kept}) for r in responses
    )
    return replace(row, rubric=rubric, responses=cut)


def _password() -> str:
    """About 50 bits that can be read out and typed."""
    consonants, vowels = "bdfghjklmnprstvz", "aeiou"
    syllables = [secrets.choice(consonants) + secrets.choice(vowels) for _ in range(8)]
    return "-".join(a + b for a, b in zip(syllables[::2], syllables[1::2], strict=True))


# ---- work that is done already, by a script ----


def _work(
    database: Database,
    reviewer_id: str,
    seed: int,
    rubrics: int | None,
    adjudicated: int | None,
) -> None:
    """Finish so many of this reviewer's parts as a script answers them; None for all of them."""
    for part, limit in (("rubric", rubrics), ("first", adjudicated)):
        with database.read() as session:
            found = session.execute(
                select(Assignment, Item)
                .join(Item, Item.id == Assignment.item_id)
                .where(Assignment.reviewer_id == reviewer_id, Assignment.part == part)
                .order_by(Item.position)
                .limit(limit)
            ).all()
        for assignment, item in found:
            rng = random.Random(f"{item.instruction_id}:{part}:{seed}")
            with database.write() as session:
                if part == "rubric":
                    _review(session, assignment, item, rng)
                else:
                    _judge(session, assignment, item, rng)


def _review(session: Session, assignment: Assignment, item: Item, rng: random.Random) -> None:
    """Three of four are accepted as they are; in the others a sentence is made clearer."""
    answer = rounds.first_answer(item.content)
    answer["decision"] = "accept"
    if rng.random() < 0.25:
        draft = drafts.from_json(answer["criteria"])
        first = draft[0]
        draft = drafts.edit(draft, first.id, text=f"{first.text.rstrip('.')}, in plain words.")
        answer |= {"decision": "accept_with_edits", "criteria": drafts.to_json(draft)}
    seconds = 20 + 8 * len(answer["criteria"]) * rng.uniform(0.6, 1.6)
    _finish(session, assignment, 0, answer, seconds)


def _finish(
    session: Session, assignment: Assignment, base: int, answer: dict[str, Any], seconds: float
) -> int:
    return saves.save(
        session,
        assignment.id,
        assignment.reviewer_id,
        base=base,
        save_id=f"demo-{new_id()}",
        answer=answer,
        seconds=seconds,
        state="done",
    ).version


def _judge(session: Session, assignment: Assignment, item: Item, rng: random.Random) -> None:
    """The known label, else "not met"; some the other way, some "cannot say"."""
    written = session.get_one(ItemSecret, item.id).content["responses"]
    verdicts: dict[str, dict[str, Any]] = {}
    merit = {}
    for key in assignment.response_order:
        labels = {v["criterion"]: v["verdict"] for v in written[key]["verdicts"]}
        verdicts[key] = {}
        merit[key] = rng.random()
        for criterion in item.content["rubric"]["criteria"]:
            met = labels.get(criterion["id"]) == "met"
            wanted = met != (rng.random() < 0.07)
            verdict = "cannot_say" if rng.random() < 0.04 else "met" if wanted else "unmet"
            verdicts[key][criterion["id"]] = {"v": verdict, "note": ""}
            merit[key] += (-20 if criterion["tier"] == Tier.VETO else 3) * met
    preference = {}
    for a, b in pairs_of(assignment.response_order):
        gap = merit[a] - merit[b]
        size = "_much" if abs(gap) > 6 else ""
        choice = f"first_better{size}" if gap > 0 else f"second_better{size}"
        preference[f"{a}|{b}"] = "tie" if abs(gap) < 1 else choice
    first = {"preference": preference, "preference_given": True}
    version = saves.save(
        session,
        assignment.id,
        assignment.reviewer_id,
        base=0,
        save_id=f"demo-{new_id()}",
        answer=first,
        seconds=rng.uniform(30, 90),
    ).version
    criteria = len(item.content["rubric"]["criteria"]) * len(verdicts)
    answer = {**first, "verdicts": verdicts, "disputed": {}, "dangers": {}}
    _finish(session, assignment, version, answer, criteria * rng.uniform(4, 12))


# ---- running ----


def prepare(folder: Path, *, language: str = "en") -> tuple[Database, dict[str, str]]:
    """The demo's database, filled if it is new, and a password for every account.

    Raises:
        DemoError: there is a database of another kind at this place.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(folder / DATABASE)
    upgrade(database)
    with database.read() as session:
        known = dict(session.execute(select(Reviewer.login, Reviewer.id)).all())  # type: ignore[arg-type]
    if not known:
        return database, fill(database, language=language)
    if set(known) != set(ACCOUNTS):
        raise DemoError(
            f"{folder / DATABASE}: has other accounts than the demo's; give --folder another one"
        )
    return database, _new_passwords(database, known)


def _new_passwords(database: Database, ids: dict[str, str]) -> dict[str, str]:
    """A demo that is started again: its passwords are known to nobody, so there are new ones."""
    from promedical.review.app import ReviewSettings

    passwords = {login: _password() for login in ids}
    with database.write() as session:
        for login, password in passwords.items():
            reviewer = session.get_one(Reviewer, ids[login])
            token = accounts.invite(
                session,
                reviewer.role,
                ReviewSettings(),
                created_by=None,
                reviewer_id=reviewer.id,
            )
            accounts.accept_invitation(
                session, token, login=login, name=reviewer.name, password=password
            )
    return passwords


def _port(wanted: int) -> int:
    """The port wanted if nobody listens there, else a free one."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError("port: found none that is free on 127.0.0.1")


def _announcement(url: str, passwords: dict[str, str], folder: Path) -> str:
    lines = [
        "",
        f"  Open {url} and log in:",
        "",
        *(
            f"    {login:<12} {password}   {ACCOUNTS[login][1]}"
            for login, password in passwords.items()
        ),
        "",
        "  Begin as reviewer, to see what a physician does; lead sees rounds, figures, agreement;",
        "  adjudicator reads what reviewer and colleague did not settle.",
        "",
        "  Do not enter anything about real patients. The finished answers here are invented.",
        f"  The database is in {folder}. Ctrl-C ends the demo.",
        "",
    ]
    return "\n".join(lines)


def _run(recipe: DemoRecipe, folder: Path) -> int:
    from promedical.review.serve import ServeRecipe, serve

    print("Filling the demo with the shipped sample …", flush=True)
    database, passwords = prepare(folder, language=recipe.language)
    database.close()
    port = _port(recipe.port)
    ready = _announcement(f"http://127.0.0.1:{port}", passwords, folder)
    serving = ServeRecipe(database=str(folder / DATABASE), port=port)
    return serve(serving, demo=True, ready=ready)


def main(argv: Sequence[str]) -> int:
    """`promedical review demo`."""
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        DemoRecipe,
        prog="promedical review demo",
        usage="%(prog)s [--folder FOLDER] [--port PORT] [--language en|zh]",
        description=DESCRIPTION,
    )
    recipe = load_recipe(DemoRecipe, None, list(argv), parser=parser)
    if recipe.folder is not None:
        return _run(recipe, Path(recipe.folder).expanduser())
    with tempfile.TemporaryDirectory(prefix="promedical-demo-") as folder:
        return _run(recipe, Path(folder))
