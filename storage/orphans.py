"""Orphans: objects in store or spool that no row names, and documents of keys that no row knows.

A crash leaves some: an object that was put and not committed. But a database restored from a backup makes orphans of what was archived
since, and that was acknowledged. So an orphan is asked what it is (`storage.testimony`) before anything is done:

============================================  ==============================================================
its study was erased, or it was dropped       deleted
no key opens it, in table, store or spool     deleted: it was never admitted, or its study was erased; in a spool: left, unless erased
its instance is archived, whole, and equal    deleted: a copy too many
its instance is archived, equal, not whole    it takes the place of the damaged object
its instance is on a node's disk alone        it takes its place, if it is equal and in the store
its instance was lost with its node           it takes its place, if it is equal
its instance is archived with other content   set aside in quarantine
it has a mark of the quarantine               set aside again, as the mark says
nobody knows its instance                     **adopted**: filed and analysed like one that arrived
a report whose analysis is still to be done   deleted: the analysis brings it again (adopted, after a restore)
it is damaged, or cannot be judged now        left, and counted
============================================  ==============================================================
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import delete, select

from storage.admission import event_of
from storage.database import to_micros, utc_now
from storage.erasure import all_erased_keys, erased_keys
from storage.errors import ColdObject, InstanceNotFound, IntegrityError, LostObject, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.quarantine import Mark, Marks
from storage.records import InstanceRecord, JobKind, JobState, NewJob, ReportRecord
from storage.scrub import Unread
from storage.study_keys import STUDY_KEYS, document_name
from storage.testimony import KeyRing, NoStudyKey, Testimony, hear
from storage.work import JOBS

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import Index
    from storage.objects import DirectoryStore, ObjectStore
    from storage.places import Places
    from storage.records import Origin, Summary
    from storage.study_keys import StudyKeys
    from storage.work import WorkQueue

GRACE = timedelta(hours=24)
"""Younger objects may be on their way in."""
_PAGE = 500
_AT_ONCE = 8
_log = logging.getLogger(__name__)

_LEFT = (InstanceNotFound, IntegrityError, ColdObject)
"""Errors that tell of one orphan. Unavailable may: twenty in a row end the sweep."""

Fate = Literal["deleted", "adopted", "healed", "quarantined", "waiting", "unreadable"]


@dataclass(slots=True)
class Swept:
    """What a sweep did with how many."""

    deleted: int = 0
    adopted: int = 0
    healed: int = 0
    quarantined: int = 0
    waiting: int = 0
    """Cannot be judged now: store away, cold, or on another node's disk; a report whose source is not here."""
    unreadable: int = 0
    """Damaged, or the ring does not open their key."""
    documents: int = 0
    """Documents of keys that were deleted."""

    @property
    def settled(self) -> int:
        """How many orphans are none any more."""
        return self.deleted + self.adopted + self.healed + self.quarantined

    def note(self, fate: Fate | None) -> None:
        """Count one; None: it is no orphan any more."""
        if fate is not None:
            setattr(self, fate, getattr(self, fate) + 1)

    def __str__(self) -> str:
        """Say it for people."""
        return ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))


@dataclass(frozen=True, slots=True)
class _Orphan:
    """An orphan that could be read."""

    object_key: str
    in_spool: bool
    is_report: bool
    received_at: int
    """Microseconds since 1970."""
    analysed: str = ""
    """Of a summary: what it was made from."""
    mark: Mark | None = None
    """It was set aside, by an operator or for what was there first."""


