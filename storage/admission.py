"""Admission: commit 1. What was sealed is stored and indexed, or found to be here already, or kept aside."""

from __future__ import annotations

import logging
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from storage.comparison import same_picture
from storage.errors import ColdObject, ConflictingInstance, InstanceNotFound, IntegrityError, LostObject, StorageError, Unavailable
from storage.records import AuditEvent, JobKind, NewJob, Outcome, Receipt
from storage.stored import StoredInstance
from storage.study_keys import document_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import Index
    from storage.landing import Landing, LandingFile
    from storage.places import Acknowledge, Places
    from storage.records import InstanceRecord, Origin, Summary
    from storage.study_keys import StudyKey, StudyKeys
    from storage.work import WorkQueue

T = TypeVar("T")
OnConflict = Literal["quarantine", "refuse"]

_LOOK_FIRST = 256 * 1024
"""Above so many bytes, and for every journey to a store, a look into the index costs less than storing a duplicate in vain."""

_log = logging.getLogger(__name__)


class _Decision(Enum):
    STORED = auto()
    DUPLICATE = auto()
    HEALED = auto()
    AGAIN = auto()


class _Known(Enum):
    """How what arrived stands to the archived instance of its UID."""

    DUPLICATE = auto()
    """The same, and the archived object was read again just now."""
    HEALING = auto()
    """The same, but the archived object is lost or damaged: what arrived takes its place."""
    BESIDE = auto()
    """The same, but the archived object lies on another node's disk alone, or nobody can say: what arrived takes its place in the row.
    Nothing is deleted: the store may have the better copy. The orphan sweep looks, later."""
    OTHER = auto()
    """Other content."""


