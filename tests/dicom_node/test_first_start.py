"""The first start of a node: a new database beside the objects of an archive is a wrong name or a loss, and nothing is done to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from dicom_node import config, node, storehouse
from dicom_node.cli import app
from dicom_node.config import Settings
from dicom_node.errors import StartError
from storage.errors import ConflictingInstance
from storage.objects import DirectoryStore
from storage.records import AuditEvent
from tests.storage.house import origin_of
from tests.storage.samples import Sample, photograph


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a node that never ran."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DICOM_NODE_INFERENCE__ENABLED", "false")
    return config.load(None)


@contextmanager
def started(settings: Settings) -> Iterator[storehouse.Storehouse]:
    """Start a node, as far as it is in the register."""
    lock = node._locked_folder(settings)
    try:
        node._prepare(settings)
        with storehouse.storage(settings) as parts, node._present(settings, parts, lock, lambda: None):
            yield parts
    finally:
        lock.close()


def received(parts: storehouse.Storehouse, sample: Sample) -> None:
    """Take a sample in."""
    with parts.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
        intake.write(sample.data_set)
        intake.commit()


def test_a_new_database_beside_a_full_store(settings: Settings, tmp_path: Path) -> None:
    """Refused in words that name every way on, and again at the next start; not a byte of the store changes. After reindex it starts."""
    first = photograph()
    with started(settings) as parts:
        received(parts, first)
        with pytest.raises(ConflictingInstance):
            received(parts, photograph(sop=first.sop_instance_uid))
        parts.archive.quarantine().synchronise_marks()
    for file in tmp_path.glob("index.db*"):
        file.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "objects").rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(StartError) as refused, started(settings):
            pass
        for word in (
            "database.url",
            "`dicom-node restore FOLDER`",
            "`dicom-node reindex`",
            "`dicom-node migrate`",
            "another node.data_dir",
        ):
            assert word in str(refused.value)
    assert {path: path.read_bytes() for path in (tmp_path / "objects").rglob("*") if path.is_file()} == before
    reindexed = CliRunner().invoke(app, ["reindex"])
    assert reindexed.exit_code == 0, reindexed.output
    with started(settings) as parts, parts.archive.open(first.sop_instance_uid) as stored:
        assert stored.read() == first.data_set
        assert len(parts.archive.quarantine().all()) == 1


def test_a_first_node_on_an_empty_store(settings: Settings) -> None:
    """It starts, whatever an operator did before; killed before anything had a row it starts again; so does one that erased everything."""
    node._prepare(settings)
    with storehouse.storage(settings) as parts:
        parts.audit.record(AuditEvent("hold.placed", "success", "operator"))
    with started(settings) as parts:
        parts.store.put_document("keys/00/" + "0" * 32, b"before its commit")
    with started(settings) as parts:
        sample = photograph()
        received(parts, sample)
        parts.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    with started(settings):
        pass


def test_two_first_nodes_at_once(settings: Settings) -> None:
    """One looks at the database, the other enters it and stores its first object, the one looks at the store: it is let in."""
    node._prepare(settings)

    with storehouse.storage(settings) as parts:

        class Other:
            """The store, in which another node stores something while we look."""

            def list_documents(self, prefix: str) -> Iterator[str]:
                """Be overtaken."""
                with started(settings):
                    parts.store.put_document("keys/00/" + "0" * 32, b"before its commit")
                return parts.store.list_documents(prefix)

        assert storehouse.foreign_store(settings, replace(parts, store=cast("Any", Other()))) == ""


def test_objects_alone_are_enough(settings: Settings) -> None:
    """Without a document of a key it is the same: somebody's objects lie there."""
    node._prepare(settings)
    with storehouse.storage(settings) as parts:
        assert isinstance(parts.store, DirectoryStore)
        parts.store.path_of("ab" * 16).write_bytes(b"object")
        assert "holds the objects of an archive" in storehouse.foreign_store(settings, parts)


def test_who_looks_at_no_archive_is_not_sent_to_start_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before `migrate`, `restore` or `reindex` these are named first: after a start none of them would fill the database."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path / "new"))
    told = " ".join(CliRunner().invoke(app, ["verify"]).output.split())
    assert told.index("reindex") < told.index("start the node once")
    assert not (tmp_path / "new" / "index.db").exists()
