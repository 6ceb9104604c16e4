"""`dicom-node doctor` against a running node and peers over real sockets: what works, what does not, and the words for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
import typer
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    Comprehensive3DSRStorage,
    SegmentationStorage,
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
    VLPhotographicImageStorage,
)
from typer.testing import CliRunner

from dicom_node.config import Settings, load
from dicom_node.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE
from dicom_node.dimse.probe import Probe
from dicom_node.doctor import Check, Doctor, doctor
from dicom_node.peers import Peer
from dicom_node.security import ClientTls, ServerTls
from dicom_node.specimen import SOP_CLASS_UID, STUDY_INSTANCE_UID, SYNTAXES, specimen
from storage.kinds import newest_kinds
from tests.certificates import Authority
from tests.dicom_node.commitment_peer import CommitmentPeer, Taken, information
from tests.dicom_node.door import open_door, open_rooms
from tests.ports import free_port
from tests.system.running_node import RunningNode, running_node

GOOD = (Verification, Comprehensive3DSRStorage, SegmentationStorage, VLPhotographicImageStorage)
QUERY = StudyRootQueryRetrieveInformationModelFind


@contextmanager
def receiver(*classes: UID, handlers: dict[object, Callable[..., object]] | None = None, accept: str = "") -> Iterator[Peer]:
    """A peer over a real socket."""
    entity = AE(ae_title="PACS")
    for uid in classes:
        entity.add_supported_context(uid)
    if accept:
        entity.require_calling_aet = [accept]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=list((handlers or {}).items()))
    try:
        yield Peer("pacs", "PACS", "127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()


def examined(peer: Peer, *, store: bool = False, sent: tuple[tuple[str, str], ...] = ()) -> list[Check]:
    """What the doctor says of a peer."""
    one = Doctor(Settings(), [peer], sent=sent, probe=lambda title: Probe(ae_title=title, connect_s=5.0, answer_s=10.0), store=store)
    return list(one.peer(peer))


def failures(checks: list[Check]) -> list[str]:
    """The sentences of what did not pass."""
    return [check.text for check in checks if check.passed is False]


def no_match(event: evt.Event) -> Iterator[tuple[int, None]]:
    """Answer a query: nothing."""
    return iter(())


def any_match(event: evt.Event) -> Iterator[tuple[int, Dataset]]:
    """Answer every query with a study."""
    found = Dataset()
    found.QueryRetrieveLevel = "STUDY"
    found.StudyInstanceUID = "1.2.3"
    yield 0xFF00, found


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).keyword)
def test_specimens(syntax: str) -> None:
    """Each test instance decodes, is marked as what it is, is the same whenever it is made, and gets no analysis."""
    from inference.pipeline import analysable  # noqa: PLC0415

    one = specimen(syntax)
    data_set = pydicom.dcmread(BytesIO(one.content))
    assert data_set.pixel_array.shape == (64, 64)
    assert int(data_set.pixel_array[63, 63]) in range(120, 132)
    assert (data_set.PatientID, data_set.StudyInstanceUID, str(data_set.file_meta.TransferSyntaxUID)) == (
        "DICOM-NODE-DOCTOR",
        STUDY_INSTANCE_UID,
        syntax,
    )
    assert specimen(syntax).content == one.content
    assert not analysable(one.summary)


def test_a_good_peer() -> None:
    """A peer that takes our reports and answers queries passes in every point; nothing is stored there unless it is asked for."""
    stored: list[str] = []

    def keep(event: evt.Event) -> int:
        stored.append(str(event.dataset.PatientID))
        return 0

    handlers = {evt.EVT_C_FIND: no_match, evt.EVT_C_STORE: keep, evt.EVT_N_ACTION: lambda _: (0x0000, None)}
    with receiver(*GOOD, QUERY, StorageCommitmentPushModel, handlers=handlers) as peer:
        checks = examined(peer)
        assert not failures(checks)
        assert not stored
        said = " / ".join(check.text for check in checks)
        for words in (
            "answers C-ECHO",
            "takes Comprehensive 3D SR Storage in Explicit",
            "storage commitment",
            "no match",
            "nothing was stored",
        ):
            assert words in said
        assert not failures(examined(peer, store=True))
    assert stored == ["DICOM-NODE-DOCTOR"]


def test_a_peer_that_takes_no_reports() -> None:
    """What a peer does not take of what it is to be sent fails, with a remedy on both sides; what only a retrieval would send is said."""
    with receiver(Verification, SegmentationStorage) as peer:
        checks = examined(peer, sent=((SOP_CLASS_UID, "1.2.840.10008.1.2.4.50"),), store=True)
    (fault,) = failures(checks)
    assert "does not take Comprehensive 3D SR Storage" in fault
    assert "take sr out of what it is sent" in fault
    assert any("VL Photographic Image Storage in JPEG Baseline" in check.text for check in checks)
    assert any("takes no photographs" in check.text for check in checks if check.passed is None)


def test_a_peer_that_refuses() -> None:
    """A peer that does not know us, calls itself otherwise, or refuses what is stored: each has its sentence."""
    with receiver(*GOOD, accept="OTHER") as peer:
        (fault,) = failures(examined(peer))
        assert "rejected the association" in fault
        assert "DERM_NODE" in fault
    with receiver(*GOOD, handlers={evt.EVT_C_STORE: lambda _: 0xA700}) as peer:
        (fault,) = failures(examined(peer, store=True))
        assert "A700" in fault
    with receiver(*GOOD[1:]) as peer:
        assert "does not answer C-ECHO" in failures(examined(peer))[0]


@pytest.mark.parametrize(
    ("event_type", "status", "passed", "words"),
    [
        (1, 0, True, "commits the test instance"),
        (2, 0, False, "does not commit what it has just stored"),
        (0, 0, None, "its report did not come at once"),
        (0, 0x0110, False, "refused storage commitment with status 0x0110"),
    ],
)
def test_a_peer_that_commits_or_not(event_type: int, status: int, passed: bool | None, words: str) -> None:
    """A peer that offers storage commitment is asked to commit the test instance; what comes of it is told apart."""

    def report(taken: Taken) -> None:
        if event_type:
            pairs = taken.references
            told = (
                information(taken.transaction_uid, pairs) if event_type == 1 else information(taken.transaction_uid, (), {pairs[0]: 0x0112})
            )
            arguments = (told, event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE)
            threading.Timer(0.2, taken.association.send_n_event_report, arguments).start()  # behind the answer to the request

    with CommitmentPeer(on_action=report, action_status=status) as pacs:
        checks = examined(Peer("pacs", "PACS", "127.0.0.1", pacs.port), store=True)
        (taken,) = pacs.await_actions(1)
    assert [uid for _, uid in taken.references] == pacs.stored
    (check,) = [check for check in checks if words in check.text]
    assert check.passed is passed


def test_a_peer_that_should_commit_and_does_not_offer_it() -> None:
    """A peer that our reports are to be committed by, and that offers no storage commitment, fails with the setting."""
    with receiver(*GOOD) as peer:
        (fault,) = failures(examined(replace(peer, commit=True)))
    assert "set commit = false" in fault


def test_a_peer_that_matches_wrongly() -> None:
    """A peer that finds a study nobody has, or refuses the query, is told apart."""
    with receiver(*GOOD, QUERY, handlers={evt.EVT_C_FIND: any_match}) as peer:
        assert "1 matches for a study that nobody has" in failures(examined(peer))[0]
    with receiver(*GOOD, QUERY, handlers={evt.EVT_C_FIND: lambda _: iter([(0xA700, None)])}) as peer:
        assert "refused a query with status 0xA700" in failures(examined(peer))[0]


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (Peer("pacs", "PACS", "127.0.0.1", free_port()), "nobody listens at 127.0.0.1"),
        (Peer("pacs", "PACS", "no-such-host.invalid", 104), "does not resolve"),
    ],
)
def test_a_peer_that_is_not_there(peer: Peer, words: str) -> None:
    """Name and port are told apart, before anything of DICOM."""
    assert words in failures(examined(peer))[0]


def test_a_peer_that_only_calls() -> None:
    """A peer without an address is not tried, and does not fail."""
    (check,) = examined(Peer("camera", "CAM", "10.0.0.0/8", 0))
    assert check.passed is None


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A running node without a laboratory."""
    with running_node(tmp_path_factory.mktemp("doctor"), environ={"DICOM_NODE_INFERENCE__ENABLED": "false"}) as node:
        yield node


