"""Orthanc against the DIMSE door, both ways: it stores here, and receives what we deliver."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.peers import Peer
from tests.dicom_node.door import Door, draw, open_door, open_rooms, save
from tests.dicom_node.test_scu import held

pytestmark = pytest.mark.peer


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Orthanc:
    """A running Orthanc."""

    url: str
    peer: Peer

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """GET, or POST a body; the JSON answer."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=body), timeout=60) as answer:
            return json.load(answer)

    def file(self, path: str) -> bytes:
        """GET bytes."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return bytes(answer.read())


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """An archive behind a door."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    with open_door(rooms) as door:
        yield door
    rooms.database.close()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory, door: Door) -> Iterator[Orthanc]:
    """An Orthanc of its own ports and folder that knows the door as modality ``node``."""
    program = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.fail("Orthanc is missing; install it (apt install orthanc)")
    folder = tmp_path_factory.mktemp("orthanc")
    http, dicom = free_port(), free_port()
    (folder / "orthanc.json").write_text(
        json.dumps(
            {
                "Name": "TestOrthanc",
                "StorageDirectory": str(folder / "storage"),
                "IndexDirectory": str(folder / "storage"),
                "HttpPort": http,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False,
                "DicomAet": "ORTHANC",
                "DicomPort": dicom,
                "DicomServerEnabled": True,
                "DicomAlwaysAllowStore": True,
                "DicomModalities": {"node": ["DERM_NODE", "127.0.0.1", door.port]},
                "Plugins": [],
            }
        )
    )
    log = (folder / "log").open("wb")
    process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, env={**os.environ, "TCP_NODELAY": "1"})
    orthanc = Orthanc(f"http://127.0.0.1:{http}", Peer("orthanc", "ORTHANC", "127.0.0.1", dicom))
    try:
        for _ in range(600):
            try:
                orthanc.ask("/system")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield orthanc
    finally:
        process.terminate()
        process.wait()
        log.close()


def test_orthanc_stores_here(door: Door, orthanc: Orthanc, tmp_path: Path) -> None:
    """`POST /modalities/node/store` of two instances: both are archived with Orthanc as the sender, and equal to the originals."""
    originals = []
    for number, syntax in enumerate((ExplicitVRLittleEndian, ImplicitVRLittleEndian)):
        path = save(draw(rows=200, columns=200, seed=number), tmp_path / f"{number}.dcm", syntax)
        originals.append((pydicom.dcmread(path), orthanc.ask("/instances", path.read_bytes())["ID"]))
    answer = orthanc.ask("/modalities/node/store", json.dumps([identifier for _, identifier in originals]).encode())
    assert answer["FailedInstancesCount"] == 0
    assert answer["InstancesCount"] == 2
    for original, _ in originals:
        with door.rooms.archive.open(original.SOPInstanceUID) as stored:
            assert stored.record.origin.calling_ae_title == "ORTHANC"
            assert pydicom.dcmread(BytesIO(b"".join(stored.part10()))) == original


def test_orthanc_echoes(orthanc: Orthanc) -> None:
    """`POST /modalities/node/echo` succeeds."""
    assert orthanc.ask("/modalities/node/echo", b"{}") == {}


def test_orthanc_receives(orthanc: Orthanc) -> None:
    """What we send to Orthanc is in its archive, once, however often it is sent."""
    scu = StorageSCU(ae_title="DERM_NODE")
    instance = held(draw(rows=100, columns=100))
    for _ in range(2):
        ((_, outcome),) = scu.store(orthanc.peer, [instance])
        assert outcome == Stored(0)
    query = {"Level": "Instance", "Query": {"SOPInstanceUID": instance.summary.sop_instance_uid}}
    (identifier,) = orthanc.ask("/tools/find", json.dumps(query).encode())
    assert orthanc.file(f"/instances/{identifier}/file").endswith(instance.data)
