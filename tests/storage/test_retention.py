"""Retention: only what is due, never what is held, never what just came."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from storage.duties import Duties
from storage.errors import InstanceNotFound, StorageError
from storage.retention import Retention
from tests.storage.conftest import Build
from tests.storage.house import House, origin_of
from tests.storage.samples import photograph


def later(days: float) -> datetime:
    """Return a moment so many days from now."""
    return datetime.now(UTC) + timedelta(days=days)


def test_what_is_due_goes(houses: Build) -> None:
    """Before its time nothing is due; after it the study is listed, then erased with an audit record; a held one stays."""
    house = houses()
    old, held = photograph(), photograph()
    for sample in (old, held):
        house.ingest(sample)
    house.archive._holds.place(held.study_instance_uid, reason="court", actor="operator")
    assert list(house.archive.retention(days=30).due()) == []
    assert house.archive.retention(days=0).erase_due() == 0
    then = houses()
    retention = Retention(database=then.database, erasure=then.archive.erasure(), days=30, clock=lambda: later(31))
    (due,) = retention.due()
    assert (due.study_instance_uid, due.instances) == (old.study_instance_uid, 1)
    assert list(then.archive.retention(days=0).due()) == []
    seen: list[int] = []
    assert retention.erase_due(pace=seen.append) == len(seen) == 1
    with pytest.raises(InstanceNotFound):
        then.read(old.sop_instance_uid)
    assert then.read(held.sop_instance_uid) == held.data_set
    (event,) = [entry.event for entry in then.audit.events_of(old.study_instance_uid)]
    assert (event.action, event.actor) == ("study.erased", "retention")


def test_what_comes_meanwhile_saves_the_study(house: House) -> None:
    """An instance that comes between the listing and the erasure keeps its study; the erasure itself looks."""
    sample = photograph()
    house.ingest(sample)
    before = datetime.now(UTC)
    house.ingest(photograph(study=sample.study_instance_uid))
    with pytest.raises(StorageError, match="after that moment"):
        house.archive.erasure().erase_study(sample.study_instance_uid, actor="retention", reason="", received_before=before)
    assert house.read(sample.sop_instance_uid) == sample.data_set


@pytest.mark.parametrize("off", [3650.0, -3650.0], ids=["ahead", "behind"])
def test_a_clock_that_is_wrong_erases_nothing(house: House, off: float) -> None:
    """It jumps by ten years, before the first round or after it: nothing is erased, the trail says why; set right, all goes on."""
    sample = photograph()
    house.ingest(sample)
    wrong, right = (lambda: later(off)), datetime.now
    for clock, outcomes in ((wrong, 1), (lambda: right(UTC), 1), (wrong, 2)):
        house.database.clock = clock
        caretaker = house.archive.caretaker(duties=Duties(database=house.database, holder="one"), retention_days=30, scrub_days=0)
        house.archive._clock = clock
        assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
        assert house.actions().count("retention.held") == outcomes
        assert "study.erased" not in house.actions()
    (duty,) = [duty for duty in Duties(database=house.database, holder="").all() if duty.name == "retention"]
    assert duty.outcome.startswith("held: the clock says")
    assert "--confirm-clock" in duty.outcome
    assert house.read(sample.sop_instance_uid) == sample.data_set


def test_a_first_round_erases_nothing(houses: Build) -> None:
    """A node whose clock is years ahead takes an instance, whose audit record vouches for that clock: an operator has a day to see it."""
    house, old = houses(), photograph()
    house.ingest(old)
    house = houses(clock=lambda: later(4380))
    house.database.clock = house.archive._clock = lambda: later(4380)
    new = photograph()
    with house.archive.receive(replace(origin_of(), received_at=later(4380)), transfer_syntax_uid=new.transfer_syntax_uid) as intake:
        intake.write(new.data_set)
        intake.commit()
    caretaker = house.archive.caretaker(duties=Duties(database=house.database, holder="one"), retention_days=3650, scrub_days=0)
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert "study.erased" not in house.actions()
    (duty,) = [duty for duty in Duties(database=house.database, holder="").all() if duty.name == "retention"]
    assert "from the next round on" in duty.outcome
    house.database.clock = house.archive._clock = lambda: datetime.now(UTC)  # set right
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert house.actions()[-1] == "retention.held"
    house.database.clock = house.archive._clock = lambda: later(4381)  # it was right
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert house.actions()[-1] == "study.erased"
    assert house.read(new.sop_instance_uid) == new.data_set


def test_a_confirmed_clock_is_believed(house: House) -> None:
    """The node was off for forty days: an operator says that the clock is right, and what is due goes."""
    sample = photograph()
    house.ingest(sample)
    duties = Duties(database=house.database, holder="one")
    caretaker = house.archive.caretaker(duties=duties, retention_days=30, scrub_days=0)
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    house.archive._clock = house.database.clock = lambda: later(40)
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert house.actions()[-1] == "retention.held"
    duties.put("retention", cursor=house.archive.retention(days=30).confirm_clock(actor="operator"))
    assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert house.actions()[-2:] == ["retention.clock_confirmed", "study.erased"]


def test_daily_rounds_are_believed(house: House) -> None:
    """Day after day the clock goes on, and so does the time that is noted; a study goes on its day."""
    house.ingest(photograph())
    caretaker = house.archive.caretaker(duties=Duties(database=house.database, holder="one"), retention_days=30, scrub_days=0)
    for day in (0, 1, 2, 8, 14, 20, 26, 31.5):
        assert "study.erased" not in house.actions()
        house.archive._clock = house.database.clock = lambda day=day: later(day)
        assert caretaker.do_due(threading.Event(), only="retention") == ["retention"]
    assert house.actions()[-1] == "study.erased"
    assert "retention.held" not in house.actions()
