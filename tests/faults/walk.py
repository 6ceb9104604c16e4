"""The kill walk: the node's storage layer is killed at every step, at system calls and at random moments, and judged each time.

    python -m tests.faults.walk --points --kills 500 --syscalls

Each victim is forked from this prepared, single-threaded process, so that a kill costs milliseconds, not an interpreter's start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.failpoints import VARIABLE, failpoint_from_environment
from tests.faults.ground import INTAKE_STEPS, MOVE_STEPS, ROTATE_STEPS, WORK_STEPS, Verdict, judge, run
from tests.faults.site import KINDS, SERVICES, Site, site
from tests.faults.tally import Tally

SYSCALLS = ("write", "pwrite64", "fsync", "fdatasync", "link,linkat", "unlink,unlinkat", "openat", "mkdir", "ftruncate")
"""Where a kill is injected, one walk each: every call that changes the disk."""
FAILING = ("write", "pwrite64", "fsync", "fdatasync", "link,linkat", "ftruncate", "mkdir")
"""Where an error is injected, one walk each."""
_BATCH = 4
_FOLDER_FOR = 20
_WHOLE_EVERY = 5
_FAULTS = 100
"""Most that a judge tells of one hit: a pipe holds them."""


@dataclass
class Walked(Tally):
    """What a walk has seen."""

    victims: int = 0
    killed: int = 0
    errors: int = 0
    """Calls that failed because they were made to."""

    def line(self) -> str:
        """Return one line for people."""
        return (
            f"{self.victims} runs, {self.killed} killed, {self.errors} calls failed, {self.acknowledged} acknowledged, {self.lost} lost, "
            f"{self.orphans} orphans swept, {len(self.faults)} faults"
        )


class Walk:
    """Hits one victim after the other, in a folder that several share."""

    def __init__(self, root: Path, *, seed: int, honest: bool = True, site: Site = Site()) -> None:  # noqa: B008 - frozen
        self._honest = honest
        self._site = site
        self.tally = Walked()
        self._root = root
        self._rng = random.Random(seed)
        self._next = seed * 1_000_000
        self._folder = root / "0"
        self._used = 0
        # Everything is imported, compiled and cached here, once, before the first victim is forked.
        said: list[str] = []
        run(root / "warm", range(_BATCH), said.append, site=site)
        judge(root / "warm", said, range(_BATCH), site=site)
        if threading.active_count() != 1:
            raise RuntimeError("a walk forks: nothing else may run in this process")

    def hit(
        self,
        name: str,
        *,
        environ: dict[str, str] | None = None,
        threads: int = 1,
        kill_after: float | None = None,
        trace: Callable[[int], subprocess.Popen[bytes]] | None = None,
        tolerant: bool = False,
    ) -> bool:
        """Start a victim, let it be killed, judge; return whether it died before it was done.

        `environ` arms a failpoint, `kill_after` is in seconds, `trace` attaches a tracer to the victim while it waits to begin. One that
        is `tolerant` goes on after what it had to refuse.
        """
        if self._used == _FOLDER_FOR:
            self._site.forget(self._folder)
            self._folder = self._root / str(self._next)
            self._used = 0
        self._used += 1
        seeds = list(range(self._next, self._next + _BATCH * threads))
        self._next += len(seeds)
        status, said = self._victim(seeds, environ or {}, threads, kill_after, trace, tolerant=tolerant)
        self.tally.victims += 1
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.tally.killed += 1
            self.tally.where[name] += 1
        elif status != 0:
            self.tally.faults.append(f"{name}: the victim ended with status {status}")
        self._judge(name, said, seeds)
        return status != 0

    def _victim(
        self,
        seeds: list[int],
        environ: dict[str, str],
        threads: int,
        kill_after: float | None,
        trace: Callable[[int], subprocess.Popen[bytes]] | None,
        *,
        tolerant: bool,
    ) -> tuple[int, list[str]]:
        reading, writing = os.pipe()
        gate_out, gate_in = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.close(gate_in)

            def say(line: str) -> None:
                try:
                    os.write(writing, f"{line}\n".encode())
                except OSError:  # the injected error hit the harness itself; it is injected once
                    os.write(writing, f"{line}\n".encode())

            def be() -> None:
                os.read(gate_out, 1)
                reach = failpoint_from_environment(environ)
                run(self._folder, seeds, say, reach=reach, threads=threads, honest=self._honest, tolerant=tolerant, site=self._site)

            end_with(be)
        os.close(writing)
        os.close(gate_out)
        tracer = None if trace is None else trace(child)
        os.close(gate_in)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            said = b""
            deadline = None if kill_after is None else time.monotonic() + kill_after
            while True:
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                if not select.select([pipe], [], [], left)[0]:
                    os.kill(child, signal.SIGKILL)
                    deadline = None
                elif chunk := pipe.read(65536):
                    said += chunk
                else:
                    break
        status = os.waitpid(child, 0)[1]
        if tracer is not None:
            tracer.communicate()
        return status, said.decode().splitlines()

    def _judge(self, name: str, said: list[str], seeds: list[int]) -> None:
        verdict = judged(self._folder, said, seeds, whole=self._used % _WHOLE_EVERY == 0, site=self._site)
        self.tally.take(verdict, name, acknowledged=sum(line.startswith("stored") for line in said))

    # --- the three walks ---------------------------------------------------------------------------------------------

    def points(self, rounds: int, *, steps: Sequence[str], senders: Sequence[int], report: Callable[[str], None]) -> None:
        """Kill at every failpoint, at its first to `rounds`-th time, with so many senders at once."""
        for step in steps:
            for threads in senders:
                # Seven steps are also those of a report; the others happen once for each instance.
                twice = step in INTAKE_STEPS[:6] or step in MOVE_STEPS or step == "acknowledge.committed"
                reached = 2 * _BATCH if twice and step not in ROTATE_STEPS else _BATCH
                for nth in range(1, 1 + min(rounds, reached * threads)):
                    if not self.hit(f"{step}:{nth}", environ={VARIABLE: f"{step}:{nth}"}, threads=threads):
                        self.tally.faults.append(f"{step}:{nth} with {threads} senders was never reached")
            report(f"{step}: {self.tally.line()}")

    def random(self, kills: int, *, report: Callable[[str], None]) -> None:
        """Kill at random moments until `kills` victims died; those that were done before do not count."""
        longest = 0.4
        while self.tally.where["random"] < kills:
            if self.tally.where["random"] % 100 == 99:
                report(self.tally.line())

            died = self.hit("random", threads=self._rng.choice((1, 3)), kill_after=self._rng.uniform(0.0, longest))
            longest = min(max(longest * (1.02 if died else 0.96), 0.05), 3.0)

    def syscalls(self, *, every: int, report: Callable[[str], None]) -> None:
        """Kill at the n-th call of each kind, for every n (or each `every`-th) until a victim gets through."""
        for calls in SYSCALLS:
            nth = 1
            while self.hit(calls, trace=lambda child, calls=calls, nth=nth: _inject(child, calls, nth)):  # type: ignore[misc]
                nth += every
            report(f"{calls}: up to call {nth}; {self.tally.line()}")

    def errors(self, *, every: int, calls_of: Sequence[str] = FAILING, report: Callable[[str], None]) -> None:
        """Let the n-th call of each kind fail once, for every n (or each `every`-th) until there is no n-th call."""
        log = self._root / "trace"
        for error in ("EIO", "ENOSPC"):
            for calls in calls_of:
                nth = 1
                while True:
                    what = f"error={error}"
                    self.hit(calls, trace=lambda child, at=(calls, nth, what): _inject(child, *at, log=log), tolerant=True)  # type: ignore[misc]
                    if "(INJECTED)" not in log.read_text():
                        break
                    self.tally.errors += 1
                    nth += every
                report(f"{calls} {error}: up to call {nth}; {self.tally.line()}")


def _inject(child: int, calls: str, nth: int, what: str = "signal=SIGKILL", *, log: Path = Path(os.devnull)) -> subprocess.Popen[bytes]:
    """Attach strace to the waiting child: on entering the n-th call, which then is not executed, it is killed, or the call fails."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child), "-o", str(log), "-e", f"trace={calls}", "-e", f"inject={calls}:{what}:when={nth}"],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if b"attached" not in line:
        raise RuntimeError(f"strace did not attach: {line!r}")
    return tracer


