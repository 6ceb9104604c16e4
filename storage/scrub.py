"""Scrub: is everything still there, byte for byte? And what is not, but lies whole somewhere else, is put again.

A round reads every object that the index knows and compares its digest, its footer and its row; looks for objects without a row (the
orphan sweep decides about them); compares the documents of keys with their rows; walks the audit trail. A round may take days: it goes
page by page, says after each how far it came, and goes on there.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, select, update

from storage.admission import event_of
from storage.envelope import Opener, Sealer
from storage.errors import ColdObject, InstanceNotFound, IntegrityError, KeyNotHere, LostObject, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.objects import CHUNK
from storage.places import digest_of
from storage.records import AuditEvent
from storage.study_keys import STUDY_KEYS, document_name

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import ArchivedObject, Index
    from storage.landing import Landing
    from storage.objects import ObjectReader
    from storage.places import Places
    from storage.records import InstanceRecord, SealedObject
    from storage.study_keys import StudyKeys

_PAGE = 250
_UNREADABLE_IN_A_ROW = 20
"""So many one after the other, and it is not the objects that are at fault."""
_WHOLE = 16 << 20
"""Objects up to this many bytes are read once and kept in memory while they are looked at."""
_KEYS = (
    select(STUDY_KEYS.c.id, STUDY_KEYS.c.wrapped)
    .where(STUDY_KEYS.c.id > bindparam("after"), STUDY_KEYS.c.stored == 1)
    .order_by(STUDY_KEYS.c.id)
    .limit(_PAGE)
)
_UNSTORED = (
    update(STUDY_KEYS)
    .where(STUDY_KEYS.c.id == bindparam("study_key_id"), STUDY_KEYS.c.wrapped == bindparam("was"), STUDY_KEYS.c.stored == 1)
    .values(stored=0)
)
_log = logging.getLogger(__name__)

Pace = Callable[[int], object]
"""Told how many bytes were read, now and then 0; may wait, and may raise to stop the work."""


@dataclass(slots=True)
class Scrubbed:
    """What a round found, or the rest of one."""

    checked: int = 0
    """Looked for where they lie, and read if they are there."""
    byte_count: int = 0
    missing: int = 0
    damaged: int = 0
    healed: int = 0
    """Of the missing and damaged: put again from spool or cache."""
    cold: int = 0
    """Whose length alone was compared: they lie in a cold class."""
    elsewhere: int = 0
    """On another node's disk yet."""
    lost: int = 0
    """With the disk of a node that was declared lost, and not sent again yet."""
    unreadable: int = 0
    """The store (or its disk) cannot give them now, though it gives others; the log names them."""
    unindexed: int = 0
    documents: int = 0
    """Documents of keys that were not as their rows, and were put again."""
    audit_fault: str = ""

    def __str__(self) -> str:
        """Say it for people."""
        return ", ".join(
            f"{getattr(self, field.name)} {field.name.replace('_', ' ')}" for field in fields(self) if getattr(self, field.name)
        )


