"""A whole node as its users have it: `dicom-node serve` in processes of its own, on free ports, with a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dicom_node.config import load
from dicom_node.storehouse import Storehouse, storage
from tests.ports import free_port

START_S = 90.0


class RunningNode:
    """Starts, stops, kills and asks a node."""

    def __init__(self, folder: Path, *, toml: str = "", environ: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data_dir = folder / "var"
        self.dimse_port, self.web_port, self.admin_port = free_port(), free_port(), free_port()
        self.config = folder / "node.toml"
        self.config.write_text(toml)
        self.log = folder / "node.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DICOM_NODE_", "AWS_"))}
        self.environ = {
            **clean,
            "DICOM_NODE_NODE__DATA_DIR": str(self.data_dir),
            "DICOM_NODE_DIMSE__PORT": str(self.dimse_port),
            "DICOM_NODE_DICOMWEB__PORT": str(self.web_port),
            "DICOM_NODE_ADMIN__PORT": str(self.admin_port),
            "DICOM_NODE_LOGGING__FORMAT": "json",
            **(environ or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Of DICOMweb."""
        return f"http://127.0.0.1:{self.web_port}/dicomweb"

    def command(
        self, *arguments: str, expect: int | None = 0, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `dicom-node` against this node."""
        done = subprocess.run(
            [sys.executable, "-m", "dicom_node", *arguments, "--config", str(self.config)],
            env={**self.environ, **(environ or {})}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        if expect is not None:
            assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.log_text()[-3000:]}"
        return done

    def start(self, *, wait: bool = True, environ: Mapping[str, str] | None = None, output: int | None = None) -> RunningNode:
        """Start and wait until it is ready; with `output` it writes to that descriptor instead of its log file."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dicom_node", "serve", "--config", str(self.config)],
                env={**self.environ, **(environ or {})},
                stdout=log if output is None else output,
                stderr=log if output is None else output,
            )
        if wait:
            try:
                self.await_ready()
            except AssertionError:
                self.kill()
                raise
        return self

    def await_ready(self) -> None:
        """Wait until /readyz says so."""
        deadline = time.monotonic() + START_S
        while not self.ready():
            assert self.process is not None
            assert self.process.poll() is None, f"the node ended with {self.process.returncode}:\n{self.log_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready in {START_S} s:\n{self.log_text()[-3000:]}"
            time.sleep(0.1)

    def ready(self) -> bool:
        """Ask /readyz."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/readyz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the parent; its children stop by themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def kill_all(self) -> None:
        """SIGKILL to the parent and to every child, as when the machine fails."""
        assert self.process is not None
        # The parent first: it would start its children again.
        victims = list(self.children())
        self.process.kill()
        for process_id in victims:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.process.wait()
        self.process = None
        deadline = time.monotonic() + START_S
        while any(Path(f"/proc/{process_id}").exists() for process_id in victims):
            assert time.monotonic() < deadline, "a killed process is still there"
            time.sleep(0.02)

    def lose(self) -> None:
        """Lose the node for ever: its processes and its disk."""
        if self.process is not None:
            self.kill_all()
        shutil.rmtree(self.data_dir)

    @property
    def ring_file(self) -> Path:
        """Its key ring."""
        return self.data_dir / "keys" / "ring.json"

    def take_ring(self, ring: bytes) -> None:
        """Put a copy of another node's ring in its place."""
        self.ring_file.parent.mkdir(parents=True, mode=0o700)
        self.ring_file.write_bytes(ring)
        self.ring_file.chmod(0o600)

    def start_role(self, role: str) -> subprocess.Popen[bytes]:
        """Start one role by itself; who calls ends it."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dicom_node", "serve", "--role", role, "--config", str(self.config)],
                env=self.environ, stdout=log, stderr=log,
            )  # fmt: skip

    def children(self) -> dict[int, str]:
        """Process id -> role of each child."""
        assert self.process is not None
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and b"--role" in words:
                found[int(entry.name)] = words[words.index(b"--role") + 1].decode()
        return found

    @contextmanager
    def parts(self) -> Iterator[Storehouse]:
        """Its archive, opened in this process as its own processes open it."""
        environ = {name: value for name, value in self.environ.items() if name.startswith("DICOM_NODE_")}
        with storage(load(self.config, environ)) as parts:
            yield parts

    def log_text(self) -> str:
        """Everything it logged."""
        return self.log.read_text() if self.log.exists() else ""

    def trace(self, uid: str) -> dict[str, Any]:
        """`dicom-node trace --json`."""
        return dict(json.loads(self.command("trace", uid, "--json").stdout))

    def await_trace(self, uid: str, done: Any, *, seconds: float = 90.0) -> dict[str, Any]:
        """Trace ``uid`` until ``done(trace)``."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.trace(uid)
            if done(found):
                return found
            assert time.monotonic() < deadline, f"{json.dumps(found, indent=1)[:4000]}\n{self.log_text()[-2000:]}"
            time.sleep(0.3)


@contextmanager
def running_node(folder: Path, *, toml: str = "", environ: Mapping[str, str] | None = None) -> Iterator[RunningNode]:
    """Give a started node; it is stopped at the end."""
    node = RunningNode(folder, toml=toml, environ=environ).start()
    try:
        yield node
    finally:
        if node.process is not None:
            node.stop()


def get(url: str, accept: str = "*/*") -> tuple[int, bytes]:
    """GET; status and body, whatever the status."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def analysed(found: dict[str, Any]) -> bool:
    """Every instance of a trace has a finished analysis."""
    jobs = [job for instance in found["instances"] for job in instance["jobs"] if job["kind"] == "analyse"]
    return bool(jobs) and all(job["state"] == "done" for job in jobs)
