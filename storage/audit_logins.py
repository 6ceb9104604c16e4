"""Who identified himself, in the audit trail: the other half of what is refused there (DICOM PS3.15 A.5.3.11 User Authentication, Login).

DICOM and HTTP know no session that a user opens and closes: a sender identifies himself with each association, many times a minute perhaps.
So a login is recorded when it is the first within the hour of this user, from this address, by this means; what is done under the identity
is recorded with its name in any case. There is nothing like a logout.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from storage.records import AuditEvent

if TYPE_CHECKING:
    from storage.audit import AuditTrail

EVERY_S: Final = 3600.0
_REMEMBERED: Final = 10_000


class Logins:
    """Records logins. May be called from many threads.

    Parameters
    ----------
    audit
        Where they are recorded.
    every_s
        Seconds for which a login is not recorded again.
    monotonic
        Seconds of a clock that is never set.
    """

    def __init__(self, *, audit: AuditTrail, every_s: float = EVERY_S, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._every_s = every_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple[str, str, str, str], float] = OrderedDict()

    def note(self, user: str, *, address: str, by: str, issuer: str = "") -> None:
        """Record that a user identified himself, unless that is known; durable on return.

        Parameters
        ----------
        user
            As he is called.
        address
            Where he calls from.
        by
            How he was known: name, passcode, token.
        issuer
            Of a token.

        Raises
        ------
        Unavailable
            It is not recorded: he must not be let in.
        """
        login = (user, address, by, issuer)
        with self._lock:
            told_at = self._told.get(login)
        now = self._monotonic()
        if told_at is not None and now - told_at < self._every_s:
            return
        detail = {"address": address, "by": by, **({"issuer": issuer} if issuer else {})}
        self._audit.record(AuditEvent("user.identified", "success", user, detail=detail))
        with self._lock:
            self._told[login] = now
            self._told.move_to_end(login)
            if len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
