"""GDCM in a process of its own, for the JPEG streams that only it can read: 12-bit DCT, lossless above 8 bits, some odd JPEG-LS.

A damaged stream makes GDCM end its process (``terminate called after throwing an instance of 'gdcm::Exception'``), and what decodes
also compares pixels for the receivers, so it may cost no more than a refusal. Time and memory of the process are limited.

Run as a program it reads a stream from standard input and writes its samples, little-endian, to standard output.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

SECONDS: Final = 30
"""Processor seconds for one frame (threats.md, hard limits)."""
_MEMORY_BYTES: Final = 4 * 1024**3


class DecoderDied(Exception):
    """GDCM refused the stream, crashed over it, or took too long."""


def decode(stream: bytes, *, syntax: str, rows: int, columns: int, samples: int, precision: int) -> bytes:
    """Decode one frame: samples as they are in the stream, one byte each up to 8 bits, else two, little-endian.

    Parameters
    ----------
    syntax
        Name in GDCM of the kind of stream: JPEGExtendedProcess2_4, JPEGLosslessProcess14, JPEGLSLossless.

    Raises
    ------
    DecoderDied
    """
    command = [sys.executable, "-I", __file__, syntax, *(str(number) for number in (rows, columns, samples, precision))]
    try:
        done = subprocess.run(command, input=stream, capture_output=True, timeout=4 * SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DecoderDied(type(error).__name__) from error
    if done.returncode != 0 or len(done.stdout) != rows * columns * samples * (1 if precision <= 8 else 2):
        raise DecoderDied(f"the process of the decoder ended with {done.returncode}")
    return done.stdout


def _main(syntax: str, rows: int, columns: int, samples: int, precision: int) -> None:
    import resource  # noqa: PLC0415 - what follows belongs to the child alone

    import gdcm  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the picture
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(sys.stdin.buffer.read())
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    picture = gdcm.Image()
    picture.SetNumberOfDimensions(2)
    picture.SetDimensions((columns, rows, 1))
    picture.SetDataElement(element)
    # With these two GDCM leaves the colours of the samples alone.
    colour = gdcm.PhotometricInterpretation.RGB if samples == 3 else gdcm.PhotometricInterpretation.MONOCHROME2
    picture.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(colour))
    picture.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    # The precision of the stream, not of the header: where they differ GDCM would lose bits.
    picture.SetPixelFormat(gdcm.PixelFormat(samples, 8 if precision <= 8 else 16, precision, precision - 1, 0))
    # The wrapper hands bytes over as text with surrogates; pydicom's plug-in undoes it in the same way.
    sys.stdout.buffer.write(picture.GetBuffer().encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    _main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
