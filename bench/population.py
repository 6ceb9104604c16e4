"""A drawn hospital: index rows of any number, the same for the same number, spread as a dermatology archive's are.

Ten instances a study in two series, 100 000 studies for a million; three patients in four come once, others again and again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import text

from storage.admission import event_of
from storage.records import InstanceRecord, JobKind, NewJob, Origin, SealedObject, Summary

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.study_keys import StudyKey
    from tests.storage.house import House

PER_STUDY = 10
PER_SERIES = 5
COMMIT = 64
"""Instances in one commit. More in one savepoint cost SQLite more each: it walks its journal in memory from the beginning each time."""
_SYLLABLES = (
    "ba",
    "be",
    "bi",
    "bo",
    "da",
    "de",
    "di",
    "do",
    "ga",
    "ge",
    "ha",
    "ho",
    "ka",
    "ke",
    "ki",
    "ko",
    "la",
    "le",
    "li",
    "lo",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "no",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "so",
    "ta",
    "te",
    "to",
    "va",
    "ve",
    "vi",
    "wa",
)
_GIVEN = (
    "Ada",
    "Alan",
    "Anna",
    "Aziz",
    "Carla",
    "Chen",
    "Clara",
    "David",
    "Elif",
    "Emil",
    "Eva",
    "Farid",
    "Grace",
    "Hana",
    "Hugo",
    "Ida",
    "Ines",
    "Ivan",
    "Jan",
    "Jing",
    "Jose",
    "Kofi",
    "Lena",
    "Lina",
    "Luca",
)
_DESCRIPTIONS = (
    "Lesion, trunk",
    "Follow-up dermoscopy",
    "Total body photography",
    "Lesion, face",
    "Mole mapping",
    "Wound documentation",
    "",
)
_SITES = ("SKIN", "HEAD", "CHEST", "BACK", "ARM", "LEG", "HAND", "FOOT")
_FIRST_DAY = datetime(2012, 1, 2, tzinfo=UTC)
_ANALYSED = text(
    "UPDATE jobs SET state = 'done', due_at = NULL, attempts = 1, finished_at = created_at "
    "WHERE kind = 'analyse' AND lane = '' AND home = '' AND due_at IS NOT NULL"
)


def study_instance_uid(study: int) -> str:
    """Return the UID of a study."""
    return f"1.2.826.0.1.3680043.8.498.{_drawn('study', study) % 10**20}.{study}"


def patient_of(study: int) -> int:
    """Return whose study it is."""
    return study if _drawn("again", study) % 4 else _drawn("who", study) % (study // 8 + 1)


def patient_id(patient: int) -> str:
    """Return the ID of a patient."""
    return f"D{_drawn('id', patient) % 10**7:07}{patient % 10}"


def patient_name(patient: int) -> str:
    """Return the name of a patient: about 69 000 family names, 25 given ones."""
    family = "".join(_SYLLABLES[_drawn(f"name{place}", patient) % len(_SYLLABLES)] for place in range(3))
    return f"{family.capitalize()}^{_GIVEN[_drawn('given', patient) % len(_GIVEN)]}"


def study_date(study: int, studies: int = 100_000) -> str:
    """Return when it was made: studies come in the order of their days, a few late."""
    late = _drawn("late", study) % 30 if not _drawn("is late", study) % 20 else 0
    return f"{_FIRST_DAY + timedelta(days=study % studies * 5000 // studies - late):%Y%m%d}"


def record(number: int, key_id: str = "0" * 32) -> InstanceRecord:
    """Return the row of instance `number`."""
    study, place = divmod(number, PER_STUDY)
    series, within = divmod(place, PER_SERIES)
    patient = patient_of(study)
    uid = study_instance_uid(study)
    day, moment = study_date(study), f"{8 + study % 10:02}{_drawn('minute', study) % 60:02}{within:02}.{number % 1000:03}000"
    photograph = series == 0
    attributes = {
        "PatientName": (patient_name(patient),),
        "PatientID": (patient_id(patient),),
        "IssuerOfPatientID": ("DERM",),
        "PatientBirthDate": (f"{1930 + _drawn('born', patient) % 80}{1 + patient % 12:02}{1 + patient % 28:02}",),
        "PatientSex": ("FM"[patient % 2],),
        "StudyDate": (day,),
        "StudyTime": (f"{8 + study % 10:02}{_drawn('minute', study) % 60:02}00",),
        "AccessionNumber": (f"A{10**8 + study}",),
        "ReferringPhysicianName": (f"{_SYLLABLES[study % 41].capitalize()}{_SYLLABLES[study % 37]}^{_GIVEN[study % 25]}",),
        "StudyID": (str(study),),
        "StudyDescription": (_DESCRIPTIONS[study % len(_DESCRIPTIONS)],),
        "Modality": ("XC" if photograph else "DMS",),
        "SeriesNumber": (str(series + 1),),
        "SeriesDescription": ("Overview" if photograph else "Dermoscopy",),
        "SeriesDate": (day,),
        "BodyPartExamined": (_SITES[study % len(_SITES)],),
        "Laterality": ("LR"[study % 2],),
        "Manufacturer": ("Makers of Cameras",),
        "StationName": (f"ROOM{study % 12}",),
        "InstanceNumber": (str(within + 1),),
        "ContentDate": (day,),
        "ContentTime": (moment,),
        "Rows": ("3000",),
        "Columns": ("4000",),
        "BitsAllocated": ("8",),
        "SamplesPerPixel": ("3",),
        "PhotometricInterpretation": ("YBR_FULL_422",),
    }
    digest = hashlib.sha256(f"instance {number}".encode()).hexdigest()
    return InstanceRecord(
        summary=Summary(
            sop_class_uid="1.2.840.10008.5.1.4.1.1.77.1.4",
            sop_instance_uid=f"{uid}.{series + 1}.{within + 1}",
            study_instance_uid=uid,
            series_instance_uid=f"{uid}.{series + 1}",
            transfer_syntax_uid="1.2.840.10008.1.2.4.50",
            byte_count=1_100_000 + number % 99_991,
            sha256=digest,
            attributes={keyword: value for keyword, value in attributes.items() if value[0]},
            specific_character_set=("ISO_IR 192",),
            has_pixel_data=True,
            pixel_data_offset=1406,
        ),
        sealed=SealedObject(digest[::-1][:32], 1_101_000 + number % 99_991, digest[::-1], key_id),
        origin=Origin("dimse", datetime.now(UTC), "192.0.2.17", f"ROOM{study % 12}", "DERM_NODE", f"room{study % 12}"),
    )


def populate(house: House, first: int, last: int) -> Iterator[int]:
    """File instances `first` up to `last`, each with its job and its audit record, in group commits; yield how many there are now."""
    for start in range(first, last, COMMIT):
        end = min(start + COMMIT, last)
        studies = range(start // PER_STUDY, (end - 1) // PER_STUDY + 1)
        keys = {study: house.study_keys.current(study_instance_uid(study)) for study in studies}
        rows = [(keys[number // PER_STUDY], record(number, keys[number // PER_STUDY].id)) for number in range(start, end)]
        house.database.write(partial(file_in, house=house, rows=rows))
        yield end


def file_in(connection: Connection, *, house: House, rows: Sequence[tuple[StudyKey, InstanceRecord]]) -> None:
    """Write what commit 1 writes, and end the analysis as a worker would."""
    for key, row in rows:
        house.study_keys.store_in(connection, key, stored=True)
        house.index.add(connection, row)
        house.queue.enqueue(connection, NewJob(JobKind.ANALYSE, row.summary.sop_instance_uid))
        house.audit.append(connection, event_of("instance.received", row, detail={"acknowledged": "archive"}))
    connection.execute(_ANALYSED)


def _drawn(of: str, number: int) -> int:
    """Return a number that looks random and is the same each time."""
    return int.from_bytes(hashlib.blake2b(f"{of} {number}".encode(), digest_size=8).digest(), "big")
