"""Fixtures of the storage tests: a whole archive in a temporary folder, over each database engine and object store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.objects import ObjectStore
from storage.s3 import S3Store
from tests import ceph
from tests.conftest import ENGINES
from tests.storage.house import House, build
from tests.storage.moto_service import MotoService, moto_server

Build = Callable[..., House]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn: what uses this fixture says the same of both. A test of one of them parametrises it."""
    return str(request.param)


@pytest.fixture(scope="session")
def template_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key ring and the migrated database of a house that is new; to be copied, which is quicker than migrating."""
    folder = tmp_path_factory.mktemp("template") / "house"
    build(folder).close()
    return folder


@pytest.fixture
def houses(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Build]:
    """Build houses; each call opens the same folder and database again unless told otherwise."""
    opened: list[House] = []
    urls: dict[str, str] = {}

    def make(folder: str = "house", **options: Any) -> House:
        if engine == "postgresql" and "database_url" not in options:
            if folder not in urls:
                urls[folder] = request.getfixturevalue("postgresql_database")()
            options["database_url"] = urls[folder]
        elif not opened and not (tmp_path / folder).exists():  # the first alone: each house has a ring of its own
            template: Path = request.getfixturevalue("template_house")
            (tmp_path / folder).mkdir()
            for name in ("keys.json", "node.db"):
                shutil.copy(template / name, tmp_path / folder)
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


@pytest.fixture(scope="session")
def _moto_service() -> Iterator[MotoService]:
    with moto_server() as endpoint:
        yield MotoService(endpoint)


@pytest.fixture
def versatile(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> MotoService | ceph.Ceph:
    """An S3 service that knows versions, tags, encryption and classes: moto, or radosgw; credentials are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ceph.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph.SECRET)
    which = "radosgw" if request.config.getoption("s3") == "radosgw" else "_moto_service"
    service: MotoService | ceph.Ceph = request.getfixturevalue(which)
    return service


@pytest.fixture
def s3_store(s3_bucket: Callable[[], tuple[str, str, Path]]) -> ObjectStore:
    """An S3 store over a new bucket of a real service."""
    endpoint, bucket, _ = s3_bucket()
    return S3Store(bucket=bucket, endpoint_url=endpoint, region="us-east-1", attempts=2)


@pytest.fixture(params=["directory", "s3"])
def either_house(request: pytest.FixtureRequest, houses: Build) -> House:
    """One archive over each store in turn."""
    return houses() if request.param == "directory" else houses(store=request.getfixturevalue("s3_store"))


@pytest.fixture
def new_place(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return where a database without schema is, or can be made."""
    if engine == "postgresql":
        return str(request.getfixturevalue("postgresql_database")(migrated=False))
    (tmp_path / "new").mkdir()
    return str(tmp_path / "new")
