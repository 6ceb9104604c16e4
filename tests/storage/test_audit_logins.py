"""Claims on logins: the first of an hour is in the audit trail, and nobody is let in whose login is not."""

from __future__ import annotations

import pytest

from storage.audit import AuditTrail
from storage.audit_logins import Logins
from storage.database import Database
from storage.errors import Unavailable


def test_the_first_login_of_an_hour_is_recorded(database: Database) -> None:
    """Each user, address and means by itself; after an hour again."""
    now = [0.0]
    trail = AuditTrail(database=database)
    logins = Logins(audit=trail, monotonic=lambda: now[0])
    for _ in range(3):
        logins.note("alice", address="10.0.0.1", by="passcode")
        logins.note("alice", address="10.0.0.2", by="passcode")
        logins.note("alice", address="10.0.0.1", by="token", issuer="https://clinic")
        now[0] += 1199.0
    now[0] = 3600.0
    logins.note("alice", address="10.0.0.1", by="passcode")
    events = [entry.event for entry in trail.entries()]
    assert {(event.action, event.outcome, event.actor) for event in events} == {("user.identified", "success", "alice")}
    assert [event.detail for event in events] == [
        {"address": "10.0.0.1", "by": "passcode"},
        {"address": "10.0.0.2", "by": "passcode"},
        {"address": "10.0.0.1", "by": "token", "issuer": "https://clinic"},
        {"address": "10.0.0.1", "by": "passcode"},
    ]


def test_a_login_that_was_not_recorded_is_none(database: Database) -> None:
    """With the trail away it fails, each time."""
    logins = Logins(audit=AuditTrail(database=database))
    database.close()
    for _ in range(2):
        with pytest.raises(Unavailable):
            logins.note("alice", address="10.0.0.1", by="passcode")
