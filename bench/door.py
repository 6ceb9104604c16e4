"""What is seen from outside: C-STORE into the node and into Orthanc, interleaved; and what a report and a seal cost.

A peer that is not installed is named, never replaced by an old number.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.data_sets import picture
from storage.database import Database
from storage.envelope import Sealer
from storage.keys import Ring
from storage.study_keys import StudyKeys
from tests.inference import report_drawing as draw
from tests.interop.orthanc import running_orthanc
from tests.system.running_node import free_port, running_node

COUNTS = {"tiny": 200, "small": 100, "jpeg": 40}
"""Instances a round."""


def _instance(kind: str, number: int, folder: Path) -> None:
    """Draw one instance into a file."""
    buffer = BytesIO()
    picture(kind, number).save_as(buffer, enforce_file_format=True)
    (folder / f"{kind}-{number}.dcm").write_bytes(buffer.getvalue())


def sent(folder: Path, ae_title: str, port: int) -> float:
    """Send a folder with dcmsend at its defaults, but for the PDU size; seconds."""
    command = ["dcmsend", "--max-pdu", "131072", "-aec", ae_title, "127.0.0.1", str(port), "+sd", str(folder)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TCP_NODELAY": "1"})
    return time.perf_counter() - began


def c_store(rounds: int, folder: Path, results: dict[str, Any]) -> None:
    """Interleave node and Orthanc."""
    if shutil.which("dcmsend") is None:
        print("C-STORE: dcmsend is not installed (make peers); not measured")
        return
    with ExitStack() as stack:
        settings = {"DICOM_NODE_INFERENCE__ENABLED": "false"}
        node = stack.enter_context(running_node(folder / "node", environ=settings))
        contenders = {"node": ("DERM_NODE", node.dimse_port)}
        if shutil.which("Orthanc") or Path("/usr/sbin/Orthanc").exists():
            port = free_port()
            stack.enter_context(running_orthanc(folder / "orthanc", ae_title="ORTHANC", modalities={}, dicom_port=port))
            contenders["Orthanc"] = ("ORTHANC", port)
        else:
            print("C-STORE: Orthanc is not installed (make peers); measured without it")
        for kind, count in COUNTS.items():
            rates: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds):
                for name, (ae_title, port) in contenders.items():
                    files = folder / f"{kind}-{turn}-{name}"
                    files.mkdir()
                    for number in range(count):
                        _instance(kind, number, files)
                    rates[name].append(count / sent(files, ae_title, port))
                    shutil.rmtree(files)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            line = f"C-STORE {kind:<6}" + "".join(f"  {name} {value:7.1f}/s" for name, value in medians.items())
            if "Orthanc" in medians:
                line += f"  ratio {medians['node'] / medians['Orthanc']:.2f}"
            print(line, flush=True)
            results[f"c-store {kind}"] = {"medians per second": medians, "all": rates}


def repeated(name: str, work: Callable[[], float], results: dict[str, Any], unit: str) -> None:
    """Print the median of seven."""
    median = statistics.median(work() for _ in range(7))
    print(f"{name}  {median:.2f} {unit}", flush=True)
    results[name] = {"median": median, "unit": unit}


def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Measure all of it."""
    results: dict[str, Any] = {}
    ring = Ring.create(folder / "ring.json")
    database = Database(url=f"sqlite:///{folder}/index.db", key=ring.database_key())
    database.migrate()
    study_keys = StudyKeys(database=database, ring=ring)
    study_key = study_keys.current("2.25.1")
    block = os.urandom(1 << 20)

    def seal() -> float:
        began = time.perf_counter()
        sealer = Sealer("0" * 32, lambda _: None)
        for _ in range(128):
            sealer.update(block)
        sealer.finish({}, study_key, study_keys)
        return 128 / (time.perf_counter() - began)

    def report() -> float:
        from inference.report import build_reports  # noqa: PLC0415 - the other sections go without it

        source, analysis, context = draw.source(), draw.analysis(draw.frame()), draw.context()
        began = time.process_time()
        build_reports(source, analysis, context, node=draw.NODE)
        return (time.process_time() - began) * 1000

    repeated("seal and digest", seal, results, "MiB/s")
    repeated("reports of one image", report, results, "ms CPU")
    c_store(rounds, folder, results)
    database.close()
    return results
