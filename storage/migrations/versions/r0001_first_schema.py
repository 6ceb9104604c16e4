"""The schema of the first version: audit trail, work queue, index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table, and the head of an empty audit chain."""
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_subject", "audit", ["subject"], unique=False)
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("payload_digest", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("lease_token", sa.Text(), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=False),
        sa.Column("first_claimed_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint(
            "sop_instance_uid", "kind", "lane", "payload_digest", name=op.f("uq_jobs_sop_instance_uid_kind_lane_payload_digest")
        ),
    )
    op.create_index(
        "ix_jobs_ended",
        "jobs",
        ["kind", "state"],
        unique=False,
        sqlite_where=sa.text("due_at IS NULL"),
        postgresql_where=sa.text("due_at IS NULL"),
    )
    op.create_index(
        "ix_jobs_live",
        "jobs",
        ["kind", "lane", "due_at"],
        unique=False,
        sqlite_where=sa.text("due_at IS NOT NULL"),
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "patients",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("patient_name_alphabetic", sa.Text(), nullable=False),
        sa.Column("patient_name_ideographic", sa.Text(), nullable=False),
        sa.Column("patient_name_phonetic", sa.Text(), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("issuer_of_patient_id", sa.Text(), nullable=False),
        sa.Column("patient_birth_date", sa.Text(), nullable=False),
        sa.Column("patient_sex", sa.Text(), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patients")),
        sa.UniqueConstraint("identity", name=op.f("uq_patients_identity")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_patients_patient_id", "patients", ["patient_id"], unique=False)
    op.create_table(
        "quarantine",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("byte_count", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("sealed_byte_count", sa.BigInteger(), nullable=False),
        sa.Column("sealed_sha256", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("extra", sa.Text(), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("quarantined_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantine")),
        sa.UniqueConstraint("sop_instance_uid", "sha256", name=op.f("uq_quarantine_sop_instance_uid_sha256")),
    )
    op.create_index(op.f("ix_quarantine_object_key"), "quarantine", ["object_key"], unique=False)
    op.create_table(
        "studies",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("patient_ref", sa.BigInteger(), nullable=False),
        sa.Column("patient_name_alphabetic", sa.Text(), nullable=False),
        sa.Column("patient_name_ideographic", sa.Text(), nullable=False),
        sa.Column("patient_name_phonetic", sa.Text(), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("issuer_of_patient_id", sa.Text(), nullable=False),
        sa.Column("patient_birth_date", sa.Text(), nullable=False),
        sa.Column("patient_sex", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("study_date", sa.Text(), nullable=False),
        sa.Column("study_time", sa.Text(), nullable=False),
        sa.Column("accession_number", sa.Text(), nullable=False),
        sa.Column("referring_physician_name_alphabetic", sa.Text(), nullable=False),
        sa.Column("referring_physician_name_ideographic", sa.Text(), nullable=False),
        sa.Column("referring_physician_name_phonetic", sa.Text(), nullable=False),
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("study_description", sa.Text(), nullable=False),
        sa.Column("timezone_offset_from_utc", sa.Text(), nullable=False),
        sa.Column("modalities", sa.Text(), nullable=False),
        sa.Column("sop_classes", sa.Text(), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["patient_ref"], ["patients.id"], name=op.f("fk_studies_patient_ref")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_studies_accession_number", "studies", ["accession_number"], unique=False)
    op.create_index(
        "ix_studies_list",
        "studies",
        [
            "study_date",
            "study_time",
            "study_instance_uid",
            "patient_name_alphabetic",
            "patient_name_ideographic",
            "patient_name_phonetic",
            "patient_id",
            "accession_number",
            "study_description",
            "modalities",
            "patient_birth_date",
            "patient_sex",
            "study_id",
            "referring_physician_name_alphabetic",
            "referring_physician_name_ideographic",
            "referring_physician_name_phonetic",
        ],
        unique=False,
    )
    op.create_index("ix_studies_patient_id", "studies", ["patient_id"], unique=False)
    op.create_index("ix_studies_patient_name", "studies", ["patient_name_alphabetic"], unique=False)
    op.create_index(op.f("ix_studies_patient_ref"), "studies", ["patient_ref"], unique=False)
    op.create_index("ix_studies_study_instance_uid", "studies", ["study_instance_uid"], unique=True)
    op.create_table(
        "series",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("study_ref", sa.BigInteger(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("series_number", sa.Text(), nullable=False),
        sa.Column("series_description", sa.Text(), nullable=False),
        sa.Column("series_date", sa.Text(), nullable=False),
        sa.Column("series_time", sa.Text(), nullable=False),
        sa.Column("body_part_examined", sa.Text(), nullable=False),
        sa.Column("laterality", sa.Text(), nullable=False),
        sa.Column("manufacturer", sa.Text(), nullable=False),
        sa.Column("station_name", sa.Text(), nullable=False),
        sa.Column("performed_procedure_step_start_date", sa.Text(), nullable=False),
        sa.Column("performed_procedure_step_start_time", sa.Text(), nullable=False),
        sa.Column("instance_count", sa.Integer(), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["study_ref"], ["studies.id"], name=op.f("fk_series_study_ref")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_series")),
        sa.UniqueConstraint("study_ref", "series_instance_uid", name=op.f("uq_series_study_ref_series_instance_uid")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_series_series_instance_uid", "series", ["series_instance_uid"], unique=False)
    op.create_table(
        "instances",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("series_ref", sa.BigInteger(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("instance_number", sa.Text(), nullable=False),
        sa.Column("content_date", sa.Text(), nullable=False),
        sa.Column("content_time", sa.Text(), nullable=False),
        sa.Column("image_laterality", sa.Text(), nullable=False),
        sa.Column("number_of_frames", sa.Text(), nullable=False),
        sa.Column("rows", sa.Text(), nullable=False),
        sa.Column("columns", sa.Text(), nullable=False),
        sa.Column("bits_allocated", sa.Text(), nullable=False),
        sa.Column("samples_per_pixel", sa.Text(), nullable=False),
        sa.Column("photometric_interpretation", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("byte_count", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("sealed_byte_count", sa.BigInteger(), nullable=False),
        sa.Column("sealed_sha256", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("extra", sa.Text(), nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["series_ref"], ["series.id"], name=op.f("fk_instances_series_ref")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instances")),
        sa.UniqueConstraint("sop_instance_uid", name=op.f("uq_instances_sop_instance_uid")),
    )
    op.create_index(op.f("ix_instances_object_key"), "instances", ["object_key"], unique=False)
    op.create_index(op.f("ix_instances_series_ref"), "instances", ["series_ref"], unique=False)
    op.create_table(
        "reports",
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("source_sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["sop_instance_uid"], ["instances.sop_instance_uid"], name=op.f("fk_reports_sop_instance_uid")),
        sa.ForeignKeyConstraint(
            ["source_sop_instance_uid"], ["instances.sop_instance_uid"], name=op.f("fk_reports_source_sop_instance_uid")
        ),
        sa.PrimaryKeyConstraint("sop_instance_uid", name=op.f("pk_reports")),
    )
    op.create_index(op.f("ix_reports_source_sop_instance_uid"), "reports", ["source_sop_instance_uid"], unique=False)
    op.execute(sa.text("INSERT INTO audit_head (id, seq, hash) VALUES (1, 0, :genesis)").bindparams(genesis="0" * 64))
