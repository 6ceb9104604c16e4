"""Retention: only what is due, never what is held, never what just came."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from storage.errors import InstanceNotFound, StorageError
from storage.retention import Retention
from tests.storage.conftest import Build
from tests.storage.house import House
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
