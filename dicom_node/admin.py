"""/metrics, /healthz and /readyz, on an address of their own, never on the DICOMweb listener."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import web

log = structlog.get_logger()

END_S: Final = 2.0
"""How long a stop waits for pages that are being made; a check that hangs must not keep the node from stopping."""


class AdminServer:
    """Serves the three pages from a thread of its own.

    Parameters
    ----------
    metrics
        The exposition text.
    readiness
        What is not well, in words; empty: ready. May block; it runs in a thread.
    warnings
        What is worth a look although all is ready, in words; as `readiness`.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        metrics: Callable[[], bytes],
        readiness: Callable[[], list[str]],
        warnings: Callable[[], list[str]] = list,
    ) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._readiness = readiness
        self._warnings = warnings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)
        self._started: threading.Event = threading.Event()
        self._error: OSError | None = None
        self.address: tuple[str, int] = (host, port)

    def start(self) -> None:
        """Listen.

        Raises
        ------
        OSError
            The address is taken or not ours.
        """
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=END_S)

        async def listen() -> None:
            await runner.setup()
            site = web.TCPSite(runner, self._host, self._port, reuse_address=True)
            await site.start()
            self.address = runner.addresses[0][:2]

        try:
            self._loop.run_until_complete(listen())
        except OSError as error:
            self._error = error
            self._loop.run_until_complete(runner.cleanup())
            self._loop.close()
            return
        finally:
            self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def _app(self) -> web.Application:
        async def metrics(_request: web.Request) -> web.Response:
            text = await asyncio.to_thread(self._metrics)
            return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

        async def healthz(_request: web.Request) -> web.Response:
            return web.Response(text="alive\n")

        async def readyz(_request: web.Request) -> web.Response:
            faults = await asyncio.to_thread(self._readiness)
            warnings = await asyncio.to_thread(self._warnings)
            return web.Response(status=503 if faults else 200, text="\n".join([*(faults or ["ready"]), *warnings]) + "\n")

        app = web.Application()
        app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
        return app
