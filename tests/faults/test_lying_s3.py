"""What an S3 service can do to a store (threats.md faults 9 to 17), and what the store promises all the same.

The promise: ``put`` returns only when the service holds the very bytes; it never takes the file; a read gives the very bytes or raises.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ColdObject, InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.objects import relative_path
from storage.records import SealedObject
from storage.s3 import S3Store
from tests.faults import lying_s3 as faults
from tests.faults.lying_s3 import Fault, LyingS3
from tests.faults.proxy import Proxy

MEBIBYTE = 1 << 20
Landed = Callable[[bytes], tuple[Path, SealedObject]]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingS3]:
    """Run the service, honest until told otherwise; credentials are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret-key")
    with LyingS3(seed=11) as service:
        yield service


@pytest.fixture
def landed(tmp_path: Path) -> Landed:
    """Write a landing file and describe it."""

    def make(content: bytes) -> tuple[Path, SealedObject]:
        key = secrets.token_hex(16)
        path = tmp_path / f"landing-{key}"
        path.write_bytes(content)
        return path, SealedObject(key, len(content), hashlib.sha256(content).hexdigest(), "k1")

    return make


def store_of(s3: LyingS3, kind: type[S3Store] = S3Store, **options: Any) -> S3Store:
    """Return a store on the service that does not wait between tries."""
    given = {
        "endpoint_url": s3.endpoint,
        "region": "us-east-1",
        "read_timeout_s": 1,
        "attempts": 4,
        "multipart_bytes": 6 * MEBIBYTE,
        "part_bytes": 5 * MEBIBYTE,
        "sleep": lambda _: None,
    }
    return kind(bucket=s3.bucket, **{**given, **options})


def whole(store: S3Store, key: str) -> bytes:
    """Read an object from its first byte to its last."""
    reader = store.open(key)
    try:
        return reader.read_at(0, reader.size)
    finally:
        reader.close()


def kept(s3: LyingS3, sealed: SealedObject) -> bytes | None:
    """Return what the service really keeps of an object."""
    return s3.objects().get(relative_path(sealed.object_key))


class Credulous(S3Store):
    """A store that takes a 200 for a proof: the negative control."""

    def _confirm(self, *args: object, **options: object) -> None:
        """Believe."""


def promise(store: S3Store, s3: LyingS3, landed: Landed, content: bytes) -> bool:
    """Put once; return whether it succeeded, after the promise was looked at."""
    path, sealed = landed(content)
    try:
        store.put(sealed.object_key, path, sealed)
    except StorageError:
        assert path.read_bytes() == content, "a failed put took the file"
        return False
    assert path.read_bytes() == content, "put took the file"
    assert kept(s3, sealed) == content, "put returned although the service does not hold the bytes"
    return True


# --- 9: down ---------------------------------------------------------------------------------------------------------


def test_down_and_back(s3: LyingS3, landed: Landed) -> None:
    """Nobody at the endpoint: Unavailable with what to check, for every operation; back again, the same store works (fault 9)."""
    store = store_of(s3, connect_timeout_s=1)
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    s3.stop()
    other, other_sealed = landed(b"later")
    for operation in (
        lambda: store.put(other_sealed.object_key, other, other_sealed),
        lambda: store.open(sealed.object_key),
        lambda: store.stat(sealed.object_key),
        lambda: store.delete(sealed.object_key),
        lambda: list(store.list()),
        lambda: store.put_document("keys/ab/" + "ab" * 16, b"x"),
        store.check,
    ):
        with pytest.raises(Unavailable, match="check the endpoint and the network"):
            operation()
    s3.start()
    store.put(other_sealed.object_key, other, other_sealed)
    assert whole(store, sealed.object_key) == b"content"


# --- 10: errors at a rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [faults.INTERNAL_ERROR, faults.BAD_GATEWAY, faults.SLOW_DOWN, faults.TOO_MANY_REQUESTS], ids=lambda fault: fault.code
)
@pytest.mark.parametrize("percent", [1, 30, 90])
def test_errors_at_a_rate(s3: LyingS3, landed: Landed, fault: Fault, percent: int) -> None:
    """500, 502, SlowDown and 429 at 1, 30 and 90 %: success or Unavailable, never a lie; healed, everything goes in (fault 10)."""
    store = store_of(s3)
    s3.fail(fault, probability=percent / 100)
    succeeded = sum(promise(store, s3, landed, secrets.token_bytes(2000)) for _ in range(12))
    if percent <= 30:
        assert succeeded >= 11  # four tries each of two requests
    s3.heal()
    assert promise(store, s3, landed, b"after")