class _Found:
    """What a sweep found, to be taken in in its order: sources first, each as it was received.

    After an old restore that is the whole archive, so about 70 bytes are kept of each, and as many again of each that was analysed.
    """

    def __init__(self) -> None:
        self._sources: list[bytes] = []
        self._reports: list[bytes] = []
        self._analysed: set[bytes] = set()
        self._marks: dict[str, Mark] = {}

    def add(self, orphan: _Orphan) -> None:
        """Keep one."""
        told = max(0, orphan.received_at).to_bytes(8, "big") + bytes.fromhex(orphan.object_key)
        (self._reports if orphan.is_report else self._sources).append(told)
        if orphan.mark is not None:
            self._marks[orphan.object_key] = orphan.mark
        elif orphan.analysed:
            self._analysed.add(_digest(orphan.analysed))

    def taken(self, *, in_spool: bool, reports: bool) -> Iterator[_Orphan]:
        """Give sources or reports in their order."""
        found = self._reports if reports else self._sources
        found.sort()
        for told in found:
            object_key = told[8:].hex()
            yield _Orphan(object_key, in_spool, reports, int.from_bytes(told[:8], "big"), mark=self._marks.get(object_key))

    def was_analysed(self, sop_instance_uid: str) -> bool:
        """Tell whether a summary of this instance was found."""
        return _digest(sop_instance_uid) in self._analysed


def _digest(uid: str) -> bytes:
    return hashlib.blake2b(uid.encode(), digest_size=16).digest()


