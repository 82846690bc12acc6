"""torchvision's Faster R-CNN on P2–P5 and a pooled level."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from detection.models.background import anchors_inside
from detection.models.fpn import BackboneWithFPN
from detection.models.postprocess_spec import PostprocessSpec
from detection.models.transform import NormalizeAndBatch


def build_faster_rcnn(
    backbone: BackboneWithFPN,
    num_classes: int,
    *,
    head_channels: int = 1024,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    postprocess_spec: PostprocessSpec,
) -> FasterRCNN:
    """Faster R-CNN with FPN (arXiv 1612.03144); torchvision's calling protocol, labels 1…N.

    Args:
        num_classes: object classes, *without* background (torchvision's own count includes it).
        head_channels: width of the two fully connected layers after RoIAlign.
        anchor_sizes: one anchor size in pixels per level P2, P3, P4, P5 and pool, at three aspect ratios.
        postprocess_spec: in evaluation, `pre_nms_top_k` proposals of each level enter the proposals' NMS, and as many
            of all levels are kept.
    """
    resolution = 7
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        ),
        box_roi_pool=MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], output_size=resolution, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * resolution**2, head_channels),
        box_predictor=FastRCNNPredictor(head_channels, num_classes + 1),
        rpn_pre_nms_top_n_test=postprocess_spec.pre_nms_top_k,
        rpn_post_nms_top_n_test=postprocess_spec.pre_nms_top_k,
        box_score_thresh=postprocess_spec.score_threshold,
        box_nms_thresh=postprocess_spec.nms_threshold,
        box_detections_per_img=postprocess_spec.max_detections,
    )
    model.postprocess_spec = postprocess_spec
    # torchvision's constructor takes no classes for its two parts.
    model.rpn.__class__, model.roi_heads.__class__ = IgnoringRPN, IgnoringRoIHeads
    # torchvision infers the scales from the first image, wrongly if it is much smaller than the batch, and keeps them.
    pool = model.roi_heads.box_roi_pool
    strides = [backbone.body.strides[level] for level in backbone.levels]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(round(math.log2(strides[0])), round(math.log2(strides[-1])))
    model.transform = NormalizeAndBatch(backbone.body.mean, backbone.body.std)
    return model


class IgnoringRPN(RegionProposalNetwork):
    """Samples no background in the ignored regions of a target, see `detection.models.background`."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        return _without_ignored(labels, anchors, targets), boxes


class IgnoringRoIHeads(RoIHeads):
    """Samples no background in the ignored regions of a target, whatever their class: the scores of a proposal are one
    softmax over all classes and the background."""

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None) -> tuple:
        self.targets = targets
        samples = super().select_training_samples(proposals, targets)
        self.targets = None
        return samples

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matches, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        return matches, _without_ignored(labels, proposals, self.targets or [])


def _without_ignored(
    labels: list[Tensor], boxes: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """`labels` of each image with -1, which is not sampled, for background in its ignored regions; unless no background
    would be left."""
    if not any(len(target.get("ignored_boxes", ())) for target in targets):
        return labels
    changed = []
    for of_image, places, target in zip(labels, boxes, targets, strict=True):
        background = of_image == 0
        regions = target.get("ignored_boxes", places[:0])
        outside = background & ~anchors_inside(places)(regions[None])[0].any(dim=0)
        changed.append(torch.where(background & ~outside & outside.any(), -1, of_image))
    return changed
