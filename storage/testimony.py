"""Testimony: what a sealed object says of itself, with no help of the index.

The footer of each object holds its record, and the store holds the keys' documents: whoever has the ring can read who sent what and when
from the bucket alone. That is what the orphan sweep and the rebuilding of the index live on.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from storage.envelope import Opener
from storage.errors import InstanceNotFound, IntegrityError, KeyNotHere
from storage.intake import footer_to_record
from storage.objects import CHUNK
from storage.records import InstanceRecord, SealedObject
from storage.study_keys import document_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from storage.objects import ObjectReader, ObjectStore
    from storage.study_keys import StudyKey, StudyKeys

_KEY_ID = re.compile(r"[0-9a-f]{32}")
_WHOLE = CHUNK + (64 << 10)
"""Objects up to this many bytes are read whole: an S3 reader has them with its one request anyway."""


class NoStudyKey(IntegrityError):
    """Neither table nor store has the key that an object is sealed under: its study was erased, or it was never admitted."""

    def __init__(self, study_key_id: str) -> None:
        super().__init__("no study key opens this object: its study was erased, or it was never admitted")
        self.study_key_id = study_key_id


@dataclass(frozen=True, slots=True)
class Testimony:
    """What an object says of itself."""

    record: InstanceRecord
    """The digest of the sealed bytes is empty unless they were read."""
    report: Mapping[str, Any] | None
    """Of a report made here: source_sop_instance_uid, kind, models, deliver_to."""
    study_key: StudyKey


class KeyRing:
    """Study keys from the table, or else from their documents in one of the stores. For several threads.

    Parameters
    ----------
    study_keys
        The table, and what opens documents.
    stores
        Where documents may lie; the first is the archive's, where a key whose document it has is *stored*.
    remembered
        How many keys are kept in memory.
    """

    def __init__(self, study_keys: StudyKeys, stores: Iterable[ObjectStore], *, remembered: int = 1000) -> None:
        self._study_keys = study_keys
        self._most = remembered
        self._stores = list(stores)
        self._remembered: OrderedDict[str, StudyKey] = OrderedDict()

    def find(self, study_key_id: str) -> StudyKey:
        """Return the key.

        Raises
        ------
        NoStudyKey
            There is none of that id.
        IntegrityError
            The ring does not open it.
        Unavailable
            Database, store or key service cannot be used now.
        """
        key = self._remembered.get(study_key_id)
        if key is None:
            key = self._look_up(study_key_id)
            self._remembered[study_key_id] = key
            if len(self._remembered) > self._most:
                self._remembered.popitem(last=False)
        return key

    def listed(self, study_key_id: str) -> bool:
        """Whether a listing of the stores names the key's document: a second witness, where one false 404 would cost an object."""
        name = document_name(study_key_id)
        prefix = name[: name.rindex("/") + 1]
        return any(name == found for store in self._stores for found in store.list_documents(prefix))

    def unwrap_data_key(self, study_key: StudyKey, wrapped: bytes) -> bytes:
        """As `StudyKeys.unwrap_data_key`."""
        return self._study_keys.unwrap_data_key(study_key, wrapped)

    def _look_up(self, study_key_id: str) -> StudyKey:
        if not _KEY_ID.fullmatch(study_key_id):
            raise IntegrityError("the object names its study key by no key's name: it is damaged")
        if self._study_keys.known([study_key_id]):
            return self._study_keys.get(study_key_id)
        damaged: IntegrityError | KeyNotHere | None = None
        for store in self._stores:
            try:
                key = self._study_keys.from_document(store.get_document(document_name(study_key_id)))
            except InstanceNotFound:
                continue
            except (IntegrityError, KeyNotHere) as error:
                damaged = damaged or error  # another store may have a good one
                continue
            return replace(key, stored=store is self._stores[0])
        raise damaged or NoStudyKey(study_key_id)


class _Unwrapper:
    """What an `Opener` needs of the study keys; remembers which key it was."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self.study_key: StudyKey | None = None

    def unwrap(self, study_key_id: str, wrapped: bytes) -> bytes:
        self.study_key = self._keys.find(study_key_id)
        return self._keys.unwrap_data_key(self.study_key, wrapped)


def hear(
    reader: ObjectReader,
    object_key: str,
    keys: KeyRing,
    *,
    told_sha256: Callable[[], str] | None = None,
    read: Callable[[int], object] = lambda _: None,
) -> Testimony:
    """Return what an object says of itself.

    Parameters
    ----------
    reader
        Of the sealed bytes.
    told_sha256
        Gives their digest as the store tells it, empty if it does not. Then a large object is not read but for its ends; without, every
        segment is opened and the data set's digest compared with what the object says.
    read
        Told how many bytes were read.

    Raises
    ------
    NoStudyKey
        No key opens it.
    IntegrityError
        It is damaged, or the ring does not open its key.
    Unavailable
        Store, database or key service cannot be used now.
    """
    size = reader.size
    read_at = reader.read_at
    sealed_sha256 = ""
    if size <= _WHOLE:
        content = reader.read_at(0, size)
        sealed_sha256 = hashlib.sha256(content).hexdigest()
        read(size)

        def from_memory(offset: int, length: int) -> bytes:
            return content[offset : offset + length]

        read_at = from_memory
    unwrapper = _Unwrapper(keys)
    opener = Opener(unwrapper, object_key, read_at, size)
    footer = opener.footer()
    if not sealed_sha256 and told_sha256 is not None:
        sealed_sha256 = told_sha256()
    if not sealed_sha256:
        sealed_sha256 = _digest(reader, read)
    try:
        record = footer_to_record(footer, SealedObject(object_key, size, sealed_sha256, opener.key_id))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the record of object {object_key} was written by another version of the node: use that one") from error
    if told_sha256 is None:
        plain = hashlib.sha256()
        for chunk in opener.chunks():
            plain.update(chunk)
            read(len(chunk))
        if plain.hexdigest() != record.summary.sha256:
            raise IntegrityError("data set and footer do not tell the same digest")
    if unwrapper.study_key is None:
        raise AssertionError("an opener that opened asked for a key")
    if unwrapper.study_key.study_instance_uid != record.summary.study_instance_uid:
        raise IntegrityError("the object is sealed under the key of another study")
    return Testimony(record, footer.get("report"), unwrapper.study_key)


def _digest(reader: ObjectReader, read: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    for offset in range(0, reader.size, CHUNK):
        chunk = reader.read_at(offset, CHUNK)
        digest.update(chunk)
        read(len(chunk))
    return digest.hexdigest()
