"""Checks before any work, and without an import, that the packages which only some commands need are installed."""

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
"""Package -> the extra of setup.cfg that installs it."""
RUNTIMES = {".onnx": ("onnxruntime",), ".xml": ("openvino",)}
"""Suffix of an exported file -> packages that run it, besides PyTorch."""
WRITERS = {"onnx": ("onnx", "onnxslim", "onnxruntime"), "openvino": ("onnx", "onnxslim", "openvino")}
"""Export format -> packages that write such a file and compare it with PyTorch."""
BACKENDS = {"faster-coco-eval": ("faster_coco_eval",)}
"""eval.backend -> packages that it needs besides pycocotools."""


def require(what: str, *packages: str) -> None:
    """Raise UserError if one of `packages` (import names, keys of `EXTRAS`), which `what` needs, is not installed."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        extras = ",".join(dict.fromkeys(EXTRAS[package] for package in absent))
        names = ", ".join(absent).replace("_", "-")
        raise UserError(f"{what} needs {names}: pip install -e '.[{extras}]'")


def require_for_file(path: str | Path) -> None:
    """`require` the packages that run an exported file; a checkpoint needs none."""
    require(str(path), *RUNTIMES.get(Path(path).suffix.lower(), ()))


def require_for_quantization(formats: Sequence[str], precisions: Sequence[str]) -> None:
    """`require` the packages for quantization, which starts from an ONNX file for every format."""
    require("quantization", *WRITERS["onnx"])
    if "openvino" in formats:
        require("quantization for OpenVINO", *WRITERS["openvino"], *(["nncf"] if "int8" in precisions else []))


def require_for_backbone(name: str, weights: str | None) -> None:
    """`require` the packages that build a backbone: timm for timm/NAME and for weights=timm."""
    if name.startswith("timm/"):
        require(f"backbone {name}", "timm")
    if weights == "timm":
        require("weights=timm", "timm")


def require_for_config(config: Any) -> None:
    """`require` all packages for a training with a `detection.config.DetectionConfig`."""
    require_for_backbone(config.model.backbone.name, config.model.backbone.weights)
    require(f"eval.backend={config.eval.backend}", *BACKENDS.get(config.eval.backend, ()))
    if config.train.wandb is not None:
        require("train.wandb", "wandb")


def require_for_pretraining(config: Any) -> None:
    """`require` all packages for a `detection.pretraining.classification_config.ClassificationConfig`."""
    require_for_backbone(config.model.name, config.model.weights)
    if config.teacher is not None and config.teacher.name.startswith("timm/"):
        require(f"teacher {config.teacher.name}", "timm")
    if config.train.wandb is not None:
        require("train.wandb", "wandb")
