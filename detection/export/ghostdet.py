"""GhostDet as a function of tensors alone (see detection/export/detector_ops.py)."""

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
    """The raw form. -> cls_logits float32 [N, A, C]; bbox_regression float32 [N, A, 4], the distances (left, top,
    right, bottom) in strides from the points to the sides of their boxes."""

    def __init__(self, model: GhostDet) -> None:
        super().__init__()
        self.normalize = Normalize(model.transform)
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        logits, distances = self.head.columns(self.maps(images, sizes))
        return logits.transpose(1, 2), expected(self.by_side(distances.transpose(1, 2)))

    def maps(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        return list(self.backbone(self.normalize(images, sizes)).values())

    def by_side(self, distances: Tensor) -> Tensor:
        """[N, k, 4 * bins] -> [N, k, 4, bins]."""
        return distances.reshape(distances.shape[0], -1, 4, self.head.bins)


class GhostDetDetector(nn.Module):
    """The end-to-end form. -> boxes float32 [N, D, 4], labels int64 [N, D], scores float32 [N, D].

    What `GhostDet.postprocess` does image by image, done for all at once, and so that little of it is wide: the K
    best (point, class) pairs lie in the K points that have the best classes, so that of 80 classes times thousands of
    points a maximum is taken and no more; only those K points' distances become boxes. Classes are put beside each
    other on one plane, so that a single suppression does for all and ends when it has as many boxes as are wanted.

    Args:
        size: (height, width) of all frames, or None.
    """

    points: Tensor

    def __init__(self, model: GhostDet, size: tuple[int, int] | None, nms: NmsFn = nms_mask) -> None:
        super().__init__()
        self.heads = GhostDetHeads(model)
        self.fixed = size is not None
        if size is not None:
            self.register_buffer("points", point_table([(size[0] // s, size[1] // s) for s in STRIDES]))
        self.spec = model.postprocess_spec
        self.nms = nms

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads
        maps = heads.maps(images, sizes)
        logits, distances = (x.transpose(1, 2) for x in heads.head.columns(maps))
        # Points first, then the pairs within them.
        best, place, counts = topk_per_level([logits.amax(2)], self.spec.pre_nms_top_k, self.fixed)
        count, classes = counts[0], logits.shape[2]
        pairs = gather_rows(logits, place)
        if not self.fixed:
            # Where there are fewer points than that, the rest of them are doubles of the last.
            pairs = torch.where((best > -torch.inf)[:, :, None], pairs, -torch.inf)
        scores, pair = pairs.flatten(1).topk(min(self.spec.pre_nms_top_k, count * classes), sorted=False)
        which = torch.div(pair, classes, rounding_mode="trunc")
        label = pair - which * classes
        point = place.gather(1, which)

        table = self.points if self.fixed else point_table([(m.shape[2], m.shape[3]) for m in maps])
        centre, stride = table[point].split([2, 1], dim=-1)
        side = expected(heads.by_side(gather_rows(distances, point))) * stride
        boxes = clip_boxes(torch.cat([centre - side[..., :2], centre + side[..., 2:]], dim=-1), sizes)
        scores = scores.sigmoid()
        apart = (label * (sizes.amax((0, 1)) + 1)).to(boxes.dtype)
        spec = self.spec
        kept = self.nms(
            boxes + apart[:, :, None], scores[:, None], spec.nms_threshold, spec.score_threshold, spec.max_detections
        )
        return final_detections(boxes, label + 1, scores * kept[:, 0], spec.max_detections)


def point_table(shapes: Sequence[tuple[Any, Any]]) -> Tensor:
    """float32 [A, 3]: x, y and stride of each point of maps of (height, width)."""
    points, strides = points_of(shapes, torch.device("cpu"))
    return torch.cat([points, strides[:, None]], dim=1)


def point_spec(model: GhostDet) -> dict[str, Any]:
    """What `detection.runtime.decode` needs."""
    return {"strides": list(STRIDES), "candidates": model.postprocess_spec.pre_nms_top_k}
