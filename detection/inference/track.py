"""Tracks objects from frame to frame with norfair (BSD), which uses a Kalman filter."""

from typing import Any

import numpy as np

from detection.core.extras import require
from detection.inference.predictor import Detections

# Smallest IoU between the predicted box of an object and a detection of it.
MIN_IOU = 0.2
# Detections before an object gets an id, and seconds without detection after which it loses the id.
HITS, SECONDS_UNSEEN = 2, 1.0


class Tracker:
    """Assigns ids to the objects of one video; each video needs its own tracker.

    Args:
        fps: of the video; it determines after how many frames without detection an object loses its id.

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
        """Add "ids" to the detections of the next frame: 1, 2, …, or None for boxes without an id yet.

        An object keeps its class: boxes of different classes are never matched.
        """
        boxes, labels = np.asarray(detections["boxes"], np.float64), detections["labels"].tolist()
        found = [
            self._detection(points=box.reshape(2, 2), label=label, data=(self._frame, i))
            for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ]
        ids: list[int | None] = [None] * len(found)
        for tracked in self._tracker.update(found):
            frame, i = tracked.last_detection.data
            # Other objects were not detected in this frame.
            if frame == self._frame:
                ids[i] = tracked.id
        self._frame += 1
        return {**detections, "ids": ids}


def load_norfair() -> Any:
    """Import norfair. Raises UserError with the command to install it."""
    require("--track", "norfair")
    import norfair

    return norfair
