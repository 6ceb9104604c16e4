"""What the fault tests do in the process that is hit, and how they judge the folder afterwards.

Everything derives from a seed, so that the judge knows every byte that was sent without having been told.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from storage.errors import LeaseLost, StorageError
from storage.failpoints import unarmed
from storage.keys import Ring
from storage.mover import Mover
from storage.records import Job, JobKind, JobState, NewReport, Outcome
from tests.faults.site import Site
from tests.storage.house import House
from tests.storage.samples import Sample, photograph, report

PEERS = ("pacs", "viewer")
INTAKE_STEPS = (
    "intake.opened", "intake.first_chunk", "intake.sealed", "landing.flushed", "object.renamed", "directory.flushed",
    "index.begin", "index.written", "index.committed", "receipt.ready",
)  # fmt: skip
MOVE_STEPS = ("bring.claimed", "bring.key_published", "bring.put", "bring.written", "bring.committed", "bring.settled")
ROTATE_STEPS = ("rotate.wrapped", "rotate.document", "rotate.row")
WORK_STEPS = ("report.stored", "conclude.begin", "conclude.written", "conclude.committed", "acknowledge.committed")


def sample(seed: int) -> Sample:
    """Return the instance of a seed: mostly small, every eighth longer than one sealed segment."""
    rng = random.Random(seed)
    rows, columns = (1100, 1100) if seed % 8 == 7 else rng.choice(((16, 16), (64, 128)))
    uid = f"2.25.1{seed:020d}"
    return photograph(sop=f"{uid}.1", series=f"{uid}.2", study=f"{uid}.3", pixels=rng.randbytes(rows * columns), rows=rows, columns=columns)


def seed_of(sop_instance_uid: str) -> int:
    """Return the seed whose instance has this UID."""
    return int(sop_instance_uid.split(".")[2][1:])


def report_of(seed: int) -> Sample:
    """Return the report that an analysis of the seed's instance makes, every time the same bytes."""
    source = sample(seed)
    return report(source=source, sop=f"{source.study_instance_uid}.9", text=hashlib.sha256(source.data_set).hexdigest().encode())


def work_off(house: House, say: Callable[[str], None] = lambda _: None, *, reach: Callable[[str], None] = unarmed) -> None:
    """Bring what landed, conclude every analysis and acknowledge every delivery that is due, as Mover, worker and courier do."""
    mover = Mover(archive=house.archive, queue=house.queue, reach=reach)
    while mover.bring_once():
        continue
    while (job := house.queue.claim(JobKind.ANALYSE, owner="harness")) is not None:
        seed = seed_of(job.sop_instance_uid)
        made = NewReport("summary", report_of(seed).data_set, deliver_to=PEERS, models={"harness": "1"})
        _unless_lost(house.archive.conclude, job, reports=[made], result={"seed": seed})
        say(f"concluded {seed}")
    for peer in PEERS:
        while (job := house.queue.claim(JobKind.DELIVER, lane=peer, owner="harness")) is not None:
            _unless_lost(house.archive.acknowledge, job, status=0)
    while mover.bring_once():  # the reports
        continue


def rotate(house: House) -> None:
    """Change the wrapping key, and take the former ones out of the ring where nothing needs them any more."""
    ring_file = house.folder / "keys.json"
    Ring.add(ring_file)
    house.ring.holds("")  # looks at the file at once
    house.study_keys.rotate(put_document=house.store.put_document, delete_document=house.store.delete_document)
    for key in Ring.shown(ring_file):
        if not key.primary:
            house.study_keys.retire(key.key_id)


def _unless_lost(step: Callable[..., object], job: Job, **arguments: object) -> None:
    with suppress(LeaseLost):  # another thread of this process finished it
        step(job, **arguments)


