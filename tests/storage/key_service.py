"""A key service for tests: moto's, real HTTP, behind a front that can refuse, fail, hang or be gone.

moto opens with disabled keys and knows no quota, so what AWS answers then is scripted here, in the words of its API reference.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

REGION = "eu-central-1"


class _Front(ThreadingHTTPServer):
    daemon_threads = True
    service: KeyService


class _Handler(BaseHTTPRequestHandler):
    server: _Front

    def do_POST(self) -> None:
        """Answer as scripted, else with moto's answer."""
        service = self.server.service
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        operation = self.headers.get("X-Amz-Target", "").removeprefix("TrentService.")
        service.requests.append(operation)
        credential = self.headers.get("Authorization", "").partition("Credential=")[2]
        service.access_keys.append(credential.partition("/")[0])
        status, answer = service.scripted(operation)
        if status < 0:
            service.released.wait()
            self.close_connection = True
            return
        if not status:
            upstream = http.client.HTTPConnection(*service.upstream)
            upstream.request("POST", self.path, body, dict(self.headers))
            response = upstream.getresponse()
            status, answer = response.status, response.read()
            upstream.close()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class KeyService:
    """Where keys are, and how it is to behave."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        self.access_keys: list[str] = []
        self.released = threading.Event()
        self._script: list[tuple[str, int, bytes]] = []
        self._front = self._open(0)
        self.url = f"http://127.0.0.1:{self._front.server_port}"
        self._direct = boto3.client("kms", region_name=REGION, endpoint_url=f"http://{upstream[0]}:{upstream[1]}")

    def make_key(self) -> str:
        """Make a symmetric key and return its ARN."""
        return self._direct.create_key()["KeyMetadata"]["Arn"]

    def make_alias(self, name: str, arn: str) -> None:
        """Let ``alias/name`` be `arn`."""
        self._direct.create_alias(AliasName=f"alias/{name}", TargetKeyId=arn.split("/")[1])

    def refuse(self, code: str, *, operation: str = "", status: int = 400, times: int = 1000) -> None:
        """Refuse the next requests, of one operation or all, with an error of AWS."""
        self.answer(json.dumps({"__type": code, "message": "scripted"}).encode(), operation=operation, status=status, times=times)

    def answer(self, body: bytes, *, operation: str = "", status: int = 200, times: int = 1000) -> None:
        """Answer the next requests with given bytes."""
        self._script = [(operation, status, body)] * times

    def hang(self) -> None:
        """Take requests and answer nothing."""
        self._script = [("", -1, b"")] * 1000

    def recover(self) -> None:
        """Behave again."""
        self._script = []

    def go(self) -> None:
        """Be gone: nothing listens."""
        self._front.shutdown()
        self._front.server_close()

    def come_back(self) -> None:
        """Listen again, at the same address."""
        self._front = self._open(self._front.server_port)

    def scripted(self, operation: str) -> tuple[int, bytes]:
        """Return what to answer to this request; status 0 for moto's answer."""
        if self._script and self._script[0][0] in {"", operation}:
            _, status, body = self._script.pop(0)
            return status, body
        return 0, b""

    def _open(self, port: int) -> _Front:
        front = _Front(("127.0.0.1", port), _Handler)
        front.service = self
        threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return front


@contextmanager
def moto_server() -> Iterator[tuple[str, int]]:
    """Run moto's server; its keys are shared by all that use it."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


@contextmanager
def key_service(upstream: tuple[str, int]) -> Iterator[KeyService]:
    """Run a key service before moto's; the caller's environment has credentials."""
    service = KeyService(upstream)
    try:
        yield service
    finally:
        service.released.set()
        service.go()
