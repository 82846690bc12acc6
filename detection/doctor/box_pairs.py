"""All pairs of boxes that are in the same image, a few million at a time."""

from collections.abc import Iterator

import numpy as np


def pairs_in_images(images: np.ndarray, most: int = 2_000_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (left, right), left before right, of every two rows with the same image.

    Args:
        images: int [m], sorted.
        most: pairs at a time, about.
    """
    if not len(images):
        return
    ends = np.searchsorted(images, images, side="right")
    partners = ends - np.arange(len(images)) - 1
    total = np.cumsum(partners)
    start = 0
    while start < len(images):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + most, side="right")))
        counts = partners[start:stop]
        left = np.repeat(np.arange(start, stop), counts)
        # 0, 1, 2 … within each left row's run.
        within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(left):
            yield left, left + 1 + within
        start = stop


def overlaps(boxes: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Area that the two boxes of each pair share; boxes xyxy."""
    corner = np.minimum(boxes[left, 2:], boxes[right, 2:]) - np.maximum(boxes[left, :2], boxes[right, :2])
    return np.clip(corner, 0, None).prod(axis=1)
