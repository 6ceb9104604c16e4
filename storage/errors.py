"""The error tree. The class carries the number that both doors answer with; no ladder of ``isinstance`` anywhere.

::

    StorageError
    ├── InvalidInstance          framing, UID, geometry or limits     0xC000  no retry
    ├── MismatchedInstance       not what the command or path said    0xA900  no retry
    ├── UnsupportedInstance      SOP class or transfer syntax         0x0122  no retry
    ├── ConflictingInstance      same UID, other content              0x0111  no retry
    ├── InstanceNotFound         no such instance                     0x0112  no retry
    ├── InvalidQuery             a matching key that cannot be read   0xA900  no retry
    ├── LeaseLost                another worker holds the job now     0x0110  no retry
    ├── Unavailable              store, database or disk              0xA700  retry
    │   ├── ColdObject           in a cold storage class, being restored
    │   ├── KeyNotHere           another node's key wrapped it
    │   └── LostObject           lost with the disk of a node           0xA700  no retry
    └── IntegrityError           tag, digest or chain mismatch        0x0110  no retry, alarm

References
----------
DICOM PS3.4 Table B.2-1, PS3.7 Annex C, PS3.18 Table I.2-2
"""

from __future__ import annotations


class StorageError(Exception):
    """An operation of the archive failed; the message names cause and remedy and holds no patient data."""

    failure_reason = 0x0110  # Processing failure
    retryable = False


class InvalidInstance(StorageError):
    """The bytes are no complete, well-framed data set, or exceed a configured limit."""

    failure_reason = 0xC000  # Error: Cannot understand


class MismatchedInstance(StorageError):
    """The data set is not the one that the command set, the context or the URL path announced."""

    failure_reason = 0xA900  # Error: Data Set does not match SOP Class


class UnsupportedInstance(StorageError):
    """The SOP class or the transfer syntax is not accepted by this configuration."""

    failure_reason = 0x0122  # Refused: SOP Class not supported


class ConflictingInstance(StorageError):
    """An instance of the same SOP Instance UID and other content is archived; this one is in quarantine."""

    failure_reason = 0x0111  # Duplicate SOP Instance


class InstanceNotFound(StorageError):
    """No such study, series or instance."""

    failure_reason = 0x0112  # No such SOP Instance


class InvalidQuery(StorageError):
    """A matching key is unknown at this level, or its value is none of its value representation; HTTP answers 400."""

    failure_reason = 0xA900  # C-FIND: Identifier does not match SOP Class (PS3.4 Table C.4-1)


class LeaseLost(StorageError):
    """The lease of the job ran out and another worker took it (or it was requeued): drop the work, its result is not wanted."""


class Unavailable(StorageError):
    """Store, database or disk cannot take or give bytes now; nothing was lost, try again later."""

    failure_reason = 0xA700  # Refused: Out of resources
    retryable = True


class ColdObject(Unavailable):
    """The object is in a storage class that cannot be read at once; its restore was started.

    Parameters
    ----------
    message
        Cause and remedy.
    retry_after_s
        Seconds after which asking again makes sense.
    """

    def __init__(self, message: str, retry_after_s: int = 14_400) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyNotHere(Unavailable):
    """A study key was wrapped by a key that the ring of this node lacks: another node has it, or a backup of the ring.

    No sign of damage: it opens as soon as the ring is copied here, without a restart. Nor is the store away: what comes after it is read.
    """


class LostObject(Unavailable):
    """The object lay on the disk of a node alone that was declared lost: until the instance is sent again there is nothing to read.

    Neither not found (the row is there, and a query gives it) nor a fault to alarm about (the loss was declared, and is in the audit
    trail). To ask again does not help; to send the instance does. HTTP answers 410.
    """

    retryable = False


class IntegrityError(StorageError):
    """Stored bytes are not what was stored: authentication tag, digest or chain mismatch."""

    failure_reason = 0x0110  # Processing failure
