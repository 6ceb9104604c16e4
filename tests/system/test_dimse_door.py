"""The DIMSE door of a whole node: TLS, several receivers on one port, peers added while it runs, its doctor, its diary."""

from __future__ import annotations

import json
import os
import signal
import ssl
import threading
import time
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyFind

from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer
from dicom_node.security import ClientTls
from tests.certificates import Authority
from tests.system.pacs import drawn
from tests.system.running_node import RunningNode, running_node

QUIET = {"DICOM_NODE_INFERENCE__ENABLED": "false"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Vouches for node and callers."""
    (tmp_path / "authority").mkdir()
    return Authority(tmp_path / "authority")


def stored(node: RunningNode, uids: list[str]) -> list[str]:
    """Which of the instances the archive holds whole."""
    with node.parts() as parts:
        found = []
        for uid in uids:
            with parts.archive.open(uid) as instance:
                assert sum(map(len, instance.chunks())) == instance.record.summary.byte_count
            found.append(uid)
    return found


def test_a_door_behind_tls(tmp_path: Path, authority: Authority) -> None:
    """Mutual TLS, a peer by its certificate; the node's own commands go through; plaintext and strangers do not, and stand in the diary."""
    door, scanner, other = authority.issue("node"), authority.issue("scanner"), authority.issue("other")
    toml = f"""
[tls]
enabled = true
certificate = "{door.certificate}"
key = "{door.key}"
authorities = "{authority.file}"

[[peers]]
name = "scanner"
ae_title = "SCANNER"
host = "127.0.0.1"
certificate = "{scanner.fingerprint}"
"""
    with running_node(tmp_path / "node", toml=toml, environ=QUIET) as node:
        sent = node.command("send", "--demo").stdout
        assert "stored" in sent.lower() or "success" in sent.lower(), sent
        items = drawn(range(3))
        peer = Peer("node", "DERM_NODE", "127.0.0.1", node.dimse_port, tls=True)
        scu = StorageSCU(ae_title="SCANNER", tls=ClientTls(authority.file, scanner.certificate, scanner.key))
        assert [outcome for _, outcome in scu.store(peer, items)] == [Stored(0)] * 3
        assert len(stored(node, [item.sop_instance_uid for item in items])) == 3
        stranger = StorageSCU(ae_title="SCANNER", tls=ClientTls(authority.file, other.certificate, other.key))
        with pytest.raises(PeerUnreachable, match="reject"):
            stranger.echo(peer)
        with pytest.raises(PeerUnreachable):
            StorageSCU(ae_title="SCANNER", connect_s=5.0).echo(Peer("node", "DERM_NODE", "127.0.0.1", node.dimse_port))
        context = ssl.create_default_context(cafile=str(authority.file))
        context.load_cert_chain(scanner.certificate, scanner.key)
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(StudyFind)
        association = entity.associate("127.0.0.1", node.dimse_port, ae_title="DERM_NODE", tls_args=(context, "127.0.0.1"))
        wanted = Dataset()
        wanted.QueryRetrieveLevel, wanted.StudyInstanceUID, wanted.PatientName = "STUDY", "", ""
        answers = [status.Status for status, _ in association.send_c_find(wanted, StudyFind)]
        association.release()
        assert answers[-1] == 0
        assert len(answers) > 1
        deadline = time.monotonic() + 30
        while True:
            refused = json.loads(node.command("refusals", "--json").stdout)
            if {"tls", "association"} <= {one["kind"] for one in refused}:
                break
            assert time.monotonic() < deadline, refused
            time.sleep(0.2)
        checks = node.command("doctor", "--json", expect=None).stdout
        assert '"own door, DIMSE"' in checks


def test_peers_come_and_go_while_it_runs(tmp_path: Path) -> None:
    """`peers add` lets a caller in without a restart, `peers remove` turns it away again; the diary says how to let it in."""
    environ = {**QUIET, "DICOM_NODE_DIMSE__ACCEPT_UNKNOWN_PEERS": "never"}
    with running_node(tmp_path / "node", environ=environ) as node:
        peer = Peer("node", "DERM_NODE", "127.0.0.1", node.dimse_port)
        scu = StorageSCU(ae_title="NEWCAM")

        def let_in() -> bool:
            try:
                scu.echo(peer)
            except PeerUnreachable:
                return False
            return True

        def becomes(wanted: bool) -> None:
            deadline = time.monotonic() + 30
            while let_in() is not wanted:
                assert time.monotonic() < deadline, node.log_text()[-2000:]
                time.sleep(0.2)

        assert not let_in()
        node.command("peers", "add", "camera", "--ae-title", "NEWCAM", "--host", "127.0.0.1")
        becomes(wanted=True)
        assert "camera" in node.command("peers", "list").stdout
        node.command("peers", "remove", "camera")
        becomes(wanted=False)
        refusals = json.loads(node.command("refusals", "--json").stdout)
        assert any("peers add" in one["remedy"] and one["calling_ae_title"] == "NEWCAM" for one in refusals)


def test_a_receiver_dies_under_load(tmp_path: Path) -> None:
    """Of two receivers on one port one is killed again and again while four senders store: whoever was told Success finds it stored."""
    with running_node(tmp_path / "node", environ={**QUIET, "DICOM_NODE_DIMSE__PROCESSES": "2"}) as node:
        peer = Peer("node", "DERM_NODE", "127.0.0.1", node.dimse_port)
        acknowledged: list[str] = []
        over = threading.Event()

        def send(number: int) -> None:
            scu = StorageSCU(ae_title=f"SENDER{number}")
            for turn in range(200):
                if over.is_set():
                    return
                try:
                    for item, outcome in scu.store(peer, drawn([1000 * number + turn])):
                        if outcome == Stored(0):
                            acknowledged.append(item.summary.sop_instance_uid)
                except PeerUnreachable:
                    time.sleep(0.1)

        senders = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for sender in senders:
            sender.start()
        for _ in range(3):
            before = len(acknowledged)
            deadline = time.monotonic() + 60
            while len(acknowledged) < before + 5:
                assert time.monotonic() < deadline, node.log_text()[-3000:]
                time.sleep(0.05)
            receivers = [process_id for process_id, role in node.children().items() if role == "dimse"]
            if receivers:
                os.kill(receivers[-1], signal.SIGKILL)
        over.set()
        for sender in senders:
            sender.join()
        node.await_ready()
        assert len([process_id for process_id, role in node.children().items() if role == "dimse"]) == 2
        assert len(stored(node, acknowledged)) == len(acknowledged) >= 15
