"""What C-STORE is measured against: Orthanc, DCMTK's storescp, a receiver with pynetdicom alone, and a bare loop, the floor.

``python -m bench.receivers pynetdicom|floor FOLDER PORT`` runs one of the last two in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.database import Database
from storage.envelope import Sealer
from storage.keys import Ring
from storage.study_keys import StudyKeys
from tests.ports import free_port

PROMPT = {"TCP_NODELAY": "1"}
"""DCMTK, and Orthanc by it, sends without waiting for acknowledgements (Nagle's algorithm off)."""
DEFAULTS = {"TCP_NODELAY": "0"}
"""As Debian's DCMTK does when nobody says anything."""


@dataclass(frozen=True)
class Receiver:
    """A program that listens."""

    name: str
    ae_title: str
    port: int
    process_id: int


def program(name: str) -> str | None:
    """Path of a peer's program, None where it is not installed."""
    beside = Path("/usr/sbin") / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


@contextmanager
def orthanc(folder: Path, environ: Mapping[str, str] = PROMPT) -> Iterator[Receiver]:
    """Run Orthanc as installed, without plug-ins: they would only take time."""
    port = free_port()
    folder.mkdir(parents=True)
    configuration = {
        "Name": "Bench", "DicomAet": "ORTHANC", "DicomPort": port, "HttpPort": free_port(), "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "Plugins": [],
        "DicomAlwaysAllowStore": True, "DicomCheckCalledAet": True, "OverwriteInstances": False,
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with _running("Orthanc", [str(program("Orthanc")), str(path)], "ORTHANC", port, folder, environ) as receiver:
        yield receiver


@contextmanager
def storescp(folder: Path, environ: Mapping[str, str] = PROMPT) -> Iterator[Receiver]:
    """Run DCMTK's storescp, a process for each association."""
    port = free_port()
    folder.mkdir(parents=True)
    (folder / "in").mkdir()
    command = [str(program("storescp")), "--fork", "--accept-all", "--max-pdu", "131072", "-aet", "STORESCP", "-od", str(folder / "in")]
    with _running("storescp", [*command, str(port)], "STORESCP", port, folder, environ) as receiver:
        yield receiver


@contextmanager
def script(kind: str, folder: Path) -> Iterator[Receiver]:
    """Run one of this file's receivers, `pynetdicom` or `floor`, in a process of its own."""
    port = free_port()
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.receivers", kind, str(folder), str(port)]
    with _running(kind, command, "RECEIVER", port, folder, PROMPT) as receiver:
        yield receiver


@contextmanager
def _running(name: str, command: list[str], ae_title: str, port: int, folder: Path, environ: Mapping[str, str]) -> Iterator[Receiver]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environ})
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start: {(folder / 'log').read_text()[-500:]}") from None
                time.sleep(0.05)
            else:
                break
        yield Receiver(name, ae_title, port, process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _pynetdicom(folder: Path, port: int) -> None:
    """Receive as the examples of pynetdicom's documentation do."""
    from pynetdicom import AE, AllStoragePresentationContexts, evt
    from pynetdicom._globals import ALL_TRANSFER_SYNTAXES

    def store(event: evt.Event) -> int:
        data_set = event.dataset
        data_set.file_meta = event.file_meta
        data_set.save_as(folder / f"{data_set.SOPInstanceUID}.dcm", enforce_file_format=True)
        return 0

    entity = AE("RECEIVER")
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
    entity.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, store)])


class _Floor:
    """Receive, digest, seal, write, flush; no scan, no index, no jobs, no audit trail, and nothing that a stranger could not break."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ring = Ring.create(folder / "ring.json")
        database = Database(url=f"sqlite:///{folder}/index.db", key=ring.database_key())
        database.migrate()
        self._study_keys = StudyKeys(database=database, ring=ring)
        self._study_key = self._study_keys.current("1.2")

    def serve(self, port: int) -> None:
        """Accept for ever, a thread for each association."""
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
        from pynetdicom.pdu_primitives import A_ASSOCIATE
        from pynetdicom.presentation import PresentationContext

        from dicom_node.dimse.message import COMMAND, LAST, parse_command, pdata, pdvs, store_request, store_response

        buffer = bytearray(1 << 18)
        with connection:
            command, sealer, digest, descriptor, path = bytearray(), None, hashlib.sha256(), -1, Path()
            while True:
                kind, length = struct.unpack(">BxL", self._exactly(connection, memoryview(buffer)[:6]))
                body = self._exactly(connection, memoryview(buffer)[:length])
                if kind == 0x01:
                    decoded = A_ASSOCIATE_RQ()
                    decoded.decode(struct.pack(">BxL", kind, length) + bytes(body))
                    request: A_ASSOCIATE = decoded.to_primitive()
                    accepted = []
                    for proposed in request.presentation_context_definition_list:
                        context = PresentationContext()
                        context.context_id, context.result = proposed.context_id, 0
                        context.transfer_syntax = [proposed.transfer_syntax[0]]
                        accepted.append(context)
                    request.result, request.result_source, request.diagnostic = 0, 1, None
                    request.presentation_context_definition_results_list = accepted
                    request.maximum_length_received = 262_144
                    answer = A_ASSOCIATE_AC()
                    answer.from_primitive(request)
                    connection.sendall(answer.encode())
                elif kind == 0x05:
                    connection.sendall(struct.pack(">BxLL", 0x06, 4, 0))
                elif kind != 0x04:
                    return
                else:
                    for context_id, control, fragment in pdvs(body):
                        if control & COMMAND:
                            command += fragment
                            continue
                        if sealer is None:
                            key = secrets.token_hex(16)
                            path = self._folder / key
                            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                            sealer, digest = Sealer(key, lambda piece, into=descriptor: os.write(into, piece)), hashlib.sha256()
                        digest.update(fragment)
                        sealer.update(fragment)
                        if control & LAST:
                            sealer.finish({"sha256": digest.hexdigest()}, self._study_key, self._study_keys)
                            os.fdatasync(descriptor)
                            os.close(descriptor)
                            sealer = None
                            response = store_response(store_request(parse_command(bytes(command))), 0)
                            command.clear()
                            for pdu in pdata(context_id, COMMAND, response, 16_384):
                                connection.sendall(pdu)

    @staticmethod
    def _exactly(connection: socket.socket, view: memoryview) -> memoryview:
        have = 0
        while have < len(view):
            count = connection.recv_into(view[have:])
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if not count:
                raise SystemExit  # ends this thread alone
            have += count
        return view


if __name__ == "__main__":
    if sys.argv[1] == "pynetdicom":
        _pynetdicom(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _Floor(Path(sys.argv[2])).serve(int(sys.argv[3]))
