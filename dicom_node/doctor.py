"""`dicom-node doctor`: looks at the node, at its own doors and at every peer, and says of each fault what it is and what helps.

It changes nothing, unless it is told to store: then test instances of a patient who does not exist go through both doors and to the peers.
"""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dicom_node.console import ConfigOption, err, fail, faults_as_sentences, out, runnable, settings_of
from dicom_node.errors import DeliveryError, Refused
from dicom_node.peers import Peer, merged
from storage.errors import StorageError, Unavailable
from storage.refusals import printable

if TYPE_CHECKING:
    from dicom_node.config import Settings
    from dicom_node.dimse.probe import Pair, Probe, Visit

CALLING_AE_TITLE = "DN_DOCTOR"
"""As which the doctor calls our own door."""
_CONNECT_S = 5.0
_ANSWER_S = 15.0
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    subject: str
    passed: bool | None
    """None: not tried; the text says why."""
    text: str


class Doctor:
    """Examines.

    Parameters
    ----------
    settings
        The configuration.
    peers
        All there are now.
    sent
        SOP class and transfer syntax of what lies in the archive, which a C-MOVE to a peer would send.
    probe
        Makes what calls: given the AE title to call as.
    store
        Whether test instances may be stored, here and at the peers.
    progress
        Told what is looked at now.
    """

    def __init__(
        self,
        settings: Settings,
        peers: Sequence[Peer],
        *,
        sent: Sequence[Pair] = (),
        probe: Callable[[str], Probe],
        store: bool = False,
        progress: Progress = lambda _: None,
    ) -> None:
        self._settings = settings
        self._peers = peers
        self._sent = sent
        self._probe = probe
        self._store = store
        self._progress = progress

    def all(self) -> Iterator[Check]:
        """Look at everything: the node, its doors, each peer."""
        yield from self.node()
        if self._settings.dimse.enabled:
            yield from self.own_dimse()
        if self._settings.dicomweb.enabled:
            yield from self.own_dicomweb()
        for peer in self._peers:
            yield from self.peer(peer)

    # -- ourselves ---------------------------------------------------------------------------------------------------------------

    def node(self) -> Iterator[Check]:
        """Configuration and environment, as `dicom-node check` sees them."""
        from dicom_node.environment import findings

        self._progress("configuration and environment")
        for finding in findings(self._settings, peers=False):
            yield Check(finding.subject, finding.passed, finding.text)

    def own_dimse(self) -> Iterator[Check]:
        """Our DIMSE door: who listens there, what it accepts, and whether it stores each transfer syntax."""
        from dicom_node.specimen import SOP_CLASS_UID, SYNTAXES, specimen
        from storage.iod import TRANSFER_SYNTAXES

        subject = "own door, DIMSE"
        section = self._settings.dimse
        if self._settings.identities.mode == "required":
            yield Check(subject, passed=None, text="callers have to identify themselves (identities.mode), and the doctor has no name")
            return
        door = Peer("(this node)", section.ae_title, _reachable(section.host), section.port, tls=self._settings.tls.enabled)
        pairs = [(SOP_CLASS_UID, syntax) for syntax in TRANSFER_SYNTAXES]
        probe = self._probe(CALLING_AE_TITLE)
        self._progress(f"{subject}: association")
        if fault := _connection_fault(door):
            yield Check(subject, passed=False, text=f"{fault}; start it: `dicom-node serve`")
            return
        try:
            visit = probe.visit(door, pairs)
        except DeliveryError as error:
            if door.tls and "its certificate is of another" in str(error):  # others call it by its name, we by an address of this machine
                text = f"it speaks TLS, and its certificate does not bear {door.host}: look from elsewhere, by a name that it bears"
                yield Check(subject, passed=None, text=text)
                return
            remedy = f"`dicom-node peers add doctor --ae-title {CALLING_AE_TITLE} --host {door.host}` lets the doctor in"
            yield Check(subject, passed=False, text=f"{error}; {remedy}" if "rejected" in str(error) else str(error))
            return
        yield _echo(subject, visit)
        missing = [_name(syntax) for _, syntax in pairs if (SOP_CLASS_UID, syntax) not in visit.pairs]
        text = f"photographs are accepted in {len(visit.pairs)} transfer syntaxes" + (f"; not in {', '.join(missing)}" if missing else "")
        yield Check(subject, passed=not missing, text=text)
        if not self._store:
            yield Check(subject, passed=None, text=f"nothing was stored; --store sends a test instance in each of {len(SYNTAXES)} syntaxes")
            return
        for syntax in SYNTAXES:
            yield self._stored(subject, probe, door, specimen(syntax), _name(syntax))

    def own_dicomweb(self) -> Iterator[Check]:
        """Our HTTP door: search; and store, find and retrieve a test instance."""
        from dicom_node.specimen import SYNTAXES, specimen

        subject = "own door, DICOMweb"
        section = self._settings.dicomweb
        base = f"http://{_bracketed(_reachable(section.host))}:{section.port}{section.base_path}"
        self._progress(f"{subject}: search")
        status, body = _get(f"{base}/studies?StudyInstanceUID=2.25.1&limit=1")
        if status != 200 or body.strip() != b"[]":
            remedy = "start it: `dicom-node serve`" if status == 0 else "look at its log"
            yield Check(subject, passed=False, text=f"QIDO-RS at {base}: {_http_fault(status, body)}; {remedy}")
            return
        yield Check(subject, passed=True, text=f"QIDO-RS at {base} answers")
        if not self._store:
            yield Check(subject, passed=None, text="nothing was stored; --store sends, finds and retrieves a test instance")
            return
        one = specimen(SYNTAXES[0])
        self._progress(f"{subject}: store")
        yield self._stowed(subject, base, one)
        study = urllib.parse.quote(one.summary.study_instance_uid)
        self._progress(f"{subject}: search")
        status, body = _get(f"{base}/studies?StudyInstanceUID={study}")
        found = status == 200 and one.summary.study_instance_uid.encode() in body
        text = "QIDO-RS finds the test study" if found else f"QIDO-RS does not find the test study: {_http_fault(status, body)}"
        yield Check(subject, passed=found, text=text)
        path = f"{base}/studies/{study}/series/{one.summary.series_instance_uid}/instances/{one.sop_instance_uid}"
        self._progress(f"{subject}: retrieve")
        status, body = _get(path, accept="application/dicom; transfer-syntax=*")
        same = status == 200 and body.endswith(b"".join(one.chunks()))
        text = "WADO-RS gives back the very bytes" if same else f"WADO-RS does not give the instance back: {_http_fault(status, body)}"
        yield Check(subject, passed=same, text=text)

    def _stowed(self, subject: str, base: str, one: Any) -> Check:
        from dicomweb.client import StowClient, StowError

        try:
            (answer,) = asyncio.run(StowClient(base_url=base, timeout_s=_ANSWER_S).store([one], lambda _done, _total: None))
        except StowError as error:
            return Check(subject, passed=False, text=f"STOW-RS: {error}")
        return Check(subject, passed=answer.failure_reason == 0, text=f"STOW-RS: {answer.text}")

    # -- the others --------------------------------------------------------------------------------------------------------------

    def peer(self, peer: Peer) -> Iterator[Check]:
        """One peer: name, connection, association, C-ECHO, what it accepts of what we send, query; storage only if told to."""
        subject = f"peer {peer.name}"
        if not peer.callable or not peer.port:
            yield Check(subject, passed=None, text=f"{peer.ae_title} calls from {peer.host}, and is never called: it has no host and port")
            return
        self._progress(f"{subject}: connection")
        if fault := _connection_fault(peer):
            yield Check(subject, passed=False, text=fault)
            return
        reports = _reports(peer)
        pairs = list(dict.fromkeys([*reports, *self._sent, *_specimens()]))
        self._progress(f"{subject}: association")
        probe = self._probe(self._settings.dimse.ae_title)
        try:
            visit = probe.visit(peer, pairs)
        except DeliveryError as error:
            yield Check(subject, passed=False, text=str(error))
            return
        longest = f"PDUs of {visit.maximum_length} bytes" if visit.maximum_length else "PDUs of any length"
        yield Check(subject, passed=True, text=f"accepts the association: {visit.implementation or 'an unnamed implementation'}, {longest}")
        yield _echo(subject, visit)
        yield from self._accepted(subject, peer, reports, visit)
        yield from self._services(subject, peer, probe, visit)
        if not self._store:
            yield Check(subject, passed=None, text="nothing was stored there; --store sends it one test instance")
            return
        yield from self._delivered(subject, probe, peer, visit)

    def _accepted(self, subject: str, peer: Peer, reports: Sequence[Pair], visit: Visit) -> Iterator[Check]:
        for kind in peer.deliver:
            uid = _REPORTS[kind]
            taken = [_name(syntax) for offered, syntax in reports if offered == uid and (offered, syntax) in visit.pairs]
            if taken:
                yield Check(subject, passed=True, text=f"takes {_name(uid)} in {', '.join(taken)}")
                continue
            remedy = f"allow that SOP class there, or take {kind} out of what it is sent (deliver)"
            yield Check(subject, passed=False, text=f"does not take {_name(uid)}, so that no such report gets there; {remedy}")
        refused = [pair for pair in self._sent if pair not in visit.pairs]
        if self._sent:
            text = f"takes {len(self._sent) - len(refused)} of {len(self._sent)} kinds of instances in the archive as they are stored"
            shown = "; ".join(f"{_name(uid)} in {_name(syntax)}" for uid, syntax in refused[:5])
            text += f"; a retrieval to it would lack or convert: {shown}{' …' if len(refused) > 5 else ''}" if refused else ""
            yield Check(subject, passed=True if not refused else None, text=text)

    def _services(self, subject: str, peer: Peer, probe: Probe, visit: Visit) -> Iterator[Check]:
        from dicom_node.dimse.commitment import PUSH_MODEL
        from dicom_node.dimse.probe import SERVICES, STUDY_ROOT_FIND

        offered = [words for uid, words in SERVICES.items() if uid in visit.services]
        yield Check(subject, passed=True, text=f"offers {', '.join(offered) or 'no query, retrieval or storage commitment'}")
        if peer.commit and PUSH_MODEL not in visit.services:
            text = "does not offer storage commitment, which is asked of it (commit = true); allow it there, or set commit = false"
            yield Check(subject, passed=False, text=text)
        if STUDY_ROOT_FIND not in visit.services:
            return
        self._progress(f"{subject}: query")
        try:
            status, matches = probe.find_nothing(peer)
        except DeliveryError as error:
            yield Check(subject, passed=False, text=str(error))
            return
        if status == 0 and not matches:
            yield Check(subject, passed=True, text="answers a query for a study that nobody has: no match")
        elif status == 0:
            text = f"gave {matches} matches for a study that nobody has: it does not match on Study Instance UID; tell its maker"
            yield Check(subject, passed=False, text=text)
        else:
            text = f"refused a query with status 0x{status:04X}; its log says why: may our AE title query?"
            yield Check(subject, passed=False, text=text)

    def _delivered(self, subject: str, probe: Probe, peer: Peer, visit: Visit) -> Iterator[Check]:
        from dicom_node.dimse.commitment import PUSH_MODEL
        from dicom_node.specimen import specimen

        fitting = [pair for pair in _specimens() if pair in visit.pairs]
        if not fitting:
            yield Check(subject, passed=None, text="nothing was stored there: it takes no photographs without compression")
            return
        one = specimen(fitting[0][1])
        stored = self._stored(subject, probe, peer, one, _name(fitting[0][1]))
        yield stored
        if not stored.passed or PUSH_MODEL not in visit.services:
            return
        self._progress(f"{subject}: storage commitment")
        try:
            status, committed = probe.commit(peer, fitting[0], one.sop_instance_uid)
        except DeliveryError as error:
            yield Check(subject, passed=False, text=f"storage commitment: {error}")
            return
        yield _commitment(subject, status, committed)

    def _stored(self, subject: str, probe: Probe, peer: Peer, one: Any, syntax: str) -> Check:
        from dicom_node.dimse.scu import Stored

        self._progress(f"{subject}: store, {syntax}")
        try:
            ((_, outcome),) = list(probe.store(peer, [one]))
        except DeliveryError as error:
            return Check(subject, passed=False, text=f"store in {syntax}: {error}")
        if not isinstance(outcome, Stored):
            said = f" ({printable(outcome.comment, 64)})" if isinstance(outcome, Refused) and outcome.comment else ""
            return Check(subject, passed=False, text=f"store in {syntax}: {outcome}{said}")
        warned = f" with warning 0x{outcome.status:04X} {printable(outcome.comment, 64)}".rstrip() if outcome.status else ""
        return Check(subject, passed=True, text=f"stores {syntax}{warned}")


