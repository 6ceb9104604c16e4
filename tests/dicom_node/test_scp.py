"""The DIMSE door over a real socket, a real archive behind it, against a peer that sends exactly what it is told."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from pynetdicom.sop_class import _STORAGE_CLASSES
from structlog.testing import capture_logs

from dicom_node.dimse.receive import ReceiveLimits
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scp import is_storage
from dicom_node.dimse.scu import StorageSCU
from dicom_node.identity import Identities, User, hash_passcode
from dicom_node.peers import Peer, Peers
from dicom_node.tracing import lines
from storage.intake import footer_to_record, record_to_footer
from storage.iod import TRANSFER_SYNTAXES
from storage.known_peers import KnownPeer
from storage.records import Limits
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, Rooms, draw, encoded, open_door, open_rooms
from tests.dicom_node.receiver import certificate
from tests.dicom_node.scripted_peer import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RJ,
    ASSOCIATE_RQ,
    EXPLICIT,
    IMPLICIT,
    P_DATA,
    RELEASE_RQ,
    VERIFICATION,
    ScriptedPeer,
    associate_rq,
    echo_rq,
    pdu,
    pdv,
    store_rq,
)
from tests.dicom_node.test_threats import identity, user_information

STORE_CONTEXT = (1, SECONDARY_CAPTURE, [EXPLICIT])
PRIVATE = "1.2.826.0.1.3680043.8.498.1"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
FIND = "1.2.840.10008.5.1.4.1.2.2.1"
RETIRED_ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6"
HANGING_PROTOCOL = "1.2.840.10008.5.1.4.38.1"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def door(rooms: Rooms) -> Iterator[Door]:
    """One door for the module; it accepts everybody."""
    with open_door(rooms) as door:
        yield door


def associated(door: Door, *contexts: tuple[int, str, list[str]]) -> ScriptedPeer:
    """Return a peer with an association of the given contexts, by default one for secondary captures."""
    peer = ScriptedPeer(door.port)
    assert peer.associate(*(contexts or (STORE_CONTEXT,))) == ASSOCIATE_AC
    return peer


def store(peer: ScriptedPeer, data: bytes, sop_instance_uid: str, *, sop_class_uid: str = SECONDARY_CAPTURE) -> int:
    """Send a C-STORE in one PDU a kind, and return the status."""
    peer.send(pdu(P_DATA, pdv(1, 3, store_rq(sop_class_uid, sop_instance_uid))), pdu(P_DATA, pdv(1, 2, data)))
    return peer.status()


def test_instance_is_archived_as_sent(door: Door) -> None:
    """Success means that the archive gives the same data set bytes back, with who sent them."""
    data_set = draw()
    data = encoded(data_set)
    with associated(door) as peer:
        assert store(peer, data, data_set.SOPInstanceUID) == 0x0000
        with door.rooms.archive.open(data_set.SOPInstanceUID) as stored:
            assert b"".join(stored.chunks()) == data
            assert stored.record.summary.transfer_syntax_uid == EXPLICIT
            origin = stored.record.origin
        assert (origin.door, origin.calling_ae_title, origin.called_ae_title, origin.address) == (
            "dimse",
            "SCRIPT",
            "DERM_NODE",
            "127.0.0.1",
        )
        peer.release()


def test_fragments_of_any_size(door: Door) -> None:
    """Command and data set may come in fragments of a few bytes, several to a PDU, PDUs in any TCP segments."""
    data_set = draw(rows=4, columns=4)
    data, command = encoded(data_set), store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID)
    pdvs = [pdv(1, 1, command[:7]), pdv(1, 3, command[7:])]
    pdvs += [pdv(1, 0, data[start : start + 5]) for start in range(0, len(data), 5)] + [pdv(1, 2, b"")]
    stream = b"".join(pdu(P_DATA, b"".join(pdvs[start : start + 3])) for start in range(0, len(pdvs), 3))
    with associated(door) as peer:
        for start in range(0, len(stream), 1000):
            peer.send(stream[start : start + 1000])
        assert peer.status() == 0x0000
    with door.rooms.archive.open(data_set.SOPInstanceUID) as stored:
        assert b"".join(stored.chunks()) == data


def test_answers_keep_the_peers_maximum(door: Door) -> None:
    """A peer that takes 32 bytes a PDU gets its answer in pieces of that."""
    data_set = draw()
    with ScriptedPeer(door.port) as peer:
        assert peer.associate(STORE_CONTEXT, maximum_length=32) == ASSOCIATE_AC
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0000


def test_announces_at_least_256_kib(door: Door) -> None:
    """The maximum PDU length in the A-ASSOCIATE-AC is large, and a PDU of exactly that length is taken."""
    data_set = draw(rows=400, columns=500)
    data = encoded(data_set)
    with associated(door) as peer:
        assert peer.maximum_length >= 256 * 1024
        first = peer.maximum_length - 6
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))))
        peer.send(pdu(P_DATA, pdv(1, 0, data[:first])), pdu(P_DATA, pdv(1, 2, data[first:])))
        assert peer.status() == 0x0000


def test_same_again_is_success_and_one_copy(door: Door) -> None:
    """Sent again, byte for byte, an instance is Success and kept once (fault 6)."""
    data_set = draw()
    with associated(door) as peer:
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0000
        count = door.rooms.count()
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0000
    assert door.rooms.count() == count


def test_same_uid_other_content_is_refused(door: Door) -> None:
    """Other content under a known SOP Instance UID is answered 0111, Duplicate SOP Instance, and the first stays (threat 43)."""
    data_set = draw()
    first = encoded(data_set)
    with associated(door) as peer:
        assert store(peer, first, data_set.SOPInstanceUID) == 0x0000
        data_set.PatientID = "other"
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0111
    with door.rooms.archive.open(data_set.SOPInstanceUID) as stored:
        assert b"".join(stored.chunks()) == first


@pytest.mark.parametrize("wrong", ["command class", "command instance", "context class", "syntax", "cut", "no class", "no data set"])
def test_refusals(door: Door, wrong: str) -> None:
    """What does not fit is answered with the status of the standard and a comment, and stored under no identity (threats 16, 17, 23)."""
    data_set = draw()
    data, class_uid, instance_uid = encoded(data_set), SECONDARY_CAPTURE, str(data_set.SOPInstanceUID)
    expected, type_of_data_set, context = 0xC000, 0, STORE_CONTEXT
    if wrong == "command class":
        class_uid, expected = "1.2.840.10008.5.1.4.1.1.4", 0xA900
    elif wrong == "command instance":
        instance_uid, expected = generate_uid(), 0xA900
    elif wrong == "context class":
        class_uid, expected = "1.2.840.10008.5.1.4.1.1.4", 0xA900
        context = (1, class_uid, [EXPLICIT])
    elif wrong == "syntax":
        context = (1, SECONDARY_CAPTURE, [IMPLICIT])
    elif wrong == "cut":
        data = data[:-2]
    elif wrong == "no class":
        class_uid = ""
    else:
        type_of_data_set = 0x0101
    count = door.rooms.count()
    with associated(door, context) as peer:
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(class_uid, instance_uid, data_set_type=type_of_data_set))))
        if wrong != "no data set":
            peer.send(pdu(P_DATA, pdv(1, 2, data)))
        answer = peer.command_set()
        assert int.from_bytes(answer[0x0900], "little") == expected
        assert 0 < len(answer[0x0902]) <= 64
        assert b"Drawn" not in answer[0x0902]
        good = draw()
        assert store(peer, encoded(good), good.SOPInstanceUID, sop_class_uid=good.SOPClassUID) == (
            0x0000 if context == STORE_CONTEXT else expected
        ), "the association goes on"
    door.settle()
    assert door.rooms.count() == count + (context == STORE_CONTEXT)
    assert door.rooms.landing() == []


def test_echo_between_stores(door: Door) -> None:
    """C-ECHO stays pynetdicom's and works before, between and after C-STOREs on one association."""
    contexts = (STORE_CONTEXT, (3, VERIFICATION, [IMPLICIT]))
    with associated(door, *contexts) as peer:
        for _ in range(2):
            peer.send(pdu(P_DATA, pdv(3, 3, echo_rq())))
            assert peer.status() == 0x0000
            data_set = draw()
            assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0000
        peer.release()


