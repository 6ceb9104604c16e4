"""Peers: who is meant by a call, what may stand beside what, and the list that changes while the node runs."""

from __future__ import annotations

import ipaddress
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from structlog.testing import capture_logs

from dicom_node import config
from dicom_node.peers import HostNames, Peer, Peers, clashes, faults, network_of
from storage.audit import AuditTrail
from storage.database import Database
from storage.errors import Unavailable
from storage.known_peers import KnownPeer, KnownPeers
from tests.storage.support import open_database

FINGERPRINT = "ab" * 32


def known(name: str, **settings: object) -> KnownPeer:
    """An added peer."""
    told = {"ae_title": name.upper(), "host": "10.0.0.1", **settings}
    return KnownPeer(name, told, datetime(2026, 1, 1, tzinfo=UTC), "operator")


@given(st.text(max_size=18) | st.text("AZ az\\\x1f~", max_size=18))
@example("A" * 16)
@example("A" * 17)
def test_an_ae_title_is_what_the_configuration_takes(text: str) -> None:
    """A peer that is added obeys the same rule for AE titles as one of the configuration."""
    try:
        TypeAdapter(config.AETitle).validate_python(text)
    except ValidationError:
        allowed = False
    else:
        allowed = True
    assert ("ae_title" in dict(faults(Peer("one", text, "*")))) is not allowed


@given(st.text(max_size=70) | st.text("Aa0_.-", max_size=70))
@example("a" * 64)
@example("a" * 65)
def test_a_name_is_what_the_configuration_takes(text: str) -> None:
    """The same of names."""
    try:
        TypeAdapter(config.Name).validate_python(text)
    except ValidationError:
        allowed = False
    else:
        allowed = True
    assert ("name" in dict(faults(Peer(text, "ONE", "*")))) is not allowed


@pytest.mark.parametrize(
    "host", ["10.1.2.3", "pacs", "pacs.example.org", "my_pacs", "::1", "fe80::1%eth0", "10.0.0.0/8", "2001:db8::/32", "*"]
)
def test_hosts(host: str) -> None:
    """Addresses, host names, networks and the star are hosts."""
    assert not faults(Peer("one", "ONE", host))


@pytest.mark.parametrize(
    "host", ["", "10.1.2", "10.1.2.3/8", "10.0.0.0/40", "a b", "pacs:104", "http://pacs", "x/y", "-", "a" * 254, "300.1.1.1"]
)
def test_no_hosts(host: str) -> None:
    """What a resolver would make something else of, or nothing, is refused; a network with bits of a host is a mistake."""
    assert "host" in dict(faults(Peer("one", "ONE", host)))


def test_other_faults() -> None:
    """Each setting that is wrong is named, all at once."""
    peer = Peer("dicomweb", "ONE", "*", port=-1, deliver=("pdf",), max_associations=-1, certificate="x y", tls=True)
    assert {key for key, _ in faults(peer)} == {"name", "port", "deliver", "max_associations", "certificate", "host"}


@pytest.mark.parametrize(
    "certificate", ["", FINGERPRINT, ":".join(["AB"] * 32), f"sha256 Fingerprint={FINGERPRINT.upper()}", "pacs.example"]
)
def test_certificates(certificate: str) -> None:
    """A SHA-256 fingerprint, however it was copied, or a name, is taken."""
    assert not faults(Peer("one", "ONE", "10.0.0.1", certificate=certificate))


@pytest.mark.parametrize("certificate", ["sha1:" + "ab" * 20, "00112233445566778899aabbccddeeff", "two words"])
def test_no_certificates(certificate: str) -> None:
    """A fingerprint of another digest would match nothing: it is refused."""
    assert "certificate" in dict(faults(Peer("one", "ONE", "10.0.0.1", certificate=certificate)))


def test_settings_come_back() -> None:
    """What is written of a peer makes the same peer; what a newer version added is passed over, a wrong type is not."""
    peer = Peer("one", "ONE", "10.0.0.1", 104, False, True, ("sr",), 3, FINGERPRINT, True, True, "archive")
    assert Peer.of_settings("one", peer.settings()) == peer
    assert Peer.of_settings("one", {**peer.settings(), "of_the_future": 1}) == peer
    with pytest.raises(ValueError, match="port"):
        Peer.of_settings("one", {**peer.settings(), "port": "104"})
    with pytest.raises(ValueError, match="ae_title"):
        Peer.of_settings("one", {**peer.settings(), "ae_title": "\\"})


def test_clashes() -> None:
    """A name, or an AE title at one host, stands for one peer; the same AE title elsewhere is another."""
    one = Peer("one", "ONE", "pacs.example")
    assert [key for key, _ in clashes(Peer("one", "TWO", "10.0.0.1"), [one])] == ["name"]
    assert [key for key, _ in clashes(Peer("two", "ONE", "PACS.example."), [one])] == ["ae_title"]
    assert not clashes(Peer("two", "ONE", "other.example"), [one])


