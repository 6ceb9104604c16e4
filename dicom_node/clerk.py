"""Sees to storage commitment, beside the courier: reports what peers asked of us, and asks the peers that got our reports.

All of it is in the database, so that whoever is killed is followed by another; a lane is a peer, as it is the courier's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from dicom_node.dimse.commitment import log_told
from dicom_node.dimse.receive import unobserved
from dicom_node.errors import DeliveryError, PeerUnreachable
from storage.commitments import Commitment, Reference, State
from storage.errors import LeaseLost
from storage.failpoints import unarmed

if TYPE_CHECKING:
    from dicom_node.dimse.commitment import CommitmentCaller
    from dicom_node.peers import Peer, Peers
    from storage.commitment_check import CommitmentCheck
    from storage.commitments import Asking, Commitments, Proofs
    from storage.records import Job, Summary

log = structlog.get_logger(__name__)

_TIDY_S = 3600.0


class _Stopped(Exception):
    """The process ends."""


class CommitmentClerk:
    """Does what is due about storage commitment.

    Parameters
    ----------
    commitments, proofs
        What peers ask of us, and what we ask of them.
    check
        Reads instances again.
    caller
        Calls peers.
    peers
        Lane name -> where that is.
    wait_s
        How long is listened for a peer's report on the association on which we asked for it.
    batch
        Most reports whose commitment is asked at once.
    reach
        Failpoints: commitment.claimed, commitment.examined, commitment.sent, commitment.asking, commitment.asked.
    observe
        Told ``commitment.reported`` (peer, failed), ``commitment.unreported`` (peer), ``commitment.told`` (peer, status),
        ``commitment.asked`` (peer), ``commitment.unasked`` (peer).
    """

    def __init__(
        self,
        *,
        commitments: Commitments,
        proofs: Proofs,
        check: CommitmentCheck,
        caller: CommitmentCaller,
        peers: Peers,
        wait_s: float = 2.0,
        batch: int = 500,
        reach: Callable[[str], None] = unarmed,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._commitments = commitments
        self._proofs = proofs
        self._check = check
        self._caller = caller
        self._peers = peers
        self._wait_s = wait_s
        self._batch = batch
        self._reach = reach
        self._observe = observe
        self._tidied = time.monotonic() - _TIDY_S

    def lanes(self) -> list[str]:
        """Return the peers for which something is due, and forget now and then what is long over.

        Raises
        ------
        Unavailable
            The database.
        """
        if time.monotonic() > self._tidied + _TIDY_S:
            self._tidied = time.monotonic()
            while self._commitments.forget():
                pass
        return self._commitments.lanes()

    def delivered(self, peer: Peer, job: Job, summary: Summary) -> None:
        """Note that a peer acknowledged a report, before the delivery is called done.

        Raises
        ------
        Unavailable
            The database; the delivery must not be called done.
        """
        if peer.commit:
            self._proofs.delivered(peer.name, job, Reference(summary.sop_class_uid, summary.sop_instance_uid))

    def serve(self, lane: str, stop: threading.Event) -> None:
        """Do all that is due for a peer.

        Raises
        ------
        Unavailable
            The database.
        """
        try:
            told = self._proofs.overdue(lane)
            log_told(lane, denied=told.denied, given_up=told.given_up, reason="no commitment in time")
            while not stop.is_set() and (asking := self._proofs.ask(lane, at_most=self._batch)) is not None:
                self._ask(asking)
            while not stop.is_set() and (commitment := self._commitments.claim(lane)) is not None:
                self._see_to(commitment, stop)
        except LeaseLost:  # what is not held is not ours to see to
            log.info("commitment.elsewhere", peer=lane)
        except _Stopped:
            return

    # -- what was asked of us ----------------------------------------------------------------------------------------------------

    def _see_to(self, commitment: Commitment, stop: threading.Event) -> None:
        self._reach("commitment.claimed")
        held = _Held(self._commitments, commitment, stop)
        if commitment.state is State.ASKED:
            try:
                outcome = list(self._check.examine(commitment.references, commitment.outcome, pace=held.pace))
            except _Stopped:
                self._commitments.release(held.commitment)
                raise
            examined = self._commitments.examined(held.commitment, outcome)
            if examined is None:
                log.info("commitment.postponed", peer=commitment.peer, unknown=outcome.count(None), references=len(outcome))
                return
            held.commitment = examined
        self._reach("commitment.examined")
        self._report(held.commitment)

    def _report(self, commitment: Commitment) -> None:
        name = commitment.peer
        try:
            self._caller.report(self._peer(name), commitment)
        except DeliveryError as error:
            state = self._commitments.unreported(commitment)
            self._observe("commitment.unreported", peer=name)
            said = log.error if state is State.UNREPORTED else log.warning
            said("commitment.unreported", peer=name, attempt=commitment.attempts + 1, final=state is State.UNREPORTED, reason=str(error))
            return
        self._reach("commitment.sent")
        self._commitments.reported(commitment)
        self._observe("commitment.reported", peer=name, failed=commitment.failed)
        log.info("commitment.reported", peer=name, failed=commitment.failed, references=len(commitment.references))

    # -- what we ask -------------------------------------------------------------------------------------------------------------

    def _ask(self, asking: Asking) -> None:
        self._reach("commitment.asking")
        try:
            self._caller.request(self._peer(asking.peer), asking, self._proofs, wait_s=self._wait_s, observe=self._observe)
        except DeliveryError as error:
            self._not_asked(asking, str(error))
            return
        self._reach("commitment.asked")
        self._observe("commitment.asked", peer=asking.peer)
        log.info("commitment.asked", peer=asking.peer, reports=len(asking.references))

    def _not_asked(self, asking: Asking, reason: str) -> None:
        given_up = self._proofs.unasked(asking, reason)
        self._observe("commitment.unasked", peer=asking.peer)
        log.warning("commitment.unasked", peer=asking.peer, reports=len(asking.references), reason=reason)
        for job in given_up:
            log.error("delivery.unproven", peer=asking.peer, job=job, reason=reason)

    def _peer(self, name: str) -> Peer:
        peer = self._peers.get(name)
        if peer is None:
            raise PeerUnreachable(f"no peer {name} is known any more; add a [[peers]] entry of that name")
        return peer


class _Held:
    """A claimed commitment whose lease is renewed while its instances are read."""

    def __init__(self, commitments: Commitments, commitment: Commitment, stop: threading.Event) -> None:
        self.commitment = commitment
        self._commitments = commitments
        self._stop = stop
        self._every_s = commitments.patience.lease_s / 3
        self._renewed = time.monotonic()

    def pace(self, _: int) -> None:
        """Renew the lease when it is time to; stop with the process."""
        if self._stop.is_set():
            raise _Stopped
        if time.monotonic() > self._renewed + self._every_s:
            self._renewed = time.monotonic()
            self.commitment = self._commitments.renew(self.commitment)
