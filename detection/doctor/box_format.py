"""Detect boxes that are not in COCO format (xywh in pixels), and convert them."""

from typing import NamedTuple

import numpy as np


class BoxFormat(NamedTuple):
    """A detected format.

    Attributes:
        name: "xywh", "xyxy", "centre" (cxcywh) or "fractions" (normalized to 0…1).
        certain: whether all boxes match the format.
        rows: int64, boxes that cannot be xywh.
    """

    name: str
    certain: bool
    rows: np.ndarray


def to_xywh(boxes: np.ndarray, sizes: np.ndarray, name: str) -> np.ndarray:
    """Convert boxes [m, 4] of a format to xywh in pixels.

    Normalized boxes are multiplied by `sizes` [m, 2] first; then their format is detected again, since they may be xyxy
    or cxcywh.
    """
    if name == "fractions":
        pixels = boxes * np.concatenate([sizes, sizes], axis=1)
        detected = detect_box_format(pixels, sizes)
        return to_xywh(pixels, sizes, detected.name if detected.certain else "xywh")
    if name == "xyxy":
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if name == "centre":
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
    return boxes


def detect_box_format(boxes: np.ndarray, sizes: np.ndarray, areas: np.ndarray | None = None) -> BoxFormat:
    """Detect the format of boxes.

    One box is not enough. Of many boxes in another format, some extend beyond the image when interpreted as xywh, and
    all fit into the image when interpreted in their true format.

    Args:
        boxes: float [m, 4], finite.
        sizes: [m, 2], width and height of each box's image.
        areas: [m], annotated areas, NaN if missing: areas that equal (x2 - x1) * (y2 - y1) prove xyxy.
    """
    count = len(boxes)
    no_rows = np.zeros(0, np.int64)
    if count < 3:
        return BoxFormat("xywh", True, no_rows)
    if (boxes >= 0).all() and (boxes <= 1.0).all() and (sizes > 4).all() and (boxes[:, 2:] < 1).any():
        return BoxFormat("fractions", True, np.arange(count))
    slack = np.maximum(2.0, 0.01 * sizes)
    x2y2 = boxes[:, :2] + boxes[:, 2:]
    beyond = ((x2y2 > sizes + slack) & (boxes[:, :2] <= sizes + slack)).any(axis=1)
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    as_corners = ordered & (boxes[:, 2:] <= sizes + slack).all(axis=1) & (boxes[:, :2] >= -slack).all(axis=1)
    # Boxes near the top left corner are almost the same in both formats.
    evidence = beyond & (boxes[:, :2] > slack).any(axis=1)
    rows = np.flatnonzero(evidence & as_corners)
    if areas is not None and len(rows) >= 3 and _areas_are_xyxy(boxes, areas):
        return BoxFormat("xyxy", bool(as_corners.mean() >= 0.99), rows)
    if len(rows) >= 3 and len(rows) >= 0.9 * evidence.sum() and as_corners.mean() >= 0.5:
        certain = count >= 10 and as_corners.mean() >= 0.99 and evidence.mean() >= 0.2
        return BoxFormat("xyxy", bool(certain), rows)
    half = boxes[:, 2:] / 2
    inside = (boxes[:, :2] - half >= -slack).all(axis=1) & (boxes[:, :2] + half <= sizes + slack).all(axis=1)
    # Some true xywh boxes touch the left or top edge; as cxcywh they would extend beyond the image.
    if beyond.sum() >= 5 and count >= 20 and inside.mean() >= 0.99 and (boxes[:, 2:] > 0).all():
        return BoxFormat("centre", bool(count >= 40 and beyond.mean() >= 0.02), np.flatnonzero(beyond & inside))
    return BoxFormat("xywh", True, no_rows)


def _areas_are_xyxy(boxes: np.ndarray, areas: np.ndarray) -> bool:
    """Whether the annotated areas equal those of the boxes interpreted as x1, y1, x2, y2."""
    given = np.isfinite(areas) & (areas > 0)
    if given.sum() < 3:
        return False
    xyxy_areas = (boxes[given, 2:] - boxes[given, :2]).prod(axis=1)
    xywh_areas = boxes[given, 2:].prod(axis=1)
    return bool(_is_close(xyxy_areas, areas[given]).mean() > 0.95 and _is_close(xywh_areas, areas[given]).mean() < 0.5)


def _is_close(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.abs(left - right) <= 0.02 * np.abs(right) + 1
