"""The audit trail of a whole node goes to a repository elsewhere; while too much of it waits, the node refuses, and recovers alone."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.errors import Refused
from dicom_node.peers import Peer
from tests.certificates import Authority
from tests.dicom_node.audit_repository import AuditRepository
from tests.dicom_node.audit_schema import check
from tests.system.pacs import drawn
from tests.system.running_node import RunningNode, get, running_node


def environment(listener: AuditRepository, authority: Authority) -> dict[str, str]:
    """Of a node that analyses nothing and sends its trail to a repository of the tests."""
    return {
        "DICOM_NODE_INFERENCE__ENABLED": "false",
        "DICOM_NODE_AUDIT__SYSLOG_HOST": "localhost",
        "DICOM_NODE_AUDIT__SYSLOG_PORT": str(listener.port),
        "DICOM_NODE_AUDIT__AUTHORITIES": str(authority.file),
        "DICOM_NODE_AUDIT__DEGRADED_AFTER": "2",
        "DICOM_NODE_AUDIT__REFUSE_AFTER": "6",
    }


def store(node: RunningNode, seeds: range) -> list[object]:
    """Send instances, one by one."""
    scu = StorageSCU(ae_title="CAMERA")
    peer = Peer("node", "DERM_NODE", "127.0.0.1", node.dimse_port)
    return [outcome for item in drawn(seeds) for _, outcome in scu.store(peer, [item])]


def gauge(node: RunningNode, name: str) -> float:
    """Read a metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{node.admin_port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), -1.0)


def await_that(node: RunningNode, condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"{readiness(node)}\n{node.log_text()[-3000:]}")


def readiness(node: RunningNode) -> tuple[int, str]:
    """What /readyz says."""
    status, body = get(f"http://127.0.0.1:{node.admin_port}/readyz")
    return status, body.decode()


def test_away_then_too_much_then_back(tmp_path: Path) -> None:
    """The repository away, nothing waits for it: degraded, then 0xA700 and 503 with the reason, then, when it is back, all as before."""
    authority = Authority(tmp_path / "authority")
    listener = AuditRepository(authority.issue("repository"))
    with running_node(tmp_path / "node", environ=environment(listener, authority)) as node:
        assert store(node, range(3)) == [Stored(0)] * 3
        # The node's own duties are recorded too
        await_that(node, lambda: "audit records, the oldest" in readiness(node)[1])
        assert readiness(node)[1].startswith("ready\ndegraded: ")
        await_that(node, lambda: not isinstance(store(node, range(1))[0], Stored))
        waiting = gauge(node, "dicom_node_audit_backlog")
        (refused,) = store(node, range(20, 21))
        assert isinstance(refused, Refused)
        assert refused.status == 0xA700
        assert "audit" in refused.comment
        said = node.command("send", "--demo", "--to", node.base_url, expect=1)
        assert "answered 503" in said.stdout + said.stderr
        # The diary learns it some moments later, once for all
        await_that(node, lambda: "audit.refuse_after" in node.command("refusals", "--json").stdout)
        assert readiness(node)[0] == 503
        assert "audit.refuse_after" in readiness(node)[1]
        assert gauge(node, "dicom_node_audit_backlog") == waiting > 6, "what is refused for it leaves no records that wait"
        checked = node.command("check", expect=1)
        assert "no connection to the audit record repository" in checked.stdout + checked.stderr
        with listener:
            listener.await_numbers(range(1, int(waiting) + 1))
            await_that(node, lambda: isinstance(store(node, range(20, 21))[0], Stored))
            await_that(node, lambda: gauge(node, "dicom_node_audit_backlog") == 0)
            await_that(node, lambda: readiness(node) == (200, "ready\n"))
            checked = node.command("check", expect=None)
            assert "takes connections, and ends them in order" in checked.stdout + checked.stderr
            assert gauge(node, "dicom_node_audit_records_total") == len(set(listener.numbers))
            assert gauge(node, "dicom_node_audit_failures_total") >= 1
            assert listener.numbers == list(range(1, len(listener.numbers) + 1))
            actions = [check(message.xml).findall("EventIdentification/EventTypeCode")[-1].get("csd-code") for message in listener.messages]
            assert actions[:2] == ["keys.bound", "application.started"]
            assert actions.count("instance.received") >= 4
        log = node.log_text()
        assert "audit_sink.failed" in log
        for item in drawn(range(3)):
            for word in (item.sop_instance_uid, item.summary.study_instance_uid):
                assert word not in log


def test_files_that_cannot_be_used_stop_nothing_else(tmp_path: Path) -> None:
    """A node whose file of authorities is no certificate says so, takes instances in, and its other work goes on."""
    authority = Authority(tmp_path / "authority")
    listener = AuditRepository(authority.issue("repository"))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    environ = environment(listener, authority) | {"DICOM_NODE_AUDIT__AUTHORITIES": str(nonsense)}
    with running_node(tmp_path / "node", environ=environ) as node:
        assert store(node, range(1)) == [Stored(0)]
        await_that(node, lambda: "audit_sink.files_unusable" in node.log_text())
        assert readiness(node)[0] == 200
        checked = node.command("check", expect=1)
        assert "nonsense.pem" in checked.stdout + checked.stderr
