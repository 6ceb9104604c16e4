"""Erasure: a study or a patient is made unreadable for ever, in every copy, by forgetting keys.

One transaction takes the rows, the jobs and the study keys, and writes the audit record. After it the documents of the keys are deleted
from the store, then the objects, every version of both. A kill in between leaves documents and objects that no row names; the audit
record names their keys, so the orphan sweep deletes them and never takes them back in, and so does the same call again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select

from storage.audit import AUDIT
from storage.database import to_micros
from storage.errors import InstanceNotFound, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.records import AuditEvent, JobKind, NewJob
from storage.removal import RemovedObject, instances_in, remove_in, remove_quarantined_in, reports_made_from_in, studies_in
from storage.study_keys import document_name
from storage.tables import INSTANCE_JOIN, INSTANCES, STUDIES

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.holds import Holds
    from storage.index import Index, QuarantinedInstance
    from storage.places import Places
    from storage.study_keys import StudyKeys
    from storage.work import WorkQueue

_PARALLEL = 8
_NEWEST = select(func.max(INSTANCES.c.received_at)).select_from(INSTANCE_JOIN).where(STUDIES.c.study_instance_uid == bindparam("study"))
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Erased:
    """What an erasure took."""

    study_instance_uids: list[str]
    instances: int = 0
    """Rows, those of the quarantine included."""
    objects: list[RemovedObject] = field(default_factory=list)
    study_key_ids: list[str] = field(default_factory=list)
    left: int = 0
    """Documents and objects that could not be deleted now: call again, or the orphan sweep does it."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to delete."""
        return not self.left


