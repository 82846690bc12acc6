"""Detectors with random weights that do the work of trained ones, so that their time says something.

Box decoding and NMS work on the candidates, the (box, class) pairs with a score above the threshold, and a random
network has either none of them or all: RetinaNet's scores are all 0.01 at the start, SSD's and Faster R-CNN's all
1 / (classes + 1). So the threshold is put where as many candidates pass as with a trained network. And the
batch norms, which a freshly built network has not yet got any statistics for, take them from the images: else maps
would fade or blow up from layer to layer, and numbers near zero (denormals) are slow to compute with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet

from detection.models.ghostdet import GhostDet

CANDIDATES = 1000
"""Of an image, where no trained network in the table tells. configs/retina_ghost_320.yaml trained on bccd has,
of 57 618, some 57 500 above 0.001 (the threshold of evaluations), 2400 above 0.05, 1100 above 0.1 and 100 above 0.3."""


@torch.no_grad()
def settle(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Let the batch norms of a detector in evaluation mode take their statistics from these images.

    Args:
        images: at least two (a batch norm refuses a single 1x1 map), float [3, H, W] in [0, 1].
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(list(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


@torch.no_grad()
def candidate_scores(model: nn.Module, image: Tensor) -> Tensor:
    """Scores of all (box, class) pairs that a detector weighs for one image, descending, float32 [n].

    Args:
        model: torchvision's RetinaNet, SSD or Faster R-CNN, or one of this toolkit, in evaluation mode.
        image: float [3, H, W] in [0, 1].
    """
    outputs: list[Any] = []
    head: Any = model.roi_heads.box_predictor if isinstance(model, FasterRCNN) else model.head
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model([image])
    finally:
        handle.remove()
    logits = outputs[0][0] if isinstance(model, FasterRCNN) else outputs[0]["cls_logits"]
    # The others' first column is the background.
    scores = logits.sigmoid() if isinstance(model, RetinaNet | GhostDet) else logits.softmax(-1)[..., 1:]
    return scores.flatten().sort(descending=True).values


def threshold_for(scores: Tensor, candidates: int) -> float:
    """The score threshold that so many of these descending scores are above; all, where they are fewer."""
    return float(scores[candidates]) if candidates < len(scores) else 0.0


def like_trained(
    build: Callable[[], nn.Module], images: Sequence[Tensor], candidates: int, seed: int
) -> tuple[nn.Module, float]:
    """A built and settled detector in evaluation mode, and the score threshold for so many candidates.

    Args:
        images: uint8 [3, H, W].
    """
    torch.manual_seed(seed)
    model = build().eval()
    units = [image.float() / 255 for image in images]
    settle(model, [units[i % len(units)] for i in range(max(2, len(units)))])
    return model, threshold_for(candidate_scores(model, units[0]), candidates)
