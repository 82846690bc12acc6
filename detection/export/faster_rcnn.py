"""Faster R-CNN as an exportable function of tensors (see detection/export/detector_ops.py)."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import roi_align

from detection.export.detector_ops import (
    AnchorGrid,
    NmsFn,
    Normalize,
    clip_boxes,
    decode_boxes,
    feature_map_shapes,
    final_detections,
    fpn_features,
    gather_rows,
    nms_mask,
    permute_and_flatten,
    topk_per_level,
)

MIN_PROPOSAL_SIZE, MIN_BOX_SIZE = 1e-3, 1e-2
"""Smallest sides in pixels of proposals and detections, as in torchvision."""


class FasterRCNNDetector(nn.Module):
    """The end-to-end form: outputs boxes float32 [N, D, 4], labels int64 [N, D] and scores float32 [N, D].

    Computes torchvision's two stages for all images of a batch at once, with the same number of proposals for each
    image. Missing proposals are empty boxes with a score of zero.

    Args:
        size: (height, width) of a fixed canvas, or None.
    """

    def __init__(self, model: FasterRCNN, size: tuple[int, int] | None, nms: NmsFn = nms_mask) -> None:
        super().__init__()
        self.normalize = Normalize(model.transform)
        self.backbone: Any = model.backbone
        self.rpn, self.heads = model.rpn, model.roi_heads
        self.fixed = size is not None
        self.anchors = AnchorGrid(model.rpn.anchor_generator.cell_anchors, size, feature_map_shapes(model, size))
        self.nms = nms
        levels = [int(name[1:]) for name in model.roi_heads.box_roi_pool.featmap_names]
        self.lowest, self.highest = min(levels), max(levels)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = fpn_features(self.backbone, self.normalize(images, sizes))
        proposals, valid = self.propose(maps, images.shape[1], images.shape[2], sizes)
        return self.classify(maps, proposals, valid, sizes)

    def propose(self, maps: list[Tensor], height: Any, width: Any, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The first stage -> proposals [N, R, 4] in descending order, and which of them are valid [N, R]."""
        rpn = self.rpn
        objectness, deltas = rpn.head(maps)
        best, indices, counts = topk_per_level(
            [permute_and_flatten(x) for x in objectness], rpn.pre_nms_top_n(), self.fixed
        )
        deltas = torch.cat([permute_and_flatten(x) for x in deltas], dim=1).reshape(maps[0].shape[0], -1, 4)
        anchors = self.anchors(height, width, maps)[indices]
        deltas = gather_rows(deltas, indices)
        boxes = decode_boxes(deltas, anchors, rpn.box_coder.weights, rpn.box_coder.bbox_xform_clip)
        boxes = clip_boxes(boxes, sizes)
        scores = best.sigmoid() * is_large(boxes, MIN_PROPOSAL_SIZE)
        # NMS runs within each level.
        level = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=boxes.device)
        one_hot = level == torch.arange(len(counts), device=boxes.device)[:, None]
        max_proposals = rpn.post_nms_top_n()
        kept = self.nms(boxes, scores[:, None, :] * one_hot, rpn.nms_thresh, rpn.score_thresh, max_proposals)
        scores, order = (scores * kept.amax(1)).topk(min(max_proposals, sum(counts)))
        valid = scores > 0
        return gather_rows(boxes, order) * valid[:, :, None], valid

    def classify(
        self, maps: list[Tensor], proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads
        count, rows = proposals.shape[0], proposals.shape[1]
        logits, deltas = heads.box_predictor(heads.box_head(self.roi_align_levels(maps, proposals)))
        classes = logits.shape[1] - 1
        scores = logits.softmax(-1)[:, 1:].reshape(count, rows, classes) * valid[:, :, None]
        deltas = deltas.reshape(count, rows, classes + 1, 4)[:, :, 1:]
        extent = proposals[..., 2:] - proposals[..., :2]
        regions = torch.cat([proposals[..., :2] + 0.5 * extent, extent], dim=-1)[:, :, None]
        boxes = decode_boxes(deltas, regions, heads.box_coder.weights, heads.box_coder.bbox_xform_clip)
        boxes = clip_boxes(boxes, sizes)
        scores = scores * is_large(boxes, MIN_BOX_SIZE)
        # Each class has its own boxes, so NMS treats the classes of an image as separate images.
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
        max_detections = heads.detections_per_img
        kept = self.nms(
            boxes.reshape(-1, rows, 4),
            scores.reshape(-1, 1, rows),
            heads.nms_thresh,
            heads.score_thresh,
            max_detections,
        )
        scores = (scores * kept.reshape(count, classes, rows)).flatten(1)
        labels = torch.arange(1, classes + 1, device=scores.device)[:, None].expand(classes, rows).flatten()
        labels = labels[None].expand(count, -1)
        return final_detections(boxes.flatten(1, 2), labels, scores, max_detections)

    def roi_align_levels(self, maps: list[Tensor], proposals: Tensor) -> Tensor:
        """RoIAlign from the level of each proposal's size (`MultiScaleRoIAlign`): [N, R, 4] -> [N·R, C, S, S]."""
        pool = self.heads.box_roi_pool
        count, rows = proposals.shape[0], proposals.shape[1]
        image = torch.arange(count, device=proposals.device, dtype=proposals.dtype)[:, None, None]
        regions = torch.cat([image.expand(-1, rows, 1), proposals], dim=-1).reshape(-1, 5)
        side = torch.sqrt((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2]))
        level = torch.floor(pool.canonical_level + torch.log2(side / pool.canonical_scale) + 1e-6)
        level = level.clamp(self.lowest, self.highest)
        features, indices = [], []
        for k in range(self.lowest, self.highest + 1):
            index = torch.where(level == k)[0]
            features.append(
                roi_align(
                    maps[k - self.lowest], regions[index], pool.output_size, 2.0**-k, pool.sampling_ratio, aligned=False
                )
            )
            indices.append(index)
        # Restore the order of the proposals.
        order = torch.cat(indices)
        inverse = torch.zeros_like(level, dtype=torch.int64).scatter(
            0, order, torch.arange(count * rows, device=order.device)
        )
        return torch.cat(features)[inverse]


def is_large(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides of boxes [..., 4] have at least `side` pixels: bool [...]."""
    extent = boxes[..., 2:] - boxes[..., :2]
    return (extent >= side).all(-1)
