"""What we ask of pynetdicom beyond its documented interface, in one place, and its process-wide switches.

Our `UpperLayer` takes over pynetdicom's reading of the socket, in both roles. pyproject.toml pins the version; a test walks
`INTERNALS` and fails loudly when a new version lacks something named here or changed its code.
"""

from __future__ import annotations

import logging
from typing import Final

from pynetdicom import _config

VERSION: Final = "3.0.4"

INTERNALS: Final = (
    # (module, attribute path, first 16 hexadecimal digits of the SHA-256 of its source): what we override or stand on
    ("pynetdicom.acse", "ACSE._check_user_identity", "a890d3db8e5bfdaf"),
    ("pynetdicom.acse", "ACSE._check_sop_class_extended", "159f1a8191089473"),
    ("pynetdicom.acse", "ACSE._negotiate_as_acceptor", "fffd360957c42a8e"),
    ("pynetdicom.acse", "ACSE._negotiate_as_requestor", "507959152c5896c6"),
    ("pynetdicom.acse", "ACSE.is_aborted", "ad2eb3f545a9ed05"),
    ("pynetdicom.acse", "ACSE.send_reject", "700998293bbcb6c9"),
    ("pynetdicom.ae", "ApplicationEntity._create_socket", "f56bca8888e1ce9f"),
    ("pynetdicom.ae", "ApplicationEntity.associate", "dbc8cf47090386b2"),
    ("pynetdicom.association", "Association.__init__", "eb07516b8009ad8f"),
    ("pynetdicom.association", "Association._abort_blocking", "10b43ef8c63c6764"),
    ("pynetdicom.association", "Association._run_reactor", "f28838c5559e462a"),
    ("pynetdicom.association", "Association._serve_request", "2f24c1759cdf6c8c"),
    ("pynetdicom.association", "Association.kill", "8f9713666a7f4cff"),
    ("pynetdicom.association", "Association.release", "c7d713502b77d702"),
    ("pynetdicom.association", "Association.request", "928cd0e3013c9ab9"),
    ("pynetdicom.association", "Association.run_reactor", "ed8bbbe3b3d6ddae"),
    ("pynetdicom.dimse", "DIMSEServiceProvider.get_msg", "890e3e04283f5aeb"),
    ("pynetdicom.dimse", "DIMSEServiceProvider.receive_primitive", "5f99c86b14a15cef"),
    ("pynetdicom.dul", "DULServiceProvider.__init__", "c82dafa9438ddf70"),
    ("pynetdicom.dul", "DULServiceProvider._decode_pdu", "fc71dd1bf853e1ce"),
    ("pynetdicom.dul", "DULServiceProvider._is_transport_event", "8725ed03bb8fbdef"),
    ("pynetdicom.dul", "DULServiceProvider._process_recv_primitive", "4c0ebbb3e646e35e"),
    ("pynetdicom.dul", "DULServiceProvider._read_pdu_data", "19f2d4e38c13c835"),
    ("pynetdicom.dul", "DULServiceProvider._send", "a850a7919e68484e"),
    ("pynetdicom.dul", "DULServiceProvider.kill_dul", "5ceccf8dd01c2072"),
    ("pynetdicom.dul", "DULServiceProvider.receive_pdu", "fa67339834ca998c"),
    ("pynetdicom.dul", "DULServiceProvider.run_reactor", "e3a10eb3a0931e48"),
    ("pynetdicom.dul", "DULServiceProvider.send_pdu", "7cbce5da8594124e"),
    ("pynetdicom.dul", "DULServiceProvider.stop_dul", "28a7e0be126e7b30"),
    ("pynetdicom.fsm", "AA_1", "8495a4665f7ad3c9"),
    ("pynetdicom.fsm", "AA_2", "a58069d8299198e0"),
    ("pynetdicom.fsm", "AA_4", "de72d40c80b07e3e"),
    ("pynetdicom.fsm", "AA_8", "06c83317f08831fd"),
    ("pynetdicom.fsm", "AE_5", "35e8617fcc8d3186"),
    ("pynetdicom.fsm", "AE_6", "385d595ed49432af"),
    ("pynetdicom.fsm", "AR_5", "dc32d2343f420b32"),
    ("pynetdicom.fsm", "DT_2", "9ec543394e0b49eb"),
    ("pynetdicom.fsm", "StateMachine.do_action", "9a883f44c7f31641"),
    ("pynetdicom.presentation", "negotiate_as_acceptor", "d5413f08f0ac7b32"),
    ("pynetdicom.timer", "Timer", "77ddae7423f544b1"),
    ("pynetdicom.transport", "AssociationSocket.__init__", "1f0325fdef2cc353"),
    ("pynetdicom.transport", "AssociationSocket._shutdown_socket", "e2b2628faa81a578"),
    ("pynetdicom.transport", "AssociationSocket.close", "c726c8db53813d55"),
    ("pynetdicom.transport", "AssociationSocket.connect", "aeeeae413bd339dc"),
    ("pynetdicom.transport", "AssociationSocket.send", "1ea8158c0b51faca"),
    ("pynetdicom.transport", "RequestHandler._create_association", "05c8d12b79863cdb"),
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
