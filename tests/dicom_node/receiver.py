"""A receiver of webhooks in a thread of its own, over HTTP or HTTPS, that answers as it is told."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Posted:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def cursors(self) -> list[int]:
        """Of the changes in it."""
        return [change["cursor"] for change in json.loads(self.body)["changes"]]


class Receiver:
    """A context manager.

    Parameters
    ----------
    script
        What to do with the first requests, one after the other: a status, or ``hang``, ``cut`` (before the answer), ``drip`` (the head of
        an answer, a byte a time, without end), ``redirect``, ``endless`` (200, and a body without end), ``slow`` (204 after a while).
        Later ones get 204.
    certificate
        Certificate and key, for HTTPS.
    """

    def __init__(self, *script: int | str, certificate: Path | None = None) -> None:
        self.posted: list[Posted] = []
        self.at_once = 0
        self.most_at_once = 0
        self.port = 0
        self._script = list(script)
        self._certificate = certificate
        self._arrived = threading.Condition()
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()), name="receiver")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self.port}/hook"

    @property
    def cursors(self) -> list[int]:
        """Of all changes that came, in order."""
        return [cursor for posted in list(self.posted) for cursor in posted.cursors]

    def await_posts(self, count: int) -> list[Posted]:
        """Wait until so many requests have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.posted) >= count, 60), f"{len(self.posted)} of {count} requests came"
            return list(self.posted)

    def await_cursors(self, wanted: Sequence[int]) -> None:
        """Wait until each of these changes has come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: set(wanted) <= set(self.cursors), 60), f"{self.cursors} came of {wanted}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        context = None
        if self._certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._certificate)
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.read()
            with self._arrived:
                action = self._script.pop(0) if self._script else 204
                self.posted.append(Posted(request.path, dict(request.headers), body))
                self._arrived.notify_all()
            return await self._act(request, action)
        finally:
            self.at_once -= 1

    async def _act(self, request: web.Request, action: int | str) -> web.StreamResponse:
        transport: Any = request.transport
        match action:
            case int():
                return web.Response(status=action, text="words of the receiver")
            case "hang":
                await asyncio.sleep(3600)
            case "cut":
                transport.abort()
            case "drip":
                transport.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not transport.is_closing():
                    transport.write(b"x")
                    await asyncio.sleep(0.05)
            case "redirect":
                raise web.HTTPTemporaryRedirect("/elsewhere")
            case "endless":
                response = web.StreamResponse()
                await response.prepare(request)
                while not transport.is_closing():
                    await response.write(b"x" * 65536)
                return response
            case "slow":
                await asyncio.sleep(0.2)
        return web.Response(status=204)


def certificate(folder: Path, host: str = "127.0.0.1") -> Path:
    """Make a certificate that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"receiver-{host}.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path
