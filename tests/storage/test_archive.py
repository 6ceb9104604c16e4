"""The archive over real parts: what is acknowledged is there, what is refused leaves nothing, every step may run twice."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest

from storage.errors import (
    ConflictingInstance,
    InstanceNotFound,
    IntegrityError,
    InvalidInstance,
    LeaseLost,
    MismatchedInstance,
    StorageError,
    Unavailable,
    UnsupportedInstance,
)
from storage.failpoints import failpoint_from_environment, unarmed
from storage.intake import IntakeState, footer_to_record, record_to_footer
from storage.records import Announced, JobKind, JobState, NewReport, Outcome, Receipt
from storage.s3 import S3Store
from tests.storage.house import House, origin_of
from tests.storage.samples import Sample, photograph, report

Build = Callable[..., House]


def pixels_equal(first: bytes, second: bytes) -> bool:
    """Compare decoded pixels, as the laboratory does."""
    decoded = [pydicom.dcmread(io.BytesIO(part10)).pixel_array for part10 in (first, second)]
    return bool((decoded[0] == decoded[1]).all())


# --- admit -----------------------------------------------------------------------------------------------------------


def test_archived_as_received(either_house: House) -> None:
    """What a receipt was given for comes back byte for byte: whole, in ranges, as a Part 10 file."""
    sample = photograph(rows=1200, columns=1800)
    receipt = either_house.ingest(sample)
    assert (receipt.outcome, receipt.sop_instance_uid) == (Outcome.STORED, sample.sop_instance_uid)
    with either_house.archive.open(sample.sop_instance_uid) as stored:
        assert stored.size == len(sample.data_set)
        assert stored.read() == sample.data_set
        assert b"".join(stored.chunks()) == sample.data_set
        for offset, length in ((0, 10), (1_048_500, 200), (len(sample.data_set) - 5, 100), (len(sample.data_set) + 5, 3)):
            assert stored.read(offset, length) == sample.data_set[offset : offset + length]
        part10 = b"".join(stored.part10())
    assert part10[128:132] == b"DICM"
    assert part10.endswith(sample.data_set)
    assert pydicom.dcmread(io.BytesIO(part10)).SOPInstanceUID == sample.sop_instance_uid
    assert either_house.landing_files() == []
    assert either_house.archive.verify().intact


def test_admission_is_one_transaction_of_row_job_and_audit(house: House) -> None:
    """Commit 1 brings the row, the job and the audit record together."""
    sample = photograph()
    house.ingest(sample)
    record = house.index.find(sample.sop_instance_uid)
    assert record.role == "source"
    assert record.origin.calling_ae_title == "SENDER"
    (job,) = house.queue.jobs_of(sample.sop_instance_uid)
    assert (job.kind, job.state) == (JobKind.ANALYSE, JobState.READY)
    assert house.actions() == ["instance.received"]
    assert house.objects() == [record.sealed.object_key]


@pytest.mark.parametrize("step", [1, 7, 100, 10_000])
def test_chunking_does_not_matter(house: House, step: int) -> None:
    """However the network cut the bytes, the same is archived."""
    sample = photograph()
    with house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
        for start in range(0, len(sample.data_set), step):
            intake.write(memoryview(sample.data_set)[start : start + step])
        intake.commit()
    assert house.read(sample.sop_instance_uid) == sample.data_set


def test_into_a_vessel_made_before(house: House) -> None:
    """An instance is taken into what was made while nobody waited; after commit and settle nothing of it is left in the landing folder."""
    sample, vessel = photograph(), house.archive.vessel()
    assert house.landing_files() == [vessel.file.path]
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid, vessel=vessel)
    assert len(house.landing_files()) == 1
    intake.write(sample.data_set)
    intake.commit()
    intake.settle()
    assert house.landing_files() == []
    assert house.read(sample.sop_instance_uid) == sample.data_set


@pytest.mark.parametrize("why", ["transfer syntax", "no room", "disk"])
def test_the_vessel_of_who_is_refused_is_gone(houses: Build, why: str) -> None:
    """A vessel is used up by whoever it is given to, also when nothing is taken in."""

    def no_room() -> None:
        if why == "no room":
            raise Unavailable("no room")

    house = houses(require_room=no_room)
    vessel = house.archive.vessel()
    if why == "disk":
        house.archive._landing._min_free_bytes = 1 << 62
    with pytest.raises((UnsupportedInstance, Unavailable)):
        house.archive.receive(
            origin_of(), transfer_syntax_uid="1.2.3" if why == "transfer syntax" else photograph().transfer_syntax_uid, vessel=vessel
        )
    assert house.landing_files() == []


def test_failpoints_are_reached_in_order(houses: Build) -> None:
    """Every step that a fault test may stop at is announced, in the order of the durable path."""
    reached: list[str] = []
    houses(reach=reached.append).ingest(photograph())
    assert reached == [
        "intake.opened", "intake.first_chunk", "intake.sealed", "landing.flushed", "object.renamed", "directory.flushed",
        "index.begin", "index.written", "index.committed", "receipt.ready",
    ]  # fmt: skip


def test_same_instance_again_is_a_duplicate(either_house: House) -> None:
    """A sender that tries again gets success; nothing is stored twice and no second job is made."""
    sample = photograph()
    either_house.ingest(sample)
    again = either_house.ingest(sample, calling_ae_title="OTHER")
    assert again.outcome is Outcome.DUPLICATE
    assert len(either_house.objects()) == 1
    assert len(either_house.queue.jobs_of(sample.sop_instance_uid)) == 1
    assert either_house.actions() == ["instance.received", "instance.duplicate"]
    assert either_house.landing_files() == []


def test_other_content_goes_to_quarantine(house: House) -> None:
    """Same UID, other content: refused with 0x0111, kept aside once, the first untouched."""
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    house.ingest(first)
    for _ in range(3):
        with pytest.raises(ConflictingInstance) as caught:
            house.ingest(second)
        assert caught.value.failure_reason == 0x0111
    assert house.read(first.sop_instance_uid) == first.data_set
    (kept,) = house.index.quarantined()
    assert sorted(house.objects()) == sorted([house.index.find(first.sop_instance_uid).sealed.object_key, kept.record.sealed.object_key])
    assert house.actions() == ["instance.received", *["instance.quarantined"] * 3]
    assert house.archive.verify().intact
    assert house.archive.verify().unindexed == []


def test_other_content_is_dropped_where_configured(houses: Build) -> None:
    """Policy refuse: the second leaves one audit record and nothing else."""
    house = houses(on_conflict="refuse")
    first = photograph()
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=first.sop_instance_uid))
    assert house.index.quarantined() == []
    assert len(house.objects()) == 1
    assert house.actions() == ["instance.received", "instance.refused"]


def test_study_of_another_patient_goes_to_quarantine(house: House) -> None:
    """An instance that would put two patients into one study is kept aside."""
    first = photograph()
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(study=first.study_instance_uid, patient_id="PID-2"))
    assert len(house.index.quarantined()) == 1
    assert house.archive.verify().intact


@pytest.mark.parametrize("changed", ["nothing", "name", "pixels", "no comparer", "too large"])
def test_other_transfer_syntax(houses: Build, changed: str) -> None:
    """The same picture in another transfer syntax is a duplicate; another header or another pixel makes it a conflict."""
    options: dict[str, Any] = {"pixels_equal": pixels_equal}
    if changed == "no comparer":
        options = {}
    if changed == "too large":
        options["comparison_bytes"] = 100
    house = houses(**options)
    pixels = secrets.token_bytes(256)
    first = photograph(pixels=pixels)
    uids = {"sop": first.sop_instance_uid, "study": first.study_instance_uid, "series": first.series_instance_uid}
    second = photograph(
        **uids,
        pixels=pixels if changed != "pixels" else pixels[:-1] + bytes([pixels[-1] ^ 1]),
        name="Canary^Other" if changed == "name" else "Canary^Test",
        implicit=True,
    )
    house.ingest(first)
    if changed == "nothing":
        assert house.ingest(second).outcome is Outcome.DUPLICATE
        assert len(house.objects()) == 1
    else:
        with pytest.raises(ConflictingInstance):
            house.ingest(second)
        assert len(house.index.quarantined()) == 1
    assert house.read(first.sop_instance_uid) == first.data_set


@pytest.mark.parametrize("parts", [1, 2])
def test_many_senders_of_one_instance_at_one_moment(houses: Build, parts: int) -> None:
    """All succeed, one copy is kept: within a process and between processes on one folder (threats.md fault 8)."""
    opened = [houses() for _ in range(parts)]
    samples = [photograph() for _ in range(4)]
    barrier = threading.Barrier(8)
    outcomes: list[Outcome] = []

    def send(number: int) -> None:
        for sample in samples:
            barrier.wait()
            outcomes.append(opened[number % parts].ingest(sample).outcome)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [Outcome.DUPLICATE] * 28 + [Outcome.STORED] * 4
    assert len(opened[0].objects()) == 4
    assert opened[0].landing_files() == []
    assert opened[0].archive.verify().intact
    assert opened[0].archive.verify().unindexed == []


def test_two_senders_of_other_content_at_one_moment(house: House) -> None:
    """One of two different instances under one UID is archived, the other is in quarantine; none is lost."""
    for _ in range(5):
        first = photograph()
        second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid)
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def send(sample: Sample, barrier: threading.Barrier = barrier, outcomes: list[str] = outcomes) -> None:
            barrier.wait()
            try:
                outcomes.append(house.ingest(sample).outcome)
            except ConflictingInstance:
                outcomes.append("conflict")

        threads = [threading.Thread(target=send, args=(sample,)) for sample in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["conflict", "stored"]
    assert len(house.index.quarantined()) == 5
    assert house.archive.verify().unindexed == []


# --- refused ---------------------------------------------------------------------------------------------------------


def assert_nothing_left(house: House) -> None:
    """Look that no object, landing file or row remained."""
    assert house.objects() == []
    assert house.landing_files() == []
    assert list(house.index.all_objects()) == []


@pytest.mark.parametrize("field", ["sop_class_uid", "sop_instance_uid", "study_instance_uid"])
def test_announced_and_sent_must_agree(house: House, field: str) -> None:
    """An instance that is not the announced one is stored under neither identity (threats.md rows 16, 76)."""
    sample = photograph()
    announced = replace(Announced(sample.sop_class_uid, sample.sop_instance_uid, sample.study_instance_uid), **{field: "1.2.3"})
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid, announced=announced)
    intake.write(sample.data_set)
    with pytest.raises(MismatchedInstance):
        intake.commit()
    assert_nothing_left(house)
    assert house.actions() == ["instance.refused"]


def test_what_was_announced_and_sent_is_taken(house: House) -> None:
    """The right announcement is no obstacle."""
    sample = photograph()
    announced = Announced(sample.sop_class_uid, sample.sop_instance_uid, sample.study_instance_uid)
    with house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid, announced=announced) as intake:
        intake.write(sample.data_set)
        assert intake.commit().outcome is Outcome.STORED


def test_sop_class_not_accepted(houses: Build) -> None:
    """A SOP class that the configuration does not accept is refused with 0x0122."""
    house = houses(accept_sop_class=lambda _: False)
    with pytest.raises(UnsupportedInstance):
        house.ingest(photograph())
    assert_nothing_left(house)


def test_unknown_transfer_syntax(house: House) -> None:
    """An unknown transfer syntax is refused before a byte is taken, with one audit record."""
    with pytest.raises(UnsupportedInstance):
        house.archive.receive(origin_of(), transfer_syntax_uid="1.2.3.4")
    assert_nothing_left(house)
    assert house.actions() == ["instance.refused"]


def test_every_cut_is_refused(house: House) -> None:
    """A data set that ends early, at whichever byte, is never acknowledged and leaves nothing (threats.md row 23)."""
    sample = photograph(rows=4, columns=4)
    cuts = range(len(sample.data_set))
    for cut in cuts:
        with pytest.raises(StorageError) as caught:
            house.ingest(replace(sample, data_set=sample.data_set[:cut]))
        assert not caught.value.retryable
    assert_nothing_left(house)
    assert house.actions() == ["instance.refused"] * len(cuts)


def test_limit_of_the_call(house: House) -> None:
    """The instance stops at the limit; what was written goes."""
    sample = photograph(rows=100, columns=100)
    intake = house.archive.receive(
        origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid, limits=replace(house.archive._limits, object_bytes=500)
    )
    with pytest.raises(InvalidInstance):
        intake.write(sample.data_set)
    assert intake.state is IntakeState.CLOSED
    assert_nothing_left(house)


def test_abort_leaves_nothing_and_says_nothing(house: House) -> None:
    """A sender that goes away in the middle leaves neither file nor row nor record (threats.md fault 7)."""
    sample = photograph()
    with house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
        intake.write(sample.data_set[:100])
        assert len(house.landing_files()) == 1
    intake.abort()
    assert intake.state is IntakeState.CLOSED
    assert_nothing_left(house)
    assert house.actions() == []


def test_intake_is_used_once(house: House) -> None:
    """A committed or closed intake takes nothing more."""
    sample = photograph()
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid)
    intake.write(sample.data_set)
    intake.commit()
    intake.abort()
    assert intake.state is IntakeState.COMMITTED
    for use in (intake.commit, lambda: intake.write(b"x")):
        with pytest.raises(RuntimeError, match="committed"):
            use()
    assert house.read(sample.sop_instance_uid) == sample.data_set


def test_landing_files_are_private_and_sealed(house: House) -> None:
    """What lies in landing is 0600 in folders 0700, under random names, and ciphertext from the first byte."""
    sample = photograph(rows=1100, columns=1100, pixels=b"PLAINTEXT!" * 121_000)
    with house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
        intake.write(sample.data_set[:1_200_000])
        (path,) = house.landing_files()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)} == {0o700}
        assert len(path.read_bytes()) > 1_000_000
        assert b"PLAINTEXT!" not in path.read_bytes()


# --- when things below fail ------------------------------------------------------------------------------------------


def test_little_space_refuses_before_reading(houses: Build) -> None:
    """Below the reserve nothing is taken in: Unavailable, which the doors answer with 0xA700."""
    house = houses(min_free_bytes=1 << 62)
    with pytest.raises(Unavailable, match="reserve"):
        house.archive.receive(origin_of(), transfer_syntax_uid="1.2.840.10008.1.2.1")
    with pytest.raises(Unavailable, match="reserve"):
        house.archive.check()


@pytest.mark.parametrize(
    ("call", "number"), [("write", errno.ENOSPC), ("write", errno.EIO), ("fdatasync", errno.EIO), ("fsync", errno.EIO)]
)
def test_disk_errors_are_never_success(house: House, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """A failed write or flush is Unavailable, and after an I/O error the node is not ready any more (threats.md faults 18, 20)."""
    sample = photograph()
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid)
    intake.write(sample.data_set)

    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(Unavailable):
            intake.commit()
    with pytest.raises(InstanceNotFound):
        house.index.find(sample.sop_instance_uid)
    assert house.landing_files() == []
    if number == errno.EIO:
        with pytest.raises(Unavailable, match="I/O error"):
            house.archive.check()
        with pytest.raises(Unavailable, match="I/O error"):
            house.ingest(sample)
    else:
        house.archive.check()
        assert house.ingest(sample).outcome is Outcome.STORED


def test_database_gone_at_the_commit(houses: Build) -> None:
    """No receipt without the commit; the object stays without a row until it is swept; the sender's next try succeeds."""
    house = houses()
    sample = photograph()
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid)
    intake.write(sample.data_set)
    house.database.close()
    with pytest.raises(Unavailable):
        intake.commit()
    again = houses()
    assert again.landing_files() == []
    assert again.ingest(sample).outcome is Outcome.STORED
    assert again.archive.verify().intact


