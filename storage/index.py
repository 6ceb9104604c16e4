"""The index: patient, study, series and instance rows; one search for QIDO-RS and C-FIND alike.

Each row keeps the attributes of its level as they were received, for answers, and normalised columns, for matching
(:mod:`storage.matching`). What a patient, study or series is called is what its **first** instance said; an instance that says otherwise
keeps its own words in its own row, so that :meth:`Index.find` gives back what came. Two rules keep findings on the right patient:

- a Study Instance UID that arrives with another Patient ID or Issuer of Patient ID is refused (:class:`ConflictingInstance`);
- a study carries its own copy of the patient's attributes, and instances without Patient ID are one patient a study, not all the same.

Modalities and SOP classes of a study and the counts of its series are kept by the writer; a search adds up a few series, and never counts
instances.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy.exc
from sqlalchemy import Row, and_, bindparam, insert, select, update

from storage import search
from storage.database import from_micros, to_micros
from storage.errors import ConflictingInstance, InstanceNotFound
from storage.matching import normalised
from storage.prepared import Prepared
from storage.records import INDEXED, InstanceRecord, Level, Match, Origin, Query, ReportRecord, SealedObject, Summary
from storage.search import members, pages, parents
from storage.tables import COLUMN_NAMES, INSTANCE_JOIN, INSTANCES, PATIENTS, QUARANTINE, REPORTS, SERIES, STORAGE, STUDIES
from storage.texts import note_in

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

_KNOWN_SERIES = 4096
_OTHER_PATIENT = "the study is archived with another Patient ID or Issuer of Patient ID: compare both, and correct the one that is wrong"
_PAGE = 500


_RECORD = select(
    STUDIES.c.study_instance_uid,
    SERIES.c.series_instance_uid,
    INSTANCES.c.sop_class_uid,
    INSTANCES.c.sop_instance_uid,
    STUDIES.c.attributes.label("study_attributes"),
    SERIES.c.attributes.label("series_attributes"),
    *(INSTANCES.c[name] for name in STORAGE),
).select_from(INSTANCE_JOIN)
_FIND = Prepared(_RECORD.where(INSTANCES.c.sop_instance_uid == bindparam("uid")))
_FIND_SERIES = Prepared(
    select(
        STUDIES.c.id.label("study_ref"),
        STUDIES.c.attributes.label("study_attributes"),
        STUDIES.c.sop_classes,
        SERIES.c.id.label("series_ref"),
        SERIES.c.attributes.label("series_attributes"),
    )
    .select_from(STUDIES.outerjoin(SERIES, and_(SERIES.c.study_ref == STUDIES.c.id, SERIES.c.series_instance_uid == bindparam("series"))))
    .where(STUDIES.c.study_instance_uid == bindparam("study"))
    .with_for_update(of=STUDIES)
)
_FIND_PATIENT = Prepared(select(PATIENTS.c.id).where(PATIENTS.c.identity == bindparam("identity_")))
_FIND_SETS = Prepared(select(STUDIES.c.modalities, STUDIES.c.sop_classes).where(STUDIES.c.id == bindparam("ref")).with_for_update())
_SET_SETS = Prepared(
    update(STUDIES).where(STUDIES.c.id == bindparam("ref")).values(modalities=bindparam("modalities_"), sop_classes=bindparam("classes_"))
)
_COUNT_IN_SERIES = Prepared(update(SERIES).where(SERIES.c.id == bindparam("ref")).values(instance_count=SERIES.c.instance_count + 1))
_ADD_PATIENT, _ADD_STUDY, _ADD_SERIES = (
    Prepared(insert(table).returning(table.c.id), columns=(column.name for column in table.c if column.name != "id"))
    for table in (PATIENTS, STUDIES, SERIES)
)
_ADD_INSTANCE = Prepared(insert(INSTANCES).inline(), columns=(column.name for column in INSTANCES.c if column.name != "id"))
_ADD_QUARANTINE = insert(QUARANTINE).inline()
_ADD_REPORT = insert(REPORTS).inline()
_FIND_QUARANTINED = select(QUARANTINE.c.id).where(
    QUARANTINE.c.sop_instance_uid == bindparam("uid"), QUARANTINE.c.sha256 == bindparam("digest")
)
_FIND_REPORT = select(REPORTS).where(REPORTS.c.sop_instance_uid == bindparam("uid"))
_REPORTS_OF = (
    select(REPORTS).where(REPORTS.c.source_sop_instance_uid == bindparam("uid")).order_by(REPORTS.c.kind, REPORTS.c.sop_instance_uid)
)


@dataclass(frozen=True, slots=True)
class ArchivedObject:
    """A sealed object that the index knows, for comparing store and index."""

    object_key: str
    sop_instance_uid: str
    byte_count: int
    """Of the sealed bytes."""
    sha256: str
    """Over the sealed bytes."""
    key_id: str
    landed_on: str
    """As `InstanceRecord.landed_on`."""
    id: int
    """Number of its row: where a walk goes on."""
    quarantined: bool


@dataclass(frozen=True, slots=True)
class QuarantinedInstance:
    """An instance that was kept aside: another of its UID, or its study with another patient, was there first."""

    id: int
    record: InstanceRecord
    reason: str
    quarantined_at: datetime


@dataclass(frozen=True, slots=True)
class _KnownSeries:
    """A committed series: what an instance of it needs to be filed."""

    study_ref: int
    series_ref: int
    parents: Mapping[str, list[str]]
    sop_classes: frozenset[str]


class Index:
    """Files instances under their patients, studies and series, and finds them again.

    Parameters
    ----------
    database
        Methods that take a ``connection`` run inside of its ``write``.
    """

    def __init__(self, *, database: Database) -> None:
        self._database = database
        self._known: dict[tuple[str, str], _KnownSeries] = {}  # touched in writes only, one at a time

    # -- filing ------------------------------------------------------------------------------------------------------------------

    def add(self, connection: Connection, record: InstanceRecord) -> None:
        """File an instance, making its patient, study and series where they are new.

        Raises
        ------
        ConflictingInstance
            The SOP Instance UID is filed already, or its study belongs to another patient.
        """
        summary = record.summary
        values = _attributes(summary)
        place = (summary.study_instance_uid, summary.series_instance_uid)
        known = self._known.get(place)
        # One statement counts the instance and tells whether the series that is remembered still is there: it may have been erased, by
        # another process perhaps. (Keys are never given to another row.)
        counted = known is not None and _COUNT_IN_SERIES.run(connection, {"ref": known.series_ref}).rowcount == 1
        if known is not None and not counted:
            self._known.pop(place, None)
        series = known if known is not None and counted else self._series(connection, values)
        if _identity(values) != _identity(series.parents):
            raise ConflictingInstance(_OTHER_PATIENT)
        if summary.sop_class_uid not in series.sop_classes:
            series = self._extend(connection, series, summary.sop_class_uid)
        own: dict[str, list[str] | None] = {
            keyword: list(value) for keyword, value in values.items() if series.parents.get(keyword) != list(value)
        }
        own.update((keyword, None) for keyword in series.parents.keys() - values.keys())  # its parents have it, it has not
        row = {"series_ref": series.series_ref, **_matching_values(values, Level.INSTANCE), **_storage_values(record, own)}
        try:
            _ADD_INSTANCE.run(connection, row)
        except sqlalchemy.exc.IntegrityError as error:
            raise ConflictingInstance("an instance of this SOP Instance UID is archived already") from error
        if not counted:
            _COUNT_IN_SERIES.run(connection, {"ref": series.series_ref})
        if series is not known:
            self._database.on_commit(lambda: self._remember(place, series))

    def conflict_in(self, connection: Connection, record: InstanceRecord) -> str:
        """Return why `add` would refuse this instance, in words; empty when it would not. Changes nothing."""
        values = _attributes(record.summary)
        if self.find_in(connection, record.summary.sop_instance_uid) is not None:
            return "an instance of this SOP Instance UID is archived already"
        study, series = record.summary.study_instance_uid, record.summary.series_instance_uid
        found = _FIND_SERIES.first(connection, {"study": study, "series": series})
        return _OTHER_PATIENT if found is not None and _identity(json.loads(found.study_attributes)) != _identity(values) else ""

    def _remember(self, place: tuple[str, str], series: _KnownSeries) -> None:
        while len(self._known) >= _KNOWN_SERIES:
            del self._known[next(iter(self._known))]
        self._known[place] = series

    def _series(self, connection: Connection, values: Mapping[str, tuple[str, ...]]) -> _KnownSeries:
        """Find or make the series of an instance with these attributes, and its study and patient."""
        study_uid, series_uid = values["StudyInstanceUID"][0], values["SeriesInstanceUID"][0]
        found = _FIND_SERIES.first(connection, {"study": study_uid, "series": series_uid})
        if found is None:
            of_study = _of_levels(values, Level.PATIENT, Level.STUDY)
            study_ref = self._add_study(connection, values, of_study)
            classes: frozenset[str] = frozenset()
        else:
            of_study, study_ref, classes = json.loads(found.study_attributes), found.study_ref, frozenset(members(found.sop_classes))
        if _identity(of_study) != _identity(values):
            # add() refuses it: no series is made for an instance that is not filed
            return _KnownSeries(study_ref, 0, of_study, classes)
        if found is not None and found.series_ref is not None:
            return _KnownSeries(study_ref, found.series_ref, {**of_study, **json.loads(found.series_attributes)}, classes)
        of_series = _of_levels(values, Level.SERIES)
        series_ref = _ADD_SERIES.scalar(
            connection,
            {"study_ref": study_ref, **_matching_values(values, Level.SERIES), "instance_count": 0, "attributes": _dump(of_series)},
        )
        modality = normalised("CS", values.get("Modality", ()))[0]
        if modality:
            sets = _FIND_SETS.first(connection, {"ref": study_ref})
            _SET_SETS.run(connection, {"ref": study_ref, "modalities_": _joined(sets.modalities, modality), "classes_": sets.sop_classes})
        return _KnownSeries(study_ref, int(series_ref), {**of_study, **of_series}, classes)

    def _add_study(self, connection: Connection, values: Mapping[str, tuple[str, ...]], of_study: Mapping[str, list[str]]) -> int:
        patient_id, issuer = _identity(values)
        identity = _dump([patient_id, issuer] if patient_id else [values["StudyInstanceUID"][0]])
        patient_ref = _FIND_PATIENT.scalar(connection, {"identity_": identity})
        if patient_ref is None:
            of_patient = _of_levels(values, Level.PATIENT)
            patient_ref = _ADD_PATIENT.scalar(
                connection, {"identity": identity, **_matching_values(values, Level.PATIENT), "attributes": _dump(of_patient)}
            )
        row = {
            "patient_ref": patient_ref,
            **_matching_values(values, Level.PATIENT, Level.STUDY),
            "modalities": "",
            "sop_classes": "",
            "attributes": _dump(of_study),
        }
        study_ref = _ADD_STUDY.scalar(connection, row)
        note_in(connection, row)  # a new patient's texts are those of this study
        return int(study_ref)

    def _extend(self, connection: Connection, series: _KnownSeries, sop_class_uid: str) -> _KnownSeries:
        """Note a SOP class that the study had not; what another process noted meanwhile stays."""
        sets = _FIND_SETS.first(connection, {"ref": series.study_ref})
        classes = _joined(sets.sop_classes, sop_class_uid)
        if classes != sets.sop_classes:
            _SET_SETS.run(connection, {"ref": series.study_ref, "modalities_": sets.modalities, "classes_": classes})
        return _KnownSeries(series.study_ref, series.series_ref, series.parents, frozenset(members(classes)))

    def quarantine(self, connection: Connection, record: InstanceRecord, reason: str, *, at: datetime | None = None) -> bool:
        """Note an instance that is kept aside (`at`: since when, if not now), for an operator to judge.

        Returns
        -------
        bool
            False when the same content is in quarantine already (a sender that tries again): nothing was written, drop the new object.
        """
        summary = record.summary
        if connection.execute(_FIND_QUARANTINED, {"uid": summary.sop_instance_uid, "digest": summary.sha256}).first() is not None:
            return False
        attributes: dict[str, list[str] | None] = {keyword: list(value) for keyword, value in _attributes(summary).items()}
        connection.execute(
            _ADD_QUARANTINE,
            {
                "sop_class_uid": summary.sop_class_uid,
                "sop_instance_uid": summary.sop_instance_uid,
                "study_instance_uid": summary.study_instance_uid,
                "series_instance_uid": summary.series_instance_uid,
                **_storage_values(record, attributes),
                "reason": reason,
                "quarantined_at": to_micros(at or self._database.clock()),
            },
        )
        return True

    def quarantined(self) -> list[QuarantinedInstance]:
        """Return what is in quarantine, oldest first."""
        with self._database.read() as connection:
            return self.quarantined_in(connection)

    def quarantined_in(
        self,
        connection: Connection,
        *,
        quarantine_id: int | None = None,
        study_instance_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> list[QuarantinedInstance]:
        """Return what is in quarantine, oldest first: all, or that of a number, a study, an instance."""
        statement = select(QUARANTINE).order_by(QUARANTINE.c.id)
        for column, wanted in (
            (QUARANTINE.c.id, quarantine_id),
            (QUARANTINE.c.study_instance_uid, study_instance_uid),
            (QUARANTINE.c.sop_instance_uid, sop_instance_uid),
        ):
            if wanted is not None:
                statement = statement.where(column == wanted)
        return [
            QuarantinedInstance(row.id, _record(row, json.loads(row.attributes)), row.reason, from_micros(row.quarantined_at))
            for row in connection.execute(statement)
        ]

    # -- finding -----------------------------------------------------------------------------------------------------------------

    def find(self, sop_instance_uid: str) -> InstanceRecord:
        """Return the record of an instance.

        Raises
        ------
        InstanceNotFound
            No such instance.
        """
        with self._database.read() as connection:
            record = self.find_in(connection, sop_instance_uid)
        if record is None:
            raise InstanceNotFound("no instance of this SOP Instance UID is archived")
        return record

    def find_in(self, connection: Connection, sop_instance_uid: str) -> InstanceRecord | None:
        """Return the record of an instance as the transaction of `connection` sees it, None when there is none."""
        row = _FIND.first(connection, {"uid": sop_instance_uid})
        return None if row is None else _record(row, _own_words(row, {}))

    def has_study_in(self, connection: Connection, study_instance_uid: str) -> bool:
        """Tell whether anything of a study is archived or in quarantine."""
        return any(
            connection.execute(select(table.c.id).where(table.c.study_instance_uid == study_instance_uid).limit(1)).first() is not None
            for table in (STUDIES, QUARANTINE)
        )

    def instances(
        self, study_instance_uid: str, series_instance_uid: str | None = None, sop_instance_uid: str | None = None
    ) -> list[InstanceRecord]:
        """Return the instances of a study, a series, or the one instance, by series and instance number, then UID.

        Raises
        ------
        InstanceNotFound
            None such: also when the instance exists, but under another study or series.
        """
        statement = _RECORD.where(STUDIES.c.study_instance_uid == study_instance_uid)
        if series_instance_uid is not None:
            statement = statement.where(SERIES.c.series_instance_uid == series_instance_uid)
        if sop_instance_uid is not None:
            statement = statement.where(INSTANCES.c.sop_instance_uid == sop_instance_uid)
        with self._database.read() as connection:
            rows = connection.execute(statement).all()
        if not rows:
            raise InstanceNotFound("no such study, series or instance is archived")
        parsed: dict[str, Any] = {}
        return sorted((_record(row, _own_words(row, parsed)) for row in rows), key=_in_order)

    def match(self, query: Query) -> list[Match]:
        """Return what matches, as `storage.search.match`."""
        return search.match(self._database, query)

    def count(self, query: Query) -> int:
        """Return how many match, as `storage.search.count`."""
        return search.count(self._database, query)

    # -- objects -----------------------------------------------------------------------------------------------------------------

    def replace_object(self, connection: Connection, object_key: str, sealed: SealedObject, *, landed_on: str) -> None:
        """Have the row (archived or in quarantine) of the object `object_key` name another object of the same instance."""
        values = {
            "object_key": sealed.object_key,
            "sealed_byte_count": sealed.byte_count,
            "sealed_sha256": sealed.sha256,
            "key_id": sealed.key_id,
            "landed_on": landed_on,
        }
        for table in (INSTANCES, QUARANTINE):
            connection.execute(update(table).where(table.c.object_key == object_key).values(values))

    def arrived_in_store(self, connection: Connection, object_key: str, *, landed_on: str) -> bool:
        """Note that a landed object is in the store; False when no row says that it lies on `landed_on`."""
        for table in (INSTANCES, QUARANTINE):
            moved = update(table).where(table.c.object_key == object_key, table.c.landed_on == landed_on).values(landed_on="")
            if connection.execute(moved).rowcount:
                return True
        return False

    def record_of_object(self, object_key: str) -> InstanceRecord | None:
        """Return the record, archived or in quarantine, whose object this is; None when no row names it."""
        with self._database.read() as connection:
            return self.record_of_object_in(connection, object_key)

    def record_of_object_in(self, connection: Connection, object_key: str) -> InstanceRecord | None:
        """As `record_of_object`, in the caller's transaction."""
        row = connection.execute(_RECORD.where(INSTANCES.c.object_key == object_key)).first()
        if row is not None:
            return _record(row, _own_words(row, {}))
        row = connection.execute(select(QUARANTINE).where(QUARANTINE.c.object_key == object_key)).first()
        return None if row is None else _record(row, json.loads(row.attributes))

    # -- reports and objects -----------------------------------------------------------------------------------------------------

    def add_report(self, connection: Connection, report: ReportRecord) -> None:
        """Note what a report was made from; both instances must be filed. The same again changes nothing.

        Raises
        ------
        ConflictingInstance
            The report is noted with another source, kind or models.
        """
        values = {
            "sop_instance_uid": report.sop_instance_uid,
            "source_sop_instance_uid": report.source_sop_instance_uid,
            "kind": report.kind,
            "models": _dump(dict(sorted(report.models.items()))),
        }
        found = connection.execute(_FIND_REPORT, {"uid": report.sop_instance_uid}).first()
        if found is None:
            connection.execute(_ADD_REPORT, values)
        elif dict(found._mapping) != values:  # noqa: SLF001 - SQLAlchemy's public accessor
            raise ConflictingInstance("the report is archived with another source or other models")

    def reports_of(self, source_sop_instance_uid: str) -> list[ReportRecord]:
        """Return the reports made from an instance, by kind."""
        with self._database.read() as connection:
            return [_report(row) for row in connection.execute(_REPORTS_OF, {"uid": source_sop_instance_uid})]

    def source_of(self, report_sop_instance_uid: str) -> str:
        """Return the SOP Instance UID of what a report was made from.

        Raises
        ------
        InstanceNotFound
            No report made here has this UID.
        """
        with self._database.read() as connection:
            row = connection.execute(_FIND_REPORT, {"uid": report_sop_instance_uid}).first()
        if row is None:
            raise InstanceNotFound("no report of this SOP Instance UID was made here")
        return str(row.source_sop_instance_uid)

    def all_objects(self) -> Iterator[ArchivedObject]:
        """Give every sealed object that the index knows, quarantine included, page by page (no long snapshot)."""
        for quarantined in (False, True):
            after = 0
            while page := self.objects_after(after, quarantined=quarantined):
                yield from page
                after = page[-1].id

    def objects_after(self, after: int, *, quarantined: bool = False) -> list[ArchivedObject]:
        """Return the next page of the sealed objects of the archived instances, or of the quarantine, behind the row `after`."""
        table = QUARANTINE if quarantined else INSTANCES
        columns = (
            table.c.object_key,
            table.c.sop_instance_uid,
            table.c.sealed_byte_count,
            table.c.sealed_sha256,
            table.c.key_id,
            table.c.landed_on,
            table.c.id,
        )
        statement = select(*columns).where(table.c.id > after).order_by(table.c.id).limit(_PAGE)
        with self._database.read() as connection:
            return [ArchivedObject(*row, quarantined=quarantined) for row in connection.execute(statement)]

    def known_objects(self, object_keys: Iterable[str]) -> set[str]:
        """Return those of `object_keys` that the index knows; the others are orphans of a crash."""
        wanted, known = list(object_keys), set[str]()
        with self._database.read() as connection:
            for page in pages(wanted):
                for table in (INSTANCES, QUARANTINE):
                    known.update(row[0] for row in connection.execute(select(table.c.object_key).where(table.c.object_key.in_(page))))
        return known


