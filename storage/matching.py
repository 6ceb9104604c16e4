"""Attribute matching: from a key of a query to a condition on the index, and from an attribute to what it is compared with.

======================  ====================================================================================================
universal               empty, or nothing but ``*``
list of UID             separated by backslash or comma
range                   dates and times: ``a-b``, ``a-``, ``-b``; a time of less precision means all of its hour or minute
wildcard                ``*`` and ``?`` in text only; everything else is literal
single value            anything else; whole numbers by value
person name             without regard to case, each component group by itself; without ``=`` any of the three groups may match
======================  ====================================================================================================

References
----------
DICOM PS3.4 C.2.2.2, PS3.5 6.2, PS3.18 8.3.4
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, and_, or_, true

from storage.errors import InvalidQuery

LENGTH = 256
"""Characters of a value that take part in matching: more than any conformant one has."""
GROUPS = ("alphabetic", "ideographic", "phonetic")

_DATE = re.compile(r"\d{8}")
_OLD_DATE = re.compile(r"\d{4}\.\d{2}\.\d{2}")  # ACR-NEMA, PS3.5 6.2
_TIME = re.compile(r"(\d{2})(?::?(\d{2})(?::?(\d{2})(?:\.(\d{1,6}))?)?)?")
_NUMBER = re.compile(r"[+-]?\d{1,12}")


def column_names(keyword: str, vr: str) -> tuple[str, ...]:
    """Return the names of the columns that hold the normalised values of `keyword`: three for a person name, else one."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", keyword).lower()
    return tuple(f"{name}_{group}" for group in GROUPS) if vr == "PN" else (name,)


