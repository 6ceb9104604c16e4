"""The door before any association: who stalls, shouts or speaks another protocol takes no slot, no thread, and nobody's place."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from dicom_node.dimse.connection import PlainConnection, TlsConnection
from dicom_node.dimse.receive import ReceiveLimits
from dicom_node.dimse.slots import Slots
from dicom_node.dimse.vestibule import Turned, Vestibule, request_fault
from dicom_node.peers import Peer, Peers
from tests.dicom_node.door import SECONDARY_CAPTURE, Rooms, draw, encoded, open_door, open_rooms
from tests.dicom_node.receiver import certificate
from tests.dicom_node.scripted_peer import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RJ,
    EXPLICIT,
    IMPLICIT,
    P_DATA,
    VERIFICATION,
    ScriptedPeer,
    associate_rq,
    echo_rq,
    pdu,
    pdv,
    store_rq,
)

STORE_CONTEXT = (1, SECONDARY_CAPTURE, [EXPLICIT])
ECHO_CONTEXT = (1, VERIFICATION, [IMPLICIT])


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a door and of a client that believes it."""
    authority = certificate(tmp_path_factory.mktemp("certificate"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(authority)
    client = ssl.create_default_context(cafile=str(authority))
    return server, client


def echo(port: int) -> None:
    """Associate, echo, release."""
    with ScriptedPeer(port) as peer:
        assert peer.associate(ECHO_CONTEXT) == ASSOCIATE_AC
        peer.send(pdu(P_DATA, pdv(1, 3, echo_rq())))
        assert peer.status() == 0
        peer.release()


def secured(port: int, context: ssl.SSLContext) -> ScriptedPeer:
    """A peer behind TLS."""
    peer = ScriptedPeer(port)
    peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")
    return peer


def test_five_hundred_stalled_handshakes(rooms: Rooms) -> None:
    """They take no thread and no slot; an honest caller gets in beside them although eight associations are the limit (threat 3)."""
    with open_door(rooms, maximum_associations=8, limits=ReceiveLimits(handshake_s=60.0)) as door:
        threads = threading.active_count()
        request = associate_rq([STORE_CONTEXT])
        stalled = [ScriptedPeer(door.port) for _ in range(500)]
        for number, peer in enumerate(stalled):
            peer.send(request[: number % len(request)])
        for _ in range(3):
            echo(door.port)
        door.settle()
        assert threading.active_count() == threads
        for peer in stalled:
            peer.socket.close()


def test_the_crowd_gives_way(rooms: Rooms) -> None:
    """When too many wait, the one that waits longest of the address with most goes, and is told of; a newcomer has a place."""
    listener = socket.create_server(("127.0.0.1", 0))
    turned: list[Turned] = []
    entered = threading.Event()

    def enter(connection: object, _address: object, request: bytes) -> None:
        assert request == associate_rq([STORE_CONTEXT])
        connection.close()  # type: ignore[attr-defined]
        entered.set()

    vestibule = Vestibule(listener, enter=enter, waiting=3, handshake_s=60.0, turned=turned.append)  # type: ignore[arg-type]
    vestibule.start()
    try:
        port = listener.getsockname()[1]
        other = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))  # waits longest, but alone
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        crowd[0].settimeout(30)
        assert crowd[0].recv(1) == b""
        assert [one.address for one in turned] == ["127.0.0.1"]
        other.sendall(associate_rq([STORE_CONTEXT]))
        assert entered.wait(30)
        for one in (*crowd, other):
            one.close()
    finally:
        vestibule.stop()
    assert rooms.landing() == []


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"GET /studies HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP on the DICOM port"),
        (bytes.fromhex("16030100a5010000a10303") + bytes(160), "TLS handshake on a port without TLS"),
        (struct.pack(">BxL", 1, 0xFFFFFFFF), "association request longer than allowed"),
        (struct.pack(">BxL", 1, 0), "association request without content"),
        (pdu(P_DATA, pdv(1, 3, echo_rq())), "PDU before any association"),
        (bytes(60), "unrecognised PDU type"),
    ],
)
def test_what_is_no_request_is_named(rooms: Rooms, first: bytes, reason: str) -> None:
    """It is answered with A-ABORT at its header, and the log says in words what it was, once for all repetitions."""
    with open_door(rooms) as door, capture_logs() as events:
        for _ in range(3):
            with ScriptedPeer(door.port) as peer:
                peer.send(first)
                assert peer.ends()[0] == ABORT
        door.events.wait_for("association.refused", 3)
    assert [event["reason"] for event in events if event["event"] == "connection.refused"] == [reason]


