"""How far two detectors' results are from each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAME_BOX, SAME_SCORE = 2.0, 0.05
"""Detections further apart than this (pixels, score) are not the same one."""
FLIPS = 0.005
"""The share of detections that may have no counterpart: two boxes whose IoU is the threshold of the suppression to the
last digit are one for one program and two for the other."""


@dataclass
class Parity:
    """Largest differences between detections that belong together, and how many belong to none.

    Attributes:
        images, detections: how many were compared.
        boxes: pixels.
        scores: of 1.
        unmatched: detections that only one of the two has, but for those that a difference of `tolerance`
            in score lets come and go at the threshold or at the end of the list.
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
        return self.unmatched <= FLIPS * self.detections and self.boxes <= boxes and self.scores <= scores

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

    Their order is not compared: scores that differ by rounding may change places.
    """
    parity = Parity(images=len(expected))
    for one, other in zip(found, expected, strict=True):
        a, b = _columns(one), _columns(other)
        # Below this score a detection may be in one list alone.
        least = [score_threshold, *(x[2].min() for x in (a, b) if len(x[2]) >= max_detections)]
        parity.detections += len(b[2])
        for mine, theirs in ((b, a), (a, b)):
            boxes, scores, matched = _distances(mine, theirs)
            parity.boxes = max(parity.boxes, float(boxes[matched].max(initial=0)))
            parity.scores = max(parity.scores, float(scores[matched].max(initial=0)))
            parity.unmatched += int((mine[2][~matched] > max(least) + tolerance).sum())
    return parity


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def _columns(found: Mapping[str, Any]) -> Columns:
    return np.asarray(found["boxes"]), np.asarray(found["labels"]), np.asarray(found["scores"])


def _distances(mine: Columns, theirs: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of mine the distance in box and in score to the nearest of theirs, and whether that is the same."""
    count = len(mine[2])
    if not len(theirs[2]):
        return np.zeros(count), np.zeros(count), np.zeros(count, bool)
    boxes = np.abs(mine[0][:, None] - theirs[0][None]).max(-1)
    scores = np.abs(mine[2][:, None] - theirs[2][None])
    apart = boxes / SAME_BOX + scores / SAME_SCORE
    apart[mine[1][:, None] != theirs[1][None]] = np.inf
    nearest = (np.arange(count), apart.argmin(1))
    same = (apart[nearest] < np.inf) & (boxes[nearest] <= SAME_BOX) & (scores[nearest] <= SAME_SCORE)
    return boxes[nearest], scores[nearest], same
