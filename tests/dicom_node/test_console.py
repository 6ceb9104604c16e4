"""What the command line says when something is wrong: sentences whose commands can be typed as they stand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.console import command_line, runnable


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """Give a configuration file, in a folder with a space, whose data folder is empty."""
    path = tmp_path / "my node" / "node.toml"
    path.parent.mkdir()
    path.write_text(
        f'[node]\ndata_dir = "{tmp_path / "var"}"\n[database]\nurl = "postgresql://localhost:1/x"\n[archive]\nstore = "s3"\nbucket = "b"\n'
    )
    return path


@pytest.mark.parametrize("command", [["keys", "list"], ["trace", "1.2.3"]])
def test_hints_carry_the_configuration(configuration: Path, command: list[str]) -> None:
    """Who gave --config is told commands with it: without, they would look at another node."""
    done = CliRunner().invoke(app, [*command, "--config", str(configuration)])
    assert done.exit_code == 1
    assert f"`dicom-node keys init --config '{configuration}'`" in done.output


def test_hints_are_short_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who works with the defaults is not told more than is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DICOM_NODE_DATABASE__URL", "postgresql://localhost:1/x")
    monkeypatch.setenv("DICOM_NODE_ARCHIVE__STORE", "s3")
    monkeypatch.setenv("DICOM_NODE_ARCHIVE__BUCKET", "b")
    assert "`dicom-node keys init`" in CliRunner().invoke(app, ["trace", "1.2.3"]).output


def test_hints_name_the_program_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an environment that is not on the PATH, the hint names the program with its folder."""
    monkeypatch.setattr(sys, "argv", [".venv/bin/dicom-node", "x"])
    assert runnable("run `dicom-node keys list`") == "run `.venv/bin/dicom-node keys list`"
    assert command_line("migrate --config a --to b", Path("c")) == ".venv/bin/dicom-node migrate --config a --to b"
    monkeypatch.setattr(sys, "argv", ["/x/dicom_node/__main__.py", "x"])
    assert command_line("trace 1", Path("c")) == "dicom-node trace 1 --config c"
