"""Orthanc against the DIMSE door, both ways: it stores here, and receives what we deliver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.peers import Peer
from tests.dicom_node.door import Door, draw, open_door, open_rooms, save
from tests.dicom_node.test_scu import held
from tests.interop.orthanc import Orthanc, running_orthanc
from tests.ports import free_port

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """An archive behind a door."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    with open_door(rooms) as door:
        yield door
    rooms.database.close()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory, door: Door) -> Iterator[Orthanc]:
    """An Orthanc that knows the door as modality ``node``."""
    folder = tmp_path_factory.mktemp("orthanc")
    with running_orthanc(folder, ae_title="ORTHANC", modalities={"node": ("DERM_NODE", door.port)}, dicom_port=free_port()) as orthanc:
        yield orthanc


def test_orthanc_stores_here(door: Door, orthanc: Orthanc, tmp_path: Path) -> None:
    """`POST /modalities/node/store` of two instances: both are archived with Orthanc as the sender, and equal to the originals."""
    originals = []
    for number, syntax in enumerate((ExplicitVRLittleEndian, ImplicitVRLittleEndian)):
        path = save(draw(rows=200, columns=200, seed=number), tmp_path / f"{number}.dcm", syntax)
        originals.append((pydicom.dcmread(path), orthanc.upload(path.read_bytes())))
    answer = orthanc.call("/modalities/node/store", json.dumps([identifier for _, identifier in originals]).encode())
    assert answer["FailedInstancesCount"] == 0
    assert answer["InstancesCount"] == 2
    for original, _ in originals:
        with door.rooms.archive.open(original.SOPInstanceUID) as stored:
            assert stored.record.origin.calling_ae_title == "ORTHANC"
            assert pydicom.dcmread(BytesIO(b"".join(stored.part10()))) == original


def test_orthanc_echoes(orthanc: Orthanc) -> None:
    """`POST /modalities/node/echo` succeeds."""
    assert orthanc.call("/modalities/node/echo", b"{}") == {}


def test_orthanc_receives(orthanc: Orthanc) -> None:
    """What we send to Orthanc is in its archive, once, however often it is sent."""
    scu = StorageSCU(ae_title="DERM_NODE")
    instance = held(draw(rows=100, columns=100))
    for _ in range(2):
        ((_, outcome),) = scu.store(Peer("orthanc", orthanc.ae_title, "127.0.0.1", orthanc.dicom_port), [instance])
        assert outcome == Stored(0)
    query = {"Level": "Instance", "Query": {"SOPInstanceUID": instance.summary.sop_instance_uid}}
    (identifier,) = orthanc.call("/tools/find", json.dumps(query).encode())
    assert orthanc.raw(f"/instances/{identifier}/file").endswith(instance.data)
