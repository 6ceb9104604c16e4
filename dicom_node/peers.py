"""The peers: who may call, and where reports go. Those of the configuration, and those added while the node runs."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import structlog

from storage.errors import StorageError

if TYPE_CHECKING:
    from storage.known_peers import KnownPeer

log = structlog.get_logger(__name__)

ANY_ADDRESS = "*"
"""``host`` of a peer that may call from every address; nothing can be sent to it."""
RESERVED_NAMES: Final = frozenset({"dicomweb", "node"})
_HOST_NAMES = 4096
REPORT_KINDS: Final = ("sr", "seg")

# PS3.5 Section 6.2, VR AE: no backslash, no control characters, not only spaces; spaces at the ends mean nothing, and are not taken.
_AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Peer:
    """One DICOM application entity beside us."""

    name: str
    """What routes, logs and commands call it."""
    ae_title: str
    host: str
    """Address or host name; or, for one that calls and is never called, a network (``10.20.0.0/16``), or ``*`` for anywhere."""
    port: int = 104
    """0: it is never called."""
    accept: bool = True
    """May it store here?"""
    retrieve: bool = True
    """May it query and retrieve here?"""
    deliver: tuple[str, ...] = REPORT_KINDS
    """Which reports it is sent."""
    max_associations: int = 0
    """How many associations it may hold here at once; 0 for no quota of its own."""
    certificate: str = ""
    """SHA-256 fingerprint or name of the certificate that it must show by TLS (`dicom_node.security.matches`); empty: any."""
    tls: bool = False
    """Call it by TLS."""
    commit: bool = False
    """Ask it for storage commitment of our reports."""
    acknowledge: Literal["", "land", "archive"] = ""
    """What Success means for it; empty: as the archive's."""

    @property
    def callable(self) -> bool:
        """Whether there is an address to send to."""
        return self.host != ANY_ADDRESS and network_of(self.host) is None

    def settings(self) -> dict[str, Any]:
        """Everything but the name, as JSON takes it."""
        told = asdict(self)
        del told["name"]
        return {**told, "deliver": list(self.deliver)}

    @classmethod
    def of_settings(cls, name: str, settings: Mapping[str, Any]) -> Peer:
        """Make a peer of what `settings` wrote; what a newer version wrote beyond it is passed over.

        Raises
        ------
        ValueError
            A value is not what it must be.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        told = {key: value for key, value in settings.items() if key in kinds and key != "name"}
        for key, value in told.items():
            wanted = {"bool": bool, "int": int, "tuple[str, ...]": list}.get(kinds[key], str)
            if type(value) is not wanted:
                raise ValueError(f"{key}: must be of type {wanted.__name__}")
        peer = cls(name=name, **{**told, "deliver": tuple(told.get("deliver", REPORT_KINDS))})
        if found := faults(peer):
            raise ValueError("; ".join(f"{key}: {words}" for key, words in found))
        return peer


def normal_address(address: str) -> str:
    """Return an IP address in one spelling: an IPv4 address seen through an IPv6 socket is the IPv4 address, no zone."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed)


def network_of(host: str) -> Network | None:
    """Return the network that a `host` names (``10.20.0.0/16``); None for an address, a host name, ``*``, or nonsense."""
    if "/" not in host:
        return None
    try:
        return ipaddress.ip_network(host, strict=True)
    except ValueError:
        return None


