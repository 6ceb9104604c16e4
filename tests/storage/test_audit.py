"""Audit trail: the chain names the exact record that was touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from storage.audit import GENESIS, AuditTrail
from storage.records import AuditEvent
from tests.storage.support import RECEIVED, open_database

if TYPE_CHECKING:
    from storage.database import Database


def event(number: int) -> AuditEvent:
    """Return one of a row of different events."""
    return AuditEvent(
        "instance.received", "success", "PACS", f"1.2.{number % 3}", {"name": "Müller^山田", "number": number, "more": [1.5, None]}
    )


@pytest.fixture
def trail(database: Database) -> AuditTrail:
    """Return a trail of nine records."""
    trail = AuditTrail(database=database)
    for number in range(1, 10):
        assert trail.record(event(number)) == number
    return trail


def tamper(database: Database, *statements: str) -> None:
    """Change the tables behind the trail's back."""
    for statement in statements:
        database.write(lambda connection, statement=statement: connection.execute(text(statement)))


def test_events_come_back_as_they_were_recorded(database: Database, trail: AuditTrail) -> None:
    """What was recorded is read back whole and in order, by subject and in full, with the clock's time."""
    assert [entry.event for entry in trail.events_of("1.2.1")] == [event(1), event(4), event(7)]
    assert [entry.event for entry in trail.entries()] == [event(number) for number in range(1, 10)]
    database.clock = lambda: RECEIVED
    trail.record(event(10))
    assert trail.events_of("1.2.1")[-1].at == RECEIVED


def test_a_text_with_nul_is_recorded_as_it_is_stored(trail: AuditTrail) -> None:
    """What a peer called itself cannot break the chain: no database holds NUL, and the hash is over what it holds."""
    trail.record(AuditEvent("x", "a\0b", "c\0", "\0", {"detail": "\0"}))
    assert (trail.verify(), [entry.event.outcome for entry in trail.entries()][-1]) == (None, "a\ufffdb")


def test_an_untouched_trail_verifies(database: Database, trail: AuditTrail, place: str) -> None:
    """No fault is found in an empty trail, in a full one, nor in one that another process continues."""
    assert trail.verify() is None
    other = open_database(place)
    AuditTrail(database=other).record(event(10))
    other.close()
    trail.record(event(11))
    assert trail.verify() is None
    assert trail.head()[0] == 11
    tamper(database, "DELETE FROM audit", f"UPDATE audit_head SET seq = 0, hash = '{GENESIS}'")  # noqa: S608
    assert trail.verify() is None


def test_an_event_lives_and_dies_with_its_transaction(database: Database, trail: AuditTrail) -> None:
    """A work that raises leaves no record and no gap in the chain."""

    def work(connection: object) -> None:
        trail.append(connection, event(10))  # type: ignore[arg-type]
        raise LookupError

    with pytest.raises(LookupError):
        database.write(work)
    assert trail.record(event(10)) == 10
    assert trail.verify() is None


def test_a_detail_that_is_no_json_is_refused(trail: AuditTrail) -> None:
    """What could not be read back in the same form is not recorded."""
    with pytest.raises(TypeError):
        trail.record(AuditEvent("x", "success", "me", detail={"bytes": b""}))
    assert trail.verify() is None


@pytest.mark.parametrize(
    ("statements", "seq"),
    [
        (["UPDATE audit SET outcome = 'failure' WHERE seq = 4"], 4),
        (["UPDATE audit SET at = at + 1 WHERE seq = 4"], 4),
        (["UPDATE audit SET subject = '1.2.9' WHERE seq = 9"], 9),
        (["UPDATE audit SET detail = '{}' WHERE seq = 1"], 1),
        (["UPDATE audit SET actor = action, action = actor WHERE seq = 3"], 3),
        (["UPDATE audit SET hash = 'zz' WHERE seq = 5"], 5),
        (["DELETE FROM audit WHERE seq = 1"], 1),
        (["DELETE FROM audit WHERE seq = 6"], 6),
        (["DELETE FROM audit WHERE seq = 6", "UPDATE audit SET seq = seq - 1 WHERE seq > 6"], 6),
        (
            [
                "UPDATE audit SET seq = 100 WHERE seq = 2",
                "UPDATE audit SET seq = 2 WHERE seq = 3",
                "UPDATE audit SET seq = 3 WHERE seq = 100",
            ],
            2,
        ),
        (["DELETE FROM audit WHERE seq >= 8"], 8),
        (["DELETE FROM audit"], 1),
        (["DELETE FROM audit_head"], 9),
        (["UPDATE audit_head SET seq = 8"], 9),
        (["UPDATE audit_head SET hash = substr(hash, 2) || substr(hash, 1, 1)"], 9),
        (["INSERT INTO audit SELECT 10, at, action, outcome, actor, subject, detail, hash FROM audit WHERE seq = 9"], 10),
    ],
)
def test_every_tampering_is_named(database: Database, trail: AuditTrail, statements: list[str], seq: int) -> None:
    """Edited, deleted, moved, inserted records and a cut tail break the chain at that very record (threats row 92)."""
    tamper(database, *statements)
    fault = trail.verify()
    assert fault is not None
    assert fault.seq == seq
    assert fault.reason
