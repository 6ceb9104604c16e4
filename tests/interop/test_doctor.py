"""The doctor and the refusal diary against DCMTK and Orthanc: what they say of real programs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
import pytest

from dicom_node.config import Settings
from dicom_node.dimse.probe import Probe
from dicom_node.doctor import Check, Doctor
from dicom_node.peers import Peer, Peers
from dicom_node.specimen import PATIENT_ID
from storage.refusals import Refusals
from tests.dicom_node.door import Door, draw, open_door, open_rooms, save
from tests.interop.orthanc import program, running_orthanc
from tests.ports import free_port

pytestmark = pytest.mark.peer


def examined(peer: Peer, *, store: bool = True) -> list[Check]:
    """What the doctor says of a peer."""
    one = Doctor(Settings(), [peer], probe=lambda title: Probe(ae_title=title, connect_s=5.0, answer_s=20.0), store=store)
    return list(one.peer(peer))


def failures(checks: list[Check]) -> list[str]:
    """The sentences of what did not pass."""
    return [check.text for check in checks if check.passed is False]


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[Peer]:
    """DCMTK's receiver."""
    port = free_port()
    process = subprocess.Popen(
        [program("storescp"), "-aet", "STORESCP", "-od", str(folder), *options, str(port)], stderr=subprocess.DEVNULL
    )
    peer = Peer("storescp", "STORESCP", "127.0.0.1", port)
    try:
        for _ in range(200):
            if not failures(examined(peer, store=False))[:1] or process.poll() is not None:
                break
            time.sleep(0.05)
        yield peer
    finally:
        process.terminate()
        process.wait()


def test_storescp(tmp_path: Path) -> None:
    """DCMTK's storescp passes: it takes reports, offers no query, and has got one test instance."""
    with storescp(tmp_path) as peer:
        checks = examined(peer)
    assert not failures(checks)
    said = " / ".join(check.text for check in checks)
    for words in (
        "OFFIS_DCMTK",
        "answers C-ECHO",
        "takes Comprehensive 3D SR Storage",
        "offers no query",
        "stores Explicit VR Little Endian",
    ):
        assert words in said, said
    (received,) = tmp_path.iterdir()
    assert pydicom.dcmread(received).PatientID == PATIENT_ID


def test_storescp_that_refuses(tmp_path: Path) -> None:
    """A storescp that refuses every association is told from one that is not there."""
    with storescp(tmp_path, "--refuse") as peer:
        assert "rejected the association" in failures(examined(peer))[0]
    assert "nobody listens" in failures(examined(peer))[0]


def test_orthanc(tmp_path: Path) -> None:
    """Orthanc passes: query with no match, commitment offered, the test instance stored; by another AE title it rejects us."""
    port = free_port()
    modalities = {"node": ("DERM_NODE", free_port())}
    with running_orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities, dicom_port=port) as orthanc:
        checks = examined(Peer("orthanc", "ORTHANC", "127.0.0.1", port))
        said = " / ".join(check.text for check in checks)
        assert not failures(checks), said
        for words in ("storage commitment", "Study Root C-FIND", "no match", "stores Explicit VR Little Endian"):
            assert words in said, said
        (instance,) = orthanc.instances()
        assert orthanc.call(f"/instances/{instance}/simplified-tags")["PatientID"] == PATIENT_ID
        assert "rejected the association" in failures(examined(Peer("orthanc", "OTHER", "127.0.0.1", port)))[0]


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[Door, Refusals]]:
    """A door with one peer, and its diary."""
    rooms = open_rooms(tmp_path)
    peers = Peers([Peer("modality", "MODALITY", "127.0.0.1")])
    with Refusals(database=rooms.database, every_s=0.01) as diary, open_door(rooms, peers=peers, refusals=diary) as door:
        yield door, diary
    rooms.database.close()


def run(name: str, *arguments: object) -> int:
    """Run a DCMTK program to its end."""
    return subprocess.run([program(name), *map(str, arguments)], capture_output=True, timeout=120, check=False).returncode


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-aet", "STRANGER", "-aec", "DERM_NODE"), "AE title 'STRANGER' at 127.0.0.1 is no peer"),
        (("-aet", "MODALITY", "-aec", "OTHER"), "it called AE title 'OTHER', and ours is DERM_NODE"),
    ],
)
def test_echoscu_turned_away(door: tuple[Door, Refusals], arguments: tuple[str, ...], reason: str) -> None:
    """What echoscu was refused stands in the diary, with the command or the setting that helps."""
    listening, diary = door
    assert run("echoscu", *arguments, "127.0.0.1", listening.port) != 0
    assert diary.flush()
    (row,) = diary.all()
    assert row.reason == reason
    assert row.remedy


def test_storescu_turned_away(door: tuple[Door, Refusals], tmp_path: Path) -> None:
    """An instance that storescu sends broken is in the diary under the peer's name; so is findscu's context that nobody serves."""
    listening, diary = door
    data_set = draw()
    data_set.PixelData = data_set.PixelData[:-10]
    path = save(data_set, tmp_path / "cut.dcm")
    run("storescu", "-aet", "MODALITY", "-aec", "DERM_NODE", "127.0.0.1", listening.port, path)
    run("findscu", "-W", "-aet", "MODALITY", "-aec", "DERM_NODE", "-k", "PatientName", "127.0.0.1", listening.port)
    assert diary.flush()
    told = {row.kind: row for row in diary.all() if row.kind == "instance" or "Worklist" in row.reason}
    assert told["instance"].peer == "modality"
    assert told["instance"].reason.startswith("0xC000")
    assert "is no service of this node" in told["context"].reason
