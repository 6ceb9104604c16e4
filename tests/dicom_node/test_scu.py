"""C-STORE out: to a door of our own with a real archive, to pynetdicom's SCP, and to scripted answers."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom.dsutils import decode

from dicom_node.dimse.connection import Outflow, Pace
from dicom_node.dimse.scu import StorageSCU, Stored, _fragments
from dicom_node.errors import PeerUnreachable, Refused
from dicom_node.peers import Peer
from storage.errors import IntegrityError, StorageError
from storage.records import Summary
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, Rooms, draw, encoded, open_door, open_rooms
from tests.dicom_node.scripted_peer import EXPLICIT, IMPLICIT, command, element, elements_of, even, item, pdu, pdv, us
from tests.ports import free_port

BIG_ENDIAN = "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4.50"
CONTEXT = -1


@dataclass(frozen=True)
class Held:
    """An instance held in memory, to send."""

    summary: Summary
    data: bytes
    step: int = 1000

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), self.step):
            yield self.data[start : start + self.step]


def held(data_set: Dataset, *, syntax: str = EXPLICIT, data: bytes | None = None) -> Held:
    """Hold a drawn picture."""
    content = encoded(data_set, implicit=syntax == IMPLICIT) if data is None else data
    summary = Summary(
        sop_class_uid=data_set.SOPClassUID,
        sop_instance_uid=data_set.SOPInstanceUID,
        study_instance_uid=data_set.StudyInstanceUID,
        series_instance_uid=data_set.SeriesInstanceUID,
        transfer_syntax_uid=syntax,
        byte_count=len(content),
        sha256="",
        attributes={},
    )
    return Held(summary, content)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def door(rooms: Rooms) -> Iterator[Door]:
    """One door for the module."""
    with open_door(rooms) as door:
        yield door


@pytest.fixture
def scu() -> StorageSCU:
    """A sender."""
    return StorageSCU(ae_title="SENDER", connect_s=10.0, answer_s=10.0)


def peer_at(port: int, *, ae_title: str = "DERM_NODE") -> Peer:
    """The peer at a port of this machine."""
    return Peer("there", ae_title, "127.0.0.1", port)


@contextlib.contextmanager
def answering_scp(syntaxes: list[str], answer: Callable[[dict[int, bytes], bytes], tuple[int, str]]) -> Iterator[Peer]:
    """An SCP for secondary captures in given syntaxes, answering with status and Error Comment."""

    def serve(connection: socket.socket) -> None:
        while (request := receive_message(connection)) is not None:
            status, comment = answer(*request)
            elements = request[0]
            message_id = int.from_bytes(elements[0x0110], "little")
            connection.sendall(store_rsp(status, context_id=elements[CONTEXT][0], message_id=message_id, comment=comment))
        connection.sendall(pdu(6, bytes(4)))

    with scripted_scp(serve, syntaxes) as peer:
        yield peer


@contextlib.contextmanager
def scripted_scp(serve: Callable[[socket.socket], None], syntaxes: Sequence[str] = (EXPLICIT,)) -> Iterator[Peer]:
    """An SCP that accepts associations for secondary captures, one after the other, and then does what it is told."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError, EOFError):
                    if stop.is_set():
                        return
                    connection.sendall(accept(receive(connection)[1], syntaxes))
                    serve(connection)
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield peer_at(listener.getsockname()[1])
        finally:
            stop.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def accept(request: bytes, syntaxes: Sequence[str]) -> bytes:
    """Answer an A-ASSOCIATE-RQ: result 0 for secondary captures in one of the syntaxes, else 3 or 4."""
    results, items = [], request[68:]
    while items:
        kind, length = struct.unpack_from(">BxH", items)
        body, items = items[4 : 4 + length], items[4 + length :]
        if kind == 0x20:
            proposed, sub_items = {0x30: [], 0x40: []}, body[4:]
            while sub_items:
                kind, length = struct.unpack_from(">BxH", sub_items)
                proposed[kind].append(sub_items[4 : 4 + length].decode())
                sub_items = sub_items[4 + length :]
            common = [syntax for syntax in proposed[0x40] if syntax in syntaxes]
            result = 3 if proposed[0x30] != [SECONDARY_CAPTURE] else 0 if common else 4
            results.append(item(0x21, bytes((body[0], 0, result, 0)) + item(0x40, (common or [IMPLICIT])[0].encode())))
    user = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4"))
    return pdu(2, request[:68] + item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(results) + user)


