"""RetinaNet's losses over a whole batch, without waiting for the GPU.

The results are those of torchvision's `RetinaNet.compute_loss` (a test compares them), which handles one image after
the other, waits several times for the GPU for each, and makes a dozen passes over all logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou_loss

IGNORED, BACKGROUND = -2, -1


def match_anchors(boxes: Tensor, anchors: Tensor, low: float = 0.4, high: float = 0.5) -> Tensor:
    """Assign each anchor the index of a box, BACKGROUND (IoU below `low`) or IGNORED (IoU in between).

    An anchor with the highest IoU (or an equal one) of some box is never ignored, however low the IoU: it keeps the box
    that it overlaps most.

    Args:
        boxes: float32 [M, 4] xyxy, M >= 0.
        anchors: float32 [A, 4] xyxy.

    Returns:
        int64 [A]
    """
    if not len(boxes):
        return anchors.new_full((len(anchors),), BACKGROUND, dtype=torch.int64)
    iou = box_iou(boxes, anchors)
    best, box = iou.max(dim=0)
    matches = torch.where(best >= high, box, torch.where(best >= low, IGNORED, BACKGROUND))
    # A box that overlaps no anchor at all would have all of them as its "best".
    rescued = ((iou == iou.amax(dim=1, keepdim=True)) & (iou > 0)).any(dim=0)
    return torch.where(rescued, box, matches)


def retina_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    coder: BoxCoder,
    box_loss: str,
    background_of: Callable[[Tensor], Tensor | None] = lambda positive: None,
) -> dict[str, Tensor]:
    """Focal loss and box loss, each divided by the number of positive anchors of its image, averaged over images.

    Args:
        logits: float32 [N, A, C].
        deltas: float32 [N, A, 4], what the box head put out.
        anchors: float32 [A, 4] xyxy, the same for every image of the batch.
        boxes: N times float32 [M_i, 4] xyxy.
        labels: N times int64 [M_i], 0…C-1.
        box_loss: "giou" or "l1".
        background_of: from the positive anchors, bool [N, A], to the `background_mask`.

    Returns:
        {"classification", "bbox_regression"}, scalars.
    """
    images = len(boxes)
    matches = torch.stack([match_anchors(of_image, anchors) for of_image in boxes])
    positive = matches >= 0
    weight = 1.0 / (positive.sum(dim=1, keepdim=True).clamp(min=1) * images)

    # Boxes of all images in one table, the first entry for anchors that have none.
    nothing = anchors.new_tensor([[0.0, 0.0, 1.0, 1.0]])
    all_boxes, all_labels = torch.cat([nothing, *boxes]), torch.cat([labels[0].new_zeros(1), *labels])
    starts = (
        torch.tensor([0, *(len(of_image) for of_image in boxes[:-1])]).cumsum(0).to(matches.device, non_blocking=True)
    )
    rows = torch.where(positive, matches + starts[:, None] + 1, 0)

    own = logits.gather(2, all_labels[rows][..., None])[..., 0]
    background = background_of(positive)
    as_negative, own_negative = _NegativeFocalLoss.apply(logits, background), negative_focal_loss(own)
    if background is not None:
        own_negative = own_negative * background.expand_as(logits).gather(2, all_labels[rows][..., None])[..., 0]
    # The logit of an anchor's own class is counted among the negatives there: taken out here.
    correction = positive_focal_loss(own) - own_negative
    classification = as_negative * (matches != IGNORED) + correction * positive

    box_weight = (positive * weight).flatten()
    if box_loss == "giou":
        found = coder.decode_single(deltas.flatten(0, 1), anchors.repeat(images, 1))
        # An anchor without a box has weight zero, but zero times what is not finite is not zero.
        target = torch.where(positive.flatten()[:, None], all_boxes[rows].flatten(0, 1), found.detach())
        per_anchor = generalized_box_iou_loss(found, target, eps=1e-7)
    else:
        target = coder.encode_single(all_boxes[rows].flatten(0, 1), anchors.repeat(images, 1))
        per_anchor = F.l1_loss(deltas.flatten(0, 1), target, reduction="none").sum(dim=1)
    # A box that is not a number matches no anchor; it is not to be passed over in silence, though.
    whole = (all_boxes * 0).sum()
    return {
        "classification": (classification * weight).sum(),
        "bbox_regression": (per_anchor * box_weight).sum() + whole,
    }


def positive_focal_loss(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """Of logits that should be high (arXiv 1708.02002, equation 5, gamma 2); any shape."""
    return alpha * torch.sigmoid(-logits).square() * F.softplus(-logits)


def negative_focal_loss(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """Of logits that should be low; any shape."""
    return (1 - alpha) * torch.sigmoid(logits).square() * F.softplus(logits)


class _NegativeFocalLoss(torch.autograd.Function):
    """`negative_focal_loss` summed over classes, [N, A, C] -> [N, A], with its gradient made in the same pass; with a
    `background_mask`, over the classes for which the anchor may be background.

    There are anchors times classes of these, millions, and hardly any positive ones: autograd would keep and read
    back four arrays of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, background: Tensor | None = None) -> Tensor:
        p = torch.sigmoid(logits)
        softplus = F.softplus(logits)
        square = p.square().mul_(0.75)
        if background is not None:
            square.mul_(background)
        loss = torch.einsum("nac,nac->na", square, softplus)
        # d(p² s)/dx = p² (2 (1 - p) s + p), as dp/dx = p (1 - p) and ds/dx = p.
        gradient = softplus.mul_(1 - p).mul_(2).add_(p).mul_(square)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer[..., None], None
