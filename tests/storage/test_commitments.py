"""The register of storage commitments and the check behind it, on both engines: idempotent, bounded, claimed once, true."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from storage.commitment_check import CommitmentCheck
from storage.commitments import (
    COMMITMENTS,
    NEXT,
    Commitments,
    DuplicateTransaction,
    Patience,
    Proofs,
    Reference,
    State,
    TooManyTransactions,
)
from storage.errors import LeaseLost
from storage.records import JobKind, NewJob
from tests.storage.house import House
from tests.storage.samples import Sample, photograph

Build = Callable[..., House]


class Clock:
    """A time of day that goes on when told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    """The clock of the house."""
    return Clock()


@pytest.fixture
def house(houses: Build, clock: Clock) -> House:
    """A house whose database tells this time."""
    house = houses()
    house.database.clock = clock
    return house


PATIENCE = Patience(delay=lambda attempts: 10.0 * attempts)


def register(house: House, patience: Patience = PATIENCE) -> Commitments:
    """What peers ask of us."""
    return Commitments(database=house.database, audit=house.audit, patience=patience)


def proofs(house: House, patience: Patience = PATIENCE) -> Proofs:
    """What we ask of peers."""
    return Proofs(database=house.database, audit=house.audit, queue=house.queue, index=house.index, patience=patience)


def check(house: House) -> CommitmentCheck:
    """Reads again."""
    return CommitmentCheck(index=house.index, places=house.archive.places, study_keys=house.study_keys, audit=house.audit)


def rows(house: House) -> list[Any]:
    """All of the table."""
    with house.database.read() as connection:
        return list(connection.execute(select(COMMITMENTS).order_by(COMMITMENTS.c.digest)))


def kept(house: House, sample: Sample | None = None) -> Reference:
    """Archive an instance."""
    receipt = house.ingest(sample or photograph())
    return Reference(receipt.sop_class_uid, receipt.sop_instance_uid)


A, B = Reference("1.2.3", "1.4.1"), Reference("1.2.3", "1.4.2")


def test_accept_is_idempotent(house: House) -> None:
    """The same request is one row, whatever the order of its references; another under the UID is refused; peers do not share UIDs."""
    commitments = register(house)
    first = commitments.accept("pacs", "1.9", [A, B])
    assert first is not None
    assert (first.references, first.outcome, first.state) == ((A, B), (None, None), State.ASKED)
    assert commitments.accept("pacs", "1.9", [B, A]) is None
    with pytest.raises(DuplicateTransaction) as refused:
        commitments.accept("pacs", "1.9", [A])
    assert refused.value.failure_reason == 0x0131
    assert commitments.accept("other", "1.9", [A]) is not None
    assert len(rows(house)) == 2


def test_open_commitments_are_bounded(house: House) -> None:
    """Beyond the limit a peer is refused with 0213, another is not; what is over does not count."""
    commitments = register(house, replace(PATIENCE, open_at_most=2))
    first = commitments.accept("pacs", "1.1", [A])
    assert first is not None
    assert commitments.accept("pacs", "1.2", [A]) is not None
    with pytest.raises(TooManyTransactions) as refused:
        commitments.accept("pacs", "1.3", [A])
    assert refused.value.failure_reason == 0x0213
    assert commitments.accept("other", "1.3", [A]) is not None
    examined = commitments.examined(first, [0])
    assert examined is not None
    commitments.reported(examined)
    assert commitments.accept("pacs", "1.3", [A]) is not None


def test_lease(house: House, clock: Clock) -> None:
    """What is claimed is nobody else's until the lease ends; then the first holder's steps are refused."""
    commitments = register(house)
    first = commitments.accept("pacs", "1.9", [A])
    assert first is not None
    assert commitments.claim("pacs") is None
    assert commitments.lanes() == []
    clock.pass_(50)
    first = commitments.renew(first)
    clock.pass_(50)
    assert commitments.claim("pacs") is None
    clock.pass_(15)
    assert commitments.lanes() == ["pacs"]
    second = commitments.claim("pacs")
    assert second is not None
    for step in (commitments.renew, commitments.release, lambda held: commitments.examined(held, [0])):
        with pytest.raises(LeaseLost):
            step(first)
    commitments.release(second)
    assert commitments.claim("pacs") is not None


