"""One contract over both object stores, then what is special to each."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storage.errors import InstanceNotFound, IntegrityError, Unavailable
from storage.objects import DirectoryStore, ObjectStore
from storage.records import SealedObject
from storage.s3 import S3Store

Landed = Callable[[bytes], tuple[Path, SealedObject]]
MEBIBYTE = 1 << 20


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Each implementation in turn."""
    if request.param == "directory":
        return DirectoryStore(tmp_path / "objects")
    endpoint, bucket, _ = request.getfixturevalue("s3_bucket")()
    return S3Store(bucket=bucket, prefix="sealed/", endpoint_url=endpoint, region="us-east-1", attempts=2)


@pytest.fixture
def landed(tmp_path: Path) -> Landed:
    """Write a landing file and describe it."""

    def make(content: bytes) -> tuple[Path, SealedObject]:
        key = secrets.token_hex(16)
        path = tmp_path / f"landing-{key}"
        path.write_bytes(content)
        return path, SealedObject(key, len(content), hashlib.sha256(content).hexdigest(), "k1")

    return make


def whole(store: ObjectStore, key: str) -> bytes:
    """Read an object from its first byte to its last."""
    reader = store.open(key)
    try:
        return reader.read_at(0, reader.size)
    finally:
        reader.close()


@pytest.mark.parametrize("size", [0, 1, 5000, 3 * MEBIBYTE + 7])
def test_what_was_put_is_read_back(store: ObjectStore, landed: Landed, size: int) -> None:
    """An object comes back byte for byte; the file that was put stays for its owner to remove."""
    content = secrets.token_bytes(size)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    assert path.read_bytes() == content
    assert whole(store, sealed.object_key) == content


def test_ranges(store: ObjectStore, landed: Landed) -> None:
    """A range gives exactly its bytes, fewer only at the end, none behind it."""
    content = secrets.token_bytes(2 * MEBIBYTE + 100)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    reader = store.open(sealed.object_key)
    assert reader.size == len(content)
    for offset, length in (
        (0, 1),
        (0, 1100),
        (5, MEBIBYTE),
        (MEBIBYTE - 1, MEBIBYTE),
        (2 * MEBIBYTE, 100),
        (2 * MEBIBYTE, 500),
        (len(content), 10),
        (7, 0),
    ):
        assert reader.read_at(offset, length) == content[offset : offset + length]
    reader.close()
    reader.close()


def test_absent_object(store: ObjectStore) -> None:
    """Opening what is not there raises InstanceNotFound; deleting it is no error."""
    with pytest.raises(InstanceNotFound):
        store.open("0" * 32)
    store.delete("0" * 32)


def test_listing_is_complete_and_sorted(store: ObjectStore, landed: Landed) -> None:
    """Every object is listed once with its size, by rising key; a deleted one is gone."""
    expected = {}
    for number in range(12):
        path, sealed = landed(bytes(number))
        store.put(sealed.object_key, path, sealed)
        expected[sealed.object_key] = number
    removed = sorted(expected)[3]
    store.delete(removed)
    del expected[removed]
    listed = list(store.list())
    assert [info.object_key for info in listed] == sorted(expected)
    assert {info.object_key: info.byte_count for info in listed} == expected
    assert all(info.modified_at.tzinfo is not None for info in listed)


def test_same_object_twice_is_idempotent(store: ObjectStore, landed: Landed) -> None:
    """A step may run twice: the same bytes under the same key are accepted again."""
    content = b"same"
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    store.put(sealed.object_key, path, sealed)
    assert whole(store, sealed.object_key) == content


@pytest.mark.parametrize("key", ["../../etc/passwd", "A" * 32, "a" * 31, "a" * 33, "", "a" * 32 + "\n"])
def test_only_opaque_keys(store: ObjectStore, key: str) -> None:
    """A key that is not 32 hexadecimal digits reaches no path and no request."""
    with pytest.raises(ValueError, match="hexadecimal"):
        store.open(key)


def test_check_passes(store: ObjectStore) -> None:
    """A store that works is ready."""
    store.check()


# --- directory -------------------------------------------------------------------------------------------------------


def test_directory_modes(tmp_path: Path, landed: Landed) -> None:
    """Folders are 0700 and there are 256 of them."""
    DirectoryStore(tmp_path / "objects")
    folders = list((tmp_path / "objects").iterdir())
    assert len(folders) == 256
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in [tmp_path / "objects", *folders]} == {0o700}


def test_directory_never_overwrites(tmp_path: Path, landed: Landed) -> None:
    """Other bytes under a key that is taken raise IntegrityError and leave the first object alone."""
    store = DirectoryStore(tmp_path / "objects")
    path, sealed = landed(b"first")
    store.put(sealed.object_key, path, sealed)
    other, other_sealed = landed(b"other")
    with pytest.raises(IntegrityError):
        store.put(sealed.object_key, other, SealedObject(sealed.object_key, 5, other_sealed.sha256, "k1"))
    assert whole(store, sealed.object_key) == b"first"


