"""Where a sealed object may lie: the spool of a node, its read cache, the store. Puts, opens, moves and removes it there.

With a directory as the store there is one place. With a bucket, policy ``land`` puts an object into the spool, on the node's own durable
disk, from where the Mover brings it into the store; policy ``archive`` puts it into the store at once. The cache holds copies that may
vanish at any time. The row of the instance says where the object is (`InstanceRecord.landed_on`); this file believes the row and
looks into the next place when the object was moved meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from storage.errors import ColdObject, InstanceNotFound, IntegrityError, LostObject, StorageError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from storage.cache import ReadCache
    from storage.objects import DirectoryStore, ObjectReader, ObjectStore
    from storage.records import InstanceRecord, SealedObject

Acknowledge = Literal["land", "archive"]
"""What Success means: flushed on this node's disk, or in the store with its digest confirmed."""

_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


class Places:
    """The places of one node.

    Parameters
    ----------
    store
        Where objects live for good.
    spool
        On the node's own durable disk, for a remote store and policy ``land``; None: everything goes to the store at once.
    cache
        Copies for reading; None: every reading asks the store.
    node_id
        Of the node whose spool it is.
    cached_bytes
        Largest object that is copied into the cache when it is read.
    lost
        Whether an instance (its SOP Instance UID comes second) was lost with the disk of the node that comes first.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        spool: DirectoryStore | None = None,
        cache: ReadCache | None = None,
        node_id: str = "",
        cached_bytes: int = 16 * 1024**2,
        lost: Callable[[str, str], bool] = lambda _node_id, _uid: False,
    ) -> None:
        if spool is not None and not node_id:
            raise ValueError("a spool belongs to a node: give node_id")
        self.store = store
        self._spool = spool
        self._cache = cache
        self._node_id = node_id
        self._cached_bytes = cached_bytes
        self._lost = lost

    @property
    def spool(self) -> DirectoryStore | None:
        """Spool of this node, for those who take care of it."""
        return self._spool

    @property
    def cache(self) -> ReadCache | None:
        """Cache of this node, for those who take care of it."""
        return self._cache

    @property
    def node_id(self) -> str:
        """Of the node whose spool it is."""
        return self._node_id

    @property
    def remote(self) -> bool:
        """Whether to put an object is a journey."""
        return self.store.remote

    def lands(self, policy: Acknowledge) -> bool:
        """Whether an object of this policy goes into the spool first."""
        return self._spool is not None and policy == "land"

    def rests_here(self, policy: Acknowledge) -> bool:
        """Whether an object of this policy rests on this node's disk when it is put: it has to be flushed there before."""
        return not self.remote or self.lands(policy)

    def put(self, record: InstanceRecord, path: Path, policy: Acknowledge) -> InstanceRecord:
        """Make the object of `record` durable as `policy` asks, and return the record that says where it is. The file stays.

        Raises
        ------
        Unavailable, IntegrityError
            As `ObjectStore.put`; nothing was promised.
        """
        if self._spool is not None and self.lands(policy):
            self._spool.put(record.sealed.object_key, path, record.sealed)
            return replace(record, landed_on=self._node_id)
        self.store.put(record.sealed.object_key, path, record.sealed, tags={"role": record.role})
        return record

    def keep_document(self, name: str, content: bytes, policy: Acknowledge) -> None:
        """Have the document of a study's key lie where its objects will: whoever finds those can read them, with the database lost.

        Raises
        ------
        Unavailable
            As `put`.
        """
        if self._spool is None or not self.lands(policy):
            self.store.put_document(name, content)
            return
        try:
            if self._spool.get_document(name) == content:
                return  # the study's next instance
        except InstanceNotFound:
            pass
        self._spool.put_document(name, content)

    def keep_copy(self, sealed: SealedObject, path: Path) -> None:
        """Give the landing file of what is in the store to the cache: it is read in a moment. The file is gone, or stays."""
        if self._cache is not None and sealed.byte_count <= self._cached_bytes:
            self._cache.adopt(path, sealed.object_key)

    def open(self, record: InstanceRecord) -> ObjectReader:
        """Open the object of `record`.

        Raises
        ------
        InstanceNotFound
            It is in no place where it could be.
        LostObject
            It lay on the disk of a node that was declared lost.
        ColdObject, Unavailable
            It cannot be read now, or lies on another node's disk yet.
        """
        object_key = record.sealed.object_key
        if record.landed_on and record.landed_on == self._node_id and self._spool is not None:
            try:
                return self._spool.open(object_key)
            except InstanceNotFound:
                return self.store.open(object_key)  # moved since the row was read
        if record.landed_on:
            try:
                return self.store.open(object_key)  # perhaps it was moved meanwhile
            except InstanceNotFound as error:
                self.require_not_lost(record.landed_on, record.summary.sop_instance_uid)
                raise Unavailable(
                    f"the object lies on node {record.landed_on} yet, which brings it into the store; start that node, or wait for it"
                ) from error
        return self._cached(record.sealed) or self.store.open(object_key)

    def require_not_lost(self, node_id: str, sop_instance_uid: str) -> None:
        """Raise LostObject when an instance was lost with the disk of a node: nobody brings it any more, whoever waits."""
        if self._lost(node_id, sop_instance_uid):
            raise LostObject(f"the object lay on the disk of node {node_id} alone, which was declared lost: have the instance sent again")

    def require_whole(self, record: InstanceRecord, *, thaw: bool = True) -> None:
        """Read the object of `record` from where its row says it lives, never from the cache, and compare its digest.

        Parameters
        ----------
        thaw
            Whether the restore of one in a cold class is started, which takes hours and costs money; its length is compared all the same.

        Raises
        ------
        InstanceNotFound
            It is gone.
        IntegrityError
            It is not what was sealed.
        LostObject
            It lay on the disk of a node that was declared lost.
        ColdObject, Unavailable
            It cannot be read now.
        """
        if record.landed_on and record.landed_on != self._node_id:
            self.require_not_lost(record.landed_on, record.summary.sop_instance_uid)
            raise Unavailable(f"the object lies on the disk of node {record.landed_on}: only that node can read it yet")
        if self.remote and not record.landed_on and not thaw:
            info = self.store.stat(record.sealed.object_key)
            if info.byte_count != record.sealed.byte_count:
                raise _unlike(record.sealed, info.byte_count)
            if info.cold:
                raise ColdObject(f"object {record.sealed.object_key} lies in a cold class: its length is right")
        reader = self.open(record) if record.landed_on else self.store.open(record.sealed.object_key)
        try:
            if reader.size != record.sealed.byte_count or digest_of(reader) != record.sealed.sha256:
                raise _unlike(record.sealed, reader.size)
        finally:
            reader.close()

    def bring(self, record: InstanceRecord, *, still: Callable[[], bool] = lambda: True) -> None:
        """Bring a landed object into the store; on return its digest there is confirmed. The spool keeps its file.

        Parameters
        ----------
        record
            Of the instance.
        still
            Asked before anything in the store is deleted: does its row still say that the object lies here?

        Raises
        ------
        InstanceNotFound
            Neither spool nor store has it.
        IntegrityError
            The spool's bytes are not those that were sealed: the disk lost what it had promised.
        Unavailable
            The store does not take it now.
        """
        if self._spool is None:
            raise RuntimeError("a node without a spool has nothing to bring")
        object_key = record.sealed.object_key
        reader = None
        try:
            reader = self._spool.open(object_key)
        except InstanceNotFound:
            self.require_whole(replace(record, landed_on=""))  # brought before, by a process that died before its commit
            return
        try:
            # An upload of other bytes would be refused by the read-back; found here, it is known which side is at fault.
            if reader.size != record.sealed.byte_count or digest_of(reader) != record.sealed.sha256:
                raise IntegrityError(
                    f"landed object {object_key} is not what was sealed: the disk changed it; have it sent again, replace the disk"
                )
        finally:
            reader.close()
        path, tags = self._spool.path_of(object_key), {"role": record.role}
        try:
            self.store.put(object_key, path, record.sealed, tags=tags)
        except IntegrityError as error:
            # The spool's bytes were compared a moment ago: the store kept other bytes of an earlier try and could not be asked then.
            _log.warning("store.spoilt", extra={"object_key": object_key, "reason": str(error)})
            try:
                self.require_whole(replace(record, landed_on=""))
            except (InstanceNotFound, IntegrityError) as found:
                try:
                    # another process may bring it, and settle the spool's file, between the answer and what follows
                    with self._spool.held(object_key) as kept:
                        if not still():  # what is there now is the row's own
                            raise _brought_meanwhile() from found
                        self.store.delete(object_key)
                        self.store.put(object_key, kept, record.sealed, tags=tags)
                except InstanceNotFound:
                    raise _brought_meanwhile() from found

    def settle(self, sealed: SealedObject) -> None:
        """After the commit that says so: what was brought is in the store, the spool's file becomes a cached copy, or goes."""
        if self._spool is None:
            return
        try:
            self.keep_copy(sealed, self._spool.path_of(sealed.object_key))
            self._spool.delete(sealed.object_key)
            self._forget_document(self._spool, f"keys/{sealed.key_id[:2]}/{sealed.key_id}")
        except StorageError as error:
            _log.warning("spool.left", extra={"object_key": sealed.object_key, "reason": str(error)})  # the sweep finds it

    @staticmethod
    def _forget_document(spool: DirectoryStore, name: str) -> None:
        """Remove the document of a key that is in the store now; mostly another object of the study was faster."""
        try:
            spool.get_document(name)
        except InstanceNotFound:
            return
        spool.delete_document(name)

    def delete(self, record: InstanceRecord, *, versions: bool = False) -> None:
        """Remove the object from every place of this node and from the store; `versions` as `ObjectStore.delete`."""
        object_key = record.sealed.object_key
        if self._cache is not None:
            self._cache.drop(object_key)
        if self._spool is not None:
            self._spool.delete(object_key)
        if not record.landed_on or versions:
            self.store.delete(object_key, versions=versions)

    def erase(self, object_key: str) -> None:
        """Remove an object for good: every version in the store, and what this node has of it."""
        if self._cache is not None:
            self._cache.drop(object_key)
        if self._spool is not None:
            self._spool.delete(object_key, versions=True)
        self.store.delete(object_key, versions=True)

    def erase_document(self, name: str) -> None:
        """Remove a document for good, from store and spool."""
        if self._spool is not None:
            self._spool.delete_document(name)
        self.store.delete_document(name)

    def landed(self) -> Iterator[str]:
        """Yield the keys of the objects in the spool."""
        if self._spool is not None:
            for info in self._spool.list():
                yield info.object_key

    def crowded(self) -> bool:
        """Whether less than a tenth of the spool's disk is free, or nobody can say: what landed should leave it."""
        if self._spool is None:
            return False
        try:
            space = os.statvfs(self._spool.path_of("0" * 32).parent)
        except OSError:
            return True
        return space.f_bavail * 10 < space.f_blocks

    def check(self) -> None:
        """Raise Unavailable when nothing can be put: with a spool the store may be away for a while, and landing goes on."""
        if self._spool is not None:
            self._spool.check()
        else:
            self.store.check()

    def _cached(self, sealed: SealedObject) -> ObjectReader | None:
        """Return the cached copy, made now when it is worth it; its digest is compared each time: the cache is nobody's promise."""
        if self._cache is None or sealed.byte_count > self._cached_bytes:
            return None
        reader = self._cache.open(sealed.object_key)
        if reader is None:
            source = self.store.open(sealed.object_key)
            try:
                if source.size != sealed.byte_count:
                    return None  # the caller opens the object itself, and says what is wrong with it
                self._cache.fill(sealed.object_key, chunks_of(source), sealed.sha256, sealed.byte_count)
            finally:
                source.close()
            reader = self._cache.open(sealed.object_key)
        if reader is not None and (reader.size != sealed.byte_count or digest_of(reader) != sealed.sha256):
            reader.close()
            self._cache.drop(sealed.object_key)
            return None
        return reader


def chunks_of(reader: ObjectReader) -> Iterator[bytes]:
    """Yield the whole object in pieces of a megabyte."""
    for offset in range(0, reader.size, _CHUNK):
        yield reader.read_at(offset, _CHUNK)


def _unlike(sealed: SealedObject, byte_count: int) -> IntegrityError:
    return IntegrityError(f"object {sealed.object_key} is not what was sealed ({byte_count} bytes, {sealed.byte_count} expected)")


def _brought_meanwhile() -> Unavailable:
    return Unavailable("the object was brought, replaced or erased meanwhile: its row says what is left to do")


def digest_of(reader: ObjectReader) -> str:
    """Return the SHA-256 of the sealed bytes, hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks_of(reader):
        digest.update(chunk)
    return digest.hexdigest()