def test_claimed_once_by_many(house: House) -> None:
    """Eight threads that claim at once get each commitment once."""
    commitments = register(house)
    for number in range(20):
        held = commitments.accept("pacs", f"1.{number + 1}", [A])
        assert held is not None
        commitments.release(held)
    got: list[str] = []

    def claim() -> None:
        while (one := register(house).claim("pacs")) is not None:
            got.append(one.transaction_uid)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(f"1.{number + 1}" for number in range(20))


def test_what_is_not_known_is_looked_at_again(house: House, clock: Clock) -> None:
    """An outcome that is not known yet is kept in part and postponed; when the patience ends it is a failure, 0213."""
    commitments = register(house)
    held = commitments.accept("pacs", "1.9", [A, B])
    assert held is not None
    assert commitments.examined(held, [0, None]) is None
    assert commitments.claim("pacs") is None
    clock.pass_(11)
    again = commitments.claim("pacs")
    assert again is not None
    assert (again.outcome, again.attempts) == ((0, None), 1)
    clock.pass_(3600)
    final = commitments.examined(again, [0, None])
    assert final is not None
    assert (final.outcome, final.failed, final.state) == ((0, 0x0213), 1, State.EXAMINED)
    (event,) = [entry.event for entry in house.audit.events_of("1.9")]
    assert (event.action, event.actor, event.detail) == ("instances.committed", "pacs", {"committed": 1, "failed": 1})


def test_reports_end_and_are_forgotten(house: House, clock: Clock) -> None:
    """A report that is not taken is due again, later each time, for days; what is over loses its references and is forgotten in a month."""
    commitments = register(house)
    held = commitments.accept("pacs", "1.9", [A])
    assert held is not None
    examined = commitments.examined(held, [0])
    assert examined is not None
    assert commitments.unreported(examined) is State.EXAMINED
    clock.pass_(9)
    assert commitments.claim("pacs") is None
    clock.pass_(2)
    second = commitments.claim("pacs")
    assert second is not None
    assert (second.outcome, second.attempts, second.state) == ((0,), 1, State.EXAMINED)
    clock.pass_(4 * 86400)
    assert commitments.unreported(second) is State.UNREPORTED
    assert commitments.lanes() == []
    assert rows(house)[0].instances == "[]"
    again = commitments.accept("pacs", "1.9", [A])
    assert again is not None
    assert again.references == (A,)
    examined = commitments.examined(again, [0])
    assert examined is not None
    commitments.reported(examined)
    clock.pass_(29 * 86400)
    assert commitments.forget() == 0
    clock.pass_(2 * 86400)
    assert commitments.forget() == 1
    assert rows(house) == []


def test_a_clock_put_back_delays_nothing_for_ever(house: House, clock: Clock) -> None:
    """A row that a wrong clock wrote a year ahead is due."""
    commitments = register(house)
    clock.pass_(400 * 86400)
    assert commitments.accept("pacs", "1.9", [A]) is not None
    clock.pass_(-400 * 86400)
    assert commitments.claim("pacs") is not None


def test_steps_are_those_of_the_table(house: House) -> None:
    """Every state but the first two is reached from another, and a step that is not in the table is refused."""
    assert set(NEXT) == set(State)
    assert {after for steps in NEXT.values() for after in steps} == set(State)
    commitments = register(house)
    held = commitments.accept("pacs", "1.9", [A])
    assert held is not None
    with pytest.raises(ValueError, match="no way leads"):
        commitments.reported(held)