def test_one_caller_leaves_room_for_others(rooms: Rooms) -> None:
    """A caller without a quota of its own gets three quarters of the associations; the rest is for others (threat 6)."""
    peers = Peers([Peer("many", "MANY", "*", 0), Peer("other", "OTHER", "*", 0)])
    with open_door(rooms, peers=peers, maximum_associations=4) as door:
        held = [ScriptedPeer(door.port) for _ in range(4)]
        assert [peer.associate(STORE_CONTEXT, calling="MANY") for peer in held] == [ASSOCIATE_AC] * 3 + [ASSOCIATE_RJ]
        assert held[3].answer == bytes((0, 2, 3, 2))
        with ScriptedPeer(door.port) as other:
            assert other.associate(STORE_CONTEXT, calling="OTHER") == ASSOCIATE_AC
            other.release()
        for peer in held:
            peer.socket.close()
        door.settle()


def test_two_doors_share_port_and_slots(rooms: Rooms, tmp_path: Path) -> None:
    """Two receivers on one port (SO_REUSEPORT) keep one limit together."""
    path = tmp_path / "slots"
    with (
        open_door(rooms, slots=Slots(total=8, path=path)) as first,
        open_door(rooms, slots=Slots(total=8, path=path), port=first.port) as second,
    ):
        callers = [ScriptedPeer(first.port) for _ in range(12)]
        answers = [caller.associate(STORE_CONTEXT) for caller in callers]
        assert answers.count(ASSOCIATE_AC) == 6  # three quarters of eight: all call from one address
        assert first.scp.associations + second.scp.associations == 6
        for caller in callers:
            caller.socket.close()
        first.settle()
        second.settle()


def test_a_message_that_trickles_is_aborted(rooms: Rooms) -> None:
    """A data set that comes in PDUs of a few bytes, each in time, is below the minimum rate: A-ABORT, nothing is kept (threat 5)."""
    limits = ReceiveLimits(idle_s=1.0, minimum_bytes_per_s=1000)
    with open_door(rooms, limits=limits) as door, ScriptedPeer(door.port) as peer:
        assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, "1.2.3"))))
        data = encoded(draw())
        ended = threading.Event()

        def trickle() -> None:
            for position in range(0, len(data), 2):
                try:
                    peer.send(pdu(P_DATA, pdv(1, 0, data[position : position + 2])))
                except OSError:
                    return
                if ended.wait(0.2):
                    return

        sender = threading.Thread(target=trickle)
        sender.start()
        assert peer.ends() == (ABORT, bytes((0, 0, 2, 6)))
        ended.set()
        sender.join()
        door.settle()
        assert rooms.landing() == []


def test_a_pause_between_messages_is_no_slow_message(rooms: Rooms) -> None:
    """The time before a message does not count against it."""
    data_set = draw()
    with open_door(rooms, limits=ReceiveLimits(idle_s=2.0, minimum_bytes_per_s=1000)) as door, ScriptedPeer(door.port) as peer:
        assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
        time.sleep(1.5)
        data = encoded(data_set)
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))), pdu(P_DATA, pdv(1, 0, data[:100])))
        time.sleep(1.0)
        peer.send(pdu(P_DATA, pdv(1, 2, data[100:])))
        assert peer.status() == 0
        peer.release()


# --- TLS ---------------------------------------------------------------------------------------------------------------


def test_tls_stores(rooms: Rooms, pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """Instances of several records arrive whole through TLS, in PDUs of every cut, and the answers come back."""
    server, client = pair
    with open_door(rooms, tls=lambda: server) as door, secured(door.port, client) as peer:
        assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
        for number in range(3):
            data_set = draw(rows=300, columns=400, seed=number)
            data = encoded(data_set)
            peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))))
            cuts = [0, 1, 70_000, 70_001, 200_000, len(data)]
            for first, last in itertools.pairwise(cuts):
                peer.send(pdu(P_DATA, pdv(1, 2 if last == len(data) else 0, data[first:last])))
            assert peer.status() == 0
            with rooms.archive.open(data_set.SOPInstanceUID) as stored:
                assert b"".join(stored.chunks()) == data
        peer.release()