def test_every_storage_class_and_syntax_is_accepted(door: Door) -> None:
    """Every storage SOP class that the library names, and every syntax it or the scanner knows, each in a context of its own.

    But the three of SMPTE ST 2110: those are real-time streams (PS3.22), not stored instances.
    """
    syntaxes = {str(syntax) for syntax in ALL_TRANSFER_SYNTAXES if not syntax.startswith("1.2.840.10008.1.2.7.")} | set(TRANSFER_SYNTAXES)
    proposals = [(uid, EXPLICIT) for uid in _STORAGE_CLASSES.values()] + [(SECONDARY_CAPTURE, syntax) for syntax in sorted(syntaxes)]
    for start in range(0, len(proposals), 128):
        batch = proposals[start : start + 128]
        contexts = [(2 * number + 1, uid, [syntax]) for number, (uid, syntax) in enumerate(batch)]
        with associated(door, *contexts) as peer:
            assert peer.results == {context_id: (0, syntaxes[0]) for context_id, _, syntaxes in contexts}
            peer.release()


def test_contexts_are_refused_one_by_one(door: Door) -> None:
    """An unknown service or syntax costs its own context, not the association; the proposer's first known syntax is taken."""
    contexts = [
        (1, FIND, [IMPLICIT]),
        (3, SECONDARY_CAPTURE, ["1.2.3.4"]),
        (5, SECONDARY_CAPTURE, ["1.2.3.4", "1.2.840.10008.1.2.4.50", IMPLICIT]),
        (7, RETIRED_ULTRASOUND, [IMPLICIT]),
        (9, PRIVATE, [EXPLICIT]),
        (11, HANGING_PROTOCOL, [EXPLICIT]),
    ]
    with associated(door, *contexts) as peer:
        results = {context_id: result for context_id, (result, _) in peer.results.items()}
        assert results == {1: 3, 3: 4, 5: 0, 7: 0, 9: 0, 11: 3}
        assert peer.results[5][1] == "1.2.840.10008.1.2.4.50"


