"""Independent validators judge every object we make: dicom3tools (dciodvfy, dcentvfy) and DCMTK (dsrdump)."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from inference.records import Category, Code, Diagnosis, Failure, ImageAnalysis, Lesion, Report, ReportReference, Segmentation
from inference.report import build_reports
from tests.inference import report_drawing as draw

pytestmark = pytest.mark.peer

# Schemes that dciodvfy cannot know: ours, ICD-11's, and their UIDs. Nothing else may be warned of.
_OWN_SCHEMES = re.compile(
    r"Coding(SchemeDesignator|SchemeUID)\(.*Unrecognized defined term = <(99DERMNODE|99ICD11|2\.16\.840\.1\.113883\.6\.347|2\.25\.\d+)>$"
)
# Said of every object whose source has an empty type 2 attribute: it could not be put on a CD as it is.
_EMPTY_IN_SOURCE = re.compile(r"- Missing attribute or value that would be needed to build DICOMDIR$")
# Accession Number stands in the series of a SEG and in the study of an SR for dcentvfy: harmless (report.md section 5)
_ACCESSION = re.compile(r"Different information entities for attribute - Element=<AccessionNumber>")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: install the packages dicom3tools and dcmtk")
    return found


def _typical() -> tuple[Dataset, ImageAnalysis]:
    return draw.source(), draw.analysis()


def _dermoscopic() -> tuple[Dataset, ImageAnalysis]:
    return draw.reread(draw.source(draw.DERMOSCOPIC)), draw.analysis()


def _secondary_capture() -> tuple[Dataset, ImageAnalysis]:
    return draw.source(draw.SECONDARY_CAPTURE), draw.analysis()


def _bare() -> tuple[Dataset, ImageAnalysis]:
    return draw.source(draw.SECONDARY_CAPTURE, bare=True), draw.analysis()


def _multi_frame() -> tuple[Dataset, ImageAnalysis]:
    frames = (draw.frame(1, discs=[(40, 50, 25)]), draw.frame(2), draw.frame(3, discs=[(40, 60, 20), (90, 120, 12)]))
    return draw.source(draw.MULTI_FRAME_TRUE_COLOUR, frames=5), draw.analysis(*frames, count=5)


def _multi_frame_merged() -> tuple[Dataset, ImageAnalysis]:
    discs = [(10.0 + 20 * (n // 7), 10.0 + 20 * (n % 7), 6.0) for n in range(15)]
    return draw.source(draw.MULTI_FRAME_TRUE_COLOUR, frames=2), draw.analysis(draw.frame(1, discs=discs), draw.frame(2, discs=discs))


def _refused() -> tuple[Dataset, ImageAnalysis]:
    frame = replace(draw.frame(), quality=draw.quality(12, acceptable=False), domain=draw.domain(dermatological=False, confidence=0.031))
    return draw.source(), draw.analysis(frame)


def _nothing() -> tuple[Dataset, ImageAnalysis]:
    frame = replace(
        draw.frame(), quality=None, domain=None, failures=(Failure("quality", "bundle absent"), Failure("domain", "bundle absent"))
    )
    return draw.source(), draw.analysis(frame)


def _partial() -> tuple[Dataset, ImageAnalysis]:
    frame = replace(draw.frame(discs=[(40, 50, 25)]), diagnosis=None, indicators=(), failures=(Failure("diagnosis", "bundle damaged"),))
    return draw.source(), draw.analysis(frame)


def _many() -> tuple[Dataset, ImageAnalysis]:
    discs = [(6.0 + 12 * (n // 20), 6.0 + 12 * (n % 20), 4.0) for n in range(300)]
    return draw.source(rows=200, columns=250), draw.analysis(draw.frame(discs=discs, rows=200, columns=250))


def _border() -> tuple[Dataset, ImageAnalysis]:
    mask = np.ones((121, 163), dtype=bool)
    whole = np.array([[-3, -3], [170, -3], [170, 130], [-3, 130]], dtype=np.float32)
    nothing = np.array([[1, 1], [9, 1], [1, 1]], dtype=np.float32)
    lesions = (Lesion("lesion-1", whole, 1e9, 100, None, 1.0), Lesion("lesion-2", nothing, 0, 0, None, 0.0))
    frame = replace(draw.frame(rows=121, columns=163), segmentation=Segmentation(mask, lesions, draw.algorithm("lesion-segmenter")))
    return draw.source(rows=121, columns=163), draw.analysis(frame)


def _codes() -> tuple[Dataset, ImageAnalysis]:
    title = "Malignant neoplasm of the skin, of a kind that has a title which no attribute of sixty-four characters could hold: 黒色腫"
    categories = (
        Category("a", Code("2C30&XH4846&XA1234&XT8W", "99ICD11", title), math.nan),
        Category("b", Code("urn:oid:2.16.840.1.113883.6.347", "99ICD11", "黒" * 70), 0.3),
    )
    frame = replace(draw.frame(), diagnosis=Diagnosis(categories, 0.9, draw.algorithm("模" * 80)))
    return draw.source(), draw.analysis(frame)


def _ideographic() -> tuple[Dataset, ImageAnalysis]:
    source = draw.source()
    source.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    source.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    source.PatientID = "患者42"
    source.ReferringPhysicianName = "Yamada^T=" + "山" * 9 + "^" + "山" * 8
    return draw.reread(source), draw.analysis()


def _odd_source() -> tuple[Dataset, ImageAnalysis]:
    source = draw.source()
    wrong = {
        "PatientName": "x" * 70,
        "PatientID": "1" * 65,
        "PatientBirthDate": "yesterday",
        "PatientSex": "female",
        "AccessionNumber": "a" * 20,
    }
    for keyword, value in wrong.items():
        element = source[keyword]
        source[keyword] = DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)
    source.LossyImageCompression = "01"
    source.PatientOrientation = ["L", "F"]
    source.TimezoneOffsetFromUTC = "+0900"
    return source, draw.analysis()


def _lossy() -> tuple[Dataset, ImageAnalysis]:
    source = draw.source()
    source.LossyImageCompression = "01"
    source.LossyImageCompressionRatio = "12.5"
    source.LossyImageCompressionMethod = "ISO_10918_1"
    return source, draw.analysis()


CASES: dict[str, Callable[[], tuple[Dataset, ImageAnalysis]]] = {
    case.__name__.lstrip("_"): case
    for case in (
        _typical,
        _dermoscopic,
        _secondary_capture,
        _bare,
        _multi_frame,
        _multi_frame_merged,
        _refused,
        _nothing,
        _partial,
        _many,
        _border,
        _codes,
        _ideographic,
        _odd_source,
        _lossy,
    )
}


def _files(folder: Path, reports: tuple[Report, ...]) -> list[Path]:
    files = []
    for report in reports:
        files.append(folder / f"{report.kind}.dcm")
        files[-1].write_bytes(draw.part10(report).getvalue())
    return files


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_validators_find_nothing(case: Callable[[], tuple[Dataset, ImageAnalysis]], tmp_path: Path) -> None:
    """No error of dciodvfy, no warning but for our own designators; dsrdump reads every SR; dcentvfy finds the three consistent."""
    source, analysis = case()
    before = ReportReference(str(source.StudyInstanceUID), "2.25.11", "1.2.840.10008.5.1.4.1.1.88.34", "2.25.12")
    context = draw.context(predecessors={"summary": before, "findings": before})
    files = _files(tmp_path, build_reports(source, analysis, context, node=draw.NODE))
    for file in files:
        done = subprocess.run([_tool("dciodvfy"), "-new", file], capture_output=True, text=True, errors="replace", check=False)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        left = [line for line in said if not _OWN_SCHEMES.search(line) and not _EMPTY_IN_SOURCE.search(line)]
        assert left == ["Segmentation" if file.stem == "segmentation" else "Comprehensive3DSR"], f"{file.stem}: {left}"
        assert done.returncode == 0
        if file.stem != "segmentation":
            done = subprocess.run([_tool("dsrdump"), "-Er", file], capture_output=True, text=True, errors="replace", check=False)
            assert done.returncode == 0
            assert "E:" not in done.stderr, done.stderr
            assert "Imaging Measurement Report" in done.stdout
    done = subprocess.run([_tool("dcentvfy"), *files], capture_output=True, text=True, errors="replace", check=False)
    assert [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not _ACCESSION.search(line)] == []


def test_the_validators_do_find_faults(tmp_path: Path) -> None:
    """Negative control: a report without its Completion Flag is an error to dciodvfy."""
    source, analysis = _typical()
    report = build_reports(source, analysis, draw.context(), node=draw.NODE)[0]
    damaged = report.data_set.replace(b"\x40\x00\x91\xa4CS\x08\x00COMPLETE", b"")
    assert len(damaged) < len(report.data_set)
    (file,) = _files(tmp_path, (replace(report, data_set=damaged),))
    done = subprocess.run([_tool("dciodvfy"), "-new", file], capture_output=True, text=True, errors="replace", check=False)
    assert "Error - " in done.stdout + done.stderr
