"""Detectors as functions of tensors alone, which is what exporters can follow.

Both forms take images uint8 [N, H, W, 3] (RGB, each image at the top left of its frame, H and W multiples of 32)
and sizes int64 [N, 2] ((height, width) of each image in its frame). Nothing here depends on a number that only the
images decide: there are always as many candidates and as many detections, unused ones score zero. So batches of any
size work, and images without a detection need no path of their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.fpn import BackboneWithFPN
from detection.models.retinanet import GhostRetinaNet
from detection.models.transform import NormalizeAndBatch

STRIDE = 32
"""Sides of a frame are multiples of it, as NormalizeAndBatch pads them; so each map of a pyramid is twice the next."""

Keep = Callable[[Tensor, Tensor, float, float, int], Tensor]
"""As `keep_mask`; each exporter brings its own way to write non-maximum suppression down."""


def keep_mask(boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, most: int) -> Tensor:
    """Non-maximum suppression within each group of each image: 1 for what is kept, 0 for the rest.

    Args:
        boxes: float32 [B, K, 4], xyxy; the groups of an image share them.
        scores: float32 [B, G, K]; what does not score more than `score_threshold` is not in the group.
        most: a group keeps no more than its so many best; a group of this function may keep more.

    Returns:
        float32 [B, G, K].
    """
    mask = torch.zeros_like(scores)
    for image, (its_boxes, its_scores) in enumerate(zip(boxes, scores, strict=True)):
        group, place = torch.where(its_scores > score_threshold)
        kept = torchvision.ops.batched_nms(its_boxes[place], its_scores[group, place], group, nms_threshold)
        mask[image, group[kept], place[kept]] = 1
    return mask


class Normalize(nn.Module):
    """What NormalizeAndBatch does, for images that are in their frames already."""

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


def pyramid(backbone: BackboneWithFPN, x: Tensor) -> list[Tensor]:
    """The maps of `BackboneWithFPN`, finest first.

    In frames of `STRIDE` each map is enlarged by exactly two; said so, runtimes keep the map in their own layout, which
    torchvision's "to the size of the other" makes them leave.
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


class Anchors(nn.Module):
    """The anchors of all maps as [A, 4]: centre x, centre y, width, height. Those of torchvision's AnchorGenerator.

    Args:
        cells: of each level the anchors around (0, 0), [a, 4] xyxy.
        shapes: (height, width) of each level's map where frames have one size, and `size` (height, width) of theirs;
            the anchors are then constants. None: they are computed from the maps.
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
        """For frames of this height and width, and the maps [N, C, H, W] of the pyramid."""
        if self.fixed:
            return self.table
        return self._compute(height, width, [(m.shape[2], m.shape[3]) for m in maps])

    def _compute(self, height: Any, width: Any, shapes: Sequence[tuple[Any, Any]]) -> Tensor:
        tables = []
        for level, (rows, columns) in enumerate(shapes):
            cell = self.get_buffer(f"cell{level}")
            # As torchvision: whole pixels, also where the frame is no multiple of the map (320 // 3 = 106 on P7).
            x = (torch.arange(columns, device=cell.device) * (width // columns)).float()
            y = (torch.arange(rows, device=cell.device) * (height // rows)).float()
            x = x[:, None, None] * cell.new_tensor([1.0, 0, 0, 0])
            y = y[:, None, None, None] * cell.new_tensor([0, 1.0, 0, 0])
            tables.append((y + (x + cell)).reshape(-1, 4))
        return torch.cat(tables)


def decode_boxes(codes: Tensor, anchors: Tensor, weights: Sequence[float], limit: float) -> Tensor:
    """torchvision's `BoxCoder.decode_single`: codes [..., 4], anchors [..., 4] (centre, extent) -> xyxy [..., 4]."""
    x, y, width, height = weights
    shift = codes[..., :2] / codes.new_tensor([x, y]) if (x, y) != (1, 1) else codes[..., :2]
    growth = codes[..., 2:] / codes.new_tensor([width, height]) if (width, height) != (1, 1) else codes[..., 2:]
    centre = shift * anchors[..., 2:] + anchors[..., :2]
    half = 0.5 * (torch.exp(growth.clamp(max=limit)) * anchors[..., 2:])
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [N, ..., 4] xyxy inside their images of `sizes` [N, 2] (height, width)."""
    corner = torch.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], dim=1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), corner.view(-1, *[1] * (boxes.dim() - 2), 4))


def rows_of(x: Tensor) -> Tensor:
    """Map [N, C, H, W] -> [N, H·W·C]: what belongs to one place stands together."""
    return x.permute(0, 2, 3, 1).flatten(1)


def best_per_level(levels: Sequence[Tensor], count: int, fixed: bool) -> tuple[Tensor, Tensor, list[int]]:
    """The `count` highest values of each level (all, where it has fewer), in no order.

    Args:
        levels: [N, n] each.
        fixed: whether each n is known now. If not, levels are filled up with minus infinity, so that there
            are `count` of each.

    Returns:
        values [N, K]; their places [N, K] in the levels one after the other; and how many are of which level.
    """
    values, places, counts = [], [], []
    start: Any = 0
    for level in levels:
        n = level.shape[1]
        counts.append(min(count, n) if fixed else count)
        if not fixed:
            level = F.pad(level, (0, count), value=-math.inf)
        value, place = level.topk(counts[-1], sorted=False)
        values.append(value)
        # What was filled up must not point beyond its level.
        places.append((place if fixed else torch.minimum(place, torch.full_like(place, n - 1))) + start)
        start = start + n
    return torch.cat(values, dim=1), torch.cat(places, dim=1), counts


def take(table: Tensor, places: Tensor) -> Tensor:
    """[N, n, k], [N, m] -> [N, m, k]. Whole rows are copied; `gather` would need a place for each of their numbers."""
    count, n, width = table.shape
    first = torch.arange(count, device=table.device)[:, None] * n
    return table.reshape(-1, width).index_select(0, (places + first).flatten()).reshape(-1, places.shape[1], width)


def final_detections(
    boxes: Tensor, labels: Tensor, scores: Tensor, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of candidates [N, K, 4], [N, K], [N, K], of which those not wanted score zero; descending.

    Returns:
        boxes float32 [N, D, 4], labels int64 [N, D], scores float32 [N, D]; all zero where there are fewer.
    """
    missing = max_detections - scores.shape[1]
    if missing > 0:
        boxes, labels = F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing))
        scores = F.pad(scores, (0, missing))
    scores, order = scores.topk(max_detections)
    found = scores > 0
    return take(boxes, order) * found[:, :, None], labels.gather(1, order) * found, scores