def test_unknown_classes_by_setting(rooms: Rooms) -> None:
    """With the setting off, classes that PS3.6 does not name are refused; named storage classes never are."""
    with open_door(rooms, unknown_sop_classes=False) as door, ScriptedPeer(door.port) as peer:
        assert peer.associate((1, PRIVATE, [EXPLICIT]), (3, RETIRED_ULTRASOUND, [EXPLICIT])) == ASSOCIATE_AC
        assert {context_id: result for context_id, (result, _) in peer.results.items()} == {1: 3, 3: 0}
    assert all(is_storage(uid, unknown=False) for uid in _STORAGE_CLASSES.values())
    assert not is_storage(FIND, unknown=True)


def rejection(port: int, **settings: str) -> tuple[int, ...]:
    """Ask for an association, and return result, source and diagnostic of the rejection; (0,) when accepted."""
    with ScriptedPeer(port) as peer:
        if peer.associate(STORE_CONTEXT, **settings) == ASSOCIATE_RJ:
            return tuple(peer.answer[1:4])
        peer.release()
        return (0,)


def test_admission(rooms: Rooms) -> None:
    """Wrong called AE title 1,1,7; unknown caller, known caller from elsewhere, peer that may do nothing 1,1,3 (threats 10, 11)."""
    peers = Peers(
        [
            Peer("scanner", "SCANNER", "localhost"),
            Peer("anywhere", "ROAMING", "*"),
            Peer("away", "AWAY", "192.0.2.1"),
            Peer("mute", "MUTE", "127.0.0.1", accept=False, retrieve=False),
        ]
    )
    with open_door(rooms, peers=peers) as door:
        assert rejection(door.port, calling="SCANNER") == (0,)
        assert rejection(door.port, calling="ROAMING") == (0,)
        assert rejection(door.port, calling="SCANNER", called="OTHER") == (1, 1, 7)
        assert rejection(door.port, calling="NOBODY") == (1, 1, 3)
        assert rejection(door.port, calling="../../etc") == (1, 1, 3)
        assert rejection(door.port, calling="AWAY") == (1, 1, 3)
        assert rejection(door.port, calling="MUTE") == (1, 1, 3)
        door.events.wait_for("association.rejected", 5)