def normalised(vr: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return what the columns of :func:`column_names` hold for an attribute; empty text for nothing or nonsense.

    Of several values the first takes part in matching (all indexed attributes have a value multiplicity of 1).
    """
    value = values[0].replace("\0", "").strip() if values else ""
    match vr:
        case "PN":
            groups = _name_groups(value)
            return (groups[0], groups[1], groups[2])
        case "DA":
            return (_date(value) or "",)
        case "TM":
            return (_time(value, last=False) or "",)
        case "IS" | "US":
            return (str(int(value)) if _NUMBER.fullmatch(value) else "",)
        case _:
            return (value[:LENGTH],)


def condition(keyword: str, vr: str, columns: Sequence[Column[Any]], value: str) -> ColumnElement[bool] | None:
    """Return the condition of one matching key, None for universal matching.

    Raises
    ------
    InvalidQuery
        The value is none of its value representation.
    """
    value = value.replace("\0", "").strip()
    if not value.strip("*"):
        return None
    match vr:
        case "UI":
            return columns[0].in_([part for part in (part.strip() for part in re.split(r"[\\,]", value)) if part])
        case "PN":
            return _person_name(columns, value) if value.strip("*^=") else None
        case "DA" | "TM":
            first, last = bounds(keyword, vr, value)
            return columns[0].between(first, last)
        case "IS" | "US":
            if not _NUMBER.fullmatch(value):
                raise InvalidQuery(f"{keyword}: a whole number is expected")
            return columns[0] == str(int(value))
        case _:
            return text(columns[0], value)


def patterns(vr: str, columns: Sequence[Column[Any]], value: str) -> list[tuple[Sequence[Column[Any]], str]]:
    """Return the patterns in a key of text or person name that no order of texts helps to find, each with the columns of which one matches.

    All that :func:`condition` finds fulfils all of them.
    """
    value = value.replace("\0", "").strip()
    if vr != "PN":
        return [(columns, value)] if _is_read(value) else []
    if not value.strip("*^="):
        return []
    groups = _name_groups(value)
    found = [((column,), group) for column, group in zip(columns, groups, strict=True)] if "=" in value else [(columns, groups[0])]
    return [(some, wanted) for some, wanted in found if _is_read(wanted) and not _without_end(wanted)]


def _is_read(value: str) -> bool:
    """Tell whether rows have to be looked at for a value: it has a wildcard before its end."""
    return bool(re.search(r"[*?]", value.rstrip("*")))


def text(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    """Return the condition that `column` matches `value`, in which ``*`` and ``?`` are wildcards."""
    if "*" not in value and "?" not in value:
        return column == value[:LENGTH]
    if not _is_read(value):
        prefix = value.rstrip("*")
        # a range of texts, compared by their bytes: an index serves it however the statement was prepared
        return and_(column >= prefix, column < after) if (after := _after(prefix)) else column >= prefix
    return column.like(pattern(value), escape="!")


def _after(prefix: str) -> str:
    """Return the least text that is greater than all that begin with `prefix`; empty when there is none."""
    while prefix:
        last = ord(prefix[-1]) + 1
        if last <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if last == 0xD800 else last)  # no surrogates: they are no characters
        prefix = prefix[:-1]
    return ""


def pattern(value: str) -> str:
    """Return the SQL LIKE pattern of a wildcard value, ``!`` escaping; runs of wildcards are put in order, so that they stay cheap."""
    value = re.sub(r"[*?]{2,}", lambda run: "?" * run[0].count("?") + "*" * ("*" in run[0]), value)
    value = re.sub(r"[!%_]", lambda special: f"!{special[0]}", value)
    return value.replace("*", "%").replace("?", "_")


def bounds(keyword: str, vr: str, value: str) -> tuple[str, str]:
    """Return first and last normalised value of a date or time key: of a range, or of a single value's precision.

    Raises
    ------
    InvalidQuery
        Neither a value nor a range of values.
    """
    begin, hyphen, end = value.partition("-")
    if not hyphen:
        end = begin
    begin, end = begin.strip(), end.strip()
    first, last = ("0", "9") if vr == "DA" else ("0", "3")  # an open end; below and above every value, and above "no value"
    if begin:
        first = (_date(begin) if vr == "DA" else _time(begin, last=False)) or ""
    if end:
        last = (_date(end) if vr == "DA" else _time(end, last=True)) or ""
    if not first or not last or not (begin or end):
        form = "a date YYYYMMDD" if vr == "DA" else "a time HHMMSS.FFFFFF"
        raise InvalidQuery(f"{keyword}: {form}, or a range a-b, a- or -b is expected")
    return first, last


def combined(dates: tuple[Column[Any], str], times: tuple[Column[Any], str], keywords: tuple[str, str]) -> ColumnElement[bool]:
    """Return the condition of a date and a time key taken together as one range of moments (PS3.4 C.2.2.2.5.4)."""
    (date, date_value), (time, time_value) = dates, times
    first_date, last_date = bounds(keywords[0], "DA", date_value.strip())
    first_time, last_time = bounds(keywords[1], "TM", time_value.strip())
    return and_(
        or_(date > first_date, and_(date == first_date, time >= first_time)),
        or_(date < last_date, and_(date == last_date, time <= last_time)),
    )


def _person_name(columns: Sequence[Column[Any]], value: str) -> ColumnElement[bool]:
    groups = _name_groups(value)
    if "=" in value:
        wanted = [_group(column, group) for column, group in zip(columns, groups, strict=True) if group.strip("*")]
        return and_(true(), *wanted)
    return or_(*(_group(column, groups[0]) for column in columns))


def _group(column: Column[Any], wanted: str) -> ColumnElement[bool]:
    """Return the condition on one component group; stored ones have lost empty last components, so ``smith^*`` is also ``smith``."""
    bare = _without_end(wanted)
    return or_(text(column, wanted), column == bare) if bare else text(column, wanted)


def _without_end(wanted: str) -> str:
    """Return what a wanted group matches besides: itself without a last component that may be empty; nothing if it has none such."""
    bare = re.sub(r"[\s^*]+$", "", wanted)
    return bare if wanted.endswith("*") and "^" in wanted[len(bare) :] and not re.search(r"[*?]", bare) else ""


def _name_groups(value: str) -> list[str]:
    """Split a person name into its three component groups, comparable without regard to case; empty ends are insignificant."""
    groups = [unicodedata.normalize("NFC", group).casefold().strip() for group in value.split("=")[:3]]
    trimmed = [re.sub(r"[\s^]+$", "", group)[:LENGTH] for group in groups]
    return trimmed + [""] * (3 - len(trimmed))


def _date(value: str) -> str | None:
    if _OLD_DATE.fullmatch(value):
        value = value.replace(".", "")
    return value if _DATE.fullmatch(value) else None


def _time(value: str, *, last: bool) -> str | None:
    """Return HHMMSS.FFFFFF, the missing part filled up with its first or last value."""
    found = _TIME.fullmatch(value)
    if found is None:
        return None
    hours, minutes, seconds, fraction = found.groups()
    filler = ("59", "59", "9") if last else ("00", "00", "0")
    return f"{hours}{minutes or filler[0]}{seconds or filler[1]}.{(fraction or '').ljust(6, filler[2])}"


def keys_present(keys: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that ask for more than universal matching."""
    return {keyword: value for keyword, value in keys.items() if value.replace("\0", "").strip().strip("*")}
