"""C-FIND: pynetdicom asks over a real socket; records filed in a real index answer."""

from __future__ import annotations

import itertools
import re
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from dicom_node.dimse.identifier import InvalidIdentifier, read_identifier
from dicom_node.dimse.query import QuerySCP
from dicom_node.peers import Peer, Peers
from storage.errors import Unavailable
from storage.records import INDEXED, InstanceRecord, Level, Query
from storage.search import Finding
from tests.dicom_node.door import Door, Rooms, open_door, open_rooms
from tests.dicom_node.scripted_peer import EXPLICIT, IMPLICIT
from tests.storage.support import instance

PATIENT_ROOT, STUDY_ROOT, STUDY_ONLY = (f"1.2.840.10008.5.1.4.1.2.{root}.1" for root in (1, 2, 3))
SUCCESS, PENDING, WITHOUT_OPTIONAL, CANCELLED, OUT_OF_RESOURCES, DOES_NOT_MATCH, UNABLE = (
    0x0000,
    0xFF00,
    0xFF01,
    0xFE00,
    0xA700,
    0xA900,
    0xC000,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about what we ask

NAMES = ("Smith^John", "Smith^Jane", "SMITH", "Müller^Jörg", "山田^太郎", "O'Neil^Pat_100%", "")
DATES = ("20240101", "20240131", "20231231", "")


def _records() -> list[InstanceRecord]:
    """Every combination of a few names, dates and modalities, in studies of one to three series."""
    records = []
    for number, (name, date) in enumerate(itertools.product(NAMES, DATES)):
        study = f"1.2.{number + 1}"
        modalities = ("XC", "DMS", "SR")[: number % 3 + 1]
        for place, modality in enumerate(modalities, start=1):
            values = {
                "PatientName": name,
                "PatientID": f"P{number % 5}",
                "PatientBirthDate": "19700101",
                "StudyDate": date,
                "StudyTime": f"{number % 24:02}3000",
                "AccessionNumber": f"A{number:03}",
                "StudyDescription": "Skin*" if number % 4 else "Skin",
                "Modality": modality,
                "SeriesNumber": str(place),
                "InstanceNumber": "1",
                "Rows": "16",
            }
            records.append(instance(values, study=study, series=f"{study}.{place}", uid=f"{study}.{place}.1"))
    return records


RECORDS = _records()


def file(rooms: Rooms, records: Sequence[InstanceRecord]) -> None:
    """File records without objects: queries read the index alone."""

    def work(connection: Any) -> None:
        for record in records:
            rooms.index.add(connection, record)

    rooms.database.write(work)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One index for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    file(rooms, RECORDS)
    yield rooms
    rooms.database.close()


def query_scp(rooms: Rooms, **settings: Any) -> QuerySCP:
    """The service under test; unknown callers may ask."""
    return QuerySCP(database=rooms.database, audit=rooms.audit, ae_title="DERM_NODE", **{"unknown_peers": True, **settings})


@pytest.fixture(scope="module")
def door(rooms: Rooms) -> Iterator[Door]:
    """One door for the module."""
    with open_door(rooms, services=(query_scp(rooms),)) as door:
        yield door


@contextmanager
def asking(door: Door, *, syntaxes: Sequence[str] = (EXPLICIT,), negotiate: bytes = b"", ae_title: str = "ASKS") -> Iterator[Association]:
    """An association with contexts for all three models."""
    entity = AE(ae_title)
    items: list[Any] = []
    for model in (PATIENT_ROOT, STUDY_ROOT, STUDY_ONLY):
        entity.add_requested_context(model, list(syntaxes))
        if negotiate:
            item = SOPClassExtendedNegotiation()
            item.sop_class_uid = model
            item.service_class_application_information = negotiate
            items.append(item)
    association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE", ext_neg=items)
    assert association.is_established
    try:
        yield association
    finally:
        association.release()


@pytest.fixture(scope="module")
def association(door: Door) -> Iterator[Association]:
    """One association for the module."""
    with asking(door) as association:
        yield association


def identifier(level: str, **keys: Any) -> Dataset:
    """A request's Identifier."""
    data_set = Dataset()
    if level:
        data_set.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(data_set, keyword, value)
    return data_set


def ask(association: Association, request: Dataset, model: str = STUDY_ROOT) -> tuple[Dataset, list[tuple[int, Dataset]]]:
    """Return the final status, and status and Identifier of each match."""
    responses = list(association.send_c_find(request, model))
    final, nothing = responses.pop()
    assert nothing is None
    return final, [(status.Status, answer or Dataset()) for status, answer in responses]


def found(association: Association, request: Dataset, keyword: str, model: str = STUDY_ROOT) -> list[str]:
    """Return the values of an attribute of all matches of a query that succeeds."""
    final, matches = ask(association, request, model)
    assert final.Status == SUCCESS, final
    return [str(getattr(answer, keyword)) for _, answer in matches]


# -- what is matched, and what is answered -----------------------------------------------------------------------------------------


def test_the_whole_hierarchy(association: Association) -> None:
    """Patient, study, series and instance are found one below the other, in both roots, with the keys of their levels."""
    request = identifier(
        "PATIENT", PatientID="P1", PatientName="", NumberOfPatientRelatedStudies=None, NumberOfPatientRelatedInstances=None
    )
    final, ((status, patient),) = ask(association, request, PATIENT_ROOT)
    of_patient = [record for record in RECORDS if record.summary.attributes["PatientID"] == ("P1",)]
    assert (final.Status, status) == (SUCCESS, PENDING)
    assert patient.NumberOfPatientRelatedInstances == len(of_patient)
    assert patient.NumberOfPatientRelatedStudies == len({record.summary.study_instance_uid for record in of_patient})
    studies = found(association, identifier("STUDY", PatientID="P1", StudyInstanceUID=""), "StudyInstanceUID", PATIENT_ROOT)
    assert sorted(studies) == sorted({record.summary.study_instance_uid for record in of_patient})
    study = next(uid for uid in studies if len([one for one in of_patient if one.summary.study_instance_uid == uid]) == 3)
    request = identifier("SERIES", StudyInstanceUID=study, SeriesInstanceUID="", Modality="", NumberOfSeriesRelatedInstances=None)
    final, series = ask(association, request)
    assert [(one.SeriesInstanceUID, one.Modality, one.NumberOfSeriesRelatedInstances) for _, one in series] == [
        (f"{study}.1", "XC", 1),
        (f"{study}.2", "DMS", 1),
        (f"{study}.3", "SR", 1),
    ]
    request = identifier("IMAGE", StudyInstanceUID=study, SeriesInstanceUID=f"{study}.2", SOPInstanceUID="", Rows=None, InstanceNumber=None)
    final, ((_, image),) = ask(association, request)
    assert (image.SOPInstanceUID, image.Rows, image.InstanceNumber) == (f"{study}.2.1", 16, 1)
    request.PatientID = "P1"
    assert found(association, request, "SOPInstanceUID", PATIENT_ROOT) == [f"{study}.2.1"]
    assert len(found(association, identifier("STUDY", PatientID="P1", StudyInstanceUID=""), "StudyInstanceUID", STUDY_ONLY)) == len(studies)


def test_an_answer_holds_what_was_asked_and_nothing_else(association: Association) -> None:
    """Requested attributes, empty when not known, level, Retrieve AE Title; Instance Availability only when asked for."""
    request = identifier("STUDY", StudyInstanceUID="1.2.1", AccessionNumber="", StudyID="", InstanceAvailability="", ModalitiesInStudy="")
    _, ((status, answer),) = ask(association, request)
    assert status == PENDING
    assert {element.keyword: element.value or "" for element in answer} == {
        "AccessionNumber": "A000",
        "QueryRetrieveLevel": "STUDY",
        "RetrieveAETitle": "DERM_NODE",
        "InstanceAvailability": "ONLINE",
        "ModalitiesInStudy": "XC",
        "StudyInstanceUID": "1.2.1",
        "StudyID": "",
    }
    _, ((_, answer),) = ask(association, identifier("STUDY", StudyInstanceUID="1.2.1"))
    assert [element.keyword for element in answer] == ["QueryRetrieveLevel", "RetrieveAETitle", "StudyInstanceUID"]


def test_optional_keys_that_are_not_supported_are_told(association: Association) -> None:
    """Sequences come back empty, unknown and private attributes and those of lower levels not at all; the status is FF01."""
    item = Dataset()
    item.ScheduledProcedureStepID = "X"
    request = identifier("STUDY", StudyInstanceUID="1.2.1", RequestAttributesSequence=[item], PatientComments="none", Modality="CT")
    request.add_new(0x00091001, "LO", "private")
    final, ((status, answer),) = ask(association, request)
    assert (final.Status, status) == (SUCCESS, WITHOUT_OPTIONAL)
    assert len(answer.RequestAttributesSequence) == 0
    assert {element.keyword for element in answer} == {
        "QueryRetrieveLevel",
        "RetrieveAETitle",
        "StudyInstanceUID",
        "RequestAttributesSequence",
    }


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", "müller*"), ("ISO_IR 192", "MÜLLER^jörg"), (["", "ISO 2022 IR 87"], "山田^太郎")]
)
def test_names_in_every_character_set(door: Door, syntax: str, charset: Any, name: str) -> None:
    """The Identifier's own character set is decoded; answers that are not ASCII are in UTF-8 and say so, others say nothing."""
    with asking(door, syntaxes=[syntax]) as association:
        request = identifier("STUDY", SpecificCharacterSet=charset, PatientName=name, StudyDate="20240101")
        _, ((_, answer),) = ask(association, request)
        assert str(answer.PatientName) in {"Müller^Jörg", "山田^太郎"}
        assert answer.SpecificCharacterSet == "ISO_IR 192"
        _, ((_, answer),) = ask(association, identifier("STUDY", SpecificCharacterSet=charset, PatientName="smith", StudyDate="20240101"))
        assert "SpecificCharacterSet" not in answer


