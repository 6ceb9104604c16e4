"""SIGKILL to worker and courier at every step of analysis and delivery: nothing is lost, nothing is doubled, no hand is needed.

Intake, store and index are walked point by point in tests/faults; here whole nodes die. The failpoint kills the process that reaches
it for the third time; its successor counts anew and comes through.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicom_node.demo import draw_skin_picture
from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.peers import Peer
from dicom_node.photograph import PhotographOptions, wrap_pixels
from dicom_node.sending import Outgoing, scan
from storage.records import Level, Query
from storage.work import utc_now
from tests.dicom_node.door import Door, open_door, open_rooms
from tests.inference.models import write_bundle
from tests.system.running_node import RunningNode

POINTS = (
    "analyse.claimed", "analyse.decoded", "analyse.predicted", "report.built", "report.stored", "conclude.begin", "conclude.written",
    "conclude.committed", "deliver.claimed", "deliver.sent", "deliver.answered", "acknowledge.committed",
)  # fmt: skip
IMAGES = 4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small bundles whose gates let everything pass: what is tested here is not the models."""
    folder = tmp_path_factory.mktemp("bundles")
    open_gates = {"quality": {"acceptable": 0}, "domain": {"dermatological": 0.0}}
    return ",".join(str(write_bundle(folder, task, thresholds=thresholds)) for task, thresholds in open_gates.items())


@dataclass
class Pacs:
    """A destination: a DIMSE door of its own over an archive of its own."""

    door: Door

    def reports(self) -> list[str]:
        """SOP Instance UIDs it holds; the archive keeps one of each UID and refuses other content."""
        found = self.door.rooms.index.match(Query(Level.INSTANCE))
        return [match.attributes["SOPInstanceUID"][0] for match in found]

    def conflicts(self) -> int:
        """Reports that came twice with different content."""
        return len(self.door.rooms.index.quarantined())


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    """A listening destination."""
    folder = tmp_path / "pacs"
    folder.mkdir()
    rooms = open_rooms(folder)
    with open_door(rooms) as door:
        yield Pacs(door)
    rooms.archive.close()
    rooms.database.close()


def node_for(tmp_path: Path, pacs: Pacs, bundles: str, **environ: str) -> RunningNode:
    """A node whose reports go to ``pacs``; a dead process's work is taken over after two seconds."""
    toml = (
        f'[[peers]]\nname = "pacs"\nae_title = "DERM_NODE"\nhost = "127.0.0.1"\nport = {pacs.door.port}\naccept = false\n'
        '[[routes]]\nto = ["pacs"]\n'
    )
    settings = {"DICOM_NODE_NODE__LEASE_S": "2", "DICOM_NODE_INFERENCE__BUNDLES": bundles, "DICOM_NODE_DELIVERY__FIRST_DELAY_S": "0.2"}
    return RunningNode(tmp_path / "node", toml=toml, environ={**settings, **environ})


def drawn(count: int) -> list[Outgoing]:
    """Small photographs."""
    items = []
    for seed in range(count):
        content = wrap_pixels(draw_skin_picture(seed=seed, rows=96, columns=96), PhotographOptions(), now=utc_now())
        items.append(Outgoing(f"drawn {seed}", content, scan(content)))
    return items


def send(node: RunningNode, items: list[Outgoing]) -> list[Outgoing]:
    """Send, and return those that were answered with Success."""
    scu = StorageSCU(ae_title="SENDER")
    peer = Peer(name="node", ae_title="DERM_NODE", host="127.0.0.1", port=node.dimse_port)
    return [item for item, (_, outcome) in zip(items, scu.store(peer, items), strict=False) if outcome == Stored(0)]


def await_reports(node: RunningNode, pacs: Pacs, count: int) -> None:
    """Wait until the destination holds ``count`` reports; each must be one that the node archived."""
    deadline = time.monotonic() + 120
    while len(pacs.reports()) < count:
        assert time.monotonic() < deadline, f"{len(pacs.reports())} of {count} reports arrived\n{node.log_text()[-3000:]}"
        time.sleep(0.2)


def judge(node: RunningNode, pacs: Pacs, items: list[Outgoing]) -> None:
    """Every acknowledged picture has one report, archived once and delivered; no job waits, none was given up."""
    deadline = time.monotonic() + 60
    with node.parts() as parts:
        while True:
            states = {state.value for (_, state), count in parts.queue.counts().items() if count}
            if states <= {"done"} or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert states <= {"done"}, parts.queue.counts()
        made = []
        for item in items:
            (report,) = parts.index.reports_of(item.sop_instance_uid)
            made.append(report.sop_instance_uid)
        assert sorted(pacs.reports()) == sorted(made)
        assert pacs.conflicts() == 0
        assert parts.archive.verify().intact


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step(tmp_path: Path, pacs: Pacs, bundles: str, point: str) -> None:
    """The process that reaches ``point`` the third time dies there; all reports arrive all the same, each once."""
    node = node_for(tmp_path, pacs, bundles, DICOM_NODE_FAILPOINT=f"{point}:3").start()
    try:
        items = drawn(IMAGES)
        assert send(node, items) == items
        await_reports(node, pacs, IMAGES)
        judge(node, pacs, items)
        assert "SIGKILL" in node.log_text(), "the failpoint was never reached"
    finally:
        node.stop()


def test_random_kills_while_it_works(tmp_path: Path, pacs: Pacs, bundles: str) -> None:
    """Any process, the parent too, at any moment: what was acknowledged is reported and delivered, once."""
    chance = random.Random(7)
    node = node_for(tmp_path, pacs, bundles).start()
    acknowledged: list[Outgoing] = []
    items = drawn(24)
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
        await_reports(node, pacs, len(items))
        judge(node, pacs, items)
    finally:
        done.wait(1)
        node.stop()
        sender.join(60)