class Orphans:
    """Finds orphans and decides about them.

    Parameters
    ----------
    database, index, queue, audit, study_keys, places
        The parts it ties together.
    jobs_for
        As `storage.archive.Archive`.
    follow_marks
        `storage.quarantine.Quarantine.follow_marks`: called when instances are settled, and reports are not yet.
    reach
        Failpoint orphan.judged.
    clock
        Time of day.
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
        jobs_for: Callable[[Summary, Origin], Sequence[NewJob]],
        follow_marks: Callable[[], object] = lambda: None,
        reach: Callable[[str], None] = unarmed,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._study_keys = study_keys
        self._places = places
        self._jobs_for = jobs_for
        self._follow_marks = follow_marks
        self._reach = reach
        self._clock = clock

    def sweep(self, *, grace: timedelta = GRACE, restored: bool = False, pace: Callable[[int], object] = lambda _: None) -> Swept:
        """Decide about every orphan of the store that is older than `grace`, then about documents of keys.

        Parameters
        ----------
        restored
            The database was restored from a backup, and nothing else runs: reports are taken in though their analysis seems to be undone.
        pace
            Told how many bytes were read, now and then 0; may wait, and may raise to stop the sweep, which then begins anew.

        Raises
        ------
        Unavailable
            Store or database cannot be read; what was decided stays so. One object that cannot be read is *waiting*, and the sweep goes on.
        """
        swept = Swept()
        before = self._clock() - grace
        old = (info.object_key for info in self._places.store.list() if info.modified_at < before)
        keys = KeyRing(self._study_keys, self._stores())
        self._sweep_objects(old, keys, swept, in_spool=False, restored=restored, pace=pace)
        self._sweep_documents(before, keys, swept, pace, unneeded=not restored)
        return swept

    def sweep_spool(self, *, grace: timedelta = GRACE, restored: bool = False, pace: Callable[[int], object] = lambda _: None) -> Swept:
        """As `sweep`, of what lies in this node's spool and no row says so; what is in the store already goes."""
        swept = Swept()
        spool = self._places.spool
        if spool is not None:
            before = self._clock() - grace
            keys = KeyRing(self._study_keys, self._stores())
            old = (info.object_key for info in spool.list() if info.modified_at < before)
            self._sweep_objects(old, keys, swept, in_spool=True, restored=restored, pace=pace)
            self._sweep_spool_documents(spool, before, keys, swept)
            spool.clean_uploads(before)
        return swept

    def _stores(self) -> list[ObjectStore]:
        return [self._places.store, *([self._places.spool] if self._places.spool is not None else [])]

    # -- objects -----------------------------------------------------------------------------------------------------------------

    def _sweep_objects(
        self, object_keys: Iterator[str], keys: KeyRing, swept: Swept, *, in_spool: bool, restored: bool, pace: Callable[[int], object]
    ) -> None:
        found = _Found()
        unread = Unread()
        marks = cache(partial(Marks, self._places.store))
        erased = cache(partial(all_erased_keys, self._database))
        with ThreadPoolExecutor(_AT_ONCE if self._places.remote else 1, "orphans") as pool:
            while page := list(islice(object_keys, _PAGE)):
                pace(0)
                orphans = self._without_row(page, in_spool=in_spool)
                look = partial(self._look, keys=keys, marks=marks, erased=erased, in_spool=in_spool, restored=restored)
                for object_key, (seen, orphan) in zip(orphans, pool.map(look, orphans), strict=True):
                    swept.note(_noted(unread, object_key, seen))
                    if orphan is not None:
                        found.add(orphan)
        for reports in (False, True):
            self._settle_all(found.taken(in_spool=in_spool, reports=reports), keys, found, swept, unread, restored=restored, pace=pace)
            if not in_spool and not reports:
                self._follow_marks()  # before a report finds the instance of its source's UID

    def _settle_all(
        self,
        orphans: Iterable[_Orphan],
        keys: KeyRing,
        found: _Found,
        swept: Swept,
        unread: Unread,
        *,
        restored: bool,
        pace: Callable[[int], object],
    ) -> None:
        for orphan in orphans:
            self._reach("orphan.judged")
            judged: Fate | Unavailable | None
            try:
                judged = self._settle(orphan, keys, found, restored=restored, pace=pace)
            except _LEFT as error:
                judged = _left(orphan.object_key, error)
            except Unavailable as error:
                judged = error
            swept.note(_noted(unread, orphan.object_key, judged))

    def _without_row(self, object_keys: list[str], *, in_spool: bool) -> list[str]:
        known = self._index.known_objects(object_keys)
        if in_spool:
            for object_key in sorted(known):
                record = self._index.record_of_object(object_key)
                if record is not None and not record.landed_on:
                    self._places.settle(record.sealed)  # brought into the store; the Mover died before it tidied up
        return [object_key for object_key in object_keys if object_key not in known]

    def _look(
        self, object_key: str, *, keys: KeyRing, marks: Callable[[], Marks], erased: Callable[[], set[str]], in_spool: bool, restored: bool
    ) -> tuple[Fate | Unavailable | None, _Orphan | None]:
        """Read an orphan's record; what nobody can open is done with. Unavailable is handed back."""
        try:
            try:
                heard = self._hear(object_key, keys, in_spool=in_spool, told_sha256=lambda: "-")
                mark = marks().of(object_key)
            except NoStudyKey as error:
                if restored or keys.listed(error.study_key_id):
                    return "waiting", None  # table or documents may be older than they should be, or the store was wrong about one of them
                if in_spool and error.study_key_id not in erased():
                    return "waiting", None  # it was acknowledged, perhaps, and its key may come back with another backup
                _log.warning("orphan.without_key", extra={"object_key": object_key, "study_key_id": error.study_key_id})
                self._delete(object_key, in_spool=in_spool)
                return "deleted", None
        except _LEFT as error:
            return _left(object_key, error), None
        except Unavailable as error:
            return error, None
        analysed = str(heard.report["source_sop_instance_uid"]) if heard.report is not None and heard.report["kind"] == "summary" else ""
        return None, _Orphan(object_key, in_spool, heard.report is not None, to_micros(heard.record.origin.received_at), analysed, mark)

    def _hear(
        self,
        object_key: str,
        keys: KeyRing,
        *,
        in_spool: bool,
        told_sha256: Callable[[], str] | None = None,
        pace: Callable[[int], object] = lambda _: None,
    ) -> Testimony:
        store = self._places.spool if in_spool and self._places.spool is not None else self._places.store
        if store.stat(object_key).cold:
            raise ColdObject(f"object {object_key} lies in a cold class; it is judged when it was restored")
        reader = store.open(object_key)
        try:
            return hear(reader, object_key, keys, told_sha256=told_sha256, read=pace)
        finally:
            reader.close()

    def _settle(self, orphan: _Orphan, keys: KeyRing, found: _Found, *, restored: bool, pace: Callable[[int], object]) -> Fate | None:
        """Decide about one orphan, which is read whole before."""
        heard = self._hear(orphan.object_key, keys, in_spool=orphan.in_spool, pace=pace)
        record = replace(heard.record, landed_on=self._places.node_id if orphan.in_spool else "")
        if self._was_erased(record, heard.study_key.id):
            self._delete(orphan.object_key, in_spool=orphan.in_spool)
            return "deleted"
        known = self._known(record.summary.sop_instance_uid)
        whole = known is None or known.summary.sha256 != record.summary.sha256 or self._whole(known, orphan)
        if whole is None:
            return "waiting"
        if orphan.mark is None and heard.report is not None and known is None and not restored and self._analysis_waits(heard.report):
            self._delete(orphan.object_key, in_spool=orphan.in_spool)
            return "deleted"
        fate = self._database.write(
            partial(
                self._settle_in,
                record=record,
                heard=heard,
                mark=orphan.mark,
                judged=known,
                whole=whole,
                analysed=found.was_analysed(record.summary.sop_instance_uid),
                restored=restored,
            )
        )
        if fate == "deleted":
            self._delete(orphan.object_key, in_spool=orphan.in_spool)
        elif fate == "healed" and known is not None:
            self._discard(known)
        return fate

    def _settle_in(
        self,
        connection: Connection,
        *,
        record: InstanceRecord,
        heard: Testimony,
        mark: Mark | None,
        judged: InstanceRecord | None,
        whole: bool,
        analysed: bool,
        restored: bool,
    ) -> Fate | None:
        summary = record.summary
        if self._index.record_of_object_in(connection, record.sealed.object_key) is not None:
            return None  # it was on its way in after all
        known = self._index.find_in(connection, summary.sop_instance_uid)
        if (known and known.sealed.object_key) != (judged and judged.sealed.object_key):
            return "waiting"  # something changed since it was judged: the next sweep judges anew
        if known is not None and known.summary.sha256 == summary.sha256:
            if whole:
                return "deleted"
            self._study_keys.restore_in(connection, heard.study_key, stored=heard.study_key.stored)
            self._index.replace_object(connection, known.sealed.object_key, record.sealed, landed_on=record.landed_on)
            self._queue.rehome(connection, summary.sop_instance_uid, home=record.landed_on)
            self._move_in(connection, record)
            detail = {"replaced_object_key": known.sealed.object_key, "by": "an object that no row named"}
            self._audit.append(connection, event_of("instance.healed", record, detail=detail))
            return "healed"  # a mark stays with it: by it the decision is followed as soon as the accepted one is found
        if mark is not None:
            return self._set_aside_in(connection, record, heard, mark.reason, at=mark.quarantined_at)
        if known is not None:
            return self._set_aside_in(connection, record, heard, "another instance of this SOP Instance UID is archived")
        if heard.report is not None and self._index.find_in(connection, str(heard.report["source_sop_instance_uid"])) is None:
            return "waiting"
        conflict = self._index.conflict_in(connection, record)
        if conflict:
            return self._set_aside_in(connection, record, heard, conflict)
        self._study_keys.restore_in(connection, heard.study_key, stored=heard.study_key.stored)
        self._index.add(connection, record)
        self._move_in(connection, record)
        if heard.report is not None:
            self._adopt_report_in(connection, record, heard.report, restored=restored)
        elif not analysed:
            for job in self._jobs_for(summary, record.origin):
                self._queue.enqueue(connection, replace(job, home=record.landed_on))
        self._audit.append(connection, event_of("instance.adopted", record))
        return "adopted"

    def _adopt_report_in(self, connection: Connection, record: InstanceRecord, report: Mapping[str, Any], *, restored: bool) -> None:
        source = str(report["source_sop_instance_uid"])
        uid = record.summary.sop_instance_uid
        self._index.add_report(connection, ReportRecord(uid, source, str(report["kind"]), dict(report["models"])))
        for peer in report["deliver_to"]:
            self._queue.enqueue(connection, NewJob(JobKind.DELIVER, uid, lane=str(peer), home=record.landed_on))
        if restored and report["kind"] == "summary":
            undone = (JobState.READY.value, JobState.CLAIMED.value)
            connection.execute(
                delete(JOBS).where(JOBS.c.sop_instance_uid == source, JOBS.c.kind == JobKind.ANALYSE.value, JOBS.c.state.in_(undone))
            )

    def _set_aside_in(
        self, connection: Connection, record: InstanceRecord, heard: Testimony, reason: str, *, at: datetime | None = None
    ) -> Fate:
        if not self._index.quarantine(connection, record, reason, at=at):
            return "deleted"  # the same content is in quarantine already
        self._study_keys.restore_in(connection, heard.study_key, stored=heard.study_key.stored)
        self._move_in(connection, record)
        self._audit.append(connection, event_of("instance.quarantined", record, outcome=reason))
        return "quarantined"

    def _move_in(self, connection: Connection, record: InstanceRecord) -> None:
        if record.landed_on:
            payload = {"object_key": record.sealed.object_key}
            job = NewJob(JobKind.ARCHIVE, record.summary.sop_instance_uid, payload=payload, home=record.landed_on)
            self._queue.enqueue_again(connection, job)  # that of a former row of this object is done perhaps

    # -- what is known -----------------------------------------------------------------------------------------------------------

    def _known(self, sop_instance_uid: str) -> InstanceRecord | None:
        with self._database.read() as connection:
            return self._index.find_in(connection, sop_instance_uid)

    def _whole(self, known: InstanceRecord, orphan: _Orphan) -> bool | None:
        """Tell whether the archived object is as good as the orphan; None when that cannot be said now."""
        if known.landed_on and not orphan.in_spool:
            return False  # it lies on one disk alone, perhaps of a node that is lost; this one lies in the store
        try:
            self._places.require_whole(known, thaw=False)  # beside a cold one the orphan waits; it costs less than a restore
        except (InstanceNotFound, IntegrityError, LostObject):
            return False  # lost with its node: nobody else has it any more
        except Unavailable:
            return None
        return True

    def _analysis_waits(self, report: Mapping[str, Any]) -> bool:
        jobs = self._queue.jobs_of(str(report["source_sop_instance_uid"]))
        return any(job.kind is JobKind.ANALYSE and job.state in (JobState.READY, JobState.CLAIMED) for job in jobs)

    def _was_erased(self, record: InstanceRecord, study_key_id: str) -> bool:
        """Ask the audit trail whether this very object, the key of its study, or the study after it came, was erased here."""
        study_instance_uid = record.summary.study_instance_uid
        if study_key_id in (erased_keys(self._audit, study_instance_uid) or ()):
            return True
        # Under a key that never came into the table: whoever made it died before its commit.
        if any(
            entry.event.action == "study.erased" and entry.at > record.origin.received_at
            for entry in self._audit.events_of(study_instance_uid)
        ):
            return True
        return any(
            entry.event.action == "quarantine.dropped" and entry.event.detail.get("object_key") == record.sealed.object_key
            for entry in self._audit.events_of(record.summary.sop_instance_uid)
        )

    def _delete(self, object_key: str, *, in_spool: bool) -> None:
        if in_spool and self._places.spool is not None:
            self._places.spool.delete(object_key)
        else:
            self._places.store.delete(object_key)

    def _discard(self, known: InstanceRecord) -> None:
        """Delete the damaged object that was replaced."""
        try:
            self._places.delete(known)
        except StorageError as error:
            _log.warning("object.left", extra={"object_key": known.sealed.object_key, "reason": str(error)})

    # -- documents of keys -------------------------------------------------------------------------------------------------------

    def _sweep_documents(self, before: datetime, keys: KeyRing, swept: Swept, pace: Callable[[int], object], *, unneeded: bool) -> None:
        """Delete documents of keys that were erased; if `unneeded`, old ones too that neither a row knows nor an object needs.

        From a store that several nodes share those never go: the spool of another node, which nobody sees here, may hold an acknowledged
        instance that a restored database does not know, and that only this document opens.
        """
        store = self._places.store
        unneeded = unneeded and not self._places.remote
        candidates: list[str] = []
        names = store.list_documents("keys/")
        while page := [name.rpartition("/")[2] for name in islice(names, _PAGE)]:
            pace(0)
            known = self._study_keys.known(page)
            candidates += [study_key_id for study_key_id in page if study_key_id not in known]
        needed: set[str] | None = None
        erased = all_erased_keys(self._database) if candidates else set()
        unread = Unread()
        for study_key_id in candidates:
            if study_key_id not in erased:  # else it goes unread: a store may have spoilt it, and its objects wait for that
                try:
                    key = self._study_keys.from_document(store.get_document(document_name(study_key_id)))
                except InstanceNotFound:
                    continue
                except IntegrityError as error:
                    _log.error("study_key.document_unreadable", extra={"study_key_id": study_key_id, "reason": str(error)})
                    swept.unreadable += 1
                    continue
                except Unavailable as error:
                    unread.note(document_name(study_key_id), error)
                    swept.waiting += 1
                    continue
                unread.over()
                if not unneeded or key.created_at >= before:
                    continue
                if needed is None:
                    needed = self._needed_keys(keys, in_spool=False)
                    landed = self._needed_keys(keys, in_spool=True)
                    needed = None if needed is None or landed is None else needed | landed
                if needed is None or study_key_id in needed:
                    continue
            if not self._study_keys.known([study_key_id]):
                store.delete_document(document_name(study_key_id))
                swept.documents += 1

    def _sweep_spool_documents(self, spool: DirectoryStore, before: datetime, keys: KeyRing, swept: Swept) -> None:
        """Delete documents of keys that are in the store by now, that were erased, or that neither a row knows nor an object needs."""
        needed: set[str] | None = None
        names = spool.list_documents("keys/")
        while page := [name.rpartition("/")[2] for name in islice(names, _PAGE)]:
            with self._database.read() as connection:
                rows = connection.execute(select(STUDY_KEYS.c.id, STUDY_KEYS.c.stored).where(STUDY_KEYS.c.id.in_(page)))
                stored = {row.id: row.stored == 1 for row in rows}
            for study_key_id in page:
                name = document_name(study_key_id)
                over = stored.get(study_key_id, False)
                if study_key_id not in stored:
                    age = self._age(spool, name, before)
                    if age == "old":
                        # asked now, for each that is old: younger objects, not adopted yet, may need it
                        needed = self._needed_keys(keys, in_spool=True) if needed is None else needed
                        if needed is None:
                            return
                    over = age == "erased" or (age == "old" and needed is not None and study_key_id not in needed)
                if over:
                    spool.delete_document(name)
                    swept.documents += 1

    def _age(self, spool: DirectoryStore, name: str, before: datetime) -> Literal["erased", "old", "young"]:
        """Tell of a key without a row whether it was erased, or how old it is; one that cannot be read is kept, as a young one is."""
        try:
            key = self._study_keys.from_document(spool.get_document(name))
        except (InstanceNotFound, IntegrityError, Unavailable) as error:
            _log.warning("study_key.document_unreadable", extra={"study_key_id": name.rpartition("/")[2], "reason": str(error)})
            return "young"
        if key.id in (erased_keys(self._audit, key.study_instance_uid) or ()):
            return "erased"
        return "old" if key.created_at < before else "young"

    def _needed_keys(self, keys: KeyRing, *, in_spool: bool) -> set[str] | None:
        """Return the keys of all objects without a row that are still there, young ones too; None when one does not say."""
        needed: set[str] = set()
        place = self._places.spool if in_spool else self._places.store
        everything = (info.object_key for info in place.list()) if place is not None else iter(())
        while page := list(islice(everything, _PAGE)):
            for object_key in self._without_row(page, in_spool=in_spool):
                try:
                    needed.add(self._hear(object_key, keys, in_spool=in_spool, told_sha256=lambda: "-").study_key.id)
                except (NoStudyKey, InstanceNotFound):
                    continue
                except (IntegrityError, Unavailable) as error:
                    _log.warning("orphan.waiting", extra={"object_key": object_key, "reason": str(error)})
                    return None
        return needed


def _noted(unread: Unread, object_key: str, seen: Fate | Unavailable | None) -> Fate | None:
    """Return what became of an orphan, one that cannot be read now waits; raises when so many in a row could not."""
    if isinstance(seen, Unavailable):
        unread.note(object_key, seen)
        return "waiting"
    unread.over()
    return seen


def _left(object_key: str, error: StorageError) -> Fate | None:
    """Say what becomes of an orphan that cannot be judged: it stays where it is. None: it is gone meanwhile."""
    if isinstance(error, InstanceNotFound):
        return None
    fate: Fate = "waiting" if isinstance(error, ColdObject) else "unreadable"
    _log.warning(f"orphan.{fate}", extra={"object_key": object_key, "reason": str(error)})
    return fate
