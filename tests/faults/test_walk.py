"""The kill walk in small; in full it is ``python -m tests.faults.walk --points --kills 500 --syscalls``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.ground import INTAKE_STEPS, WORK_STEPS, judge, run

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