class RetinaNetHeads(nn.Module):
    """The raw form. -> cls_logits float32 [N, A, C], bbox_regression float32 [N, A, 4], for the anchors in the order of
    the levels, their rows, their columns, and the anchors of a place."""

    def __init__(self, model: GhostRetinaNet) -> None:
        super().__init__()
        self.normalize = Normalize(model.transform)
        self.backbone: BackboneWithFPN = model.backbone  # type: ignore[assignment]
        self.head = model.head
        self.num_classes = model.head.classification_head.num_classes

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        logits, regression = self.levels(pyramid(self.backbone, self.normalize(images, sizes)))
        count = images.shape[0]
        return torch.cat(logits, dim=1).reshape(count, -1, self.num_classes), regression

    def levels(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps of the pyramid -> of each level the logits [N, n·C]; of all the regression [N, A, 4]."""
        head = self.head
        logits = [head.classification_head.conv(x) for x in maps]
        boxes = [head.regression_head.conv(x) for x in maps]
        if head.towers is not None:
            logits, boxes = head.towers["cls"](logits), head.towers["box"](boxes)
        logits = [rows_of(head.classification_head.cls_logits(x)) for x in logits]
        boxes = [rows_of(head.regression_head.bbox_reg(x)) for x in boxes]
        return logits, torch.cat(boxes, dim=1).reshape(maps[0].shape[0], -1, 4)


class RetinaNetDetector(nn.Module):
    """The end-to-end form. -> boxes float32 [N, D, 4], labels int64 [N, D], scores float32 [N, D].

    What torchvision's `postprocess_detections` does image by image, done for all at once.

    Args:
        size: (height, width) of all frames, or None.
    """

    def __init__(self, model: GhostRetinaNet, size: tuple[int, int] | None, keep: Keep = keep_mask) -> None:
        super().__init__()
        self.heads = RetinaNetHeads(model)
        self.fixed = size is not None
        self.anchors = Anchors(model.anchor_generator.cell_anchors, size, map_shapes(model, size))
        self.candidates = model.topk_candidates
        self.box_limit = model.head.regression_head.box_coder.bbox_xform_clip
        self.box_weights = model.head.regression_head.box_coder.weights
        self.score_threshold, self.nms_threshold = model.score_thresh, model.nms_thresh
        self.max_detections = model.detections_per_img
        self.keep = keep

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, classes = self.heads, self.heads.num_classes
        maps = pyramid(heads.backbone, heads.normalize(images, sizes))
        logits, regression = heads.levels(maps)
        # The best above a threshold are the best, as far as they are above it: no need to search for those first.
        best, places, _ = best_per_level(logits, self.candidates, self.fixed)
        scores = best.sigmoid()
        anchor = torch.div(places, classes, rounding_mode="trunc")
        label = places - anchor * classes
        codes = take(regression, anchor)
        anchors = self.anchors(images.shape[1], images.shape[2], maps)[anchor]
        boxes = clip_boxes(decode_boxes(codes, anchors, self.box_weights, self.box_limit), sizes)
        own = label[:, None, :] == torch.arange(classes, device=label.device)[:, None]
        by_class = scores[:, None, :] * own
        kept = self.keep(boxes, by_class, self.nms_threshold, self.score_threshold, self.max_detections)
        return final_detections(boxes, label + 1, scores * kept.amax(1), self.max_detections)


def map_shapes(model: Any, size: tuple[int, int] | None) -> list[tuple[int, int]] | None:
    """(height, width) of each map of a detector's pyramid in a frame of this size; None where it has no one size."""
    if size is None:
        return None
    with torch.inference_mode():
        weight = next(model.parameters())
        maps = pyramid(model.backbone, weight.new_zeros(1, 3, *size))
    return [(m.shape[2], m.shape[3]) for m in maps]
