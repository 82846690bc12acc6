"""Opens a checkpoint or an exported file as a detector with torchvision's calling protocol."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.checkpoint import Classes, classes_of, config_of, load_model_state, read_checkpoint, weights_of
from detection.config import DetectionConfig
from detection.core.device import autocast
from detection.models.build import build_model
from detection.models.fpn import BackboneWithFPN
from detection.runtime.adapted import AdaptedDetector, load_adapted
from detection.runtime.adapter import find_adapter
from detection.runtime.exported import exported_config, is_exported, load_exported, read_metadata


def load_detector(
    path: str | Path,
    device: torch.device,
    *,
    score_threshold: float | None = None,
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> tuple[torch.nn.Module, DetectionConfig, Classes]:
    """Load a checkpoint (with its averaged weights, if it has them) or an exported file for inference.

    A re-parameterizable backbone is fused, so the model cannot be trained. Exported files are ONNX (`.onnx`), OpenVINO
    (`.xml`), TorchScript (`.torchscript`) and torch.export (`.pt2`); see `detection.runtime.exported`.

    Args:
        score_threshold: replaces `eval.score_threshold` of the config.
        overrides: `key=value` for the config, e.g. eval.nms_threshold=0.6.
        adapter: of an ONNX file of another project, see `detection.runtime.adapter.find_adapter`.

    Raises:
        UserError: the file cannot be read or does not fit its adapter, or `overrides` change what is fixed in it.
    """
    if (found := find_adapter(path, adapter)) is not None:
        return load_adapted(path, found, device, score_threshold=score_threshold, overrides=overrides)
    if is_exported(path):
        return load_exported(path, device, score_threshold=score_threshold, overrides=overrides)
    content = read_checkpoint(path)
    classes = classes_of(content, path)
    config = config_of(content, path).with_overrides(overrides)
    build = config.model_copy(deep=True)
    # All weights are in the checkpoint; the file of pretrained weights may be missing.
    build.model.weights = build.model.backbone.weights = None
    if score_threshold is not None:
        build.eval.score_threshold = score_threshold
    model = build_model(build, len(classes.names))
    load_model_state(model, weights_of(content, path), path)
    neck: BackboneWithFPN = model.backbone  # type: ignore[assignment]
    neck.body.fuse()
    model = model.to(device).eval()
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, config, classes


def own_resize(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray] | None:
    """How a detector of `load_detector` resizes images, uint8 [H, W, 3] -> [H', W', 3]; None for
    `detection.data.transforms.resize` with the sizes of its config."""
    return model.resize if isinstance(model, AdaptedDetector) else None


@torch.inference_mode()
def predict_batch(
    model: torch.nn.Module, images: Iterable[Tensor], device: torch.device, amp: str = "off"
) -> list[dict[str, Tensor]]:
    """Detect in images [3, H, W] with a model in evaluation mode: one forward pass under autocast.

    Args:
        device: the model's; images are copied there.
        amp: "off", "bf16" or "fp16".

    Returns:
        For each image {boxes float [n, 4] xyxy in its pixels, labels int64 [n], scores float [n]}.
    """
    with autocast(device, amp):
        return model([image.to(device, non_blocking=True) for image in images])


def detector_config(
    path: str | Path, overrides: Sequence[str] = (), adapter: str | Path | None = None
) -> DetectionConfig:
    """The config of a checkpoint or an exported file, without its model. Raises UserError, see `load_detector`."""
    if (found := find_adapter(path, adapter)) is not None:
        return load_adapted(path, found, torch.device("cpu"), overrides=overrides)[1]
    if is_exported(path):
        return exported_config(read_metadata(path), path, overrides)
    return config_of(read_checkpoint(path), path).with_overrides(overrides)
