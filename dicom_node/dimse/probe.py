"""Asks a peer what it would take of us: contexts, C-ECHO, a query that matches nothing; changes nothing there.

References
----------
DICOM PS3.8 Section 9.3.3 (A-ASSOCIATE-AC), PS3.4 Annex A (Verification), C (Query/Retrieve), J (Storage Commitment)
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicom_node.dimse.scu import StorageSCU
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer

VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
SERVICES: Mapping[str, str] = {
    COMMITMENT: "storage commitment",
    STUDY_ROOT_FIND: "query (Study Root C-FIND)",
    STUDY_ROOT_MOVE: "retrieve (Study Root C-MOVE)",
    STUDY_ROOT_GET: "retrieve (Study Root C-GET)",
}
PLAIN = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
_AT_ONCE = 100  # of the 128 contexts that an association can have
Pair = tuple[str, str]
"""SOP class and transfer syntax."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a peer said."""

    implementation: str
    """Its Implementation Version Name, or Class UID; empty when it names neither."""
    maximum_length: int
    """Longest P-DATA-TF it takes, in bytes; 0: any."""
    echo: int | None
    """Status of C-ECHO; None: no answer, or it accepts no Verification."""
    services: frozenset[str]
    """Of `SERVICES`, those whose contexts it accepts."""
    pairs: frozenset[Pair]
    """Of those asked for, the accepted ones."""


class Probe(StorageSCU):
    """Asks. Made as a `StorageSCU` is."""

    def visit(self, peer: Peer, pairs: Sequence[Pair]) -> Visit:
        """Associate and see what the peer accepts; one association for every hundred pairs.

        Raises
        ------
        PeerUnreachable
            No association: why, and what to look at.
        """
        first, *others = [pairs[start : start + _AT_ONCE] for start in range(0, len(pairs), _AT_ONCE)] or [()]
        offered = [build_context(VERIFICATION), *(build_context(uid, list(PLAIN)) for uid in SERVICES)]
        with self._association(peer, [*offered, *_contexts(first)]) as association:
            accepted = _accepted(association)
            echo = None
            if any(uid == VERIFICATION for uid, _ in accepted):
                answer = association.send_c_echo()
                echo = int(answer.Status) if "Status" in answer else None
            version = association.acceptor.implementation_version_name or association.acceptor.implementation_class_uid or ""
            maximum_length = association.acceptor.maximum_length or 0
        for batch in others:
            with self._association(peer, _contexts(batch)) as association:
                accepted |= _accepted(association)
        return Visit(
            implementation=str(version),
            maximum_length=maximum_length,
            echo=echo,
            services=frozenset(uid for uid, _ in accepted if uid in SERVICES),
            pairs=frozenset(pair for pair in pairs if pair in accepted),
        )

    def find_nothing(self, peer: Peer) -> tuple[int, int]:
        """Search a peer for a study that nobody has. Returns the status of C-FIND, and how many matches came.

        Raises
        ------
        PeerUnreachable
            No association, no such context, or no answer.
        """
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "STUDY"
        wanted.StudyInstanceUID = f"2.25.{secrets.randbits(120)}"
        wanted.StudyDate = ""
        with self._association(peer, [build_context(STUDY_ROOT_FIND, list(PLAIN))]) as association:
            if not association.is_established:
                raise PeerUnreachable(f"peer {peer.name} takes no query any more")
            matches = 0
            for status, _identifier in association.send_c_find(wanted, UID(STUDY_ROOT_FIND)):
                if "Status" not in status:
                    break
                if status.Status in (0xFF00, 0xFF01):  # Pending
                    matches += 1
                    continue
                return int(status.Status), matches
        raise PeerUnreachable(f"peer {peer.name} gave no answer to a query; look at its log")


def _contexts(pairs: Iterable[Pair]) -> list[PresentationContext]:
    return [build_context(abstract, transfer) for abstract, transfer in pairs]


def _accepted(association: Association) -> set[Pair]:
    return {(str(context.abstract_syntax), str(context.transfer_syntax[0])) for context in association.accepted_contexts}