def test_directory_refuses_symbolic_links(tmp_path: Path, landed: Landed) -> None:
    """Neither an object nor a landing file may be a symbolic link (threats.md row 91)."""
    store = DirectoryStore(tmp_path / "objects")
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345")
    (tmp_path / "objects" / "aa" / ("a" * 32)).symlink_to(secret)
    with pytest.raises(IntegrityError, match="symbolic link"):
        store.open("a" * 32)
    link = tmp_path / "landing"
    link.symlink_to(secret)
    with pytest.raises(IntegrityError):
        store.put("b" * 32, link, SealedObject("b" * 32, 5, hashlib.sha256(b"12345").hexdigest(), "k1"))
    assert not list(store.list())[1:]


def test_directory_wrong_length(tmp_path: Path, landed: Landed) -> None:
    """A landing file that is shorter than what was sealed is not stored."""
    store = DirectoryStore(tmp_path / "objects")
    path, sealed = landed(b"12345")
    path.write_bytes(b"1234")
    with pytest.raises(IntegrityError):
        store.put(sealed.object_key, path, sealed)
    assert list(store.list()) == []
    assert path.exists()


def test_directory_other_file_system(tmp_path: Path, landed: Landed) -> None:
    """Landing on another file system is refused with the remedy, not copied."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system here")
    store = DirectoryStore(tmp_path / "objects")
    path, sealed = landed(b"12345")
    elsewhere = memory / f"objects-test-{os.getpid()}"
    try:
        elsewhere.write_bytes(path.read_bytes())
        with pytest.raises(Unavailable, match="put both on one") as caught:
            store.put(sealed.object_key, elsewhere, sealed)
    finally:
        elsewhere.unlink()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EXDEV


def test_directory_gone(tmp_path: Path) -> None:
    """A vanished object directory makes the store not ready."""
    store = DirectoryStore(tmp_path / "objects")
    (tmp_path / "objects").rename(tmp_path / "moved")
    with pytest.raises(Unavailable, match="gone"):
        store.check()


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_s3_multipart(s3_bucket: Callable[[], tuple[str, str, Path]], landed: Landed) -> None:
    """Above the limit an object goes up in parts and comes back whole."""
    endpoint, bucket, folder = s3_bucket()
    store = S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", multipart_bytes=6 * MEBIBYTE, part_bytes=5 * MEBIBYTE)
    content = secrets.token_bytes(12 * MEBIBYTE + 3)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    assert whole(store, sealed.object_key) == content
    assert [file.stat().st_size for file in folder.rglob("*") if file.is_file()] == [len(content)]


def test_s3_bucket_missing(s3_bucket: Callable[[], tuple[str, str, Path]], landed: Landed) -> None:
    """A missing bucket is Unavailable with the remedy, for every operation."""
    endpoint, _, _ = s3_bucket()
    store = S3Store(bucket="no-such-bucket", endpoint_url=endpoint, region="us-east-1", attempts=1)
    path, sealed = landed(b"x")
    for operation in (
        store.check,
        lambda: store.put(sealed.object_key, path, sealed),
        lambda: store.open("0" * 32),
        lambda: list(store.list()),
    ):
        with pytest.raises(Unavailable, match="bucket"):
            operation()
    assert path.exists()


def test_s3_wrong_credentials(s3_bucket: Callable[[], tuple[str, str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused credentials are Unavailable and say so."""
    endpoint, bucket, _ = s3_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    with pytest.raises(Unavailable, match="credentials"):
        S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", attempts=1).check()


def test_s3_no_credentials() -> None:
    """Absent credentials are Unavailable and say where to give them."""
    with pytest.raises(Unavailable, match="no credentials"):
        S3Store(bucket="b", endpoint_url="http://127.0.0.1:9", region="us-east-1", attempts=1).check()


class FakeS3(ThreadingHTTPServer):
    """An S3 service that follows a script instead of the truth."""

    def __init__(self, script: str) -> None:
        super().__init__(("127.0.0.1", 0), FakeS3Handler)
        self.script = script
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.released = threading.Event()


