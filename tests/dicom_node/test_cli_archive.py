"""The commands of those who look after an archive, typed against a real one in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicom_node import config, storehouse
from dicom_node.cli import app
from storage.actor import operator
from storage.duties import Duties
from storage.keys import Ring
from storage.nodes import Incarnation

LOST = "00000000000000aa"
Type = Callable[..., Result]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Type a command; the archive is there, empty, and no node runs."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DICOM_NODE_CARE__RETENTION_DAYS", "30")
    settings = config.load(None)
    (tmp_path / "keys").mkdir(mode=0o700)
    database = storehouse.open_database(settings, Ring.create(settings.ring_file))
    database.migrate()
    database.close()
    return lambda *words, **options: CliRunner().invoke(app, words, **options)


@contextmanager
def opened() -> Iterator[storehouse.Storehouse]:
    """Open the archive that the commands use."""
    with storehouse.storage(config.load(None)) as parts:
        yield parts


def test_a_node_is_declared_lost(typed: Type) -> None:
    """The list shows it with what lies there; it is asked before; a wrong number is refused; afterwards the list says lost."""
    with opened() as parts:
        first = Incarnation("first")
        parts.nodes.enter(node_id=LOST, incarnation=first, host="one", data_dir="/data", version="1")
        parts.nodes.leave(LOST, first)
    assert "+0.0 s" in typed("nodes").stdout
    assert "stopped" in typed("nodes").stdout
    assert typed("nodes", "lost", "0" * 16, "--yes").exit_code == 1
    assert typed("nodes", "lost", LOST, input="n\n").exit_code == 1
    assert "stopped" in typed("nodes").stdout
    done = typed("nodes", "lost", LOST, "--yes")
    assert (done.exit_code, "declared lost: 0 found, 0 lost" in done.stdout) == (0, True)
    assert " lost " in typed("nodes").stdout


def test_a_clock_that_is_doubted_is_confirmed(typed: Type) -> None:
    """`retention` says that the clock is doubted and what to type; typed, it is believed."""
    with opened() as parts:
        Duties(database=parts.database, holder="").put("retention", cursor="2016-11-21T00:00:00+00:00")
    doubted = typed("retention")
    assert (doubted.exit_code, "retention --confirm-clock" in doubted.stderr) == (1, True)
    assert typed("retention", "--confirm-clock").exit_code == 0
    assert typed("retention").exit_code == 0


def test_a_key_is_changed(typed: Type) -> None:
    """Added, rotated, the former one removed: the list shows the new one alone, and the audit trail what was done."""
    with opened() as parts:
        former = parts.ring.primary_key_id
    assert typed("keys", "remove", former).exit_code == 1
    for words in (("add", "--promote"), ("rotate",), ("remove", former)):
        assert typed("keys", *words).exit_code == 0
    assert former not in typed("keys", "list").stdout
    with opened() as parts:
        assert [entry.event.action for entry in parts.audit.entries()] == ["keys.added", "keys.rotated", "keys.removed"]


def test_nothing_is_backed_up_into_the_node(typed: Type, tmp_path: Path) -> None:
    """`backup` into the data folder, where it would write over the archive's own folders, is a sentence, and nothing is written."""
    refused = typed("backup", str(tmp_path / "backups"))
    assert (refused.exit_code, "Name a folder on another disk" in refused.stderr) == (1, True)
    assert not (tmp_path / "backups").exists()


@pytest.fixture
def written(typed: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the configuration of the archive to a file, which nothing but --config names; without it the defaults hold, of no archive."""
    monkeypatch.delenv("DICOM_NODE_NODE__DATA_DIR")
    monkeypatch.chdir(tmp_path.parent)
    file = tmp_path / "node.toml"
    file.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
    return str(file)


def test_the_group_takes_the_configuration(typed: Type, written: str) -> None:
    """`nodes --config X lost ID` looks at X, as `nodes lost ID --config X` does, and says so in its hint."""
    for words in (("nodes", "--config", written, "lost", LOST, "--yes"), ("nodes", "lost", LOST, "--yes", "--config", written)):
        refused = typed(*words)
        assert refused.exit_code == 1
        assert f"no node {LOST} is registered; `dicom-node nodes --config {written}` shows those that are" in refused.stderr


def test_hints_about_keys_can_be_typed(typed: Type, written: str) -> None:
    """What `keys add` and `keys rotate` tell to do next carries the program and the configuration."""
    assert f"`dicom-node keys rotate --config {written}`" in typed("keys", "add", "--config", written).stdout
    assert f"`dicom-node keys list --config {written}`" in typed("keys", "rotate", "--config", written).stdout


def test_the_ring_moves_with_the_database(typed: Type, written: str, tmp_path: Path) -> None:
    """`migrate` to a folder without a ring, or with another: the old one is to be copied, and no new one made. With it, all is moved."""
    new = tmp_path / "new"
    (new / "keys").mkdir(parents=True, mode=0o700)
    file = tmp_path / "new.toml"
    file.write_text(f'[node]\ndata_dir = "{new}"\n')
    ring, copy = tmp_path / "keys" / "ring.json", new / "keys" / "ring.json"
    words = ("migrate", "--config", written, "--to", str(file))
    refused = typed(*words)
    assert (refused.exit_code, f"copy {ring} there" in refused.stderr, "keys init" in refused.output) == (1, True, False)
    Ring.create(copy)
    refused = typed(*words)
    assert (refused.exit_code, f"{copy} is another ring" in refused.stderr) == (1, True)
    copy.write_bytes(ring.read_bytes())
    assert typed(*words).exit_code == 0
    with storehouse.storage(config.load(file)) as parts:
        (event,) = (entry.event for entry in parts.audit.entries())
    assert (event.action, event.actor) == ("archive.moved", operator())
    assert (event.detail["from"], event.detail["to"]) == (str(tmp_path / "index.db"), str(new / "index.db"))
