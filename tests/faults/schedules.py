"""Random schedules: many short lives of a node, each with its own faults, each proved by the checker.

    python -m tests.faults.schedules --runs 100 --seed 7

A schedule is a seed. It draws a house (store in a directory or in a lying S3 service, policies, cache) and a few dozen steps: senders that
send, repeat, contradict and go away, readers, Mover, worker, courier, rotation, and between them kills, a lying store, a full disk and a
stepping clock. Then everything is healed, what was not acknowledged is sent again, the work is given time, and the checker judges.

Real parts in one process: SQLite, files, HTTP. A kill is a photograph: at the failpoint the node's folder is copied as a SIGKILL would
leave it, whatever the dying process still does happens to the old folder, and the next life begins on the copy.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Final

from storage.archive import Archive, NewReport
from storage.cache import ReadCache
from storage.errors import ConflictingInstance, InstanceNotFound, IntegrityError, InvalidInstance, LeaseLost, StorageError
from storage.keys import Ring
from storage.mover import Mover
from storage.records import Job, JobKind, JobState
from storage.retirement import Retirement
from tests.faults import lying_s3
from tests.faults.checker import Violation, judge
from tests.faults.history import History, digest
from tests.faults.stage import NODE_ID, Stage, stage
from tests.faults.tally import tell
from tests.storage.house import House, build, origin_of
from tests.storage.samples import Sample, photograph, report

PEERS: Final = ("pacs", "viewer")
CANARIES: Final = ("Canary^Test", "2.25.17700")
_ROUNDS: Final = 60
_STORE_FAULTS: Final[tuple[tuple[lying_s3.Fault, str], ...]] = (
    (lying_s3.NOTHING, "put"),
    (lying_s3.HALF, "put"),
    (lying_s3.OTHER, "put"),
    (lying_s3.LOST_ANSWER, ""),
    (lying_s3.WRONG_ETAG, "put"),
    (lying_s3.RESET, ""),
    (lying_s3.INTERNAL_ERROR, ""),
    (lying_s3.SLOW_DOWN, ""),
    (lying_s3.TOO_MANY_REQUESTS, ""),
    (lying_s3.BAD_DIGEST, "put"),
    (lying_s3.REQUEST_TIMEOUT, "put"),
    (lying_s3.DENIED, ""),
    (lying_s3.EXPIRED_TOKEN, ""),
    (lying_s3.cut_request(300), "put"),
    (lying_s3.cut_response(200), "get"),
    (lying_s3.late(2), "put"),
    (lying_s3.OTHER, "get"),
)


class Killed(BaseException):
    """The process is dead; nothing may catch this."""


@dataclass
class Tally:
    """What many schedules have seen."""

    schedules: int = 0
    acked: int = 0
    events: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    broken: dict[int, list[Violation]] = field(default_factory=dict)

    def line(self) -> str:
        """Return one line for people."""
        return (
            f"{self.schedules} schedules, {self.acked} acknowledged, {sum(self.kills.values())} kills at {len(self.kills)} points, "
            f"{self.events['fault']} faults, {self.events['refused']} refusals, {len(self.broken)} schedules with a broken promise"
        )


class Schedule:
    """One seed, lived through."""

    def __init__(self, seed: int, stage: Stage) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._stage = stage
        self._folder = stage.disk / "house"
        self._photograph = stage.root / "photograph"
        self._ballast = stage.disk / "ballast"
        self.history_path = stage.root / "history.jsonl"
        for path in (self._folder, self._photograph):
            shutil.rmtree(path, ignore_errors=True)
        self.history_path.unlink(missing_ok=True)
        self._ballast.unlink(missing_ok=True)
        shutil.copytree(stage.root / "template", self._folder)
        self._history = History(self.history_path)
        self._counted: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self._offset = timedelta()
        self._lock = threading.Lock()
        self._fuse: int | None = None
        self._dead_at = ""
        self._store_lies = False
        self._sent: dict[int, set[int]] = {}
        self._acked: dict[int, int] = {}
        self._erasing: set[int] = set()
        self._next = 0
        remote = self._rng.random() < 0.4 or stage.radosgw is not None
        self._service, self._store = stage.service() if remote else (None, None)
        self._cached = remote and self._rng.random() < 0.5
        self._lands = remote and self._rng.random() < 0.8
        self._reserve = self._rng.choice((0, 1 << 20))
        self._poisoned = self._rng.random() < 0.3
        stage.reach = self._reach

    # --- the house ---------------------------------------------------------------------------------------------------

    def _clock(self) -> datetime:
        return datetime.now(UTC) + self._offset

    def _open(self) -> House:
        self._dead_at = ""
        options: dict[str, object] = {
            "acknowledge": lambda origin: "archive" if origin.calling_ae_title == "STRICT" else "land",
            "min_free_bytes": self._reserve,
        }
        if self._cached:
            options["cache"] = ReadCache(self._folder / "cache", 1 << 20)
        house = build(
            self._folder,
            store=self._store,
            reach=self._reach,
            clock=self._clock,
            node_id=NODE_ID if self._lands else "",
            **options,
        )
        try:
            house.archive.sweep()
        except BaseException:
            house.close()
            raise
        return house

    def _reach(self, name: str) -> None:
        with self._lock:
            if self._dead_at:
                raise Killed(name)
            if self._fuse is None:
                return
            self._fuse -= 1
            if self._fuse > 0:
                return
            self._fuse = None
            self._dead_at = name
            _copy(self._folder, self._photograph)
        raise Killed(name)

    def _revive(self, house: House | None) -> House:
        """Begin the next life on what the last one left; again, if it dies while it starts."""
        while True:
            self._say("crashed", point=self._dead_at)
            self.kills[self._dead_at] += 1
            if house is not None:
                house.close()
                house = None
            shutil.rmtree(self._folder)
            self._ballast.unlink(missing_ok=True)  # a copy may need more blocks than what it was made from
            _copy(self._photograph, self._folder)
            shutil.rmtree(self._photograph)
            if self._rng.random() < 0.7:
                self._offset += timedelta(seconds=61)  # the leases of the dead run out
            began = time.monotonic()
            try:
                house = self._open()
            except Killed:
                continue
            self._house = house
            self._say("recovered", seconds=round(time.monotonic() - began, 3))
            return house

    def _say(self, event: str, uid: str = "", sha256: str = "", **detail: object) -> None:
        self._counted[event] += 1
        self._history.say(event, uid, sha256, **detail)

    # --- what is sent ------------------------------------------------------------------------------------------------

    def _picture(self, number: int, variant: int = 0) -> Sample:
        rng = random.Random(f"{self._seed} {number} {variant}")
        rows, columns = (1100, 1000) if number % 25 == 7 else rng.choice(((16, 16), (64, 128), (200, 200)))
        stem = f"2.25.17700{self._seed:09d}"
        pixels = rng.randbytes(rows * columns)
        study = f"{stem}{number // 3:04d}"
        return photograph(sop=f"{stem}{number:06d}.1", series=f"{study}.2", study=f"{study}.3", pixels=pixels, rows=rows, columns=columns)

    def _number(self, uid: str) -> int:
        return int(uid.removesuffix(".1")[-6:])

    def _report_of(self, source: Sample) -> Sample:
        return report(source=source, sop=f"{source.sop_instance_uid}.9", text=digest(source.data_set).encode())

    def _poison(self, uid: str) -> bool:
        return self._poisoned and self._number(uid) % 4 == 3

    def _send(self, house: House, number: int, *, variant: int = 0, origin: str = "", cut: bool = False) -> None:
        one = self._picture(number, variant)
        sha256 = digest(one.data_set)
        origin = origin or self._rng.choice(("CAMERA", "STRICT", "PHONE"))
        self._sent.setdefault(number, set()).add(variant)
        data = one.data_set[: self._rng.randrange(1, len(one.data_set))] if cut else one.data_set
        self._say("sent", one.sop_instance_uid, sha256, origin=origin)
        if self._stage.dishonest == "ack before commit":
            self._say("acked", one.sop_instance_uid, sha256)
        try:
            with house.archive.receive(origin_of(calling_ae_title=origin), transfer_syntax_uid=one.transfer_syntax_uid) as intake:
                for start in range(0, len(data), 65536):
                    intake.write(data[start : start + 65536])
                if cut and self._rng.random() < 0.5:
                    self._say("aborted", one.sop_instance_uid, sha256)
                    return
                receipt = intake.commit()
        except StorageError as error:
            conflict, invalid = isinstance(error, ConflictingInstance), isinstance(error, InvalidInstance)
            self._say("refused", one.sop_instance_uid, sha256, reason=str(error), conflict=conflict, invalid=invalid)
            return
        self._acked.setdefault(number, variant)
        if self._stage.dishonest != "ack before commit":
            self._say("acked", one.sop_instance_uid, receipt.sha256)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _new(self, house: House) -> None:
        self._next += 1
        self._send(house, self._next - 1)

    def _again(self, house: House) -> None:
        if self._sent:
            self._send(house, self._rng.choice(sorted(self._sent)))

    def _contradict(self, house: House) -> None:
        if self._sent:
            self._send(house, self._rng.choice(sorted(self._sent)), variant=1)

    def _break_off(self, house: House) -> None:
        self._next += 1
        self._send(house, self._next - 1, cut=True)

    def _read(self, house: House) -> None:
        if not self._acked:
            return
        uid = self._picture(self._rng.choice(sorted(self._acked))).sop_instance_uid
        try:
            with house.archive.open(uid) as stored:
                self._say("retrieved", uid, digest(stored.read()))
        except InstanceNotFound as error:
            self._say("missing", uid, reason=str(error))
        except IntegrityError as error:
            if not self._store_lies:  # else the store gave other bytes, and that they were not passed on is the promise
                self._say("missing", uid, reason=str(error))
        except StorageError:
            return  # later, then

    def _move(self, house: House) -> bool:
        mover = Mover(
            archive=house.archive,
            queue=house.queue,
            reach=self._reach,
            observe=lambda event, **_: self._counted.update({event: 1}),
        )
        with suppress(StorageError):
            return mover.bring_once()
        return False

    def _analyse(self, house: House) -> bool:
        with suppress(StorageError):
            job = house.queue.claim(JobKind.ANALYSE, owner="worker")
            if job is None:
                return False
            try:
                self._conclude(house, job)
            except LeaseLost:
                return True
            except StorageError as error:
                house.queue.release(job, after_s=1, reason=str(error))
            return True
        return False

    def _conclude(self, house: House, job: Job) -> None:
        uid = job.sop_instance_uid
        if self._poison(uid):
            self._say("failed", uid, poison=True)
            house.archive.fail(job, "the picture is poison", retryable=True)
            return
        with house.archive.open(uid) as stored:
            data_set = stored.read()
        source = self._picture(self._number(uid))
        variant = 0 if digest(source.data_set) == digest(data_set) else 1
        made = self._report_of(self._picture(self._number(uid), variant))
        new = NewReport("summary", made.data_set, deliver_to=PEERS, models={"schedule": "1"})
        house.archive.conclude(job, reports=[new], result={})
        self._say("concluded", made.sop_instance_uid, digest(made.data_set), source=uid)

    def _deliver(self, house: House) -> bool:
        return self._deliver_to(house, self._rng.choice(PEERS))

    def _deliver_to(self, house: House, lane: str) -> bool:
        with suppress(StorageError):
            job = house.queue.claim(JobKind.DELIVER, lane=lane, owner="courier")
            if job is None:
                return False
            if self._rng.random() < 0.15:
                house.archive.fail(job, "the peer is away", retryable=True)
                return True
            try:
                with house.archive.open(job.sop_instance_uid) as stored:
                    data_set = stored.read()
            except StorageError as error:
                house.queue.release(job, after_s=1, reason=str(error))
                return True
            self._say("delivered", job.sop_instance_uid, digest(data_set), peer=lane)
            if self._rng.random() < 0.1:
                return True  # the answer is lost: the lease runs out, and it is delivered again
            house.archive.acknowledge(job, status=0)
            self._say("proved", job.sop_instance_uid, peer=lane)
            return True
        return False

    def _rotate(self, house: House) -> None:
        ring_file = self._folder / "keys.json"
        self._say("fault", name="rotation")
        with suppress(StorageError):
            Ring.add(ring_file)
            house.ring.holds("")  # looks at the file now; else within a second
            house.study_keys.rotate(put_document=house.store.put_document, delete_document=house.store.delete_document)
            retirement = Retirement(
                database=house.database,
                study_keys=house.study_keys,
                ring=house.ring,
                audit=house.audit,
                store=house.store,
                spool=house.archive._places.spool,
            )
            for key in Ring.shown(ring_file):
                if not key.primary:
                    with suppress(StorageError):  # it is still in use
                        retirement.retire(key.key_id)

    def _sweep(self, house: House) -> None:
        # Nothing is on its way in between two steps: what has no row now was left by a death.
        with suppress(StorageError):
            orphans = house.archive.orphans()
            grace = timedelta(minutes=-10)
            orphans.sweep(grace=grace)
            orphans.sweep_spool(grace=grace)

    def _erase(self, house: House) -> None:
        if self._acked:
            self._erase_study(house, self._rng.choice(sorted(self._acked)) // 3)

    def _erase_study(self, house: House, study: int) -> None:
        numbers = [number for number in sorted(self._sent) if number // 3 == study]
        pictures = [self._picture(number).sop_instance_uid for number in numbers]
        self._erasing.add(study)
        for uid in pictures:
            self._say("erasing", uid)
            self._say("erasing", f"{uid}.9")
        try:
            with suppress(InstanceNotFound):
                house.archive.erasure().erase_study(self._picture(3 * study).study_instance_uid, actor="operator", reason="asked for")
        except StorageError:
            return  # nothing was changed, or not all: it is done again in the end
        for number, uid in zip(numbers, pictures, strict=True):
            self._say("erased", uid)
            self._say("erased", f"{uid}.9")
            self._acked.pop(number, None)
            if self._rng.random() < 0.5:
                self._sent.pop(number)
        self._erasing.discard(study)

    def _kill_soon(self, house: House) -> None:
        self._fuse = self._rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12, 14))

    def _store_breaks(self, house: House) -> None:
        if self._service is None:
            return
        fault, operation = self._rng.choice(_STORE_FAULTS)
        self._store_lies = True
        self._service.fail(fault, operation=operation, times=self._rng.choice((1, 2, 3, 8)))
        self._say("fault", name=f"store: {fault.name} {fault.code} {operation}")

    def _store_heals(self, house: House) -> None:
        if self._service is not None:
            self._service.heal()
            self._store_lies = False

    def _disk_fills(self, house: House) -> None:
        if not self._stage.small_disk or self._ballast.exists():
            return
        space = os.statvfs(self._stage.disk)
        left = self._rng.choice((0, 1, 4, 16, 64, 256)) * 4096
        count = space.f_bavail * space.f_frsize - left
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(count, 4096))
        self._say("fault", name=f"disk: {left} bytes left")

    def _disk_empties(self, house: House) -> None:
        self._ballast.unlink(missing_ok=True)

    def _clock_steps(self, house: House) -> None:
        seconds = self._rng.choice((-86400, -3600, -60, 61, 3600, 86400, 10 * 365 * 86400, -10 * 365 * 86400))
        self._offset += timedelta(seconds=seconds)
        self._say("fault", name=f"clock: {seconds} s")

    @cached_property
    def _steps(self) -> tuple[list[Callable[[House], object]], list[int]]:
        table: dict[Callable[[House], object], int] = {
            self._new: 20,
            self._again: 6,
            self._contradict: 2,
            self._break_off: 2,
            self._read: 4,
            self._move: 10,
            self._analyse: 12,
            self._deliver: 14,
            self._rotate: 1,
            self._erase: 1,
            self._sweep: 1,
            self._kill_soon: 9,
            self._store_breaks: 6 if self._service else 0,
            self._store_heals: 4 if self._service else 0,
            self._disk_fills: 2,
            self._disk_empties: 3,
            self._clock_steps: 2,
        }
        return list(table), list(table.values())

    # --- a life ------------------------------------------------------------------------------------------------------

    def live(self) -> list[Violation]:
        """Live through the schedule and return the promises that were broken."""
        self._say("began", peers=PEERS, canaries=CANARIES, seed=self._seed)
        house = self._house = self._open()
        try:
            steps, weights = self._steps
            for step in self._rng.choices(steps, weights, k=self._rng.randrange(8, 40)):
                try:
                    step(house)
                except Killed:
                    house = self._revive(house)
            house = self._heal(house)
            others = self._service.objects() if self._service else None
            found = self._without_spoilt(judge(self.history_path, house, others=others)) + self._documents(house)
        finally:
            self._house.close()
            self._history.close()
        return found

    def _heal(self, house: House) -> House:
        """Let nothing be broken any more, start anew, send what was not acknowledged, and give the work its time."""
        self._store_heals(house)
        self._disk_empties(house)
        house.close()
        self._fuse = None
        if self._stage.dishonest == "lose an object" and self._acked:
            self._lose_one()
        house = self._house = self._open()
        self._say("healed")
        again = self._rng.sample(sorted(self._acked), min(2, len(self._acked)))
        for number in sorted(self._sent):
            if number not in self._acked or number in again:
                self._send(house, number, variant=self._acked.get(number, 0))
        # As the duty of every node does each hour; an operator whose erasure was broken off runs it again, as it asks for.
        house.study_keys.publish_all(put_document=house.store.put_document, delete_document=house.store.delete_document)
        for study in sorted(self._erasing):
            self._erase_study(house, study)
        self._sweep(house)
        self._drain(house)
        self._sweep(house)
        self._drain(house)
        for number, variant in sorted(self._acked.items()):
            uid = self._picture(number, variant).sop_instance_uid
            self._say("queried", uid, found=_knows(house.archive, uid))
        self._say("ended")
        return house

    def _drain(self, house: House) -> None:
        for _ in range(_ROUNDS):
            self._offset += timedelta(hours=2)
            while self._move(house) or self._analyse(house) or any(self._deliver_to(house, peer) for peer in PEERS):
                continue
            counts = house.queue.counts()
            if not sum(count for (_, state), count in counts.items() if state in (JobState.READY, JobState.CLAIMED)):
                break

    def _lose_one(self) -> None:
        """Negative control: the store loses an object that nobody will send again."""
        if self._service is not None:
            for name in self._service.objects():
                if "keys/" not in name:
                    self._service.remove(name)
        for path in (*(self._folder / "objects").rglob("*"), *(self._folder / "landed").rglob("*")):
            if path.is_file() and path.parent.parent.name != "keys":
                path.unlink()
        self._sent.clear()

    def _without_spoilt(self, found: list[Violation]) -> list[Violation]:
        """Pass over objects without a row that the lying store spoilt and would not delete: nobody can say what they were, so they stay."""
        spoilt = {name.rpartition("/")[2] for name in self._service.spoilt} if self._service else set()
        return [one for one in found if not (one.words.endswith("has no row") and spoilt & set(one.words.split()))]

    def _documents(self, house: House) -> list[Violation]:
        """Every study key must be in the store too, and open: the bucket alone is enough to begin anew (promise P1)."""
        found = []
        for study_key_id in {object_.key_id for object_ in house.index.all_objects()}:
            try:
                name = f"keys/{study_key_id[:2]}/{study_key_id}"
                if house.study_keys.from_document(house.store.get_document(name)).id != study_key_id:
                    found.append(Violation("P1", "", f"the document of study key {study_key_id} is another one's"))
            except StorageError as error:
                found.append(Violation("P1", "", f"study key {study_key_id} cannot be had from the store: {error}"))
        return found

    @property
    def counted(self) -> Counter[str]:
        """How many events of each kind there were."""
        return self._counted


def _knows(archive: Archive, uid: str) -> bool:
    try:
        archive.open(uid).close()
    except StorageError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a folder as it is at this moment; a file that vanishes meanwhile is not there."""
    target.mkdir(mode=0o700)
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _copy(Path(entry.path), target / entry.name)
            else:
                with suppress(FileNotFoundError):
                    if entry.name.endswith("-shm"):
                        continue  # SQLite makes it anew when nobody has it open
                    shutil.copy2(entry.path, target / entry.name)


