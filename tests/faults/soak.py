"""The soak: schedules, power cuts and kill points by count or by the clock, in several processes, counted while it runs.

    python -m tests.faults.soak --runs 10000 --cuts 500 --kills 1000 --processes 2
    python -m tests.faults.soak --minutes 600

Each piece is a command of its own with a seed of its own, printed as it ends; a piece that breaks a promise is printed whole, and its
command makes it again. Every minute, and at the end, a line says how much was done.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Literal

from tests.faults.tally import heard
from tests.faults.walk import steps_of

Part = Literal["schedules", "cuts", "kills"]
PARTS: Final[tuple[Part, ...]] = ("schedules", "cuts", "kills")
_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_SCHEDULES: Final = 100
_CUTS: Final = 40
_STEPS: Final = 3
_ENDLESS: Final = 10**9
_SAY_EVERY_S: Final = 60.0
_SHOWN: Final = 40_000
_PERIOD_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Piece:
    """A command and what it is counted as."""

    part: Part
    arguments: tuple[str, ...]
    about: int
    """How much of its part it does, roughly."""

    def __str__(self) -> str:
        """Return the command as it can be typed."""
        return f"python -m {' '.join(self.arguments)}"


@dataclass
class Done:
    """What was done so far."""

    counts: Counter[str] = field(default_factory=Counter)
    pieces: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return one line for people."""
        return (
            f"{self.counts['schedules']} schedules (with {self.counts['kills in schedules']} kills), {self.counts['cuts']} power cuts, "
            f"{self.counts['kills']} kill points, {self.counts['acknowledged']} instances acknowledged: "
            f"{self.counts['broken']} broken promises"
        )


def pieces_of(part: Part, seed: int) -> Iterator[Piece]:
    """Yield the pieces of a part for ever; the seeds begin at `seed`."""
    number = 0
    while True:
        if part == "schedules":
            first = seed + number * _SCHEDULES
            yield Piece(part, ("tests.faults.schedules", "--runs", str(_SCHEDULES), "--seed", str(first)), _SCHEDULES)
        elif part == "cuts":
            store = ("directory", "land", "directory", "archive")[number % 4]
            yield Piece(part, ("tests.faults.power", "--cuts", str(_CUTS), "--store", store, "--seed", str(seed + number)), _CUTS)
        else:
            yield from _walks(seed + number)
        number += 1


def _walks(seed: int) -> Iterator[Piece]:
    """Yield one walk by every failpoint of every kind of store, with and without a rotation."""
    for store, rotates in (("directory", False), ("land", False), ("archive", False), ("directory", True), ("land", True)):
        steps = steps_of(store, rotates=rotates)
        if rotates:
            steps = steps[-_STEPS:]
        for start in range(0, len(steps), _STEPS):
            some = steps[start : start + _STEPS]
            more = ("--rotate",) if rotates else ()
            arguments = ("tests.faults.walk", "--store", store, *more, "--points", "8", "--seed", str(seed), "--steps", *some)
            yield Piece("kills", arguments, 8 * 2 * len(some))


