"""GhostDet: one point a place, boxes as distances, light all the way through."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from detection.models.aligned import aligned_losses, assign, pad_targets
from detection.models.ghost_pan import DepthwiseSeparable, GhostPyramid
from detection.models.transform import NormalizeAndBatch

STRIDES = (8, 16, 32, 64)


class GhostDetHead(nn.Module):
    """Depthwise separable towers of each level's own, shared by classes and boxes up to their last layers.

    forward: maps, finest first -> cls_logits float32 [N, A, C], bbox_regression float32 [N, A, 4 * bins]. Points are in
    the order of the levels, their rows and their columns.

    Args:
        channels: of the maps and the towers.
        depth: layers in a tower.
        bins: a distance is an average of 0 … bins - 1 strides, weighted by a softmax (arXiv 2006.04388).
    """

    def __init__(self, channels: int, num_classes: int, *, depth: int = 2, bins: int = 8) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        self.towers = nn.ModuleList(
            nn.Sequential(*(DepthwiseSeparable(channels, channels) for _ in range(depth))) for _ in STRIDES
        )
        self.cls_logits = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for _ in STRIDES)
        self.bbox_reg = nn.ModuleList(nn.Conv2d(channels, 4 * bins, 1) for _ in STRIDES)
        for cls, reg in zip(self.cls_logits, self.bbox_reg, strict=True):
            nn.init.normal_(cls.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.normal_(reg.weight, std=0.01)  # type: ignore[arg-type]
            # Every point begins with a score of 1 %: few are positive (arXiv 1708.02002, section 4.1).
            nn.init.constant_(cls.bias, -math.log(99))  # type: ignore[arg-type]
            nn.init.zeros_(reg.bias)  # type: ignore[arg-type]

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        towers = [tower(level) for tower, level in zip(self.towers, x, strict=True)]
        return {
            "cls_logits": _rows(towers, self.cls_logits, self.num_classes),
            "bbox_regression": _rows(towers, self.bbox_reg, 4 * self.bins),
        }


def _rows(maps: list[Tensor], layers: nn.ModuleList, channels: int) -> Tensor:
    outputs = [layer(x).flatten(2) for layer, x in zip(layers, maps, strict=True)]
    # In full precision, also where autocast made the convolutions half as precise.
    return torch.cat(outputs, dim=2).transpose(1, 2).float()


class GhostDet(nn.Module):
    """torchvision's calling protocol.

    forward: (list of [3, H, W] uint8 or float in [0, 1], targets with boxes float32 [n, 4] xyxy in pixels and labels
    int64 [n], 1…C) -> dict of losses in training, list of {boxes, labels, scores} in evaluation.

    Args:
        num_classes: object classes, without background.
        head_depth, bins: see `GhostDetHead`.
        box_loss_weight, distance_loss_weight: against the classification loss.
    """

    def __init__(
        self,
        backbone: GhostPyramid,
        num_classes: int,
        *,
        head_depth: int = 2,
        bins: int = 8,
        box_loss_weight: float = 2.5,
        distance_loss_weight: float = 0.5,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = GhostDetHead(backbone.out_channels, num_classes, depth=head_depth, bins=bins)
        self.transform = NormalizeAndBatch(backbone.body.mean, backbone.body.std)
        self.loss_weights = {
            "classification": 1.0,
            "bbox_regression": box_loss_weight,
            "distances": distance_loss_weight,
        }
        self.score_thresh, self.nms_thresh = score_threshold, nms_threshold
        self.detections_per_img, self.topk_candidates = max_detections, 1000

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        pictures, targets = self.transform(images, targets)
        maps = list(self.backbone(pictures.tensors).values())
        outputs = self.head(maps)
        points, strides = points_of([(x.shape[2], x.shape[3]) for x in maps], maps[0].device)
        distances = outputs["bbox_regression"].unflatten(2, (4, self.head.bins))
        boxes = boxes_of(distances, points, strides)
        if not self.training:
            return self.postprocess(outputs["cls_logits"], boxes, pictures.image_sizes)
        if targets is None:
            raise ValueError("targets are needed in training")
        logits = outputs["cls_logits"]
        truth = pad_targets([t["boxes"] for t in targets], [t["labels"] - 1 for t in targets])
        target = assign(logits.detach().sigmoid(), boxes.detach(), points, strides, *truth)
        losses = aligned_losses(logits, distances, boxes, points, strides, target)
        return {name: self.loss_weights[name] * loss for name, loss in losses.items()}

    def postprocess(self, logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """The best candidates above the threshold, each class without doubles."""
        found = []
        for its_logits, its_boxes, size in zip(logits, boxes, image_sizes, strict=True):
            scores, places = its_logits.sigmoid().flatten().topk(min(self.topk_candidates, its_logits.numel()))
            places, scores = places[scores > self.score_thresh], scores[scores > self.score_thresh]
            point, label = places // logits.shape[2], places % logits.shape[2]
            clipped = clip_boxes_to_image(its_boxes[point], size)
            kept = batched_nms(clipped, scores, label, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": clipped[kept], "labels": label[kept] + 1, "scores": scores[kept]})
        return found


def points_of(shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of the cells of maps of (height, width): float32 [A, 2] (x, y) in pixels, and their strides [A]."""
    points, strides = [], []
    for stride, (height, width) in zip(STRIDES, shapes, strict=True):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        points.append((torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def boxes_of(distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Logits of distances [N, A, 4, B] -> boxes float32 [N, A, 4] xyxy in pixels."""
    numbers = torch.arange(distances.shape[-1], device=distances.device, dtype=distances.dtype)
    sides = (distances.softmax(dim=-1) @ numbers) * strides[:, None]
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)
