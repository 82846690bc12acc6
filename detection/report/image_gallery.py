"""The images of a report: crops of false positives and missed objects, and images with ground truth and detections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.core.boxes import xywh_to_xyxy
from detection.core.errors import UserError
from detection.core.html import Album
from detection.data.image_io import read_image
from detection.evaluation.analyze import Analysis
from detection.evaluation.breakdown import KINDS
from detection.evaluation.curves import kept
from detection.inference.draw import draw_on

GREEN, RED, ORANGE = (46, 204, 90), (255, 60, 60), (255, 170, 0)
GAP = 8
"""Pixels between two images side by side."""
MAX_CROPS_PER_IMAGE = 3
"""In one gallery."""
CROP_SIDE = 200
"""Pixels of a crop on the page; crops are stored at twice this size."""


class ImageReader:
    """Read images of a dataset and cache the last one. Files that cannot be read are collected in `unreadable`.

    Args:
        folder: image folder; None if there is none.
    """

    def __init__(self, analysis: Analysis, folder: Path | None) -> None:
        self.annotations, self.folder = analysis.matches.annotations, folder
        self.unreadable: set[str] = set()
        self._last: tuple[int, np.ndarray] | None = None

    def __call__(self, i: int) -> np.ndarray | None:
        """Image i as RGB uint8 [H, W, 3] in its original size; None if it cannot be read."""
        if self.folder is None:
            return None
        if self._last is None or self._last[0] != i:
            width, height = self.annotations.sizes[i].tolist()
            try:
                self._last = i, read_image(self.folder / str(self.annotations.file_names[i]), (width, height))
            except UserError:
                self.unreadable.add(str(self.annotations.file_names[i]))
                return None
        return self._last[1]


def add_false_positives(album: Album, analysis: Analysis, read: ImageReader, count: int) -> None:
    """Add crops of the most confident false positives (red) with nearby objects (green)."""
    matches, breakdown = analysis.matches, analysis.breakdown
    wrong = np.flatnonzero(matches.wrong(0))
    wrong = wrong[np.argsort(-matches.score[wrong], kind="stable")]
    for d in _limit_per_image(wrong, matches.image[wrong], count):
        i = int(matches.image[d])
        image = read(i)
        if image is None:
            continue
        name = matches.annotations.class_names[matches.label[d] - 1]
        about = int(breakdown.about[d])
        truth = f" of {matches.annotations.class_names[matches.annotations.labels[about] - 1]}" if about >= 0 else ""
        caption = (
            f"{name} {matches.score[d]:.2f}: {KINDS[breakdown.kind[d]]}{truth} · {matches.annotations.file_names[i]}"
        )
        crop, shift, scale = _crop(image, matches.box[d])
        for box in _object_boxes(analysis, i):
            _draw_outlined_box(crop, (box - shift) * scale, GREEN)
        _draw_outlined_box(crop, (xywh_to_xyxy(matches.box[d]) - shift) * scale, RED)
        if not album.add(crop, caption, max_side=2 * CROP_SIDE):
            return


def add_missed(album: Album, analysis: Analysis, read: ImageReader, count: int) -> None:
    """Add crops of the largest objects missed at the recommended thresholds (orange) and the closest error (red)."""
    matches = analysis.matches
    annotations = matches.annotations
    chosen = kept(matches, analysis.thresholds)
    found = np.zeros(len(annotations.boxes), bool)
    found[matches.truth[0][matches.right(0) & chosen]] = True
    missed = np.flatnonzero(matches.counted & ~found)
    missed = missed[np.argsort(-annotations.areas[missed], kind="stable")]
    image_of_object = matches.image_of_object
    # For each object: the score of its match at any threshold, and the best error about it.
    score_of = np.full(len(annotations.boxes), np.nan)
    right = matches.right(0)
    score_of[matches.truth[0][right]] = matches.score[right]
    error_of = _best_errors(analysis)
    for row in _limit_per_image(missed, image_of_object[missed], count):
        i = int(image_of_object[row])
        image = read(i)
        if image is None:
            continue
        name, label = annotations.class_names[annotations.labels[row] - 1], int(annotations.labels[row])
        crop, shift, scale = _crop(image, annotations.boxes[row])
        error = int(error_of[row])
        if np.isfinite(score_of[row]):
            reason = f"found with score {score_of[row]:.2f}, the threshold is {analysis.thresholds[label - 1]:.2f}"
        elif error >= 0:
            predicted = annotations.class_names[matches.label[error] - 1]
            reason = f"{KINDS[analysis.breakdown.kind[error]]}: {predicted} {matches.score[error]:.2f}"
            _draw_outlined_box(crop, (xywh_to_xyxy(matches.box[error]) - shift) * scale, RED)
        else:
            reason = "no detection at any score"
        _draw_outlined_box(crop, (xywh_to_xyxy(annotations.boxes[row]) - shift) * scale, ORANGE)
        if not album.add(crop, f"{name}: {reason} · {annotations.file_names[i]}", max_side=2 * CROP_SIDE):
            return


def add_images(album: Album, analysis: Analysis, read: ImageReader, images: Sequence[int]) -> None:
    """Add images with ground truth beside detections at the recommended thresholds."""
    scores = analysis.images
    for i in images:
        image = read(i)
        if image is None:
            continue
        pair = side_by_side([draw_ground_truth(image, analysis, i), draw_detections(image, analysis, i)])
        caption = (
            f"{analysis.matches.annotations.file_names[i]}: F1 {scores.f1[i]:.2f}; {scores.right[i]} correct, "
            f"{scores.wrong[i]} wrong, {scores.missed[i]} missed"
        )
        if not album.add(pair, caption, max_side=900):
            return


def draw_ground_truth(image: np.ndarray, analysis: Analysis, i: int) -> np.ndarray:
    """A copy with its objects: found green, missed orange, crowd regions gray."""
    matches = analysis.matches
    annotations = matches.annotations
    canvas = _downscale(image)
    rows = np.arange(annotations.offsets[i], annotations.offsets[i + 1])
    chosen = (matches.image == i) & matches.right(0) & kept(matches, analysis.thresholds)
    found = np.isin(rows, matches.truth[0][chosen])
    colors = [
        (150, 150, 150) if annotations.crowd[row] else GREEN if hit else ORANGE
        for row, hit in zip(rows, found, strict=True)
    ]
    _draw(canvas, image, annotations.boxes[rows], annotations.labels[rows], annotations.class_names, colors)
    return canvas


def draw_detections(image: np.ndarray, analysis: Analysis, i: int) -> np.ndarray:
    """A copy with its detections at the recommended thresholds: correct green, wrong red, on crowd regions gray."""
    matches = analysis.matches
    canvas = _downscale(image)
    rows = np.flatnonzero((matches.image == i) & kept(matches, analysis.thresholds))
    right, ignored = matches.right(0)[rows], matches.ignored[0][rows]
    colors = [(150, 150, 150) if skip else GREEN if hit else RED for hit, skip in zip(right, ignored, strict=True)]
    names = matches.annotations.class_names
    _draw(canvas, image, matches.box[rows], matches.label[rows], names, colors, matches.score[rows])
    return canvas


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate images of equal height with gaps."""
    height = images[0].shape[0]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (gap, image)]
    return np.concatenate(parts[1:], axis=1)


