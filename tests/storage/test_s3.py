"""S3Store against real services: what goes with an object, cold classes, versions, certificates, and what it costs."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from storage.errors import ColdObject, InstanceNotFound, IntegrityError, Unavailable
from storage.objects import relative_path
from storage.records import SealedObject
from storage.s3 import S3Store
from tests.ceph import Ceph
from tests.faults.lying_s3 import SLOW_DOWN, TAGS_DROPPED, LyingS3, error
from tests.ports import free_port
from tests.storage.moto_service import MotoService, client_of

MEBIBYTE = 1 << 20
NAME = "keys/ab/" + "ab" * 16
Landed = Callable[[bytes], tuple[Path, SealedObject]]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret-key")


@pytest.fixture
def moto(versatile: MotoService | Ceph) -> Callable[..., tuple[S3Store, str, Any]]:
    """Make a store on a new bucket of moto, or of radosgw: (store, bucket, boto3's own client)."""

    def make(*, versioned: bool = False, **options: Any) -> tuple[S3Store, str, Any]:
        bucket = versatile.new_bucket(versioned=versioned)
        given = {"endpoint_url": versatile.endpoint, "region": "us-east-1", "attempts": 2, "sleep": lambda _: None}
        return S3Store(bucket=bucket, **{**given, **options}), bucket, versatile.client()

    return make


@pytest.fixture
def landed(tmp_path: Path) -> Landed:
    """Write a landing file and describe it."""

    def make(content: bytes) -> tuple[Path, SealedObject]:
        key = secrets.token_hex(16)
        path = tmp_path / f"landing-{key}"
        path.write_bytes(content)
        return path, SealedObject(key, len(content), hashlib.sha256(content).hexdigest(), "k1")

    return make


def whole(store: S3Store, key: str) -> bytes:
    """Read an object from its first byte to its last."""
    reader = store.open(key)
    try:
        return reader.read_at(0, reader.size)
    finally:
        reader.close()


# --- what goes with an object ----------------------------------------------------------------------------------------


@pytest.fixture
def aws(request: pytest.FixtureRequest) -> None:
    """What radosgw has not, or not as AWS has it: skipped there."""
    if request.config.getoption("s3") == "radosgw":
        pytest.skip("radosgw has no cold classes, and no SSE-S3 before Ceph 17")


@pytest.mark.parametrize("size", [3000, 7 * MEBIBYTE])
def test_encryption_class_and_tags_go_with_the_object(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed, size: int) -> None:
    """SSE-KMS with its key, the storage class and the tags of configuration and call are on the object, whole or in parts."""
    store, bucket, client = moto(
        server_side_encryption="aws:kms",
        kms_key_id="arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012",
        storage_class="INTELLIGENT_TIERING",
        tags={"node": "a b", "kind": "none"},
        multipart_bytes=6 * MEBIBYTE,
        part_bytes=5 * MEBIBYTE,
    )
    path, sealed = landed(secrets.token_bytes(size))
    store.put(sealed.object_key, path, sealed, tags={"kind": "image/more=1+1"})
    head = client.head_object(Bucket=bucket, Key=relative_path(sealed.object_key))
    assert head["ServerSideEncryption"] == "aws:kms"
    assert head["SSEKMSKeyId"].endswith("12345678-1234-1234-1234-123456789012")
    assert head["StorageClass"] == "INTELLIGENT_TIERING"
    tags = client.get_object_tagging(Bucket=bucket, Key=relative_path(sealed.object_key))["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"node": "a b", "kind": "image/more=1+1"}
    assert not store.stat(sealed.object_key).cold
    assert whole(store, sealed.object_key) == path.read_bytes()


@pytest.mark.usefixtures("aws")
def test_documents_stay_warm(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """A document is encrypted as objects are, but neither in their class nor with their tags: a lifecycle rule must not freeze keys."""
    store, bucket, client = moto(server_side_encryption="AES256", storage_class="GLACIER", tags={"kind": "image"})
    store.put_document(NAME, b"document")
    head = client.head_object(Bucket=bucket, Key=NAME)
    assert (head["ServerSideEncryption"], head.get("StorageClass", "STANDARD")) == ("AES256", "STANDARD")
    assert client.get_object_tagging(Bucket=bucket, Key=NAME)["TagSet"] == []
    assert store.get_document(NAME) == b"document"


def test_tags_that_an_upload_in_parts_lost_are_put_again(counted: tuple[LyingS3, S3Store], landed: Landed) -> None:
    """A service that drops them and says so (radosgw) is told them again; where nothing is lost, and where none are, nothing is said."""
    s3, _ = counted
    store = S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, region="us-east-1", multipart_bytes=6 * MEBIBYTE, part_bytes=5 * MEBIBYTE)
    path, sealed = landed(bytes(7 * MEBIBYTE))
    name = relative_path(sealed.object_key)
    store.put(sealed.object_key, path, sealed, tags={"kind": "a b", "k": "1"})
    assert (s3.tagging(name), s3.count("tag")) == ("kind=a%20b&k=1", 0)
    s3.remove(name)
    s3.fail(TAGS_DROPPED)
    store.put(sealed.object_key, path, sealed, tags={"kind": "a b", "k": "1"})
    assert (s3.tagging(name), s3.count("tag")) == ("kind=a%20b&k=1", 1)
    s3.remove(name)
    store.put(sealed.object_key, path, sealed)
    assert s3.count("tag") == 1


@pytest.mark.parametrize("size", [3000, 7 * MEBIBYTE])
def test_encryption_that_is_not_there_is_told_once(
    counted: tuple[LyingS3, S3Store], landed: Landed, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """A service that takes the wish for encryption and does nothing (radosgw 16: SSE-S3) is named in the log, once; another is not."""
    s3, _ = counted
    options: dict[str, Any] = {"multipart_bytes": 6 * MEBIBYTE, "part_bytes": 5 * MEBIBYTE, "region": "us-east-1", "attempts": 2}
    store = S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, server_side_encryption="AES256", **options)
    for _ in range(2):
        path, sealed = landed(bytes(size))
        store.put(sealed.object_key, path, sealed)
        store.put_document(NAME, b"document")
    assert [record.message for record in caplog.records] == ["store.encryption.ignored"]


def test_encryption_that_is_there_is_not_told(
    moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever encrypts says so in the answer: of an object, of one in parts, of a document."""
    master = "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012"
    parts = {"multipart_bytes": 6 * MEBIBYTE, "part_bytes": 5 * MEBIBYTE}
    store, _, _ = moto(server_side_encryption="aws:kms", kms_key_id=master, **parts)
    for size in (3000, 7 * MEBIBYTE):
        path, sealed = landed(bytes(size))
        store.put(sealed.object_key, path, sealed)
    store.put_document(NAME, b"document")
    assert "store.encryption.ignored" not in caplog.text


@pytest.mark.parametrize("code", ["InvalidArgument", "InvalidStorageClass"])
def test_what_the_service_does_not_know_is_named(counted: tuple[LyingS3, S3Store], landed: Landed, code: str) -> None:
    """A storage class, tag or encryption that a service has not is no matter of time: the settings are named."""
    s3, store = counted
    s3.fail(error(400, code))
    path, sealed = landed(b"x")
    with pytest.raises(Unavailable, match=r"does not take such a request \(400 .*\); check \[archive\] storage_class"):
        store.put(sealed.object_key, path, sealed)
    assert s3.count("put") == 1


def test_more_than_ten_tags_are_refused(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """The service would refuse them at every put: said at once."""
    store, _, _ = moto(tags={str(number): "" for number in range(10)})
    path, sealed = landed(b"x")
    with pytest.raises(ValueError, match="at most ten tags"):
        store.put(sealed.object_key, path, sealed, tags={"eleventh": ""})
    with pytest.raises(ValueError, match="at most ten tags"):
        moto(tags={str(number): "" for number in range(11)})


@pytest.mark.parametrize("tags", [{"": "x"}, {"kind": "a&b"}, {"k" * 129: ""}, {"kind": "v" * 257}, {"kind": "a\nb"}])
def test_tags_that_s3_does_not_take(moto: Callable[..., tuple[S3Store, str, Any]], tags: dict[str, str]) -> None:
    """Said when the store is made, not at the first put."""
    with pytest.raises(ValueError, match="S3 does not take"):
        moto(tags=tags)


def test_a_trial_tells_versions_and_leaves_nothing(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """What was put for the trial is gone, each version of it; whether the bucket keeps versions is told."""
    store, bucket, client = moto()
    assert store.trial() is False
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert store.trial() is True
    assert not {"Versions", "DeleteMarkers"} & client.list_object_versions(Bucket=bucket).keys()


def test_unknown_tier_is_refused(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """A tier of restoring that does not exist is named when the store is made."""
    with pytest.raises(ValueError, match="Expedited, Standard, Bulk"):
        moto(restore_tier="Sometime")


@pytest.mark.parametrize(("style", "expected"), [("auto", "/bucket/"), ("path", "/bucket/"), ("virtual", "/")])
def test_addressing_style(credentials: None, style: Any, expected: str) -> None:
    """The bucket stands in the path of an endpoint of one's own, unless virtual hosts are asked for."""
    store = S3Store(bucket="bucket", endpoint_url="http://localhost:9", region="us-east-1", addressing_style=style)
    url = store._client._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
    assert url.split("?")[0] == ("http://bucket.localhost:9/k" if style == "virtual" else f"http://localhost:9{expected}k")


# --- cold classes ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aws")
def test_cold_object_is_confirmed_and_restored(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """An object put into GLACIER is confirmed without reading; opening starts the restore; the restored copy is read."""
    store, bucket, client = moto(storage_class="GLACIER", restore_tier="Bulk", restore_days=3)
    path, sealed = landed(secrets.token_bytes(3000))
    store.put(sealed.object_key, path, sealed)
    store.put(sealed.object_key, path, sealed)  # again: 412, and still the same
    assert store.stat(sealed.object_key).cold
    assert [info.cold for info in store.list()] == [True]
    with pytest.raises(ColdObject, match="GLACIER") as caught:
        store.open(sealed.object_key)
    assert caught.value.retry_after_s == 12 * 3600
    assert "ongoing-request" in client.head_object(Bucket=bucket, Key=relative_path(sealed.object_key))["Restore"]
    assert whole(store, sealed.object_key) == path.read_bytes()  # moto restores at once
    assert not store.stat(sealed.object_key).cold


@pytest.mark.usefixtures("aws")
def test_deep_archive_takes_longer(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """From DEEP_ARCHIVE nothing is expedited: the standard tier is asked for, twelve hours are told."""
    store, _, _ = moto(storage_class="DEEP_ARCHIVE", restore_tier="Expedited")
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    with pytest.raises(ColdObject) as caught:
        store.open(sealed.object_key)
    assert caught.value.retry_after_s == 12 * 3600


@pytest.mark.usefixtures("aws")
def test_other_bytes_in_a_cold_class_are_found(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """A taken key in a cold class is compared by the service's digest: other bytes of the same length are IntegrityError."""
    store, _, _ = moto(storage_class="GLACIER")
    path, sealed = landed(b"theirs")
    store.put(sealed.object_key, path, sealed)
    path.write_bytes(b"mine, ")
    with pytest.raises(IntegrityError, match="other bytes"):
        store.put(sealed.object_key, path, SealedObject(sealed.object_key, 6, hashlib.sha256(b"mine, ").hexdigest(), "k1"))


# --- versions --------------------------------------------------------------------------------------------------------


def test_erasure_removes_every_version(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """A plain deletion keeps what a versioned bucket keeps; an erasure leaves no version and no mark, of this object alone."""
    store, bucket, client = moto(versioned=True, prefix="sealed/")
    path, sealed = landed(b"content")
    other, other_sealed = landed(b"other")
    store.put(other_sealed.object_key, other, other_sealed)
    for _ in range(2):
        store.put(sealed.object_key, path, sealed)
        store.delete(sealed.object_key)

    def versions() -> list[str]:
        found = client.list_object_versions(Bucket=bucket)
        return [entry["Key"] for entry in [*found.get("Versions", ()), *found.get("DeleteMarkers", ())]]

    name = "sealed/" + relative_path(sealed.object_key)
    client.put_object(Bucket=bucket, Key=name + ".copy", Body=b"somebody else's")
    assert versions().count(name) == 4
    store.delete(sealed.object_key, versions=True)
    assert sorted(versions()) == sorted(["sealed/" + relative_path(other_sealed.object_key), name + ".copy"])


def test_document_is_erased_with_every_version(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """A replaced document leaves versions; deleting it removes them all (shredding)."""
    store, bucket, client = moto(versioned=True)
    for content in (b"one", b"two", b"three"):
        store.put_document(NAME, content)
    store.delete_document(NAME)
    found = client.list_object_versions(Bucket=bucket)
    assert "Versions" not in found
    assert "DeleteMarkers" not in found


# --- uploads in parts ------------------------------------------------------------------------------------------------


def test_multipart(s3_bucket: Callable[[], tuple[str, str, Path]], landed: Landed) -> None:
    """Above the limit an object goes up in parts and comes back whole; nothing else lies in the bucket."""
    endpoint, bucket, _ = s3_bucket()
    store = S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", multipart_bytes=6 * MEBIBYTE, part_bytes=5 * MEBIBYTE)
    content = secrets.token_bytes(12 * MEBIBYTE + 3)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    assert whole(store, sealed.object_key) == content
    assert [entry["Size"] for entry in client_of(endpoint).list_objects_v2(Bucket=bucket)["Contents"]] == [len(content)]


def test_uploads_are_cleaned_in_moto(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """An upload that someone began and left is aborted when it is old enough, page by page; one of another name stays."""
    store, bucket, client = moto(prefix="sealed/")
    for number in range(3):
        client.create_multipart_upload(Bucket=bucket, Key="sealed/" + relative_path(f"{number:032x}"))
    client.create_multipart_upload(Bucket=bucket, Key="sealed/somebody else's")
    assert store.clean_uploads(dt.datetime(2001, 1, 1, tzinfo=dt.UTC)) == 0
    assert store.clean_uploads(dt.datetime.now(dt.UTC) + dt.timedelta(days=1)) == 3
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["sealed/somebody else's"]


# --- what the disk does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3000, 7 * MEBIBYTE])
def test_landing_file_that_rotted(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed, size: int) -> None:
    """One flipped bit in the landing file: IntegrityError before anything is stored, and no upload is left (threats.md fault 23)."""
    store, bucket, client = moto(multipart_bytes=6 * MEBIBYTE, part_bytes=5 * MEBIBYTE)
    path, sealed = landed(bytes(size))
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x01")
    with pytest.raises(IntegrityError, match="other bytes than were sealed"):
        store.put(sealed.object_key, path, sealed)
    assert list(store.list()) == []
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_landing_file_that_is_gone(moto: Callable[..., tuple[S3Store, str, Any]], landed: Landed) -> None:
    """A landing file that is not there is the disk's trouble and said so."""
    store, _, _ = moto()
    path, sealed = landed(b"x")
    path.unlink()
    with pytest.raises(Unavailable, match="directory or file is gone") as caught:
        store.put(sealed.object_key, path, sealed)
    assert isinstance(caught.value.__cause__, OSError)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(credentials: None) -> Iterator[tuple[LyingS3, S3Store]]:
    """Return a service that counts requests, and a store on it."""
    with LyingS3() as s3:
        yield s3, S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, region="us-east-1")


def test_requests_of_an_instance_of_usual_size(counted: tuple[LyingS3, S3Store], landed: Landed) -> None:
    """Half a megabyte: one put and one get to store it, one get to read it from trailer to body, one head to know it is there."""
    s3, store = counted
    path, sealed = landed(secrets.token_bytes(500_000))
    store.put(sealed.object_key, path, sealed)
    assert [operation for operation, _ in s3.requests] == ["put", "get"]
    s3.requests.clear()
    reader = store.open(sealed.object_key)
    pieces = [reader.read_at(499_000, 1000), reader.read_at(0, 2000), reader.read_at(2000, 497_000)]
    reader.close()
    assert b"".join([pieces[1], pieces[2], pieces[0]]) == path.read_bytes()
    assert s3.requests == [("get", relative_path(sealed.object_key))]
    s3.requests.clear()
    assert store.stat(sealed.object_key).byte_count == 500_000
    assert [operation for operation, _ in s3.requests] == ["head"]


def test_requests_of_a_large_instance(counted: tuple[LyingS3, S3Store], landed: Landed) -> None:
    """Twelve megabytes read from trailer over header to the end, a segment at a time, cost two requests; a part elsewhere one."""
    s3, store = counted
    content = secrets.token_bytes(12 * MEBIBYTE)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    s3.requests.clear()
    reader = store.open(sealed.object_key)
    assert reader.read_at(reader.size - 400, 400) == content[-400:]
    assert reader.read_at(reader.size - 5000, 4600) == content[-5000:-400]
    got = [reader.read_at(0, 1100), *(reader.read_at(1100 + number * MEBIBYTE, MEBIBYTE) for number in range(12))]
    assert b"".join(got) == content
    assert [operation for operation, _ in s3.requests] == ["get", "get"]
    assert reader.read_at(7 * MEBIBYTE, 9) == content[7 * MEBIBYTE : 7 * MEBIBYTE + 9]
    assert len(s3.requests) == 3
    reader.close()


def test_memory_does_not_grow_with_the_object(s3_bucket: Callable[[], tuple[str, str, Path]], landed: Landed) -> None:
    """Storing 40 MiB, whole and in parts, and reading it by segments, takes less than 6 MiB of memory."""
    endpoint, bucket, _ = s3_bucket()
    path, sealed = landed(bytes(40 * MEBIBYTE))
    for prefix, multipart_bytes in (("whole/", 64 * MEBIBYTE), ("parts/", 6 * MEBIBYTE)):
        store = S3Store(bucket=bucket, prefix=prefix, endpoint_url=endpoint, region="us-east-1", multipart_bytes=multipart_bytes)
        store.check()  # loads what boto3 loads once
        tracemalloc.start()
        store.put(sealed.object_key, path, sealed)
        reader = store.open(sealed.object_key)
        for offset in range(0, reader.size, MEBIBYTE):
            assert len(reader.read_at(offset, MEBIBYTE)) == MEBIBYTE
        reader.close()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * MEBIBYTE


def test_listing_of_many_pages(counted: tuple[LyingS3, S3Store], landed: Landed) -> None:
    """2 500 objects come over three pages, each once and in order; a page that fails is asked for again."""
    s3, store = counted
    for number in range(2500):
        s3._keep(relative_path(f"{number * 7919:032x}"), b"x", {})
    s3.fail(SLOW_DOWN, operation="list", times=1)
    listed = [info.object_key for info in store.list()]
    assert listed == sorted(f"{number * 7919:032x}" for number in range(2500))
    assert s3.count("list") == 4


# --- credentials and certificates ------------------------------------------------------------------------------------


def test_wrong_credentials(s3_bucket: Callable[[], tuple[str, str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused credentials are Unavailable and say so."""
    endpoint, bucket, _ = s3_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    with pytest.raises(Unavailable, match="credentials"):
        S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", attempts=2).check()


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("InvalidAccessKeyId", 403, r"access denied \(InvalidAccessKeyId\); the credentials are expired or unknown: renew them"),
        ("SignatureDoesNotMatch", 403, "the credentials are expired or unknown: renew them"),
        ("AccessDenied", 403, r"access denied \(AccessDenied\); check the credentials and the policy"),
        ("NoSuchBucket", 404, "there is no such bucket; create it"),
        ("SlowDown", 503, r"access denied \(403\)"),
    ],
)
def test_a_refusal_without_words_is_asked_about(counted: tuple[LyingS3, S3Store], code: str, status: int, said: str) -> None:
    """The answer to a HEAD has no code: a listing is asked for it, so that a bad key, a policy and a missing bucket sound different."""
    s3, store = counted
    s3.fail(error(403, "none"), operation="check")
    s3.fail(error(status, code), operation="list")
    with pytest.raises(Unavailable, match=said):
        store.check()


@pytest.mark.parametrize(
    ("operation", "said"),
    [("put", "cannot write"), ("get", "cannot read"), ("list", "cannot list"), ("delete", "cannot"), ("uploads", "cannot list uploads of")],
)
def test_a_trial_finds_the_right_that_lacks(counted: tuple[LyingS3, S3Store], operation: str, said: str) -> None:
    """Each right alone, while all others are there: which one is said, and nothing is left where it may be removed."""
    s3, store = counted
    store.trial()
    assert s3.objects() == {}
    s3.fail(error(403, "AccessDenied"), operation=operation)
    with pytest.raises(Unavailable, match=rf"{said}.*access denied \(AccessDenied\); check the credentials and the policy"):
        store.trial()
    assert bool(s3.objects()) == (operation == "delete")


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (error(301, "PermanentRedirect", x_amz_bucket_region="eu-central-1"), "set [archive] region to 'eu-central-1'"),
        (error(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-central-1"), "set [archive] region to 'eu-central-1'"),
        (error(301, "PermanentRedirect"), "correct [archive] region or endpoint_url"),
    ],
)
def test_a_bucket_of_another_region(counted: tuple[LyingS3, S3Store], landed: Landed, fault: Any, remedy: str) -> None:
    """Over every kind of request the setting is named, and the region that the store says."""
    s3, store = counted
    s3.fail(fault)
    path, sealed = landed(b"x")
    for operation in (
        store.check,
        lambda: store.put(sealed.object_key, path, sealed),
        lambda: store.stat("0" * 32),
        lambda: list(store.list()),
    ):
        with pytest.raises(Unavailable, match="the bucket is not of region 'us-east-1'") as refused:
            operation()
        assert remedy in str(refused.value)


def test_no_credentials() -> None:
    """Absent credentials are Unavailable and say where to give them."""
    with pytest.raises(Unavailable, match="no credentials found; give the node AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or"):
        S3Store(bucket="b", endpoint_url="http://127.0.0.1:9", region="us-east-1", attempts=2).check()


def test_missing_bucket(s3_bucket: Callable[[], tuple[str, str, Path]], landed: Landed) -> None:
    """A missing bucket is Unavailable with the remedy, for every operation; above all it is not a missing object."""
    endpoint, _, _ = s3_bucket()
    store = S3Store(bucket="no-such-bucket", endpoint_url=endpoint, region="us-east-1", attempts=1)
    path, sealed = landed(b"x")
    for operation in (
        store.check,
        lambda: store.put(sealed.object_key, path, sealed),
        lambda: store.open("0" * 32),
        lambda: store.stat("0" * 32),
        lambda: list(store.list()),
        lambda: store.get_document(NAME),
    ):
        with pytest.raises(Unavailable, match="bucket"):
            operation()


class Authority:
    """A certificate authority of the test's own, and a server certificate of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca_file = folder / f"{name}-ca.pem"
        self.certificate = folder / f"{name}.pem"
        self.key = folder / f"{name}.key"
        now = dt.datetime.now(dt.UTC)
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

        def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
            return (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(ca_name)
                .public_key(public_key)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - dt.timedelta(hours=1))
                .not_valid_after(now + dt.timedelta(days=1))
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            )

        authority = (
            builder(ca_name, ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        server = (
            builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "s3")]), key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        self.ca_file.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        self.certificate.write_bytes(server.public_bytes(serialization.Encoding.PEM))
        self.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )


@contextmanager
def tls_service(authority: Authority, folder: Path) -> Iterator[str]:
    """Run ``rclone serve s3`` over TLS with one bucket; yield ``127.0.0.1:port``."""
    rclone = Path(sys.executable).with_name("rclone")
    (folder / "bucket").mkdir(parents=True)
    port = free_port()
    process = subprocess.Popen(
        [
            str(rclone if rclone.exists() else shutil.which("rclone")),
            *("serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}", "--auth-key", "any-access-key,any-secret-key"),
            *("--cert", str(authority.certificate), "--key", str(authority.key), str(folder)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.fail("rclone serve s3 did not start with a certificate")
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_only_the_right_authority_is_believed(tmp_path: Path, landed: Landed, credentials: None) -> None:
    """Over TLS the store works with the service's authority; another, none, or a wrong name is refused with the remedy (row 95)."""
    right, wrong = Authority(tmp_path, "right"), Authority(tmp_path, "wrong")
    with tls_service(right, tmp_path / "s3") as address:
        port = address.rpartition(":")[2]
        store = S3Store(bucket="bucket", endpoint_url=f"https://{address}", region="us-east-1", ca_file=right.ca_file)
        content = secrets.token_bytes(3000)
        path, sealed = landed(content)
        store.put(sealed.object_key, path, sealed)
        assert whole(store, sealed.object_key) == content
        pauses: list[float] = []
        for endpoint, ca_file in (
            (f"https://{address}", wrong.ca_file),
            (f"https://{address}", None),
            (f"https://localhost:{port}", right.ca_file),
        ):
            other = S3Store(bucket="bucket", endpoint_url=endpoint, region="us-east-1", ca_file=ca_file, sleep=pauses.append)
            with pytest.raises(Unavailable, match=r"certificate is not trusted, or names another host; give .*ca_file"):
                other.check()
            with pytest.raises(Unavailable, match="certificate is not trusted"):
                other.open(sealed.object_key)
        assert pauses == []  # trying again would not change it


def test_missing_authority_file(tmp_path: Path) -> None:
    """A file of certificates that is not there is said when the store is made, not taken for "trust the system's"."""
    with pytest.raises(Unavailable, match=r"trusted certificates .* is missing"):
        S3Store(bucket="bucket", endpoint_url="https://127.0.0.1:9", region="us-east-1", ca_file=tmp_path / "absent.pem")


def test_absent_objects_over_every_question(moto: Callable[..., tuple[S3Store, str, Any]]) -> None:
    """No object: InstanceNotFound from open, stat and get_document, and cleaning finds nothing."""
    store, _, _ = moto()
    for operation in (lambda: store.open("0" * 32), lambda: store.stat("0" * 32), lambda: store.get_document(NAME)):
        with pytest.raises(InstanceNotFound):
            operation()
    assert store.clean_uploads(dt.datetime.now(dt.UTC)) == 0
