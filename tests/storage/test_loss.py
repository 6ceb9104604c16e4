"""The loss of a node: what lay on its disk alone comes to a declared end, and nothing waits for it for ever."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from dicomweb.errors import from_storage
from storage.errors import ConflictingInstance, InstanceNotFound, LostObject, StorageError, Unavailable
from storage.loss import Loss, Losses
from storage.nodes import Incarnation, Nodes
from storage.records import Job, JobKind, JobState, NewReport, Outcome
from tests.faults.lying_s3 import LyingS3, error
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import Sample, photograph, report
from tests.storage.test_erasure import concluded
from tests.storage.test_mover import mover_of, store_of

FIRST = Incarnation("first")
DEAD, ALIVE = "00000000000000aa", "00000000000000bb"
TOLD = {"node_id": DEAD, "incarnation": FIRST, "host": "one", "data_dir": "/data", "version": "1"}


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingS3]:
    """A bucket that lies when told to."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    with LyingS3() as service:
        yield service


@pytest.fixture
def dead(houses: Build, lying: LyingS3) -> House:
    """The node that will be lost; registered, stopped."""
    house = houses(store=store_of(lying), node_id=DEAD)
    nodes_of(house).enter(**TOLD)
    nodes_of(house).leave(DEAD, FIRST)
    return house


@pytest.fixture
def alive(houses: Build, lying: LyingS3, dead: House) -> House:
    """Another node on the same database and bucket. Its spool is the same folder, which `burnt` empties."""
    return houses(store=store_of(lying), node_id=ALIVE)


def nodes_of(house: House) -> Nodes:
    """Return the register, which waits for nothing."""
    return Nodes(database=house.database, wait=lambda _: None)


def burnt(house: House) -> None:
    """Destroy the disk of the node."""
    for path in (house.folder / "landed").rglob("*"):
        if path.is_file():
            path.unlink()


def declared(house: House) -> Losses:
    """Declare the node lost, at the other."""
    parts = {"database": house.database, "index": house.index, "queue": house.queue, "audit": house.audit}
    return Loss(**parts, places=house.archive.places, nodes=nodes_of(house)).declare(DEAD, actor="operator")


def jobs(house: House, uid: str, kind: JobKind) -> list[Job]:
    """Return the jobs of a kind about an instance."""
    return [job for job in house.queue.jobs_of(uid) if job.kind is kind]


def bring_all(house: House) -> None:
    """Have the Mover do all that there is."""
    while mover_of(house).bring_once():
        pass


def nothing_waits(house: House) -> bool:
    """Whether no job is ready or claimed whose home is the lost node."""
    with house.database.read() as connection:
        statement = f"SELECT count(*) FROM jobs WHERE home = '{DEAD}' AND due_at IS NOT NULL"  # noqa: S608
        return connection.exec_driver_sql(statement).scalar() == 0


@pytest.mark.parametrize("policy", ["land", "archive"])
def test_what_is_gone_is_lost_by_name_and_comes_back_when_it_is_sent_again(
    houses: Build, lying: LyingS3, dead: House, alive: House, policy: str
) -> None:
    """Its jobs are dead, the trail and the register say so; sent again it takes its place, is brought and analysed like any other."""
    sample = photograph()
    dead.ingest(sample)
    burnt(dead)
    assert nodes_of(alive).lying()[DEAD].waiting == 1
    assert declared(alive) == Losses(lost=1)
    assert nothing_waits(alive)
    assert {job.state for job in alive.queue.jobs_of(sample.sop_instance_uid)} == {JobState.DEAD}
    assert [alive.queue.requeue_dead(kind) for kind in (JobKind.ANALYSE, JobKind.ARCHIVE)] == [0, 0]
    for job in alive.queue.jobs_of(sample.sop_instance_uid):
        with pytest.raises(StorageError, match="declared lost: send the instance again"):
            alive.queue.requeue(job.id)
    assert nothing_waits(alive)
    assert (nodes_of(alive).lying()[DEAD].waiting, nodes_of(alive).lying()[DEAD].lost) == (0, 1)
    assert declared(alive) == Losses()
    assert alive.actions().count("instance.lost") == 1
    assert {job["state"] for job in alive.archive.trace(sample.sop_instance_uid)["instances"][0]["jobs"]} == {"dead"}
    with pytest.raises(LostObject, match="declared lost: have the instance sent again") as gone:
        alive.read(sample.sop_instance_uid)
    assert from_storage(gone.value).status == 410
    again = houses(store=store_of(lying), node_id=ALIVE, acknowledge=lambda _: policy)
    assert again.ingest(sample).outcome is Outcome.STORED
    assert again.read(sample.sop_instance_uid) == sample.data_set
    assert nodes_of(again).lying().get(DEAD) is None
    concluded(again, sample)
    bring_all(again)
    assert again.archive.verify().intact
    assert nothing_waits(again)