def test_limits_on_associations(rooms: Rooms) -> None:
    """Beyond the limit, or the peer's own quota, the rejection is transient 2,3,2; a silent connection takes no place (threats 3, 6)."""
    peers = Peers([Peer("one", "ONE", "*", max_associations=1), Peer("many", "MANY", "*")])
    with open_door(rooms, peers=peers, maximum_associations=2) as door:
        silent = [ScriptedPeer(door.port) for _ in range(5)]
        with ScriptedPeer(door.port) as one, ScriptedPeer(door.port) as many:
            assert one.associate(STORE_CONTEXT, calling="ONE") == ASSOCIATE_AC
            assert rejection(door.port, calling="ONE") == (2, 3, 2)
            assert many.associate(STORE_CONTEXT, calling="MANY") == ASSOCIATE_AC
            assert rejection(door.port, calling="MANY") == (2, 3, 2)
            many.release()
        one.socket.close()
        door.settle()
        assert rejection(door.port, calling="MANY") == (0,)
        for peer in silent:
            peer.socket.close()


LAWFUL = store_rq(SECONDARY_CAPTURE, "1.2.3")
WIRE_VIOLATIONS = [
    pytest.param(pdu(P_DATA, pdv(1, 0, b"data")), 5, id="data before command"),
    pytest.param(pdu(P_DATA, pdv(7, 3, LAWFUL)), 6, id="context not accepted"),
    pytest.param(pdu(P_DATA, pdv(1, 3, LAWFUL) + pdv(1, 3, LAWFUL)), 5, id="command twice"),
    pytest.param(pdu(P_DATA, struct.pack(">LB", 1, 1)), 6, id="PDV of one byte"),
    pytest.param(pdu(P_DATA, b""), 6, id="P-DATA without PDV"),
    pytest.param(struct.pack(">BxL", P_DATA, 256 * 1024 + 1), 6, id="P-DATA longer than announced"),
    pytest.param(struct.pack(">BxL", P_DATA, 0xFFFFFFFF), 6, id="P-DATA of 4 GiB"),
    pytest.param(struct.pack(">BxL", ASSOCIATE_RQ, 0xFFFFFFFF), 6, id="A-ASSOCIATE-RQ of 4 GiB"),
    pytest.param(struct.pack(">BxL", ABORT, 1000), 6, id="long A-ABORT"),
    pytest.param(pdu(0x08, b""), 1, id="unknown PDU type"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1, id="HTTP"),
    pytest.param(pdu(P_DATA, pdv(1, 3, LAWFUL)) + pdu(RELEASE_RQ, bytes(4)), 2, id="release within a message"),
    pytest.param(pdu(P_DATA, pdv(1, 3, LAWFUL[:-1])), 6, id="command cut"),
    pytest.param(pdu(P_DATA, pdv(1, 3, LAWFUL.replace(b"\0\1\2\0\0\0\1\0", b"\0\1\2\0\0\0\xff\x7f"))), 6, id="unknown command field"),
]


@pytest.mark.parametrize(("bytes_sent", "diagnostic"), WIRE_VIOLATIONS)
def test_violations_are_aborted(door: Door, bytes_sent: bytes, diagnostic: int) -> None:
    """Each breach of PS3.7 and PS3.8 on the wire gets an A-ABORT that says which, and nothing stays (threats 1, 2, 8, 14)."""
    with associated(door) as peer:
        peer.send(bytes_sent)
        assert peer.ends() == (ABORT, bytes((0, 0, 2, diagnostic)))
    door.settle()
    assert door.rooms.landing() == []


