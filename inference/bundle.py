"""Model bundles: a folder with ``manifest.json`` and safetensors weights, pinned by digest. Nothing in it is ever executed.

The digest of a bundle is the SHA-256 over the bytes of the manifest followed by the bytes of the weights. A configuration
names a bundle by its folder, and pins it by ``folder@sha256:<64 hexadecimal digits>``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from inference.errors import ModelUnavailable
from inference.records import Algorithm

MANIFEST: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_WEIGHTS_BYTES: Final = 1 << 29
INDICATORS: Final = ("dermatological_condition", "malignancy", "pigmented_lesion", "urgent_referral", "high_priority_referral")
"""The columns of the indicator matrix (items.md section 6), in the order of the report."""

Task = Literal["quality", "domain", "diagnosis", "segmentation"]
View = Literal["as_is", "flip_columns", "flip_rows", "turn_half"]
Probability = Annotated[float, Field(ge=0, le=1)]
_TASK_LABELS: Final[Mapping[str, frozenset[str]]] = MappingProxyType({"domain": frozenset({"dermoscopic", "clinical", "other"})})
_TASK_THRESHOLDS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "quality": frozenset({"acceptable"}),
        "domain": frozenset({"dermatological"}),
        "diagnosis": frozenset(INDICATORS),
        "segmentation": frozenset({"mask", "minimum_area_percent"}),
    }
)
_REFERENCE: Final = re.compile(r"(?P<folder>.+?)(?:@sha256:(?P<digest>[0-9a-f]{64}))?")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LabelCode(_Part):
    """The code of a label (DICOM PS3.3 Section 8)."""

    value: str = Field(min_length=1, max_length=16)
    scheme_designator: str = Field(min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class Label(_Part):
    """One output of the network."""

    key: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    code: LabelCode | None = None


class Architecture(_Part):
    """A name in ``inference.networks.ARCHITECTURES`` and its arguments."""

    name: str = Field(max_length=64)
    arguments: dict[str, int | float | bool | str | list[int]] = Field(default_factory=dict)


class Input(_Part):
    """How a picture becomes the network's input.

    ``squeeze`` keeps the whole picture and gives up its aspect ratio; ``centre`` keeps the ratio of the largest centred
    square. Each channel becomes (value - mean) / deviation, value in 0 to 255. Outputs are the mean over `views`.
    """

    rows: int = Field(ge=32, le=1024)
    columns: int = Field(ge=32, le=1024)
    aspect: Literal["squeeze", "centre"]
    mean: tuple[float, float, float]
    deviation: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    views: tuple[View, ...] = Field(default=("as_is",), min_length=1, max_length=4)


class Calibration(_Part):
    """Logits become softmax(logits / temperature + bias); a regression's output becomes output * scale + offset."""

    temperature: float = Field(default=1.0, gt=0)
    bias: list[float] = Field(default_factory=list)
    scale: float = 1.0
    offset: float = 0.0


