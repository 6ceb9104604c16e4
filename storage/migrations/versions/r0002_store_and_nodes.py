"""Study keys, landed objects, homes of jobs, duties, legal holds, nodes, subscribers of the change feed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what many nodes with one store and one database need."""
    if op.get_bind().execute(sa.text("SELECT count(*) FROM instances")).scalar():
        raise RuntimeError(
            "the archive was made by the preview 0.1, whose objects this release cannot open: start with an empty data folder"
        )
    for table in ("instances", "quarantine"):
        op.add_column(table, sa.Column("landed_on", sa.Text(), server_default="", nullable=False))
    op.add_column("jobs", sa.Column("home", sa.Text(), server_default="", nullable=False))
    op.drop_index("ix_jobs_live", "jobs")
    op.create_index(
        "ix_jobs_live",
        "jobs",
        ["kind", "lane", "home", "due_at"],
        unique=False,
        sqlite_where=sa.text("due_at IS NOT NULL"),
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index("ix_studies_patient_name_ideographic", "studies", ["patient_name_ideographic"], unique=False)
    op.create_index("ix_studies_patient_name_phonetic", "studies", ["patient_name_phonetic"], unique=False)
    op.create_index("ix_patients_patient_name", "patients", ["patient_name_alphabetic"], unique=False)
    op.create_index("ix_patients_patient_name_ideographic", "patients", ["patient_name_ideographic"], unique=False)
    op.create_index("ix_patients_patient_name_phonetic", "patients", ["patient_name_phonetic"], unique=False)
    op.create_table(
        "study_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("wrapping_key_id", sa.Text(), nullable=False),
        sa.Column("wrapped", sa.Text(), nullable=False),
        sa.Column("stored", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_keys")),
    )
    op.create_index("ix_study_keys_study_instance_uid", "study_keys", ["study_instance_uid"], unique=False)
    op.create_index("ix_study_keys_wrapping_key_id", "study_keys", ["wrapping_key_id"], unique=False)
    op.create_table(
        "duties",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("held_until", sa.BigInteger(), nullable=False),
        sa.Column("cursor", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_duties")),
    )
    op.create_table(
        "holds",
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("placed_by", sa.Text(), nullable=False),
        sa.Column("placed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("study_instance_uid", name=op.f("pk_holds")),
    )
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("data_dir", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_nodes")),
    )
    op.create_table(
        "subscribers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_subscribers")),
    )
