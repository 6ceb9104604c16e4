"""What the pages say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from dicom_node.cli import app
from storage import errors
from storage.work import TRANSITIONS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def test_the_table_of_jobs_is_the_table_of_the_code() -> None:
    """docs/architecture.md prints every transition, and no other."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text[text.index("## A job") : text.index("## The sealed object")]
    printed = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in section.splitlines() if line.startswith("|")}
    printed -= {("state", "step", "next"), ("---", "---", "---")}
    assert printed == {(state.value, step.value, following.value) for (state, step), following in TRANSITIONS.items()}


def test_the_table_of_errors_is_the_tree_of_the_code() -> None:
    """docs/architecture.md names each error of the tree that a door answers with, with its number."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"^\s*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)) - {"LeaseLost"}  # no door ever answers with it
    assert len(names) == 8
    for name in names:
        error = getattr(errors, name)
        assert re.search(rf"\| `{name}` \| 0x{error.failure_reason:04X} ", text), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link between pages has its target."""
    for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_command_is_in_the_readme() -> None:
    """The README lists the commands there are."""
    (listed,) = re.findall(r"^Commands: `dicom-node ([^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(listed.split(" | ")) == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_every_make_target_is_real() -> None:
    """`make` targets named on a page exist."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"`make ([a-z]+)`", page.read_text()):
            assert named in targets, (page.name, named)
