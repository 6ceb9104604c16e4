"""`dicom-node send`: DICOM files and pictures, out by C-STORE or STOW-RS, as a user of any archive would."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from dicom_node.config import Settings
from dicom_node.photograph import BODY_SITES, LATERALITIES, PhotographOptions, UnreadablePicture, wrap_picture, wrap_pixels
from dicom_node.security import ClientTls
from dicom_node.storehouse import client_tls
from storage.errors import StorageError
from storage.part10 import Part10Parser
from storage.records import Limits, Summary
from storage.scan import DataSetScanner

CHUNK = 1 << 20
Progress = Callable[[int, int | None], None]


class SendError(Exception):
    """Nothing more can be sent; each fault is a sentence with its remedy."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One instance to send: a file, or bytes made here."""

    source: str
    """What the user named."""
    content: Path | bytes
    summary: Summary

    @property
    def sop_instance_uid(self) -> str:
        """SOP Instance UID (0008,0018)."""
        return self.summary.sop_instance_uid

    def part10(self) -> Iterator[bytes]:
        """The file, chunk by chunk."""
        return _read(self.content)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The data set bytes, without preamble and file meta, about ``size`` at a time."""
        parser = Part10Parser()
        for chunk in _read(self.content, size):
            for piece in parser.feed(chunk):
                yield bytes(piece)
        parser.finish()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the receiver said of one instance."""

    source: str
    sop_instance_uid: str
    stored: bool
    text: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where to: a DICOMweb base URL, or host, port and AE titles."""

    label: str
    url: str = ""
    host: str = ""
    port: int = 0
    called_ae_title: str = ""
    calling_ae_title: str = ""
    timeout_s: float = 60.0
    tls: ClientTls | None = None
    """Call by TLS, believing these."""


def _read(content: Path | bytes, size: int = CHUNK) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for start in range(0, len(content), size):
            yield content[start : start + size]
        return
    with content.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def scan(content: Path | bytes) -> Summary:
    """Scan a Part 10 file whole, as the archive would; raises what the archive would."""
    parser = Part10Parser()
    scanner: DataSetScanner | None = None
    for chunk in _read(content):
        for piece in parser.feed(chunk):
            if scanner is None:
                scanner = DataSetScanner(str(parser.transfer_syntax_uid), Limits())
            scanner.feed(piece)
    parser.finish()
    if scanner is None:
        scanner = DataSetScanner(str(parser.transfer_syntax_uid), Limits())
    return scanner.finish()


def collect(files: Sequence[Path], *, demo: bool, options: PhotographOptions) -> list[Outgoing]:
    """Look at what was named: folders are searched for DICOM files, pictures are wrapped.

    Raises
    ------
    SendError
        With every file that cannot be sent, or a wrong option.
    """
    faults: list[str] = []
    if options.body_site and options.body_site not in BODY_SITES:
        faults.append(f"--body-site {options.body_site}: use one of {', '.join(BODY_SITES)}")
    if options.laterality and options.laterality not in LATERALITIES:
        faults.append(f"--laterality {options.laterality}: use one of {', '.join(LATERALITIES)}")
    if options.patient_birth_date and not re.fullmatch(r"\d{8}", options.patient_birth_date):
        faults.append(f"--patient-birth-date {options.patient_birth_date}: use YYYYMMDD")
    if options.patient_sex and options.patient_sex not in {"M", "F", "O"}:
        faults.append(f"--patient-sex {options.patient_sex}: use M, F or O")
    if faults:
        raise SendError(*faults)
    now = datetime.now(UTC)
    collected: list[Outgoing] = []
    for path in _expand(files):
        try:
            with path.open("rb") as file:
                head = file.read(132)
            content: Path | bytes = path if head[128:] == b"DICM" else wrap_picture(path, options, now=now)
            collected.append(Outgoing(str(path), content, scan(content)))
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}); check the name and its permissions")
        except UnreadablePicture as error:
            faults.append(str(error))
        except StorageError as error:
            faults.append(f"{path}: not a whole DICOM file: {error}")
    if faults:
        raise SendError(*faults)
    if demo:
        from dicom_node.demo import draw_skin_picture  # drawn only when asked for

        drawn = wrap_pixels(draw_skin_picture(seed=int(now.timestamp())), options, now=now)
        collected.append(Outgoing("(drawn)", drawn, scan(drawn)))
    return collected


def _expand(files: Sequence[Path]) -> Iterator[Path]:
    for path in files:
        if path.is_dir():
            yield from sorted(inner for inner in path.rglob("*") if inner.is_file() and not inner.name.startswith("."))
        else:
            yield path


def save(items: Sequence[Outgoing], folder: Path) -> list[Path]:
    """Write each instance as ``<name of its source>.dcm`` into ``folder``; an existing file is never replaced.

    Raises
    ------
    SendError
        The folder cannot be written.
    """
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in items:
            stem = Path(item.source).stem if isinstance(item.content, Path) or item.source != "(drawn)" else "demo"
            path = folder / f"{stem}.dcm"
            number = 1
            while path.exists():
                number += 1
                path = folder / f"{stem}-{number}.dcm"
            with path.open("xb") as file:
                file.writelines(item.part10())
            paths.append(path)
    except OSError as error:
        raise SendError(f"{folder}: cannot be written ({error.strerror}); name another folder with --output") from error
    return paths


def target(settings: Settings, *, to: str | None, called_ae_title: str | None, calling_ae_title: str, tls: bool = False) -> Target:
    """Where to send, from ``--to`` or from the configuration, which also says whether the node itself is called by TLS.

    Raises
    ------
    SendError
        ``--to`` is neither host:port nor a URL.
    """
    if to is None:
        to, tls = f"{settings.dimse.host}:{settings.dimse.port}", settings.tls.enabled
    if to.startswith(("http://", "https://")):
        if not urlsplit(to).hostname:
            raise SendError(f"--to {to}: the URL names no host")
        return Target(label=to, url=to.removesuffix("/studies"))
    host, _, port = to.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SendError(f"--to {to}: use host:port, or an http(s) URL ending before /studies")
    if tls and settings.tls.authorities is None:
        raise SendError("TLS needs to know whom to believe; name the receiver's authority in tls.authorities")
    called = called_ae_title or settings.dimse.ae_title
    return Target(
        label=f"{called} at {to}",
        host=host.strip("[]"),
        port=int(port),
        called_ae_title=called,
        calling_ae_title=calling_ae_title,
        tls=client_tls(settings) if tls else None,
    )


def send(items: Sequence[Outgoing], to: Target, *, progress: Progress) -> list[Answer]:
    """Send all; the answers stand in the order of ``items``.

    Raises
    ------
    SendError
        The receiver cannot be reached, or turned us away.
    """
    return _stow(items, to, progress) if to.url else _store(items, to, progress)


def _stow(items: Sequence[Outgoing], to: Target, progress: Progress) -> list[Answer]:
    from dicomweb.client import StowClient, StowError  # aiohttp loads only when used

    try:
        answers = asyncio.run(StowClient(base_url=to.url, timeout_s=to.timeout_s).store(items, progress))
    except StowError as error:
        raise SendError(str(error)) from error
    return [
        Answer(item.source, item.sop_instance_uid, stored=answer.failure_reason == 0, text=answer.text)
        for item, answer in zip(items, answers, strict=True)
    ]


def _store(items: Sequence[Outgoing], to: Target, progress: Progress) -> list[Answer]:
    from dicom_node.dimse.scu import StorageSCU, Stored  # pynetdicom loads only when used
    from dicom_node.errors import DeliveryError, PeerUnreachable, Refused
    from dicom_node.peers import Peer

    scu = StorageSCU(ae_title=to.calling_ae_title, answer_s=to.timeout_s, tls=to.tls)
    peer = Peer(name=to.label, ae_title=to.called_ae_title, host=to.host, port=to.port, tls=to.tls is not None)
    answers: list[Answer] = []
    try:
        for item, outcome in zip(items, (outcome for _, outcome in scu.store(peer, items)), strict=False):
            match outcome:
                case Refused(status=0x0111, comment=comment):
                    text = f"refused, 0x0111 Duplicate SOP Instance: {comment or 'an instance of this UID is stored there'}"
                    answers.append(Answer(item.source, item.sop_instance_uid, stored=False, text=text))
                case Stored(status=status, comment=comment):
                    text = "stored" if status == 0 else f"stored with warning 0x{status:04X} {comment}".rstrip()
                    answers.append(Answer(item.source, item.sop_instance_uid, stored=True, text=text))
                case Refused(status=status, comment=comment) if comment:
                    answers.append(Answer(item.source, item.sop_instance_uid, stored=False, text=f"refused, 0x{status:04X} {comment}"))
                case DeliveryError() | StorageError():
                    answers.append(Answer(item.source, item.sop_instance_uid, stored=False, text=f"not stored: {outcome}"))
            progress(len(answers), len(items))
    except PeerUnreachable as error:
        if not answers:
            raise SendError(str(error)) from error
        answers += [Answer(item.source, item.sop_instance_uid, stored=False, text=f"not sent: {error}") for item in items[len(answers) :]]
    answers += [
        Answer(item.source, item.sop_instance_uid, stored=False, text="not sent: the association ended before it; send it again")
        for item in items[len(answers) :]
    ]
    return answers
