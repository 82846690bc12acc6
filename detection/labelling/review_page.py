"""An HTML page with the boxes that a detector added to a data set."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup

from detection.core.boxes import xywh_to_xyxy
from detection.core.errors import UserError
from detection.core.html import Album, Section, table, write_page
from detection.data.annotations import Annotations
from detection.data.image_io import read_image
from detection.inference.draw import class_color, draw_on
from detection.labelling.merge import AddedBoxes, MergedClasses

MOST_DOUBTFUL, SPREAD = 120, 40
"""Images of the two galleries at most; the size of the page limits them further."""
SIDE = 560
"""Pixels of the longer side of an image on the page."""
DASH = 7
"""Pixels."""
GRAY = (150, 150, 150)


def write_review_page(
    path: str | Path, data: Annotations, classes: MergedClasses, added: AddedBoxes, score: float
) -> None:
    """Write the page: counts, the most doubtful images, and images spread over the whole set.

    Args:
        data: the annotations without the added boxes.
        score: threshold between doubtful boxes and annotations.

    Raises:
        UserError: the page cannot be written.
    """
    rows, doubts = image_doubt(data, added, score)
    most = rows[np.argsort(doubts, kind="stable")][:MOST_DOUBTFUL]
    spread = rows[np.unique(np.linspace(0, len(rows) - 1, min(SPREAD, len(rows))).astype(int))]
    counts = sorted(added.counts(classes), key=lambda count: -count[1] - count[2])
    sections = [
        Section("Added boxes", [table(("class", "boxes", "doubtful boxes", "images"), counts)]),
        Section(
            "Most doubtful images",
            [_gallery(data, classes, added, most)],
            f"Sorted by the added box whose score is nearest to {score:g}. Solid: added as an annotation; dashed (and "
            "? in the text): doubtful, ignored in training; gray: annotations of the data.",
        ),
        Section("Images from the whole set", [_gallery(data, classes, added, spread)], "Evenly spread."),
    ]
    subtitle = f"{len(data)} images of {data.source}, labelled with {added.source}"
    write_page(path, "Added labels", sections, subtitle=subtitle)


def image_doubt(data: Annotations, added: AddedBoxes, score: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images with added boxes, int64 [k], ascending; the smallest distance of the score of such a box from
    `score`, float64 [k]."""
    row_of = {int(image_id): row for row, image_id in enumerate(data.image_ids)}
    doubt = np.full(len(data), np.inf)
    rows = np.array([row_of[i] for i in added.image_ids.tolist()], np.int64)
    np.minimum.at(doubt, rows, np.abs(added.scores - score))
    rows = np.unique(rows)
    return rows, doubt[rows]


def draw_labels(
    image: np.ndarray, data: Annotations, row: int, classes: MergedClasses, added: AddedBoxes
) -> np.ndarray:
    """An RGB image of at most `SIDE` pixels with the annotations of the data (gray) and the added boxes."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    own = slice(data.offsets[row], data.offsets[row + 1])
    boxes, labels = xywh_to_xyxy(data.boxes[own]) * scale, data.labels[own]
    names = [data.class_names[label - 1] for label in labels]
    draw_on(canvas, {"boxes": boxes, "labels": labels, "names": names, "colors": [GRAY] * len(boxes)})
    mine = added.image_ids == data.image_ids[row]
    boxes, scores, doubtful = xywh_to_xyxy(added.boxes[mine]) * scale, added.scores[mine], added.doubtful[mine]
    labels = np.searchsorted(classes.ids, added.category_ids[mine]) + 1
    for box, label in zip(boxes[doubtful], labels[doubtful], strict=True):
        _dashed_rectangle(canvas, box, class_color(int(label)))
    boxes, labels, scores = boxes[~doubtful], labels[~doubtful], scores[~doubtful]
    names = [classes.names[label - 1] for label in labels]
    draw_on(canvas, {"boxes": boxes, "labels": labels, "names": names, "scores": scores})
    return canvas


def _gallery(data: Annotations, classes: MergedClasses, added: AddedBoxes, rows: Iterable[int]) -> Markup:
    album = Album(max_bytes=4_000_000)
    name_of = dict(zip(classes.ids, classes.names, strict=True))
    for row in rows:
        name, size = str(data.file_names[row]), data.sizes[row].tolist()
        try:
            image = read_image(Path(data.images) / name, (size[0], size[1]))
        except UserError:  # it was there when the detector saw it
            continue
        mine = added.image_ids == data.image_ids[row]
        columns = (added.category_ids[mine].tolist(), added.scores[mine].tolist(), added.doubtful[mine].tolist())
        words = [
            f"{name_of[number]} {score:.2f}{'?' if doubtful else ''}"
            for number, score, doubtful in zip(*columns, strict=True)
        ]
        caption = f"{name}: {', '.join(words[:12])}{', …' if len(words) > 12 else ''}"
        album.add(draw_labels(image, data, row, classes, added), caption, max_side=SIDE)
    return album.gallery(side=280)


def _dashed_rectangle(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = box.round().astype(int).tolist()
    for start in range(x1, x2, 2 * DASH):
        for y in (y1, y2):
            cv2.line(canvas, (start, y), (min(start + DASH, x2), y), color, 1)
    for start in range(y1, y2, 2 * DASH):
        for x in (x1, x2):
            cv2.line(canvas, (x, start), (x, min(start + DASH, y2)), color, 1)