def test_second_request_is_aborted(door: Door) -> None:
    """An A-ASSOCIATE-RQ within an association is an unexpected PDU (PS3.8 Table 9-10, Sta6 and Evt6: AA-8)."""
    with associated(door) as peer:
        peer.send(associate_rq([STORE_CONTEXT]))
        assert peer.ends()[0] == ABORT


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(struct.pack(">BxL", ASSOCIATE_RQ, 0xFFFFFFFF), id="claims 4 GiB"),
        pytest.param(struct.pack(">BxL", ASSOCIATE_RQ, 128 * 1024 + 1), id="past the handshake limit"),
        pytest.param(pdu(P_DATA, pdv(1, 3, LAWFUL)), id="P-DATA first"),
        pytest.param(associate_rq([]), id="no context"),
        pytest.param(associate_rq([(2, SECONDARY_CAPTURE, [EXPLICIT])]), id="even context"),
        pytest.param(associate_rq([STORE_CONTEXT, STORE_CONTEXT]), id="context twice"),
        pytest.param(associate_rq([STORE_CONTEXT], protocol=2), id="protocol version"),
        pytest.param(associate_rq([STORE_CONTEXT], calling="\0\1"), id="AE title of control bytes"),
        pytest.param(pdu(ASSOCIATE_RQ, b"x" * 200), id="garbage"),
        pytest.param(pdu(ASSOCIATE_RQ, associate_rq([STORE_CONTEXT])[6:-20]), id="cut"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
    ],
)
def test_bad_handshakes(door: Door, first: bytes) -> None:
    """A handshake that is none ends in A-ABORT or A-ASSOCIATE-RJ, and the door goes on (threats 1, 8, 9, 10)."""
    with ScriptedPeer(door.port) as peer:
        peer.send(first)
        assert peer.ends()[0] in (ABORT, ASSOCIATE_RJ)
    assert rejection(door.port) == (0,)


@pytest.mark.parametrize("how", ["abort", "close", "reset"])
@pytest.mark.parametrize("where", range(5))
def test_broken_association_leaves_nothing(door: Door, how: str, where: int) -> None:
    """However and wherever in a message the peer goes away, the landing area is empty and the index as before (fault 7)."""
    data_set = draw(rows=200, columns=200)
    data, command = encoded(data_set), store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID)
    stream = [
        pdu(P_DATA, pdv(1, 1, command[:20])),
        pdu(P_DATA, pdv(1, 3, command[20:])),
        pdu(P_DATA, pdv(1, 0, data[:1000])),
        pdu(P_DATA, pdv(1, 0, data[1000:-2])),
        pdu(P_DATA, pdv(1, 0, data[-2:]))[:-1],
    ]
    count = door.rooms.count()
    with associated(door) as peer:
        peer.send(*stream[: where + 1])
        if how == "abort" and where < 4:
            peer.send(pdu(ABORT, bytes(4)))
        elif how == "reset":
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    door.settle()
    assert door.rooms.landing() == []
    assert door.rooms.count() == count


def test_endless_data_set_is_stopped(tmp_path: Path) -> None:
    """A data set longer than the object limit is refused; one that goes on beyond the message limit is aborted (threat 18)."""
    rooms = open_rooms(tmp_path, limits=Limits(object_bytes=100_000))
    data_set = draw(rows=300, columns=300)
    with open_door(rooms, message_bytes=400_000) as door, associated(door) as peer:
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) in (0xC000, 0xA700)
        assert rooms.landing() == []
        peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))))
        peer.send(pdu(P_DATA, pdv(1, 0, encoded(data_set))))
        for _ in range(3):
            peer.send(pdu(P_DATA, pdv(1, 0, bytes(100_000))))
        assert peer.ends() == (ABORT, bytes((0, 0, 2, 6)))
    assert rooms.count() == 0
    rooms.database.close()


def test_archive_in_trouble_is_out_of_resources(tmp_path: Path) -> None:
    """Without its database the archive promises nothing: A700, so that the sender keeps the instance and tries again."""
    rooms = open_rooms(tmp_path)
    data_set = draw()
    with open_door(rooms) as door, associated(door) as peer:
        rooms.database.close()
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0xA700
        assert rooms.landing() == []
        peer.release()


def test_stalled_handshakes_are_closed(rooms: Rooms) -> None:
    """Silence, and a request that never becomes whole, are closed after the handshake time; others get in meanwhile (threats 3, 4)."""
    with open_door(rooms, limits=ReceiveLimits(handshake_s=1.0)) as door:
        request = associate_rq([STORE_CONTEXT])
        stalled = [ScriptedPeer(door.port) for _ in range(10)]
        for number, peer in enumerate(stalled):
            peer.send(request[: 9 * number])
        assert rejection(door.port) == (0,)
        for peer in stalled:
            peer.ends()
            peer.socket.close()