def test_modalities_in_study(association: Association) -> None:
    """A study is found by any of its modalities, by one of a list, and by a wildcard."""
    for value, wanted in (("SR", {"SR"}), (["SR", "DMS"], {"SR", "DMS"}), ("X*", {"XC"}), ("CT", set())):
        expected = {one.summary.study_instance_uid for one in RECORDS if one.summary.attributes["Modality"][0] in wanted}
        assert set(found(association, identifier("STUDY", ModalitiesInStudy=value, StudyInstanceUID=""), "StudyInstanceUID")) == expected


# -- the property --------------------------------------------------------------------------------------------------------------------

KEYS: dict[str, st.SearchStrategy[str]] = {
    "PatientName": st.sampled_from(["smith*", "*J?hn", "Müller^Jörg", "*^*", "SMITH", "o'neil^pat_100%", "山田*", "*%", "?????", "*"]),
    "PatientID": st.sampled_from(["P1", "p1", "P*", "P?", "*", "Q"]),
    "StudyDate": st.sampled_from(["20240101", "20240101-", "-20240101", "20231201-20240115", "*", "19000101-19000102"]),
    "StudyTime": st.sampled_from(["0930", "09-11", "-0500", "123000"]),
    "AccessionNumber": st.sampled_from(["A00*", "A001", "a001", "A??1", "*1*"]),
    "StudyDescription": st.sampled_from(["Skin", "Skin*", "skin", "*n"]),
    "StudyInstanceUID": st.lists(st.sampled_from([f"1.2.{number}" for number in range(1, 40)]), max_size=4).map("\\".join),
    "ModalitiesInStudy": st.lists(st.sampled_from(["XC", "SR", "DMS", "CT"]), max_size=2).map("\\".join),
}


