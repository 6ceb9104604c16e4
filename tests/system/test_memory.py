"""A worker that the kernel kills for memory: in a memory cgroup of its own, over a picture that does not fit there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dicom_node.demo import draw_skin_picture
from dicom_node.photograph import PhotographOptions, wrap_pixels
from dicom_node.sending import Outgoing, scan
from storage.database import utc_now
from tests.system.pacs import drawn, quick_bundles, quick_settings, send
from tests.system.running_node import RunningNode, analysed, running_node

MIB = 1 << 20


@contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[Path]:
    """Make a memory cgroup below that of this process, whose limits go on to hold; needs root and cgroup version 1."""
    ours = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.split(":")[1] == "memory"]
    if not ours:
        pytest.skip("no memory cgroup of version 1 here")
    group = Path("/sys/fs/cgroup/memory") / ours[0].strip("/") / name
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    try:
        yield group
    finally:
        group.rmdir()  # whoever was in it has ended


def kills(group: Path) -> int:
    """Processes of a group that the kernel killed for memory."""
    words = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    return int(words["oom_kill"])


def large() -> Outgoing:
    """Draw a photograph of 18 MB."""
    content = wrap_pixels(draw_skin_picture(seed=1, rows=2000, columns=3000), PhotographOptions(), now=utc_now())
    return Outgoing("large", content, scan(content))


def analysis(node: RunningNode, item: Outgoing) -> dict[str, Any]:
    """Wait for an analysis, return its job."""
    (instance,) = node.await_trace(item.sop_instance_uid, analysed)["instances"]
    (job,) = (job for job in instance["jobs"] if job["kind"] == "analyse")
    return dict(job)


@contextmanager
def node_of(folder: Path) -> Iterator[RunningNode]:
    """Start a node with one worker."""
    environ = {**quick_settings(quick_bundles(folder / "bundles")), "DICOM_NODE_INFERENCE__WORKERS": "1", "DICOM_NODE_NODE__LEASE_S": "10"}
    with running_node(folder / "node", environ=environ) as node:
        yield node


def put_worker(node: RunningNode, group: Path) -> int:
    """Put the worker into a group: what it takes from now on counts there."""
    (worker,) = (process_id for process_id, role in node.children().items() if role == "worker")
    (group / "cgroup.procs").write_text(str(worker))
    return worker


def test_the_kernel_kills_the_worker_for_memory(tmp_path: Path) -> None:
    """The picture is too large for the worker's memory: the kernel kills it, its successor does the work (28)."""
    with memory_group(f"dicom-node-{tmp_path.parent.name}-small", 12 * MIB) as group, node_of(tmp_path) as node:
        worker = put_worker(node, group)
        items = [large(), *drawn(range(3))]
        assert send(node, items) == items
        assert [analysis(node, item)["attempts"] > 1 for item in items] == [True, False, False, False]
        assert kills(group) == 1
        assert worker not in node.children()
        ended = [json.loads(line) for line in node.log_text().splitlines() if '"process.ended"' in line]
        assert [(one["process"], one["cause"]) for one in ended] == [("worker", "signal SIGKILL")]


def test_control_with_memory_enough_nobody_is_killed(tmp_path: Path) -> None:
    """Negative control: in a group with room the same worker does the same at its first try."""
    with memory_group(f"dicom-node-{tmp_path.parent.name}-large", 4096 * MIB) as group, node_of(tmp_path) as node:
        worker = put_worker(node, group)
        items = [large()]
        assert send(node, items) == items
        assert analysis(node, items[0])["attempts"] == 1
        assert kills(group) == 0
        assert worker in node.children()
