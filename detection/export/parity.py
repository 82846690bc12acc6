"""Measures the difference between the results of two detectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MATCH_PIXELS, MATCH_SCORE = 2.0, 0.05
"""Largest difference (pixels, score) between matching detections."""
MAX_UNMATCHED = 0.005
"""Fraction of detections that may be unmatched: if the IoU of two boxes equals the NMS threshold up to rounding, one
program may keep both and the other only one."""


@dataclass
class Parity:
    """Largest differences between matching detections, and the number of unmatched ones.

    Attributes:
        images, detections: number of compared images and detections.
        boxes: largest difference of box coordinates in pixels.
        scores: largest difference of scores.
        unmatched: detections of only one of the two, without those whose score is within `tolerance` of the score
            threshold or of the last detection in a full list.
    """

    images: int = 0
    detections: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    unmatched: int = 0

    def __add__(self, other: "Parity") -> "Parity":
        return Parity(
            self.images + other.images,
            self.detections + other.detections,
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            self.unmatched + other.unmatched,
        )

    def within(self, boxes: float, scores: float) -> bool:
        return self.unmatched <= MAX_UNMATCHED * self.detections and self.boxes <= boxes and self.scores <= scores

    def __str__(self) -> str:
        text = f"{self.detections} detections on {self.images} images: "
        text += f"boxes within {self.boxes:.1g} px, scores within {self.scores:.1g}"
        return text + (f", {self.unmatched} without a counterpart" if self.unmatched else "")


def compare(
    found: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, Any]],
    *,
    score_threshold: float,
    max_detections: int,
    tolerance: float = 1e-3,
) -> Parity:
    """Compare the results {boxes [n, 4], labels [n], scores [n]} of two detectors on the same images.

    The order is ignored, because scores that differ by rounding may be sorted differently.
    """
    parity = Parity(images=len(expected))
    for one, other in zip(found, expected, strict=True):
        a, b = _columns(one), _columns(other)
        # Below this score a detection may be in only one list.
        least = [score_threshold, *(x[2].min() for x in (a, b) if len(x[2]) >= max_detections)]
        parity.detections += len(b[2])
        for left, right in ((b, a), (a, b)):
            boxes, scores, matched = _distances(left, right)
            parity.boxes = max(parity.boxes, float(boxes[matched].max(initial=0)))
            parity.scores = max(parity.scores, float(scores[matched].max(initial=0)))
            parity.unmatched += int((left[2][~matched] > max(least) + tolerance).sum())
    return parity


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def _columns(found: Mapping[str, Any]) -> Columns:
    return np.asarray(found["boxes"]), np.asarray(found["labels"]), np.asarray(found["scores"])


def _distances(left: Columns, right: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each detection of `left`: distance in box and score to the nearest of `right`, and whether they match."""
    count = len(left[2])
    if not len(right[2]):
        return np.zeros(count), np.zeros(count), np.zeros(count, bool)
    boxes = np.abs(left[0][:, None] - right[0][None]).max(-1)
    scores = np.abs(left[2][:, None] - right[2][None])
    distance = boxes / MATCH_PIXELS + scores / MATCH_SCORE
    distance[left[1][:, None] != right[1][None]] = np.inf
    nearest = (np.arange(count), distance.argmin(1))
    same = (distance[nearest] < np.inf) & (boxes[nearest] <= MATCH_PIXELS) & (scores[nearest] <= MATCH_SCORE)
    return boxes[nearest], scores[nearest], same