class Admission:
    """Admits instances; one per archive, its methods may be called from many threads at once.

    Parameters
    ----------
    database, index, queue, audit, places, study_keys, landing
        The parts it ties together.
    jobs_for, acknowledge, pixels_equal, on_conflict, comparison_bytes, reach
        As `storage.archive.Archive`.
    """

    def __init__(
        self,
        *,
        database: Database,
        index: Index,
        queue: WorkQueue,
        audit: AuditTrail,
        places: Places,
        study_keys: StudyKeys,
        landing: Landing,
        jobs_for: Callable[[Summary, Origin], Sequence[NewJob]],
        acknowledge: Callable[[Origin], Acknowledge],
        pixels_equal: Callable[[bytes, bytes], bool] | None,
        on_conflict: OnConflict,
        comparison_bytes: int,
        reach: Callable[[str], None],
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._places = places
        self._study_keys = study_keys
        self._landing = landing
        self._jobs_for = jobs_for
        self._acknowledge = acknowledge
        self._pixels_equal = pixels_equal
        self._on_conflict = on_conflict
        self._comparison_bytes = comparison_bytes
        self._reach = reach

    def admit(self, record: InstanceRecord, file: LandingFile, study_key: StudyKey) -> Receipt:
        """Store and index what was sealed, or find that it is here already. The database's transaction has the last word."""
        summary = record.summary
        policy = self._acknowledge(record.origin)
        settled: dict[str, _Known] = {}  # by the object key of an archived instance of this UID
        stored: InstanceRecord | None = None
        known: InstanceRecord | None = None
        if not self._places.rests_here(policy) or record.sealed.byte_count > _LOOK_FIRST:
            known = self._known(summary.sop_instance_uid)
        while True:
            if known is not None and known.sealed.object_key not in settled:
                settled[known.sealed.object_key] = self._compare(known, record, file, stored=stored, policy=policy)
            if stored is None and (known is None or settled[known.sealed.object_key] is not _Known.DUPLICATE):
                stored = self.put(record, file, study_key, policy)
            try:
                decision, known = self.write(
                    partial(self._decide, arrived=stored or record, settled=settled, stored=stored is not None, study_key=study_key),
                    study_key,
                )
            except ConflictingInstance as error:
                self._set_aside(stored or record, file, error, stored=stored is not None, study_key=study_key, policy=policy)
                raise
            if decision is _Decision.AGAIN:
                continue
            self._reach("index.committed")
            if decision is _Decision.DUPLICATE and stored is not None:
                self.drop(stored)
            elif decision is _Decision.HEALED and known is not None and settled[known.sealed.object_key] is _Known.HEALING:
                self.drop(known)
            if stored is not None and decision is not _Decision.DUPLICATE and not stored.landed_on:
                self._places.keep_copy(stored.sealed, file.path)
            return Receipt(
                outcome=Outcome.DUPLICATE if decision is _Decision.DUPLICATE else Outcome.STORED,
                sop_class_uid=summary.sop_class_uid,
                sop_instance_uid=summary.sop_instance_uid,
                study_instance_uid=summary.study_instance_uid,
                series_instance_uid=summary.series_instance_uid,
                sha256=summary.sha256,
            )

    def put(self, record: InstanceRecord, file: LandingFile, study_key: StudyKey, policy: Acknowledge) -> InstanceRecord:
        """Make the object durable as `policy` asks, the document of its study's key before it; return the record that says where it is."""
        if self._places.rests_here(policy):
            file.flush()  # what goes to a store at once is durable there, or nowhere
        self._reach("landing.flushed")
        try:
            if not study_key.stored:
                self._keep_key(study_key, policy)
            return self._places.put(record, file.path, policy)
        except Unavailable as error:
            if isinstance(error.__cause__, OSError):
                self._landing.failure(error.__cause__)  # remembers an input/output error
            raise

    def _keep_key(self, study_key: StudyKey, policy: Acknowledge) -> None:
        """Put the document of a study's key where the object goes, as the row has it now.

        What this process remembers may be from before a rotation: that document would replace the newer one that the row vouches for, and
        were this instance refused after that, nobody would put it right before the old wrapping key is retired. A rotation may be over
        before the document is in the store, too: so the row is read again, until it is as what was put.
        """
        name = document_name(study_key.id)
        if self._places.lands(policy):
            self._places.keep_document(name, self._study_keys.document(study_key), policy)
            return
        put = b""
        while True:
            try:
                study_key = self._study_keys.get(study_key.id)
            except IntegrityError as error:
                raise Unavailable("the keys of the study changed while this instance arrived (erased, perhaps): send it again") from error
            if study_key.wrapped == put or (study_key.stored and not put):
                return
            self._places.keep_document(name, self._study_keys.document(study_key), policy)
            put = study_key.wrapped

    def add_in(self, connection: Connection, record: InstanceRecord, study_key: StudyKey) -> None:
        """File an instance, or have its row where its object lies, with its study key; the Mover's job too if it landed."""
        self._study_keys.store_in(connection, study_key, stored=not record.landed_on)
        self._index.add(connection, record)
        self.enqueue_move_in(connection, record)

    def enqueue_move_in(self, connection: Connection, record: InstanceRecord) -> None:
        """Ask the Mover of the node where `record` landed to bring it into the store."""
        if record.landed_on:
            payload = {"object_key": record.sealed.object_key}
            job = NewJob(JobKind.ARCHIVE, record.summary.sop_instance_uid, payload=payload, home=record.landed_on)
            self._queue.enqueue(connection, job)

    def write(self, work: Callable[[Connection], T], *study_keys: StudyKey) -> T:
        """Run the transaction that files what was sealed under these keys. Failed, nobody knows whether they are in the table."""
        try:
            return self._database.write(work)
        except Unavailable:
            self._study_keys.doubt(study_keys)
            raise

    def drop(self, record: InstanceRecord) -> None:
        """Remove an object without a row. After a commit of unknown outcome nothing is dropped: the sweep asks the index."""
        try:
            if self._index.record_of_object(record.sealed.object_key) is not None:
                return  # a sweep took it for an orphan (of a node whose clock is ahead), and filed it
            self._places.delete(record)
        except StorageError as error:
            _log.warning("object.left", extra={"object_key": record.sealed.object_key, "reason": str(error)})

    def _decide(
        self, connection: Connection, *, arrived: InstanceRecord, settled: Mapping[str, _Known], stored: bool, study_key: StudyKey
    ) -> tuple[_Decision, InstanceRecord | None]:
        """Commit 1: decide what the instance is and write what follows, all in one transaction.

        AGAIN, with the archived instance of this UID, when that has to be compared first; it writes nothing. So does ConflictingInstance.
        """
        self._reach("index.begin")
        summary = arrived.summary
        known = self._index.find_in(connection, summary.sop_instance_uid)
        if known is None:
            if not stored:
                return _Decision.AGAIN, None
            self.add_in(connection, arrived, study_key)
            for job in self._jobs_for(summary, arrived.origin):
                self._queue.enqueue(connection, job if job.home == arrived.landed_on else replace(job, home=arrived.landed_on))
            self._audit.append(connection, event_of("instance.received", arrived, detail=_where(arrived)))
            self._reach("index.written")
            return _Decision.STORED, None
        relation = settled.get(known.sealed.object_key)
        if relation is None or (relation is not _Known.DUPLICATE and not stored):
            return _Decision.AGAIN, known
        if relation is _Known.DUPLICATE:
            self._audit.append(connection, event_of("instance.duplicate", arrived))
            return _Decision.DUPLICATE, known
        if relation in (_Known.HEALING, _Known.BESIDE):
            self._study_keys.store_in(connection, study_key, stored=not arrived.landed_on)
            self._index.replace_object(connection, known.sealed.object_key, arrived.sealed, landed_on=arrived.landed_on)
            self._queue.rehome(connection, summary.sop_instance_uid, home=arrived.landed_on)
            self._queue.revive_in(connection, summary.sop_instance_uid)
            self.enqueue_move_in(connection, arrived)
            detail = {"replaced_object_key": known.sealed.object_key, **_where(arrived)}
            self._audit.append(connection, event_of("instance.healed", arrived, detail=detail))
            return _Decision.HEALED, known
        fate = "is kept in quarantine; an operator decides" if self._on_conflict == "quarantine" else "was dropped, as configured"
        raise ConflictingInstance(f"an instance of this SOP Instance UID and other content is archived; this one {fate}")

    def _set_aside(
        self,
        record: InstanceRecord,
        file: LandingFile,
        conflict: ConflictingInstance,
        *,
        stored: bool,
        study_key: StudyKey,
        policy: Acknowledge,
    ) -> None:
        """Keep a conflicting instance in quarantine, or drop it, as configured. The archived one is not touched."""
        if self._on_conflict == "refuse":
            if stored:
                self.drop(record)
            return
        kept = record if stored else self.put(record, file, study_key, policy)

        def work(connection: Connection) -> bool:
            self._study_keys.store_in(connection, study_key, stored=not kept.landed_on)
            new = self._index.quarantine(connection, kept, str(conflict))
            if new:
                self.enqueue_move_in(connection, kept)
            self._audit.append(connection, event_of("instance.quarantined", kept, outcome=str(conflict)))
            return new

        if not self.write(work, study_key):
            self.drop(kept)  # the same content is kept already: a sender that tries again

    def _known(self, sop_instance_uid: str) -> InstanceRecord | None:
        with self._database.read() as connection:
            return self._index.find_in(connection, sop_instance_uid)

    def _compare(
        self, known: InstanceRecord, record: InstanceRecord, file: LandingFile, *, stored: InstanceRecord | None, policy: Acknowledge
    ) -> _Known:
        """Tell how `record` stands to `known`. Success for a duplicate says that a good copy is here, so that copy is read again."""
        if known.summary.sha256 != record.summary.sha256:
            return _Known.DUPLICATE if self._same_picture(known, record, file, stored=stored) else _Known.OTHER
        try:
            self._places.require_whole(known, thaw=False)
        except (InstanceNotFound, IntegrityError) as error:
            _log.error("object.damaged", extra={"object_key": known.sealed.object_key, "reason": str(error)})
            return _Known.HEALING
        except ColdObject:
            return _Known.DUPLICATE  # in its length: the store vouches for what it put away
        except Unavailable:
            if known.landed_on or self._places.lands(policy):
                return _Known.BESIDE  # another node's promise, or a store that is away: this node makes a promise of its own
            raise
        return _Known.DUPLICATE

    def _same_picture(self, known: InstanceRecord, record: InstanceRecord, file: LandingFile, *, stored: InstanceRecord | None) -> bool:
        if (
            self._pixels_equal is None
            or known.summary.transfer_syntax_uid == record.summary.transfer_syntax_uid
            or max(known.summary.byte_count, record.summary.byte_count) > self._comparison_bytes
        ):
            return False

        def passed_on(_record: InstanceRecord, _error: IntegrityError) -> None:
            """Raise no alarm here: the sender's answer and the scrub do."""

        try:
            self._places.require_whole(known)  # what is read below may be a cached copy
            with StoredInstance(known, self._places.open(known), self._study_keys, passed_on) as archived:
                first = b"".join(archived.part10())
        except (InstanceNotFound, IntegrityError, LostObject) as error:
            _log.error("object.damaged", extra={"object_key": known.sealed.object_key, "reason": str(error)})
            return False
        reader = self._places.open(stored) if stored is not None else file.reader()
        with StoredInstance(record, reader, self._study_keys, passed_on) as arrived:
            second = b"".join(arrived.part10())
        return same_picture(first, second, self._pixels_equal)


def _where(record: InstanceRecord) -> dict[str, str]:
    return {"acknowledged": "land", "landed_on": record.landed_on} if record.landed_on else {"acknowledged": "archive"}


def actor_of(origin: Origin) -> str:
    """Return who did it, for the audit trail."""
    return origin.peer or origin.calling_ae_title or origin.address or origin.door


def whence(origin: Origin) -> dict[str, str]:
    """Return through which door, from where and by which user, for the detail of an audit record."""
    return {"door": origin.door, "address": origin.address, **({"user": origin.user} if origin.user else {})}


def event_of(action: str, record: InstanceRecord, *, outcome: str = "success", detail: Mapping[str, Any] | None = None) -> AuditEvent:
    """Return the audit record of something that happened to an instance."""
    summary, origin = record.summary, record.origin
    return AuditEvent(
        action=action,
        outcome=outcome,
        actor=actor_of(origin),
        subject=summary.sop_instance_uid,
        detail={
            **whence(origin),
            "calling_ae_title": origin.calling_ae_title,
            "study_instance_uid": summary.study_instance_uid,
            "sha256": summary.sha256,
            "object_key": record.sealed.object_key,
            "byte_count": summary.byte_count,
            **(detail or {}),
        },
    )
