"""The listening socket of the HTTP door: deadlines for headers, limits of the request head, drained shutdown.

aiohttp closes idle connections, but waits without end for the first request of a connection to be complete, and answers what is no
HTTP with the parser's own words. Both are changed here.

References
----------
RFC 9112 Section 2.2; RFC 9457
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from typing import Any

from aiohttp import web
from aiohttp.web_request import BaseRequest

from dicomweb.app import TRAFFIC
from dicomweb.errors import problem

_log = logging.getLogger(__name__)


class _Connection(web.RequestHandler):
    """One connection: its first request must be there in time, and what is no HTTP gets a problem document."""

    __slots__ = ("_head_s", "_head_timer")

    def __init__(self, *arguments: Any, head_s: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._head_s = head_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(self._head_s, self._head_is_due)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _head_is_due(self) -> None:
        # Later requests of the connection are covered by aiohttp's keep-alive timer, which partial headers do not stop.
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what could not be read as HTTP; nothing that was sent is said back."""
        del message
        _log.info("connection.refused", extra={"status": status, "reason": type(exc).__name__})
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, it cannot become another")
        detail = "the request is no HTTP/1.1, or its head is too long" if status < 500 else "a fault of the node; its log tells more"
        response = web.Response(
            status=status,
            body=json.dumps(problem(status, detail)).encode(),
            headers={"Content-Type": "application/problem+json", "X-Content-Type-Options": "nosniff", "Server": "dicom-node"},
        )
        response.force_close()
        return response


class Serving:
    """A running HTTP door; made by `serve`."""

    def __init__(self, app: web.Application, runner: web.AppRunner, server: asyncio.Server, drain_s: float) -> None:
        self._app = app
        self._runner = runner
        self._server = server
        self._drain_s = drain_s

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on."""
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def close(self) -> None:
        """Take no new connection, let running requests end within the drain time, then close."""
        self._server.close()
        # aiohttp's own shutdown stops reading at once, so that an upload could never end: wait first.
        await self._app[TRAFFIC].drain(self._drain_s)
        await self._runner.cleanup()


async def serve(
    app: web.Application,
    *,
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    reuse_port: bool = False,
    head_s: float = 20.0,
    keepalive_s: float = 75.0,
    drain_s: float = 30.0,
) -> Serving:
    """Listen, and answer requests in the running loop until `Serving.close`.

    Parameters
    ----------
    app
        From `dicomweb.app.make_app`.
    port
        0 takes a free one.
    reuse_port
        Share the port with other processes.
    head_s
        The head of a connection's first request must be there within this time.
    keepalive_s
        A connection waits this long for its next request.
    drain_s
        Running requests may take this long when the door closes.

    Raises
    ------
    OSError
        The address cannot be listened on.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    loop = asyncio.get_running_loop()
    manager = runner.server

    def connection() -> asyncio.Protocol:
        return _Connection(
            manager,
            loop=loop,
            head_s=head_s,
            keepalive_timeout=keepalive_s,
            access_log=None,
            auto_decompress=False,
            max_line_size=8190,
            max_field_size=8190,
            max_headers=64,
            lingering_time=5.0,
        )

    try:
        server = await loop.create_server(connection, host, port, ssl=ssl_context, reuse_port=reuse_port or None, backlog=1024)
    except BaseException:
        await runner.cleanup()
        raise
    return Serving(app, runner, server, drain_s)
