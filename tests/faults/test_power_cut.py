"""Power cuts: the disk's image copied at the moment of an acknowledgement, mounted again, judged.

The node works on an ext4 file system in a loop-mounted image. What it has flushed is in the image file; what it has only written is in the
page cache of that file system and so not in a copy of the image. The negative control runs the same with every flush switched off by a
preloaded library, and demands that instances are lost: this test can fail.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.failpoints import VARIABLE
from tests.faults.ground import INTAKE_STEPS, WORK_STEPS
from tests.faults.power import Disk, cut_often, do
from tests.faults.site import Site, site
from tests.faults.tally import heard

pytestmark = pytest.mark.peer

_REPOSITORY = Path(__file__).resolve().parents[2]
_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
int fsync(int d) { return 0; }
int fdatasync(int d) { return 0; }
int syncfs(int d) { return 0; }
void sync(void) { }
int msync(void *a, unsigned long l, int f) { return 0; }
int sync_file_range(int d, off64_t o, off64_t n, unsigned f) { return 0; }
static int strip(int flags) { return flags & ~(O_SYNC | O_DSYNC); }
#define OPEN(name) \\
int name(const char *path, int flags, ...) { \\
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \\
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \\
    return real(path, strip(flags), mode); }
OPEN(open)
OPEN(open64)
"""
_NODE = """
import os, sys
from pathlib import Path
from storage.failpoints import failpoint_from_environment
from tests.faults.ground import run
from tests.faults.site import Site
def say(line):
    print(line, flush=True)
    sys.stdin.readline()
first, count, threads = (int(word) for word in sys.argv[2:5])
site = Site(sys.argv[5], sys.argv[6], Path(sys.argv[7]))
run(Path(sys.argv[1]), range(first, first + count), say, reach=failpoint_from_environment(os.environ), threads=threads, site=site)
"""
_JUDGE = """
import sys
from pathlib import Path
from tests.faults.ground import judge
from tests.faults.site import Site
lines = sys.stdin.read().splitlines()
site = Site(sys.argv[4], sys.argv[5], Path(sys.argv[6]))
verdict = judge(Path(sys.argv[1]), lines, range(int(sys.argv[2]), int(sys.argv[3])), site=site)
print(verdict.lost, *verdict.faults, sep="\\n")
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small mounted disk; needs root, mkfs.ext4 and loop devices."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (package e2fsprogs)")
    made = Disk.format(tmp_path / "disk.img", tmp_path / "disk", byte_count=96 << 20)
    try:
        made.mount()
    except RuntimeError as error:
        pytest.skip(f"no loop mount here: {error}")
    yield made
    made.unmount()


@pytest.fixture
def flushless(tmp_path: Path) -> dict[str, str]:
    """Environment in which every flush is a lie."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source, library = tmp_path / "flushless.c", tmp_path / "flushless.so"
    source.write_text(_SHIM)
    do("gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl")
    return {"LD_PRELOAD": str(library)}


def words(where: Site) -> list[str]:
    """A site, for a process of its own."""
    return [where.kind, where.endpoint, str(where.buckets)]


