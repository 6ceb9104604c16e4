"""DIMSE messages as bytes: command sets, PDVs, and putting fragments together in their lawful order. No input or output.

References
----------
DICOM PS3.7 Sections 6.3 and 9.3 (command sets), PS3.8 Section 9.3.5 and Annex E (P-DATA-TF, message control header)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from dicom_node.dimse.comment import in_brief

C_STORE_RQ = 0x0001
C_STORE_RSP = 0x8001
NO_DATA_SET = 0x0101
"""Command Data Set Type (0000,0800) of a message without a data set; every other value means that one follows."""

COMMAND = 0x01
"""Message control header: the fragment is of the command set; else of the data set."""
LAST = 0x02
"""Message control header: the last fragment of its kind."""

_FREE_FRAGMENTS, _FRAGMENT_BYTES = 4096, 64

# Elements of group 0000, PS3.7 Annex E
AFFECTED_SOP_CLASS_UID = 0x0002
COMMAND_FIELD = 0x0100
MESSAGE_ID = 0x0110
MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
PRIORITY = 0x0700
COMMAND_DATA_SET_TYPE = 0x0800
STATUS = 0x0900
ERROR_COMMENT = 0x0902
AFFECTED_SOP_INSTANCE_UID = 0x1000


class ProtocolViolation(Exception):
    """The peer broke PS3.7 or PS3.8 such that the association cannot go on; the remedy is A-ABORT.

    Parameters
    ----------
    reason
        What was wrong, without anything that the peer wrote.
    diagnostic
        Reason/Diag. of the A-ABORT, service-provider source (PS3.8 Table 9-26): 1 unrecognised PDU, 2 unexpected PDU,
        5 unexpected PDU parameter, 6 invalid PDU parameter value.
    """

    def __init__(self, reason: str, diagnostic: int = 6) -> None:
        super().__init__(reason)
        self.diagnostic = diagnostic


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """The command set of a C-STORE-RQ (PS3.7 Table 9.3-1), as far as it is used here. Empty text: absent."""

    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool


def parse_command(encoded: bytes) -> dict[int, bytes]:
    """Take a command set apart (Implicit VR Little Endian, PS3.7 Section 6.3.1).

    Returns
    -------
    dict
        Element number in group 0000 -> value bytes.

    Raises
    ------
    ProtocolViolation
        Lengths that do not add up, a group other than 0000, or an element twice.
    """
    elements: dict[int, bytes] = {}
    position, end = 0, len(encoded)
    while position < end:
        if end - position < 8:
            raise ProtocolViolation("command set ends within an element")
        group, element, length = struct.unpack_from("<HHL", encoded, position)
        position += 8
        if group != 0 or element in elements:
            raise ProtocolViolation("command set holds a foreign or repeated element")
        if length > end - position:
            raise ProtocolViolation("command element longer than the command set")
        elements[element] = encoded[position : position + length]
        position += length
    return elements


def number_of(elements: Mapping[int, bytes], element: int) -> int:
    """Return the value of a US element.

    Raises
    ------
    ProtocolViolation
        It is absent or not two bytes long.
    """
    value = elements.get(element, b"")
    if len(value) != 2:
        raise ProtocolViolation(f"command element (0000,{element:04X}) is absent or no single number")
    return int.from_bytes(value, "little")


def text_of(elements: Mapping[int, bytes], element: int) -> str:
    """Return the value of a text element without its padding; empty when absent. Bytes beyond ASCII become ``?``."""
    return elements.get(element, b"").rstrip(b"\0 ").decode("ascii", "replace").replace("\ufffd", "?")


def store_request(elements: Mapping[int, bytes]) -> StoreRequest:
    """Read a C-STORE-RQ.

    Raises
    ------
    ProtocolViolation
        Without Message ID or Command Data Set Type no answer is possible.
    """
    return StoreRequest(
        message_id=number_of(elements, MESSAGE_ID),
        sop_class_uid=text_of(elements, AFFECTED_SOP_CLASS_UID),
        sop_instance_uid=text_of(elements, AFFECTED_SOP_INSTANCE_UID),
        has_data_set=number_of(elements, COMMAND_DATA_SET_TYPE) != NO_DATA_SET,
    )


def us(value: int) -> bytes:
    """Encode a US value."""
    return struct.pack("<H", value)


def ui(value: str) -> bytes:
    """Encode a UI value, padded with NUL to even length."""
    encoded = value.encode("ascii", "replace")
    return encoded + b"\0" * (len(encoded) % 2)


def comment(text: str) -> bytes:
    """Encode an Error Comment (LO): the essence in 64 characters, printable ASCII, no backslash, padded with a space."""
    printable = "".join(character if " " <= character <= "~" and character != "\\" else "?" for character in in_brief(text))
    encoded = printable.strip().encode("ascii")
    return encoded + b" " * (len(encoded) % 2)


def encode_command(elements: Mapping[int, bytes]) -> bytes:
    """Put a command set together, Command Group Length included."""
    body = b"".join(struct.pack("<HHL", 0, element, len(value)) + value for element, value in sorted(elements.items()))
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def store_response(request: StoreRequest, status: int, error_comment: str = "") -> bytes:
    """Encode the C-STORE-RSP to `request` (PS3.7 Table 9.3-2)."""
    elements = {
        AFFECTED_SOP_CLASS_UID: ui(request.sop_class_uid),
        COMMAND_FIELD: us(C_STORE_RSP),
        MESSAGE_ID_BEING_RESPONDED_TO: us(request.message_id),
        COMMAND_DATA_SET_TYPE: us(NO_DATA_SET),
        STATUS: us(status),
        AFFECTED_SOP_INSTANCE_UID: ui(request.sop_instance_uid),
    }
    if error_comment:
        elements[ERROR_COMMENT] = comment(error_comment)
    return encode_command(elements)


def pdata_header(context_id: int, control: int, length: int) -> bytes:
    """Return what stands before a fragment of `length` bytes in a P-DATA-TF PDU with one PDV (12 bytes)."""
    return struct.pack(">BxLLBB", 0x04, length + 6, length + 2, context_id, control)


def pdata(context_id: int, kind: int, payload: bytes, maximum_length: int) -> Iterator[bytes]:
    """Cut one command or data set into P-DATA-TF PDUs of at most `maximum_length` bytes (0: no limit) after the PDU header."""
    room = payload_room(maximum_length) or max(len(payload), 1)
    for start in range(0, max(len(payload), 1), room):
        fragment = payload[start : start + room]
        control = kind | (LAST if start + room >= len(payload) else 0)
        yield pdata_header(context_id, control, len(fragment)) + fragment


def payload_room(maximum_length: int) -> int:
    """Return how many bytes of a fragment fit in one PDU of a peer's `maximum_length`, an even number; 0 for no limit."""
    return 0 if maximum_length == 0 else max((maximum_length - 6) & ~1, 2)


