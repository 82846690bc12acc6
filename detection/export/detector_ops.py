"""Operations that the exported detectors share.

An exported detector is a function of tensors. Its inputs are images uint8 [N, H, W, 3] (RGB, each image at the top left
of its canvas; H and W are multiples of 32) and sizes int64 [N, 2] ((height, width) of each image on its canvas). No
shape depends on the content of the images: the numbers of candidates and detections are fixed, and unused entries have
a score of zero. So batches of any size work, and images without a detection need no separate code path.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.fpn import BackboneWithFPN
from detection.models.transform import NormalizeAndBatch

STRIDE = 32
"""The sides of a canvas are multiples of it, as in NormalizeAndBatch, so each map is twice as large as the next."""

NmsFn = Callable[[Tensor, Tensor, float, float, int], Tensor]
"""Signature of `nms_mask`; each exporter has its own implementation of non-maximum suppression."""


def nms_mask(boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, max_output: int) -> Tensor:
    """Non-maximum suppression within each group of each image.

    Args:
        boxes: float32 [B, K, 4], xyxy; the groups of an image share them.
        scores: float32 [B, G, K]; only boxes that score more than `score_threshold` belong to a group.
        max_output: an implementation may keep only this many boxes of a group, those with the highest scores. This
            one keeps all.

    Returns:
        float32 [B, G, K]: 1 for kept boxes, 0 for the others.
    """
    mask = torch.zeros_like(scores)
    for i, (image_boxes, image_scores) in enumerate(zip(boxes, scores, strict=True)):
        group, index = torch.where(image_scores > score_threshold)
        kept = torchvision.ops.batched_nms(image_boxes[index], image_scores[group, index], group, nms_threshold)
        mask[i, group[kept], index[kept]] = 1
    return mask


class Normalize(nn.Module):
    """The normalization of NormalizeAndBatch, for images that are already padded to a canvas."""

    factor: Tensor
    shift: Tensor

    def __init__(self, transform: NormalizeAndBatch) -> None:
        super().__init__()
        self.register_buffer("factor", transform.scale / 255)
        self.register_buffer("shift", transform.shift.clone())

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 [N, H, W, 3], int64 [N, 2] -> float32 [N, 3, H, W], zero outside the images."""
        x = images.permute(0, 3, 1, 2).float() * self.factor + self.shift
        rows = torch.arange(images.shape[1], device=images.device) < sizes[:, :1]
        columns = torch.arange(images.shape[2], device=images.device) < sizes[:, 1:]
        return x * (rows.float()[:, None, :, None] * columns.float()[:, None, None, :])


def fpn_features(backbone: BackboneWithFPN, x: Tensor) -> list[Tensor]:
    """The feature maps of `BackboneWithFPN`, finest first.

    torchvision resizes each map to the size of the next finer one. On a canvas of multiples of `STRIDE` the factor is
    exactly two, and with a constant factor runtimes can keep the map in their own memory layout.
    """
    features = backbone.body(x)
    levels = [features[level] for level in backbone.levels]
    fpn = backbone.fpn
    top = fpn.inner_blocks[-1](levels[-1])
    maps = [fpn.layer_blocks[-1](top)]
    for i in reversed(range(len(levels) - 1)):
        top = fpn.inner_blocks[i](levels[i]) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        maps.insert(0, fpn.layer_blocks[i](top))
    assert fpn.extra_blocks is not None
    maps, _ = fpn.extra_blocks(maps, levels, [level.replace("c", "p") for level in backbone.levels])
    return maps