def addresses_of(host: str) -> frozenset[str]:
    """Resolve a host to its addresses; empty when the name does not resolve now."""
    try:
        return frozenset((normal_address(host),))
    except ValueError:
        pass  # a name
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return frozenset()
    return frozenset(normal_address(str(entry[4][0])) for entry in found)


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What the name service said of a host name."""

    asked_at: float
    good_at: float
    """When it last gave addresses; -inf: never."""
    addresses: frozenset[str]


class HostNames:
    """Addresses of host names, asked for anew every few seconds; while the name service does not know them, the last ones hold.

    Parameters
    ----------
    resolve
        As `addresses_of`.
    fresh_s
        How long an answer holds unasked.
    kept_s
        How long the last good addresses stand in for an answer.
    """

    def __init__(self, resolve: Callable[[str], frozenset[str]] = addresses_of, *, fresh_s: float = 10.0, kept_s: float = 86_400.0) -> None:
        self._resolve = resolve
        self._fresh_s = fresh_s
        self._kept_s = kept_s
        self._lock = threading.Lock()
        self._known: dict[str, _Resolved] = {}

    def addresses(self, host: str) -> frozenset[str]:
        """Return the addresses of a host; empty: unknown for now."""
        with contextlib.suppress(ValueError):  # a name
            return frozenset((normal_address(host),))
        now = time.monotonic()
        with self._lock:
            known = self._known.get(host)
        if known is None or now - known.asked_at >= self._fresh_s:
            found = self._resolve(host)  # may take long: not under the lock
            known = known or _Resolved(now, float("-inf"), frozenset())
            known = _Resolved(now, now, found) if found else replace(known, asked_at=now)
            with self._lock:
                self._known.pop(host, None)
                while len(self._known) >= _HOST_NAMES:
                    del self._known[next(iter(self._known))]
                self._known[host] = known
        return known.addresses if now - known.good_at <= self._kept_s else frozenset()


def faults(peer: Peer) -> list[tuple[str, str]]:
    """Return what is wrong with a peer by itself: setting, and what it must be."""
    found = []
    if not NAME.fullmatch(peer.name):
        found.append(("name", "use letters, digits, full stop, hyphen and underscore, at most 64, beginning with a letter or digit"))
    elif peer.name in RESERVED_NAMES:
        found.append(("name", f"the name {peer.name!r} is reserved; choose another"))
    if not _AE_TITLE.fullmatch(peer.ae_title):
        found.append(("ae_title", "use 1 to 16 printable ASCII characters, without backslash, no space at either end"))
    if not _is_host(peer.host):
        found.append(
            ("host", "use an IP address or a host name; a network as 10.20.0.0/16, or *, for a peer that calls and is never called")
        )
    if not 0 <= peer.port <= 65535:
        found.append(("port", "use 1 to 65535, or 0 for a peer that is never called"))
    if unknown := [kind for kind in peer.deliver if kind not in REPORT_KINDS]:
        found.append(("deliver", f"{', '.join(unknown)}: use {' and '.join(REPORT_KINDS)}"))
    if peer.max_associations < 0:
        found.append(("max_associations", "must be at least 0"))
    if peer.certificate and (words := _certificate_fault(peer.certificate)):
        found.append(("certificate", words))
    if peer.acknowledge not in {"", "land", "archive"}:
        found.append(("acknowledge", "use land or archive"))
    if not peer.callable and (peer.tls or peer.commit):
        found.append(("host", "tls and commit are about calling it: name its address"))
    return found


def clashes(peer: Peer, others: Iterable[Peer]) -> list[tuple[str, str]]:
    """Return why a peer cannot stand beside the others: setting, and what is wrong."""
    found = []
    for other in others:
        if other.name == peer.name:
            found.append(("name", f"the name {peer.name!r} stands twice; give each peer a name of its own"))
        if other.ae_title == peer.ae_title and _same_host(other.host, peer.host):
            words = f"AE title {peer.ae_title!r} at {peer.host!r} is peer {other.name!r} already; a caller must be one peer"
            found.append(("ae_title", words))
    return found


def _certificate_fault(certificate: str) -> str:
    from dicom_node.security import certificate_setting  # noqa: PLC0415 - most nodes have no such peer

    try:
        certificate_setting(certificate)
    except ValueError as error:
        return str(error)
    return ""


def _is_host(host: str) -> bool:
    if host == ANY_ADDRESS or network_of(host) is not None:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # Digits and dots alone are a mistyped address, which resolvers take for something else.
        return bool(_HOST_NAME.fullmatch(host)) and not re.fullmatch(r"[0-9.]+", host)
    return True


def _same_host(first: str, second: str) -> bool:
    return first.rstrip(".").lower() == second.rstrip(".").lower()


def merged(configured: Iterable[Peer], known: Iterable[KnownPeer]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that hold, by name, and why others of those that were added do not: the configuration wins."""
    current, unusable = {peer.name: peer for peer in configured}, {}
    for one in known:
        try:
            peer = Peer.of_settings(one.name, one.settings)
        except ValueError as error:
            unusable[one.name] = str(error)
            continue
        if found := clashes(peer, current.values()):
            unusable[one.name] = found[0][1]
            continue
        current[peer.name] = peer
    return current, unusable


def _titles(peers: Iterable[Peer]) -> frozenset[str]:
    return frozenset(peer.ae_title.strip() for peer in peers)


