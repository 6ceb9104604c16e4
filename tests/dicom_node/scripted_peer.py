"""A peer that sends exactly the bytes it is told to, and says what came back. It shares no code with the node."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
VERIFICATION = "1.2.840.10008.1.1"

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
RESET = -1
"""Returned for a PDU type when the connection was reset instead of closed."""


def pdu(kind: int, body: bytes) -> bytes:
    """One PDU."""
    return struct.pack(">BBL", kind, 0, len(body)) + body


def item(kind: int, body: bytes) -> bytes:
    """One item or sub-item of an association request."""
    return struct.pack(">BBH", kind, 0, len(body)) + body


def pdv(context_id: int, control: int, fragment: bytes) -> bytes:
    """One presentation data value."""
    return struct.pack(">LBB", len(fragment) + 2, context_id, control) + fragment


def element(number: int, value: bytes) -> bytes:
    """One element of group 0000, Implicit VR Little Endian."""
    return struct.pack("<HHL", 0, number, len(value)) + value


def command(*elements: bytes) -> bytes:
    """A command set with its group length."""
    body = b"".join(elements)
    return element(0, struct.pack("<L", len(body))) + body


def even(text: str) -> bytes:
    """A UID, padded."""
    return text.encode() + b"\0" * (len(text) % 2)


def us(value: int) -> bytes:
    """A US value."""
    return struct.pack("<H", value)


def store_rq(sop_class_uid: str, sop_instance_uid: str, *, message_id: int = 1, data_set_type: int = 0) -> bytes:
    """The command set of a C-STORE-RQ."""
    return command(
        element(0x0002, even(sop_class_uid)),
        element(0x0100, us(0x0001)),
        element(0x0110, us(message_id)),
        element(0x0700, us(0)),
        element(0x0800, us(data_set_type)),
        element(0x1000, even(sop_instance_uid)),
    )


def echo_rq(message_id: int = 1) -> bytes:
    """The command set of a C-ECHO-RQ."""
    return command(
        element(0x0002, even(VERIFICATION)), element(0x0100, us(0x0030)), element(0x0110, us(message_id)), element(0x0800, us(0x0101))
    )


def associate_rq(
    contexts: Iterable[tuple[int, str, Sequence[str]]],
    *,
    called: str = "DERM_NODE",
    calling: str = "SCRIPT",
    maximum_length: int = 16384,
    protocol: int = 1,
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 Table 9-11)."""
    items = [item(0x10, APPLICATION_CONTEXT)]
    for context_id, abstract, syntaxes in contexts:
        sub_items = item(0x30, abstract.encode()) + b"".join(item(0x40, syntax.encode()) for syntax in syntaxes)
        items.append(item(0x20, bytes((context_id, 0, 0, 0)) + sub_items))
    items.append(item(0x50, item(0x51, struct.pack(">L", maximum_length)) + item(0x52, b"1.2.3.4")))
    head = struct.pack(">HH16s16s32x", protocol, 0, called.encode().ljust(16), calling.encode().ljust(16))
    return pdu(ASSOCIATE_RQ, head + b"".join(items))


def elements_of(encoded: bytes) -> dict[int, bytes]:
    """Take a command set apart."""
    found: dict[int, bytes] = {}
    while encoded:
        _, number, length = struct.unpack_from("<HHL", encoded)
        found[number] = encoded[8 : 8 + length]
        encoded = encoded[8 + length :]
    return found


class ScriptedPeer:
    """A connection to a door."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.maximum_length = 0
        self.results: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(b"".join(parts))

    def pdu(self) -> tuple[int, bytes] | None:
        """Read the next PDU: type and body; None when the door closed the connection."""
        try:
            header = self._exactly(6)
            if not header:
                return None
            kind, _, length = struct.unpack(">BBL", header)
            return kind, self._exactly(length)
        except ConnectionResetError:
            return RESET, b""

    def associate(self, *contexts: tuple[int, str, Sequence[str]], **settings: object) -> int:
        """Ask for an association, and return the type of the answer; accepted contexts are in `results`."""
        self.send(associate_rq(contexts, **settings))  # type: ignore[arg-type]
        answer = self.pdu()
        assert answer is not None
        kind, body = answer
        self.answer = body
        if kind == ASSOCIATE_AC:
            self._read_results(body[68:])
        return kind

    def command_set(self) -> dict[int, bytes]:
        """Read one answer without a data set, however it is cut up."""
        encoded = b""
        while True:
            answer = self.pdu()
            assert answer is not None, "the door closed the connection"
            kind, body = answer
            assert kind == P_DATA, f"PDU type {kind}, body {body.hex()}"
            while body:
                length, _, control = struct.unpack_from(">LBB", body)
                encoded += body[6 : 4 + length]
                body = body[4 + length :]
                if control & 2:
                    return elements_of(encoded)

    def status(self) -> int:
        """Read one answer, and return its status."""
        return int.from_bytes(self.command_set()[0x0900], "little")

    def ends(self) -> tuple[int, bytes]:
        """Read until the door ends the connection; return the last PDU it sent."""
        last = (0, b"")
        while (answer := self.pdu()) is not None:
            if answer[0] == RESET:
                break
            last = answer
        return last

    def release(self) -> None:
        """End the association in order."""
        self.send(pdu(RELEASE_RQ, bytes(4)))
        assert self.ends()[0] == RELEASE_RP

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                assert not data, "the connection ended within a PDU"
                return b""
            data += piece
        return data

    def _read_results(self, items: bytes) -> None:
        while items:
            kind, length = struct.unpack_from(">BxH", items)
            body, items = items[4 : 4 + length], items[4 + length :]
            if kind == 0x21:
                syntax_length = struct.unpack_from(">H", body, 6)[0]
                self.results[body[0]] = (body[2], body[8 : 8 + syntax_length].decode())
            elif kind == 0x50:
                self.maximum_length = struct.unpack_from(">L", body, 4)[0]
