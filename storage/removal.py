"""Removing rows of the index: instances, and the series, studies and patients that are empty without them.

Everything here runs inside of the caller's transaction. What other processes remember of a series that goes is found out by the count
they make (`Index.add`): keys of rows are never given again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, exists, or_, select, update

from storage.search import pages
from storage.tables import INSTANCE_JOIN, INSTANCES, PATIENTS, QUARANTINE, REPORTS, SERIES, STUDIES
from storage.texts import forget_unused_in, texts_in

if TYPE_CHECKING:
    from sqlalchemy import Connection


@dataclass(frozen=True, slots=True)
class RemovedObject:
    """An object that no row names any more."""

    object_key: str
    sop_instance_uid: str
    landed_on: str = ""
    """As `storage.records.InstanceRecord.landed_on`."""


_OF_STUDY = select(INSTANCES.c.sop_instance_uid).select_from(INSTANCE_JOIN).where(STUDIES.c.study_instance_uid == bindparam("study"))
_STUDIES_OF = (
    select(STUDIES.c.study_instance_uid)
    .select_from(STUDIES.join(PATIENTS, STUDIES.c.patient_ref == PATIENTS.c.id))
    .where(PATIENTS.c.identity == bindparam("identity_"))
    .order_by(STUDIES.c.study_instance_uid)
)
_ROWS = select(INSTANCES.c.id, INSTANCES.c.series_ref, INSTANCES.c.object_key, INSTANCES.c.sop_instance_uid, INSTANCES.c.landed_on)


def instances_in(connection: Connection, study_instance_uid: str) -> list[str]:
    """Return the SOP Instance UIDs of a study."""
    return list(connection.scalars(_OF_STUDY, {"study": study_instance_uid}))


def studies_in(connection: Connection, patient_id: str, issuer_of_patient_id: str) -> list[str]:
    """Return the Study Instance UIDs of a patient, whose ID is not empty."""
    identity = json.dumps([patient_id.strip(), issuer_of_patient_id.strip()], ensure_ascii=False, separators=(",", ":"))
    return list(connection.scalars(_STUDIES_OF, {"identity_": identity}))


def reports_made_from_in(connection: Connection, sop_instance_uids: Iterable[str]) -> list[str]:
    """Return the SOP Instance UIDs of the reports that were made from these instances."""
    found: list[str] = []
    for page in pages(sorted(set(sop_instance_uids))):
        found += connection.scalars(select(REPORTS.c.sop_instance_uid).where(REPORTS.c.source_sop_instance_uid.in_(page)))
    return found


def remove_in(connection: Connection, sop_instance_uids: Iterable[str]) -> list[RemovedObject]:
    """Remove the rows of archived instances, what links them with reports, and what is empty without them.

    Reports made from them are the caller's to name, or they lose what links them with their source. The modalities and SOP classes of a
    study that keeps other instances stay as they are: other processes rely on them only ever growing.
    """
    uids = sorted(set(sop_instance_uids))
    for page in pages(uids):
        connection.execute(delete(REPORTS).where(or_(REPORTS.c.sop_instance_uid.in_(page), REPORTS.c.source_sop_instance_uid.in_(page))))
    removed: list[RemovedObject] = []
    fewer: Counter[int] = Counter()
    for page in pages(uids):
        rows = connection.execute(_ROWS.where(INSTANCES.c.sop_instance_uid.in_(page))).all()
        fewer.update(row.series_ref for row in rows)
        removed += [RemovedObject(row.object_key, row.sop_instance_uid, row.landed_on) for row in rows]
        connection.execute(delete(INSTANCES).where(INSTANCES.c.id.in_([row.id for row in rows])))
    for ref, number in fewer.items():
        connection.execute(update(SERIES).where(SERIES.c.id == ref).values(instance_count=SERIES.c.instance_count - number))
    for page_of_series in pages(sorted(fewer)):
        _remove_empty(connection, page_of_series)
    return removed


def remove_quarantined_in(connection: Connection, quarantine_ids: Iterable[int]) -> None:
    """Remove rows of the quarantine."""
    for page in pages(sorted(set(quarantine_ids))):
        connection.execute(delete(QUARANTINE).where(QUARANTINE.c.id.in_(page)))


def _remove_empty(connection: Connection, series: list[int]) -> None:
    studies = set(connection.scalars(select(SERIES.c.study_ref).where(SERIES.c.id.in_(series))))
    no_instance = ~exists().where(INSTANCES.c.series_ref == SERIES.c.id)
    connection.execute(delete(SERIES).where(SERIES.c.id.in_(series), no_instance))
    for page in pages(sorted(studies)):
        patients = set(connection.scalars(select(STUDIES.c.patient_ref).where(STUDIES.c.id.in_(page))))
        texts = texts_in(connection, studies=page, patients=sorted(patients))
        connection.execute(delete(STUDIES).where(STUDIES.c.id.in_(page), ~exists().where(SERIES.c.study_ref == STUDIES.c.id)))
        for page_of_patients in pages(sorted(patients)):
            no_study = ~exists().where(STUDIES.c.patient_ref == PATIENTS.c.id)
            connection.execute(delete(PATIENTS).where(PATIENTS.c.id.in_(page_of_patients), no_study))
        forget_unused_in(connection, texts)