class AnchorGrid(nn.Module):
    """The anchors of torchvision's AnchorGenerator for all levels, as [A, 4]: center x, center y, width, height.

    Args:
        cells: for each level the anchors around (0, 0), [a, 4] xyxy.
        size: (height, width) of a fixed canvas; the anchors are then constants. None: they are computed from the maps.
        shapes: (height, width) of the feature map of each level on the fixed canvas.
    """

    table: Tensor

    def __init__(
        self,
        cells: Sequence[Tensor],
        size: tuple[int, int] | None = None,
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        for level, cell in enumerate(cells):
            extent = cell[:, 2:] - cell[:, :2]
            self.register_buffer(f"cell{level}", torch.cat([cell[:, :2] + 0.5 * extent, extent], dim=1))
        self.fixed = size is not None
        if size is not None:
            assert shapes is not None
            self.register_buffer("table", self._compute(size[0], size[1], shapes))

    def forward(self, height: Any, width: Any, maps: Sequence[Tensor]) -> Tensor:
        """Anchors for a canvas of this height and width, and its feature maps [N, C, H, W]."""
        if self.fixed:
            return self.table
        return self._compute(height, width, [(m.shape[2], m.shape[3]) for m in maps])

    def _compute(self, height: Any, width: Any, shapes: Sequence[tuple[Any, Any]]) -> Tensor:
        tables = []
        for level, (rows, columns) in enumerate(shapes):
            cell = self.get_buffer(f"cell{level}")
            # As in torchvision: whole pixels, even if the canvas is not a multiple of the map (320 // 3 = 106 on P7).
            x = (torch.arange(columns, device=cell.device) * (width // columns)).float()
            y = (torch.arange(rows, device=cell.device) * (height // rows)).float()
            x = x[:, None, None] * cell.new_tensor([1.0, 0, 0, 0])
            y = y[:, None, None, None] * cell.new_tensor([0, 1.0, 0, 0])
            tables.append((y + (x + cell)).reshape(-1, 4))
        return torch.cat(tables)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float], max_log_scale: float) -> Tensor:
    """torchvision's `BoxCoder.decode_single`: deltas [..., 4], anchors [..., 4] (center, size) -> xyxy [..., 4]."""
    x, y, width, height = weights
    shift = deltas[..., :2] / deltas.new_tensor([x, y]) if (x, y) != (1, 1) else deltas[..., :2]
    log_scale = deltas[..., 2:] / deltas.new_tensor([width, height]) if (width, height) != (1, 1) else deltas[..., 2:]
    center = shift * anchors[..., 2:] + anchors[..., :2]
    half = 0.5 * (torch.exp(log_scale.clamp(max=max_log_scale)) * anchors[..., 2:])
    return torch.cat([center - half, center + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [N, ..., 4] xyxy to their images of `sizes` [N, 2] (height, width)."""
    corner = torch.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], dim=1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), corner.view(-1, *[1] * (boxes.dim() - 2), 4))


def permute_and_flatten(x: Tensor) -> Tensor:
    """Feature map [N, C, H, W] -> [N, H·W·C], channels last."""
    return x.permute(0, 2, 3, 1).flatten(1)


def topk_per_level(levels: Sequence[Tensor], count: int, fixed: bool) -> tuple[Tensor, Tensor, list[int]]:
    """The `count` highest values of each level (all, if it has fewer), unsorted.

    Args:
        levels: [N, n] each.
        fixed: whether each n is a constant. If not, levels are padded with minus infinity so that each has `count`.

    Returns:
        Values [N, K]; their indices [N, K] into the concatenated levels; and the number of values of each level.
    """
    values, indices, counts = [], [], []
    start: Any = 0
    for level in levels:
        n = level.shape[1]
        counts.append(min(count, n) if fixed else count)
        if not fixed:
            level = F.pad(level, (0, count), value=-math.inf)
        value, index = level.topk(counts[-1], sorted=False)
        values.append(value)
        # The index of padding must not point beyond its level.
        indices.append((index if fixed else torch.minimum(index, torch.full_like(index, n - 1))) + start)
        start = start + n
    return torch.cat(values, dim=1), torch.cat(indices, dim=1), counts


def gather_rows(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of `table` [N, n, k] at `indices` [N, m] -> [N, m, k].

    `index_select` copies whole rows; `gather` would need an index for each element.
    """
    count, n, width = table.shape
    first = torch.arange(count, device=table.device)[:, None] * n
    return table.reshape(-1, width).index_select(0, (indices + first).flatten()).reshape(-1, indices.shape[1], width)


def final_detections(
    boxes: Tensor, labels: Tensor, scores: Tensor, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `max_detections` candidates with the highest scores, in descending order.

    Args:
        boxes, labels, scores: candidates [N, K, 4], [N, K], [N, K]; suppressed ones have a score of zero.

    Returns:
        boxes float32 [N, D, 4], labels int64 [N, D], scores float32 [N, D]; unused entries are zero.
    """
    missing = max_detections - scores.shape[1]
    if missing > 0:
        boxes, labels = F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing))
        scores = F.pad(scores, (0, missing))
    scores, order = scores.topk(max_detections)
    used = scores > 0
    return gather_rows(boxes, order) * used[:, :, None], labels.gather(1, order) * used, scores


def feature_map_shapes(model: Any, size: tuple[int, int] | None) -> list[tuple[int, int]] | None:
    """(height, width) of each feature map of a detector on a canvas of this size; None without a fixed size."""
    if size is None:
        return None
    with torch.inference_mode():
        weight = next(model.parameters())
        maps = fpn_features(model.backbone, weight.new_zeros(1, 3, *size))
    return [(m.shape[2], m.shape[3]) for m in maps]