class Soak:
    """Runs pieces in so many processes at a time, of each part as much as was asked for.

    Parameters
    ----------
    wanted
        How much of each part; what is not named is not done.
    seed
        Of the first piece of each part.
    report
        Takes lines for people.
    """

    def __init__(self, wanted: dict[Part, int], *, seed: int, report: Callable[[str], None]) -> None:
        self.done = Done()
        self._wanted = {part: count for part, count in wanted.items() if count > 0}
        self._pieces = {part: pieces_of(part, seed) for part in self._wanted}
        self._begun: Counter[str] = Counter()
        self._running: list[tuple[Piece, subprocess.Popen[bytes], IO[bytes]]] = []
        self._report = report

    def run(self, *, processes: int, until: float | None = None) -> Done:
        """Go on until everything wanted is done, or the monotonic clock says `until`; what is under way then comes to its end."""
        said = time.monotonic()
        try:
            while True:
                self._collect()
                while len(self._running) < processes and (until is None or time.monotonic() < until):
                    piece = self._next()
                    if piece is None:
                        break
                    self._begin(piece)
                if not self._running:
                    return self.done
                if time.monotonic() - said >= _SAY_EVERY_S:
                    said = time.monotonic()
                    self._report(self.done.line())
                time.sleep(_PERIOD_S)
        finally:
            for _, process, output in self._running:  # interrupted: they take down what they mounted
                process.send_signal(signal.SIGINT)
                process.wait()
                output.close()

    def _next(self) -> Piece | None:
        """Return the next piece of the part that is least far, counted with what is under way; None when nothing is left."""
        under_way = Counter[str]()
        for piece, _, _ in self._running:
            under_way[piece.part] += piece.about
        far = {part: (self.done.counts[part] + under_way[part]) / wanted for part, wanted in self._wanted.items()}
        part = min(far, key=lambda name: far[name], default=None)
        return None if part is None or far[part] >= 1 else next(self._pieces[part])

    def _begin(self, piece: Piece) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the piece has ended
        process = subprocess.Popen([sys.executable, "-m", *piece.arguments], cwd=_REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        self._running.append((piece, process, output))

    def _collect(self) -> None:
        for running in list(self._running):
            piece, process, output = running
            if process.poll() is None:
                continue
            self._running.remove(running)
            output.seek(0)
            told = output.read().decode(errors="replace")
            output.close()
            self.take(piece, process.returncode, told)

    def take(self, piece: Piece, status: int, told: str) -> None:
        """Count what a piece said at its end."""
        found = heard(told)
        broken = int(found.pop("broken", 0)) or int(status != 0)
        self.done.counts.update({name: int(count) for name, count in found.items()})
        self.done.counts["broken"] += broken
        self.done.pieces[piece.part] += 1
        self._report(f"{'BROKEN' if broken else 'kept'}: {piece}")
        if broken:
            self.done.broken.append(str(piece))
            self._report(told[-_SHOWN:])


def main(arguments: list[str] | None = None) -> int:
    """Soak as asked; the exit status is 0 when every promise was kept and everything asked for was done."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Faults by count, or by the clock.")
    parser.add_argument("--runs", type=int, default=None, help="random schedules")
    parser.add_argument("--cuts", type=int, default=None, help="power cuts; needs root")
    parser.add_argument("--kills", type=int, default=None, help="walked kill points")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many minutes; without counts: of all, as much as goes")
    parser.add_argument("--processes", type=int, default=2, help="how many pieces at a time")
    parser.add_argument("--seed", type=int, default=None, help="of the first piece of each part; the next ones count on")
    options = parser.parse_args(arguments)
    wanted: dict[Part, int] = {"schedules": options.runs or 0, "cuts": options.cuts or 0, "kills": options.kills or 0}
    if options.runs is options.cuts is options.kills is None:
        if options.minutes is None:
            parser.error("say how much: --runs, --cuts, --kills, or --minutes")
        wanted = {"schedules": 10 * _ENDLESS, "cuts": _ENDLESS // 2, "kills": _ENDLESS}
    if wanted["cuts"] and os.geteuid() != 0:
        sys.stdout.write("no power cuts: mounting needs root\n")
        wanted["cuts"] = 0
    seed = options.seed if options.seed is not None else time.time_ns() % 10**8
    started = time.monotonic()

    def report(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {line}\n")
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the pieces take down what they mounted
    report(f"seed {seed}")
    until = None if options.minutes is None else started + 60 * options.minutes
    done = Soak(wanted, seed=seed, report=report).run(processes=options.processes, until=until)
    report(
        f"seeds from {seed}: {done.pieces['schedules']} pieces of schedules, {done.pieces['cuts']} of cuts, {done.pieces['kills']} of walks"
    )
    for command in done.broken:
        report(f"BROKEN: {command}")
    report(f"total: {done.line()}")
    return 1 if done.counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
