"""Three nodes on one PostgreSQL, one bucket and copies of one ring, under load, while parts of them die: the long form of test_many_nodes.

``python -m tests.system.cluster --rounds 40 --seed 1 --policy archive`` runs random schedules and prints what it saw.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from dicom_node.sending import Outgoing
from storage.records import JobKind, JobState
from tests.system.pacs import Pacs, await_reports, drawn, judge, quick_bundles, quick_settings, running_pacs, send
from tests.system.running_node import RunningNode
from tests.system.services import Services, services

PAUSE_S = 0.1


@dataclass
class Load:
    """What is sent: each instance again and again, to any node, until one of them answers Success."""

    most: int
    """Instances at most; `more` raises it."""
    seeds: Iterator[int] = field(default_factory=itertools.count)
    waiting: list[Outgoing] = field(default_factory=list)
    acknowledged: dict[str, Outgoing] = field(default_factory=dict)
    by_node: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """Tries that were not answered with Success."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: bool = False
    """Nothing new is drawn; what waits is sent still."""

    def take(self) -> Outgoing | None:
        """Return the next one, None when there is none now."""
        with self.changed:
            if self.waiting:
                return self.waiting.pop(0)
            if self.ended or len(self.acknowledged) >= self.most:
                return None
            seed = next(self.seeds)
        return drawn([seed])[0]

    def sent(self, item: Outgoing, node: RunningNode, *, stored: bool) -> None:
        """Note an answer, or that there was none."""
        with self.changed:
            if stored:
                self.acknowledged[item.sop_instance_uid] = item
                self.by_node[node.folder.name] += 1
            else:
                self.refused += 1
                self.waiting.append(item)
            self.changed.notify_all()

    def more(self, count: int) -> None:
        """Let so many more be sent than are acknowledged now."""
        with self.changed:
            self.most = len(self.acknowledged) + count

    def await_acknowledged(self, enough: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until `enough` of them were answered."""
        with self.changed:
            assert self.changed.wait_for(enough, seconds), f"{self.by_node}, {self.refused} refused"


class Cluster:
    """Nodes that share everything but their disks, and a destination for their reports."""

    def __init__(self, folder: Path, ground: Services, pacs: Pacs, bundles: str, policies: Sequence[str]) -> None:
        self._ground = ground
        self.pacs = pacs
        self._shared = {
            **ground.new_archive(),
            **quick_settings(bundles),
            "DICOM_NODE_ARCHIVE__DEADLINE_S": "5",
            "DICOM_NODE_DICOMWEB__ENABLED": "false",
        }
        self._folder = folder
        self._numbers = itertools.count()
        self.policies = list(policies)
        self.nodes = [self._new(policy) for policy in policies]
        self.nodes[0].command("keys", "init")
        self._ring = self.nodes[0].ring_file.read_bytes()
        for node in self.nodes[1:]:
            node.take_ring(self._ring)

    def _new(self, policy: str) -> RunningNode:
        environ = {**self._shared, "DICOM_NODE_ARCHIVE__ACKNOWLEDGE": policy}
        return RunningNode(self._folder / f"node-{next(self._numbers)}", toml=self.pacs.toml, environ=environ)

    def start(self, environs: Mapping[int, Mapping[str, str]]) -> None:
        """Start all of them at once."""
        for place, node in enumerate(self.nodes):
            node.start(wait=False, environ=environs.get(place))
        for node in self.nodes:
            node.await_ready()

    def replace(self, place: int) -> None:
        """Put a new node, with an empty disk and a copy of the ring, where one was lost."""
        self.nodes[place] = self._new(self.policies[place])
        self.nodes[place].take_ring(self._ring)
        self.nodes[place].start()

    @property
    def living(self) -> list[RunningNode]:
        """Those that were not killed."""
        return [node for node in self.nodes if node.process is not None]

    @contextmanager
    def sending(self, load: Load) -> Iterator[None]:
        """Send to every node at once, in threads; at the end everything that was begun is acknowledged."""
        gone = threading.Event()

        def keep_sending(place: int) -> None:
            while not gone.is_set():
                node = self.nodes[place]
                item = load.take() if node.process is not None else None
                if item is not None:
                    try:
                        stored = bool(send(node, [item]))
                    except Exception:  # noqa: BLE001 - the node is being killed: the sender tries again, as senders do
                        stored = False
                    load.sent(item, node, stored=stored)
                gone.wait(PAUSE_S)

        threads = [threading.Thread(target=keep_sending, args=(place,)) for place in range(len(self.nodes))]
        for thread in threads:
            thread.start()
        try:
            yield
            load.ended = True
            deadline = time.monotonic() + 180
            while any(thread.is_alive() for thread in threads) and not gone.is_set():
                with load.changed:
                    if not load.waiting:
                        gone.set()
                assert time.monotonic() < deadline, f"{len(load.waiting)} instances find no node that takes them"
                gone.wait(PAUSE_S)
        finally:
            gone.set()
            for thread in threads:
                thread.join()

    def judge(self, load: Load) -> None:
        """All that was acknowledged is archived, analysed and at the destination, each once as it sees it."""
        items = list(load.acknowledged.values())
        await_reports(self.pacs, len(items), *self.living, seconds=300)
        judge(self.living[0], self.pacs, items, seconds=120)
        for node in self.living:
            before, _, trace = node.log_text().partition("Traceback")
            assert not trace, before[-1000:] + trace[:6000]

    def taken_over(self) -> int:
        """Analyses that needed more than one claim."""
        with self.living[0].parts() as parts, parts.database.read() as connection:
            text = "SELECT count(*) FROM jobs WHERE kind = %s AND state = %s AND attempts > 1"
            return int(connection.exec_driver_sql(text, (JobKind.ANALYSE.value, JobState.DONE.value)).scalar_one())

    def close(self) -> None:
        """End what runs."""
        for node in self.living:
            node.kill_all()


def crash_postgresql(ground: Services) -> None:
    """Crash the database server; it recovers at the next start."""
    ground.postgresql.stop("immediate")
    ground.postgresql.start()


def restart_s3(ground: Services, away_s: float) -> None:
    """Kill the S3 service; it is back after a while."""
    ground.s3.kill()
    time.sleep(away_s)
    ground.s3.start()


def walk(cluster: Cluster, ground: Services, load: Load, chance: random.Random, rounds: int, per_round: int) -> Counter[str]:
    """Let one part after the other die, at random moments, and come back; return how often each did."""
    seen: Counter[str] = Counter()
    for number in range(rounds):
        load.more(per_round)
        time.sleep(chance.uniform(0.3, 2.0))
        what = chance.choices(("node", "process", "postgresql", "s3"), (5, 2, 1, 1))[0]
        place = chance.randrange(len(cluster.nodes))
        node = cluster.nodes[place]
        if what == "node" and cluster.policies[place] == "archive" and chance.random() < 0.5:
            what = "node lost for ever"
            node.lose()
            time.sleep(chance.uniform(0.0, 3.0))
            cluster.replace(place)
        elif what == "node":
            node.kill_all()
            time.sleep(chance.uniform(0.0, 3.0))
            node.start()
        elif what == "process":
            children = list(node.children())
            if children:
                os.kill(chance.choice(children), 9)
        elif what == "postgresql":
            crash_postgresql(ground)
        else:
            restart_s3(ground, chance.uniform(0.0, 4.0))
        seen[what] += 1
        sys.stdout.write(
            f"{number + 1}/{rounds} {what} {place}: {len(load.acknowledged)} acknowledged, {len(cluster.pacs.reports())} at the PACS\n"
        )
        sys.stdout.flush()
    return seen


def main() -> None:
    """Run schedules as long as told."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))  # the destination lives in this process
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--instances", type=int, default=20, help="a round")
    parser.add_argument("--s3", choices=("rclone", "radosgw"), default="rclone", help="radosgw: see make ceph")
    parser.add_argument("--policy", choices=("land", "archive", "mixed"), default="mixed")
    arguments = parser.parse_args()
    policies = {"mixed": ["land", "archive", "archive"]}.get(arguments.policy, [arguments.policy] * 3)
    with (
        tempfile.TemporaryDirectory(prefix="dicom-node-cluster-") as name,
        services(Path(name) / "services", durable=True, s3=arguments.s3) as ground,
    ):
        os.environ.update(ground.credentials)
        with running_pacs(Path(name) / "pacs") as pacs:
            cluster = Cluster(Path(name), ground, pacs, quick_bundles(Path(name) / "bundles"), policies)
            load = Load(arguments.instances)
            try:
                cluster.start({})
                with cluster.sending(load):
                    seen = walk(cluster, ground, load, random.Random(arguments.seed), arguments.rounds, arguments.instances)
                cluster.judge(load)
                sys.stdout.write(
                    f"seed {arguments.seed}, policy {arguments.policy}: {len(load.acknowledged)} acknowledged ({dict(load.by_node)}), "
                    f"{load.refused} tries without Success, deaths {dict(seen)}; {len(pacs.reports())} reports at the PACS, "
                    f"{pacs.repeats()} came again equal, {pacs.conflicts()} with other content; "
                    f"{cluster.taken_over()} analyses were taken over\n"
                )
            finally:
                cluster.close()


if __name__ == "__main__":
    main()
