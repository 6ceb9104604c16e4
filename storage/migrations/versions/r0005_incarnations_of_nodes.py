"""Which processes a node is at present, and how far its clock is from the database's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; nodes that were registered before have neither until they start again."""
    op.add_column("nodes", sa.Column("incarnation", sa.Text(), nullable=True))
    op.add_column("nodes", sa.Column("clock_ahead", sa.BigInteger(), nullable=True))