_REPORTS = {"sr": "1.2.840.10008.5.1.4.1.1.88.34", "seg": "1.2.840.10008.5.1.4.1.1.66.4"}


def _reports(peer: Peer) -> list[Pair]:
    from dicom_node.dimse.probe import PLAIN

    return [(_REPORTS[kind], syntax) for kind in peer.deliver for syntax in PLAIN]


def _specimens() -> list[Pair]:
    from dicom_node.dimse.probe import PLAIN
    from dicom_node.specimen import SOP_CLASS_UID

    return [(SOP_CLASS_UID, syntax) for syntax in PLAIN]


def _name(uid: str) -> str:
    from pydicom.uid import UID

    return UID(uid).name


def _echo(subject: str, visit: Visit) -> Check:
    if visit.echo is None:
        return Check(subject, passed=False, text="does not answer C-ECHO; it must (PS3.4 Annex A): let it accept Verification")
    words = "answers C-ECHO" if visit.echo == 0 else f"answers C-ECHO with status 0x{visit.echo:04X}; look at its log"
    return Check(subject, passed=visit.echo == 0, text=words)


def _commitment(subject: str, status: int | None, committed: bool | None) -> Check:
    if status is None:
        return Check(subject, passed=False, text="gave no answer to a request for storage commitment; look at its log")
    if status:
        return Check(subject, passed=False, text=f"refused storage commitment with status 0x{status:04X}; may our AE title ask for it?")
    if committed is None:
        text = "takes a request for storage commitment; its report did not come at once, it may come on an association of its own"
        return Check(subject, passed=None, text=text)
    words = "commits the test instance" if committed else "does not commit what it has just stored; look at its log"
    return Check(subject, passed=committed, text=words)


