"""Proof of arrival: storage commitment is asked of what was delivered, and what the peer does not have is sent again (fault 36)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pynetdicom.association import Association

from dicom_node.clerk import CommitmentClerk
from dicom_node.courier import Courier
from dicom_node.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, CommitmentCaller
from dicom_node.dimse.scu import StorageSCU
from dicom_node.peers import Peer, Peers
from storage.commitments import Patience, State
from storage.records import Job, JobState
from tests.dicom_node.commitment_peer import CommitmentPeer, Office, Taken, information, open_office
from tests.dicom_node.door import Rooms, open_door, open_rooms
from tests.dicom_node.test_commitment import states
from tests.dicom_node.test_courier import archived, job_of, wait_for

QUICK = Patience(delay=lambda _: 0.2, answer_s=1.0, lease_s=2.0)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Rooms]:
    """An archive with reports to deliver."""
    rooms = open_rooms(tmp_path)
    yield rooms
    rooms.database.close()


@pytest.fixture
def pacs() -> Iterator[CommitmentPeer]:
    """A peer that acknowledges what it is sent, and keeps nothing."""
    with CommitmentPeer() as pacs:
        yield pacs


def destination(pacs: CommitmentPeer) -> Peer:
    """The peer as the node knows it."""
    return Peer("pacs", "PACS", "127.0.0.1", pacs.port, commit=True)


def opened(house: Rooms, pacs: CommitmentPeer, *, patience: Patience = QUICK) -> Office:
    """The parts of storage commitment."""
    return open_office(house, [destination(pacs)], patience=patience)


@contextmanager
def running(house: Rooms, pacs: CommitmentPeer, office: Office) -> Iterator[None]:
    """Let the courier run with its clerk."""
    sender = StorageSCU(ae_title="DERM_NODE", connect_s=5.0, answer_s=5.0)
    courier = Courier(
        archive=house.archive, queue=house.queue, peers=Peers([destination(pacs)]), sender=sender, clerk=office.clerk, poll_s=0.05
    )
    stop = threading.Event()
    thread = threading.Thread(target=courier.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def reporting(committed: Callable[[str], bool]) -> Callable[[Taken], None]:
    """Report soon after a request on its association, each instance committed or 0112."""

    def report(taken: Taken) -> None:
        good = [pair for pair in taken.references if committed(pair[1])]
        bad = {pair: 0x0112 for pair in taken.references if not committed(pair[1])}
        threading.Timer(0.2, _tell, (taken.association, taken.transaction_uid, good, bad)).start()

    return report


def _tell(association: Association, uid: str, good: list[tuple[str, str]], bad: dict[tuple[str, str], int]) -> None:
    association.send_n_event_report(information(uid, good, bad), 2 if bad else 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)


def actions(house: Rooms, uid: str) -> list[str]:
    """What the audit trail says of a report."""
    return [entry.event.action for entry in house.audit.events_of(uid) if entry.event.action.startswith("report.")]


def committed(job: Job) -> bool:
    """Whether the proof is in the delivery's result."""
    return job.state is JobState.DONE and "commitment" in job.result


def test_proof_of_arrival(house: Rooms, pacs: CommitmentPeer) -> None:
    """Three delivered reports are asked for together; the peer's report on that association is kept as proof in job and audit."""
    pacs.on_action = reporting(lambda _: True)
    sent = [archived(house, "pacs")[0] for _ in range(3)]
    office = opened(house, pacs)
    with running(house, pacs, office):
        wait_for(house, lambda: all(committed(job_of(house, uid, "pacs")) for uid in sent))
    assert len(pacs.taken) <= 2, "a batch is delivered within a second, or over the turn of one"
    assert sorted(uid for taken in pacs.taken for _, uid in taken.references) == sorted(sent)
    under = {uid: taken.transaction_uid for taken in pacs.taken for _, uid in taken.references}
    for uid in sent:
        result = job_of(house, uid, "pacs").result
        assert (result["status"], result["commitment"]["transaction_uid"]) == ("0000", under[uid])
        assert actions(house, uid) == ["report.delivered", "report.committed"]
        (told,) = house.archive.trace(uid)["instances"]
        assert [job["result"]["commitment"]["transaction_uid"] for job in told["jobs"]] == [under[uid]]
    assert states(office) == [State.COMMITTED] * 3


