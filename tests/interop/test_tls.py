"""DCMTK with TLS, both ways: it calls our door, and receives from us; what must not come in or go out does not, in words."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.dimse.query import QuerySCP
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scu import StorageSCU, Stored
from dicom_node.errors import PeerUnreachable
from dicom_node.peers import Peer, Peers
from dicom_node.security import ClientTls, ServerTls
from tests.certificates import SERVER, Authority, Pair
from tests.dicom_node.door import Door, Rooms, draw, open_door, open_rooms, save
from tests.dicom_node.test_scu import held
from tests.interop.test_dcmtk import PROPOSE, data_set_bytes, drawn, run, tool
from tests.interop.tunnel import tunnel
from tests.ports import free_port

pytestmark = pytest.mark.peer


@dataclass
class Keys:
    """An authority with a pair for the door and one for the modality."""

    folder: Path
    authority: Authority
    door: Pair
    modality: Pair
    tls: ServerTls

    def options(self, pair: Pair | None = None, authority: Authority | None = None) -> list[object]:
        """DCMTK's options of a good caller."""
        pair = pair or self.modality
        return ["+tls", pair.key, pair.certificate, "+cf", (authority or self.authority).file]

    def ours(self) -> ClientTls:
        """TLS of our calls."""
        return ClientTls(self.authority.file, self.door.certificate, self.door.key)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Certificates for the module; the revocation list names one that nobody else uses."""
    folder = tmp_path_factory.mktemp("keys")
    authority = Authority(folder)
    door, modality = authority.issue("door"), authority.issue("modality")
    revocations = authority.revoke(authority.issue("revoked"))
    tls = ServerTls(door.certificate, door.key, authorities=authority.file, revocations=revocations, watch_s=0.0)
    return Keys(folder, authority, door, modality, tls)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def door(rooms: Rooms, keys: Keys) -> Iterator[Door]:
    """One door by TLS for the module; it asks for certificates."""
    with open_door(rooms, tls=keys.tls.context) as door:
        yield door


def echo(door: Door, *options: object) -> subprocess.CompletedProcess[str]:
    """Call with echoscu."""
    return run("echoscu", "-aec", "DERM_NODE", "-to", "10", *options, "127.0.0.1", door.port)


@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_echoscu_in_each_profile(door: Door, keys: Keys, profile: str) -> None:
    """The three living profiles of DCMTK (BCP 195 non-downgrading, plain and extended) get through."""
    done = echo(door, *keys.options(), profile)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("profile", ["+pa", "+pn"])
def test_retired_profiles_find_nothing_in_common(door: Door, keys: Keys, profile: str) -> None:
    """The retired profile of CBC suites speaks TLS 1.0 and is refused; that without encryption is too."""
    suites = ["+cs", "TLS_RSA_WITH_AES_128_CBC_SHA"] if profile == "+pa" else []
    done = echo(door, *keys.options(), profile, *suites)
    if profile == "+pa" and done.returncode == 0:
        # DCMTK 3.6.7 lets this profile fall forward to TLS 1.2 with suites of BCP 195: then nothing weak was spoken
        assert "CBC" not in done.stderr
        return
    assert done.returncode != 0


def bad_callers(keys: Keys) -> dict[str, list[object]]:
    """Options of callers that must not come in."""
    stranger = Authority(keys.folder / "stranger", "stranger")
    authority = keys.authority
    revoked = Pair(keys.folder / "revoked.crt", keys.folder / "revoked.key", keys.modality.x509)
    return {
        "plain": [],
        "no certificate": ["+tla", "+cf", authority.file],
        "unknown authority": keys.options(stranger.issue("x")),
        "self-signed": keys.options(authority.issue("self", self_signed=True)),
        "expired": keys.options(authority.issue("expired", begins_days=-5, ends_days=-1)),
        "wrong purpose": keys.options(authority.issue("purpose", purposes=SERVER)),
        "revoked": keys.options(revoked),
        "does not know us": keys.options(authority=stranger),
    }


def test_callers_that_must_not_come_in(door: Door, keys: Keys) -> None:
    """Plain DICOM, no certificate, a foreign, self-signed, expired, revoked one, one of another use: none comes in (84, 85)."""
    accepted = door.events.counts["association.accepted"]
    for kind, options in bad_callers(keys).items():
        assert echo(door, *options).returncode != 0, kind
    assert door.events.counts["association.accepted"] == accepted
    assert echo(door, *keys.options()).returncode == 0


@pytest.mark.parametrize("syntax", list(PROPOSE), ids=[syntax.keyword for syntax in PROPOSE])
def test_storescu_in_every_kind_of_syntax(door: Door, keys: Keys, tmp_path: Path, syntax: str) -> None:
    """By TLS as without: the bytes sent are the bytes archived."""
    path = drawn(tmp_path / "picture.dcm", syntax)
    sent = run("storescu", "-v", "-aec", "DERM_NODE", *keys.options(), PROPOSE[syntax], "127.0.0.1", door.port, path)  # type: ignore[index]
    assert sent.returncode == 0, sent.stderr
    assert "Received Store Response (Success)" in sent.stderr
    with door.rooms.archive.open(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) as stored:
        assert stored.record.summary.transfer_syntax_uid == syntax
        if syntax != DeflatedExplicitVRLittleEndian:  # deflated anew by DCMTK
            assert b"".join(stored.chunks()) == data_set_bytes(path)


@pytest.mark.parametrize("pdu", [4096, 131_072])
def test_big_instance(door: Door, keys: Keys, tmp_path: Path, pdu: int) -> None:
    """32 MB arrive whole, in PDUs that many records of TLS fill and in PDUs that many fit into one read."""
    path = save(draw(rows=4096, columns=4096), tmp_path / "big.dcm")
    sent = run("storescu", "-aec", "DERM_NODE", *keys.options(), "--max-send-pdu", pdu, "127.0.0.1", door.port, path)
    assert sent.returncode == 0, sent.stderr
    with door.rooms.archive.open(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) as stored:
        assert b"".join(stored.chunks()) == data_set_bytes(path)


def test_senders_without_tls_of_their_own(door: Door, keys: Keys, tmp_path: Path) -> None:
    """Two dcmsend at once through a TLS tunnel, as sites do with stunnel: all instances of both are stored."""
    count = door.rooms.count()
    context = keys.ours().context()
    with tunnel(door.port, context) as port:
        senders = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            for number in range(20):
                save(draw(rows=64, columns=64, seed=number), tmp_path / name / f"{number}.dcm")
            command = [tool("dcmsend"), "-aec", "DERM_NODE", "127.0.0.1", str(port), "+sd", str(tmp_path / name)]
            senders.append(subprocess.Popen(command, stderr=subprocess.PIPE))
        for sender in senders:
            _, errors = sender.communicate(timeout=120)
            assert sender.returncode == 0, errors
    assert door.rooms.count() == count + 40


def test_sender_killed_in_mid_store(door: Door, keys: Keys, tmp_path: Path) -> None:
    """A storescu that dies within an instance, by TLS, leaves nothing behind."""
    path = save(draw(rows=6000, columns=6000), tmp_path / "big.dcm")
    count = door.rooms.count()
    options = [str(option) for option in keys.options()]
    sender = subprocess.Popen(
        [tool("storescu"), "-aec", "DERM_NODE", *options, "--max-send-pdu", "4096", "127.0.0.1", str(door.port), str(path)]
    )
    while not door.rooms.landing():
        assert sender.poll() is None, "the sender ended before it could be killed"
        time.sleep(0.001)
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    door.settle()
    assert door.rooms.landing() == []
    assert door.rooms.count() == count


def test_certificate_swapped_under_load(rooms: Rooms, tmp_path: Path) -> None:
    """While senders store, the door's pair is replaced again and again: no association is dropped, and handshakes show the newest."""
    authority = Authority(tmp_path / "keys")
    pair, modality = authority.issue("door"), authority.issue("modality")
    keys = Keys(tmp_path, authority, pair, modality, ServerTls(pair.certificate, pair.key, authorities=authority.file, watch_s=0.0))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        for number in range(150):
            save(draw(rows=128, columns=128, seed=number), folder / f"{number}.dcm")
    options = [str(option) for option in keys.options()]
    with open_door(rooms, tls=keys.tls.context) as door:
        count = rooms.count()
        command = [tool("storescu"), "-aec", "DERM_NODE", *options, "127.0.0.1", str(door.port), "+sd"]
        # each of the two senders keeps one association throughout
        senders = [subprocess.Popen([*command, str(folder)], stderr=subprocess.PIPE) for folder in folders]
        swaps = 0
        while swaps < 3 or any(sender.poll() is None for sender in senders):
            renewed = authority.issue(f"renewed-{swaps}", ends_days=100 + swaps)
            renewed.copy_to(pair.certificate, pair.key)
            client = ClientTls(authority.file, modality.certificate, modality.key)
            StorageSCU(ae_title="CHECKER", tls=client).echo(
                Peer("door", "DERM_NODE", "127.0.0.1", door.port, tls=True, certificate=renewed.fingerprint)
            )
            assert echo(door, *options).returncode == 0
            swaps += 1
        for sender in senders:
            _, errors = sender.communicate(timeout=120)
            assert sender.returncode == 0, errors
        assert door.events.counts["association.violation"] == door.events.counts["association.failed"] == 0
    assert rooms.count() == count + 300


