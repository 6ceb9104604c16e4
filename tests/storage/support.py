"""What the tests of database, index, queue and audit trail share: a key, a database in a folder, drawn-up records."""

from __future__ import annotations

import hashlib
import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from storage.database import Database
from storage.records import InstanceRecord, Origin, SealedObject, Summary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KEY = bytes(range(32))
RECEIVED = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
_NUMBERS = itertools.count(1)


def open_database(place: Path | str, *, key: bytes = KEY, **options: object) -> Database:
    """Return the database of a place, not migrated: a folder (SQLite in node.db) or a URL (PostgreSQL)."""
    if "://" in str(place):
        return Database(url=str(place), key=None, **options)  # type: ignore[arg-type]
    return Database(url=f"sqlite:///{place}/node.db", key=key, **options)  # type: ignore[arg-type]


def instance(
    attributes: Mapping[str, str | tuple[str, ...]] | None = None,
    *,
    study: str = "1.2.3",
    series: str = "",
    uid: str = "",
    role: str = "source",
    sop_class_uid: str = "1.2.840.10008.5.1.4.1.1.77.1.4",
    content: str = "",
) -> InstanceRecord:
    """Return the record of an instance; PatientID P1 unless `attributes` says otherwise, every UID is new unless named."""
    uid = uid or f"{study}.9.{next(_NUMBERS)}"
    series = series or f"{study}.1"
    given: dict[str, str | tuple[str, ...]] = {"PatientID": "P1", "PatientName": "Doe^Jane", "Modality": "XC", **(attributes or {})}
    given |= {"SOPClassUID": sop_class_uid, "SOPInstanceUID": uid, "StudyInstanceUID": study, "SeriesInstanceUID": series}
    values = {keyword: value if isinstance(value, tuple) else (value,) for keyword, value in given.items()}
    digest = hashlib.sha256((uid + content).encode()).hexdigest()
    summary = Summary(
        sop_class_uid, uid, study, series, "1.2.840.10008.1.2.1", 1000, digest, values, ("ISO_IR 192",), True, 500, "", "Cam", "1.0"
    )
    sealed = SealedObject(digest[:32], 1100, digest[::-1], "key-1")
    return InstanceRecord(summary, sealed, Origin("dimse", RECEIVED, "10.0.0.1", "SCU", "NODE", "pacs"), role)
