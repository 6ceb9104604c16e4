"""Quarantine: instances that were kept aside because another of their UID, or their study with another patient, was there first.

An operator looks, then accepts (it takes the place of the archived one, which is kept aside in its stead) or drops. The rows are the
truth; a *mark* beside the objects (document ``quarantine/..``) says of each object that it was set aside, when and why, so that an index
rebuilt from the store alone comes to the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from storage.admission import event_of
from storage.errors import ConflictingInstance, InstanceNotFound, IntegrityError, StorageError
from storage.failpoints import unarmed
from storage.records import AuditEvent, InstanceRecord, JobKind, NewJob
from storage.removal import remove_in, remove_quarantined_in, reports_made_from_in
from storage.study_keys import document_name
from storage.work import was_lost_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.holds import Holds
    from storage.index import Index, QuarantinedInstance
    from storage.objects import ObjectStore
    from storage.places import Places
    from storage.records import Origin, Summary
    from storage.study_keys import StudyKeys
    from storage.work import WorkQueue

_FORMAT = "dicom-node quarantine 1"
_FOLLOWED = "the marks in the store say that an operator decided so, after the backup that this database comes from"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """What the store says of an object that was set aside."""

    reason: str
    quarantined_at: datetime


def mark_name(object_key: str) -> str:
    """Return the name of an object's mark in the store."""
    return f"quarantine/{object_key[:2]}/{object_key}"


def read_mark(store: ObjectStore, object_key: str) -> Mark | None:
    """Return the mark of an object, None when it was not set aside.

    Raises
    ------
    IntegrityError
        The document is none of ours.
    """
    try:
        content = store.get_document(mark_name(object_key))
    except InstanceNotFound:
        return None
    try:
        found = json.loads(content)
        if found["format"] != _FORMAT:
            raise ValueError("format")  # noqa: TRY301 - one sentence for all that is wrong with it
        return Mark(str(found["reason"]), datetime.fromisoformat(found["quarantined_at"]))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the quarantine mark of object {object_key} is damaged; the caretaker writes it anew") from error


