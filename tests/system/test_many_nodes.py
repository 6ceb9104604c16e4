"""Several nodes on one database and one bucket; roles that run each by itself; folders that are not one's own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.nodes import Incarnation
from tests.system.cluster import Cluster, Load, crash_postgresql
from tests.system.pacs import Pacs, await_reports, drawn, judge, quick_settings, send
from tests.system.running_node import RunningNode
from tests.system.services import Services, services

pytestmark = pytest.mark.peer

ROLES = ("dimse", "web", "worker", "courier", "mover")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """S3, KMS and a PostgreSQL that may crash."""
    with services(tmp_path_factory.mktemp("services"), durable=True) as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(ground: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """For opening a node's archive in this process."""
    for name, value in ground.credentials.items():
        monkeypatch.setenv(name, value)


def test_three_nodes_lose_nothing(ground: Services, bundles: str, pacs: Pacs, tmp_path: Path) -> None:
    """Node by node, S3 and PostgreSQL die under load: all that was acknowledged is analysed, and at the PACS once.

    The second node, policy `archive`, is lost for ever while its worker holds a job: another takes it over. The first, policy `land`,
    is killed with objects that lie on its disk alone: it brings them when it is back. Random and longer: ``tests.system.cluster``.
    """
    cluster = Cluster(tmp_path, ground, pacs, bundles, ["land", "archive", "archive"])
    first, second, _ = cluster.nodes
    load = Load(12)
    try:
        cluster.start({1: {"DICOM_NODE_FAILPOINT": "analyse.claimed:2"}})
        with cluster.sending(load):
            deadline = time.monotonic() + 120
            while "SIGKILL" not in second.log_text():
                assert time.monotonic() < deadline, second.log_text()[-2000:]
                time.sleep(0.02)
            second.lose()
            ground.s3.kill()
            load.more(12)
            landed = load.by_node[first.folder.name]
            load.await_acknowledged(lambda: load.by_node[first.folder.name] > landed + 2)
            first.kill_all()
            assert list((first.data_dir / "landed").rglob("*")), "nothing had landed"
            ground.s3.start()
            first.start()
            crash_postgresql(ground)
            load.more(12)
            acknowledged = len(load.acknowledged)
            load.await_acknowledged(lambda: len(load.acknowledged) > acknowledged + 2)
        cluster.judge(load)
        assert cluster.taken_over() >= 1
        for node in cluster.living:
            assert node.stop() == 0
    finally:
        cluster.close()


def test_roles_alone_are_one_node(ground: Services, bundles: str, pacs: Pacs, tmp_path: Path) -> None:
    """Five processes, started at once on an empty folder, are a node; a whole node beside them, and a copied folder, are refused."""
    environ = {**ground.new_archive(policy="land"), **quick_settings(bundles)}
    node = RunningNode(tmp_path / "node", toml=pacs.toml, environ=environ)
    node.command("keys", "init")
    running = {role: node.start_role(role) for role in ROLES}
    try:
        (item,) = drawn([0])
        deadline = time.monotonic() + 90
        while not answers(node) or not send(node, [item]):
            assert all(process.poll() is None for process in running.values()), node.log_text()[-3000:]
            assert time.monotonic() < deadline, node.log_text()[-3000:]
            time.sleep(0.2)
        refused = node.command("serve", expect=1)
        assert "another node (process" in refused.stderr
        await_reports(pacs, 1, node)
        # One of them stops in order; the others still are this node, so a copy of its folder is refused.
        running["web"].send_signal(signal.SIGTERM)
        assert running.pop("web").wait(60) == 0
        copy = RunningNode(tmp_path / "copy", environ=environ)
        shutil.copytree(node.data_dir, copy.data_dir)
        for arguments in (("serve",), ("serve", "--role", "mover")):
            refused = copy.command(*arguments, expect=1)
            assert "this data folder is a copy" in refused.stderr
        judge(node, pacs, [item])
    finally:
        ended = end(running)
    assert ended == dict.fromkeys(running, 0)
    assert "Traceback" not in node.log_text()