def test_idle_association_is_aborted(rooms: Rooms) -> None:
    """An association that falls silent within a data set is aborted, and what it had sent is dropped (threat 5)."""
    with open_door(rooms, limits=ReceiveLimits(idle_s=1.0)) as door:
        with associated(door) as peer:
            peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, "1.2.3"))), pdu(P_DATA, pdv(1, 0, encoded(draw())[:200]))[:-7])
            assert peer.ends()[0] == ABORT
        door.settle()
        assert rooms.landing() == []


def test_two_senders_of_one_instance(door: Door) -> None:
    """Two peers send the same instance at the same moment: both get Success, one copy is kept (fault 8)."""
    data_set = draw(rows=100, columns=100)
    data, count = encoded(data_set), door.rooms.count()
    statuses: list[int] = []
    ready = threading.Barrier(2)

    def send() -> None:
        with associated(door) as peer:
            ready.wait(30)
            statuses.append(store(peer, data, data_set.SOPInstanceUID))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0]
    assert door.rooms.count() == count + 1


def test_stop_drains_then_aborts(rooms: Rooms) -> None:
    """Stopping takes no new caller, lets who is under way finish, and aborts who does not (fault 5)."""
    data_set = draw()
    with open_door(rooms) as door, associated(door) as busy, associated(door) as idle:
        busy.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))))
        stopping = threading.Thread(target=door.scp.stop, args=(30.0,))
        stopping.start()
        busy.send(pdu(P_DATA, pdv(1, 2, encoded(data_set))))
        assert busy.status() == 0x0000
        busy.release()
        door.scp.stop(drain_s=0.0)
        assert idle.ends()[0] == ABORT
        stopping.join()
        assert door.scp.associations == 0
        with pytest.raises(ConnectionRefusedError):
            ScriptedPeer(door.port)


def test_no_patient_attribute_in_the_log(door: Door) -> None:
    """What the door logs of a stored, a refused and a broken instance holds neither patient attributes nor instance UIDs."""
    data_set = draw()
    with capture_logs() as events:
        with associated(door) as peer:
            assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0000
            assert store(peer, encoded(data_set)[:-2], data_set.SOPInstanceUID) == 0xC000
            peer.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, data_set.SOPInstanceUID))), pdu(P_DATA, b"broken"))
            peer.ends()
        door.settle()
    text = repr(events)
    assert {event["event"] for event in events} >= {"association.accepted", "instance.refused", "association.violation", "instance.aborted"}
    for secret in ("Drawn", "drawn-1", data_set.SOPInstanceUID, data_set.StudyInstanceUID):
        assert secret not in text


def test_threads_end_with_their_associations(rooms: Rooms) -> None:
    """Fifty callers that connect, associate or abort leave no thread behind (threat 7)."""
    with open_door(rooms) as door:
        for number in range(50):
            with ScriptedPeer(door.port) as peer:
                if number % 3:
                    assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
                if number % 3 == 2:
                    peer.send(pdu(ABORT, bytes(4)))
        door.scp.stop(drain_s=30.0)
        assert not [thread for thread in threading.enumerate() if "AcceptorThread" in thread.name]
        assert door.events.counts["association.failed"] == 0


def test_who_may_not_store(rooms: Rooms) -> None:
    """Accept = false: no storage contexts; beside C-GET they are there, and a store is answered 0124."""
    peers = Peers([Peer("reader", "READER", "127.0.0.1", accept=False)])
    with open_door(rooms, peers=peers) as door, ScriptedPeer(door.port) as peer:
        assert peer.associate(STORE_CONTEXT, (3, VERIFICATION, [IMPLICIT]), calling="READER") == ASSOCIATE_AC
        assert {context: result for context, (result, _) in peer.results.items()} == {1: 3, 3: 0}
        peer.release()
    sender = StorageSCU(ae_title="DERM_NODE")
    retrieve = RetrieveSCP(database=rooms.database, archive=rooms.archive, audit=rooms.audit, peers=peers, sender=sender)
    data_set = draw()
    with open_door(rooms, peers=peers, services=[retrieve]) as door, ScriptedPeer(door.port) as peer:
        assert peer.associate(STORE_CONTEXT, (3, GET, [IMPLICIT]), calling="READER") == ASSOCIATE_AC
        assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0x0124
        peer.release()
    assert rooms.landing() == []