def test_refusal_stands_when_it_cannot_be_recorded(house: House) -> None:
    """An audit trail that cannot be written does not hide the reason from the sender."""
    intake = house.archive.receive(origin_of(), transfer_syntax_uid="1.2.840.10008.1.2.1")
    house.database.close()
    intake.write(photograph().data_set[:100])
    with pytest.raises(InvalidInstance):
        intake.commit()


def test_store_down_then_back(houses: Build, s3_bucket: Callable[[], tuple[str, str, Path]]) -> None:
    """With the store away nothing is acknowledged and nothing is left; the sender's next try succeeds (threats.md fault 9)."""
    endpoint, bucket, folder = s3_bucket()
    house = houses(store=S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", attempts=1))
    sample = photograph()
    moved = folder.rename(folder.with_name(f"{bucket}-away"))
    with pytest.raises(Unavailable, match="no such bucket"):
        house.ingest(sample)
    assert house.landing_files() == []
    assert list(house.index.all_objects()) == []
    moved.rename(folder)
    time.sleep(0.1)  # the service remembers for ten milliseconds that the bucket was gone
    assert house.ingest(sample).outcome is Outcome.STORED
    assert house.read(sample.sop_instance_uid) == sample.data_set


def object_file(house: House, sop_instance_uid: str) -> Path:
    """Return where a directory store keeps an instance."""
    key = house.index.find(sop_instance_uid).sealed.object_key
    return house.folder / "objects" / key[:2] / key


def spoil(path: Path, damage: str, other: Path) -> None:
    """Do to an object's file what disks and people do."""
    content = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(content[:-1])
        case "flipped":
            path.write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
        case "swapped":
            path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "swapped"])
