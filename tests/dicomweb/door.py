"""The HTTP door over a real archive, in a thread of its own, and a client that sends exactly what it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from typing import Any, Self

from dicomweb.app import make_app
from dicomweb.server import Serving, serve
from storage.part10 import part10_prefix
from tests.storage.house import House
from tests.storage.samples import Sample, photograph

MULTIPART = 'multipart/related; type="application/dicom"; boundary={}'
ANY_SYNTAX = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}


@dataclass(frozen=True)
class Answer:
    """An HTTP response, read whole."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def problem(self) -> dict[str, Any]:
        """The body, which must be a problem document of this status that shows nothing of our inside."""
        assert self.headers["content-type"] == "application/problem+json", self.headers
        document = self.json
        assert document["status"] == self.status
        assert document["detail"]
        assert "Traceback" not in self.body.decode()
        return dict(document)

    @property
    def parts(self) -> list[tuple[str, bytes]]:
        """Content-Type and content of each part; the body must end with its closing delimiter."""
        message = Message()
        message["Content-Type"] = self.headers["content-type"]
        boundary = message.get_boundary()
        assert boundary is not None
        assert self.body.endswith(f"\r\n--{boundary}--\r\n".encode())
        found = []
        for part in self.body.split(f"--{boundary}".encode())[1:-1]:
            headers, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
            found.append((str(BytesParser().parsebytes(headers + b"\r\n\r\n")["Content-Type"]), content.removesuffix(b"\r\n")))
        return found


class Door:
    """A running door. A context manager."""

    def __init__(self, house: House, *, head_s: float = 20.0, **options: Any) -> None:
        self.house = house
        self._options = options
        self._head_s = head_s
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._serving: Serving | None = None
        self._thread = threading.Thread(target=self._run, name="door")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = make_app(
            archive=self.house.archive, index=self.house.index, audit=self.house.audit, node_ae_title="NODE", workers=4, **self._options
        )
        self._serving = self._loop.run_until_complete(serve(app, host="127.0.0.1", port=0, head_s=self._head_s, drain_s=2))
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._serving.close())
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._serving is not None
        return self._serving.address[1]

    @property
    def base(self) -> str:
        """URL of the service."""
        return f"http://127.0.0.1:{self.port}/dicomweb"

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        raw: bool = False,
    ) -> Answer:
        """Send one request; `path` begins after the base path and is sent as it is, or from the root if `raw`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            target = path if raw or path.startswith("http") else "/dicomweb" + path
            connection.request(method, target.removeprefix(f"http://127.0.0.1:{self.port}"), body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            content = response.read()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """GET; header names with underscores for hyphens."""
        return self.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def store(self, *files: bytes, path: str = "/studies", boundary: str = "boundary", headers: Mapping[str, str] | None = None) -> Answer:
        """Store Part 10 files in one multipart body."""
        return self.request(
            "POST", path, headers={"Content-Type": MULTIPART.format(boundary), **(headers or {})}, body=multipart(files, boundary)
        )

    def stored(self, **options: Any) -> Sample:
        """Store a fresh photograph."""
        sample = photograph(**options)
        answer = self.store(file_of(sample))
        assert answer.status == 200, answer.body
        return sample


def multipart(files: Iterable[bytes], boundary: str = "boundary", *, head: bytes = b"Content-Type: application/dicom\r\n") -> bytes:
    """Write a multipart body."""
    mark = b"--" + boundary.encode()
    return b"".join(mark + b"\r\n" + head + b"\r\n" + file + b"\r\n" for file in files) + mark + b"--\r\n"


def file_of(sample: Sample) -> bytes:
    """Write a sample as a Part 10 file."""
    prefix = part10_prefix(
        sop_class_uid=sample.sop_class_uid, sop_instance_uid=sample.sop_instance_uid, transfer_syntax_uid=sample.transfer_syntax_uid
    )
    return prefix + sample.data_set


def path_of(sample: Sample) -> str:
    """Path of an instance."""
    return f"/studies/{sample.study_instance_uid}/series/{sample.series_instance_uid}/instances/{sample.sop_instance_uid}"


def canary() -> str:
    """Give a patient name that occurs nowhere else."""
    return f"Canary^{secrets.token_hex(6)}"