class Marks:
    """The marks of a store, listed once.

    Parameters
    ----------
    store
        Where they lie.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.object_keys = frozenset(name.rpartition("/")[2] for name in store.list_documents("quarantine/"))

    def of(self, object_key: str) -> Mark | None:
        """Return the mark of an object, None when it was not set aside; raises as `read_mark`."""
        return read_mark(self._store, object_key) if object_key in self.object_keys else None


class Quarantine:
    """Shows, accepts and drops what was kept aside.

    Parameters
    ----------
    database, index, queue, audit, study_keys, places, holds
        The parts it ties together.
    jobs_for
        As `storage.archive.Archive`: an accepted instance is analysed as a new one.
    reach
        Failpoints quarantine.committed and quarantine.marked.
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
        jobs_for: Callable[[Summary, Origin], Sequence[NewJob]],
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._study_keys = study_keys
        self._places = places
        self._holds = holds
        self._jobs_for = jobs_for
        self._reach = reach

    def all(self) -> list[QuarantinedInstance]:
        """Return what is in quarantine, oldest first."""
        return self._index.quarantined()

    def show(self, quarantine_id: int) -> tuple[QuarantinedInstance, InstanceRecord | None]:
        """Return one, and the archived instance of its SOP Instance UID if there is one.

        Raises
        ------
        InstanceNotFound
            Nothing of that number is in quarantine.
        """
        with self._database.read() as connection:
            one = self._one(connection, quarantine_id)
            return one, self._index.find_in(connection, one.record.summary.sop_instance_uid)

    def accept(self, quarantine_id: int, *, actor: str, reason: str) -> InstanceRecord:
        """Archive what was kept aside, in the place of the archived instance of its UID, which is kept aside in its stead.

        So are the reports made from the latter, whose findings are of another picture; deliveries of theirs that wait are cancelled. The
        accepted instance is analysed anew. Nothing is deleted. What was lost with its node cannot be kept aside: the audit trail says so.

        Raises
        ------
        InstanceNotFound
            As `show`.
        ConflictingInstance
            Its study is archived with another patient: that cannot be decided here.
        """
        record = self._database.write(partial(self._accept_in, quarantine_id=quarantine_id, actor=actor, reason=reason))
        self._reach("quarantine.committed")
        self.synchronise_marks()
        self._reach("quarantine.marked")
        return record

    def drop(self, quarantine_id: int, *, actor: str, reason: str) -> None:
        """Delete what was kept aside, every version of it, and its study's keys if nothing else of the study is here.

        Raises
        ------
        InstanceNotFound
            As `show`.
        StorageError
            Its study is under legal hold.
        Unavailable
            The database, and nothing was changed; or the store: the sweep deletes the object later.
        """

        def work(connection: Connection) -> tuple[str, list[str]]:
            one = self._one(connection, quarantine_id)
            summary, sealed = one.record.summary, one.record.sealed
            if self._holds.find_in(connection, summary.study_instance_uid) is not None:
                raise StorageError("its study is under legal hold: lift the hold first, if that is right")
            remove_quarantined_in(connection, [quarantine_id])
            key_ids: list[str] = []
            if not self._index.has_study_in(connection, summary.study_instance_uid):
                key_ids = self._study_keys.forget_in(connection, summary.study_instance_uid)
            detail = {
                "object_key": sealed.object_key,
                "study_instance_uid": summary.study_instance_uid,
                "sha256": summary.sha256,
                "study_keys": key_ids,
                "reason": reason,
            }
            event = AuditEvent(action="quarantine.dropped", outcome="success", actor=actor, subject=summary.sop_instance_uid, detail=detail)
            self._audit.append(connection, event)
            return sealed.object_key, key_ids

        object_key, key_ids = self._database.write(work)
        self._reach("quarantine.committed")
        for key_id in key_ids:
            self._places.erase_document(document_name(key_id))
        self._places.erase(object_key)
        self._places.store.delete_document(mark_name(object_key))

    def synchronise_marks(self) -> int:
        """Write the marks that the store lacks and remove those of what is not in quarantine (any more); return how many.

        The database may be older than the store, or not its own: what an operator decided since (`follow_marks`) is taken up before, and
        the mark stays of an object that is still there and of which no row and no record of the audit trail tells.
        """
        self.follow_marks()
        store = self._places.store
        wanted = {one.record.sealed.object_key: one for one in self._index.quarantined() if not one.record.landed_on}
        there = Marks(store).object_keys
        for object_key in sorted(wanted.keys() - there):
            one = wanted[object_key]
            content = {"format": _FORMAT, "reason": one.reason, "quarantined_at": one.quarantined_at.isoformat()}
            store.put_document(mark_name(object_key), json.dumps(content, sort_keys=True).encode())
        gone = [object_key for object_key in sorted(there - wanted.keys()) if self._is_over(object_key)]
        for object_key in gone:
            store.delete_document(mark_name(object_key))
        return len(wanted.keys() - there) + len(gone)

    def follow_marks(self) -> int:
        """Take up what an operator decided after the backup that this database was restored from; return how many decisions.

        An archived object with a mark, and the audit trail does not say that it was accepted after that: it was set aside since. The one
        object of its UID that is in quarantine without a mark, and had come by then, was accepted in its stead, and is so again. What came
        later nobody decided about.
        """
        marks = Marks(self._places.store)
        aside = self._index.quarantined() if marks.object_keys else []
        unmarked = {one.id: one.record.summary.sop_instance_uid for one in aside if self._may_be_decided(one, marks.object_keys)}
        followed = 0
        for uid in sorted(set(unmarked.values())):
            with self._database.read() as connection:
                archived = self._index.find_in(connection, uid)
            mark = None if archived is None else self._mark_of(archived, marks)
            if archived is None or mark is None or self._was_accepted(archived, mark):
                continue
            seen = frozenset(unmarked)
            work = partial(self._follow_in, archived=archived, mark=mark, marked=marks.object_keys, seen=seen)
            try:
                followed += self._database.write(work)
            except ConflictingInstance as error:
                _log.warning("quarantine.not_followed", extra={"object_key": archived.sealed.object_key, "reason": str(error)})
        return followed

    # -- the transactions --------------------------------------------------------------------------------------------------------

    def _one(self, connection: Connection, quarantine_id: int) -> QuarantinedInstance:
        found = self._index.quarantined_in(connection, quarantine_id=quarantine_id)
        if not found:
            raise InstanceNotFound(f"nothing of number {quarantine_id} is in quarantine")
        return found[0]

    def _accept_in(self, connection: Connection, *, quarantine_id: int, actor: str, reason: str) -> InstanceRecord:
        record = self._one(connection, quarantine_id).record
        uid = record.summary.sop_instance_uid
        replaced = self._index.find_in(connection, uid)
        remove_quarantined_in(connection, [quarantine_id])
        detail = {"object_key": record.sealed.object_key, "sha256": record.summary.sha256, "reason": reason}
        if replaced is not None:
            reports = [self._index.find_in(connection, report) for report in reports_made_from_in(connection, [uid])]
            aside = [replaced, *(report for report in reports if report is not None)]
            lost = {one.summary.sop_instance_uid for one in aside if self._is_lost_in(connection, one)}
            remove_in(connection, [one.summary.sop_instance_uid for one in aside])
            self._queue.cancel_in(connection, [one.summary.sop_instance_uid for one in aside])
            for one in aside:
                if one.summary.sop_instance_uid in lost:
                    self._audit.append(connection, event_of("quarantine.lost", one, detail={"landed_on": one.landed_on}))
                    continue
                why = "replaced by an operator" if one is replaced else "made from an instance that an operator replaced"
                self._index.quarantine(connection, one, why)
                self._move_on_in(connection, one)
            detail["replaced_object_key"] = replaced.sealed.object_key
            detail["replaced_sha256"] = replaced.summary.sha256
        try:
            self._index.add(connection, record)
        except ConflictingInstance as error:
            raise ConflictingInstance(
                f"{error}. Accepting cannot decide whose study it is: if what is archived is wrong, erase that study and accept again; "
                "if this one is, have it corrected and sent again, and drop it here"
            ) from error
        for job in self._jobs_for(record.summary, record.origin):
            self._queue.enqueue(connection, replace(job, home=record.landed_on))  # the jobs for what it replaces were cancelled
        self._move_on_in(connection, record)
        event = AuditEvent(action="quarantine.accepted", outcome="success", actor=actor, subject=uid, detail=detail)
        self._audit.append(connection, event)
        return record

    def _follow_in(
        self, connection: Connection, *, archived: InstanceRecord, mark: Mark, marked: frozenset[str], seen: frozenset[int]
    ) -> int:
        """Accept what was accepted after the backup, if that can be said of one and nothing changed meanwhile."""
        uid = archived.summary.sop_instance_uid
        known = self._index.find_in(connection, uid)
        if known is None or known.sealed != archived.sealed:
            return 0
        decided = [
            one
            for one in self._index.quarantined_in(connection, sop_instance_uid=uid)
            if self._may_be_decided(one, marked) and one.record.origin.received_at <= mark.quarantined_at
        ]
        if len(decided) != 1 or decided[0].id not in seen:
            return 0  # of several nobody can say which, and one that was set aside meanwhile was decided about: an operator decides again
        self._accept_in(connection, quarantine_id=decided[0].id, actor="node", reason=_FOLLOWED)
        return 1

    @staticmethod
    def _may_be_decided(one: QuarantinedInstance, marked: frozenset[str]) -> bool:
        return not one.record.landed_on and one.record.sealed.object_key not in marked

    @staticmethod
    def _is_lost_in(connection: Connection, record: InstanceRecord) -> bool:
        return bool(record.landed_on) and was_lost_in(connection, record.summary.sop_instance_uid, home=record.landed_on)

    def _move_on_in(self, connection: Connection, record: InstanceRecord) -> None:
        """Have what lies on a node's disk alone brought into the store: the jobs about its UID were cancelled."""
        if record.landed_on:
            payload = {"object_key": record.sealed.object_key}
            self._queue.enqueue(
                connection, NewJob(JobKind.ARCHIVE, record.summary.sop_instance_uid, payload=payload, home=record.landed_on)
            )

    def _is_over(self, object_key: str) -> bool:
        """Look again, now: whether an object with a mark was accepted, or is gone."""
        with self._database.read() as connection:
            record = self._index.record_of_object_in(connection, object_key)
            uid = "" if record is None else record.summary.sop_instance_uid
            kept = self._index.quarantined_in(connection, sop_instance_uid=uid) if uid else []
        if record is None:
            return not self._is_there(object_key)
        if object_key in {one.record.sealed.object_key for one in kept}:
            return False
        try:
            mark = read_mark(self._places.store, object_key)
        except IntegrityError:
            mark = None  # it does not say when: the audit trail alone does
        if self._was_accepted(record, mark):
            return True
        _log.warning("quarantine.mark_contradicts", extra={"object_key": object_key})  # the database is older than the mark
        return False

    def _is_there(self, object_key: str) -> bool:
        try:
            self._places.store.stat(object_key)
        except InstanceNotFound:
            return False
        return True

    def _mark_of(self, record: InstanceRecord, marks: Marks) -> Mark | None:
        """Return an archived object's mark; None too when it is damaged, as it does not say since when then."""
        try:
            return marks.of(record.sealed.object_key)
        except IntegrityError as error:
            _log.warning("quarantine.not_followed", extra={"object_key": record.sealed.object_key, "reason": str(error)})
            return None

    def _was_accepted(self, record: InstanceRecord, mark: Mark | None) -> bool:
        """Ask the audit trail whether an archived object came out of the quarantine after its mark was made (ever, if None).

        What is recorded behind a record of the mark's time came later, also where another node's clock said an earlier time.
        """
        later = mark is None
        for entry in self._audit.events_of(record.summary.sop_instance_uid):
            later = later or mark is None or entry.at >= mark.quarantined_at
            if later and entry.event.action == "quarantine.accepted" and entry.event.detail.get("object_key") == record.sealed.object_key:
                return True
        return False
