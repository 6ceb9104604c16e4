"""Do store and index agree? Every object read again, both directions compared; the whole run for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from storage.errors import ColdObject, InstanceNotFound, IntegrityError, LostObject, Unavailable
from storage.records import AuditEvent
from storage.scrub import Elsewhere, Unread, alarm, check_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from storage.audit import AuditTrail
    from storage.index import Index
    from storage.objects import ObjectStore
    from storage.places import Places
    from storage.study_keys import StudyKeys

_PAGE = 500


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
    cold: int = 0
    """Of the objects: in a cold class, their length alone was compared."""
    elsewhere: int = 0
    """Of the objects: on another node's disk yet."""
    lost: list[str] = field(default_factory=list)
    """Object keys of instances that were lost with the disk of a node that was declared lost, and were not sent again yet."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Object key -> why the store or its disk cannot give it now, though it gives others."""

    @property
    def intact(self) -> bool:
        """Whether nothing that was acknowledged is lost, changed or in doubt; objects without a row are no loss."""
        return not self.missing and not self.damaged and not self.unreadable and not self.lost and not self.audit_fault

    def lines(self) -> list[str]:
        """Return the findings for people, one a line; object keys, no identities."""
        return [
            f"{self.checked} objects read, {self.byte_count} bytes",
            *([f"{self.cold} of them lie in a cold class: their length alone was compared"] if self.cold else []),
            *([f"{self.elsewhere} of them lie on another node's disk yet: not read"] if self.elsewhere else []),
            *(f"object {key} was lost with the disk of its node: have the instance sent again" for key in self.lost),
            *(f"object {key} is gone from the store" for key in self.missing),
            *(f"object {key}: {reason}" for key, reason in self.damaged.items()),
            *(f"object {key} cannot be read now, others can: {reason}" for key, reason in self.unreadable.items()),
            *(f"object {key} is in no row of the index: left by a crash, or the index is older than the store" for key in self.unindexed),
            f"audit trail: {self.audit_fault}" if self.audit_fault else "audit trail: whole",
        ]


def verify(
    *,
    index: Index,
    places: Places,
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
        Store or database cannot be read; nothing can be said of what is left. Where it is a few objects alone, they are named.
    """
    store = places.store
    missing: list[str] = []
    damaged: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    lost: list[str] = []
    patience = Unread()
    checked = byte_count = cold = elsewhere = 0
    for known in index.all_objects():
        try:
            check_object(known, index=index, places=places, study_keys=study_keys, thorough=True)
            patience.over()
        except ColdObject:
            cold += 1
        except Elsewhere:
            elsewhere += 1
        except LostObject:
            lost.append(known.object_key)
            continue
        except Unavailable as error:
            patience.note(known.object_key, error)
            unreadable[known.object_key] = str(error)
            continue
        except (InstanceNotFound, IntegrityError) as error:
            if index.record_of_object(known.object_key) is None:
                continue  # erased or replaced meanwhile
            if isinstance(error, InstanceNotFound):
                missing.append(known.object_key)
                alarm(audit, known, "the object is gone from the store")
            else:
                damaged[known.object_key] = str(error)
                alarm(audit, known, str(error))
        checked += 1
        byte_count += known.byte_count
        progress(checked, None)
    unindexed: list[str] = []
    listed = (info.object_key for info in store.list())
    while page := list(islice(listed, _PAGE)):
        unindexed += sorted(set(page) - index.known_objects(page))
    # What had no row may have been on its way in; by now it has one, or was dropped as a duplicate.
    known_now = index.known_objects(unindexed)
    unindexed = [object_key for object_key in unindexed if object_key not in known_now and _there(store, object_key)]
    fault = audit.verify()
    found = Reconciliation(
        checked=checked,
        byte_count=byte_count,
        missing=missing,
        damaged=damaged,
        unindexed=unindexed,
        audit_fault=fault.reason if fault else "",
        cold=cold,
        elsewhere=elsewhere,
        lost=lost,
        unreadable=unreadable,
    )
    audit.record(
        AuditEvent(
            action="archive.verified",
            outcome="success" if found.intact else "objects or audit records are missing, lost, damaged or cannot be read",
            actor="node",
            detail={
                "checked": checked,
                "missing": len(missing),
                "damaged": len(damaged),
                "unindexed": len(unindexed),
                "cold": cold,
                "elsewhere": elsewhere,
                "lost": len(lost),
                "unreadable": len(unreadable),
            },
        ),
    )
    return found


def _there(store: ObjectStore, object_key: str) -> bool:
    try:
        store.stat(object_key)
    except InstanceNotFound:
        return False
    except Unavailable:
        return True  # the listing names it
    return True
