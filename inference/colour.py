"""From stored values to 8-bit sRGB: luma and chroma, palettes, grey scales and ICC profiles. Pure functions of a header and arrays.

References
----------
DICOM PS3.3 C.7.6.3.1.2 Photometric Interpretation, C.7.9 Palette Color Lookup Table, C.11.1 Modality LUT, C.11.2 VOI LUT,
C.11.15 ICC Profile
"""

from __future__ import annotations

import io
import itertools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from pydicom.dataset import Dataset

from inference.errors import UnsupportedPixels

MAXIMUM_PROFILE_BYTES: Final = 4 * 1024 * 1024
"""Display and camera profiles have 0.5 to 600 kB; a profile of 50 MB is an attack (threats.md row 60)."""

_PALETTE: Final = ("Red", "Green", "Blue")


def ybr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert full-range YBR to RGB, uint8, shape (rows, columns, 3) (PS3.3 C.7.6.3.1.2, the matrix of JFIF)."""
    return np.array(Image.fromarray(np.ascontiguousarray(pixels), "YCbCr").convert("RGB"))


def upsampled_422(pixels: NDArray[np.uint8], *, rows: int, columns: int) -> NDArray[np.uint8]:
    """Undo the chroma subsampling of uncompressed YBR_FULL_422: two luma samples, then their common Cb and Cr."""
    groups = pixels.reshape(rows, columns // 2, 4)
    full = np.empty((rows, columns // 2, 2, 3), np.uint8)
    full[..., 0] = groups[..., :2]
    full[..., 1:] = groups[:, :, None, 2:]
    return full.reshape(rows, columns, 3)


def scaled_to_8_bits(values: NDArray[np.uint16], bits_stored: int) -> NDArray[np.uint8]:
    """Map 0 .. 2**bits_stored - 1 to 0 .. 255, rounding; larger values become 255."""
    maximum = 2**bits_stored - 1
    table = np.minimum(np.arange(2**16, dtype=np.uint32), maximum)
    scaled: NDArray[np.uint8] = ((table * 510 + maximum) // (2 * maximum)).astype(np.uint8)[values]
    return scaled


def palette_table(header: Dataset, *, entries: int, big_endian: bool) -> NDArray[np.uint8]:
    """RGB of each stored value, uint8, shape (entries, 3).

    Values before the first mapped value take the first colour, values behind the last take the last
    (PS3.3 C.7.6.3.1.5). 16-bit tables are cut to their upper 8 bits, unless they only fill the lower ones.

    Raises
    ------
    UnsupportedPixels
        A table is missing, or shorter or longer than its descriptor says.
    """
    indices = np.arange(entries)
    columns = []
    for name in _PALETTE:
        prefix = f"{name}PaletteColorLookupTable"
        if f"{prefix}Descriptor" not in header:
            raise UnsupportedPixels("Photometric Interpretation is PALETTE COLOR and a colour lookup table is missing.")
        count, first, bits = _descriptor(header, f"{prefix}Descriptor")
        if f"Segmented{prefix}Data" in header:
            words = _lut_words(header, f"Segmented{prefix}Data", None, bits, big_endian=big_endian)
            table = _expanded(words, count)
        else:
            table = _lut_words(header, f"{prefix}Data", count, bits, big_endian=big_endian)
        columns.append(table[np.clip(indices - first, 0, count - 1)])
    rgb = np.stack(columns, axis=1)
    return (rgb >> 8 if rgb.max() > 255 else rgb).astype(np.uint8)


def _descriptor(header: Dataset, keyword: str) -> tuple[int, int, int]:
    """Number of entries, first mapped value, bits of an entry (PS3.3 C.11.1.1)."""
    values = header[keyword].value
    if not isinstance(values, list | tuple) and not hasattr(values, "__len__"):
        raise UnsupportedPixels("A lookup table descriptor does not have its three values.")
    if len(values) != 3 or not all(isinstance(value, int) for value in values):
        raise UnsupportedPixels("A lookup table descriptor does not have its three values.")
    count, first, bits = (int(value) for value in values)
    if not 1 <= bits <= 16 or not 0 <= count <= 2**16:
        raise UnsupportedPixels(f"A lookup table of {count} entries of {bits} bits is not possible.")
    if header.get("PixelRepresentation") == 1 and first > 2**15 - 1:
        first -= 2**16
    return count or 2**16, first, bits


def _lut_words(header: Dataset, keyword: str, count: int | None, bits: int, *, big_endian: bool) -> NDArray[np.uint16]:
    """Give the entries of a lookup table as 16-bit words, `count` of them, or as many as there are."""
    value = header[keyword].value if keyword in header else None
    if isinstance(value, int):
        value = [value]
    if isinstance(value, bytes):
        raw = np.frombuffer(value[: len(value) & ~1], ">u2" if big_endian else "<u2").astype(np.uint16)
        if bits <= 8 and count is not None and len(value) == count + count % 2:  # two entries to a word, the lower byte first
            raw = np.stack((raw & 255, raw >> 8), axis=1).reshape(-1)[:count]
    elif value is not None and hasattr(value, "__len__") and all(isinstance(entry, int) for entry in value):
        raw = (np.array(list(value), np.int64) & 0xFFFF).astype(np.uint16)
    else:
        raise UnsupportedPixels("A lookup table has no data.")
    if not len(raw) or (count is not None and len(raw) != count):
        raise UnsupportedPixels(f"A lookup table has {len(raw)} entries where its descriptor says {count}.")
    return raw


def _expanded(words: NDArray[np.uint16], count: int) -> NDArray[np.uint16]:
    """Expand a segmented lookup table to exactly `count` entries (PS3.3 C.7.9.2)."""
    entries: list[int] = []
    position = 0
    data = [int(word) for word in words]

    def expand(position: int, *, nested: bool) -> int:
        operation, length = data[position], data[position + 1]
        if operation == 0:
            entries.extend(data[position + 2 : position + 2 + length])
            position += 2 + length
        elif operation == 1 and entries:
            entries.extend(int(value) for value in np.rint(np.linspace(entries[-1], data[position + 2], length + 1))[1:])
            position += 3
        elif operation == 2 and not nested:
            target = (data[position + 2] | data[position + 3] << 16) // 2
            for _ in range(length):
                target = expand(target, nested=True)
            position += 4
        else:
            raise UnsupportedPixels("A segmented lookup table begins with a line, or has an unknown or nested segment.")
        if len(entries) > count:
            raise UnsupportedPixels("A segmented lookup table expands beyond its descriptor.")
        return position

    try:
        while len(entries) < count:
            position = expand(position, nested=False)
    except IndexError:
        raise UnsupportedPixels("A segmented lookup table is shorter than its descriptor says.") from None
    return np.array(entries, np.uint16)


def grey_table(
    header: Dataset, stored: NDArray[np.integer[Any]], *, bits_stored: int, inverted: bool, big_endian: bool
) -> NDArray[np.uint8]:
    """8-bit grey of each value in ``stored.min() .. stored.max()``.

    Modality LUT or rescale, then VOI LUT or window (the first of several). Without either, pictures of at most
    8 bits keep their brightness and deeper ones are stretched from their darkest to their brightest value.
    """
    lowest, highest = int(stored.min()), int(stored.max())
    values = np.arange(lowest, highest + 1, dtype=np.float64)
    modality_lut = header.get("ModalityLUTSequence")
    if modality_lut:
        values = _through_lut(modality_lut[0], values, big_endian=big_endian)
        domain = (float(values.min()), float(values.max()))
    else:
        slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0)
        values = values * slope + intercept
        domain = (values[0], values[-1]) if bits_stored > 8 or lowest < 0 else (intercept, (2**bits_stored - 1) * slope + intercept)
    voi_lut = header.get("VOILUTSequence")
    width = _number(header, "WindowWidth", 0.0)
    if voi_lut:
        _, _, bits = _descriptor(voi_lut[0], "LUTDescriptor")
        grey = _through_lut(voi_lut[0], values, big_endian=big_endian) / (2**bits - 1)
    elif width > 0:
        grey = _windowed(values, _number(header, "WindowCenter", 0.0), width, str(header.get("VOILUTFunction", "LINEAR") or "LINEAR"))
    else:
        low, high = min(domain), max(domain)
        grey = (values - low) / (high - low) if high > low else np.zeros_like(values)
    grey = np.clip(grey, 0.0, 1.0)
    levels: NDArray[np.uint8] = np.rint((1.0 - grey if inverted else grey) * 255.0).astype(np.uint8)
    return levels


def _through_lut(item: Dataset, values: NDArray[np.float64], *, big_endian: bool) -> NDArray[np.float64]:
    count, first, bits = _descriptor(item, "LUTDescriptor")
    table = _lut_words(item, "LUTData", count, bits, big_endian=big_endian)
    found: NDArray[np.float64] = table[np.clip(np.rint(values) - first, 0, count - 1).astype(np.int64)].astype(np.float64)
    return found


def _windowed(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, output 0 to 1."""
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0))))
    if function == "LINEAR_EXACT":
        return np.asarray((values - center) / width + 0.5)
    return np.asarray((values - (center - 0.5)) / max(width - 1.0, 1e-6) + 0.5)


