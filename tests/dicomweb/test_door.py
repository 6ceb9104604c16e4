"""What holds for every resource: paths, methods, headers, origins, errors, limits of the head, shutdown."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from dicomweb.app import make_app
from dicomweb.context import WebLimits
from dicomweb.errors import TABLE, from_storage
from dicomweb.server import serve
from storage import errors
from storage.errors import StorageError, Unavailable
from tests.dicomweb.door import ANY_SYNTAX, MULTIPART, Door, canary, file_of, multipart, path_of
from tests.storage.house import build
from tests.storage.samples import photograph

Doors = Callable[..., Door]


@pytest.mark.parametrize(
    "path",
    [
        "/dicomweb/studies/%00", "/dicomweb/studies/1.2%00", "/dicomweb/studies/..", "/dicomweb/studies/%2e%2e/x", "/dicomweb/studies/%2e%2e%2fetc",  # noqa: E501
        "/dicomweb//studies", "/dicomweb/studies/", "/dicomweb/studies/%252e%252e", "/dicomweb/studies/1.2/series/%2E%2E/instances",
        "/dicomweb/studies/..%5c..%5c", "/dicomweb/../../etc/passwd", "/dicomweb/studies/1.2.3%0d%0aX-Injected:%20yes", "/dicomweb/studies/" + "1" * 65,  # noqa: E501
        "/dicomweb/studies/%F0%9F%92%A9", "/dicomweb/studies/1.2.3/series/../../..", "/", "/dicomweb", "/dicomweb/nothing", "/dicomweb/studies/1.2/x",  # noqa: E501
        "/dicomweb/studies/1.2/series/1.3/instances/1.4/rendered", "/dicomweb/studies/1%2e2/../metadata", "/etc/passwd", "/dicomweb/studies/*",  # noqa: E501
    ],
)  # fmt: skip
def test_paths(door: Door, path: str) -> None:
    """What is no resource is 400 or 404 with a problem document that says nothing back, for every method."""
    for method in ("GET", "POST", "DELETE"):
        answer = door.request(method, path, raw=True)
        assert answer.status in {400, 404, 405, 415}, (method, answer.status)
        assert "Injected" not in str(answer.headers)
        assert answer.problem["detail"]
        assert "passwd" not in answer.body.decode()


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("DELETE", "/studies", {"GET", "HEAD", "OPTIONS", "POST"}), ("PUT", "/studies/1.2", {"GET", "HEAD", "OPTIONS", "POST"}),
    ("POST", "/studies/1.2/series", {"GET", "HEAD", "OPTIONS"}), ("PATCH", "/instances", {"GET", "HEAD", "OPTIONS"}),
    ("TRACE", "/studies", {"GET", "HEAD", "OPTIONS", "POST"}),
])  # fmt: skip
def test_methods(door: Door, method: str, path: str, allowed: set[str]) -> None:
    """Another method is 405 with Allow; an override header or parameter changes nothing."""
    answer = door.request(method, path)
    assert answer.status == 405
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == allowed
    assert answer.problem["detail"]
    assert door.request("POST", "/instances?_method=GET", headers={"X-HTTP-Method-Override": "GET"}).status == 405
    assert set(door.request("OPTIONS", path).headers["allow"].split(", ")) == allowed


def test_every_answer_has_the_headers_of_safety(door: Door) -> None:
    """Good, bad and streamed answers all say nosniff and do not say what they are made with."""
    for answer in (door.get("/studies"), door.get("/nothing"), door.get(path_of(door.stored())), door.request("OPTIONS", "/studies")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["server"] == "dicom-node"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in answer.headers if name.startswith("access-control")]


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}


def test_origins(doors: Doors) -> None:
    """Only configured origins get CORS headers, named ones with credentials, never * with credentials; a foreign page may not store."""
    viewer, foreign = "https://viewer.example", "https://evil.example"
    door = doors(cors_origins=(viewer,))
    sample = photograph()
    for answer in (
        door.get("/studies", Origin=viewer),
        door.get("/nothing", Origin=viewer),
        door.request("OPTIONS", "/studies", headers={"Origin": viewer, **PREFLIGHT}),
    ):
        assert answer.headers["access-control-allow-origin"] == viewer
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "Origin" in answer.headers["vary"]
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert (
        "content-type"
        in door.request("OPTIONS", "/studies", headers={"Origin": viewer, **PREFLIGHT}).headers["access-control-allow-headers"].lower()
    )
    for answer in (
        door.get("/studies", Origin=foreign),
        door.request("OPTIONS", "/studies", headers={"Origin": foreign, **PREFLIGHT}),
        door.get("/studies"),
    ):
        assert "access-control-allow-origin" not in answer.headers
    assert door.store(file_of(sample), headers={"Origin": foreign}).problem["status"] == 403
    assert door.get(path_of(sample)).status == 404
    assert door.store(file_of(sample), headers={"Origin": viewer}).status == 200
    assert door.store(file_of(sample), headers={"Origin": f"http://127.0.0.1:{door.port}"}).status == 200
    with Door(door.house, cors_origins=("*",)) as wide:
        answer = wide.get("/studies", Origin=foreign)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
    with Door(door.house) as closed:
        assert closed.store(file_of(sample), headers={"Origin": viewer}).status == 403
    for bad in ("viewer.example", "https://viewer.example/", "null"):
        with pytest.raises(ValueError, match="origin"):
            make_app(archive=door.house.archive, index=door.house.index, audit=door.house.audit, cors_origins=(bad,))


@pytest.mark.parametrize("head", [
    b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /dicomweb/studies HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /dicomweb/studies HTTP/1.1\r\nBad Header: x\r\n\r\n", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /dicomweb/studies HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"GET /dicomweb/studies HTTP/1.1\r\nHost: h\r\n" + b"".join(b"X%d: a\r\n" % number for number in range(500)) + b"\r\n",
    b"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", b"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",  # noqa: E501
    b"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/related; type=application/dicom; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",  # noqa: E501
    b"GET /dicomweb/studies HTTP/9.9\r\n\r\n", b"\r\n\r\n\0\0\0\0",
])  # fmt: skip
def test_what_is_no_http(door: Door, head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Malformed or oversized request heads and bodies get a clean refusal of the 400 class or a closed connection, nothing echoed, no traceback."""  # noqa: E501
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.settimeout(20)
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
    if received:
        assert re.match(rb"HTTP/1\.[01] 4\d\d ", received), received[:200]
        assert b"application/problem+json" in received
        assert b"aaaa" not in received
    assert not [record for record in caplog.records if record.exc_info]
    assert door.get("/studies?limit=1").status == 200