class Weights(_Part):
    """The weights file: a plain name inside the bundle's folder."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class DataCard(_Part):
    """What the model was made from and what it is not good for, in words."""

    training_data: str
    evaluation_data: str
    intended_use: str
    limitations: str


class ModelCard(_Part):
    """The manifest of a bundle; an unknown key is a fault, not a comment."""

    format: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    version: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,15}$")
    title: str = Field(min_length=1, max_length=64)
    task: Task
    architecture: Architecture
    labels: tuple[Label, ...] = Field(min_length=1, max_length=2000)
    input: Input
    calibration: Calibration
    thresholds: dict[str, float]
    matrix: dict[str, dict[str, bool]] | None = None
    """Of a diagnosis: a row per label key, in it every indicator."""
    modalities: tuple[Literal["clinical", "dermoscopic"], ...] = Field(default=("dermoscopic",), min_length=1)
    """Of a diagnosis or segmentation model: the pictures it was made for; others it is not asked about."""
    limits: dict[str, list[tuple[float, float]]] = Field(default_factory=dict)
    """Of a quality model: the highest score by a measured property, as points of a piecewise linear curve."""
    data_card: DataCard
    licence: str
    attribution: tuple[str, ...]
    metrics: dict[str, Any]
    clinical: Literal[False]
    """Always false: no bundle of this format is a medical device by itself."""
    weights: Weights

    @field_validator("limits")
    @classmethod
    def _limits_rise(cls, limits: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
        for name, points in limits.items():
            if name not in ("short_side", "contrast"):
                raise ValueError(f"no measured property {name!r}; known: short_side, contrast")
            places = [place for place, _ in points]
            if not points or places != sorted(set(places)):
                raise ValueError(f"the points of {name!r} must rise strictly")
        return limits

    @model_validator(mode="after")
    def _fits_its_task(self) -> Self:
        keys = [label.key for label in self.labels]
        if len(set(keys)) != len(keys):
            raise ValueError("two labels have the same key")
        wanted = _TASK_LABELS.get(self.task)
        if wanted is not None and set(keys) != wanted:
            raise ValueError(f"a {self.task} model needs the labels {sorted(wanted)}")
        if self.task in ("quality", "segmentation") and len(keys) != 1:
            raise ValueError(f"a {self.task} model has one label")
        if set(self.thresholds) != _TASK_THRESHOLDS[self.task]:
            raise ValueError(f"a {self.task} model needs exactly the thresholds {sorted(_TASK_THRESHOLDS[self.task])}")
        if self.calibration.bias and len(self.calibration.bias) != len(keys):
            raise ValueError("calibration.bias needs one value a label")
        if self.task == "diagnosis":
            self._check_matrix(keys)
        elif self.matrix is not None:
            raise ValueError("only a diagnosis model has a matrix")
        return self

    def _check_matrix(self, keys: list[str]) -> None:
        if any(label.code is None for label in self.labels):
            raise ValueError("every label of a diagnosis model needs a code")
        rows = self.matrix or {}
        if set(rows) != set(keys):
            raise ValueError(f"the matrix needs exactly one row for each of {sorted(keys)}; a class without a row never counts as 0")
        for key, row in rows.items():
            if set(row) != set(INDICATORS):
                raise ValueError(f"the matrix row {key!r} needs exactly the columns {list(INDICATORS)}")


@dataclass(frozen=True, slots=True, eq=False)
class ModelBundle:
    """A checked bundle in memory. ``weights``: float16 or float32 arrays by tensor name."""

    card: ModelCard
    digest: str
    """SHA-256, hexadecimal, over manifest and weights."""
    weights: Mapping[str, NDArray[np.floating[Any]]]
    folder: Path

    def algorithm(self, parameters: str = "") -> Algorithm:
        """Describe this model in a result (TID 4019)."""
        return Algorithm(name=self.card.name, version=self.card.version, digest=self.digest, parameters=parameters)


def _read(path: Path, limit: int, folder: Path) -> bytes:
    """Read a file of the bundle whole, so that what is checked is what is used."""
    try:
        resolved = path.resolve(strict=True)
        if resolved.parent != folder.resolve(strict=True):
            raise ModelUnavailable(f"{path} leads out of the bundle's folder; put the file itself there, not a link")
        size = resolved.stat().st_size
        if size > limit:
            raise ModelUnavailable(f"{path} has {size} bytes, more than the limit of {limit}; is it the right file?")
        with resolved.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ModelUnavailable(
            f"{path} cannot be read ({error.strerror}); check the path and the permissions in [inference] bundles"
        ) from error
    if len(content) > limit:
        raise ModelUnavailable(f"{path} grew beyond the limit of {limit} bytes while it was read")
    return content


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in fault['loc']) or 'manifest'}: {fault['msg']}" for fault in error.errors()[:8])


def load_bundle(folder: Path, expected_digest: str | None = None) -> ModelBundle:
    """Read and check a bundle.

    Raises
    ------
    ModelUnavailable
        A file is missing, too large or outside the folder; the manifest does not fit the schema; a digest is wrong;
        the weights are no float16 / float32 safetensors. The message names the remedy.
    """
    manifest = _read(folder / MANIFEST, MAX_MANIFEST_BYTES, folder)
    try:
        card = ModelCard.model_validate_json(manifest)
    except ValidationError as error:
        raise ModelUnavailable(f"{folder / MANIFEST} does not fit the schema: {_faults(error)} (docs/models.md lists every key)") from error
    weights = _read(folder / card.weights.file, MAX_WEIGHTS_BYTES, folder)
    found = hashlib.sha256(weights).hexdigest()
    if found != card.weights.sha256:
        raise ModelUnavailable(
            f"{folder / card.weights.file} has SHA-256 {found}, its manifest says {card.weights.sha256}; copy the bundle again"
        )
    digest = hashlib.sha256(manifest + weights).hexdigest()
    if expected_digest is not None and digest != expected_digest.lower():
        raise ModelUnavailable(
            f"{folder} has digest {digest}, the configuration pins {expected_digest}; restore the bundle or change the pin"
        )
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelUnavailable(f"{folder / card.weights.file} is no valid safetensors file ({error}); copy the bundle again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float16, np.float32):
            raise ModelUnavailable(f"{folder / card.weights.file}: tensor {name!r} is {tensor.dtype}; store float16 or float32")
        if not np.isfinite(tensor).all():
            raise ModelUnavailable(
                f"{folder / card.weights.file}: tensor {name!r} holds values that are not finite; train or convert it again"
            )
    return ModelBundle(card=card, digest=digest, weights=MappingProxyType(tensors), folder=folder)


def parse_reference(reference: str) -> tuple[Path, str | None]:
    """Split ``folder`` or ``folder@sha256:<digest>``.

    Raises
    ------
    ModelUnavailable
        The part after ``@sha256:`` is no digest.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or "@sha256:" in match["folder"]:
        raise ModelUnavailable(f"{reference!r} is no bundle: write a folder, or folder@sha256: and 64 lower-case hexadecimal digits")
    return Path(match["folder"]), match["digest"]


def default_bundles() -> tuple[Path, ...]:
    """Give the folders of the shipped reference bundles, sorted by name."""
    shipped = resources.files("inference") / "bundles"
    return tuple(sorted(Path(str(folder)) for folder in shipped.iterdir() if (folder / MANIFEST).is_file())) if shipped.is_dir() else ()


def load_bundles(references: Sequence[str] = (), *, shipped: Iterable[Path] | None = None) -> tuple[ModelBundle, ...]:
    """Load the operator's bundles; a shipped one fills each task that they leave open.

    Raises
    ------
    ModelUnavailable
        A bundle cannot be loaded, or two of `references` are for one task.
    """
    chosen: dict[str, ModelBundle] = {}
    for reference in references:
        bundle = load_bundle(*parse_reference(reference))
        if bundle.card.task in chosen:
            raise ModelUnavailable(
                f"{bundle.folder} and {chosen[bundle.card.task].folder} are both for {bundle.card.task}; keep one of them"
            )
        chosen[bundle.card.task] = bundle
    for folder in default_bundles() if shipped is None else shipped:
        bundle = load_bundle(folder)
        chosen.setdefault(bundle.card.task, bundle)
    return tuple(chosen[task] for task in sorted(chosen))
