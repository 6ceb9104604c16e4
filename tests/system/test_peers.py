"""Peers of a whole running node: added, refused, removed and reported to while it runs, as its operator does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from tests.system.running_node import RunningNode, running_node

ENVIRON = {"DICOM_NODE_INFERENCE__ENABLED": "false", "DICOM_NODE_DIMSE__ACCEPT_UNKNOWN_PEERS": "never"}


def echoes(node: RunningNode) -> bool:
    """Whether AE title NEWCAM of this machine is let in, and answered."""
    entity = AE(ae_title="NEWCAM")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", node.dimse_port, ae_title="DERM_NODE")
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return bool(status.Status == 0)


def until(condition: Callable[[], bool]) -> None:
    """Wait until something has come about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_peer_comes_and_goes_while_the_node_runs(tmp_path: Path) -> None:
    """A stranger is refused; the diary has the command that lets it in; soon after that it is in, and after its removal out again."""
    with running_node(tmp_path, environ=ENVIRON) as node:
        assert not echoes(node)
        until(lambda: "AE title 'NEWCAM' at 127.0.0.1 is no peer" in node.command("refusals").stdout)
        assert "peers add NAME --ae-title NEWCAM --host 127.0.0.1" in node.command("refusals").stdout
        node.command("peers", "add", "newcam", "--ae-title", "NEWCAM", "--host", "127.0.0.1")
        until(lambda: echoes(node))
        assert "newcam" in node.command("peers", "list").stdout
        node.command("peers", "remove", "newcam")
        until(lambda: not echoes(node))
        assert '"peers.changed"' in node.log_text()
