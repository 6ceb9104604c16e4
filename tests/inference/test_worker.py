"""From a claimed job to its reports: once, the same again, after a crash, and when it cannot be done."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from inference.records import ImageAnalysis, Report, ReportContext
from inference.worker import Worker
from storage.records import Job, JobKind, JobState, Origin, ReportRecord
from storage.work import WorkQueue
from tests.inference import pictures
from tests.inference.laboratory import ingest, photograph, pipeline_of, worker_of, write_laboratory
from tests.storage.house import House, build


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Open an archive in a folder."""
    opened = build(tmp_path / "house")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a laboratory whose gates are open."""
    return write_laboratory(tmp_path_factory.mktemp("open"))


def job_of(house: House, sop_instance_uid: str) -> Job:
    """Give the only analysis of an instance."""
    (job,) = (job for job in house.queue.jobs_of(sop_instance_uid) if job.kind is JobKind.ANALYSE)
    return job


def later(house: House, minutes: float = 10) -> WorkQueue:
    """Give the queue as it will be seen in some minutes: delays are over and leases have run out."""
    return WorkQueue(database=house.database, clock=lambda: datetime.now(UTC) + timedelta(minutes=minutes))


def reports_of(house: House, sop_instance_uid: str) -> dict[str, ReportRecord]:
    """Give the reports about an instance by kind; there is one of each."""
    reports = house.index.reports_of(sop_instance_uid)
    assert len({report.kind for report in reports}) == len(reports)
    return {report.kind: report for report in reports}


def document(house: House, sop_instance_uid: str) -> Dataset:
    """Read an archived instance."""
    with house.archive.open(sop_instance_uid) as stored:
        return pydicom.dcmread(BytesIO(b"".join(stored.part10())))


def damaged(stream: bytes) -> bytes:
    """Wrap a stream that is no JPEG as one."""
    data_set = pydicom.dcmread(BytesIO(photograph()))
    data_set.PhotometricInterpretation = "YBR_FULL_422"
    return pictures.part10(data_set, pictures.JPEG_BASELINE, pydicom.encaps.encapsulate([stream]))


def test_an_instance_becomes_reports(house: House, bundles: Path) -> None:
    """One job: summary, findings and segmentation in the source's study, the job done with models and outcome, all in the audit trail."""
    receipt = ingest(house, photograph(), peer="clinic")
    asked: list[tuple[str, str]] = []

    def deliver_to(origin: Origin, kind: str) -> tuple[str, ...]:
        asked.append((origin.peer, kind))
        return ("pacs",) if kind == "summary" else ()

    worker = worker_of(house, pipeline_of(bundles), deliver_to=deliver_to)
    assert worker.work_once()
    assert not worker.work_once()

    job = job_of(house, receipt.sop_instance_uid)
    assert job.state is JobState.DONE
    assert job.result["outcome"] == "analysed"
    assert set(job.result["models"]) == {"test-quality", "test-domain", "test-diagnosis", "test-segmentation"}
    reports = reports_of(house, receipt.sop_instance_uid)
    assert set(reports) == {"summary", "findings", "segmentation"} == set(job.result["reports"])
    for report in reports.values():
        made = document(house, report.sop_instance_uid)
        assert made.StudyInstanceUID == receipt.study_instance_uid
        assert made.PatientID == "CANARY-ID"
        assert report.models == job.result["models"]
    assert asked == [("clinic", "summary"), ("clinic", "findings"), ("clinic", "segmentation")]
    (delivery,) = house.queue.jobs_of(reports["summary"].sop_instance_uid)
    assert (delivery.kind, delivery.lane) == (JobKind.DELIVER, "pacs")
    assert "analysis.concluded" in house.actions()


def test_a_second_run_gives_the_same_bytes(house: House, bundles: Path) -> None:
    """A requeued job makes the reports that are archived already, byte for byte; otherwise the archive would refuse them."""
    uid = ingest(house, photograph()).sop_instance_uid
    worker_of(house, pipeline_of(bundles)).work_once()
    before = reports_of(house, uid)
    objects = sorted(house.objects())
    first = job_of(house, uid)
    house.queue.requeue(first.id)
    assert worker_of(house, pipeline_of(bundles), queue=later(house)).work_once()
    second = job_of(house, uid)
    assert second.state is JobState.DONE
    assert second.result == first.result
    assert second.first_claimed_at == first.first_claimed_at
    assert reports_of(house, uid) == before
    assert sorted(house.objects()) == objects