def _number(header: Dataset, keyword: str, otherwise: float) -> float:
    """Give the first value of a decimal string; finite."""
    value = header.get(keyword)
    if value is None or value == "":
        return otherwise
    first = value[0] if hasattr(value, "__len__") and not isinstance(value, str) and len(value) else value
    number = float(first)
    if not np.isfinite(number) or abs(number) > 1e15:
        raise UnsupportedPixels(f"{keyword} is no number to calculate with.")
    return number


def to_srgb(pixels: NDArray[np.uint8], profile: bytes) -> tuple[NDArray[np.uint8], str]:
    """Apply an ICC input or display profile.

    Parameters
    ----------
    pixels
        uint8, shape (rows, columns, 3), in the colour space of the profile.
    profile
        The bytes of the profile; empty means that the picture is sRGB.

    Returns
    -------
    tuple
        The picture in sRGB, and a note in words when the profile could not be used (the picture is then unchanged).
    """
    if not profile:
        return pixels, ""
    if len(profile) > MAXIMUM_PROFILE_BYTES:
        return pixels, f"ICC profile ignored: {len(profile)} bytes are more than the {MAXIMUM_PROFILE_BYTES} allowed."
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB", ImageCms.Intent.PERCEPTUAL)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return pixels, "ICC profile ignored: it is damaged, or not made for RGB pictures."
    steps = range(0, 256, 51)
    probe = np.array(list(itertools.product(steps, steps, steps)), np.uint8)[None]
    if np.abs(_through(transform, probe).astype(np.int16) - probe).max() <= 1:
        return pixels, ""  # sRGB under whatever name: most profiles met in practice
    return _through(transform, pixels), ""


def _through(transform: ImageCms.ImageCmsTransform, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(pixels), "RGB")
    converted = ImageCms.applyTransform(image, transform)
    return np.array(converted)
