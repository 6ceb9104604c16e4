"""Storage Commitment Push Model, both sides: what a peer asks of us and what it tells us at the door, and how we call it for the same.

The roles belong to the service, not to the call: who commits sends its report on the association of the request as long as that is open,
and else calls the other one, proposing by role selection that it is the SCP there.

References
----------
DICOM PS3.4 Annex J; PS3.7 Sections 10.1.1 (N-EVENT-REPORT), 10.1.4 (N-ACTION), Annex C (status); PS3.7 D.3.3.4 (role selection)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_role, evt
from pynetdicom.dimse_primitives import N_ACTION, N_EVENT_REPORT
from pynetdicom.presentation import PresentationContext, build_context

from dicom_node.dimse.comment import in_brief
from dicom_node.dimse.operation import others_of
from dicom_node.dimse.receive import unobserved
from dicom_node.dimse.references import CommitmentInformation, TooManyReferences, UnreadableReferences, read_information, write_information
from dicom_node.dimse.scu import StorageSCU
from dicom_node.errors import PeerUnreachable, Refused
from storage.errors import LeaseLost, StorageError
from storage.refusals import NoDiary

if TYPE_CHECKING:
    from pynetdicom.association import Association

    from dicom_node.dimse.scp import AcceptedAssociation
    from dicom_node.peers import Peer
    from storage.commitment_check import CommitmentCheck
    from storage.commitments import Asking, Commitment, Commitments, Proofs
    from storage.refusals import Diary

log = structlog.get_logger(__name__)

PUSH_MODEL: Final = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
REQUEST_STORAGE_COMMITMENT = 1
ALL_COMMITTED, FAILURES_EXIST = 1, 2

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
NO_SUCH_SOP_CLASS = 0x0118
NO_SUCH_ACTION_TYPE = 0x0123
NOT_AUTHORISED = 0x0124
UNRECOGNISED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213

_SYNTAXES: Final = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
_LOOK_S = 0.02


class _Refusal(Exception):
    """A request is answered with a failure."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Wanted(Exception):
    """The peer wants something else now, or time is up."""