def test_pauses_grow_have_jitter_and_heed_retry_after(s3: LyingS3, landed: Landed) -> None:
    """Between tries the store waits: random, below a doubling limit, at least as long as the service asks (fault 10)."""
    pauses: list[float] = []
    store = store_of(s3, attempts=8, sleep=pauses.append)
    s3.fail(faults.SLOW_DOWN)
    for _ in range(10):
        with pytest.raises(Unavailable, match="answered 503"):
            store.check()
    rounds = [pauses[start : start + 7] for start in range(0, 70, 7)]
    for number in range(7):
        nth = [pause[number] for pause in rounds]
        assert max(nth) <= 0.1 * 2 ** (number + 1)
        assert len(set(nth)) > 5
    assert max(pauses) > 2
    pauses.clear()
    s3.heal()
    s3.fail(faults.error(503, "SlowDown", retry_after="17"), times=1)
    store.check()
    assert pauses[0] >= 17


def test_deadline_ends_repetitions(s3: LyingS3) -> None:
    """With the deadline in sight the store does not start another pause (faults 10, 13)."""
    pauses: list[float] = []
    store = store_of(s3, attempts=1000, deadline_s=20, sleep=pauses.append)
    s3.fail(faults.error(503, "SlowDown", retry_after="30"))
    with pytest.raises(Unavailable, match="before the deadline"):
        store.check()
    assert (pauses, s3.count("check")) == ([], 1)


# --- 11: lies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [faults.NOTHING, faults.HALF, faults.OTHER], ids=lambda fault: fault.name)
@pytest.mark.parametrize(("size", "operation"), [(3000, "put"), (7 * MEBIBYTE, "part"), (7 * MEBIBYTE, "complete")])
def test_200_is_not_believed(s3: LyingS3, landed: Landed, fault: Fault, size: int, operation: str) -> None:
    """A 200 that kept nothing, half or other bytes is found before put returns; what is wrong is removed (fault 11)."""
    store = store_of(s3)
    s3.fail(fault, operation=operation)
    path, sealed = landed(secrets.token_bytes(size))
    with pytest.raises(Unavailable, match="does not give the same bytes back"):
        store.put(sealed.object_key, path, sealed)
    assert path.exists()
    assert kept(s3, sealed) is None
    s3.heal()
    store.put(sealed.object_key, path, sealed)
    assert kept(s3, sealed) == path.read_bytes()


@pytest.mark.parametrize("fault", [faults.NOTHING, faults.HALF, faults.OTHER], ids=lambda fault: fault.name)
def test_control_a_store_that_believes_is_caught(s3: LyingS3, landed: Landed, fault: Fault) -> None:
    """Negative control: without the reading back the promise breaks, and the test sees it."""
    s3.fail(fault, operation="put")
    with pytest.raises(AssertionError, match="does not hold the bytes"):
        promise(store_of(s3, Credulous), s3, landed, b"content")


def test_document_200_is_not_believed(s3: LyingS3) -> None:
    """Documents are read back too; a replacement that was not kept is found (fault 11)."""
    store = store_of(s3)
    name = "keys/ab/" + "ab" * 16
    store.put_document(name, b"first")
    for fault in (faults.NOTHING, faults.HALF, faults.OTHER):
        s3.fail(fault, operation="put", times=1)
        with pytest.raises(Unavailable, match="does not give the same bytes back"):
            store.put_document(name, b"second")
    store.put_document(name, b"third")
    assert store.get_document(name) == b"third"


# --- 12: broken transfers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        (faults.BAD_DIGEST, "put"),
        (faults.REQUEST_TIMEOUT, "put"),
        (faults.RESET, ""),
        (faults.cut_request(0), "put"),
        (faults.cut_request(1500), "put"),
        (faults.cut_response(0), "get"),
        (faults.cut_response(1), "get"),
        (faults.cut_response(2999), "get"),
        (faults.LOST_ANSWER, "put"),
        (faults.done_but(500, "InternalError"), "put"),
        (faults.late(3), "put"),
        (faults.WRONG_ETAG, "put"),
        (faults.SLOW_DOWN, ""),
        (faults.HANG, "put"),
        (faults.HANG, "get"),
        (faults.OTHER, "get"),
    ],
    ids=lambda value: f"{value.name} {value.code} {value.number}" if isinstance(value, Fault) else value,
)
def test_passing_fault_is_ridden_out(s3: LyingS3, landed: Landed, fault: Fault, operation: str) -> None:
    """One of these and then honesty ends in success, with the very bytes stored and read (faults 10, 12, 13, 14)."""
    store = store_of(s3)
    s3.fail(fault, operation=operation, times=1)
    content = secrets.token_bytes(3000)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    assert kept(s3, sealed) == content
    assert whole(store, sealed.object_key) == content
    assert s3.objects().keys() == {relative_path(sealed.object_key)}