def test_damage_is_an_alarm(house: House, damage: str) -> None:
    """A lost, cut, changed or exchanged object is never served; the audit trail has the alarm, verify names it (rows 23, 90)."""
    sample, other = photograph(), photograph()
    house.ingest(sample)
    house.ingest(other)
    path = object_file(house, sample.sop_instance_uid)
    spoil(path, damage, object_file(house, other.sop_instance_uid))
    with pytest.raises(IntegrityError):
        house.read(sample.sop_instance_uid)
    assert "instance.damaged" in house.actions()
    assert house.read(other.sop_instance_uid) == other.data_set
    found = house.archive.verify()
    assert not found.intact
    assert [*found.missing, *found.damaged] == [path.name]
    assert any(path.name in line for line in found.lines())


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "swapped"])
def test_a_second_sending_heals_a_damaged_object(house: House, damage: str) -> None:
    """Success for a duplicate says that a good copy is here: where the object is lost or rotten, what arrives takes its place."""
    sample, other = photograph(), photograph()
    house.ingest(sample)
    house.ingest(other)
    spoil(object_file(house, sample.sop_instance_uid), damage, object_file(house, other.sop_instance_uid))
    for job in house.queue.claim_some(JobKind.ANALYSE, owner="test", at_most=2):
        house.queue.fail(job, "the object is damaged", retryable=False)
    assert house.ingest(sample).outcome is Outcome.STORED
    assert [job.state for job in house.queue.jobs_of(sample.sop_instance_uid)] == [JobState.READY]  # its analysis died of the damage
    assert [job.state for job in house.queue.jobs_of(other.sop_instance_uid)] == [JobState.DEAD]
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert set(house.objects()) == {house.index.find(one.sop_instance_uid).sealed.object_key for one in (sample, other)}
    assert house.landing_files() == []
    assert "instance.healed" in house.actions()
    assert len(house.queue.jobs_of(sample.sop_instance_uid)) == 1
    assert house.archive.verify().intact
    assert house.ingest(sample).outcome is Outcome.DUPLICATE


