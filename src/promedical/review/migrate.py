"""Bringing a database's tables up to date: Alembic, with its scripts inside the package."""

from __future__ import annotations

from promedical.review.database import Database
from promedical.review.tables import Base

__all__ = ["upgrade"]


def upgrade(database: Database) -> None:
    """Make the tables what this version of the program expects."""
    Base.metadata.create_all(database.engine)
