"""The receiver: message assembly, PDU buffer, guards, and what it relies on in pynetdicom."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import operator
import socket
import struct
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.dimse import message
from dicom_node.dimse.library import INTERNALS, VERSION
from dicom_node.dimse.message import MessageReader, ProtocolViolation, StoreRequest
from dicom_node.dimse.receive import BellQueue, PDUBuffer, Turnstile, Waker
from tests.dicom_node import scripted_peer as script

STORE = script.store_rq("1.2.3", "1.2.3.4")


class Collected:
    """A store operation that keeps what it is given."""

    def __init__(self, context_id: int, request: StoreRequest) -> None:
        self.context_id, self.request = context_id, request
        self.data = bytearray()
        self.finished = self.settled = self.aborted = False

    def write(self, fragment: memoryview) -> None:
        self.data += fragment

    def finish(self) -> tuple[int, str]:
        self.finished = True
        return 0, ""

    def settle(self) -> None:
        assert self.finished
        self.settled = True

    def abort(self) -> None:
        self.aborted = True


class Reading:
    """A message reader with everything it gave out."""

    def __init__(self) -> None:
        self.stores: list[Collected] = []
        self.answers: list[tuple[int, dict[int, bytes]]] = []
        self.handed_on: list[tuple[int, int, bytes]] = []
        self.reader = MessageReader(
            known_context=lambda context_id: context_id in (1, 3),
            begin_store=self._begin,
            answer=lambda context_id, command: self.answers.append((context_id, script.elements_of(command))),
            hand_on=lambda *fragment: self.handed_on.append(fragment),
            command_bytes=4096,
            foreign_bytes=4096,
        )

    def _begin(self, context_id: int, request: StoreRequest) -> Collected:
        self.stores.append(Collected(context_id, request))
        return self.stores[-1]

    def feed(self, *pdvs: bytes) -> None:
        self.reader.feed(memoryview(b"".join(pdvs)))


def cut(payload: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at places."""
    bounds = sorted({place % (len(payload) + 1) for place in places})
    return [payload[start:end] for start, end in zip([0, *bounds], [*bounds, len(payload)], strict=True)]


def fragments(context_id: int, kind: int, payload: bytes, places: list[int]) -> list[bytes]:
    """PDVs of a payload cut at places, the last one flagged."""
    pieces = cut(payload, places)
    return [script.pdv(context_id, kind | (2 if number == len(pieces) else 0), piece) for number, piece in enumerate(pieces, start=1)]


places = st.lists(st.integers(0, 10_000), max_size=6)


@pytest.mark.parametrize(("module", "name", "digest"), INTERNALS, ids=[f"{module}:{name}" for module, name, _ in INTERNALS])
def test_pynetdicom_is_the_one_that_was_read(module: str, name: str, digest: str) -> None:
    """What receive.py and scp.py stand on in pynetdicom is what it was when they were written; else read the new code, then re-pin."""
    source = inspect.getsource(operator.attrgetter(name)(importlib.import_module(module)))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == digest, (
        f"{module}.{name} changed; read it, then see dicom_node/dimse/library.py"
    )


def test_pynetdicom_is_pinned() -> None:
    """The installed version is the pinned one, and pyproject.toml pins it exactly."""
    assert version("pynetdicom") == VERSION
    assert f'"pynetdicom=={VERSION}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@given(st.binary(max_size=3000), places, places, places)
