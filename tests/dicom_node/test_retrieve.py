"""C-MOVE and C-GET: pynetdicom asks and receives over real sockets, out of a real archive."""

from __future__ import annotations

import queue
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_ECHO
from pynetdicom.dsutils import decode, encode
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from dicom_node.dimse import retrieve, transcode
from dicom_node.dimse.decoder import Decoder, Turns
from dicom_node.dimse.receive import ReceiveLimits
from dicom_node.dimse.retrieve import COUNTABLE, Outgoing, RetrieveSCP
from dicom_node.dimse.scu import StorageSCU, fit, store_command, write_store
from dicom_node.peers import Peer, Peers
from storage.errors import UnsupportedInstance
from storage.records import Announced, Origin
from storage.s3 import S3Store
from tests.dicom_node.door import SECONDARY_CAPTURE, Door, Rooms, draw, open_door, open_rooms
from tests.faults.lying_s3 import LyingS3
from tests.ports import free_port
from tests.storage.house import build
from tests.storage.samples import VL_PHOTOGRAPHIC, new_uid, photograph
from tests.storage.support import RECEIVED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about what we draw

PATIENT_MOVE, PATIENT_GET = (f"1.2.840.10008.5.1.4.1.2.1.{service}" for service in (2, 3))
STUDY_MOVE, STUDY_GET = (f"1.2.840.10008.5.1.4.1.2.2.{service}" for service in (2, 3))
VERIFICATION = "1.2.840.10008.1.1"
ECHO_RSP = 0x8030
SUCCESS, PENDING, CANCELLED, SOME_FAILED = 0x0000, 0xFF00, 0xFE00, 0xB000
CANNOT_COUNT, CANNOT_PERFORM, UNKNOWN_DESTINATION, DOES_NOT_MATCH = 0xA701, 0xA702, 0xA801, 0xA900
UNPLAIN = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


