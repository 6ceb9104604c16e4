"""Run the networks of the bundles on decoded frames. With ``networks.py`` the only importer of torch in the node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from inference import geometry
from inference.bundle import INDICATORS, Input, ModelBundle, Task
from inference.errors import DeviceError, DeviceFull, DeviceLost, ModelUnavailable, UnsupportedPixels
from inference.items.diagnosis import entropy, indicators
from inference.items.quality import acceptable, limited, quality_band
from inference.networks import ARCHITECTURES, build
from inference.records import Category, Code, Diagnosis, Domain, Indicator, Lesion, Quality, Segmentation
from storage.failpoints import unarmed

Picture = NDArray[np.uint8]
DIGITS: Final = 6
"""Decimals kept of a probability: below them the order of a sum on another machine may show."""
MAX_LESIONS: Final = 20
_NO_MEMORY: Final = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_NO_DEVICE: Final = re.compile(
    r"CUDA error|CUDA driver|CUDA-capable|cuDNN error|cuDNN_STATUS|CUBLAS_STATUS|device-side assert", re.IGNORECASE
)
"""In messages of torch, which raises RuntimeError for most of it."""
_FLIPS: Final[dict[str, tuple[int, ...]]] = {"as_is": (), "flip_columns": (3,), "flip_rows": (2,), "turn_half": (2, 3)}


class Model(Protocol):
    """What the pipeline needs of a model: raw outputs of a network, or of a rule that stands in for one."""

    bundle: ModelBundle

    def outputs(self, frame: Picture) -> NDArray[np.float64]:
        """Give the mean outputs over the views: shape (labels,), or (labels, rows, columns) of the input for a segmentation."""
        ...


@contextmanager
def _faults_of_device() -> Iterator[None]:
    """Tell what is wrong with the device from what is wrong with the picture or the model."""
    try:
        yield
    except MemoryError as error:
        raise DeviceFull("there is no memory left for the analysis; give the worker more, or run fewer of them") from error
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(said):
            raise DeviceFull(f"there is no memory left for the analysis ({said}); give the worker more, or run fewer of them") from error
        if isinstance(error, torch.AcceleratorError) or _NO_DEVICE.search(said):
            raise DeviceLost(f"the device failed under the analysis ({said})") from error
        raise


class TorchModel:
    """A bundle's network on a device, checked against its manifest by one run at the start."""

    def __init__(self, bundle: ModelBundle, device: torch.device, reach: Callable[[str], None] = unarmed) -> None:
        self.bundle = bundle
        self._device = device
        self._reach = reach
        card = bundle.card
        if card.architecture.name not in ARCHITECTURES:
            raise ModelUnavailable(
                f"{bundle.folder}: no architecture {card.architecture.name!r}; known: {', '.join(sorted(ARCHITECTURES))}"
            )
        try:
            network = build(card.architecture.name, card.architecture.arguments)
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise ModelUnavailable(
                f"{bundle.folder}: {card.architecture.name} does not take these arguments ({error}); mend the manifest"
            ) from error
        _load(network, bundle)
        with _faults_of_device():
            self._network = network.eval().requires_grad_(requires_grad=False).to(device)
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._mean = torch.tensor(card.input.mean, device=device).view(1, 3, 1, 1)
            self._deviation = torch.tensor(card.input.deviation, device=device).view(1, 3, 1, 1)
        found = self.outputs(np.zeros((card.input.rows, card.input.columns, 3), np.uint8)).shape
        wanted: tuple[int, ...] = (len(card.labels),)
        if card.task == "segmentation":
            wanted = (len(card.labels), card.input.rows, card.input.columns)
        if found != wanted:
            raise ModelUnavailable(
                f"{bundle.folder}: the network gives {found}, its {len(card.labels)} labels need {wanted}; mend the manifest"
            )

    def outputs(self, frame: Picture) -> NDArray[np.float64]:
        """Give the mean outputs over the views of the manifest.

        Raises
        ------
        DeviceLost, DeviceFull
        """
        with _faults_of_device():
            self._reach("device.compute")
            mean = self._mean_outputs(frame)
        if not np.isfinite(mean).all():
            raise ModelUnavailable(f"{self.bundle.folder}: the network gave a value that is not finite; train or convert it again")
        return mean

    def _mean_outputs(self, frame: Picture) -> NDArray[np.float64]:
        batch = prepare(frame, self.bundle.card.input).to(self._device)
        batch = ((batch - self._mean) / self._deviation).contiguous(memory_format=torch.channels_last)
        total: torch.Tensor | None = None
        with torch.inference_mode():
            for view in self.bundle.card.input.views:
                axes = _FLIPS[view]
                seen = self._network(torch.flip(batch, axes) if axes else batch)
                if seen.ndim == 4 and axes:
                    seen = torch.flip(seen, axes)
                total = seen if total is None else total + seen
        assert total is not None  # noqa: S101 - the manifest has at least one view
        mean: NDArray[np.float64] = (total / len(self.bundle.card.input.views))[0].double().cpu().numpy()
        return mean


