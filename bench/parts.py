"""What parts of the node cost by themselves: sealing, building a report."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.database import Database
from storage.envelope import Sealer
from storage.keys import Ring
from storage.study_keys import StudyKeys
from tests.inference import report_drawing as draw


def repeated(name: str, work: Callable[[], float], results: dict[str, Any], unit: str) -> None:
    """Print the median of seven."""
    median = statistics.median(work() for _ in range(7))
    print(f"{name}  {median:.2f} {unit}", flush=True)
    results[name] = {"median": median, "unit": unit}


def run(folder: Path) -> dict[str, Any]:
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
        from inference.report import build_reports

        source, analysis, context = draw.source(), draw.analysis(draw.frame()), draw.context()
        began = time.process_time()
        build_reports(source, analysis, context, node=draw.NODE)
        return (time.process_time() - began) * 1000

    repeated("seal and digest", seal, results, "MiB/s")
    repeated("reports of one image", report, results, "ms CPU")
    database.close()
    return results
