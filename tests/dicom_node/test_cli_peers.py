"""`dicom-node peers` and `dicom-node refusals`, as an operator types them, against a real archive and a real door."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from click.testing import Result
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from typer.testing import CliRunner

from dicom_node import node, storehouse
from dicom_node.cli_peers import peers_app, refusals
from dicom_node.config import load
from dicom_node.dimse.scp import StorageSCP
from dicom_node.environment import findings
from dicom_node.peers import Peers
from storage.audit import AuditTrail
from storage.known_peers import KnownPeers
from storage.records import JobKind, NewJob
from storage.refusals import Refusals
from storage.visits import Visits
from tests.ports import free_port

app = typer.Typer()
app.add_typer(peers_app, name="peers")
app.command("refusals")(refusals)


class Site:
    """A prepared archive with its configuration file."""

    def __init__(self, folder: Path, toml: str = "") -> None:
        self.config = folder / "node.toml"
        self.config.write_text(f'[node]\ndata_dir = "{folder}/var"\n{toml}')
        self.settings = load(self.config, {})
        node._prepare(self.settings)

    def run(self, line: str, *, expect: int = 0) -> Result:
        """Run a command line of `dicom-node`."""
        done = CliRunner().invoke(app, [*shlex.split(line), "--config", str(self.config)])
        assert done.exit_code == expect, f"{line}: {done.output} {done.exception}"
        return done

    @contextmanager
    def parts(self) -> Iterator[storehouse.Storehouse]:
        """Its archive."""
        with storehouse.storage(self.settings) as parts:
            yield parts


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A node with a configured peer."""
    return Site(tmp_path, '[[peers]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n')


def names(site: Site) -> set[str]:
    """The peers there are."""
    return {peer["name"] for peer in json.loads(site.run("peers list --json").stdout)}


def test_add_list_show_remove(site: Site) -> None:
    """A peer is added with all its settings, listed beside the configured one, shown, and removed; the audit trail has both."""
    done = site.run(
        "peers add camera --ae-title CAM --host 10.0.0.9 --port 4242 --no-retrieve --deliver sr --max-associations 3 --acknowledge archive "
        f"--tls --commit --certificate {':'.join(['AB'] * 32)}"
    )
    assert "CAM at 10.0.0.9 port 4242 by TLS, may store here" in done.stdout
    assert "set dimse.host" in done.stderr
    told = {peer["name"]: peer for peer in json.loads(site.run("peers list --json").stdout)}
    assert told["pacs"]["source"] == "configuration"
    assert told["camera"] == {
        "name": "camera", "ae_title": "CAM", "host": "10.0.0.9", "port": 4242, "accept": True, "retrieve": False, "deliver": ["sr"],
        "max_associations": 3, "certificate": "ab" * 32, "tls": True, "commit": True, "acknowledge": "archive", "source": "added",
        "last_seen": None, "last_refused": None,
    }  # fmt: skip
    lines = site.run("peers list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "pacs", "camera"]
    shown = site.run("peers show camera").stdout
    assert "added 2" in shown
    assert "by operator" in shown
    assert site.run("peers remove camera").stdout.startswith("peer camera removed")
    assert names(site) == {"pacs"}
    with site.parts() as parts:
        assert [entry.event.action for entry in parts.audit.entries()][-2:] == ["peer.added", "peer.removed"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("peers add pacs --ae-title OTHER --host 10.0.0.1", "NAME: the name 'pacs' stands twice"),
        ("peers add two --ae-title PACS --host 127.0.0.1", "is peer 'pacs' already"),
        ("peers add two --ae-title 'A\\B'", "--ae-title: use 1 to 16 printable"),
        ("peers add two --ae-title TWO --host 10.0.0.1/8", "--host: use an IP address"),
        ("peers add two --ae-title TWO --deliver pdf", "--deliver: pdf: use sr and seg"),
        ("peers add two --ae-title TWO --port 99999", "--port: use 1 to 65535"),
        ("peers add two --ae-title TWO --certificate sha256:00:11", "openssl x509"),
        ("peers add node --ae-title TWO", "reserved"),
        ("peers remove pacs", "stands in the configuration"),
        ("peers remove nobody", "no peer is called nobody"),
        ("peers show nobody", "known: pacs"),
        ("peers echo", "name a peer, or use --all"),
        ("peers echo nobody", "no peer is called nobody"),
    ],
)
def test_what_cannot_be_done_is_said(site: Site, line: str, words: str) -> None:
    """Each mistake is one sentence with the option that it is about, and nothing is changed."""
    assert words in site.run(line, expect=1).stderr
    assert names(site) == {"pacs"}


def test_added_twice(site: Site) -> None:
    """A second peer of an added one's name, or of its AE title and host, is refused."""
    site.run("peers add two --ae-title TWO --host 10.0.0.2")
    assert "stands twice" in site.run("peers add two --ae-title THREE --host 10.0.0.3", expect=1).stderr
    assert "is peer 'two' already" in site.run("peers add three --ae-title TWO --host 10.0.0.2", expect=1).stderr
    assert names(site) == {"pacs", "two"}