def test_the_nearest_is_meant() -> None:
    """A caller is the peer of its address; else of the narrowest network around it; else one from anywhere; else nobody."""
    peers = Peers([
        Peer("anywhere", "ONE", "*"),
        Peer("wide", "ONE", "10.0.0.0/8"),
        Peer("narrow", "ONE", "10.1.0.0/16"),
        Peer("exact", "ONE", "10.1.2.3"),
        Peer("six", "ONE", "2001:db8::/32"),
        Peer("named", "TWO", "localhost"),
    ])  # fmt: skip
    meant = {
        "10.1.2.3": "exact", "::ffff:10.1.2.3": "exact", "10.1.2.4": "narrow", "10.2.0.1": "wide", "11.0.0.1": "anywhere",
        "2001:db8::9": "six",
    }  # fmt: skip
    for address, name in meant.items():
        found = peers.by_calling("ONE ", address)
        assert found is not None
        assert found.name == name
    named = peers.by_calling("TWO", "127.0.0.1")
    assert named is not None
    assert named.name == "named"
    assert peers.by_calling("TWO", "10.1.2.3") is None
    assert peers.by_calling("THREE", "10.1.2.3") is None
    assert not Peer("wide", "ONE", "10.0.0.0/8").callable


@given(st.ip_addresses(), st.integers(0, 128), st.ip_addresses())
def test_networks(base: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: int, caller: ipaddress.IPv4Address) -> None:
    """A peer of a network is who calls from inside of it, whatever the two IP versions are."""
    network = ipaddress.ip_network((base, min(prefix, base.max_prefixlen)), strict=False)
    assert network_of(str(network)) == network
    meant = Peers([Peer("one", "ONE", str(network))]).by_calling("ONE", str(caller))
    mapped = getattr(caller, "ipv4_mapped", None)
    assert (meant is not None) is ((mapped or caller) in network)


def test_peers_that_are_added_are_known_without_a_restart(tmp_path: Path) -> None:
    """A peer added by another process is known once the list is read again, and unknown again once removed; the configured one stays."""
    database = open_database(tmp_path)
    database.migrate()
    elsewhere = open_database(tmp_path)
    theirs = KnownPeers(database=elsewhere, audit=AuditTrail(database=elsewhere))
    ours = KnownPeers(database=database, audit=AuditTrail(database=database))
    peers = Peers([Peer("first", "FIRST", "*")], added=ours.all, refresh_s=0.0, answer_s=60.0)
    assert [peer.name for peer in peers] == ["first"]
    added = Peer("pacs", "PACS", "10.0.0.9", 104)
    theirs.add("pacs", added.settings(), actor="operator", check=lambda _: None)
    assert peers.by_calling("PACS", "10.0.0.9") == added
    assert len(peers) == 2
    assert peers.get("pacs") == added
    theirs.remove("pacs", actor="operator")
    assert peers.get("pacs") is None
    database.close()
    elsewhere.close()


def test_the_list_is_not_read_at_every_call() -> None:
    """A list that is not too old is not read again: a door may ask for every association."""
    reads: list[int] = []

    def read() -> list[KnownPeer]:
        reads.append(1)
        return [known("pacs")]

    peers = Peers(added=read, refresh_s=3600.0)
    for _ in range(100):
        assert peers.get("pacs") is not None
    assert len(reads) == 1


def test_without_the_database_the_last_list_holds() -> None:
    """While the list cannot be read the last one holds, said once; when it can again, the new one does."""
    answers: list[list[KnownPeer] | Unavailable] = [[known("pacs")], *[Unavailable("the database is away: wait")] * 3, []]
    peers = Peers(added=lambda: _given(answers), refresh_s=0.0, answer_s=60.0)
    with capture_logs() as logs:
        for _ in range(4):
            assert peers.by_calling("PACS", "10.0.0.1") is not None
        assert peers.by_calling("PACS", "10.0.0.1") is None
    assert [entry["event"] for entry in logs].count("peers.unavailable") == 1


def _given(answers: list[list[KnownPeer] | Unavailable]) -> list[KnownPeer]:
    answer = answers.pop(0)
    if isinstance(answer, Unavailable):
        raise answer
    return answer


def test_a_database_that_hangs_holds_nobody_up() -> None:
    """While a read hangs, callers go on with the last list, all of them, and one read is under way, not one for each."""
    release = threading.Event()
    reads: list[int] = []

    def read() -> list[KnownPeer]:
        reads.append(1)
        if len(reads) > 1:
            release.wait(60)
        return [known("pacs")] if len(reads) == 1 else []

    peers = Peers(added=read, refresh_s=0.0, answer_s=0.05)
    assert peers.get("pacs") is not None
    try:
        for _ in range(3):
            assert peers.get("pacs") is not None
        assert len(reads) == 2
    finally:
        release.set()
    while peers.get("pacs") is not None:  # in the end the new list is there
        assert len(reads) < 1000


