"""Small videos, made and counted."""

import time

import cv2
import numpy as np


def write_video(path, frames=7, size=(96, 72), fourcc="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10.0, size)
    for i in range(frames):
        frame = np.full((size[1], size[0], 3), 110, np.uint8)
        cv2.rectangle(frame, (5 + 5 * i, 20), (30 + 5 * i, 45), (240, 240, 240), -1)
        writer.write(frame)
    writer.release()


def frames_of(path):
    """(number of frames that can be read, frames per second)."""
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    return count, capture.get(cv2.CAP_PROP_FPS)


class SquareFinder:
    """Stands in for a predictor: finds bright squares on a dark ground exactly, without a network."""

    num_streams = 1

    def prepare(self, image, *, bgr=False):
        return image.copy()

    def detect(self, images):
        return [self._find(image) for image in images]

    def _find(self, image):
        mask = (image.min(axis=2) > 170).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(mask)
        boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, area in stats[1:count] if area > 30], np.float32)
        n = len(boxes)
        return {
            "boxes": boxes.reshape(-1, 4),
            "labels": np.ones(n, np.int64),
            "names": ["square"] * n,
            "scores": np.full(n, 0.9, np.float32),
        }


class SlowDevice:
    """Stands in for `cv2.VideoCapture` of a camera: one frame every `1 / fps` seconds, each brighter by two."""

    def __init__(self, fps=50.0, frames=60):
        self.fps, self.left, self.released = fps, frames, False
        self.shade = 0

    def isOpened(self):
        return True

    def get(self, name):
        return self.fps if name == cv2.CAP_PROP_FPS else -1.0

    def read(self):
        assert not self.released
        time.sleep(1 / self.fps)
        if self.left == 0:
            return False, None
        self.left -= 1
        self.shade += 2
        return True, np.full((48, 64, 3), self.shade, np.uint8)

    def release(self):
        self.released = True