class FakeS3Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode())

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        if self.headers.get("Expect") == "100-continue" and self.request_version != "HTTP/1.1":
            return
        content = self.body()
        server = self.server
        server.requests.append("PUT")
        count = server.requests.count("PUT")
        match server.script:
            case "nothing":
                pass
            case "half":
                server.objects[self.path] = content[: len(content) // 2]
            case "other":
                server.objects[self.path] = bytes(byte ^ 1 for byte in content)
            case "hang":
                server.released.wait(20)
                self.close_connection = True
                return
            case "slow down twice" if count <= 2:
                self.error(503, "SlowDown")
                return
            case "denied":
                self.error(403, "AccessDenied")
                return
            case "lost answer" if count == 1:
                server.objects[self.path] = content
                self.close_connection = True
                return
            case "lost answer" | "taken":
                self.error(412, "PreconditionFailed")
                return
            case _:
                server.objects[self.path] = content
        self.answer(200, ETag='"0"')

    def do_GET(self) -> None:
        server = self.server
        server.requests.append("GET")
        count = server.requests.count("GET")
        if server.script == "late" and count <= 2:
            self.error(404, "NoSuchKey")
            return
        content = server.objects.get(self.path)
        if content is None:
            self.error(404, "NoSuchKey")
            return
        status, headers = 200, {}
        if asked := self.headers.get("Range"):
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            headers["Content_Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if server.script == "cut" and count % 2 == 1:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.answer(status, content, **headers)

    def do_POST(self) -> None:
        self.body()
        self.server.requests.append("POST")
        if "uploads" in self.path:
            self.answer(200, b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        else:
            self.error(500, "InternalError")

    def do_DELETE(self) -> None:
        self.server.requests.append("ABORT" if "uploadId" in self.path else "DELETE")
        self.server.objects.pop(self.path, None)
        self.answer(204)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], tuple[FakeS3, S3Store]]]:
    """Start a scripted service and a store that talks to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret-key")

    @contextmanager
    def serve(script: str) -> Iterator[tuple[FakeS3, S3Store]]:
        server = FakeS3(script)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield (
                server,
                S3Store(
                    bucket="bucket",
                    endpoint_url=f"http://127.0.0.1:{server.server_port}",
                    region="us-east-1",
                    read_timeout_s=1,
                    attempts=3,
                    multipart_bytes=6 * MEBIBYTE,
                    part_bytes=5 * MEBIBYTE,
                    sleep=lambda _: None,
                ),
            )
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
            server.server_close()

    opened: list[object] = []

    def start(script: str) -> tuple[FakeS3, S3Store]:
        context = serve(script)
        opened.append(context)
        return context.__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", ["nothing", "half", "other"])
def test_s3_lies_are_found_before_put_returns(fake: Callable[[str], tuple[FakeS3, S3Store]], landed: Landed, script: str) -> None:
    """A 200 that stored nothing, half or other bytes is not believed, and the landing file stays (threats.md fault 11)."""
    server, store = fake(script)
    path, sealed = landed(secrets.token_bytes(3000))
    with pytest.raises(Unavailable, match="does not give the same bytes back"):
        store.put(sealed.object_key, path, sealed)
    assert path.exists()
    assert server.objects == {}


@pytest.mark.parametrize("script", ["slow down twice", "late", "cut", "lost answer"])
def test_s3_passing_faults_are_ridden_out(fake: Callable[[str], tuple[FakeS3, S3Store]], landed: Landed, script: str) -> None:
    """503s, a late listing, a cut answer and a lost answer end in success with the object whole (faults 10, 12, 14)."""
    server, store = fake(script)
    content = secrets.token_bytes(3000)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    assert list(server.objects.values()) == [content]
    assert whole(store, sealed.object_key) == content


def test_s3_taken_key_of_other_bytes(fake: Callable[[str], tuple[FakeS3, S3Store]], landed: Landed) -> None:
    """412 over other bytes is IntegrityError: nothing is overwritten."""
    server, store = fake("taken")
    path, sealed = landed(b"mine")
    server.objects[f"/bucket/{sealed.object_key[:2]}/{sealed.object_key}"] = b"theirs"
    with pytest.raises(IntegrityError):
        store.put(sealed.object_key, path, sealed)
    assert path.exists()


@pytest.mark.parametrize(("script", "words"), [("hang", "Timeout"), ("denied", "access denied")])
def test_s3_lasting_faults_are_unavailable(fake: Callable[[str], tuple[FakeS3, S3Store]], landed: Landed, script: str, words: str) -> None:
    """A black hole and a refusal end in Unavailable within bounds (faults 13, 15)."""
    _, store = fake(script)
    path, sealed = landed(b"x" * 100)
    with pytest.raises(Unavailable, match=words):
        store.put(sealed.object_key, path, sealed)
    assert path.exists()


def test_s3_failed_multipart_is_aborted(fake: Callable[[str], tuple[FakeS3, S3Store]], landed: Landed) -> None:
    """An upload in parts that cannot be completed leaves no orphan upload (fault 17)."""
    server, store = fake("fine")
    path, sealed = landed(secrets.token_bytes(7 * MEBIBYTE))
    with pytest.raises(Unavailable):
        store.put(sealed.object_key, path, sealed)
    assert "ABORT" in server.requests
    assert path.exists()


def test_s3_endpoint_down(fake: Callable[[str], tuple[FakeS3, S3Store]]) -> None:
    """Nobody at the endpoint: Unavailable, with what to check."""
    _, store = fake("fine")
    down = S3Store(bucket="bucket", endpoint_url="http://127.0.0.1:9", region="us-east-1", attempts=2, connect_timeout_s=1)
    with pytest.raises(Unavailable, match="check the endpoint"):
        down.check()
    store.delete("0" * 32)