@pytest.mark.parametrize(("acceptable", "shown"), [(False, "dermoscopic"), (True, "other")])
def test_a_refused_picture_is_a_result(house: House, tmp_path: Path, *, acceptable: bool, shown: str) -> None:
    """What a gate refused ends done, with a summary and nothing else."""
    uid = ingest(house, photograph()).sop_instance_uid
    worker_of(house, pipeline_of(write_laboratory(tmp_path / "shut", acceptable=acceptable, shown=shown))).work_once()
    job = job_of(house, uid)
    assert job.state is JobState.DONE
    assert job.result["outcome"] == "refused"
    assert job.result["frames"] == [{"number": 1, "valid": False}]
    assert set(reports_of(house, uid)) == {"summary"}


def rewrapped(**attributes: Any) -> bytes:
    """Change attributes of the photograph; its pixels become a zero for each sample of every frame."""
    data_set = pydicom.dcmread(BytesIO(photograph()))
    for keyword, value in attributes.items():
        setattr(data_set, keyword, value)
    size = data_set.Rows * data_set.Columns * data_set.SamplesPerPixel * int(data_set.get("NumberOfFrames", 1))
    return pictures.part10(data_set, pictures.EXPLICIT, bytes(size))


def test_a_grey_picture_gets_a_summary_that_says_so(house: House, bundles: Path) -> None:
    """A job for a grey picture, should one be made, ends with a summary in which nothing was found."""
    uid = ingest(house, rewrapped(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")).sop_instance_uid
    worker_of(house, pipeline_of(bundles)).work_once()
    job = job_of(house, uid)
    assert job.state is JobState.DONE, job.reason
    assert (job.result["outcome"], job.result["frames"]) == ("refused", [])
    assert "no colour" in job.result["failures"][0]
    assert set(reports_of(house, uid)) == {"summary"}


def test_frames_are_analysed_one_by_one_up_to_the_limit(house: House, bundles: Path) -> None:
    """A multi-frame secondary capture: the first frames, and the report is partial because there were more."""
    part10 = rewrapped(SOPClassUID="1.2.840.10008.5.1.4.1.1.7.4", NumberOfFrames=3, Rows=32, Columns=32)
    uid = ingest(house, part10).sop_instance_uid
    worker_of(house, pipeline_of(bundles, max_frames=2)).work_once()
    job = job_of(house, uid)
    assert job.state is JobState.DONE, job.reason
    assert [frame["number"] for frame in job.result["frames"]] == [1, 2]
    assert document(house, job.result["reports"]["summary"]).CompletionFlag == "PARTIAL"


@pytest.mark.parametrize(
    ("part10", "options", "words"),
    [
        (damaged(b"\xff\xd8\xff\xe0 no picture at all"), {}, "JPEG"),
        (photograph(), {"max_pixels": 100}, "pixels"),
        (photograph(), {"max_bytes": 1000}, "bytes"),
    ],
    ids=["damaged", "too many pixels", "too many bytes"],
)
def test_what_cannot_be_decoded_is_refused_at_once(house: House, bundles: Path, part10: bytes, options: dict[str, Any], words: str) -> None:
    """No second try: the job is dead with the reason, the audit trail has it, and there is no report."""
    uid = ingest(house, part10).sop_instance_uid
    assert worker_of(house, pipeline_of(bundles), **options).work_once()
    job = job_of(house, uid)
    assert (job.state, job.attempts) == (JobState.DEAD, 1)
    assert words in job.reason
    assert house.index.reports_of(uid) == []
    (event,) = [entry.event for entry in house.audit.events_of(uid) if entry.event.action == "analysis.refused"]
    assert event.outcome == job.reason


def test_a_model_that_fails_is_tried_again(house: House, tmp_path: Path, bundles: Path) -> None:
    """An operator can mend a model: the job waits, and a worker with a good model concludes it."""
    overflowing = {"rows": 64, "columns": 64, "aspect": "squeeze", "mean": [0.0] * 3, "deviation": [1e-38] * 3}
    uid = ingest(house, photograph()).sop_instance_uid
    broken = write_laboratory(tmp_path / "broken", quality={"input": overflowing})
    assert worker_of(house, pipeline_of(broken)).work_once()
    waiting = job_of(house, uid)
    assert waiting.state is JobState.READY
    assert "not finite" in waiting.reason
    assert worker_of(house, pipeline_of(bundles), queue=later(house)).work_once()
    assert job_of(house, uid).state is JobState.DONE


def test_an_outage_uses_up_no_tries(house: House, bundles: Path) -> None:
    """The store is away, then the disk full, for as long as you like: the job waits with the reason, and ends well once both are back."""
    uid = ingest(house, photograph()).sop_instance_uid
    objects, aside = house.folder / "objects", house.folder / "aside"
    key = house.objects()[0]
    events: list[str] = []

    def try_again(minutes: float) -> Job:
        options = {"queue": later(house, minutes), "observe": lambda event, **_: events.append(event)}
        assert worker_of(house, pipeline_of(bundles), **options).work_once()
        return job_of(house, uid)

    (objects / key[:2]).rename(aside)
    (objects / key[:2]).touch()  # a file where the folder was: neither there nor gone
    for minutes in range(10, 50, 10):
        job = try_again(minutes)
        assert (job.state, job.attempts) == (JobState.READY, 0)
        assert "objects" in job.reason
    (objects / key[:2]).unlink()
    aside.rename(objects / key[:2])
    landing = house.archive._landing
    reserve, landing._min_free_bytes = landing._min_free_bytes, 1 << 62
    for minutes in range(50, 90, 10):
        job = try_again(minutes)
        assert (job.state, job.attempts) == (JobState.READY, 0)
        assert "free" in job.reason
    landing._min_free_bytes = reserve
    assert events == ["analysis.postponed"] * 8
    assert try_again(100).state is JobState.DONE
    assert set(reports_of(house, uid)) == {"summary", "findings", "segmentation"}


def test_a_fault_of_the_program_names_no_patient(house: House, bundles: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error may quote the header: neither the job nor the log repeats it, and after three tries the job is dead."""
    uid = ingest(house, photograph()).sop_instance_uid

    def broken(header: Dataset, _analysis: ImageAnalysis, _context: ReportContext) -> Sequence[Report]:
        raise KeyError(str(header.PatientName))

    for minutes in (0, 60, 600):
        worker = worker_of(house, pipeline_of(bundles), queue=later(house, minutes))
        worker._reports = broken
        assert worker.work_once()
    job = job_of(house, uid)
    assert job.state is JobState.DEAD
    assert "KeyError" in job.reason
    assert "analysis.refused" in house.actions()
    assert "KeyError" in caplog.text
    assert "Canary" not in caplog.text + job.reason
    assert uid not in caplog.text


def test_a_lost_lease_drops_the_result(house: House, bundles: Path) -> None:
    """A worker that was away too long leaves no trace; the other one's result stands."""
    uid = ingest(house, photograph()).sop_instance_uid
    other = worker_of(house, pipeline_of(bundles), queue=later(house))

    def away(name: str) -> None:
        if name == "report.built":
            assert other.work_once()

    assert worker_of(house, pipeline_of(bundles), reach=away).work_once()
    job = job_of(house, uid)
    assert (job.state, job.attempts) == (JobState.DONE, 2)
    assert house.actions().count("analysis.concluded") == 1
    assert set(reports_of(house, uid)) == {"summary", "findings", "segmentation"}
    assert len(house.objects()) == 4


def test_a_lost_lease_ends_the_work_early(house: House, bundles: Path) -> None:
    """Once a heartbeat was refused nothing more is computed."""
    ingest(house, photograph())
    reached: list[str] = []

    def away(name: str) -> None:
        reached.append(name)
        if name == "analyse.claimed":
            assert later(house).claim(JobKind.ANALYSE, owner="other") is not None
        if name == "analyse.decoded":
            deadline = time.monotonic() + 30
            while any(thread.name.startswith("lease of job") for thread in threading.enumerate()) and time.monotonic() < deadline:
                time.sleep(0.01)

    assert worker_of(house, pipeline_of(bundles), reach=away, heartbeat_s=0.02).work_once()
    assert reached == ["analyse.claimed", "analyse.decoded"]


def test_the_lease_is_renewed_while_the_work_lasts(house: House, bundles: Path) -> None:
    """A slow analysis keeps its job."""
    uid = ingest(house, photograph()).sop_instance_uid
    due: list[datetime | None] = []

    def slow(name: str) -> None:
        if name == "analyse.decoded":
            due.append(job_of(house, uid).available_at)
            deadline = time.monotonic() + 30
            while job_of(house, uid).available_at == due[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            due.append(job_of(house, uid).available_at)

    assert worker_of(house, pipeline_of(bundles), reach=slow, heartbeat_s=0.05).work_once()
    first, second = due
    assert first is not None
    assert second is not None
    assert second > first
    assert job_of(house, uid).state is JobState.DONE


def test_a_new_model_replaces_the_report_and_names_it(house: House, bundles: Path, tmp_path: Path) -> None:
    """Other models, other UIDs; each new report names the one before, and an old configuration run again still makes its own bytes."""
    uid = ingest(house, photograph()).sop_instance_uid
    worker_of(house, pipeline_of(bundles)).work_once()
    old = reports_of(house, uid)["summary"]
    upgraded = write_laboratory(tmp_path / "new", diagnosis={"version": "0.2"})
    house.queue.requeue(job_of(house, uid).id)
    worker_of(house, pipeline_of(upgraded), queue=later(house)).work_once()
    new = job_of(house, uid).result["reports"]["summary"]
    assert new != old.sop_instance_uid
    predecessor = document(house, new).PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert predecessor.ReferencedSOPInstanceUID == old.sop_instance_uid
    for folder in (bundles, upgraded):
        house.queue.requeue(job_of(house, uid).id)
        worker_of(house, pipeline_of(folder), queue=later(house, 20)).work_once()
        assert job_of(house, uid).state is JobState.DONE, job_of(house, uid).reason
    assert len([report for report in house.index.reports_of(uid) if report.kind == "summary"]) == 2


POINTS = (
    "analyse.claimed",
    "analyse.decoded",
    "analyse.predicted",
    "report.built",
    "report.stored",
    "conclude.written",
    "conclude.committed",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> Path:
    """Make a house for each failpoint, in which a worker was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    for point in POINTS:
        opened = build(folder / point)
        ingest(opened, photograph())
        opened.close()
    command = [sys.executable, "-m", "tests.inference.laboratory", str(bundles), str(folder), *POINTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [word for point in POINTS for word in (point, str(-signal.SIGKILL))]
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_worker_loses_and_doubles_nothing(killed: Path, bundles: Path, point: str) -> None:
    """SIGKILL at any step: the next worker takes the job when the lease has run out, and there is one report of each kind."""
    opened = build(killed / point)
    try:
        uid = pydicom.dcmread(BytesIO(photograph())).SOPInstanceUID
        assert job_of(opened, uid).state is (JobState.DONE if point == "conclude.committed" else JobState.CLAIMED)
        assert worker_of(opened, pipeline_of(bundles), queue=later(opened)).work_once() == (point != "conclude.committed")
        assert job_of(opened, uid).state is JobState.DONE
        assert set(reports_of(opened, uid)) == {"summary", "findings", "segmentation"}
        assert opened.actions().count("analysis.concluded") == 1
    finally:
        opened.close()


def test_it_works_until_told_to_stop(house: House, bundles: Path) -> None:
    """Three instances are analysed, and the loop ends when asked."""
    uids = [ingest(house, photograph(seed)).sop_instance_uid for seed in range(3)]
    stop = threading.Event()
    concluded: list[str] = []

    def observe(event: str, **_: Any) -> None:
        concluded.append(event)
        if len(concluded) == 3:
            stop.set()

    run_to_the_end(worker_of(house, pipeline_of(bundles), observe=observe, poll_s=0.01), stop)
    assert concluded == ["analysis.concluded"] * 3
    assert all(job_of(house, uid).state is JobState.DONE for uid in uids)


def run_to_the_end(worker: Worker, stop: threading.Event) -> None:
    """Run a worker in a thread until it ends by itself."""
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    thread.join(120)
    assert not thread.is_alive()


def test_a_database_that_is_away_is_waited_for(house: House, bundles: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loop survives a queue that cannot be asked, and says so."""
    house.database.close()
    stop = threading.Event()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            stop.set()

    run_to_the_end(worker_of(house, pipeline_of(bundles), wait=wait), stop)
    assert len(waits) == 2
    assert "worker.queue_unavailable" in caplog.text
