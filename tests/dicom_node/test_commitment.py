"""Storage Commitment over real associations: what is asked of us, what we report, what we are told, and whom we believe."""

from __future__ import annotations

import struct
import threading
import time
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid
from pynetdicom.dimse_primitives import N_ACTION

from dicom_node.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE
from dicom_node.dimse.references import write_information
from dicom_node.peers import Peer, Peers
from storage.commitments import Patience, Reference, State
from storage.records import Origin
from storage.refusals import NoDiary
from tests.dicom_node.commitment_peer import CommitmentPeer, Office, information, open_office, transaction
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, draw, encoded, open_door, open_rooms
from tests.dicom_node.scripted_peer import EXPLICIT

Pair = tuple[str, str]


class Notes(NoDiary):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.noted: list[dict[str, str]] = []

    def note(self, **noted: str) -> None:
        """Keep it."""
        self.noted.append(noted)


@pytest.fixture
def peer() -> Iterator[CommitmentPeer]:
    """Listens, and may ask."""
    with CommitmentPeer() as peer:
        yield peer


@pytest.fixture
def notes() -> Notes:
    """What is refused."""
    return Notes()


@pytest.fixture
def office(tmp_path: Path, peer: CommitmentPeer, notes: Notes) -> Iterator[Office]:
    """An archive that knows the peer, and one more that calls itself OTHER."""
    rooms = open_rooms(tmp_path)
    known = [Peer("pacs", "PACS", "127.0.0.1", peer.port), Peer("other", "OTHER", "127.0.0.1", peer.port)]
    yield open_office(rooms, known, diary=notes, references=50)
    rooms.database.close()


@pytest.fixture
def door(office: Office, peer: CommitmentPeer) -> Iterator[Door]:
    """The archive's door, with the service."""
    known = [Peer("pacs", "PACS", "127.0.0.1", peer.port), Peer("other", "OTHER", "127.0.0.1", peer.port)]
    with open_door(office.rooms, peers=Peers(known), services=[office.service], accept_unknown_peers=True) as door:
        yield door


def archived(office: Office) -> Pair:
    """Archive a picture."""
    data_set = draw()
    with office.rooms.archive.receive(
        Origin(door="dimse", received_at=office.rooms.database.clock()), transfer_syntax_uid=EXPLICIT
    ) as intake:
        intake.write(encoded(data_set))
        intake.commit()
    return str(data_set.SOPClassUID), str(data_set.SOPInstanceUID)


def states(office: Office) -> list[str]:
    """State of every commitment."""
    from sqlalchemy import select  # noqa: PLC0415

    from storage.commitments import COMMITMENTS  # noqa: PLC0415

    with office.rooms.database.read() as connection:
        return sorted(connection.execute(select(COMMITMENTS.c.state)).scalars())