@pytest.mark.parametrize("length", [7000, 9000, 10_000, 12_000, 15_000])
def test_what_is_decrypted_is_not_waited_for(rooms: Rooms, pair: tuple[ssl.SSLContext, ssl.SSLContext], length: int) -> None:
    """The end of an instance that lies decrypted within OpenSSL is read although the socket is silent."""
    server, client = pair
    data_set = draw(rows=300, columns=400, seed=length)
    data = encoded(data_set)
    with open_door(rooms, tls=lambda: server, limits=ReceiveLimits(idle_s=5.0)) as door, secured(door.port, client) as peer:
        assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
        pieces = [data[first : first + length] for first in range(0, len(data), length)]
        pdus = [pdu(P_DATA, pdv(1, 2 if piece is pieces[-1] else 0, piece)) for piece in pieces]
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))), *pdus)
        assert peer.status() == 0
        peer.release()


def test_stalled_tls_handshakes(rooms: Rooms, pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """Handshakes that stop anywhere are closed after the handshake time; an honest caller gets in beside them (threats 3, 85)."""
    server, client = pair
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    first = outgoing.read()
    with open_door(rooms, tls=lambda: server, limits=ReceiveLimits(handshake_s=3.0)) as door:
        stalled = [ScriptedPeer(door.port) for _ in range(20)]
        for number, peer in enumerate(stalled):
            peer.send(first[: number * 30])
        with secured(door.port, client) as peer:
            assert peer.associate(ECHO_CONTEXT) == ASSOCIATE_AC
            peer.release()
        for peer in stalled:
            while peer.socket.recv(4096):
                pass
            peer.socket.close()
        door.events.wait_for("association.refused", 20)


def test_plaintext_on_the_tls_port(rooms: Rooms, pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """It is refused, said in the log, and nothing is read as an association request (threat 85)."""
    with open_door(rooms, tls=lambda: pair[0]) as door, capture_logs() as events:
        with ScriptedPeer(door.port) as peer:
            peer.send(associate_rq([STORE_CONTEXT]))
            with contextlib.suppress(ConnectionResetError):
                while peer.socket.recv(4096):
                    pass
        door.events.wait_for("association.refused")
    assert [event["reason"] for event in events if event["event"] == "connection.refused"] == ["TLS handshake failed"]


def test_a_peer_that_stops_within_a_record(rooms: Rooms, pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """Half a TLS record holds no thread: the association is aborted when its idle time is over, and stop does not wait for it."""
    server, client = pair
    with open_door(rooms, tls=lambda: server, limits=ReceiveLimits(idle_s=1.0)) as door:
        raw = socket.create_connection(("127.0.0.1", door.port), timeout=30)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(outgoing.read())
                incoming.write(raw.recv(65536))
        tls.write(associate_rq([STORE_CONTEXT]))
        raw.sendall(outgoing.read())
        door.events.wait_for("association.accepted")
        tls.write(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, "1.2.3"))))
        raw.sendall(outgoing.read()[:-5])
        door.events.wait_for("association.ended")
        raw.close()


