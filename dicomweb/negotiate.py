"""Content negotiation: Accept header or accept query parameter -> what to send.

Pure functions; the rules are PS3.18 Section 8.7 with RFC 9110 Section 12.5.1: order and ``q`` decide, an entry that is unknown
or not on offer is passed over, names are compared without case, values may be quoted or not, nothing fits -> 406 with the list
of what is on offer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from dicomweb.errors import BadRequest, NotAcceptable

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1.99"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = frozenset({IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN})
"""Syntaxes whose pixel data are native: every one converts to Explicit VR Little Endian without a codec."""

DICOM_JSON = "application/dicom+json"
_MAX_ENTRIES = 64
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_WEIGHT = re.compile(r"(0?\.[0-9]{1,3}|0|1|1\.0{0,3}|0\.)")


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type or range with its parameters; type and parameter names in lower case."""

    name: str
    parameters: Mapping[str, str]

    def parameter(self, name: str) -> str:
        """Value of a parameter, empty if absent."""
        return self.parameters.get(name, "")


def parse_media_type(text: str) -> MediaType:
    """Parse ``type/subtype; name=value; name="value"``.

    An unquoted value may hold what RFC 9110 would want quoted (``type=application/dicom``, ``boundary==_a:b``): it ends at the
    next semicolon. Clients in the field write it so.

    Raises
    ------
    BadRequest
        No ``type/subtype``, a parameter without a name, an unterminated quote.
    """
    head, *rest = _split(text, ";")
    name = head.strip().lower()
    if name == "*":  # what Java's HttpURLConnection calls */*
        name = "*/*"
    main, slash, sub = name.partition("/")
    if not slash or not _TOKEN.fullmatch(main) or not _TOKEN.fullmatch(sub):
        raise BadRequest("malformed media type: 'type/subtype' expected")
    parameters: dict[str, str] = {}
    for entry in rest:
        if not entry.strip():
            continue
        key, equals, value = entry.partition("=")
        key = key.strip().lower()
        if not equals or not _TOKEN.fullmatch(key):
            raise BadRequest("malformed media type: a parameter is no 'name=value'")
        parameters.setdefault(key, _unquote(value.strip()))
    return MediaType(name, MappingProxyType(parameters))


def parse_accept(text: str) -> tuple[MediaType, ...]:
    """Parse an Accept header into ranges, best first; entries of weight 0 are left out, an empty header means everything.

    Raises
    ------
    BadRequest
        An entry or a weight is malformed, or there are more than 64 entries.
    """
    entries = [entry for entry in _split(text, ",") if entry.strip()]
    if len(entries) > _MAX_ENTRIES:
        raise BadRequest(f"more than {_MAX_ENTRIES} entries in Accept")
    weighted: list[tuple[float, MediaType]] = []
    for entry in entries:
        media = parse_media_type(entry)
        weight = media.parameter("q") or "1"
        if not _WEIGHT.fullmatch(weight):
            raise BadRequest("malformed Accept: q is no number from 0 to 1")
        weighted.append((float("0" + weight if weight.startswith(".") else weight), media))
    if not weighted:
        return (MediaType("*/*", MappingProxyType({})),)
    weighted.sort(key=lambda pair: -pair[0])  # stable: equal weights keep the order of the header
    return tuple(media for weight, media in weighted if weight > 0)


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator outside quoted strings."""
    parts: list[str] = []
    start, quoted, escaped = 0, False, False
    for index, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            parts.append(text[start:index])
            start = index + 1
    if quoted:
        raise BadRequest("malformed header: a quoted string does not end")
    parts.append(text[start:])
    return parts


def _unquote(value: str) -> str:
    if len(value) >= 2 and value.startswith('"') and value.endswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    if '"' in value:
        raise BadRequest("malformed header: a quote inside an unquoted value")
    return value


def json_type(accepted: Sequence[MediaType]) -> str:
    """Choose the type of a JSON answer: application/dicom+json, or application/json where that is asked for.

    Raises
    ------
    NotAcceptable
        Only other types are accepted, for example XML.
    """
    for media in accepted:
        if media.name in {DICOM_JSON, "application/*", "*/*"}:
            return DICOM_JSON
        if media.name == "application/json":
            return "application/json"
    raise NotAcceptable("on offer: application/dicom+json, application/json")


class Container(StrEnum):
    """How instances are wrapped in an answer."""

    MULTIPART = "multipart/related"
    SINGLE = "single part"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: the container and, per instance, the transfer syntax."""

    container: Container
    transfer_syntax_uids: tuple[str, ...]


def plan_instances(accepted: Sequence[MediaType], stored: Sequence[str], *, single: bool) -> Plan:
    """Choose container and transfer syntax for an answer of application/dicom instances.

    Parameters
    ----------
    accepted
        From `parse_accept`.
    stored
        Transfer Syntax UID of each instance to be sent, as stored.
    single
        Whether the resource is one instance, so that a bare ``application/dicom`` can be given.

    Raises
    ------
    NotAcceptable
        No container is accepted, or an instance is stored compressed and neither its syntax nor ``*`` is accepted.

    References
    ----------
    DICOM PS3.18 Section 8.7.3: without a transfer-syntax parameter Explicit VR Little Endian is meant
    """
    wanted: dict[Container, list[str]] = {}
    for media in accepted:
        container = _container(media, single=single)
        if container:
            wanted.setdefault(container, []).append(media.parameter("transfer-syntax") or EXPLICIT_VR_LITTLE_ENDIAN)
    for container, syntaxes in wanted.items():
        chosen = [_syntax(uid, syntaxes) for uid in stored]
        if all(chosen):
            return Plan(container, tuple(chosen))
    raise NotAcceptable(_on_offer(stored, single=single, container_fits=bool(wanted)))


