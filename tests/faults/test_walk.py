"""The kill walk in small; in full it is ``python -m tests.faults.walk --points --kills 500 --syscalls``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.ground import INTAKE_STEPS, MOVE_STEPS, ROTATE_STEPS, WORK_STEPS, judge, run

_REPOSITORY = Path(__file__).resolve().parents[2]


def walk_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Walk in a process of its own (it forks), in memory where there is such a file system: a kill cannot tell the difference."""
    memory = Path("/dev/shm")
    where = ["--folder", str(memory)] if os.access(memory, os.W_OK) else []
    command = [sys.executable, "-m", "tests.faults.walk", *arguments, *where]
    return subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)


def walk(*arguments: str) -> str:
    """Walk and demand that nothing was wrong."""
    done = walk_of(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_every_step() -> None:
    """SIGKILL at each step: nothing acknowledged is lost, nothing is doubled, the restart needs no hand (threats.md faults 1, 4)."""
    told = walk("--points", "1", "--senders", "1")
    for step in (*INTAKE_STEPS, *WORK_STEPS):
        assert f"killed at {step}:1: 1" in told


def test_killed_at_random_moments() -> None:
    """SIGKILL at ten random moments: the same."""
    assert "killed at random: 10" in walk("--kills", "10")


def test_killed_with_a_bucket() -> None:
    """SIGKILL at each step that is another one with S3: the spool, the Mover, the document of a key, the store at once (faults 1, 4)."""
    steps = ("object.renamed", "index.begin", "index.committed", *MOVE_STEPS)
    told = walk("--store", "land", "--points", "1", "--senders", "1", "--steps", *steps)
    for step in steps:
        assert f"killed at {step}:1: 1" in told
    walk("--store", "archive", "--points", "1", "--senders", "1", "--steps", "object.renamed", "directory.flushed", "index.committed")


def test_killed_while_rotating() -> None:
    """SIGKILL at each step of a rotation while instances come in: every object opens, every key's document too (fault 46)."""
    told = walk("--rotate", "--points", "1", "--senders", "1", "--steps", *ROTATE_STEPS, "index.committed")
    for step in ROTATE_STEPS:
        assert f"killed at {step}:1: 1" in told


@pytest.mark.soak
@pytest.mark.parametrize("store", ["directory", "archive", "land"])
def test_killed_everywhere(store: str) -> None:
    """SIGKILL at each step, the first three times, with one sender and with three."""
    walk("--store", store, "--points", "3")


@pytest.mark.peer
def test_calls_that_fail() -> None:
    """EIO and ENOSPC at some calls of each kind: refused, never lost; the node goes on or says why it cannot (faults 18, 20, 21)."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    told = walk("--errors", "150", "--calls", "write", "pwrite64", "fsync", "fdatasync", "link,linkat")
    assert "fsync EIO" in told
    assert " 0 calls failed" not in told.splitlines()[-1]


@pytest.mark.peer
@pytest.mark.slow
def test_killed_at_system_calls() -> None:
    """SIGKILL on entering every 40th call that changes the disk: the same; the full walk takes every one."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    assert "killed at fsync" in walk("--syscalls", "40")


def test_dishonest_receiver_is_found_out() -> None:
    """Negative control: a receiver that acknowledges before the commit loses instances, and the walk says so."""
    done = walk_of("--points", "1", "--senders", "1", "--steps", "index.begin", "--dishonest")
    assert done.returncode == 1
    assert "acknowledged and lost" in done.stdout


def test_judge_finds_nothing_wrong_with_a_whole_run(tmp_path: Path) -> None:
    """Without a kill everything is stored, concluded and proved, and the judge has nothing to say."""
    said: list[str] = []
    run(tmp_path / "house", range(8), said.append)
    assert len(said) == 16
    verdict = judge(tmp_path / "house", said, range(8))
    assert (verdict.faults, verdict.acknowledged, verdict.lost, verdict.orphans) == ([], 8, 0, 0)


def test_judge_finds_a_lost_instance(tmp_path: Path) -> None:
    """Negative control of the judge: an acknowledgement of what was never sent is a loss."""
    run(tmp_path / "house", range(2), lambda _: None)
    verdict = judge(tmp_path / "house", ["stored 2 00"], range(2))
    assert verdict.lost == 1
    assert len(verdict.faults) == 2
