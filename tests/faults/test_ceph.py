"""S3Store on Ceph while Ceph breaks: its gateway is killed, its OSD stands still or is killed; run by ``make soak``."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.errors import InstanceNotFound, StorageError, Unavailable
from storage.objects import relative_path
from storage.records import SealedObject
from storage.s3 import S3Store
from tests.ceph import KEY, SECRET, Ceph, started
from tests.dicom_node.receiver import certificate

pytestmark = [pytest.mark.soak, pytest.mark.peer]

MEBIBYTE = 1 << 20
DOCUMENT = "keys/ab/" + "ab" * 16
Landed = Callable[[bytes], tuple[Path, SealedObject]]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceph's user."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def landed(tmp_path: Path) -> Landed:
    """Write a landing file and describe it."""

    def make(content: bytes) -> tuple[Path, SealedObject]:
        key = secrets.token_hex(16)
        path = tmp_path / key
        path.write_bytes(content)
        return path, SealedObject(key, len(content), hashlib.sha256(content).hexdigest(), "k1")

    return make


@pytest.fixture
def store(radosgw: Ceph, credentials: None) -> S3Store:
    """A store on a new bucket, which puts what is above six megabytes in parts."""
    return store_on(radosgw)


def store_on(ceph: Ceph, **options: object) -> S3Store:
    """Make a store on a new bucket."""
    given = {"multipart_bytes": 6 * MEBIBYTE, "part_bytes": 5 * MEBIBYTE, "region": "us-east-1", **options}
    return S3Store(bucket=str(given.pop("bucket", "")) or ceph.new_bucket(), endpoint_url=ceph.endpoint, **given)  # type: ignore[arg-type]


def whole(store: S3Store, key: str) -> bytes:
    """Read an object from its first byte to its last."""
    reader = store.open(key)
    try:
        return reader.read_at(0, reader.size)
    finally:
        reader.close()


class Load:
    """Threads that put what they make, each again until it is taken; every eighth goes up in parts."""

    def __init__(self, store: S3Store, landed: Landed) -> None:
        self._store = store
        self._landed = landed
        self._gone = threading.Event()
        self.changed = threading.Condition()
        self.taken: dict[str, str] = {}
        """Object key -> SHA-256 of what a put came back for."""
        self.refused = 0
        self.others: list[BaseException] = []

    def _run(self) -> None:
        number = 0
        while not self._gone.is_set():
            number += 1
            path, sealed = self._landed(secrets.token_bytes(7 * MEBIBYTE if number % 8 == 0 else 20_000))
            while not self._gone.is_set():
                try:
                    self._store.put(sealed.object_key, path, sealed, tags={"role": "source"})
                except StorageError:
                    with self.changed:
                        self.refused += 1
                        self.changed.notify_all()
                    continue
                except BaseException as error:
                    self.others.append(error)
                    raise
                with self.changed:
                    self.taken[sealed.object_key] = sealed.sha256
                    self.changed.notify_all()
                break
            path.unlink()

    @contextmanager
    def putting(self, threads: int = 4) -> Iterator[None]:
        """Put meanwhile."""
        crew = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in crew:
            thread.start()
        try:
            yield
        finally:
            self._gone.set()
            for thread in crew:
                thread.join()

    def await_more(self, count: int) -> None:
        """Wait until so many more were taken."""
        with self.changed:
            wanted = len(self.taken) + count
            assert self.changed.wait_for(lambda: len(self.taken) >= wanted, 240), f"{len(self.taken)} of {wanted}, {self.refused} refused"


def judge(ceph: Ceph, load: Load, store: S3Store) -> None:
    """Everything that was taken is there as it was put; nothing of an upload that broke off stays after the sweep."""
    assert load.others == []
    for key, sha256 in load.taken.items():
        assert hashlib.sha256(whole(store, key)).hexdigest() == sha256, f"{key} was altered"
    assert load.taken.keys() <= {info.object_key for info in store.list()}
    store.clean_uploads(datetime.now(UTC) + timedelta(days=1))
    assert "Uploads" not in ceph.client().list_multipart_uploads(Bucket=store._bucket), "parts of an upload stay"


def kill_gateway_under(radosgw: Ceph, load: Load, times: int) -> None:
    """SIGKILL to radosgw, so many times, under four threads of puts, which go on by themselves."""
    with load.putting():
        for _ in range(times):
            load.await_more(12)
            radosgw.kill_gateway()
            try:
                with load.changed:
                    refused = load.refused
                    load.changed.wait_for(lambda refused=refused: load.refused > refused, 5)  # type: ignore[misc]
            finally:
                radosgw.start_gateway()
        load.await_more(12)


def test_gateway_killed_under_load(radosgw: Ceph, store: S3Store, landed: Landed) -> None:
    """SIGKILL to radosgw, four times, under load: what was answered is there, the load goes on by itself (fault 9)."""
    load = Load(store, landed)
    kill_gateway_under(radosgw, load, 4)
    judge(radosgw, load, store)


class Believer(S3Store):
    """What a careless client does: a put that failed is taken for one that succeeded."""

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:
        """Put, and say yes whatever comes."""
        with suppress(Unavailable):
            super().put(object_key, path, sealed, tags=tags)


def test_control_who_believes_a_failure_loses(radosgw: Ceph, credentials: None, landed: Landed) -> None:
    """Negative control: the same kill under a client that answers before it knows is found out."""
    store = Believer(bucket=radosgw.new_bucket(), endpoint_url=radosgw.endpoint, region="us-east-1", attempts=1)
    load = Load(store, landed)
    with load.putting():
        load.await_more(12)
        radosgw.kill_gateway()
        try:
            load.await_more(12)  # it says yes to what nobody took
        finally:
            radosgw.start_gateway()
    with pytest.raises(InstanceNotFound):
        judge(radosgw, load, store)


@pytest.mark.parametrize(("harm", "words"), [("lost", None), ("altered", "was altered"), ("left", "parts of an upload stay")])
def test_control_what_the_store_loses_is_seen(
    radosgw: Ceph, store: S3Store, landed: Landed, monkeypatch: pytest.MonkeyPatch, harm: str, words: str | None
) -> None:
    """Negative control: one object lost or altered behind the client's back, or one upload left, and the judge says so."""
    load = Load(store, landed)
    with load.putting():
        load.await_more(8)
    judge(radosgw, load, store)
    client, name = radosgw.client(), relative_path(next(iter(load.taken)))
    if harm == "lost":
        client.delete_object(Bucket=store._bucket, Key=name)
    elif harm == "altered":
        size = client.head_object(Bucket=store._bucket, Key=name)["ContentLength"]
        client.put_object(Bucket=store._bucket, Key=name, Body=bytes(size))
    else:
        client.create_multipart_upload(Bucket=store._bucket, Key=name)
        monkeypatch.setattr(store, "clean_uploads", lambda _older_than: 0)
    with pytest.raises(InstanceNotFound if harm == "lost" else AssertionError, match=words):
        judge(radosgw, load, store)


