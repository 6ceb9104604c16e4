"""Puts what the door refuses into words for whoever looks after it: why, and what helps; for the refusal diary.

Nothing of a data set stands in them. AE titles are what a stranger wrote: the diary escapes them, commands that are proposed quote them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID
from pynetdicom.presentation import PresentationContext

from dicom_node.dimse.vestibule import TOO_MANY_REQUESTS
from dicom_node.peers import Peer, Peers
from dicom_node.security import handshake_fault
from storage.records import Origin
from storage.refusals import Diary

_PLACE = re.compile(r" at byte \d+")
_STATUS_REMEDIES: Final[Mapping[int, str]] = {
    0x0111: "`dicom-node quarantine list` and `quarantine show` tell the two apart",
    0x0122: "send a SOP class and transfer syntax of `dicom-node conformance`",
    0xA700: "free space on the node's disk, or look at its store and database: `dicom-node check`; the sender may try again",
    0xA900: "look at the sender: it announces another instance than it sends",
    0xC000: "send the original file; this copy is broken",
}


class Rejected(Protocol):
    """What an A-ASSOCIATE-RJ says (`dicom_node.dimse.scp.Rejection`)."""

    @property
    def result(self) -> int:
        """1: permanent, 2: transient."""

    @property
    def source(self) -> int:
        """1: us, 3: the presentation layer."""

    @property
    def diagnostic(self) -> int:
        """The reason's number."""

    @property
    def reason(self) -> str:
        """In words."""

    @property
    def remedy(self) -> str:
        """In words; empty: it follows from the numbers."""