class CommitmentSCP:
    """The service at the door: takes N-ACTION requests, and the N-EVENT-REPORTs of peers that we asked.

    Parameters
    ----------
    commitments
        Where requests are made durable before they are answered.
    check
        Reads instances again.
    proofs
        What we asked of peers; None: nothing, and every report is refused.
    references
        Most references in one request.
    pause_s
        How long the association has to stay open after our answer before the report is sent on it: who releases at once expects
        to be called.
    grace_s
        How long at most its thread examines instances; what takes longer is reported by the courier, on an association of its own.
    answer_s
        How long a peer may take to answer a report.
    diary
        Takes note of what is refused.
    observe
        Told ``commitment.requested`` (peer, status), ``commitment.reported`` (peer, failed), ``commitment.told`` (peer, status).
    """

    sends_instances = False
    takes_reports = True
    """The peer may be the SCP of this class here (PS3.7 D.3.3.4): it reports on an association of its own."""

    def __init__(
        self,
        *,
        commitments: Commitments,
        check: CommitmentCheck,
        proofs: Proofs | None = None,
        references: int = 10_000,
        pause_s: float = 1.0,
        grace_s: float = 5.0,
        answer_s: float = 10.0,
        diary: Diary | None = None,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._commitments = commitments
        self._check = check
        self._proofs = proofs
        self._references = references
        self._pause_s = pause_s
        self._grace_s = grace_s
        self._answer_s = answer_s
        self._lease_s = max(grace_s, pause_s) + answer_s + 5.0
        self._diary = diary or NoDiary()
        self._observe = observe

    @property
    def abstract_syntaxes(self) -> Mapping[str, tuple[str, ...]]:
        """The Push Model, in the plain syntaxes."""
        return {PUSH_MODEL: _SYNTAXES}

    def permitted(self, peer: Peer | None) -> bool:
        """Known peers that may store here, and those that we ask for commitment: a stranger has nobody to report to.

        The latter may report, and no more: `serve` refuses their requests.
        """
        return peer is not None and (peer.accept or peer.commit)

    def serve(self, association: AcceptedAssociation, context: PresentationContext, request: Any) -> None:
        """Answer an N-ACTION or N-EVENT-REPORT request; what else comes in this context is an unrecognised operation."""
        if threading.current_thread() is not association:
            # pynetdicom serves N-EVENT-REPORTs each in a thread of its own: a flood of them would be a flood of threads
            association.dimse.msg_queue.put((cast("int", context.context_id), request))
        elif isinstance(request, N_ACTION):
            self._action(association, context, request)
        elif isinstance(request, N_EVENT_REPORT):
            self._event(association, context, request)
        else:
            log.warning("commitment.unrecognised", peer=_named(association), message=type(request).__name__)
            answer = type(request)()
            answer.MessageIDBeingRespondedTo = request.MessageID
            answer.Status = UNRECOGNISED_OPERATION
            association.dimse.send_msg(answer, cast("int", context.context_id))

    # -- N-ACTION ----------------------------------------------------------------------------------------------------------------

    def _action(self, association: AcceptedAssociation, context: PresentationContext, request: N_ACTION) -> None:
        peer = _named(association)
        commitment: Commitment | None = None
        status, reason = SUCCESS, ""
        try:
            commitment = self._accepted(association.peer, context, request)
        except _Refusal as refusal:
            status, reason = refusal.status, str(refusal)
        except StorageError as error:
            status = PROCESSING_FAILURE if error.failure_reason == 0xA700 else error.failure_reason  # 0xA700 is C-STORE's alone
            reason = str(error)
        answer = N_ACTION()
        answer.MessageIDBeingRespondedTo = request.MessageID
        answer.AffectedSOPClassUID = UID(PUSH_MODEL)
        answer.AffectedSOPInstanceUID = UID(PUSH_MODEL_INSTANCE)
        answer.Status = status
        if reason:
            answer.ErrorComment = in_brief(reason)  # type: ignore[assignment] # the class says None, and takes text
            log.warning("commitment.refused", peer=peer, status=f"{status:04X}", reason=reason)
            self._note(association, f"storage commitment was refused with status {status:04X}: {reason}")
        self._observe("commitment.requested", peer=peer, status=status)
        association.dimse.send_msg(answer, cast("int", context.context_id))
        if commitment is not None:
            log.info("commitment.requested", peer=peer, references=len(commitment.references))
            try:
                self._report_here(association, context, commitment)
            except LeaseLost:
                log.info("commitment.elsewhere", peer=peer)
            except StorageError as error:  # comes due, and the courier goes on
                log.warning("commitment.unavailable", peer=peer, reason=str(error))

    def _accepted(self, peer: Peer | None, context: PresentationContext, request: N_ACTION) -> Commitment | None:
        if peer is None or not peer.accept:
            raise _Refusal(NOT_AUTHORISED, "who may not store here has nothing to be committed; set accept = true for the peer")
        if request.RequestedSOPClassUID != PUSH_MODEL:
            raise _Refusal(NO_SUCH_SOP_CLASS, "the Requested SOP Class is not Storage Commitment Push Model")
        if request.RequestedSOPInstanceUID != PUSH_MODEL_INSTANCE:
            raise _Refusal(NO_SUCH_INSTANCE, f"the Requested SOP Instance is not the well-known {PUSH_MODEL_INSTANCE}")
        if request.ActionTypeID != REQUEST_STORAGE_COMMITMENT:
            raise _Refusal(NO_SUCH_ACTION_TYPE, "the Action Type ID is not 1, Request Storage Commitment")
        information = self._read(context, request.ActionInformation)
        references = tuple(dict.fromkeys(information.referenced))
        if not references:
            raise _Refusal(INVALID_ARGUMENT_VALUE, "the Referenced SOP Sequence (0008,1199) is missing or empty")
        return self._commitments.accept(peer.name, information.transaction_uid, references, lease_s=self._lease_s)

    def _read(self, context: PresentationContext, encoded: BytesIO | None) -> CommitmentInformation:
        return _read(encoded, implicit=_implicit(context), limit=self._references)

    def _report_here(self, association: AcceptedAssociation, context: PresentationContext, commitment: Commitment) -> None:
        """Examine and report while the association is open and idle; else leave it to the courier."""
        answered = time.monotonic()

        def pace(_: int) -> None:
            if _news(association) or time.monotonic() > answered + max(self._grace_s, self._pause_s + 1.0):
                raise _Wanted

        examined: Commitment | None = commitment
        try:
            outcome = list(self._check.examine(commitment.references, commitment.outcome, pace=pace))
            examined = self._commitments.examined(commitment, outcome, lease_s=self._lease_s)
            if examined is None:
                return
            while time.monotonic() < answered + self._pause_s:
                time.sleep(_LOOK_S)
                pace(0)
            status = send_report(association, context, examined, answer_s=self._answer_s)
        except _Wanted:
            self._commitments.release(cast("Commitment", examined))
            return
        if status == SUCCESS:
            self._commitments.reported(examined)
            self._observe("commitment.reported", peer=examined.peer, failed=examined.failed)
            log.info("commitment.reported", peer=examined.peer, failed=examined.failed, references=len(examined.references))
        else:
            self._commitments.release(examined)

    # -- N-EVENT-REPORT ----------------------------------------------------------------------------------------------------------

    def _event(self, association: AcceptedAssociation, context: PresentationContext, request: N_EVENT_REPORT) -> None:
        status, reason = believe(
            self._proofs, _named(association), request, implicit=_implicit(context), limit=self._references, observe=self._observe
        )
        if reason:
            self._note(association, f"a storage commitment report was not believed: {reason}")
        answer = N_EVENT_REPORT()
        answer.MessageIDBeingRespondedTo = request.MessageID
        answer.AffectedSOPClassUID = UID(PUSH_MODEL)
        answer.AffectedSOPInstanceUID = UID(PUSH_MODEL_INSTANCE)
        if status == SUCCESS:
            answer.EventTypeID = request.EventTypeID
        answer.Status = status
        association.dimse.send_msg(answer, cast("int", context.context_id))

    def _note(self, association: AcceptedAssociation, reason: str) -> None:
        proposal = association.proposal
        self._diary.note(
            kind="commitment",
            reason=reason,
            peer=_named(association),
            address=association.address,
            calling_ae_title=proposal.calling_ae_title,
            called_ae_title=proposal.called_ae_title,
        )


class CommitmentCaller(StorageSCU):
    """Calls peers about storage commitment: to ask for it, and to report what they asked. Parameters as `StorageSCU`."""

    def request(
        self, peer: Peer, asking: Asking, proofs: Proofs, *, wait_s: float = 2.0, observe: Callable[..., None] = unobserved
    ) -> None:
        """Ask a peer to commit what we delivered, and listen for its report on the same association for `wait_s`.

        Raises
        ------
        PeerUnreachable
            No association, or no answer.
        Refused
            It does not offer storage commitment, or refused the request.
        StorageError
            What it answered could not be noted.
        """
        heard: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()

        def hear(event: evt.Event) -> tuple[int, None]:
            implicit = event.context.transfer_syntax == ImplicitVRLittleEndian
            limit = len(asking.references)
            status, _ = believe(proofs, peer.name, cast("N_EVENT_REPORT", event.request), implicit=implicit, limit=limit, observe=observe)
            heard.put(threading.current_thread())
            return status, None

        handlers = [(evt.EVT_N_EVENT_REPORT, hear)]
        with self._association(peer, [build_context(PUSH_MODEL, list(_SYNTAXES))], evt_handlers=handlers) as association:
            context = _context(association, peer)
            _pause(association)
            action = N_ACTION()
            action.MessageID = 1
            action.RequestedSOPClassUID = UID(PUSH_MODEL)
            action.RequestedSOPInstanceUID = UID(PUSH_MODEL_INSTANCE)
            action.ActionTypeID = REQUEST_STORAGE_COMMITMENT
            action.ActionInformation = BytesIO(write_information(asking.transaction_uid, asking.references, implicit=_implicit(context)))
            association.dimse.send_msg(action, cast("int", context.context_id))
            _require_success(peer, _answer(association, N_ACTION, 1, self._answer_s), "storage commitment request")
            proofs.asked(asking)
            association._reactor_checkpoint.set()  # noqa: SLF001 - see library.py; now it may release, and report
            deadline = time.monotonic() + wait_s
            while association.is_established and (left := deadline - time.monotonic()) > 0:
                try:
                    answering = heard.get(timeout=min(left, 0.1))
                except queue.Empty:
                    continue
                answering.join(self._answer_s)  # it has our answer to send
                return

    def report(self, peer: Peer, commitment: Commitment) -> None:
        """Tell a peer what came of its request, on an association of our own where we are the SCP.

        Raises
        ------
        PeerUnreachable
            No association, or no answer.
        Refused
            It takes no such report, or not this one.
        """
        contexts = [build_context(PUSH_MODEL, list(_SYNTAXES))]
        for roles in ([build_role(PUSH_MODEL, scp_role=True)], []):  # some reject a context for its role, and take the report without
            with self._association(peer, contexts, ext_neg=roles) as association:
                if not association.accepted_contexts and roles:
                    continue
                context = _context(association, peer)
                _pause(association)
                _require_success(peer, send_report(association, context, commitment, answer_s=self._answer_s), "storage commitment report")
                return


def send_report(association: Association, context: PresentationContext, commitment: Commitment, *, answer_s: float) -> int | None:
    """Send the N-EVENT-REPORT of an examined commitment, from the thread that alone takes the association's messages.

    Returns
    -------
    int or None
        The status of its answer; None where none came.
    """
    pairs = list(zip(commitment.references, commitment.outcome, strict=True))
    failed = [(reference, reason) for reference, reason in pairs if reason]
    committed = [reference for reference, reason in pairs if not reason]
    event = N_EVENT_REPORT()
    event.MessageID = 1
    event.AffectedSOPClassUID = UID(PUSH_MODEL)
    event.AffectedSOPInstanceUID = UID(PUSH_MODEL_INSTANCE)
    event.EventTypeID = FAILURES_EXIST if failed else ALL_COMMITTED
    event.EventInformation = BytesIO(write_information(commitment.transaction_uid, committed, failed, implicit=_implicit(context)))
    association.dimse.send_msg(event, cast("int", context.context_id))
    return _answer(association, N_EVENT_REPORT, 1, answer_s)


def believe(
    proofs: Proofs | None,
    peer: str,
    request: N_EVENT_REPORT,
    *,
    implicit: bool,
    limit: int,
    observe: Callable[..., None] = unobserved,
) -> tuple[int, str]:
    """Take a report of `peer` about what we asked of it.

    Returns
    -------
    tuple
        Status of the answer, and why the report was not believed; empty when it was.
    """
    try:
        _believe(proofs, peer, request, implicit=implicit, limit=limit)
    except _Refusal as refusal:
        status, reason = refusal.status, str(refusal)
    except StorageError as error:  # the peer reports again, or it is asked again
        status, reason = PROCESSING_FAILURE, str(error)
    else:
        status, reason = SUCCESS, ""
    if reason:
        log.warning("commitment.not_believed", peer=peer, status=f"{status:04X}", reason=reason)
    observe("commitment.told", peer=peer, status=status)
    return status, reason


def _believe(proofs: Proofs | None, peer: str, request: N_EVENT_REPORT, *, implicit: bool, limit: int) -> None:
    if request.AffectedSOPClassUID != PUSH_MODEL:
        raise _Refusal(NO_SUCH_SOP_CLASS, "the Affected SOP Class is not Storage Commitment Push Model")
    if request.AffectedSOPInstanceUID != PUSH_MODEL_INSTANCE:
        raise _Refusal(NO_SUCH_INSTANCE, f"the Affected SOP Instance is not the well-known {PUSH_MODEL_INSTANCE}")
    if request.EventTypeID not in (ALL_COMMITTED, FAILURES_EXIST):
        raise _Refusal(NO_SUCH_EVENT_TYPE, "the Event Type ID is neither 1 nor 2")
    information = _read(request.EventInformation, implicit=implicit, limit=limit)
    committed = [reference.sop_instance_uid for reference in information.referenced]
    failed = {reference.sop_instance_uid: reason for reference, reason in information.failed}
    told = None if proofs is None or not peer else proofs.reported(peer, information.transaction_uid, committed, failed)
    if told is None:
        raise _Refusal(INVALID_ARGUMENT_VALUE, "this peer was not asked for storage commitment under that Transaction UID")
    log_told(peer, committed=told.committed, denied=told.denied, given_up=told.given_up, reason="the peer does not commit it")


def log_told(
    peer: str, *, committed: tuple[int, ...] = (), denied: tuple[int, ...] = (), given_up: tuple[int, ...] = (), reason: str
) -> None:
    """Say what became of delivered reports, by the numbers of their jobs."""
    if committed:
        log.info("delivery.committed", peer=peer, jobs=len(committed))
    for job in denied:
        log.warning("delivery.not_committed", peer=peer, job=job, reason=reason, then="sent again")
    for job in given_up:
        log.error(
            "delivery.uncommitted", peer=peer, job=job, reason=reason, remedy=f"look at the peer's log, then dicom-node requeue {job}"
        )


def _read(encoded: BytesIO | None, *, implicit: bool, limit: int) -> CommitmentInformation:
    try:
        return read_information(encoded.getvalue() if encoded is not None else b"", implicit=implicit, limit=limit)
    except TooManyReferences:
        raise _Refusal(RESOURCE_LIMITATION, f"there are more than {limit} references; ask for fewer at once") from None
    except UnreadableReferences as error:
        raise _Refusal(INVALID_ARGUMENT_VALUE, f"the data set cannot be read: {error}") from error


def _answer(association: Association, kind: type[N_ACTION | N_EVENT_REPORT], message_id: int, answer_s: float) -> int | None:
    """Wait for the answer to a request of ours; other messages of the peer keep their order. None: it wants to go, or is gone."""
    deadline = time.monotonic() + answer_s
    messages = association.dimse.msg_queue
    with others_of(messages) as others:
        while time.monotonic() < deadline:
            try:
                item = messages.get(timeout=_LOOK_S)
            except queue.Empty:
                if association.dul.to_user_queue.queue or not association.is_established:
                    return None
                continue
            if item[1] is None:
                return None
            answer = item[1]
            if isinstance(answer, kind) and answer.MessageIDBeingRespondedTo == message_id and answer.is_valid_response:
                return int(cast("int", answer.Status))
            try:
                others.keep(item)
            except ConnectionAbortedError as error:
                log.warning("commitment.broken_off", reason=str(error))
                association.abort(block=False)
                return None
    return None


def _news(association: AcceptedAssociation) -> bool:
    """Whether the peer sent something: a release, an abort, another request."""
    return bool(association.dul.to_user_queue.queue or association.dimse.msg_queue.queue or not association.is_established)


def _named(association: AcceptedAssociation) -> str:
    return association.peer.name if association.peer is not None else ""


def _implicit(context: PresentationContext) -> bool:
    return context.transfer_syntax[0] == ImplicitVRLittleEndian


def _context(association: Association, peer: Peer) -> PresentationContext:
    if not association.accepted_contexts:
        raise Refused(0, f"peer {peer.name} does not offer Storage Commitment Push Model; enable it there, or set commit = false for it")
    return association.accepted_contexts[0]


def _require_success(peer: Peer, status: int | None, what: str) -> None:
    if status is None:
        raise PeerUnreachable(f"peer {peer.name} gave no answer to the {what}; look at its log")
    if status != SUCCESS:
        raise Refused(status, f"peer {peer.name} refused the {what} with status {status:04X}; PS3.7 Annex C and its log say why")


def _pause(association: Association) -> None:
    """Keep the association's own thread from taking the answers, as its send methods do."""
    association._reactor_checkpoint.clear()  # noqa: SLF001 - see library.py
    while association.is_alive() and not association._is_paused:  # noqa: SLF001
        time.sleep(0.001)
