"""Study keys: between the ring and the objects. They make erasing a study and changing the wrapping key cheap.

A study key is 32 random bytes that wrap the data keys of the objects of one study. It is kept wrapped by a key of the ring: in the table
``study_keys``, and as a small document beside the objects, so that the bucket describes itself. Changing the wrapping key re-wraps study
keys and touches no object; erasing the study keys of a study (`StudyKeys.forget_in`) makes every copy of its objects unreadable, those in
backups included. A study may have several: each process that takes its first instance at the same moment makes one.

What a process remembers is good for ``cache_s`` seconds and never prolonged by use. So an erased key stops working everywhere after that
time (at once where it was erased), and with the key service away a process goes on for that time with the keys it has.

References
----------
RFC 3394 AES Key Wrap
"""

from __future__ import annotations

import base64
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap
from sqlalchemy import BigInteger, Column, Integer, Row, Table, Text, bindparam, case, delete, func, insert, select, update

from storage.database import METADATA, from_micros, to_micros
from storage.errors import IntegrityError, KeyNotHere, Unavailable
from storage.failpoints import unarmed
from storage.keys import Ring
from storage.prepared import Prepared
from storage.study_key import StudyKey, document_name, read_document, write_document

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

__all__ = ["STUDY_KEYS", "StudyKey", "StudyKeys", "document_name"]

