"""Draws boxes, class names and scores on an image."""

import colorsys
import functools
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

FONT = cv2.FONT_HERSHEY_SIMPLEX
Color = tuple[int, int, int]


@functools.lru_cache(maxsize=4096)
def class_color(label: int) -> Color:
    """RGB color of a class; neighboring labels differ clearly (hues at the golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: np.ndarray, detections: Mapping[str, Any]) -> np.ndarray:
    """A copy of an RGB uint8 [H, W, 3] image with the detections of `Predictor.predict`; see `draw_on`."""
    canvas = np.ascontiguousarray(image).copy()
    draw_on(canvas, detections)
    return canvas


def draw_on(canvas: np.ndarray, detections: Mapping[str, Any], *, bgr: bool = False) -> None:
    """Draw detections on a uint8 [H, W, 3] image in place, RGB or BGR; the line width and the font fit its size.

    Without "scores" (ground truth) labels are names only. With "ids" (of `track.Tracker`) each object has its own
    color, and its id in the label. "colors" (RGB, one for each box) replace the class colors. The highest score is
    drawn last, on top. OpenCV's font has only Latin letters; others become question marks.
    """
    line, scale, weight = _sizes(canvas)
    scores, ids, colors = detections.get("scores"), detections.get("ids"), detections.get("colors")
    boxes = np.asarray(detections["boxes"]).reshape(-1, 4).round().astype(int).tolist()
    for i in range(len(boxes)) if scores is None else np.argsort(scores, kind="stable").tolist():
        text = detections["names"][i] if scores is None else f"{detections['names'][i]} {scores[i]:.2f}"
        number = int(detections["labels"][i])
        if ids is not None and ids[i] is not None:
            text, number = f"#{ids[i]} {text}", ids[i]
        color = class_color(number) if colors is None else colors[i]
        _rectangle(canvas, boxes[i], color[::-1] if bgr else color, line)
        _label(canvas, text, boxes[i], color, bgr, scale, weight)


def draw_rate(canvas: np.ndarray, rate: float) -> None:
    """Draw the frames per second in the upper left corner of an image, in place."""
    _, scale, weight = _sizes(canvas)
    _label(canvas, f"{rate:.1f} fps", (0, 0, 0, 0), (0, 0, 0), False, 1.3 * scale, weight)


def _sizes(canvas: np.ndarray) -> tuple[int, float, int]:
    """Line width, font scale and font thickness."""
    side = max(canvas.shape[:2])
    # The font grows more slowly on large images, which show more objects.
    scale = max(0.35, min(side / 1300, (side / 1300) ** 0.5))
    return max(1, round(side / 400)), scale, max(1, round(1.3 * scale))


def _rectangle(canvas: np.ndarray, box: list[int], color: tuple[int, ...], line: int) -> None:
    height, width = canvas.shape[:2]
    # Edges on or beyond the border of the image stay visible.
    x1, x2 = (min(max(x, 0), width - 1) for x in box[0::2])
    y1, y2 = (min(max(y, 0), height - 1) for y in box[1::2])
    # No anti-aliasing: straight lines do not need it, and it takes three times as long on a 4K image.
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)


def _label(
    canvas: np.ndarray,
    text: str,
    box: list[int] | tuple[int, int, int, int],
    color: Color,
    bgr: bool,
    scale: float,
    weight: int,
) -> None:
    """Write a label above the box, or inside it at the upper border of the image; `color` is RGB."""
    width = canvas.shape[1]
    # OpenCV crashes on a lone surrogate, like \ud800 in a class name.
    text = text.encode("utf-8", "replace").decode()
    (text_width, text_height), below = cv2.getTextSize(text, FONT, scale, weight)
    top = box[1] - text_height - below if box[1] - text_height - below >= 0 else max(box[1], 0)
    left = max(0, min(box[0], width - text_width))
    corner = (left + text_width, top + text_height + below)
    cv2.rectangle(canvas, (left, top), corner, color[::-1] if bgr else color, cv2.FILLED)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(canvas, text, (left, top + text_height + below // 2), FONT, scale, ink, weight, cv2.LINE_AA)
