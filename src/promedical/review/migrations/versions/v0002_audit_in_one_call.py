"""PostgreSQL: a function that adds an entry of the audit log, so that others wait for one call."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Each statement of a volatile function sees what was committed before it began: the last entry is
# looked for once the lock is held, which lasts until the transaction ends.
FUNCTION = """
CREATE FUNCTION promedical_audit(
    at timestamptz, actor_id text, action text, subject text, digest text,
    head text, middle text, tail text
) RETURNS void LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    number bigint;
    last text;
BEGIN
    PERFORM pg_advisory_xact_lock(7305521);
    SELECT e.seq + 1, e.hash INTO number, last FROM audit_event e ORDER BY e.seq DESC LIMIT 1;
    number := coalesce(number, 1);
    last := coalesce(last, repeat('0', 64));
    INSERT INTO audit_event
        (seq, at, actor_id, action, subject, digest, previous_hash, hash)
    VALUES (
        number, at, actor_id, action, subject, digest, last,
        encode(sha256(convert_to(head || last || middle || number || tail, 'UTF8')), 'hex')
    );
END $$
"""


def upgrade() -> None:
    """Make the function."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(FUNCTION)


def downgrade() -> None:
    """Remove it."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "DROP FUNCTION promedical_audit(timestamptz, text, text, text, text, text, text, text)"
        )
