"""Numbers of a set, for the summary, the JSON file and the plots."""

from typing import Any

import numpy as np

from detection.doctor.box_checks import box_sizes, clipped
from detection.doctor.class_checks import boxes_per_image, class_counts
from detection.doctor.entries import Entries
from detection.doctor.suitability import Setting, resize

SMALL, LARGE = 32.0, 96.0
"""COCO's bounds of small, medium and large: roots of the area in pixels of the original image."""


def statistics(entries: Entries) -> dict[str, Any]:
    """Plain values: counts, quantiles of sizes and shapes, boxes and images of each class."""
    boxes, images = class_counts(entries)
    sides = box_sides(entries)
    root = np.sqrt(sides.prod(axis=1))
    known = entries.sizes[(entries.sizes > 0).all(axis=1)]
    each = boxes_per_image(entries)
    return {
        "source": entries.source,
        "format": entries.format,
        "images": len(entries.image_ids),
        "boxes": int(entries.valid.sum()),
        "crowd": int(entries.crowd.sum()),
        "images_without_boxes": int((each == 0).sum()),
        "boxes_per_image": {"mean": float(each.mean()) if len(each) else 0.0, "most": int(each.max(initial=0))},
        "image_width": _quantiles(known[:, 0]),
        "image_height": _quantiles(known[:, 1]),
        "box_side": _quantiles(root),
        "box_aspect": _quantiles(sides[:, 0] / sides[:, 1]),
        "small": float((root < SMALL).mean()) if len(root) else 0.0,
        "medium": float(((root >= SMALL) & (root < LARGE)).mean()) if len(root) else 0.0,
        "large": float((root >= LARGE).mean()) if len(root) else 0.0,
        "classes": [
            {"id": int(i), "name": name, "boxes": int(b), "images": int(n)}
            for i, name, b, n in zip(entries.category_ids, entries.category_names, boxes, images, strict=True)
        ],
    }


def box_sides(entries: Entries) -> np.ndarray:
    """float [b, 2]: width and height within the image of boxes that training sees."""
    inner = _training_boxes(entries)[0]
    return inner[:, 2:] - inner[:, :2]


def sides_at_input(entries: Entries, setting: Setting) -> np.ndarray:
    """float [b, 2]: as `box_sides`, in pixels of the resized image."""
    boxes, sizes = _training_boxes(entries)
    seen, _ = resize(boxes, sizes, setting) if len(boxes) else (boxes, sizes)
    return seen[:, 2:] - seen[:, :2]


def centres(entries: Entries) -> np.ndarray:
    """float [b, 2]: where in its image each box's centre lies, 0…1."""
    boxes, sizes = _training_boxes(entries)
    return (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes


def _training_boxes(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    sizes = box_sizes(entries)
    inner = clipped(entries.boxes, sizes)
    with np.errstate(invalid="ignore"):
        keep = entries.valid & ((inner[:, 2:] - inner[:, :2]) >= 1).all(axis=1)
    return inner[keep], sizes[keep]


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("least", "10%", "median", "90%", "most")
    return dict(zip(names, np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).round(3).tolist(), strict=True))