# --- conclude and acknowledge ----------------------------------------------------------------------------------------


def concluded(house: House, sample: Sample, *, patient_id: str = "PID-1") -> list[Receipt]:
    """Claim the analysis of a sample and conclude it with one report."""
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    assert job.sop_instance_uid == sample.sop_instance_uid
    made = report(source=sample, sop=f"{sample.sop_instance_uid}1", patient_id=patient_id)
    new = NewReport(kind="summary", data_set=made.data_set, deliver_to=("pacs", "viewer"), models={"derm": "1 abc"})
    return house.archive.conclude(job, reports=[new], result={"status": "analysed"})


def test_conclude_is_one_transaction(either_house: House) -> None:
    """Commit 2: the report is archived and linked, one delivery per peer is queued, the job is done, the trail knows."""
    house = either_house
    sample = photograph()
    house.ingest(sample)
    (receipt,) = concluded(house, sample)
    assert receipt.outcome is Outcome.STORED
    record = house.index.find(receipt.sop_instance_uid)
    assert (record.role, record.origin.door) == ("report", "node")
    (linked,) = house.index.reports_of(sample.sop_instance_uid)
    assert (linked.sop_instance_uid, linked.kind, linked.models) == (receipt.sop_instance_uid, "summary", {"derm": "1 abc"})
    (job,) = house.queue.jobs_of(sample.sop_instance_uid)
    assert (job.state, job.result) == (JobState.DONE, {"status": "analysed"})
    deliveries = house.queue.jobs_of(receipt.sop_instance_uid)
    assert {(one.kind, one.lane, one.state) for one in deliveries} == {
        (JobKind.DELIVER, "pacs", JobState.READY),
        (JobKind.DELIVER, "viewer", JobState.READY),
    }
    assert house.actions() == ["instance.received", "report.concluded", "analysis.concluded"]
    assert house.archive.verify().intact