def _connection_fault(peer: Peer) -> str:
    """Say why no TCP connection to a peer comes about; empty when one does."""
    try:
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return f"the host name {peer.host} does not resolve; correct it, or the name service"
    fault = ""
    for family, kind, protocol, _, address in found:
        where = " port ".join((str(address[0]), str(peer.port)))
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(_CONNECT_S)
            try:
                connection.connect(address)
            except TimeoutError:
                fault = f"{where} does not answer; a firewall in between drops the packets, or the machine is off"
            except ConnectionRefusedError:
                fault = f"nobody listens at {where}; start the program there, or correct the port"
            except OSError as error:
                fault = f"{where} cannot be reached ({error.strerror or type(error).__name__}); look at network and routes"
            else:
                return ""
    return fault


def _reachable(host: str) -> str:
    """Return the address at which a listener on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - a listener's


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _get(url: str, accept: str = "application/dicom+json") -> tuple[int, bytes]:
    """GET; status and body, or status 0 and why nothing came."""
    request = urllib.request.Request(url, headers={"Accept": accept})  # noqa: S310 - our own http:// address
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:  # noqa: S310
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(getattr(error, "reason", error)).encode()


def _http_fault(status: int, body: bytes) -> str:
    shown = printable(body[:200].decode("utf-8", "replace"), 200)
    return f"no answer ({shown})" if status == 0 else f"status {status}, {shown!r}"


# -- the command ----------------------------------------------------------------------------------------------------------------------


def doctor(
    peer: Annotated[str | None, typer.Argument(help="One peer alone; default: the node and every peer.", show_default=False)] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Also store test instances (patient DICOM-NODE-DOCTOR), here and at the peers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Look at the node, its own doors and each peer: what works, what does not, why, and what helps. Status 1 when something does not."""
    with faults_as_sentences():
        settings = settings_of(config_file)
        peers, sent, missing = _archive(settings)
        if peer is not None:
            if peer not in peers:
                raise fail(f"no peer is called {peer}; known: {', '.join(peers) or 'none'}")
            peers = {peer: peers[peer]}
        checks: list[Check] = []
        with err.status("looking") if err.is_terminal else nullcontext() as status:
            one = Doctor(
                settings,
                list(peers.values()),
                sent=sent,
                probe=_probe_of(settings),
                store=store,
                progress=lambda what: status.update(f"looking at {what}") if status is not None else None,
            )
            for check in chain(missing, one.all()) if peer is None else one.peer(peers[peer]):
                checks.append(check)
                _show(check, as_json=as_json)
    failed = sum(check.passed is False for check in checks)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    elif store:
        from dicom_node.specimen import PATIENT_ID, STUDY_INSTANCE_UID

        here = f"here: `dicom-node erase {STUDY_INSTANCE_UID}`; " if peer is None else ""
        err.print(Text(runnable(f"how to remove the test study {here}at a peer: there, patient {PATIENT_ID}"), style="dim"))
    if failed:
        raise typer.Exit(1) if as_json else fail(f"{failed} of {len(checks)} did not pass; the lines marked 'no' say what to do")