STUDY_KEYS: Final = Table(
    "study_keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("study_instance_uid", Text, nullable=False, index=True),
    Column("wrapping_key_id", Text, nullable=False, index=True),
    Column("wrapped", Text, nullable=False),
    # 1: its document is in the object store. 0: nobody put it yet, and who does marks it. Negative: it was replaced, perhaps by something
    # spoilt; every such doubt is another number, so that no older knowledge counts.
    Column("stored", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

_T = STUDY_KEYS.c
_FIND = Prepared(select(STUDY_KEYS).where(_T.id == bindparam("study_key_id")))
_OF_STUDY = Prepared(select(STUDY_KEYS).where(_T.study_instance_uid == bindparam("study")).order_by(_T.created_at, _T.id))
_ADD = Prepared(insert(STUDY_KEYS))
_MARK = update(STUDY_KEYS).where(_T.id == bindparam("study_key_id")).values(stored=bindparam("mark"))
_RE_WRAP = (
    update(STUDY_KEYS)
    .where(_T.id == bindparam("study_key_id"), _T.wrapped == bindparam("was"))
    .values(
        wrapping_key_id=bindparam("by"),
        wrapped=bindparam("now"),
        stored=case((_T.stored == bindparam("doubt"), 1), else_=bindparam("again")),
    )
)
_UNSURE = update(STUDY_KEYS).where(_T.id.in_(bindparam("study_key_ids", expanding=True))).values(stored=bindparam("doubt"))
_LEFT = (
    select(STUDY_KEYS)
    .where(_T.wrapping_key_id != bindparam("primary"), _T.id > bindparam("after"))
    .order_by(_T.id)
    .limit(bindparam("at_most"))
)
_COUNT_LEFT = select(func.count()).select_from(STUDY_KEYS).where(_T.wrapping_key_id != bindparam("primary"))
_USED = select(_T.id).where(_T.wrapping_key_id == bindparam("key_id")).limit(1)

_BATCH: Final = 64
_ROUNDS: Final = 8
"""Tries to bring a document in line with a row that goes on changing."""
_PARALLEL: Final = 4
_STRIPES: Final = 64

_log = logging.getLogger(__name__)

PutDocument = Callable[[str, bytes], None]
DeleteDocument = Callable[[str], None]


@dataclass(slots=True)
class _Held:
    """What a process remembers of a study key."""

    key: StudyKey
    until: float
    in_table: bool
    """Whether a row of it has been seen: if that row is gone, the key was erased."""


class StudyKeys:
    """The study keys as a process uses them; for any number of threads.

    Parameters
    ----------
    database
        Has the table ``study_keys``.
    ring
        Wraps and unwraps them.
    cache_s
        Seconds for which a key that was looked up is used without asking table and ring again.
    cache_keys
        How many keys are remembered, the least recently used are dropped.
    monotonic
        Seconds of a clock that is never set.
    reach
        Failpoints ``rotate.wrapped``, ``rotate.document``, ``rotate.row``.
    """

    def __init__(
        self,
        *,
        database: Database,
        ring: Ring,
        cache_s: float = 60.0,
        cache_keys: int = 10_000,
        monotonic: Callable[[], float] = time.monotonic,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._database = database
        self._ring = ring
        self._cache_s = cache_s
        self._cache_keys = cache_keys
        self._monotonic = monotonic
        self._reach = reach
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._current: dict[str, str] = {}
        # one lookup at a time for a study, so that a rush of first instances makes one key
        self._stripes = tuple(threading.Lock() for _ in range(_STRIPES))

    # -- sealing -----------------------------------------------------------------------------------------------------------------

    def current(self, study_instance_uid: str) -> StudyKey:
        """Return the key that new objects of the study are sealed under; a new one, not in the table yet, when there is none.

        Raises
        ------
        Unavailable
            Database, ring or key service cannot be used now.
        """
        with self._stripes[hash(study_instance_uid) % _STRIPES]:
            held = self._remembered(study_instance_uid)
            if held is not None:
                return held
            for row in self._rows(study_instance_uid):
                try:
                    key = self._opened(row)
                except IntegrityError as error:
                    _log.error("study_key.damaged", extra={"study_key_id": row.id, "reason": str(error)})
                    continue
                except KeyNotHere as error:  # to take in what arrives, this node needs no key of another
                    _log.warning("study_key.not_here", extra={"study_key_id": row.id, "reason": str(error)})
                    continue
                self._remember(key, in_table=True, current=True)
                return key
            study_key_id = secrets.token_hex(16)
            wrapping_key_id, secret, wrapped = self._ring.generate(study_key_id)
            # whole microseconds, as the table keeps it
            created_at = from_micros(to_micros(self._database.clock()))
            key = StudyKey(study_key_id, study_instance_uid, secret, wrapping_key_id, wrapped, created_at)
            self._remember(key, in_table=False, current=True)
            return key

    def store_in(self, connection: Connection, study_key: StudyKey, *, stored: bool = False) -> None:
        """Inside of a ``Database.write``: have the key in the table, where an object sealed under it is admitted. May be repeated.

        Parameters
        ----------
        connection
            Of the transaction.
        study_key
            From `current` of this process.
        stored
            Whether ``document(study_key)`` was put into the object store for this.

        Raises
        ------
        Unavailable
            The key was erased, or its wrapping key retired, since it was taken: what was sealed under it must not be admitted. When
            the sender tries again, it is sealed under a new one.
        """
        row = _FIND.first(connection, {"study_key_id": study_key.id})
        if row is None:
            self._require_fit(study_key)
            _ADD.run(connection, _values(study_key, stored=stored))
        elif stored and row.stored == 0:
            if not study_key.stored:  # who remembered a document put none
                self.mark_stored_in(connection, study_key)
        elif stored and (row.wrapped != _text(study_key.wrapped) if row.stored == 1 else not study_key.stored):
            # re-wrapped, or about to be, while this document was on its way, which may have replaced the newer one: it has to be put again
            connection.execute(_MARK, {"study_key_id": study_key.id, "mark": _new_doubt()})
        self._database.on_commit(lambda: self._seen_in_table(study_key.id, stored=row is None and stored))

    def restore_in(self, connection: Connection, study_key: StudyKey, *, stored: bool = True) -> None:
        """Inside of a ``Database.write``: take over a key from its document; a row that is there stays as it is.

        `stored`: the document lies in the object store, not in a node's spool alone.
        """
        if _FIND.first(connection, {"study_key_id": study_key.id}) is None:
            _ADD.run(connection, _values(study_key, stored=stored))

    def doubt(self, study_keys: Iterable[StudyKey]) -> None:
        """After a commit of unknown outcome: forget the keys, which may be in the table now and erased from it tomorrow.

        What waits here under one of them is refused as retryable when it is not in the table.
        """
        self._drop([study_key.id for study_key in study_keys])

    def _require_fit(self, study_key: StudyKey) -> None:
        """Let only a key come into the table that was made here and never was in it: an erased one must not come back."""
        with self._lock:
            held = self._held.get(study_key.id)
            fit = held is not None and not held.in_table
        if not fit:
            self._drop([study_key.id])
            raise Unavailable("the keys of the study changed while this instance arrived (erased, perhaps): send it again")
        # asked in the transaction, which `retire` excludes: no row can come under a wrapping key that is being removed
        if not self._ring.holds(study_key.wrapping_key_id):
            self._drop([study_key.id])
            raise Unavailable("the wrapping key was retired while this instance arrived: send it again")

    def wrap_data_key(self, study_key: StudyKey, data_key: bytes) -> bytes:
        """Wrap the data key of an object (32 bytes) for the object's capsule (RFC 3394)."""
        return aes_key_wrap(study_key.secret, data_key)

    # -- opening -----------------------------------------------------------------------------------------------------------------

    def unwrap(self, study_key_id: str, wrapped: bytes) -> bytes:
        """Return the data key of an object from what its capsule says.

        Raises
        ------
        IntegrityError
            There is no such study key (any more), or it did not wrap these bytes.
        Unavailable
            Database, ring or key service cannot be used now.
        """
        return self.unwrap_data_key(self._fresh(study_key_id) or self.get(study_key_id), wrapped)

    def unwrap_data_key(self, study_key: StudyKey, wrapped: bytes) -> bytes:
        """Return the data key of an object, given the key of its study; the way back of `wrap_data_key`.

        Raises
        ------
        IntegrityError
            That key did not wrap these bytes.
        """
        try:
            return aes_key_unwrap(study_key.secret, wrapped)
        except InvalidUnwrap as error:
            raise IntegrityError("the object's data key is damaged, or another object's; restore the object from another copy") from error

    def get(self, study_key_id: str) -> StudyKey:
        """Return a key as the table has it now.

        Raises
        ------
        IntegrityError
            There is no such study key (any more), or the ring does not open it.
        Unavailable
            Database, ring or key service cannot be used now.
        """
        for _ in range(2):  # it may come into the table between the look there and the look into what is remembered
            with self._database.read() as connection:
                row = _FIND.first(connection, {"study_key_id": study_key_id})
            if row is not None:
                key = self._opened(row)
                self._remember(key, in_table=True, current=False)
                return key
            with self._lock:
                held = self._held.get(study_key_id)
                if held is None:
                    break
                if not held.in_table:
                    return held.key  # of an object that was sealed here and is not admitted yet
        self._drop([study_key_id])
        raise IntegrityError(
            "there is no such study key: the study of this object was erased, or the table lost the key "
            "(`dicom-node reindex` brings it back from the store)"
        )

    def all_of(self, study_instance_uid: str) -> list[StudyKey]:
        """Return every key of a study, oldest first. Raises as `get`."""
        return [self._opened(row) for row in self._rows(study_instance_uid)]

    # -- erasing -----------------------------------------------------------------------------------------------------------------

    def forget_in(self, connection: Connection, study_instance_uid: str) -> list[str]:
        """Inside of a ``Database.write``: erase every key of a study.

        Returns
        -------
        list of str
            Their ids: the caller deletes every version of the documents of that name (`document_name`) after the commit. Other processes
            stop using the keys within ``cache_s``.
        """
        ids = [row.id for row in _OF_STUDY.all(connection, {"study": study_instance_uid})]
        connection.execute(delete(STUDY_KEYS).where(_T.study_instance_uid == study_instance_uid))
        self._drop(ids)  # for what follows in the same commit; and again after it, as a reader may have seen the rows until then
        self._database.on_commit(lambda: self._drop(ids))
        return ids

    # -- documents ---------------------------------------------------------------------------------------------------------------

    def document(self, study_key: StudyKey) -> bytes:
        """Return what the object store keeps of a key under `document_name`."""
        return write_document(study_key)

    def from_document(self, content: bytes) -> StudyKey:
        """Return the key that a document keeps; the way back of `document`.

        Raises
        ------
        IntegrityError
            The document is damaged, or the ring does not open it.
        Unavailable
            The key service cannot be used now.
        """
        return read_document(content, self._ring.unwrap)

    def publish(self, study_key_id: str, *, put_document: PutDocument, delete_document: DeleteDocument) -> None:
        """Put the document of a key into the object store and record that; safe beside a rotation and an erasure of the same key.

        Raises
        ------
        IntegrityError
            There is no such study key (any more); no document of it was left behind.
        Unavailable
            The store, or as `get`.
        """
        name = document_name(study_key_id)
        key = self._fresh(study_key_id)
        if key is None or not key.stored:
            if self._is_stored(study_key_id):
                return  # whether this node's ring can open it or not
            key = self.get(study_key_id)
        if key.stored:
            return
        put_document(name, self.document(key))
        if not self._database.write(partial(self.mark_stored_in, study_key=key)):
            self._put_again(study_key_id, put_document, delete_document)

    def republish(self, study_key_id: str, *, put_document: PutDocument, delete_document: DeleteDocument) -> None:
        """Put the document of a key anew, though its row says that it is there: what is there is not as the row. Raises as `publish`."""
        self._put_again(study_key_id, put_document, delete_document)

    def _put_again(self, study_key_id: str, put_document: PutDocument, delete_document: DeleteDocument) -> None:
        """Bring the document in line with a row that changed while one was put: what was put may have replaced a newer one."""
        for _ in range(_ROUNDS):
            try:
                key = self.get(study_key_id)
            except IntegrityError:
                if not self.known([study_key_id]):
                    delete_document(document_name(study_key_id))
                raise
            put_document(document_name(study_key_id), self.document(key))
            if self._database.write(partial(self.mark_stored_in, study_key=key)):
                return
        _log.info("study_key.doubted", extra={"study_key_id": study_key_id})  # instances of it come in faster: the next round puts it again

    def _is_stored(self, study_key_id: str) -> bool:
        with self._database.read() as connection:
            row = _FIND.first(connection, {"study_key_id": study_key_id})
        return row is not None and row.stored == 1

    def publish_all(self, *, put_document: PutDocument, delete_document: DeleteDocument) -> int:
        """Put the documents of all keys that are not known to be in the store; return how many. A duty of every node.

        A key that cannot be opened is passed over, and stands in the log. One whose rotation did not end is put each time until one does.
        Unavailable as `publish`.
        """
        done, after = 0, ""
        statement = select(_T.id).where(_T.stored != 1, _T.id > bindparam("after")).order_by(_T.id).limit(_BATCH)
        while True:
            with self._database.read() as connection:
                ids = list(connection.scalars(statement, {"after": after}))
            if not ids:
                return done
            after = ids[-1]
            for study_key_id in ids:
                try:
                    # not publish: what is remembered here may be from before
                    self._put_again(study_key_id, put_document, delete_document)
                except (IntegrityError, KeyNotHere) as error:
                    _log.error("study_key.unpublished", extra={"study_key_id": study_key_id, "reason": str(error)})
                    continue
                done += 1

    def mark_stored_in(self, connection: Connection, study_key: StudyKey) -> bool:
        """Inside of a ``Database.write``: record that ``document(study_key)`` was put into the store.

        Returns
        -------
        bool
            False when the row is not as it was when `study_key` was read: what was put may have replaced something newer, or may have
            been replaced.

        Notes
        -----
        While a rotation is under way it replaces the document after all, so nobody else vouches for one that it doubts; and nobody knows
        whether a rotation that does not end still has a request on its way. What it doubts is wrapped by another than the primary key.
        """
        row = _FIND.first(connection, {"study_key_id": study_key.id})
        if row is None or row.wrapped != _text(study_key.wrapped) or row.stored != _mark(study_key):
            return False
        if row.stored >= 0 or row.wrapping_key_id == self._ring.primary_key_id:
            connection.execute(_MARK, {"study_key_id": study_key.id, "mark": 1})
            self._database.on_commit(lambda: self._seen_in_table(study_key.id, stored=True))
        return True

    def known(self, study_key_ids: Iterable[str]) -> set[str]:
        """Return those of the ids (a few hundred at most) that are in the table; the document of any other is an orphan."""
        with self._database.read() as connection:
            return set(connection.scalars(select(_T.id).where(_T.id.in_(list(study_key_ids)))))

    # -- changing the wrapping key -----------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Return how many study keys each wrapping key wraps."""
        statement = select(_T.wrapping_key_id, func.count()).group_by(_T.wrapping_key_id)
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(statement)}

    def rotate(
        self,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        *,
        put_document: PutDocument,
        delete_document: DeleteDocument,
    ) -> int:
        """Re-wrap every study key that is not wrapped by the primary key, while others seal and read.

        For each: wrap anew, replace the document, change the row. Killed at any point, the row tells what is left:
        run it again. While a document is replaced its row says that none is surely there: should the store spoil it, it is put again.
        One at a time for a database, please: two would do the work twice.

        Parameters
        ----------
        progress
            Called with (done, total) after each batch; the total may grow while others go on making keys.
        put_document, delete_document
            Of the object store.

        Returns
        -------
        int
            How many were re-wrapped.

        Raises
        ------
        IntegrityError
            Some could not be opened (they stand in the log); all others are done.
        KeyNotHere
            The same, as this ring lacks the keys that wrap them.
        Unavailable
            Database, store, ring or key service; what was done stays done.
        """
        done, damaged, not_here = 0, 0, ""
        again = True
        with ThreadPoolExecutor(_PARALLEL, "rotate") as pool:
            while again:  # until a whole pass finds nothing: keys may come under the old wrapping key meanwhile
                again, damaged, not_here, after = False, 0, "", ""
                total = done + self._count_left()
                while batch := self._left(after):
                    after = batch[-1].id
                    doubt = _new_doubt()
                    self._database.write(partial(_doubt_in, study_key_ids=[row.id for row in batch], doubt=doubt))
                    tasks = [pool.submit(self._re_wrapped, row, put_document) for row in batch]
                    pairs = [(row, task.result()) for row, task in zip(batch, tasks, strict=True)]
                    fresh = [(row, key) for row, key in pairs if isinstance(key, StudyKey)]
                    not_here = next((str(key) for _, key in pairs if isinstance(key, KeyNotHere)), not_here)
                    damaged += len(batch) - len(fresh)
                    changed = self._database.write(partial(_replace_in, fresh=fresh, doubt=doubt))
                    self._reach("rotate.row")
                    for row, _ in fresh:
                        if row.id not in changed:
                            with suppress(IntegrityError):  # erased: no document stays
                                self._put_again(row.id, put_document, delete_document)
                    done += len(changed)
                    again = again or bool(fresh)
                    progress(done, max(done, total))
        self.publish_all(put_document=put_document, delete_document=delete_document)
        if not_here:
            raise KeyNotHere(f"{damaged} study keys keep their wrapping key, all others are done: {not_here}; then run this again")
        if damaged:
            raise IntegrityError(
                f"{damaged} study keys could not be opened and keep their wrapping key: the log names them; restore their documents or rows"
            )
        return done

    def unused(self, wrapping_key_id: str) -> bool:
        """Tell whether no study key is wrapped by a key of the ring."""
        with self._database.read() as connection:
            return connection.execute(_USED, {"key_id": wrapping_key_id}).first() is None

    def retire(self, wrapping_key_id: str) -> None:
        """Remove a key from the ring file, unless a row uses it. Documents without a row: see ``storage.retirement``.

        Raises
        ------
        Unavailable
            A study key is wrapped by it; or as ``Ring.removal``.

        Notes
        -----
        Looked up and removed in one write transaction, and a new row asks the ring in its own: no row comes between. That holds for all
        processes that share this file; a node with a copy of the ring needs the new copy before. The ring is locked before the
        transaction begins: whoever holds it meanwhile must not make everybody's commits wait.
        """
        with Ring.removal(self._ring.path, wrapping_key_id) as take_out:

            def work(connection: Connection) -> None:
                if connection.execute(_USED, {"key_id": wrapping_key_id}).first() is not None:
                    raise Unavailable(f"key {wrapping_key_id} still wraps study keys: run `dicom-node keys rotate`, then remove it")
                take_out()

            self._database.write(work)

    def _left(self, after: str) -> list[Row[Any]]:
        with self._database.read() as connection:
            found = connection.execute(_LEFT, {"primary": self._ring.primary_key_id, "after": after, "at_most": _BATCH})
            return list(found)

    def _count_left(self) -> int:
        with self._database.read() as connection:
            return int(connection.execute(_COUNT_LEFT, {"primary": self._ring.primary_key_id}).scalar_one())

    def _re_wrapped(self, row: Row[Any], put_document: PutDocument) -> StudyKey | IntegrityError | KeyNotHere:
        """Return a key with a new wrap and its document replaced; or why it cannot be opened."""
        try:
            key = self._opened(row)
        except (IntegrityError, KeyNotHere) as error:
            event = "study_key.not_here" if isinstance(error, KeyNotHere) else "study_key.damaged"
            _log.error(event, extra={"study_key_id": row.id, "reason": str(error)})
            return error
        wrapping_key_id, wrapped = self._ring.wrap(key.secret, key.id)
        key = replace(key, wrapping_key_id=wrapping_key_id, wrapped=wrapped)
        self._reach("rotate.wrapped")
        # also when none is known to be there: one may be on its way, and would keep the former wrapping key in use
        put_document(document_name(key.id), self.document(key))
        self._reach("rotate.document")
        return key

    # -- what a process remembers ------------------------------------------------------------------------------------------------

    def _rows(self, study_instance_uid: str) -> list[Row[Any]]:
        with self._database.read() as connection:
            return _OF_STUDY.all(connection, {"study": study_instance_uid})

    def _opened(self, row: Row[Any]) -> StudyKey:
        try:
            wrapped = base64.b64decode(row.wrapped, validate=True)
        except ValueError as error:
            raise IntegrityError("a row of the table study_keys is damaged: restore the database from its copy, or reindex") from error
        known = self._fresh(row.id)
        secret = known.secret if known is not None and known.wrapped == wrapped else self._ring.unwrap(row.wrapping_key_id, wrapped, row.id)
        created_at = from_micros(row.created_at)
        return StudyKey(
            row.id, row.study_instance_uid, secret, row.wrapping_key_id, wrapped, created_at, row.stored == 1, min(row.stored, 0)
        )

    def _remembered(self, study_instance_uid: str) -> StudyKey | None:
        """Return the key that was current for the study, if it still may be."""
        with self._lock:
            held = self._held.get(self._current.get(study_instance_uid, ""))
            if held is None or self._monotonic() >= held.until:
                return None
            self._held.move_to_end(held.key.id)
        if not held.in_table and held.key.wrapping_key_id != self._ring.primary_key_id:
            return None  # never admitted: a rotation that is over has not seen it
        return held.key

    def _fresh(self, study_key_id: str) -> StudyKey | None:
        with self._lock:
            held = self._held.get(study_key_id)
            if held is None or self._monotonic() >= held.until:
                return None
            self._held.move_to_end(study_key_id)
            return held.key

    def _remember(self, key: StudyKey, *, in_table: bool, current: bool) -> None:
        until = self._monotonic() + self._cache_s
        with self._lock:
            self._held[key.id] = _Held(key, until, in_table)
            self._held.move_to_end(key.id)
            if current:
                self._current[key.study_instance_uid] = key.id
            while len(self._held) > self._cache_keys:
                self._forget(next(iter(self._held)))

    def _seen_in_table(self, study_key_id: str, *, stored: bool = False) -> None:
        with self._lock:
            held = self._held.get(study_key_id)
            if held is not None:
                held.in_table = True
                if stored:
                    held.key = replace(held.key, stored=True, doubt=0)

    def _drop(self, study_key_ids: Iterable[str]) -> None:
        with self._lock:
            for study_key_id in study_key_ids:
                self._forget(study_key_id)

    def _forget(self, study_key_id: str) -> None:
        held = self._held.pop(study_key_id, None)
        if held is not None and self._current.get(held.key.study_instance_uid) == study_key_id:
            del self._current[held.key.study_instance_uid]


def _new_doubt() -> int:
    """Return what a row's mark becomes when its document is replaced: a number that no one knew before."""
    return -1 - secrets.randbelow(2**31 - 1)


def _mark(key: StudyKey) -> int:
    """Return the mark of a key's row as it was when the key was read."""
    return 1 if key.stored else key.doubt


def _doubt_in(connection: Connection, study_key_ids: list[str], doubt: int) -> None:
    """Note that the documents of these keys are about to be replaced."""
    connection.execute(_UNSURE, {"study_key_ids": study_key_ids, "doubt": doubt})


def _replace_in(connection: Connection, fresh: list[tuple[Row[Any], StudyKey]], doubt: int) -> set[str]:
    """Write the new wraps of those rows that are still as they were read; return their ids."""
    changed = set()
    for row, key in fresh:
        values = {"study_key_id": row.id, "was": row.wrapped, "by": key.wrapping_key_id, "now": _text(key.wrapped)}
        # another doubt than ours: somebody put a document meanwhile, perhaps over the new one
        values |= {"doubt": doubt, "again": _new_doubt()}
        if connection.execute(_RE_WRAP, values).rowcount == 1:
            changed.add(row.id)
    return changed


def _values(key: StudyKey, *, stored: bool) -> dict[str, Any]:
    return {
        "id": key.id,
        "study_instance_uid": key.study_instance_uid,
        "wrapping_key_id": key.wrapping_key_id,
        "wrapped": _text(key.wrapped),
        "stored": int(stored),
        "created_at": to_micros(key.created_at),
    }


def _text(secret: bytes) -> str:
    return base64.b64encode(secret).decode("ascii")