def test_who_looks_up_a_name_takes_the_old_list_while_a_new_one_is_read() -> None:
    """Between one and two ages of the list a name is looked up in the old one, however long reading takes; callers in the new."""
    reads: list[int] = []
    release = threading.Event()

    def read() -> list[KnownPeer]:
        reads.append(1)
        if len(reads) > 1:
            release.wait(60)
        return [known("pacs")] if len(reads) == 1 else []

    peers = Peers(added=read, refresh_s=1000.0, answer_s=3600.0)
    assert peers.get("pacs") is not None
    peers._read_at -= 1500.0
    assert peers.get("pacs") is not None  # else it would wait for an hour
    release.set()
    assert peers.by_calling("PACS", "10.0.0.1") is None
    assert len(reads) == 2


def test_what_clashes_with_the_configuration_is_passed_over() -> None:
    """An added peer whose name, or AE title and host, the configuration has since is passed over, as is an unreadable one; said once."""
    rows = [known("pacs"), known("twin", ae_title="ONE", host="10.0.0.5"), known("broken", port="x"), known("good")]
    peers = Peers([Peer("pacs", "OURS", "10.0.0.4"), Peer("one", "ONE", "10.0.0.5")], added=lambda: rows, refresh_s=0.0, answer_s=60.0)
    with capture_logs() as logs:
        for _ in range(3):
            assert {peer.name for peer in peers} == {"pacs", "one", "good"}
    assert sorted(entry["peer"] for entry in logs if entry["event"] == "peer.passed_over") == ["broken", "pacs", "twin"]
    pacs = peers.get("pacs")
    assert pacs is not None
    assert pacs.ae_title == "OURS"


def test_a_closed_database_is_an_outage(tmp_path: Path) -> None:
    """A list that is read from a database closed meanwhile is the last known one."""
    database: Database = open_database(tmp_path)
    database.migrate()
    ours = KnownPeers(database=database, audit=AuditTrail(database=database))
    ours.add("pacs", Peer("pacs", "PACS", "10.0.0.1").settings(), actor="operator", check=lambda _: None)
    peers = Peers(added=ours.all, refresh_s=0.0, answer_s=60.0)
    assert len(peers) == 1
    database.close()
    assert len(peers) == 1


def test_the_last_addresses_hold_while_a_host_name_does_not_resolve() -> None:
    """An outage of the name service makes no stranger of a peer; it is not asked at every call; and what it never knew may come yet."""
    answers = [frozenset({"10.0.0.1"}), frozenset[str](), frozenset({"10.0.0.2"})]
    asked: list[str] = []

    def resolve(host: str) -> frozenset[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    peers = Peers([Peer("one", "ONE", "one.example")], host_names=HostNames(resolve, fresh_s=0.0))
    assert [peers.by_calling("ONE", "10.0.0.1") is not None for _ in range(3)] == [True, True, False]
    assert peers.by_calling("ONE", "10.0.0.2") is not None
    assert not peers.unknown_for_now("ONE")

    asked.clear()
    lasting = HostNames(resolve)
    assert lasting.addresses("one.example") == lasting.addresses("one.example") == {"10.0.0.1"}
    assert asked == ["one.example"]

    forgotten = HostNames(resolve, fresh_s=0.0, kept_s=-1.0)
    asked.clear()
    assert forgotten.addresses("one.example") == frozenset()

    nowhere = Peers([Peer("one", "ONE", "one.example"), Peer("two", "TWO", "*")], host_names=HostNames(lambda _: frozenset()))
    assert nowhere.by_calling("ONE", "10.0.0.1") is None
    assert nowhere.unknown_for_now("ONE")
    assert not nowhere.unknown_for_now("OTHER")


def test_host_names_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers come and go: what was resolved longest ago is forgotten."""
    monkeypatch.setattr("dicom_node.peers._HOST_NAMES", 2)
    asked: list[str] = []
    names = HostNames(lambda host: frozenset({asked.append(host) or "10.0.0.1"}))
    for host in ("a", "b", "c", "c", "a"):
        names.addresses(host)
    assert asked == ["a", "b", "c", "a"]


def test_nobody_is_a_stranger_before_the_added_peers_were_read() -> None:
    """A node that starts while its database is away tells unknown callers to come again."""
    answers: list[list[KnownPeer] | Unavailable] = [Unavailable("away"), [known("one")]]
    peers = Peers(added=lambda: _given(answers), refresh_s=0.0, answer_s=5.0)
    assert peers.by_calling("ONE", "10.0.0.1") is None
    assert Peers(added=lambda: _given([Unavailable("away")]), answer_s=5.0).unknown_for_now("ONE")
    assert peers.by_calling("ONE", "10.0.0.1") is not None
    assert not peers.unknown_for_now("OTHER")


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of threads the last list holds; once there are some, it is read."""
    peers = Peers(added=lambda: [known("one")], refresh_s=0.0, answer_s=5.0)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert peers.get("one") is None
    assert peers.get("one") is not None