def test_slow_heads(doors: Doors) -> None:
    """A connection whose first request does not get complete is closed at the deadline though bytes keep coming; others are served."""
    door = doors(head_s=0.6)

    def trickle() -> bytes:
        with socket.create_connection(("127.0.0.1", door.port)) as connection:
            connection.sendall(b"GET /dicomweb/studies HTTP/1.1\r\nHost: h\r\n")
            for number in range(100):
                connection.settimeout(0.1)
                try:
                    return connection.recv(100)
                except TimeoutError:
                    connection.sendall(b"X%d: y\r\n" % (number % 10))
                except ConnectionError:
                    return b""
        return b"still open"

    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(trickle) for _ in range(20)]
        assert door.get("/studies").status == 200
        assert {one.result() for one in slow} == {b""}


def test_too_many_requests(doors: Doors) -> None:
    """One request more than allowed is 503 with Retry-After."""
    door = doors(limits=WebLimits(requests=1))
    body = multipart([file_of(photograph())])
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(
            f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: {MULTIPART.format('boundary')}\r\nContent-Length: {len(body)}\r\n\r\n".encode()  # noqa: E501
        )
        for _ in range(200):
            answer = door.get("/studies")
            if answer.status == 503:
                break
            time.sleep(0.01)
        assert answer.status == 503
        assert answer.headers["retry-after"]
        connection.sendall(body)
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert door.get("/studies").status == 200


def test_every_error_of_the_archive_has_a_row() -> None:
    """Each class of the archive's error tree becomes a status by the one table; what may be tried again says when."""
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, StorageError)]
    assert set(TABLE) <= set(classes)
    for one in classes:
        web = from_storage(one("the reason"))
        assert web.status in {400, 404, 410, 500, 503}
        assert web.detail
        assert ("Retry-After" in web.headers) == one.retryable
    assert from_storage(Unavailable("x")).status == 503
    full = Unavailable("x")
    full.__cause__ = OSError(28, "No space left on device")
    assert from_storage(full).status == 507


def test_a_database_that_fails(tmp_path: Path) -> None:
    """When the database cannot be read: 503 with Retry-After and words of ours, not the engine's."""
    house = build(tmp_path)
    with Door(house) as door:
        sample = door.stored()
        house.database.close()
        for path in ("/studies", path_of(sample), path_of(sample) + "/metadata"):
            answer = door.get(path)
            assert answer.status == 503
            assert answer.headers["retry-after"]
            assert "sql" not in answer.problem["detail"].lower()
    house.archive.close()


