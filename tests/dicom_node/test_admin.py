"""The admin pages: what hangs behind one of them does not keep the node from stopping; and which of them Docker asks."""

from __future__ import annotations

import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

from dicom_node.admin import AdminServer


def test_a_check_that_hangs_does_not_keep_the_server_from_stopping() -> None:
    """A client waits for /readyz, whose check does not end: the server stops all the same, long before the check would."""
    asked, stopped, ended = threading.Event(), threading.Event(), []

    def readiness() -> list[str]:
        asked.set()
        ended.append(stopped.wait(45))
        return []

    server = AdminServer(host="127.0.0.1", port=0, metrics=lambda: b"", readiness=readiness)
    server.start()

    def ask() -> None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.address[1]}/readyz", timeout=120):
            pass

    client = threading.Thread(target=ask)
    client.start()
    assert asked.wait(60)
    server.stop()
    stopped.set()
    client.join()
    assert ended in ([], [True])


def test_docker_asks_whether_the_node_lives() -> None:
    """A node whose bucket is away is not ready, and well: an orchestrator that killed it for that would kill every node there is."""
    (check,) = [line for line in Path(__file__).parents[2].joinpath("Dockerfile").read_text().splitlines() if "urlopen" in line]
    assert "/healthz" in check
