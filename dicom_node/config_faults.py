"""What is wrong with a configuration, in words: which table, which key, what stands there, what may stand there.

The checks themselves are the settings' (`dicom_node.config`); here their results, and those of the TOML reader, become sentences.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

_ENDINGS = {1: "st", 2: "nd", 3: "rd"}
_PATTERNS: Mapping[str, str] = {
    "ae_title": "use 1 to 16 printable ASCII characters, without backslash, no space at either end",
    "name": "use letters, digits, full stop, hyphen and underscore, at most 64, beginning with a letter or digit",
    "base_path": "use parts of letters, digits, . _ - that each begin with /, for example /dicomweb; empty for none",
    "private_scheme": "use 99 and up to 14 capital letters, digits and underscores, for example 99DERMNODE",
    "icd11_scheme": "use 99 and up to 14 capital letters, digits and underscores, for example 99ICD11",
    "url": "use an http:// or https:// URL without spaces",
}
_TYPES: Mapping[str, str] = {
    "string": 'must be a text in quotes, for example "text"',
    "path": 'must be a path in quotes, for example "/var/lib/dicom-node"',
    "int": "must be a whole number, without quotes",
    "float": "must be a number, without quotes",
    "bool": "must be true or false, without quotes",
}
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_TOML_REMEDIES: tuple[tuple[str, str], ...] = (
    ("Invalid value", "texts stand in double quotes, yes and no are true and false"),
    ("Expected '=' after a key", "a line is key = value, or [table]"),
    ("Cannot overwrite", "the key stands twice in its table; keep one of them"),
    ("Cannot declare", "the table stands twice; put its keys together under one"),
    ("Cannot mutate", "the table stands twice; put its keys together under one"),
    ("Expected newline", "one key a line; a text with quotes around it, a comment after #"),
    ("Expected ']'", "a table's name stands in brackets: [dimse], or [[peers]]"),
    ("Unescaped '\\' in a string", "write \\\\ for a backslash, or put the text into single quotes"),
    ("Illegal character", "the text lacks its closing quote, or holds a control character"),
    ("Unclosed array", "the list lacks its closing bracket ]"),
    ("Unterminated string", "the text lacks its closing quotes"),
)


def ordinal(number: int) -> str:
    """Return a number as people count places: 1st, 2nd, 3rd, 4th."""
    return f"{number}{'th' if number % 100 in (11, 12, 13) else _ENDINGS.get(number % 10, 'th')}"


def entry(table: str, index: int, told: object = None) -> str:
    """Name one of several tables of a name, as people count, with its own name: ``the 2nd [[peers]] ("pacs")``.

    Parameters
    ----------
    index
        Counted from 0.
    told
        What stands in it; its ``name`` or ``ae_title`` is shown.
    """
    held = told if isinstance(told, Mapping) else {}
    name = next((held[key] for key in ("name", "ae_title") if isinstance(held.get(key), str)), "")
    return f"the {ordinal(index + 1)} [[{table}]]" + (f' ("{name}")' if name else "")


def unreadable(path: Path, error: tomllib.TOMLDecodeError | UnicodeDecodeError) -> str:
    """Say why a file is no TOML, and where: line and column."""
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        return f"{path}, line {line}: not valid TOML: a byte that is no UTF-8; save the file as UTF-8"
    words = str(error)
    remedy = next((remedy for start, remedy in _TOML_REMEDIES if words.startswith(start)), "compare it with `dicom-node config --example`")
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", words)
    where = f", line {found[1]}, column {found[2]}" if found and found[1] else ", at its end" if found else ""
    return f"{path}{where}: not valid TOML: {words[: found.start()] if found else words}; {remedy}"


def sentence(fault: Mapping[str, Any], settings: type[BaseModel], table: Mapping[str, Any], sources: Mapping[tuple[str, str], str]) -> str:
    """Say what one fault of pydantic's means for who wrote the file.

    Parameters
    ----------
    fault
        Of ``ValidationError.errors()``.
    settings
        The class of the whole configuration.
    table
        What was read.
    sources
        Section and key -> the environment variable that its value came from.
    """
    place = tuple(fault["loc"])
    kind, section = str(fault["type"]), str(place[0])
    if len(place) == 1:
        return _of_section(kind, section, settings, fault["input"])
    model, several = _model(settings, section)
    rest = place[1:]
    if several and isinstance(rest[0], int):
        held = table.get(section)
        told = held[rest[0]] if isinstance(held, Sequence) and rest[0] < len(held) else None
        where, rest = entry(section, rest[0], told), rest[1:]
        if not rest:
            return f"{where}: must be a table of keys"
        where += f", {rest[0]}"
    else:
        where = f"{section}.{rest[0]}"
    key = str(rest[0])
    if kind == "extra_forbidden":
        return f"{where}: there is no such key{nearest(key, _keys(model))}{_elsewhere(key, section, settings)}; known: {_list(model)}"
    if len(rest) > 1 and isinstance(rest[1], int):
        where += f", its {ordinal(rest[1] + 1)} item"
    if source := sources.get((section, key)):
        where = f"{source} ({where})"
    return f"{where}: {_wrong(kind, key, fault)}{_given(kind, key, model, fault.get('input'))}"


def _of_section(kind: str, section: str, settings: type[BaseModel], given: object) -> str:
    if kind == "extra_forbidden":
        if not isinstance(given, Mapping | list):
            homes = _homes(section, settings)
            remedy = f"put it under {' or '.join(homes)}" if homes else "no table has such a key"
            return f"{section}: stands before the first table; {remedy}"
        known = ", ".join(f"[[{name}]]" if _model(settings, name)[1] else f"[{name}]" for name in settings.model_fields)
        return f"{section}: there is no such table{nearest(section, settings.model_fields)}; known: {known}"
    if _model(settings, section)[1]:
        return f"{section}: must be a table of which there may be several; write [[{section}]], with two brackets, above the keys of each"
    if isinstance(given, list):
        return f"{section}: must be one table; write [{section}], with single brackets, once"
    return f"{section}: must be a table; write [{section}] on a line of its own, and its keys below"


def _wrong(kind: str, key: str, fault: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = fault.get("ctx") or {}
    if kind == "missing":
        return "is missing; it is required"
    if key in _PATTERNS and kind in {"string_pattern_mismatch", "string_too_short", "string_too_long"}:
        return _PATTERNS[key]
    if kind == "literal_error":
        return f"must be {context['expected']}".replace("''", "empty")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]}"
    if kind == "tuple_type":
        return 'must be a list in brackets, for example ["one", "two"]'
    if kind == "int_from_float":
        return "must be a whole number"
    return _TYPES.get(kind.partition("_")[0]) or str(fault["msg"]).removeprefix("Value error, ")


def _given(kind: str, key: str, model: type[BaseModel], value: object) -> str:
    """Show what stands there, unless it is a secret or holds one."""
    if kind == "missing" or "Secret" in str(_annotation(model, key)):
        return ""
    shown = ("true" if value else "false") if isinstance(value, bool) else repr(value)
    shown = re.sub(r"//[^/@\s]*@", "//…@", shown)
    return f" (given: {shown if len(shown) <= 80 else shown[:79] + '…'})"


def _model(settings: type[BaseModel], section: str) -> tuple[type[BaseModel], bool]:
    """Return the class of a section, and whether there may be several."""
    field = settings.model_fields.get(section)
    held = get_args(field.annotation) if field is not None else ()
    model = held[0] if held else field.annotation if field is not None else None
    return (model if isinstance(model, type) and issubclass(model, BaseModel) else settings), bool(held)


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _annotation(model: type[BaseModel], key: str) -> object:
    return next((field.annotation for name, field in model.model_fields.items() if key in (name, field.alias)), None)


def _list(model: type[BaseModel]) -> str:
    return ", ".join(_keys(model))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return what was meant, perhaps, as a clause to be appended; empty when nothing is near."""
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def _homes(key: str, settings: type[BaseModel]) -> list[str]:
    return [
        f"[[{name}]]" if several else f"[{name}]"
        for name in settings.model_fields
        for model, several in [_model(settings, name)]
        if key in _keys(model)
    ]


def _elsewhere(key: str, section: str, settings: type[BaseModel]) -> str:
    homes = [home for home in _homes(key, settings) if home.strip("[]") != section]
    return f"; it belongs to {' or '.join(homes)}" if homes else ""
