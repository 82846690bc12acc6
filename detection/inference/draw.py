"""Boxes, class names and scores on a picture."""

import colorsys
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np


def class_color(label: int) -> tuple[int, int, int]:
    """RGB of a class; neighbours differ clearly (hues at the golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: np.ndarray, detections: Mapping[str, Any]) -> np.ndarray:
    """A copy of an RGB uint8 [H, W, 3] picture with the detections of `Predictor.predict` drawn on it.

    Ground truth, without "scores", is drawn with names alone.

    The best score is drawn last, on top. OpenCV's font has Latin letters only; others show as question marks.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = canvas.shape[:2]
    line = max(1, round(max(height, width) / 400))
    font, size = cv2.FONT_HERSHEY_SIMPLEX, max(0.35, max(height, width) / 1300)
    scores = detections.get("scores")
    order = range(len(detections["labels"])) if scores is None else np.argsort(scores, kind="stable").tolist()
    for i in order:
        x1, y1, x2, y2 = (round(v) for v in np.asarray(detections["boxes"][i]).tolist())
        color = class_color(int(detections["labels"][i]))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line, cv2.LINE_AA)
        text = detections["names"][i] if scores is None else f"{detections['names'][i]} {scores[i]:.2f}"
        (text_width, text_height), below = cv2.getTextSize(text, font, size, 1)
        # Above the box, or just inside it where the picture ends.
        top = y1 - text_height - below if y1 - text_height - below >= 0 else y1
        left = max(0, min(x1, width - text_width))
        cv2.rectangle(canvas, (left, top), (left + text_width, top + text_height + below), color, -1)
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
        ink = (0, 0, 0) if bright else (255, 255, 255)
        cv2.putText(canvas, text, (left, top + text_height + below // 2), font, size, ink, 1, cv2.LINE_AA)
    return canvas
