"""What text the Value Representations hold (PS3.5 Table 6.2-1): to judge a source's values, and to make our own fit."""

from __future__ import annotations

import re
from datetime import date

_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9]\d*)(\.(0|[1-9]\d*))*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_OR_BACKSLASH = re.compile(r"[\x00-\x1f\x7f-\x9f\\]+")
_CONTROL_IN_PARAGRAPHS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_LENGTH = {"LO": 64, "SH": 16, "ST": 1024, "UT": 1 << 20}


def _valid_date(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"\d{8}", text, re.ASCII)) and date(int(text[:4]), int(text[4:6]), int(text[6:])).year > 0
    except ValueError:
        return False


def valid(vr: str, text: str) -> bool:
    """Whether `text` is one value that VR `vr` can hold (PS3.5 Table 6.2-1)."""
    if vr == "DA":
        return _valid_date(text)
    if vr == "TM":
        return bool(re.fullmatch(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", text, re.ASCII))
    if vr == "AS":
        return bool(re.fullmatch(r"\d{3}[DWMY]", text, re.ASCII))
    if vr == "CS":
        return bool(re.fullmatch(r"[A-Z0-9 _]{1,16}", text))
    if vr == "UI":
        return bool(_UID.fullmatch(text))
    if vr == "PN":
        groups = text.split("=")
        return (
            len(groups) <= 3
            and all(len(group) <= 64 and group.count("^") <= 4 for group in groups)
            and "\\" not in text
            and not _CONTROL.search(text)
        )
    if vr in {"ST", "UT"}:
        return len(text) <= _LENGTH[vr] and not _CONTROL_IN_PARAGRAPHS.search(text)
    return len(text) <= _LENGTH[vr] and "\\" not in text and not _CONTROL.search(text)


def one_line(text: str) -> str:
    """Text for an attribute of one line: control characters and backslashes become spaces."""
    return _CONTROL_OR_BACKSLASH.sub(" ", text).strip()


def shortened(text: str, limit: int = 64) -> str:
    """Text that fits an LO, SH or the like: one line, cut at a word where it is longer than `limit`.

    The standard counts characters, some readers and validators count bytes of UTF-8: what fits by bytes fits by both.
    """
    text = one_line(text)
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return text
    whole = encoded[:limit].decode("utf-8", "ignore")
    words = text[: len(whole) + 1].rsplit(" ", 1)[0]
    return (words if 0 < len(words) <= len(whole) else whole).rstrip(" ,;:(")


def paragraphs(text: str) -> str:
    """Text for a UT, which may have line breaks; never empty, as the Text Value of a content item is of type 1."""
    return _CONTROL_IN_PARAGRAPHS.sub(" ", text).strip() or "-"
