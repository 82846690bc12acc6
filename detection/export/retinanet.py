"""RetinaNet as an exportable function of tensors (see detection/export/detector_ops.py)."""

import torch
from torch import Tensor, nn

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
from detection.models.fpn import BackboneWithFPN
from detection.models.retinanet import GhostRetinaNet


class RetinaNetHeads(nn.Module):
    """The raw form: outputs cls_logits float32 [N, A, C] and bbox_regression float32 [N, A, 4].

    Anchors are in the order of levels, rows, columns, and the anchors at one position.
    """

    def __init__(self, model: GhostRetinaNet) -> None:
        super().__init__()
        self.normalize = Normalize(model.transform)
        self.backbone: BackboneWithFPN = model.backbone  # type: ignore[assignment]
        self.head = model.head
        self.num_classes = model.head.classification_head.num_classes

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        logits, regression = self.levels(fpn_features(self.backbone, self.normalize(images, sizes)))
        count = images.shape[0]
        return torch.cat(logits, dim=1).reshape(count, -1, self.num_classes), regression

    def levels(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Feature maps -> logits [N, n·C] of each level, and regression [N, A, 4] of all levels."""
        head = self.head
        logits = [head.classification_head.conv(x) for x in maps]
        boxes = [head.regression_head.conv(x) for x in maps]
        if head.towers is not None:
            logits, boxes = head.towers["cls"](logits), head.towers["box"](boxes)
        logits = [permute_and_flatten(head.classification_head.cls_logits(x)) for x in logits]
        boxes = [permute_and_flatten(head.regression_head.bbox_reg(x)) for x in boxes]
        return logits, torch.cat(boxes, dim=1).reshape(maps[0].shape[0], -1, 4)


class RetinaNetDetector(nn.Module):
    """The end-to-end form: outputs boxes float32 [N, D, 4], labels int64 [N, D] and scores float32 [N, D].

    Computes torchvision's `postprocess_detections` for all images of a batch at once.

    Args:
        size: (height, width) of a fixed canvas, or None.
    """

    def __init__(self, model: GhostRetinaNet, size: tuple[int, int] | None, nms: NmsFn = nms_mask) -> None:
        super().__init__()
        self.heads = RetinaNetHeads(model)
        self.fixed = size is not None
        self.anchors = AnchorGrid(model.anchor_generator.cell_anchors, size, feature_map_shapes(model, size))
        self.spec = model.postprocess_spec
        self.box_limit = model.head.regression_head.box_coder.bbox_xform_clip
        self.box_weights = model.head.regression_head.box_coder.weights
        self.nms = nms

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, classes = self.heads, self.heads.num_classes
        maps = fpn_features(heads.backbone, heads.normalize(images, sizes))
        logits, regression = heads.levels(maps)
        # Top-k first, threshold later (in NMS): the order does not change the result.
        best, indices, _ = topk_per_level(logits, self.spec.pre_nms_top_k, self.fixed)
        scores = best.sigmoid()
        anchor = torch.div(indices, classes, rounding_mode="trunc")
        label = indices - anchor * classes
        deltas = gather_rows(regression, anchor)
        anchors = self.anchors(images.shape[1], images.shape[2], maps)[anchor]
        boxes = clip_boxes(decode_boxes(deltas, anchors, self.box_weights, self.box_limit), sizes)
        one_hot = label[:, None, :] == torch.arange(classes, device=label.device)[:, None]
        by_class = scores[:, None, :] * one_hot
        spec = self.spec
        kept = self.nms(boxes, by_class, spec.nms_threshold, spec.score_threshold, spec.max_detections)
        return final_detections(boxes, label + 1, scores * kept.amax(1), spec.max_detections)
