"""One contract over every object store (the S3 one over three services), then what is special to the directory."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.errors import InstanceNotFound, IntegrityError, Unavailable
from storage.objects import DOCUMENT_BYTES, DirectoryStore, ObjectStore
from storage.records import SealedObject
from storage.s3 import S3Store
from tests.faults.lying_s3 import LyingS3

Landed = Callable[[bytes], tuple[Path, SealedObject]]
MEBIBYTE = 1 << 20


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any credentials, for services that compare none."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret-key")


@pytest.fixture(params=["directory", "rclone", "moto", "moto, versions kept", "lying without a script"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """Each implementation in turn, over each service; with ``--s3 radosgw`` that takes the place of rclone and moto."""
    options = {"prefix": "sealed/", "region": "us-east-1", "attempts": 3}
    match request.param:
        case "directory":
            yield DirectoryStore(tmp_path / "objects")
        case "rclone":
            endpoint, bucket, _ = request.getfixturevalue("s3_bucket")()
            yield S3Store(bucket=bucket, endpoint_url=endpoint, **options)
        case "lying without a script":
            request.getfixturevalue("credentials")
            with LyingS3() as s3:
                yield S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, **options)
        case moto:
            service = request.getfixturevalue("versatile")
            yield S3Store(bucket=service.new_bucket(versioned="versions" in moto), endpoint_url=service.endpoint, **options)


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
    """Opening and asking for what is not there raises InstanceNotFound; deleting it is no error."""
    for operation in (store.open, store.stat):
        with pytest.raises(InstanceNotFound):
            operation("0" * 32)
    store.delete("0" * 32)
    store.delete("0" * 32, versions=True)


def test_stat_tells_the_length(store: ObjectStore, landed: Landed) -> None:
    """Stat agrees with the listing, and both with what was put."""
    path, sealed = landed(bytes(4321))
    store.put(sealed.object_key, path, sealed)
    info = store.stat(sealed.object_key)
    assert (info.object_key, info.byte_count, info.cold) == (sealed.object_key, 4321, False)
    assert abs((datetime.now(UTC) - info.modified_at).total_seconds()) < 3600
    assert [(info.object_key, info.byte_count) for info in store.list()] == [(sealed.object_key, 4321)]


@pytest.mark.parametrize("versions", [False, True])
def test_deleted_object_is_gone(store: ObjectStore, landed: Landed, versions: bool) -> None:
    """A deleted object is neither opened nor told of nor listed; its neighbour stays."""
    path, sealed = landed(b"one")
    other, other_sealed = landed(b"two")
    store.put(sealed.object_key, path, sealed, tags={"kind": "image"})
    store.put(other_sealed.object_key, other, other_sealed)
    store.delete(sealed.object_key, versions=versions)
    for operation in (store.open, store.stat):
        with pytest.raises(InstanceNotFound):
            operation(sealed.object_key)
    assert [info.object_key for info in store.list()] == [other_sealed.object_key]
    assert whole(store, other_sealed.object_key) == b"two"


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


def test_landing_file_of_other_bytes(store: ObjectStore, landed: Landed) -> None:
    """A file that is not as long as what was sealed is not stored, and said to be the fault of the disk, not of the store."""
    path, sealed = landed(b"12345")
    path.write_bytes(b"1234")
    with pytest.raises(IntegrityError):
        store.put(sealed.object_key, path, sealed)
    assert list(store.list()) == []
    assert path.exists()


# --- documents -------------------------------------------------------------------------------------------------------


def named(number: int, kind: str = "keys") -> str:
    """Return the name of a document."""
    digits = hashlib.sha256(str(number).encode()).hexdigest()[:32]
    return f"{kind}/{digits[:2]}/{digits}"


def test_documents(store: ObjectStore) -> None:
    """A document is written, replaced, read, listed below its kind or folder in rising order, and removed."""
    names = [named(number) for number in range(12)]
    for number, name in enumerate(names):
        store.put_document(name, str(number).encode())
    store.put_document(named(1, "notes"), b"of another kind")
    store.put_document(names[3], b"replaced")
    store.put_document(names[4], b"")
    assert store.get_document(names[3]) == b"replaced"
    assert store.get_document(names[4]) == b""
    assert store.get_document(names[5]) == b"5"
    store.delete_document(names[7])
    store.delete_document(names[7])
    left = sorted(set(names) - {names[7]})
    assert list(store.list_documents("keys/")) == left
    assert list(store.list_documents(left[0][:8])) == [name for name in left if name.startswith(left[0][:8])]
    assert list(store.list_documents("absent/")) == []
    with pytest.raises(InstanceNotFound):
        store.get_document(names[7])


def test_documents_are_no_objects(store: ObjectStore, landed: Landed) -> None:
    """The listing of objects does not show documents, and the other way round, even where their folders meet."""
    path, sealed = landed(b"object")
    store.put(sealed.object_key, path, sealed)
    store.put_document(named(1), b"document")
    store.put_document(named(1, "ab"), b"in a folder of objects")
    assert [info.object_key for info in store.list()] == [sealed.object_key]
    assert list(store.list_documents("keys/")) == [named(1)]
    assert list(store.list_documents("ab/")) == [named(1, "ab")]


def test_document_of_the_largest_size(store: ObjectStore) -> None:
    """64 KiB fit, one byte more is refused before anything is sent."""
    content = secrets.token_bytes(DOCUMENT_BYTES)
    store.put_document(named(1), content)
    assert store.get_document(named(1)) == content
    with pytest.raises(ValueError, match="at most"):
        store.put_document(named(2), content + b"x")
    assert list(store.list_documents("keys/")) == [named(1)]


@pytest.mark.parametrize(
    "name", ["../" + "a" * 32, "keys/aa/" + "a" * 31, "keys/aa/" + "a" * 32 + "\n", "Keys/aa/" + "a" * 32, "a" * 32, "/aa/" + "a" * 32]
)
def test_only_names_of_ours(store: ObjectStore, name: str) -> None:
    """A name that is no document's reaches no path and no request."""
    for operation in (
        store.get_document,
        store.delete_document,
        lambda name: store.put_document(name, b""),
        lambda name: list(store.list_documents(name)),
    ):
        with pytest.raises(ValueError, match="document"):
            operation(name)


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


