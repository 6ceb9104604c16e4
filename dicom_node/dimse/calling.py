"""The socket of a call by TLS: pynetdicom's, with our handshake, and what went wrong with it in words.

References
----------
DICOM PS3.15 Annex B (secure transport connection profiles)
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final, cast

from pynetdicom.association import Association
from pynetdicom.transport import T_CONNECT, AddressInformation, AssociationSocket

from dicom_node.dimse.connection import TlsConnection
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer
from dicom_node.security import ClientTls
from dicom_node.tls_faults import Fault, handshake_fault

_UNHEARD: Final = Fault(
    "after the handshake it said nothing any more",
    "in TLS 1.3 a receiver refuses our certificate then: look at its log, and at our certificate",
)


class TellingConnection(TlsConnection):
    """Remembers why the peer was never heard: one of TLS 1.3 refuses our certificate after the handshake, when we speak already."""

    heard = False
    error: ssl.SSLError | None = None

    def recv_into(self, view: memoryview) -> int:
        """As its parent."""
        try:
            count = super().recv_into(view)
        except ssl.SSLError as error:
            self.error = error
            raise
        self.heard = self.heard or bool(count)
        return count

    def send(self, data: bytes | memoryview) -> int:
        """As its parent; where the peer has closed, the alert that it left is read."""
        try:
            return super().send(data)
        except OSError:
            if not self.heard:
                with contextlib.suppress(OSError):
                    self.recv_into(memoryview(bytearray(1)))
            raise

    sendall = send


class TlsSocket(AssociationSocket):
    """Connects, makes the TLS handshake within the association's connection timeout, and only then is connected for pynetdicom.

    Parameters
    ----------
    association, address
        As its parent's.
    tls
        Whom we believe and what we show.
    peer
        Who is called: its certificate must bear the name or address of its ``host``.
    send_s
        Longest wait for a peer that does not read.
    """

    def __init__(self, association: Association, address: AddressInformation, *, tls: ClientTls, peer: Peer, send_s: float) -> None:
        super().__init__(association, address=address)
        self._tls = tls
        self._peer = peer
        self._send_s = send_s
        self._connection: TellingConnection | None = None
        self._fault: PeerUnreachable | None = None

    def connect(self, primitive: T_CONNECT) -> None:
        """Connect; `primitive` tells the state machine how it went, and `fault` us why not."""
        connection = cast("socket.socket", self.socket)
        timeout_s = self.assoc.connection_timeout or 10.0
        try:
            connection.settimeout(timeout_s)
            connection.connect(primitive.address_info.as_tuple)
            secured = self._tls.secure(connection, host=self._peer.host, certificate=self._peer.certificate, timeout_s=timeout_s)
        except (OSError, PeerUnreachable) as error:
            self._fault = error if isinstance(error, PeerUnreachable) else None
            connection.close()
            self.socket = None
            primitive.result = "Evt17"  # Transport connection closed
        else:
            self._connection = TellingConnection(secured, send_s=self._send_s)
            self.socket = cast("socket.socket", self._connection)
            self._is_connected = True
            self.assoc.requestor.address_info = AddressInformation.from_tuple(secured.getsockname())
            primitive.result = "Evt2"  # Transport connection confirmation
        self.provider_queue.put(primitive)
        self._ready.set()

    @property
    def fault(self) -> str:
        """What was wrong with TLS, and the remedy; empty: nothing."""
        if self._fault is not None:
            return str(self._fault)
        if self._connection is None or self._connection.heard:
            return ""
        if self._connection.error is not None:
            return f"TLS with {self._peer.host}: {handshake_fault(self._connection.error, calling=True)}"
        return f"TLS with {self._peer.host}: {_UNHEARD}"

    def release(self) -> None:
        """Give the socket back, which the library may leave open."""
        if self._connection is not None:
            self._connection.close()