def receive(connection: socket.socket) -> tuple[int, bytes]:
    """Read one PDU: type and body."""
    header = connection.recv(6, socket.MSG_WAITALL)
    if len(header) < 6:
        raise EOFError
    kind, length = struct.unpack(">BxL", header)
    return kind, connection.recv(length, socket.MSG_WAITALL)


def receive_message(connection: socket.socket) -> tuple[dict[int, bytes], bytes] | None:
    """Read one message: command set (and CONTEXT) and data set; None when a release is asked for."""
    parts = {1: b"", 0: b""}
    while True:
        kind, body = receive(connection)
        if kind == 5:
            return None
        if kind != 4:
            raise EOFError
        while body:
            length, context_id, control = struct.unpack_from(">LBB", body)
            parts[control & 1] += body[6 : 4 + length]
            body = body[4 + length :]
            if control == 2:
                return {**elements_of(parts[1]), CONTEXT: bytes((context_id,))}, parts[0]


def store_rsp(status: int, *, context_id: int = 1, message_id: int = 1, comment: str = "") -> bytes:
    """A C-STORE-RSP."""
    elements = [
        element(0x0002, even(SECONDARY_CAPTURE)),
        element(0x0100, us(0x8001)),
        element(0x0120, us(message_id)),
        element(0x0800, us(0x0101)),
        element(0x0900, us(status)),
    ]
    if comment:
        elements.append(element(0x0902, comment.encode()))
    return pdu(4, pdv(context_id, 3, command(*elements, element(0x1000, even("1.2.3")))))


def test_batch_arrives_as_stored(scu: StorageSCU, door: Door) -> None:
    """Instances of several syntaxes go over one association, byte for byte, and each has its answer in order."""
    batch = [held(draw()), held(draw(), syntax=IMPLICIT), held(draw(rows=500, columns=400))]
    accepted = door.events.counts["association.accepted"]
    outcomes = list(scu.store(peer_at(door.port), batch))
    assert outcomes == [(instance, Stored(0)) for instance in batch]
    assert door.events.counts["association.accepted"] == accepted + 1
    for instance in batch:
        with door.rooms.archive.open(instance.summary.sop_instance_uid) as stored:
            assert b"".join(stored.chunks()) == instance.data
            assert stored.record.summary.transfer_syntax_uid == instance.summary.transfer_syntax_uid


def test_many_classes_take_more_than_one_association(scu: StorageSCU, door: Door) -> None:
    """A batch whose contexts exceed 128 is sent on as many associations as it needs."""
    batch = [held(draw(sop_class_uid=f"1.2.826.0.1.3680043.8.498.{number}")) for number in range(70)]
    assert [outcome for _, outcome in scu.store(peer_at(door.port), batch)] == [Stored(0)] * 70


def test_echo(scu: StorageSCU, door: Door) -> None:
    """C-ECHO passes at a peer that is there, and names the remedy at one that is not."""
    scu.echo(peer_at(door.port))
    with pytest.raises(PeerUnreachable, match="rejected the association"):
        scu.echo(peer_at(door.port, ae_title="WRONG"))


@pytest.mark.parametrize(("status", "kind"), [(0x0000, Stored), (0xB000, Stored), (0xB006, Stored), (0x0107, Stored)])
def test_success_and_warnings_are_stored(scu: StorageSCU, status: int, kind: type) -> None:
    """Success and warnings mean that the peer has it (fault 35)."""
    with answering_scp([EXPLICIT], lambda *_: (status, "")) as peer:
        ((_, outcome),) = scu.store(peer, [held(draw())])
    assert outcome == kind(status)


