"""GhostDet as an exportable function of tensors (see detection/export/detector_ops.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection.export.detector_ops import (
    NmsFn,
    Normalize,
    clip_boxes,
    final_detections,
    gather_rows,
    nms_mask,
    topk_per_level,
)
from detection.models.ghost_pan import STRIDES
from detection.models.ghostdet import GhostDet, expected, points_of


class GhostDetHeads(nn.Module):
    """The raw form: outputs cls_logits float32 [N, A, C] and bbox_regression float32 [N, A, 4].

    The regression is the distances (left, top, right, bottom) in strides from the anchor points to the sides of boxes.
    """

    def __init__(self, model: GhostDet) -> None:
        super().__init__()
        self.normalize = Normalize(model.transform)
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        logits, distances = self.head.columns(self.maps(images, sizes))
        return logits.transpose(1, 2), expected(self.split_sides(distances.transpose(1, 2)))

    def maps(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        return list(self.backbone(self.normalize(images, sizes)).values())

    def split_sides(self, distances: Tensor) -> Tensor:
        """[N, k, 4 * bins] -> [N, k, 4, bins]."""
        return distances.reshape(distances.shape[0], -1, 4, self.head.bins)


class GhostDetDetector(nn.Module):
    """The end-to-end form: outputs boxes float32 [N, D, 4], labels int64 [N, D] and scores float32 [N, D].

    Computes `GhostDet.postprocess` for all images of a batch at once. The K best (point, class) pairs are in the K
    points with the highest class scores, so top-k runs on the maximum over the classes, and only the distances of K
    points are decoded to boxes. The boxes of each class are shifted to a region of their own, so one NMS call handles
    all classes and stops at `max_detections`.

    Args:
        size: (height, width) of a fixed canvas, or None.
    """

    points: Tensor

    def __init__(self, model: GhostDet, size: tuple[int, int] | None, nms: NmsFn = nms_mask) -> None:
        super().__init__()
        self.heads = GhostDetHeads(model)
        self.fixed = size is not None
        if size is not None:
            self.register_buffer("points", anchor_points([(size[0] // s, size[1] // s) for s in STRIDES]))
        self.spec = model.postprocess_spec
        self.nms = nms

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads
        maps = heads.maps(images, sizes)
        logits, distances = (x.transpose(1, 2) for x in heads.head.columns(maps))
        # First the best points, then the best (point, class) pairs among them.
        best, index, counts = topk_per_level([logits.amax(2)], self.spec.pre_nms_top_k, self.fixed)
        count, classes = counts[0], logits.shape[2]
        pairs = gather_rows(logits, index)
        if not self.fixed:
            # With fewer points than that, the padding repeats the last point.
            pairs = torch.where((best > -torch.inf)[:, :, None], pairs, -torch.inf)
        scores, pair = pairs.flatten(1).topk(min(self.spec.pre_nms_top_k, count * classes), sorted=False)
        row = torch.div(pair, classes, rounding_mode="trunc")
        label = pair - row * classes
        point = index.gather(1, row)

        table = self.points if self.fixed else anchor_points([(m.shape[2], m.shape[3]) for m in maps])
        center, stride = table[point].split([2, 1], dim=-1)
        side = expected(heads.split_sides(gather_rows(distances, point))) * stride
        boxes = clip_boxes(torch.cat([center - side[..., :2], center + side[..., 2:]], dim=-1), sizes)
        scores = scores.sigmoid()
        offset = (label * (sizes.amax((0, 1)) + 1)).to(boxes.dtype)
        spec = self.spec
        kept = self.nms(
            boxes + offset[:, :, None], scores[:, None], spec.nms_threshold, spec.score_threshold, spec.max_detections
        )
        return final_detections(boxes, label + 1, scores * kept[:, 0], spec.max_detections)


def anchor_points(shapes: Sequence[tuple[Any, Any]]) -> Tensor:
    """float32 [A, 3]: x, y and stride of each anchor point of feature maps of (height, width)."""
    points, strides = points_of(shapes, torch.device("cpu"))
    return torch.cat([points, strides[:, None]], dim=1)


def point_spec(model: GhostDet) -> dict[str, Any]:
    """What `detection.runtime.decode` needs."""
    return {"strides": list(STRIDES), "candidates": model.postprocess_spec.pre_nms_top_k}
