"""Random schedules in small; in full they are ``python -m tests.faults.schedules --runs 10000``, or ``make soak``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.faults import schedules
from tests.faults.checker import Violation
from tests.faults.schedules import Schedule, Tally, run, stage

RUNS = 75


def lived(first: int, *, dishonest: str = "", runs: int = RUNS) -> tuple[Tally, list[str]]:
    """Live through schedules from seed `first` on; in CI the same ones each time, else new ones."""
    told: list[str] = []
    tally = Tally()
    seed = first if os.environ.get("CI") or dishonest else first + time.time_ns() % 10**8
    with stage(dishonest=dishonest) as made:
        run(made, range(seed, seed + runs), tally, report=told.append)
    return tally, told


@pytest.mark.parametrize("part", [1, 2])
def test_random_schedules_break_no_promise(part: int) -> None:
    """Kills, a lying store, full disks and clock steps, drawn from printed seeds: the checker finds nothing (all promises)."""
    tally, told = lived(part * 10_000_000)
    assert tally.broken == {}, "\n".join(told)[-20_000:]
    assert tally.acked > 2 * RUNS
    assert sum(tally.kills.values()) > RUNS // 4, "the schedules do not kill any more"
    assert tally.events["refused"]
    assert tally.events["fault"]


@pytest.mark.parametrize(("dishonest", "promise"), [("ack before commit", "P2"), ("lose an object", "P1")])
def test_a_dishonest_node_is_found_out(dishonest: str, promise: str) -> None:
    """Negative control: an answer before the commit, and a store that loses what it took, break their promises in most schedules."""
    tally, _ = lived(1, dishonest=dishonest, runs=10)
    assert len(tally.broken) > 5
    assert promise in {violation.promise for found in tally.broken.values() for violation in found}


def test_a_seed_gives_the_same_schedule() -> None:
    """What a seed draws is the same each time: a broken one can be looked at again."""
    seen = []
    with stage() as made:
        for _ in range(2):
            schedule = Schedule(12, made)
            assert schedule.live() == []
            seen.append([line.split('"sha256"')[1] for line in schedule.history_path.read_text().splitlines() if '"sent"' in line])
    assert seen[0]
    assert seen[0] == seen[1]


def test_a_broken_promise_is_told_with_its_history(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program prints seed, promise and history of what broke, and says so in its exit status."""
    monkeypatch.setattr(schedules, "judge", lambda *_, **__: [Violation("P1", "2.25.1", "lost")])
    assert schedules.main(["--runs", "1", "--seed", "3"]) == 1
    told = capsys.readouterr().out
    assert "seed 3:" in told
    assert "P1 2.25.1: lost" in told
    assert '"event":"began"' in told


def test_nothing_is_left_of_the_stage() -> None:
    """Folder and small disk are gone afterwards."""
    with stage() as made:
        root = made.root
        assert root.is_dir()
    assert not root.exists()
    assert str(root) not in Path("/proc/mounts").read_text()
