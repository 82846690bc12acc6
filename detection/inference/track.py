"""Which object of a frame is which of the frame before: norfair (BSD) follows boxes with a Kalman filter."""

from typing import Any

import numpy as np

from detection.core.extras import require
from detection.inference.predictor import Detections

# An object is matched with a box that has at least this IoU with where it is expected.
MIN_IOU = 0.2
# It must be found so often before it gets a number, and keeps it while unseen for so long.
HITS, SECONDS_UNSEEN = 2, 1.0


class Tracker:
    """Gives the objects of one video numbers that stay; a new video needs a new tracker.

    Args:
        fps: of the video; the faster it is, the more frames an object may be unseen and keep its number.

    Raises:
        UserError: norfair is not installed.
    """

    def __init__(self, fps: float) -> None:
        norfair = load_norfair()
        self._frame = 0
        self._detection = norfair.Detection
        self._tracker = norfair.Tracker(
            distance_function="iou",
            distance_threshold=1 - MIN_IOU,
            hit_counter_max=max(HITS, round(SECONDS_UNSEEN * fps)),
            initialization_delay=HITS - 1,
        )

    def update(self, detections: Detections) -> Detections:
        """Detections of the next frame -> the same with "ids": 1, 2, … or None, not yet, for each box.

        Objects of different classes are never the same.
        """
        boxes, labels = np.asarray(detections["boxes"], np.float64), detections["labels"].tolist()
        found = [
            self._detection(points=box.reshape(2, 2), label=label, data=(self._frame, i))
            for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ]
        ids: list[int | None] = [None] * len(found)
        for tracked in self._tracker.update(found):
            frame, i = tracked.last_detection.data
            # Others were not seen in this frame.
            if frame == self._frame:
                ids[i] = tracked.id
        self._frame += 1
        return {**detections, "ids": ids}


def load_norfair() -> Any:
    """The library, or a UserError that says how to get it."""
    require("--track", "norfair")
    import norfair

    return norfair
