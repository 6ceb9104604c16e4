"""The peers that the configuration names: who may call, and where reports go."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ANY_ADDRESS = "*"
"""``host`` of a peer that may call from every address; nothing can be sent to it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One DICOM application entity beside us."""

    name: str
    """What routes, logs and commands call it."""
    ae_title: str
    host: str
    """Address or host name; ``*`` for a peer that calls from anywhere and is never called."""
    port: int = 104
    accept: bool = True
    """May it store here?"""
    retrieve: bool = True
    """May it query and retrieve here?"""
    deliver: tuple[str, ...] = ("sr", "seg")
    """Which reports it is sent."""
    max_associations: int = 0
    """How many associations it may hold here at once; 0 for no quota of its own."""

    @property
    def callable(self) -> bool:
        """Whether there is an address to send to."""
        return self.host != ANY_ADDRESS


def normal_address(address: str) -> str:
    """Return an IP address in one spelling: an IPv4 address seen through an IPv6 socket is the IPv4 address, no zone."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed)


def addresses_of(host: str) -> frozenset[str]:
    """Resolve a host to its addresses; empty when the name does not resolve now."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return frozenset()
    return frozenset(normal_address(str(entry[4][0])) for entry in found)


class Peers:
    """The configured peers, looked up by name or by who calls.

    Parameters
    ----------
    peers
        In the order of the configuration. Names are unique.

    Raises
    ------
    ValueError
        Two peers bear one name.
    """

    def __init__(self, peers: Sequence[Peer] = ()) -> None:
        self._by_name = {peer.name: peer for peer in peers}
        if len(self._by_name) != len(peers):
            raise ValueError("two [[peers]] bear the same name; rename one of them")

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Peer | None:
        """Return the peer of that name; None when the configuration names none (any more)."""
        return self._by_name.get(name)

    def by_calling(self, ae_title: str, address: str) -> Peer | None:
        """Return the peer that calls with `ae_title` from the IP address `address`.

        A peer that names the address wins over one that may call from anywhere. Host names are resolved at each call,
        so that a peer that moved is known again without a restart.
        """
        calling = normal_address(address)
        named = [peer for peer in self if peer.ae_title.strip() == ae_title.strip()]
        for peer in named:
            if peer.callable and calling in addresses_of(peer.host):
                return peer
        return next((peer for peer in named if not peer.callable), None)