def test_conclude_may_run_twice(house: House) -> None:
    """A second run of the analysis (an operator's requeue) keeps one report and one delivery per peer."""
    sample = photograph()
    house.ingest(sample)
    (first,) = concluded(house, sample)
    (job,) = house.queue.jobs_of(sample.sop_instance_uid)
    assert house.archive.requeue(job_id=job.id) == 1
    (second,) = concluded(house, sample)
    assert second.outcome is Outcome.DUPLICATE
    assert second.sop_instance_uid == first.sop_instance_uid
    assert len(house.objects()) == 2
    assert len(house.queue.jobs_of(first.sop_instance_uid)) == 2
    assert house.landing_files() == []


def test_conclude_without_the_lease_keeps_nothing(houses: Build) -> None:
    """A worker that lost its lease changes nothing: no report, no delivery, no object."""
    house = houses()
    sample = photograph()
    house.ingest(sample)
    job = house.queue.claim(JobKind.ANALYSE, owner="slow")
    assert job is not None
    made = report(source=sample, sop=f"{sample.sop_instance_uid}1")
    with pytest.raises(LeaseLost):
        house.archive.conclude(
            replace(job, lease_token="0" * 32), reports=[NewReport("summary", made.data_set, deliver_to=("pacs",))], result={}
        )
    assert len(house.objects()) == 1
    assert house.index.reports_of(sample.sop_instance_uid) == []
    assert house.queue.jobs_of(made.sop_instance_uid) == []
    assert house.actions() == ["instance.received"]


