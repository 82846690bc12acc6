"""An HTML page with the boxes that a detector added to a data set."""

from pathlib import Path

import cv2
import numpy as np

from detection.core.boxes import xywh_to_xyxy
from detection.core.errors import UserError
from detection.core.html import Album, Section, table, write_page
from detection.data.annotations import Annotations
from detection.data.image_io import read_image
from detection.inference.draw import class_color, draw_on
from detection.labelling.merge import AddedBoxes, MergedClasses

MOST_IMAGES = 120
"""Of each gallery; the size of the page limits them further."""
SIDE = 560
"""Pixels of the longer side of an image on the page."""
DASH = 7


def write_review_page(
    path: str | Path, merged: Annotations, classes: MergedClasses, added: AddedBoxes, score: float
) -> None:
    """Write the page: counts, the most doubtful images, and images spread over the whole set.

    Args:
        merged: the annotations with the added boxes.
        score: threshold between doubtful boxes and annotations.

    Raises:
        UserError: the page cannot be written.
    """
    doubt = image_doubt(merged, added, score)
    most = np.argsort(doubt, kind="stable")
    most = most[np.isfinite(doubt[most])]
    spread = np.unique(np.linspace(0, len(most) - 1, min(40, len(most))).astype(int))
    by_image = np.flatnonzero(np.isfinite(doubt))
    sections = [
        Section("Added boxes", [_count_table(classes, added)]),
        Section(
            "Most doubtful images",
            [_gallery(merged, added, most[:MOST_IMAGES])],
            f"Images by their added box with the score nearest to {score:g}. Solid: added as annotation; dashed: "
            "doubtful, ignored in training; gray: annotations of the data.",
        ),
        Section("Images from the whole set", [_gallery(merged, added, by_image[spread])], "Evenly spread."),
    ]
    subtitle = f"{len(merged)} images of {merged.source}, labelled with {added.source}"
    write_page(path, "Added labels", sections, subtitle=subtitle)


def image_doubt(merged: Annotations, added: AddedBoxes, score: float) -> np.ndarray:
    """float64 [n]: for each image the smallest distance of the score of an added box from the threshold; infinite for
    images without added boxes."""
    row_of = {int(image_id): row for row, image_id in enumerate(merged.image_ids)}
    doubt = np.full(len(merged), np.inf)
    rows = np.array([row_of[i] for i in added.image_ids.tolist()], np.int64)
    np.minimum.at(doubt, rows, np.abs(added.scores - score))
    return doubt


def draw_labels(image: np.ndarray, merged: Annotations, row: int, added: AddedBoxes) -> np.ndarray:
    """An RGB image of at most `SIDE` pixels with the annotations of the data (gray) and the added boxes."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    mine = added.image_ids == merged.image_ids[row]
    own = slice(merged.offsets[row], merged.offsets[row + 1] - int(mine.sum()))
    boxes = xywh_to_xyxy(merged.boxes[own]) * scale
    names = [merged.class_names[label - 1] for label in merged.labels[own]]
    gray = [(150, 150, 150)] * len(boxes)
    draw_on(canvas, {"boxes": boxes, "labels": merged.labels[own], "names": names, "colors": gray})
    labels = np.searchsorted(merged.category_ids, added.category_ids[mine]) + 1
    boxes, scores, doubtful = xywh_to_xyxy(added.boxes[mine]) * scale, added.scores[mine], added.doubtful[mine]
    for box, label in zip(boxes[doubtful], labels[doubtful], strict=True):
        _dashed_rectangle(canvas, box, class_color(int(label)))
    sure = ~doubtful
    names = [merged.class_names[label - 1] for label in labels[sure]]
    draw_on(canvas, {"boxes": boxes[sure], "labels": labels[sure], "names": names, "scores": scores[sure]})
    return canvas


def _gallery(merged: Annotations, added: AddedBoxes, rows: np.ndarray):  # type: ignore[no-untyped-def]
    album = Album()
    for row in rows.tolist():
        name = str(merged.file_names[row])
        try:
            image = read_image(Path(merged.images) / name)
        except UserError:
            continue
        mine = added.image_ids == merged.image_ids[row]
        drawn = draw_labels(image, merged, row, added)
        album.add(drawn, f"{name}: {_boxes_in_words(merged, added, mine)}", max_side=SIDE)
    return album.gallery(side=280)


def _boxes_in_words(merged: Annotations, added: AddedBoxes, mine: np.ndarray) -> str:
    label = np.searchsorted(merged.category_ids, added.category_ids[mine])
    scores, doubtful = added.scores[mine], added.doubtful[mine]
    words = [
        f"{merged.class_names[i]} {score:.2f}{'?' if doubt else ''}"
        for i, score, doubt in zip(label, scores, doubtful, strict=True)
    ]
    return ", ".join(words[:12]) + (", …" if len(words) > 12 else "")


def _count_table(classes: MergedClasses, added: AddedBoxes):  # type: ignore[no-untyped-def]
    rows = []
    for name, number in classes.id_of_added.items():
        of_class = added.category_ids == number
        doubtful = int((of_class & added.doubtful).sum())
        images = len(np.unique(added.image_ids[of_class]))
        rows.append((name, int(of_class.sum()) - doubtful, doubtful, images))
    rows.sort(key=lambda line: -line[1] - line[2])
    return table(("class", "boxes", "doubtful boxes", "images"), rows)


def _dashed_rectangle(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = box.round().astype(int).tolist()
    for start in range(x1, x2, 2 * DASH):
        for y in (y1, y2):
            cv2.line(canvas, (start, y), (min(start + DASH, x2), y), color, 1)
    for start in range(y1, y2, 2 * DASH):
        for x in (x1, x2):
            cv2.line(canvas, (x, start), (x, min(start + DASH, y2)), color, 1)
