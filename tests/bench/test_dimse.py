"""The measurement itself: everybody who is here gets the same instances, and the figure is a figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from bench import dimse
from bench.data_sets import Pattern
from bench.figure import draw
from tests.interop.orthanc import program


def test_files_are_instances_of_their_studies(tmp_path: Path) -> None:
    """Twenty-five files are two studies, of two series and one; each can be read, and no UID of an instance is there twice."""
    Pattern.drawn("tiny").write_files(tmp_path, 25)
    read = [pydicom.dcmread(BytesIO(file.read_bytes())) for file in sorted(tmp_path.iterdir())]
    assert len({one.StudyInstanceUID for one in read}) == 2
    assert len({one.SeriesInstanceUID for one in read}) == 3
    assert len({one.SOPInstanceUID for one in read}) == 25
    assert all(one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID and len(one.PixelData) == 8192 for one in read)


@pytest.mark.peer
@pytest.mark.slow
def test_everybody_takes_a_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """A short run sends to node, Orthanc, storescp, pynetdicom and the floor, and each is compared with Orthanc."""
    for name in ("dcmsend", "storescp", "Orthanc"):
        program(name)
    results = dimse.run(1, short=True)
    (found,) = results.values()
    for kind in ("tiny", "jpeg"):
        assert found[kind].keys() == set(dimse.EVERYBODY)
        assert all(one["per second"] > 0 for one in found[kind].values())
        assert {name for name, one in found[kind].items() if "ratio" in one} == set(dimse.EVERYBODY) - {"Orthanc"}
    assert "ms CPU" in capsys.readouterr().out


def test_the_figure_shows_every_contender(tmp_path: Path) -> None:
    """The figure is well-formed, names whom it shows with rate and ratio (median of the rounds); a setting without Orthanc is left out."""
    node, floor = {"per second": 50.0, "ratio": 2.0}, {"per second": 1500.0, "ratio": 61.0}
    line = {"node": node, "Orthanc": {"per second": 25.0}, "floor": floor}
    results = {"a < b": {"tiny": line, "load": [1, 2]}, "by storescu": {"tiny": {"node": {"per second": 1.0}}, "load": [1, 2]}}
    draw(results, tmp_path / "figure.svg", title="today")
    tree = ET.parse(tmp_path / "figure.svg")  # noqa: S314 - written a line above
    words = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in words
    assert "node  2.00  (50.0/s)" in words
    assert "floor  61.00  (1,500/s, bar cut)" in words
    assert "by storescu" not in words