@pytest.mark.parametrize(
    ("status", "retryable"),
    [
        (0xA700, True),
        (0xA701, True),
        (0xA900, False),
        (0xC000, False),
        (0xC211, False),
        (0x0122, False),
        (0x0124, False),
        (0x0110, False),
        (0x0111, False),
    ],
)
def test_refusals_say_whether_to_retry(scu: StorageSCU, status: int, retryable: bool) -> None:
    """Out of resources may be tried again, every other refusal not; the batch goes on behind it (fault 35)."""
    answers = iter((status, 0x0000))
    with answering_scp([EXPLICIT], lambda *_: (next(answers), "")) as peer:
        (_, refused), (_, stored) = scu.store(peer, [held(draw()), held(draw())])
    assert isinstance(refused, Refused)
    assert (refused.status, refused.retryable) == (status, retryable)
    assert f"{status:04X}" in str(refused)
    assert stored == Stored(0)


def test_error_comment_stays_out_of_the_reason(scu: StorageSCU) -> None:
    """A peer's Error Comment may hold anything; it comes with the outcome, not within the reason that is logged."""
    with answering_scp([EXPLICIT], lambda *_: (0xC123, "Drawn^Picture is bad")) as peer:
        ((_, outcome),) = scu.store(peer, [held(draw())])
    assert isinstance(outcome, Refused)
    assert "Drawn" not in str(outcome)
    assert outcome.comment == "Drawn^Picture is bad"


@pytest.mark.parametrize(("theirs", "ours"), [(IMPLICIT, EXPLICIT), (EXPLICIT, IMPLICIT)])
def test_plain_syntaxes_are_converted_when_they_must_be(scu: StorageSCU, theirs: str, ours: str) -> None:
    """A peer that knows one plain syntax only still receives what is stored in the other, with the same values."""
    data_set, seen = draw(), []

    def keep(_request: dict[int, bytes], data: bytes) -> tuple[int, str]:
        seen.append(decode(BytesIO(data), theirs == IMPLICIT, True))
        return 0x0000, ""

    with answering_scp([theirs], keep) as peer:
        ((_, outcome),) = scu.store(peer, [held(data_set, syntax=ours)])
    assert outcome == Stored(0)
    assert seen == [data_set]


@pytest.mark.parametrize("syntax", [JPEG, BIG_ENDIAN])
def test_no_accepted_context_is_refused_by_name(scu: StorageSCU, syntax: str) -> None:
    """Where no context fits, the instance is refused, not tried again, and the reason names class and syntax; others go on (fault 34)."""
    with answering_scp([EXPLICIT], lambda *_: (0, "")) as peer:
        (_, refused), (_, stored) = scu.store(peer, [held(draw(), syntax=syntax), held(draw())])
        assert stored == Stored(0)
        ((_, alone),) = scu.store(peer, [held(draw(), syntax=syntax)])
    for outcome in (refused, alone):
        assert isinstance(outcome, Refused)
        assert not outcome.retryable
        assert "Secondary Capture Image Storage" in str(outcome)


def test_unreachable_peers(scu: StorageSCU, door: Door) -> None:
    """No connection, no address, no such host, a rejection: PeerUnreachable, to be retried, each with its remedy (fault 34)."""
    closed = free_port()
    for peer, words in (
        (peer_at(closed), "did not answer"),
        (Peer("nowhere", "X", "*"), "has no address"),
        (Peer("nameless", "X", "no-such-host.invalid"), "does not resolve"),
        (peer_at(door.port, ae_title="WRONG"), "rejected the association"),
    ):
        with pytest.raises(PeerUnreachable, match=words) as caught:
            list(scu.store(peer, [held(draw())]))
        assert caught.value.retryable


@pytest.mark.parametrize(
    "how", ["abort in the data set", "close in the data set", "abort instead of an answer", "other message", "garbage"]
)
def test_broken_associations(scu: StorageSCU, how: str) -> None:
    """A peer that breaks off, or answers what was not asked, is unreachable at that instance; the rest is not tried (fault 35)."""

    def serve(connection: socket.socket) -> None:
        if how.endswith("in the data set"):
            receive(connection)
            if how.startswith("abort"):
                connection.sendall(pdu(7, bytes(4)))
            connection.close()
            return
        receive_message(connection)
        connection.sendall(
            {"abort instead of an answer": pdu(7, bytes(4)), "other message": store_rsp(0, message_id=77)}.get(how, b"\xff" * 20)
        )

    with scripted_scp(serve) as peer:
        outcomes = list(scu.store(peer, [held(draw(rows=1000, columns=1000)), held(draw())]))
    ((_, outcome),) = outcomes
    assert isinstance(outcome, PeerUnreachable)