def test_what_is_lost_is_told_from_what_is_elsewhere(dead: House, alive: House) -> None:
    """`verify` and scrub: until it is declared, the object is on another node's disk; then it is lost by name, and not whole."""
    sample = photograph()
    dead.ingest(sample)
    burnt(dead)
    with pytest.raises(Unavailable, match="start that node, or wait for it") as waiting:
        alive.read(sample.sop_instance_uid)
    assert not isinstance(waiting.value, LostObject)
    found, round_ = alive.archive.verify(), alive.archive.scrub().round()
    assert (found.checked, found.elsewhere, found.lost, found.intact) == (1, 1, [], True)
    assert (round_.checked, round_.elsewhere, round_.lost) == (0, 1, 0)
    declared(alive)
    found, round_ = alive.archive.verify(), alive.archive.scrub().round()
    key = alive.index.find(sample.sop_instance_uid).sealed.object_key
    assert (found.checked, found.elsewhere, found.lost, found.intact) == (0, 0, [key], False)
    assert f"object {key} was lost with the disk of its node: have the instance sent again" in found.lines()
    assert (round_.checked, round_.elsewhere, round_.lost) == (0, 0, 1)
    assert "instance.damaged" not in alive.actions()


def test_what_the_store_has_is_found(dead: House, alive: House, lying: LyingS3) -> None:
    """The node died between putting the object and saying so: it is in the store, and everyone may work on it."""
    sample = photograph()
    dead.ingest(sample)
    job = dead.queue.claim(JobKind.ARCHIVE, owner="mover")
    assert job is not None
    assert dead.archive.carry(job) is not None  # and no `arrived`
    burnt(dead)
    assert declared(alive) == Losses(found=1)
    assert alive.index.find(sample.sop_instance_uid).landed_on == ""
    assert alive.read(sample.sop_instance_uid) == sample.data_set
    concluded(alive, sample)
    bring_all(alive)
    assert nothing_waits(alive)
    assert "instance.lost" not in alive.actions()
    assert alive.archive.verify().intact


def test_what_was_saved_from_the_disk_is_brought_by_another_node(dead: House, alive: House) -> None:
    """The files of the dead node's spool were put into that of another: that node has them now, analyses and brings them."""
    samples = [photograph() for _ in range(3)]
    for sample in samples:
        dead.ingest(sample)
    assert declared(alive) == Losses(found=3)
    assert {alive.index.find(sample.sop_instance_uid).landed_on for sample in samples} == {ALIVE}
    for sample in samples:
        concluded_any(alive, samples)
        assert alive.read(sample.sop_instance_uid) == sample.data_set
    bring_all(alive)
    assert {alive.index.find(sample.sop_instance_uid).landed_on for sample in samples} == {""}
    assert nothing_waits(alive)
    assert alive.archive.verify().intact


def concluded_any(house: House, samples: list[Sample]) -> None:
    """Analyse whichever is next."""
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    made = report_of(next(sample for sample in samples if sample.sop_instance_uid == job.sop_instance_uid))
    house.archive.conclude(job, reports=[NewReport("summary", made.data_set, deliver_to=("pacs",))], result={})


def report_of(source: Sample) -> Sample:
    """Draw the report of a sample."""
    return report(source=source, sop=f"{source.sop_instance_uid}1")


@pytest.mark.parametrize("delivered", [True, False])
def test_reports_that_are_nowhere_are_made_again(dead: House, alive: House, delivered: bool) -> None:
    """Their source is in the store: the analysis runs again, to the same UID; what was delivered is not delivered twice."""
    sample = photograph()
    dead.ingest(sample)
    bring_all(dead)
    uid = concluded(dead, sample)
    if delivered:
        delivery = dead.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier")
        assert delivery is not None
        dead.archive.acknowledge(delivery, status=0)
    burnt(dead)
    assert declared(alive) == Losses(reports=1)
    with pytest.raises(InstanceNotFound):
        alive.index.find(uid)
    assert concluded(alive, sample) == uid
    assert delivered or [job.home for job in jobs(alive, uid, JobKind.DELIVER)] == [ALIVE]
    bring_all(alive)
    assert alive.index.find(uid).landed_on == ""
    (delivery,) = jobs(alive, uid, JobKind.DELIVER)
    assert delivery.state is (JobState.DONE if delivered else JobState.READY)
    assert delivered or alive.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier") is not None
    assert nothing_waits(alive)
    assert alive.archive.verify().intact


def test_a_report_and_its_source_gone_are_made_again_when_the_source_comes(dead: House, alive: House) -> None:
    """Concluded, and both lost: sent again, the instance is analysed again."""
    sample = photograph()
    dead.ingest(sample)
    uid = concluded(dead, sample)
    burnt(dead)
    assert declared(alive) == Losses(lost=1, reports=1)
    assert nothing_waits(alive)
    assert alive.queue.claim(JobKind.ANALYSE, owner="test") is None
    alive.ingest(sample)
    assert concluded(alive, sample) == uid
    bring_all(alive)
    assert alive.archive.verify().intact


