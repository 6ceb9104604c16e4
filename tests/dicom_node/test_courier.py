"""The courier: real queue, real archive, real associations; what is delivered, tried again, refused, and never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dicom_node.courier import Courier
from dicom_node.dimse.scu import StorageSCU
from dicom_node.peers import Peer, Peers
from storage.leases import Leases
from storage.records import Job, JobKind, JobState, NewJob, Origin
from tests.dicom_node.door import Door, Rooms, draw, encoded, open_door, open_rooms
from tests.dicom_node.scripted_peer import EXPLICIT
from tests.ports import free_port


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Rooms]:
    """An archive whose every admitted instance is to be delivered to the lanes of its study description."""
    (tmp_path / "house").mkdir()
    rooms = open_rooms(tmp_path / "house")
    yield rooms
    rooms.database.close()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Door]:
    """A peer to deliver to: another archive behind another door."""
    (tmp_path / "pacs").mkdir()
    rooms = open_rooms(tmp_path / "pacs")
    with open_door(rooms) as door:
        yield door
    rooms.database.close()


def closed_port() -> int:
    """A port where nobody listens."""
    return free_port()


def archived(house: Rooms, *lanes: str, data_set: Dataset | None = None) -> tuple[str, bytes]:
    """Archive a picture in the house, and enqueue its delivery to the lanes."""
    data_set = data_set or draw()
    data = encoded(data_set)
    origin = Origin(door="node", received_at=house.database.clock())
    with house.archive.receive(origin, transfer_syntax_uid=EXPLICIT) as intake:
        intake.write(data)
        intake.commit()
    for lane in lanes:
        job = NewJob(kind=JobKind.DELIVER, sop_instance_uid=data_set.SOPInstanceUID, lane=lane)
        house.database.write(lambda connection, job=job: house.queue.enqueue(connection, job))
    return str(data_set.SOPInstanceUID), data


def job_of(house: Rooms, uid: str, lane: str) -> Job:
    """The delivery of an instance to a lane."""
    (job,) = [job for job in house.queue.jobs_of(uid) if job.lane == lane]
    return job


def courier(house: Rooms, *peers: Peer, reach: Callable[[str], None] = lambda _: None, **settings: object) -> Courier:
    """A courier with short waits."""
    arguments: dict[str, object] = {"poll_s": 0.02, "batch": 8, **settings}
    return Courier(
        archive=house.archive,
        queue=house.queue,
        peers=Peers(peers),
        sender=StorageSCU(ae_title="DERM_NODE", connect_s=5.0, answer_s=5.0),
        reach=reach,
        **arguments,  # type: ignore[arg-type]
    )


@contextmanager
def running(courier: Courier) -> Iterator[None]:
    """Let a courier run for the length of a block."""
    stop = threading.Event()
    thread = threading.Thread(target=courier.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def wait_for(house: Rooms, condition: Callable[[], bool]) -> None:
    """Wait until the database has come to a state."""
    for _ in range(600):
        if condition():
            return
        house.database.changed(0.05)
    pytest.fail(f"did not come: {house.queue.counts()}")


def test_delivers_and_records_the_proof(house: Rooms, pacs: Door) -> None:
    """Reports arrive byte for byte on one association; each job is done with status and peer, and the audit trail says so."""
    sent = [archived(house, "pacs") for _ in range(3)]
    assert courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)).deliver("pacs") == 3
    assert pacs.events.counts["association.accepted"] == 1
    for uid, data in sent:
        with pacs.rooms.archive.open(uid) as stored:
            assert b"".join(stored.chunks()) == data
        job = job_of(house, uid, "pacs")
        assert job.state is JobState.DONE
        assert job.result == {"status": "0000", "peer": "pacs", "ae_title": "DERM_NODE"}
        assert "report.delivered" in {entry.event.action for entry in house.audit.events_of(uid)}


def test_a_peer_that_is_away_delays_no_other(house: Rooms, pacs: Door) -> None:
    """While one peer is unreachable, the other gets its reports; the first one's stay ready and arrive when it is back (faults 34, 37)."""
    uid, data = archived(house, "away", "pacs")
    port = closed_port()
    peers = (Peer("away", "DERM_NODE", "127.0.0.1", port), Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port))
    with running(courier(house, *peers)):
        wait_for(house, lambda: job_of(house, uid, "pacs").state is JobState.DONE)
        wait_for(house, lambda: "did not answer" in job_of(house, uid, "away").reason)
        assert job_of(house, uid, "away").state in (JobState.READY, JobState.CLAIMED, JobState.DEAD)
    back = courier(house, Peer("away", "DERM_NODE", "127.0.0.1", pacs.port))
    if job_of(house, uid, "away").state is JobState.DEAD:
        house.queue.requeue_dead(JobKind.DELIVER, lane="away")
    back.deliver("away")
    assert job_of(house, uid, "away").state is JobState.DONE
    with pacs.rooms.archive.open(uid) as stored:
        assert b"".join(stored.chunks()) == data


def test_refusal_ends_the_job_with_its_reason(house: Rooms, pacs: Door) -> None:
    """A refused instance is dead with the peer's status and words in its reason; the others of the batch arrive (fault 35)."""
    other, _ = archived(house, "pacs")
    unknown = draw(sop_class_uid="1.2.826.0.1.3680043.8.498.1")
    refused, _ = archived(house, "pacs", data_set=unknown)
    last, _ = archived(house, "pacs")
    pacs.scp._unknown_sop_classes = False
    courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)).deliver("pacs")
    job = job_of(house, refused, "pacs")
    assert job.state is JobState.DEAD
    assert "no presentation context" in job.reason
    (event,) = [entry.event for entry in house.audit.events_of(refused) if entry.event.action == "delivery.given_up"]
    assert (event.actor, event.outcome) == ("pacs", job.reason)
    assert [job_of(house, uid, "pacs").state for uid in (other, last)] == [JobState.DONE, JobState.DONE]