def test_osd_stands_still_under_load(radosgw: Ceph, credentials: None, landed: Landed) -> None:
    """SIGSTOP to the OSD: radosgw takes requests and hangs; each put ends at its deadline, and all goes on after SIGCONT (fault 13)."""
    store = store_on(radosgw, read_timeout_s=3.0, deadline_s=8.0, attempts=3)
    load = Load(store, landed)
    with load.putting():
        load.await_more(12)
        radosgw.freeze_osd()
        try:
            with load.changed:
                refused = load.refused
                assert load.changed.wait_for(lambda: load.refused >= refused + 4, 120), "puts hang with their store"
        finally:
            radosgw.thaw_osd()
        load.await_more(12)
    judge(radosgw, load, store)


def test_control_without_a_deadline_puts_hang(radosgw: Ceph, credentials: None, landed: Landed) -> None:
    """Negative control: a client that waits as long as it takes says nothing while the OSD stands still."""
    load = Load(store_on(radosgw, read_timeout_s=3600.0, deadline_s=3600.0), landed)
    with load.putting():
        load.await_more(12)
        radosgw.freeze_osd()
        try:
            with load.changed:
                assert not load.changed.wait_for(lambda: load.refused, 15)
        finally:
            radosgw.thaw_osd()
        load.await_more(12)


