"""The bundle format: what is refused, and that the refusal names cause and remedy."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from inference.bundle import INDICATORS, _read, default_bundles, load_bundle, load_bundles, parse_reference
from inference.errors import ModelUnavailable
from tests.inference.models import manifest, write_bundle

TENSORS = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(3, np.float32)}
WEIGHTS = save(TENSORS)


def test_loads_and_names_itself(tmp_path: Path) -> None:
    """The digest is the SHA-256 over manifest and weights; tensors come back as they were stored."""
    folder = write_bundle(tmp_path, "diagnosis", WEIGHTS)
    bundle = load_bundle(folder)
    assert bundle.digest == hashlib.sha256((folder / "manifest.json").read_bytes() + WEIGHTS).hexdigest()
    assert set(bundle.weights) == {"a", "b"}
    assert np.array_equal(bundle.weights["a"], TENSORS["a"])
    assert bundle.algorithm("x").digest == bundle.digest


def test_pin_is_checked(tmp_path: Path) -> None:
    """The right pin loads, another is refused and both digests are shown."""
    folder = write_bundle(tmp_path, "domain", WEIGHTS)
    digest = load_bundle(folder).digest
    assert load_bundle(*parse_reference(f"{folder}@sha256:{digest}")).digest == digest
    with pytest.raises(ModelUnavailable, match=rf"has digest {digest}, the configuration pins {'0' * 64}"):
        load_bundle(folder, "0" * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"clinical": True}, "clinical"),
        ({"format": 2}, "format"),
        ({"task": "prognosis"}, "Input should be 'quality'"),
        ({"thresholds": {"malignancy": 0.5}}, "exactly the thresholds"),
        ({"matrix": {"melanoma": dict.fromkeys(INDICATORS, True)}}, "one row for each"),
        ({"matrix": None}, "one row for each"),
        ({"matrix": {"melanoma": {"malignancy": True}, "nevus": dict.fromkeys(INDICATORS, True)}}, "exactly the columns"),
        ({"labels": [{"key": "melanoma"}, {"key": "nevus"}]}, "needs a code"),
        ({"calibration": {"bias": [0.1]}}, "one value a label"),
        ({"calibration": {"temperature": 0}}, "temperature"),
        ({"name": "../evil"}, "name"),
        ({"limits": {"sharpness": [[0, 1]]}}, "no measured property"),
        ({"limits": {"contrast": [[2, 1], [1, 2]]}}, "rise strictly"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Every departure from the schema is refused and named."""
    folder = write_bundle(tmp_path, "diagnosis", WEIGHTS, **changes)
    with pytest.raises(ModelUnavailable, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors", "weights.pt", "..safetensors"])
def test_weights_file_is_a_plain_name(tmp_path: Path, name: str) -> None:
    """No path and no other format can be named as weights."""
    folder = write_bundle(tmp_path, "domain", WEIGHTS, weights={"file": name, "sha256": hashlib.sha256(WEIGHTS).hexdigest()})
    with pytest.raises(ModelUnavailable, match=r"weights\.file"):
        load_bundle(folder)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A link to a file elsewhere is refused even when the content is right."""
    folder = write_bundle(tmp_path, "domain", WEIGHTS)
    (folder / "weights.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "weights.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelUnavailable, match="leads out of"):
        load_bundle(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A missing manifest and missing weights are each named with their path."""
    with pytest.raises(ModelUnavailable, match=r"manifest\.json cannot be read \(No such file"):
        load_bundle(tmp_path)
    folder = write_bundle(tmp_path, "domain", WEIGHTS)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"weights\.safetensors cannot be read"):
        load_bundle(folder)


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    """A file over the limit is refused by its size."""
    (tmp_path / "manifest.json").write_bytes(b"x" * 11)
    with pytest.raises(ModelUnavailable, match="has 11 bytes, more than the limit of 10"):
        _read(tmp_path / "manifest.json", 10, tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/dicom-node-pickle-was-run"),))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (pickle.dumps(_Bomb()), "no valid safetensors"),
        (b"", "no valid safetensors"),
        (WEIGHTS[:-1], "no valid safetensors"),
        (save({"a": np.array([np.nan], np.float32)}), "not finite"),
        (save({"a": np.array([1], np.int64)}), "float16 or float32"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, weights: bytes, message: str) -> None:
    """Pickles, truncated files, integers and NaN are refused although their digest is right; nothing in them runs."""
    folder = write_bundle(tmp_path, "domain", weights)
    with pytest.raises(ModelUnavailable, match=message):
        load_bundle(folder)
    assert not Path("/tmp/dicom-node-pickle-was-run").exists()


def test_other_weights_are_refused_without_a_pin(tmp_path: Path) -> None:
    """Weights that are valid but not those of the manifest are refused, and both digests are shown."""
    folder = write_bundle(tmp_path, "domain", WEIGHTS)
    (folder / "weights.safetensors").write_bytes(save({"a": np.zeros((2, 3), np.float16)}))
    with pytest.raises(ModelUnavailable, match=f"its manifest says {hashlib.sha256(WEIGHTS).hexdigest()}"):
        load_bundle(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.sampled_from(["manifest.json", "weights.safetensors"]))
def test_no_flipped_bit_passes_a_pin(tmp_path: Path, place: float, bit: int, which: str) -> None:
    """Whatever bit is flipped, a pinned bundle is refused with the one error an operator can act on."""
    folder = write_bundle(tmp_path, "domain", WEIGHTS)
    digest = load_bundle(folder).digest
    content = bytearray((folder / which).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (folder / which).write_bytes(content)
    with pytest.raises(ModelUnavailable):
        load_bundle(folder, digest)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5), lambda part: st.lists(part) | st.dictionaries(st.text(max_size=5), part)
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_other_manifest_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    """Neither arbitrary bytes nor arbitrary JSON raise anything but ModelUnavailable."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ModelUnavailable):
        load_bundle(tmp_path)


def test_operators_bundle_takes_the_place_of_a_shipped_one(tmp_path: Path) -> None:
    """A task named in the configuration is the operator's; the others stay the shipped ones."""
    mine = write_bundle(tmp_path / "mine", "domain", WEIGHTS)
    shipped = [write_bundle(tmp_path / "shipped", task, save({"c": np.ones(1, np.float16)})) for task in ("domain", "quality")]
    found = {bundle.card.task: bundle.folder for bundle in load_bundles([str(mine)], shipped=shipped)}
    assert found == {"domain": mine, "quality": shipped[1]}


def test_two_bundles_for_one_task_are_refused(tmp_path: Path) -> None:
    """Nobody has to guess which of two bundles ran."""
    first, second = (write_bundle(tmp_path / name, "domain", WEIGHTS) for name in "ab")
    with pytest.raises(ModelUnavailable, match="both for domain"):
        load_bundles([str(first), str(second)], shipped=())


def test_reference_with_a_broken_pin_is_refused() -> None:
    """A pin that is no digest is never taken for a part of the path."""
    assert parse_reference("/models/x") == (Path("/models/x"), None)
    for reference in ("", "/models/x@sha256:abc", f"/models/x@sha256:{'A' * 64}"):
        with pytest.raises(ModelUnavailable):
            parse_reference(reference)


def test_shipped_bundles_are_whole() -> None:
    """Every shipped bundle loads, none claims to be clinical, and each is licensed and measured."""
    bundles = load_bundles()
    assert {bundle.card.task for bundle in bundles} == {"quality", "domain", "diagnosis", "segmentation"}
    assert len(default_bundles()) == len(bundles)
    for bundle in bundles:
        assert bundle.card.clinical is False
        assert bundle.card.licence
        assert bundle.card.attribution
        assert bundle.card.metrics["test"]
        assert "clinical use" in bundle.card.data_card.limitations


def test_the_test_manifest_is_valid_for_every_task(tmp_path: Path) -> None:
    """The refusals above are for their stated reason: unchanged, each manifest loads."""
    for task in ("quality", "domain", "diagnosis", "segmentation"):
        assert load_bundle(write_bundle(tmp_path, task, WEIGHTS)).card.name == manifest(task)["name"]
