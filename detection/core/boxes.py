"""Boxes as NumPy arrays [..., 4]: xywh is (left, top, width, height), xyxy is (left, top, right, bottom)."""

import numpy as np

SAME_OBJECT = 0.8
"""IoU above which a box that a detector adds is taken for an annotated object, if perhaps of another class."""


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Clip xyxy [m, 4] to images of (width, height), [2] or [m, 2]."""
    return np.clip(boxes, 0, np.concatenate([sizes, sizes], axis=-1))


def box_area(boxes: np.ndarray) -> np.ndarray:
    """xyxy [..., 4] -> [...]"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
