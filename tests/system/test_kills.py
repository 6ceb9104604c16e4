"""SIGKILL to worker and courier at every step of analysis and delivery: nothing is lost, nothing is doubled, no hand is needed.

Intake, store and index are walked point by point in tests/faults; here whole nodes die. The failpoint kills the process that reaches
it for the third time; its successor comes through.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from dicom_node.sending import Outgoing
from tests.system.pacs import Pacs, await_reports, drawn, judge, quick_settings, send
from tests.system.running_node import RunningNode

POINTS = (
    "analyse.claimed", "analyse.decoded", "analyse.predicted", "report.built", "report.stored", "conclude.begin", "conclude.written",
    "conclude.committed", "deliver.claimed", "deliver.sent", "deliver.answered", "acknowledge.committed",
)  # fmt: skip
IMAGES = 4


def node_for(tmp_path: Path, pacs: Pacs, bundles: str, **environ: str) -> RunningNode:
    """A node whose reports go to ``pacs``."""
    return RunningNode(tmp_path / "node", toml=pacs.toml, environ={**quick_settings(bundles), **environ})


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step(tmp_path: Path, pacs: Pacs, bundles: str, point: str) -> None:
    """The process that reaches ``point`` the third time dies there; all reports arrive all the same, each once."""
    once = {
        "DICOM_NODE_FAILPOINT": f"{point}:3",
        "DICOM_NODE_FAILPOINT_ONCE": str(tmp_path / "fired"),
        "DICOM_NODE_DICOMWEB__ENABLED": "false",  # no step is its
    }
    node = node_for(tmp_path, pacs, bundles, **once).start()
    try:
        items = drawn(range(IMAGES))
        assert send(node, items) == items
        await_reports(pacs, IMAGES, node)
        judge(node, pacs, items)
        assert "SIGKILL" in node.log_text(), "the failpoint was never reached"
    finally:
        node.stop()


def test_random_kills_while_it_works(tmp_path: Path, pacs: Pacs, bundles: str) -> None:
    """Any process, the parent too, at any moment: what was acknowledged is reported and delivered, once."""
    chance = random.Random(7)
    node = node_for(tmp_path, pacs, bundles).start()
    acknowledged: list[Outgoing] = []
    items = drawn(range(24))
    done = threading.Event()

    def keep_sending() -> None:
        waiting = list(items)
        while waiting:
            try:
                stored = send(node, waiting[:3])
            except Exception:  # noqa: BLE001 - the node is being killed: the sender tries again, as senders do
                stored = []
            acknowledged.extend(stored)
            waiting = [item for item in waiting if item not in stored]
            time.sleep(0.05)
        done.set()

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        for _ in range(8):
            time.sleep(chance.uniform(0.2, 1.5))
            children = list(node.children())
            if not children or chance.random() < 0.25:
                node.kill()
                node.start()
            else:
                os.kill(chance.choice(children), signal.SIGKILL)
        assert done.wait(120), f"{len(acknowledged)} of {len(items)}"
        assert len(acknowledged) == len(items)
        await_reports(pacs, len(items), node)
        judge(node, pacs, items)
    finally:
        done.wait(1)
        node.stop()
        sender.join(60)
