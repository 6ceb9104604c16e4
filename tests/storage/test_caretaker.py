"""The caretaker: every duty is done in its time by one of many, goes on where it was stopped, and fails alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from storage.cache import ReadCache
from storage.caretaker import Caretaker
from storage.duties import Duties
from storage.objects import DirectoryStore, ObjectStore
from storage.study_keys import STUDY_KEYS
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import photograph
from tests.storage.test_orphans import left_behind

NODE = "00000000000000aa"


def caretaker_of(house: House, holder: str = "one", **settings: object) -> Caretaker:
    """Return the caretaker of a house."""
    return house.archive.caretaker(duties=Duties(database=house.database, holder=holder), **settings)


def test_all_duties_once(houses: Build, s3_store: ObjectStore, tmp_path: Path) -> None:
    """A node with spool and cache does nine duties at its start, then none until they are due; what they found can be read."""
    house = houses(store=s3_store, node_id=NODE, cache=ReadCache(tmp_path / "cache", 1 << 20))
    house.ingest(photograph())
    caretaker = caretaker_of(house, retention_days=10.0)
    assert len(caretaker.duties) == 8
    stop = threading.Event()
    assert caretaker.do_due(stop) == caretaker.duties
    assert caretaker.do_due(stop) == []
    for duty in Duties(database=house.database, holder="").all():
        assert duty.holder == ""
        assert duty.finished_at is not None
        assert duty.outcome
        assert not duty.outcome.startswith("failed")
    assert "archive.scrubbed" in house.actions()


def test_one_of_many_does_it(houses: Build) -> None:
    """Of two caretakers on one database one does what concerns both; one at a time does its own as well."""
    first, second = houses(), houses()
    stop = threading.Event()
    done = caretaker_of(first, "one").do_due(stop)
    assert done == ["documents", "orphans", "uploads", "scrub", "landing"]
    assert caretaker_of(second, "two").do_due(stop) == []


def test_due_again_in_time(houses: Build) -> None:
    """After a day the daily duties are due again; a scrub of every thirty days is not."""
    house = houses()
    stop = threading.Event()
    caretaker_of(house).do_due(stop)
    house.database.clock = lambda: datetime.now(UTC) + timedelta(days=1, minutes=1)
    assert caretaker_of(house).do_due(stop) == ["documents", "orphans", "uploads", "landing"]
    assert caretaker_of(house, scrub_days=0).duties == ["documents", "orphans", "uploads", "landing"]


def test_it_runs_until_it_is_stopped(houses: Build) -> None:
    """`run` does what is due and ends soon after the word, in the middle of a slow scrub too, whose place is kept for the next."""
    house = houses()
    for _ in range(3):
        house.ingest(photograph())
    stop = threading.Event()
    thread = threading.Thread(target=caretaker_of(house, scrub_bytes_per_s=10, poll_s=0.01, renew_s=0.05).run, args=(stop,))
    thread.start()
    duties = Duties(database=house.database, holder="other")
    while not any(duty.name == "scrub" and duty.holder for duty in duties.all()):
        stop.wait(0.01)
    assert duties.take("scrub", every_s=1.0) is None
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    (scrub,) = [duty for duty in duties.all() if duty.name == "scrub"]
    assert (scrub.holder, scrub.cursor, scrub.finished_at is not None) == ("", "instances", True)
    assert "scrub" in caretaker_of(house, "other").do_due(threading.Event())
    assert house.actions()[-1] == "archive.scrubbed"


class Slow(DirectoryStore):
    """A folder that takes documents when it is told to."""

    begun: threading.Event
    told: threading.Event

    def put_document(self, name: str, content: bytes) -> None:
        """Wait, then put."""
        self.begun.set()
        self.told.wait(60)
        super().put_document(name, content)


def test_a_slow_duty_stays_in_hand(houses: Build, tmp_path: Path) -> None:
    """One that takes longer than its lease, in a single step, is renewed meanwhile: nobody does it a second time."""
    house = houses()
    house.ingest(photograph())
    house.database.write(lambda connection: connection.execute(update(STUDY_KEYS).values(stored=0)))
    store = Slow(house.folder / "objects")
    store.begun, store.told = threading.Event(), threading.Event()
    slow = houses(store=store)
    duties = Duties(database=slow.database, holder="one", lease_s=2.0)
    caretaker = slow.archive.caretaker(duties=duties, renew_s=0.2)
    thread = threading.Thread(target=caretaker.do_due, args=(threading.Event(), "documents"))
    thread.start()
    assert store.begun.wait(60)
    thread.join(3.0)  # longer than the lease
    assert Duties(database=house.database, holder="two", lease_s=2.0).take("documents", every_s=3600) is None
    store.told.set()
    thread.join(60)
    (duty,) = [duty for duty in duties.all() if duty.name == "documents"]
    assert (duty.holder, duty.outcome.startswith("1 documents")) == ("", True)


def test_a_duty_that_fails_stops_no_other(houses: Build) -> None:
    """A store that is away fails the duties that need it, with the reason, soon to be tried again; the rest is done."""
    house = houses()
    (house.folder / "objects").rename(house.folder / "away")
    done = caretaker_of(house).do_due(threading.Event())
    assert done == ["documents", "orphans", "uploads", "scrub", "landing"]
    states = {duty.name: duty for duty in Duties(database=house.database, holder="").all()}
    assert states["orphans"].outcome.startswith("failed: ")
    assert not states["landing"].outcome.startswith("failed")
    assert states["orphans"].due_at < datetime.now(UTC) + timedelta(minutes=11)
    (house.folder / "away").rename(house.folder / "objects")
    house.database.clock = lambda: datetime.now(UTC) + timedelta(minutes=11)
    assert "orphans" in caretaker_of(house).do_due(threading.Event())
    assert not {duty.name: duty for duty in Duties(database=house.database, holder="").all()}["orphans"].outcome.startswith("failed")


def test_only_one(houses: Build) -> None:
    """An operator may ask for one duty alone."""
    house = houses()
    left_behind(house, photograph())
    assert caretaker_of(house, orphan_grace=timedelta(minutes=-1)).do_due(threading.Event(), only="orphans") == ["orphans"]
    assert house.actions() == ["instance.adopted"]


_PROGRAM = """
import os, sys, threading
from pathlib import Path
from storage.duties import Duties
from storage.failpoints import failpoint_from_environment
from tests.storage.house import build
reach = failpoint_from_environment(os.environ)
house = build(Path(sys.argv[1]), reach=reach)
caretaker = house.archive.caretaker(duties=Duties(database=house.database, holder="killed"), poll_s=0.01)
save = type(house.archive.scrub()).round
def round_(self, cursor="", *, save, pace):
    def saved(at):
        save(at)
        reach("scrub.saved")
    return whole(self, cursor, save=saved, pace=pace)
whole, type(house.archive.scrub()).round = save, round_
caretaker.run(threading.Event())
"""


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_killed_in_a_scrub(houses: Build, engine: str) -> None:
    """The next holder goes on from the cursor that the dead one saved, once its lease is over."""
    house = houses()
    for _ in range(3):
        house.ingest(photograph())
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(house.folder)],
        env={**os.environ, "DICOM_NODE_FAILPOINT": "scrub.saved:3"},
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == -9
    (scrub,) = [duty for duty in Duties(database=house.database, holder="").all() if duty.name == "scrub"]
    assert (scrub.holder, scrub.cursor) == ("killed", "quarantine")
    assert caretaker_of(house).do_due(threading.Event(), only="scrub") == []
    house.database.clock = lambda: datetime.now(UTC) + timedelta(minutes=3)
    assert caretaker_of(house).do_due(threading.Event(), only="scrub") == ["scrub"]
    (event,) = [entry.event for entry in house.audit.entries() if entry.event.action == "archive.scrubbed"]
    assert event.detail["checked"] == 0  # the instances were checked by the one that was killed
