"""Slots for associations, in one process and shared by several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.dimse.slots import Held, Slots

_HOLDER = """
import sys, time
from pathlib import Path
from dicom_node.dimse.slots import Slots
slots = Slots(total=int(sys.argv[2]), path=Path(sys.argv[1]))
print(sum(slots.take("a", 100) is not None for _ in range(int(sys.argv[3]))), flush=True)
time.sleep(300)
"""


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans()), max_size=40), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_counts_like_a_table(steps: list[tuple[str, bool]], total: int, quota: int) -> None:
    """Whatever is taken and given back in whatever order: a slot is had exactly while the whole and the caller's own have room."""
    slots = Slots(total=total)
    held: dict[str, list[Held]] = {"a": [], "b": [], "c": []}
    try:
        for caller, take in steps:
            if take:
                room = len(held[caller]) < quota and sum(map(len, held.values())) < total
                slot = slots.take(caller, quota)
                assert (slot is not None) == room
                if slot is not None:
                    held[caller].append(slot)
            elif held[caller]:
                slots.give(held[caller].pop(0))
            assert slots.held == sum(map(len, held.values()))
    finally:
        slots.close()


def test_processes_share_and_the_dead_hold_nothing(tmp_path: Path) -> None:
    """What another process holds is taken; the kernel gives it back when that process is killed."""
    path = tmp_path / "slots"
    other = subprocess.Popen([sys.executable, "-c", _HOLDER, str(path), "4", "3"], stdout=subprocess.PIPE, text=True)
    slots = Slots(total=4, path=path)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "3"
        assert slots.take("a", 3) is None  # the caller's own are with the other process
        mine = slots.take("b", 3)
        assert mine is not None
        assert slots.take("b", 3) is None  # none of the four is left
        other.kill()
        other.wait()
        assert [slots.take("a", 3) is not None for _ in range(4)] == [True, True, True, False]
    finally:
        other.kill()
        other.communicate()
        slots.close()


@pytest.mark.parametrize("total", [0, -1, 1 << 20])
def test_no_senseless_number(total: int) -> None:
    """A number of slots that no range holds is refused."""
    with pytest.raises(ValueError, match="associations"):
        Slots(total=total)
