"""``python -m bench.mischief``: what mischief at the DIMSE door costs an honest sender, and what it leaves.

Stalled handshakes, connections that are aborted in every state a hundred thousand times, two hundred associations that store at once, and
the honest sender's rate under each attack of the catalogue of threats. The door is a process of its own, its folder on the RAM disk. Some
ten minutes; ``--only`` chooses, ``--cycles`` makes fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.services import in_memory, load
from tests.dicom_node import test_threats as attacks
from tests.dicom_node.scripted_peer import ABORT, IMPLICIT, P_DATA, VERIFICATION, ScriptedPeer, associate_rq, echo_rq, pdu, pdv, store_rq
from tests.dicom_node.threats import (
    SECONDARY_CAPTURE,
    STORE_CONTEXT,
    Caller,
    Guarded,
    HonestSender,
    Repeated,
    guarded_door,
    instance,
    store,
)

ECHO = (1, VERIFICATION, [IMPLICIT])
PARTS = ("stalled", "cycles", "associations", "rates")


@contextmanager
def a_door(*, handshake_s: float = 10.0, idle_s: float = 60.0, requests_per_s: float = 100.0) -> Iterator[Guarded]:
    """Give a door at its defaults."""
    with (
        in_memory(wanted=True) as folder,
        guarded_door(folder / "door", handshake_s=handshake_s, idle_s=idle_s, requests_per_s=requests_per_s) as door,
    ):
        yield door


def echo_s(door: Guarded) -> float:
    """Associate, echo, release; seconds."""
    began = time.monotonic()
    with ScriptedPeer(door.port) as peer:
        peer.associate(ECHO, calling="HONEST")
        peer.send(pdu(P_DATA, pdv(1, 3, echo_rq())))
        assert peer.status() == 0
        peer.release()
    return time.monotonic() - began


def stalled(results: dict[str, Any]) -> None:
    """Stall handshakes anywhere in the request, and echo until they are gone."""
    request = associate_rq([ECHO])
    for count in (30, 500, 5000):
        with a_door() as door:
            alone = statistics.median(echo_s(door) for _ in range(20))
            before = door.state()
            began = time.monotonic()
            sockets = []
            for number in range(count):
                connection = socket.create_connection(("127.0.0.1", door.port))
                connection.send(request[: number % len(request)])
                sockets.append(connection)
            last = time.monotonic()
            during = door.state()
            worst, echoes = 0.0, 0
            while door.state()["waiting"]:
                worst, echoes = max(worst, echo_s(door)), echoes + 1
                time.sleep(0.05)
            gone = time.monotonic() - last
            bytes_each = (during["memory"] - before["memory"]) * 1024 / count
            for connection in sockets:
                connection.close()
            print(
                f"stalled {count:>5}: worst of {echoes} echoes {worst * 1000:.0f} ms (alone {alone * 1000:.0f}), gone {gone:.1f} s after "
                f"the last, {last - began:.1f} s to connect, {bytes_each:.1f} KiB each, {during['threads'] - before['threads']} threads",
                flush=True,
            )
            results[f"stalled {count}"] = {"worst echo s": worst, "alone s": alone, "gone s": gone, "KiB each": bytes_each}


def cycles(results: dict[str, Any], count: int) -> None:
    """Connect and abort in each state, again and again."""
    states = attacks.states()
    with a_door(requests_per_s=0.0) as door:  # the rate would only make it last longer

        def abort(number: int) -> None:
            _, sent, answers = states[number % len(states)]
            with Caller(door.port) as caller, suppress(OSError):
                caller.send(*sent)
                for _ in range(answers):
                    caller.pdu()
                if number % 3 == 0:
                    caller.send(pdu(ABORT, bytes(4)))
                elif number % 3 == 1:
                    caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def run(first: int, last: int) -> None:
            for number in range(first, last):
                abort(number)

        run(0, min(2000, count // 10))  # what the first ones load and fill is no drift
        before = door.settled()
        began = time.monotonic()
        threads = [threading.Thread(target=run, args=(part * count // 4, (part + 1) * count // 4)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        after = door.settled()
    drift = {name: (before[name], after[name]) for name in ("threads", "descriptors", "memory")}
    print(
        f"connect/abort {count}: {count / took:.0f}/s; "
        + ", ".join(f"{name} {old:.0f} -> {new:.0f} ({100 * (new - old) / old:+.1f} %)" for name, (old, new) in drift.items()),
        flush=True,
    )
    results["cycles"] = {"count": count, "per s": count / took, **drift}


def associations(results: dict[str, Any], count: int = 200) -> None:
    """Store on many associations at once."""
    with a_door() as door:
        before = door.settled(verify=True)
        ready, sent = threading.Barrier(count + 1), threading.Barrier(count + 1)
        statuses: list[int] = []

        def sender() -> None:
            with ScriptedPeer(door.port) as peer:
                peer.associate(STORE_CONTEXT, calling="HONEST")
                uid, data = instance()
                request = pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, uid)))
                peer.send(request, pdu(P_DATA, pdv(1, 0, data[:-50])))
                ready.wait()
                sent.wait()
                peer.send(pdu(P_DATA, pdv(1, 2, data[-50:])))
                statuses.append(peer.status())
                for _ in range(4):
                    uid, data = instance()
                    statuses.append(store(peer, uid, data))
                peer.release()

        threads = [threading.Thread(target=sender) for _ in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        held = door.state()
        began = time.monotonic()
        sent.wait()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        after = door.settled(verify=True)
    stored = after["instances"] - before["instances"]
    right = statuses.count(0) == stored == 5 * count and after["clean"]
    each = (held["memory"] - before["memory"]) / count
    most = (after["most"] - before["memory"]) / count
    print(
        f"{count} associations at once: {held['associations']} held, {stored} instances stored, {'all right' if right else 'NOT RIGHT'}, "
        f"{stored / took:.0f}/s, {each:.2f} MiB each while open, {most:.2f} at most",
        flush=True,
    )
    results["associations"] = {"count": count, "right": right, "MiB each": each, "MiB each at most": most, "per s": stored / took}
    assert right


def _trickle(door: Guarded) -> None:
    request = associate_rq([STORE_CONTEXT])
    callers = [Caller(door.port) for _ in range(60)]
    for position in range(20):
        for caller in callers:
            with suppress(OSError):
                caller.send(request[position : position + 1])
        time.sleep(0.1)
    for caller in callers:
        caller.socket.close()


def _holding(door: Guarded, prepare: Callable[[Caller], None], *, count: int = 20, seconds: float = 1.0) -> None:
    callers = [Caller(door.port) for _ in range(count)]
    for caller in callers:
        with suppress(OSError):
            prepare(caller)
    time.sleep(seconds)
    for caller in callers:
        caller.socket.close()


def _sent(door: Guarded, *streams: bytes, contexts: tuple[Any, ...] = (STORE_CONTEXT, attacks.ECHO_CONTEXT, attacks.FIND_CONTEXT)) -> None:
    """Associate, send one broken thing, read to the end; each stream on an association of its own."""
    for stream in streams:
        with Caller(door.port) as caller, suppress(OSError):
            caller.associate(*contexts)
            caller.send(stream)
            caller.ends()


def _first(door: Guarded, *streams: bytes) -> None:
    """Send one broken thing as the first."""
    for stream in streams:
        with Caller(door.port) as caller, suppress(OSError):
            caller.send(stream)
            caller.socket.shutdown(socket.SHUT_WR)
            caller.ends()


def attacks_of(door: Guarded) -> dict[str, Callable[[], None]]:
    """Return one round of each attack."""
    lawful = attacks.LAWFUL
    _, data = instance()
    endless = pdu(P_DATA, pdv(1, 3, lawful)) + pdu(P_DATA, pdv(1, 0, data)) + pdu(P_DATA, pdv(1, 0, bytes(200_000))) * 60
    big = b"".join(pdu(P_DATA, pdv(5, 0, bytes(250_000))) for _ in range(16))
    flood = pdu(P_DATA, pdv(3, 3, echo_rq())) * 500
    wrong = pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, "1.2.3"))) + pdu(P_DATA, pdv(1, 2, data)) + pdu(5, bytes(4))

    png = pdu(P_DATA, pdv(1, 3, lawful)) + pdu(P_DATA, pdv(1, 2, b"\x89PNG" * 500)) + pdu(5, bytes(4))

    def quota() -> None:
        _holding(door, lambda caller: caller.send(associate_rq([STORE_CONTEXT], calling="LIMITED")), count=60, seconds=0.1)

    def idle() -> None:
        _holding(door, lambda caller: caller.send(associate_rq([STORE_CONTEXT])), seconds=1.0)

    def rejected() -> None:
        _holding(door, lambda caller: caller.send(associate_rq([STORE_CONTEXT], calling="NOBODY")), count=60, seconds=0.1)

    def knock() -> None:
        for _ in range(20):
            socket.create_connection(("127.0.0.1", door.port)).close()

    def aborts() -> None:
        for _, sent, _ in attacks.states():
            with Caller(door.port) as caller, suppress(OSError):
                caller.send(*sent)

    return {
        "1 claimed length": lambda: _first(door, struct.pack(">BxL", 1, 0xFFFFFFFF) + bytes(10_000)),
        "2 longer than announced": lambda: _sent(door, struct.pack(">BxL", 4, 2**31) + bytes(60_000)),
        "3 trickled handshakes": lambda: _trickle(door),
        "4 connections": knock,
        "5 idle associations": idle,
        "6 beyond the quota": quota,
        "6 rejected, and stay": rejected,
        "7 abort in every state": aborts,
        "8 out of place": lambda: _sent(door, *(sent for _, sent, _ in attacks.OUT_OF_PLACE)),
        "9 proposals": lambda: _first(door, *(sent for _, sent, _ in attacks.PROPOSALS)),
        "10 titles": lambda: _first(door, *(associate_rq([STORE_CONTEXT], calling=one) for one in attacks.HOSTILE_TITLES)),
        "11 strangers": lambda: _first(door, *(associate_rq([STORE_CONTEXT], calling="NOBODY") for _ in range(10))),
        "12 identities": lambda: _first(door, *(attacks.user_information(one) for _, one in attacks.IDENTITIES)),
        "13 negotiation": lambda: _first(door, *(attacks.user_information(one) for _, one in attacks.NEGOTIATION)),
        "14 fragments": lambda: _sent(door, *(sent for _, sent in attacks.FRAGMENTS)),
        "14 empty fragments": lambda: _sent(door, pdu(P_DATA, pdv(1, 3, lawful)) + pdu(P_DATA, pdv(1, 0, b"") * 16_000)),
        "15 commands": lambda: _sent(door, *(pdu(P_DATA, pdv(3, 3, sent)) + pdu(5, bytes(4)) for _, sent in attacks.COMMANDS)),
        "15 flood of requests": lambda: _sent(door, flood + pdu(5, bytes(4))),
        "15 long identifiers": lambda: _sent(door, pdu(P_DATA, pdv(5, 3, attacks.find_rq())) + big + pdu(P_DATA, pdv(5, 2, b""))),
        "16 other instance": lambda: _sent(door, wrong),
        "17 other encoding": lambda: _sent(door, png),
        "18 endless data set": lambda: _sent(door, endless),
    }


def rate(door: Guarded, seconds: float) -> float:
    """Let the honest sender work for a while, in a process of its own; instances a second."""
    command = [sys.executable, "-m", "bench.mischief", "--honest", str(door.port), "--seconds", str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def honest(port: int, seconds: float) -> None:
    """Be the honest sender."""
    sender = HonestSender(port, at_least=0)
    began = time.monotonic()
    sender.start()
    time.sleep(seconds)
    stored = sender.finish()
    print(len(stored) / (time.monotonic() - began))


def rates(results: dict[str, Any], seconds: float, rounds: int, beginnings: tuple[str, ...] = ("",)) -> None:
    """Compare the honest sender's rate alone and under each attack; they take turns. One attacker, as fast as it can."""
    found: dict[str, list[float]] = {}
    with a_door(handshake_s=2.0) as door:
        rate(door, 1.0)
        for _ in range(rounds):
            for name, attack in ((name, attack) for name, attack in attacks_of(door).items() if name.startswith(beginnings)):
                alone = rate(door, seconds)
                with Repeated(attack) as repeated:
                    under = rate(door, seconds)
                found.setdefault(name, []).append(under / alone)
                door.settled()
                print(f"  {name:<26} {alone:6.1f}/s alone, {under:6.1f}/s under {repeated.times} rounds", flush=True)
    for name, ratios in found.items():
        median = statistics.median(ratios)
        print(f"honest rate under {name:<26} {median:.2f}{'' if median >= 0.5 else '  BELOW 0.5'}", flush=True)
        results[f"rate under {name}"] = {"median": median, "all": ratios}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.mischief", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attack", action="append", default=[], metavar="TEXT", help="of the rates only attacks whose name begins so")
    parser.add_argument("--honest", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.honest:
        honest(arguments.honest, arguments.seconds)
        return
    parts = arguments.only or PARTS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 20_000), limit))
    results: dict[str, Any] = {"processors": os.cpu_count(), "load before": load()}
    print(f"{os.cpu_count()} processors, load {load():.1f}", flush=True)
    if "stalled" in parts:
        stalled(results)
    if "associations" in parts:
        associations(results)
    if "rates" in parts:
        rates(results, arguments.seconds, arguments.rounds, tuple(arguments.attack or [""]))
    if "cycles" in parts:
        cycles(results, arguments.cycles)
    results["load after"] = load()
    target = Path(__file__).parent / "results" / f"mischief-{datetime.now(UTC):%Y-%m-%d}.json"
    target.parent.mkdir(exist_ok=True)
    before = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps({**before, **results}, indent=1) + "\n")
    print(f"load {load():.1f}; written: {target}")


if __name__ == "__main__":
    main()
