"""The log of a whole node goes to a pipe that nobody reads, or to a volume that is full: nothing else notices."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.dicom_node.test_log_pipe import full_pipe
from tests.system.running_node import RunningNode, analysed, get


def used(node: RunningNode) -> None:
    """Send a picture by each door; both are analysed, and all processes are ready."""
    by_dimse = node.command("send", "--demo").stdout.split()
    by_web = node.command("send", "--demo", "--to", node.base_url).stdout.split()
    for word, uid, *_ in (by_dimse, by_web):
        assert word == "stored"
        node.await_trace(uid, analysed)
    assert node.ready()


def test_a_log_pipe_that_is_stuck(tmp_path: Path) -> None:
    """Standard output and error are one full pipe: the node starts, answers Success, analyses, and stops by itself (56)."""
    with full_pipe() as (reader, writer, held):
        node = RunningNode(tmp_path, environ={"DICOM_NODE_LOGGING__LEVEL": "debug"}).start(output=writer)
        try:
            used(node)
        finally:
            code = node.stop()
        assert code == 0
        os.set_blocking(reader, False)
        assert os.read(reader, held + 1) == b"x" * held
    assert node.log_text() == ""


def test_a_log_volume_that_is_full(tmp_path: Path) -> None:
    """Every write of the log ends with ENOSPC: the same, and the lines are counted (56, 19)."""
    full = os.open("/dev/full", os.O_WRONLY)
    node = RunningNode(tmp_path).start(output=full)
    os.close(full)
    try:
        used(node)
        text = get(f"http://127.0.0.1:{node.admin_port}/metrics")[1].decode()
        dropped = re.search(r"^dicom_node_log_lines_dropped_total (\S+)$", text, re.MULTILINE)
        assert dropped is not None
        assert float(dropped[1]) > 0
    finally:
        assert node.stop() == 0


def test_control_a_log_that_is_read_has_the_lines(tmp_path: Path) -> None:
    """Negative control: what the full pipe did not take is there when it is a file, from the start to the last line."""
    node = RunningNode(tmp_path).start()
    used(node)
    assert node.stop() == 0
    assert "node.starting" in node.log_text()
    assert "The node is ready" in node.log_text()
    assert "node.stopped" in node.log_text().splitlines()[-1]
