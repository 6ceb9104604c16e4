"""One query or retrieval under way: its responses, written past the library, and what its requestor does meanwhile.

Responses go to the socket from the thread that makes them: where the peer reads slowly the work waits for it, and none of them pile up.

References
----------
DICOM PS3.7 Sections 9.1.2 to 9.1.4, 9.3.2 to 9.3.4 and Annex C (status); PS3.4 Tables C.4-1 to C.4-3
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydicom.uid import UID

from dicom_node.dimse import message
from dicom_node.dimse.connection import Outflow, Pace

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

    from dicom_node.dimse.scp import AcceptedAssociation

C_FIND_RSP: Final = 0x8020
C_GET_RSP: Final = 0x8010
C_MOVE_RSP: Final = 0x8021

SUCCESS: Final = 0x0000
PENDING: Final = 0xFF00
PENDING_WITHOUT_OPTIONAL: Final = 0xFF01
"""Matches are continuing; optional keys were not supported for existence or matching."""
CANCELLED: Final = 0xFE00
OUT_OF_RESOURCES: Final = 0xA700
SOP_CLASS_NOT_SUPPORTED: Final = 0x0122
UNRECOGNISED_OPERATION: Final = 0x0211

_OFFENDING_ELEMENT, _REMAINING = 0x0901, 0x1020
_HAS_DATA_SET = 0x0001
_FLUSH = 32_768
_OTHERS = 16
_LOOK_S = 0.1
T = TypeVar("T")


class Operation:
    """A C-FIND, C-GET or C-MOVE that is being answered.

    Parameters
    ----------
    association, context, request
        Where it was asked for, and how.
    response
        Command Field of its responses.
    """

    def __init__(self, association: AcceptedAssociation, context: PresentationContext, request: Any, response: int) -> None:
        self._association = association
        self._context_id = int(context.context_id or 0)
        self._response = response
        self._buffer = bytearray()
        self._pace = Pace()
        self.message_id = int(request.MessageID)
        self.sop_class_uid = str(request.AffectedSOPClassUID)
        self.transfer_syntax_uid = str(context.transfer_syntax[0])

    @property
    def cancelled(self) -> bool:
        """Whether the requestor wants no more of it (C-CANCEL)."""
        return self.message_id in self._association.dimse.cancel_req

    @property
    def over(self) -> bool:
        """Whether the association has ended, and nobody is left to answer."""
        return self._association.acse.is_aborted() or not self._association.dul.is_alive()

    @property
    def maximum_length(self) -> int:
        """Longest P-DATA-TF that the peer takes; 0: no limit."""
        return self._association.dimse.maximum_pdu_size or 0

    def respond(
        self,
        status: int,
        *,
        identifier: bytes | None = None,
        counts: Sequence[int | None] = (),
        comment: str = "",
        offending: Sequence[int] = (),
        hold: bool = False,
    ) -> None:
        """Send a response.

        Parameters
        ----------
        counts
            Remaining, completed, failed and warning sub-operations; None: not said.
        hold
            It may wait for the next ones, up to 32 KiB of them.

        Raises
        ------
        OSError
            The peer is gone, or does not read.
        """
        elements = {
            message.AFFECTED_SOP_CLASS_UID: message.ui(self.sop_class_uid),
            message.COMMAND_FIELD: message.us(self._response),
            message.MESSAGE_ID_BEING_RESPONDED_TO: message.us(self.message_id),
            message.COMMAND_DATA_SET_TYPE: message.us(message.NO_DATA_SET if identifier is None else _HAS_DATA_SET),
            message.STATUS: message.us(status),
        }
        elements |= {_REMAINING + place: message.us(min(number, 0xFFFF)) for place, number in enumerate(counts) if number is not None}
        if offending:
            elements[_OFFENDING_ELEMENT] = b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in offending)
        if comment:
            elements[message.ERROR_COMMENT] = message.comment(comment)
        for pdu in message.pdata(self._context_id, message.COMMAND, message.encode_command(elements), self.maximum_length):
            self._buffer += pdu
        if identifier is not None:
            for pdu in message.pdata(self._context_id, 0, identifier, self.maximum_length):
                self._buffer += pdu
        if not hold or len(self._buffer) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Send the responses that were held."""
        waiting, self._buffer = self._buffer, bytearray()
        if waiting:
            self.socket().sendall(waiting)

    def socket(self) -> Outflow:
        """Return the way to the peer, to write P-DATA to; what it raises is for the association to be aborted.

        Raises
        ------
        ConnectionError
            It is closed.
        """
        connection = self._association.dul.socket.socket if self._association.dul.socket is not None else None
        if connection is None:
            raise ConnectionResetError("the association has ended")
        return Outflow(connection, self._pace)


