"""Locks of lineages, digests that name their algorithm, and patches that came from elsewhere.

Digests that are there already are SHA-256 and stay what they are.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAME = sa.String(length=255)
WORD = sa.String(length=16)
TIMESTAMP = sa.String(length=27)


def upgrade() -> None:
    """Add what is new and rename what a digest was called."""
    for table in ("model_files", "model_tensors", "lineage_files", "lineage_tensors"):
        op.execute(sa.text(f"ALTER TABLE {table} RENAME COLUMN sha256 TO digest"))
        op.add_column(table, sa.Column("digest_algorithm", WORD, nullable=False, server_default="sha256"))
    op.add_column("patches", sa.Column("origin", sa.JSON(), nullable=True))
    op.create_table(
        "lineage_locks",
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("purpose", NAME, nullable=False),
        sa.Column("host", NAME, nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("process_started", sa.BigInteger(), nullable=False),
        sa.Column("token", NAME, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.Column("acquired_at", TIMESTAMP, nullable=False),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_lineage_locks_lineage_id_lineages")),
        sa.PrimaryKeyConstraint("lineage_id", name=op.f("pk_lineage_locks")),
    )
