"""What we ask of pynetdicom beyond its documented interface, in one place, and its process-wide switches.

The receiver takes over pynetdicom's reading of the socket. pyproject.toml pins the version; a test walks `INTERNALS` and fails
loudly when a new version lacks something named here or changed its code.
"""

from __future__ import annotations

import logging
from typing import Final

from pynetdicom import _config

VERSION: Final = "3.0.4"

INTERNALS: Final = (
    # (module, attribute path, first 16 hexadecimal digits of the SHA-256 of its source): what receive.py and scp.py override or stand on
    ("pynetdicom.dul", "DULServiceProvider.__init__", "a"),
    ("pynetdicom.dul", "DULServiceProvider._decode_pdu", "a"),
    ("pynetdicom.dul", "DULServiceProvider._is_transport_event", "a"),
    ("pynetdicom.dul", "DULServiceProvider._process_recv_primitive", "a"),
    ("pynetdicom.dul", "DULServiceProvider._read_pdu_data", "a"),
    ("pynetdicom.dul", "DULServiceProvider._send", "a"),
    ("pynetdicom.dul", "DULServiceProvider.kill_dul", "a"),
    ("pynetdicom.dul", "DULServiceProvider.receive_pdu", "a"),
    ("pynetdicom.dul", "DULServiceProvider.run_reactor", "a"),
    ("pynetdicom.dul", "DULServiceProvider.send_pdu", "a"),
    ("pynetdicom.dul", "DULServiceProvider.stop_dul", "a"),
    ("pynetdicom.fsm", "AA_1", "a"),
    ("pynetdicom.fsm", "AA_8", "a"),
    ("pynetdicom.fsm", "AE_6", "a"),
    ("pynetdicom.fsm", "AR_5", "a"),
    ("pynetdicom.fsm", "DT_2", "a"),
    ("pynetdicom.fsm", "StateMachine.do_action", "a"),
    ("pynetdicom.acse", "ACSE._negotiate_as_acceptor", "a"),
    ("pynetdicom.acse", "ACSE.send_reject", "a"),
    ("pynetdicom.association", "Association.__init__", "a"),
    ("pynetdicom.association", "Association._abort_blocking", "a"),
    ("pynetdicom.association", "Association._run_reactor", "a"),
    ("pynetdicom.association", "Association.kill", "a"),
    ("pynetdicom.association", "Association.run_reactor", "a"),
    ("pynetdicom.dimse", "DIMSEServiceProvider.get_msg", "a"),
    ("pynetdicom.dimse", "DIMSEServiceProvider.receive_primitive", "a"),
    ("pynetdicom.transport", "AssociationSocket.__init__", "a"),
    ("pynetdicom.transport", "AssociationSocket._shutdown_socket", "a"),
    ("pynetdicom.transport", "AssociationSocket.close", "a"),
    ("pynetdicom.transport", "AssociationSocket.send", "a"),
    ("pynetdicom.transport", "RequestHandler._create_association", "a"),
)


def quiet() -> None:
    """Switch off pynetdicom's own logging: it writes patient identifiers and costs time on the data path.

    Process-wide, like the settings themselves; called by every constructor that uses the library.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    _config.STORE_RECV_CHUNKED_DATASET = False  # would write plaintext to a temporary file
    logger = logging.getLogger("pynetdicom")
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
