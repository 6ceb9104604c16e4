"""The identity of a node: made once, kept whatever happens to the power, and never made anew for a folder that has one."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicom_node import config, storehouse
from dicom_node.cli import app
from dicom_node.config import Settings
from storage.database import Database
from storage.errors import Unavailable
from storage.keys import Ring
from storage.nodes import Incarnation, Nodes


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of an archive that is there, and empty."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path / "data"))
    settings = config.load(None)
    storehouse.folder(storehouse.folder(settings.node.data_dir) / "keys")
    database = storehouse.open_database(settings, Ring.create(settings.ring_file))
    database.migrate()
    database.close()
    return settings


@pytest.fixture
def database(settings: Settings) -> Database:
    """Of the archive."""
    return storehouse.open_database(settings, Ring.load(settings.ring_file))


def test_the_identity_is_flushed_before_it_is_used(settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the file under a name of its own, with its content; then the folder, once the name is there. For us alone; it stays."""
    path = settings.node.data_dir / "node_id"
    flushed: list[object] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            flushed.append(sorted(name for name in os.listdir(descriptor) if "node_id" in name))
        else:
            flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    made = storehouse.node_id(settings, database)
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert flushed == [17, ["node_id"]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert storehouse.node_id(settings, database) == made
    database.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 17, b"0123456789ABCDEF\n", b"\xff\xfe", b"0123456789abcdef\n0123456789abcdef\n"])
def test_a_spoilt_identity_is_refused_with_the_remedy(settings: Settings, database: Database, content: bytes) -> None:
    """Nothing is made in its place; where the database knows host and folder, the sentence has what to write into it."""
    path = settings.node.data_dir / "node_id"
    path.write_bytes(content)
    with pytest.raises(Unavailable, match=r"node_id holds no identity.*table `nodes`"):
        storehouse.node_id(settings, database)
    place = {"host": socket.gethostname(), "data_dir": str(settings.node.data_dir.resolve())}
    Nodes(database=database).enter(node_id="00000000000000aa", incarnation=Incarnation("first"), version="1", **place)
    with pytest.raises(Unavailable, match="for this host and folder 00000000000000aa"):
        storehouse.node_id(settings, database)
    assert path.read_bytes() == content
    database.close()
    said = CliRunner().invoke(app, ["nodes"])
    assert said.exit_code == 1
    assert "holds no identity" in " ".join(said.stderr.split())
    path.write_text("00000000000000aa\n")
    assert CliRunner().invoke(app, ["nodes"]).exit_code == 0