@pytest.mark.parametrize("operation", ["part", "complete"])
@pytest.mark.parametrize(
    "fault", [faults.LOST_ANSWER, faults.cut_request(30), faults.BAD_DIGEST, faults.SLOW_DOWN], ids=lambda fault: fault.name
)
def test_passing_fault_in_parts_is_ridden_out(s3: LyingS3, landed: Landed, fault: Fault, operation: str) -> None:
    """The same for an object in parts; no upload is left open (faults 12, 17)."""
    store = store_of(s3)
    s3.fail(fault, operation=operation, times=1)
    assert promise(store, s3, landed, secrets.token_bytes(7 * MEBIBYTE))
    assert s3.uploads() == []


@pytest.mark.parametrize("cut", [0, 1, 100, 65_535, 65_536, 65_537, 1_500_000])
def test_read_is_taken_up_where_it_broke(s3: LyingS3, landed: Landed, cut: int) -> None:
    """Every answer ends after N bytes once: the bytes read are right, and not asked for twice (fault 12)."""
    store = store_of(s3)
    content = secrets.token_bytes(3 * MEBIBYTE + 5)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    s3.fail(faults.cut_response(cut), operation="get", times=2)
    reader = store.open(sealed.object_key)
    got = b"".join(reader.read_at(offset, 700_000) for offset in range(0, reader.size, 700_000))
    reader.close()
    assert got == content


def test_answer_that_always_breaks_off(s3: LyingS3, landed: Landed) -> None:
    """Every answer ends before its first byte: Unavailable after the tries, not for ever (faults 12, 13)."""
    store = store_of(s3)
    path, sealed = landed(bytes(3000))
    store.put(sealed.object_key, path, sealed)
    s3.fail(faults.cut_response(0), operation="get")
    reader = store.open(sealed.object_key)
    with pytest.raises(Unavailable, match="breaks off"):
        reader.read_at(0, 10)
    reader.close()
    assert s3.count("get") <= 1 + 1 + store._client.attempts


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("at_byte", [0, 10, 400, 1500, 3100])
def test_line_that_breaks(s3: LyingS3, landed: Landed, way: str, at_byte: int) -> None:
    """The TCP connection is cut at byte N of request or answer: ridden out, the bytes are right (fault 12)."""
    with Proxy("127.0.0.1", s3.port) as proxy:
        store = store_of(s3, endpoint_url=f"http://127.0.0.1:{proxy.port}")
        getattr(proxy, f"cut_{way}")(at_byte)
        assert promise(store, s3, landed, secrets.token_bytes(3000))
        assert proxy.connections > 1


# --- 13: silence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["put", "get", "head", "list", "check", "delete"])
def test_hanging_service(s3: LyingS3, landed: Landed, operation: str) -> None:
    """No byte comes: Unavailable after the time-outs, whatever was asked (fault 13)."""
    store = store_of(s3, read_timeout_s=0.3, attempts=2)
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    s3.fail(faults.HANG, operation=operation)
    other, other_sealed = landed(b"other")
    asked: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(other_sealed.object_key, other, other_sealed),
        "get": lambda: store.open(sealed.object_key),
        "head": lambda: store.stat(sealed.object_key),
        "list": lambda: list(store.list()),
        "check": store.check,
        "delete": lambda: store.delete(sealed.object_key),
    }
    with pytest.raises(Unavailable, match="Timeout"):
        asked[operation]()


def test_hanging_service_stops_no_other(s3: LyingS3, landed: Landed) -> None:
    """While one put hangs, others go through (fault 13, P8)."""
    store = store_of(s3, read_timeout_s=30, attempts=1)
    s3.fail(faults.HANG, operation="put", times=1)
    path, sealed = landed(b"hangs")
    ended: list[StorageError] = []

    def hanging() -> None:
        try:
            store.put(sealed.object_key, path, sealed)
        except StorageError as error:
            ended.append(error)

    thread = threading.Thread(target=hanging)
    thread.start()
    while s3.count("put") == 0:
        thread.join(0.01)
    for _ in range(5):
        assert promise(store, s3, landed, b"goes through")
    assert thread.is_alive()
    s3.heal()
    thread.join()
    assert len(ended) == 1


