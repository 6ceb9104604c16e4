"""Where reports go: routes that name peers which are there, which are not there yet, and which are gone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from structlog.testing import capture_logs

from dicom_node.config import load
from dicom_node.node import routing
from dicom_node.peers import Peer, Peers
from dicom_node.routes import Route, Routing
from storage.records import Origin

CAMERA = Origin(door="dimse", received_at=datetime.now(UTC), peer="camera")
PACS = Peer("pacs", "PACS", "192.0.2.1", 104, deliver=("sr",))


def test_the_first_route_that_fits() -> None:
    """By sender, HTTP door or any; without a route back to the sender; only what and whom can be delivered to."""
    peers = Peers([PACS, Peer("camera", "CAMERA", "192.0.2.2", 104), Peer("caller", "CALLER", "*", 0)])
    routing = Routing(peers=peers, routes=[Route("dicomweb", ("pacs",)), Route("camera", ("camera", "pacs", "pacs", "caller"))])
    assert routing.destinations(CAMERA, "summary") == ("camera", "pacs")
    assert routing.destinations(CAMERA, "segmentation") == ("camera",)
    assert routing.destinations(Origin("dicomweb", CAMERA.received_at), "summary") == ("pacs",)
    assert routing.destinations(Origin("dimse", CAMERA.received_at, peer="pacs"), "findings") == ("pacs",)
    assert routing.destinations(Origin("dimse", CAMERA.received_at, peer="caller"), "findings") == ()
    assert routing.nobodys() == []


def test_a_route_may_name_who_is_not_there_yet() -> None:
    """What is for a peer that is added later has its delivery made now; a sender who is no peer any more is sent nothing."""
    routing = Routing(peers=Peers([PACS]), routes=[Route("camera", ("later", "pacs"))])
    assert routing.destinations(CAMERA, "segmentation") == ("later",)
    assert routing.destinations(CAMERA, "summary") == ("later", "pacs")
    assert routing.nobodys() == ["camera", "later"]
    back = Routing(peers=Peers(), routes=[])
    assert back.destinations(CAMERA, "summary") == ()
    itself = Routing(peers=Peers(), routes=[Route("*", ("camera",))])
    assert itself.destinations(CAMERA, "summary") == ()


def test_the_start_says_which_routes_name_nobody(tmp_path: Path) -> None:
    """A route to who is no peer yet is no fault, but said at the start of who decides about routes, with what to do."""
    path = tmp_path / "node.toml"
    path.write_text('[[routes]]\nto = ["later", "pacs"]\n[[peers]]\nname = "pacs"\nae_title = "PACS"\nhost = "192.0.2.1"\nport = 104\n')
    with capture_logs() as logs:
        routing(load(path, {}), Peers([PACS]))
    assert [(one["event"], one["peer"]) for one in logs] == [("route.nobody", "later")]
    assert "`dicom-node peers add later ...`" in logs[0]["reason"]