def _downscale(image: np.ndarray, side: int = 640) -> np.ndarray:
    """A copy with at most `side` pixels per side, so that lines and text are readable on the page."""
    scale = min(1.0, side / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _draw(
    canvas: np.ndarray,
    image: np.ndarray,
    xywh: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    colors: Sequence[Any],
    scores: np.ndarray | None = None,
) -> None:
    boxes = xywh_to_xyxy(xywh) * (canvas.shape[1] / image.shape[1])
    found = {"boxes": boxes, "labels": labels, "names": [names[label - 1] for label in labels], "colors": colors}
    draw_on(canvas, found if scores is None else found | {"scores": scores})


def _best_errors(analysis: Analysis) -> np.ndarray:
    """int64 [objects]: the localisation or classification error about each object with the highest score, or -1."""
    breakdown, matches = analysis.breakdown, analysis.matches
    best = np.full(len(matches.annotations.boxes), -1)
    rows = np.flatnonzero(np.isin(breakdown.kind, [KINDS.index("classification"), KINDS.index("localisation")]))
    rows = rows[np.argsort(matches.score[rows], kind="stable")]
    # Of several assignments to one object the last one, with the highest score, remains.
    best[breakdown.about[rows]] = rows
    return best


def _limit_per_image(rows: np.ndarray, images: np.ndarray, count: int) -> list[int]:
    """The first `count` rows with at most `MAX_CROPS_PER_IMAGE` rows of each image."""
    taken: dict[int, int] = {}
    chosen: list[int] = []
    for row, image in zip(rows.tolist(), images.tolist(), strict=True):
        if len(chosen) == count:
            break
        if taken.get(image, 0) < MAX_CROPS_PER_IMAGE:
            taken[image] = taken.get(image, 0) + 1
            chosen.append(row)
    return chosen


def _object_boxes(analysis: Analysis, i: int) -> np.ndarray:
    """Boxes xyxy [g, 4] of the objects in image i, without crowd regions."""
    annotations = analysis.matches.annotations
    rows = slice(annotations.offsets[i], annotations.offsets[i + 1])
    return xywh_to_xyxy(annotations.boxes[rows][~annotations.crowd[rows]])


def _crop(image: np.ndarray, xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A square crop around a box with some context, scaled to 2 * `CROP_SIDE` pixels.

    Returns:
        crop: uint8 [h, w, 3].
        shift [4], scale: (box - shift) * scale converts an xyxy box to pixels of the crop.
    """
    height, width = image.shape[:2]
    side = round(max(1.8 * max(xywh[2], xywh[3]), 48.0))
    center = xywh[:2] + xywh[2:] / 2
    # Move the crop inside the image, since boxes from prediction files may lie anywhere.
    x1, y1 = (
        int(np.clip(round(float(m - side / 2)), 0, max(0, limit - side)))
        for m, limit in zip(center, (width, height), strict=True)
    )
    x2, y2 = min(width, x1 + side), min(height, y1 + side)
    part = image[y1:y2, x1:x2]
    scale = 2 * CROP_SIDE / max(part.shape[:2])
    size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return part, np.array([x1, y1, x1, y1], np.float64), scale


def _draw_outlined_box(canvas: np.ndarray, xyxy: np.ndarray, color: tuple[int, int, int]) -> None:
    """Draw a box with a dark outline, so that it is visible on any background."""
    x1, y1, x2, y2 = (round(float(np.clip(v, -1e4, 1e4))) for v in xyxy)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), (0, 0, 0), 5)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, 3)