def pdvs(body: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Walk the PDVs of a P-DATA-TF PDU (without its 6-byte header): context id, message control header, fragment.

    Raises
    ------
    ProtocolViolation
        No PDV, or item lengths that do not add up to the PDU (PS3.8 Table 9-23).
    """
    position, end = 0, len(body)
    if not end:
        raise ProtocolViolation("P-DATA-TF without a PDV")
    while position < end:
        if end - position < 6:
            raise ProtocolViolation("P-DATA-TF ends within a PDV header")
        length, context_id, control = struct.unpack_from(">LBB", body, position)
        if length < 2 or length > end - position - 4:
            raise ProtocolViolation("PDV length does not fit its PDU")
        yield context_id, control, body[position + 6 : position + 4 + length]
        position += 4 + length


class StoreOperation(Protocol):
    """What a C-STORE-RQ becomes: takes the data set in pieces and ends with a status. Never raises StorageError."""

    def write(self, fragment: memoryview) -> None:
        """Take the next piece; the memory is only lent for the call."""

    def finish(self) -> tuple[int, str]:
        """Make it durable. Returns Status (0000,0900) and Error Comment (0000,0902)."""

    def settle(self) -> None:
        """Do what can wait until the peer has its answer. Called once after `finish`."""

    def abort(self) -> None:
        """Leave nothing behind."""


class MessageReader:
    """Puts the fragments of one association's messages together, in the only order that PS3.8 Annex E allows.

    C-STORE requests are answered here, where they are expected; every other message is handed on, fragment by fragment.

    Parameters
    ----------
    known_context
        Whether a presentation context id was accepted.
    begin_store
        Opens the operation of a C-STORE-RQ received in a context; None where we are the sender, and expect none.
    answer
        Sends an encoded command set in a context.
    hand_on
        Takes fragments of other messages: context id, message control header, fragment. A command set arrives whole.
    command_bytes, foreign_bytes
        Limits on a command set and on the data set of a message that is not C-STORE, both held in memory.
    """

    def __init__(
        self,
        *,
        known_context: Callable[[int], bool],
        begin_store: Callable[[int, StoreRequest], StoreOperation] | None,
        answer: Callable[[int, bytes], None],
        hand_on: Callable[[int, int, bytes], None],
        command_bytes: int,
        foreign_bytes: int,
    ) -> None:
        self._known_context = known_context
        self._begin_store = begin_store
        self._answer = answer
        self._hand_on = hand_on
        self._command_bytes = command_bytes
        self._foreign_bytes = foreign_bytes
        self._context_id = 0
        self._command = bytearray()
        self._awaiting_data = False
        self._foreign_count = 0
        self._fragments = self._bytes = 0
        self._request: StoreRequest | None = None
        self._operation: StoreOperation | None = None

    @property
    def busy(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._context_id != 0

    def feed(self, body: memoryview) -> None:
        """Take one P-DATA-TF PDU, without its header.

        Raises
        ------
        ProtocolViolation
            The order, a context or a length is wrong; the operation under way is aborted by `abandon`.
        """
        for context_id, control, fragment in pdvs(body):
            if not self._known_context(context_id):
                raise ProtocolViolation("PDV in a presentation context that was not accepted")
            if self._context_id not in (0, context_id):
                raise ProtocolViolation("message goes on in another presentation context", 5)
            self._fragments += 1
            self._bytes += len(fragment)
            if self._fragments > _FREE_FRAGMENTS and self._bytes < self._fragments * _FRAGMENT_BYTES:
                # each costs the processor as much as a long one does
                raise ProtocolViolation("message in too many fragments of a few bytes or none")
            if control & COMMAND:
                self._take_command(context_id, control, fragment)
            else:
                self._take_data(context_id, control, fragment)

    def abandon(self) -> None:
        """Abort the operation under way, if any; to be called when the association ends, however it ends."""
        operation, self._operation = self._operation, None
        self._end_message()
        if operation is not None:
            operation.abort()

    def _take_command(self, context_id: int, control: int, fragment: memoryview) -> None:
        if self._awaiting_data:
            raise ProtocolViolation("command fragment where the data set was to follow", 5)
        if len(self._command) + len(fragment) > self._command_bytes:
            raise ProtocolViolation("command set longer than the limit")
        self._context_id = context_id
        self._command += fragment
        if not control & LAST:
            return
        encoded = bytes(self._command)
        self._command.clear()
        elements = parse_command(encoded)
        self._awaiting_data = number_of(elements, COMMAND_DATA_SET_TYPE) != NO_DATA_SET
        if number_of(elements, COMMAND_FIELD) == C_STORE_RQ and self._begin_store is not None:
            self._request = store_request(elements)
            self._operation = self._begin_store(context_id, self._request)
            if not self._awaiting_data:
                self._finish_store()
        else:
            awaiting_data = self._awaiting_data
            self._hand_on(context_id, COMMAND | LAST, encoded)
            if not awaiting_data:
                self._end_message()

    def _take_data(self, context_id: int, control: int, fragment: memoryview) -> None:
        if not self._awaiting_data:
            raise ProtocolViolation("data set fragment without its command set", 5)
        if self._operation is not None:
            self._operation.write(fragment)
            if control & LAST:
                self._finish_store()
            return
        self._foreign_count += len(fragment)
        if self._foreign_count > self._foreign_bytes:
            raise ProtocolViolation("data set of a message other than C-STORE longer than the limit")
        last = control & LAST
        if last:
            self._end_message()  # before: handing on the last fragment may start the service
        self._hand_on(context_id, last, bytes(fragment))

    def _finish_store(self) -> None:
        request, operation, context_id = self._request, self._operation, self._context_id
        if request is None or operation is None:  # pragma: no cover - unreachable by construction
            raise ProtocolViolation("no C-STORE under way")
        status, error_comment = operation.finish()
        self._operation = None
        self._end_message()
        try:
            self._answer(context_id, store_response(request, status, error_comment))
        finally:
            operation.settle()

    def _end_message(self) -> None:
        self._context_id = 0
        self._fragments = self._bytes = 0
        self._command.clear()
        self._awaiting_data = False
        self._foreign_count = 0
        self._request = None
