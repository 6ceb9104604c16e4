"""The direct writer: what it writes, pydicom reads and would have written itself."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from inference.report import seg
from inference.report.encode import encode
from inference.report.identity import derived_uid
from inference.report.regions import share_out
from inference.report.values import shortened, valid
from tests.inference import report_drawing as draw


def test_bytes_equal_those_of_pydicom() -> None:
    """Every VR that is used, nested and empty sequences included: the bytes are those of pydicom's writer."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPInstanceUID = "1.2.3"
    ds.PatientName = "Ärzte"
    ds.Rows = 7
    ds.DimensionIndexPointer = 0x0062000B
    ds.GraphicData = [1.5, 2.25]
    ds.FloatingPointValue = 0.1
    ds.TextValue = "odd"
    ds.PixelData = b"\x01\x02"
    ds["PixelData"].VR = "OB"
    item = Dataset()
    item.CodeValue = "1"
    ds.ConceptNameCodeSequence = [item, Dataset()]
    ds.MeasuredValueSequence = []
    frame = Dataset()
    frame.DimensionIndexValues = [1, 2]
    ds.FrameContentSequence = [frame]
    expected = BytesIO()
    pydicom.dcmwrite(expected, ds, implicit_vr=False, little_endian=True)
    written = encode(
        [
            (0x7FE00010, "OB", b"\x01\x02"),
            (0x00209111, "SQ", ([(0x00209157, "UL", (1, 2))],)),
            (0x00080005, "CS", "ISO_IR 192"),
            (0x00080018, "UI", "1.2.3"),
            (0x00100010, "PN", "Ärzte"),
            (0x00280010, "US", 7),
            (0x00209165, "AT", 0x0062000B),
            (0x00700022, "FL", [1.5, 2.25]),
            (0x0040A161, "FD", 0.1),
            (0x0040A160, "UT", "odd"),
            (0x0040A043, "SQ", ([(0x00080100, "SH", "1")], b"")),
            (0x0040A300, "SQ", ()),
        ]
    )
    assert written == expected.getvalue()


def test_too_long_for_its_vr_is_refused() -> None:
    """A value beyond 16 bit of length raises instead of writing a wrong length."""
    with pytest.raises(ValueError, match=r"\(0070,0022\)"):
        encode([(0x00700022, "FL", np.zeros(20000, dtype=np.float32))])


@given(st.lists(st.text(), max_size=4))
def test_derived_uids_are_valid_and_tell_parts_apart(parts: list[str]) -> None:
    """A UID of any parts follows the grammar; joining two parts gives another one."""
    assert valid("UI", derived_uid(*parts))
    assert len(derived_uid(*parts)) <= 44
    if len(parts) > 1:
        assert derived_uid(*parts) != derived_uid(parts[0] + parts[1], *parts[2:])


@given(st.text(max_size=200), st.integers(1, 64))
def test_shortened_fits(text: str, limit: int) -> None:
    """Never longer than the limit, never with a character an LO cannot hold, a beginning of the text's one line."""
    short = shortened(text, limit)
    assert len(short.encode("utf-8", "replace")) <= limit
    assert valid("LO", short)


@given(st.binary(min_size=2, max_size=40), st.integers(1, 13))
def test_the_mask_is_shared_out_exactly(cells: bytes, columns: int) -> None:
    """Any mask, three lesions: every set pixel has one owner, no other pixel has any, no component is torn."""
    bits = np.unpackbits(np.frombuffer(cells, dtype=np.uint8)).astype(bool)
    mask = bits[: len(bits) // columns * columns].reshape(-1, columns)
    part = draw.segmentation([(2, 2, 2), (8, 3, 2), (5, 10, 3)])
    labels = share_out(mask, part.lesions)
    assert labels is not None
    np.testing.assert_array_equal(labels > 0, mask)
    for first, second in (
        (labels[1:], labels[:-1]),
        (labels[:, 1:], labels[:, :-1]),
        (labels[1:, 1:], labels[:-1, :-1]),
        (labels[1:, :-1], labels[:-1, 1:]),
    ):
        both = (first > 0) & (second > 0)
        np.testing.assert_array_equal(first[both], second[both])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_packed_bits(count: int, rows: int, columns: int, random: object) -> None:
    """Frames of any size: pydicom's own unpacking gives them back."""
    generator = np.random.default_rng(random.randrange(1 << 30))  # type: ignore[attr-defined]
    frames = generator.random((count, rows, columns)) < 0.5
    data = seg.packed(iter(frames))
    assert len(data) % 2 == 0
    unpacked = pydicom.pixels.utils.unpack_bits(data)[: frames.size].reshape(frames.shape)
    np.testing.assert_array_equal(unpacked, frames)
