"""The architecture's table of rooms names every module, and none that is not there."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("storage", "dicom_node", "dicom_node/dimse")


def rooms() -> list[str]:
    """Return the files of the table's first column, from the root; a name without a folder is beside the one before it."""
    found: list[str] = []
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        folder = ""
        for name in re.findall(r"`([\w*/.]+\.py)`", line.split("|")[1]):
            folder = str(Path(name).parent) if "/" in name else folder
            found.append(f"{folder}/{Path(name).name}")
    return found


def test_every_module_has_its_room() -> None:
    """Who adds a module says in the architecture what it is for; who removes one takes it out."""
    modules = [
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).glob("*.py") if not path.name.startswith("__")
    ]
    named = rooms()
    assert [module for module in modules if not any(fnmatch.fnmatchcase(module, name) for name in named)] == []
    assert [name for name in named if not any(fnmatch.fnmatchcase(module, name) for module in modules) and not (ROOT / name).exists()] == []
