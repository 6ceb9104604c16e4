"""Decoding: every transfer syntax gives the colours that were drawn, and nothing else than a refusal comes of damaged bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from inference.errors import UnsupportedPixels
from inference.pixels import decode_frames, pixels_equal, source_header
from tests.inference import pictures
from tests.inference.pictures import encapsulated, gradient, native, patches, ybr

BUDGET = 10_000_000
Encoded = Callable[[Path], tuple[bytes, int]]
"""A file of `patches()`, and how far a colour may be off."""


def frame_of(part10: bytes) -> NDArray[np.uint8]:
    """Decode a file of one frame."""
    frames = decode_frames(part10, max_pixels=BUDGET)
    assert frames.pixels.dtype == np.uint8
    assert len(frames.pixels) == 1
    return frames.pixels[0]


def middles(picture: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Colours in the middle of the nine patches."""
    rows, columns = picture.shape[:2]
    return picture[rows // 6 :: rows // 3, columns // 6 :: columns // 3].astype(np.int16)


def _one(stream: bytes, syntax: str, interpretation: str, **attributes: Any) -> bytes:
    return encapsulated([stream], patches()[None], syntax, interpretation, **attributes)


def _deep(picture: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """12-bit samples of a picture."""
    return ((picture.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)


def _subsampled(picture: NDArray[np.uint8]) -> bytes:
    """Uncompressed YBR_FULL_422: Y Y Cb Cr of each pair of pixels."""
    full = ybr(picture)
    pairs = np.empty((*full.shape[:1], full.shape[1] // 2, 4), np.uint8)
    pairs[..., 0], pairs[..., 1] = full[:, ::2, 0], full[:, 1::2, 0]
    pairs[..., 2:] = full[:, ::2, 1:]
    return pairs.tobytes()


P = patches()
ENCODED: dict[str, Encoded] = {
    "implicit": lambda _: (native(P[None], pictures.IMPLICIT), 0),
    "explicit": lambda _: (native(P[None], pictures.EXPLICIT), 0),
    "deflated": lambda _: (native(P[None], pictures.DEFLATED), 0),
    "big endian": lambda _: (native(P[None], pictures.BIG_ENDIAN), 0),
    "planes": lambda _: (native(P[None], PlanarConfiguration=1), 0),
    "16 bit": lambda _: (native(_deep(P)[None], BitsStored=12, HighBit=11), 0),
    "16 bit big endian": lambda _: (native(_deep(P)[None], pictures.BIG_ENDIAN, BitsStored=12, HighBit=11), 0),
    "16 bit, high bit 15": lambda _: (native(_deep(P)[None] << 4 | 5, BitsStored=12, HighBit=15), 0),
    "YBR_FULL": lambda _: (native(ybr(P)[None], photometric_interpretation="YBR_FULL"), 2),
    "YBR_FULL planes": lambda _: (native(ybr(P)[None], photometric_interpretation="YBR_FULL", PlanarConfiguration=1), 2),
    "YBR_FULL_422": lambda _: (pictures.part10(pictures.image(P[None], "YBR_FULL_422"), pictures.EXPLICIT, _subsampled(P)), 2),
    "YBR_FULL_422 that is full": lambda _: (native(ybr(P)[None], photometric_interpretation="YBR_FULL_422"), 2),
    "encapsulated uncompressed": lambda _: (_one(P.tobytes(), pictures.ENCAPSULATED_UNCOMPRESSED, "RGB"), 0),
    "deflated frame": lambda _: (_one(zlib.compress(P.tobytes(), wbits=-15), pictures.DEFLATED_FRAMES, "RGB"), 0),
    "RLE": lambda _: (_one(pictures.rle(P), pictures.RLE, "RGB"), 0),
    "RLE YBR_FULL": lambda _: (_one(pictures.rle(ybr(P)), pictures.RLE, "YBR_FULL"), 2),
    "JPEG with JFIF": lambda _: (_one(pictures.jpeg(P), pictures.JPEG_BASELINE, "YBR_FULL_422"), 3),
    "JPEG with JFIF, called RGB": lambda _: (_one(pictures.jpeg(P), pictures.JPEG_BASELINE, "RGB"), 3),
    "JPEG with JFIF, chroma halved": lambda _: (_one(pictures.jpeg(P, subsampling=2), pictures.JPEG_BASELINE, "YBR_FULL_422"), 3),
    "JPEG of OpenCV": lambda _: (_one(pictures.jpeg_of_opencv(P), pictures.JPEG_BASELINE, "YBR_FULL_422"), 3),
    "JPEG progressive": lambda _: (_one(pictures.jpeg(P, progressive=True), pictures.JPEG_BASELINE, "YBR_FULL_422"), 3),
    "JPEG in the extended syntax": lambda _: (_one(pictures.jpeg(P), pictures.JPEG_EXTENDED, "YBR_FULL_422"), 3),
    "JPEG RGB, said by APP14 and ids": lambda _: (_one(pictures.jpeg_rgb(P), pictures.JPEG_BASELINE, "RGB"), 3),
    "JPEG RGB, called YBR_FULL": lambda _: (_one(pictures.jpeg_rgb(P), pictures.JPEG_BASELINE, "YBR_FULL"), 3),
    "JPEG RGB without any marker": lambda _: (_one(pictures.without_markers(pictures.jpeg_rgb(P)), pictures.JPEG_BASELINE, "RGB"), 3),
    "JPEG YBR without any marker": lambda _: (_one(pictures.without_markers(pictures.jpeg(P)), pictures.JPEG_BASELINE, "YBR_FULL_422"), 3),
    "JPEG YBR, halved, no marker, called RGB": lambda _: (
        _one(pictures.without_markers(pictures.jpeg(P, subsampling=2)), pictures.JPEG_BASELINE, "RGB"),
        3,
    ),
    "JPEG lossless": lambda folder: (
        _one(pictures.jpeg_lossless(P, selection_value_1=False, folder=folder), pictures.JPEG_LOSSLESS, "RGB"),
        0,
    ),
    "JPEG lossless SV1": lambda folder: (
        _one(pictures.jpeg_lossless(P, selection_value_1=True, folder=folder), pictures.JPEG_LOSSLESS_SV1, "RGB"),
        0,
    ),
    "JPEG lossless without any marker, YBR_FULL": lambda folder: (
        _one(
            pictures.without_markers(pictures.jpeg_lossless(ybr(P), selection_value_1=True, folder=folder)),
            pictures.JPEG_LOSSLESS_SV1,
            "YBR_FULL",
        ),
        2,
    ),
    "JPEG lossless YBR_FULL, said by APP14, called RGB": lambda folder: (
        _one(
            pictures.with_app14(
                pictures.without_markers(pictures.jpeg_lossless(ybr(P), selection_value_1=True, folder=folder)), transform=1
            ),
            pictures.JPEG_LOSSLESS_SV1,
            "RGB",
        ),
        2,
    ),
    "JPEG with JFIF and an APP14 that denies it": lambda _: (
        _one(pictures.with_app14(pictures.jpeg(P), transform=0), pictures.JPEG_BASELINE, "RGB"),
        3,
    ),
    "JPEG lossless 16 bit": lambda folder: (
        encapsulated(
            [pictures.jpeg_lossless(_deep(P), selection_value_1=True, folder=folder)],
            _deep(P)[None],
            pictures.JPEG_LOSSLESS_SV1,
            "RGB",
            BitsStored=12,
            HighBit=11,
        ),
        0,
    ),
    "JPEG-LS by plane": lambda _: (_one(pictures.charls(P, interleave_mode=0), pictures.JPEG_LS, "RGB"), 0),
    "JPEG-LS by line": lambda _: (_one(pictures.charls(P, interleave_mode=1), pictures.JPEG_LS, "RGB"), 0),
    "JPEG-LS by sample": lambda _: (_one(pictures.charls(P, interleave_mode=2), pictures.JPEG_LS, "RGB"), 0),
    "JPEG-LS near lossless": lambda _: (_one(pictures.charls(P, lossy_error=2), pictures.JPEG_LS_NEAR, "RGB"), 2),
    "JPEG-LS YBR_FULL": lambda _: (_one(pictures.charls(ybr(P)), pictures.JPEG_LS, "YBR_FULL"), 2),
    "JPEG 2000 YBR_RCT": lambda _: (_one(pictures.jpeg_2000(P, transform=True), pictures.JPEG_2000_LOSSLESS, "YBR_RCT"), 0),
    "JPEG 2000 RGB": lambda _: (_one(pictures.jpeg_2000(P, transform=False), pictures.JPEG_2000_LOSSLESS, "RGB"), 0),
    "JPEG 2000 with a transform, called RGB": lambda _: (_one(pictures.jpeg_2000(P, transform=True), pictures.JPEG_2000, "RGB"), 0),
    "JPEG 2000 with a transform, called YBR_FULL": lambda _: (
        _one(pictures.jpeg_2000(P, transform=True), pictures.JPEG_2000, "YBR_FULL"),
        0,
    ),
    "JPEG 2000 YBR_FULL": lambda _: (_one(pictures.jpeg_2000(ybr(P), transform=False), pictures.JPEG_2000_LOSSLESS, "YBR_FULL"), 2),
    "JPEG 2000 YBR_ICT": lambda _: (_one(pictures.jpeg_2000(P, transform=True, ratio=4), pictures.JPEG_2000, "YBR_ICT"), 8),
    "JPEG 2000 in a JP2 file": lambda _: (
        _one(pictures.jpeg_2000(P, transform=True, codec_format=1), pictures.JPEG_2000_LOSSLESS, "YBR_RCT"),
        0,
    ),
}


@pytest.mark.parametrize("name", ENCODED)
def test_drawn_colours_come_back(name: str, tmp_path: Path) -> None:
    """Red is red, and skin is skin, in every transfer syntax and Photometric Interpretation."""
    part10, tolerance = ENCODED[name](tmp_path)
    pixels = frame_of(part10)
    assert pixels.shape == P.shape
    assert np.abs(middles(pixels) - middles(P)).max() <= tolerance
    if tolerance == 0:
        assert np.array_equal(pixels, P)


@pytest.mark.parametrize("name", ENCODED)
def test_every_cut_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    """A file cut anywhere is refused, never shown half grey; only what follows the pixels may be missing."""
    part10, _ = ENCODED[name](tmp_path)
    whole = frame_of(part10)
    cuts = {*range(0, len(part10), max(len(part10) // 97, 1)), *range(len(part10) - 40, len(part10))}
    for cut in sorted(cuts):
        try:
            pixels = frame_of(part10[:cut])
        except UnsupportedPixels:
            continue
        pytest.fail(f"cut at {cut} of {len(part10)} was decoded, equal: {np.array_equal(pixels, whole)}")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(ENCODED)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_flipped_bits_give_pixels_or_a_refusal(name: str, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever bits flip, nothing but UnsupportedPixels is raised, and pixels have the size that the header says."""
    part10 = bytearray(ENCODED[name](tmp_path_factory.getbasetemp())[0])
    for place, bit in flips:
        part10[int(place * len(part10))] ^= 1 << bit
    try:
        frames = decode_frames(bytes(part10), max_pixels=100_000)
    except UnsupportedPixels:
        return
    assert frames.pixels.ndim == 4
    assert frames.pixels[..., 0].size <= 100_000


def test_grey_pictures() -> None:
    """MONOCHROME2 keeps its 8 bits, MONOCHROME1 is turned round, and all three channels are equal."""
    grey = gradient()[:, :, 0]
    assert np.array_equal(frame_of(native(grey[None], photometric_interpretation="MONOCHROME2")), np.stack([grey] * 3, axis=2))
    assert np.array_equal(frame_of(native(grey[None], photometric_interpretation="MONOCHROME1"))[..., 1], 255 - grey)
    lossy = frame_of(encapsulated([pictures.jpeg(grey)], grey[None], pictures.JPEG_BASELINE, "MONOCHROME2"))[..., 2]
    assert np.abs(lossy.astype(int) - grey).mean() < 3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"WindowCenter": "2048", "WindowWidth": "4096"}, [0, 127, 255]),
        ({"WindowCenter": ["100.5", "5"], "WindowWidth": ["201", "6"]}, [0, 255, 255]),
        ({"RescaleSlope": "2", "RescaleIntercept": "-1000", "WindowCenter": "3095", "WindowWidth": "8190"}, [0, 127, 255]),
        ({"WindowCenter": "2047.5", "WindowWidth": "4095", "VOILUTFunction": "LINEAR_EXACT"}, [0, 127, 255]),
        ({"WindowCenter": "2047.5", "WindowWidth": "800", "VOILUTFunction": "SIGMOID"}, [0, 127, 255]),
        ({}, [0, 127, 255]),
    ],
    ids=["window", "first of two windows", "rescaled", "exact", "sigmoid", "stretched"],
)
def test_deep_grey_is_windowed(attributes: dict[str, Any], expected: list[int]) -> None:
    """12-bit grey becomes 8-bit grey through the window of the header (PS3.3 C.11.2), or is stretched without one."""
    values = np.array([[[0, 2047, 4095]]], np.uint16)
    part10 = native(values, photometric_interpretation="MONOCHROME2", BitsStored=12, HighBit=11, **attributes)
    found = frame_of(part10)[0, :, 0].astype(int)
    assert np.abs(found - expected).max() <= 1


def test_signed_grey_keeps_its_order() -> None:
    """Negative stored values are darker than positive ones, also where unused bits hold rubbish."""
    values = np.array([[[-2048, -1, 0, 2047]]], np.int16)
    dirty = (values.view(np.uint16) & 0x0FFF | 0xA000).view(np.int16)
    part10 = native(dirty, photometric_interpretation="MONOCHROME2", BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert frame_of(part10)[0, :, 0].tolist() == [0, 127, 128, 255] or frame_of(part10)[0, :, 0].tolist() == [0, 127, 127, 255]


def test_modality_and_voi_lookup_tables() -> None:
    """Modality LUT and VOI LUT are applied one after the other (PS3.3 C.11.1, C.11.2)."""
    modality, voi = Dataset(), Dataset()
    modality.LUTDescriptor, modality.LUTData, modality.ModalityLUTType = [4, 0, 8], bytes((30, 20, 10, 0)), "US"
    voi.LUTDescriptor, voi.LUTData = [31, 0, 8], struct.pack("<31H", *range(0, 248, 8))
    part10 = native(
        np.array([[[0, 1, 2, 3]]], np.uint8), photometric_interpretation="MONOCHROME2", ModalityLUTSequence=[modality], VOILUTSequence=[voi]
    )
    assert frame_of(part10)[0, :, 0].tolist() == [240, 160, 80, 0]


def test_one_bit_frames_lie_unpadded() -> None:
    """Frames of one bit follow each other without padding (PS3.5 8.1.1)."""
    frames = np.random.default_rng(3).integers(0, 2, (3, 5, 7), np.uint8)
    data_set = pictures.image(frames, "MONOCHROME2", BitsAllocated=1, BitsStored=1, HighBit=0)
    part10 = pictures.part10(data_set, pictures.EXPLICIT, np.packbits(frames.reshape(-1), bitorder="little").tobytes())
    assert np.array_equal(decode_frames(part10, max_pixels=BUDGET).pixels[..., 0], frames * 255)


# --- palettes --------------------------------------------------------------------------------------------------------


def _palette(
    picture: NDArray[Any], tables: list[list[int]], *, bits: int, first: int = 0, packed: bool = False, **attributes: Any
) -> bytes:
    data_set = pictures.image(picture[None], "PALETTE COLOR", **attributes)
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(data_set, f"{name}PaletteColorLookupTableDescriptor", [len(table) % 65536, first, bits])
        content = bytes(table) if packed else struct.pack(f"<{len(table)}H", *table)
        setattr(data_set, f"{name}PaletteColorLookupTableData", content + b"\0" * (len(content) % 2))
    return pictures.part10(data_set, pictures.EXPLICIT, picture.tobytes())


INDICES = np.array([[0, 1, 2, 1]], np.uint8)
WANTED = [[255, 0, 0], [0, 255, 0], [200, 150, 120], [0, 255, 0]]
TABLES = [[255, 0, 200], [0, 255, 150], [0, 0, 120]]


@pytest.mark.parametrize(
    "part10",
    [
        _palette(INDICES, [[value << 8 for value in table] for table in TABLES], bits=16),
        _palette(INDICES, [[value * 257 for value in table] for table in TABLES], bits=16),
        _palette(INDICES, TABLES, bits=16),
        _palette(INDICES, TABLES, bits=8),
        _palette(INDICES, TABLES, bits=8, packed=True),
        _palette(INDICES + 10, TABLES, bits=8, first=10),
        _palette(INDICES.astype(np.uint16) + 300, TABLES, bits=8, first=300),
    ],
    ids=["upper byte", "full scale", "only lower byte filled", "8 bit", "8 bit packed", "first mapped value", "16-bit indices"],
)
def test_palettes_become_colours(part10: bytes) -> None:
    """A palette is expanded, however its tables are written (PS3.3 C.7.6.3.1.5 and C.7.9)."""
    assert frame_of(part10)[0].tolist() == WANTED


def test_indices_outside_a_palette_take_its_ends() -> None:
    """Values before the first mapped value and behind the last take the first and the last entry (PS3.3 C.7.6.3.1.5)."""
    part10 = _palette(np.array([[0, 9, 10, 13, 255]], np.uint8), TABLES, bits=8, first=10)
    assert frame_of(part10)[0].tolist() == [WANTED[0], WANTED[0], WANTED[0], WANTED[2], WANTED[2]]


def test_segmented_palettes_are_expanded() -> None:
    """Discrete, linear and indirect segments (PS3.3 C.7.9.2)."""
    data_set = pictures.image(np.zeros((1, 1, 9), np.uint8), "PALETTE COLOR")
    # two entries, four more on the line to 40 000, then the first two segments' first again: 0 1000, ..., 0 1000 and one more
    segments = [0, 2, 0, 1000, 1, 4, 41000, 2, 1, 0, 0, 0, 1, 65535]
    for name in ("Red", "Green", "Blue"):
        setattr(data_set, f"{name}PaletteColorLookupTableDescriptor", [9, 0, 16])
        setattr(data_set, f"Segmented{name}PaletteColorLookupTableData", struct.pack(f"<{len(segments)}H", *segments))
    part10 = pictures.part10(data_set, pictures.EXPLICIT, bytes(range(9)))
    wanted = [0, 1000, 11000, 21000, 31000, 41000, 0, 1000, 65535]
    assert frame_of(part10)[0, :, 0].tolist() == [value >> 8 for value in wanted]


@pytest.mark.parametrize(
    ("descriptor", "segments"),
    [
        ([9, 0, 16], [0, 2, 0, 1000]),
        ([2, 0, 16], [0, 3, 1, 2, 3]),
        ([9, 0, 16], [1, 9, 7]),
        ([9, 0, 16], [2, 1, 0, 0]),
        ([9, 0, 16], [7, 1, 0]),
    ],
    ids=["short", "long", "line first", "indirect to itself", "unknown"],
)
def test_broken_segmented_palettes_are_refused(descriptor: list[int], segments: list[int]) -> None:
    """A segmented table that does not make exactly its entries is refused, without expanding what is behind."""
    data_set = pictures.image(np.zeros((1, 1, 2), np.uint8), "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(data_set, f"{name}PaletteColorLookupTableDescriptor", descriptor)
        setattr(data_set, f"Segmented{name}PaletteColorLookupTableData", struct.pack(f"<{len(segments)}H", *segments))
    with pytest.raises(UnsupportedPixels):
        frame_of(pictures.part10(data_set, pictures.EXPLICIT, bytes(2)))


@pytest.mark.parametrize(
    ("descriptor", "content"), [([5, 0, 8], bytes(3)), ([3, 0, 8], bytes(40)), ([3, 0, 99], bytes(3)), ([3, 0], bytes(3)), (None, b"")]
)
def test_impossible_palettes_are_refused(descriptor: list[int] | None, content: bytes) -> None:
    """A palette shorter or longer than its descriptor, or without one, is refused (threats.md row 52)."""
    data_set = pictures.image(INDICES[None], "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        if descriptor:
            setattr(data_set, f"{name}PaletteColorLookupTableDescriptor", descriptor)
            setattr(data_set, f"{name}PaletteColorLookupTableData", content + b"\0" * (len(content) % 2))
    with pytest.raises(UnsupportedPixels):
        frame_of(pictures.part10(data_set, pictures.EXPLICIT, INDICES.tobytes()))


# --- colour profiles -------------------------------------------------------------------------------------------------

WIDE = ((0.6097559, 0.3111242, 0.0194811), (0.2052401, 0.6256560, 0.0608902), (0.1492240, 0.0632197, 0.7448387))
"""XYZ (D50) of a wide-gamut space (its green far outside sRGB)."""
R, G, B = pictures.SRGB_PRIMARIES


@pytest.mark.parametrize(
    ("primaries", "gamma"),
    [((G, B, R), 2.2), (WIDE, 2.2), (pictures.SRGB_PRIMARIES, 1.0)],
    ids=["channels swapped", "wide gamut", "linear"],
)
@pytest.mark.parametrize("place", ["header", "optical path", "inside the JPEG stream", "palette"])
def test_a_colour_profile_is_applied(primaries: tuple[tuple[float, ...], ...], gamma: float, place: str) -> None:
    """An ICC profile turns the picture into sRGB as the textbook formula does, wherever the profile is."""
    profile = pictures.icc_profile(primaries, gamma)
    tolerance = 2
    if place == "header":
        part10 = native(P[None], ICCProfile=profile)
    elif place == "optical path":
        path = Dataset()
        path.ICCProfile = profile
        part10 = native(P[None], OpticalPathSequence=[path])
    elif place == "palette":
        tables = [[colour[channel] for colour in pictures.COLOURS] for channel in range(3)]
        part10 = _palette(
            np.repeat(np.repeat(np.arange(9, dtype=np.uint8).reshape(3, 3), 16, 0), 24, 1), tables, bits=8, ICCProfile=profile
        )
    else:
        part10 = _one(pictures.jpeg(P, icc_profile=profile, quality=100), pictures.JPEG_BASELINE, "YBR_FULL_422")
        tolerance = 14  # a profile that brightens the dark brightens the noise of the encoder
    expected = pictures.through_profile(P, primaries, gamma)
    assert np.abs(middles(expected) - middles(P)).max() > 12, "the profile would not show"
    assert np.abs(middles(frame_of(part10)) - middles(expected)).max() <= tolerance


def test_the_profile_of_the_header_counts_before_that_of_the_stream() -> None:
    """Of two profiles the header's is applied, and only that."""
    swapped, linear = pictures.icc_profile((G, B, R), 2.2), pictures.icc_profile((R, G, B), 1.0)
    stream = pictures.jpeg(P, icc_profile=linear, quality=100)
    part10 = _one(stream, pictures.JPEG_BASELINE, "YBR_FULL_422", ICCProfile=swapped)
    assert np.abs(middles(frame_of(part10)) - middles(pictures.through_profile(P, (G, B, R), 2.2))).max() <= 6


def test_srgb_is_left_alone() -> None:
    """The profile that says sRGB changes not one sample."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = gradient()
    assert np.array_equal(frame_of(native(picture[None], ICCProfile=profile)), picture)


@pytest.mark.parametrize(
    "profile",
    [b"rubbish!" * 20, pictures.icc_profile((R, G, B), 1.0)[:200], pictures.icc_profile((R, G, B), 1.0) + b"\0" * (5 * 1024 * 1024)],
)
def test_an_unusable_profile_is_noted_not_applied(profile: bytes) -> None:
    """A damaged or absurdly large profile leaves the picture as it is, and leaves a note (threats.md row 60)."""
    frames = decode_frames(native(P[None], ICCProfile=profile), max_pixels=BUDGET)
    assert np.array_equal(frames.pixels[0], P)
    assert len(frames.notes) == 1
    assert "ICC" in frames.notes[0]


# --- frames ----------------------------------------------------------------------------------------------------------

MANY = np.stack([np.roll(gradient(), 5 * number, axis=1) for number in range(4)])


def _fragmented(streams: list[bytes], *, table: bytes, parts: int = 3) -> bytes:
    """Encapsulate streams in several fragments each, with an offset table as given."""
    pixel_data = struct.pack("<II", 0xE000FFFE, len(table)) + table
    for stream in streams:
        padded = stream + b"\0" * (len(stream) % 2)
        step = len(padded) // parts & ~1
        for number in range(parts):
            part = padded[number * step : (number + 1) * step if number < parts - 1 else None]
            pixel_data += struct.pack("<II", 0xE000FFFE, len(part)) + part
    return pixel_data + struct.pack("<II", 0xE0DDFFFE, 0)


def _offsets(streams: list[bytes], parts: int = 3) -> bytes:
    begins = [0]
    for stream in streams[:-1]:
        begins.append(begins[-1] + len(stream) + len(stream) % 2 + 8 * parts)
    return struct.pack(f"<{len(begins)}I", *begins)


@pytest.mark.parametrize("syntax", ["native", "RLE", "JPEG", "JPEG-LS", "JPEG 2000", "extended offset table"])
def test_many_frames(syntax: str) -> None:
    """Every frame comes in its place."""
    part10 = {
        "native": lambda: native(MANY),
        "RLE": lambda: encapsulated([pictures.rle(one) for one in MANY], MANY, pictures.RLE, "RGB"),
        "JPEG": lambda: encapsulated([pictures.jpeg(one) for one in MANY], MANY, pictures.JPEG_BASELINE, "YBR_FULL_422"),
        "JPEG-LS": lambda: encapsulated([pictures.charls(one) for one in MANY], MANY, pictures.JPEG_LS, "RGB"),
        "JPEG 2000": lambda: encapsulated([pictures.jpeg_2000(one, transform=True) for one in MANY], MANY, pictures.JPEG_2000, "YBR_RCT"),
        "extended offset table": lambda: pictures.extended([pictures.charls(one) for one in MANY], MANY, pictures.JPEG_LS, "RGB"),
    }[syntax]()
    pixels = decode_frames(part10, max_pixels=BUDGET).pixels
    assert pixels.shape == MANY.shape
    assert np.abs(pixels.astype(int) - MANY).mean(axis=(1, 2, 3)).max() < (4 if syntax == "JPEG" else 1e-9)


@pytest.mark.parametrize("table", ["right", "empty", "wrong", "short"])
def test_fragments_are_joined_whatever_the_offset_table_says(table: str) -> None:
    """Frames of several fragments are found by a right table, and by the beginnings of their streams without one (row 57)."""
    streams = [pictures.jpeg(one) for one in MANY]
    right = _offsets(streams)
    content = {"right": right, "empty": b"", "wrong": struct.pack("<4I", 0, 2, 4, 6), "short": right[:8]}[table]
    part10 = pictures.part10(pictures.image(MANY, "YBR_FULL_422"), pictures.JPEG_BASELINE, _fragmented(streams, table=content))
    assert np.abs(decode_frames(part10, max_pixels=BUDGET).pixels.astype(int) - MANY).mean() < 4


def test_an_offset_table_alone_tells_frames_apart() -> None:
    """Streams without a beginning of their own, in several fragments each, are divided by a right table, basic or extended."""
    streams = [pictures.rle(one) for one in MANY]
    for extended in (False, True):
        table = _offsets(streams)
        data_set = pictures.image(MANY)
        if extended:
            data_set.ExtendedOffsetTable = np.frombuffer(table, "<u4").astype("<u8").tobytes()
            data_set.ExtendedOffsetTableLengths = np.array([len(stream) for stream in streams], "<u8").tobytes()
        part10 = pictures.part10(data_set, pictures.RLE, _fragmented(streams, table=b"" if extended else table))
        assert np.array_equal(decode_frames(part10, max_pixels=BUDGET).pixels, MANY)


@pytest.mark.parametrize(
    ("syntax", "stream"),
    [
        (pictures.JPEG_BASELINE, pictures.jpeg(gradient(80, 96))),
        (pictures.JPEG_BASELINE, pictures.jpeg(gradient(80, 96), progressive=True)),
        (pictures.JPEG_LS, pictures.charls(gradient(80, 96))),
        (pictures.JPEG_2000, pictures.jpeg_2000(gradient(80, 96), transform=True)),
        (pictures.RLE, pictures.rle(gradient(80, 96))),
        (pictures.DEFLATED_FRAMES, zlib.compress(gradient(80, 96).tobytes(), wbits=-15)),
    ],
    ids=["JPEG", "JPEG progressive", "JPEG-LS", "JPEG 2000", "RLE", "deflated frame"],
)
def test_a_stream_that_ends_early_is_refused(syntax: str, stream: bytes) -> None:
    """Decoders fill what is missing with grey: a stream cut inside a well-framed file is refused before (threats.md row 54)."""
    for cut in range(2, len(stream) - 2, max(len(stream) // 50, 1)):
        with pytest.raises(UnsupportedPixels):
            frame_of(encapsulated([stream[:cut]], gradient(80, 96)[None], syntax, "RGB"))


def test_one_frame_in_many_fragments() -> None:
    """All fragments belong to the only frame."""
    stream = pictures.charls(P)
    part10 = pictures.part10(pictures.image(P[None]), pictures.JPEG_LS, _fragmented([stream], table=b"", parts=5))
    assert np.array_equal(frame_of(part10), P)


def test_frames_that_cannot_be_told_apart_are_refused() -> None:
    """Without a table and without beginnings, fragments are no frames."""
    streams = [pictures.rle(one) for one in MANY]
    part10 = pictures.part10(pictures.image(MANY), pictures.RLE, _fragmented(streams, table=b""))
    with pytest.raises(UnsupportedPixels, match="divided"):
        decode_frames(part10, max_pixels=BUDGET)


def test_only_the_first_frames_are_decoded() -> None:
    """max_frames cuts, and the pixel budget counts what is decoded."""
    part10 = native(MANY)
    assert np.array_equal(decode_frames(part10, max_pixels=2 * MANY[0, ..., 0].size, max_frames=2).pixels, MANY[:2])
    with pytest.raises(UnsupportedPixels, match="pixels"):
        decode_frames(part10, max_pixels=2 * MANY[0, ..., 0].size, max_frames=3)


def test_orientation_of_exif_is_ignored() -> None:
    """The stored orientation is kept: coordinates in reports refer to it."""
    picture = gradient(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    stream = pictures.jpeg(picture, exif=exif.tobytes())
    part10 = encapsulated([stream], picture[None], pictures.JPEG_BASELINE, "YBR_FULL_422")
    assert frame_of(part10).shape == picture.shape


# --- what headers claim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attributes",
    [
        {"Rows": 0},
        {"Columns": 0},
        {"Rows": 65535, "Columns": 65535},
        {"Rows": None},
        {"NumberOfFrames": "2147483647"},
        {"NumberOfFrames": "-1"},
        {"BitsAllocated": 0},
        {"BitsAllocated": 12},
        {"BitsAllocated": 255},
        {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        {"BitsStored": 0},
        {"BitsStored": 9},
        {"HighBit": 8},
        {"HighBit": 6},
        {"SamplesPerPixel": 0},
        {"SamplesPerPixel": 4},
        {"SamplesPerPixel": 1},
        {"PhotometricInterpretation": "CMYK"},
        {"PhotometricInterpretation": "PALETTE COLOR"},
        {"PhotometricInterpretation": None},
        {"PixelRepresentation": 1},
        {"PixelRepresentation": 7},
        {"PlanarConfiguration": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("syntax", [pictures.EXPLICIT, pictures.JPEG_BASELINE, pictures.JPEG_2000, pictures.RLE])
def test_impossible_headers_are_refused(attributes: dict[str, Any], syntax: str) -> None:
    """What no picture can be, or the pixel data is not, is refused before anything is decoded (threats.md rows 47 to 51)."""
    streams = {
        pictures.JPEG_BASELINE: pictures.jpeg(P),
        pictures.JPEG_2000: pictures.jpeg_2000(P, transform=True),
        pictures.RLE: pictures.rle(P),
    }
    data_set = pictures.image(P[None])
    pixel_data = P.tobytes() if syntax == pictures.EXPLICIT else encapsulate([streams[syntax]])
    data_set.update({pydicom.datadict.tag_for_keyword(keyword): _element(keyword, value) for keyword, value in attributes.items()})
    with pytest.raises(UnsupportedPixels):
        frame_of(pictures.part10(data_set, syntax, pixel_data))


def _element(keyword: str, value: Any) -> pydicom.DataElement:
    vr = pydicom.datadict.dictionary_VR(keyword)
    return pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value)


@pytest.mark.parametrize("change", [-2, 2, 100])
def test_pixel_data_of_another_length_is_refused(change: int) -> None:
    """Longer or shorter than the geometry says: refused, never padded (threats.md row 49)."""
    content = (P.tobytes() + bytes(100))[: P.size + change]
    with pytest.raises(UnsupportedPixels, match="bytes"):
        frame_of(pictures.part10(pictures.image(P[None]), pictures.EXPLICIT, content))


@pytest.mark.parametrize("encode", [pictures.jpeg, pictures.charls, lambda picture: pictures.jpeg_2000(picture, transform=True)])
def test_a_stream_of_another_size_is_refused(encode: Callable[[NDArray[np.uint8]], bytes]) -> None:
    """A stream whose picture is not the header's never reaches a decoder (threats.md rows 54 to 56)."""
    syntaxes = {b"\xff\xd8\xff\xe0": pictures.JPEG_BASELINE, b"\xff\xd8\xff\xf7": pictures.JPEG_LS, b"\xff\x4f\xff\x51": pictures.JPEG_2000}
    stream = encode(gradient(80, 90))
    with pytest.raises(UnsupportedPixels, match="header says"):
        frame_of(_one(stream, syntaxes[stream[:4]], "RGB"))


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """80 000 scans would keep a decoder busy for minutes (threats.md row 54)."""
    stream = pictures.jpeg(P, progressive=True)
    last = stream.rfind(b"\xff\xda")
    bomb = stream[:last] + stream[last:-2] * 80_000 + stream[-2:]
    with pytest.raises(UnsupportedPixels, match="scans"):
        frame_of(_one(bomb, pictures.JPEG_BASELINE, "YBR_FULL_422"))


def test_a_jpeg_2000_of_many_tiles_is_refused() -> None:
    """A claim of millions of tiles has no bytes behind it (threats.md row 55)."""
    stream = bytearray(pictures.jpeg_2000(P, transform=True))
    struct.pack_into(">II", stream, 24, 1, 1)  # XTsiz, YTsiz
    with pytest.raises(UnsupportedPixels, match="tiles"):
        frame_of(_one(bytes(stream), pictures.JPEG_2000, "YBR_RCT"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda stream: struct.pack("<I", 0) + stream[4:],
        lambda stream: struct.pack("<I", 15) + stream[4:],
        lambda stream: stream[:4] + struct.pack("<3I", 64, 10**6, 2 * 10**6) + stream[16:],
        lambda stream: stream[:4] + struct.pack("<3I", 0, 70, 80) + stream[16:],
        lambda stream: stream[:64] + b"\x82\x00" * (len(stream) // 2 - 32),
        lambda stream: stream[:64] + b"\x80" * (len(stream) - 64),
    ],
    ids=["no segment", "15 segments", "offsets outside", "offsets in the header", "too long", "nothing"],
)
def test_hostile_rle_is_refused(damage: Callable[[bytes], bytes]) -> None:
    """RLE segments outside the frame, or that do not make exactly a plane (threats.md row 53)."""
    with pytest.raises(UnsupportedPixels):
        frame_of(_one(damage(pictures.rle(gradient(48, 72))), pictures.RLE, "RGB"))


def test_a_deflated_bomb_inside_a_frame_is_refused() -> None:
    """A frame inflates to its size, not to a gigabyte."""
    with pytest.raises(UnsupportedPixels):
        frame_of(_one(zlib.compress(bytes(50_000_000), wbits=-15), pictures.DEFLATED_FRAMES, "RGB"))


@pytest.mark.parametrize("syntax", ["1.2.840.113619.5.2", "1.3.46.670589.33.1.4.1", "1.2.840.10008.1.2.4.100", ""])
def test_other_transfer_syntaxes_are_refused(syntax: str) -> None:
    """Proprietary compression and video are archived, not decoded (threats.md row 59)."""
    whole = _one(b"\x01\x02\x03\x04", pictures.JPEG_BASELINE, "RGB")
    file = pydicom.dcmread(io.BytesIO(whole))
    file.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, implicit_vr=False, little_endian=True)
    with pytest.raises(UnsupportedPixels):
        frame_of(buffer.getvalue())


def test_an_object_without_pixels_is_refused() -> None:
    """Documents have nothing to decode (threats.md row 45)."""
    data_set = pictures.image(P[None])
    whole = pictures.part10(data_set, pictures.EXPLICIT, P.tobytes())
    with pytest.raises(UnsupportedPixels, match="no Pixel Data"):
        frame_of(whole[: whole.index(b"\xe0\x7f\x10\x00OB")])


def test_an_attribute_of_odd_length_is_refused() -> None:
    """Pydicom raises an error of its own where a number has three bytes; it is a refusal like any other."""
    part10 = native(P[None])
    place = part10.index(struct.pack("<HH2sH", 0x0028, 0x0101, b"US", 2))
    with pytest.raises(UnsupportedPixels):
        frame_of(part10[: place + 6] + b"\x03\x00\x08\x00\x00" + part10[place + 10 :])


def test_refusals_name_no_patient() -> None:
    """The reason is written into the log: it holds nothing of the patient module."""
    for attributes in ({"Rows": 0}, {"NumberOfFrames": "999"}, {"PhotometricInterpretation": "CANARY"}):
        with pytest.raises(UnsupportedPixels) as caught:
            frame_of(native(P[None], **attributes))
        assert "canary" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(["0.5", "0.25"], (0.5, 0.25)), (["0", "1"], None), (["-1", "1"], None), (["1e400", "1"], None), (["0.5"], None), (None, None)],
    ids=str,
)
def test_spacing(stated: list[str] | None, expected: tuple[float, float] | None) -> None:
    """Pixel Spacing is taken as stated, or not at all; a scale is never invented."""
    attributes = {} if stated is None else {"PixelSpacing": stated}
    with pydicom.config.disable_value_validation():
        part10 = native(P[None], **attributes)
    assert decode_frames(part10, max_pixels=BUDGET).spacing_mm == expected


def test_the_header_is_read_without_the_pixels() -> None:
    """source_header gives what stands in front of the pixels, in every kind of file."""
    for name in ("implicit", "deflated", "big endian", "RLE"):
        header = source_header(ENCODED[name](Path())[0])
        assert header.PatientName == "Canary^Test"
        assert "PixelData" not in header
        assert header.Rows == P.shape[0]


def test_pixels_can_be_written_to() -> None:
    """The array is its own and writeable, whichever decoder made it: torch asks for that."""
    for name in ("explicit", "RLE", "JPEG with JFIF", "JPEG 2000 RGB"):
        pixels = decode_frames(ENCODED[name](Path())[0], max_pixels=BUDGET).pixels
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


# --- the same picture twice ------------------------------------------------------------------------------------------

LOSSLESS = [name for name in ENCODED if name in {"implicit", "explicit", "deflated", "big endian", "planes", "RLE", "JPEG lossless",
    "JPEG lossless SV1", "JPEG-LS by plane", "JPEG-LS by sample", "JPEG 2000 YBR_RCT", "JPEG 2000 RGB"}]  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_equal_pixels_are_found_equal(name: str, tmp_path: Path) -> None:
    """The same stored values in two lossless transfer syntaxes are equal, in both directions."""
    first, second = ENCODED["explicit"](tmp_path)[0], ENCODED[name](tmp_path)[0]
    assert pixels_equal(first, second)
    assert pixels_equal(second, first)


def test_other_pixels_are_found_different(tmp_path: Path) -> None:
    """One sample, a lossy stream, another number of frames, or damage: not equal."""
    first = ENCODED["explicit"](tmp_path)[0]
    changed = P.copy()
    changed[7, 7, 1] ^= 1
    assert not pixels_equal(first, _one(pictures.charls(changed), pictures.JPEG_LS, "RGB"))
    assert not pixels_equal(first, ENCODED["JPEG with JFIF"](tmp_path)[0])
    assert not pixels_equal(first, ENCODED["JPEG-LS near lossless"](tmp_path)[0])
    assert not pixels_equal(first, native(np.stack([P, P])))
    assert not pixels_equal(first, first[:-10])
    assert not pixels_equal(first, b"")
    assert not pixels_equal(first, first, max_pixels=10)


# --- corpora ---------------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_one_picture_in_many_transfer_syntaxes(shared: Path) -> None:
    """Public files of one picture in many transfer syntaxes decode to the same values, or nearly, where the syntax loses."""
    folder = shared / "corpora" / "cornerstone3D"
    files = {path.name.split("_")[-1].removesuffix(".dcm"): path.read_bytes() for path in folder.glob("CTImage.dcm_*")}
    assert len(files) == 14
    reference = decode_frames(files[pictures.EXPLICIT], max_pixels=BUDGET).pixels.astype(int)
    for syntax, part10 in files.items():
        difference = np.abs(decode_frames(part10, max_pixels=BUDGET).pixels.astype(int) - reference)
        lossless = syntax not in {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55",
                                  "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91"}  # fmt: skip
        assert difference.max() == 0 if lossless else difference.mean() < 6, syntax
        if lossless:
            assert pixels_equal(files[pictures.EXPLICIT], part10), syntax


@pytest.mark.shared
def test_twelve_bit_jpeg(shared: Path) -> None:
    """JPEG of 12 bits is nearly the lossless file of the same picture (NEMA's compression samples)."""
    folder = shared / "corpora" / "dicom-test-files" / "WG04"
    for name in ("MR1", "MR2", "MR3", "MR4", "XA1"):
        lossless = decode_frames((folder / "JPLL" / f"{name}_JPLL").read_bytes(), max_pixels=BUDGET).pixels.astype(int)
        lossy = decode_frames((folder / "JPLY" / f"{name}_JPLY").read_bytes(), max_pixels=BUDGET).pixels.astype(int)
        assert np.abs(lossless - lossy).mean() < 6, name


@pytest.mark.shared
def test_every_public_file_is_decoded_or_refused(shared: Path) -> None:
    """Good and broken public files: pixels or UnsupportedPixels, and all but the known odd ones of the pictures are decoded."""
    decoded = refused = 0
    for path in sorted((shared / "corpora").rglob("*")):
        if path.is_dir() or path.suffix in {".txt", ".md", ".tsv"}:
            continue
        try:
            decode_frames(path.read_bytes(), max_pixels=600_000)
        except UnsupportedPixels as error:
            refused += not any(words in str(error) for words in ("no Pixel Data", "preamble", "pixels allowed"))
        else:
            decoded += 1
    assert decoded >= 250
    assert refused <= 35
