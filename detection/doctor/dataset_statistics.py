"""Statistics of a dataset for the text, JSON and HTML reports."""

from typing import Any

import numpy as np

from detection.doctor.anchor_checks import AnchorConfig, resize_boxes
from detection.doctor.box_checks import clip_to_image, image_sizes_of_boxes
from detection.doctor.class_checks import boxes_per_image, class_counts
from detection.doctor.entries import Entries

SMALL, LARGE = 32.0, 96.0
"""COCO's limits of small, medium and large objects: square root of the area in pixels of the original image."""


def dataset_statistics(entries: Entries) -> dict[str, Any]:
    """Counts, quantiles of box sizes and shapes, and boxes and images of each class, as plain values."""
    boxes, images = class_counts(entries)
    sides = box_sides(entries)
    side = np.sqrt(sides.prod(axis=1))
    known = entries.sizes[(entries.sizes > 0).all(axis=1)]
    per_image = boxes_per_image(entries)
    return {
        "source": entries.source,
        "format": entries.format,
        "images": len(entries.image_ids),
        "boxes": int(entries.valid.sum()),
        "crowd": int(entries.crowd.sum()),
        "images_without_boxes": int((per_image == 0).sum()),
        "boxes_per_image": {
            "mean": float(per_image.mean()) if len(per_image) else 0.0,
            "most": int(per_image.max(initial=0)),
        },
        "image_width": _quantiles(known[:, 0]),
        "image_height": _quantiles(known[:, 1]),
        "box_side": _quantiles(side),
        "box_aspect": _quantiles(sides[:, 0] / sides[:, 1]),
        "small": float((side < SMALL).mean()) if len(side) else 0.0,
        "medium": float(((side >= SMALL) & (side < LARGE)).mean()) if len(side) else 0.0,
        "large": float((side >= LARGE).mean()) if len(side) else 0.0,
        "classes": [
            {"id": int(i), "name": name, "boxes": int(b), "images": int(n)}
            for i, name, b, n in zip(entries.category_ids, entries.category_names, boxes, images, strict=True)
        ],
    }


def box_sides(entries: Entries) -> np.ndarray:
    """float [b, 2]: width and height of the boxes that training uses, clipped to the image."""
    inner = _training_boxes(entries)[0]
    return inner[:, 2:] - inner[:, :2]


def box_sides_at_input(entries: Entries, anchor_config: AnchorConfig) -> np.ndarray:
    """float [b, 2]: `box_sides` in pixels of the resized image."""
    boxes, sizes = _training_boxes(entries)
    resized, _ = resize_boxes(boxes, sizes, anchor_config) if len(boxes) else (boxes, sizes)
    return resized[:, 2:] - resized[:, :2]


def box_centers(entries: Entries) -> np.ndarray:
    """float [b, 2]: center of each box relative to its image, 0…1."""
    boxes, sizes = _training_boxes(entries)
    return (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes


def _training_boxes(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """xyxy boxes [b, 4], clipped to their image, and the image sizes [b, 2]."""
    sizes = image_sizes_of_boxes(entries)
    inner = clip_to_image(entries.boxes, sizes)
    with np.errstate(invalid="ignore"):
        keep = entries.valid & ((inner[:, 2:] - inner[:, :2]) >= 1).all(axis=1)
    return inner[keep], sizes[keep]


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("least", "10%", "median", "90%", "most")
    return dict(zip(names, np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).round(3).tolist(), strict=True))
