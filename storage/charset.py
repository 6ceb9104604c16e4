"""Text of the few collected values under Specific Character Set (0008,0005).

Nothing here raises or warns: a value that its character set cannot explain is decoded with U+FFFD in place of the bytes that
make no sense, because the index needs some text and the data set itself is kept byte for byte anyway.

References
----------
DICOM PS3.3 C.12.1.1.2 Specific Character Set, PS3.5 Section 6.1
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding

_ESCAPE = b"\x1b"
_RESETS = frozenset(b"\t\n\f\r\\^=")
"""After these the initial character set holds again (PS3.5 6.1.2.5.3)."""
_STATEFUL = frozenset({"iso2022_jp", "iso2022_jp_2"})
"""Codecs that want to see the escape sequence themselves."""


@cache
def _codecs(terms: tuple[str, ...]) -> tuple[str, ...]:
    codecs = tuple(python_encoding[term] for term in terms if term in python_encoding)
    return codecs or ("latin_1",)


def decode(value: bytes, specific_character_set: Sequence[str]) -> str:
    r"""Decode the whole value of an element, backslashes and all.

    Parameters
    ----------
    value : bytes
        As in the data set.
    specific_character_set : sequence of str
        Defined terms of (0008,0005); unknown ones are passed over, none at all means the default repertoire, read as Latin-1 so
        that the bytes of a sender that forgot to say are at least told apart.
    """
    if value.isascii() and _ESCAPE not in value:
        return value.decode("ascii")
    codecs = _codecs(tuple(specific_character_set))
    if _ESCAPE not in value or codecs[0] in ("UTF8", "GB18030", "GBK"):
        # without code extensions one codec explains all; these three forbid code extensions
        codec = codecs[0]
        return value.decode("latin_1" if codec == "iso8859" else codec, "replace")
    head, *parts = value.split(_ESCAPE)
    first = "latin_1" if codecs[0] == "iso8859" else codecs[0]
    text = [head.decode(first, "replace")]
    for part in parts:
        text.append(_decode_part(_ESCAPE + part, first))
    return "".join(text)


def _decode_part(part: bytes, first: str) -> str:
    """Decode what follows one escape sequence, up to the next."""
    for size in (3, 4):
        codec = CODES_TO_ENCODINGS.get(part[:size])
        if codec is not None:
            break
    else:
        return "\N{REPLACEMENT CHARACTER}" + part[1:].decode(first, "replace")
    if codec in _STATEFUL:
        # the delimiters are bytes of two-byte characters too: the codec itself must find the end
        return part.decode(codec, "replace")
    body = part[size:]
    cut = next((index for index, byte in enumerate(body) if byte in _RESETS), len(body))
    codec = "latin_1" if codec == "iso8859" else codec
    return body[:cut].decode(codec, "replace") + body[cut:].decode(first, "replace")
