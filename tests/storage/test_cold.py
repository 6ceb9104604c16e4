"""Objects in a cold class: to look whether they are there costs no restore."""

from __future__ import annotations

from typing import Any

import pytest

from storage.loss import Loss
from storage.nodes import Nodes
from storage.objects import relative_path
from storage.s3 import S3Store
from tests.ceph import Ceph
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.moto_service import MotoService
from tests.storage.samples import photograph
from tests.storage.test_orphans import NOW, left_behind

pytestmark = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


@pytest.fixture
def cold(houses: Build, versatile: MotoService | Ceph, request: pytest.FixtureRequest) -> House:
    """An archive whose objects go into GLACIER at once."""
    if request.config.getoption("s3") == "radosgw":
        pytest.skip("radosgw has no cold classes")
    return houses(store=store(versatile, versatile.new_bucket(versioned=True), storage_class="GLACIER"))


def store(versatile: MotoService | Ceph, bucket: str, **options: Any) -> S3Store:
    """Make a store on a bucket."""
    return S3Store(bucket=bucket, endpoint_url=versatile.endpoint, region="us-east-1", attempts=2, **options)


def is_being_restored(house: House, versatile: MotoService | Ceph, object_key: str) -> bool:
    """Ask the service."""
    assert isinstance(house.store, S3Store)
    return "Restore" in versatile.client().head_object(Bucket=house.store._bucket, Key=relative_path(object_key))


def test_a_duplicate_restores_nothing(cold: House, versatile: MotoService | Ceph) -> None:
    """Sent again, it is a duplicate: the store vouches for an object of the right length."""
    sample = photograph()
    cold.ingest(sample)
    assert cold.ingest(sample).outcome == "duplicate"
    (key,) = cold.objects()
    assert not is_being_restored(cold, versatile, key)


def test_an_orphan_beside_it_waits(cold: House, houses: Build, versatile: MotoService | Ceph) -> None:
    """A warm copy that no row names is left, and the cold object too."""
    sample = photograph()
    cold.ingest(sample)
    (key,) = cold.objects()
    assert isinstance(cold.store, S3Store)
    warm = houses(store=store(versatile, cold.store._bucket))
    left_behind(warm, sample)
    assert warm.archive.orphans().sweep(grace=NOW).waiting == 1
    assert len(cold.objects()) == 2
    assert not is_being_restored(cold, versatile, key)


def test_what_a_lost_node_had_brought(cold: House, versatile: MotoService | Ceph) -> None:
    """It is found in the store, by its length."""
    sample = photograph()
    cold.ingest(sample)
    record = cold.index.find(sample.sop_instance_uid)
    loss = Loss(
        database=cold.database,
        index=cold.index,
        queue=cold.queue,
        audit=cold.audit,
        places=cold.archive.places,
        nodes=Nodes(database=cold.database),
    )
    assert loss._place_of(record) == ""
    assert not is_being_restored(cold, versatile, record.sealed.object_key)
