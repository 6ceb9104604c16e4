"""Write a trained network and its figures as a bundle under ``inference/bundles``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from torch import nn

from inference.bundle import INDICATORS, load_bundle
from inference.training import data, fit

VERSION = "1.0.0"
CODE_SCHEME = "99ICD11"
BACKBONE = "MobileNet weights from google-coral/test_data, Apache-2.0"
ISIC_2017 = (
    'Codella et al., "Skin Lesion Analysis Toward Melanoma Detection: A Challenge at the 2017 ISBI, hosted by ISIC", arXiv:1710.05006 '
    "(CC-0)"
)
ISIC_2018 = 'Codella et al., "Skin Lesion Analysis Toward Melanoma Detection 2018", arXiv:1902.03368 (Tasks 1 and 2, CC-0)'
HEALTHY = "AGPPGA Non-Specific Lesion dataset, Legit.Health, doi:10.5281/zenodo.17975532, CC BY 4.0"
NON_SKIN = (
    "Open Images pictures via google-coral/test_data, CC BY 2.0",
    "BCCD_Dataset, copyright (c) 2017 shenggan, MIT",
    "mercure documentation pictures, copyright (c) 2019-2024 Kai Tobias Block, Roy Wiggins, Joshy Cyriac, Amanpreet Singh Saimbhi, MIT",
)
LIMITATIONS = (
    "A reference model for plumbing and regression tests, not for clinical use. Dermoscopy of mostly light skin, three classes, one "
    "archive; no skin-tone "
    "labels, so no statement about fairness; no patient or lesion ids, so two pictures of one lesion may sit on both sides of the split. "
    "The backbone was "
    "trained on ImageNet, which was published for non-commercial research; the backbone files are published under Apache-2.0."
)
Spec = tuple[str, dict[str, Any]]


def split_counts(listed: list[data.Picture]) -> dict[str, Any]:
    """Describe the split that was used."""
    return {
        "rule": f"by group of near duplicates; test: ISIC 2017 validation set and hash below {data.TEST_SHARE}; validation: the next "
        "{data.VALIDATION_SHARE}",
        "salt": data.SPLIT_SALT,
        **{
            split: {
                name: count
                for index, name in enumerate(data.CLASSES)
                if (count := Counter((p.split, p.label) for p in listed)[split, index])
            }
            for split in ("train", "validation", "test")
        },
    }


def write(network: nn.Module, manifest: dict[str, Any], *, folder: Path | None = None) -> Path:
    """Write the bundle named in `manifest`: weights as float16, then the manifest with their digest; read it back as a check."""
    target = (folder or Path(__file__).resolve().parents[1] / "bundles") / str(manifest["name"])
    target.mkdir(parents=True, exist_ok=True)
    weights = save({name: np.ascontiguousarray(tensor.detach().half().numpy()) for name, tensor in sorted(network.state_dict().items())})
    (target / "weights.safetensors").write_bytes(weights)
    whole = {
        "format": 1,
        **manifest,
        "clinical": False,
        "weights": {"file": "weights.safetensors", "sha256": hashlib.sha256(weights).hexdigest()},
    }
    (target / "manifest.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    bundle = load_bundle(target)
    fit.say(f"wrote {target} ({len(weights)} bytes of weights, digest {bundle.digest})")
    return target


def picture_input(size: int, views: tuple[str, ...] = ("as_is",)) -> dict[str, Any]:
    """The ``input`` of a manifest: the whole picture squeezed to a square, scaled to [-1, 1]."""
    return {"rows": size, "columns": size, "aspect": "squeeze", "mean": [127.5] * 3, "deviation": [127.5] * 3, "views": list(views)}


def write_diagnosis(
    network: nn.Module,
    *,
    architecture: Spec,
    size: int,
    views: tuple[str, ...],
    calibration: tuple[float, list[float]],
    threshold: float,
    sensitivity: float,
    metrics: dict[str, Any],
) -> Path:
    """Write the diagnosis bundle; `threshold` holds for malignancy and both referrals, whose columns are the same here."""
    codes = {
        "melanoma": ("2C30", "Melanoma of skin"),
        "seborrheic_keratosis": ("2F21.0", "Seborrhoeic keratosis"),
        "nevus": ("2F20", "Melanocytic naevus"),
    }
    # a melanoma is malignant and urgent; every one of the three is a dermatological condition and usually pigmented
    rows = {
        "melanoma": (True, True, True, True, True),
        "seborrheic_keratosis": (True, False, True, False, False),
        "nevus": (True, False, True, False, False),
    }
    return write(
        network,
        {
            "name": "lesion-diagnosis",
            "version": VERSION,
            "title": "Reference diagnosis, three pigmented lesions",
            "task": "diagnosis",
            "architecture": {"name": architecture[0], "arguments": architecture[1]},
            "labels": [
                {"key": key, "code": {"value": codes[key][0], "scheme_designator": CODE_SCHEME, "meaning": codes[key][1]}}
                for key in data.CLASSES
            ],
            "input": picture_input(size, views),
            "calibration": {"temperature": calibration[0], "bias": calibration[1]},
            "thresholds": {
                "dermatological_condition": 0.5,
                "malignancy": threshold,
                "pigmented_lesion": 0.5,
                "urgent_referral": threshold,
                "high_priority_referral": threshold,
            },
            "matrix": {key: dict(zip(INDICATORS, rows[key], strict=True)) for key in data.CLASSES},
            "data_card": {
                "training_data": "ISIC 2017 dermoscopy with three classes, and the ISIC 2018 crops of the same ids; fine-tuned from "
                "ImageNet MobileNetV2.",
                "evaluation_data": "Held-out part of the same archive, split by id and near-duplicate group; whole 2017 pictures.",
                "intended_use": "Dermoscopic pictures of one pigmented lesion. The threshold of malignancy and of both referrals is the "
                "highest that "
                f"finds {sensitivity:.0%} of the melanomas of the validation split. Codes of ICD-11 were not checked against the "
                f"official browser.",
                "limitations": LIMITATIONS + " Whatever is shown, the three probabilities sum to 1: no other disease can be named.",
            },
            "licence": "Apache-2.0",
            "attribution": [ISIC_2017, ISIC_2018, BACKBONE],
            "metrics": metrics,
        },
    )


def write_segmentation(
    network: nn.Module, *, architecture: Spec, size: int, views: tuple[str, ...], threshold: float, metrics: dict[str, Any]
) -> Path:
    """Write the lesion segmentation bundle."""
    return write(
        network,
        {
            "name": "lesion-segmentation",
            "version": VERSION,
            "title": "Reference lesion outline, dermoscopy",
            "task": "segmentation",
            "architecture": {"name": architecture[0], "arguments": architecture[1]},
            "labels": [{"key": "lesion"}],
            "input": picture_input(size, views),
            "calibration": {},
            "thresholds": {"mask": threshold, "minimum_area_percent": 0.1},
            "data_card": {
                "training_data": "ISIC 2018 Task 1 pictures and masks, centre squares; fine-tuned from ImageNet MobileNetV2.",
                "evaluation_data": "Held-out part of the same archive, split by id and near-duplicate group; Dice at 512 x 512 pixels.",
                "intended_use": "Dermoscopic pictures of one lesion; outlines for display and area, not for measurement of growth.",
                "limitations": LIMITATIONS,
            },
            "licence": "Apache-2.0",
            "attribution": [ISIC_2018, ISIC_2017, BACKBONE],
            "metrics": metrics,
        },
    )


def write_domain(
    network: nn.Module, *, architecture: Spec, size: int, threshold: float, labels: tuple[str, ...], metrics: dict[str, Any]
) -> Path:
    """Write the domain bundle."""
    return write(
        network,
        {
            "name": "image-domain",
            "version": VERSION,
            "title": "Reference domain check",
            "task": "domain",
            "architecture": {"name": architecture[0], "arguments": architecture[1]},
            "labels": [{"key": key} for key in labels],
            "input": picture_input(size),
            "calibration": {},
            "thresholds": {"dermatological": threshold},
            "data_card": {
                "training_data": "ISIC dermoscopy; crops of 7 photographs of healthy skin, some with a dermoscopic lesion laid over; "
                "lesions drawn by this "
                "software (dicom_node.demo, other seeds than the demonstration's) as dermoscopic; blood smears, animals, plants, food, "
                "screens, rendered "
                "radiology and pathology files, drawn patterns and text pages as other. One linear layer on unchanged ImageNet "
                "MobileNetV1 features.",
                "evaluation_data": "Held-out ids, 4 held-out photographs and their crops, and negatives; each negative source also left "
                "out of the fit whole.",
                "intended_use": "Keeps pictures that are not of skin from the clinical models.",
                "limitations": LIMITATIONS
                + " Only 13 photographs of healthy, light skin stand for clinical photography: expect errors on wide-field pictures.",
            },
            "licence": "Apache-2.0",
            "attribution": [ISIC_2017, ISIC_2018, HEALTHY, *NON_SKIN, BACKBONE],
            "metrics": metrics,
        },
    )


def write_quality(
    network: nn.Module, *, architecture: Spec, size: int, threshold: float, limits: dict[str, list[list[float]]], metrics: dict[str, Any]
) -> Path:
    """Write the quality bundle."""
    return write(
        network,
        {
            "name": "image-quality",
            "version": VERSION,
            "title": "Reference image quality",
            "task": "quality",
            "architecture": {"name": architecture[0], "arguments": architecture[1]},
            "labels": [{"key": "quality"}],
            "input": picture_input(size),
            "calibration": {"scale": 100.0},
            "thresholds": {"acceptable": threshold},
            "limits": limits,
            "data_card": {
                "training_data": "ISIC dermoscopy, crops of photographs of healthy skin and lesions drawn by this software, made worse "
                "on purpose (blur, "
                "low resolution, exposure, contrast, noise, JPEG); the target score is a formula of those faults, not a person's opinion.",
                "evaluation_data": "The same faults on held-out pictures.",
                "intended_use": "Finds pictures too poor to analyse. Seen at 256 x 256 pixels: faults finer than that are not seen. The "
                "measured limits "
                "(pixels of the short side, contrast) lower the network's score, never raise it.",
                "limitations": LIMITATIONS + " The score was not compared with the opinion of people.",
            },
            "licence": "Apache-2.0",
            "attribution": [ISIC_2018, ISIC_2017, HEALTHY, BACKBONE],
            "metrics": metrics,
        },
    )