def test_what_the_peer_lost_is_sent_again(house: Rooms, pacs: CommitmentPeer) -> None:
    """The peer answers 0000, keeps nothing, and reports 0112: the report is sent again, three times in all, then given up aloud."""
    pacs.on_action = reporting(lambda _: False)
    uid, _ = archived(house, "pacs")
    office = opened(house, pacs)
    with running(house, pacs, office):
        wait_for(house, lambda: states(office) == [State.UNCOMMITTED])
    assert pacs.stored == [uid] * 3
    assert len({taken.transaction_uid for taken in pacs.taken}) == 3
    assert actions(house, uid) == ["report.delivered", "report.denied"] * 2 + ["report.delivered", "report.uncommitted"]


def test_only_what_was_lost_is_sent_again(house: Rooms, pacs: CommitmentPeer) -> None:
    """Of two reports the lost one is sent again, and committed the second time."""
    kept, lost = archived(house, "pacs")[0], archived(house, "pacs")[0]
    pacs.on_action = reporting(lambda uid: uid == kept or pacs.stored.count(uid) > 1)
    office = opened(house, pacs)
    with running(house, pacs, office):
        wait_for(house, lambda: committed(job_of(house, kept, "pacs")) and committed(job_of(house, lost, "pacs")))
    assert (pacs.stored.count(kept), pacs.stored.count(lost)) == (1, 2)


def test_a_peer_that_never_reports(house: Rooms, pacs: CommitmentPeer) -> None:
    """No report within the patience: the instance is sent again; a report that comes then still proves it."""
    uid, _ = archived(house, "pacs")
    office = opened(house, pacs)
    with running(house, pacs, office):
        wait_for(house, lambda: pacs.stored.count(uid) == 2)
        pacs.on_action = reporting(lambda _: True)
        wait_for(house, lambda: committed(job_of(house, uid, "pacs")))
    assert actions(house, uid)[:2] == ["report.delivered", "report.denied"]


def test_a_peer_without_the_service(house: Rooms) -> None:
    """A peer that offers no storage commitment is not sent the report again; after days without proof that is said, once."""
    with CommitmentPeer(offers=False) as pacs:
        uid, _ = archived(house, "pacs")
        office = opened(house, pacs, patience=replace(QUICK, report_s=1.0))
        with running(house, pacs, office):
            wait_for(house, lambda: states(office) == [State.UNPROVEN])
        assert pacs.stored == [uid]
        assert actions(house, uid) == ["report.delivered", "report.unproven"]


def test_a_peer_that_refuses_the_request(house: Rooms, pacs: CommitmentPeer) -> None:
    """A request refused with 0213 is made again, under a Transaction UID of its own, until it is taken."""
    pacs.action_status = 0x0213
    uid, _ = archived(house, "pacs")
    office = opened(house, pacs)
    with running(house, pacs, office):
        pacs.await_actions(2)
        pacs.on_action, pacs.action_status = reporting(lambda _: True), 0
        wait_for(house, lambda: committed(job_of(house, uid, "pacs")))
    assert pacs.stored == [uid]
    assert len({taken.transaction_uid for taken in pacs.taken}) == len(pacs.taken) >= 3


def test_a_peer_that_is_not_to_be_asked(house: Rooms, pacs: CommitmentPeer) -> None:
    """Without ``commit`` a peer is asked nothing, and its delivery is done with its answer."""
    uid, _ = archived(house, "pacs")
    office = opened(house, pacs)
    office.clerk.delivered(replace(destination(pacs), commit=False), job_of(house, uid, "pacs"), house.index.find(uid).summary)
    assert states(office) == []


def asked(house: Rooms, pacs: CommitmentPeer, office: Office) -> tuple[str, Taken]:
    """Deliver a report, and ask for its commitment; the peer has not reported yet."""
    uid, _ = archived(house, "pacs")
    with running(house, pacs, office):
        (taken,) = pacs.await_actions(1)
        wait_for(house, lambda: states(office) == [State.AWAITED])
    return uid, taken


