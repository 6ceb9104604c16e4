"""Lawful conversations, broken at random: the door answers or ends each, never fails within, and keeps nothing of them.

MUTANTS=20000 SEED=7 in the environment make more of them, or others; a failure names the seed.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dicom_node.scripted_peer import (
    ABORT,
    ASSOCIATE_AC,
    EXPLICIT,
    IMPLICIT,
    P_DATA,
    RELEASE_RQ,
    VERIFICATION,
    associate_rq,
    echo_rq,
    pdu,
    pdv,
    store_rq,
)
from tests.dicom_node.test_threats import (
    COMMITMENT,
    FIND_CONTEXT,
    IDENTIFIER,
    IDENTITIES,
    NEGOTIATION,
    STUDY_MOVE,
    find_rq,
    references,
    user_information,
)
from tests.dicom_node.threats import SECONDARY_CAPTURE, STORE_CONTEXT, Caller, Guarded, Mischief, guarded_door, instance, under_attack

CONTEXTS = [STORE_CONTEXT, (3, VERIFICATION, [IMPLICIT]), FIND_CONTEXT, (7, COMMITMENT, [IMPLICIT, EXPLICIT]), (9, STUDY_MOVE, [IMPLICIT])]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A door of its own."""
    with guarded_door(tmp_path_factory.mktemp("guarded")) as door:
        yield door


def conversation(chance: random.Random) -> list[bytes]:
    """Return the PDUs that a lawful peer may send once it is associated; C-STORE last but one, so that something is under way."""
    uid, data = instance("1.2.826.0.1.3680043.8.498." + str(chance.getrandbits(64)))
    store = [pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, uid))), *(pdu(P_DATA, one) for one in pieces(1, data, chance))]
    echo = [pdu(P_DATA, pdv(3, 3, echo_rq()))]
    find = [pdu(P_DATA, pdv(5, 3, find_rq())), pdu(P_DATA, pdv(5, 2, IDENTIFIER))]
    moving = find_rq(sop_class_uid=STUDY_MOVE).replace(struct.pack("<HHLH", 0, 0x100, 2, 0x20), struct.pack("<HHLH", 0, 0x100, 2, 0x21))
    move = [pdu(P_DATA, pdv(9, 3, moving)), pdu(P_DATA, pdv(9, 2, IDENTIFIER))]
    commit = [pdu(P_DATA, pdv(7, 3, echo_rq())), pdu(P_DATA, pdv(7, 2, references(3, "1.2.3")))]
    parts = [one for one in (echo, find, move, commit) if chance.random() < 0.3]
    chance.shuffle(parts)
    return [*(one for part in parts for one in part), *store, pdu(chance.choice([RELEASE_RQ, RELEASE_RQ, ABORT]), bytes(4))]


def pieces(context_id: int, data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Cut a data set into some PDVs."""
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(chance.randrange(4)))})
    for start, end in itertools.pairwise(cuts):
        yield pdv(context_id, 2 if end == len(data) else 0, data[start:end])


def flipped(stream: bytes, chance: random.Random) -> bytes:
    """Flip some bits, more often where headers are."""
    changed = bytearray(stream)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(changed)) if chance.random() < 0.5 else chance.randrange(min(len(changed), 200))
        changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def length_edited(stream: bytes, chance: random.Random) -> bytes:
    """Write another length over four or two bytes."""
    changed = bytearray(stream)
    place = chance.randrange(max(len(changed) - 4, 1))
    value = chance.choice([0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, len(stream)])
    changed[place : place + 4] = struct.pack(chance.choice([">L", "<L"]), value)
    return bytes(changed)


def cut(stream: bytes, chance: random.Random) -> bytes:
    """End somewhere."""
    return stream[: chance.randrange(len(stream))]


def spliced(stream: bytes, chance: random.Random) -> bytes:
    """Take a piece out, or put one in twice, or noise."""
    start = chance.randrange(len(stream))
    end = min(len(stream), start + chance.choice([1, 2, 4, 6, 12, 100]))
    return stream[:start] + chance.choice([b"", stream[start:end] * 2, chance.randbytes(end - start)]) + stream[end:]


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [flipped, length_edited, cut, spliced]


def mutant(chance: random.Random) -> tuple[bytes, bytes]:
    """Return the association request and what follows its answer, at least one of them broken."""
    request = associate_rq(CONTEXTS)
    if chance.random() < 0.2:
        request = user_information(chance.choice([*IDENTITIES, *NEGOTIATION])[1])
    pdus = conversation(chance)
    if chance.random() < 0.3:  # out of order, missing, or twice
        place, other = chance.randrange(len(pdus)), chance.randrange(len(pdus))
        chance.choice([lambda: pdus.insert(place, pdus[other]), lambda: pdus.pop(place), pdus.reverse])()
    following = b"".join(pdus)
    if chance.random() < 0.25:
        return chance.choice(MUTATIONS)(request, chance), following
    for _ in range(chance.randint(1, 2)):
        following = chance.choice(MUTATIONS)(following, chance) or b"\0"
    return request, following


def converse(port: int, seed: str) -> bool:
    """Hold a broken conversation to its end; whether an instance was stored in it, for sure."""
    request, following = mutant(random.Random(seed))
    with Caller(port) as caller:
        try:
            caller.send(request)
            if not request.endswith(associate_rq(CONTEXTS)[-40:]):
                caller.socket.shutdown(socket.SHUT_WR)
            answer = caller.pdu()
            if answer is None or answer[0] != ASSOCIATE_AC:
                return False
            caller.send(following)
            caller.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the door has ended it
        try:
            while (answer := caller.pdu()) is not None and answer[0] > 0:
                pass
        except TimeoutError:
            raise AssertionError(f"mutant {seed}: neither an answer nor an end") from None
        except (OSError, AssertionError):
            pass
        stored_answer = struct.pack("<HHLH", 0, 0x100, 2, 0x8001)
        return stored_answer in caller.heard and b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\x00" in caller.heard


@pytest.mark.timeout(3600 if "MUTANTS" in os.environ else 240)
def test_mutants(door: Guarded) -> None:
    """Bit flips, cuts, wrong lengths, splices, wrong orders, in every phase: each conversation ends, R1-R8 hold (rows 1-22)."""
    count, seed = int(os.environ.get("MUTANTS", "2000")), int(os.environ.get("SEED", "1"))

    def attack(mischief: Mischief) -> None:
        mischief.perhaps_more = True
        busy = threading.BoundedSemaphore(6)

        def one(number: int) -> None:
            with busy:
                converse(door.port, f"{seed}/{number}")

        with ThreadPoolExecutor(6) as pool:
            for _ in pool.map(one, range(count)):
                pass

    under_attack(door, attack)
