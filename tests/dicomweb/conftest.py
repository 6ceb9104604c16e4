"""Fixtures of the HTTP door: one door over one real archive for all tests, and doors made to order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.dicomweb.door import Door
from tests.storage.house import build


@pytest.fixture(scope="package")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A door over an archive that fills up from test to test: every test makes its own UIDs."""
    house = build(tmp_path_factory.mktemp("door"))
    with Door(house) as running:
        yield running
    house.close()


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    """Make doors with options of `dicomweb.app.make_app`, and archives with options of `Archive` given as ``archive``."""
    with ExitStack() as stack:

        def make(*, archive: dict[str, Any] | None = None, **options: Any) -> Door:
            house = build(tmp_path / "house", **(archive or {}))
            stack.callback(house.close)
            return stack.enter_context(Door(house, **options))

        yield make
