"""What keeps a node from starting, and what can go wrong on the way out. The class says whether trying again can help.

::

    DeliveryError
    ├── Refused            the peer answered, and will answer the same again (or, 0xA7xx, is out of resources for now)
    └── PeerUnreachable    no answer: no connection, no association, aborted, timed out      retry

References
----------
DICOM PS3.4 Table B.2-1 (C-STORE Response Status), PS3.7 Annex C
"""

from __future__ import annotations

OUT_OF_RESOURCES = range(0xA700, 0xA800)
"""Refused: Out of resources. The only failure of C-STORE that the standard calls temporary."""


class DeliveryError(Exception):
    """An instance did not arrive; the message names cause and remedy and holds no patient data."""

    retryable = False


class Refused(DeliveryError):
    """The peer will not take the instance.

    Parameters
    ----------
    status
        Status (0000,0900) of the C-STORE response; 0 where the refusal came before any response (no presentation context accepted).
    reason
        For people: what was refused, and what to do.
    comment
        Error Comment (0000,0902), the peer's words, which may hold anything: for the encrypted index, never for a log.
    """

    def __init__(self, status: int, reason: str, comment: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.comment = comment
        self.retryable = status in OUT_OF_RESOURCES


class PeerUnreachable(DeliveryError):
    """No answer from the peer; nothing is known of the instance's fate there, so it is sent again under the same UID."""

    retryable = True


class StartError(Exception):
    """The node cannot start; each fault is a sentence with its remedy."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults
