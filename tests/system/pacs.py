"""A destination for reports, and small photographs to be sent: what the tests of kills and of many nodes share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dicom_node.demo import draw_skin_picture
from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.peers import Peer
from dicom_node.photograph import PhotographOptions, wrap_pixels
from dicom_node.sending import Outgoing, scan
from storage.database import utc_now
from storage.records import Level, Outcome, Query
from tests.dicom_node.door import Door, open_door, open_rooms
from tests.inference.models import write_bundle
from tests.system.running_node import RunningNode


@dataclass
class Pacs:
    """A destination: a DIMSE door of its own over an archive of its own, which keeps one instance of each UID."""

    door: Door

    @property
    def toml(self) -> str:
        """What a node's configuration says of it: every report goes there."""
        return (
            f'[[peers]]\nname = "pacs"\nae_title = "DERM_NODE"\nhost = "127.0.0.1"\nport = {self.door.port}\naccept = false\n'
            '[[routes]]\nto = ["pacs"]\n'
        )

    def reports(self) -> list[str]:
        """SOP Instance UIDs it holds."""
        found = self.door.rooms.index.match(Query(Level.INSTANCE))
        return [match.attributes["SOPInstanceUID"][0] for match in found]

    def conflicts(self) -> int:
        """Reports that came twice with different content: refused, and kept aside."""
        return len(self.door.rooms.index.quarantined())

    def repeats(self) -> int:
        """Reports that came again, equal byte by byte."""
        with self.door.events.changed:
            return sum(
                event == "instance.received" and labels["outcome"] == Outcome.DUPLICATE.value for event, labels in self.door.events.labels
            )


@contextmanager
def running_pacs(folder: Path) -> Iterator[Pacs]:
    """Listen until the block ends."""
    folder.mkdir()
    rooms = open_rooms(folder)
    with open_door(rooms) as door:
        yield Pacs(door)
    rooms.archive.close()
    rooms.database.close()


def quick_bundles(folder: Path) -> str:
    """Small bundles whose gates let everything pass, as the configuration names them: one report an image, made in no time."""
    open_gates = {"quality": {"acceptable": 0}, "domain": {"dermatological": 0.0}}
    return ",".join(str(write_bundle(folder, task, thresholds=thresholds)) for task, thresholds in open_gates.items())


def quick_settings(bundles: str) -> dict[str, str]:
    """Environment of a node that analyses with `bundles`, and where a dead process's work is taken over after two seconds."""
    return {
        "DICOM_NODE_NODE__LEASE_S": "2",
        "DICOM_NODE_INFERENCE__BUNDLES": bundles,
        "DICOM_NODE_INFERENCE__THREADS": "1",
        "DICOM_NODE_DELIVERY__FIRST_DELAY_S": "0.2",
    }


def drawn(seeds: Sequence[int], options: PhotographOptions | None = None) -> list[Outgoing]:
    """Draw small photographs."""
    items = []
    for seed in seeds:
        content = wrap_pixels(draw_skin_picture(seed=seed, rows=96, columns=96), options or PhotographOptions(), now=utc_now())
        items.append(Outgoing(f"drawn {seed}", content, scan(content)))
    return items


def send(node: RunningNode, items: Sequence[Outgoing]) -> list[Outgoing]:
    """Send, and return those that were answered with Success."""
    scu = StorageSCU(ae_title="SENDER")
    peer = Peer(name="node", ae_title="DERM_NODE", host="127.0.0.1", port=node.dimse_port)
    return [item for item, (_, outcome) in zip(items, scu.store(peer, items), strict=False) if outcome == Stored(0)]


def await_reports(pacs: Pacs, count: int, *nodes: RunningNode, seconds: float = 120.0) -> None:
    """Wait until the destination holds ``count`` reports."""
    deadline = time.monotonic() + seconds
    while len(pacs.reports()) < count:
        logs = "\n".join(node.log_text()[-3000:] for node in nodes)
        assert time.monotonic() < deadline, f"{len(pacs.reports())} of {count} reports arrived\n{logs}"
        time.sleep(0.2)


def judge(node: RunningNode, pacs: Pacs, items: Sequence[Outgoing], *, seconds: float = 60.0) -> None:
    """Every acknowledged picture has one report, archived once and delivered; no job waits, none was given up."""
    deadline = time.monotonic() + seconds
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
        found = parts.archive.verify()
        assert found.intact, found.lines()
