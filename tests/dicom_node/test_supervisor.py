"""The parent of the processes, when the machine has nothing left to start one with."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dicom_node.supervisor import Supervisor


def test_a_child_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a process now: the node neither ends nor leaks descriptors, and tries again later."""
    stop = threading.Event()
    tries: list[Any] = []

    def no_memory(*arguments: Any, **_: Any) -> None:
        tries.append(arguments)
        if len(tries) == 2:
            stop.set()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    supervisor = Supervisor(roles=["courier"], config=None, on_exit=lambda _: None)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all we want
    supervisor.run(stop, drain_s=0.0, on_ready=lambda: pytest.fail("nothing runs"))
    assert len(tries) == 2
    assert supervisor.states() == {"courier-0": "down"}
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert Path("/proc/self/fd").exists()


def test_a_process_that_does_not_end_is_cut(tmp_path: Path) -> None:
    """What waits for ever after a stop is left behind, and the log says where it stood; what ends in time is let alone."""
    script = tmp_path / "hangs.py"
    script.write_text(
        "import sys, threading\n"
        "from dicom_node.supervisor import end_in_time\n"
        "stop = threading.Event()\n"
        "stop.set()\n"
        "end_in_time(stop, 0.2)\n"
        "if sys.argv[1] == 'hangs':\n"
        "    threading.Event().wait()\n"
    )
    hung = subprocess.run([sys.executable, str(script), "hangs"], capture_output=True, text=True, timeout=60, check=False)
    assert hung.returncode == 1
    assert "stop.cut" in hung.stdout
    assert "MainThread in " in hung.stdout
    good = subprocess.run([sys.executable, str(script), "ends"], capture_output=True, text=True, timeout=60, check=False)
    assert (good.returncode, good.stdout) == (0, "")
