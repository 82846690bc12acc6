"""Builds detectors with random weights whose latency is comparable to that of trained ones.

Box decoding and NMS process the candidates, the (box, class) pairs with a score above the threshold. A random network
has none or all of them: all scores of RetinaNet are 0.01 at first, those of SSD and Faster R-CNN 1 / (classes + 1). So
the threshold is chosen such that as many candidates pass as in a trained network. The batch norms take their statistics
from the images. Otherwise activations would vanish or explode from layer to layer, and values near zero (denormals)
slow down the computation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet

from detection.models.ghostdet import GhostDet

NUM_NMS_CANDIDATES = 1000
"""Default number of candidates of an image, without a trained network in the table. configs/retina_ghost_320.yaml
trained on bccd has 57 618 pairs: about 57 500 above 0.001 (the threshold of evaluations), 2400 above 0.05, 1100 above
0.1 and 100 above 0.3."""


@torch.no_grad()
def update_batch_norms(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Set the statistics of the batch norms of a detector in evaluation mode to those of the images.

    Args:
        images: float [3, H, W] in [0, 1]; at least two, because a batch norm raises an error for a single 1x1 map.
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
def nms_candidate_scores(model: nn.Module, image: Tensor) -> Tensor:
    """Scores of all (box, class) pairs of a detector for one image, descending, float32 [n].

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
    # In the others the first column is the background.
    scores = logits.sigmoid() if isinstance(model, RetinaNet | GhostDet) else logits.softmax(-1)[..., 1:]
    return scores.flatten().sort(descending=True).values


def score_threshold_for(scores: Tensor, num_candidates: int) -> float:
    """The score threshold that `num_candidates` of these descending scores exceed; 0 if there are fewer scores."""
    return float(scores[num_candidates]) if num_candidates < len(scores) else 0.0


def build_untrained(
    build: Callable[[], nn.Module], images: Sequence[Tensor], num_candidates: int, seed: int
) -> tuple[nn.Module, float]:
    """Build a detector in evaluation mode with batch norm statistics of the images, and find the score threshold.

    Args:
        images: uint8 [3, H, W].
        num_candidates: number of (box, class) pairs of the first image that pass the threshold.
    """
    torch.manual_seed(seed)
    model = build().eval()
    inputs = [image.float() / 255 for image in images]
    update_batch_norms(model, [inputs[i % len(inputs)] for i in range(max(2, len(inputs)))])
    return model, score_threshold_for(nms_candidate_scores(model, inputs[0]), num_candidates)
