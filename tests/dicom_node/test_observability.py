"""What the logs never show, and counters that a full disk cannot turn into a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dicom_node.observability import COUNTER_BYTES

FAULT = """
import logging, structlog
from dicom_node.observability import configure_logging

configure_logging(form={form!r}, level="info", role="test")

def fail(data_key, patient):
    raise ValueError("words " + "of the fault")

for log in (structlog.get_logger(), logging.getLogger("storage.archive")):
    try:
        fail(bytes(range(65, 81)), "CAN" + "ARY")
    except ValueError:
        log.exception("it.failed")
"""

COUNT = """
from dicom_node.observability import Metrics

metrics = Metrics()
for number in range(100):
    metrics.instance(door="dimse", outcome=f"0x{number:04X}", byte_count=1)
    metrics.seconds(f"step{number % 10}", 0.1)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own: logging and prometheus_client are set up once a process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, **environment})


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_variables(form: str) -> None:
    """Of a fault the log tells where and what, never the values at hand, which may be a key or a patient's name."""
    said = run(FAULT.format(form=form)).stderr
    assert said.count("words of the fault") == 2
    assert "in fail" in said
    assert "CANARY" not in said
    assert "ABCDEFGHIJ" not in said


def test_counters_have_their_blocks_from_the_start(tmp_path: Path) -> None:
    """The files behind the counters are no holes: a write into one on a full disk would end the process by SIGBUS. They do not grow."""
    run(COUNT, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    files = sorted(tmp_path.glob("*.db"))
    assert [file.name.partition("_")[0] for file in files] == ["counter", "histogram"]
    for file in files:
        assert file.stat().st_size == COUNTER_BYTES
        assert file.stat().st_blocks * 512 >= COUNTER_BYTES