def is_asked(wanted: type[Any], association: AcceptedAssociation, context: PresentationContext, request: Any) -> bool:
    """Whether a request is the one that its context is for; any other is answered with 0211, unrecognised operation."""
    if isinstance(request, wanted):
        return True
    answer = type(request)()
    answer.MessageIDBeingRespondedTo = request.MessageID
    answer.Status = UNRECOGNISED_OPERATION
    association.dimse.send_msg(answer, int(context.context_id or 0))
    return False


def negotiated_for(association: AcceptedAssociation, sop_class_uid: str) -> bytes:
    """Return the Service-class-application-information that the requestor proposed for a SOP class; empty: none."""
    return association.requestor.sop_class_extended.get(UID(sop_class_uid), b"")


class SearchEnded(Exception):
    """A search did not come to its end.

    Parameters
    ----------
    reason
        Cause and remedy; empty: the requestor wants no more of it, or is gone.
    """


class Searches:
    """Searches of the index, each in a thread of its own, so that C-CANCEL and the end of the association are seen meanwhile.

    Parameters
    ----------
    count
        At once; others wait their turn.
    longest_s
        Of a search, waiting for its turn included.
    """

    def __init__(self, count: int = 4, *, longest_s: float = 25.0) -> None:
        self._turns = threading.BoundedSemaphore(count)
        self._longest_s = longest_s

    def run(self, asking: Operation, search: Callable[[], T], cancel: Callable[[], None]) -> T:
        """Return what `search` returns; `cancel` has it end soon, and is called until it has.

        Raises
        ------
        SearchEnded
            It is not wanted any more, or takes too long.
        Exception
            What `search` raised.
        """
        deadline = time.monotonic() + self._longest_s
        while not self._turns.acquire(timeout=_LOOK_S):
            if asking.cancelled or asking.over:
                raise SearchEnded
            if time.monotonic() > deadline:
                raise SearchEnded("other queries keep the index busy; ask again later")
        ended: queue.SimpleQueue[tuple[list[T], Exception | None]] = queue.SimpleQueue()

        def body() -> None:
            try:
                ended.put(([search()], None))
            except Exception as error:  # noqa: BLE001 - raised again in the association's thread
                ended.put(([], error))
            finally:
                self._turns.release()

        thread = threading.Thread(target=body, name="dimse-search", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._turns.release()
            raise SearchEnded("no thread is to be had for the search; ask again later") from error
        stopped: SearchEnded | None = None
        result: tuple[list[T], Exception | None] | None = None
        while result is None:
            try:
                result = ended.get(timeout=_LOOK_S)
            except queue.Empty:
                if asking.cancelled or asking.over:
                    stopped = stopped or SearchEnded()
                elif time.monotonic() > deadline:
                    stopped = stopped or SearchEnded(f"the search took over {self._longest_s:g} s; narrow the query")
                if stopped is not None:
                    cancel()
        if stopped is not None:
            raise stopped
        found, failure = result
        if failure is not None:
            raise failure
        return found[0]


class Others(list[Any]):
    """What came while the answer to a request of ours was waited for."""

    def keep(self, item: Any) -> None:
        """Keep a message for afterwards.

        Raises
        ------
        ConnectionAbortedError
            They are too many; the association is to be ended.
        """
        if len(self) >= _OTHERS:
            raise ConnectionAbortedError("the peer sent requests beyond number instead of the answer to ours")
        self.append(item)


@contextmanager
def others_of(messages: queue.Queue[Any]) -> Iterator[Others]:
    """For the length of a block keep messages that are to be served after it; then they are put back, in their order."""
    others = Others()
    try:
        yield others
    finally:
        for item in others:
            messages.put(item)
