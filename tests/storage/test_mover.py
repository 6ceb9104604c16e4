"""The spool and the Mover: what was acknowledged on the node's disk reaches the store, whatever is away, and is readable all the time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage.cache import ReadCache
from storage.errors import InstanceNotFound, Unavailable
from storage.mover import Bandwidth, Mover
from storage.objects import OBJECT_KEY
from storage.records import JobKind, JobState, NewReport, Outcome
from storage.s3 import S3Store
from tests.faults.lying_s3 import HALF, NOTHING, OTHER, Fault, LyingS3, error
from tests.storage.conftest import Build
from tests.storage.house import House, origin_of
from tests.storage.samples import Sample, photograph, report

NODE = "00000000000000aa"


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingS3]:
    """A bucket that lies when told to."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    with LyingS3() as service:
        yield service


@pytest.fixture
def landing(houses: Build, lying: LyingS3) -> House:
    """A node that acknowledges by landing, with a bucket behind."""
    return houses(store=store_of(lying), node_id=NODE)


def store_of(lying: LyingS3) -> S3Store:
    """Return a store over the service, quick to give up."""
    return S3Store(bucket=lying.bucket, endpoint_url=lying.endpoint, region="us-east-1", attempts=2, deadline_s=5, read_timeout_s=1)


def mover_of(house: House, patience_s: float = 10.0) -> Mover:
    """Return the Mover of a house."""
    return Mover(archive=house.archive, queue=house.queue, poll_s=0.05, patience_s=patience_s)


def let_seem_busy(house: House, *, seconds_ago: float) -> None:
    """Have the last instance begun to arrive so many seconds ago; negative: without end."""
    moment = time.time() - seconds_ago
    for folder in (house.folder / "landing").iterdir():
        os.utime(folder, (moment, moment))


def test_landed_then_archived(landing: House) -> None:
    """Success comes with the object in the spool; the Mover brings it and its key's document; then the spool is empty, and reads go on."""
    house, sample = landing, photograph()
    house.ingest(sample)
    record = house.index.find(sample.sop_instance_uid)
    assert record.landed_on == NODE
    assert house.objects() == []
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert mover_of(house).bring_once()
    moved = house.index.find(sample.sop_instance_uid)
    assert moved.landed_on == ""
    assert moved.sealed == record.sealed
    assert house.objects() == [record.sealed.object_key]
    assert list(house.store.list_documents("keys/")) == [f"keys/{record.sealed.key_id[:2]}/{record.sealed.key_id}"]
    assert [path for path in (house.folder / "landed").rglob("*") if path.is_file()] == []
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert not mover_of(house).bring_once()
    assert "instance.archived" in house.actions()
    assert house.archive.verify().intact


def test_jobs_stay_at_home_until_the_object_is_in_the_store(houses: Build, lying: LyingS3) -> None:
    """Another node is not given the analysis of what it cannot read; once the object is in the store, anyone is."""
    house = houses(store=store_of(lying), node_id=NODE)
    other = houses(store=store_of(lying), node_id="00000000000000bb")
    sample = photograph()
    house.ingest(sample)
    assert other.queue.claim(JobKind.ANALYSE, owner="other") is None
    assert other.queue.claim(JobKind.ARCHIVE, owner="other") is None
    with pytest.raises(Unavailable, match="lies on node"):
        other.read(sample.sop_instance_uid)
    mover_of(house).bring_once()
    assert other.read(sample.sop_instance_uid) == sample.data_set
    assert other.queue.claim(JobKind.ANALYSE, owner="other") is not None


def test_the_store_away_stops_nobody(landing: House, lying: LyingS3) -> None:
    """With the bucket failing every request, instances are taken in, read, concluded; once it works, all of it arrives (fault 9)."""
    house = landing
    samples = [photograph() for _ in range(5)]
    lying.fail(error(500, "InternalError"))
    for sample in samples:
        house.ingest(sample)
    with moving(house):
        _all_goes_on(house, lying, samples)


