"""Storage Commitment with Orthanc: it asks us, and we ask it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicom_node.courier import Courier
from dicom_node.dimse.scu import StorageSCU
from dicom_node.peers import Peer, Peers
from storage.commitments import Patience, State
from tests.dicom_node.commitment_peer import Office, open_office
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, draw, open_door, open_rooms, save
from tests.dicom_node.test_commitment import archived, states
from tests.dicom_node.test_courier import archived as to_deliver
from tests.dicom_node.test_courier import job_of
from tests.interop.orthanc import Orthanc, running_orthanc
from tests.ports import free_port

pytestmark = pytest.mark.peer

PATIENCE = Patience(delay=lambda _: 0.3, wait_s=0.0, answer_s=3.0)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[Door, Office, Peer]]:
    """An archive that knows an Orthanc which does not run yet, and its door."""
    rooms = open_rooms(tmp_path)
    orthanc = Peer("orthanc", "ORTHANC", "127.0.0.1", free_port(), commit=True)
    office = open_office(rooms, [orthanc], patience=PATIENCE)
    with open_door(rooms, peers=Peers([orthanc]), services=[office.service]) as door:
        yield door, office, orthanc
    rooms.database.close()


@pytest.fixture
def orthanc(tmp_path: Path, door: tuple[Door, Office, Peer]) -> Iterator[Orthanc]:
    """An Orthanc that knows the door as modality ``node``."""
    listening, _, peer = door
    modalities = {"node": ("DERM_NODE", listening.port)}
    with running_orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities, dicom_port=peer.port) as orthanc:
        yield orthanc


def asked_by(orthanc: Orthanc, office: Office, pairs: list[tuple[str, str]]) -> dict[str, object]:
    """Let Orthanc ask us about instances, and wait for what it was told."""
    answer = orthanc.call("/modalities/node/storage-commitment", json.dumps({"DicomInstances": [list(pair) for pair in pairs]}).encode())
    for _ in range(200):
        office.work("orthanc")
        told = orthanc.call(f"/storage-commitment/{answer['ID']}")
        if told["Status"] != "Pending":
            return dict(told)
        time.sleep(0.1)
    pytest.fail("Orthanc heard nothing")


def test_orthanc_asks_and_hears_success(door: tuple[Door, Office, Peer], orthanc: Orthanc) -> None:
    """Orthanc stores an instance here, asks for its commitment, releases, and is told of the success on an association of ours."""
    listening, office, _ = door
    path = save(draw(), listening.rooms.folder / "one.dcm")
    identifier = orthanc.upload(path.read_bytes())
    assert orthanc.send("node", identifier)["FailedInstancesCount"] == 0
    original = pydicom.dcmread(path)
    told = asked_by(orthanc, office, [(original.SOPClassUID, original.SOPInstanceUID)])
    assert told["Status"] == "Success"
    assert told["Success"] == [{"SOPClassUID": original.SOPClassUID, "SOPInstanceUID": original.SOPInstanceUID}]
    assert told["Failures"] == []
    assert states(office) == ["reported"]


def test_orthanc_hears_of_failures(door: tuple[Door, Office, Peer], orthanc: Orthanc) -> None:
    """Orthanc is told which of its instances are kept here and which not, and why in the standard's words."""
    _, office, _ = door
    good, conflict, unknown = archived(office), archived(office), (SECONDARY_CAPTURE, str(generate_uid()))
    told = asked_by(orthanc, office, [good, ("1.2.840.10008.5.1.4.1.1.2", conflict[1]), unknown])
    assert told["Status"] == "Failure"
    assert told["Success"] == [{"SOPClassUID": good[0], "SOPInstanceUID": good[1]}]
    failures = {failure["SOPInstanceUID"]: failure["FailureReason"] for failure in told["Failures"]}  # type: ignore[attr-defined]
    assert failures == {conflict[1]: 0x0119, unknown[1]: 0x0112}


def test_orthanc_sends_with_commitment(door: tuple[Door, Office, Peer], orthanc: Orthanc) -> None:
    """`POST /modalities/node/store` with ``StorageCommitment`` ends in success."""
    listening, office, _ = door
    identifiers = [orthanc.upload(save(draw(seed=n), listening.rooms.folder / f"{n}.dcm").read_bytes()) for n in range(2)]
    body = {"Resources": identifiers, "StorageCommitment": True, "Synchronous": True}
    answer = orthanc.call("/modalities/node/store", json.dumps(body).encode())
    transaction = answer["StorageCommitmentTransactionUID"]
    office.work_until("orthanc", lambda: orthanc.call(f"/storage-commitment/{transaction}")["Status"] == "Success")


def delivered(office: Office, peer: Peer) -> tuple[Courier, str]:
    """Deliver a report to Orthanc, whose commitment is owed then."""
    rooms = office.rooms
    uid, _ = to_deliver(rooms, "orthanc")
    sender = StorageSCU(ae_title="DERM_NODE")
    courier = Courier(archive=rooms.archive, queue=rooms.queue, peers=Peers([peer]), sender=sender, clerk=office.clerk)
    assert courier.deliver("orthanc") == 1
    return courier, uid


def test_orthanc_commits_our_reports(door: tuple[Door, Office, Peer], orthanc: Orthanc) -> None:
    """A delivered report is asked for; Orthanc calls our door as SCP by role selection, and the proof is kept."""
    listening, office, peer = door
    _, uid = delivered(office, peer)
    office.work_until("orthanc", lambda: states(office) == [State.COMMITTED])
    assert "commitment" in job_of(office.rooms, uid, "orthanc").result
    assert len(orthanc.instances()) == 1
    assert listening.events.counts["association.accepted"] >= 1


def test_orthanc_lost_our_report(door: tuple[Door, Office, Peer], orthanc: Orthanc) -> None:
    """Deleted in Orthanc before we ask: it says so, the report is sent again, and committed then (fault 36)."""
    _, office, peer = door
    courier, uid = delivered(office, peer)
    (identifier,) = orthanc.instances()
    orthanc.delete(f"/instances/{identifier}")
    assert orthanc.instances() == []
    office.work_until("orthanc", lambda: states(office) == [State.RESENT])
    assert courier.deliver("orthanc") == 1
    office.work_until("orthanc", lambda: states(office) == [State.COMMITTED])
    (identifier,) = orthanc.instances()
    assert pydicom.dcmread(BytesIO(orthanc.raw(f"/instances/{identifier}/file"))).SOPInstanceUID == uid