def prepare(frame: Picture, wanted: Input) -> torch.Tensor:
    """Resize a frame to a network's input: float32, shape (1, 3, rows, columns), 0 to 255; mean and deviation not yet applied.

    Raises
    ------
    UnsupportedPixels
        The frame is no uint8 array of shape (rows, columns, 3) with at least one pixel.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise UnsupportedPixels(f"a frame is uint8 of shape (rows, columns, 3), this one {frame.dtype} of shape {frame.shape}")
    small = geometry.resized(frame, wanted.rows, wanted.columns, wanted.aspect)
    return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))[None].float()


def _load(network: torch.nn.Module, bundle: ModelBundle) -> None:
    """Copy the weights into the network after comparing every name and shape."""
    expected = network.state_dict()
    missing, foreign = sorted(set(expected) - set(bundle.weights)), sorted(set(bundle.weights) - set(expected))
    if missing or foreign:
        raise ModelUnavailable(
            f"{bundle.folder}: the weights do not fit {bundle.card.architecture.name}: missing {missing[:3]}, foreign {foreign[:3]}; "
            "name the architecture and arguments they were trained with"
        )
    for name, tensor in expected.items():
        shape = bundle.weights[name].shape
        if shape != tuple(tensor.shape):
            raise ModelUnavailable(
                f"{bundle.folder}: tensor {name!r} is {shape}, the architecture needs {tuple(tensor.shape)}; mend the manifest"
            )
    network.load_state_dict({name: torch.from_numpy(np.array(bundle.weights[name], np.float32)) for name in expected})


def _softmax(logits: NDArray[np.float64], temperature: float, bias: Sequence[float]) -> list[float]:
    scaled = logits / temperature + (np.asarray(bias) if len(bias) else 0.0)
    powers = np.exp(scaled - scaled.max())
    rounded: NDArray[np.float64] = np.round(powers / powers.sum(), DIGITS)
    # what rounding took or gave goes to the likeliest, so that the sum is 1
    rounded[int(rounded.argmax())] += 1 - rounded.sum()
    return [float(value) for value in np.clip(np.round(rounded, DIGITS), 0, 1)]


def _on(name: str, bundles: Sequence[ModelBundle], reach: Callable[[str], None]) -> dict[str, Model]:
    """Bring the networks to a device; each has run once there."""
    try:
        place = torch.device(name)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise DeviceLost(str(error).partition("\n")[0]) from error
    if place.type != "cpu":
        # a CPU's kernels are deterministic as they are, and this call imports seconds' worth of compiler
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return {bundle.card.task: TorchModel(bundle, place, reach) for bundle in bundles}


class ModelRunner:
    """The models of a worker, one a task; every result names the model that gave it.

    The same frame gives the same rounded result at every run on one machine: fixed threads, deterministic algorithms,
    nothing drawn at random.

    Parameters
    ----------
    bundles
        At most one for each task.
    threads
        Threads of torch; 0 leaves torch's own choice.
    device
        ``auto`` takes a GPU when there is one; else a torch device name.
    fall_back
        Take the CPU, and say why in `fault`, where the device cannot be used; else that is ModelUnavailable.
    reach
        Failpoint: device.compute, before each run of a network, those at the start too.

    Attributes
    ----------
    fault
        Why the CPU stands in for the device that was asked for; empty when it does not.

    Raises
    ------
    ModelUnavailable
        Two bundles for one task, weights that do not fit their architecture, or no such device.
    """

    def __init__(
        self,
        bundles: Sequence[ModelBundle],
        *,
        threads: int,
        device: str = "auto",
        fall_back: bool = False,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        if threads > 0:
            torch.set_num_threads(threads)
        tasks: dict[str, ModelBundle] = {}
        for bundle in bundles:
            other = tasks.setdefault(bundle.card.task, bundle)
            if other is not bundle:
                raise ModelUnavailable(f"{bundle.folder} and {other.folder} are both for {bundle.card.task}; keep one of them")
        self.fault = ""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self._models = _on(name, bundles, reach)
        except DeviceError as error:
            self.fault = f"device {device!r} cannot be used ({error})"
            if not fall_back or name == "cpu":
                raise ModelUnavailable(f"{self.fault}; set [inference] device to auto or cpu") from error
            self._models = _on("cpu", bundles, reach)

    def has(self, task: Task) -> bool:
        """Say whether there is a model for `task`."""
        return task in self._models

    @property
    def bundles(self) -> tuple[ModelBundle, ...]:
        """The bundles in use, sorted by task."""
        return tuple(self._models[task].bundle for task in sorted(self._models))

    def _model(self, task: Task) -> Model:
        try:
            return self._models[task]
        except KeyError:
            raise ModelUnavailable(f"no bundle for {task}; name one in [inference] bundles") from None

    def quality(self, frame: Picture) -> Quality:
        """Score a frame, uint8 sRGB of shape (rows, columns, 3); score rounded to one decimal.

        Raises
        ------
        ModelUnavailable, UnsupportedPixels
        """
        model = self._model("quality")
        card = model.bundle.card
        raw = float(model.outputs(frame)[0]) * card.calibration.scale + card.calibration.offset
        measured = {"short_side": float(min(frame.shape[:2])), "contrast": geometry.contrast(frame)}
        score = round(limited(raw, measured, card.limits), 1) + 0.0
        threshold = card.thresholds["acceptable"]
        return Quality(
            score=score,
            band=quality_band(score),
            acceptable=acceptable(score, threshold),
            threshold=threshold,
            algorithm=model.bundle.algorithm(f"measured limits: {', '.join(sorted(card.limits)) or 'none'}"),
        )

    def domain(self, frame: Picture) -> Domain:
        """Say whether a frame shows skin, and in which modality.

        Raises
        ------
        ModelUnavailable, UnsupportedPixels
        """
        model = self._model("domain")
        card = model.bundle.card
        values = _softmax(model.outputs(frame), card.calibration.temperature, card.calibration.bias)
        p = dict(zip((label.key for label in card.labels), values, strict=True))
        confidence = round(p["clinical"] + p["dermoscopic"], DIGITS)
        threshold = card.thresholds["dermatological"]
        dermatological = confidence >= threshold
        modality = ("dermoscopic" if p["dermoscopic"] >= p["clinical"] else "clinical") if dermatological else None
        return Domain(
            dermatological=dermatological,
            confidence=min(confidence, 1.0),
            modality=modality,
            threshold=threshold,
            algorithm=model.bundle.algorithm(),
        )

    def diagnosis(self, frame: Picture) -> tuple[Diagnosis, tuple[Indicator, ...]]:
        """Give the calibrated distribution over the bundle's categories, and what its matrix derives from it.

        Raises
        ------
        ModelUnavailable, UnsupportedPixels
        """
        model = self._model("diagnosis")
        card = model.bundle.card
        values = _softmax(model.outputs(frame), card.calibration.temperature, card.calibration.bias)
        categories = []
        for label, value in zip(card.labels, values, strict=True):
            assert label.code is not None  # noqa: S101 - the card of a diagnosis was checked for it
            code = Code(label.code.value, label.code.scheme_designator, label.code.meaning)
            categories.append(Category(key=label.key, code=code, probability=value))
        categories.sort(key=lambda category: (-category.probability, category.code.value))
        offsets = ", ".join(f"{value:g}" for value in card.calibration.bias) or "none"
        calibration = f"temperature {card.calibration.temperature:g}; class offsets {offsets}"
        diagnosis = Diagnosis(
            categories=tuple(categories), entropy=round(entropy(values), DIGITS), algorithm=model.bundle.algorithm(calibration)
        )
        derived = indicators({category.key: category.probability for category in categories}, card.matrix or {})
        found = []
        for key in INDICATORS:
            probability, threshold = round(derived[key], DIGITS), card.thresholds[key]
            found.append(
                Indicator(
                    key=key,
                    probability=probability,
                    threshold=threshold,
                    positive=probability >= threshold,
                    algorithm=model.bundle.algorithm("matrix of the bundle"),
                )
            )
        return diagnosis, tuple(found)

    def segmentation(self, frame: Picture, spacing_mm: tuple[float, float] | None = None) -> Segmentation:
        """Outline the lesions of a frame.

        Parameters
        ----------
        spacing_mm
            Millimetres between rows and between columns; None when not known, then no area in mm2 is given.

        Returns
        -------
        Segmentation
            ``mask`` in the frame's own size, only regions of the least area of the manifest and at most `MAX_LESIONS`.

        Raises
        ------
        ModelUnavailable, UnsupportedPixels
        """
        model = self._model("segmentation")
        card = model.bundle.card
        logits = model.outputs(frame)[0]
        small = (1 / (1 + np.exp(-np.clip(logits / card.calibration.temperature, -60, 60)))).astype(np.float32)
        rows, columns = frame.shape[:2]
        probability = _placed(small, rows, columns, card.input)
        cut, least = card.thresholds["mask"], card.thresholds["minimum_area_percent"] / 100 * rows * columns
        regions = geometry.components(probability >= cut, max(least, 1.0))[:MAX_LESIONS]
        mask = np.zeros((rows, columns), np.bool_)
        lesions = []
        for number, region in enumerate(regions, start=1):
            mask |= region
            polygon = geometry.outline(region)
            if polygon is None:
                continue
            area = float(region.sum())
            lesions.append(
                Lesion(
                    key=f"{card.labels[0].key}-{number}",
                    polygon=polygon,
                    area_pixels=area,
                    area_percent=round(100 * area / (rows * columns), 4),
                    area_mm2=None if spacing_mm is None else round(area * spacing_mm[0] * spacing_mm[1], 4),
                    certainty=round(float(probability[region].mean()), 4),
                )
            )
        parameters = f"mask at {cut:g}; regions of at least {card.thresholds['minimum_area_percent']:g} % of the image"
        return Segmentation(mask=mask, lesions=tuple(lesions), algorithm=model.bundle.algorithm(parameters))


def _placed(small: NDArray[np.float32], rows: int, columns: int, wanted: Input) -> NDArray[np.float32]:
    """Put the network's map back over the frame; outside of a centred square nothing was seen, so nothing was found."""
    if wanted.aspect == "squeeze":
        return geometry.enlarged(small, rows, columns)
    side = min(rows, columns)
    whole: NDArray[Any] = np.zeros((rows, columns), np.float32)
    top, left = (rows - side) // 2, (columns - side) // 2
    whole[top : top + side, left : left + side] = geometry.enlarged(small, side, side)
    return whole