# -- from records to rows ------------------------------------------------------------------------------------------------------------


_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _attributes(summary: Summary) -> dict[str, tuple[str, ...]]:
    """Return the indexed attributes, the four UIDs as the scanner judged them."""
    return {
        **{keyword: value for keyword, value in summary.attributes.items() if keyword in INDEXED},
        "SOPClassUID": (summary.sop_class_uid,),
        "SOPInstanceUID": (summary.sop_instance_uid,),
        "StudyInstanceUID": (summary.study_instance_uid,),
        "SeriesInstanceUID": (summary.series_instance_uid,),
    }


def _of_levels(values: Mapping[str, tuple[str, ...]], *levels: Level) -> dict[str, list[str]]:
    return {keyword: list(value) for keyword, value in values.items() if INDEXED[keyword][0] in levels}


def _identity(values: Mapping[str, Any]) -> tuple[str, str]:
    patient_id, issuer = values.get("PatientID"), values.get("IssuerOfPatientID")
    return (patient_id[0].strip() if patient_id else "", issuer[0].strip() if issuer else "")


def _matching_values(values: Mapping[str, tuple[str, ...]], *levels: Level) -> dict[str, str]:
    row: dict[str, str] = {}
    for keyword, vr, columns in _columns(levels):
        value = values.get(keyword)
        if value is None:
            row.update(dict.fromkeys(columns, ""))
        elif len(columns) == 1:
            row[columns[0]] = normalised(vr, value)[0]
        else:
            row.update(zip(columns, normalised(vr, value), strict=True))
    return row


