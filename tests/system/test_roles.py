"""Roles that run alone tell how they are; what hangs does not keep a node from stopping."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.lying_s3 import LyingS3
from tests.ports import free_port
from tests.postgresql_server import PostgresqlServer, started
from tests.system.running_node import START_S, RunningNode

QUIET = {
    "DICOM_NODE_INFERENCE__ENABLED": "false",
    "DICOM_NODE_DIMSE__ENABLED": "false",
    "DICOM_NODE_DICOMWEB__ENABLED": "false",
    "DICOM_NODE_NODE__DRAIN_S": "0",
}


def page(port: int, path: str) -> str:
    """Return what an admin page says; empty while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool], node: RunningNode) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, node.log_text()[-3000:]
        time.sleep(0.1)


@contextmanager
def role(node: RunningNode, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a role alone meanwhile."""
    with node.log.open("ab") as log:
        command = [sys.executable, "-m", "dicom_node", "serve", "--role", name, "--config", str(node.config), *arguments]
        process = subprocess.Popen(command, env=node.environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_role_alone_serves_its_own_pages(tmp_path: Path) -> None:
    """Each on a port of its own: ready or not, its counters; one whose port another has says so and works all the same."""
    node, own = RunningNode(tmp_path, environ=QUIET), free_port()
    with role(node, "courier") as courier, role(node, "mover", "--admin-port", str(own)) as mover:
        wait_for(lambda: page(node.admin_port, "readyz") == page(own, "readyz") == "ready\n", node)
        assert page(own, "healthz") == "alive\n"
        assert 'dicom_node_process_ready{process="courier"} 1.0' in page(node.admin_port, "metrics")
        told = page(own, "metrics")
        assert 'dicom_node_process_ready{process="mover"} 1.0' in told
        assert "dicom_node_moved_bytes_total 0.0" in told
        assert "dicom_node_oldest_ready_seconds" in told
        with role(node, "courier") as second:
            wait_for(lambda: "admin.not_served" in node.log_text(), node)
            assert "--admin-port" in node.log_text()
            second.send_signal(signal.SIGTERM)
            assert second.wait(60) == 0
        for process in (courier, mover):
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert page(own, "readyz") == ""


@contextmanager
def frozen(server: PostgresqlServer) -> Iterator[None]:
    """Stop every process of a server in its tracks meanwhile: connections stay open, nothing answers."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.peer
@pytest.mark.parametrize("alone", [False, True])
def test_a_hung_database_does_not_keep_a_node_from_stopping(tmp_path: Path, *, alone: bool) -> None:
    """PostgreSQL takes statements and never answers: the node ends within node.drain_s and ten seconds, and says what did not end."""
    with started(durable=False) as server, LyingS3() as s3:
        environ = {
            **QUIET,
            "AWS_ACCESS_KEY_ID": "test-access-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret-key",
            "DICOM_NODE_DATABASE__URL": f"postgresql://node@127.0.0.1:{server.port}/postgres",
            "DICOM_NODE_ARCHIVE__STORE": "s3",
            "DICOM_NODE_ARCHIVE__BUCKET": s3.bucket,
            "DICOM_NODE_ARCHIVE__ENDPOINT_URL": s3.endpoint,
            "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
        }
        node = RunningNode(tmp_path / "node", environ=environ)
        node.command("keys", "init")
        if alone:
            with role(node, "courier") as process:
                wait_for(node.ready, node)
                with frozen(server):
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(60) == 1
        else:
            node.start()
            with frozen(server):
                assert node.stop() == 1
    said = node.log_text()
    assert '"event": "stop.cut"' in said
    assert "MainThread in " in said