class Words:
    """Says why, and what helps.

    Parameters
    ----------
    diary
        Takes note.
    peers
        Who is known.
    ae_title
        Ours.
    """

    def __init__(self, diary: Diary, *, peers: Peers, ae_title: str) -> None:
        self._diary = diary
        self._peers = peers
        self._ae_title = ae_title

    def association(
        self, rejection: Rejected, *, peer: Peer | None, address: str, calling_ae_title: str, called_ae_title: str, named: bool = True
    ) -> None:
        """Note a rejected association.

        Parameters
        ----------
        peer
            Who called, as far as that was looked at.
        named
            False: no peer bears the calling AE title, which is not to be looked up.
        """
        calling, called = calling_ae_title.strip(), called_ae_title.strip()
        code = (rejection.result, rejection.source, rejection.diagnostic)
        if rejection.remedy:
            reason, remedy = rejection.reason, rejection.remedy
        elif code == (1, 1, 7):
            reason, remedy = self._other_called(called)
        elif code == (1, 1, 3):
            reason, remedy = self._unknown_calling(peer, calling, address, self._peers.bearing(calling) if named else [])
        elif code == (2, 3, 2):
            reason, remedy = self._limit(peer)
        else:
            reason, remedy = rejection.reason, ""
        self._note("association", reason, remedy, peer, address, calling, called)

    def contexts(
        self,
        proposed: Iterable[PresentationContext],
        rejected: Iterable[PresentationContext],
        *,
        origin: Origin,
        takes: Callable[[str], bool],
        permits: Callable[[str], bool],
    ) -> None:
        """Note the presentation contexts of an association that were rejected.

        Parameters
        ----------
        proposed, rejected
            As pynetdicom has them.
        takes
            Whether an abstract syntax is taken at all, in some transfer syntax, of some caller.
        permits
            Whether of this caller.
        """
        offered = {context.context_id: [UID(str(syntax)).name for syntax in context.transfer_syntax] for context in proposed}
        for context in rejected:
            uid = UID(str(context.abstract_syntax))
            known = UID_dictionary.get(uid)
            name = uid.name if known else f"SOP class {uid}"
            if takes(uid) and not permits(uid):
                reason = f"{name}: {'peer ' + origin.peer if origin.peer else 'an unknown caller'} may not use it"
                remedy = "let the peer query and retrieve (retrieve = true) or store (accept = true), if it shall"
            elif takes(uid):
                syntaxes = ", ".join(offered.get(context.context_id, [])[:8])
                reason = f"{name} was offered only in {syntaxes or 'no transfer syntax'}, which is not taken"
                remedy = "let the caller offer Explicit VR Little Endian too; `dicom-node conformance` lists what is taken"
            elif not known:
                reason = f"{name} is private or unknown"
                remedy = "to store such instances all the same set dimse.unknown_sop_classes = true"
            else:
                reason = f"{name} is no service of this node"
                remedy = "`dicom-node conformance` lists what there is; the caller may leave it out"
            self._of(origin, "context", reason, remedy)

    def violation(self, reason: str, origin: Origin) -> None:
        """Note an association that was aborted because the caller broke the protocol."""
        remedy = "the caller's DICOM implementation is broken, or no DICOM program; look at its version and log"
        self._of(origin, "association", f"aborted, the caller broke the protocol: {reason}", remedy)

    def instance(self, status: int, reason: str, origin: Origin) -> None:
        """Note an instance that was refused; `reason` is the sentence of the error."""
        why, _, remedy = _PLACE.sub("", reason).partition("; ")
        remedy = _STATUS_REMEDIES.get(0xA700 if status >> 8 == 0xA7 else status, remedy)
        self._of(origin, "instance", f"0x{status:04X}: {why}", remedy)

    def connection(self, reason: str, *, address: str, error: OSError | None = None) -> None:
        """Note a connection that came to no association request; `error` is that of a TLS handshake."""
        if error is not None:
            fault = handshake_fault(error)
            self._note("tls", f"TLS: {fault.reason}", fault.remedy, None, address)
            return
        remedies = {
            "TLS handshake on a port without TLS": "switch TLS on here, or off at the caller",
            "HTTP on the DICOM port": "DICOMweb has a port of its own, [dicomweb]",
            "no whole association request within the handshake time": "a scanner, or a DICOM program on a bad line",
            TOO_MANY_REQUESTS: "let the callers there send more on each association, or raise dimse.association_requests_per_s",
        }
        remedy = remedies.get(reason, "look what calls from there; it is no DICOM program, or a broken one")
        self._note("connection", reason, remedy, None, address)

    def _of(self, origin: Origin, kind: str, reason: str, remedy: str) -> None:
        self._diary.note(
            kind=kind,
            reason=reason,
            remedy=remedy,
            peer=origin.peer,
            address=origin.address,
            calling_ae_title=origin.calling_ae_title,
            called_ae_title=origin.called_ae_title,
        )

    def _note(self, kind: str, reason: str, remedy: str, peer: Peer | None, address: str, calling: str = "", called: str = "") -> None:
        self._diary.note(
            kind=kind,
            reason=reason,
            remedy=remedy,
            peer=peer.name if peer is not None else "",
            address=address,
            calling_ae_title=calling,
            called_ae_title=called,
        )

    def _other_called(self, called: str) -> tuple[str, str]:
        reason = f"it called AE title {called!r}, and ours is {self._ae_title}"
        return reason, f"set the called AE title at the caller to {self._ae_title}, or dimse.ae_title here to what it calls"

    def _unknown_calling(self, peer: Peer | None, calling: str, address: str, named: Sequence[Peer]) -> tuple[str, str]:
        if peer is not None:
            reason = f"peer {peer.name} may do nothing here (accept and retrieve are false)"
            return reason, "let it store (accept = true), or query and retrieve (retrieve = true), if it shall"
        command = f"`dicom-node peers add NAME --ae-title {shlex.quote(calling)} --host {address}`"
        if named:
            known = ", ".join(f"{one.name} at {one.host}" for one in named)
            reason = f"AE title {calling!r} is known ({known}), but not at {address}"
            return reason, f"correct the host of that peer, or, if this is another one: {command}"
        return f"AE title {calling!r} at {address} is no peer", command

    def _limit(self, peer: Peer | None) -> tuple[str, str]:
        if peer is not None and peer.max_associations:
            reason = f"too many associations at once: of peer {peer.name} (max_associations = {peer.max_associations}), or of all"
            return reason, "let it hold fewer, or raise max_associations; for all dimse.maximum_associations"
        return "too many associations at once, or the node was stopping", "let the caller hold fewer, or raise dimse.maximum_associations"
