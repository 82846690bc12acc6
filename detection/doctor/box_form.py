"""In which form boxes are written: COCO's x, y, width, height in pixels, or one that was taken for it."""

from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
    """`name` is xywh, xyxy, centre or fractions; `certain` where all boxes speak for it; `rows` show it best."""

    name: str
    certain: bool
    rows: np.ndarray


def as_xywh(boxes: np.ndarray, sizes: np.ndarray, form: str) -> np.ndarray:
    """Boxes [m, 4] of a form -> xywh in pixels; of fractions, what they are fractions of is found out, too."""
    if form == "fractions":
        pixels = boxes * np.concatenate([sizes, sizes], axis=1)
        inner = box_form(pixels, sizes)
        return as_xywh(pixels, sizes, inner.name if inner.certain else "xywh")
    if form == "xyxy":
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if form == "centre":
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
    return boxes


def box_form(boxes: np.ndarray, sizes: np.ndarray, areas: np.ndarray | None = None) -> Form:
    """What form boxes are likely written in.

    A single box tells nothing; of many, those of a wrong form lie beyond the frame when they are read as xywh, and
    fit into it when they are read as what they are.

    Args:
        boxes: float [m, 4], finite.
        sizes: [m, 2], width and height of each one's image.
        areas: [m], NaN where not given: one that is (x2 - x1) (y2 - y1) gives a box away.
    """
    count = len(boxes)
    nothing = np.zeros(0, np.int64)
    if count < 3:
        return Form("xywh", True, nothing)
    if (boxes >= 0).all() and (boxes <= 1.0).all() and (sizes > 4).all() and (boxes[:, 2:] < 1).any():
        return Form("fractions", True, np.arange(count))
    slack = np.maximum(2.0, 0.01 * sizes)
    x2y2 = boxes[:, :2] + boxes[:, 2:]
    beyond = ((x2y2 > sizes + slack) & (boxes[:, :2] <= sizes + slack)).any(axis=1)
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    as_corners = ordered & (boxes[:, 2:] <= sizes + slack).all(axis=1) & (boxes[:, :2] >= -slack).all(axis=1)
    # Boxes that begin at the upper left corner are the same in both forms, nearly.
    telling = beyond & (boxes[:, :2] > slack).any(axis=1)
    rows = np.flatnonzero(telling & as_corners)
    if areas is not None and len(rows) >= 3 and _areas_tell(boxes, areas):
        return Form("xyxy", bool(as_corners.mean() >= 0.99), rows)
    if len(rows) >= 3 and len(rows) >= 0.9 * telling.sum() and as_corners.mean() >= 0.5:
        certain = count >= 10 and as_corners.mean() >= 0.99 and telling.mean() >= 0.2
        return Form("xyxy", bool(certain), rows)
    half = boxes[:, 2:] / 2
    inside = (boxes[:, :2] - half >= -slack).all(axis=1) & (boxes[:, :2] + half <= sizes + slack).all(axis=1)
    # Of boxes that are true xywh, some touch the left or upper edge, and would lie beyond it as centres.
    if beyond.sum() >= 5 and count >= 20 and inside.mean() >= 0.99 and (boxes[:, 2:] > 0).all():
        return Form("centre", bool(count >= 40 and beyond.mean() >= 0.02), np.flatnonzero(beyond & inside))
    return Form("xywh", True, nothing)


def _areas_tell(boxes: np.ndarray, areas: np.ndarray) -> bool:
    """Whether areas are those of boxes that are x1, y1, x2, y2."""
    given = np.isfinite(areas) & (areas > 0)
    if given.sum() < 3:
        return False
    corners = (boxes[given, 2:] - boxes[given, :2]).prod(axis=1)
    plain = boxes[given, 2:].prod(axis=1)
    return bool(_near(corners, areas[given]).mean() > 0.95 and _near(plain, areas[given]).mean() < 0.5)


def _near(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.abs(left - right) <= 0.02 * np.abs(right) + 1
