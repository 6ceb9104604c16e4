"""Fixtures of the storage tests: a whole archive in a temporary folder, over each object store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.database import Database
from storage.objects import ObjectStore
from storage.s3 import S3Store
from tests.storage.house import House, build
from tests.storage.support import open_database

Build = Callable[..., House]


@pytest.fixture
def houses(tmp_path: Path) -> Iterator[Build]:
    """Build houses; each call opens the same folder again unless told otherwise."""
    opened: list[House] = []

    def make(folder: str = "house", **options: Any) -> House:
        house = build(tmp_path / folder, **options)
        opened.append(house)
        return house

    yield make
    for house in opened:
        house.close()


@pytest.fixture
def house(houses: Build) -> House:
    """One archive over a directory."""
    return houses()


@pytest.fixture
def s3_store(s3_bucket: Callable[[], tuple[str, str, Path]]) -> ObjectStore:
    """An S3 store over a new bucket of a real service."""
    endpoint, bucket, _ = s3_bucket()
    return S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", attempts=2)


@pytest.fixture(params=["directory", "s3"])
def either_house(request: pytest.FixtureRequest, houses: Build) -> House:
    """One archive over each store in turn."""
    return houses() if request.param == "directory" else houses(store=request.getfixturevalue("s3_store"))


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a new, migrated database; tests copy it, which is quicker than migrating."""
    folder = tmp_path_factory.mktemp("template")
    database = open_database(folder)
    database.migrate()
    database.close()
    return folder / "node.db"


@pytest.fixture
def database(template_database: Path, tmp_path: Path) -> Iterator[Database]:
    """An empty database, node.db in tmp_path."""
    shutil.copy(template_database, tmp_path)
    database = open_database(tmp_path)
    yield database
    database.close()