def test_reports_on_the_association_of_the_request(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """Who keeps the association open gets the report on it: all instances committed, event type 1, no Failed SOP Sequence."""
    pairs = [archived(office) for _ in range(3)]
    uid = transaction()
    assert peer.ask(door.port, uid, pairs, then=lambda: peer.await_reports(1)) == 0
    (report,) = peer.reports
    assert (report.event_type, report.here) == (1, False)
    assert report.data_set.TransactionUID == uid
    assert report.committed == pairs
    assert "FailedSOPSequence" not in report.data_set
    door.settle()
    assert states(office) == ["reported"]
    office.work("pacs")
    assert len(peer.reports) == 1


def test_reports_on_an_association_of_its_own(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """Who releases soon is called, with the role of the SCP proposed; nothing was sent on the first association (PS3.4 J.3.3)."""
    pair = archived(office)
    assert peer.ask(door.port, transaction(), [pair], then=lambda: time.sleep(0.15)) == 0
    door.settle()
    assert peer.reports == []
    office.work_until("pacs", lambda: states(office) == ["reported"])
    (report,) = peer.reports
    assert (report.event_type, report.here, report.as_scp, report.committed) == (1, True, True, [pair])


def test_says_which_failed_and_why(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """Event type 2 names each instance once: 0112 unknown, 0119 of another class, 0122 of a class not stored, 0110 damaged."""
    good, conflict, damaged = (archived(office) for _ in range(3))
    unknown, strange = (SECONDARY_CAPTURE, str(generate_uid())), ("1.2.999", str(generate_uid()))
    for path in (office.rooms.folder / "objects").rglob("*"):
        with office.rooms.archive.open(damaged[1]) as stored:
            key = stored.record.sealed.object_key
        if path.is_file() and path.name.startswith(key):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(content)
            break
    asked = [good, ("1.2.840.10008.5.1.4.1.1.2", conflict[1]), unknown, strange, damaged, good]
    assert peer.ask(door.port, transaction(), asked, then=lambda: peer.await_reports(1)) == 0
    (report,) = peer.reports
    assert report.event_type == 2
    assert report.committed == [good]
    assert report.failed == {conflict[1]: 0x0119, unknown[1]: 0x0112, strange[1]: 0x0122, damaged[1]: 0x0110}
    assert "instance.damaged" in {entry.event.action for entry in office.rooms.audit.events_of(damaged[1])}


def test_refuses_nonsense(office: Office, door: Door, peer: CommitmentPeer, notes: Notes) -> None:
    """Wrong class, instance, action type and data set get the standard's status, and are noted; the association lives on."""
    pair = archived(office)
    good = information(transaction(), [pair])
    without = Dataset()
    without.ReferencedSOPSequence = good.ReferencedSOPSequence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad_uid = information("1.2.x", [pair])
    cases = [
        (good, 1, PUSH_MODEL, "1.2.3", 0x0112),
        (good, 2, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0123),
        (without, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0115),
        (information(transaction(), []), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0115),
        (bad_uid, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0115),
        (None, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0115),
        (information(transaction(), [(SECONDARY_CAPTURE, f"1.2.{n}") for n in range(51)]), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 0x0213),
    ]
    with peer.calling(door.port) as association:
        for data_set, action, class_uid, instance_uid, wanted in cases:
            status, _ = association.send_n_action(data_set, action, class_uid, instance_uid)  # type: ignore[arg-type]
            assert status.Status == wanted
            assert status.ErrorComment
        status, _ = association.send_n_action(good, 1, "1.2.840.10008.1.20.2", PUSH_MODEL_INSTANCE, meta_uid=PUSH_MODEL)  # type: ignore[arg-type]
        assert status.Status == 0x0118
    assert states(office) == []
    assert [note["kind"] for note in notes.noted] == ["commitment"] * (len(cases) + 1)
    assert all(note["peer"] == "pacs" for note in notes.noted)


def test_other_operations_are_unrecognised(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """An N-GET in the context is answered with 0211, and the association lives on."""
    with peer.calling(door.port) as association:
        status, _ = association.send_n_get([0x00080018], PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0x0211
        status, _ = association.send_n_action(information(transaction(), [archived(office)]), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0


def test_same_request_again_is_the_same(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """The same request under the same Transaction UID is answered and reported again; another one under it is refused with 0131."""
    pair, other = archived(office), archived(office)
    uid = transaction()
    assert peer.ask(door.port, uid, [pair]) == 0
    assert peer.ask(door.port, uid, [pair]) == 0
    door.settle()
    assert len(states(office)) == 1
    office.work_until("pacs", lambda: states(office) == ["reported"])
    assert peer.ask(door.port, uid, [pair]) == 0
    door.settle()
    office.work_until("pacs", lambda: len(peer.reports) == 2)
    assert peer.ask(door.port, uid, [pair, other]) == 0x0131
    assert peer.ask(door.port, uid, [other]) == 0x0131
    assert len(states(office)) == 1


def test_who_may_not_store_may_not_ask(office: Office, peer: CommitmentPeer, notes: Notes) -> None:
    """A peer that only reports to us, accept = false and commit = true, is refused with 0124, not authorised, and a note."""
    known = Peer("pacs", "PACS", "127.0.0.1", peer.port, accept=False, commit=True)
    with open_door(office.rooms, peers=Peers([known]), services=[office.service]) as door:
        pair = archived(office)
        assert peer.ask(door.port, transaction(), [pair]) == 0x0124
        assert peer.tell(door.port, information(transaction(), [pair])) == 0x0115
    assert states(office) == []
    assert "accept = true" in notes.noted[0]["reason"]


def test_transaction_uids_are_each_peers_own(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """Two peers that use one Transaction UID each get their own report."""
    uid, pair = transaction(), archived(office)
    assert peer.ask(door.port, uid, [pair]) == 0
    with peer.calling(door.port, ae_title="OTHER") as association:
        status, _ = association.send_n_action(information(uid, [pair, pair]), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0
    door.settle()
    assert len(states(office)) == 2


def test_strangers_have_no_context(door: Door, peer: CommitmentPeer) -> None:
    """A caller that is no known peer is let in by this door, and its Storage Commitment context is refused."""
    with peer.calling(door.port, ae_title="STRANGER") as association:
        assert not association.is_established
        assert association.rejected_contexts or association.is_aborted


def test_report_survives_a_peer_that_is_away(office: Office, door: Door, peer: CommitmentPeer, tmp_path: Path) -> None:
    """A report that cannot be delivered or is refused is tried again; after the patience with the peer it ends, and is audited."""
    uid = transaction()
    assert peer.ask(door.port, uid, [archived(office)]) == 0
    door.settle()
    peer.event_status = 0x0110
    office.work_until("pacs", lambda: len(peer.reports) > 2)
    assert states(office) == ["examined"]
    patient = open_office(
        office.rooms, [Peer("pacs", "PACS", "127.0.0.1", peer.port)], patience=Patience(report_s=0.0, delay=lambda _: 0.3)
    )
    patient.work_until("pacs", lambda: states(office) == ["unreported"])
    assert "commitment.unreported" in {entry.event.action for entry in office.rooms.audit.events_of(uid)}


def test_claimed_once_however_many_work(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """Four clerks at once report each of ten commitments exactly once."""
    for _ in range(10):
        assert peer.ask(door.port, transaction(), [archived(office)]) == 0
    door.settle()
    threads = [threading.Thread(target=office.work, args=("pacs",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    office.work_until("pacs", lambda: states(office) == ["reported"] * 10)
    assert len({report.data_set.TransactionUID for report in peer.reports}) == len(peer.reports) == 10


def test_forged_reports_are_not_believed(office: Office, door: Door, peer: CommitmentPeer, notes: Notes) -> None:
    """Unknown transactions, other event types, wrong instances, unreadable data: refused by status and noted (threats.md row 22)."""
    pair = archived(office)
    assert peer.tell(door.port, information(transaction(), [pair])) == 0x0115
    assert peer.tell(door.port, information(transaction(), [pair]), event_type=3) == 0x0113
    without = information(transaction(), [pair])
    del without.TransactionUID
    assert peer.tell(door.port, without) == 0x0115
    assert len(notes.noted) == 3
    assert "not believed" in notes.noted[0]["reason"]
    assert peer.tell(door.port, information(transaction(), [pair]), ae_title="STRANGER") is None


def test_a_flood_of_reports_makes_no_flood_of_threads(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """A hundred reports on one association are answered in order by the association's own thread."""
    with peer.calling(door.port, as_scp=True) as association:
        for _ in range(100):
            status, _ = association.send_n_event_report(information(transaction(), [("1.2", "1.3")]), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
            assert status.Status == 0x0115
    door.settle()
    assert State.COMMITTED not in states(office)


def test_too_many_open_commitments(office: Office, tmp_path: Path, peer: CommitmentPeer) -> None:
    """A peer may have so many commitments open; the next is refused with 0213 until one is over."""
    known = [Peer("pacs", "PACS", "127.0.0.1", peer.port)]
    small = open_office(office.rooms, known, patience=Patience(open_at_most=2, delay=lambda _: 0.3))
    pair = archived(office)
    with open_door(office.rooms, peers=Peers(known), services=[small.service]) as door:
        assert [peer.ask(door.port, transaction(), [pair]) for _ in range(3)] == [0, 0, 0x0213]
        door.settle()
        small.work_until("pacs", lambda: states(small) == ["reported"] * 2)
        assert peer.ask(door.port, transaction(), [pair]) == 0


def test_a_million_references(office: Office, door: Door, peer: CommitmentPeer) -> None:
    """A request of fifty megabytes ends its association before it is held whole; nothing is kept of it, and others are served (row 22)."""
    with peer.calling(door.port) as association:
        action = N_ACTION()
        action.MessageID, action.ActionTypeID = 1, 1
        action.RequestedSOPClassUID, action.RequestedSOPInstanceUID = UID(PUSH_MODEL), UID(PUSH_MODEL_INSTANCE)
        one = write_information("1.2.3", [Reference("1.2", "1.3")], implicit=True)
        action.ActionInformation = BytesIO(one[:14] + struct.pack("<HHL", 8, 0x1199, 0xFFFFFFFF) + one[22:] * 1_000_000)
        association.dimse.send_msg(action, association.accepted_contexts[0].context_id or 0)
        door.events.wait_for("association.violation")
        association.join(30)
        assert not association.is_alive()
    door.settle()
    assert states(office) == []
    assert peer.ask(door.port, transaction(), [archived(office)]) == 0


@pytest.mark.parametrize("point", ["commitment.claimed", "commitment.examined", "commitment.sent"])
def test_killed_while_reporting(office: Office, door: Door, peer: CommitmentPeer, point: str) -> None:
    """A clerk that dies with a commitment in hand is followed by another when its lease ends; the peer hears of it at least once."""

    class Killed(BaseException):
        pass

    def kill(name: str) -> None:
        if name == point:
            raise Killed

    short = open_office(
        office.rooms, [Peer("pacs", "PACS", "127.0.0.1", peer.port)], patience=Patience(lease_s=1.0, delay=lambda _: 0.3), reach=kill
    )
    pair = archived(office)
    assert peer.ask(door.port, transaction(), [pair]) == 0
    door.settle()
    with pytest.raises(Killed):
        short.work_until("pacs", lambda: False)
    office.work_until("pacs", lambda: states(office) == ["reported"])
    assert {tuple(report.committed) for report in peer.reports} == {(pair,)}
    assert len(peer.reports) == (2 if point == "commitment.sent" else 1)
