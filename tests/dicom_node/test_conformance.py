"""The conformance statement says what the doors do: its tables are compared with the doors themselves."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dicom_node.config import Settings
from dicom_node.conformance import COMPUTED, ROUTES, conformance, served, statement, stored_classes
from dicom_node.dimse import query
from dicom_node.dimse.query import QuerySCP
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scu import StorageSCU
from dicom_node.document import Document
from dicom_node.peers import Peers
from dicomweb.app import make_app
from storage.iod import TRANSFER_SYNTAXES
from storage.records import INDEXED
from tests.dicom_node.commitment_peer import open_office
from tests.dicom_node.door import SECONDARY_CAPTURE, open_rooms

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    """docs/conformance.md is what `dicom-node conformance` prints of the default configuration; run it again after a change."""
    assert (ROOT / "docs" / "conformance.md").read_text() == statement(Settings()).markdown()


def test_the_services_are_the_door_s(tmp_path: Path) -> None:
    """What the statement lists beside Verification and Storage is what the services say of themselves, with their transfer syntaxes."""
    rooms = open_rooms(tmp_path)
    office = open_office(rooms, [])
    sender = StorageSCU(ae_title="A")
    services = [
        QuerySCP(database=rooms.database, audit=rooms.audit, ae_title="A"),
        RetrieveSCP(database=rooms.database, archive=rooms.archive, audit=rooms.audit, peers=Peers(), sender=sender),
        office.service,
    ]
    assert served() == {uid: syntaxes for service in services for uid, syntaxes in service.abstract_syntaxes.items()}
    rooms.database.close()


async def test_the_routes_are_the_router_s(tmp_path: Path) -> None:
    """Each resource and method of the HTTP door is in the statement, and no other."""
    rooms = open_rooms(tmp_path)
    app = make_app(archive=rooms.archive, index=rooms.index, audit=rooms.audit, base_path="/base")
    served_here = set()
    for route in app.router.routes():
        path = re.sub(r":[^{}]*\}", "}", str(route.resource.canonical if route.resource is not None else ""))
        if route.method in {"GET", "POST"}:
            served_here.add((path.removeprefix("/base"), route.method))
    assert served_here == {(path, method) for path, method, *_ in ROUTES}
    await app.cleanup()
    rooms.database.close()


def test_the_keys_are_the_query_s() -> None:
    """Counted attributes are those that the query service counts, and every attribute of the index stands in the statement."""
    assert dict(COMPUTED) == dict(query._COMPUTED)
    text = statement(Settings()).markdown()
    for keyword in INDEXED:
        assert re.search(rf"\b{keyword}\b", text), keyword


def test_classes_and_syntaxes() -> None:
    """Every transfer syntax that can be stored, and each storage class of PS3.6, retired ones too, is listed with its UID."""
    text = statement(Settings()).markdown()
    classes = stored_classes()
    assert len(classes) > 150
    assert {SECONDARY_CAPTURE, "1.2.840.10008.5.1.4.1.1.77.1.4", "1.2.840.10008.5.1.4.1.1.3"} <= set(classes)
    for uid in (*classes, *TRANSFER_SYNTAXES):
        assert f"| {uid} |" in text, uid


def test_it_follows_the_configuration() -> None:
    """AE title, port, limits and doors that are switched off are those of the configuration in force."""
    settings = Settings.model_validate(
        {"dimse": {"ae_title": "SKIN", "port": 104, "idle_s": 7, "unknown_sop_classes": True}, "dicomweb": {"enabled": False}}
    )
    text = statement(settings).markdown()
    assert "`SKIN`" in text
    assert "aborted after 7 s" in text
    assert "private and unknown ones too" in text
    assert "Switched off in this configuration (`dicomweb.enabled = false`)" in text
    assert "speaks no TLS" in text
    assert "not looked at in this configuration" in text
    secured = {"enabled": True, "certificate": "a.pem", "key": "a.pem", "authorities": "a.pem"}
    text = statement(Settings.model_validate({"tls": secured, "identities": {"mode": "required"}})).markdown()
    assert "callers must show a certificate; revocation lists are not looked at" in text
    assert "callers must identify themselves" in text
    without = statement(Settings.model_validate({"dimse": {"enabled": False}})).markdown()
    assert "as SCP it offers nothing" in without
    assert "MODEL - FIND" not in without.upper()


class Outline(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what is linked and what can be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.anchors: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        told = dict(attrs)
        if tag != "meta":
            self.open.append(tag)
        self.anchors.add(told.get("id") or "")
        self.links.add((told.get("href") or "#").removeprefix("#"))

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        assert self.open.pop() == tag


def test_html() -> None:
    """The page is well-formed, its contents lead to its sections, and it loads nothing from elsewhere."""
    page = statement(Settings()).html()
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert outline.links <= outline.anchors | {""}
    assert "src=" not in page
    assert "http-equiv" not in page


def test_documents_escape() -> None:
    """What would be markup is text, in both forms; a table with a row too short is a mistake of ours."""
    document = Document("a < b")
    document.heading(1, "one")
    document.heading(2, "one one")
    document.heading(1, "two & three")
    document.table(("a|b",), [("`<script>`",)])
    document.bullets("x")
    assert "## 2 two & three" in document.markdown()
    assert "### 1.1 one one" in document.markdown()
    assert "| a\\|b |" in document.markdown()
    assert "<script>" not in document.html()
    assert "<code>&lt;script&gt;</code>" in document.html()
    with pytest.raises(ValueError, match="cells"):
        document.table(("a", "b"), [("c",)])


def test_the_command(tmp_path: Path) -> None:
    """The command prints Markdown, or writes HTML to a file; a file that cannot be written is a sentence."""
    app = typer.Typer()
    app.command()(conformance)
    config = tmp_path / "node.toml"
    config.write_text('[dimse]\nae_title = "SKIN"\n')
    printed = CliRunner().invoke(app, ["--config", str(config)])
    assert printed.exit_code == 0
    assert printed.stdout.startswith("# DICOM conformance statement of dicom-node\n")
    assert "`SKIN`" in printed.stdout
    page = tmp_path / "statement.html"
    assert CliRunner().invoke(app, ["--html", "--output", str(page), "--config", str(config)]).exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    failed = CliRunner().invoke(app, ["--output", str(tmp_path / "no" / "x"), "--config", str(config)])
    assert failed.exit_code == 1
    assert "name another file" in failed.stderr