@cache
def _columns(levels: tuple[Level, ...]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Return keyword, VR and columns of the attributes of some levels."""
    return tuple((keyword, vr, COLUMN_NAMES[keyword]) for keyword, (level, vr) in INDEXED.items() if level in levels)


def _storage_values(record: InstanceRecord, attributes: Mapping[str, list[str] | None]) -> dict[str, Any]:
    summary, sealed, origin = record.summary, record.sealed, record.origin
    extra = {
        "door": origin.door,
        "address": origin.address,
        "calling": origin.calling_ae_title,
        "called": origin.called_ae_title,
        "peer": origin.peer,
        **({"user": origin.user} if origin.user else {}),
        "charset": summary.specific_character_set,
        "pixels": summary.has_pixel_data,
        "pixel_offset": summary.pixel_data_offset,
        "title": summary.document_title_code,
        "model": summary.manufacturer_model_name,
        "software": summary.software_versions,
    }
    return {
        "role": record.role,
        "transfer_syntax_uid": summary.transfer_syntax_uid,
        "byte_count": summary.byte_count,
        "sha256": summary.sha256,
        "object_key": sealed.object_key,
        "sealed_byte_count": sealed.byte_count,
        "sealed_sha256": sealed.sha256,
        "key_id": sealed.key_id,
        "landed_on": record.landed_on,
        "received_at": to_micros(origin.received_at),
        "extra": _dump(extra),
        "attributes": _dump(attributes),
    }


def _joined(written: str, member: str) -> str:
    r"""Add to a set written ``\A\B\``, the form in which one LIKE finds a member."""
    found = {*members(written), member}
    return "\\" + "\\".join(sorted(found)) + "\\"


# -- from rows to records ------------------------------------------------------------------------------------------------------------


def _own_words(row: Row[Any], parsed: dict[str, Any]) -> dict[str, list[str]]:
    """Return the attributes as this very instance said them: what it has from its parents, and where it differs."""
    merged = parents(row, parsed)
    for keyword, value in json.loads(row.attributes).items():
        if value is None:
            merged.pop(keyword, None)
        else:
            merged[keyword] = value
    return merged


def _record(row: Row[Any], attributes: Mapping[str, list[str]]) -> InstanceRecord:
    extra = json.loads(row.extra)
    return InstanceRecord(
        summary=Summary(
            sop_class_uid=row.sop_class_uid,
            sop_instance_uid=row.sop_instance_uid,
            study_instance_uid=row.study_instance_uid,
            series_instance_uid=row.series_instance_uid,
            transfer_syntax_uid=row.transfer_syntax_uid,
            byte_count=row.byte_count,
            sha256=row.sha256,
            attributes={keyword: tuple(value) for keyword, value in attributes.items()},
            specific_character_set=tuple(extra["charset"]),
            has_pixel_data=extra["pixels"],
            pixel_data_offset=extra["pixel_offset"],
            document_title_code=extra["title"],
            manufacturer_model_name=extra["model"],
            software_versions=extra["software"],
        ),
        sealed=SealedObject(row.object_key, row.sealed_byte_count, row.sealed_sha256, row.key_id),
        origin=Origin(
            door=extra["door"],
            received_at=from_micros(row.received_at),
            address=extra["address"],
            calling_ae_title=extra["calling"],
            called_ae_title=extra["called"],
            peer=extra["peer"],
            user=extra.get("user", ""),
        ),
        role=row.role,
        landed_on=row.landed_on,
    )


def _in_order(record: InstanceRecord) -> tuple[int, str, int, str]:
    summary = record.summary
    series_number = normalised("IS", summary.attributes.get("SeriesNumber", ()))[0]
    number = normalised("IS", summary.attributes.get("InstanceNumber", ()))[0]
    return int(series_number or 0), summary.series_instance_uid, int(number or 0), summary.sop_instance_uid


def _report(row: Row[Any]) -> ReportRecord:
    return ReportRecord(row.sop_instance_uid, row.source_sop_instance_uid, row.kind, json.loads(row.models))
