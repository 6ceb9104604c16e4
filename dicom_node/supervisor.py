"""The parent of the node's processes: starts one child a role, restarts what dies, stops all of them in order.

A child knows its parent lives by a pipe (the lifeline): when the parent dies, however it dies, the pipe ends and the child stops,
so a killed node leaves nothing behind that would keep its ports. By a second pipe a child says every few seconds that it is ready,
or that its disk or database has failed it; one that falls silent hangs, and is killed and started again.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import structlog

from storage.errors import StorageError

log = structlog.get_logger()

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 15.0
STEADY_S = 30.0
"""A child that lived this long is restarted without delay."""
READY, DEGRADED, FAULTY = b"+", b"~", b"-"
"""What a child says of itself; degraded: it works, worse than it was asked to."""
SERVING = frozenset({"ready", "degraded"})
"""States in which a child does its work."""
_OURS = ("dicom_node", "dicomweb", "inference", "storage")
SIGN_OF_LIFE_S = 5.0
"""How often it does."""


@dataclass
class Child:
    """One process of the node."""

    role: str
    process: subprocess.Popen[bytes] | None = None
    lifeline: int = -1
    status: int = -1
    said: bytes = b""
    """Its last word; empty until it is ready for the first time."""
    heard_at: float = 0.0
    started_at: float = 0.0
    restart_at: float = 0.0
    delay_s: float = FIRST_DELAY_S
    restarts: int = field(default=0)


class Supervisor:
    """Keeps the children of ``roles`` running.

    Parameters
    ----------
    roles
        Role names; one that stands twice gets two processes.
    config
        The configuration file the children read, or None.
    on_exit
        Called with the process id of each child that ended.
    silence_s
        A child that was ready and says nothing for so long is taken to hang.
    """

    def __init__(self, *, roles: Sequence[str], config: Path | None, on_exit: Callable[[int], None], silence_s: float = 120.0) -> None:
        self._silence_s = silence_s
        self._children = [Child(role) for role in roles]
        self._config = config
        self._on_exit = on_exit

    def states(self) -> dict[str, str]:
        """Role (numbered where there are several) -> ready, degraded, faulty, starting or down, for people and /readyz."""
        words = {READY: "ready", DEGRADED: "degraded", FAULTY: "faulty"}
        states: dict[str, str] = {}
        for number, child in enumerate(self._children):
            process = child.process  # the other thread may forget it meanwhile
            running = process is not None and process.poll() is None
            states[f"{child.role}-{number}"] = words.get(child.said, "starting") if running else "down"
        return states

    @property
    def ready(self) -> bool:
        """Every child runs and has said so."""
        return SERVING.issuperset(self.states().values())

    def run(self, stop: threading.Event, *, drain_s: float, on_ready: Callable[[], None], cut: threading.Event | None = None) -> None:
        """Keep the children running until ``stop``; then end them within ``drain_s`` seconds, or at once if ``cut`` is set, too."""
        announced = False
        try:
            while not stop.is_set():
                now = time.monotonic()
                for child in self._children:
                    self._tend(child, now)
                if self.ready and not announced:
                    announced = True
                    on_ready()
                self._listen(timeout_s=0.1)
        finally:
            self._end(drain_s, cut=cut is not None and cut.is_set())

    def _tend(self, child: Child, now: float) -> None:
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                if child.said and now - child.heard_at > self._silence_s:
                    log.error(
                        "process.hangs",
                        process=child.role,
                        silent_for_s=round(now - child.heard_at),
                        remedy="it is killed and started again",
                    )
                    child.process.kill()
                    child.heard_at = now
                return
            self._on_exit(child.process.pid)
            self._close(child)
            child.delay_s = FIRST_DELAY_S if now - child.started_at > STEADY_S else min(child.delay_s * 2, LONGEST_DELAY_S)
            child.restart_at = now + child.delay_s
            child.restarts += 1
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            log.error("process.ended", process=child.role, cause=cause, restart_in_s=round(child.delay_s, 1))
        if now >= child.restart_at:
            try:
                self._start(child, now)
            except OSError as error:  # no process, memory or descriptor to be had: the others go on, and this one is tried again
                self._close(child)
                child.delay_s = min(child.delay_s * 2, LONGEST_DELAY_S)
                child.restart_at = now + child.delay_s
                reason = error.strerror or type(error).__name__
                log.warning("process.not_started", process=child.role, reason=reason, restart_in_s=round(child.delay_s, 1))

    def _start(self, child: Child, now: float) -> None:
        lifeline_read, child.lifeline = os.pipe()
        try:
            child.status, status_write = os.pipe()
        except OSError:
            os.close(lifeline_read)
            raise
        command = [sys.executable, "-m", "dicom_node", "serve", "--role", child.role,
                   "--lifeline", str(lifeline_read), "--status", str(status_write)]  # fmt: skip
        if self._config is not None:
            command += ["--config", str(self._config)]
        try:
            # A session of its own: Ctrl-C in a terminal reaches the parent alone, which then stops the children in order.
            child.process = subprocess.Popen(command, pass_fds=(lifeline_read, status_write), start_new_session=True)
        finally:
            os.close(lifeline_read)
            os.close(status_write)
        child.said = b""
        child.started_at = now

    def _listen(self, *, timeout_s: float) -> None:
        waiting = {child.status: child for child in self._children if child.status >= 0}
        if not waiting:
            time.sleep(timeout_s)
            return
        readable, _, _ = select.select(list(waiting), [], [], timeout_s)
        for descriptor in readable:
            words = os.read(descriptor, 64)
            if words:
                waiting[descriptor].said, waiting[descriptor].heard_at = words[-1:], time.monotonic()
            else:  # it ended: _tend sees the exit status
                time.sleep(0.05)

    def _close(self, child: Child) -> None:
        for descriptor in (child.lifeline, child.status):
            if descriptor >= 0:
                os.close(descriptor)
        child.process, child.lifeline, child.status, child.said = None, -1, -1, b""

    def _end(self, drain_s: float, *, cut: bool) -> None:
        running = [child for child in self._children if child.process is not None]
        for child in running:
            if child.process is not None and child.process.poll() is None:
                child.process.kill() if cut else child.process.terminate()
        deadline = time.monotonic() + drain_s + 5.0  # the child drains by itself; the rest is for its own closing
        for child in running:
            process = child.process
            if process is None:
                continue
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process.killed", process=child.role, reason="did not stop in time")
                process.kill()
                process.wait()
            self._on_exit(process.pid)
            self._close(child)


def stop_with_parent(lifeline: int, stop: threading.Event) -> None:
    """Set ``stop`` when the parent's end of the pipe closes; returns at once, watches in a thread."""

    def watch() -> None:
        while os.read(lifeline, 1):
            pass
        stop.set()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def give_signs_of_life(status: int, stop: threading.Event, check: Callable[[], None], *, well: bytes = READY) -> None:
    """Tell the parent now and every few seconds, until ``stop``, how this process is; returns at once, speaks from a thread.

    Parameters
    ----------
    check
        Raises StorageError while this process can take nothing in.
    well
        What it says while it can: READY or DEGRADED.
    """

    def speak() -> None:
        word = well
        while True:
            try:
                os.write(status, word)
            except OSError:
                return  # the parent is gone; the lifeline ends this process
            if stop.wait(SIGN_OF_LIFE_S):
                return
            try:
                check()
            except StorageError as error:
                if word != FAULTY:
                    log.error("process.faulty", reason=str(error))  # noqa: TRY400 - a sentence for a person
                word = FAULTY
            else:
                word = well

    threading.Thread(target=speak, name="signs of life", daemon=True).start()


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; for the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop


