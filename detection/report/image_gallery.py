"""The images of a report: what was wrong and what was missed, and whole images with truth beside detections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

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
SAME_IMAGE = 3
"""At most so many crops of one image in a gallery."""
CROP = 200


class ImageReader:
    """Reads images of a data set, the last one kept; those that cannot be read are counted, not raised.

    Args:
        folder: None: there are no images.
    """

    def __init__(self, analysis: Analysis, folder: Path | None) -> None:
        self.index, self.folder = analysis.matches.index, folder
        self.unreadable: set[str] = set()
        self._last: tuple[int, np.ndarray] | None = None

    def __call__(self, i: int) -> np.ndarray | None:
        """RGB uint8 [H, W, 3] of image i in its own size; None where it cannot be read."""
        if self.folder is None:
            return None
        if self._last is None or self._last[0] != i:
            width, height = self.index.sizes[i].tolist()
            try:
                self._last = i, read_image(self.folder / str(self.index.file_names[i]), (width, height))
            except UserError:
                self.unreadable.add(str(self.index.file_names[i]))
                return None
        return self._last[1]


def add_false_positives(album: Album, analysis: Analysis, read: ImageReader, count: int) -> None:
    """Crops of the most confident false positives (red) with the objects around them (green)."""
    matches, breakdown = analysis.matches, analysis.breakdown
    wrong = np.flatnonzero(matches.wrong(0))
    wrong = wrong[np.argsort(-matches.score[wrong], kind="stable")]
    for d in _few_of_each_image(wrong, matches.image[wrong], count):
        i = int(matches.image[d])
        image = read(i)
        if image is None:
            continue
        name = matches.index.class_names[matches.label[d] - 1]
        about = int(breakdown.about[d])
        truth = f" of {matches.index.class_names[matches.index.labels[about] - 1]}" if about >= 0 else ""
        caption = f"{name} {matches.score[d]:.2f}: {KINDS[breakdown.kind[d]]}{truth} · {matches.index.file_names[i]}"
        crop, shift, scale = _crop(image, matches.box[d])
        for box in _objects(analysis, i):
            _frame(crop, (box - shift) * scale, GREEN)
        _frame(crop, (_xyxy(matches.box[d]) - shift) * scale, RED)
        if not album.add(crop, caption, max_side=2 * CROP):
            return


def add_missed(album: Album, analysis: Analysis, read: ImageReader, count: int) -> None:
    """Crops of the largest objects (orange) that are missed at the recommended thresholds, and what came near (red)."""
    matches = analysis.matches
    index = matches.index
    chosen = kept(matches, analysis.thresholds)
    found = np.zeros(len(index.boxes), bool)
    found[matches.truth[0][matches.right(0) & chosen]] = True
    missed = np.flatnonzero(matches.counted & ~found)
    missed = missed[np.argsort(-index.areas[missed], kind="stable")]
    image_of_object = matches.image_of_object
    # The detection that was matched with an object, whatever its score; and the best mistake about it.
    score_of = np.full(len(index.boxes), np.nan)
    right = matches.right(0)
    score_of[matches.truth[0][right]] = matches.score[right]
    mistake_of = _best_mistakes(analysis)
    for row in _few_of_each_image(missed, image_of_object[missed], count):
        i = int(image_of_object[row])
        image = read(i)
        if image is None:
            continue
        name, label = index.class_names[index.labels[row] - 1], int(index.labels[row])
        crop, shift, scale = _crop(image, index.boxes[row])
        mistake = int(mistake_of[row])
        if np.isfinite(score_of[row]):
            why = f"found with {score_of[row]:.2f}, the threshold is {analysis.thresholds[label - 1]:.2f}"
        elif mistake >= 0:
            taken = index.class_names[matches.label[mistake] - 1]
            why = f"{KINDS[analysis.breakdown.kind[mistake]]}: {taken} {matches.score[mistake]:.2f}"
            _frame(crop, (_xyxy(matches.box[mistake]) - shift) * scale, RED)
        else:
            why = "nothing there at any score"
        _frame(crop, (_xyxy(index.boxes[row]) - shift) * scale, ORANGE)
        if not album.add(crop, f"{name}: {why} · {index.file_names[i]}", max_side=2 * CROP):
            return


def add_images(album: Album, analysis: Analysis, read: ImageReader, images: Sequence[int]) -> None:
    """Whole images, truth beside detections at the recommended thresholds."""
    scores = analysis.images
    for i in images:
        image = read(i)
        if image is None:
            continue
        pair = side_by_side([draw_truth(image, analysis, i), draw_found(image, analysis, i)])
        caption = (
            f"{analysis.matches.index.file_names[i]}: F1 {scores.f1[i]:.2f}; {scores.right[i]} right, "
            f"{scores.wrong[i]} wrong, {scores.missed[i]} missed"
        )
        if not album.add(pair, caption, max_side=900):
            return


def draw_truth(image: np.ndarray, analysis: Analysis, i: int) -> np.ndarray:
    """A copy with its objects: found green, missed orange, crowd regions grey."""
    matches = analysis.matches
    index = matches.index
    canvas = _fitting(image)
    rows = np.arange(index.offsets[i], index.offsets[i + 1])
    chosen = (matches.image == i) & matches.right(0) & kept(matches, analysis.thresholds)
    found = np.isin(rows, matches.truth[0][chosen])
    colors = [
        (150, 150, 150) if index.crowd[row] else GREEN if hit else ORANGE for row, hit in zip(rows, found, strict=True)
    ]
    _draw(canvas, image, index.boxes[rows], index.labels[rows], index.class_names, colors)
    return canvas


def draw_found(image: np.ndarray, analysis: Analysis, i: int) -> np.ndarray:
    """A copy with its detections at the recommended thresholds: right green, wrong red, on crowd regions grey."""
    matches = analysis.matches
    canvas = _fitting(image)
    rows = np.flatnonzero((matches.image == i) & kept(matches, analysis.thresholds))
    right, ignored = matches.right(0)[rows], matches.ignored[0][rows]
    colors = [(150, 150, 150) if skip else GREEN if hit else RED for hit, skip in zip(right, ignored, strict=True)]
    names = matches.index.class_names
    _draw(canvas, image, matches.box[rows], matches.label[rows], names, colors, matches.score[rows])
    return canvas


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one height in a row."""
    height = images[0].shape[0]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (gap, image)]
    return np.concatenate(parts[1:], axis=1)


