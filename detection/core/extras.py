"""Packages that only some commands need: whether they are there is known before any work, without importing them."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.core.errors import UserError

EXTRAS = {
    "faster_coco_eval": "fast-eval",
    "huggingface_hub": "hub",
    "nncf": "quantize",
    "norfair": "track",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxslim": "onnx",
    "openvino": "openvino",
    "timm": "timm",
    "wandb": "wandb",
}
"""Package -> the extra of setup.cfg that brings it."""
RUNTIMES = {".onnx": ("onnxruntime",), ".xml": ("openvino",)}
"""How an exported file's name ends -> what runs it, besides PyTorch."""
WRITERS = {"onnx": ("onnx", "onnxslim", "onnxruntime"), "openvino": ("onnx", "onnxslim", "openvino")}
"""Format of tools/export.py -> what writes such a file and compares it with PyTorch."""
BACKENDS = {"faster-coco-eval": ("faster_coco_eval",)}
"""eval.backend -> what it needs besides pycocotools."""


def require(what: str, *packages: str) -> None:
    """Raise UserError where one of `packages` (names to import, of `EXTRAS`) is not installed; `what` needs them."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        extras = ",".join(dict.fromkeys(EXTRAS[package] for package in absent))
        names = ", ".join(absent).replace("_", "-")
        raise UserError(f"{what} needs {names}: pip install -e '.[{extras}]'")


def require_for_file(path: str | Path) -> None:
    """`require` of what runs an exported file; nothing for checkpoints."""
    require(str(path), *RUNTIMES.get(Path(path).suffix.lower(), ()))


def require_for_quantization(formats: Sequence[str], precisions: Sequence[str]) -> None:
    """`require` of what tools/quantize.py needs, which makes all files of the ONNX one."""
    require("quantization", *WRITERS["onnx"])
    if "openvino" in formats:
        require("quantization for OpenVINO", *WRITERS["openvino"], *(["nncf"] if "int8" in precisions else []))


def require_for_backbone(name: str, weights: str | None) -> None:
    """`require` of what builds a backbone: timm for timm/NAME, and for its weights."""
    if name.startswith("timm/"):
        require(f"backbone {name}", "timm")
    if weights == "timm":
        require("weights=timm", "timm")


def require_for_config(config: Any) -> None:
    """`require` of all that a training by this `detection.config.DetectionConfig` needs."""
    require_for_backbone(config.model.backbone.name, config.model.backbone.weights)
    require(f"eval.backend={config.eval.backend}", *BACKENDS.get(config.eval.backend, ()))
    if config.train.wandb is not None:
        require("train.wandb", "wandb")


def require_for_pretraining(config: Any) -> None:
    """`require` of all that this `detection.pretraining.classification_config.ClassificationConfig` needs."""
    require_for_backbone(config.model.name, config.model.weights)
    if config.teacher is not None and config.teacher.name.startswith("timm/"):
        require(f"teacher {config.teacher.name}", "timm")
    if config.train.wandb is not None:
        require("train.wandb", "wandb")
