"""A door in a process of its own that tells what it does, an honest sender beside the mischief, and what holds for every row (R1-R8).

``python -m tests.dicom_node.threats FOLDER HANDSHAKE_S IDLE_S REQUESTS_PER_S`` is the process: it says on standard output where it listens,
and answers a line of standard input with its state. An audit hook of the interpreter notes what it opens for writing outside of its folder,
where it connects to, and what it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from tests.dicom_node.door import SECONDARY_CAPTURE, draw, encoded
from tests.dicom_node.scripted_peer import ASSOCIATE_AC, EXPLICIT, P_DATA, RESET, ScriptedPeer, pdu, pdv, store_rq

CANARY = "Serinus^Canaria"
"""In every data set and identifier that is sent here, and nowhere in a log."""
GROWTH_MIB = 64
OBJECT_BYTES = 4 * 1024**2
STORE_CONTEXT = (1, SECONDARY_CAPTURE, [EXPLICIT])
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# --- the process -------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What the interpreter of the door's process was seen to do that it should not."""

    folder: str
    armed: bool = False
    written: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event; an audit hook (PEP 578)."""
        if not self.armed:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and (arguments[2] or 0) & _WRITING:
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((self.folder, "/dev/")):
                self.written.append(path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
            paths = [os.path.realpath(os.fsdecode(one)) for one in arguments[: 1 + (event == "os.rename")] if isinstance(one, str | bytes)]
            self.written += [path for path in paths if not path.startswith(self.folder)]
        elif event in ("socket.connect", "socket.sendto"):
            self.connected.append(f"{event} {arguments[1:]}")
        elif event == "socket.getaddrinfo" and re.fullmatch(r"[0-9.]+", str(arguments[0])) is None:  # an address is not looked up
            self.connected.append(f"{event} {arguments[0]}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.started.append(event)


def _memory_mib() -> tuple[float, float]:
    """Return resident memory now, and the most since `_forget_the_most`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _forget_the_most() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def process(folder: Path, handshake_s: float, idle_s: float, requests_per_s: float) -> None:
    """Be the door until standard input ends."""
    import resource  # noqa: PLC0415 - nobody else needs these

    import structlog  # noqa: PLC0415

    from dicom_node.dimse.query import QuerySCP  # noqa: PLC0415
    from dicom_node.dimse.receive import ReceiveLimits  # noqa: PLC0415
    from dicom_node.dimse.retrieve import RetrieveSCP  # noqa: PLC0415
    from dicom_node.dimse.scu import StorageSCU  # noqa: PLC0415
    from dicom_node.observability import configure_logging  # noqa: PLC0415
    from dicom_node.peers import Peer, Peers  # noqa: PLC0415
    from storage.audit import AuditTrail  # noqa: PLC0415
    from storage.records import Limits  # noqa: PLC0415
    from storage.refusals import Refusals  # noqa: PLC0415
    from tests.dicom_node.commitment_peer import open_office  # noqa: PLC0415
    from tests.dicom_node.door import open_door, open_rooms  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    configure_logging(form="json", level="info", role="receiver")
    watch = Watch(str(folder.resolve()))
    os.chdir(folder)  # the hook is not told what a name relative to an open folder is relative to: the archive's are
    sys.addaudithook(watch)
    known = [
        Peer("honest", "HONEST", "*", 0),
        Peer("script", "SCRIPT", "*", 0),
        Peer("limited", "LIMITED", "*", 0, max_associations=2),
        Peer("away", "AWAY", "192.0.2.1"),
        Peer("mute", "MUTE", "127.0.0.1", accept=False, retrieve=False),
    ]
    peers = Peers(known)
    rooms = open_rooms(folder, limits=Limits(object_bytes=OBJECT_BYTES))
    audit: AuditTrail = rooms.audit
    parts = {"database": rooms.database, "audit": audit}
    query = QuerySCP(**parts, ae_title="DERM_NODE", search_s=5.0)  # type: ignore[arg-type]
    sender = StorageSCU(ae_title="DERM_NODE", connect_s=2.0)
    retrieve = RetrieveSCP(**parts, archive=rooms.archive, peers=peers, sender=sender)  # type: ignore[arg-type]
    with Refusals(database=rooms.database, every_s=0.1, audit=audit) as refusals:
        commitment = open_office(rooms, known, diary=refusals, references=100).service
        with open_door(
            rooms,
            peers=peers,
            services=[query, retrieve, commitment],
            refusals=refusals,
            maximum_associations=24 if idle_s < 60 else 400,
            association_requests_per_s=requests_per_s,
            message_bytes=2 * OBJECT_BYTES,
            limits=ReceiveLimits(handshake_s=handshake_s, idle_s=idle_s),
        ) as door:

            def state(*, verify: bool) -> dict[str, Any]:
                memory, most = _memory_mib()
                vestibule = door.scp._vestibule
                assert vestibule is not None
                refusals.flush()
                found: dict[str, Any] = {
                    "memory": memory,
                    "most": most,
                    "threads": threading.active_count(),
                    "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
                    "associations": door.scp.associations,
                    "open": len(door.scp._open) + len(door.scp._rejected),
                    "waiting": vestibule.waiting,
                    "landing": len(rooms.landing()),
                    "instances": rooms.count(),
                    "counts": dict(door.events.counts),
                    "written": watch.written,
                    "connected": watch.connected,
                    "started": watch.started,
                    "processor_s": time.process_time(),
                }
                if verify:
                    watch.armed = False
                    result = rooms.archive.verify()
                    found["clean"] = result.intact and not result.unindexed
                    found["verified"] = result.lines()
                    found["chain"] = audit.verify() is None
                    found["alerts"] = [dict(one.event.detail) for one in audit.entries() if one.event.action == "association.refused"]
                    found["refusals"] = [[one.kind, one.reason, one.calling_ae_title, one.count] for one in refusals.all(limit=1000)]
                    _forget_the_most()
                    watch.armed = True
                return found

            door.events.labels = deque(maxlen=0)  # type: ignore[assignment] # they are counted here, not kept: memory is measured
            sys.stdout.write(json.dumps({"port": door.port}) + "\n")
            sys.stdout.flush()
            watch.armed = True
            for line in sys.stdin:
                sys.stdout.write(json.dumps(state(verify=line.strip() == "verify")) + "\n")
                sys.stdout.flush()
            watch.armed = False
    rooms.database.close()
    structlog.reset_defaults()


