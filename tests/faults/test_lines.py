"""Lines between a sender and the door that are slow, cut or reset: nothing is doubled, nothing is lost, nobody else waits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer
from tests.dicom_node.door import Door, draw, open_door, open_rooms
from tests.dicom_node.test_scu import Held, held
from tests.faults.proxy import Proxy


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """A DIMSE door with an archive."""
    rooms = open_rooms(tmp_path)
    with open_door(rooms) as opened:
        yield opened
    rooms.archive.close()
    rooms.database.close()


@pytest.fixture
def line(door: Door) -> Iterator[Proxy]:
    """The line to it."""
    with Proxy("127.0.0.1", door.port) as proxy:
        yield proxy


def send(port: int, *items: Held) -> list[Held]:
    """Send and return those that were answered with Success; a broken line ends the batch."""
    peer = Peer("node", "DERM_NODE", "127.0.0.1", port)
    try:
        answers = list(StorageSCU(ae_title="SENDER", connect_s=10.0, answer_s=60.0).store(peer, items))
    except PeerUnreachable:
        return []
    return [item for item, outcome in answers if outcome == Stored(0)]  # type: ignore[misc]


def whole(door: Door, items: list[Held]) -> bool:
    """Whether the archive holds each of them as it was sent, and one of each."""
    for item in items:
        with door.rooms.archive.open(item.summary.sop_instance_uid) as stored:
            if stored.read() != item.data:
                return False
    return door.rooms.count() == len(items)


def test_the_answer_is_lost_on_the_wire(door: Door, line: Proxy) -> None:
    """The line breaks before the answer, wherever it breaks; the sender sends again: Success, one copy, the same bytes (fault 6)."""
    items = [held(draw()) for _ in range(4)]
    lost = 0
    for item, at_byte in zip(items, (1, 150, 250, 300), strict=True):
        line.cut_down(at_byte)
        lost += not send(line.port, item)
        door.settle()
        assert send(line.port, item) == [item]
    assert lost
    assert whole(door, items)
    actions = [entry.event.action for entry in door.rooms.audit.entries()]
    assert actions.count("instance.received") == len(items)


def test_control_a_whole_line_needs_no_second_sending(door: Door, line: Proxy) -> None:
    """Negative control: over a whole line the first sending is answered, and a second one is a duplicate in the audit trail."""
    items = [held(draw()) for _ in range(4)]
    assert send(line.port, *items) == items
    assert [entry.event.action for entry in door.rooms.audit.entries()].count("instance.duplicate") == 0
    assert send(line.port, *items) == items
    assert [entry.event.action for entry in door.rooms.audit.entries()].count("instance.duplicate") == len(items)


def test_a_slow_line_is_slow_and_nothing_else(door: Door, line: Proxy) -> None:
    """10 kB/s with latency: it arrives, and a sender on another line is served meanwhile (fault 40)."""
    line.bytes_per_s, line.delay_s = 10_000, 0.1
    slow, quick = held(draw()), held(draw())
    assert send(door.port, quick) == [quick]
    assert send(line.port, slow) == [slow]
    assert whole(door, [quick, slow])


def test_a_line_that_is_reset_again_and_again(door: Door, line: Proxy) -> None:
    """Cut at drawn places in most of its associations: who sends until it is answered gets all of it in, once (fault 40)."""
    rng = random.Random(40)
    items = [held(draw()) for _ in range(12)]
    waiting, broken = list(items), 0
    for _ in range(200):
        if not waiting:
            break
        if rng.random() < 0.7:
            line.cut_up(rng.randrange(1, 3 * len(items[0].data)))
        done = send(line.port, *waiting)
        broken += len(done) < len(waiting)
        waiting = [item for item in waiting if item not in done]
    assert waiting == []
    assert broken
    door.settle()
    assert whole(door, items)
    assert door.rooms.landing() == []