def test_osd_killed_under_load(radosgw: Ceph, credentials: None, landed: Landed) -> None:
    """SIGKILL to the OSD, which comes back on its disk: what was answered before is there (fault 9)."""
    store = store_on(radosgw, read_timeout_s=5.0, deadline_s=20.0)
    load = Load(store, landed)
    with load.putting():
        load.await_more(12)
        radosgw.kill_osd()
        radosgw.start_osd()
        load.await_more(12)
    judge(radosgw, load, store)


@pytest.mark.parametrize("size", [3000, 7 * MEBIBYTE])
def test_locked_bucket(radosgw: Ceph, credentials: None, landed: Landed, size: int) -> None:
    """With object lock a put works, a plain deletion hides, and an erasure before its time says what is in the way."""
    bucket = radosgw.new_bucket(locked=True)
    rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
    radosgw.client().put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=rule)
    store = store_on(radosgw, bucket=bucket, attempts=2)
    path, sealed = landed(secrets.token_bytes(size))
    store.put(sealed.object_key, path, sealed)
    store.put_document(DOCUMENT, b"document")
    assert whole(store, sealed.object_key) == path.read_bytes()
    retention = radosgw.client().get_object_retention(Bucket=bucket, Key=relative_path(sealed.object_key))["Retention"]
    assert retention["Mode"] == "GOVERNANCE"
    store.delete(sealed.object_key)
    assert list(store.list()) == []
    for erase in (lambda: store.delete(sealed.object_key, versions=True), lambda: store.delete_document(DOCUMENT)):
        with pytest.raises(Unavailable, match=r"object lock|access denied"):
            erase()


def test_control_without_a_lock_it_is_erased(radosgw: Ceph, credentials: None, landed: Landed) -> None:
    """Negative control: in a bucket that keeps versions and locks none, the same erasures are done."""
    store = store_on(radosgw, bucket=radosgw.new_bucket(versioned=True), attempts=2)
    path, sealed = landed(secrets.token_bytes(3000))
    store.put(sealed.object_key, path, sealed)
    store.put_document(DOCUMENT, b"document")
    store.delete(sealed.object_key)
    store.delete(sealed.object_key, versions=True)
    store.delete_document(DOCUMENT)
    left = radosgw.client().list_object_versions(Bucket=store._bucket)
    assert "Versions" not in left
    assert "DeleteMarkers" not in left


def test_over_tls(tmp_path_factory: pytest.TempPathFactory, credentials: None, landed: Landed) -> None:
    """The same service with a certificate: parts go up without their digest in the signature, and come back whole."""
    shown = certificate(tmp_path_factory.mktemp("tls"))
    with started(certificate=shown) as ceph:
        client_store = S3Store(
            bucket=ceph.new_bucket(),
            endpoint_url=ceph.endpoint,
            region="us-east-1",
            ca_file=shown,
            multipart_bytes=6 * MEBIBYTE,
            part_bytes=5 * MEBIBYTE,
        )
        for size in (3000, 12 * MEBIBYTE + 3):
            path, sealed = landed(secrets.token_bytes(size))
            client_store.put(sealed.object_key, path, sealed, tags={"role": "source"})
            assert whole(client_store, sealed.object_key) == path.read_bytes()
        other = certificate(tmp_path_factory.mktemp("other"))
        for stranger in (
            S3Store(bucket=ceph.new_bucket(), endpoint_url=ceph.endpoint, region="us-east-1", ca_file=other, attempts=1),
            S3Store(bucket=ceph.new_bucket(), endpoint_url=ceph.endpoint, region="us-east-1", attempts=1),
        ):
            with pytest.raises(Unavailable, match=r"certificate"):  # negative control: who trusts others does not speak to it
                stranger.put(sealed.object_key, path, sealed)