def _matches(keyword: str, key: str, values: Sequence[str]) -> bool:
    """PS3.4 C.2.2.2 once more, over texts; shares nothing with the index."""
    if not key.strip("*^=" if keyword == "PatientName" else "*"):
        return True  # universal; a name of nothing but delimiters too
    value = values[0] if values else ""
    if keyword in {"StudyInstanceUID", "ModalitiesInStudy"}:
        return bool(set(key.split("\\")) & set(values))
    if keyword == "StudyDate":
        first, hyphen, last = key.partition("-")
        return bool(value) and (first or "0") <= value <= ((last or "9") if hyphen else first)
    if keyword == "StudyTime":
        first, hyphen, last = key.partition("-")
        return bool(value) and first.ljust(6, "0") <= value <= ((last or first) if hyphen else first).ljust(6, "9")
    pattern = "".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in key)
    if keyword == "PatientName":
        return re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL) is not None
    return re.fullmatch(pattern, value, re.DOTALL) is not None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.fixed_dictionaries({}, optional=KEYS))
def test_any_keys_find_what_they_say(association: Association, rooms: Rooms, keys: dict[str, str]) -> None:
    """C-FIND gives the studies that the rules of matching give by brute force, and those that QIDO-RS's search gives, in its order."""
    studies: dict[str, dict[str, tuple[str, ...]]] = {}
    for record in RECORDS:
        known = studies.setdefault(record.summary.study_instance_uid, dict(record.summary.attributes))
        known["ModalitiesInStudy"] = (*known.get("ModalitiesInStudy", ()), record.summary.attributes["Modality"][0])
    expected = {
        uid for uid, known in studies.items() if all(_matches(keyword, key, known.get(keyword, ())) for keyword, key in keys.items())
    }
    request = identifier("STUDY", SpecificCharacterSet="ISO_IR 192", **{"StudyInstanceUID": "", **keys})
    answered = found(association, request, "StudyInstanceUID")
    assert set(answered) == expected
    assert answered == [match.attributes["StudyInstanceUID"][0] for match in rooms.index.match(Query(Level.STUDY, keys))]


