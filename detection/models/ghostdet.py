"""GhostDet: a light anchor-free detector with one anchor point per place; boxes are distances to their four sides."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from detection.models.background import background_mask, points_inside
from detection.models.ghost_pan import STRIDES, BackboneWithPAN, DepthwiseSeparable
from detection.models.postprocess import select_detections
from detection.models.postprocess_spec import PostprocessSpec
from detection.models.task_aligned import aligned_losses, assign, pad_targets
from detection.models.transform import NormalizeAndBatch

BINS = 8
"""A distance is an average of 0 … 7 strides, so that the coarsest level's boxes have up to 448 pixels a side."""


class LevelHead(nn.Module):
    """A depthwise separable tower and the prediction layers of one level.

    forward: [N, channels, H, W] -> logits [N, C, H·W], distances [N, 4 * bins, H·W].
    """

    def __init__(self, channels: int, num_classes: int, depth: int, bins: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(*(DepthwiseSeparable(channels, channels) for _ in range(depth)))
        self.cls_logits = nn.Conv2d(channels, num_classes, 1)
        self.bbox_reg = nn.Conv2d(channels, 4 * bins, 1)
        for layer in (self.cls_logits, self.bbox_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # Every point starts with a score of 1 %: few are positive (arXiv 1708.02002, section 4.1).
        nn.init.constant_(self.cls_logits.bias, -math.log(99))  # type: ignore[arg-type]
        # And with a box of four strides per side: the expected distance is 2.
        with torch.no_grad():
            self.bbox_reg.bias.copy_((-0.32 * torch.arange(bins)).repeat(4))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tower(x)
        return self.cls_logits(x).flatten(2), self.bbox_reg(x).flatten(2)


class GhostDetHead(nn.Module):
    """A `LevelHead` for each level; the points are in the order of the levels, their rows and their columns.

    forward: maps, finest first -> cls_logits float32 [N, A, C], bbox_regression float32 [N, A, 4 * bins].

    Args:
        channels: of the maps and the towers.
        depth: layers in a tower.
        bins: a distance is an average of 0 … bins - 1 strides, weighted by a softmax (arXiv 2006.04388).
    """

    def __init__(self, channels: int, num_classes: int, *, depth: int = 2, bins: int = BINS) -> None:
        super().__init__()
        self.bins = bins
        self.levels = nn.ModuleList(LevelHead(channels, num_classes, depth, bins) for _ in STRIDES)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        logits, distances = self.columns(x)
        # In full precision, also under autocast.
        return {
            "cls_logits": logits.transpose(1, 2).float(),
            "bbox_regression": distances.transpose(1, 2).float(),
        }

    def columns(self, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps -> logits [N, C, A], distances [N, 4 * bins, A], a column for each point."""
        answers = [head(level) for head, level in zip(self.levels, x, strict=True)]
        logits, distances = zip(*answers, strict=True)
        return torch.cat(logits, dim=2), torch.cat(distances, dim=2)


class GhostDet(nn.Module):
    """torchvision's calling protocol.

    forward: (list of [3, H, W] uint8 or float in [0, 1], targets with boxes float32 [n, 4] xyxy in pixels and labels
    int64 [n], 1…C, the optional fields of `detection.models.background`, and optionally scores float32 [n] in [0, 1],
    how certain each box is) -> dict of losses in training, list of {boxes, labels, scores} in evaluation.

    Args:
        num_classes: object classes, without background.
        head_depth: see `GhostDetHead`.
        box_loss_weight, distance_loss_weight: against the classification loss.
    """

    def __init__(
        self,
        backbone: BackboneWithPAN,
        num_classes: int,
        *,
        head_depth: int = 2,
        box_loss_weight: float = 2.5,
        distance_loss_weight: float = 0.5,
        postprocess_spec: PostprocessSpec,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = GhostDetHead(backbone.out_channels, num_classes, depth=head_depth)
        self.transform = NormalizeAndBatch(backbone.body.mean, backbone.body.std)
        self.loss_weights = {
            "classification": 1.0,
            "bbox_regression": box_loss_weight,
            "distances": distance_loss_weight,
        }
        self.postprocess_spec = postprocess_spec

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        batched, targets = self.transform(images, targets)
        maps = list(self.backbone(batched.tensors).values())
        outputs = self.head(maps)
        logits = outputs["cls_logits"]
        distances = outputs["bbox_regression"].unflatten(2, (4, self.head.bins))
        points, strides = points_of([(x.shape[2], x.shape[3]) for x in maps], logits.device)
        if not self.training:
            found = zip(logits, distances, batched.image_sizes, strict=True)
            return [self._select(*of_image, points, strides) for of_image in found]
        if targets is None:
            raise ValueError("targets are needed in training")
        boxes = boxes_of(distances, points, strides)
        with record_function("assignment"):
            truth = pad_targets([t["boxes"] for t in targets], [t["labels"] - 1 for t in targets])
            certainty = None
            if any("scores" in t for t in targets):
                scores = [t.get("scores", torch.ones_like(t["boxes"][:, 0])) for t in targets]
                certainty = truth[2].float().masked_scatter(truth[2], torch.cat(scores))
            target = assign(logits.detach().sigmoid(), boxes.detach(), points, strides, *truth, certainty)
        background = background_mask(targets, logits.shape[2], target.positive, points_inside(points))
        losses = aligned_losses(logits, distances, boxes, points, strides, target, background)
        return {name: self.loss_weights[name] * loss for name, loss in losses.items()}

    def _select(
        self, logits: Tensor, distances: Tensor, size: tuple[int, int], points: Tensor, strides: Tensor
    ) -> dict[str, Tensor]:
        """The detections of one image of `size` (height, width)."""

        def decode(rows: list[Tensor]) -> Tensor:
            (row,) = rows
            return boxes_of(distances[row], points[row], strides[row])

        return select_detections([logits], decode, size, self.postprocess_spec)


def points_of(shapes: Sequence[tuple[Any, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of the cells of maps of (height, width): float32 [A, 2] (x, y) in pixels, and their strides [A]."""
    points, strides = [], []
    for stride, (height, width) in zip(STRIDES, shapes, strict=True):
        x = (torch.arange(width, device=device) + 0.5) * stride
        y = (torch.arange(height, device=device) + 0.5) * stride
        x, y = x[None, :] + 0 * y[:, None], y[:, None] + 0 * x[None, :]
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        strides.append(torch.full_like(points[-1][:, 0], stride))
    return torch.cat(points), torch.cat(strides)


def boxes_of(distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Logits of distances [..., A, 4, B] at points [A, 2] of strides [A] -> boxes float32 [..., A, 4] xyxy."""
    sides = expected(distances) * strides[:, None]
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def expected(distances: Tensor) -> Tensor:
    """Logits of the numbers 0 … B-1 [..., B] -> their average by softmax [...]."""
    numbers = torch.arange(distances.shape[-1], device=distances.device, dtype=distances.dtype)
    # A product with a vector would take ONNX Runtime ten times as long.
    return (distances.softmax(dim=-1) * numbers).sum(dim=-1)