# --- from outside ------------------------------------------------------------------------------------------------------


@dataclass
class Guarded:
    """A door in a process of its own."""

    port: int
    folder: Path
    handshake_s: float
    idle_s: float
    _process: subprocess.Popen[str]
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def state(self, *, verify: bool = False) -> dict[str, Any]:
        """Ask for its state."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write("verify\n" if verify else "state\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the door's process has ended; {self.log()[-2000:]}"
        found: dict[str, Any] = json.loads(line)
        return found

    def settled(self, *, verify: bool = False, patience_s: float = 30.0) -> dict[str, Any]:
        """Ask for its state when no association is left, and nobody waits."""
        deadline = time.monotonic() + patience_s
        while (found := self.state())["open"] or found["waiting"] or found["landing"]:
            assert time.monotonic() < deadline, f"it does not come to rest: {found}"
            time.sleep(0.02)
        return self.state(verify=True) if verify else found

    def log(self) -> str:
        """What it wrote to its log so far."""
        return (self.folder / "log").read_text()


@contextlib.contextmanager
def guarded_door(folder: Path, *, handshake_s: float = 1.5, idle_s: float = 1.5, requests_per_s: float = 0.0) -> Iterator[Guarded]:
    """Start the process, and end it; by default it takes as many association requests a second as come."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir()
    command = [sys.executable, "-m", "tests.dicom_node.threats", str(data), str(handshake_s), str(idle_s), str(requests_per_s)]
    environ = {**os.environ, "MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        try:
            assert running.stdout is not None
            assert running.stdin is not None
            line = running.stdout.readline()
            assert line, (folder / "log").read_text()
            door = Guarded(json.loads(line)["port"], folder, handshake_s, idle_s, running)
            _warm(door)
            yield door
        finally:
            running.stdin.close()  # type: ignore[union-attr]
            try:
                running.wait(60)
            finally:
                running.kill()
                running.stdout.close()  # type: ignore[union-attr]


def _warm(door: Guarded) -> None:
    """Let it load what it loads and start what it starts with the first of everything."""
    with ScriptedPeer(door.port) as stranger:
        stranger.associate(STORE_CONTEXT, calling="NOBODY")
    senders = [HonestSender(door.port, at_least=6) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.finish()
    door.settled(verify=True)


class Caller(ScriptedPeer):
    """A scripted peer that keeps all it was told, and cannot be left hanging."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.heard = bytearray()

    def pdu(self) -> tuple[int, bytes] | None:
        """As its parent."""
        answer = super().pdu()
        if answer is not None and answer[0] != RESET:
            self.heard += answer[1]
            assert b"Traceback" not in self.heard
            assert b'File "' not in self.heard
        return answer


def instance(uid: str = "") -> tuple[str, bytes]:
    """Draw an instance that bears the canary, with fresh UIDs or such as begin with `uid`: SOP Instance UID, and its data set."""
    data_set = draw(rows=8, columns=8)
    if uid:
        data_set.StudyInstanceUID, data_set.SeriesInstanceUID, data_set.SOPInstanceUID = f"{uid}.1", f"{uid}.2", f"{uid}.3"
    data_set.PatientName = CANARY
    return str(data_set.SOPInstanceUID), encoded(data_set)


def store(caller: ScriptedPeer, sop_instance_uid: str, data: bytes) -> int:
    """Send a C-STORE, and return its status."""
    caller.send(pdu(P_DATA, pdv(1, 3, store_rq(SECONDARY_CAPTURE, sop_instance_uid))), pdu(P_DATA, pdv(1, 2, data)))
    return caller.status()


class HonestSender(threading.Thread):
    """Stores instances, on a new association for every third, until it is told to end; raises in `finish` what went wrong."""

    def __init__(self, port: int, *, at_least: int) -> None:
        super().__init__(name="honest", daemon=True)
        self._port = port
        self._at_least = at_least
        self._ending = threading.Event()
        self.enough = threading.Event()
        self.stored: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Send."""
        try:
            while not (self._ending.is_set() and len(self.stored) >= self._at_least):
                with ScriptedPeer(self._port) as peer:
                    answer = peer.associate(STORE_CONTEXT, calling="HONEST")
                    assert answer == ASSOCIATE_AC, f"the honest sender was answered PDU type {answer}"
                    for _ in range(3):
                        uid, data = instance()
                        status = store(peer, uid, data)
                        assert status == 0, f"the honest sender was answered {status:04X}"
                        self.stored.append(uid)
                        if len(self.stored) >= self._at_least:
                            self.enough.set()
                    peer.release()
                self._ending.wait(0.02)  # leave the processor to the mischief
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self.error = error
        self.enough.set()

    def finish(self) -> list[str]:
        """End, and return the SOP Instance UIDs of what was stored."""
        self._ending.set()
        self.join(60)
        assert not self.is_alive(), "the honest sender hangs"
        if self.error is not None:
            raise self.error
        return self.stored


@dataclass
class Mischief:
    """What an attack did: filled by the attack, judged by `under_attack`."""

    door: Guarded
    honest: HonestSender
    stored: int = 0
    """Instances that the attack itself has stored lawfully; at least so many when it may have been more."""
    perhaps_more: bool = False
    budget_mib: float = 0.0
    """Memory that it may take beyond what every attack may."""
    callers: list[Caller] = field(default_factory=list)

    def call(self) -> Caller:
        """Connect; closed at the end."""
        caller = Caller(self.door.port)
        self.callers.append(caller)
        return caller

    def associated(self, *contexts: tuple[int, str, list[str]], **settings: Any) -> Caller:
        """Connect, with an association."""
        caller = self.call()
        assert caller.associate(*(contexts or (STORE_CONTEXT,)), **settings) == ASSOCIATE_AC
        return caller

    def close(self) -> None:
        """Close all that is open."""
        for caller in self.callers:
            caller.socket.close()


class Judgement:
    """The state of a door before an attack, and what must hold after it."""

    def __init__(self, door: Guarded) -> None:
        self.door = door
        self.before = door.settled(verify=True)
        self._log = len(door.log())

    def pronounce(self, mischief: Mischief, honest: list[str]) -> dict[str, Any]:
        """Check R1, R3 and R6-R8; R2, R4 and R5 are seen where the attack is made. Returns the state afterwards."""
        before, after = self.before, self.door.settled(verify=True)
        log = self.door.log()[self._log :]
        # R1: nothing of ours failed
        for event in ("association.failed",):
            assert after["counts"].get(event, 0) == before["counts"].get(event, 0), log[-4000:]
        assert "Traceback" not in log, next(line for line in log.splitlines() if "Traceback" in line)
        # R3: the most while it went on, and what was kept
        allowed = GROWTH_MIB + mischief.budget_mib
        grown = f"from {before['memory']:.0f} MiB to {after['most']:.0f}, then {after['memory']:.0f}"
        assert after["most"] - before["memory"] <= allowed, grown
        assert after["memory"] - before["memory"] <= GROWTH_MIB, grown
        assert after["threads"] <= before["threads"], f"from {before['threads']} threads to {after['threads']}"
        # the database opens another connection when several want one
        assert after["descriptors"] <= before["descriptors"] + 8, f"from {before['descriptors']} descriptors to {after['descriptors']}"
        # R6
        for what in ("written", "connected", "started"):
            assert after[what] == before[what], f"{what}: {after[what][:5]}"
        # R7
        assert after["chain"], "the audit trail is broken"
        for secret in (CANARY, *CANARY.split("^"), "drawn-1", *honest[:20]):
            assert secret not in log, next(line for line in log.splitlines() if secret in line)
        # R8
        assert after["landing"] == 0, "landing files are left"
        expected = before["instances"] + len(honest) + mischief.stored
        stored = after["instances"]
        assert stored == expected or (mischief.perhaps_more and stored > expected), "more or less is stored than was answered"
        assert after["clean"], after["verified"]
        return after


Attack = Callable[[Mischief], None]


def under_attack(door: Guarded, attack: Attack, *, honest_instances: int = 3) -> dict[str, Any]:
    """Attack the door while an honest sender works (R2); returns the state afterwards, ``before`` in it, when all of R1-R8 holds."""
    judgement = Judgement(door)
    honest = HonestSender(door.port, at_least=honest_instances)
    honest.start()
    mischief = Mischief(door, honest)
    try:
        attack(mischief)
    finally:
        mischief.close()
        stored = honest.finish()
    return {**judgement.pronounce(mischief, stored), "before": judgement.before}


class Repeated:
    """An attack that is made again and again, by threads, until it is told to end."""

    def __init__(self, attack: Callable[[], None], *, threads: int = 1) -> None:
        self._attack = attack
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self.times = 0
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._attack()
            except BaseException as error:  # noqa: BLE001 - raised again where it is ended
                self.error = error
                return
            self.times += 1


if __name__ == "__main__":
    partial(process, Path(sys.argv[1]), *map(float, sys.argv[2:]))()