def test_conclude_refuses_another_report_of_the_same_uid(house: House) -> None:
    """A second run that gives other bytes under the same UID is an error, not a silent replacement."""
    sample = photograph()
    house.ingest(sample)
    (first,) = concluded(house, sample)
    archived = house.read(first.sop_instance_uid)
    (job,) = house.queue.jobs_of(sample.sop_instance_uid)
    house.archive.requeue(job_id=job.id)
    claimed = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert claimed is not None
    other = report(source=sample, sop=first.sop_instance_uid, text=b"another finding")
    with pytest.raises(ConflictingInstance):
        house.archive.conclude(claimed, reports=[NewReport("summary", other.data_set)], result={})
    assert house.read(first.sop_instance_uid) == archived
    assert len(house.objects()) == 2
    assert house.landing_files() == []


def test_conclude_without_reports(house: House) -> None:
    """An analysis that gives no report still ends its job and is recorded."""
    sample = photograph()
    house.ingest(sample)
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    assert house.archive.conclude(job, reports=[], result={"status": "not analysable"}) == []
    assert house.queue.jobs_of(sample.sop_instance_uid)[0].state is JobState.DONE


def test_acknowledge_keeps_the_proof(house: House) -> None:
    """Commit 3: the destination's answer ends the job and is in the trail; without the lease nothing is written."""
    sample = photograph()
    house.ingest(sample)
    (receipt,) = concluded(house, sample)
    job = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier")
    assert job is not None
    with pytest.raises(LeaseLost):
        house.archive.acknowledge(replace(job, lease_token="0" * 32), status=0x0000)
    house.archive.acknowledge(job, status=0xB000, detail={"ae_title": "PACS"})
    done = next(one for one in house.queue.jobs_of(receipt.sop_instance_uid) if one.lane == "pacs")
    assert (done.state, done.result) == (JobState.DONE, {"status": "B000", "ae_title": "PACS"})
    (event,) = [entry.event for entry in house.audit.events_of(receipt.sop_instance_uid) if entry.event.action == "report.delivered"]
    assert (event.actor, event.detail["status"]) == ("pacs", "B000")