def archive(rooms: Rooms, data_set: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Store a data set as it would come by DIMSE; its bytes."""
    encoded = encode(data_set, syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian, syntax == DeflatedExplicitVRLittleEndian)
    assert encoded is not None
    origin = Origin("dimse", RECEIVED, "10.0.0.1", "SCU", "NODE", "pacs")
    with rooms.archive.receive(origin, transfer_syntax_uid=str(syntax), announced=Announced()) as intake:
        intake.write(encoded)
        intake.commit()
    return bytes(encoded)


def study_of(rooms: Rooms, count: int, **settings: Any) -> list[Dataset]:
    """Store a study of drawn pictures."""
    pictures = [draw(seed=number, **settings) for number in range(count)]
    for number, picture in enumerate(pictures, start=1):
        picture.StudyInstanceUID, picture.SeriesInstanceUID = pictures[0].StudyInstanceUID, pictures[0].SeriesInstanceUID
        picture.InstanceNumber = str(number)
        archive(rooms, picture)
    return pictures


@dataclass
class Received:
    """What reached the far end of C-STORE."""

    instances: list[tuple[str, str, bytes]] = field(default_factory=list)
    """SOP Instance UID, transfer syntax, data set bytes."""
    originators: set[tuple[Any, Any]] = field(default_factory=set)
    contexts: list[int] = field(default_factory=list)
    """Of each association."""
    answer: Callable[[str], int] = lambda _: SUCCESS

    def store(self, event: evt.Event) -> int:
        """Take an instance."""
        request: Any = event.request
        uid = str(request.AffectedSOPInstanceUID)
        self.instances.append((uid, str(event.context.transfer_syntax), request.DataSet.getvalue()))
        self.originators.add((request.MoveOriginatorApplicationEntityTitle, request.MoveOriginatorMessageID))
        return self.answer(uid)

    def data_set(self, number: int = 0) -> Dataset:
        """Decode one."""
        _, syntax, encoded = self.instances[number]
        return decode(BytesIO(encoded), syntax == ImplicitVRLittleEndian, True)


@dataclass
class Destination:
    """A receiver of C-MOVE."""

    peer: Peer
    received: Received


@contextmanager
def receiving(received: Received | None = None, *, syntaxes: Sequence[str] = (), more: Sequence[Any] = ()) -> Iterator[Destination]:
    """Run pynetdicom's storage SCP as peer DEST."""
    received = received or Received()
    entity = AE("DEST")
    entity.add_supported_context(SECONDARY_CAPTURE, list(syntaxes) or [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    entity.maximum_associations = 5
    handlers: list[Any] = [
        (evt.EVT_C_STORE, received.store),
        (evt.EVT_ACCEPTED, lambda event: received.contexts.append(len(event.assoc.accepted_contexts))),
        *more,
    ]
    server: Any = entity.start_server(("127.0.0.1", free_port()), block=False, evt_handlers=handlers)
    try:
        yield Destination(Peer("dest", "DEST", "127.0.0.1", server.server_address[1]), received)
    finally:
        server.shutdown()


@contextmanager
def door_of(rooms: Rooms, *destinations: Peer, answer_s: float = 10.0, **settings: Any) -> Iterator[Door]:
    """A door that retrieves, and knows these destinations."""
    sender = StorageSCU(ae_title="DERM_NODE", connect_s=5.0, answer_s=answer_s)
    limits = settings.pop("limits", None)
    service = RetrieveSCP(
        **{
            "database": rooms.database,
            "archive": rooms.archive,
            "audit": rooms.audit,
            "peers": Peers(destinations),
            "sender": sender,
            "unknown_peers": True,
            "answer_s": answer_s,
            **settings,
        }
    )
    with open_door(rooms, services=(service,), limits=limits) as door:
        yield door


@contextmanager
def asking(
    door: Door,
    *,
    storage: Sequence[tuple[str, Sequence[str]]] = ((SECONDARY_CAPTURE, (ExplicitVRLittleEndian,)),),
    received: Received | None = None,
    role: bool = True,
    negotiate: bytes = b"",
) -> Iterator[Association]:
    """An association that asks for C-MOVE and C-GET; for the latter it is SCP of `storage`, (SOP class, transfer syntaxes) each."""
    entity = AE("ASKS")
    for model in (PATIENT_MOVE, PATIENT_GET, STUDY_MOVE, STUDY_GET):
        entity.add_requested_context(model)
    items: list[Any] = []
    for sop_class_uid, syntaxes in storage:
        entity.add_requested_context(sop_class_uid, list(syntaxes))
        if role:
            items.append(build_role(sop_class_uid, scp_role=True))
    if negotiate:
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid, item.service_class_application_information = STUDY_GET, negotiate
        items.append(item)
    handlers: list[Any] = [(evt.EVT_C_STORE, (received or Received()).store)]
    association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE", ext_neg=items, evt_handlers=handlers)
    assert association.is_established
    try:
        yield association
    finally:
        association.release()


def identifier(level: str, **keys: Any) -> Dataset:
    """A request's Identifier."""
    data_set = Dataset()
    data_set.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(data_set, keyword, value)
    return data_set


def of_study(pictures: Sequence[Dataset]) -> Dataset:
    """The Identifier of a whole study."""
    return identifier("STUDY", StudyInstanceUID=pictures[0].StudyInstanceUID)


def counts(status: Dataset) -> tuple[int | None, int, int, int]:
    """Remaining, completed, failed, warning."""
    return (
        status.get("NumberOfRemainingSuboperations"),
        status.NumberOfCompletedSuboperations,
        status.NumberOfFailedSuboperations,
        status.NumberOfWarningSuboperations,
    )


def get(association: Association, request: Dataset, model: str = STUDY_GET) -> tuple[Dataset, Dataset | None, list[Dataset]]:
    """Final status and Identifier, and the pending responses."""
    responses = list(association.send_c_get(request, model))
    final, answer = responses.pop()
    return final, answer or None, [status for status, _ in responses]


def move(
    association: Association, request: Dataset, to: str = "DEST", model: str = STUDY_MOVE
) -> tuple[Dataset, Dataset | None, list[Dataset]]:
    """Final status and Identifier, and the pending responses."""
    responses = list(association.send_c_move(request, to, model))
    final, answer = responses.pop()
    return final, answer or None, [status for status, _ in responses]


def failed(answer: Dataset | None) -> list[str]:
    """Failed SOP Instance UID List."""
    if answer is None:
        return []
    value = answer.FailedSOPInstanceUIDList
    return [value] if isinstance(value, str) else list(value)


# -- C-GET -----------------------------------------------------------------------------------------------------------------------------


def test_get_a_study(rooms: Rooms) -> None:
    """Every instance comes back on the same association, byte for byte, in order, and each response counts."""
    pictures = study_of(rooms, 3)
    received = Received()
    with door_of(rooms) as door, asking(door, received=received) as association:
        final, answer, pending = get(association, of_study(pictures))
    assert (final.Status, answer) == (SUCCESS, None)
    assert [counts(status) for status in pending] == [(2, 1, 0, 0), (1, 2, 0, 0), (0, 3, 0, 0)]
    assert counts(final) == (None, 3, 0, 0)
    assert [uid for uid, _, _ in received.instances] == [picture.SOPInstanceUID for picture in pictures]
    for (uid, syntax, data), picture in zip(received.instances, pictures, strict=True):
        with rooms.archive.open(uid) as stored:
            assert data == stored.read()
        assert syntax == ExplicitVRLittleEndian
        assert decode(BytesIO(data), False, True) == picture


def test_get_by_every_level(rooms: Rooms) -> None:
    """Patient, study, series, instance and lists of their UIDs give just what they name; an unknown UID gives nothing, successfully."""
    one, other = study_of(rooms, 2), study_of(rooms, 2)
    for picture in (*one, *other):
        assert picture.PatientID == "drawn-1"
    study, series = one[0].StudyInstanceUID, one[0].SeriesInstanceUID
    with door_of(rooms) as door:
        for model, keys, wanted in (
            (STUDY_GET, {"level": "STUDY", "StudyInstanceUID": [study, other[0].StudyInstanceUID]}, {*one_uids(one), *one_uids(other)}),
            (STUDY_GET, {"level": "SERIES", "StudyInstanceUID": study, "SeriesInstanceUID": series}, one_uids(one)),
            (
                STUDY_GET,
                {"level": "IMAGE", "StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": one[1].SOPInstanceUID},
                {one[1].SOPInstanceUID},
            ),
            (PATIENT_GET, {"level": "STUDY", "PatientID": "drawn-1", "StudyInstanceUID": study}, one_uids(one)),
            (PATIENT_GET, {"level": "STUDY", "PatientID": "another", "StudyInstanceUID": study}, set()),
            (STUDY_GET, {"level": "STUDY", "StudyInstanceUID": "1.2.3.4"}, set()),
        ):
            received = Received()
            with asking(door, received=received) as association:
                final, answer, _ = get(association, identifier(**keys), model)
            assert (final.Status, answer) == (SUCCESS, None)
            assert {uid for uid, _, _ in received.instances} == wanted
            assert counts(final) == (None, len(wanted), 0, 0)


def one_uids(pictures: Sequence[Dataset]) -> set[str]:
    """SOP Instance UIDs."""
    return {picture.SOPInstanceUID for picture in pictures}


def test_get_a_patient(tmp_path: Path) -> None:
    """All studies of a Patient ID."""
    rooms = open_rooms(tmp_path)
    pictures = [*study_of(rooms, 1), *study_of(rooms, 2)]
    received = Received()
    with door_of(rooms) as door, asking(door, received=received) as association:
        final, _, _ = get(association, identifier("PATIENT", PatientID="drawn-1"), PATIENT_GET)
    assert final.Status == SUCCESS
    assert {uid for uid, _, _ in received.instances} == one_uids(pictures)
    rooms.database.close()


@pytest.mark.parametrize(
    ("model", "level", "keys"),
    [
        (STUDY_GET, "STUDY", {}),
        (STUDY_GET, "STUDY", {"StudyInstanceUID": "*"}),
        (STUDY_GET, "SERIES", {"SeriesInstanceUID": "1.2"}),
        (STUDY_GET, "IMAGE", {"StudyInstanceUID": ["1.2", "1.3"], "SeriesInstanceUID": "1.4", "SOPInstanceUID": "1.5"}),
        (STUDY_GET, "PATIENT", {"PatientID": "drawn-1"}),
        (PATIENT_GET, "PATIENT", {"PatientID": "drawn*"}),
        (PATIENT_GET, "PATIENT", {"PatientID": ""}),
        (STUDY_GET, "NONE", {}),
    ],
)
def test_a_retrieval_names_what_it_wants(rooms: Rooms, model: str, level: str, keys: dict[str, Any]) -> None:
    """Without the unique key of its level, with wildcards, or without those above: A900, and nothing is sent."""
    with door_of(rooms) as door, asking(door) as association:
        final, answer, pending = get(association, identifier(level, **keys), model)
    assert (final.Status, answer, pending) == (DOES_NOT_MATCH, None, [])
    assert final.ErrorComment


def test_relational_retrieval_once_negotiated(rooms: Rooms) -> None:
    """An instance by its UID alone."""
    (picture,) = study_of(rooms, 1)
    request = identifier("IMAGE", SOPInstanceUID=picture.SOPInstanceUID)
    with door_of(rooms) as door:
        with asking(door) as association:
            assert get(association, request)[0].Status == DOES_NOT_MATCH
        with asking(door, negotiate=b"\1\1") as association:
            assert association.acceptor.sop_class_extended == {STUDY_GET: b"\1\0"}
            assert counts(get(association, request)[0]) == (None, 1, 0, 0)


def test_get_without_role_or_context(rooms: Rooms) -> None:
    """A requestor that is SCP of nothing, or not of this class: each sub-operation is counted as failed and named."""
    pictures = study_of(rooms, 2)
    with door_of(rooms) as door:
        for settings in ({"role": False}, {"storage": (("1.2.840.10008.5.1.4.1.1.2", (ExplicitVRLittleEndian,)),)}):
            with asking(door, **settings) as association:
                final, answer, _ = get(association, of_study(pictures))
            assert final.Status == CANNOT_PERFORM
            assert set(failed(answer)) == one_uids(pictures)
            assert final.ErrorComment.startswith("the requestor proposed no presentation context")


@pytest.mark.parametrize("stored", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, *UNPLAIN])
@pytest.mark.parametrize("wanted", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_uncompressed_syntaxes_are_converted(rooms: Rooms, stored: str, wanted: str) -> None:
    """Between the uncompressed syntaxes every value stays: sequences, private elements, numbers of both byte orders."""
    picture = draw()
    picture.PatientName = "Müller^Jörg"
    picture.SpecificCharacterSet = "ISO_IR 192"
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "T-01000", "SRT", "Skin"
    item.ReferencedFrameNumber = [1, 2]
    inner = Dataset()
    inner.FloatingPointValue = 1.25
    item.ConceptCodeSequence = Items([inner])
    picture.AnatomicRegionSequence = Items([item, Dataset()])
    picture.PixelAspectRatio = [1, 2]
    picture.SmallestImagePixelValue = 3
    picture.add_new(0x00091001, "UL", 70_000)
    picture.add_new(0x00090010, "LO", "DRAWN")
    archive(rooms, picture, stored)
    received = Received()
    with door_of(rooms) as door, asking(door, storage=((SECONDARY_CAPTURE, (wanted,)),), received=received) as association:
        final, _, _ = get(association, of_study([picture]))
    assert final.Status == SUCCESS
    assert received.instances[0][1] == wanted
    back = received.data_set()
    if stored == ExplicitVRBigEndian:  # pydicom wrote the words of the pixels as they were
        picture.PixelData = np.frombuffer(picture.PixelData, np.uint16).byteswap().tobytes()
    if ImplicitVRLittleEndian in (stored, wanted):  # private elements have no VR there
        back[0x00091001].value, picture[0x00091001].value = b"", b""
        back[0x00091001].VR = picture[0x00091001].VR = "UN"
    assert back == picture


def _read(stream: bytes, mode: int) -> np.ndarray[Any, Any]:
    picture = cv2.imdecode(np.frombuffer(stream, np.uint8), mode)
    assert picture is not None
    return picture


def compressed(syntax: str, *, frames: int = 2, colour: bool = True) -> tuple[Dataset, np.ndarray[Any, Any]]:
    """Draw a picture, compress it; the data set and its pixels."""
    rng = np.random.default_rng(7)
    smooth = cv2.resize(rng.integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8).transpose(1, 2, 3, 0).reshape(4, 4, -1), (40, 32))
    pixels = np.ascontiguousarray(smooth.reshape(32, 40, 3, frames).transpose(3, 0, 1, 2))
    if not colour:
        pixels = np.ascontiguousarray(pixels[..., 0])
    picture = draw()
    picture.Rows, picture.Columns = 32, 40
    picture.SamplesPerPixel = 3 if colour else 1
    picture.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        picture.PlanarConfiguration = 0
    picture.BitsAllocated = picture.BitsStored = 8
    picture.HighBit = 7
    picture.NumberOfFrames = str(frames)
    if syntax == JPEGBaseline8Bit:
        streams = [cv2.imencode(".jpg", frame[..., ::-1] if colour else frame)[1].tobytes() for frame in pixels]
        picture.PixelData = encapsulate(streams)
        picture["PixelData"].VR = "OB"
        if colour:
            picture.PhotometricInterpretation = "YBR_FULL_422"
        pixels = np.stack([_read(stream, cv2.IMREAD_COLOR_RGB if colour else cv2.IMREAD_GRAYSCALE) for stream in streams])
    else:
        picture.PixelData = pixels.tobytes()
        picture["PixelData"].VR = "OB"
        from pydicom.dataset import FileMetaDataset  # noqa: PLC0415

        picture.file_meta = FileMetaDataset()
        picture.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        picture.compress(syntax, generate_instance_uid=False)
    picture["PixelData"].is_undefined_length = True
    return picture, pixels


@pytest.mark.parametrize("wanted", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
@pytest.mark.parametrize("stored", [RLELossless, JPEG2000Lossless, JPEGBaseline8Bit])
def test_compressed_pixels_are_decoded_for_who_lacks_the_syntax(rooms: Rooms, stored: str, colour: bool, wanted: str) -> None:
    """Every frame is what the codec gives; the attributes that speak of the pixels follow; what was lost stays said."""
    picture, pixels = compressed(stored, colour=colour)
    archive(rooms, picture, stored)
    received = Received()
    with door_of(rooms) as door, asking(door, storage=((SECONDARY_CAPTURE, (wanted,)),), received=received) as association:
        final, _, _ = get(association, of_study([picture]))
    assert final.Status == SUCCESS, final
    back = received.data_set()
    assert received.instances[0][1] == wanted
    assert np.array_equal(np.frombuffer(back.PixelData, np.uint8).reshape(pixels.shape), pixels)
    assert back.PhotometricInterpretation == ("RGB" if colour else "MONOCHROME2")
    assert (back.BitsStored, back.HighBit, back.get("PlanarConfiguration")) == (8, 7, 0 if colour else None)
    assert back.get("LossyImageCompression") == ("01" if stored == JPEGBaseline8Bit else None)
    others = {"PixelData", "PhotometricInterpretation", "LossyImageCompression", "PlanarConfiguration"}
    for element in picture:
        assert element.keyword in others or back[element.tag] == element


def test_the_stored_syntax_is_kept_where_it_is_taken(rooms: Rooms) -> None:
    """Offered in a context of its own, the compressed syntax wins over the plain one, and no byte changes."""
    picture, _ = compressed(RLELossless)
    data = archive(rooms, picture, RLELossless)
    received = Received()
    storage = ((SECONDARY_CAPTURE, (ExplicitVRLittleEndian,)), (SECONDARY_CAPTURE, (RLELossless,)))
    with door_of(rooms) as door, asking(door, storage=storage, received=received) as association:
        assert get(association, of_study([picture]))[0].Status == SUCCESS
    assert received.instances == [(picture.SOPInstanceUID, RLELossless, data)]


def test_a_context_with_a_choice_takes_the_plain_syntax(rooms: Rooms) -> None:
    """Of several syntaxes in one context that one is accepted in which everything can be had, a compressed one first or not."""
    picture, pixels = compressed(RLELossless)
    plain = draw()
    plain.StudyInstanceUID = picture.StudyInstanceUID
    archive(rooms, picture, RLELossless)
    archive(rooms, plain)
    received = Received()
    storage = ((SECONDARY_CAPTURE, (JPEGBaseline8Bit, RLELossless, ImplicitVRLittleEndian)),)
    with door_of(rooms) as door, asking(door, storage=storage, received=received) as association:
        assert get(association, of_study([picture]))[0].Status == SUCCESS
    assert {syntax for _, syntax, _ in received.instances} == {ImplicitVRLittleEndian}
    assert pixels.tobytes() in {received.data_set(number).PixelData for number in range(2)}
    assert transcode.in_order_of_use([MPEG2MPML, ExplicitVRLittleEndian]) == [MPEG2MPML, ExplicitVRLittleEndian]


def test_what_cannot_be_decoded_is_counted_as_failed(rooms: Rooms) -> None:
    """A video and a broken stream fail with their reason; the others of the study arrive: B000 and the list."""
    pictures = study_of(rooms, 1)
    video, _ = compressed(RLELossless)
    broken, _ = compressed(RLELossless)
    broken.PixelData = encapsulate([b"\xff" * 200, b"\xff" * 200])
    broken["PixelData"].is_undefined_length = True
    for one, syntax in ((video, MPEG2MPML), (broken, RLELossless)):
        one.StudyInstanceUID = pictures[0].StudyInstanceUID
        archive(rooms, one, syntax)
    received = Received()
    with door_of(rooms) as door, asking(door, received=received) as association:
        final, answer, pending = get(association, of_study(pictures))
    assert (final.Status, len(pending)) == (SOME_FAILED, 3)
    assert counts(final) == (None, 1, 2, 0)
    assert set(failed(answer)) == {video.SOPInstanceUID, broken.SOPInstanceUID}
    assert [uid for uid, _, _ in received.instances] == [pictures[0].SOPInstanceUID]


def test_a_decoder_that_hangs_costs_one_instance() -> None:
    """Its process is ended at the deadline, and the failure has a name."""
    image = {"transfer_syntax_uid": RLELossless, "rows": 1, "columns": 1}
    with Decoder(image, frame_bytes=1, frame_s=0.01) as decoder, pytest.raises(UnsupportedInstance, match="died"):
        decoder.decode(b"\0" * 10_000_000)


def test_decoders_take_turns() -> None:
    """No more of them at once than there are turns; who waits and is not wanted any more is told so, and takes none."""
    turns = Turns(1)
    with turns.take():
        asked = iter((True, False))
        with pytest.raises(UnsupportedInstance, match="not wanted"), turns.take(lambda: next(asked)):
            pytest.fail("a second turn was given")
        waiting = threading.Thread(target=lambda: turns.take().__enter__())
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_instance_that_broke_off_gives_its_turn_back(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that aborts within decoded instances leaves the only decoder to the next ones."""
    monkeypatch.setattr(retrieve, "Turns", lambda: Turns(1))
    pictures = [compressed(RLELossless, frames=2)[0] for _ in range(3)]
    for picture in pictures:
        picture.StudyInstanceUID = pictures[0].StudyInstanceUID
        archive(rooms, picture, RLELossless)
    aborted = threading.Event()

    def abort_first(event: evt.Event) -> None:
        if not aborted.is_set():
            aborted.set()
            event.assoc.abort()

    with receiving(more=[(evt.EVT_DATA_RECV, abort_first)]) as destination, door_of(rooms, destination.peer) as door:
        for _ in range(2):
            with asking(door) as association:
                final, _, _ = move(association, of_study(pictures))
    assert final.Status == SUCCESS
    assert len(destination.received.instances) >= 3


def test_answers_of_the_requestor_are_counted(rooms: Rooms) -> None:
    """Its warnings and refusals of single sub-operations appear in the counts, the list and the final status."""
    pictures = study_of(rooms, 4)
    answers = dict(zip([picture.SOPInstanceUID for picture in pictures], (SUCCESS, 0xB007, 0x0111, 0xC000), strict=True))
    received = Received(answer=lambda uid: answers[uid])
    with door_of(rooms) as door, asking(door, received=received) as association:
        final, answer, _ = get(association, of_study(pictures))
    assert final.Status == SOME_FAILED
    assert counts(final) == (None, 1, 2, 1)
    assert failed(answer) == [pictures[2].SOPInstanceUID, pictures[3].SOPInstanceUID]


def test_an_instance_that_is_gone_is_counted_as_failed(rooms: Rooms) -> None:
    """One whose object cannot be read fails, before the requestor hears of it; the rest arrives."""
    pictures = study_of(rooms, 3)
    record = rooms.index.find(pictures[1].SOPInstanceUID)
    (found,) = (path for path in (rooms.folder / "objects").rglob("*") if path.is_file() and path.name.startswith(record.sealed.object_key))
    found.unlink()
    received = Received()
    with door_of(rooms) as door, asking(door, received=received) as association:
        final, answer, _ = get(association, of_study(pictures))
    assert (final.Status, failed(answer)) == (SOME_FAILED, [pictures[1].SOPInstanceUID])
    assert len(received.instances) == 2


def test_cold_objects_are_counted_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that have to be restored first fail with that reason, their restore is started, and later they are given."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    with LyingS3() as bucket:
        store = S3Store(
            bucket=bucket.bucket, endpoint_url=bucket.endpoint, region="us-east-1", storage_class="GLACIER", restore_tier="Expedited"
        )
        house = build(tmp_path / "house", store=store, acknowledge=lambda _: "archive")
        cold = Rooms(tmp_path, house.database, house.index, house.queue, house.audit, house.archive)
        try:
            study = new_uid()
            for _ in range(2):
                house.ingest(photograph(study=study))
            received = Received()
            with door_of(cold) as door, asking(door, storage=((VL_PHOTOGRAPHIC, (ExplicitVRLittleEndian,)),), received=received) as asked:
                final, answer, _ = get(asked, identifier("STUDY", StudyInstanceUID=study))
                assert (final.Status, len(failed(answer))) == (CANNOT_PERFORM, 2)
                assert "cold" in final.ErrorComment
                assert received.instances == []
                bucket.finish_restores()
                assert counts(get(asked, identifier("STUDY", StudyInstanceUID=study))[0]) == (None, 2, 0, 0)
        finally:
            house.close()


@pytest.mark.parametrize("wanted", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["as stored", "converted"])
def test_big_instances_are_never_whole_in_memory(rooms: Rooms, wanted: str) -> None:
    """48 MiB go out in pieces, as they are and converted, within a few MiB of memory."""
    picture = draw(rows=4096, columns=6144)
    size = len(archive(rooms, picture))
    summary = rooms.index.find(picture.SOPInstanceUID).summary

    class Sink:
        written = 0

        def sendall(self, data: bytes) -> None:
            self.written += len(data)

    sink = Sink()
    tracemalloc.start()
    try:
        prepared = fit(Outgoing(rooms.archive, summary), {wanted: 1}, "the sink")
        write_store(sink, prepared, store_command(summary, 1), 16_384)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sink.written > size - 1000
    assert peak < 12 * 1024**2


def test_a_requestor_that_does_not_answer(rooms: Rooms) -> None:
    """A sub-operation of C-GET without an answer ends the association after its time; the door goes on."""
    pictures = study_of(rooms, 2)
    go_on = threading.Event()
    received = Received(answer=lambda _: SUCCESS if go_on.wait(20) else 0xC000)
    with door_of(rooms, answer_s=0.5) as door:
        with asking(door, received=received) as association:
            responses = list(association.send_c_get(of_study(pictures), STUDY_GET))
            go_on.set()
            assert len(received.instances) == 1
            assert [status.get("Status") for status, _ in responses] in ([], [None])
        door.settle()
        assert door.scp.associations == 0


@pytest.mark.parametrize("count", [3, 20])
def test_other_requests_within_a_get_are_answered_after_it(rooms: Rooms, count: int) -> None:
    """C-ECHOs that come before the answer to a sub-operation are kept and answered, 16 of them; who sends more is hung up on."""
    pictures = study_of(rooms, 2)
    with door_of(rooms) as door:
        sent = threading.Event()

        def echo_first(_: str) -> int:
            if not sent.is_set():
                sent.set()
                for number in range(count):
                    request = C_ECHO()
                    request.MessageID = 100 + number
                    request.AffectedSOPClassUID = VERIFICATION
                    association.dimse.send_msg(request, echoing)
            return SUCCESS

        storage = ((SECONDARY_CAPTURE, (ExplicitVRLittleEndian,)), (VERIFICATION, (ImplicitVRLittleEndian,)))
        with asking(door, storage=storage, received=Received(answer=echo_first)) as association:
            echoing = next(int(one.context_id or 0) for one in association.accepted_contexts if one.abstract_syntax == VERIFICATION)
            came: queue.SimpleQueue[Any] = queue.SimpleQueue()
            association.bind(evt.EVT_DIMSE_RECV, lambda event: came.put(event.message.command_set))
            responses = list(association.send_c_get(of_study(pictures), STUDY_GET))
            if count <= 16:
                assert responses[-1][0].Status == SUCCESS
                answered: list[int] = []
                while len(answered) < count:
                    command = came.get(timeout=10)
                    if command.CommandField == ECHO_RSP:
                        answered.append(command.MessageIDBeingRespondedTo)
                assert answered == list(range(100, 100 + count))
            else:
                assert responses[-1][0].get("Status") != SUCCESS
        door.settle()
        assert door.scp.associations == 0


@contextmanager
def slow_index(rooms: Rooms) -> Iterator[None]:
    """Make what locates instances count to a number that takes SQLite minutes, first."""
    from sqlalchemy import event  # noqa: PLC0415

    def slow(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> tuple[str, Any]:
        if statement.startswith("SELECT studies.study_instance_uid"):
            cursor.execute("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1000000000) SELECT max(n) FROM c")
        return statement, parameters

    reader = rooms.database._backend.reader  # the engine, to slow it down
    event.listen(reader, "before_cursor_execute", slow, retval=True)
    try:
        yield
    finally:
        event.remove(reader, "before_cursor_execute", slow)


def test_the_search_of_a_retrieval_is_cancelled_in_the_database(rooms: Rooms) -> None:
    """C-CANCEL while the database looks for the instances: FE00, not minutes later, and the association goes on."""
    pictures = study_of(rooms, 1)
    with door_of(rooms) as door, asking(door) as association:
        with slow_index(rooms):
            responses = association.send_c_get(of_study(pictures), STUDY_GET, msg_id=5)
            time.sleep(0.5)
            association.send_c_cancel(5, query_model=STUDY_GET)
            final, _ = next(responses)
            assert list(responses) == []
        assert final.Status == CANCELLED
        assert counts(final) == (0, 0, 0, 0)
        assert get(association, of_study(pictures))[0].Status == SUCCESS


def test_the_search_of_a_retrieval_has_a_limit(rooms: Rooms) -> None:
    """What takes the index too long is A701; a requestor that goes away meanwhile leaves no search behind."""
    pictures = study_of(rooms, 1)
    with door_of(rooms, search_s=0.5, searches=1) as door, asking(door) as association, slow_index(rooms):
        final, _, pending = get(association, of_study(pictures))
        assert (final.Status, pending) == (CANNOT_COUNT, [])
        assert "took over" in final.ErrorComment
    with door_of(rooms, searches=1) as door:
        with asking(door) as association, slow_index(rooms):
            association.send_c_get(of_study(pictures), STUDY_GET)
            time.sleep(0.5)
            association.abort()
            door.settle()
        with asking(door) as association:
            assert get(association, of_study(pictures))[0].Status == SUCCESS


def test_get_is_cancelled(rooms: Rooms) -> None:
    """C-CANCEL: FE00 with what remains, and the association goes on."""
    pictures = study_of(rooms, 12)
    received = Received()
    with door_of(rooms) as door, asking(door, received=received) as association:
        final = None
        for number, (status, _) in enumerate(association.send_c_get(of_study(pictures), STUDY_GET, msg_id=5), start=1):
            final = status
            if number == 2:
                association.send_c_cancel(5, query_model=STUDY_GET)
        assert final is not None
        assert final.Status == CANCELLED
        remaining, completed, _, _ = counts(final)
        assert remaining == 12 - completed > 0
        assert len(received.instances) == completed
        assert get(association, identifier("STUDY", StudyInstanceUID="1.2.3.4"))[0].Status == SUCCESS


# -- C-MOVE ----------------------------------------------------------------------------------------------------------------------------


def test_move_a_study(rooms: Rooms) -> None:
    """Every instance reaches the peer, byte for byte, with the Move Originator; responses count, and the audit trail knows."""
    pictures = study_of(rooms, 3)
    with receiving() as destination, door_of(rooms, destination.peer) as door, asking(door) as association:
        final, answer, pending = move(association, of_study(pictures))
    received = destination.received
    assert (final.Status, answer) == (SUCCESS, None)
    assert [counts(status) for status in pending] == [(2, 1, 0, 0), (1, 2, 0, 0), (0, 3, 0, 0)]
    assert counts(final) == (None, 3, 0, 0)
    assert [uid for uid, _, _ in received.instances] == [picture.SOPInstanceUID for picture in pictures]
    assert received.originators == {("ASKS", 1)}
    for uid, _, data in received.instances:
        with rooms.archive.open(uid) as stored:
            assert data == stored.read()
    entry = rooms.audit.events_of(pictures[0].StudyInstanceUID)[-1].event
    assert (entry.action, entry.outcome, entry.actor) == ("instance.retrieved", "success", "ASKS")
    assert entry.detail == {"door": "dimse", "address": "127.0.0.1", "level": "STUDY", "destination": "dest", "instances": 3}


def test_move_to_an_unknown_destination(rooms: Rooms) -> None:
    """A801, and no connection is made: not to a peer of another title, nor to one that has no address."""
    pictures = study_of(rooms, 1)
    with receiving() as destination:
        nowhere = Peer("nowhere", "NOWHERE", "*", destination.peer.port)
        with door_of(rooms, destination.peer, nowhere) as door, asking(door) as association:
            for title in ("OTHER", "NOWHERE", "dest"):
                final, answer, pending = move(association, of_study(pictures), title)
                assert (final.Status, answer, pending) == (UNKNOWN_DESTINATION, None, [])
        assert destination.received.contexts == []


def test_the_requestor_itself_is_the_first_choice(rooms: Rooms) -> None:
    """Of two peers with one AE title the one that asks gets its own; anybody else is told that there are two, and none gets anything."""
    pictures = study_of(rooms, 1)
    with receiving() as destination:
        other = Peer("other", "DEST", "127.0.0.1", free_port())
        peers = Peers([other, destination.peer, Peer("caller", "DEST", "*")])
        sender = StorageSCU(ae_title="DERM_NODE")
        service = RetrieveSCP(database=rooms.database, archive=rooms.archive, audit=rooms.audit, peers=peers, sender=sender)
        assert service._destination("DEST", destination.peer) is destination.peer
        with door_of(rooms, other, destination.peer) as door, asking(door) as association:
            final, _, pending = move(association, of_study(pictures))
        assert (final.Status, pending) == (UNKNOWN_DESTINATION, [])
        assert "ambiguous" in final.ErrorComment
        assert destination.received.contexts == []


def test_move_to_a_peer_that_is_away(rooms: Rooms) -> None:
    """A702, every instance in the list, and the reason in the comment."""
    pictures = study_of(rooms, 2)
    with door_of(rooms, Peer("dest", "DEST", "127.0.0.1", free_port())) as door, asking(door) as association:
        final, answer, _ = move(association, of_study(pictures))
    assert (final.Status, counts(final)) == (CANNOT_PERFORM, (None, 0, 2, 0))
    assert set(failed(answer)) == one_uids(pictures)
    assert "did not answer" in final.ErrorComment


def test_move_of_nothing(rooms: Rooms) -> None:
    """Unknown UIDs: 0000 with no sub-operation, and no connection."""
    with receiving() as destination, door_of(rooms, destination.peer) as door, asking(door) as association:
        final, _, pending = move(association, identifier("STUDY", StudyInstanceUID="1.2.3.4"))
    assert (final.Status, counts(final), pending) == (SUCCESS, (None, 0, 0, 0), [])
    assert destination.received.contexts == []


def test_move_where_some_are_refused(rooms: Rooms) -> None:
    """B000, counts and list; refusals of single instances do not stop the rest."""
    pictures = study_of(rooms, 3)
    refused = pictures[1].SOPInstanceUID
    for status, words in ((0xA900, "A900"), (0x0111, "has another instance of that UID")):
        received = Received(answer=lambda uid, status=status: status if uid == refused else SUCCESS)
        with receiving(received) as destination, door_of(rooms, destination.peer) as door, asking(door) as association:
            final, answer, _ = move(association, of_study(pictures))
        assert (final.Status, counts(final), failed(answer)) == (SOME_FAILED, (None, 2, 1, 0), [refused])
        assert words in final.ErrorComment


def test_move_goes_on_after_an_association_that_broke(rooms: Rooms) -> None:
    """A receiver that aborts at one instance costs that one: the others go on a new association."""
    pictures = study_of(rooms, 4)
    fatal = pictures[1].SOPInstanceUID
    received = Received()

    def abort_at(event: evt.Event) -> int:
        request: Any = event.request
        if request.AffectedSOPInstanceUID == fatal:
            event.assoc.abort()
            return 0xC000
        return received.store(event)

    entity = AE("DEST")
    entity.add_supported_context(SECONDARY_CAPTURE)
    server: Any = entity.start_server(("127.0.0.1", free_port()), block=False, evt_handlers=[(evt.EVT_C_STORE, abort_at)])
    try:
        peer = Peer("dest", "DEST", "127.0.0.1", server.server_address[1])
        with door_of(rooms, peer) as door, asking(door) as association:
            final, answer, _ = move(association, of_study(pictures))
    finally:
        server.shutdown()
    assert (final.Status, counts(final), failed(answer)) == (SOME_FAILED, (None, 3, 1, 0), [fatal])
    assert {uid for uid, _, _ in received.instances} == one_uids(pictures) - {fatal}


def test_move_transcodes_only_where_it_must(rooms: Rooms) -> None:
    """To a receiver of plain syntaxes the compressed instance goes decoded; to one that takes it, as it is."""
    picture, pixels = compressed(JPEG2000Lossless)
    data = archive(rooms, picture, JPEG2000Lossless)
    with receiving(syntaxes=[ImplicitVRLittleEndian]) as destination, door_of(rooms, destination.peer) as door, asking(door) as association:
        assert move(association, of_study([picture]))[0].Status == SUCCESS
        assert destination.received.data_set().PixelData == pixels.tobytes()
    everything = [JPEG2000Lossless, ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    with receiving(syntaxes=everything) as destination, door_of(rooms, destination.peer) as door, asking(door) as association:
        assert move(association, of_study([picture]))[0].Status == SUCCESS
        assert destination.received.instances == [(picture.SOPInstanceUID, JPEG2000Lossless, data)]


def test_more_classes_than_one_association_has_contexts(tmp_path: Path) -> None:
    """Instances of 150 SOP classes go to another node over several associations, none with more than 128 contexts."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = open_rooms(tmp_path / "here"), open_rooms(tmp_path / "there")
    study = generate_uid()
    for number in range(150):
        picture = draw(sop_class_uid=f"1.2.826.0.1.3680043.8.498.99.{number}", rows=2, columns=2)
        picture.StudyInstanceUID = study
        archive(here, picture)
    with open_door(there) as destination:
        peer = Peer("dest", "DERM_NODE", "127.0.0.1", destination.port)
        with door_of(here, peer) as door, asking(door) as association:
            final, _, _ = move(association, identifier("STUDY", StudyInstanceUID=study), "DERM_NODE")
        assert (final.Status, counts(final)) == (SUCCESS, (None, 150, 0, 0))
        destination.settle()
        assert destination.events.counts["association.accepted"] == 3
    assert there.count() == 150
    here.database.close()
    there.database.close()


def test_move_is_cancelled_while_the_receiver_is_slow(rooms: Rooms) -> None:
    """C-CANCEL while an answer is awaited: FE00 comes soon, the association to the receiver is given up, what was not sent remains."""
    pictures = study_of(rooms, 5)
    go_on, answered = threading.Event(), threading.Event()

    def slowly(uid: str) -> int:
        if uid != pictures[0].SOPInstanceUID:
            go_on.wait(60)
            answered.set()
        return SUCCESS

    received = Received(answer=slowly)
    with receiving(received) as destination, door_of(rooms, destination.peer, answer_s=60.0) as door, asking(door) as association:
        responses = association.send_c_move(of_study(pictures), "DEST", STUDY_MOVE, msg_id=3)
        assert next(responses)[0].Status == PENDING
        association.send_c_cancel(3, query_model=STUDY_MOVE)
        final, answer = next(responses)
        assert not answered.is_set()
        go_on.set()
    assert final.Status == CANCELLED
    assert counts(final) in {(3, 1, 1, 0), (4, 1, 0, 0)}
    assert failed(answer) in ([pictures[1].SOPInstanceUID], [])


# -- both ------------------------------------------------------------------------------------------------------------------------------


def test_more_instances_than_the_limit(rooms: Rooms) -> None:
    """A701, and nothing is sent."""
    pictures = study_of(rooms, 3)
    with door_of(rooms, maximum_instances=2) as door, asking(door) as association:
        final, _, pending = get(association, of_study(pictures))
    assert (final.Status, pending) == (CANNOT_COUNT, [])
    assert "retrieve them in parts" in final.ErrorComment


def test_no_more_instances_than_can_be_counted(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of a response are 16 bits: whatever the setting, what they cannot tell is refused with A701."""
    pictures = study_of(rooms, 3)
    assert COUNTABLE == 65_535
    monkeypatch.setattr(retrieve, "COUNTABLE", 2)
    with door_of(rooms, maximum_instances=100_000) as door, asking(door) as association:
        assert get(association, of_study(pictures))[0].Status == CANNOT_COUNT


def test_only_who_may_retrieve(rooms: Rooms) -> None:
    """A peer without the right, and an unknown caller, get their contexts refused."""
    sender = StorageSCU(ae_title="DERM_NODE")
    service = RetrieveSCP(database=rooms.database, archive=rooms.archive, audit=rooms.audit, peers=Peers(), sender=sender)
    peers = Peers([Peer("may", "MAY", "127.0.0.1"), Peer("not", "NOT", "127.0.0.1", retrieve=False)])
    with open_door(rooms, peers=peers, accept_unknown_peers=True, services=(service,)) as door:
        for title, accepted in (("MAY", True), ("NOT", False), ("STRANGER", False)):
            entity = AE(title)
            entity.add_requested_context(STUDY_GET)
            entity.add_requested_context("1.2.840.10008.1.1")
            association = entity.associate("127.0.0.1", door.port, ae_title="DERM_NODE")
            assert (STUDY_GET in [context.abstract_syntax for context in association.accepted_contexts]) is accepted
            association.release()


def test_single_instances_are_named_in_the_audit_trail(rooms: Rooms) -> None:
    """Each instance that is asked for by itself is a record by itself."""
    pictures = study_of(rooms, 3)
    keys = {"StudyInstanceUID": pictures[0].StudyInstanceUID, "SeriesInstanceUID": pictures[0].SeriesInstanceUID}
    with door_of(rooms) as door, asking(door) as association:
        get(association, identifier("IMAGE", SOPInstanceUID=[pictures[0].SOPInstanceUID, pictures[2].SOPInstanceUID], **keys))
    actions = [[entry.event.action for entry in rooms.audit.events_of(picture.SOPInstanceUID)] for picture in pictures]
    assert ["instance.retrieved" in one for one in actions] == [True, False, True]


def test_a_long_retrieval_does_not_end_the_association(rooms: Rooms) -> None:
    """The requestor of a C-MOVE is silent for longer than the idle limit, as it should be; afterwards it asks again."""
    pictures = study_of(rooms, 2)

    def slowly(_uid: str) -> int:
        time.sleep(1.0)
        return SUCCESS

    with (
        receiving(Received(answer=slowly)) as destination,
        door_of(rooms, destination.peer, limits=ReceiveLimits(idle_s=1.0)) as door,
        asking(door) as association,
    ):
        assert move(association, of_study(pictures))[0].Status == SUCCESS
        assert move(association, identifier("STUDY", StudyInstanceUID="1.2.3.4"))[0].Status == SUCCESS


def test_a_requestor_that_vanishes_leaves_nothing(rooms: Rooms) -> None:
    """An abort within C-GET ends the operation and its association; the door goes on."""
    pictures = study_of(rooms, 3)
    with door_of(rooms) as door:
        with asking(door) as association:
            responses = association.send_c_get(of_study(pictures), STUDY_GET)
            next(responses)
            association.abort()
        door.settle()
        with asking(door) as association:
            assert get(association, of_study(pictures))[0].Status == SUCCESS