def run(stage: Stage, seeds: range, tally: Tally, *, until: float | None = None, report: Callable[[str], None] = lambda _: None) -> None:
    """Live through the seeds, or until the monotonic clock says `until`; a broken promise prints its history."""
    for seed in seeds:
        if until is not None and time.monotonic() >= until:
            break
        schedule = Schedule(seed, stage)
        try:
            found = schedule.live()
        except Exception as error:  # noqa: BLE001 - a schedule that cannot be lived to its end is a finding, with its seed
            found = [Violation("P4", "", f"the schedule broke off: {type(error).__name__}: {error}")]
        tally.schedules += 1
        tally.acked += schedule.counted["acked"]
        tally.events += schedule.counted
        tally.kills += schedule.kills
        if found:
            tally.broken[seed] = found
            report(f"seed {seed}:")
            for violation in found:
                report(f"  {violation}")
            if not stage.dishonest:
                report(schedule.history_path.read_text())
        if tally.schedules % 500 == 0:
            report(tally.line())


def main(arguments: list[str] | None = None) -> int:
    """Run schedules as asked; the exit status is 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.schedules", description="Random schedules of faults.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many minutes")
    parser.add_argument("--seed", type=int, default=None, help="of the first schedule; the next ones count on")
    parser.add_argument("--s3", choices=("lying", "radosgw"), default="lying", help="radosgw: see make ceph")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the working folder")
    parser.add_argument("--dishonest", choices=("ack before commit", "lose an object"), default="", help="negative control")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    seed = options.seed if options.seed is not None else time.time_ns() % 10**9
    started = time.monotonic()

    def report(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {line}\n")
        sys.stdout.flush()

    report(f"seed {seed}")
    tally = Tally()
    until = None if options.minutes is None else started + 60 * options.minutes
    runs = options.runs if options.minutes is None else 10**9
    with stage(options.folder, dishonest=options.dishonest, radosgw=options.s3 == "radosgw") as made:
        run(made, range(seed, seed + runs), tally, until=until, report=report)
    report(tally.line())
    for point, count in sorted(tally.kills.items()):
        report(f"  killed at {point}: {count}")
    kills = sum(tally.kills.values())
    tell({"schedules": tally.schedules, "kills in schedules": kills, "acknowledged": tally.acked, "broken": len(tally.broken)})
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
