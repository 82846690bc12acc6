"""From class logits and boxes to detections: score threshold, candidate selection and non-maximum suppression (NMS)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from detection.models.postprocess_spec import PostprocessSpec


def select_detections(
    logits: Sequence[Tensor],
    decode: Callable[[list[Tensor]], Tensor],
    size: tuple[int, int],
    spec: PostprocessSpec,
) -> dict[str, Tensor]:
    """The detections of one image.

    Only candidates go through the sigmoid and become boxes: with 80 classes, one pair in hundreds.

    Args:
        logits: float32 [A, C] of each group of anchors or points; a group has at most `spec.pre_nms_top_k` candidates.
        decode: rows of each group, int64 [k] each -> their boxes, float32 [sum of k, 4] xyxy in pixels.
        size: (height, width) of the image, to which boxes are clipped.

    Returns:
        {boxes float32 [n, 4], scores float32 [n], labels int64 [n], 1…C}, by descending score.
    """
    lowest = score_to_logit(spec.score_threshold)
    rows, scores, labels = [], [], []
    for group in logits:
        flat = group.flatten()
        pairs = torch.where(flat > lowest)[0]
        pair_scores = flat[pairs].sigmoid()
        passed = pair_scores > spec.score_threshold
        pair_scores, pairs = pair_scores[passed], pairs[passed]
        if len(pairs) > spec.pre_nms_top_k:
            pair_scores, best = pair_scores.topk(spec.pre_nms_top_k)
            pairs = pairs[best]
        rows.append(torch.div(pairs, group.shape[1], rounding_mode="floor"))
        labels.append(pairs % group.shape[1])
        scores.append(pair_scores)
    boxes = clip_boxes_to_image(decode(rows), size)
    all_scores, all_labels = torch.cat(scores), torch.cat(labels)
    keep = batched_nms_topk(boxes, all_scores, all_labels, spec.nms_threshold, spec.max_detections)
    return {"boxes": boxes[keep], "scores": all_scores[keep], "labels": all_labels[keep] + 1}


def batched_nms_topk(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, count: int) -> Tensor:
    """NMS within each class that stops at the `count` best boxes. Returns their rows, by descending score.

    NMS goes from the best box to the worst and never changes an earlier decision. So the few hundred best candidates
    are compared first, and more of them only where these do not yield `count` boxes.

    Args:
        boxes, scores, labels: [n, 4] xyxy, [n], [n].
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    order = scores.argsort(descending=True, stable=True)
    # Each class is shifted to a place of its own, so that one NMS suffices. In float32, the boxes of the last classes
    # would be off by 0.01 pixels.
    shifted = boxes.double() + (labels * (boxes.max().ceil() + 1))[:, None]
    compared = 4 * count
    while True:
        best = order[:compared]
        keep = best[nms(shifted[best], scores[best].double(), nms_threshold)]
        if len(keep) >= count or compared >= len(order):
            return keep[:count]
        compared *= 4


def score_to_logit(score: float) -> float:
    """A logit slightly below that of `score`, so that rounding excludes no logit whose score is above `score`."""
    if not 0 < score < 1:
        return -math.inf if score <= 0 else math.inf
    return math.log(score / (1 - score)) - 1e-3