@contextmanager
def moving(house: House, patience_s: float = 10.0) -> Iterator[None]:
    """Have a Mover run."""
    stop = threading.Event()
    thread = threading.Thread(target=mover_of(house, patience_s).run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _all_goes_on(house: House, lying: LyingS3, samples: list[Sample]) -> None:
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    source = next(sample for sample in samples if sample.sop_instance_uid == job.sop_instance_uid)
    made = report(source=source, sop=f"{source.sop_instance_uid}1")
    house.archive.conclude(job, reports=[NewReport("summary", made.data_set, deliver_to=("pacs",))], result={})
    assert house.ingest(samples[0]).outcome in {Outcome.STORED, Outcome.DUPLICATE}
    for sample in samples:
        assert house.read(sample.sop_instance_uid) == sample.data_set
    lying.heal()
    wanted = {*(sample.sop_instance_uid for sample in samples), made.sop_instance_uid}
    deadline = time.monotonic() + 60
    while any(house.index.find(uid).landed_on for uid in wanted):
        assert time.monotonic() < deadline, "what landed does not arrive"
        time.sleep(0.05)
    assert {house.index.find(uid).sealed.object_key for uid in wanted} <= set(house.objects())
    for sample in samples:
        assert house.read(sample.sop_instance_uid) == sample.data_set


def _await_in_store(house: House, sample: Sample) -> None:
    deadline = time.monotonic() + 60
    while house.index.find(sample.sop_instance_uid).landed_on:
        assert time.monotonic() < deadline, "what landed does not arrive"
        time.sleep(0.02)


def test_receiving_goes_first(landing: House, lying: LyingS3) -> None:
    """While senders are busy nothing is brought, not even asked for; in their pause it is."""
    sample = photograph()
    landing.ingest(sample)
    let_seem_busy(landing, seconds_ago=-3600)
    with moving(landing, patience_s=3600):
        time.sleep(0.5)  # many looks; too short a time can only let the test pass
        assert lying.requests == []
        let_seem_busy(landing, seconds_ago=60)
        _await_in_store(landing, sample)


def test_patience_ends(landing: House) -> None:
    """Senders that make no pause do not keep what landed from the store for ever."""
    sample = photograph()
    landing.ingest(sample)
    let_seem_busy(landing, seconds_ago=-3600)
    with moving(landing, patience_s=0.3):
        _await_in_store(landing, sample)


@pytest.mark.parametrize("patience_s", [0.0, 3600.0])
def test_a_full_disk_is_emptied(landing: House, monkeypatch: pytest.MonkeyPatch, patience_s: float) -> None:
    """With little of the disk free, or no patience, it is brought beside busy senders."""
    sample = photograph()
    landing.ingest(sample)
    let_seem_busy(landing, seconds_ago=-3600)
    assert not landing.archive.places.crowded()
    if patience_s:
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=9, f_blocks=100, f_frsize=1 << 30))
    with moving(landing, patience_s):
        _await_in_store(landing, sample)


def test_how_long_nothing_arrived(landing: House) -> None:
    """Told by the folders of all processes of the node: the begin and the end of each instance count; of none, it is long ago."""
    assert landing.archive.quiet_s() > 1e6
    with landing.archive.receive(origin_of(), transfer_syntax_uid=photograph().transfer_syntax_uid):
        let_seem_busy(landing, seconds_ago=500)
        assert 500 <= landing.archive.quiet_s() < 560
    assert landing.archive.quiet_s() < 60
    let_seem_busy(landing, seconds_ago=-500)
    assert landing.archive.quiet_s() == 0


@pytest.mark.parametrize("fault", [NOTHING, HALF, OTHER], ids=lambda fault: fault.name)
def test_a_store_that_lies_keeps_the_spool(landing: House, lying: LyingS3, fault: Fault) -> None:
    """The bucket answers 200 and keeps nothing, half, or other bytes: the spool keeps its file until they came back right (fault 11)."""
    house, sample = landing, photograph()
    house.ingest(sample)
    lying.fail(fault, operation="put")
    assert mover_of(house).bring_once()
    assert house.index.find(sample.sop_instance_uid).landed_on == NODE
    assert [path for path in (house.folder / "landed").rglob("*") if path.is_file()] != []
    assert house.read(sample.sop_instance_uid) == sample.data_set
    (job,) = [job for job in house.queue.jobs_of(sample.sop_instance_uid) if job.kind is JobKind.ARCHIVE]
    assert job.state is JobState.READY
    assert job.reason


