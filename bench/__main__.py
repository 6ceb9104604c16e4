"""C-STORE into the node and into Orthanc, interleaved; and what a report and a seal cost.

Only ratios within one run count: the machine may be noisy. A peer that is not installed is named, never replaced by an old number.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from inference.drawing import draw_skin_picture
from storage.database import Database
from storage.envelope import Sealer
from storage.keys import Ring
from storage.study_keys import StudyKeys
from tests.inference import report_drawing as draw
from tests.interop.orthanc import running_orthanc
from tests.system.running_node import free_port, running_node

COUNTS = {"tiny": 200, "small": 100, "jpeg": 40}
"""Instances a round."""


def instance(kind: str, number: int, folder: Path) -> Path:
    """Draw one instance: tiny 64x128 8 bit, small 512x512 16 bit, jpeg 4000x3000 baseline."""
    data_set = Dataset()
    data_set.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data_set.SOPInstanceUID = pydicom.uid.generate_uid()
    data_set.StudyInstanceUID = data_set.SeriesInstanceUID = f"1.2.{time.time_ns()}.{number}"
    data_set.PatientName, data_set.PatientID, data_set.Modality = "Bench^Mark", "bench", "OT"
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
        setattr(data_set, keyword, "")
    data_set.SeriesNumber = data_set.InstanceNumber = "1"
    data_set.ConversionType = "WSD"
    syntax = pydicom.uid.ExplicitVRLittleEndian
    if kind == "jpeg":
        rows, columns, bits, samples = 3000, 4000, 8, 3
        picture = cv2.resize(draw_skin_picture(seed=number % 4, rows=750, columns=1000), (columns, rows))
        stream = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        data_set.PixelData, syntax = encapsulate([stream]), pydicom.uid.JPEGBaseline8Bit
        data_set.PhotometricInterpretation, data_set.PlanarConfiguration = "YBR_FULL_422", 0
    else:
        rows, columns, bits, samples = (64, 128, 8, 1) if kind == "tiny" else (512, 512, 16, 1)
        data_set.PixelData = np.random.default_rng(number).bytes(rows * columns * bits // 8)
        data_set.PhotometricInterpretation = "MONOCHROME2"
    data_set["PixelData"].VR = "OB" if bits == 8 else "OW"
    data_set.Rows, data_set.Columns, data_set.SamplesPerPixel = rows, columns, samples
    data_set.BitsAllocated = data_set.BitsStored = bits
    data_set.HighBit, data_set.PixelRepresentation = bits - 1, 0
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    data_set.save_as(buffer, enforce_file_format=True)
    path = folder / f"{kind}-{number}.dcm"
    path.write_bytes(buffer.getvalue())
    return path


def sent(folder: Path, ae_title: str, port: int) -> float:
    """Send a folder with dcmsend at its defaults, but for the PDU size; seconds."""
    command = ["dcmsend", "--max-pdu", "131072", "-aec", ae_title, "127.0.0.1", str(port), "+sd", str(folder)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TCP_NODELAY": "1"})
    return time.perf_counter() - began


def ingest(rounds: int, folder: Path, results: dict[str, object]) -> None:
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
                        instance(kind, number, files)
                    rates[name].append(count / sent(files, ae_title, port))
                    shutil.rmtree(files)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            line = f"C-STORE {kind:<6}" + "".join(f"  {name} {value:7.1f}/s" for name, value in medians.items())
            if "Orthanc" in medians:
                line += f"  ratio {medians['node'] / medians['Orthanc']:.2f}"
            print(line, flush=True)
            results[f"c-store {kind}"] = {"medians per second": medians, "all": rates}


def repeated(name: str, work: Callable[[], float], results: dict[str, object], unit: str) -> None:
    """Print the median of seven."""
    median = statistics.median(work() for _ in range(7))
    print(f"{name}  {median:.2f} {unit}", flush=True)
    results[name] = {"median": median, "unit": unit}


def main() -> None:
    """Run everything this machine can."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    results: dict[str, object] = {"machine": platform.machine(), "processors": os.cpu_count(), "rounds": rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
            from inference.report import build_reports  # noqa: PLC0415

            source, analysis, context = draw.source(), draw.analysis(draw.frame()), draw.context()
            began = time.process_time()
            build_reports(source, analysis, context, node=draw.NODE)
            return (time.process_time() - began) * 1000

        repeated("seal and digest", seal, results, "MiB/s")
        repeated("reports of one image", report, results, "ms CPU")
        ingest(rounds, folder, results)
    target = Path(__file__).parent / "results"
    target.mkdir(exist_ok=True)
    path = target / f"{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