def test_a_duplicate_is_a_report_that_arrived(house: Rooms, pacs: Door) -> None:
    """A report's UID stands for its content: 0111 says that the peer has it, from a delivery whose answer was lost (fault 35)."""
    picture = draw()
    archived(pacs.rooms, data_set=picture)
    picture.PatientComments = "so that the door answers 0111"
    uid, _ = archived(house, "pacs", data_set=picture)
    courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)).deliver("pacs")
    job = job_of(house, uid, "pacs")
    assert job.state is JobState.DONE
    assert job.result["status"] == "0111"


def test_out_of_resources_is_tried_again(house: Rooms, pacs: Door) -> None:
    """A700 leaves the job ready, with one attempt spent."""
    uid, _ = archived(house, "pacs")
    pacs.rooms.database.close()
    courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)).deliver("pacs")
    job = job_of(house, uid, "pacs")
    assert (job.state, job.attempts) == (JobState.READY, 1)
    assert "A700" in job.reason


def test_peer_that_is_configured_no_more(house: Rooms) -> None:
    """A lane without a peer keeps its jobs, and says what to configure; so does a peer without an address."""
    uid, _ = archived(house, "gone", "roaming")
    one = courier(house, Peer("roaming", "R", "*"))
    one.deliver("gone")
    one.deliver("roaming")
    assert "`dicom-node peers add gone --ae-title TITLE --host HOST --port PORT`" in job_of(house, uid, "gone").reason
    assert "has no address" in job_of(house, uid, "roaming").reason
    assert {job.state for job in house.queue.jobs_of(uid)} == {JobState.READY}


def test_instance_that_is_not_there(house: Rooms, pacs: Door) -> None:
    """A job for an instance the archive does not hold is dead with the reason; the rest of the batch arrives."""
    job = NewJob(kind=JobKind.DELIVER, sop_instance_uid="1.2.3.4", lane="pacs")
    house.database.write(lambda connection: house.queue.enqueue(connection, job))
    uid, _ = archived(house, "pacs")
    courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)).deliver("pacs")
    assert job_of(house, "1.2.3.4", "pacs").state is JobState.DEAD
    assert job_of(house, uid, "pacs").state is JobState.DONE


def test_broken_association_releases_the_rest(house: Rooms, pacs: Door) -> None:
    """When the peer aborts at an instance, that one is tried again later, and those behind it are ready at once, no attempt spent."""
    pacs.scp._message_bytes = 50_000
    big, _ = archived(house, "pacs", data_set=draw(rows=300, columns=300))
    small, _ = archived(house, "pacs")
    there = courier(house, Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port))
    there.deliver("pacs")
    assert (job_of(house, big, "pacs").state, job_of(house, big, "pacs").attempts) == (JobState.READY, 1)
    assert (job_of(house, small, "pacs").state, job_of(house, small, "pacs").attempts) == (JobState.READY, 0)


def test_failpoints_stand_around_the_answer(house: Rooms, pacs: Door) -> None:
    """The named steps are reached in order, once an instance; at deliver.sent the house has no proof yet."""
    uid, _ = archived(house, "pacs")
    reached: list[tuple[str, JobState]] = []
    courier(
        house,
        Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port),
        reach=lambda name: reached.append((name, job_of(house, uid, "pacs").state)),
    ).deliver("pacs")
    assert reached == [("deliver.claimed", JobState.CLAIMED), ("deliver.sent", JobState.CLAIMED), ("deliver.answered", JobState.CLAIMED)]


def test_lost_acknowledgement_delivers_the_same_again(tmp_path: Path, pacs: Door) -> None:
    """A crash between answer and record sends the same instance again; the peer keeps one copy and the job ends (fault 38)."""
    (tmp_path / "short").mkdir()
    house = open_rooms(tmp_path / "short", lease_s=0.05)
    uid, _ = archived(house, "pacs")
    there = Peer("pacs", "DERM_NODE", "127.0.0.1", pacs.port)

    class Crash(Exception):
        pass

    def crash(name: str) -> None:
        if name == "deliver.answered":
            raise Crash

    with pytest.raises(Crash):
        courier(house, there, reach=crash).deliver("pacs")
    assert job_of(house, uid, "pacs").state is JobState.CLAIMED
    again = courier(house, there)
    wait_for(house, lambda: again.deliver("pacs") == 1)
    assert job_of(house, uid, "pacs").state is JobState.DONE
    assert pacs.rooms.count() == 1
    house.database.close()


def test_leases_are_renewed_while_a_batch_is_under_way(tmp_path: Path) -> None:
    """A batch that takes longer than the lease stays ours; a dropped job is renewed no more, and another may claim it."""
    house = open_rooms(tmp_path, lease_s=1.0)
    for _ in range(2):
        archived(house, "pacs")
    jobs = [house.queue.claim(JobKind.DELIVER, lane="pacs", owner="one") for _ in range(2)]
    held = [job for job in jobs if job is not None]
    with Leases(house.queue, held, every_s=0.1) as leases:
        assert leases.drop(held[0])
        assert not leases.drop(held[0])
        claimed: list[Job] = []

        def claim() -> bool:
            job = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="two")
            claimed.extend([job] if job is not None else [])
            return job is not None

        wait_for(house, claim)
        assert [job.id for job in claimed] == [held[0].id]
        assert [job.id for job in leases.held] == [held[1].id]
        assert not claim(), "the lease of the other one, claimed at the same time, was not renewed"
    house.database.close()


def test_stop_ends_the_threads(house: Rooms) -> None:
    """After stop no courier thread is left."""
    with running(courier(house)):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("courier")]
