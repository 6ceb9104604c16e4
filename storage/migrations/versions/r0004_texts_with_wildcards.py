"""Names and descriptions, and the runs of three characters in them: for patterns that begin with a wildcard."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("studies", "patient_name_alphabetic"),
    ("studies", "patient_name_ideographic"),
    ("studies", "patient_name_phonetic"),
    ("studies", "study_description"),
    ("patients", "patient_name_alphabetic"),
    ("patients", "patient_name_ideographic"),
    ("patients", "patient_name_phonetic"),
)


def upgrade() -> None:
    """Make the tables, and fill them from the studies and patients that are there."""
    by_bytes = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    big = sa.BigInteger()
    op.create_index("ix_studies_study_description", "studies", ["study_description"], unique=False)
    op.create_table(
        "texts",
        sa.Column("id", big.with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("value", by_bytes, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_texts")),
        sa.UniqueConstraint("value", name=op.f("uq_texts_value")),
    )
    op.create_table(
        "trigrams",
        sa.Column("trigram", by_bytes, nullable=False),
        sa.Column("text_ref", big, nullable=False),
        sa.PrimaryKeyConstraint("trigram", "text_ref", name=op.f("pk_trigrams")),
        sqlite_with_rowid=False,
    )
    for table, column in _COLUMNS:
        long_enough = f"SELECT {column} FROM {table} WHERE length({column}) >= 3"  # noqa: S608 - names of our own
        op.execute(f"INSERT INTO texts (value) {long_enough} ON CONFLICT DO NOTHING")
    op.execute(
        "WITH RECURSIVE places (place) AS (SELECT 1 UNION ALL SELECT place + 1 FROM places WHERE place < 254) "
        "INSERT INTO trigrams (trigram, text_ref) SELECT substr(value, place, 3), id FROM texts, places "
        "WHERE place <= length(value) - 2 ON CONFLICT DO NOTHING"
    )
