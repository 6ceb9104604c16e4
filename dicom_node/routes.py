"""Where reports go: the first route that fits the sender, else back to the sender itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dicom_node.peers import Peers
from storage.records import Origin

DELIVERED_AS = {"summary": "sr", "findings": "sr", "segmentation": "seg"}
"""Kind of a report -> what a peer's ``deliver`` calls it."""


@dataclass(frozen=True, slots=True)
class Route:
    """``sender`` is a peer's name, ``dicomweb`` for the HTTP door, or ``*``."""

    sender: str
    to: tuple[str, ...]


ABSENT = "a route names {name}, and no peer is called so: what is for it waits; add it: `dicom-node peers add {name} ...`"
"""What to say of a name that `Routing.nobodys` returns."""


class Routing:
    """Decides the destinations of a report."""

    def __init__(self, *, peers: Peers, routes: Sequence[Route]) -> None:
        self._peers = peers
        self._routes = tuple(routes)

    def destinations(self, origin: Origin, kind: str) -> tuple[str, ...]:
        """Names of the peers that get a report of ``kind`` (summary, findings, segmentation) about an instance of ``origin``.

        One that a route names and nobody is called yet is among them.
        """
        wanted = DELIVERED_AS[kind]
        chosen: list[str] = []
        for name in self._names(origin):
            peer = self._peers.get(name)
            # Who is named by a route may be added later, and what is for it waits; a sender who is gone is gone.
            wants = name != origin.peer if peer is None else peer.callable and peer.port > 0 and wanted in peer.deliver
            if wants and name not in chosen:
                chosen.append(name)
        return tuple(chosen)

    def nobodys(self) -> list[str]:
        """Return what routes name and no peer is called now."""
        named = {name for route in self._routes for name in (route.sender, *route.to)} - {"*", "dicomweb"}
        return sorted(name for name in named if self._peers.get(name) is None)

    def _names(self, origin: Origin) -> tuple[str, ...]:
        sender = "dicomweb" if origin.door == "dicomweb" else origin.peer
        for route in self._routes:
            if route.sender in {"*", sender}:
                return route.to
        return (origin.peer,) if origin.peer else ()
