"""What nodes under test analyse with and deliver to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.pacs import Pacs, quick_bundles, running_pacs


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Quick ones, where what is tested is not the models."""
    return quick_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    """A listening destination."""
    with running_pacs(tmp_path / "pacs") as listening:
        yield listening
