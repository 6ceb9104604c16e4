"""A node whose GPU is lost, or was never there: every picture is analysed, and everybody is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system.running_node import RunningNode, analysed, get, running_node


def logged(node: RunningNode, event: str) -> list[dict[str, Any]]:
    """Lines of the log about an event."""
    return [
        line for line in map(json.loads, filter(lambda line: line.startswith("{"), node.log_text().splitlines())) if line["event"] == event
    ]


def analyse(node: RunningNode) -> dict[str, Any]:
    """Send a picture, wait for its analysis, return its job."""
    found = node.await_trace(node.command("send", "--demo").stdout.split()[1], analysed)
    (job,) = (job for job in found["instances"][0]["jobs"] if job["kind"] == "analyse")
    return dict(job)


def stood_in(node: RunningNode) -> list[str]:
    """Values of the gauge of workers on the CPU in a GPU's stead."""
    text = get(f"http://127.0.0.1:{node.admin_port}/metrics")[1].decode()
    return re.findall(r'^dicom_node_workers_on_stand_in\{device="[a-z]+"\} (\S+)$', text, re.MULTILINE)


def test_the_device_is_lost_in_mid_run(tmp_path: Path) -> None:
    """What torch raises of a lost GPU: the worker says so and ends, another takes its place, the picture lost no try (33)."""
    environ = {
        # the first computations are those of the start, one for each of the four shipped bundles
        "DICOM_NODE_FAILPOINT": "device.compute:6:raise=CUDA error: unspecified launch failure",
        "DICOM_NODE_FAILPOINT_ONCE": str(tmp_path / "once"),
    }
    with running_node(tmp_path / "node", environ=environ) as node:
        job = analyse(node)
        assert (tmp_path / "once").exists()
        assert job["attempts"] == 1
        (lost,) = logged(node, "worker.device_lost")
        assert "unspecified launch failure" in lost["reason"]
        (ended,) = logged(node, "process.ended")
        assert (ended["process"], ended["cause"]) == ("worker", "exit status 1")
        assert "Traceback" not in node.log_text()
        assert analyse(node)["attempts"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_asked_for_and_there_is_none(tmp_path: Path) -> None:
    """The node works on the CPU, warns loudly, and /readyz and a gauge say degraded; `check` is an error (33)."""
    with running_node(tmp_path, environ={"DICOM_NODE_INFERENCE__DEVICE": "cuda"}) as node:
        assert analyse(node)["attempts"] == 1
        (told,) = logged(node, "worker.degraded")
        assert told["level"] == "error"
        status, body = get(f"http://127.0.0.1:{node.admin_port}/readyz")
        assert status == 200
        assert re.fullmatch(r"ready\ndegraded: process worker-\d computes on the CPU, .*\n", body.decode())
        assert stood_in(node) == ["1.0"]
        checked = node.command("check", expect=1)
        assert "device 'cuda' cannot be used" in checked.stdout + checked.stderr


def test_control_with_the_device_that_was_asked_for_nothing_is_degraded(tmp_path: Path) -> None:
    """Negative control: the CPU asked for and used is no fault."""
    with running_node(tmp_path, environ={"DICOM_NODE_INFERENCE__DEVICE": "cpu"}) as node:
        assert get(f"http://127.0.0.1:{node.admin_port}/readyz") == (200, b"ready\n")
        assert stood_in(node) == ["0.0"]
        assert logged(node, "worker.degraded") == []
