"""Reindex: the whole index from the bucket alone, given the ring.

Four passes, each resumable: a run that was killed is started again and goes on. What is known so far is kept in a table of its own beside
the others (encrypted with them, dropped at the end), so that memory does not grow with the archive.

1. the documents of keys: the table of study keys;
2. the footers of all objects, many at a time: a large object is not read but for its ends when the store tells its digest;
3. filing, in the order in which the instances were received: the first names patient, study and series. What was set aside is marked in
   the store (`storage.quarantine`); of two that contradict each other without a mark the earlier one was archived;
4. reports are linked with their sources; what has no report is analysed.

What the store does not hold does not come back: audit trail, legal holds, change feed subscribers, state of deliveries. The trail begins
anew with ``archive.reindexed``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Integer, MetaData, Row, Table, Text, bindparam, exists, func, insert, inspect, select, update

from storage.actor import operator
from storage.database import from_micros, to_micros
from storage.database_name import name_of
from storage.errors import InstanceNotFound, IntegrityError, KeyNotHere, Unavailable
from storage.failpoints import unarmed
from storage.intake import footer_to_record, record_to_footer
from storage.quarantine import Marks
from storage.records import AuditEvent, InstanceRecord, JobKind, NewJob, ReportRecord, SealedObject
from storage.study_keys import document_name
from storage.tables import INSTANCES, QUARANTINE, REPORTS, STUDIES
from storage.testimony import KeyRing, NoStudyKey, hear

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import Index
    from storage.objects import ObjectStore
    from storage.places import Places
    from storage.records import Origin, Summary
    from storage.study_keys import StudyKey, StudyKeys
    from storage.work import WorkQueue

Progress = Callable[[str, int, int | None], object]
"""Told the pass, how many are done, and of how many (None: not known)."""

HEARD = Table(
    "reindex_heard",
    MetaData(),  # not one of the node's tables: it exists while a reindex is under way
    Column("object_key", Text, primary_key=True),
    Column("received_at", BigInteger, nullable=False, index=True),
    Column("landed_on", Text, nullable=False),
    Column("sealed_byte_count", BigInteger, nullable=False),
    Column("sealed_sha256", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("reason", Text, nullable=False),  # set aside: why and since when
    Column("quarantined_at", BigInteger),
    Column("footer", Text, nullable=False),
    Column("state", Integer, nullable=False),  # HEARD, FILED, LINKED
)
_STATE_HEARD, _STATE_FILED, _STATE_LINKED = 0, 1, 2
_PAGE = 250
_AT_ONCE = 16
_KEYS = 50_000
"""Study keys that are remembered meanwhile: objects come in no order, and to open a key may be a call of the key service."""
_NEXT = select(HEARD).where(HEARD.c.state == _STATE_HEARD).order_by(HEARD.c.received_at, HEARD.c.object_key).limit(_PAGE).with_for_update()
_NEXT_LINK = (
    select(HEARD).where(HEARD.c.state == _STATE_FILED, HEARD.c.object_key > bindparam("after")).order_by(HEARD.c.object_key).limit(_PAGE)
)
_SET_STATE = update(HEARD).where(HEARD.c.object_key == bindparam("key_")).values(state=bindparam("state_"))
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reindexed:
    """What was found."""

    objects: int = 0
    study_keys: int = 0
    instances: int = 0
    reports: int = 0
    quarantined: int = 0
    copies: int = 0
    """Objects of an instance that another object has too: the orphan sweep deletes them."""
    without_key: int = 0
    """Objects that no key opens: their study was erased, or its keys are lost."""
    unreadable: int = 0
    """Damaged objects and documents; the log names them."""
    unlinked: int = 0
    """Reports whose source is not here."""
    analyses: int = 0
    """Instances that will be analysed."""
    deliveries: int = 0

    def __str__(self) -> str:
        """Say it for people."""
        return ", ".join(f"{getattr(self, field.name)} {field.name.replace('_', ' ')}" for field in fields(self))


class Reindex:
    """Fills an empty, migrated database; nothing else may use database or store meanwhile.

    Parameters
    ----------
    database, index, queue, audit, study_keys, places
        The parts it ties together.
    jobs_for
        As `storage.archive.Archive`.
    deliver
        Have every report delivered again to whom it was meant for: what was delivered already nobody knows.
    reach
        Failpoints reindex.keys, reindex.heard, reindex.filed, reindex.linked.
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
        deliver: bool = False,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._study_keys = study_keys
        self._places = places
        self._jobs_for = jobs_for
        self._deliver = deliver
        self._reach = reach

    def run(self, progress: Progress = lambda _pass, _done, _total: None) -> Reindexed:
        """Rebuild the index.

        Raises
        ------
        Unavailable
            The database is not empty (and no reindex was begun in it); database, store, ring or key service is away: run it again.
        """
        found = Reindexed()
        self._begin()
        self._restore_keys(found, progress)
        self._hear_all(found, progress)
        total = self._count()
        found.objects = total
        self._file_all(progress, total)
        self._link_all(found, progress, total)
        self._analyse_all(found, progress)
        self._end(found)
        return found

    # -- begin and end -----------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        def work(connection: Connection) -> None:
            if inspect(connection).has_table(HEARD.name):
                return
            for table in (INSTANCES, QUARANTINE, STUDIES):
                if connection.execute(select(table.c.id).limit(1)).first() is not None:
                    sqlite = connection.dialect.name == "sqlite"
                    remedy = "move that file aside" if sqlite else "name an empty database in database.url"
                    raise Unavailable(
                        f"the index is not empty: {name_of(connection)} holds instances, and reindex fills a new one. With no node "
                        f"running, {remedy} (keep the old one: audit trail and legal holds are in it alone), then reindex again"
                    )
            HEARD.create(connection)

        self._database.write(work)

    def _end(self, found: Reindexed) -> None:
        def work(connection: Connection) -> None:
            for name, table in (("instances", INSTANCES), ("reports", REPORTS), ("quarantined", QUARANTINE)):
                setattr(found, name, connection.execute(select(func.count()).select_from(table)).scalar_one())
            filed = (
                select(func.count())
                .select_from(HEARD)
                .where(
                    ~exists().where(INSTANCES.c.object_key == HEARD.c.object_key),
                    ~exists().where(QUARANTINE.c.object_key == HEARD.c.object_key),
                )
            )
            found.copies = connection.execute(filed).scalar_one()
            self._audit.append(
                connection, AuditEvent(action="archive.reindexed", outcome="success", actor=operator(), detail=asdict(found))
            )
            HEARD.drop(connection)

        self._database.write(work)

    def _count(self) -> int:
        with self._database.read() as connection:
            return int(connection.execute(select(func.count()).select_from(HEARD)).scalar_one())

    # -- pass 1: keys ------------------------------------------------------------------------------------------------------------

    def _restore_keys(self, found: Reindexed, progress: Progress) -> None:
        with ThreadPoolExecutor(_AT_ONCE, "reindex") as pool:
            for store, stored in self._stores():
                names = store.list_documents("keys/")
                while page := [name.rpartition("/")[2] for name in islice(names, _PAGE)]:
                    known = self._study_keys.known(page)
                    found.study_keys += len(known) if stored else 0
                    keys = list(pool.map(partial(self._key, store), [key_id for key_id in page if key_id not in known]))
                    good = [key for key in keys if key is not None]
                    found.unreadable += len(keys) - len(good)
                    self._database.write(partial(self._restore_keys_in, keys=good, stored=stored))
                    found.study_keys += len(good)
                    self._reach("reindex.keys")
                    progress("keys", found.study_keys, None)

    def _stores(self) -> list[tuple[ObjectStore, bool]]:
        spool = self._places.spool
        return [(self._places.store, True), *([(spool, False)] if spool is not None else [])]

    def _key(self, store: ObjectStore, study_key_id: str) -> StudyKey | None:
        try:
            return self._study_keys.from_document(store.get_document(document_name(study_key_id)))
        except (IntegrityError, InstanceNotFound, KeyNotHere) as error:
            _log.error("study_key.document_unreadable", extra={"study_key_id": study_key_id, "reason": str(error)})
            return None

    def _restore_keys_in(self, connection: Connection, *, keys: list[StudyKey], stored: bool) -> None:
        for key in keys:
            self._study_keys.restore_in(connection, key, stored=stored)

    # -- pass 2: footers ---------------------------------------------------------------------------------------------------------

    def _hear_all(self, found: Reindexed, progress: Progress) -> None:
        keys = KeyRing(self._study_keys, [], remembered=_KEYS)
        marks = Marks(self._places.store)
        done = 0
        with ThreadPoolExecutor(_AT_ONCE, "reindex") as pool:
            for store, landed_on in (
                (self._places.store, ""),
                *([(self._places.spool, self._places.node_id)] if self._places.spool else []),
            ):
                listed = store.list()
                while page := list(islice(listed, _PAGE)):
                    new = self._unheard([info.object_key for info in page])
                    cold = {info.object_key for info in page if info.cold}
                    hear_one = partial(self._hear, store=store, landed_on=landed_on, keys=keys, cold=cold, marks=marks)
                    values = list(pool.map(hear_one, new))
                    heard = [one for one in values if isinstance(one, dict)]
                    if heard:
                        self._database.write(partial(_insert_heard, values=heard))
                    found.without_key += values.count("without_key")
                    found.unreadable += values.count("unreadable")
                    done += len(page)
                    self._reach("reindex.heard")
                    progress("objects", done, None)

    def _unheard(self, object_keys: list[str]) -> list[str]:
        with self._database.read() as connection:
            heard = set(connection.scalars(select(HEARD.c.object_key).where(HEARD.c.object_key.in_(object_keys))))
        return [object_key for object_key in object_keys if object_key not in heard]

    def _hear(
        self, object_key: str, *, store: ObjectStore, landed_on: str, keys: KeyRing, cold: set[str], marks: Marks
    ) -> dict[str, Any] | str:
        try:
            if object_key in cold and store.stat(object_key).cold:
                raise Unavailable(f"object {object_key} lies in a cold class: restore the objects of the bucket for some days, and go on")
            reader = store.open(object_key)
            try:
                heard = hear(reader, object_key, keys, told_sha256=partial(store.sha256, object_key))
            finally:
                reader.close()
            mark = marks.of(object_key)
        except NoStudyKey as error:
            _log.warning("reindex.without_key", extra={"object_key": object_key, "study_key_id": error.study_key_id})
            return "without_key"
        except (IntegrityError, InstanceNotFound) as error:
            _log.error("reindex.unreadable", extra={"object_key": object_key, "reason": str(error)})
            return "unreadable"
        record = heard.record
        footer = record_to_footer(record.summary, record.origin, record.role, report=heard.report)
        return {
            "object_key": object_key,
            "received_at": to_micros(record.origin.received_at),
            "landed_on": landed_on,
            "sealed_byte_count": record.sealed.byte_count,
            "sealed_sha256": record.sealed.sha256,
            "key_id": record.sealed.key_id,
            "reason": mark.reason if mark else "",
            "quarantined_at": to_micros(mark.quarantined_at) if mark else None,
            "footer": json.dumps(footer, ensure_ascii=False, separators=(",", ":")),
            "state": _STATE_HEARD,
        }

    # -- pass 3: filing ----------------------------------------------------------------------------------------------------------

    def _file_all(self, progress: Progress, total: int) -> None:
        with self._database.read() as connection:
            done = total - int(
                connection.execute(select(func.count()).select_from(HEARD).where(HEARD.c.state == _STATE_HEARD)).scalar_one()
            )
        while filed := self._database.write(self._file_in):
            done += filed
            self._reach("reindex.filed")
            progress("instances", done, total)

    def _file_in(self, connection: Connection) -> int:
        rows = connection.execute(_NEXT).all()
        for row in rows:
            record = _record(row)
            if row.quarantined_at is not None:
                self._index.quarantine(connection, record, row.reason, at=from_micros(row.quarantined_at))
            else:
                self._file_one_in(connection, record)
            connection.execute(_SET_STATE, {"key_": row.object_key, "state_": _STATE_FILED})
        return len(rows)

    def _file_one_in(self, connection: Connection, record: InstanceRecord) -> None:
        known = self._index.find_in(connection, record.summary.sop_instance_uid)
        if known is not None and known.summary.sha256 == record.summary.sha256:
            return  # a copy too many
        conflict = self._index.conflict_in(connection, record)
        if conflict:
            new = self._index.quarantine(connection, record, conflict, at=record.origin.received_at)
        else:
            self._index.add(connection, record)
            new = True
        if new and record.landed_on:
            payload = {"object_key": record.sealed.object_key}
            job = NewJob(JobKind.ARCHIVE, record.summary.sop_instance_uid, payload=payload, home=record.landed_on)
            self._queue.enqueue(connection, job)

    # -- pass 4: reports and analyses --------------------------------------------------------------------------------------------

    def _link_all(self, found: Reindexed, progress: Progress, total: int) -> None:
        after, done = "", 0
        while True:
            with self._database.read() as connection:
                rows = connection.execute(_NEXT_LINK, {"after": after}).all()
            if not rows:
                return
            self._database.write(partial(self._link_in, rows=rows, found=found))
            after = rows[-1].object_key
            done += len(rows)
            self._reach("reindex.linked")
            progress("reports", done, total)

    def _link_in(self, connection: Connection, *, rows: Sequence[Row[Any]], found: Reindexed) -> None:
        for row in rows:
            report = json.loads(row.footer).get("report")
            if report is not None:
                self._link_one_in(connection, _record(row), report, found)
            connection.execute(_SET_STATE, {"key_": row.object_key, "state_": _STATE_LINKED})

    def _link_one_in(self, connection: Connection, record: InstanceRecord, report: dict[str, Any], found: Reindexed) -> None:
        uid, source = record.summary.sop_instance_uid, str(report["source_sop_instance_uid"])
        filed = self._index.find_in(connection, uid)
        if filed is None or filed.sealed.object_key != record.sealed.object_key:
            return  # set aside, or a copy
        if self._index.find_in(connection, source) is None:
            found.unlinked += 1
            _log.warning("reindex.unlinked", extra={"object_key": record.sealed.object_key})
            return
        self._index.add_report(connection, ReportRecord(uid, source, str(report["kind"]), dict(report["models"])))
        if self._deliver:
            for peer in report["deliver_to"]:
                self._queue.enqueue(connection, NewJob(JobKind.DELIVER, uid, lane=str(peer), home=record.landed_on))
                found.deliveries += 1

    def _analyse_all(self, found: Reindexed, progress: Progress) -> None:
        for uids in self._unanalysed():
            found.analyses += self._database.write(partial(self._analyse_in, uids=uids))
            progress("analyses", found.analyses, None)

    def _unanalysed(self) -> Iterator[list[str]]:
        """Give the received instances without a summary, page by page."""
        has_summary = exists().where(REPORTS.c.source_sop_instance_uid == INSTANCES.c.sop_instance_uid, REPORTS.c.kind == "summary")
        page = (
            select(INSTANCES.c.id, INSTANCES.c.sop_instance_uid)
            .where(INSTANCES.c.id > bindparam("after"), INSTANCES.c.role == "source", ~has_summary)
            .order_by(INSTANCES.c.id)
            .limit(_PAGE)
        )
        after = 0
        while True:
            with self._database.read() as connection:
                rows = connection.execute(page, {"after": after}).all()
            if not rows:
                return
            yield [row.sop_instance_uid for row in rows]
            after = rows[-1].id

    def _analyse_in(self, connection: Connection, *, uids: list[str]) -> int:
        count = 0
        for uid in uids:
            record = self._index.find_in(connection, uid)
            if record is not None:
                for job in self._jobs_for(record.summary, record.origin):
                    self._queue.enqueue(connection, replace(job, home=record.landed_on))
                    count += 1
        return count


def _insert_heard(connection: Connection, *, values: list[dict[str, Any]]) -> None:
    connection.execute(insert(HEARD), values)


def _record(row: Row[Any]) -> InstanceRecord:
    sealed = SealedObject(row.object_key, row.sealed_byte_count, row.sealed_sha256, row.key_id)
    return replace(footer_to_record(json.loads(row.footer), sealed), landed_on=row.landed_on)