def test_silent_peer_times_out() -> None:
    """A peer that takes an instance and never answers is unreachable after the answer time."""
    with scripted_scp(lambda connection: receive_message(connection) and None) as peer:
        ((_, outcome),) = StorageSCU(ae_title="SENDER", answer_s=0.5).store(peer, [held(draw())])
    assert isinstance(outcome, PeerUnreachable)
    assert "no answer" in str(outcome)


def test_unreadable_instance_never_starts(scu: StorageSCU, door: Door) -> None:
    """An instance that the archive cannot read is told as such; the peer heard nothing of it."""

    @dataclass(frozen=True)
    class Unreadable(Held):
        def chunks(self) -> Iterator[bytes]:
            raise IntegrityError("tag mismatch")
            yield b""

    good = held(draw())
    bad = Unreadable(good.summary, b"")
    received = door.events.counts["instance.received"]
    ((_, outcome),) = scu.store(peer_at(door.port), [bad])
    assert isinstance(outcome, StorageError)
    door.settle()
    assert door.events.counts["instance.received"] == received


def test_sent_is_called_before_the_answer(scu: StorageSCU) -> None:
    """The hook between wire and answer is called once an instance, when the peer has all of it and has not answered."""
    on_wire, received, told = threading.Event(), [], []

    def serve(connection: socket.socket) -> None:
        received.append(receive_message(connection))
        told.append(on_wire.wait(30))
        connection.sendall(store_rsp(0))
        receive(connection)
        connection.sendall(pdu(6, bytes(4)))

    instance = held(draw())
    with scripted_scp(serve) as peer:
        ((_, outcome),) = scu.store(peer, [instance], sent=on_wire.set)
    assert outcome == Stored(0)
    ((request, data),) = received
    assert (request[0x0100], data, told) == (us(1), instance.data, [True])


def test_no_thread_is_left(scu: StorageSCU, door: Door) -> None:
    """However an association ended, its threads ended with it."""
    list(scu.store(peer_at(door.port), [held(draw())]))
    with contextlib.suppress(PeerUnreachable):
        list(scu.store(peer_at(door.port, ae_title="WRONG"), [held(draw())]))
    with scripted_scp(lambda connection: receive(connection) and connection.close()) as peer:
        list(scu.store(peer, [held(draw(rows=1000, columns=1000))]))
    door.settle()
    assert not [thread for thread in threading.enumerate() if "RequestorThread" in thread.name]


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 100))
def test_fragments_are_the_stream(chunks: list[bytes], room: int) -> None:
    """Whatever the archive's chunks are, the fragments join to the same bytes, fill their room, and only the last is flagged."""
    fragments = list(_fragments(iter(chunks), room))
    assert b"".join(fragment for fragment, _ in fragments) == b"".join(chunks)
    assert [last for _, last in fragments] == [False] * (len(fragments) - 1) + [True]
    assert all(len(fragment) == room for fragment, last in fragments if not last)


@pytest.mark.parametrize("taken", [256, 65_536])
def test_who_reads_a_few_bytes_now_and_then_is_given_up(taken: int) -> None:
    """No single write takes long, and yet it would never end: below the minimum rate writing fails; above it all arrives."""
    ours, theirs = socket.socketpair()
    size = 400_000
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200_000))
        came: list[int] = []

        def read() -> None:
            while piece := theirs.recv(taken):
                came.append(len(piece))
                time.sleep(0.05)

        reader = threading.Thread(target=read)
        reader.start()
        way = Outflow(ours, Pace(judged_s=0.3, minimum_bytes_per_s=20_000))
        if taken > 1000:
            way.sendall(bytes(size))
        else:
            with pytest.raises(OSError, match=r"minimum rate|temporarily"):
                way.sendall(bytes(size))
        ours.close()
        reader.join()
        assert (sum(came) == size) is (taken > 1000)


def test_the_pace_is_judged_by_waiting_alone() -> None:
    """A peer that is waited for for a minute must have taken 60 KiB; how long we had nothing to write does not count."""
    pace = Pace()
    pace.note(59.0, 0)
    pace.note(1.0, 61_440)
    pace.note(59.9, 1)
    with pytest.raises(TimeoutError, match="minimum rate"):
        pace.note(0.1, 100)