def test_two_threads_may_send_at_once(pair: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """What two threads send through one TLS connection to a peer that reads slowly arrives whole, each piece in one piece."""
    server, client = pair
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    reader: list[ssl.SSLSocket] = []
    shaking = threading.Thread(target=lambda: reader.append(client.wrap_socket(theirs, server_hostname="127.0.0.1")))
    shaking.start()
    secured_end = server.wrap_socket(ours, server_side=True)
    shaking.join()
    secured_end.setblocking(False)
    connection = TlsConnection(secured_end, send_s=30.0)
    piece, count = 300_000, 10
    senders = [threading.Thread(target=lambda byte=byte: [connection.send(byte * piece) for _ in range(count)]) for byte in (b"a", b"b")]
    for sender in senders:
        sender.start()
    received = bytearray()
    while len(received) < 2 * piece * count:
        received += reader[0].recv(65_536)
    for sender in senders:
        sender.join()
    pieces = {bytes(received[start : start + piece]) for start in range(0, len(received), piece)}
    assert pieces == {b"a" * piece, b"b" * piece}
    reader[0].close()
    connection.close()


# --- requests that are not worth decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (associate_rq([(1, SECONDARY_CAPTURE, [f"1.2.{number}" for number in range(5000)])]), "more contexts"),
        (associate_rq([(1, SECONDARY_CAPTURE, [EXPLICIT])] * 129), "more contexts"),
        (associate_rq([STORE_CONTEXT])[:-3] + b"\xff\xff\xff", "add up"),
    ],
    ids=["5000 syntaxes", "129 contexts", "a length past the end"],
)
def test_excessive_requests(rooms: Rooms, request_: bytes, words: str) -> None:
    """They are aborted before the library, whose time grows with the square, sees them (threat 9)."""
    request_ = request_[:2] + struct.pack(">L", len(request_) - 6) + request_[6:]
    if words == "add up":  # the last item claims more than there is
        at = request_.rindex(b"\x52\x00")
        request_ = request_[: at + 2] + b"\x7f\xff" + request_[at + 4 :]
    with open_door(rooms) as door, capture_logs() as events:
        with ScriptedPeer(door.port) as peer:
            peer.send(request_)
            assert peer.ends() == (ABORT, bytes((0, 0, 2, 6)))
        door.events.wait_for("association.refused")
    assert words in next(event["reason"] for event in events if event["event"] == "connection.refused")


@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_bytes_are_judged(noise: bytes, place: int) -> None:
    """Whatever stands in a request, judging it ends and raises nothing; a lawful one is let through."""
    lawful = associate_rq([STORE_CONTEXT, ECHO_CONTEXT])
    assert request_fault(lawful) == ""
    assert isinstance(request_fault(lawful[:74] + noise), str)
    assert isinstance(request_fault(lawful[:place] + noise + lawful[place:]), str)


def test_partial_requests_have_a_budget() -> None:
    """All that wait hold so many bytes at most; the longest of the address that sent most goes, others stay."""
    listener = socket.create_server(("127.0.0.1", 0))
    turned: list[Turned] = []
    vestibule = Vestibule(listener, enter=lambda *_: None, handshake_s=60.0, waiting_bytes=250_000, turned=turned.append)
    vestibule.start()
    try:
        port = listener.getsockname()[1]
        honest = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
        honest.sendall(associate_rq([STORE_CONTEXT])[:50])
        greedy = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for one in greedy:
            one.sendall(struct.pack(">BxL", 1, 120_000) + bytes(100_000))
        deadline = time.monotonic() + 30
        while len(turned) < 2:
            assert time.monotonic() < deadline, turned
            time.sleep(0.01)
        assert {one.reason for one in turned} == {"too many bytes of association requests wait"}
        assert {one.address for one in turned} == {"127.0.0.1"}
        assert vestibule.waiting == 3
        for one in (honest, *greedy):
            one.close()
    finally:
        vestibule.stop()


@contextlib.contextmanager
def hanging_up(listener: socket.socket, **settings: Any) -> Iterator[tuple[Vestibule, list[bytes]]]:
    """Run a vestibule behind which everybody is hung up on at his turn; also the AE titles that had theirs."""
    entered: list[bytes] = []

    def enter(connection: PlainConnection | TlsConnection, _address: object, request: bytes) -> None:
        entered.append(request[26:42].strip())
        connection.close()

    vestibule = Vestibule(listener, enter=enter, **settings)
    vestibule.start()
    try:
        yield vestibule, entered
    finally:
        vestibule.stop()


def test_a_flood_of_requests_waits_for_its_turns(rooms: Rooms) -> None:
    """Whole requests beyond the rate of an address wait without a thread; another AE title there is next (threats 6, 7)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    with hanging_up(listener, handshake_s=60.0, requests_per_s=2.0, burst=2) as (_, entered):
        port = listener.getsockname()[1]
        flood = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for one in flood:
            one.sendall(associate_rq([STORE_CONTEXT], calling="FLOOD"))
        honest = socket.create_connection(("127.0.0.1", port))
        honest.sendall(associate_rq([STORE_CONTEXT], calling="HONEST"))
        honest.settimeout(30)
        assert honest.recv(1) == b""
        assert entered.count(b"FLOOD") < 20
        for one in (*flood, honest):
            one.close()


def test_who_hangs_up_takes_nobodys_turn() -> None:
    """A thousand who asked and went away while they waited are not looked at; one who stayed behind them is (threats 6, 7)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    with hanging_up(listener, handshake_s=60.0, requests_per_s=1.0, burst=1) as (vestibule, entered):
        port = listener.getsockname()[1]
        for _ in range(1000):
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(associate_rq([STORE_CONTEXT], calling="SAME"))
        with socket.create_connection(("127.0.0.1", port), timeout=30) as stays:
            stays.sendall(associate_rq([STORE_CONTEXT], calling="SAME"))
            assert stays.recv(1) == b""
        assert len(entered) < 50
        assert vestibule.waiting == 0


