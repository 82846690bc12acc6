"""torchvision's detectors, to be measured beside this toolkit's: random weights, so that nothing is downloaded."""

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

from detection.benchmark.untrained import like_trained
from detection.core.errors import UserError
from detection.core.extras import require
from detection.runtime.onnx import open_session

SSD_SIDE = 320
"""torchvision's SSDlite resizes every image to this."""


def peer_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """The height and width that a peer computes on where it is asked for `size`."""
    return (SSD_SIDE, SSD_SIDE) if name.startswith("ssdlite") else size


def build_peer(name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """One of `detection.benchmark.settings.PEERS`, with random weights, that takes images of `size` as they are.

    Args:
        num_classes: object classes, *without* background (torchvision's own count includes it).

    Faster R-CNN has the few proposals (150) that its builder sets, as in the model that torchvision publishes. Its
    batch norms can be folded; those of the published weights are frozen, and a little slower.
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
    candidates: int,
    seed: int,
) -> nn.Module:
    """Write a peer that does a trained network's work (see `untrained`) to a file for `open_peer`."""
    model, threshold = like_trained(lambda: build_peer(name, num_classes, size), images, candidates, seed)
    torch.save({"weights": model.state_dict(), "score_threshold": threshold}, path)
    return _with_threshold(model, threshold)


def open_peer(name: str, path: Path, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """The peer that `save_peer` wrote, in evaluation mode on the CPU."""
    model = build_peer(name, num_classes, size)
    content = torch.load(path, weights_only=True)
    model.load_state_dict(content["weights"])
    return _with_threshold(model.eval(), content["score_threshold"])


def _with_threshold(model: nn.Module, threshold: float) -> nn.Module:
    holder: Any = model.roi_heads if isinstance(model, FasterRCNN) else model
    holder.score_thresh = threshold
    return model


def export_peer(model: nn.Module, path: Path, image: Tensor) -> None:
    """Write a peer as ONNX the way torchvision's documentation says: traced, for one image of this size.

    Args:
        image: uint8 [3, H, W].

    Raises:
        UserError: `onnx` is not installed, or this PyTorch cannot trace to ONNX any more.
    """
    require("torchvision's detectors in ONNX", "onnx")
    try:
        with warnings.catch_warnings():
            # Tracing warns of what depends on the image's size, which is fixed here, and of its own old age.
            warnings.simplefilter("ignore")
            torch.onnx.export(model, ([image.float() / 255],), str(path), dynamo=False, opset_version=17)
    except (RuntimeError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PyTorch {torch.__version__} cannot export it to ONNX: {reason}") from error


class PeerSession:
    """What `export_peer` wrote, in ONNX Runtime: a list of one uint8 image [3, H, W] -> [{boxes}]."""

    fixed_batch = 1

    def __init__(self, path: Path, threads: int, device: torch.device) -> None:
        self.session = open_session(path, device, threads)

    def __call__(self, images: list[Tensor]) -> list[dict[str, np.ndarray]]:
        (image,) = images
        # All three put out the boxes first.
        boxes, *_ = self.session.run(None, {self.session.get_inputs()[0].name: (image.float() / 255).numpy()})
        return [{"boxes": boxes}]
