"""Rows 1 to 22 of the catalogue of threats: what a stranger can do at the DIMSE door, and what must hold while and after he does it.

The door is a process of its own; an honest sender stores through every attack. `under_attack` checks for each of them: R1 the door serves,
and nothing failed within; R2 the honest sender stores all of its instances; R3 memory, threads and descriptors; R6 no write outside of the
folder, no connection, no program; R7 the audit chain is whole and the log knows no patient; R8 nothing is left half-stored. R4 is the time
limit of these tests and of each answer (30 s); R5, the answer, is in the attack itself. How much, how long: ``python -m bench.mischief``.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import generate_uid

from tests.dicom_node import threats
from tests.dicom_node.door import SECONDARY_CAPTURE, draw, encoded
from tests.dicom_node.scripted_peer import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RJ,
    ASSOCIATE_RQ,
    EXPLICIT,
    IMPLICIT,
    P_DATA,
    RELEASE_RP,
    RELEASE_RQ,
    VERIFICATION,
    associate_rq,
    command,
    echo_rq,
    element,
    even,
    item,
    pdu,
    pdv,
    store_rq,
    us,
)
from tests.dicom_node.threats import CANARY, OBJECT_BYTES, STORE_CONTEXT, Caller, Guarded, Mischief, guarded_door, instance, under_attack

pytestmark = pytest.mark.timeout(90)

ECHO_CONTEXT = (3, VERIFICATION, [IMPLICIT])
MR = "1.2.840.10008.5.1.4.1.1.4"
STUDY_FIND, STUDY_MOVE = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2"
COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
ANNOUNCED = 262_144
"""Our maximum PDU length."""

REPOSITORY = Path(__file__).parents[2]
TESTS: dict[int, tuple[str, ...]] = {
    1: ("test_threats.test_claimed_length", "test_scp.test_bad_handshakes", "test_receive.test_buffer_judges_by_the_header_alone"),
    2: ("test_threats.test_longer_than_announced", "test_scp.test_violations_are_aborted"),
    3: (
        "test_threats.test_trickled_handshakes",
        "test_vestibule.test_five_hundred_stalled_handshakes",
        "test_vestibule.test_stalled_tls_handshakes",
        "test_vestibule.test_the_crowd_gives_way",
    ),
    4: ("test_threats.test_silence_and_health_checks", "test_scp.test_stalled_handshakes_are_closed"),
    5: (
        "test_threats.test_idle_and_trickling_associations",
        "test_vestibule.test_a_message_that_trickles_is_aborted",
        "test_vestibule.test_a_peer_that_stops_within_a_record",
        "test_scp.test_idle_association_is_aborted",
    ),
    6: (
        "test_threats.test_more_associations_than_allowed",
        "test_threats.test_rejected_callers_who_stay",
        "test_vestibule.test_one_caller_leaves_room_for_others",
        "test_vestibule.test_a_flood_of_requests_waits_for_its_turns",
        "test_vestibule.test_who_hangs_up_takes_nobodys_turn",
        "test_vestibule.test_no_turn_in_time_is_a_transient_rejection",
        "test_vestibule.test_two_doors_share_port_and_slots",
        "test_scp.test_limits_on_associations",
    ),
    7: ("test_threats.test_abort_in_every_state", "test_scp.test_broken_association_leaves_nothing"),
    8: ("test_threats.test_pdu_out_of_place", "test_scp.test_second_request_is_aborted", "test_vestibule.test_what_is_no_request_is_named"),
    9: ("test_threats.test_senseless_proposals", "test_scp.test_bad_handshakes", "test_vestibule.test_another_application_is_rejected"),
    10: ("test_threats.test_hostile_titles", "test_scp.test_admission"),
    11: (
        "test_threats.test_callers_who_are_not_let_in",
        "test_scp.test_admission",
        "test_vestibule.test_strangers_are_rejected_without_a_thread",
    ),
    12: ("test_threats.test_user_identity", "test_identity"),
    13: ("test_threats.test_negotiation_garbage",),
    14: ("test_threats.test_broken_fragments", "test_scp.test_violations_are_aborted", "test_receive.test_violations"),
    15: (
        "test_threats.test_broken_commands",
        "test_threats.test_floods_of_requests",
        "test_threats.test_requests_sent_ahead_are_all_answered",
        "test_receive.test_mutated_messages_only_violate",
    ),
    16: ("test_threats.test_other_instance_than_announced", "test_scp.test_refusals"),
    17: ("test_threats.test_other_transfer_syntax_than_negotiated", "test_scp.test_refusals"),
    18: ("test_threats.test_endless_data_set", "test_scp.test_endless_data_set_is_stopped"),
    19: ("test_threats.test_heavy_queries",),
    20: ("test_threats.test_hostile_identifiers",),
    21: ("test_threats.test_move_to_a_stranger",),
    22: (
        "test_threats.test_commitment_mischief",
        "test_commitment.test_a_million_references",
        "test_commitment.test_forged_reports_are_not_believed",
        "test_commitment.test_same_request_again_is_the_same",
    ),
}
"""Row of the catalogue -> what proves it, of this folder's test modules."""


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One door for the module, in a process of its own; two seconds are its patience."""
    with guarded_door(tmp_path_factory.mktemp("guarded")) as door:
        yield door


def answered(caller: Caller, kinds: Sequence[int] = (ABORT,), diagnostic: int | None = None) -> None:
    """Read to the end of the connection, and check the last PDU; `diagnostic` is that of an A-ABORT of the service provider."""
    kind, body = caller.ends()
    assert kind in kinds, f"answered with PDU type {kind} {body.hex()}"
    if diagnostic is not None:
        assert body == bytes((0, 0, 2, diagnostic))


def released(caller: Caller) -> None:
    """End an association in order."""
    caller.send(pdu(RELEASE_RQ, bytes(4)))
    assert caller.ends()[0] == RELEASE_RP


# --- rows 1 and 2: lengths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(1, 8))
def test_claimed_length(door: Guarded, kind: int) -> None:
    """Row 1: a PDU that claims 4 GiB is judged at its header, first or within an association: A-ABORT, nothing is reserved for it."""

    def attack(mischief: Mischief) -> None:
        for _ in range(5):
            header = struct.pack(">BxL", kind, 0xFFFFFFFF)
            first = mischief.call()
            first.send(header, bytes(10_000))
            # there is no association yet to abort for one who aborts
            answered(first, (0,) if kind == ABORT else (ABORT,))
            within = mischief.associated()
            within.send(header, bytes(10_000))
            answered(within, diagnostic=6)

    under_attack(door, attack)


@pytest.mark.parametrize("length", [ANNOUNCED + 1, 2 * ANNOUNCED, 2**31])
def test_longer_than_announced(door: Guarded, length: int) -> None:
    """Row 2: P-DATA longer than our maximum is A-ABORT(2,6) at its header, what follows is not kept."""

    def attack(mischief: Mischief) -> None:
        callers = [mischief.associated() for _ in range(10)]
        for caller in callers:
            assert caller.maximum_length == ANNOUNCED
            caller.send(struct.pack(">BxL", P_DATA, length), bytes(65_536))
        for caller in callers:
            answered(caller, diagnostic=6)

    under_attack(door, attack)


# --- rows 3 to 7: who holds what ---------------------------------------------------------------------------------------


def test_trickled_handshakes(door: Guarded) -> None:
    """Row 3: sixty callers who send a byte now and then hold no slot, and are gone after the handshake time."""

    def attack(mischief: Mischief) -> None:
        request = associate_rq([STORE_CONTEXT])
        before = refused(mischief.door.state())
        callers = []
        for _ in range(60):
            callers.append(mischief.call())
            callers[-1].send(request[:1])
        position = 1
        while refused(mischief.door.state()) < before + 60:
            for caller in callers:
                try:
                    caller.send(request[position : position + 1])
                except OSError:
                    continue  # it is gone already
            position += 1
            assert position < len(request), "a trickled handshake came to its end"
            time.sleep(0.1)
        for caller in callers:
            assert caller.ends()[0] == 0

    def refused(state: dict[str, Any]) -> int:
        return int(state["counts"].get("association.refused", 0))

    after = under_attack(door, attack, honest_instances=9)
    assert refused(after) - refused(after["before"]) == 60


def test_silence_and_health_checks(door: Guarded) -> None:
    """Row 4: who connects and says nothing is closed; who connects and goes away, five hundred times, leaves nothing."""

    def attack(mischief: Mischief) -> None:
        silent = [mischief.call() for _ in range(40)]
        for number in range(500):
            check = socket.create_connection(("127.0.0.1", door.port), timeout=30)
            if number % 2:
                check.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as some balancers do
            check.close()
        for caller in silent:
            assert caller.ends()[0] == 0

    under_attack(door, attack)


@pytest.mark.parametrize("how", ["idle", "in a PDU", "in a data set", "in a command", "byte by byte"])
def test_idle_and_trickling_associations(door: Guarded, how: str) -> None:
    """Row 5: an association that is idle, or slower than the minimum rate in a message, is aborted, and its partial instance removed."""

    def attack(mischief: Mischief) -> None:
        callers = [mischief.associated() for _ in range(4)]
        _, data = instance()
        request = store_rq(SECONDARY_CAPTURE, "1.2.3")
        for caller in callers:
            if how == "in a PDU":
                caller.send(pdu(P_DATA, pdv(1, 3, request))[:-5])
            elif how == "in a command":
                caller.send(pdu(P_DATA, pdv(1, 1, request[:20])))
            elif how in ("in a data set", "byte by byte"):
                caller.send(pdu(P_DATA, pdv(1, 3, request)), pdu(P_DATA, pdv(1, 0, data[:100])))
        ended = threading.Event()

        def trickle() -> None:
            for position in range(100, len(data)):
                for caller in callers:
                    try:
                        caller.send(pdu(P_DATA, pdv(1, 0, data[position : position + 1])))
                    except OSError:
                        return
                if ended.wait(0.1):
                    return

        trickler = threading.Thread(target=trickle)
        if how == "byte by byte":
            trickler.start()
        try:
            for caller in callers:
                answered(caller)
        finally:
            ended.set()
            if trickler.ident:
                trickler.join()

    under_attack(door, attack)


def test_more_associations_than_allowed(door: Guarded) -> None:
    """Row 6: one caller gets its quota and then A-ASSOCIATE-RJ(2,3,2), however often it asks; others still get in."""

    def attack(mischief: Mischief) -> None:
        for calling, quota in (("LIMITED", 2), ("SCRIPT", 18)):
            for _ in range(quota):
                mischief.associated(calling=calling)
            for _ in range(60):
                caller = mischief.call()
                assert caller.associate(STORE_CONTEXT, calling=calling) == ASSOCIATE_RJ
                assert caller.answer == bytes((0, 2, 3, 2))
                caller.socket.close()
            mischief.close()
        assert mischief.honest.enough.wait(30)

    under_attack(door, attack, honest_instances=9)


def states() -> list[tuple[str, list[bytes], int]]:
    """What brings an association into each state, and how many answers are read on the way."""
    request, uid = associate_rq([STORE_CONTEXT, ECHO_CONTEXT]), str(generate_uid())
    _, data = instance()
    stored = pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, uid)))
    return [
        ("connected", [], 0),
        ("in the header", [request[:4]], 0),
        ("in the request", [request[:100]], 0),
        ("request not answered yet", [request], 0),
        ("associated", [request], 1),
        ("in a command", [request, pdu(P_DATA, pdv(1, 1, store_rq(SECONDARY_CAPTURE, uid)[:30]))], 1),
        ("before the data set", [request, stored], 1),
        ("in a data set", [request, stored, pdu(P_DATA, pdv(1, 0, data[:300]))], 1),
        ("in a PDU", [request, stored, pdu(P_DATA, pdv(1, 0, data[:300]))[:-9]], 1),
        ("echo not read", [request, pdu(P_DATA, pdv(3, 3, echo_rq()))], 1),
        ("release not read", [request, pdu(RELEASE_RQ, bytes(4))], 1),
        ("rejected", [associate_rq([STORE_CONTEXT], calling="NOBODY")], 0),
        ("after a violation", [request, pdu(0x2F, b"")], 1),
    ]


@pytest.mark.parametrize("how", ["abort", "close", "reset"])
def test_abort_in_every_state(door: Guarded, how: str) -> None:
    """Row 7: abort, end or reset in every state of the state machine, ten times each, leaves no thread, descriptor or landing file."""

    def attack(mischief: Mischief) -> None:
        for _ in range(10):
            for _, sent, answers in states():
                caller = mischief.call()
                caller.send(*sent)
                for _ in range(answers):
                    caller.pdu()
                if how == "abort":
                    caller.send(pdu(ABORT, bytes(4)))
                elif how == "reset":
                    caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                caller.socket.close()

    under_attack(door, attack)


def test_rejected_callers_who_stay(door: Guarded) -> None:
    """Row 6: strangers who are rejected and do not hang up hold no place that others need."""

    def attack(mischief: Mischief) -> None:
        request = associate_rq([STORE_CONTEXT], calling="NOBODY")
        while not mischief.honest.enough.is_set() or len(mischief.callers) < 250:
            caller = mischief.call()
            caller.send(request)
            assert len(mischief.callers) < 5000
        for caller in mischief.callers:
            assert caller.pdu() in ((ASSOCIATE_RJ, bytes((0, 1, 1, 3))), (ASSOCIATE_RJ, bytes((0, 2, 3, 2))))

    under_attack(door, attack, honest_instances=9)


# --- rows 8 to 13: the upper layer -------------------------------------------------------------------------------------

LAWFUL = store_rq(SECONDARY_CAPTURE, "1.2.3")
OUT_OF_PLACE: list[tuple[str, bytes, int]] = [
    ("unknown type", pdu(0x08, b""), 1),
    ("type 0", pdu(0x00, bytes(20)), 1),
    ("type 255", pdu(0xFF, bytes(20)), 1),
    ("release in a message", pdu(P_DATA, pdv(1, 3, LAWFUL)) + pdu(RELEASE_RQ, bytes(4)), 2),
]
UNEXPECTED: list[tuple[str, bytes]] = [
    ("second request", associate_rq([STORE_CONTEXT])),
    ("request in a message", pdu(P_DATA, pdv(1, 3, LAWFUL)) + associate_rq([STORE_CONTEXT])),
    ("accept", pdu(2, associate_rq([STORE_CONTEXT])[6:])),
    ("reject", pdu(3, bytes((0, 1, 1, 1)))),
    ("release answer", pdu(6, bytes(4))),
]


def test_pdu_out_of_place(door: Guarded) -> None:
    """Row 8: unknown PDU types and PDUs that have no place in a state are A-ABORT (PS3.8 Table 9-10), first or later."""

    def attack(mischief: Mischief) -> None:
        for name, sent, diagnostic in OUT_OF_PLACE:
            caller = mischief.associated()
            caller.send(sent)
            kind, body = caller.ends()
            assert (kind, body) == (ABORT, bytes((0, 0, 2, diagnostic))), name
        for name, sent in UNEXPECTED:
            caller = mischief.associated()
            caller.send(sent)
            assert caller.ends()[0] == ABORT, name
        for kind in (0, 2, 3, 4, 5, 6, 8, 0x2F, 0xFF):
            caller = mischief.call()
            caller.send(pdu(kind, bytes(4)))
            answered(caller)
        # and pipelined behind the request, before it is answered
        for following in (pdu(P_DATA, pdv(3, 3, echo_rq())), associate_rq([ECHO_CONTEXT]), pdu(RELEASE_RQ, bytes(4)), pdu(0x2F, b"")):
            caller = mischief.call()
            caller.send(associate_rq([ECHO_CONTEXT]), following)
            assert caller.ends()[0] in (ABORT, ASSOCIATE_AC, P_DATA, RELEASE_RP)

    under_attack(door, attack)


def request_of(*items: bytes, fixed: bytes | None = None) -> bytes:
    """Return an A-ASSOCIATE-RQ of given items."""
    head = struct.pack(">HH16s16s32x", 1, 0, b"DERM_NODE".ljust(16), b"SCRIPT".ljust(16)) if fixed is None else fixed
    return pdu(ASSOCIATE_RQ, head + b"".join(items))


def context_item(context_id: int, syntaxes: Sequence[str] = (EXPLICIT,), abstract: str = SECONDARY_CAPTURE) -> bytes:
    """Return a Presentation Context Item."""
    inner = item(0x30, abstract.encode()) + b"".join(item(0x40, syntax.encode()) for syntax in syntaxes)
    return item(0x20, bytes((context_id, 0, 0, 0)) + inner)


APPLICATION = item(0x10, b"1.2.840.10008.3.1.1.1")
USER = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4"))
PROPOSALS: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("id 0", request_of(APPLICATION, context_item(0), USER), (ABORT, ASSOCIATE_RJ)),
    ("even id", request_of(APPLICATION, context_item(2), USER), (ABORT, ASSOCIATE_RJ)),
    ("id twice", request_of(APPLICATION, context_item(1), context_item(1), USER), (ABORT, ASSOCIATE_RJ)),
    ("129 contexts", request_of(APPLICATION, *(context_item((2 * n + 1) % 256) for n in range(129)), USER), (ABORT, ASSOCIATE_RJ)),
    ("no context", request_of(APPLICATION, USER), (ABORT, ASSOCIATE_RJ)),
    ("no user information", request_of(APPLICATION, context_item(1)), (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC)),
    ("no application context", request_of(context_item(1), USER), (ABORT, ASSOCIATE_RJ)),
    ("other application context", request_of(item(0x10, b"1.2.3"), context_item(1), USER), (ASSOCIATE_RJ,)),
    ("ten thousand syntaxes", request_of(APPLICATION, context_item(1)[:-2], item(0x40, EXPLICIT.encode()) * 10_000, USER), (ABORT,)),
    (
        "two thousand syntaxes",
        request_of(APPLICATION, context_item(1, [f"1.2.3.{n}" for n in range(2000)]), USER),
        (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC),
    ),
    ("sub-item past the item", request_of(APPLICATION, item(0x20, bytes((1, 0, 0, 0, 0x30, 0, 0xFF, 0xFF))), USER), (ABORT, ASSOCIATE_RJ)),
    ("item past the PDU", request_of(APPLICATION, b"\x20\0\xff\xff" + bytes(20)), (ABORT, ASSOCIATE_RJ)),
    ("thirty thousand empty items", request_of(APPLICATION, item(0x20, b"") * 30_000), (ABORT, ASSOCIATE_RJ)),
    ("unknown items", request_of(APPLICATION, item(0x99, bytes(100)) * 1000, context_item(1), USER), (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC)),
    ("fixed part cut", request_of(fixed=bytes(20)), (ABORT, ASSOCIATE_RJ)),
    ("UID of letters", request_of(APPLICATION, context_item(1, abstract="<script>"), USER), (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC)),
    ("UID not ASCII", request_of(APPLICATION, context_item(1, abstract="1.2.\u00e9"), USER), (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC)),
    ("long UID", request_of(APPLICATION, context_item(1, abstract="1." * 5000), USER), (ABORT, ASSOCIATE_RJ, ASSOCIATE_AC)),
]


def test_senseless_proposals(door: Guarded) -> None:
    """Row 9: an A-ASSOCIATE-RQ that breaks PS3.8 is rejected or aborted; one that is only odd may be accepted, without odd contexts."""

    def attack(mischief: Mischief) -> None:
        for name, sent, expected in PROPOSALS * 3:
            caller = mischief.call()
            caller.send(sent)
            answer = caller.pdu()
            assert answer is not None, f"{name}: closed without an answer"
            assert answer[0] in expected, name
            if answer[0] == ASSOCIATE_AC:
                released(caller)

    under_attack(door, attack)


HOSTILE_TITLES = ["", "\0\1\2", "NUL\0NUL", "../../etc/passwd", "$(reboot)", "`id`;ls", "' OR 1=1 --", "%s%n%n%n", "\x1b[31mRED", "a\r\nb"]


def test_hostile_titles(door: Guarded) -> None:
    """Row 10: AE titles of every malice are rejected (1,1,3; as called ones 1,1,7) or aborted; they reach neither path nor shell."""

    def attack(mischief: Mischief) -> None:
        for title in HOSTILE_TITLES:
            for settings, diagnostic in (({"calling": title}, 3), ({"called": title}, 7), ({"calling": title, "called": title}, 7)):
                caller = mischief.call()
                caller.send(associate_rq([STORE_CONTEXT], **settings))
                kind, body = caller.ends()
                assert kind in (ABORT, ASSOCIATE_RJ)
                if kind == ASSOCIATE_RJ:
                    assert body == bytes((0, 1, 1, diagnostic))

    after = under_attack(door, attack)
    for line in door.log().splitlines():
        assert line.isprintable()
    assert any("$(reboot)" in calling for _, _, calling, _ in after["refusals"])


@pytest.mark.parametrize("calling", ["NOBODY", "AWAY", "MUTE", "script", "SCRIPT\u00a0"])
def test_callers_who_are_not_let_in(door: Guarded, calling: str) -> None:
    """Row 11: who is no peer, a peer elsewhere, or one that may do nothing is rejected (1,1,3), noted each time, and audited once."""

    def attack(mischief: Mischief) -> None:
        for _ in range(20):
            caller = mischief.call()
            caller.send(associate_rq([STORE_CONTEXT], calling=calling))
            kind, body = caller.ends()
            assert (kind, body) == (ASSOCIATE_RJ, bytes((0, 1, 1, 3))) or (kind == ABORT and not calling.isascii())

    after = under_attack(door, attack)
    if calling.isascii():
        noted = {
            when: sum(one[3] for one in state["refusals"] if (one[0], one[2]) == ("association", calling))
            for when, state in (("before", after["before"]), ("after", after))
        }
        assert noted["after"] - noted["before"] == 20
        audited = [event for event in after["alerts"] if event["calling_ae_title"] == calling]
        assert len(audited) == 1


def identity(kind: int, primary: bytes, secondary: bytes = b"", *, response: int = 1, lie: int = 0) -> bytes:
    """Return a User Identity sub-item (PS3.7 Table D.3-14); `lie` is added to the length of its primary field."""
    return item(
        0x58, struct.pack(">BBH", kind, response, (len(primary) + lie) & 0xFFFF) + primary + struct.pack(">H", len(secondary)) + secondary
    )


def user_information(*sub_items: bytes) -> bytes:
    """Return an A-ASSOCIATE-RQ with given sub-items of the User Information."""
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4") + b"".join(sub_items)
    return request_of(APPLICATION, context_item(1), item(0x50, user))


IDENTITIES: list[tuple[str, bytes]] = [
    ("name", identity(1, CANARY.encode())),
    ("passcode", identity(2, b"root", b"toor")),
    ("no name", identity(2, b"", b"")),
    ("60 KiB", identity(2, b"x" * 60_000, b"y")),
    ("token", identity(5, b"eyJhbGciOiJub25lIn0.e30.")),
    ("token of no kind", identity(5, b"\xff" * 1000)),
    ("unknown type", identity(99, b"x")),
    ("length past the item", identity(2, b"abc", b"def", lie=5000)),
    ("length short", identity(2, b"abcdef", b"def", lie=-4)),
    ("empty", item(0x58, b"")),
    ("twice", identity(1, b"one") + identity(2, b"two", b"three")),
]


def test_user_identity(door: Guarded) -> None:
    """Row 12: an identity that is wrong, huge or none gets its caller no further than none does; guesses in test_identity.py."""

    def attack(mischief: Mischief) -> None:
        for name, sub_item in IDENTITIES * 3:
            caller = mischief.call()
            caller.send(user_information(sub_item))
            answer = caller.pdu()
            assert answer is not None, name
            assert answer[0] in (ASSOCIATE_AC, ASSOCIATE_RJ, ABORT), name
            if answer[0] == ASSOCIATE_AC:
                released(caller)

    under_attack(door, attack)


def role(uid: bytes, scu: int, scp: int) -> bytes:
    """Return a Role Selection sub-item."""
    return item(0x54, struct.pack(">H", len(uid)) + uid + bytes((scu, scp)))


NEGOTIATION: list[tuple[str, bytes]] = [
    ("role of nothing", role(b"", 1, 1)),
    ("role of 200", role(SECONDARY_CAPTURE.encode(), 200, 200)),
    ("role cut", item(0x54, b"\0\x40" + b"1.2")),
    ("a thousand roles", role(SECONDARY_CAPTURE.encode(), 0, 1) * 1000),
    ("window of 0", item(0x53, bytes(4))),
    ("window of 65535", item(0x53, b"\xff" * 4)),
    ("window cut", item(0x53, b"\1")),
    ("window twice", item(0x53, bytes(4)) * 2),
    ("extended", item(0x56, struct.pack(">H", 5) + b"1.2.3" + os.urandom(5000))),
    ("extended find", item(0x56, struct.pack(">H", len(STUDY_FIND)) + STUDY_FIND.encode() + b"\xff" * 4000)),
    ("extended cut", item(0x56, b"\xff\xff")),
    ("common extended", item(0x57, struct.pack(">H", 5) + b"1.2.3" + struct.pack(">H", 60_000))),
    ("common extended of storage", item(0x57, b"\0\x051.2.3" + b"\0\x061.2.84" + b"\0\0")),
    ("implementation twice", item(0x52, b"1.2") + item(0x55, b"\xff" * 16) * 2),
    ("maximum length 1", item(0x51, struct.pack(">L", 1))),
    ("maximum length cut", item(0x51, b"\1")),
    ("unknown", item(0x7F, b"x" * 40_000)),
    ("empty ones", b"".join(item(kind, b"") for kind in range(0x51, 0x60))),
]


def test_negotiation_garbage(door: Guarded) -> None:
    """Row 13: garbage in role selection, asynchronous window and extended negotiation is ignored or refused; C-STORE is answered."""

    def attack(mischief: Mischief) -> None:
        for name, sub_item in NEGOTIATION * 2:
            caller = mischief.call()
            caller.send(user_information(sub_item))
            answer = caller.pdu()
            assert answer is not None, name
            assert answer[0] in (ASSOCIATE_AC, ASSOCIATE_RJ, ABORT), name
            if answer[0] == ASSOCIATE_AC:
                caller.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, "1.2.3"))), pdu(P_DATA, pdv(1, 2, b"no data set")))
                answer = caller.pdu()
                assert answer is not None, name
                assert answer[0] in (P_DATA, ABORT), name
            caller.socket.close()

    under_attack(door, attack)


# --- rows 14 and 15: DIMSE messages ------------------------------------------------------------------------------------

FRAGMENTS: list[tuple[str, bytes]] = [
    ("PDV length 0", pdu(P_DATA, struct.pack(">L", 0))),
    ("PDV length 1", pdu(P_DATA, struct.pack(">LB", 1, 1))),
    ("PDV past the PDU", pdu(P_DATA, struct.pack(">LBB", 0xFFFFFFFF, 1, 3) + LAWFUL)),
    ("half a PDV header", pdu(P_DATA, pdv(1, 1, LAWFUL) + b"\0\0")),
    ("context 0", pdu(P_DATA, pdv(0, 3, LAWFUL))),
    ("context 255", pdu(P_DATA, pdv(255, 3, LAWFUL))),
    ("data first", pdu(P_DATA, pdv(1, 2, b"data"))),
    ("data in the command", pdu(P_DATA, pdv(1, 1, LAWFUL[:20]) + pdv(1, 2, b"data"))),
    ("command in the data", pdu(P_DATA, pdv(1, 3, LAWFUL) + pdv(1, 0, b"data") + pdv(1, 3, LAWFUL))),
    ("data in another context", pdu(P_DATA, pdv(1, 3, LAWFUL) + pdv(3, 2, b"data"))),
    ("reserved bits", pdu(P_DATA, pdv(1, 0xFC, b"data"))),
    ("command of nothing", pdu(P_DATA, pdv(1, 3, b""))),
]


def test_broken_fragments(door: Guarded) -> None:
    """Row 14: PDVs of impossible lengths, contexts and orders are A-ABORT, and a partial instance goes."""

    def attack(mischief: Mischief) -> None:
        for name, sent in FRAGMENTS * 3:
            caller = mischief.associated(STORE_CONTEXT, ECHO_CONTEXT)
            caller.send(sent)
            assert caller.ends()[0] == ABORT, name
            caller.socket.close()

    under_attack(door, attack)


def message(field: int, *elements: bytes, message_id: int = 1, data_set_type: int = 0x0101, sop_class_uid: str = VERIFICATION) -> bytes:
    """Return a command set."""
    return command(
        element(0x0002, even(sop_class_uid)),
        element(0x0100, us(field)),
        element(0x0110, us(message_id)),
        element(0x0800, us(data_set_type)),
        *elements,
    )


def answer_of(field: int) -> bytes:
    """Return the command set of a response."""
    return command(element(0x0100, us(field)), element(0x0120, us(1)), element(0x0800, us(0x101)), element(0x0900, us(0)))


COMMANDS: list[tuple[str, bytes]] = [
    ("no message id", command(element(0x0002, even(VERIFICATION)), element(0x0100, us(0x30)), element(0x0800, us(0x101)))),
    ("no class", command(element(0x0100, us(0x30)), element(0x0110, us(1)), element(0x0800, us(0x101)))),
    ("class twice", message(0x30, element(0x0002, even(VERIFICATION)))),
    ("command field 0", message(0)),
    ("command field 7FFF", message(0x7FFF)),
    ("command field of four bytes", command(element(0x0100, bytes(4)), element(0x0110, us(1)), element(0x0800, us(0x101)))),
    ("element past the end", command(struct.pack("<HHL", 0, 2, 0xFFFFFFFF))),
    ("other group", message(0x30) + struct.pack("<HHL", 0x10, 0x10, 0)),
    ("unasked answer", command(element(0x0100, us(0x8030)), element(0x0120, us(1)), element(0x0800, us(0x101)), element(0x0900, us(0)))),
    (
        "unasked store answer",
        command(element(0x0100, us(0x8001)), element(0x0120, us(1)), element(0x0800, us(0x101)), element(0x0900, us(0))),
    ),
    ("cancel of nothing", command(element(0x0100, us(0x0FFF)), element(0x0120, us(9)), element(0x0800, us(0x101)))),
    ("echo of a storage class", message(0x30, sop_class_uid=SECONDARY_CAPTURE)),
    ("find in the echo context", message(0x20, sop_class_uid=STUDY_FIND)),
    ("echo of the find class", message(0x30, sop_class_uid=STUDY_FIND)),
    ("get", message(0x10, sop_class_uid=STUDY_FIND)),
    ("move", message(0x21, sop_class_uid=STUDY_MOVE)),
    ("n-event-report", message(0x100, element(0x1000, even("1.2")), element(0x1002, us(1)))),
    ("n-get", message(0x110, element(0x0003, even(VERIFICATION)), element(0x1001, even("1.2")))),
    ("n-set", message(0x120, element(0x0003, even(VERIFICATION)), element(0x1001, even("1.2")))),
    ("n-action", message(0x130, element(0x0003, even(COMMITMENT)), element(0x1001, even("1.2")), element(0x1008, us(1)))),
    ("n-create", message(0x140)),
    ("n-delete", message(0x150, element(0x0003, even(VERIFICATION)), element(0x1001, even("1.2")))),
    ("UID of control bytes", message(0x30, sop_class_uid="\x1b[31m\n\r")),
    (
        "UID not ASCII",
        command(element(0x0002, b"\xff\xfe\xfd\xfc"), element(0x0100, us(0x30)), element(0x0110, us(1)), element(0x0800, us(0x101))),
    ),
    ("long UID", message(0x30, sop_class_uid="1." * 10_000)),
]


def test_broken_commands(door: Guarded) -> None:
    """Row 15: a command set that is broken, makes no sense or has no place gets a failure status, A-ABORT, or nothing where none is due."""

    def attack(mischief: Mischief) -> None:
        for name, sent in COMMANDS:
            for context_id in (1, 3, 5, 7):
                caller = mischief.associated(STORE_CONTEXT, ECHO_CONTEXT, (5, STUDY_FIND, [IMPLICIT]), (7, COMMITMENT, [IMPLICIT]))
                caller.send(pdu(P_DATA, pdv(context_id, 3, sent)), pdu(RELEASE_RQ, bytes(4)))
                kind, _ = caller.ends()
                assert kind in (ABORT, RELEASE_RP), f"{name} in context {context_id}"
                caller.socket.close()

    under_attack(door, attack)


def test_long_and_lying_commands(door: Guarded) -> None:
    """Row 15: a command set of a megabyte is A-ABORT(2,6); a data set that was announced and does not come, or comes unannounced, too."""

    def attack(mischief: Mischief) -> None:
        long = mischief.associated()
        for _ in range(5):
            long.send(pdu(P_DATA, pdv(1, 1, bytes(200_000))))
        answered(long, diagnostic=6)
        unannounced = mischief.associated(STORE_CONTEXT, ECHO_CONTEXT)
        unannounced.send(pdu(P_DATA, pdv(3, 3, echo_rq()) + pdv(3, 2, b"data")))
        answered(unannounced, diagnostic=5)
        missing = mischief.associated(STORE_CONTEXT, ECHO_CONTEXT)
        missing.send(pdu(P_DATA, pdv(3, 3, message(0x30, data_set_type=0))), pdu(P_DATA, pdv(3, 3, echo_rq())))
        answered(missing, diagnostic=5)
        endless = mischief.associated(STORE_CONTEXT, ECHO_CONTEXT)
        endless.send(pdu(P_DATA, pdv(3, 3, message(0x30, data_set_type=0))))
        with contextlib.suppress(OSError):
            for _ in range(200):
                endless.send(pdu(P_DATA, pdv(3, 0, bytes(200_000))))
        answered(endless, (ABORT, 0))

    under_attack(door, attack)


@pytest.mark.parametrize("what", ["echo", "find", "identifiers", "cancel", "events"])
def test_floods_of_requests(door: Guarded, what: str) -> None:
    """Row 15: who sends requests and reads no answer is not read himself any more, or aborted: requests that wait take bounded memory."""

    def attack(mischief: Mischief) -> None:
        contexts = [ECHO_CONTEXT, (5, STUDY_FIND, [IMPLICIT]), (7, COMMITMENT, [IMPLICIT])]
        if what == "echo":
            one = pdu(P_DATA, pdv(3, 3, echo_rq())) * 100
        elif what == "find":
            one = (pdu(P_DATA, pdv(5, 3, find_rq())) + pdu(P_DATA, pdv(5, 2, IDENTIFIER))) * 100
        elif what == "identifiers":
            long = b"".join(pdu(P_DATA, pdv(5, 0, bytes(250_000))) for _ in range(16))
            one = pdu(P_DATA, pdv(5, 3, find_rq())) + long + pdu(P_DATA, pdv(5, 2, b""))
        elif what == "cancel":
            cancels = (command(element(0x0100, us(0x0FFF)), element(0x0120, us(n)), element(0x0800, us(0x101))) for n in range(100))
            one = b"".join(pdu(P_DATA, pdv(5, 3, cancel)) for cancel in cancels)
        else:
            event = message(0x100, element(0x1000, even(COMMITMENT_INSTANCE)), element(0x1002, us(1)), sop_class_uid=COMMITMENT)
            one = pdu(P_DATA, pdv(7, 3, event)) * 100

        def flood(caller: Caller) -> None:
            caller.socket.settimeout(1)
            deadline = time.monotonic() + 2
            try:
                while time.monotonic() < deadline:
                    caller.send(one)
            except OSError:
                return  # it is not read any more, or aborted

        callers = [mischief.associated(*contexts) for _ in range(4)]
        mischief.budget_mib = 96 if what == "identifiers" else 0  # 32 MiB, and what the library makes of them
        flooding = [threading.Thread(target=flood, args=(caller,)) for caller in callers]
        for thread in flooding:
            thread.start()
        for thread in flooding:
            thread.join()

    under_attack(door, attack)


@pytest.mark.timeout(45, func_only=True)
def test_requests_sent_ahead_are_all_answered(door: Guarded) -> None:
    """Row 15: two hundred requests in one go are answered one after the other without waiting for more to come."""

    def attack(mischief: Mischief) -> None:
        caller = mischief.associated(ECHO_CONTEXT)
        caller.send(pdu(P_DATA, pdv(3, 3, echo_rq())) * 200)
        for _ in range(200):
            assert caller.status() == 0
        released(caller)

    under_attack(door, attack)


# --- rows 16 to 18: C-STORE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["instance", "class", "context", "all three"])
def test_other_instance_than_announced(door: Guarded, what: str) -> None:
    """Row 16: command, data set and context that name different classes or instances are 0xA900, and stored under none of them."""

    def attack(mischief: Mischief) -> None:
        uid, data = instance()
        announced_class = MR if what in ("class", "context", "all three") else SECONDARY_CAPTURE
        announced = str(generate_uid()) if what in ("instance", "all three") else uid
        context = (1, MR, [EXPLICIT]) if what == "context" else STORE_CONTEXT
        caller = mischief.associated(context)
        for _ in range(5):
            caller.send(pdu(P_DATA, pdv(1, 3, store_rq(announced_class, announced))), pdu(P_DATA, pdv(1, 2, data)))
            assert caller.status() == 0xA900
        caller.release()

    under_attack(door, attack)


def test_other_transfer_syntax_than_negotiated(door: Guarded) -> None:
    """Row 17: a data set in another encoding than its context's is 0xC000, and the association goes on."""

    def attack(mischief: Mischief) -> None:
        data_set = draw(rows=8, columns=8)
        data_set.PatientName = CANARY
        explicit, implicit = encoded(data_set), encoded(data_set, implicit=True)
        deflated = zlib.compress(explicit)
        jpeg, big, deflate = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
        for syntax, wrong in (
            (EXPLICIT, implicit),
            (IMPLICIT, explicit),
            (EXPLICIT, deflated),
            (deflate, explicit),
            (deflate, deflated),  # with a header of zlib, which it must not have
            (big, explicit),
            (jpeg, implicit),
            (jpeg, explicit),  # its pixels are native
            (EXPLICIT, b"\x89PNG" + os.urandom(1000)),
            (EXPLICIT, b""),
        ):
            caller = mischief.associated((1, SECONDARY_CAPTURE, [syntax]))
            assert threats.store(caller, str(data_set.SOPInstanceUID), wrong) in (0xC000, 0xA900), syntax
            caller.release()

    under_attack(door, attack)