@contextmanager
def node(
    folder: Path,
    first: int,
    count: int,
    *,
    threads: int = 1,
    environ: dict[str, str] | None = None,
    where: Site = Site(),  # noqa: B008 - frozen
) -> Iterator[subprocess.Popen[str]]:
    """Run a node that says each acknowledgement and waits until it may go on; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NODE, str(folder), str(first), str(count), str(threads), *words(where)],
        cwd=_REPOSITORY,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def judged(
    copy: Path,
    mount_point: Path,
    said: list[str],
    first: int,
    last: int,
    *,
    where: Site = Site(),  # noqa: B008 - frozen
) -> tuple[int, list[str]]:
    """Mount a copy, start on it, return how many acknowledged instances are lost and every fault."""
    disk = Disk(copy, mount_point)
    disk.mount()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _JUDGE, str(mount_point / "house"), str(first), str(last), *words(where)],
            cwd=_REPOSITORY,
            input="\n".join(said),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        disk.unmount()
        copy.unlink()
    if done.returncode:
        return len(said), [f"the node does not start: {done.stderr.splitlines()[-1]}"]
    lost, *faults = done.stdout.splitlines()
    return int(lost), faults


def cut_at_each_acknowledgement(disk: Disk, tmp_path: Path, *, count: int, environ: dict[str, str]) -> list[tuple[int, list[str]]]:
    """Cut the power at each acknowledgement and return what was lost each time."""
    folder = disk.mount_point / "house"
    with node(folder, 0, 1) as process:  # the folder itself is made, with real flushes
        for _ in iter(process.stdout.readline, ""):  # type: ignore[union-attr]
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
    do("sync", "-f", str(disk.mount_point))
    said: list[str] = []
    cuts: list[tuple[Path, list[str]]] = []
    with node(folder, 1, count, environ=environ) as process:
        for line in iter(process.stdout.readline, ""):  # type: ignore[union-attr]
            copy = tmp_path / f"cut{len(cuts)}.img"
            disk.cut(copy)
            said.append(line.strip())
            cuts.append((copy, list(said)))
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
    disk.unmount()
    return [judged(copy, tmp_path / "copy", before, 0, 1 + count) for copy, before in cuts]


def test_power_cut_at_the_acknowledgement_loses_nothing(disk: Disk, tmp_path: Path) -> None:
    """Every instance, report and proof that was acknowledged when the power went is there after the restart (threats.md fault 3)."""
    found = cut_at_each_acknowledgement(disk, tmp_path, count=6, environ={})
    assert len(found) == 12  # a receipt and a concluded analysis for each instance
    assert [faults for _, faults in found if faults] == []
    assert sum(lost for lost, _ in found) == 0


def test_power_cut_without_flushes_loses_instances(disk: Disk, tmp_path: Path, flushless: dict[str, str]) -> None:
    """Negative control: with every flush switched off the same cuts lose acknowledged instances."""
    found = cut_at_each_acknowledgement(disk, tmp_path, count=2, environ=flushless)
    assert len(found) == 4
    assert all(lost > 0 for lost, _ in found), found


def cut_with_a_spool(disk: Disk, tmp_path: Path, *, count: int, environ: dict[str, str]) -> list[tuple[int, list[str]]]:
    """As `cut_at_each_acknowledgement`, by policy ``land``: the spool is on the disk that is cut, the bucket elsewhere."""
    cuts: list[tuple[Path, Path, list[str]]] = []
    said: list[str] = []
    folder = disk.mount_point / "house"
    with site("land", tmp_path) as where:
        bucket = where.buckets / where.bucket_of(folder)
        for first, number, surroundings in ((0, 1, {}), (1, count, environ)):
            with node(folder, first, number, environ=surroundings, where=where) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                for line in iter(process.stdout.readline, ""):
                    if first:
                        copy, bucket_copy = tmp_path / f"cut{len(cuts)}.img", tmp_path / f"bucket{len(cuts)}"
                        disk.cut(copy)
                        shutil.copytree(bucket, bucket_copy)
                        said.append(line.strip())
                        cuts.append((copy, bucket_copy, list(said)))
                    process.stdin.write("\n")
                    process.stdin.flush()
            do("sync", "-f", str(disk.mount_point)) if not first else None
        disk.unmount()
        found = []
        for copy, bucket_copy, before in cuts:
            judged_bucket = where.buckets / where.bucket_of(tmp_path / "copy" / "house")
            shutil.rmtree(judged_bucket, ignore_errors=True)
            shutil.copytree(bucket_copy, judged_bucket)
            found.append(judged(copy, tmp_path / "copy", before, 0, 1 + count, where=where))
    return found


def test_power_cut_of_the_spool(disk: Disk, tmp_path: Path) -> None:
    """Acknowledged by ``land``, then the power goes: the spool has it, and after the restart it is brought (faults 2, 3)."""
    found = cut_with_a_spool(disk, tmp_path, count=3, environ={})
    assert len(found) == 6
    assert [faults for _, faults in found if faults] == []


@pytest.mark.soak
def test_power_cut_of_the_spool_without_flushes(disk: Disk, tmp_path: Path, flushless: dict[str, str]) -> None:
    """Negative control: with every flush switched off the spool loses what it had promised."""
    assert any(lost > 0 for lost, _ in cut_with_a_spool(disk, tmp_path, count=2, environ=flushless))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["directory", "land", "archive"])
def test_many_power_cuts(disk: Disk, kind: str) -> None:
    """Fifty cuts, one at each step that changes the disk, lose nothing."""
    disk.unmount()
    tally = cut_often(50, seed=1, kind=kind)
    assert (tally.cuts, tally.lost, tally.faults) == (50, 0, [])
    assert tally.acknowledged > 50


def test_power_cuts_are_counted_and_can_fail(disk: Disk, flushless: dict[str, str]) -> None:
    """The program loses nothing with an honest disk; as negative control, with every flush switched off, it says that much was lost."""
    disk.unmount()
    command = [sys.executable, "-m", "tests.faults.power", "--cuts", "12", "--seed", "3"]
    honest = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    assert honest.returncode == 0, honest.stdout + honest.stderr
    told = heard(honest.stdout)
    assert (told["cuts"], told["broken"]) == (12, 0)
    assert told["acknowledged"] > 5
    lying = subprocess.run(command, cwd=_REPOSITORY, env={**os.environ, **flushless}, capture_output=True, text=True, check=False)
    assert lying.returncode == 1, lying.stdout + lying.stderr
    assert heard(lying.stdout)["broken"] > 3


def test_power_cut_at_each_step(disk: Disk, tmp_path: Path) -> None:
    """A cut at each step of the durable path keeps what was acknowledged, and what was not can be sent again (fault 2)."""
    folder = disk.mount_point / "house"
    said: list[str] = []
    cuts: list[tuple[str, Path, list[str], int]] = []
    for number, step in enumerate((*INTAKE_STEPS, *WORK_STEPS)):
        nth = 2 if step in INTAKE_STEPS else 1
        with node(folder, 2 * number, 2, environ={VARIABLE: f"{step}:{nth}:pause"}) as process:
            paused = _until_paused(process, said.append)
            assert paused, f"{step} was not reached"
            copy = tmp_path / f"cut{number}.img"
            disk.cut(copy)
            cuts.append((step, copy, list(said), 2 * number + 2))
    disk.unmount()
    for step, copy, before, last in cuts:
        assert (step, judged(copy, tmp_path / "copy", before, 0, last)) == (step, (0, []))


def _until_paused(process: subprocess.Popen[str], say: Callable[[str], None]) -> bool:
    """Let the node go on at each acknowledgement until its failpoint pauses it."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    paused = threading.Event()

    def listen() -> None:
        for line in iter(process.stderr.readline, ""):  # type: ignore[union-attr]
            if "is paused" in line:
                paused.set()
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    while not paused.is_set():
        if select.select([process.stdout], [], [], 0.02)[0]:
            line = process.stdout.readline()
            if not line:
                break
            say(line.strip())
            process.stdin.write("\n")
            process.stdin.flush()
    listener.join()
    return paused.is_set()