def test_every_cut_gives_the_same_data_set(data: bytes, command_places: list[int], data_places: list[int], pdu_places: list[int]) -> None:
    """However a message is cut into PDVs, and those are put into PDUs, the operation receives its bytes and is answered once."""
    reading = Reading()
    pdvs = fragments(3, 1, STORE, command_places) + fragments(3, 0, data, data_places)
    bounds = sorted({place % len(pdvs) for place in pdu_places} - {0})
    for start, end in zip([0, *bounds], [*bounds, len(pdvs)], strict=True):
        reading.feed(*pdvs[start:end])
    (operation,) = reading.stores
    assert bytes(operation.data) == data
    assert operation.finished
    assert operation.settled
    assert operation.request == StoreRequest(1, "1.2.3", "1.2.3.4", has_data_set=True)
    ((context_id, answer),) = reading.answers
    assert (context_id, answer[message.STATUS], answer[message.COMMAND_FIELD]) == (3, b"\0\0", b"\x01\x80")
    assert not reading.reader.busy


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_hostile_bytes_only_violate(bodies: list[bytes]) -> None:
    """Whatever a P-DATA-TF holds, the reader takes it or raises ProtocolViolation, and abandoning leaves no operation open."""
    reading = Reading()
    try:
        for body in bodies:
            reading.reader.feed(memoryview(body))
    except ProtocolViolation:
        pass
    reading.reader.abandon()
    assert all(operation.finished or operation.aborted for operation in reading.stores)


@given(st.data())
def test_mutated_messages_only_violate(data: st.DataObject) -> None:
    """A lawful message with any bytes replaced is taken or is a violation, never another exception."""
    body = bytearray(script.pdv(1, 3, STORE) + script.pdv(1, 2, b"x" * 20))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    reading = Reading()
    with contextlib.suppress(ProtocolViolation):
        reading.reader.feed(memoryview(bytes(body)))
    reading.reader.abandon()


@pytest.mark.parametrize(
    "pdvs",
    [
        pytest.param([], id="no PDV"),
        pytest.param([struct.pack(">L", 1) + b"\x01"], id="PDV length 1"),
        pytest.param([struct.pack(">L", 0)], id="PDV length 0"),
        pytest.param([script.pdv(1, 3, STORE)[:-1]], id="PDV past its PDU"),
        pytest.param([script.pdv(5, 3, STORE)], id="context not accepted"),
        pytest.param([script.pdv(1, 0, b"data")], id="data without command"),
        pytest.param([script.pdv(1, 3, STORE), script.pdv(1, 3, STORE)], id="command where data belongs"),
        pytest.param([script.pdv(1, 3, STORE), script.pdv(3, 2, b"data")], id="data in another context"),
        pytest.param([script.pdv(1, 1, STORE[:20]), script.pdv(1, 0, b"data")], id="data before the command ended"),
        pytest.param([script.pdv(1, 3, STORE[:-1])], id="command element cut"),
        pytest.param([script.pdv(1, 3, STORE + script.element(0x0110, b"\1\0"))], id="element twice"),
        pytest.param([script.pdv(1, 3, STORE + struct.pack("<HHL", 8, 0x10, 0))], id="foreign group"),
        pytest.param([script.pdv(1, 1, b"\0" * 4097)], id="command too long"),
        pytest.param([script.pdv(1, 3, script.command(script.element(0x0100, b"\1\0")))], id="no data set type"),
        pytest.param([script.pdv(1, 3, script.echo_rq()), script.pdv(1, 2, b"data")], id="data where none was announced"),
        pytest.param(
            [script.pdv(1, 3, script.echo_rq().replace(b"\x01\x01", b"\0\0")), script.pdv(1, 0, b"d" * 4097)], id="endless identifier"
        ),
    ],
)
def test_violations(pdvs: list[bytes]) -> None:
    """Every breach of PS3.8 Annex E, and every limit, is a violation (threats 14, 15)."""
    with pytest.raises(ProtocolViolation):
        Reading().feed(*pdvs)


def test_other_messages_are_handed_on() -> None:
    """A message other than C-STORE goes to pynetdicom, its command set whole, whatever the fragments were."""
    reading = Reading()
    echo = script.echo_rq()
    reading.feed(script.pdv(1, 1, echo[:11]), script.pdv(1, 3, echo[11:]))
    assert reading.handed_on == [(1, 3, echo)]
    assert not reading.reader.busy