def end_with(be: Callable[[], object]) -> None:
    """Run the child's part and end the child, whatever happens, without the parent's exit handlers."""
    code = 1
    try:
        be()
        code = 0
    except BaseException as error:  # noqa: BLE001 - the child's last words
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def judged(folder: Path, said: list[str], seeds: list[int], *, whole: bool = True, site: Site) -> Verdict | None:
    """Judge in a child, as `tests.faults.ground.judge`; None when the node does not start."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def be() -> None:
            verdict = judge(folder, said, seeds, whole=whole, site=site)
            verdict.faults = verdict.faults[:_FAULTS]
            os.write(writing, json.dumps(asdict(verdict)).encode())

        end_with(be)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    return None if status or not found else Verdict(**json.loads(found))


def steps_of(store: str, *, rotates: bool = False) -> tuple[str, ...]:
    """Return the failpoints that a node with this store comes by."""
    moves = MOVE_STEPS if store == "land" else ()
    return (*INTAKE_STEPS, *WORK_STEPS, *moves, *(ROTATE_STEPS if rotates else ()))


def main(arguments: list[str] | None = None) -> int:
    """Walk as asked; the exit status is 0 when nothing was lost and nothing else was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="?", const=8, default=0, metavar="ROUNDS", help="every failpoint, ROUNDS times")
    parser.add_argument("--steps", nargs="+", default=(), metavar="STEP", help="only these failpoints")
    parser.add_argument("--store", choices=KINDS, default="directory", help="where the objects go; else than directory: S3")
    parser.add_argument("--s3", choices=SERVICES, default="rclone", help="who serves S3; radosgw: see make ceph")
    parser.add_argument("--rotate", action="store_true", help="rotate the wrapping key between the instances")
    parser.add_argument("--senders", type=int, nargs="+", default=(1, 3), help="how many senders at once")
    parser.add_argument("--kills", type=int, default=0, help="random kills")
    parser.add_argument("--syscalls", type=int, nargs="?", const=1, default=0, metavar="EVERY", help="every EVERY-th call under strace")
    parser.add_argument("--errors", type=int, nargs="?", const=1, default=0, metavar="EVERY", help="every EVERY-th call fails: EIO, ENOSPC")
    parser.add_argument("--calls", nargs="+", default=(), metavar="CALL", help="only these calls fail")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, default=None, help="where to make the working folder")
    parser.add_argument("--dishonest", action="store_true", help="negative control: acknowledge before the commit")
    options = parser.parse_args(arguments)
    started = time.monotonic()

    def report(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {line}\n")
        sys.stdout.flush()

    report(f"seed {options.seed}")
    steps = options.steps or steps_of(options.store, rotates=options.rotate)
    with (
        tempfile.TemporaryDirectory(prefix="walk-", dir=options.folder) as root,
        site(options.store, Path(root), rotates=options.rotate, service=options.s3) as where,
    ):
        walk = Walk(Path(root), seed=options.seed, honest=not options.dishonest, site=where)
        if options.points:
            walk.points(options.points, steps=steps, senders=options.senders, report=report)
            report(f"points: {walk.tally.line()}")
        if options.syscalls:
            walk.syscalls(every=options.syscalls, report=report)
        if options.errors:
            walk.errors(every=options.errors, calls_of=options.calls or FAILING, report=report)
        if options.kills:
            walk.random(options.kills, report=report)
        report(f"total: {walk.tally.line()}")
    return walk.tally.end("killed", {"kills": walk.tally.killed}, report)


if __name__ == "__main__":
    sys.exit(main())