class Peers:
    """The peers, looked up by name or by who calls.

    Parameters
    ----------
    peers
        In the order of the configuration. Names are unique.
    added
        Reads those that were added while the node runs (`KnownPeers.all`); None: there are none. One that bears the name of a
        configured peer, or its AE title and host, is passed over.
    refresh_s
        How old the list of the added ones may grow. While the database is away the last one holds.
    answer_s
        How long anybody waits for it to be read again; for the first time ten times as long.
    host_names
        Resolves the hosts of peers.

    Raises
    ------
    ValueError
        Two peers bear one name.
    """

    def __init__(
        self,
        peers: Sequence[Peer] = (),
        *,
        added: Callable[[], Sequence[KnownPeer]] | None = None,
        refresh_s: float = 2.0,
        answer_s: float = 0.5,
        host_names: HostNames | None = None,
    ) -> None:
        self._host_names = host_names or HostNames()
        self._configured = {peer.name: peer for peer in peers}
        if len(self._configured) != len(peers):
            raise ValueError("two [[peers]] bear the same name; rename one of them")
        self._by_name: Mapping[str, Peer] = self._configured
        self._titles = _titles(peers)
        self._added = added
        self._refresh_s = refresh_s
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._answered: threading.Event | None = None
        self._read_at = float("-inf")
        self._known = added is None
        self._unavailable = False
        self._unusable: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._current().values())

    def __len__(self) -> int:
        return len(self._current())

    def get(self, name: str) -> Peer | None:
        """Return the peer of that name; None when there is none (any more)."""
        return self._current().get(name)

    def by_calling(self, ae_title: str, address: str) -> Peer | None:
        """Return the peer that calls with `ae_title` from the IP address `address`.

        A peer that names the address wins over one that names a network, the narrower network over the wider, and these over one
        that may call from anywhere. Host names are resolved anew after some seconds, so that a peer that moved is known again without
        a restart. Where it returns None, `unknown_for_now` says whether that is the last word.
        """
        calling = normal_address(address)
        named = self.bearing(ae_title)
        for peer in named:
            if peer.callable and calling in self._host_names.addresses(peer.host):
                return peer
        parsed = ipaddress.ip_address(calling)
        around = [(network.prefixlen, peer) for peer in named if (network := network_of(peer.host)) is not None and parsed in network]
        if around:
            return max(around, key=lambda pair: pair[0])[1]
        return next((peer for peer in named if peer.host == ANY_ADDRESS), None)

    def unknown_for_now(self, ae_title: str) -> bool:
        """Whether a caller that `by_calling` did not find may be a peer all the same: it is to try again, not to give up.

        The added peers could not be read yet, or a peer of that AE title has a host name that does not resolve.
        """
        named = self.bearing(ae_title)
        return not self._known or any(peer.callable and not self._host_names.addresses(peer.host) for peer in named)

    def bearing(self, ae_title: str) -> list[Peer]:
        """Return the peers of an AE title, wherever they call from."""
        return [peer for peer in self._current(at_once=False).values() if peer.ae_title.strip() == ae_title.strip()]

    def known_title(self, ae_title: str) -> bool | None:
        """Whether a peer bears an AE title, without waiting for anything; None: only `bearing` can say, the list is old."""
        if ae_title.strip() in self._titles:
            return True
        if self._added is None:
            return False
        with self._lock:
            return False if self._known and time.monotonic() - self._read_at < self._refresh_s else None

    # -- what was added ----------------------------------------------------------------------------------------------------------

    def _current(self, *, at_once: bool = True) -> Mapping[str, Peer]:
        """Return the list; one that is too old is read again first, by one thread for all, which nobody waits for for long.

        Who wants an answer `at_once`, for every instance that comes, takes the old list while a new one is read; unless nobody asked
        for a while, and it is older still.
        """
        if self._added is None:
            return self._by_name
        with self._lock:
            age = time.monotonic() - self._read_at
            if age < self._refresh_s:
                return self._by_name
            answered = self._answered
            if answered is None:
                answered = threading.Event()
                thread = threading.Thread(target=self._refresh, args=(answered,), name="peers", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no thread to be had now: the next one who asks tries again
                    log.warning("peers.unavailable", reason=str(error), advice="the last known list of added peers holds meanwhile")
                    return self._by_name
                self._answered = answered
            first = self._read_at == float("-inf")
        if not at_once or age >= 2 * self._refresh_s:
            answered.wait(self._answer_s * 10 if first else self._answer_s)
        return self._by_name

    def _refresh(self, answered: threading.Event) -> None:
        try:
            known = cast("Callable[[], Sequence[KnownPeer]]", self._added)()
        except StorageError as error:
            if not self._unavailable:  # said once an outage
                log.warning("peers.unavailable", reason=str(error), advice="the last known list of added peers holds meanwhile")
            self._unavailable = True
        except Exception:  # an edge: the thread's own; the list as it was goes on
            log.exception("peers.failed")
        else:
            self._unavailable = False
            self._take(known)
            self._known = True
        finally:
            with self._lock:
                self._read_at = time.monotonic()
                self._answered = None
            answered.set()

    def _take(self, known: Sequence[KnownPeer]) -> None:
        current, unusable = merged(self._configured.values(), known)
        for name in unusable.keys() - self._unusable:
            log.warning("peer.passed_over", peer=name, reason=unusable[name], remedy=f"dicom-node peers remove {name}")
        self._unusable = frozenset(unusable)
        before, self._by_name, self._titles = self._by_name, current, _titles(current.values())
        if before != current and self._read_at != float("-inf"):
            came = sorted(name for name, peer in current.items() if before.get(name) != peer)
            log.info("peers.changed", added=came, removed=sorted(before.keys() - current.keys()))