def _fitting(image: np.ndarray, side: int = 640) -> np.ndarray:
    """A copy of at most `side` pixels, so that lines and letters suit the size at which it is looked at."""
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
    boxes = _xyxy(xywh) * (canvas.shape[1] / image.shape[1])
    found = {"boxes": boxes, "labels": labels, "names": [names[label - 1] for label in labels], "colors": colors}
    draw_on(canvas, found if scores is None else found | {"scores": scores})


def _best_mistakes(analysis: Analysis) -> np.ndarray:
    """int64 [objects]: the best scored localisation or classification error about each; -1 where there is none."""
    breakdown, matches = analysis.breakdown, analysis.matches
    best = np.full(len(matches.index.boxes), -1)
    these = np.flatnonzero(np.isin(breakdown.kind, [KINDS.index("classification"), KINDS.index("localisation")]))
    these = these[np.argsort(matches.score[these], kind="stable")]
    # Of several the last one, which has the best score, stays.
    best[breakdown.about[these]] = these
    return best


def _few_of_each_image(rows: np.ndarray, images: np.ndarray, count: int) -> list[int]:
    taken: dict[int, int] = {}
    chosen: list[int] = []
    for row, image in zip(rows.tolist(), images.tolist(), strict=True):
        if len(chosen) == count:
            break
        if taken.get(image, 0) < SAME_IMAGE:
            taken[image] = taken.get(image, 0) + 1
            chosen.append(row)
    return chosen


def _objects(analysis: Analysis, i: int) -> np.ndarray:
    """Its objects, xyxy [g, 4], without crowd regions."""
    index = analysis.matches.index
    rows = slice(index.offsets[i], index.offsets[i + 1])
    return _xyxy(index.boxes[rows][~index.crowd[rows]])


def _crop(image: np.ndarray, xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A square part around a box, with surroundings, scaled to `CROP` pixels or more.

    Returns:
        The crop; what has to be taken from xyxy boxes, and what they are then multiplied with, to be in its pixels.
    """
    height, width = image.shape[:2]
    side = round(max(1.8 * max(xywh[2], xywh[3]), 48.0))
    middle = xywh[:2] + xywh[2:] / 2
    # Within the image, if it is large enough; a box of a foreign file may lie anywhere.
    x1, y1 = (
        int(np.clip(round(float(m - side / 2)), 0, max(0, limit - side)))
        for m, limit in zip(middle, (width, height), strict=True)
    )
    x2, y2 = min(width, x1 + side), min(height, y1 + side)
    part = image[y1:y2, x1:x2]
    scale = 2 * CROP / max(part.shape[:2])
    size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return part, np.array([x1, y1, x1, y1], np.float64), scale


def _frame(canvas: np.ndarray, xyxy: np.ndarray, color: tuple[int, int, int]) -> None:
    """A frame with a dark edge, to be seen on anything."""
    x1, y1, x2, y2 = (round(float(np.clip(v, -1e4, 1e4))) for v in xyxy)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), (0, 0, 0), 5)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, 3)


def _xyxy(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[..., :2], xywh[..., :2] + xywh[..., 2:]], axis=-1)
