"""Peers added while the node runs: what the table keeps, and what the audit trail says of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from storage.audit import AuditTrail
from storage.database import Database
from storage.known_peers import KnownPeer, KnownPeers
from storage.records import JobKind, NewJob
from storage.work import WorkQueue


def anything(_others: Sequence[KnownPeer]) -> None:
    """Let everyone in."""


def test_added_and_removed(database: Database) -> None:
    """What was added is listed in order until it is removed; both are in the audit trail, with who and what."""
    audit = AuditTrail(database=database)
    known = KnownPeers(database=database, audit=audit)
    known.add("two", {"ae_title": "TWO"}, actor="ann", check=anything)
    known.add("one", {"ae_title": "ONE", "port": 104}, actor="bob", check=anything)
    assert [(one.name, one.settings, one.added_by) for one in known.all()] == [
        ("two", {"ae_title": "TWO"}, "ann"),
        ("one", {"ae_title": "ONE", "port": 104}, "bob"),
    ]
    assert known.remove("two", actor="eve")
    assert not known.remove("two", actor="eve")
    assert [one.name for one in known.all()] == ["one"]
    events = [(entry.event.action, entry.event.actor, entry.event.detail["peer"]) for entry in audit.entries()]
    assert events == [("peer.added", "ann", "two"), ("peer.added", "bob", "one"), ("peer.removed", "eve", "two")]
    assert audit.verify() is None


def test_what_the_check_refuses_leaves_no_trace(database: Database) -> None:
    """The check sees who is there, in the transaction; what it refuses is neither in the table nor in the audit trail."""
    audit = AuditTrail(database=database)
    known = KnownPeers(database=database, audit=audit)
    known.add("one", {}, actor="ann", check=anything)

    def refuse(others: Sequence[KnownPeer]) -> None:
        assert [one.name for one in others] == ["one"]
        raise ValueError("clash")

    with pytest.raises(ValueError, match="clash"):
        known.add("two", {}, actor="ann", check=refuse)
    assert [one.name for one in known.all()] == ["one"]
    assert audit.head()[0] == 1


def test_what_waited_for_a_peer_goes_at_once(database: Database) -> None:
    """Deliveries that failed since nobody bore the name, and wait for a long time, are due when a peer of that name is added."""
    queue = WorkQueue(database=database, delay=lambda _: 3600.0)
    known = KnownPeers(database=database, audit=AuditTrail(database=database))
    for lane in ("pacs", "other"):
        database.write(lambda connection, lane=lane: queue.enqueue(connection, NewJob(JobKind.DELIVER, "1.2.3", lane=lane)))  # type: ignore[misc]
        job = queue.claim(JobKind.DELIVER, lane=lane, owner="courier")
        assert job is not None
        queue.fail(job, "no peer is called so", retryable=True)
    assert list(queue.lanes(JobKind.DELIVER)) == []
    known.add("pacs", {"ae_title": "PACS"}, actor="ann", check=anything)
    assert list(queue.lanes(JobKind.DELIVER)) == ["pacs"]


def test_what_waits_for_a_peer(database: Database) -> None:
    """Reports that are to be delivered to a peer are counted, others and delivered ones are not."""
    queue = WorkQueue(database=database)
    known = KnownPeers(database=database, audit=AuditTrail(database=database))
    for number, lane in enumerate(("pacs", "pacs", "pacs", "other")):
        job = NewJob(JobKind.DELIVER, f"1.2.{number}", lane=lane)
        database.write(lambda connection, job=job: queue.enqueue(connection, job))  # type: ignore[misc]
    claimed = queue.claim(JobKind.DELIVER, lane="pacs", owner="test")
    assert claimed is not None
    queue.finish(claimed, {})
    assert known.waiting("pacs") == 2
    assert known.waiting("nobody") == 0
