"""torchvision's detectors for comparison, with random weights so that nothing is downloaded."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    retinanet_resnet50_fpn_v2,
    ssdlite320_mobilenet_v3_large,
)

from detection.benchmark.untrained import build_untrained
from detection.core.errors import UserError
from detection.core.extras import require
from detection.runtime.onnx import open_session

SSD_SIDE = 320
"""torchvision's SSDlite resizes every image to this."""


def peer_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the input of a peer for images of `size`."""
    return (SSD_SIDE, SSD_SIDE) if name.startswith("ssdlite") else size


def build_peer(name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """Build one of `detection.benchmark.settings.PEERS` with random weights; it does not resize images of `size`.

    Faster R-CNN has 150 proposals, the default of its builder and of torchvision's published model. Its batch norms can
    be folded; the frozen ones of the published weights are a little slower.

    Args:
        num_classes: object classes, *without* background (torchvision's count includes it).
    """
    weights: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": num_classes + 1}
    sides = {"min_size": min(size), "max_size": max(size)}
    if name == "ssdlite320_mobilenet_v3_large":
        return ssdlite320_mobilenet_v3_large(**weights)
    if name == "fasterrcnn_mobilenet_v3_large_320_fpn":
        return fasterrcnn_mobilenet_v3_large_320_fpn(**weights, **sides)
    return retinanet_resnet50_fpn_v2(**weights, **sides)


def save_peer(
    name: str,
    path: Path,
    num_classes: int,
    size: tuple[int, int],
    images: Sequence[Tensor],
    num_candidates: int,
    seed: int,
) -> nn.Module:
    """Save a peer with as much work as a trained network (see `untrained`) for `open_peer`."""
    model, threshold = build_untrained(lambda: build_peer(name, num_classes, size), images, num_candidates, seed)
    torch.save({"weights": model.state_dict(), "score_threshold": threshold}, path)
    return _with_threshold(model, threshold)


def open_peer(name: str, path: Path, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """Load a file of `save_peer`, in evaluation mode on the CPU."""
    model = build_peer(name, num_classes, size)
    content = torch.load(path, weights_only=True)
    model.load_state_dict(content["weights"])
    return _with_threshold(model.eval(), content["score_threshold"])


def _with_threshold(model: nn.Module, threshold: float) -> nn.Module:
    head: Any = model.roi_heads if isinstance(model, FasterRCNN) else model
    head.score_thresh = threshold
    return model


def export_peer(model: nn.Module, path: Path, image: Tensor) -> None:
    """Export a peer to ONNX as in torchvision's documentation: traced, for one image of this size.

    Args:
        image: uint8 [3, H, W].

    Raises:
        UserError: `onnx` is not installed, or this version of PyTorch no longer traces to ONNX.
    """
    require("torchvision's detectors in ONNX", "onnx")
    try:
        with warnings.catch_warnings():
            # Tracing warns about values that depend on the image size, which is fixed here, and about its deprecation.
            warnings.simplefilter("ignore")
            torch.onnx.export(model, ([image.float() / 255],), str(path), dynamo=False, opset_version=17)
    except (RuntimeError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PyTorch {torch.__version__} cannot export it to ONNX: {reason}") from error


class PeerSession:
    """Runs a file of `export_peer` in ONNX Runtime: a list of one uint8 image [3, H, W] -> [{boxes}]."""

    fixed_batch = 1

    def __init__(self, path: Path, threads: int, device: torch.device) -> None:
        self.session = open_session(path, device, threads)

    def __call__(self, images: list[Tensor]) -> list[dict[str, np.ndarray]]:
        (image,) = images
        # The boxes are the first output of all peers.
        boxes, *_ = self.session.run(None, {self.session.get_inputs()[0].name: (image.float() / 255).numpy()})
        return [{"boxes": boxes}]