# -- hierarchical and relational ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "level", "keys", "offending"),
    [
        (STUDY_ROOT, "SERIES", {"SeriesInstanceUID": ""}, "StudyInstanceUID"),
        (STUDY_ROOT, "SERIES", {"StudyInstanceUID": ["1.2.1", "1.2.2"]}, "StudyInstanceUID"),
        (STUDY_ROOT, "IMAGE", {"StudyInstanceUID": "1.2.1"}, "SeriesInstanceUID"),
        (PATIENT_ROOT, "STUDY", {"StudyInstanceUID": "1.2.1"}, "PatientID"),
        (PATIENT_ROOT, "STUDY", {"PatientID": "P*"}, "PatientID"),
        (STUDY_ROOT, "PATIENT", {"PatientID": "P1"}, "QueryRetrieveLevel"),
        (STUDY_ONLY, "SERIES", {"PatientID": "P1", "StudyInstanceUID": "1.2.1"}, "QueryRetrieveLevel"),
        (STUDY_ROOT, "STUDIES", {}, "QueryRetrieveLevel"),
        (STUDY_ROOT, "", {"StudyInstanceUID": ""}, "QueryRetrieveLevel"),
        (STUDY_ROOT, "STUDY", {"StudyDate": "1999-01-01-02"}, "StudyDate"),
        (STUDY_ROOT, "STUDY", {"AccessionNumber": "A" * 2000}, "AccessionNumber"),
    ],
)
def test_what_does_not_match_the_model_is_refused(
    association: Association, model: str, level: str, keys: dict[str, Any], offending: str
) -> None:
    """Missing or wrong level, missing unique keys of the levels above, values of no VR: A900 with the element and a comment."""
    final, matches = ask(association, identifier(level, **keys), model)
    assert (final.Status, matches) == (DOES_NOT_MATCH, [])
    assert final.OffendingElement == tag_for_keyword(offending)
    assert 0 < len(final.ErrorComment) <= 64


