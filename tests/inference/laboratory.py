"""A laboratory over seeded bundles whose gates open and shut as told, for tests of the pipeline and of the worker.

As a program it forks a child for each failpoint, which takes the job of a house of that name and is killed there:
``python -m tests.inference.laboratory BUNDLES FOLDER POINT...`` (one start of torch for all of them).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from dicom_node.photograph import PhotographOptions, wrap_pixels
from inference.bundle import load_bundle
from inference.pipeline import Pipeline
from inference.report import NodeIdentity, build_reports
from inference.runner import ModelRunner
from inference.worker import Worker
from storage.failpoints import VARIABLE, failpoint_from_environment, unarmed
from storage.records import Receipt
from storage.work import WorkQueue
from tests.inference.models import write_bundle
from tests.storage.house import House, build, origin_of

TASKS = ("quality", "domain", "diagnosis", "segmentation")
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
IDENTITY = NodeIdentity("makers", "dicom-node", "0.1.0", "serial-1")


def write_laboratory(
    folder: Path, *, acceptable: bool = True, shown: str = "dermoscopic", tasks: Sequence[str] = TASKS, **changes: dict[str, Any]
) -> Path:
    """Write bundles; the quality gate opens when `acceptable`, the domain gate finds `shown`: dermoscopic, clinical or other.

    `changes` alter the manifest of the task they are named after.
    """
    bias = [20.0 * (key == shown) for key in ("dermoscopic", "clinical", "other")]
    gates: dict[str, dict[str, Any]] = {
        "quality": {"thresholds": {"acceptable": 0 if acceptable else 101}},
        "domain": {"calibration": {"bias": bias}},
        "segmentation": {"thresholds": {"mask": 0.4, "minimum_area_percent": 0.1}},
    }
    for task in tasks:
        write_bundle(folder, task, **{**gates.get(task, {}), **changes.get(task, {})})
    return folder


def pipeline_of(folder: Path, **options: Any) -> Pipeline:
    """Make a pipeline over the bundles in a folder."""
    bundles = [load_bundle(path) for path in sorted(folder.iterdir())]
    return Pipeline(model=ModelRunner(bundles, threads=1, device="cpu"), **options)


def picture(rows: int = 96, columns: int = 128, seed: int = 1) -> NDArray[np.uint8]:
    """Draw blocks of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-rows // 16), -(-columns // 16), 3), np.uint8)
    return np.ascontiguousarray(np.repeat(np.repeat(small, 16, 0), 16, 1)[:rows, :columns])


def photograph(seed: int = 1) -> bytes:
    """Wrap a picture as a dermoscopic photograph, a DICOM file."""
    options = PhotographOptions(dermoscopic=True, patient_id="CANARY-ID", patient_name="Canary^Patient", body_site="back")
    return wrap_pixels(picture(seed=seed), options, now=NOON)


def ingest(house: House, part10: bytes, **origin: str) -> Receipt:
    """Receive a DICOM file."""
    meta = pydicom.dcmread(pydicom.filebase.DicomBytesIO(part10), stop_before_pixels=True).file_meta
    # group 0002 ends where its group length says: preamble, DICM, the length element, and what it counts
    begin = 128 + 4 + 12 + meta.FileMetaInformationGroupLength
    with house.archive.receive(origin_of(**origin), transfer_syntax_uid=str(meta.TransferSyntaxUID)) as intake:
        intake.write(part10[begin:])
        return intake.commit()


def worker_of(
    house: House,
    pipeline: Pipeline,
    *,
    queue: WorkQueue | None = None,
    reach: Callable[[str], None] = unarmed,
    **options: Any,
) -> Worker:
    """Make a worker over a house."""
    return Worker(
        archive=house.archive,
        index=house.index,
        queue=queue or house.queue,
        pipeline=pipeline,
        reports=partial(build_reports, node=IDENTITY),
        installation_uid="2.25.77",
        reach=reach,
        **options,
    )


def _work_until(point: str, folder: Path, pipeline: Pipeline) -> None:
    armed = failpoint_from_environment({VARIABLE: f"{point}:1"})
    opened = build(folder, reach=armed)
    worker_of(opened, pipeline, reach=armed).work_once()


if __name__ == "__main__":
    shared_pipeline = pipeline_of(Path(sys.argv[1]))
    for killed_at in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            _work_until(killed_at, Path(sys.argv[2]) / killed_at, shared_pipeline)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(killed_at, status)  # noqa: T201 - read by the test