def test_what_was_in_quarantine_is_kept_aside_again_when_it_comes_again(dead: House, alive: House) -> None:
    """The row of a quarantined instance that is gone goes: the sender's next try is kept aside, with an object."""
    sample = photograph()
    dead.ingest(sample)
    bring_all(dead)
    other = photograph(sop=sample.sop_instance_uid, study=sample.study_instance_uid)
    with pytest.raises(ConflictingInstance):
        dead.ingest(other)
    burnt(dead)
    assert declared(alive) == Losses(quarantined=1)
    assert alive.index.quarantined() == []
    with pytest.raises(ConflictingInstance):
        alive.ingest(other)
    bring_all(alive)
    (kept,) = alive.index.quarantined()
    assert kept.record.landed_on == ""
    assert nothing_waits(alive)
    assert alive.archive.verify().intact


def test_a_node_that_comes_back_all_the_same_goes_on(dead: House, alive: House) -> None:
    """Declared lost too early: its disk was elsewhere. It starts again, its jobs are ready, its objects are brought, none is deleted."""
    sample, again = photograph(), photograph()
    for one in (sample, again):
        dead.ingest(one)
    kept = dead.folder / "kept"
    shutil.copytree(dead.folder / "landed", kept)
    burnt(dead)
    assert declared(alive).lost == 2
    alive.ingest(again)
    bring_all(alive)
    shutil.copytree(kept, dead.folder / "landed", dirs_exist_ok=True)
    nodes_of(dead).enter(**TOLD)
    assert [node.state for node in nodes_of(dead).all()] == ["seen"]
    dead.archive.orphans().sweep_spool(grace=timedelta(minutes=-1))
    assert dead.read(sample.sop_instance_uid) == sample.data_set
    bring_all(dead)
    assert {job.state for job in jobs(dead, sample.sop_instance_uid, JobKind.ANALYSE)} == {JobState.READY}
    for one in (sample, again):
        assert alive.read(one.sop_instance_uid) == one.data_set
        assert alive.index.find(one.sop_instance_uid).landed_on == ""
    assert nodes_of(alive).lying() == {}
    assert alive.archive.verify().intact
    assert "node.returned" in alive.actions()


def test_an_accepted_instance_replaces_one_that_was_lost(dead: House, alive: House) -> None:
    """What was lost is not kept aside, as if its node brought it yet; the trail says so, and nothing waits for the node."""
    lost = photograph()
    dead.ingest(lost)
    burnt(dead)
    assert declared(alive).lost == 1
    other = photograph(sop=lost.sop_instance_uid, study=lost.study_instance_uid)
    with pytest.raises(ConflictingInstance):
        alive.ingest(other)
    (aside,) = alive.archive.quarantine().all()
    alive.archive.quarantine().accept(aside.id, actor="operator", reason="the other is lost")
    assert alive.archive.quarantine().all() == []
    assert nothing_waits(alive)
    assert nodes_of(alive).lying().get(DEAD) is None
    assert alive.actions()[-2:] == ["quarantine.lost", "quarantine.accepted"]
    bring_all(alive)
    assert alive.read(lost.sop_instance_uid) == other.data_set
    assert alive.archive.verify().intact


def test_what_cannot_be_asked_is_not_lost(dead: House, alive: House, lying: LyingS3) -> None:
    """With the bucket away nothing is said of any object; the same command later does it."""
    sample = photograph()
    dead.ingest(sample)
    burnt(dead)
    lying.fail(error(500, "InternalError"))
    with pytest.raises(Unavailable):
        declared(alive)
    assert "instance.lost" not in alive.actions()
    lying.heal()
    assert declared(alive) == Losses(lost=1)


def test_ones_own_node_is_not_lost(dead: House) -> None:
    """Where the disk is, its Mover is what helps."""
    with pytest.raises(StorageError, match="is this one"):
        declared(dead)


def test_a_moved_folder_is_the_same_node(
    houses: Build, lying: LyingS3, tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    """The machine died, its disk is mounted elsewhere: the node there is the same one, and brings what had landed."""
    url = {"database_url": request.getfixturevalue("postgresql_database")()} if engine == "postgresql" else {}
    dead, sample = houses(store=store_of(lying), node_id=DEAD, **url), photograph()
    nodes_of(dead).enter(**TOLD)
    dead.ingest(sample)
    dead.close()
    dead.folder.rename(tmp_path / "elsewhere")
    moved = houses("elsewhere", store=store_of(lying), node_id=DEAD, **url)
    nodes_of(moved).enter(**TOLD | {"host": "two", "data_dir": "/elsewhere"})
    assert moved.read(sample.sop_instance_uid) == sample.data_set
    concluded(moved, sample)
    bring_all(moved)
    assert moved.index.find(sample.sop_instance_uid).landed_on == ""
    assert moved.archive.verify().intact
