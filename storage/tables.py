"""The tables of the index. Rows keep attributes as they were received, for answers, and normalised columns, for matching."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, Table, Text, UniqueConstraint
from sqlalchemy import Index as TableIndex

from storage.database import METADATA, BigId
from storage.matching import column_names
from storage.records import INDEXED, Level


def _matching_columns(*levels: Level) -> list[Column[Any]]:
    return [
        Column(name, Text, nullable=False)
        for keyword, (level, vr) in INDEXED.items()
        if level in levels
        for name in column_names(keyword, vr)
    ]


def _storage_columns() -> list[Column[Any]]:
    return [
        Column("role", Text, nullable=False),
        Column("transfer_syntax_uid", Text, nullable=False),
        Column("byte_count", BigInteger, nullable=False),
        Column("sha256", Text, nullable=False),
        Column("object_key", Text, nullable=False, index=True),
        Column("sealed_byte_count", BigInteger, nullable=False),
        Column("sealed_sha256", Text, nullable=False),
        Column("key_id", Text, nullable=False),
        Column("landed_on", Text, nullable=False, server_default=""),
        Column("received_at", BigInteger, nullable=False),
        Column("extra", Text, nullable=False),
        Column("attributes", Text, nullable=False),
    ]


PATIENTS = Table(
    "patients",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("identity", Text, nullable=False, unique=True),
    *_matching_columns(Level.PATIENT),
    Column("attributes", Text, nullable=False),
    sqlite_autoincrement=True,
)
STUDIES = Table(
    "studies",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("patient_ref", BigInteger, ForeignKey("patients.id"), nullable=False, index=True),
    *_matching_columns(Level.PATIENT, Level.STUDY),
    Column("modalities", Text, nullable=False),
    Column("sop_classes", Text, nullable=False),
    Column("attributes", Text, nullable=False),
    sqlite_autoincrement=True,  # a cached key must never be given to another row
)
SERIES = Table(
    "series",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("study_ref", BigInteger, ForeignKey("studies.id"), nullable=False),
    *_matching_columns(Level.SERIES),
    Column("instance_count", Integer, nullable=False),
    Column("attributes", Text, nullable=False),
    UniqueConstraint("study_ref", "series_instance_uid"),
    sqlite_autoincrement=True,
)
INSTANCES = Table(
    "instances",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("series_ref", BigInteger, ForeignKey("series.id"), nullable=False, index=True),
    *_matching_columns(Level.INSTANCE),
    *_storage_columns(),
    UniqueConstraint("sop_instance_uid"),
)
TEXTS = Table(
    "texts",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("value", Text, nullable=False),
    UniqueConstraint("value"),
)
TRIGRAMS = Table(
    "trigrams",
    METADATA,
    Column("trigram", Text, primary_key=True),
    Column("text_ref", BigInteger, primary_key=True),  # without a foreign key, whose check would have to read all
    sqlite_with_rowid=False,
)
QUARANTINE = Table(
    "quarantine",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("sop_class_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("series_instance_uid", Text, nullable=False),
    *_storage_columns(),
    Column("reason", Text, nullable=False),
    Column("quarantined_at", BigInteger, nullable=False),
    UniqueConstraint("sop_instance_uid", "sha256"),
)
REPORTS = Table(
    "reports",
    METADATA,
    Column("sop_instance_uid", Text, ForeignKey("instances.sop_instance_uid"), primary_key=True),
    Column("source_sop_instance_uid", Text, ForeignKey("instances.sop_instance_uid"), nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("models", Text, nullable=False),
)
# The order of answers, and in it everything that a viewer's study list filters by: such a search reads this index and nothing else.
TableIndex(
    "ix_studies_list",
    STUDIES.c.study_date,
    STUDIES.c.study_time,
    STUDIES.c.study_instance_uid,
    STUDIES.c.patient_name_alphabetic,
    STUDIES.c.patient_name_ideographic,
    STUDIES.c.patient_name_phonetic,
    STUDIES.c.patient_id,
    STUDIES.c.accession_number,
    STUDIES.c.study_description,
    STUDIES.c.modalities,
    STUDIES.c.patient_birth_date,
    STUDIES.c.patient_sex,
    STUDIES.c.study_id,
    STUDIES.c.referring_physician_name_alphabetic,
    STUDIES.c.referring_physician_name_ideographic,
    STUDIES.c.referring_physician_name_phonetic,
)
TableIndex("ix_studies_study_instance_uid", STUDIES.c.study_instance_uid, unique=True)
TableIndex("ix_studies_patient_id", STUDIES.c.patient_id)
TableIndex("ix_studies_accession_number", STUDIES.c.accession_number)
TableIndex("ix_studies_study_description", STUDIES.c.study_description)
# A name asked for without "=" may stand in any of the three groups: one group without an index, and every row is looked at.
for _table in (STUDIES, PATIENTS):
    TableIndex(f"ix_{_table.name}_patient_name", _table.c.patient_name_alphabetic)
    TableIndex(f"ix_{_table.name}_patient_name_ideographic", _table.c.patient_name_ideographic)
    TableIndex(f"ix_{_table.name}_patient_name_phonetic", _table.c.patient_name_phonetic)
TableIndex("ix_patients_patient_id", PATIENTS.c.patient_id)
TableIndex("ix_series_series_instance_uid", SERIES.c.series_instance_uid)

STORAGE = [column.name for column in _storage_columns()]
"""Columns that instances and quarantine have in common."""
SERIES_JOIN = SERIES.join(STUDIES, SERIES.c.study_ref == STUDIES.c.id)
INSTANCE_JOIN = INSTANCES.join(SERIES, INSTANCES.c.series_ref == SERIES.c.id).join(STUDIES, SERIES.c.study_ref == STUDIES.c.id)
COLUMN_NAMES = {keyword: column_names(keyword, vr) for keyword, (_, vr) in INDEXED.items()}
"""keyword -> its columns for matching."""
