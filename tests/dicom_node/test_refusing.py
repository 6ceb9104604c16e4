"""What the DIMSE door refuses stands in the diary, with why and what helps; in every case without patient data."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit
from pynetdicom import AE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    ModalityWorklistInformationFind,
    SecondaryCaptureImageStorage,
    Verification,
)

from dicom_node.dimse.refusing import Words
from dicom_node.dimse.scp import UNKNOWN_CALLING, Rejection
from dicom_node.peers import Peer, Peers
from storage.records import Origin
from storage.refusals import Refusal, Refusals
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, Rooms, draw, open_door, open_rooms
from tests.dicom_node.scripted_peer import ScriptedPeer

PEERS = [
    Peer("known", "KNOWN", "127.0.0.1"),
    Peer("moved", "MOVED", "10.9.9.9"),
    Peer("target", "TARGET", "127.0.0.1", 104, accept=False, retrieve=False),
]


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    """An archive."""
    rooms = open_rooms(tmp_path)
    yield rooms
    rooms.database.close()


@contextmanager
def noted(rooms: Rooms, **settings: object) -> Iterator[tuple[Door, Refusals]]:
    """A door that keeps a diary."""
    with Refusals(database=rooms.database, every_s=0.01) as diary, open_door(rooms, refusals=diary, **settings) as door:  # type: ignore[arg-type]
        yield door, diary


def only(diary: Refusals) -> Refusal:
    """The one row there is."""
    assert diary.flush()
    (row,) = diary.all()
    return row


def associate(door: Door, calling: str, called: str = "DERM_NODE", *contexts: tuple[str, str]) -> object:
    """Try to associate; returns the association, ended."""
    entity = AE(ae_title=calling)
    for abstract, transfer in contexts or ((Verification, "1.2.840.10008.1.2"),):
        entity.add_requested_context(abstract, transfer)
    association = entity.associate("127.0.0.1", door.port, ae_title=called)
    if association.is_established:
        association.release()
    door.settle()
    return association


@pytest.mark.parametrize(
    ("calling", "called", "reason", "remedy"),
    [
        ("STRANGER", "DERM_NODE", "AE title 'STRANGER' at 127.0.0.1 is no peer", "peers add NAME --ae-title STRANGER --host 127.0.0.1`"),
        ("it's; rm", "DERM_NODE", "is no peer", "--ae-title 'it'\"'\"'s; rm' --host"),
        ("KNOWN", "OTHER", "it called AE title 'OTHER', and ours is DERM_NODE", "set the called AE title at the caller to DERM_NODE"),
        ("MOVED", "DERM_NODE", "is known (moved at 10.9.9.9), but not at 127.0.0.1", "correct the host"),
        ("TARGET", "DERM_NODE", "peer target may do nothing here", "accept = true"),
    ],
)  # fmt: skip
def test_rejected_associations(rooms: Rooms, calling: str, called: str, reason: str, remedy: str) -> None:
    """Each rejected caller learns from us what PS3.8 has numbers for; the diary says what it was and the command that helps."""
    with noted(rooms, peers=Peers(PEERS)) as (door, diary):
        associate(door, calling, called)
        row = only(diary)
    assert (row.kind, row.address, row.calling_ae_title, row.called_ae_title) == ("association", "127.0.0.1", calling, called)
    assert reason in row.reason
    assert remedy in row.remedy


def test_too_many_associations(rooms: Rooms) -> None:
    """A caller beyond its quota stands in the diary under its name, with the setting."""
    with noted(rooms, peers=Peers([Peer("one", "ONE", "127.0.0.1", max_associations=1)])) as (door, diary):
        entity = AE(ae_title="ONE")
        entity.add_requested_context(Verification)
        first = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE")
        second = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE")
        assert second.is_rejected
        first.release()
        row = only(diary)
    assert row.peer == "one"
    assert "max_associations = 1" in row.reason


@pytest.mark.parametrize(
    ("abstract", "transfer", "reason"),
    [
        (ModalityWorklistInformationFind, ExplicitVRLittleEndian, "Modality Worklist Information Model - FIND is no service of this node"),
        (CTImageStorage, "1.2.840.10008.1.2.7.1", "CT Image Storage was offered only in"),
        ("1.2.826.0.1.3680043.9.1", ExplicitVRLittleEndian, "SOP class 1.2.826.0.1.3680043.9.1 is private or unknown"),
    ],
)
def test_rejected_contexts(rooms: Rooms, abstract: str, transfer: str, reason: str) -> None:
    """A presentation context that is not accepted is named, be it for its SOP class or its transfer syntaxes; accepted ones are not."""
    with noted(rooms, unknown_sop_classes=False) as (door, diary):
        associate(door, "ANY", "DERM_NODE", (SecondaryCaptureImageStorage, JPEGBaseline8Bit), (abstract, transfer))
        row = only(diary)
    assert (row.kind, row.calling_ae_title) == ("context", "ANY")
    assert row.reason.startswith(reason)
    assert row.remedy


def test_contexts_that_a_peer_may_not_use(rooms: Rooms) -> None:
    """A peer that may only query is refused storage, by what it may not and not by what it offered."""
    with noted(rooms, peers=Peers([Peer("viewer", "VIEWER", "127.0.0.1", accept=False)])) as (door, diary):
        associate(door, "VIEWER", "DERM_NODE", (SecondaryCaptureImageStorage, ExplicitVRLittleEndian))
        row = only(diary)
    assert (row.kind, row.peer) == ("context", "viewer")
    assert row.reason == "Secondary Capture Image Storage: peer viewer may not use it"
    assert "accept = true" in row.remedy


def test_refused_instances(rooms: Rooms) -> None:
    """A refused instance is there with its status and cause, of its peer; repeats are counted; nothing of the data set stands in it."""
    with noted(rooms, peers=Peers(PEERS)) as (door, diary):
        entity = AE(ae_title="KNOWN")
        entity.add_requested_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE")
        data_set = draw()
        data_set.file_meta = FileMetaDataset()
        data_set.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data_set.PixelData = data_set.PixelData[:-2]  # less than Rows and Columns say
        for _ in range(2):
            assert association.send_c_store(data_set).Status == 0xC000
        association.release()
        row = only(diary)
    assert (row.kind, row.peer, row.count) == ("instance", "known", 2)
    assert row.reason.startswith("0xC000: ")
    for told in (str(data_set.PatientName), data_set.PatientID, data_set.SOPInstanceUID):
        assert told not in f"{row.reason} {row.remedy}"


def test_violations(rooms: Rooms) -> None:
    """A caller that breaks the protocol on an association is named with what it did."""
    with noted(rooms) as (door, diary):
        with ScriptedPeer(door.port) as peer:
            peer.associate((1, SECONDARY_CAPTURE, [ExplicitVRLittleEndian]))
            peer.send(b"\x04\x00\x7f\xff\xff\xff")
            door.events.wait_for("association.violation")
        row = only(diary)
    assert row.reason == "aborted, the caller broke the protocol: PDU longer than announced or allowed"


@pytest.mark.parametrize(("sent", "reason"), [(b"GET / HTTP/1.1\r\n\r\n", "HTTP on the DICOM port"), (b"\x16\x03\x01\x00\x05hello", "TLS")])
def test_connections_that_are_no_dicom(rooms: Rooms, sent: bytes, reason: str) -> None:
    """What is no association request at all is noted by its address, with a guess what it is."""
    with noted(rooms) as (door, diary):
        with socket.create_connection(("127.0.0.1", door.port)) as stranger:
            stranger.sendall(sent)
            stranger.settimeout(30)
            while stranger.recv(1024):
                pass
        row = only(diary)
    assert (row.kind, row.address, row.calling_ae_title) == ("connection", "127.0.0.1", "")
    assert reason in row.reason


class Notes:
    """A diary for those who look at one note."""

    def __init__(self) -> None:
        self.told: list[dict[str, str]] = []

    def note(self, **told: str) -> None:
        """Keep it."""
        self.told.append(told)


def test_handshakes_and_unknown_rejections_have_words() -> None:
    """A TLS handshake that failed is explained; a rejection with a number of its own at least says its reason."""
    notes = Notes()
    words = Words(notes, peers=Peers(), ae_title="DERM_NODE")  # type: ignore[arg-type]
    error = ssl.SSLError(1, "[SSL: NO_SHARED_CIPHER] no shared cipher")
    error.reason = "NO_SHARED_CIPHER"
    words.connection("TLS handshake failed", address="10.0.0.1", error=error)
    words.connection("TLS handshake failed", address="10.0.0.1", error=ConnectionResetError(104, "Connection reset by peer"))
    who = {"peer": None, "calling_ae_title": "A", "called_ae_title": "B"}
    words.association(Rejection(1, 1, 1, "user identity not accepted"), address="10.0.0.1", **who)  # type: ignore[arg-type]
    words.association(UNKNOWN_CALLING, address="::1", **who)  # type: ignore[arg-type]
    assert [told["kind"] for told in notes.told] == ["tls", "tls", "association", "association"]
    assert "no cipher suite in common" in notes.told[0]["reason"]
    assert notes.told[2]["reason"] == "user identity not accepted"
    assert all(told["remedy"] for told in notes.told if told["kind"] == "tls")


def test_places_in_a_data_set_do_not_make_new_rows() -> None:
    """The same fault at another byte is the same refusal."""
    notes = Notes()
    words = Words(notes, peers=Peers(), ae_title="DERM_NODE")  # type: ignore[arg-type]
    origin = Origin("dimse", datetime.now(UTC), "10.0.0.1", "A", "B", "pacs")
    for byte in (12, 4711):
        words.instance(0xC000, f"(7FE0,0010) at byte {byte}: the value is cut; send it again", origin)
    assert notes.told[0] == notes.told[1]
    assert notes.told[0]["reason"] == "0xC000: (7FE0,0010): the value is cut"