def test_removing_says_what_waits(site: Site) -> None:
    """Who removes a peer learns how many reports wait for it; they stay."""
    site.run("peers add two --ae-title TWO --host 10.0.0.2 --port 104")
    with site.parts() as parts:
        parts.database.write(lambda connection: parts.queue.enqueue(connection, NewJob(JobKind.DELIVER, "1.2.3", lane="two")))
    assert "reports waiting:  1" in site.run("peers show two").stdout
    assert "1 report waits for it" in site.run("peers remove two").stderr
    with site.parts() as parts:
        assert KnownPeers(database=parts.database, audit=parts.audit).waiting("two") == 1


def test_a_running_door_knows_them_at_once(site: Site) -> None:
    """A door rejects a caller, accepts it once `peers add` has returned and the list is read again, rejects it after `peers remove`."""
    with site.parts() as parts:
        added = KnownPeers(database=parts.database, audit=AuditTrail(database=parts.database)).all
        peers = Peers(storehouse.peers_of(site.settings), added=added, refresh_s=0.0, answer_s=60.0)
        door = StorageSCP(archive=parts.archive, peers=peers, ae_title="DERM_NODE", port=0)
        _, port = door.start()
        try:
            assert not _echoes(port)
            site.run("peers add new --ae-title NEW --host 127.0.0.1")
            assert _echoes(port)
            site.run("peers remove new")
            assert not _echoes(port)
        finally:
            door.stop(0.0)


def _echoes(port: int) -> bool:
    entity = AE(ae_title="NEW")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", port, ae_title="DERM_NODE")
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return bool(status.Status == 0)


def test_echo(site: Site) -> None:
    """`peers echo` calls one peer or all, says which answers, and what to look at where one does not; its exit status tells both apart."""
    entity = AE(ae_title="LIVE")
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False)
    try:
        site.run(f"peers add live --ae-title LIVE --host 127.0.0.1 --port {server.server_address[1]}")
        site.run(f"peers add dead --ae-title DEAD --host 127.0.0.1 --port {free_port()}")
        site.run("peers add caller --ae-title CALLER")
        assert "live: LIVE at 127.0.0.1 port" in site.run("peers echo live").stdout
        both = site.run("peers echo --all", expect=1)
        assert "is it running, and is the port open?" in both.stdout
        assert "answers C-ECHO" in both.stdout
        assert "caller" not in both.stdout
        assert "2 of 3 did not answer" in both.stderr  # nor does pacs
    finally:
        server.shutdown()


def test_when_a_peer_was_seen_last(site: Site) -> None:
    """The list and the page of a peer tell when it associated last, and from where; of one that never did they do not."""
    site.run("peers add camera --ae-title CAM --host 10.0.0.9")
    assert "last seen:        -" in site.run("peers show pacs").stdout
    with site.parts() as parts, Visits(database=parts.database) as visits:
        visits.note("pacs", "127.0.0.1")
    told = {peer["name"]: peer["last_seen"] for peer in json.loads(site.run("peers list --json").stdout)}
    assert datetime.now(UTC) - datetime.fromisoformat(told["pacs"]) < timedelta(hours=1)
    assert told["camera"] is None
    assert " at 127.0.0.1\n" in site.run("peers show pacs").stdout


def test_refusals_are_shown(site: Site) -> None:
    """The diary is a table with why and what to do, newest first, for one peer alone, and as JSON; an empty one says so."""
    assert "nothing was refused" in site.run("refusals").stderr
    with site.parts() as parts, Refusals(database=parts.database, every_s=0.01) as diary:
        remedy = "`dicom-node peers add NAME --ae-title NEW --host 10.0.0.7`"
        diary.note(kind="association", reason="no peer", remedy=remedy, address="10.0.0.7", calling_ae_title="NEW\x1b[1m")
        assert diary.flush()
        diary.note(kind="instance", reason="0xC000", peer="pacs", address="10.0.0.8", calling_ae_title="PACS")
        assert diary.flush()
    shown = site.run("refusals").stdout
    assert shown.index("pacs: 'PACS' at 10.0.0.8") < shown.index("'NEW\\x1b[1m' at 10.0.0.7")
    assert f"--ae-title NEW --host 10.0.0.7 --config {site.config}`" in shown
    assert "NEW" not in site.run("refusals --peer pacs").stdout
    assert [one["kind"] for one in json.loads(site.run("refusals --json --limit 1").stdout)] == ["instance"]
    assert "0xC000" in site.run("peers show pacs").stdout
    assert json.loads(site.run("peers list --json").stdout)[0]["last_refused"] is not None


def test_check_knows_the_added_peers(tmp_path: Path) -> None:
    """`dicom-node check` calls those that were added too; it says which routes name nobody yet, and when nobody may store."""
    toml = (
        f'[dimse]\nhost = "0.0.0.0"\nwithout_peers = "listen"\nport = {free_port()}\n'
        '[dicomweb]\nenabled = false\n[admin]\nenabled = false\n[inference]\nenabled = false\n[[routes]]\nto = ["later"]\n'
    )
    site = Site(tmp_path, toml)

    def told() -> dict[str, tuple[bool | None, str]]:
        return {one.subject: (one.passed, one.text) for one in findings(site.settings)}

    before = told()
    assert before["routes"][0] is None
    assert "`dicom-node peers add later" in before["routes"][1]
    assert before["peers"][0] is None
    site.run(f"peers add later --ae-title LATER --host 127.0.0.1 --port {free_port()}")
    after = told()
    assert after["peer later"][0] is False
    assert "reports wait until it answers" in after["peer later"][1]
    assert not {"routes", "peers"} & after.keys()