def of_node(node: RunningNode, *, store: bool) -> list[Check]:
    """What the doctor says of the node and its doors."""
    settings = load(node.config, {name: value for name, value in node.environ.items() if name.startswith("DICOM_NODE_")})
    return list(Doctor(settings, [], probe=lambda title: Probe(ae_title=title), store=store).all())


def test_a_healthy_node(node: RunningNode) -> None:
    """Every check of a healthy node passes; without --store nothing is stored, with it each syntax goes in, and one out by WADO-RS."""
    checks = of_node(node, store=False)
    assert not failures(checks)
    assert [check.subject for check in checks if check.passed is None] == ["own door, DIMSE", "own door, DICOMweb"]
    with node.parts() as parts:
        assert newest_kinds(parts.database) == []
    for _ in range(2):  # the second time the same instances are there already
        checks = of_node(node, store=True)
        assert not failures(checks)
        said = [check.text for check in checks]
        assert sum(text.startswith("stores ") for text in said) == len(SYNTAXES)
        for words in ("STOW-RS: stored", "QIDO-RS finds the test study", "WADO-RS gives back the very bytes"):
            assert words in said
    with node.parts() as parts:
        assert {syntax for _, syntax in newest_kinds(parts.database)} == set(SYNTAXES)


def test_the_command(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command tells of the node and each peer, also one that was added; status 1 when something does not pass; JSON for programs."""
    for name, value in node.environ.items():
        if name.startswith("DICOM_NODE_"):
            monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(doctor)

    def run(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [*arguments, "--config", str(node.config)])
        return done.exit_code, done.stdout, done.stderr

    code, told, _ = run()
    assert code == 0, told
    assert "own door, DIMSE: answers C-ECHO" in told
    assert run("nobody")[0] == 1
    with receiver(*GOOD) as peer, node.parts() as parts:
        from storage.known_peers import KnownPeers  # noqa: PLC0415

        known = KnownPeers(database=parts.database, audit=parts.audit)
        known.add("pacs", peer.settings(), actor="test", check=lambda _: None)
        code, told, _ = run("pacs", "--json")
        assert code == 0, told
        assert {check["subject"] for check in json.loads(told)} == {"peer pacs"}
    code, told, said = run("pacs")
    assert code == 1
    assert "nobody listens" in told
    assert "1 of 1 did not pass" in said


@pytest.mark.parametrize(("names", "passed"), [(("localhost", "127.0.0.1"), True), (("node.example",), None)])
def test_an_own_door_with_tls(tmp_path: Path, names: tuple[str, ...], passed: bool | None) -> None:
    """Our own door is called by TLS when it speaks that; a certificate for others' name of it is no fault, and is said."""
    authority = Authority(tmp_path / "pki")
    pair = authority.issue("node", hosts=names)
    rooms = open_rooms(tmp_path)
    tls = ServerTls(pair.certificate, pair.key, authorities=authority.file)
    with open_door(rooms, tls=tls.context) as door:
        told = {"enabled": True, "certificate": pair.certificate, "key": pair.key, "authorities": authority.file}
        settings = Settings.model_validate({"dimse": {"port": door.port}, "tls": told})
        client = ClientTls(authority.file, pair.certificate, pair.key)
        first, *_ = Doctor(settings, [], probe=lambda title: Probe(ae_title=title, tls=client)).own_dimse()
    rooms.database.close()
    assert first.passed is passed, first.text
    assert ("does not bear 127.0.0.1" in first.text) is (passed is None)


def test_an_own_door_that_wants_names() -> None:
    """Where callers have to identify themselves the doctor does not try, and says so."""
    settings = Settings.model_validate({"identities": {"mode": "required"}})
    (check,) = Doctor(settings, [], probe=lambda title: Probe(ae_title=title)).own_dimse()
    assert check.passed is None
    assert "identities.mode" in check.text


class ForgetfulWeb(BaseHTTPRequestHandler):
    """An HTTP door that says Success, and loses the last byte of what it stores."""

    def do_GET(self) -> None:
        """Search and retrieve."""
        one = specimen(SYNTAXES[0])
        if "/instances/" in self.path:
            self._answer(one.content[:-1], "application/dicom")
        elif "2.25.1&" in self.path:
            self._answer(b"[]")
        else:
            self._answer(json.dumps([{"0020000D": {"vr": "UI", "Value": [one.summary.study_instance_uid]}}]).encode())

    def do_POST(self) -> None:
        """Store."""
        while (size := int(self.rfile.readline().strip(), 16)) > 0:  # chunks, to the last
            self.rfile.read(size + 2)
        stored = {"00081155": {"vr": "UI", "Value": [specimen(SYNTAXES[0]).sop_instance_uid]}}
        self._answer(json.dumps({"00081199": {"vr": "SQ", "Value": [stored]}}).encode())

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def _answer(self, body: bytes, kind: str = "application/dicom+json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_web_door_that_loses_bytes() -> None:
    """An HTTP door that stores, finds, and gives back one byte less does not pass: what comes back is compared."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ForgetfulWeb)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        settings = Settings.model_validate({"dicomweb": {"port": server.server_port}})
        checks = list(Doctor(settings, [], probe=lambda title: Probe(ae_title=title), store=True).own_dicomweb())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (fault,) = failures(checks)
    assert "WADO-RS does not give the instance back" in fault


def test_a_node_that_does_not_run(tmp_path: Path) -> None:
    """Of a node that does not run the doctor says so, with what starts it."""
    environ = {
        "DICOM_NODE_NODE__DATA_DIR": str(tmp_path / "var"), "DICOM_NODE_DIMSE__PORT": str(free_port()),
        "DICOM_NODE_DICOMWEB__PORT": str(free_port()), "DICOM_NODE_INFERENCE__ENABLED": "false",
    }  # fmt: skip
    checks = list(Doctor(load(None, environ), [], probe=lambda title: Probe(ae_title=title)).all())
    assert [text for text in failures(checks) if "`dicom-node serve`" in text] == failures(checks)
    assert len(failures(checks)) == 2


def test_a_node_that_does_not_know_the_doctor(node: RunningNode) -> None:
    """A door that lets in peers alone rejects the doctor, who says how to be let in."""
    environ = {name: value for name, value in node.environ.items() if name.startswith("DICOM_NODE_")}
    settings = load(node.config, {**environ, "DICOM_NODE_DIMSE__AE_TITLE": "OTHER"})
    (check,) = Doctor(settings, [], probe=lambda title: Probe(ae_title=title)).own_dimse()
    assert not check.passed
    assert "`dicom-node peers add doctor --ae-title DN_DOCTOR --host 127.0.0.1`" in check.text


def test_probes_ask_for_more_than_one_association_holds() -> None:
    """More pairs than contexts fit into one association are asked for in several."""
    pairs = [(SOP_CLASS_UID, f"1.2.840.10008.1.2.99.{number}") for number in range(250)] + [(SOP_CLASS_UID, str(ExplicitVRLittleEndian))]
    with receiver(*GOOD) as peer:
        visit = Probe(ae_title="DERM_NODE").visit(peer, pairs)
    assert visit.pairs == {pairs[-1]}
    assert visit.echo == 0
