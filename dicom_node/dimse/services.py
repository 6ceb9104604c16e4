"""What a DIMSE service is to the door, beyond Verification and Storage: contexts that it serves, and how it answers a request.

A service runs in its association's own thread, answers by ``association.dimse.send_msg(response, context_id)``, looks at
``association.dimse.cancel_req`` for a C-CANCEL (PS3.7 Section 9.3.2.3), and returns when the operation is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

    from dicom_node.dimse.scp import AcceptedAssociation
    from dicom_node.peers import Peer


class Service(Protocol):
    """Query, retrieve, storage commitment."""

    @property
    def abstract_syntaxes(self) -> Mapping[str, tuple[str, ...]]:
        """What is served: abstract syntax -> transfer syntaxes accepted for it."""

    @property
    def sends_instances(self) -> bool:
        """Whether it sends instances back on the same association (C-GET): then the peer may be SCP of storage classes (PS3.7 D.3.3.4)."""

    def permitted(self, peer: Peer | None) -> bool:
        """Whether a caller may use it; None: an unknown one that the door lets in. Else its contexts are refused one by one."""

    def serve(self, association: AcceptedAssociation, context: PresentationContext, request: Any) -> None:
        """Answer a request (a primitive of pynetdicom) received in a context; raises nothing that the peer caused."""


@runtime_checkable
class Negotiating(Protocol):
    """A service that takes part in SOP Class Extended Negotiation (PS3.7 D.3.3.5)."""

    def negotiated(self, abstract_syntax: str, information: bytes) -> bytes:
        """Answer the Service-class-application-information that was proposed for a SOP class; empty: no answer."""