# --- care ------------------------------------------------------------------------------------------------------------


def test_verify_and_orphans(either_house: House, tmp_path: Path) -> None:
    """An object without a row is reported, stays without a grace period, stays while it is young, and goes when it is old."""
    house = either_house
    sample = photograph()
    house.ingest(sample)
    kept = house.objects()
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid)
    intake.write(photograph().data_set)
    record, _ = intake.seal()
    house.store.put(record.sealed.object_key, intake.landing_file.path, record.sealed)
    intake.abort()
    seen: list[tuple[int, int | None]] = []
    found = house.archive.verify(lambda done, total: seen.append((done, total)))
    assert found.intact
    assert found.unindexed == [record.sealed.object_key]
    assert seen == [(1, None)]
    assert house.archive.sweep() == 0
    assert house.archive.sweep(orphan_grace=timedelta(hours=1)) == 0
    assert len(house.objects()) == 2
    assert house.archive.sweep(orphan_grace=timedelta(seconds=-60)) == 1
    assert house.objects() == kept
    assert house.actions()[-1] == "archive.verified"


def test_sweep_spares_the_living(houses: Build) -> None:
    """A sweep takes what dead processes left, never what another living archive is writing (threats.md fault 50)."""
    alive, sweeper = houses(), houses()
    sample = photograph()
    intake = alive.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid)
    intake.write(sample.data_set)
    dead = alive.folder / "landing" / "0123456789abcdef"
    dead.mkdir()
    (dead / "left").write_bytes(b"ciphertext")
    assert sweeper.archive.sweep() == 1
    assert not dead.exists()
    assert len(alive.landing_files()) == 1
    assert intake.commit().outcome is Outcome.STORED
    assert alive.read(sample.sop_instance_uid) == sample.data_set


def test_landing_after_a_fork(house: House) -> None:
    """A forked child lands in a folder of its own, so that neither sweeps the other."""
    with house.archive.receive(origin_of(), transfer_syntax_uid="1.2.840.10008.1.2.1"):
        (mine,) = house.landing_files()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            house.archive._landing.create()
            os.write(writing, b"|".join(os.fsencode(path) for path in house.landing_files()))
            os._exit(0)
        os.waitpid(child, 0)
        theirs = [Path(os.fsdecode(path)) for path in os.read(reading, 4096).split(b"|")]
        os.close(reading)
        os.close(writing)
        assert len({path.parent for path in theirs}) == 2
        assert mine in theirs


def test_footer_rebuilds_the_record(house: House) -> None:
    """The record in an object's encrypted footer is the row: the index can be rebuilt from the store alone."""
    sample = photograph()
    house.ingest(sample, peer="clinic")
    record = house.index.find(sample.sop_instance_uid)
    with house.archive.open(sample.sop_instance_uid) as stored:
        footer = stored._opener.footer()
    assert footer_to_record(footer, record.sealed) == record
    assert record_to_footer(record.summary, record.origin, record.role) == footer
    with pytest.raises(ValueError, match="version 2"):
        footer_to_record(footer | {"version": 2}, record.sealed)


def test_trace_tells_the_whole_story(house: House) -> None:
    """By instance, series, study and report UID: from whom, what, where, which jobs, models, reports, deliveries and proofs; as JSON."""
    sample = photograph()
    house.ingest(sample, peer="clinic")
    (receipt,) = concluded(house, sample)
    job = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier")
    assert job is not None
    house.archive.acknowledge(job, status=0)
    for uid, level in ((sample.sop_instance_uid, "instance"), (sample.series_instance_uid, "series"), (sample.study_instance_uid, "study")):
        told = json.loads(json.dumps(house.archive.trace(uid)))
        assert told["level"] == level
        (instance,) = told["instances"]
        assert instance["received"]["peer"] == "clinic"
        assert instance["digest"] == house.index.find(sample.sop_instance_uid).summary.sha256
        assert instance["object"]["key"] in house.objects()
        assert [one["state"] for one in instance["jobs"]] == ["done"]
        (made,) = instance["reports"]
        assert made["models"] == {"derm": "1 abc"}
        assert {(one["lane"], one["state"], one["result"].get("status")) for one in made["deliveries"]} == {
            ("pacs", "done", "0000"),
            ("viewer", "ready", None),
        }
        assert [event["action"] for event in made["audit"]] == ["report.concluded", "report.delivered"]
    told = house.archive.trace(receipt.sop_instance_uid)
    assert told["instances"][0]["source_sop_instance_uid"] == sample.sop_instance_uid


