"""Task-aligned assignment of anchor points to boxes, and the losses; whole batches at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import generalized_box_iou_loss

from detection.models.losses import negative_focal_loss


@dataclass(frozen=True)
class Assignment:
    """The targets of each anchor point of each image.

    positive: bool [N, A].
    boxes: float32 [N, A, 4] xyxy, meaningful where positive.
    labels: int64 [N, A], 0…C-1, likewise.
    weight: float32 [N, A] in [0, 1], 0 where not positive: 1 for the best point of a box, lower for its other points.
    quality: float32 [N, A] in [0, 1], likewise: the target of the score of that label.
    certainty: float32 [N, A], of the box, see `assign`; None: 1.
    """

    positive: Tensor
    boxes: Tensor
    labels: Tensor
    weight: Tensor
    quality: Tensor
    certainty: Tensor | None = None


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of all images in one table: float32 [N, M, 4], int64 [N, M], and which are real, bool [N, M]; M >= 1."""
    table, classes = pad_sequence(list(boxes), batch_first=True), pad_sequence(list(labels), batch_first=True)
    if table.shape[1] == 0:
        table, classes = F.pad(table, (0, 0, 0, 1)), F.pad(classes, (0, 1))
    counts = torch.tensor([len(of_image) for of_image in boxes]).to(table.device, non_blocking=True)
    return table, classes, torch.arange(table.shape[1], device=table.device) < counts[:, None]


@torch.no_grad()
def assign(
    scores: Tensor,
    found: Tensor,
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    real: Tensor,
    certainty: Tensor | None = None,
    *,
    candidates: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment (TOOD, arXiv 2108.07755, section 3.2): each box gets the points that already score and
    place it best, by score ** alpha * IoU ** beta. No loop over images or boxes.

    Args:
        scores: float32 [N, A, C], probabilities.
        found: float32 [N, A, 4] xyxy, the boxes that the points have found.
        points: float32 [A, 2] (x, y); strides: float32 [A].
        boxes, labels, real: see `pad_targets`.
        certainty: float32 [N, M], of boxes that a teacher found, its scores: factors of their quality and of their
            box losses. None: all are certain.
        candidates: the most points that a box gets.
    """
    iou = _pairwise_iou(boxes, found)
    of_class = scores.transpose(1, 2).gather(1, labels[..., None].expand(-1, -1, scores.shape[1]))
    # A point can be assigned to boxes that contain it. Boxes smaller than a cell of the level would contain none: they
    # count as one cell large.
    half = (boxes[:, :, None, 2:] - boxes[:, :, None, :2]) / 2
    centre = boxes[:, :, None, :2] + half
    inside = ((points - centre).abs() < torch.maximum(half, strides[:, None] / 2)).all(dim=-1) & real[..., None]
    # At least 0.01, so that a box that no prediction overlaps yet has a best point.
    metric = of_class.pow(alpha) * iou.clamp(min=0.01).pow(beta)

    # Points outside come last.
    best = torch.where(inside, metric, -1.0).topk(min(candidates, len(points)), dim=-1).indices
    chosen = torch.zeros_like(inside).scatter_(2, best, True) & inside
    # A point that several boxes chose is assigned to the one that it overlaps most.
    box = torch.where(chosen, iou, -1.0).argmax(dim=1)
    positive = chosen.any(dim=1)
    own = chosen & (torch.arange(boxes.shape[1], device=box.device)[None, :, None] == box[:, None])

    metric = metric * own
    share = metric / metric.amax(dim=2, keepdim=True).clamp(min=1e-30)
    # The highest metric maps to the highest overlap.
    quality = (share * (iou * own).amax(dim=2, keepdim=True)).amax(dim=1)
    sure = None if certainty is None else certainty.gather(1, box)
    return Assignment(
        positive=positive,
        boxes=boxes.gather(1, box[..., None].expand(-1, -1, 4)),
        labels=labels.gather(1, box),
        weight=share.amax(dim=1),
        quality=quality if sure is None else quality * sure,
        certainty=sure,
    )


def _pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """[N, M, 4], [N, A, 4] -> [N, M, A]."""
    corner = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    sides = (torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:]) - corner).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b))
    return shared / (area_a[:, :, None] + area_b[:, None] - shared).clamp(min=1e-9)


def aligned_losses(
    logits: Tensor,
    distances: Tensor,
    found: Tensor,
    points: Tensor,
    strides: Tensor,
    target: Assignment,
    background: Tensor | None = None,
) -> dict[str, Tensor]:
    """Varifocal, GIoU and distribution focal loss, each divided by the sum of the weights over the batch.

    The papers weight a positive point by its quality. Here the weight is its share of the best quality of its box:
    otherwise small boxes and rare classes, whose qualities are low for long, would hardly contribute and learn late.

    Args:
        logits: float32 [N, A, C].
        distances: float32 [N, A, 4, B], logits of the distances to the four sides, in strides 0…B-1.
        found: float32 [N, A, 4] xyxy, the boxes that those distances mean, differentiable.
        background: see `detection.models.background.background_mask`; None: all that is not positive is background.

    Returns:
        {"classification", "bbox_regression", "distances"}, scalars.
    """
    total = target.weight.sum().clamp(min=1.0)
    own = logits.gather(2, target.labels[..., None])[..., 0]
    # Varifocal loss (arXiv 2008.13367): cross entropy to the quality for what is positive, focal for the rest.
    toward = F.binary_cross_entropy_with_logits(own, target.quality, reduction="none") * target.weight
    negative, own_negative = negative_focal_loss(logits), negative_focal_loss(own)
    if background is not None:
        negative = negative * background
        own_negative = own_negative * background.expand_as(logits).gather(2, target.labels[..., None])[..., 0]
    classification = negative.sum() + ((toward - own_negative) * target.positive).sum()

    chosen = target.positive
    weight = target.weight[chosen]
    if target.certainty is not None:
        weight = weight * target.certainty[chosen]
    box = generalized_box_iou_loss(found[chosen], target.boxes[chosen], eps=1e-7) * weight
    side = sides_of(target.boxes[chosen], points.expand(len(chosen), -1, -1)[chosen])
    side = side / strides.expand(len(chosen), -1)[chosen][:, None]
    parts = distribution_focal_loss(distances[chosen], side).mean(dim=1) * weight
    # A box that is NaN matches no point, but must not be ignored.
    return {
        "classification": classification / total,
        "bbox_regression": box.sum() / total + (target.boxes * 0).sum(),
        "distances": parts.sum() / total,
    }


def sides_of(boxes: Tensor, points: Tensor) -> Tensor:
    """Distances [..., 4] (left, top, right, bottom) from points [..., 2] to the sides of boxes [..., 4] xyxy."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def distribution_focal_loss(logits: Tensor, values: Tensor) -> Tensor:
    """Cross entropy to the two whole numbers around a value (generalized focal loss, arXiv 2006.04388, equation 6).

    Args:
        logits: float32 [..., B] of the numbers 0…B-1.
        values: float32 [...]; what lies outside counts as the nearest number inside.
    """
    bins = logits.shape[-1]
    values = values.clamp(0, bins - 1 - 0.01)
    left = values.floor().long()
    share = values - left
    log_probability = F.log_softmax(logits, dim=-1)
    low = log_probability.gather(-1, left[..., None])[..., 0]
    high = log_probability.gather(-1, left[..., None] + 1)[..., 0]
    return -(low * (1 - share) + high * share)