def test_directory_documents(tmp_path: Path) -> None:
    """Documents are 0600 in folders 0700; a symbolic link, a half-written or an oversized one is none."""
    store = DirectoryStore(tmp_path / "objects")
    store.put_document(named(1), b"document")
    file = tmp_path / "objects" / named(1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (file.parent, file.parent.parent)} == {0o700}
    (file.parent / f".{file.name}.1234").write_bytes(b"half")
    assert list(store.list_documents("keys/")) == [named(1)]
    file.write_bytes(bytes(DOCUMENT_BYTES + 1))
    with pytest.raises(IntegrityError, match="someone changed it"):
        store.get_document(named(1))
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"other")
    with pytest.raises(Unavailable):
        store.get_document(named(1))


def test_directory_removes_what_a_kill_left_of_a_document(tmp_path: Path) -> None:
    """A file of a document that never came to its end goes when it is old; documents, and young files, stay."""
    store = DirectoryStore(tmp_path / "objects")
    store.put_document(named(1), b"document")
    left = (tmp_path / "objects" / named(1)).with_name(f".{named(1)[-32:]}.0123abcd")
    left.write_bytes(b"half")
    now = datetime.now(UTC)
    assert store.clean_uploads(now - timedelta(hours=1)) == 0
    assert left.exists()
    assert store.clean_uploads(now + timedelta(hours=1)) == 1
    assert not left.exists()
    assert store.get_document(named(1)) == b"document"


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
