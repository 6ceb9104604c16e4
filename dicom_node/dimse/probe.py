"""Asks a peer what it would take of us: contexts, C-ECHO, a query that matches nothing; changes nothing there.

References
----------
DICOM PS3.8 Section 9.3.3 (A-ASSOCIATE-AC), PS3.4 Annex A (Verification), C (Query/Retrieve), J (Storage Commitment)
"""

from __future__ import annotations

import queue
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicom_node.dimse.commitment import ALL_COMMITTED, PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST_STORAGE_COMMITMENT
from dicom_node.dimse.scu import StorageSCU
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer

VERIFICATION = "1.2.840.10008.1.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
SERVICES: Mapping[str, str] = {
    PUSH_MODEL: "storage commitment",
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

    def commit(self, peer: Peer, pair: Pair, sop_instance_uid: str, *, wait_s: float = 5.0) -> tuple[int | None, bool | None]:
        """Ask a peer to commit an instance (its SOP class stands in `pair`).

        Returns
        -------
        tuple
            Status of N-ACTION, None without an answer; and whether the instance is committed, None when no report came on this
            association within `wait_s`: peers may send it on one of their own.

        Raises
        ------
        PeerUnreachable
            No association.
        """
        heard: queue.SimpleQueue[bool] = queue.SimpleQueue()
        wanted = Dataset()
        wanted.TransactionUID = f"2.25.{secrets.randbits(120)}"
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = pair[0], sop_instance_uid
        wanted.ReferencedSOPSequence = [reference]

        def hear(event: evt.Event) -> tuple[int, None]:
            told = event.event_information
            if told.get("TransactionUID") == wanted.TransactionUID:
                heard.put(event.event_type == ALL_COMMITTED)
            return 0x0000, None

        contexts = [build_context(PUSH_MODEL, list(PLAIN))]
        with self._association(peer, contexts, evt_handlers=[(evt.EVT_N_EVENT_REPORT, hear)]) as association:
            if not association.is_established:
                return None, None
            answer, _ = association.send_n_action(wanted, REQUEST_STORAGE_COMMITMENT, UID(PUSH_MODEL), UID(PUSH_MODEL_INSTANCE))
            if "Status" not in answer or answer.Status != 0:
                return int(answer.Status) if "Status" in answer else None, None
            try:
                return 0, heard.get(timeout=wait_s)
            except queue.Empty:
                return 0, None


def _contexts(pairs: Iterable[Pair]) -> list[PresentationContext]:
    return [build_context(abstract, transfer) for abstract, transfer in pairs]


def _accepted(association: Association) -> set[Pair]:
    return {(str(context.abstract_syntax), str(context.transfer_syntax[0])) for context in association.accepted_contexts}