def end_in_time(stop: threading.Event, limit_s: float) -> None:
    """End this process `limit_s` after ``stop``, should it still live then; returns at once, watches in a thread.

    Nothing is lost by it: what was acknowledged is durable, and all else is done again. The log says what did not end.
    """

    def watch() -> None:
        stop.wait()
        time.sleep(limit_s)
        log.error(
            "stop.cut",
            after_s=limit_s,
            unfinished="; ".join(_unfinished()),
            remedy="see why that does not answer; what was acknowledged is safe",
        )
        sys.stderr.flush()  # the log is written by another thread, which ends here too
        os._exit(1)

    threading.Thread(target=watch, name="end in time", daemon=True).start()


def end_at_once() -> NoReturn:
    """End this process now, once its last words are out: what is under way is not acknowledged."""
    sys.stderr.flush()  # the log is written by another thread, which ends here too
    os._exit(1)


def _unfinished() -> Iterator[str]:
    """Say of each thread that keeps the process from ending where in our code it is."""
    frames = sys._current_frames()  # noqa: SLF001 - the only way to look at another thread
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or (thread.daemon and thread is not threading.main_thread()):
            continue
        ours = [
            one.f_code for one, _ in traceback.walk_stack(frame) if str(one.f_globals.get("__package__") or "").partition(".")[0] in _OURS
        ]
        where = f"{ours[0].co_qualname} of {Path(ours[0].co_filename).name}" if ours else frame.f_code.co_qualname
        yield f"{thread.name} in {where}"