class Scrub:
    """Looks after what is archived.

    Parameters
    ----------
    database, index, audit, study_keys, places, landing
        The parts it ties together.
    reach
        Failpoints scrub.put and scrub.healed.
    """

    def __init__(
        self,
        *,
        database: Database,
        index: Index,
        audit: AuditTrail,
        study_keys: StudyKeys,
        places: Places,
        landing: Landing,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._database = database
        self._index = index
        self._audit = audit
        self._study_keys = study_keys
        self._places = places
        self._landing = landing
        self._reach = reach

    def round(self, cursor: str = "", *, save: Callable[[str], object] = lambda _: None, pace: Pace = lambda _: None) -> Scrubbed:
        """Go through everything once, or from `cursor` to the end.

        Parameters
        ----------
        save
            Told after each page how far the round came: the `cursor` to go on from.

        Raises
        ------
        Unavailable
            Store or database is away: go on later from the cursor saved last.
        """
        found = Scrubbed()
        parts: dict[str, Callable[[str, Scrubbed, Callable[[str], object], Pace], None]] = {
            "instances": partial(self._objects, quarantined=False),
            "quarantine": partial(self._objects, quarantined=True),
            "listing": self._listing,
            "keys": self._keys,
            "audit": self._trail,
        }
        begin, _, after = cursor.partition(" ")
        names = list(parts)
        for name in names[names.index(begin) if begin in parts else 0 :]:
            save(f"{name} {after}".strip())
            parts[name](after, found, save, pace)
            after = ""
        event = AuditEvent(
            action="archive.scrubbed",
            outcome="success"
            if found.missing + found.damaged + found.unreadable + found.lost == found.healed and not found.audit_fault
            else "damage",
            actor="node",
            detail={field.name: getattr(found, field.name) for field in fields(found)},
        )
        self._audit.record(event)
        return found

    # -- objects -----------------------------------------------------------------------------------------------------------------

    def _objects(self, after: str, found: Scrubbed, save: Callable[[str], object], pace: Pace, *, quarantined: bool) -> None:
        at, unread = int(after or 0), Unread()
        while page := self._index.objects_after(at, quarantined=quarantined):
            for known in page:
                try:
                    self._object(known, found, pace)
                    unread.over()
                except Unavailable as error:
                    unread.note(known.object_key, error)
                    found.unreadable += 1
            at = page[-1].id
            save(f"{'quarantine' if quarantined else 'instances'} {at}")

    def _object(self, known: ArchivedObject, found: Scrubbed, pace: Pace) -> None:
        try:
            check_object(known, index=self._index, places=self._places, study_keys=self._study_keys, pace=pace)
        except ColdObject:
            found.cold += 1
            return
        except Elsewhere:
            found.elsewhere += 1
            return
        except LostObject:
            found.lost += 1
            return
        except (InstanceNotFound, IntegrityError) as error:
            record = self._index.record_of_object(known.object_key)
            if record is None:
                return  # erased or replaced meanwhile
            if isinstance(error, InstanceNotFound):
                found.missing += 1
            else:
                found.damaged += 1
            if self.heal(record):
                found.healed += 1
                return
            alarm(self._audit, known, "the object is gone from the store" if isinstance(error, InstanceNotFound) else str(error))
        found.checked += 1
        found.byte_count += known.byte_count

    def heal(self, record: InstanceRecord) -> bool:
        """Put an instance again under a new object key, from a copy of this node's spool or cache; False when none is whole."""
        for reader in self._copies(record.sealed.object_key):
            try:
                if reader.size == record.sealed.byte_count and digest_of(reader) == record.sealed.sha256:
                    self._put_again(record, reader)
                    return True
            except (IntegrityError, KeyNotHere) as error:
                _log.error("scrub.not_healed", extra={"object_key": record.sealed.object_key, "reason": str(error)})
            finally:
                reader.close()
        return False

    def _copies(self, object_key: str) -> Iterator[ObjectReader]:
        spool, cache = self._places.spool, self._places.cache
        if spool is not None:
            with suppress(InstanceNotFound):
                yield spool.open(object_key)
        copy = cache.open(object_key) if cache is not None else None
        if copy is not None:
            yield copy

    def _put_again(self, record: InstanceRecord, reader: ObjectReader) -> None:
        """Seal the same bytes and the same record anew, put them, have the row name them, then remove what was damaged."""
        opener = Opener(self._study_keys, record.sealed.object_key, reader.read_at, reader.size)
        file = self._landing.create()
        try:
            sealer = Sealer(secrets.token_hex(16), file.write)
            for chunk in opener.chunks():
                sealer.update(chunk)
            sealed = sealer.finish(opener.footer(), self._study_keys.get(opener.key_id), self._study_keys)
            file.flush()
            self._places.store.put(sealed.object_key, file.path, sealed, tags={"role": record.role})
        finally:
            file.discard()
        self._reach("scrub.put")
        self._database.write(partial(self._healed_in, record=record, sealed=sealed))
        self._reach("scrub.healed")
        try:
            self._places.delete(record)
        except StorageError as error:
            _log.warning("object.left", extra={"object_key": record.sealed.object_key, "reason": str(error)})

    def _healed_in(self, connection: Connection, *, record: InstanceRecord, sealed: SealedObject) -> None:
        if self._index.record_of_object_in(connection, record.sealed.object_key) is None:
            raise IntegrityError("the instance was erased or replaced while it was healed")
        self._index.replace_object(connection, record.sealed.object_key, sealed, landed_on="")
        detail = {"replaced_object_key": record.sealed.object_key, "object_key": sealed.object_key, "by": "a copy of this node"}
        self._audit.append(connection, event_of("instance.healed", record, detail=detail))

    # -- the other direction -----------------------------------------------------------------------------------------------------

    def _listing(self, _after: str, found: Scrubbed, _save: Callable[[str], object], pace: Pace) -> None:
        listed = (info.object_key for info in self._places.store.list())
        while page := list(islice(listed, _PAGE)):
            pace(0)
            found.unindexed += len(set(page) - self._index.known_objects(page))

    # -- keys --------------------------------------------------------------------------------------------------------------------

    def _keys(self, after: str, found: Scrubbed, save: Callable[[str], object], pace: Pace) -> None:
        store = self._places.store
        while True:
            with self._database.read() as connection:
                rows = connection.execute(_KEYS, {"after": after}).all()
            if not rows:
                break
            for row in rows:
                try:
                    same = self._as_its_row(row.id)
                except KeyNotHere as error:  # a node that has the key can compare them
                    _log.warning("study_key.not_here", extra={"study_key_id": row.id, "reason": str(error)})
                    found.unreadable += 1
                    continue
                if not same:
                    self._database.write(partial(_distrust, study_key_id=row.id, was=row.wrapped))
                    found.documents += 1
            after = rows[-1].id
            pace(0)
            save(f"keys {after}")
        if found.documents:
            self._study_keys.publish_all(put_document=store.put_document, delete_document=store.delete_document)

    def _as_its_row(self, study_key_id: str) -> bool:
        """Compare a document with its row; a rotation may change both meanwhile, so twice before it is said that they differ."""
        for _ in range(2):
            try:
                content = self._places.store.get_document(document_name(study_key_id))
                if content == self._study_keys.document(self._study_keys.get(study_key_id)):
                    return True
            except InstanceNotFound:
                continue
            except IntegrityError as error:
                if not self._study_keys.known([study_key_id]):
                    return True  # erased meanwhile
                _log.error("study_key.damaged", extra={"study_key_id": study_key_id, "reason": str(error)})
        return False

    def _trail(self, _after: str, found: Scrubbed, _save: Callable[[str], object], pace: Pace) -> None:
        pace(0)
        fault = self._audit.verify()
        found.audit_fault = fault.reason if fault else ""


class Unread:
    """Objects that cannot be read now.

    One bad sector must not keep all behind it from being looked at, nor a key that this node lacks; but when many in a row cannot be
    read, the store is away.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def over(self) -> None:
        """Note that one could be read: those before it were at fault, not the store."""
        self._in_a_row = 0

    def note(self, object_key: str, error: Unavailable) -> None:
        """Note one, and log it; after so many in a row the store is away, and the error is raised."""
        if not isinstance(error, KeyNotHere):
            self._in_a_row += 1
        if self._in_a_row >= _UNREADABLE_IN_A_ROW:
            raise error
        _log.error("object.unreadable", extra={"object_key": object_key, "reason": str(error)})


class Elsewhere(Unavailable):
    """The object lies on another node's disk yet: that node looks after it."""


def check_object(
    known: ArchivedObject,
    *,
    index: Index,
    places: Places,
    study_keys: StudyKeys,
    thorough: bool = False,
    pace: Pace = lambda _: None,
) -> None:
    """Read an object where its row says that it lies, and compare digest, footer and row.

    `thorough`: every segment is opened, and the digest of the data set compared; without, of a large object the sealed bytes' digest and
    the footer say the same.

    Raises
    ------
    InstanceNotFound
        It is gone.
    IntegrityError
        It is not what was archived.
    ColdObject
        It lies in a cold class, in its full length.
    Elsewhere
        It lies on another node's disk.
    LostObject
        It was lost with the disk of another node.
    Unavailable
        It cannot be read now.
    """
    try:
        reader = _opened(known, places)
    except InstanceNotFound:
        record = index.record_of_object(known.object_key)
        if record is None or record.landed_on == known.landed_on:
            raise
        reader = _opened(replace(known, landed_on=record.landed_on), places)  # brought into the store since the row was read
    try:
        _check(known, reader, index=index, study_keys=study_keys, thorough=thorough, pace=pace)
    finally:
        reader.close()


def _opened(known: ArchivedObject, places: Places) -> ObjectReader:
    if known.landed_on and known.landed_on != places.node_id:
        places.require_not_lost(known.landed_on, known.sop_instance_uid)
        raise Elsewhere("the object lies on another node's disk yet")
    if known.landed_on and places.spool is not None:
        return places.spool.open(known.object_key)
    if places.remote:
        info = places.store.stat(known.object_key)
        if info.byte_count != known.byte_count:
            raise IntegrityError("the object has another length than what was stored")
        if info.cold:
            raise ColdObject("the object lies in a cold class: its length is right")
    return places.store.open(known.object_key)


def _check(known: ArchivedObject, reader: ObjectReader, *, index: Index, study_keys: StudyKeys, thorough: bool, pace: Pace) -> None:
    if reader.size != known.byte_count:
        raise IntegrityError("the object has another length than what was stored")
    digest = hashlib.sha256()
    content = bytearray()
    for offset in range(0, reader.size, CHUNK):
        chunk = reader.read_at(offset, CHUNK)
        digest.update(chunk)
        if reader.size <= _WHOLE:
            content += chunk
        pace(len(chunk))
    if digest.hexdigest() != known.sha256:
        raise IntegrityError("the sealed bytes are not those that were stored")
    read_at = (lambda offset, length: bytes(content[offset : offset + length])) if content else reader.read_at
    opener = Opener(study_keys, known.object_key, read_at, reader.size)
    digests = {str(opener.footer()["summary"]["sha256"])}
    if content or thorough:
        plain = hashlib.sha256()
        for chunk in opener.chunks():
            plain.update(chunk)
        digests.add(plain.hexdigest())
    record = index.record_of_object(known.object_key)
    if record is not None:
        digests.add(record.summary.sha256)
    if len(digests) != 1:
        raise IntegrityError("data set, footer and row do not tell the same digest")


def alarm(audit: AuditTrail, known: ArchivedObject, outcome: str) -> None:
    """Write down that an archived object is lost or damaged."""
    _log.error("object.damaged", extra={"object_key": known.object_key, "reason": outcome})
    detail: dict[str, Any] = {"object_key": known.object_key}
    audit.record(AuditEvent(action="instance.damaged", outcome=outcome, actor="node", subject=known.sop_instance_uid, detail=detail))


def _distrust(connection: Connection, *, study_key_id: str, was: str) -> None:
    connection.execute(_UNSTORED, {"study_key_id": study_key_id, "was": was})