def test_accepted_peers_are_told(rooms: Rooms) -> None:
    """Each association of a peer that is accepted is told with its name and address; one that is rejected is not."""
    visits: list[tuple[str, str]] = []
    peers = Peers([Peer("camera", "CAM", "*", 0), Peer("mute", "MUTE", "*", 0, accept=False, retrieve=False)])
    with open_door(rooms, peers=peers, visited=lambda *visit: visits.append(visit)) as door:
        for calling in ("CAM", "MUTE", "NOBODY", "CAM"):
            with ScriptedPeer(door.port) as peer:
                if peer.associate(STORE_CONTEXT, calling=calling) == ASSOCIATE_AC:
                    peer.release()
        door.settle()
    assert visits == [("camera", "127.0.0.1")] * 2


def test_user_identity(rooms: Rooms) -> None:
    """Who must identify and does not, or wrongly, is rejected, who guesses on is for now; the right passcode comes in (threat 12)."""
    identities = Identities([User("nurse", hash_passcode(b"correct horse"))])
    with open_door(rooms, identities=identities, identity_required=True) as door:

        def answer(secondary: bytes | None, primary: bytes = b"nurse") -> Association:
            entity = AE(ae_title="SCANNER")
            entity.add_requested_context(VERIFICATION)
            items = []
            if secondary is not None:
                item = UserIdentityNegotiation()
                item.user_identity_type, item.positive_response_requested = 2, True
                item.primary_field, item.secondary_field = primary, secondary
                items.append(item)
            association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE", ext_neg=items)
            if association.is_established:
                association.release()
            return association

        assert answer(None).is_rejected
        assert answer(b"wrong").is_rejected
        assert answer(b"wrong", b"nobody").is_rejected
        let_in = answer(b"correct horse")
        assert let_in.is_released
        assert let_in.acceptor.user_identity is not None
        results = []
        for _ in range(30):
            guess = answer(b"guess")
            assert guess.is_rejected
            results.append(guess.acceptor.primitive.result)
        assert set(results) == {1, 2}
        door.settle()


def test_who_identified_is_told_with_the_instance(rooms: Rooms) -> None:
    """The verified user is in index, footer, audit trail and trace of what came, and in the record of its refusal; else nothing is."""
    identities = Identities([User("nurse", hash_passcode(b"correct horse"))])
    named, nameless = draw(), draw()
    with open_door(rooms, identities=identities) as door:
        for request, data_set in (
            (user_information(identity(2, b"nurse", b"correct horse")), named),
            (associate_rq([STORE_CONTEXT]), nameless),
        ):
            with ScriptedPeer(door.port) as peer:
                peer.send(request)
                answer = peer.pdu()
                assert answer is not None
                assert answer[0] == ASSOCIATE_AC
                assert store(peer, encoded(data_set), data_set.SOPInstanceUID) == 0
                assert store(peer, b"nothing", "1.2.3.4") == 0xC000
                peer.release()
        door.settle()
    for data_set, user in ((named, "nurse"), (nameless, "")):
        told = rooms.archive.trace(data_set.SOPInstanceUID)
        assert told["instances"][0]["received"]["user"] == user
        assert any(", user nurse" in line for line in lines(told)) == bool(user)
        record = rooms.index.find(data_set.SOPInstanceUID)
        assert record.origin.user == user
        again = footer_to_record(json.loads(json.dumps(record_to_footer(record.summary, record.origin, "source"))), record.sealed)
        assert again.origin == record.origin
    details = {(one.event.action, one.event.detail.get("user", "")) for one in rooms.audit.entries()}
    assert details >= {(action, user) for action in ("instance.received", "instance.refused") for user in ("nurse", "")}


