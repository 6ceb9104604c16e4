"""An archived instance, opened for reading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from storage.envelope import Opener
from storage.errors import IntegrityError
from storage.part10 import part10_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from storage.objects import ObjectReader
    from storage.records import InstanceRecord
    from storage.study_keys import StudyKeys


class StoredInstance:
    """An archived instance, opened: decrypts only the segments that are read. A context manager, for one thread at a time."""

    def __init__(
        self,
        record: InstanceRecord,
        reader: ObjectReader,
        study_keys: StudyKeys,
        damaged: Callable[[InstanceRecord, IntegrityError], None],
    ) -> None:
        self.record = record
        self._reader = reader
        self._damaged = damaged
        try:
            self._opener = Opener(study_keys, record.sealed.object_key, reader.read_at, reader.size)
        except IntegrityError as error:
            reader.close()
            damaged(record, error)
            raise
        except BaseException:
            reader.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the data set, as received."""
        return self.record.summary.byte_count

    @property
    def prefix(self) -> bytes:
        """Preamble, prefix and File Meta Information of ours (PS3.10 Section 7.1)."""
        summary = self.record.summary
        return part10_prefix(
            sop_class_uid=summary.sop_class_uid,
            sop_instance_uid=summary.sop_instance_uid,
            transfer_syntax_uid=summary.transfer_syntax_uid,
        )

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Return data set bytes from `offset`; fewer than `length` only at the end.

        Raises
        ------
        IntegrityError
            The sealed bytes are not what was stored; none of the changed ones are given.
        """
        wanted = max(0, self.size - offset if length is None else min(length, self.size - offset))
        try:
            return self._opener.read(offset, wanted)
        except IntegrityError as error:
            self._damaged(self.record, error)
            raise

    def chunks(self) -> Iterator[bytes]:
        """Yield the data set in pieces of about 1 MiB, as they were sealed."""
        try:
            yield from self._opener.chunks()
        except IntegrityError as error:
            self._damaged(self.record, error)
            raise

    def part10(self) -> Iterator[bytes]:
        """Yield the instance as a Part 10 file, in pieces."""
        yield self.prefix
        yield from self.chunks()

    def close(self) -> None:
        """Close the object; may be called twice."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
