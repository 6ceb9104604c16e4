"""The catalogue and the suite are held together: every row is there, every test that it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.catalogue import CATALOGUE, Fault

_REPOSITORY = Path(__file__).resolve().parents[2]


def defined(node_id: str) -> bool:
    """Tell whether the file of a node id defines a test of its name."""
    path, _, name = node_id.partition("::")
    file = _REPOSITORY / path
    return file.is_file() and re.search(rf"^(async )?def {re.escape(name)}\(", file.read_text(), re.MULTILINE) is not None


def test_every_fault_has_a_row() -> None:
    """The 56 faults of the design, in order, none twice."""
    assert [fault.number for fault in CATALOGUE] == list(range(1, 57))


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: str(fault.number))
def test_every_test_of_a_row_exists(fault: Fault) -> None:
    """A row names tests that there are, and a negative control; or it says why it has none."""
    assert [node_id for node_id in (*fault.tests, *([fault.control] if fault.control else [])) if not defined(node_id)] == []
    assert fault.covered or fault.missing
    assert bool(fault.control) == fault.covered


def test_every_test_is_collected() -> None:
    """The runner finds the tests of this folder that rows name, the long ones too: none is hidden by a mark or a name."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "soak or not soak",
        "tests/faults",
    ]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, "PYTEST_ADDOPTS": ""})
    collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    named = {node_id for fault in CATALOGUE for node_id in (*fault.tests, fault.control) if node_id.startswith("tests/faults/")}
    assert named <= collected, done.stdout[-2000:] + done.stderr


def test_the_page_shows_every_row() -> None:
    """docs/faults.md has a line for each fault, with how many tests it has, or why none."""
    page = (_REPOSITORY / "docs" / "faults.md").read_text()
    for fault in CATALOGUE:
        status = f"{len(fault.tests)} tests" if len(fault.tests) > 1 else "1 test" if fault.tests else "**not covered**"
        notes = fault.missing.replace("|", "\\|")
        assert f"| {fault.number} | {fault.what} | {fault.promises} | {status} | {notes} |" in page
