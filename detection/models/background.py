"""Where an anchor may be trained as background: not in ignored regions, and only for classes with complete annotations.

Both are optional fields of a target, beside boxes and labels:

    ignored_boxes     float32 [m, 4] xyxy, and ignored_labels int64 [m], 1…C: regions with objects of a class that have
                      no boxes of their own (COCO's crowd regions, VOC's difficult objects)
    complete_classes  bool [C]: False for a class whose objects in the image have no boxes, or not all of them
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from detection.models.task_aligned import pad_targets


def background_mask(
    targets: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    positive: Tensor,
    inside: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """For which classes an anchor that is no object of that class is background (federated loss, arXiv 1908.03195).

    An anchor in an ignored region is not background for the class of the region, unless an object is assigned to it.
    Of a class without complete annotations no anchor of the image is background. Nothing waits for the device.

    Args:
        positive: bool [N, A], the anchors that an object is assigned to.
        inside: from regions float32 [N, M, 4] xyxy to bool [N, M, A], the anchors that lie in each of them.

    Returns:
        bool [N, A, C], or [N, 1, C] without ignored regions; None where nothing restricts the background.
    """
    mask = None
    if any("complete_classes" in target for target in targets):
        every = torch.ones(num_classes, dtype=torch.bool, device=positive.device)
        mask = torch.stack([target.get("complete_classes", every) for target in targets])[:, None]
    if any(len(target.get("ignored_boxes", ())) for target in targets):
        nothing = {
            "ignored_boxes": torch.zeros(0, 4, device=positive.device),
            "ignored_labels": torch.zeros(0, dtype=torch.int64, device=positive.device),
        }
        full = [{**nothing, **target} for target in targets]
        regions, labels, real = pad_targets(
            [target["ignored_boxes"] for target in full], [target["ignored_labels"] - 1 for target in full]
        )
        of_class = (labels[..., None] == torch.arange(num_classes, device=labels.device)) & real[..., None]
        covered = inside(regions).float().transpose(1, 2) @ of_class.float() > 0
        free = ~covered | positive[..., None]
        mask = free if mask is None else mask & free
    return mask


def points_inside(points: Tensor) -> Callable[[Tensor], Tensor]:
    """For `background_mask`: the points [A, 2] (x, y) that lie in each region."""

    def inside(regions: Tensor) -> Tensor:
        return ((points >= regions[:, :, None, :2]) & (points <= regions[:, :, None, 2:])).all(dim=-1)

    return inside


def anchors_inside(anchors: Tensor, share: float = 0.5) -> Callable[[Tensor], Tensor]:
    """For `background_mask`: the anchors [A, 4] xyxy of whose area at least `share` lies in each region."""

    def inside(regions: Tensor) -> Tensor:
        corner = torch.maximum(regions[:, :, None, :2], anchors[:, :2])
        sides = (torch.minimum(regions[:, :, None, 2:], anchors[:, 2:]) - corner).clamp(min=0)
        return sides.prod(dim=-1) >= share * (anchors[:, 2:] - anchors[:, :2]).prod(dim=-1)

    return inside