def test_relational_once_negotiated(door: Door) -> None:
    """Relational queries and combined date-time are agreed to, the rest is not; then no key of a higher level is needed."""
    with asking(door, negotiate=b"\1\1\1\1\1") as association:
        assert set(association.acceptor.sop_class_extended.values()) == {b"\1\1\0\0\0"}
        assert len(found(association, identifier("SERIES", Modality="SR", SeriesInstanceUID=""), "SeriesInstanceUID")) == 9
        moment = identifier("STUDY", StudyDate="20240101-20240131", StudyTime="1200-1400", StudyInstanceUID="")
        both = found(association, moment, "StudyInstanceUID")
    with asking(door, negotiate=b"\0\0") as association:
        assert ask(association, identifier("SERIES", Modality="SR"))[0].Status == DOES_NOT_MATCH
        apart = found(association, moment, "StudyInstanceUID")
    moments = {
        one.summary.study_instance_uid: one.summary.attributes["StudyDate"][0] + one.summary.attributes["StudyTime"][0] for one in RECORDS
    }
    assert set(both) == {uid for uid, moment in moments.items() if "20240101120000" <= moment <= "20240131145959"}
    assert len(apart) < len(both)


# -- rights, audit, limits ----------------------------------------------------------------------------------------------------------


def test_only_who_may_retrieve_may_ask(rooms: Rooms) -> None:
    """A peer without the right, and an unknown caller, get their contexts refused, the association not."""
    peers = Peers([Peer("may", "MAY", "127.0.0.1"), Peer("not", "NOT", "127.0.0.1", retrieve=False)])
    with open_door(rooms, peers=peers, accept_unknown_peers=True, services=(query_scp(rooms, unknown_peers=False),)) as door:
        for title, accepted in (("MAY", 1), ("NOT", 0), ("STRANGER", 0)):
            entity = AE(title)
            entity.add_requested_context(STUDY_ROOT)
            entity.add_requested_context("1.2.840.10008.1.1")
            association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE")
            assert sum(context.abstract_syntax == STUDY_ROOT for context in association.accepted_contexts) == accepted
            assert association.send_c_echo().Status == SUCCESS
            association.release()


def test_every_search_is_in_the_audit_trail(rooms: Rooms, association: Association) -> None:
    """As QIDO-RS writes it, and before the first match."""
    ask(association, identifier("STUDY", StudyInstanceUID="1.2.7", PatientName="*"))
    entry = rooms.audit.events_of("1.2.7")[-1].event
    assert (entry.action, entry.outcome, entry.actor) == ("study.searched", "success", "ASKS")
    assert entry.detail == {"door": "dimse", "address": "127.0.0.1", "level": "STUDY", "keys": {"StudyInstanceUID": "1.2.7"}, "matches": 1}


def test_no_audit_no_answer(rooms: Rooms) -> None:
    """When the audit trail takes nothing, nothing is shown: A700."""

    class Full:
        def record(self, _event: object) -> int:
            raise Unavailable("the disk of the data directory is full: free some space; senders will try again")

    service = QuerySCP(database=rooms.database, audit=Full(), ae_title="DERM_NODE", unknown_peers=True)  # type: ignore[arg-type]
    with open_door(rooms, services=(service,)) as door, asking(door) as association:
        final, matches = ask(association, identifier("STUDY", StudyInstanceUID=""))
    assert (final.Status, matches) == (OUT_OF_RESOURCES, [])
    assert final.ErrorComment.startswith("the disk of the data directory is full")


def test_more_matches_than_the_limit(rooms: Rooms) -> None:
    """The first ones are given, then A700 and a comment: a short answer never looks whole."""
    with open_door(rooms, services=(query_scp(rooms, maximum_rows=10),)) as door, asking(door) as association:
        final, matches = ask(association, identifier("STUDY", StudyInstanceUID=""))
        assert (final.Status, len(matches)) == (OUT_OF_RESOURCES, 10)
        assert "more than 10 matches" in final.ErrorComment
        final, matches = ask(association, identifier("STUDY", PatientID="P1", StudyInstanceUID=""))
        assert final.Status == SUCCESS