def test_black_hole(s3: LyingS3, landed: Landed) -> None:
    """A line that swallows everything: Unavailable within the time-outs; healed, the store works (faults 13, 41)."""
    with Proxy("127.0.0.1", s3.port) as proxy:
        store = store_of(s3, endpoint_url=f"http://127.0.0.1:{proxy.port}", read_timeout_s=0.3, attempts=2)
        proxy.black_hole()
        assert not promise(store, s3, landed, b"content")
        proxy.heal()
        assert promise(store, s3, landed, b"content")


def test_bytes_that_come_too_slowly(s3: LyingS3, landed: Landed) -> None:
    """A line that always moves, but hardly, ends with the deadline, though no read ever times out (fault 13)."""
    with Proxy("127.0.0.1", s3.port) as proxy:
        store = store_of(s3, endpoint_url=f"http://127.0.0.1:{proxy.port}", deadline_s=1, minimum_bytes_per_s=1 << 30, read_timeout_s=5)
        path, sealed = landed(bytes(4 * MEBIBYTE))
        store.put(sealed.object_key, path, sealed)
        proxy.bytes_per_s = 300_000  # before anything is asked for: megabytes fit into what the kernel holds
        reader = store.open(sealed.object_key)
        with pytest.raises(Unavailable, match="too slowly"):
            reader.read_at(0, 3 * MEBIBYTE)
        reader.close()


# --- 14: late and odd ------------------------------------------------------------------------------------------------


def test_never_visible(s3: LyingS3, landed: Landed) -> None:
    """An object that stays 404 after its put is no success, and is not deleted: it may come yet (fault 14)."""
    store = store_of(s3)
    s3.fail(faults.late(1000), operation="put", times=1)
    path, sealed = landed(b"content")
    with pytest.raises(Unavailable, match="holds nothing"):
        store.put(sealed.object_key, path, sealed)
    assert s3.count("delete") == 0


def test_wrong_etag_of_parts(s3: LyingS3, landed: Landed) -> None:
    """ETags prove nothing and disturb nothing (fault 14)."""
    s3.fail(faults.WRONG_ETAG)
    assert promise(store_of(s3), s3, landed, secrets.token_bytes(7 * MEBIBYTE))


def test_taken_key_of_other_bytes(s3: LyingS3, landed: Landed) -> None:
    """412 over other bytes is IntegrityError, and nothing is overwritten or removed."""
    store = store_of(s3)
    path, sealed = landed(b"theirs")
    store.put(sealed.object_key, path, sealed)
    mine = SealedObject(sealed.object_key, 4, hashlib.sha256(b"mine").hexdigest(), "k1")
    path.write_bytes(b"mine")
    with pytest.raises(IntegrityError, match="other bytes"):
        store.put(mine.object_key, path, mine)
    assert kept(s3, sealed) == b"theirs"


def test_half_kept_and_the_answer_lost(s3: LyingS3, landed: Landed) -> None:
    """A try that kept half and lost its answer leaves no stone in the way: the next put succeeds (faults 11 and 12 together)."""
    store = store_of(s3)
    path, sealed = landed(b"0123456789")
    s3.fail(faults.HALF_AND_LOST, operation="put", times=1)
    with pytest.raises(Unavailable, match="does not give the same bytes back"):
        store.put(sealed.object_key, path, sealed)
    store.put(sealed.object_key, path, sealed)
    assert kept(s3, sealed) == b"0123456789"


def test_unreadable_is_not_removed(s3: LyingS3, landed: Landed) -> None:
    """A put again of an object that is there, whose reading back fails, removes nothing (P1)."""
    store = store_of(s3)
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    s3.fail(faults.cut_response(0), operation="get")
    with pytest.raises(Unavailable):
        store.put(sealed.object_key, path, sealed)
    assert kept(s3, sealed) == b"content"
    assert s3.count("delete") == 0


