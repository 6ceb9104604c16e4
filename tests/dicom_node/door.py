"""A real archive behind a real DIMSE door on a free port, and instances drawn for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom.dsutils import encode

from dicom_node.dimse.scp import StorageSCP
from dicom_node.peers import Peers
from storage.archive import Archive
from storage.audit import AuditTrail
from storage.database import Database
from storage.index import Index
from storage.keys import Ring
from storage.objects import DirectoryStore
from storage.records import Limits, NewJob, Origin, Query, Summary
from storage.study_keys import StudyKeys
from storage.work import WorkQueue

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@dataclass
class Rooms:
    """An archive with its parts."""

    folder: Path
    database: Database
    index: Index
    queue: WorkQueue
    audit: AuditTrail
    archive: Archive

    def count(self) -> int:
        """How many instances the index holds."""
        from storage.records import Level  # noqa: PLC0415

        return self.index.count(Query(Level.INSTANCE))

    def landing(self) -> list[Path]:
        """Files on their way in."""
        return [path for path in (self.folder / "landing").rglob("*") if path.is_file()]


def open_rooms(
    folder: Path, *, limits: Limits | None = None, jobs: Sequence[NewJob] = (), delay_s: float = 0.0, lease_s: float = 60.0
) -> Rooms:
    """Make an archive in `folder`, with the embedded database and directory store."""
    ring = Ring.create(folder / "keys")
    database = Database(url=f"sqlite:///{folder}/index.db", key=ring.database_key())
    database.migrate()
    index, queue, audit = (
        Index(database=database),
        WorkQueue(database=database, delay=lambda _: delay_s, lease_s=lease_s),
        AuditTrail(database=database),
    )

    def jobs_for(summary: Summary, _origin: Origin) -> Sequence[NewJob]:
        return [NewJob(kind=job.kind, sop_instance_uid=summary.sop_instance_uid, lane=job.lane, payload=job.payload) for job in jobs]

    archive = Archive(
        database=database,
        index=index,
        queue=queue,
        audit=audit,
        store=DirectoryStore(folder / "objects"),
        study_keys=StudyKeys(database=database, ring=ring),
        landing=folder / "landing",
        limits=limits or Limits(),
        jobs_for=jobs_for,
        min_free_bytes=0,
    )
    return Rooms(folder, database, index, queue, audit, archive)


@dataclass
class Events:
    """Counts what a door reports."""

    counts: Counter[str] = field(default_factory=Counter)
    labels: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: str, **labels: object) -> None:
        with self.changed:
            self.counts[event] += 1
            self.labels.append((event, labels))
            self.changed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> None:
        """Wait until `event` was seen `count` times."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.counts[event] >= count, 30), f"{event} was not seen; {self.counts}"


@dataclass
class Door:
    """A listening door."""

    scp: StorageSCP
    port: int
    events: Events
    rooms: Rooms

    def settle(self) -> None:
        """Wait until no association is left."""
        with self.events.changed:
            assert self.events.changed.wait_for(lambda: self.scp.associations == 0, 30), "an association does not end"


@contextmanager
def open_door(rooms: Rooms, *, peers: Peers | None = None, **settings: object) -> Iterator[Door]:
    """Listen on a free port until the block ends; by default every caller is accepted."""
    events = Events()
    arguments: dict[str, object] = {"accept_unknown_peers": peers is None, "unknown_sop_classes": True}
    arguments.update(maximum_associations=50, port=0)
    arguments.update(settings)
    scp = StorageSCP(
        archive=rooms.archive,
        peers=peers or Peers(),
        ae_title="DERM_NODE",
        host="127.0.0.1",
        observe=events,
        **arguments,  # type: ignore[arg-type]
    )
    _, port = scp.start()
    try:
        yield Door(scp, port, events, rooms)
    finally:
        scp.stop(drain_s=0.0)


def draw(*, rows: int = 16, columns: int = 24, sop_class_uid: str = SECONDARY_CAPTURE, seed: int = 0) -> Dataset:
    """Draw a grey picture of noise, 16 bits a pixel, with fresh UIDs."""
    data_set = Dataset()
    data_set.SOPClassUID = sop_class_uid
    data_set.SOPInstanceUID = generate_uid()
    data_set.StudyInstanceUID = generate_uid()
    data_set.SeriesInstanceUID = generate_uid()
    data_set.PatientName = "Drawn^Picture"
    data_set.PatientID = "drawn-1"
    data_set.Modality = "OT"
    data_set.ConversionType = "WSD"
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
        setattr(data_set, keyword, "")
    data_set.SeriesNumber = data_set.InstanceNumber = "1"
    data_set.SamplesPerPixel = 1
    data_set.PhotometricInterpretation = "MONOCHROME2"
    data_set.Rows, data_set.Columns = rows, columns
    data_set.BitsAllocated = data_set.BitsStored = 16
    data_set.HighBit, data_set.PixelRepresentation = 15, 0
    data_set.PixelData = np.random.default_rng(seed).integers(0, 2**16, rows * columns, dtype=np.uint16).tobytes()
    return data_set


def encoded(data_set: Dataset, *, implicit: bool = False) -> bytes:
    """Encode a data set, little endian, as it travels."""
    result = encode(data_set, implicit, True)
    assert result is not None
    return result


def save(data_set: Dataset, path: Path, transfer_syntax_uid: str = ExplicitVRLittleEndian) -> Path:
    """Write a DICOM file."""
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = transfer_syntax_uid
    buffer = BytesIO()
    data_set.save_as(buffer, enforce_file_format=True)
    path.write_bytes(buffer.getvalue())
    return path