def test_a_search_that_takes_too_long(rooms: Rooms) -> None:
    """It is stopped in the database, the answer is A700, and the association goes on."""
    with open_door(rooms, services=(query_scp(rooms, search_s=-1.0, searches=1),)) as door, asking(door) as association:
        with slow_index(rooms):
            final, matches = ask(association, identifier("STUDY", StudyInstanceUID="", PatientName="*a*"))
        assert (final.Status, matches) == (OUT_OF_RESOURCES, [])
        assert "narrow the query" in final.ErrorComment


@contextmanager
def slow_index(rooms: Rooms) -> Iterator[None]:
    """Make every search of this database count to a number that takes SQLite minutes, first."""
    from sqlalchemy import event  # noqa: PLC0415

    def slow(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> tuple[str, Any]:
        if statement.startswith("SELECT studies.id"):
            slow_part = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1000000000) SELECT max(n) FROM c"
            cursor.execute(slow_part)
        return statement, parameters

    reader = rooms.database._backend.reader  # the engine, to slow it down
    event.listen(reader, "before_cursor_execute", slow, retval=True)
    try:
        yield
    finally:
        event.remove(reader, "before_cursor_execute", slow)


# -- C-CANCEL --------------------------------------------------------------------------------------------------------------------------


def test_a_search_is_cancelled_in_the_database(rooms: Rooms) -> None:
    """C-CANCEL while the database looks through its rows: FE00 comes in a second, and the statement is gone."""
    with open_door(rooms, services=(query_scp(rooms),)) as door, asking(door) as association, slow_index(rooms):
        responses = association.send_c_find(identifier("STUDY", StudyInstanceUID=""), STUDY_ROOT, msg_id=7)
        time.sleep(0.5)
        association.send_c_cancel(7, query_model=STUDY_ROOT)
        final, nothing = next(responses)  # the statement itself takes minutes
    assert (final.Status, nothing) == (CANCELLED, None)
    with rooms.database.read() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_the_answers_are_cancelled(tmp_path: Any) -> None:
    """C-CANCEL among the answers of a big query: FE00 comes before the rest of them, whatever the requestor reads meanwhile."""
    rooms = open_rooms(tmp_path)
    file(rooms, [instance(study=f"1.3.{number}") for number in range(6000)])
    with open_door(rooms, services=(query_scp(rooms),)) as door, asking(door) as association:
        count, final = 0, None
        for status, answer in association.send_c_find(identifier("STUDY", StudyInstanceUID="", PatientName=""), STUDY_ROOT, msg_id=9):
            if answer is None:
                final = status
            count += 1
            if count == 3:
                association.send_c_cancel(9, query_model=STUDY_ROOT)
        assert final is not None
        assert final.Status == CANCELLED
        assert count < 6000
        assert len(ask(association, identifier("STUDY", StudyInstanceUID="1.3.5"))[1]) == 1  # the association goes on
    rooms.database.close()


def test_a_finding_can_be_cancelled_before_it_begins(rooms: Rooms) -> None:
    """Cancelled is cancelled, whichever thread is first."""
    finding = Finding(rooms.database, Query(Level.STUDY))
    finding.cancel()
    assert finding.find() == 0
    assert list(finding.pages()) == []


# -- mischief --------------------------------------------------------------------------------------------------------------------------


def _element(tag: int, vr: bytes, value: bytes) -> bytes:
    length = struct.pack("<HI", 0, len(value)) if vr in {b"SQ", b"UN", b"OB"} else struct.pack("<H", len(value))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + length + value


LEVEL = _element(0x00080052, b"CS", b"STUDY ")


