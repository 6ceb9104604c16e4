"""Do store and index agree? Every object read again, both directions compared; and what a crash left is removed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from storage.envelope import Opener
from storage.errors import InstanceNotFound, IntegrityError
from storage.records import AuditEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from storage.audit import AuditTrail
    from storage.index import ArchivedObject, Index
    from storage.objects import ObjectStore
    from storage.study_keys import StudyKeys

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What `verify` found."""

    checked: int = 0
    """Objects read."""
    byte_count: int = 0
    """Sealed bytes read."""
    missing: list[str] = field(default_factory=list)
    """Object keys that the index knows and the store does not: lost instances."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Object key -> what is wrong with it."""
    unindexed: list[str] = field(default_factory=list)
    """Object keys that the store knows and the index does not: left by a crash, or the index is older than the store."""
    audit_fault: str = ""
    """First break of the audit trail's chain; empty when there is none."""

    @property
    def intact(self) -> bool:
        """Whether nothing that was acknowledged is lost or changed; objects without a row are no loss."""
        return not self.missing and not self.damaged and not self.audit_fault

    def lines(self) -> list[str]:
        """Return the findings for people, one a line; object keys, no identities."""
        return [
            f"{self.checked} objects read, {self.byte_count} bytes",
            *(f"object {key} is gone from the store" for key in self.missing),
            *(f"object {key}: {reason}" for key, reason in self.damaged.items()),
            *(f"object {key} is in no row of the index: left by a crash, or the index is older than the store" for key in self.unindexed),
            f"audit trail: {self.audit_fault}" if self.audit_fault else "audit trail: whole",
        ]


def verify(
    *,
    index: Index,
    store: ObjectStore,
    study_keys: StudyKeys,
    audit: AuditTrail,
    progress: Callable[[int, int | None], object],
) -> Reconciliation:
    """Read every indexed object again and look for objects without a row. May run beside ingest.

    Of each object the sealed bytes are compared with the row's digest, every segment is opened, and the digest of the data set compared
    with that of the footer and the row. The audit trail's chain is walked too. ``progress`` is called with the
    number of objects done and None (how many there will be is not known). Findings and the end of the run are recorded in the audit trail.

    Raises
    ------
    Unavailable
        Store or database cannot be read; nothing can be said of what is left.
    """
    listed = [info.object_key for info in store.list()]
    known_keys: set[str] = set()
    missing: list[str] = []
    damaged: dict[str, str] = {}
    checked = byte_count = 0
    for known in index.all_objects():
        known_keys.add(known.object_key)
        try:
            _verify_object(index, store, study_keys, known)
        except InstanceNotFound:
            missing.append(known.object_key)
            _record(audit, known, "the object is gone from the store")
        except IntegrityError as error:
            damaged[known.object_key] = str(error)
            _record(audit, known, str(error))
        checked += 1
        byte_count += known.byte_count
        progress(checked, None)
    unindexed = [object_key for object_key in listed if object_key not in known_keys]
    if unindexed:
        # What had no row may have been on its way in; by now it has one, or was dropped as a duplicate.
        known_keys = {known.object_key for known in index.all_objects()}
        unindexed = [object_key for object_key in unindexed if object_key not in known_keys and _there(store, object_key)]
    fault = audit.verify()
    found = Reconciliation(checked, byte_count, missing, damaged, unindexed, fault.reason if fault else "")
    audit.record(
        AuditEvent(
            action="archive.verified",
            outcome="success" if found.intact else "objects or audit records are missing or damaged",
            actor="node",
            detail={"checked": checked, "missing": len(missing), "damaged": len(damaged), "unindexed": len(unindexed)},
        ),
    )
    return found


def _there(store: ObjectStore, object_key: str) -> bool:
    try:
        store.open(object_key).close()
    except InstanceNotFound:
        return False
    return True


def _verify_object(index: Index, store: ObjectStore, study_keys: StudyKeys, known: ArchivedObject) -> None:
    reader = store.open(known.object_key)
    try:
        sealed = hashlib.sha256()
        for offset in range(0, reader.size, _CHUNK):
            sealed.update(reader.read_at(offset, _CHUNK))
        if (reader.size, sealed.hexdigest()) != (known.byte_count, known.sha256):
            raise IntegrityError("the sealed bytes are not those that were stored")
        opener = Opener(study_keys, known.object_key, reader.read_at, reader.size)
        plain = hashlib.sha256()
        for chunk in opener.chunks():
            plain.update(chunk)
        digests = {plain.hexdigest(), opener.footer()["summary"]["sha256"]}
        if not known.quarantined:
            digests.add(index.find(known.sop_instance_uid).summary.sha256)
        if len(digests) != 1:
            raise IntegrityError("data set, footer and row do not tell the same digest")
    finally:
        reader.close()


def _record(audit: AuditTrail, known: ArchivedObject, outcome: str) -> None:
    audit.record(
        AuditEvent(
            action="instance.damaged",
            outcome=outcome,
            actor="node",
            subject=known.sop_instance_uid,
            detail={"object_key": known.object_key},
        ),
    )