def test_check_tells_the_truth(house: House) -> None:
    """0 for what is there, 0112, 0119, 0122 for what is not so; 0110 and an alarm for what is damaged or gone."""
    good, other, damaged, gone = (kept(house) for _ in range(4))
    for reference, content in ((damaged, b"x"), (gone, None)):
        key = house.index.find(reference.sop_instance_uid).sealed.object_key
        (path,) = [path for path in (house.folder / "objects").rglob("*") if path.name.startswith(key)]
        path.chmod(0o600)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + content)
    told = CommitmentCheck(
        index=house.index,
        places=house.archive.places,
        study_keys=house.study_keys,
        audit=house.audit,
        supported=lambda uid: uid != "1.2.999",
    )
    asked = [good, replaced(other, "1.2.999"), replaced(A, "1.2.999"), A, damaged, gone]
    assert list(told.examine(asked)) == [0, 0x0119, 0x0122, 0x0112, 0x0110, 0x0110]
    for reference in (damaged, gone):
        assert "instance.damaged" in {entry.event.action for entry in house.audit.events_of(reference.sop_instance_uid)}
    assert list(told.examine(asked, [7, None, 9, None, 5, 6])) == [7, 0x0119, 9, 0x0112, 5, 6]


def replaced(reference: Reference, sop_class_uid: str) -> Reference:
    """The same instance under another class."""
    return Reference(sop_class_uid, reference.sop_instance_uid)


@pytest.mark.peer
def test_what_landed_is_not_in_the_store_yet(houses: Build, s3_store: Any) -> None:
    """With policy land an instance is not known to be kept until the Mover brought it into the store; then it is read from there."""
    house = houses(store=s3_store, node_id="node-a")
    reference = kept(house)
    assert list(check(house).examine([reference])) == [None]
    job = house.queue.claim(JobKind.ARCHIVE, owner="mover")
    assert job is not None
    house.archive.bring(job)
    assert list(check(house).examine([reference])) == [0]
    s3_store.delete(house.index.find(reference.sop_instance_uid).sealed.object_key)
    assert list(check(house).examine([reference])) == [0x0110]


# -- what we ask -----------------------------------------------------------------------------------------------------------------------


def delivered(house: House, office: Proofs, reference: Reference | None = None) -> tuple[Reference, int]:
    """Deliver a report to the peer."""
    reference = reference or kept(house)
    job = NewJob(JobKind.DELIVER, reference.sop_instance_uid, lane="pacs")
    house.database.write(lambda connection: house.queue.enqueue(connection, job))
    claimed = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier")
    assert claimed is not None
    office.delivered("pacs", claimed, reference)
    house.archive.acknowledge(claimed, status=0)
    return reference, claimed.id


def test_asked_in_a_batch_and_proven(house: House, clock: Clock) -> None:
    """What was delivered is asked in one transaction; the peer's word ends in job and audit; said twice it changes nothing."""
    office = proofs(house)
    (first, job), (second, _) = delivered(house, office), delivered(house, office)
    assert office.ask("pacs") is None
    clock.pass_(3)
    assert register(house).lanes() == ["pacs"]
    asking = office.ask("pacs")
    assert asking is not None
    assert sorted(asking.references) == sorted([first, second])
    assert office.ask("pacs") is None
    office.asked(asking)
    assert office.reported("other", asking.transaction_uid, [first.sop_instance_uid], {}) is None
    assert office.reported("pacs", "1.2.3", [first.sop_instance_uid], {}) is None
    assert office.reported("pacs", "", [first.sop_instance_uid], {}) is None
    told = office.reported("pacs", asking.transaction_uid, [first.sop_instance_uid], {second.sop_instance_uid: 0x0112})
    assert told is not None
    assert (told.committed, len(told.denied), told.given_up) == ((job,), 1, ())
    again = office.reported("pacs", asking.transaction_uid, [], {first.sop_instance_uid: 0x0112})
    assert again is not None
    assert (again.committed, again.denied, again.given_up) == ((), (), ())
    (done,) = [one for one in house.queue.jobs_of(first.sop_instance_uid) if one.kind is JobKind.DELIVER]
    assert done.result["commitment"] == {"transaction_uid": asking.transaction_uid, "at": clock.now.isoformat()}
    (event,) = [entry.event for entry in house.audit.events_of(second.sop_instance_uid) if entry.event.action == "report.denied"]
    assert event.outcome == "not committed by the peer: failure reason 0112"