# --- 15: refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.DENIED, "check the credentials and the policy"),
        (faults.EXPIRED_TOKEN, "expired or unknown: renew them"),
        (faults.NO_BUCKET, "no such bucket; create it"),
        (faults.error(403, "RequestTimeTooSkewed"), "set the clock"),
    ],
    ids=lambda value: value.code if isinstance(value, Fault) else "",
)
def test_refusal_says_what_to_do(s3: LyingS3, landed: Landed, fault: Fault, words: str) -> None:
    """Expired credentials, a policy, a missing bucket, a wrong clock: Unavailable with the remedy; an object is never "not found"."""
    store = store_of(s3)
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    s3.fail(fault)
    other, other_sealed = landed(b"other")
    for operation in (
        lambda: store.put(other_sealed.object_key, other, other_sealed),
        lambda: store.open(sealed.object_key),
        lambda: list(store.list()),
        lambda: store.put_document("keys/ab/" + "ab" * 16, b"x"),
    ):
        with pytest.raises(Unavailable, match=words):
            operation()
    for question in (lambda: store.stat(sealed.object_key), store.check):  # the answer to a HEAD has no words
        with pytest.raises(Unavailable):
            question()
    s3.heal()
    assert whole(store, sealed.object_key) == b"content"


def test_renewed_credentials_need_no_restart(s3: LyingS3, landed: Landed, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ExpiredToken the standard chain is asked again: what was renewed meanwhile is used by the same store (fault 15)."""
    store = store_of(s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed-access-key")
    s3.fail(faults.EXPIRED_TOKEN, times=1)
    assert promise(store, s3, landed, b"content")
    assert "any-access-key" in s3.heads[0]["authorization"]
    assert "renewed-access-key" in s3.heads[-1]["authorization"]


# --- 16: out of band -------------------------------------------------------------------------------------------------


def test_deleted_or_rolled_back_out_of_band(s3: LyingS3, landed: Landed) -> None:
    """A deleted object is InstanceNotFound, a shortened one is seen by its length, a replaced one has another digest (fault 16)."""
    store = store_of(s3)
    path, sealed = landed(b"content")
    store.put(sealed.object_key, path, sealed)
    name = relative_path(sealed.object_key)
    s3.replace(name, b"CONTENT")
    assert hashlib.sha256(whole(store, sealed.object_key)).hexdigest() != sealed.sha256
    s3.replace(name, b"cont")
    assert store.stat(sealed.object_key).byte_count == 4
    s3.remove(name)
    for operation in (store.open, store.stat):
        with pytest.raises(InstanceNotFound):
            operation(sealed.object_key)
    for _ in range(3):
        s3.roll_back(name)
    assert whole(store, sealed.object_key) == b"content"


def test_object_replaced_while_it_is_read(s3: LyingS3, landed: Landed) -> None:
    """Bytes of two objects are never joined when the length tells: Unavailable."""
    store = store_of(s3)
    path, sealed = landed(bytes(3 * MEBIBYTE))
    store.put(sealed.object_key, path, sealed)
    s3.fail(faults.cut_response(100_000), operation="get", times=1)
    reader = store.open(sealed.object_key)
    s3.replace(relative_path(sealed.object_key), bytes(2 * MEBIBYTE))
    with pytest.raises(Unavailable, match="replaced while it was read"):
        reader.read_at(0, MEBIBYTE)
    with pytest.raises(Unavailable, match="replaced while it was read"):
        reader.read_at(MEBIBYTE, MEBIBYTE)
    s3.remove(relative_path(sealed.object_key))
    with pytest.raises(InstanceNotFound):
        reader.read_at(MEBIBYTE, MEBIBYTE)
    reader.close()


# --- 17: uploads in parts --------------------------------------------------------------------------------------------


def test_failed_upload_is_aborted(s3: LyingS3, landed: Landed) -> None:
    """An upload in parts that cannot go on leaves no open upload (fault 17)."""
    store = store_of(s3)
    for operation in ("part", "complete"):
        s3.fail(faults.INTERNAL_ERROR, operation=operation)
        assert not promise(store, s3, landed, secrets.token_bytes(7 * MEBIBYTE))
        s3.heal()
    assert s3.uploads() == []
    assert s3.objects() == {}


def test_orphaned_uploads_are_cleaned(s3: LyingS3, landed: Landed) -> None:
    """What a crash left open is found below our prefix and aborted when it is old enough; another's and young ones stay (fault 17)."""
    store, other = store_of(s3, prefix="ours/"), store_of(s3, prefix="ours/theirs/")
    for each in (store, other):
        s3.fail(faults.INTERNAL_ERROR, operation="part")
        s3.fail(faults.INTERNAL_ERROR, operation="abort")
        assert not promise(each, s3, landed, secrets.token_bytes(7 * MEBIBYTE))
        s3.heal()
    assert len(s3.uploads()) == 2
    now = datetime.now(UTC)
    assert store.clean_uploads(now - timedelta(days=1)) == 0
    s3.age_uploads(now - timedelta(days=2))
    assert store.clean_uploads(now - timedelta(days=1)) == 1
    assert [name.startswith("ours/theirs/") for name in s3.uploads()] == [True]


# --- cold classes ----------------------------------------------------------------------------------------------------


def test_restore_is_started_once(s3: LyingS3, landed: Landed) -> None:
    """Opening a cold object starts its restore and says when to come again; asked meanwhile, no second one is started."""
    store = store_of(s3, storage_class="GLACIER", restore_tier="Expedited")
    content = secrets.token_bytes(3000)
    path, sealed = landed(content)
    store.put(sealed.object_key, path, sealed)
    for said in ("started", "under way", "under way"):
        with pytest.raises(ColdObject, match=said) as caught:
            store.open(sealed.object_key)
        assert caught.value.retry_after_s == 300
    assert s3.count("restore") == 1
    assert store.stat(sealed.object_key).cold
    s3.finish_restores()
    assert not store.stat(sealed.object_key).cold
    assert whole(store, sealed.object_key) == content


@pytest.mark.parametrize("size", [3000, 7 * MEBIBYTE])
def test_put_into_a_cold_class_is_confirmed(s3: LyingS3, landed: Landed, size: int) -> None:
    """What cannot be read back is confirmed by the service's digest and length: a missing, shorter or other object is found."""
    store = store_of(s3, storage_class="DEEP_ARCHIVE")
    assert promise(store, s3, landed, secrets.token_bytes(size))
    for fault in (faults.NOTHING, faults.HALF):
        s3.fail(fault, operation="put" if size == 3000 else "complete")
        assert not promise(store, s3, landed, secrets.token_bytes(size))
        s3.heal()


# --- everything at once ----------------------------------------------------------------------------------------------

EVERYTHING = [
    faults.NOTHING,
    faults.HALF,
    faults.OTHER,
    faults.HALF_AND_LOST,
    faults.LOST_ANSWER,
    faults.WRONG_ETAG,
    faults.RESET,
    faults.INTERNAL_ERROR,
    faults.SLOW_DOWN,
    faults.BAD_DIGEST,
    faults.REQUEST_TIMEOUT,
    faults.DENIED,
    faults.NO_BUCKET,
    faults.done_but(500, "InternalError"),
    faults.cut_request(100),
    faults.cut_response(50),
    faults.late(2),
]


def play(store: S3Store, s3: LyingS3, landed: Landed, dice: random.Random, rounds: int) -> int:
    """Put under random rules; return how many succeeded, each looked at. What succeeded is still there, whole, at the end."""
    acknowledged: dict[str, bytes] = {}
    for _ in range(rounds):
        s3.heal()
        for fault in dice.sample(EVERYTHING, 3):
            s3.fail(fault, probability=dice.choice([0.1, 0.3, 0.9]), operation=dice.choice(["", "put", "get", "delete"]))
        content = dice.randbytes(dice.choice([0, 1, 500, 20_000]))
        path, sealed = landed(content)
        for _ in range(dice.choice([1, 2])):
            try:
                store.put(sealed.object_key, path, sealed)
            except StorageError:
                continue
            acknowledged[sealed.object_key] = content
            assert kept(s3, sealed) == content, "put returned although the service does not hold the bytes"
        assert path.read_bytes() == content
    s3.heal()
    for key, content in acknowledged.items():
        assert whole(store, key) == content
    return len(acknowledged)


@pytest.mark.parametrize("seed", range(4))
def test_random_faults(s3: LyingS3, landed: Landed, seed: int) -> None:
    """Over random rules of every fault, each put that returned is held by the service, at once and at the end (faults 10 to 15)."""
    assert play(store_of(s3, attempts=3), s3, landed, random.Random(seed), 40) > 5


def test_control_random_faults(s3: LyingS3, landed: Landed) -> None:
    """Negative control: the same play breaks the promise of a store that believes a 200."""
    with pytest.raises(AssertionError, match="does not hold the bytes"):
        play(store_of(s3, Credulous, attempts=3), s3, landed, random.Random(0), 40)