def _container(media: MediaType, *, single: bool) -> Container | None:
    if media.name in {"*/*", "multipart/*"}:
        return Container.MULTIPART
    if media.name == "multipart/related":
        return Container.MULTIPART if media.parameter("type").lower() in {"application/dicom", "application/*", "*/*", ""} else None
    if media.name in {"application/dicom", "application/*"} and single:
        return Container.SINGLE
    return None


def _syntax(stored: str, wanted: Iterable[str]) -> str:
    """Transfer syntax to send for one instance; empty if none of the wanted ones is possible."""
    for uid in wanted:
        if uid in {"*", stored}:
            return stored
        if uid == EXPLICIT_VR_LITTLE_ENDIAN and stored in UNCOMPRESSED:
            return uid
    return ""


def _on_offer(stored: Sequence[str], *, single: bool, container_fits: bool) -> str:
    forms = 'multipart/related; type="application/dicom"' + (", application/dicom" if single else "")
    syntaxes = sorted(set(stored) | ({EXPLICIT_VR_LITTLE_ENDIAN} if set(stored) & UNCOMPRESSED else set()))
    if not container_fits:
        return f"on offer: {forms}, each with transfer-syntax=* (as stored)"
    compressed = sum(uid not in UNCOMPRESSED for uid in stored)
    why = f"{compressed} of {len(stored)} instances are stored compressed and are not decompressed here; " if compressed else ""
    return f"{why}ask with transfer-syntax=* (as stored); on offer: {forms}, transfer syntaxes {', '.join(syntaxes)}"


_IMAGE_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # media type and its older names: PS3.18 Table 8.7.3-4 and -5
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 57, 70)), ("image/jpeg",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (80, 81)), ("image/jls", "image/x-jls")),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (90, 91)), ("image/jp2",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (92, 93)), ("image/jpx",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (110, 111, 112)), ("image/jxl",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203)), ("image/jphc",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in ("100", "100.1", "101", "101.1")), ("video/mpeg2",)),
        **dict.fromkeys((f"1.2.840.10008.1.2.4.{number}{variant}" for number in range(102, 107) for variant in ("", ".1")), ("video/mp4",)),
        **dict.fromkeys(("1.2.840.10008.1.2.4.107", "1.2.840.10008.1.2.4.108"), ("video/mp4",)),
        "1.2.840.10008.1.2.5": ("image/dicom-rle", "image/x-dicom-rle"),
    }
)
OCTETS = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class OctetPlan:
    """How bulk data or frames are sent."""

    container: Container
    content_type: str
    """Of each part, or of the whole."""
    media_type: str
    """The same without parameters."""


def plan_octets(
    accepted: Sequence[MediaType], transfer_syntax_uid: str, *, encapsulated: bool, single: bool, own_type: str = ""
) -> OctetPlan:
    """Choose container and media type for frames or another bulk value, as stored (native values little endian).

    Parameters
    ----------
    transfer_syntax_uid
        As the instance is stored.
    encapsulated
        Whether the value is compressed pixel data.
    single
        Whether there is one value, so that it can be given without multipart.
    own_type
        Media type that the object itself states for the value, for example application/pdf.

    Raises
    ------
    NotAcceptable
        Compressed frames are asked for decoded, or in another syntax than the stored one.

    References
    ----------
    DICOM PS3.18 Section 8.7.3.3. ``application/octet-stream; transfer-syntax=*`` is not in it; viewers send it and mean "as stored".
    """
    real = _IMAGE_TYPES.get(transfer_syntax_uid, (OCTETS,)) if encapsulated else (OCTETS, *((own_type,) if own_type else ()))
    syntax = transfer_syntax_uid if encapsulated else EXPLICIT_VR_LITTLE_ENDIAN
    for media in accepted:
        multipart = media.name in {"*/*", "multipart/*", "multipart/related"}
        if not multipart and not single:
            continue
        name = (media.parameter("type").lower() or "*/*") if multipart else media.name
        wanted = media.parameter("transfer-syntax")
        if wanted not in {"", "*", syntax}:
            continue
        if name in real or (name == "*/*" or (name.endswith("/*") and any(one.startswith(name[:-1]) for one in real))):
            chosen = name if name in real else real[0]
        elif name == OCTETS and wanted:
            chosen = real[0]
        else:
            continue
        plain = not encapsulated and chosen != OCTETS
        content_type = chosen if plain else f"{chosen}; transfer-syntax={syntax}"
        return OctetPlan(Container.MULTIPART if multipart else Container.SINGLE, content_type, chosen)
    if encapsulated:
        raise NotAcceptable(
            f'stored compressed and not decompressed here; on offer: multipart/related; type="{real[0]}"; transfer-syntax={syntax}, '
            f'or multipart/related; type="{OCTETS}"; transfer-syntax=*'
        )
    raise NotAcceptable(f'on offer: multipart/related; type="{OCTETS}"' + "".join(f', multipart/related; type="{one}"' for one in real[1:]))