class Erasure:
    """Erases studies and patients; several may run at a time.

    Parameters
    ----------
    database, index, queue, audit, study_keys, places, holds
        The parts it ties together.
    reach
        Failpoints erase.committed, erase.documents, erase.objects.
    """

    def __init__(
        self,
        *,
        database: Database,
        index: Index,
        queue: WorkQueue,
        audit: AuditTrail,
        study_keys: StudyKeys,
        places: Places,
        holds: Holds,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._study_keys = study_keys
        self._places = places
        self._holds = holds
        self._reach = reach

    def erase_study(self, study_instance_uid: str, *, actor: str, reason: str, received_before: datetime | None = None) -> Erased:
        """Erase a study: its instances, the reports made from them, what of it is in quarantine, its keys.

        Once more, for a study that is erased: deletes what a crash or an absent store left.

        Parameters
        ----------
        received_before
            Only if all of its instances came before that moment.

        Raises
        ------
        InstanceNotFound
            No such study was ever here.
        StorageError
            It is under legal hold, or an instance came later than `received_before`. Nothing was changed.
        Unavailable
            The database; nothing was changed, or (PostgreSQL lost while committing) nobody knows: call again.
        """

        def work(connection: Connection) -> Erased:
            if received_before is not None:
                newest = connection.execute(_NEWEST, {"study": study_instance_uid}).scalar()
                if newest is not None and newest >= to_micros(received_before):
                    raise StorageError("an instance of the study came after that moment: nothing was erased")
            return self._erase_in([study_instance_uid], connection, actor=actor, reason=reason)

        return self._finish(self._database.write(work))

    def erase_patient(self, patient_id: str, issuer_of_patient_id: str = "", *, actor: str, reason: str) -> Erased:
        """Erase every study of a patient, and what else of the patient is in quarantine.

        Raises
        ------
        InstanceNotFound
            No such patient is here.
        StorageError
            A study of the patient is under legal hold: the message names them, and nothing was changed. Or the Patient ID is empty.
        Unavailable
            As `erase_study`.
        """
        if not patient_id.strip():
            raise StorageError("an empty Patient ID names nobody: erase the studies one by one")

        def work(connection: Connection) -> Erased:
            kept = [
                one
                for one in self._index.quarantined_in(connection)
                if _identity(one) == (patient_id.strip(), issuer_of_patient_id.strip())
            ]
            return self._erase_in(
                connection=connection,
                study_instance_uids=studies_in(connection, patient_id, issuer_of_patient_id),
                kept=kept,
                actor=actor,
                reason=reason,
            )

        return self._finish(self._database.write(work))

    # -- the transaction ---------------------------------------------------------------------------------------------------------

    def _erase_in(
        self,
        study_instance_uids: list[str],
        connection: Connection,
        *,
        actor: str,
        reason: str,
        kept: Iterable[QuarantinedInstance] = (),
    ) -> Erased:
        aside = {one.id: one for one in kept}
        for study in study_instance_uids:
            aside.update((one.id, one) for one in self._index.quarantined_in(connection, study_instance_uid=study))
        self._require_free(connection, {*study_instance_uids, *(one.record.summary.study_instance_uid for one in aside.values())})
        erased = Erased(list(study_instance_uids))
        for study in study_instance_uids:
            uids = set(instances_in(connection, study))
            uids |= set(reports_made_from_in(connection, uids))
            own_aside = [one for one in aside.values() if one.record.summary.study_instance_uid == study]
            objects = self._take_in(connection, uids, own_aside)
            key_ids = self._study_keys.forget_in(connection, study)
            if not objects and not key_ids:
                erased_before = erased_keys(self._audit, study)
                if erased_before is None:
                    raise InstanceNotFound("no study of this UID is archived, in quarantine, or was erased here")
                key_ids = erased_before
            else:
                detail = {"instances": len(objects), "objects": len(objects), "study_keys": key_ids, "reason": reason}
                self._audit.append(
                    connection, AuditEvent(action="study.erased", outcome="success", actor=actor, subject=study, detail=detail)
                )
            erased.instances += len(objects)
            erased.objects += objects
            erased.study_key_ids += key_ids
        for one in aside.values():
            if one.record.summary.study_instance_uid not in study_instance_uids:
                self._drop_in(connection, one, erased, actor=actor, reason=reason)
        if not study_instance_uids and not aside:
            raise InstanceNotFound("no patient of this Patient ID and Issuer of Patient ID is archived or in quarantine")
        return erased

    def _require_free(self, connection: Connection, study_instance_uids: Iterable[str]) -> None:
        held = [study for study in sorted(study_instance_uids) if self._holds.find_in(connection, study) is not None]
        if held:
            raise StorageError(f"under legal hold, nothing was erased: {', '.join(held)}; lift the hold first, if that is right")

    def _take_in(self, connection: Connection, uids: set[str], aside: list[QuarantinedInstance]) -> list[RemovedObject]:
        objects = remove_in(connection, uids)
        remove_quarantined_in(connection, [one.id for one in aside])
        objects += [RemovedObject(one.record.sealed.object_key, one.record.summary.sop_instance_uid, one.record.landed_on) for one in aside]
        gone = {one.sop_instance_uid for one in objects}
        self._queue.cancel_in(connection, {uid for uid in gone if self._index.find_in(connection, uid) is None})
        for uid in gone:  # of another study, kept aside under the same UID: its way into the store must go on
            for one in self._index.quarantined_in(connection, sop_instance_uid=uid):
                if one.record.landed_on:
                    payload = {"object_key": one.record.sealed.object_key}
                    self._queue.enqueue(connection, NewJob(JobKind.ARCHIVE, uid, payload=payload, home=one.record.landed_on))
        return objects

    def _drop_in(self, connection: Connection, one: QuarantinedInstance, erased: Erased, *, actor: str, reason: str) -> None:
        """Take an instance of the patient from the quarantine whose study is archived for another patient, and stays."""
        summary, sealed = one.record.summary, one.record.sealed
        remove_quarantined_in(connection, [one.id])
        erased.instances += 1
        erased.objects.append(RemovedObject(sealed.object_key, summary.sop_instance_uid, one.record.landed_on))
        detail = {"object_key": sealed.object_key, "study_instance_uid": summary.study_instance_uid, "reason": reason}
        event = AuditEvent(action="quarantine.dropped", outcome="success", actor=actor, subject=summary.sop_instance_uid, detail=detail)
        self._audit.append(connection, event)

    # -- after it ----------------------------------------------------------------------------------------------------------------

    def _finish(self, erased: Erased) -> Erased:
        """Delete documents, then objects; what cannot be deleted now is counted."""
        self._reach("erase.committed")
        with ThreadPoolExecutor(_PARALLEL if self._places.remote else 1, "erase") as pool:
            erased.left += sum(pool.map(self._gone_document, erased.study_key_ids))
            self._reach("erase.documents")
            erased.left += sum(pool.map(self._gone_object, [one.object_key for one in erased.objects]))
        self._reach("erase.objects")
        return erased

    def _gone_document(self, study_key_id: str) -> int:
        try:
            self._places.erase_document(document_name(study_key_id))
        except Unavailable as error:
            _log.warning("erasure.left", extra={"study_key_id": study_key_id, "reason": str(error)})
            return 1
        return 0

    def _gone_object(self, object_key: str) -> int:
        try:
            self._places.erase(object_key)
        except Unavailable as error:
            _log.warning("erasure.left", extra={"object_key": object_key, "reason": str(error)})
            return 1
        return 0


def erased_keys(audit: AuditTrail, study_instance_uid: str) -> list[str] | None:
    """Return the ids of the keys of a study that were erased; None when it never was."""
    events = [entry.event for entry in audit.events_of(study_instance_uid) if entry.event.action == "study.erased"]
    if not events:
        return None
    return sorted({str(key_id) for event in events for key_id in event.detail.get("study_keys", ())})


def all_erased_keys(database: Database) -> set[str]:
    """Return the ids of all keys of which the audit trail says that they were erased, with a study or from the quarantine.

    It looks through the whole trail.
    """
    statement = select(AUDIT.c.detail).where(AUDIT.c.action.in_(("study.erased", "quarantine.dropped")))
    with database.read() as connection:
        return {str(key_id) for detail in connection.scalars(statement) for key_id in json.loads(detail).get("study_keys", ())}


def _identity(one: QuarantinedInstance) -> tuple[str, str]:
    attributes = one.record.summary.attributes
    patient_id, issuer = attributes.get("PatientID"), attributes.get("IssuerOfPatientID")
    return (patient_id[0].strip() if patient_id else "", issuer[0].strip() if issuer else "")