def test_trace_of_what_was_refused_or_kept_aside(house: House) -> None:
    """A refused instance is found by its announced UID, one in quarantine by its own; a UID never heard of is not found."""
    sample = photograph()
    announced = Announced(sop_instance_uid="1.2.3")
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid, announced=announced)
    intake.write(sample.data_set)
    with pytest.raises(MismatchedInstance):
        intake.commit()
    assert house.archive.trace("1.2.3")["audit"][0]["action"] == "instance.refused"
    house.ingest(sample)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=sample.sop_instance_uid, study=sample.study_instance_uid))
    assert len(house.archive.trace(sample.sop_instance_uid)["quarantined"]) == 1
    with pytest.raises(InstanceNotFound):
        house.archive.trace("1.2.4")


def test_no_identity_in_any_file(house: House) -> None:
    """Name, ID and UIDs of the patient stand in no file under the data directory, in ASCII or UTF-16 (threats.md row 89)."""
    sample = photograph(name="Zanahoria^Quilla", patient_id="PATID-7391-XK")
    house.ingest(sample)
    concluded(house, sample, patient_id="PATID-7391-XK")
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=sample.sop_instance_uid, study=sample.study_instance_uid, patient_id="PATID-7391-XK"))
    words = ["Zanahoria", "PATID-7391-XK", sample.sop_instance_uid, sample.study_instance_uid, sample.series_instance_uid]
    needles = [word.encode(codec) for word in words for codec in ("ascii", "utf-16-le", "utf-16-be")]
    searched = 0
    for path in house.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            searched += len(content)
            assert not [needle for needle in needles if needle in content], path.name
            assert not [word for word in words if word in path.name]
    assert searched > 5_000
    if (house.folder / "node.db").exists():
        assert (house.folder / "node.db-wal").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_instance(tmp_path: Path) -> None:
    """Receiving a multi-frame instance of 1 GB grows resident memory by at most 64 MB."""
    program = """
import sys
from pathlib import Path
from tests.storage.house import build, origin_of
from tests.storage.samples import chunks_of_video, photograph

def resident(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

house = build(Path(sys.argv[1]))
house.ingest(photograph())
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
with house.archive.receive(origin_of(), transfer_syntax_uid="1.2.840.10008.1.2.1") as intake:
    for chunk in chunks_of_video(1 << 30):
        for start in range(0, len(chunk), 131072):
            intake.write(memoryview(chunk)[start : start + 131072])
    intake.commit()
print(resident("VmHWM") - before, next(house.index.all_objects()).byte_count)
house.close()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "house")], capture_output=True, text=True, check=True)
    growth_kib = int(done.stdout.split()[0])
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 1 << 30
    assert growth_kib <= 64 * 1024


# --- failpoints ------------------------------------------------------------------------------------------------------


def test_failpoint_grammar() -> None:
    """Nothing set means nothing armed; a setting that does not follow the grammar is refused with the grammar."""
    assert failpoint_from_environment({}) is unarmed
    for wrong in ("landing.flushed", "landing.flushed:0", "landing.flushed:1:explode", ":1", "a:1:kill:2"):
        with pytest.raises(ValueError, match="name:nth"):
            failpoint_from_environment({"DICOM_NODE_FAILPOINT": wrong})


def test_failpoint_kills_at_the_nth_time(tmp_path: Path) -> None:
    """The process dies by SIGKILL at the chosen step, not before."""
    program = """
import os
from storage.failpoints import failpoint_from_environment
reach = failpoint_from_environment(os.environ)
for number in range(5):
    print(number, flush=True)
    reach("other.step")
    reach("some.step")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DICOM_NODE_FAILPOINT": "some.step:3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9
    assert done.stdout.split() == ["0", "1", "2"]