@pytest.mark.parametrize("what", ["pixels", "one element", "many elements", "empty fragments"])
def test_endless_data_set(door: Guarded, what: str) -> None:
    """Row 18: a data set without end is refused at the object limit, and aborted when it still goes on; the disk has its room again."""

    def attack(mischief: Mischief) -> None:
        _, data = instance()
        if what == "one element":
            data = data[:-144] + b"\xff\xff\xff\xfe"
        piece = (struct.pack("<HH2sH", 0x11, 0x1001, b"LO", 8) + b"ENDLESS!") * 6000 if what == "many elements" else bytes(96_000)
        caller = mischief.associated()
        caller.send(pdu(P_DATA, pdv(1, 3, LAWFUL)), pdu(P_DATA, pdv(1, 0, data)))
        with contextlib.suppress(OSError):
            for _ in range(4 * OBJECT_BYTES // 96_000):
                caller.send(pdu(P_DATA, pdv(1, 0, b"") * 16_000 if what == "empty fragments" else pdv(1, 0, piece)))
        answered(caller, (ABORT, 0))  # what was sent after the end may have become a reset

    under_attack(door, attack)


# --- rows 19 to 22: the services ---------------------------------------------------------------------------------------


def implicit(group: int, number: int, value: bytes) -> bytes:
    """Return an element of Implicit VR Little Endian."""
    value += b" " * (len(value) % 2)
    return struct.pack("<HHL", group, number, len(value)) + value


def find_rq(message_id: int = 1, sop_class_uid: str = STUDY_FIND) -> bytes:
    """Return the command set of a C-FIND-RQ."""
    return message(0x20, element(0x0700, us(0)), message_id=message_id, data_set_type=1, sop_class_uid=sop_class_uid)


LEVEL = implicit(8, 0x52, b"STUDY")
IDENTIFIER = LEVEL + implicit(0x10, 0x10, b"*") + implicit(0x20, 0x0D, b"")
FIND_CONTEXT = (5, STUDY_FIND, [IMPLICIT])


def find(caller: Caller, identifier: bytes) -> int:
    """Ask, and return the final status."""
    caller.send(pdu(P_DATA, pdv(5, 3, find_rq())), *(pdu(P_DATA, one) for one in fragments(5, identifier)))
    return final_status(caller)


def final_status(caller: Caller) -> int:
    """Read responses, with or without identifiers, to the final one."""
    encoded_command = b""
    while True:
        answer = caller.pdu()
        assert answer is not None, "the door closed the connection"
        kind, body = answer
        assert kind == P_DATA, f"PDU type {kind} {body.hex()}"
        while body:
            length, _, control = struct.unpack_from(">LBB", body)
            fragment, body = body[6 : 4 + length], body[4 + length :]
            if control & 1:
                encoded_command += fragment
            if control == 3:
                place = encoded_command.index(b"\0\0\0\x09\2\0\0\0")
                status = int.from_bytes(encoded_command[place + 8 : place + 10], "little")
                encoded_command = b""
                if status >> 8 != 0xFF:
                    return status


QUERIES: list[tuple[str, bytes]] = [
    ("everything", LEVEL + implicit(0x10, 0x10, b"*")),
    ("ten thousand UIDs", LEVEL + implicit(0x20, 0x0D, b"\\".join(b"1.2.3.%d" % n for n in range(10_000)))),
    ("stars and question marks", LEVEL + implicit(0x10, 0x10, b"*?" * 30)),
    ("long pattern", LEVEL + implicit(0x10, 0x10, b"*a" * 500)),
    ("leading star", LEVEL + implicit(0x10, 0x10, b"*" + b"?" * 60 + b"x")),
    ("all of time", LEVEL + implicit(8, 0x20, b"-99991231") + implicit(0x10, 0x10, b"")),
]


def test_heavy_queries(door: Guarded) -> None:
    """Row 19: wide patterns and long lists are answered or refused by status, by many callers at once; C-CANCEL and abort are heard."""

    def attack(mischief: Mischief) -> None:
        for name, identifier in QUERIES:
            callers = [mischief.associated(FIND_CONTEXT) for _ in range(5)]
            for caller in callers:
                caller.send(pdu(P_DATA, pdv(5, 3, find_rq())), pdu(P_DATA, pdv(5, 2, identifier)))
            cancel = command(element(0x0100, us(0x0FFF)), element(0x0120, us(1)), element(0x0800, us(0x101)))
            callers[0].send(pdu(P_DATA, pdv(5, 3, cancel)))
            callers[1].send(pdu(ABORT, bytes(4)))
            callers[2].socket.close()
            assert final_status(callers[0]) in (0x0000, 0xFE00, 0xA700, 0xA900), name
            for caller in callers[3:]:
                assert final_status(caller) in (0x0000, 0xA700, 0xA900), name
            for caller in callers:
                caller.socket.close()

    under_attack(door, attack)


IDENTIFIERS: list[tuple[str, bytes]] = [
    ("no level", implicit(0x10, 0x10, b"A*")),
    ("other level", implicit(8, 0x52, b"PLANET")),
    ("SQL", LEVEL + implicit(0x10, 0x10, b"'; DROP TABLE studies; --")),
    ("SQL in a UID", LEVEL + implicit(0x20, 0x0D, b"1' OR '1'='1")),
    ("SQL in a date", LEVEL + implicit(8, 0x20, b"20200101' OR 1=1 --")),
    ("sequence for a name", LEVEL + struct.pack("<HHL", 0x10, 0x10, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)),
    ("text for a sequence", LEVEL + implicit(8, 0x1140, b"this is no sequence")),
    ("number for a name", LEVEL + implicit(0x10, 0x10, bytes(range(32)))),
    ("nested deeply", LEVEL + (struct.pack("<HHLHHL", 8, 0x1140, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)) * 3000),
    ("cut", IDENTIFIER[:-5]),
    ("past the end", LEVEL + struct.pack("<HHL", 0x10, 0x10, 0xFFFFFFFE)),
    ("out of order", implicit(0x20, 0x0D, b"1.2") + LEVEL),
    ("twice", LEVEL + LEVEL),
    ("ten thousand elements", LEVEL + b"".join(implicit(0x11, 0x1000 + n, b"x ") for n in range(10_000))),
    ("a megabyte", LEVEL + implicit(0x10, 0x10, b"A" * 1_000_000)),
    ("broken character set", implicit(8, 5, b"\\ISO 2022 IR 999\\" * 50) + LEVEL + implicit(0x10, 0x10, b"\x1b$B\xff\xff\x1b")),
    ("canary", LEVEL + implicit(0x10, 0x10, CANARY.encode()) + implicit(0x10, 0x20, b"drawn-1")),
    ("nothing", b""),
    ("noise", bytes(random.Random(7).randrange(256) for _ in range(500))),
]
ANSWERS = (0x0000, 0xA700, 0xA900, 0xC000, 0xC001)


def test_hostile_identifiers(door: Guarded) -> None:
    """Row 20: identifiers of wrong VRs, SQL, broken framing and depth are 0xA900 or 0xC000, or match nothing; the association goes on."""

    def attack(mischief: Mischief) -> None:
        caller = mischief.associated(FIND_CONTEXT)
        for name, identifier in IDENTIFIERS * 2:
            status = find(caller, identifier)
            assert status in ANSWERS, f"{name}: {status:04X}"
        caller.release()

    under_attack(door, attack)


def test_move_to_a_stranger(door: Guarded) -> None:
    """Row 21: a Move Destination that is no peer with an address is 0xA801, and nothing is connected to, whatever it is called."""

    def attack(mischief: Mischief) -> None:
        for title in (b"STRANGER", b"127.0.0.1", b"../../x", b"$(id)", b"HONEST", b"", b"\xff\xfe"):
            caller = mischief.associated((5, STUDY_MOVE, [IMPLICIT]))
            request = message(
                0x21,
                element(0x0600, title + b" " * (len(title) % 2)),
                element(0x0700, us(0)),
                data_set_type=1,
                sop_class_uid=STUDY_MOVE,
            )
            caller.send(pdu(P_DATA, pdv(5, 3, request)), pdu(P_DATA, pdv(5, 2, LEVEL + implicit(0x20, 0x0D, b"1.2.3"))))
            answer = final_status(caller) if title.isascii() and title else caller.ends()[0]
            assert answer in (0xA801, ABORT, P_DATA), title
            assert title not in (b"STRANGER", b"127.0.0.1", b"HONEST") or answer == 0xA801

    under_attack(door, attack)


def references(count: int, transaction: str, *, uid: str = "") -> bytes:
    """Return Action Information of so many references."""
    items = b"".join(
        struct.pack("<HHL", 0xFFFE, 0xE000, len(body)) + body
        for number in range(count)
        for body in [implicit(8, 0x1150, even(SECONDARY_CAPTURE)) + implicit(8, 0x1155, even(uid or f"1.2.{number}"))]
    )
    return implicit(8, 0x1195, even(transaction)) + struct.pack("<HHL", 8, 0x1199, len(items)) + items


def n_action(caller: Caller, information: bytes, *, instance_uid: str = COMMITMENT_INSTANCE, action: int = 1) -> int:
    """Ask for storage commitment; the status."""
    request = command(
        element(0x0003, even(COMMITMENT)),
        element(0x0100, us(0x0130)),
        element(0x0110, us(1)),
        element(0x0800, us(1)),
        element(0x1001, even(instance_uid)),
        element(0x1008, us(action)),
    )
    caller.send(pdu(P_DATA, pdv(7, 3, request)), *(pdu(P_DATA, one) for one in fragments(7, information)))
    return caller.status()


def fragments(context_id: int, data: bytes) -> Iterator[bytes]:
    """Cut a data set into PDVs."""
    size = ANNOUNCED - 6
    for start in range(0, max(len(data), 1), size):
        yield pdv(context_id, 2 if start + size >= len(data) else 0, data[start : start + size])


def test_commitment_mischief(door: Guarded) -> None:
    """Row 22: too many, foreign and repeated references, a re-used Transaction UID, forged reports: bounded, by status, none believed."""
    context = (7, COMMITMENT, [IMPLICIT])

    def attack(mischief: Mischief) -> None:
        caller = mischief.associated(context)
        assert n_action(caller, references(5000, str(generate_uid()))) in (0x0213, 0x0110)
        assert n_action(caller, references(1, str(generate_uid())), instance_uid="1.2.3") == 0x0112
        assert n_action(caller, references(1, str(generate_uid())), action=9) == 0x0123
        assert n_action(caller, b"noise") in (0x0110, 0x0115)
        assert n_action(caller, references(0, str(generate_uid()))) == 0x0115
        event = message(
            0x100, element(0x1000, even(COMMITMENT_INSTANCE)), element(0x1002, us(1)), sop_class_uid=COMMITMENT, data_set_type=1
        )
        for transaction in (str(generate_uid()), "1.2.3"):
            caller.send(pdu(P_DATA, pdv(7, 3, event)), pdu(P_DATA, pdv(7, 2, references(1, transaction))))
            assert caller.status() in (0x0110, 0x0112, 0x0115)
        caller.release()
        transaction = str(generate_uid())
        for number, expected in ((1, 0), (1, 0), (2, 0x0131)):
            caller = mischief.associated(context)
            assert n_action(caller, references(number, transaction)) == expected
            caller.send(pdu(ABORT, bytes(4)))
        stranger = mischief.call()
        assert stranger.associate(context, calling="NOBODY") == ASSOCIATE_RJ

    under_attack(door, attack)


# --- the table ---------------------------------------------------------------------------------------------------------


def test_every_row_has_its_tests_and_its_line_of_the_page() -> None:
    """Each row of the table above names tests that exist, in modules of this folder; docs/dimse.md has a line for each row."""
    folder = Path(__file__).parent
    known: set[str] = set()
    for path in folder.glob("test_*.py"):
        known.add(path.stem)
        known |= {f"{path.stem}.{node.name}" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert sorted(TESTS) == list(range(1, 23))
    missing = {name for names in TESTS.values() for name in names} - known
    assert not missing
    lines = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / "dimse.md").read_text(), re.MULTILINE)
    assert [int(one) for one in lines] == list(range(1, 23))