def test_report_at_our_door(house: Rooms, pacs: CommitmentPeer) -> None:
    """A peer that reports on an association of its own, as SCP by role selection, is heard at the door; a second time changes nothing."""
    office = opened(house, pacs, patience=replace(QUICK, answer_s=60.0))
    uid, taken = asked(house, pacs, office)
    with open_door(house, peers=Peers([destination(pacs)]), services=[office.service]) as door:
        with pacs.calling(door.port, as_scp=True) as association:
            assert association.is_established
            (role,) = association.acceptor.role_selection.values()
            assert (role.scu_role, role.scp_role) == (False, True)
        assert pacs.tell(door.port, information(taken.transaction_uid, taken.references)) == 0
        assert committed(job_of(house, uid, "pacs"))
        assert pacs.tell(door.port, information(taken.transaction_uid, [], dict.fromkeys(taken.references, 0x0112)), event_type=2) == 0
    assert states(office) == [State.COMMITTED]
    assert actions(house, uid) == ["report.delivered", "report.committed"]


def test_forged_reports(house: Rooms, pacs: CommitmentPeer) -> None:
    """Another known peer that names our transaction, and foreign instances in the right peer's report, change nothing (row 22)."""
    office = opened(house, pacs, patience=replace(QUICK, answer_s=60.0))
    uid, taken = asked(house, pacs, office)
    foreign, _ = archived(house)
    known = Peers([destination(pacs), Peer("forger", "FORGER", "127.0.0.1", 0, commit=True)])
    with open_door(house, peers=known, services=[office.service]) as door:
        assert pacs.tell(door.port, information(taken.transaction_uid, taken.references), ae_title="FORGER") == 0x0115
        assert states(office) == [State.AWAITED]
        more = [(taken.references[0][0], foreign), *taken.references]
        assert pacs.tell(door.port, information(taken.transaction_uid, more)) == 0
    assert committed(job_of(house, uid, "pacs"))
    assert actions(house, foreign) == []
    assert states(office) == [State.COMMITTED]


def test_what_a_report_does_not_speak_of_is_not_committed(house: Rooms, pacs: CommitmentPeer) -> None:
    """A success report that names another instance proves nothing: the report is sent again."""
    office = opened(house, pacs, patience=replace(QUICK, answer_s=60.0))
    uid, taken = asked(house, pacs, office)
    with open_door(house, peers=Peers([destination(pacs)]), services=[office.service]) as door:
        assert pacs.tell(door.port, information(taken.transaction_uid, [("1.2", "1.3")])) == 0
    pacs.on_action = reporting(lambda _: True)
    with running(house, pacs, office):
        wait_for(house, lambda: committed(job_of(house, uid, "pacs")))
    assert pacs.stored == [uid, uid]


@pytest.mark.parametrize("point", ["commitment.asking", "commitment.asked"])
def test_killed_while_asking(house: Rooms, pacs: CommitmentPeer, point: str) -> None:
    """A clerk that dies before the request or after it is followed by another, and the proof comes in the end."""

    class Killed(BaseException):
        pass

    def kill(name: str) -> None:
        if name == point:
            raise Killed

    office = opened(house, pacs)
    uid, _ = archived(house, "pacs")
    peers, caller = Peers([destination(pacs)]), CommitmentCaller(ae_title="DERM_NODE", connect_s=5.0, answer_s=5.0)
    dying = CommitmentClerk(
        commitments=office.commitments, proofs=office.proofs, check=office.check, caller=caller, peers=peers, wait_s=0.1, reach=kill
    )
    sender = StorageSCU(ae_title="DERM_NODE")
    Courier(archive=house.archive, queue=house.queue, peers=peers, sender=sender, clerk=dying).deliver("pacs")
    for _ in range(600):
        try:
            dying.serve("pacs", threading.Event())
        except Killed:
            break
        house.database.changed(0.05)
    else:
        pytest.fail(f"{point} was not reached")
    pacs.on_action = reporting(lambda _: True)
    with running(house, pacs, office):
        wait_for(house, lambda: committed(job_of(house, uid, "pacs")))