def test_certificates_of_peers(rooms: Rooms, tmp_path: Path) -> None:
    """A peer with a certificate of its own is that peer only when it shows it (threat 11)."""
    file = certificate(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    server.load_verify_locations(file)
    server.verify_mode = ssl.CERT_OPTIONAL
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(file.read_text().split("-----BEGIN PRIVATE")[0])).hexdigest()
    peers = Peers([Peer("shown", "SHOWN", "*", 0, certificate=fingerprint), Peer("other", "OTHER", "*", 0, certificate="0" * 64)])
    with open_door(rooms, peers=peers, tls=lambda: server) as door:
        for shows, calling, expected in ((True, "SHOWN", ASSOCIATE_AC), (True, "OTHER", ASSOCIATE_RJ), (False, "SHOWN", ASSOCIATE_RJ)):
            client = ssl.create_default_context(cafile=str(file))
            if shows:
                client.load_cert_chain(file)
            peer = ScriptedPeer(door.port)
            peer.socket = client.wrap_socket(peer.socket, server_hostname="127.0.0.1")
            assert peer.associate(STORE_CONTEXT, calling=calling) == expected
            peer.socket.close()
        door.settle()


def test_credentials_that_end_end_associations(rooms: Rooms, tmp_path: Path) -> None:
    """An association whose certificate is revoked, or whose token ends, while it is open is aborted; others go on (threat 81)."""
    file = certificate(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    server.load_verify_locations(file)
    server.verify_mode = ssl.CERT_OPTIONAL
    revoked = threading.Event()
    limits = ReceiveLimits(credentials_s=0.1)
    ended = lambda _: "revoked" if revoked.is_set() else ""  # noqa: E731
    with open_door(rooms, tls=lambda: server, certificate_ended=ended, limits=limits) as door:
        client = ssl.create_default_context(cafile=str(file))
        anonymous = ScriptedPeer(door.port)
        anonymous.socket = client.wrap_socket(anonymous.socket, server_hostname="127.0.0.1")
        client.load_cert_chain(file)
        shown = ScriptedPeer(door.port)
        shown.socket = client.wrap_socket(shown.socket, server_hostname="127.0.0.1")
        for peer in (anonymous, shown):
            assert peer.associate(STORE_CONTEXT) == ASSOCIATE_AC
        revoked.set()
        assert shown.ends()[0] == ABORT
        anonymous.release()
        for peer in (anonymous, shown):
            peer.socket.close()
        door.settle()


def test_a_peer_that_is_removed_is_out(rooms: Rooms) -> None:
    """An association of a peer that is removed, or loses a right, while it is open is aborted; others go on."""
    added = [KnownPeer("camera", {**Peer("camera", "CAMERA", "*", 0).settings()}, datetime.now(UTC), "test")]
    peers = Peers([Peer("stays", "STAYS", "*", 0)], added=lambda: list(added), refresh_s=0.0)
    with open_door(rooms, peers=peers, limits=ReceiveLimits(credentials_s=0.1)) as door:
        camera, stays = ScriptedPeer(door.port), ScriptedPeer(door.port)
        assert camera.associate(STORE_CONTEXT, calling="CAMERA") == ASSOCIATE_AC
        assert stays.associate(STORE_CONTEXT, calling="STAYS") == ASSOCIATE_AC
        added.clear()
        assert camera.ends()[0] == ABORT
        data_set = draw()
        assert store(stays, encoded(data_set), data_set.SOPInstanceUID) == 0
        stays.release()
        for peer in (camera, stays):
            peer.socket.close()
        door.settle()


def test_what_repeats_is_logged_once(rooms: Rooms) -> None:
    """A stranger who is rejected fifty times is one line in the log; each of them is counted and stands in the diary."""
    with open_door(rooms, peers=Peers()) as door, capture_logs() as events:
        for _ in range(50):
            assert rejection(door.port) == (1, 1, 3)
        door.events.wait_for("association.rejected", 50)
    assert sum(event["event"] == "association.rejected" for event in events) == 1


def test_a_peer_whose_name_does_not_resolve_may_try_again(rooms: Rooms) -> None:
    """While the name service is away nobody knows who calls: a transient rejection, so that the sender keeps its queue."""
    peers = Peers([Peer("named", "NAMED", "no-such-host.invalid")])
    with open_door(rooms, peers=peers) as door:
        assert rejection(door.port, calling="NAMED") == (2, 3, 1)
        assert rejection(door.port, calling="NOBODY") == (1, 1, 3)