def test_query_and_retrieve(keys: Keys, tmp_path: Path) -> None:
    """DCMTK's findscu by TLS of its own, getscu and movescu through a tunnel, the move's sub-operations by TLS to storescp: all get it."""
    (tmp_path / "house").mkdir()
    rooms = open_rooms(tmp_path / "house")
    pictures = [draw(rows=700, columns=700) for _ in range(3)]
    for picture in pictures[1:]:
        picture.StudyInstanceUID, picture.SeriesInstanceUID = pictures[0].StudyInstanceUID, pictures[0].SeriesInstanceUID
    study = ["-S", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={pictures[0].StudyInstanceUID}"]
    with receiving("storescp", tmp_path / "moved", *keys.options()) as receiver:
        peers = Peers([receiver])
        shared: dict[str, Any] = {"database": rooms.database, "audit": rooms.audit, "unknown_peers": True}
        sender = StorageSCU(ae_title="DERM_NODE", tls=keys.ours())
        services = [
            QuerySCP(ae_title="DERM_NODE", **shared),
            RetrieveSCP(archive=rooms.archive, peers=peers, sender=sender, **shared),
        ]
        with open_door(rooms, peers=peers, accept_unknown_peers=True, tls=keys.tls.context, services=services) as door:
            ours = Peer("door", "DERM_NODE", "127.0.0.1", door.port, tls=True)
            assert [outcome for _, outcome in sender.store(ours, [held(picture) for picture in pictures])] == [Stored(0)] * 3
            found = run("findscu", "-v", "-aec", "DERM_NODE", *keys.options(), *study, "-k", "PatientID", "127.0.0.1", door.port)
            assert found.returncode == 0, found.stderr
            assert "drawn-1" in found.stderr + found.stdout
            with tunnel(door.port, keys.ours().context()) as port:
                (tmp_path / "got").mkdir()
                got = run("getscu", "-aec", "DERM_NODE", *study, "+B", "-od", tmp_path / "got", "127.0.0.1", port)
                assert got.returncode == 0, got.stderr
                moved = run("movescu", "-aec", "DERM_NODE", "-aem", "RECEIVER", *study, "127.0.0.1", port)
                assert moved.returncode == 0, moved.stderr
    rooms.database.close()
    for folder in ("got", "moved"):
        received = {pydicom.dcmread(path).SOPInstanceUID for path in (tmp_path / folder).iterdir()}
        assert received == {picture.SOPInstanceUID for picture in pictures}, folder


# We call


PROFILE = """
[[TransferSyntaxes]]
[Plain]
TransferSyntax1 = LittleEndianExplicit
TransferSyntax2 = LittleEndianImplicit
[[PresentationContexts]]
[Contexts]
PresentationContext1 = VerificationSOPClass\\Plain
PresentationContext2 = SecondaryCaptureImageStorage\\Plain
[[Profiles]]
[Default]
PresentationContexts = Contexts
"""
"""What dcmrecv accepts."""


@contextmanager
def receiving(program: str, folder: Path, *options: object) -> Iterator[Peer]:
    """DCMTK's storescp or dcmrecv by TLS, writing what it receives bit for bit."""
    folder.mkdir()
    port = free_port()
    how = ["+xa", "+B"] if program == "storescp" else ["+B"]
    process = subprocess.Popen(
        [tool(program), "-aet", "RECEIVER", *how, *map(str, options), "-od", str(folder), str(port)], stderr=subprocess.DEVNULL
    )
    try:
        wait_for_listener(port, process)
        yield Peer("receiver", "RECEIVER", "127.0.0.1", port, tls=True)
    finally:
        process.terminate()
        process.wait()


def wait_for_listener(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until something listens."""
    lines = Path("/proc/net/tcp")
    for _ in range(400):
        if f":{port:04X} 00000000:0000 0A" in lines.read_text():
            return
        assert process.poll() is None, "it did not start"
        time.sleep(0.025)
    pytest.fail("it does not listen")


@pytest.mark.parametrize("program", ["storescp", "dcmrecv"])
def test_receivers_get_what_is_stored(keys: Keys, tmp_path: Path, program: str) -> None:
    """A batch in two syntaxes reaches DCMTK by mutual TLS, byte for byte."""
    batch = [held(draw(rows=1500, columns=1000)), held(draw(), syntax=ImplicitVRLittleEndian)]
    profile = tmp_path / "profile.cfg"
    profile.write_text(PROFILE)
    what = ["-xf", profile, "Default"] if program == "dcmrecv" else []
    with receiving(program, tmp_path / "received", *keys.options(), *what) as peer:
        scu = StorageSCU(ae_title="DERM_NODE", tls=keys.ours())
        scu.echo(peer)
        assert [outcome for _, outcome in scu.store(peer, batch)] == [Stored(0)] * len(batch)
        received = {data_set_bytes(path) for path in (tmp_path / "received").iterdir()}
    assert received == {instance.data for instance in batch}


def told(action: Callable[[], object]) -> str:
    """What the operator reads."""
    with pytest.raises(PeerUnreachable) as caught:
        action()
    return str(caught.value)


def test_receivers_that_are_not_who_they_should_be(keys: Keys, tmp_path: Path) -> None:
    """Self-signed, expired, another host, a foreign authority: nothing is sent, and the words name fault and remedy (row 95)."""
    stranger = Authority(tmp_path / "stranger", "stranger")
    servers = {
        "self-signed": keys.authority.issue("own", self_signed=True),
        "expired": keys.authority.issue("old", begins_days=-5, ends_days=-1),
        "another address": keys.authority.issue("elsewhere", hosts=["192.0.2.7"]),
        "authority we do not know": stranger.issue("foreign"),
    }
    scu = StorageSCU(ae_title="DERM_NODE", tls=keys.ours())
    for number, (word, pair) in enumerate(servers.items()):
        with receiving("storescp", tmp_path / str(number), *keys.options(pair)) as peer:
            said = told(lambda peer=peer: scu.echo(peer))  # type: ignore[misc]
            assert word in said
            assert "peer receiver" in said


def test_receivers_that_refuse_us(keys: Keys, tmp_path: Path) -> None:
    """A receiver that wants a certificate, or does not know ours, is told of in words; so is plain DICOM against TLS, both ways round."""
    without, foreign = ClientTls(keys.authority.file), Authority(tmp_path / "other", "other").issue("us")
    unknown = ClientTls(keys.authority.file, foreign.certificate, foreign.key)
    with receiving("storescp", tmp_path / "tls", *keys.options()) as peer:
        assert "wants a certificate" in told(lambda: StorageSCU(ae_title="US", tls=without).echo(peer))
        assert "does not know the authority of our certificate" in told(lambda: StorageSCU(ae_title="US", tls=unknown).echo(peer))
        plain = Peer("receiver", "RECEIVER", peer.host, peer.port)
        assert "receiver" in told(lambda: StorageSCU(ae_title="US", connect_s=2.0).echo(plain))
        assert "not configured" in told(lambda: StorageSCU(ae_title="US").echo(peer))
    with receiving("storescp", tmp_path / "plain") as peer:
        said = told(lambda: StorageSCU(ae_title="US", connect_s=2.0, tls=keys.ours()).echo(peer))
        assert "plain DICOM" in said


def test_our_own_door_called_by_ourselves(door: Door, keys: Keys) -> None:
    """Our caller and our door understand each other by TLS, eight associations at once; a large batch goes through."""
    peer = Peer("door", "DERM_NODE", "localhost", door.port, tls=True, certificate=keys.door.fingerprint)
    outcomes: list[object] = []

    def send() -> None:
        scu = StorageSCU(ae_title="US", tls=keys.ours())
        outcomes.extend(outcome for _, outcome in scu.store(peer, [held(draw(rows=400, columns=400)) for _ in range(5)]))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Stored(0)] * 40


def test_newest_protocol(door: Door, keys: Keys) -> None:
    """The door speaks TLS 1.3 where the caller does."""
    with socket.create_connection(("127.0.0.1", door.port)) as connection, keys.ours().secure(connection, host="127.0.0.1") as secured:
        assert secured.version() == "TLSv1.3"
