"""What runs on which image, in which order: gates first, then what the profile's models can say of a picture that passed them.

The pipeline holds no model code and no torch; it is handed a runner. One failing item does not stop the others: its group
is absent, and the failure is named in the report.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from inference.errors import InferenceError, ModelUnavailable
from inference.records import Failure, FrameAnalysis, ImageAnalysis

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from inference.records import Frames
    from inference.runner import ModelRunner
    from storage.records import Summary

T = TypeVar("T")

ANALYSABLE: Final = {
    # Photographs that an IOD of PS3.3 makes for us, and secondary captures, the way phones and scanners file photographs.
    "1.2.840.10008.5.1.4.1.1.77.1.4": "VL Photographic Image Storage",
    "1.2.840.10008.5.1.4.1.1.77.1.7": "Dermoscopic Photography Image Storage",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.7.4": "Multi-frame True Color Secondary Capture Image Storage",
}
"""SOP classes whose instances are analysed. Not among them: video (a codec that `decode_frames` has not), endoscopy,
microscopy, slides and ophthalmology (VL too, but never skin as these models know it), and encapsulated documents (no pixels)."""

OUR_MODEL_NAME: Final = "dicom-node"
"""Manufacturer's Model Name (0008,1090) of what this node makes; a secondary capture of ours that comes back is not analysed."""

_ITEM_ERRORS: Final = (InferenceError, ArithmeticError, LookupError, RuntimeError, ValueError)
"""What a model, or the arithmetic behind it, raises on a picture it cannot digest; anything else is a fault of the program."""


def analysable(summary: Summary) -> bool:
    """Tell whether an admitted instance gets an analysis: by SOP class and colour, never by Modality; our own objects never.

    References
    ----------
    DICOM PS3.3 C.7.6.3.1.1 Samples per Pixel
    """
    if summary.sop_class_uid not in ANALYSABLE or not summary.has_pixel_data or summary.manufacturer_model_name == OUR_MODEL_NAME:
        return False
    samples = summary.attributes.get("SamplesPerPixel", ())
    interpretation = summary.attributes.get("PhotometricInterpretation", ())
    return samples == ("3",) or (samples == ("1",) and interpretation == ("PALETTE COLOR",))


class Pipeline:
    """Runs a profile on decoded images.

    Parameters
    ----------
    model
        The runner with the bundles; both gates must be among them.
    profile
        Name of this combination of items, written into the reports.
    max_frames
        Frames of one instance that are analysed; the first ones.
    observe
        Told the seconds each step took: ``quality``, ``domain``, ``diagnosis``, ``segmentation``.

    Raises
    ------
    ModelUnavailable
        A gate has no bundle: without gates nothing clinical may run.
    """

    def __init__(
        self,
        *,
        model: ModelRunner,
        profile: str = "dermatology",
        max_frames: int = 64,
        observe: Callable[[str, float], None] = lambda _step, _seconds: None,
    ) -> None:
        if not (model.has("quality") and model.has("domain")):
            raise ModelUnavailable(
                "The gates need a quality and a domain bundle; name them in [inference] bundles, or leave the shipped ones."
            )
        self._model = model
        self._observe = observe
        self._modalities = {bundle.card.task: frozenset(bundle.card.modalities) for bundle in model.bundles}
        self.profile = profile
        self.max_frames = max_frames

    @property
    def models(self) -> dict[str, str]:
        """Bundle name -> version and digest, of every bundle in use."""
        return {bundle.card.name: f"{bundle.card.version} sha256:{bundle.digest}" for bundle in self._model.bundles}

    @property
    def configuration_digest(self) -> str:
        """SHA-256, hexadecimal, over all that decides a result beside the picture: profile, limits, and bundles with their thresholds."""
        configuration: dict[str, Any] = {"profile": self.profile, "max_frames": self.max_frames, "bundles": self.models}
        return hashlib.sha256(json.dumps(configuration, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def run(self, header: Dataset, frames: Frames) -> ImageAnalysis:
        """Analyse the frames of one instance.

        Parameters
        ----------
        header
            The instance's data set without its pixels.
        frames
            Its first frames, as `decode_frames` gives them.

        Returns
        -------
        ImageAnalysis
            With a `Failure` and no frame for a picture without colour. A frame that a gate refused has the results of the gates alone.

        Raises
        ------
        InferenceError
            A gate could not run; nothing can be said of the picture.
        """
        frame_count = int(header.get("NumberOfFrames") or 1)
        if header.get("SamplesPerPixel") != 3 and header.get("PhotometricInterpretation") != "PALETTE COLOR":
            return ImageAnalysis(
                (), frame_count, (Failure("image", "The picture has no colour; the models are made for colour pictures."),)
            )
        shown = frames.pixels[: self.max_frames]
        analysed = tuple(self._frame(number, pixels, frames.spacing_mm) for number, pixels in enumerate(shown, start=1))
        failures = tuple(Failure("colour", note) for note in frames.notes)
        if len(analysed) < frame_count:
            failures += (Failure("frames", f"Only the first {len(analysed)} of {frame_count} frames were analysed, as configured."),)
        return ImageAnalysis(analysed, frame_count, failures)

    def _frame(self, number: int, pixels: NDArray[np.uint8], spacing_mm: tuple[float, float] | None) -> FrameAnalysis:
        rows, columns = pixels.shape[:2]
        quality = self._timed("quality", partial(self._model.quality, pixels))
        domain = self._timed("domain", partial(self._model.domain, pixels))
        gates = FrameAnalysis(number, rows, columns, quality, domain)
        if not gates.valid:
            return gates
        failures: list[Failure] = []
        diagnosed = self._item("diagnosis", domain.modality, partial(self._model.diagnosis, pixels), failures)
        segmentation = self._item("segmentation", domain.modality, partial(self._model.segmentation, pixels, spacing_mm), failures)
        diagnosis, indicators = diagnosed or (None, ())
        return FrameAnalysis(number, rows, columns, quality, domain, diagnosis, indicators, segmentation, tuple(failures))

    def _item(self, task: Any, modality: str | None, run: Callable[[], T], failures: list[Failure]) -> T | None:
        """Run one clinical item; None, with the reason in `failures`, where it cannot."""
        if not self._model.has(task):
            return None  # not part of this profile
        if modality not in self._modalities[task]:
            made_for = " and ".join(sorted(self._modalities[task]))
            failures.append(Failure(task, f"The model is made for {made_for} pictures; this one is {modality}."))
            return None
        try:
            return self._timed(task, run)
        except _ITEM_ERRORS as error:
            reason = (
                str(error) if isinstance(error, InferenceError) else f"The model could not digest the picture ({type(error).__name__})."
            )
            failures.append(Failure(task, reason))
            return None

    def _timed(self, step: str, run: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = run()
        self._observe(step, time.perf_counter() - began)
        return result
