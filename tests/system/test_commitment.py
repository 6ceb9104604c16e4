"""Storage Commitment of a whole node: what it said Success to is kept, whatever is killed."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import FileMetaDataset
from pynetdicom import AE

from tests.dicom_node.commitment_peer import CommitmentPeer, transaction
from tests.dicom_node.door import SECONDARY_CAPTURE, draw
from tests.system.running_node import RunningNode


def test_a_request_survives_a_kill(tmp_path: Path) -> None:
    """Every process is killed right after the request was answered 0000: the node that starts again reports to the peer."""
    with CommitmentPeer() as peer:
        toml = f"""
[inference]
enabled = false

[[peers]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = {peer.port}
"""
        node = RunningNode(tmp_path / "node", toml=toml).start()
        try:
            picture = draw()
            entity = AE("PACS")
            entity.add_requested_context(SECONDARY_CAPTURE, "1.2.840.10008.1.2.1")
            association = entity.associate("127.0.0.1", node.dimse_port, ae_title="DERM_NODE")
            picture.file_meta = FileMetaDataset()
            picture.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
            assert association.send_c_store(picture).Status == 0
            association.release()
            pairs = [(str(picture.SOPClassUID), str(picture.SOPInstanceUID)), (SECONDARY_CAPTURE, "1.2.3.4")]
            uid = transaction()
            assert peer.ask(node.dimse_port, uid, pairs, then=node.kill_all) == 0
            assert peer.reports == []
            node.start()
            (report,) = peer.await_reports(1)  # when the lease of the dead one ends
            assert (report.event_type, report.here, report.data_set.TransactionUID) == (2, True, uid)
            assert (report.committed, report.failed) == ([pairs[0]], {"1.2.3.4": 0x0112})
        finally:
            if node.process is not None:
                node.stop()
