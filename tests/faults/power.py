"""Power cuts by the hundred: a node on a disk of its own, whose image is copied at each step that changed it, and judged.

    python -m tests.faults.power --cuts 500 --seed 7

The node stops at each failpoint and at each acknowledgement. What it had flushed by then is in the image file, what it had only written is
in the page cache of the mounted file system, and so not in a copy of the image. A copy equal to the one before, with nothing answered
since, is no other cut and is not counted. Each copy is mounted, a node is started on it and judged as after a kill
(`tests.faults.ground.judge`, everything read).

A disk is small, lies in memory, and holds a few instances: the next round begins on a new one. Node and judge are forked from this
process, which has imported everything. Needs root, mkfs.ext4 and loop devices.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.ground import judge, run
from tests.faults.site import KINDS, Site, site
from tests.faults.tally import Tally
from tests.faults.walk import end_with, judged

INSTANCES: Final = 3
"""Of a round, that is of a disk."""
_IMAGE_BYTES: Final = 48 << 20
_MEMORY: Final = Path("/dev/shm")


class Disk:
    """An ext4 file system in an image file."""

    def __init__(self, image: Path, mount_point: Path) -> None:
        self.image = image
        self.mount_point = mount_point
        mount_point.mkdir(exist_ok=True)

    @classmethod
    def format(cls, image: Path, mount_point: Path, *, byte_count: int) -> Disk:
        """Make a new file system."""
        with image.open("wb") as file:
            file.truncate(byte_count)
        do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        return cls(image, mount_point)

    def mount(self) -> None:
        """Mount the image; a journal left by a cut is replayed by the kernel."""
        # commit=300: the file system must not flush of its own accord while the test looks.
        do("mount", "-o", "loop,commit=300", str(self.image), str(self.mount_point))

    def unmount(self) -> None:
        """Unmount, if mounted."""
        if os.path.ismount(self.mount_point):
            do("umount", str(self.mount_point))

    def cut(self, copy: Path) -> None:
        """Copy the image as it is now, without any flush."""
        do("cp", "--sparse=always", str(self.image), str(copy))


def do(*command: str) -> None:
    """Run a command; RuntimeError with what it said when it fails."""
    honest = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the negative control takes flushes away
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=honest)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def memory() -> Path | None:
    """Return a folder in memory, where there is one."""
    return _MEMORY if os.access(_MEMORY, os.W_OK) else None


@dataclass
class Cuts(Tally):
    """What many cuts have shown."""

    cuts: int = 0
    alike: int = 0
    """Copies equal to the one before, with no answer in between: not counted as cuts."""

    def line(self) -> str:
        """Return one line for people."""
        return (
            f"{self.cuts} power cuts at {len(self.where)} steps ({self.alike} more changed nothing), {self.acknowledged} acknowledged, "
            f"{self.lost} lost, {len(self.faults)} faults"
        )


class PowerCuts:
    """Cuts the power of one node after the other.

    Parameters
    ----------
    root
        Working folder, in memory at best.
    seed
        Of the first instance.
    where
        Where the node keeps its objects; of a bucket, a copy is made with the image.
    """

    def __init__(self, root: Path, *, seed: int, where: Site) -> None:
        self.tally = Cuts()
        self._root = root
        self._where = where
        self._next = seed * 1_000_000
        said: list[str] = []
        run(root / "warm", range(1), said.append, site=where)  # imports and caches, once, before anything is forked
        judge(root / "warm", said, range(1), site=where)

    def round(self, *, at_most: int) -> None:
        """Let a node take a few instances on a new disk, and cut its power at each step, `at_most` so many times."""
        seeds = list(range(self._next, self._next + INSTANCES))
        self._next += INSTANCES
        disk = Disk.format(self._root / "disk.img", self._root / "disk", byte_count=_IMAGE_BYTES)
        disk.mount()
        house = disk.mount_point / f"house{seeds[0]}"
        said: list[str] = []
        before, cuts = ("", 0), 0
        try:
            self._where.open(house).close()  # the house was built before today
            do("sync", "-f", str(disk.mount_point))
            with self._node(house, seeds) as steps:
                for step in steps:
                    if not step.startswith("point "):
                        said.append(step)
                    copy = self._root / "copy.img"
                    disk.cut(copy)
                    now = (_digest(copy), len(said))
                    if now == before:
                        self.tally.alike += 1
                    else:
                        self._judge(copy, house, step, said, seeds)
                        cuts += 1
                    before = now
                    copy.unlink(missing_ok=True)
                    if cuts == at_most:
                        break
        finally:
            disk.unmount()
            disk.image.unlink()

    @contextmanager
    def _node(self, house: Path, seeds: list[int]) -> Iterator[Iterator[str]]:
        """Fork the node; give the steps at which it stops until it is asked for the next one. It is killed at the end."""
        told, telling = os.pipe()
        waiting, letting = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(told)
            os.close(letting)

            def say(line: str) -> None:
                os.write(telling, f"{line}\n".encode())
                if not os.read(waiting, 1):
                    os._exit(0)

            end_with(lambda: run(house, seeds, say, reach=lambda name: say(f"point {name}"), site=self._where))
        os.close(telling)
        os.close(waiting)

        def steps() -> Iterator[str]:
            for line in lines:
                yield line.strip()
                os.write(letting, b"\n")

        try:
            with os.fdopen(told) as lines:
                yield steps()
        finally:
            os.close(letting)
            os.kill(child, 9)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                self.tally.faults.append(f"the node ended with status {os.WEXITSTATUS(status)}")

    def _judge(self, copy: Path, house: Path, step: str, said: list[str], seeds: list[int]) -> None:
        name = step.partition(" ")[2] if step.startswith("point ") else step.partition(" ")[0]
        mount_point = self._root / "copy"
        disk = Disk(copy, mount_point)
        folder = mount_point / house.name
        if self._where.kind != "directory":
            bucket = self._where.buckets / self._where.bucket_of(folder)
            shutil.rmtree(bucket, ignore_errors=True)
            shutil.copytree(self._where.buckets / self._where.bucket_of(house), bucket)
        disk.mount()
        try:
            verdict = judged(folder, said, seeds, site=self._where)
        finally:
            disk.unmount()
        self.tally.cuts += 1
        self.tally.where[name] += 1
        where = f"seeds {seeds[0]} to {seeds[-1]}, {len(said)} answers, at {name}"
        self.tally.take(verdict, where, acknowledged=sum(line.startswith("stored") for line in said))


def _digest(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def cut_often(cuts: int, *, seed: int, kind: str = "directory", report: Callable[[str], None] = lambda _: None) -> Cuts:
    """Cut the power so many times, on disk after disk."""
    chosen = KINDS[KINDS.index(kind)]  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="power-", dir=memory()) as root, site(chosen, Path(root)) as where:
        power = PowerCuts(Path(root), seed=seed, where=where)
        while power.tally.cuts < cuts:
            done = power.tally.cuts
            power.round(at_most=cuts - done)
            report(power.tally.line())
            if power.tally.cuts == done:
                raise RuntimeError("a round without a cut: nothing that the node does reaches its disk")
    return power.tally


def main(arguments: list[str] | None = None) -> int:
    """Cut as asked; the exit status is 0 when nothing was lost and nothing else was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.power", description="Power cuts at each step of the durable path.")
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--store", choices=KINDS, default="directory", help="where the objects go; else than directory: rclone serves S3")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    options = parser.parse_args(arguments)
    started = time.monotonic()

    def report(line: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {line}\n")
        sys.stdout.flush()

    report(f"seed {options.seed}")
    tally = cut_often(options.cuts, seed=options.seed, kind=options.store, report=report)
    report(f"total: {tally.line()}")
    return tally.end("cut", {"cuts": tally.cuts}, report)


if __name__ == "__main__":
    sys.exit(main())
