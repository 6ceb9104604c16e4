"""DCMTK against the DIMSE door, both ways: echoscu, storescu and dcmsend send, storescp receives."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.peers import Peer
from storage.part10 import Part10Parser
from tests.dicom_node.door import Door, Rooms, draw, encoded, open_door, open_rooms, save
from tests.dicom_node.test_scu import held
from tests.ports import free_port

pytestmark = pytest.mark.peer

PROPOSE = {
    ExplicitVRLittleEndian: "-xe",
    ImplicitVRLittleEndian: "-xi",
    ExplicitVRBigEndian: "-xb",
    DeflatedExplicitVRLittleEndian: "-xd",
    JPEGBaseline8Bit: "-xy",
    RLELossless: "-xr",
}


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


def tool(name: str) -> str:
    """The path of a DCMTK program."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing; install DCMTK (apt install dcmtk)")
    return path


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a DCMTK program to its end."""
    return subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def drawn(path: Path, syntax: str) -> Path:
    """Draw a picture in a transfer syntax. Compressed ones are no real streams: a door stores what it cannot decode."""
    data_set = draw(rows=32, columns=32)
    if syntax in (JPEGBaseline8Bit, RLELossless):
        data_set.BitsAllocated = data_set.BitsStored = 8
        data_set.HighBit = 7
        data_set.PixelData = encapsulate([bytes(np.random.default_rng(1).integers(0, 256, 400, dtype=np.uint8))])
        data_set["PixelData"].VR = "OB"
        data_set["PixelData"].is_undefined_length = True
    return save(data_set, path, syntax)


def data_set_bytes(path: Path) -> bytes:
    """The data set of a file."""
    parser = Part10Parser()
    data = b"".join(bytes(piece) for piece in parser.feed(path.read_bytes()))
    parser.finish()
    return data


def test_echoscu(door: Door) -> None:
    """C-ECHO succeeds, and a wrong called AE title is rejected by its name."""
    assert run("echoscu", "-aec", "DERM_NODE", "127.0.0.1", door.port).returncode == 0
    wrong = run("echoscu", "-aec", "OTHER", "127.0.0.1", door.port)
    assert wrong.returncode != 0
    assert "Called AE Title Not Recognized" in wrong.stderr


@pytest.mark.parametrize("syntax", list(PROPOSE), ids=[syntax.keyword for syntax in PROPOSE])
def test_storescu_in_every_kind_of_syntax(door: Door, tmp_path: Path, syntax: str) -> None:
    """The instance is kept in the syntax it was sent in; where DCMTK sends the file's own bytes, they are the ones archived."""
    path = drawn(tmp_path / "picture.dcm", syntax)
    sent = run("storescu", "-v", "-aec", "DERM_NODE", PROPOSE[syntax], "127.0.0.1", door.port, path)
    assert sent.returncode == 0, sent.stderr
    assert "Received Store Response (Success)" in sent.stderr
    original = pydicom.dcmread(path)
    with door.rooms.archive.open(original.SOPInstanceUID) as stored:
        assert stored.record.summary.transfer_syntax_uid == syntax
        copy = tmp_path / "copy.dcm"
        copy.write_bytes(b"".join(stored.part10()))
    again = pydicom.dcmread(copy)
    assert again == original
    if syntax != DeflatedExplicitVRLittleEndian:  # deflated anew by DCMTK
        assert data_set_bytes(copy) == data_set_bytes(path)


def test_big_instance_in_small_pdus(door: Door, tmp_path: Path) -> None:
    """32 MB in PDUs of 4 kB arrive whole."""
    path = save(draw(rows=4096, columns=4096), tmp_path / "big.dcm")
    sent = run("storescu", "-aec", "DERM_NODE", "--max-send-pdu", 4096, "127.0.0.1", door.port, path)
    assert sent.returncode == 0, sent.stderr
    with door.rooms.archive.open(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) as stored:
        assert b"".join(stored.chunks()) == data_set_bytes(path)


def test_two_senders_at_once(door: Door, tmp_path: Path) -> None:
    """Two dcmsend at the same time: all instances of both are stored."""
    count = door.rooms.count()
    senders = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(20):
            save(draw(rows=64, columns=64, seed=number), tmp_path / name / f"{number}.dcm")
        command = [tool("dcmsend"), "-aec", "DERM_NODE", "127.0.0.1", str(door.port), "+sd", str(tmp_path / name)]
        senders.append(subprocess.Popen(command, stderr=subprocess.PIPE))
    for sender in senders:
        _, errors = sender.communicate(timeout=120)
        assert sender.returncode == 0, errors
    assert door.rooms.count() == count + 40


def test_refused_instance_is_told(door: Door, tmp_path: Path) -> None:
    """A data set with cut pixel data gets status C000, DCMTK says so, and nothing is stored."""
    data_set = draw()
    data_set.PixelData = data_set.PixelData[:-10]
    path = save(data_set, tmp_path / "cut.dcm")
    count = door.rooms.count()
    sent = run("storescu", "-v", "-aec", "DERM_NODE", "127.0.0.1", door.port, path)
    assert "CannotUnderstand" in sent.stderr.replace(" ", "") or "0xc000" in sent.stderr.lower(), sent.stderr
    assert door.rooms.count() == count


def test_sender_killed_in_mid_store(door: Door, tmp_path: Path) -> None:
    """A storescu that dies within an instance leaves nothing in the landing area and nothing in the index."""
    path = save(draw(rows=6000, columns=6000), tmp_path / "big.dcm")
    count = door.rooms.count()
    command = [tool("storescu"), "-aec", "DERM_NODE", "--max-send-pdu", "4096", "127.0.0.1", str(door.port), str(path)]
    sender = subprocess.Popen(command)
    while not door.rooms.landing():
        assert sender.poll() is None, "the sender ended before it could be killed"
        time.sleep(0.001)
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    door.settle()
    assert door.rooms.landing() == []
    assert door.rooms.count() == count


@pytest.fixture
def storescp(tmp_path: Path) -> Iterator[tuple[Peer, Path]]:
    """DCMTK's storescp, writing what it receives bit for bit."""
    folder = tmp_path / "received"
    folder.mkdir()
    port = free_port()
    process = subprocess.Popen(
        [tool("storescp"), "-aet", "STORESCP", "+xa", "+B", "-od", str(folder), str(port)], stderr=subprocess.DEVNULL
    )
    peer = Peer("storescp", "STORESCP", "127.0.0.1", port)
    try:
        for _ in range(200):
            try:
                StorageSCU(ae_title="DERM_NODE").echo(peer)
                break
            except Exception:  # noqa: BLE001 - not up yet
                assert process.poll() is None, "storescp did not start"
                time.sleep(0.05)
        yield peer, folder
    finally:
        process.terminate()
        process.wait()


def test_storescp_receives_what_is_stored(storescp: tuple[Peer, Path]) -> None:
    """A batch in two syntaxes reaches DCMTK's storescp, byte for byte."""
    peer, folder = storescp
    batch = [held(draw(rows=300, columns=300)), held(draw(), syntax=ImplicitVRLittleEndian)]
    assert [outcome for _, outcome in StorageSCU(ae_title="DERM_NODE").store(peer, batch)] == [Stored(0), Stored(0)]
    received = {data_set_bytes(path) for path in folder.iterdir()}
    assert received == {instance.data for instance in batch}
    assert encoded(draw()) not in received