def test_no_turn_in_time_is_a_transient_rejection() -> None:
    """Whose turn does not come within the handshake time is told to try again, A-ASSOCIATE-RJ(2,3,1), and the node why (threat 6)."""
    listener = socket.create_server(("127.0.0.1", 0))
    turned: list[Turned] = []
    with hanging_up(listener, handshake_s=0.2, requests_per_s=0.001, burst=1, turned=turned.append) as _:
        for answer in (b"", bytes((3, 0, 0, 0, 0, 4, 0, 2, 3, 1))):
            with socket.create_connection(listener.getsockname(), timeout=30) as caller:
                caller.sendall(associate_rq([STORE_CONTEXT]))
                assert caller.recv(100) == answer
        assert [one.reason for one in turned] == ["too many association requests a second of this address"]


def test_senders_behind_one_address_wait_and_lose_nothing(rooms: Rooms) -> None:
    """Four senders at one address with an association for each instance, two at once each: all wait, none is rejected, all is stored."""
    titles = ["CAMERA1", "CAMERA2", "CAMERA3", "PACS"]
    peers = Peers([Peer(title.lower(), title, "127.0.0.0/8", 0) for title in titles])
    stored: list[int] = []
    with open_door(rooms, peers=peers, association_requests_per_s=50.0, association_request_burst=4) as door:

        def sender(title: str) -> None:
            for _ in range(10):
                data_set = draw()
                with ScriptedPeer(door.port) as peer:
                    assert peer.associate(STORE_CONTEXT, calling=title) == ASSOCIATE_AC
                    request = pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID)))
                    peer.send(request, pdu(P_DATA, pdv(1, 2, encoded(data_set))))
                    stored.append(peer.status())
                    peer.release()

        before = rooms.count()
        threads = [threading.Thread(target=sender, args=(title,)) for title in titles * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        door.settle()
    assert stored == [0] * 80
    assert rooms.count() - before == 80
    assert door.events.counts["association.rejected"] == 0


def test_strangers_are_rejected_without_a_thread(rooms: Rooms) -> None:
    """An AE title that no peer bears, and another called one with it, cost no thread; each is noted, in a turn of all strangers' (11)."""
    peers = Peers([Peer("known", "KNOWN", "*", 0)])
    with open_door(rooms, peers=peers, association_requests_per_s=50.0, association_request_burst=5) as door:
        threads = threading.active_count()
        strangers = [ScriptedPeer(door.port) for _ in range(60)]
        for number, stranger in enumerate(strangers):
            called = "DERM_NODE" if number % 2 else "OTHER"
            stranger.send(associate_rq([STORE_CONTEXT], calling=f"NOBODY{number}", called=called))
        with ScriptedPeer(door.port) as known:
            assert known.associate(STORE_CONTEXT, calling="KNOWN") == ASSOCIATE_AC
            assert door.events.counts["association.rejected"] < 50
            known.release()
        for number, stranger in enumerate(strangers):
            assert stranger.pdu() == (ASSOCIATE_RJ, bytes((0, 1, 1, 3 if number % 2 else 7)))
        door.settle()
        assert threading.active_count() <= threads + 2
        for stranger in strangers:
            stranger.socket.close()
    assert door.events.counts["association.rejected"] == 60


def test_another_application_is_rejected(rooms: Rooms) -> None:
    """An application context other than DICOM's is A-ASSOCIATE-RJ(1,1,2) (threat 9; PS3.8 9.3.4, Annex A)."""
    request = associate_rq([STORE_CONTEXT]).replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.2")
    with open_door(rooms) as door, ScriptedPeer(door.port) as peer:
        peer.send(request)
        assert peer.pdu() == (ASSOCIATE_RJ, bytes((0, 1, 1, 2)))
