"""Bringing a database's tables up to date: Alembic, with its scripts inside the package.

`promedical review serve` calls `upgrade` before it answers anybody. Left to others: what the tables
are (`tables`), each step (`migrations/versions`).
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from promedical.review.database import IMMEDIATE, Database, DatabaseError

__all__ = ["alembic_config", "upgrade"]


def alembic_config() -> Config:
    """Alembic's settings, without an ini file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(database: Database, revision: str = "head") -> None:
    """Make the tables what this version of the program expects; all steps or none.

    Raises:
        DatabaseError: the database cannot be reached, or a newer program made it.
    """
    config = alembic_config()
    options = {IMMEDIATE: True} if database.sqlite else {}
    try:
        with (
            database.engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            if not database.sqlite:  # two servers that start at once take turns
                connection.execute(text("SELECT pg_advisory_xact_lock(7305520)"))
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    except CommandError as error:
        newest = ScriptDirectory.from_config(config).get_current_head()
        raise DatabaseError(
            f"{database}: its tables are of a version that this program does not know (newest "
            f"here: {newest}); install the newer promedical again. Alembic says: {error}"
        ) from None
    except DBAPIError as error:
        # The driver's first line says what is wrong; the whole would hold statements.
        reason = str(error.orig).splitlines()[0]
        raise DatabaseError(f"{database}: cannot be opened: {reason}") from None
