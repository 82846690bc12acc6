"""torchvision's RetinaNet with a configurable head, labels 1…N and no logit for the background."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops.misc import Conv2dNormActivation

from detection.models.neck import PyramidBackbone
from detection.models.transform import NormalizeAndBatch

Norm = Callable[[int], nn.Module]


def build_retinanet(
    backbone: PyramidBackbone,
    num_classes: int,
    *,
    head_channels: int = 256,
    head_depth: int = 4,
    norm_groups: int = 0,
    box_loss: str = "l1",
    box_loss_weight: float = 1.0,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> "GhostRetinaNet":
    """A RetinaNet on P3–P7 (arXiv 1708.02002); with GroupNorm and GIoU it is torchvision's "v2" head.

    Args:
        num_classes: object classes, *without* background.
        head_channels, head_depth: of the two towers of 3x3 convolutions.
        norm_groups: of GroupNorm in the towers; 0 is no normalisation.
        box_loss, box_loss_weight: "l1" or "giou", and its weight against the classification loss.
        anchor_sizes: the smallest anchor's side in pixels on P3, P4, …; each place has three scales
            (x 2**(0, 1/3, 2/3)) and three aspect ratios (1:2, 1:1, 2:1).
    """
    sizes = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in anchor_sizes)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = GhostRetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        num_classes,
        width=head_channels,
        depth=head_depth,
        norm_groups=norm_groups,
        box_loss=box_loss,
    )
    return GhostRetinaNet(
        backbone,
        num_classes + 1,
        anchor_generator=anchors,
        head=head,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=max_detections,
        box_loss_weight=box_loss_weight,
    )


class GhostRetinaNet(RetinaNet):
    """torchvision's calling protocol; labels are 1…N as for every torchvision detector.

    torchvision lets labels index the logits, so that its RetinaNet spends one logit per anchor on a background
    class that the focal loss does not have. Here logits are the N classes, and the shift by one is made
    in the two methods below and nowhere else.

    forward: (list of [3, H, W] uint8 or float in [0, 1], targets with boxes float32 [n, 4] xyxy in pixels and
    labels int64 [n]) -> dict of losses in training, list of {boxes, labels, scores} in evaluation.
    """

    def __init__(
        self, backbone: PyramidBackbone, num_classes: int, *, box_loss_weight: float = 1.0, **retinanet: Any
    ) -> None:
        super().__init__(backbone, num_classes, **retinanet)
        self.box_loss_weight = box_loss_weight
        self.transform = NormalizeAndBatch(backbone.body.mean, backbone.body.std)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        shifted = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]
        losses = super().compute_loss(shifted, head_outputs, anchors)
        losses["bbox_regression"] = losses["bbox_regression"] * self.box_loss_weight
        return losses

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
        for per_image in detections:
            per_image["labels"] += 1
        return detections


class GhostRetinaNetHead(RetinaNetHead):
    """torchvision's two heads, with towers of any width and depth."""

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        *,
        width: int,
        depth: int,
        norm_groups: int,
        box_loss: str,
    ) -> None:
        nn.Module.__init__(self)
        norm: Norm | None = partial(_group_norm, norm_groups) if norm_groups else None
        classification = RetinaNetClassificationHead(width, num_anchors, num_classes, norm_layer=norm)
        classification.conv = _tower(in_channels, width, depth, norm)
        regression = RetinaNetRegressionHead(width, num_anchors, norm_layer=norm)
        regression.conv = _tower(in_channels, width, depth, norm)
        regression._loss_type = box_loss
        self.classification_head = classification
        self.regression_head = regression

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        # Losses, decoding and NMS in full precision, also where autocast made the convolutions half as precise.
        return {name: output.float() for name, output in super().forward(x).items()}


def _group_norm(groups: int, channels: int) -> nn.Module:
    # Two channels a group at least: a group of a single value, as on a 1x1 map, cannot be normalised, and
    # PyTorch refuses it.
    return nn.GroupNorm(math.gcd(groups, max(1, channels // 2)), channels)


def _tower(in_channels: int, width: int, depth: int, norm: Norm | None) -> nn.Sequential:
    layers = [Conv2dNormActivation(in_channels if i == 0 else width, width, norm_layer=norm) for i in range(depth)]
    for module in (m for layer in layers for m in layer.modules()):
        if isinstance(module, nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)
