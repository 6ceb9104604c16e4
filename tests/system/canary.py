"""Looks for what must not be readable: canary values in every form in which bytes could lie on a disk or cross a wire."""

from __future__ import annotations

import base64
import secrets
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicom_node.demo import draw_skin_picture
from dicom_node.photograph import PhotographOptions, wrap_pixels
from dicom_node.sending import Outgoing, scan
from storage.database import utc_now
from tests.interop.orthanc import program

_FLAGS_SYN, _FLAGS_ACK = 0x02, 0x10


@dataclass(frozen=True)
class Canary:
    """An image whose every identity, text and piece of pixel data is found nowhere else."""

    item: Outgoing
    words: Mapping[str, bytes]
    """What to look for, by name."""

    def told(self, **words: str) -> Canary:
        """Return one with more words."""
        return Canary(self.item, {**self.words, **{name: word.encode() for name, word in words.items()}})


def canary() -> Canary:
    """Draw one; different each time, so that nothing else on this machine can hold it."""
    texts = {
        "patient name": f"Kanari{secrets.token_hex(4)}^Conrad",
        "patient id": f"CAN-{secrets.token_hex(5)}",
        "accession number": f"ACC{secrets.token_hex(5)}",
        "study description": f"Yellow plumage {secrets.token_hex(8)}",
    }
    options = PhotographOptions(
        patient_name=texts["patient name"],
        patient_id=texts["patient id"],
        accession_number=texts["accession number"],
        study_description=texts["study description"],
    )
    pixels = draw_skin_picture(seed=secrets.randbelow(10**6), rows=96, columns=96)
    patch = secrets.token_bytes(72)
    pixels[40, 10:34] = list(zip(*[iter(patch)] * 3, strict=True))
    content = wrap_pixels(pixels, options, now=utc_now())
    assert content.count(patch) == 1
    item = Outgoing("canary", content, scan(content))
    summary = item.summary
    uids = {
        "study uid": summary.study_instance_uid,
        "series uid": summary.series_instance_uid,
        "sop instance uid": summary.sop_instance_uid,
    }
    return Canary(item, {"pixels": patch} | {name: word.encode() for name, word in (texts | uids).items()})


def forms(word: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a word as it could stand in a file: as it is, in UTF-16, in hexadecimal, and in base64 at each of its three places."""
    yield "plain", word
    if word.isascii():
        yield "UTF-16-LE", word.decode().encode("utf-16-le")
        yield "UTF-16-BE", word.decode().encode("utf-16-be")
    yield "hexadecimal", word.hex().encode()
    for place in range(3):
        # The characters at both ends hold bits of the neighbours; those between are the word's own.
        whole = base64.b64encode(b"\0" * place + word)
        own = whole[(place * 8 + 5) // 6 : (place + len(word)) * 8 // 6]
        yield f"base64 at {place}", own
        yield f"base64 for URLs at {place}", own.translate(bytes.maketrans(b"+/", b"-_"))


def found_in(content: bytes, words: Mapping[str, bytes]) -> list[str]:
    """Return which words stand in some bytes, and in which form."""
    return [f"{name} ({form})" for name, word in words.items() for form, needle in forms(word) if needle in content]


def scanned(places: Iterable[Path], words: Mapping[str, bytes]) -> tuple[int, dict[str, list[str]]]:
    """Read every file below `places`, names too; return how many bytes were read, and the findings by file."""
    findings: dict[str, list[str]] = {}
    byte_count = 0
    for place in places:
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            try:
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            except FileNotFoundError:
                continue  # the node works meanwhile: what it moved is found where it is now
            byte_count += len(content)
            if found := found_in(content, words) + found_in(str(path).encode(), words):
                findings[str(path)] = found
    return byte_count, findings


# --- the wire --------------------------------------------------------------------------------------------------------


@contextmanager
def captured(path: Path, ports: Iterable[int]) -> Iterator[None]:
    """Capture what crosses the loopback interface to and from `ports` into `path`, every packet whole; needs root."""
    wanted = " or ".join(f"port {port}" for port in ports)
    process = subprocess.Popen(
        [program("tcpdump"), "-i", "lo", "-n", "-s", "0", "-B", "131072", "-U", "-Z", "root", "-w", str(path), f"tcp and ({wanted})"],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    if b"listening on" not in said:
        process.kill()
        process.wait()
        pytest.fail(f"tcpdump cannot capture: {said.decode()}")
    try:
        yield
        time.sleep(1.0)  # what the kernel holds for tcpdump yet
    finally:
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode()
        process.stderr.close()
        process.wait()
    assert "\n0 packets dropped by kernel" in told, told


def streams(path: Path) -> dict[int, list[bytes]]:
    """Put each direction of each TCP connection of a capture together again; by the server's port, which is the one that was asked."""
    content = path.read_bytes()
    magic, _, _, _, _, _, link = struct.unpack_from("<IHHiIII", content)
    assert (magic, link) == (0xA1B2C3D4, 1), "not a capture of this machine's tcpdump on lo"
    open_now: dict[tuple[int, int], tuple[int, bytearray]] = {}
    whole: list[tuple[int, bytearray]] = []
    position = 24
    while position < len(content):
        captured_length, length = struct.unpack_from("<II", content, position + 8)
        assert captured_length == length, "a packet was cut"
        packet = content[position + 16 : position + 16 + length]
        position += 16 + length
        segment = packet[14 + (packet[14] & 15) * 4 :]  # behind Ethernet's and IP's header
        source, target, sequence = struct.unpack_from(">HHI", segment)
        payload = segment[(segment[12] >> 4) * 4 :]
        if segment[13] & _FLAGS_SYN:
            asked = source if segment[13] & _FLAGS_ACK else target  # the server's SYN acknowledges the client's
            pieces = bytearray()
            open_now[source, target] = ((sequence + 1) & 0xFFFFFFFF, pieces)
            whole.append((asked, pieces))
            continue
        if not payload or (source, target) not in open_now:
            continue
        first, pieces = open_now[source, target]
        start = (sequence - first) & 0xFFFFFFFF
        if start > 1 << 31:
            continue  # a keep-alive probe, before the beginning
        if len(pieces) < start + len(payload):
            pieces.extend(bytes(start + len(payload) - len(pieces)))
        pieces[start : start + len(payload)] = payload
    by_port: dict[int, list[bytes]] = {}
    for asked, pieces in whole:
        by_port.setdefault(asked, []).append(bytes(pieces))
    return by_port
