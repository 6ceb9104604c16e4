"""Small bundles with seeded weights, for tests of the format and of the runner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from inference.bundle import INDICATORS
from inference.networks import build

LABELS = {
    "quality": ["quality"],
    "domain": ["dermoscopic", "clinical", "other"],
    "diagnosis": ["melanoma", "nevus"],
    "segmentation": ["lesion"],
}
THRESHOLDS = {
    "quality": {"acceptable": 41},
    "domain": {"dermatological": 0.5},
    "diagnosis": dict.fromkeys(INDICATORS, 0.5),
    "segmentation": {"mask": 0.5, "minimum_area_percent": 0.1},
}


def manifest(task: str, weights: bytes = b"") -> dict[str, Any]:
    """Make a manifest that is valid for `weights`."""
    segmentation = task == "segmentation"
    found: dict[str, Any] = {
        "format": 1,
        "name": f"test-{task}",
        "version": "0.1",
        "title": f"Test {task}",
        "task": task,
        "architecture": {
            "name": "mobilenet_v2_segmenter" if segmentation else "mobilenet_v1_classifier",
            "arguments": {"outputs": 1, "channels": 8} if segmentation else {"outputs": len(LABELS[task]), "width": 0.25, "taps": [8, 32]},
        },
        "labels": [{"key": key, "code": {"value": key[:16], "scheme_designator": "99TEST", "meaning": key}} for key in LABELS[task]],
        "input": {"rows": 64, "columns": 64, "aspect": "squeeze", "mean": [127.5] * 3, "deviation": [127.5] * 3},
        "calibration": {"scale": 100} if task == "quality" else {},
        "thresholds": THRESHOLDS[task],
        "data_card": {"training_data": "none", "evaluation_data": "none", "intended_use": "tests", "limitations": "random weights"},
        "licence": "Apache-2.0",
        "attribution": [],
        "metrics": {},
        "clinical": False,
        "weights": {"file": "weights.safetensors", "sha256": hashlib.sha256(weights).hexdigest()},
    }
    if task == "diagnosis":
        found["matrix"] = {
            "melanoma": dict.fromkeys(INDICATORS, True),
            "nevus": dict.fromkeys(INDICATORS, False) | {"pigmented_lesion": True},
        }
    return found


def write_bundle(folder: Path, task: str, content: bytes | None = None, /, **changes: Any) -> Path:
    """Write a bundle into `folder` / `task`; top-level keys of the manifest as in `changes`."""
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    card = manifest(task)
    if content is None:
        torch.manual_seed(7)
        network = build(card["architecture"]["name"], card["architecture"]["arguments"])
        content = save({name: np.ascontiguousarray(tensor.half().numpy()) for name, tensor in network.state_dict().items()})
    (target / "weights.safetensors").write_bytes(content)
    (target / "manifest.json").write_text(json.dumps(manifest(task, content) | changes))
    return target
