"""A database belongs to one ring: the first that a node starts with, and its copies, whatever becomes of its keys."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from storage.audit import AuditTrail
from storage.database import Database
from storage.errors import Unavailable
from storage.keys import Ring
from storage.ring_identity import BOUND, RingIdentity, fingerprint


def identity(database: Database, ring: Ring) -> RingIdentity:
    """Return what a node with this ring asks."""
    return RingIdentity(database=database, audit=AuditTrail(database=database), ring=ring)


def test_the_first_ring_stays(database: Database, tmp_path: Path) -> None:
    """Bound once and recorded once; its copies are it, with other keys too; any other ring is refused, and told how it is known."""
    path = tmp_path / "ring.json"
    ring, other = Ring.create(path), Ring.create(tmp_path / "other.json")
    assert identity(database, other).fault() == ""
    identity(database, ring).bind()
    former = ring.primary_key_id
    Ring.add(path)
    Ring.remove(path, former)
    copy = tmp_path / "copy.json"
    copy.touch(mode=0o600)
    copy.write_bytes(path.read_bytes())
    for same in (ring, Ring.load(path), Ring.load(copy)):
        identity(database, same).bind()
        assert identity(database, same).fault() == ""
    with pytest.raises(Unavailable, match=f"belongs to another ring.*{fingerprint(ring)}.*copy the ring"):
        identity(database, other).bind()
    assert "other.json" in identity(database, other).fault()
    (event,) = (entry.event for entry in AuditTrail(database=database).entries())
    assert (event.action, event.actor, event.detail) == (BOUND, "node", {"ring": fingerprint(ring), "keys": [former]})


def test_two_at_once(database: Database, tmp_path: Path) -> None:
    """Of many that start on an empty database at the same moment, with two rings, the copies of one win and all others are told."""
    rings = [Ring.create(tmp_path / f"ring{number}.json") for number in range(2)]
    told: list[str] = []
    ready = threading.Barrier(8)

    def start(number: int) -> None:
        ready.wait()
        try:
            identity(database, rings[number % 2]).bind()
        except Unavailable:
            told.append(fingerprint(rings[number % 2]))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (event,) = (entry.event for entry in AuditTrail(database=database).entries())
    assert set(told) == {fingerprint(ring) for ring in rings} - {event.detail["ring"]}
    assert len(told) == 4


def test_the_fingerprint_opens_nothing(tmp_path: Path) -> None:
    """What the trail tells is none of the ring's secrets, nor begins with one."""
    ring = Ring.create(tmp_path / "ring.json")
    for secret in (ring.database_key(), ring.derive("ring identity")):
        assert fingerprint(ring) not in secret.hex()