def test_store_without_data_set_is_answered() -> None:
    """A C-STORE-RQ that announces no data set is answered at once; the operation decides with what."""
    reading = Reading()
    reading.feed(script.pdv(1, 3, script.store_rq("1.2.3", "1.2.3.4", data_set_type=0x0101)))
    assert not reading.stores[0].request.has_data_set
    assert len(reading.answers) == 1


@given(st.text(max_size=100))
def test_error_comment_is_a_short_line(text: str) -> None:
    """Whatever the reason was, the Error Comment is even, at most 64 characters of printable ASCII without a backslash (VR LO)."""
    encoded = message.comment(text)
    assert len(encoded) <= 64
    assert len(encoded) % 2 == 0
    assert all(0x20 <= byte < 0x7F and byte != 0x5C for byte in encoded)


@given(st.integers(0, 300), st.integers(8, 64) | st.just(0))
def test_outgoing_pdus_keep_the_peers_maximum(length: int, maximum_length: int) -> None:
    """A payload is cut so that no PDU is longer than the peer's maximum, and put together again it is the payload."""
    payload = bytes(index % 251 for index in range(length))
    pieces, flags = [], []
    for encoded in message.pdata(1, 0, payload, maximum_length):
        body = encoded[6:]
        assert struct.unpack(">BxL", encoded[:6]) == (4, len(body))
        assert not maximum_length or len(body) <= maximum_length
        ((_, control, fragment),) = message.pdvs(memoryview(body))
        pieces.append(bytes(fragment))
        flags.append(control)
    assert b"".join(pieces) == payload
    assert flags == [0] * (len(flags) - 1) + [2]


@given(st.lists(st.tuples(st.sampled_from([4, 5]), st.integers(0, 60_000)), min_size=1, max_size=5), st.integers(97, 40_000))
def test_buffer_returns_every_pdu_whole(shapes: list[tuple[int, int]], step: int) -> None:
    """However the stream is segmented, the buffer gives out the PDUs that went in, in order, and then wants more."""
    pdus = [script.pdu(kind, bytes((length % 256,)) * length) for kind, length in shapes]
    stream = b"".join(pdus)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        buffer = PDUBuffer(lambda _kind, _length: None)
        found: list[bytes] = []
        sent = 0
        while sent < len(stream):
            theirs.sendall(stream[sent : sent + step])
            sent += step
            while True:
                while (view := buffer.take()) is not None:
                    found.append(bytes(view))
                    view.release()
                try:
                    buffer.fill(ours)
                except BlockingIOError:
                    break
        assert found == pdus


def test_buffer_judges_by_the_header_alone() -> None:
    """A PDU that claims 4 GiB is refused when its six bytes are there; nothing is reserved for it (threat 1)."""

    def check(_kind: int, length: int) -> None:
        if length > 1000:
            raise ProtocolViolation("too long")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">BxL", 1, 0xFFFFFFFF))
        buffer = PDUBuffer(check)
        buffer.fill(ours)
        with pytest.raises(ProtocolViolation):
            buffer.take()


def test_turnstile_lets_pass_on_news_only_while_open() -> None:
    """What is put into a queue with a bell lets the waiting thread pass; a closed turnstile holds it until it is opened."""
    turnstile = Turnstile()
    bell = BellQueue(turnstile.ring)
    bell.put("something")
    assert turnstile.wait()
    turnstile.clear()
    bell.put("something")
    assert not turnstile.wait(0.0)
    turnstile.set()
    assert turnstile.wait()


def test_waker_may_be_closed_while_others_wake() -> None:
    """Waking a closed waker does nothing; in particular it writes to no descriptor that has another use by now."""
    waker = Waker()
    waker.wake()
    waker.clear()
    waker.close()
    waker.close()
    waker.wake()
    with pytest.raises(ValueError, match="closed"):
        _ = waker.descriptor
