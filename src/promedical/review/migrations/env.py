"""Alembic's entry: runs the steps on the connection that `promedical.review.migrate` opened."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from promedical.review.tables import Base, UtcTime


def render_item(kind: str, item: Any, autogen_context: Any) -> str | Literal[False]:
    """Steps hold plain types, so that they mean the same for ever."""
    if kind == "type" and isinstance(item, UtcTime):
        return "sa.DateTime(timezone=True)"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_item=render_item,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