def _show(check: Check, *, as_json: bool) -> None:
    if as_json:
        return
    mark, style = {True: ("ok", "green"), False: ("no", "bold red"), None: ("-", "dim")}[check.passed]
    out.print(Text(f"{mark:>3}  ", style=style) + Text(f"{check.subject}: ", style="bold") + Text(runnable(check.text)))


def _probe_of(settings: Settings) -> Callable[[str], Probe]:
    from dicom_node.dimse.probe import Probe
    from dicom_node.storehouse import client_tls

    tls, answer_s = client_tls(settings), min(settings.delivery.timeout_s, _ANSWER_S)
    return lambda ae_title: Probe(ae_title=ae_title, connect_s=_CONNECT_S, answer_s=answer_s, tls=tls)


def _archive(settings: Settings) -> tuple[dict[str, Peer], list[Pair], list[Check]]:
    """Return the peers there are, what kinds of instances the archive holds, and what kept us from asking the archive."""
    from dicom_node import storehouse
    from dicom_node.storehouse import peers_of
    from storage.kinds import newest_kinds
    from storage.known_peers import KnownPeers

    configured = list(peers_of(settings))
    try:
        with storehouse.storage(settings) as parts:
            rows = KnownPeers(database=parts.database, audit=parts.audit).all()
            return merged(configured, rows)[0], newest_kinds(parts.database), []
    except Unavailable as error:
        return {peer.name: peer for peer in configured}, [], [Check("archive", None, f"peers that were added are not looked at: {error}")]
    except StorageError as error:
        return {peer.name: peer for peer in configured}, [], [Check("archive", passed=False, text=str(error))]
