"""A real Orthanc on ports and folders of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port


def program(name: str) -> str:
    """Path of a peer's program; its absence skips the test, and fails it in CI."""
    found = shutil.which(name) or (f"/usr/sbin/{name}" if Path(f"/usr/sbin/{name}").exists() else None)
    if found is None:
        reason = f"{name} is missing; make peers installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Orthanc:
    """Its REST interface."""

    def __init__(self, *, ae_title: str, dicom_port: int, http_port: int) -> None:
        self.ae_title, self.dicom_port, self._http_port = ae_title, dicom_port, http_port

    def call(self, path: str, body: bytes | None = None) -> Any:
        """GET, or POST ``body``; the answer as JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._http_port}{path}", data=body)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")

    def raw(self, path: str) -> bytes:
        """GET as bytes."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}{path}", timeout=60) as response:
            return bytes(response.read())

    def delete(self, path: str) -> None:
        """DELETE."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._http_port}{path}", method="DELETE")
        with urllib.request.urlopen(request, timeout=60):
            pass

    def upload(self, part10: bytes) -> str:
        """Put an instance in; its Orthanc identifier."""
        return str(self.call("/instances", part10)["ID"])

    def send(self, modality: str, identifier: str) -> Any:
        """`POST /modalities/{modality}/store`."""
        return self.call(f"/modalities/{modality}/store", identifier.encode())

    def instances(self, sop_class_uid: str = "") -> list[str]:
        """Identifiers of all instances, or those of one SOP class."""
        every = self.call("/instances")
        return [one for one in every if not sop_class_uid or self.raw(f"/instances/{one}/metadata/SopClassUid").decode() == sop_class_uid]


@contextmanager
def running_orthanc(folder: Path, *, ae_title: str, modalities: dict[str, tuple[str, int]], dicom_port: int) -> Iterator[Orthanc]:
    """Start one; ``modalities``: name -> (AE title, port) on this machine."""
    http_port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "Name": ae_title, "DicomAet": ae_title, "DicomPort": dicom_port, "HttpPort": http_port, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "Plugins": [],
        "DicomModalities": {name: [title, "127.0.0.1", port] for name, (title, port) in modalities.items()},
        "DicomAlwaysAllowStore": True, "DicomCheckCalledAet": True, "OverwriteInstances": False, "DicomScuTimeout": 30,
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program("Orthanc"), str(path)], stdout=log, stderr=log, env={**os.environ, "TCP_NODELAY": "1"})
    orthanc = Orthanc(ae_title=ae_title, dicom_port=dicom_port, http_port=http_port)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                orthanc.call("/system")
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "orthanc.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "Orthanc did not start"
                time.sleep(0.1)
        yield orthanc
    finally:
        process.terminate()
        process.wait(30)