def test_a_landed_object_that_rotted_is_an_alarm_and_heals_by_a_second_sending(landing: House) -> None:
    """A disk that changed what it had promised: the bucket never gets it, the trail says so, and the sender's next try mends it."""
    house, sample = landing, photograph()
    house.ingest(sample)
    (path,) = (house.folder / "landed").glob("??/*")
    content = path.read_bytes()
    path.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    assert mover_of(house).bring_once()
    assert house.objects() == []
    assert "instance.damaged" in house.actions()
    assert house.ingest(sample).outcome is Outcome.STORED
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert mover_of(house).bring_once()
    assert house.objects() == [house.index.find(sample.sop_instance_uid).sealed.object_key]


def test_policies_by_origin(houses: Build, lying: LyingS3) -> None:
    """The sender's policy decides: one peer's instances are in the bucket at the answer, another's are on the disk."""
    house = houses(store=store_of(lying), node_id=NODE, acknowledge=lambda origin: "archive" if origin.peer == "careful" else "land")
    careful, quick = photograph(), photograph()
    house.ingest(careful, peer="careful")
    house.ingest(quick, peer="quick")
    assert house.objects() == [house.index.find(careful.sop_instance_uid).sealed.object_key]
    assert house.index.find(quick.sop_instance_uid).landed_on == NODE
    lying.fail(error(500, "InternalError"))
    with pytest.raises(Unavailable):
        house.ingest(photograph(), peer="careful")
    house.ingest(photograph(), peer="quick")


def test_the_cache_serves_and_may_vanish(houses: Build, lying: LyingS3, tmp_path: Path) -> None:
    """What was just stored is read without the bucket; a damaged or vanished copy is replaced by the bucket's, without an alarm."""
    cache = ReadCache(tmp_path / "cache", 10 << 20)
    house = houses(store=store_of(lying), acknowledge=lambda _: "archive", cache=cache)
    sample = photograph()
    house.ingest(sample)
    lying.fail(error(500, "InternalError"))
    assert house.read(sample.sop_instance_uid) == sample.data_set
    lying.heal()
    (copy,) = [path for path in (tmp_path / "cache").rglob("*") if OBJECT_KEY.fullmatch(path.name)]
    content = copy.read_bytes()
    copy.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert "instance.damaged" not in house.actions()
    cache.clear()
    assert house.read(sample.sop_instance_uid) == sample.data_set
    lying.fail(error(500, "InternalError"))
    assert house.read(sample.sop_instance_uid) == sample.data_set


def test_bytes_in_flight_are_limited_and_recover(houses: Build) -> None:
    """Above the budget nothing more is taken in, as out of resources; what is let go makes room again."""
    house = houses(max_bytes_in_flight=300_000)
    first, second = photograph(rows=400, columns=400, pixels=bytes(160_000)), photograph(rows=400, columns=400, pixels=bytes(160_000))
    held = house.archive.receive(origin_of(), transfer_syntax_uid=first.transfer_syntax_uid)
    held.write(first.data_set)
    with pytest.raises(Unavailable, match="not committed yet") as refused:
        house.ingest(second)
    assert refused.value.failure_reason == 0xA700
    held.commit()
    house.ingest(second)


def test_bandwidth_is_spread() -> None:
    """Takers wait in turn: a thousand bytes a second are a thousand bytes a second however many take."""
    now = 0.0
    bandwidth = Bandwidth(1000, monotonic=lambda: now)
    assert [bandwidth.take(500) for _ in range(3)] == [0.5, 1.0, 1.5]
    now = 10.0
    assert bandwidth.take(100) == pytest.approx(0.1)
    assert Bandwidth(0).take(10**9) == 0.0


def test_an_object_erased_meanwhile_is_nothing_to_bring(landing: House) -> None:
    """A job whose object no row names any more ends well, and brings nothing."""
    house, sample = landing, photograph()
    house.ingest(sample)
    job = house.queue.claim(JobKind.ARCHIVE, owner="test")
    assert job is not None
    key = house.index.find(sample.sop_instance_uid).sealed.object_key
    house.database.write(lambda connection: house.index.arrived_in_store(connection, key, landed_on=NODE))
    assert house.archive.bring(job) == 0
    assert house.objects() == []
    with pytest.raises(InstanceNotFound):
        house.index.find("1.2.3")
