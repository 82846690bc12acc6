"""Augmentations that make one training image out of several: mosaic, mix-up, copy-paste of boxes.

Each function is pure: all chance comes from the generator it is given.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from detection.core.boxes import box_area
from detection.data.transforms import FILL, AugmentedSample


def mosaic(tiles: Sequence[AugmentedSample], rng: np.random.Generator, min_visibility: float) -> AugmentedSample:
    """Four images around a random point (YOLOv4, arXiv 2004.10934), in the frame of the first one.

    Every tile is scaled by a random factor between 0.5, where it fills about its quarter, and 1, its own size, and
    touches the point with a corner. Boxes are cut at the border of their quarter; an object of which less than
    `min_visibility` (share of its area) is left is dropped.
    """
    height, width = tiles[0][0].shape[:2]
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = FILL
    cx, cy = int(width * rng.uniform(0.3, 0.7)), int(height * rng.uniform(0.3, 0.7))
    quarters = ((0, 0, cx, cy), (cx, 0, width, cy), (0, cy, cx, height), (cx, cy, width, height))
    boxes, labels, ignored = [], [], []
    for tile, (x1, y1, x2, y2) in zip(tiles, quarters, strict=True):
        image, tile_boxes = _scaled(tile.image, tile.boxes, rng.uniform(0.5, 1.0))
        h, w = image.shape[:2]
        # Where the tile's upper left corner comes to lie.
        x = x2 - w if x2 == cx else x1
        y = y2 - h if y2 == cy else y1
        left, top, right, bottom = max(x, x1), max(y, y1), min(x + w, x2), min(y + h, y2)
        canvas[top:bottom, left:right] = image[top - y : bottom - y, left - x : right - x]
        moved = tile_boxes + np.array([x, y, x, y], np.float32)
        cut, keep = _cut(moved, tile.ignored, (left, top, right, bottom), min_visibility)
        boxes.append(cut[keep])
        labels.append(tile.labels[keep])
        ignored.append(tile.ignored[keep])
    return AugmentedSample(canvas, np.concatenate(boxes), np.concatenate(labels), np.concatenate(ignored))


def mixup(
    first: AugmentedSample, second: AugmentedSample, rng: np.random.Generator, min_visibility: float
) -> AugmentedSample:
    """Two images shown through each other, with the boxes of both (arXiv 1902.04103: shares near one half)."""
    height, width = first.image.shape[:2]
    fitted = np.empty_like(first.image)
    fitted[:] = FILL
    h, w = min(height, second.image.shape[0]), min(width, second.image.shape[1])
    fitted[:h, :w] = second.image[:h, :w]
    boxes, keep = _cut(second.boxes, second.ignored, (0, 0, w, h), min_visibility)
    share = rng.beta(8.0, 8.0)
    mixed = cv2.addWeighted(first.image, share, fitted, 1 - share, 0)
    return AugmentedSample(
        mixed,
        np.concatenate([first.boxes, boxes[keep]]),
        np.concatenate([first.labels, second.labels[keep]]),
        np.concatenate([first.ignored, second.ignored[keep]]),
    )


def copy_paste(
    target: AugmentedSample, source: AugmentedSample, rng: np.random.Generator, most: int = 3
) -> AugmentedSample:
    """Paste up to `most` objects of another image, as rectangles, where they hide little of what is there.

    Without masks the pasted background is a cue that a network may learn: off by default, useful where
    objects of a class are few.
    """
    image, boxes, labels, ignored = target.image.copy(), target.boxes, target.labels, target.ignored
    height, width = image.shape[:2]
    corners = np.round(source.boxes[~source.ignored]).astype(int)
    source_labels = source.labels[~source.ignored]
    for i in rng.permutation(len(corners))[:most]:
        x1, y1, x2, y2 = corners[i]
        patch = source.image[y1:y2, x1:x2]
        h, w = patch.shape[:2]
        if not (2 <= h < height and 2 <= w < width):
            continue
        for _ in range(8):  # tries for a free place
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            place = np.array([x, y, x + w, y + h], np.float32)
            if (_share_covered(boxes[~ignored], place) <= 0.2).all():
                image[y : y + h, x : x + w] = patch
                boxes = np.concatenate([boxes, place[None]])
                labels = np.append(labels, source_labels[i])
                ignored = np.append(ignored, False)
                break
    return AugmentedSample(image, boxes, labels, ignored)


def _scaled(image: np.ndarray, boxes: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    w, h = max(1, round(width * factor)), max(1, round(height * factor))
    scaled = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    return scaled, boxes * np.array([w / width, h / height] * 2, np.float32)


def _cut(
    boxes: np.ndarray, ignored: np.ndarray, frame: tuple[float, float, float, float], min_visibility: float
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes clipped to xyxy `frame`, and which of them are kept: objects that are still worth learning, and any rest
    of an ignored region."""
    x1, y1, x2, y2 = frame
    cut = np.stack([boxes[:, 0::2].clip(x1, x2), boxes[:, 1::2].clip(y1, y2)], axis=2).reshape(-1, 4)
    sides = cut[:, 2:] - cut[:, :2]
    keep = (sides >= 1).all(axis=1) & (box_area(cut) >= min_visibility * box_area(boxes) * ~ignored)
    return cut.astype(np.float32), keep


def _share_covered(boxes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Of each box's area, the share that `place` would hide."""
    inner = np.concatenate([np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])], axis=1)
    sides = (inner[:, 2:] - inner[:, :2]).clip(0)
    return sides.prod(axis=1) / np.maximum(box_area(boxes), 1e-6)
