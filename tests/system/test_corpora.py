"""All of the corpora through both doors of a whole node: what is intact is kept bit-exact, what is cut is refused, nothing dies."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.errors import PeerUnreachable, Refused
from dicom_node.peers import Peer
from dicom_node.sending import scan
from storage.errors import StorageError
from storage.part10 import Part10Parser, part10_prefix
from storage.records import Summary
from tests.dicom_node.door import open_door, open_rooms
from tests.dicomweb import door as web_door
from tests.storage.test_scan import corpora_files, is_refused_upstream
from tests.system.running_node import running_node

pytestmark = [pytest.mark.shared, pytest.mark.slow]

CUTS = 20
ROOM = 256 * 1024**2
"""Most that a process of the doors may grow over all of it."""


@dataclass(frozen=True)
class Piece:
    """An instance, or the beginning of one, under the identity of the whole."""

    summary: Summary
    data: bytes

    def chunks(self) -> Iterator[bytes]:
        """The data set bytes."""
        for start in range(0, len(self.data), 100_000):
            yield self.data[start : start + 100_000]


def whole_pieces(shared: Path) -> list[Piece]:
    """Every intact file of the corpora."""
    pieces = []
    for path, content in corpora_files(shared):
        if not is_refused_upstream(path):
            parser = Part10Parser()
            data = b"".join(bytes(piece) for piece in parser.feed(content))
            parser.finish()
            pieces.append(Piece(scan(content), data))
    return pieces


def rounds(pieces: list[Piece]) -> list[list[Piece]]:
    """Share the pieces out so that in no round a UID stands for two things: the corpora hold one picture in many codings."""
    shared_out: list[tuple[set[str], dict[str, str], list[Piece]]] = []
    for piece in pieces:
        uid, study = piece.summary.sop_instance_uid, piece.summary.study_instance_uid
        attributes = piece.summary.attributes
        patient = "\\".join((*attributes.get("PatientID", ("",)), *attributes.get("IssuerOfPatientID", ("",))))
        fitting = (one for one in shared_out if uid not in one[0] and one[1].get(study, patient) == patient)
        uids, patients, members = next(fitting, (set[str](), dict[str, str](), list[Piece]()))
        if not members:
            shared_out.append((uids, patients, members))
        uids.add(uid)
        patients[study] = patient
        members.append(piece)
    return [members for _, _, members in shared_out]


def c_store(port: int, pieces: list[Piece]) -> list[object]:
    """Send as one C-STORE SCU; the outcome of each."""
    peer = Peer(name="node", ae_title="DERM_NODE", host="127.0.0.1", port=port)
    scu = StorageSCU(ae_title="CORPORA", answer_s=60)
    outcomes: list[object] = []
    while len(outcomes) < len(pieces):
        try:
            outcomes += [outcome for _, outcome in scu.store(peer, pieces[len(outcomes) :])]
        except PeerUnreachable as error:
            outcomes.append(error)
    return outcomes


def stow(port: int, piece: Piece) -> tuple[int, int]:
    """POST one instance; status and Failure Reason (0 when stored, -1 without one)."""
    summary = piece.summary
    prefix = part10_prefix(
        sop_class_uid=summary.sop_class_uid, sop_instance_uid=summary.sop_instance_uid, transfer_syntax_uid=summary.transfer_syntax_uid
    )
    body = b"--corpora\r\nContent-Type: application/dicom\r\n\r\n" + prefix + piece.data + b"\r\n--corpora--\r\n"
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=corpora', "Accept": "application/dicom+json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/dicomweb/studies", body=body, headers=headers)
        response = connection.getresponse()
        told = json.loads(response.read())
    finally:
        connection.close()
    if "00081199" in told:
        return response.status, 0
    for sequence in ("00081198", "0008119A"):
        if sequence in told:
            return response.status, int(told[sequence]["Value"][0]["00081197"]["Value"][0])
    return response.status, -1


def fetched(port: int, summary: Summary) -> bytes:
    """Retrieve an instance as stored; its data set bytes."""
    path = f"/dicomweb/studies/{summary.study_instance_uid}/series/{summary.series_instance_uid}/instances/{summary.sop_instance_uid}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers={"Accept": f'application/dicom; transfer-syntax="{summary.transfer_syntax_uid}"'})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
    finally:
        connection.close()
    parser = Part10Parser()
    data = b"".join(bytes(piece) for piece in parser.feed(body))
    parser.finish()
    assert parser.transfer_syntax_uid == summary.transfer_syntax_uid
    return data


def resident(process_id: int) -> int:
    """Resident memory in bytes."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.timeout(600)
def test_intact_files_are_kept_bit_exact(shared: Path, tmp_path: Path) -> None:
    """Half of them by C-STORE, half by STOW-RS, the other way about in the next round; each comes back as it was sent."""
    for number, members in enumerate(rounds(whole_pieces(shared))):
        folder = tmp_path / str(number)
        folder.mkdir()
        rooms = open_rooms(folder)
        with open_door(rooms) as dimse, web_door.Door(rooms) as web:
            by_dimse, by_web = members[number % 2 :: 2], members[1 - number % 2 :: 2]
            for piece, outcome in zip(by_dimse, c_store(dimse.port, by_dimse), strict=True):
                assert outcome == Stored(0), (piece.summary.sop_instance_uid, outcome)
            for piece in by_web:
                assert stow(web.port, piece) == (200, 0), piece.summary.sop_instance_uid
            for piece in members:
                # PS3.18 has no way to ask for these two as they are; they are read from the archive below.
                if piece.summary.transfer_syntax_uid not in {"1.2.840.10008.1.2", "1.2.840.10008.1.2.2"}:
                    assert fetched(web.port, piece.summary) == piece.data, piece.summary.sop_instance_uid
                with rooms.archive.open(piece.summary.sop_instance_uid) as stored:
                    assert stored.read() == piece.data, piece.summary.sop_instance_uid
        rooms.archive.close()
        rooms.database.close()


@pytest.mark.timeout(900)
def test_cut_files_are_refused(shared: Path, tmp_path: Path) -> None:
    """Each file cut at 20 random offsets, through each door: refused with a reason; no process dies or grows; nothing is left."""
    chance = random.Random(20_260_102)
    with running_node(tmp_path / "node") as node:
        children = node.children()
        pieces = whole_pieces(shared)
        stow(node.web_port, pieces[0])
        before = {process_id: resident(process_id) for process_id in children}
        cut = [replace(piece, data=piece.data[: chance.randrange(len(piece.data))]) for piece in pieces for _ in range(CUTS)]
        for piece, outcome in zip(cut, c_store(node.dimse_port, cut), strict=True):
            assert isinstance(outcome, Refused), (piece.summary.sop_instance_uid, len(piece.data), outcome)
            assert outcome.status in {0xC000, 0xA900}
        for piece in cut:
            status, reason = stow(node.web_port, piece)
            assert (status, reason) in {(409, 0xC000), (409, 0xA900)}, (piece.summary.sop_instance_uid, len(piece.data), status, reason)
        assert node.children() == children
        for process_id, role in children.items():
            assert resident(process_id) - before[process_id] < ROOM, role
        assert "Traceback" not in node.log_text()
        assert not [path for path in (node.data_dir / "landing").rglob("*") if path.is_file() and path.stat().st_size]


def test_a_broken_upstream_file_is_refused_with_its_reason(shared: Path) -> None:
    """What upstream itself made wrong is refused by `send` before it leaves, in words."""
    for path, content in corpora_files(shared):
        if is_refused_upstream(path):
            with pytest.raises(StorageError, match=r"\w{3}"):
                scan(content)
