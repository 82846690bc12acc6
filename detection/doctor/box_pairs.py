"""All pairs of boxes in the same image, in chunks of a few million pairs."""

from collections.abc import Iterator

import numpy as np


def pairs_in_images(images: np.ndarray, max_pairs: int = 2_000_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers (left, right), left < right, of all pairs of rows with the same image.

    Args:
        images: int [m], sorted.
        max_pairs: approximate number of pairs per chunk.
    """
    if not len(images):
        return
    ends = np.searchsorted(images, images, side="right")
    partners = ends - np.arange(len(images)) - 1
    total = np.cumsum(partners)
    start = 0
    while start < len(images):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + max_pairs, side="right")))
        counts = partners[start:stop]
        left = np.repeat(np.arange(start, stop), counts)
        # 0, 1, 2, … for the partners of each left row.
        within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(left):
            yield left, left + 1 + within
        start = stop


def intersection_areas(boxes: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Intersection area of boxes[left] and boxes[right]; boxes are xyxy."""
    sides = np.minimum(boxes[left, 2:], boxes[right, 2:]) - np.maximum(boxes[left, :2], boxes[right, :2])
    return np.clip(sides, 0, None).prod(axis=1)
