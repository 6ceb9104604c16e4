"""Is it still there? Reads instances again from the store before anybody is promised that they are kept (PS3.4 Annex J)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from storage.commitments import PROCESSING_FAILURE
from storage.errors import InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.index import ArchivedObject
from storage.scrub import Pace, alarm, check_object

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.audit import AuditTrail
    from storage.commitments import Reference
    from storage.index import Index
    from storage.places import Places
    from storage.records import InstanceRecord
    from storage.study_keys import StudyKeys

COMMITTED = 0
NO_SUCH_INSTANCE = 0x0112
CLASS_CONFLICT = 0x0119
CLASS_NOT_SUPPORTED = 0x0122


class CommitmentCheck:
    """Says of a reference whether its instance is kept: its object was read from the store just now, and its digest is the one archived.

    An object that lies on the disk of a node yet (policy ``land``) is not in the store: nothing is promised of it before the Mover
    brought it there. The same holds for what lies in a cold class, or cannot be read now.

    Parameters
    ----------
    index, places, study_keys, audit
        Of the archive.
    supported
        Whether we store instances of a SOP class.
    """

    def __init__(
        self,
        *,
        index: Index,
        places: Places,
        study_keys: StudyKeys,
        audit: AuditTrail,
        supported: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._index = index
        self._places = places
        self._study_keys = study_keys
        self._audit = audit
        self._supported = supported

    def examine(
        self, references: Sequence[Reference], known: Sequence[int | None] = (), *, pace: Pace = lambda _: None
    ) -> Iterator[int | None]:
        """Give the failure reason of each reference, 0 for one that is committed, None where it is not known yet.

        Parameters
        ----------
        known
            What was found before: only where it is None is looked again.
        pace
            Told how many bytes were read; may raise to stop the work.
        """
        for place, reference in enumerate(references):
            before = known[place] if place < len(known) else None
            yield self._one(reference, pace) if before is None else before

    def _one(self, reference: Reference, pace: Pace) -> int | None:
        pace(0)
        try:
            record = self._index.find(reference.sop_instance_uid)
            if record.summary.sop_class_uid != reference.sop_class_uid:
                return CLASS_CONFLICT
            return self._read(record, pace)
        except InstanceNotFound:
            return NO_SUCH_INSTANCE if self._supported(reference.sop_class_uid) else CLASS_NOT_SUPPORTED
        except Unavailable:
            return None

    def _read(self, record: InstanceRecord, pace: Pace) -> int | None:
        if record.landed_on and self._places.remote:
            return None
        known = _object(record)
        try:
            check_object(known, index=self._index, places=self._places, study_keys=self._study_keys, pace=pace)
        except (InstanceNotFound, IntegrityError) as error:
            now = self._index.find(record.summary.sop_instance_uid)  # erased meanwhile: that is said
            if now.sealed.object_key != record.sealed.object_key:
                return None  # healed meanwhile
            gone = isinstance(error, InstanceNotFound)
            alarm(self._audit, known, "the object is gone from the store" if gone else str(error))
            return PROCESSING_FAILURE
        except Unavailable:
            raise
        except StorageError:
            return PROCESSING_FAILURE
        return COMMITTED


def _object(record: InstanceRecord) -> ArchivedObject:
    sealed, uid = record.sealed, record.summary.sop_instance_uid
    return ArchivedObject(sealed.object_key, uid, sealed.byte_count, sealed.sha256, sealed.key_id, record.landed_on, 0, quarantined=False)
