"""The drill as an operator types it: backup, restore; what was decided in between, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicom_node import config, storehouse, tracing
from dicom_node.cli import app
from storage.errors import ConflictingInstance
from storage.index import QuarantinedInstance
from storage.keys import Ring
from storage.records import InstanceRecord, Origin, SealedObject, Summary
from tests.storage.house import origin_of
from tests.storage.samples import Sample, photograph

Type = Callable[..., Result]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Type a command; the archive is there, empty, and no node runs."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path / "node"))
    settings = config.load(None)
    (tmp_path / "node" / "keys").mkdir(mode=0o700, parents=True)
    database = storehouse.open_database(settings, Ring.create(settings.ring_file))
    database.migrate()
    database.close()
    return lambda *words, **options: CliRunner().invoke(app, words, **options)


@contextmanager
def opened() -> Iterator[storehouse.Storehouse]:
    """Open the archive that the commands use."""
    with storehouse.storage(config.load(None)) as parts:
        yield parts


def received(samples: Sequence[Sample]) -> None:
    """Take samples in; what is set aside is set aside."""
    with opened() as parts:
        for sample in samples:
            try:
                with parts.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
                    intake.write(sample.data_set)
                    intake.commit()
            except ConflictingInstance:
                continue


def test_what_was_decided_after_the_backup(typed: Type, tmp_path: Path) -> None:
    """A, then B of its UID, accepted: restored over the objects that survived, B is archived, and the list names A with its reason."""
    assert typed("backup", str(tmp_path / "backup"), "--with-ring").exit_code == 0
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    received([first, second])
    accepted = typed("quarantine", "accept", "1", "--reason", "the retake")
    assert accepted.exit_code == 0, accepted.output
    for file in (tmp_path / "node").glob("index.db*"):
        file.unlink()
    restored = typed("restore", str(tmp_path / "backup"))
    assert restored.exit_code == 0, restored.output
    with opened() as parts:
        with parts.archive.open(first.sop_instance_uid) as stored:
            assert stored.read() == second.data_set
        (kept,) = parts.archive.quarantine().all()
    assert kept.record.summary.sha256 in restored.stdout
    assert "replaced by an operator" in restored.stdout
    assert "1 in quarantine" in restored.stdout


def test_what_a_backup_says_of_itself(typed: Type, tmp_path: Path) -> None:
    """A second run with --verify names what rotted in the backup; the third finds all well."""
    received([photograph()])
    assert typed("backup", str(tmp_path / "backup")).exit_code == 0
    (copy,) = (path for path in (tmp_path / "backup" / "objects").glob("??/*") if path.is_file())
    copy.write_bytes(bytes(copy.stat().st_size))
    again = typed("backup", str(tmp_path / "backup"), "--verify")
    assert (again.exit_code, f"object {copy.name} was damaged in the backup" in again.stderr.replace("\n", " ")) == (0, True)
    again = typed("backup", str(tmp_path / "backup"), "--verify")
    assert ("damaged" in again.output, "1 objects that were there read again; 0 removed" in again.stdout) == (False, True)


def test_a_report_in_quarantine_was_made_here() -> None:
    """What nobody sent has no sender to be named."""
    summary = Summary("1.2", "1.2.3", "1.2.4", "1.2.5", "1.2.840.10008.1.2.1", 1, "0" * 64, {})
    origin, sealed = Origin(door="node", received_at=datetime.now(UTC)), SealedObject("0" * 32, 1, "0" * 64, "0" * 32)
    record = InstanceRecord(summary, sealed, origin, role="report")
    lines = list(tracing.quarantined(QuarantinedInstance(1, record, "made from another", datetime.now(UTC))))
    assert any(line.endswith("UTC, made here") for line in lines)