def run(
    folder: Path,
    seeds: Iterable[int],
    say: Callable[[str], None],
    *,
    reach: Callable[[str], None] = unarmed,
    threads: int = 1,
    honest: bool = True,
    tolerant: bool = False,
    site: Site = Site(),  # noqa: B008 - frozen
) -> None:
    """Be the node: receive the seeds' instances, saying ``stored SEED DIGEST`` after each receipt, and work the jobs off.

    The negative control is not `honest`: it says so before the commit, as many a receiver does. One that is `tolerant` goes on after a
    refusal, as the doors do; any other error still ends it.
    """
    refusal: tuple[type[StorageError], ...] = (StorageError,) if tolerant else ()
    try:
        house = site.open(folder, reach=reach)
        house.archive.sweep()
    except refusal:
        return  # it says why it cannot start; whoever starts it tries again
    seeds = list(seeds)

    def receive(mine: list[int]) -> None:
        for seed in mine:
            if not honest:
                say(f"stored {seed} {hashlib.sha256(sample(seed).data_set).hexdigest()}")
            with suppress(*refusal):
                receipt = house.ingest(sample(seed))
                if honest:
                    say(f"stored {seed} {receipt.sha256}")
            if site.rotates:
                rotate(house)
            if threads == 1:
                with suppress(*refusal):
                    work_off(house, say, reach=reach)

    if threads == 1:
        receive(seeds)
    else:
        crew = [threading.Thread(target=receive, args=(seeds[number::threads],)) for number in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        work_off(house, say, reach=reach)
    house.close()


@dataclass
class Verdict:
    """What the judge found; every fault in words."""

    faults: list[str] = field(default_factory=list)
    acknowledged: int = 0
    lost: int = 0
    orphans: int = 0


def judge(
    folder: Path,
    said: Iterable[str],
    sent: Iterable[int],
    *,
    whole: bool = True,
    site: Site = Site(),  # noqa: B008 - frozen
) -> Verdict:
    """Start on a folder that was hit and prove the promises.

    Every acknowledged instance is there bit-exact with exactly one analysis; store, index and audit trail reconcile; no landing
    file is left; whatever was not acknowledged can be sent again; in the end every instance has one report and one proof per peer.
    Not `whole`, what lay in the folder before is not read again: only the instances of `sent` are.
    """
    verdict = Verdict()
    # Two minutes later: the leases of the dead have run out.
    house = site.open(folder, clock=lambda: datetime.now(UTC) + timedelta(minutes=2))
    try:
        house.archive.sweep()
        if house.landing_files():
            verdict.faults.append("the sweep left landing files of a dead process")
        sent = list(sent)
        for line in said:
            what, number, *digest = line.split()
            seed = int(number)
            one = sample(seed)
            if what == "stored":
                verdict.acknowledged += 1
                if digest != [hashlib.sha256(one.data_set).hexdigest()]:
                    verdict.faults.append(f"seed {seed}: acknowledged under another digest")
            _judge_instance(house, one if what == "stored" else report_of(seed), seed, verdict)
        if site.rotates:
            rotate(house)  # the operator runs it again, as it asks for
        work_off(house)  # the index and the store are compared below: what landed is brought first
        if whole:
            found = house.archive.verify()
            if not found.intact:
                verdict.faults += found.lines()
        verdict.orphans = _sweep(house)
        work_off(house)  # what was adopted
        for seed in sent:
            if house.ingest(sample(seed)).outcome not in Outcome:
                verdict.faults.append(f"seed {seed}: cannot be sent again")
        work_off(house)
        for seed in sent:
            _judge_end(house, seed, verdict)
        rows = {known.object_key for known in house.index.all_objects()}
        if rows != set(house.objects()):
            verdict.faults.append("objects and rows do not match one to one")
        if house.landing_files() or [path for path in (folder / "landed").rglob("*") if path.is_file()]:
            verdict.faults.append("landing or spool files are left after the second sending")
        _judge_keys(house, verdict)
    finally:
        house.close()
    return verdict


def _judge_instance(house: House, one: Sample, seed: int, verdict: Verdict) -> None:
    try:
        if house.read(one.sop_instance_uid) == one.data_set:
            return
        verdict.faults.append(f"seed {seed}: {one.sop_class_uid} is not what was sent")
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being read, it is lost
        verdict.faults.append(f"seed {seed}: acknowledged and lost: {type(error).__name__} {error}")
    verdict.lost += 1


def _sweep(house: House) -> int:
    orphans = house.archive.orphans()
    grace = timedelta(minutes=-10)
    return orphans.sweep(grace=grace).settled + orphans.sweep_spool(grace=grace).settled


def _judge_keys(house: House, verdict: Verdict) -> None:
    """Every study key has its document in the store, and it opens with the keys of the ring."""
    for study_key_id in {known.key_id for known in house.index.all_objects()}:
        try:
            house.study_keys.from_document(house.store.get_document(f"keys/{study_key_id[:2]}/{study_key_id}"))
        except StorageError as error:
            verdict.faults.append(f"study key {study_key_id} cannot be had from the store: {error}")


def _judge_end(house: House, seed: int, verdict: Verdict) -> None:
    one, made = sample(seed), report_of(seed)
    _judge_instance(house, one, seed, verdict)
    _judge_instance(house, made, seed, verdict)
    analyses = [job.state for job in house.queue.jobs_of(one.sop_instance_uid) if job.kind is JobKind.ANALYSE]
    of_report = [job for job in house.queue.jobs_of(made.sop_instance_uid) if job.kind is JobKind.DELIVER]
    deliveries = sorted((job.lane, job.state, job.result.get("status")) for job in of_report)
    if analyses != [JobState.DONE]:
        verdict.faults.append(f"seed {seed}: analyses {analyses}")
    if deliveries != [(peer, JobState.DONE, "0000") for peer in PEERS]:
        verdict.faults.append(f"seed {seed}: deliveries {deliveries}")
    if [linked.sop_instance_uid for linked in house.index.reports_of(one.sop_instance_uid)] != [made.sop_instance_uid]:
        verdict.faults.append(f"seed {seed}: not exactly one report")
    actions = [entry.event.action for entry in house.audit.events_of(one.sop_instance_uid)]
    received = actions.count("instance.received") + actions.count("instance.adopted")
    if received != 1:
        verdict.faults.append(f"seed {seed}: {received} records of one reception")
