"""What the transactions share: collaborators, limits, the bridge to threads, URLs, and the checks of a path."""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from aiohttp import web

from dicomweb.errors import BadRequest
from dicomweb.metadata import InlineLimits
from dicomweb.multipart import MultipartLimits
from dicomweb.negotiate import MediaType, parse_accept
from storage.archive import Archive
from storage.audit import AuditTrail
from storage.index import Index
from storage.records import AuditEvent
from storage.scan import valid_uid

T = TypeVar("T")

_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_PORT = re.compile(r":[0-9]+$")
_DEFAULT_PORTS = MappingProxyType({"http": 80, "https": 443})
PIECE = 256 * 1024
"""Bytes that are moved between the loop and a thread at once."""


@dataclass(frozen=True, slots=True)
class WebLimits:
    """What one request may cost."""

    body_bytes: int = 64 * 1024**3
    """Of a STOW-RS body, all its parts together; each instance is limited by the archive too."""
    receive_s: float = 3600.0
    """From the first byte of the body to its last: the absolute deadline."""
    idle_s: float = 60.0
    """Without a byte from or to the client."""
    uploads: int = 64
    """STOW-RS requests at once."""
    requests: int = 512
    """Requests at once."""
    results: int = 1_000
    """Of one QIDO-RS answer; more are had by paging."""
    query_parameters: int = 256
    multipart: MultipartLimits = field(default_factory=MultipartLimits)
    inline: InlineLimits = field(default_factory=InlineLimits)
    inflate_bytes: int = 2 * 1024**3
    """Of a deflated data set, when it is read again."""
    frame_list: int = 1_000
    """Frames asked for in one request."""


class Meter(Protocol):
    """Counts what happens at the door; `dicom_node.observability.Metrics` is one."""

    def instance(self, *, door: str, outcome: str, byte_count: int = 0) -> None:
        """Count an instance that was stored, was a duplicate, or was refused (outcome: the failure reason)."""

    def request(self, *, transaction: str, status: int) -> None:
        """Count an answer."""


class NoMeter:
    """Counts nothing."""

    def instance(self, *, door: str, outcome: str, byte_count: int = 0) -> None:
        """Do nothing."""

    def request(self, *, transaction: str, status: int) -> None:
        """Do nothing."""


class Pool:
    """The bounded bridge from the loop to blocking code.

    Parameters
    ----------
    workers
        Threads; what does not find one free waits its turn.
    """

    def __init__(self, workers: int) -> None:
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="dicomweb")

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking code. When the caller is cancelled it first waits for the thread, so that none works on behind our back."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # looked at: the cancellation is what the caller sees
            raise

    def close(self) -> None:
        """End the threads once they are idle."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def utc_now() -> datetime:
    """Time of day, aware."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Handed to every transaction."""

    archive: Archive
    index: Index
    audit: AuditTrail
    pool: Pool
    limits: WebLimits
    meter: Meter
    base_path: str
    public_url: str
    trusted_proxy: bool
    node_ae_title: str
    clock: Callable[[], datetime]

    async def note(self, request: web.Request, action: str, subject: str, **detail: Any) -> None:
        """Write an audit record of what a client is about to see; without it nothing is shown.

        Raises
        ------
        Unavailable
            The audit trail takes no record now.
        """
        address = client_address(request, trusted_proxy=self.trusted_proxy)
        event = AuditEvent(
            action=action, outcome="success", actor=address or "unknown", subject=subject, detail={"door": "dicomweb", **detail}
        )
        await self.pool.run(self.audit.record, event)

    def base_url(self, request: web.Request) -> str:
        """URL of the service as this client reaches it, without a slash at the end.

        Raises
        ------
        BadRequest
            The Host header is no host name.
        """
        if self.public_url:
            return self.public_url.rstrip("/")
        scheme, host = request.scheme, request.headers.get("Host", "")
        if self.trusted_proxy:
            scheme = request.headers.get("X-Forwarded-Proto", scheme).split(",")[0].strip().lower()
            host = request.headers.get("X-Forwarded-Host", host).split(",")[0].strip()
        elif not _PORT.search(host) and request.transport is not None:
            # Without a proxy the client has reached this very port, whatever its Host header leaves out (dicomweb_client sends no
            # port, HTTP/1.0 no header at all).
            address, port, *_ = request.transport.get_extra_info("sockname")
            host = (host or (f"[{address}]" if ":" in address else address)) + ("" if port == _DEFAULT_PORTS.get(scheme) else f":{port}")
        if not _HOST.fullmatch(host) or scheme not in {"http", "https"}:
            raise BadRequest("the Host header is no host name")
        return f"{scheme}://{host}{self.base_path}"


def client_address(request: web.Request, *, trusted_proxy: bool) -> str:
    """Tell who sends: the peer of the socket, or what the trusted proxy saw (the last entry, the one that it wrote itself)."""
    if trusted_proxy:
        last = ",".join(request.headers.getall("X-Forwarded-For", [])).rpartition(",")[2].strip()
        with suppress(ValueError):
            return str(ip_address(last))
    return request.remote or ""


def instance_url(base: str, study: str, series: str = "", instance: str = "") -> str:
    """Retrieve URL of a study, series or instance."""
    return f"{base}/studies/{study}" + (f"/series/{series}" if series else "") + (f"/instances/{instance}" if instance else "")


def uid(request: web.Request, name: str) -> str:
    """Take a UID from the path; empty if the route has none of that name.

    Raises
    ------
    BadRequest
        It breaks the grammar of PS3.5 Section 9.1.
    """
    value: str = request.match_info.get(name, "")
    if value and not valid_uid(value):
        raise BadRequest(f"the {name} in the path is no UID of PS3.5 9.1")
    return value


def accepted(request: web.Request) -> tuple[MediaType, ...]:
    """Read what the client accepts: the accept query parameter if there is one, else the header (PS3.18 8.3.3.1)."""
    for name, value in raw_parameters(request):
        if urllib.parse.unquote(name) == "accept":
            # A plus sign stays what it is: application/dicom+json is hardly ever written with %2B.
            return parse_accept(urllib.parse.unquote(value))
    return parse_accept(", ".join(request.headers.getall("Accept", [])))


def raw_parameters(request: web.Request) -> list[tuple[str, str]]:
    """Split the query string, still percent-encoded."""
    pairs = (part.partition("=") for part in request.rel_url.raw_query_string.split("&") if part)
    return [(name, value) for name, _, value in pairs]


def gathered(pieces: Iterator[bytes], size: int = PIECE) -> Iterator[bytes]:
    """Join small pieces, so that each trip to a thread is worth it."""
    held: list[bytes] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(held)
            held, length = [], 0
    if held:
        yield b"".join(held)