def test_a_fault_of_ours_is_a_plain_500(doors: Doors, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that nobody foresaw: 500 without its words, and a log line that says where, without them either."""
    secret = canary()

    def broken(_: str) -> bool:
        raise LookupError(secret)

    door = doors(archive={"accept_sop_class": broken})
    with caplog.at_level(logging.DEBUG):
        answer = door.store(file_of(photograph(name=secret)))
    assert answer.status == 500
    assert secret not in answer.body.decode()
    assert "LookupError" not in answer.problem["detail"]
    ours = [record for record in caplog.records if record.message == "request.fault"]
    assert ours
    assert secret not in caplog.text + str([vars(record) for record in ours])
    assert door.house.landing_files() == []


def test_no_patient_data_in_the_log(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    """Storing, searching, reading and failing leave neither name nor UID in any log record."""
    name = canary()
    sample = photograph(name=name)
    with caplog.at_level(logging.DEBUG):
        door.store(file_of(sample), file_of(photograph(name=name))[:-5])
        door.get(f"/studies?PatientName={name}")
        door.get(path_of(sample))
        door.get(path_of(sample).replace("instances", "series") + "/x")
        door.get(f"/studies?PatientName={name}&StudyDate={name}")
    records = str([vars(record) for record in caplog.records if record.name.startswith("dicomweb")])
    assert name not in records
    assert sample.sop_instance_uid not in records


class Counted:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.instances: list[tuple[str, str, bool]] = []
        self.requests: list[tuple[str, int]] = []

    def instance(self, *, door: str, outcome: str, byte_count: int = 0) -> None:
        self.instances.append((door, outcome, byte_count > 0))

    def request(self, *, transaction: str, status: int) -> None:
        self.requests.append((transaction, status))


def test_what_happens_is_counted(doors: Doors) -> None:
    """Every instance by its outcome and every answer by its transaction and status, the refused ones too."""
    meter = Counted()
    door = doors(meter=meter)
    sample = photograph()
    door.store(file_of(sample), b"no file")
    door.store(file_of(sample))
    door.get(path_of(sample))
    door.get("/nothing")
    door.get("/studies?limit=x")
    assert meter.instances == [("dicomweb", "stored", True), ("dicomweb", "0xC000", False), ("dicomweb", "duplicate", True)]
    assert meter.requests == [("store", 202), ("store", 200), ("retrieve", 200), ("none", 404), ("search", 400)]


async def test_shutdown_lets_requests_end(tmp_path: Path) -> None:
    """Closing the door takes no new connection and lets a running upload end."""
    house = build(tmp_path)
    serving = await serve(
        make_app(archive=house.archive, index=house.index, audit=house.audit, workers=2), host="127.0.0.1", port=0, drain_s=20
    )
    port = serving.address[1]
    body = multipart([file_of(photograph())])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: {MULTIPART.format('boundary')}\r\nContent-Length: {len(body)}\r\n\r\n".encode()  # noqa: E501
    )
    writer.write(body[:300])
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/dicomweb/studies") as response:
        assert response.status == 200
    closing = asyncio.create_task(serving.close())
    await asyncio.sleep(0.1)
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)
    writer.write(body[300:])
    assert (await reader.read(15)) == b"HTTP/1.1 200 OK"
    await closing
    writer.close()
    await writer.wait_closed()
    house.close()


def test_who_saw_what_is_in_the_audit_trail(door: Door) -> None:
    """Every search and every retrieval leaves a record with the client's address, before anything is shown; a miss leaves none."""
    sample = door.stored()
    place = f"/studies/{sample.study_instance_uid}/series/{sample.series_instance_uid}"
    assert door.get(f"/studies?PatientID=x&StudyInstanceUID={sample.study_instance_uid}").status == 200
    assert door.get(f"{place}/metadata").status == 200
    assert door.get(f"{place}/instances/{sample.sop_instance_uid}", **ANY_SYNTAX).status == 200
    assert door.get(f"{place}/instances/1.2.3", **ANY_SYNTAX).status == 404
    events = [entry.event for entry in door.house.audit.entries() if entry.event.action in {"study.searched", "instance.retrieved"}]
    seen = [(event.action, event.actor, event.subject) for event in events][-3:]
    assert seen == [
        ("study.searched", "127.0.0.1", ""),
        ("instance.retrieved", "127.0.0.1", sample.series_instance_uid),
        ("instance.retrieved", "127.0.0.1", sample.sop_instance_uid),
    ]
    assert events[-3].detail["keys"]["PatientID"] == "x"
    assert events[-1].detail["resource"].endswith(sample.sop_instance_uid)
