"""Trace of what is no more: erased studies are told apart from what was never here."""

from __future__ import annotations

import json

import pytest

from dicom_node.tracing import lines
from storage.errors import InstanceNotFound
from tests.storage.house import House
from tests.storage.samples import photograph


def test_an_erased_study_is_told_as_such(house: House) -> None:
    """Asked by the study's UID or an instance's: that it was erased, when, by whom, why, and how much; never "none"."""
    sample = photograph()
    house.ingest(sample)
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="asked by the patient")
    for uid in (sample.study_instance_uid, sample.sop_instance_uid):
        told = json.loads(json.dumps(house.archive.trace(uid)))
        assert told["level"] == "erased"
        assert told["instances"] == []
        erased = told["erased"]
        assert (erased["study_instance_uid"], erased["actor"], erased["instances"]) == (sample.study_instance_uid, "operator", 1)
        assert erased["reason"] == "asked by the patient"
        text = "\n".join(lines(told))
        assert text.startswith(f"erased: {uid}\n  erased ")
        assert "by operator" in text
        assert "asked by the patient" in text
        assert "none" not in text
    assert f"with its study {sample.study_instance_uid}" in text


def test_a_study_that_came_again_says_both(house: House) -> None:
    """Erased, then sent again: the instances, and that there was an erasure before."""
    sample = photograph()
    house.ingest(sample)
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="retention", reason="30 days")
    house.ingest(sample)
    told = house.archive.trace(sample.study_instance_uid)
    assert (told["level"], len(told["instances"]), told["erased"]["actor"]) == ("study", 1, "retention")
    assert "  what follows was received after that" in list(lines(told))


def test_what_was_never_erased_does_not_say_so(house: House) -> None:
    """An archived study has no erasure; an unknown UID is not found."""
    sample = photograph()
    house.ingest(sample)
    assert house.archive.trace(sample.study_instance_uid)["erased"] is None
    with pytest.raises(InstanceNotFound, match="ever received here"):
        house.archive.trace("1.2.3")


def test_what_was_lost_with_a_node_is_not_to_be_requeued(house: House) -> None:
    """A dead job can be run again by its number; one whose object was lost with a node only by sending the instance again."""
    sample = photograph()
    house.ingest(sample)
    told = json.loads(json.dumps(house.archive.trace(sample.sop_instance_uid)))
    (instance,) = told["instances"]
    job = {"id": 7, "kind": "analyse", "state": "dead", "attempts": 3, "reason": "why", "result": {}, "finished_at": None}
    instance["jobs"] = [job]
    assert "      again with: `dicom-node requeue 7`" in list(lines(told))
    instance["jobs"] = [{**job, "result": {"outcome": "lost"}}]
    text = "\n".join(lines(told))
    assert "requeue" not in text
    assert "again when the instance is sent again" in text