@pytest.mark.parametrize(
    ("encoded", "status"),
    [
        (b"", DOES_NOT_MATCH),
        (b"\x08\x00", UNABLE),
        (LEVEL + LEVEL, DOES_NOT_MATCH),
        (LEVEL + _element(0x00100010, b"SQ", b""), DOES_NOT_MATCH),
        (LEVEL + _element(0x00100020, b"US", b"\1\0"), DOES_NOT_MATCH),
        (LEVEL + _element(0x00280010, b"US", b"\1\0\2"), DOES_NOT_MATCH),
        (LEVEL + _element(0x00400275, b"SQ", b"garbage!"), UNABLE),
        (LEVEL + _element(0x00100020, b"UN", b"x" * 2_000_000), DOES_NOT_MATCH),
        (LEVEL + b"".join(_element(0x00110000 + number, b"UN", b"") for number in range(1, 5000)), UNABLE),
        (LEVEL + struct.pack("<HH", 0x0040, 0xA730) + b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" * 500, UNABLE),
    ],
)
def test_hostile_identifiers_are_refused_with_a_status(encoded: bytes, status: int) -> None:
    """Broken framing, wrong VRs, attributes twice, too much of anything: a status, never an exception of another kind."""
    with pytest.raises(InvalidIdentifier) as refused:
        read_identifier(encoded, EXPLICIT)
    assert refused.value.status == status


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=120).map(lambda tail: LEVEL + tail))
def test_any_bytes_are_an_identifier_or_refused(encoded: bytes) -> None:
    """Whatever a stranger sends, reading it ends in an Identifier or in `InvalidIdentifier`."""
    for syntax in (EXPLICIT, IMPLICIT):
        try:
            read = read_identifier(encoded, syntax)
        except InvalidIdentifier:
            continue
        assert isinstance(read.level, Level)


@pytest.mark.parametrize(
    "keys",
    [
        {"PatientName": "'; DROP TABLE studies; --"},
        {"PatientName": "*?" * 120},
        {"PatientName": "%_!" * 20},
        {"StudyInstanceUID": [f"1.2.{number}" for number in range(10_000)]},
        {"ModalitiesInStudy": [f"M{number}" for number in range(64)]},
        {"PatientID": "\\".join(["P1"] * 100)},
    ],
    ids=["sql", "wildcards", "like", "uids", "modalities", "backslashes"],
)
def test_heavy_keys_are_answered(door: Door, keys: dict[str, Any]) -> None:
    """SQL is text, runs of wildcards are cheap, ten thousand UIDs are looked up; the index is whole afterwards."""
    with asking(door, syntaxes=[IMPLICIT]) as association:
        final, _ = ask(association, identifier("STUDY", **keys))
        assert final.Status == SUCCESS
        assert len(found(association, identifier("STUDY", StudyInstanceUID=""), "StudyInstanceUID")) == 28


@pytest.mark.parametrize(
    "keys",
    [
        {"StudyInstanceUID": [f"1.2.{number}" for number in range(10_001)]},
        {"ModalitiesInStudy": [f"M{number}" for number in range(65)]},
    ],
    ids=["uids", "modalities"],
)
def test_longer_lists_are_refused(door: Door, keys: dict[str, Any]) -> None:
    """Above the limits: A900, with what to do."""
    with asking(door, syntaxes=[IMPLICIT]) as association:
        assert ask(association, identifier("STUDY", **keys))[0].Status == DOES_NOT_MATCH


def test_small_pdus(rooms: Rooms) -> None:
    """A requestor that takes PDUs of 4 KiB gets every row whole."""
    with open_door(rooms, services=(query_scp(rooms),)) as door:
        entity = AE("SMALL")
        entity.add_requested_context(STUDY_ROOT)
        association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE", max_pdu=4096)
        every = {
            keyword: None if vr in {"US", "IS"} else "" for keyword, (level, vr) in INDEXED.items() if level in {Level.PATIENT, Level.STUDY}
        }
        assert len(found(association, identifier("STUDY", **every), "StudyInstanceUID")) == 28
        association.release()


def test_work_does_not_count_as_silence(rooms: Rooms) -> None:
    """A query that works for longer than the idle limit does not end the association: the requestor was waiting for us."""
    from dicom_node.dimse.receive import ReceiveLimits  # noqa: PLC0415

    with (
        open_door(rooms, services=(query_scp(rooms, search_s=2.0),), limits=ReceiveLimits(idle_s=1.0)) as door,
        asking(door) as association,
    ):
        with slow_index(rooms):
            assert ask(association, identifier("STUDY", StudyInstanceUID=""))[0].Status == OUT_OF_RESOURCES
        assert ask(association, identifier("STUDY", StudyInstanceUID="1.2.1"))[0].Status == SUCCESS