def test_report_before_the_answer(house: House, clock: Clock) -> None:
    """A report that comes before the request is noted as taken counts, and is not undone by that."""
    office = proofs(house)
    reference, _ = delivered(house, office)
    clock.pass_(3)
    asking = office.ask("pacs")
    assert asking is not None
    told = office.reported("pacs", asking.transaction_uid, [reference.sop_instance_uid], {})
    assert told is not None
    assert len(told.committed) == 1
    office.asked(asking)
    assert [row.state for row in rows(house)] == [State.COMMITTED]


def test_sent_again_until_it_is_given_up(house: House, clock: Clock) -> None:
    """Without a report in time the delivery is ready again, three times in all; an operator's requeue asks once more."""
    office = proofs(house)
    reference, job = delivered(house, office)
    for number in (1, 2, 3):
        clock.pass_(3)
        asking = office.ask("pacs")
        assert asking is not None
        office.asked(asking)
        clock.pass_(86399)
        assert office.overdue("pacs").denied == ()
        clock.pass_(2)
        told = office.overdue("pacs")
        assert (told.denied, told.given_up) == (((job,), ()) if number < 3 else ((), (job,)))
        clock.pass_(10.0 * number - 1)
        office.overdue("pacs")
        assert house.queue.lanes(JobKind.DELIVER) == []
        clock.pass_(2)
        office.overdue("pacs")
        assert house.queue.lanes(JobKind.DELIVER) == (["pacs"] if number < 3 else [])
        if number < 3:
            assert delivered(house, office, reference) == (reference, job)
    house.queue.requeue(job)
    assert delivered(house, office, reference) == (reference, job)
    clock.pass_(3)
    assert office.ask("pacs") is not None


def test_unasked(house: House, clock: Clock) -> None:
    """A request that is not taken is made again later under another Transaction UID; a killed one when its lease ends; days end it."""
    office = proofs(house)
    reference, job = delivered(house, office)
    clock.pass_(3)
    first = office.ask("pacs")
    assert first is not None
    assert office.unasked(first, "away") == ()
    clock.pass_(9)
    assert office.ask("pacs") is None
    clock.pass_(2)
    second = office.ask("pacs")
    assert second is not None
    clock.pass_(61)
    third = office.ask("pacs")
    assert third is not None
    assert len({first.transaction_uid, second.transaction_uid, third.transaction_uid}) == 3
    clock.pass_(3 * 86400)
    assert office.unasked(third, "away") == (job,)
    assert office.ask("pacs") is None
    (event,) = [entry.event for entry in house.audit.events_of(reference.sop_instance_uid) if entry.event.action == "report.unproven"]
    assert (event.outcome, event.actor) == ("away", "pacs")


def test_erased_reports_are_not_sent_again(house: House, clock: Clock) -> None:
    """What was erased here meanwhile is not delivered again."""
    office = proofs(house)
    reference, _ = delivered(house, office)
    clock.pass_(3)
    asking = office.ask("pacs")
    assert asking is not None
    office.reported("pacs", asking.transaction_uid, [], {reference.sop_instance_uid: 0x0112})
    study = house.index.find(reference.sop_instance_uid).summary.study_instance_uid
    house.archive.erasure().erase_study(study, reason="asked to", actor="operator")
    clock.pass_(20)
    office.overdue("pacs")
    assert house.queue.lanes(JobKind.DELIVER) == []
    assert [row.state for row in rows(house)] == [State.RESENT]