def answers(node: RunningNode) -> bool:
    """Whether the DIMSE door listens."""
    try:
        socket.create_connection(("127.0.0.1", node.dimse_port), timeout=1).close()
    except OSError:
        return False
    return True


def end(running: dict[str, subprocess.Popen[bytes]]) -> dict[str, int]:
    """SIGTERM to all; their exit statuses."""
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    return {role: process.wait(60) for role, process in running.items()}


QUIET = {f"DICOM_NODE_{name}__ENABLED": "false" for name in ("INFERENCE", "DIMSE", "DICOMWEB", "ADMIN", "DELIVERY")}


@contextmanager
def mover_on(node: RunningNode, host: str, *, instead: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run the node's mover meanwhile as on a machine called `host`, which has the folder `instead` in the place of the node's."""
    mount = "" if instead is None else f"mount --bind {instead} {node.data_dir} && "
    run = f"hostname {host} && {mount}exec {sys.executable} -m dicom_node serve --role mover --config {node.config}"
    with node.log.open("ab") as log:
        process = subprocess.Popen(["unshare", "--mount", "--uts", "sh", "-c", run], env=node.environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def await_ready(node: RunningNode, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many processes said that they are ready, `process` the last."""
    deadline = time.monotonic() + 120
    while node.log_text().count('"process.ready"') < count:
        assert process.poll() is None, node.log_text()[-3000:]
        assert time.monotonic() < deadline, node.log_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a copy in the place of the original, which needs root")
def test_a_clone_with_the_same_host_and_path_is_refused(ground: Services, tmp_path: Path) -> None:
    """A cloned machine has host name, path and the whole folder of the node; it is refused while the node lives.

    A second process on the very same folder, and the node again after a SIGKILL, are let in, whatever their containers are called.
    """
    node = RunningNode(tmp_path / "node", environ={**ground.new_archive(policy="land"), **QUIET, "DICOM_NODE_LOGGING__LEVEL": "debug"})
    node.command("keys", "init")
    with mover_on(node, "first") as first:
        await_ready(node, 1, first)
        clone = shutil.copytree(node.data_dir, tmp_path / "clone")
        with mover_on(node, "first", instead=clone) as refused:
            assert refused.wait(120) == 1, node.log_text()[-3000:]
        assert "this data folder is a copy" in node.log_text()
        with mover_on(node, "second") as beside:
            await_ready(node, 2, beside)
            beside.terminate()
            assert beside.wait(60) == 0
        first.kill()
        first.wait()
    with mover_on(node, "third") as again:
        await_ready(node, 3, again)
    with node.parts() as parts:
        assert [one.host for one in parts.nodes.all()] == ["third"]
    assert "Traceback" not in node.log_text()


@pytest.mark.parametrize("alone", [False, True])
def test_a_node_that_was_replaced_ends_at_once(ground: Services, tmp_path: Path, *, alone: bool) -> None:
    """A clone was let in while the node was silent: the node says so and ends with what it has running, whole or a role alone."""
    environ = {**ground.new_archive(policy="land"), **QUIET, "DICOM_NODE_DIMSE__ENABLED": "true", "DICOM_NODE_NODE__DRAIN_S": "600"}
    node = RunningNode(tmp_path / "node", environ={**environ, "DICOM_NODE_LOGGING__LEVEL": "debug"})
    node.command("keys", "init")
    process = node.start_role("dimse") if alone else node.start(wait=False).process
    assert process is not None
    try:
        await_ready(node, 1 if alone else 3, process)  # door, courier, mover
        with node.parts() as parts:
            (row,) = parts.nodes.all()
            number = (node.data_dir / "run" / "incarnation").read_text().split()[0]
            clone = Incarnation("clone", ended=frozenset({number}))
            parts.nodes.enter(node_id=row.node_id, incarnation=clone, host="clone", data_dir="/clone", version="1")
        assert process.wait(120) == 1, node.log_text()[-3000:]
        assert not answers(node)
        assert '"node.replaced"' in node.log_text()
        with node.parts() as parts:
            assert [(one.host, one.state) for one in parts.nodes.all()] == [("clone", "seen")]
    finally:
        process.kill()
        process.wait()
