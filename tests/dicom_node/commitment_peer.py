"""A peer that speaks Storage Commitment, both sides, made of pynetdicom: it shares no code with the node's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.association import Association
from pynetdicom.transport import ThreadedAssociationServer

from dicom_node.clerk import CommitmentClerk
from dicom_node.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, CommitmentCaller, CommitmentSCP
from dicom_node.peers import Peer, Peers
from storage.commitment_check import CommitmentCheck
from storage.commitments import Commitments, Patience, Proofs, Reference
from storage.failpoints import unarmed
from storage.keys import Ring
from storage.study_keys import StudyKeys
from tests.dicom_node.door import Rooms
from tests.ports import free_port

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """An N-EVENT-REPORT that came."""

    event_type: int
    data_set: Dataset
    here: bool
    """On an association that we accepted; else on that of our request."""
    as_scp: bool
    """The sender negotiated to be the SCP."""

    @property
    def committed(self) -> list[tuple[str, str]]:
        """Referenced SOP Sequence."""
        return [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in self.data_set.get("ReferencedSOPSequence", ())]

    @property
    def failed(self) -> dict[str, int]:
        """SOP Instance UID -> failure reason."""
        return {item.ReferencedSOPInstanceUID: item.FailureReason for item in self.data_set.get("FailedSOPSequence", ())}


@dataclass
class Taken:
    """An N-ACTION that came."""

    transaction_uid: str
    references: list[tuple[str, str]]
    association: Association


@dataclass
class CommitmentPeer:
    """A context manager: an application entity that listens, asks and reports.

    ``store_status`` is what C-STORE is answered with (the instance is thrown away), ``action_status`` what N-ACTION is, and
    ``event_status`` what a report of the node is.
    """

    ae_title: str = "PACS"
    port: int = field(default_factory=free_port)
    action_status: int = 0
    event_status: int = 0
    reports: list[Report] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    on_action: Callable[[Taken], None] = lambda _: None
    offers: bool = True
    _arrived: threading.Condition = field(default_factory=threading.Condition)
    _server: ThreadedAssociationServer | None = None

    def __enter__(self) -> Self:
        entity = AE(self.ae_title)
        entity.require_called_aet = True
        if self.offers:
            entity.add_supported_context(PUSH_MODEL, scu_role=True, scp_role=True)
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax))
        handlers = [(evt.EVT_N_EVENT_REPORT, self._report, [True]), (evt.EVT_N_ACTION, self._action), (evt.EVT_C_STORE, self._store)]
        self._server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)  # type: ignore[assignment,arg-type]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.shutdown()

    def await_reports(self, count: int) -> list[Report]:
        """Wait until so many reports came."""
        return self._await(lambda: self.reports, count)

    def await_actions(self, count: int) -> list[Taken]:
        """Wait until so many requests came."""
        return self._await(lambda: self.taken, count)

    def _await(self, things: Callable[[], list[Any]], count: int) -> list[Any]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(things()) >= count, 30), f"{len(things())} of {count} came"
            return list(things())

    @contextmanager
    def calling(self, port: int, *, ae_title: str = "", as_scp: bool = False) -> Iterator[Association]:
        """Associate with the node for Storage Commitment; `as_scp` to report."""
        entity = AE(ae_title or self.ae_title)
        entity.add_requested_context(PUSH_MODEL)
        roles = [build_role(PUSH_MODEL, scp_role=True)] if as_scp else []
        association = entity.associate(
            "127.0.0.1", port, ae_title="DERM_NODE", ext_neg=roles, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._report, [False])]
        )  # type: ignore[arg-type]
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def ask(self, port: int, transaction_uid: str, references: Pairs, *, then: Callable[[], object] = lambda: None) -> int:
        """Ask the node for commitment; the association stays open for ``then``. Returns the status."""
        with self.calling(port) as association:
            assert association.is_established
            status, _ = association.send_n_action(information(transaction_uid, references), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
            then()
        return int(status.Status)

    def tell(self, port: int, data_set: Dataset, *, event_type: int = 1, ae_title: str = "") -> int | None:
        """Report to the node on an association of our own. Returns the status; None where it does not let us."""
        with self.calling(port, ae_title=ae_title, as_scp=True) as association:
            if not association.is_established:
                return None
            status, _ = association.send_n_event_report(data_set, event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        return int(status.Status)

    def _report(self, event: evt.Event, here: bool) -> tuple[int, None]:
        role = event.assoc.requestor.role_selection.get(UID(PUSH_MODEL))
        data_set = event.event_information
        assert event.request.AffectedSOPInstanceUID == PUSH_MODEL_INSTANCE  # type: ignore[union-attr]
        with self._arrived:
            self.reports.append(Report(int(event.event_type or 0), data_set, here, bool(role and role.scp_role and not role.scu_role)))
            self._arrived.notify_all()
        return self.event_status, None

    def _action(self, event: evt.Event) -> tuple[int, None]:
        asked = event.action_information
        references = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in asked.ReferencedSOPSequence]
        taken = Taken(asked.TransactionUID, references, event.assoc)
        self.on_action(taken)
        with self._arrived:
            self.taken.append(taken)
            self._arrived.notify_all()
        return self.action_status, None

    def _store(self, event: evt.Event) -> int:
        self.stored.append(str(event.request.AffectedSOPInstanceUID))  # type: ignore[union-attr]
        return 0


def information(transaction_uid: str, committed: Pairs, failed: dict[tuple[str, str], int] | None = None) -> Dataset:
    """Action or Event Information as pynetdicom encodes it."""
    data_set = Dataset()
    data_set.TransactionUID = transaction_uid
    if committed:
        data_set.ReferencedSOPSequence = [_item(pair) for pair in committed]
    if failed:
        data_set.FailedSOPSequence = [_item(pair, reason) for pair, reason in failed.items()]
    return data_set


def _item(pair: tuple[str, str], reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = pair
    if reason is not None:
        item.FailureReason = reason
    return item


def transaction() -> str:
    """Return a new Transaction UID."""
    return str(generate_uid())


@dataclass
class Office:
    """All that storage commitment is made of, over the rooms of an archive."""

    rooms: Rooms
    commitments: Commitments
    proofs: Proofs
    check: CommitmentCheck
    service: CommitmentSCP
    clerk: CommitmentClerk

    def work(self, lane: str) -> None:
        """Do what is due for a peer."""
        self.clerk.serve(lane, threading.Event())

    def work_until(self, lane: str, condition: Callable[[], bool]) -> None:
        """Do what is due for a peer until something has come about."""
        for _ in range(600):
            self.work(lane)
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("it did not come")


def open_office(
    rooms: Rooms, peers: Sequence[Peer], *, patience: Patience | None = None, reach: Callable[[str], None] = unarmed, **settings: Any
) -> Office:
    """Put the parts together, as the composition root does."""
    patience = patience or Patience(delay=lambda _: 0.3, wait_s=0.0)
    commitments = Commitments(database=rooms.database, audit=rooms.audit, patience=patience)
    proofs = Proofs(database=rooms.database, audit=rooms.audit, queue=rooms.queue, index=rooms.index, patience=patience)
    keys = StudyKeys(database=rooms.database, ring=Ring.load(rooms.folder / "keys"))
    check = CommitmentCheck(
        index=rooms.index, places=rooms.archive.places, study_keys=keys, audit=rooms.audit, supported=lambda uid: not uid.endswith(".999")
    )
    arguments = {"pause_s": 0.3, "answer_s": 5.0, **settings}
    service = CommitmentSCP(commitments=commitments, check=check, proofs=proofs, **arguments)
    caller = CommitmentCaller(ae_title="DERM_NODE", connect_s=5.0, answer_s=5.0)
    clerk = CommitmentClerk(commitments=commitments, proofs=proofs, check=check, caller=caller, peers=Peers(peers), wait_s=0.5, reach=reach)
    return Office(rooms, commitments, proofs, check, service, clerk)


__all__ = ["CommitmentPeer", "Office", "Reference", "information", "open_office", "transaction"]
