"""Images with boxes for the HTML page: samples of a dataset, and the examples of findings."""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from detection.core.boxes import xywh_to_xyxy
from detection.core.errors import UserError
from detection.core.files import read_file
from detection.core.html import Album
from detection.data.image_headers import largest_file, stored_size, too_large
from detection.data.image_io import decode_image, read_image
from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, evenly_spaced
from detection.doctor.run_checks import CheckedDataset, Report
from detection.doctor.text_report import describe_example
from detection.inference.draw import draw_on

MAX_SIDE = 420
"""Pixels of an image on the page."""
FINDING_COLOR = (255, 0, 60)
GRAY = (150, 150, 150)
MARGIN_COLOR = (225, 225, 225)
MAX_CONTEXT_BOXES = 60
"""Other boxes of an image that are figure in gray."""
MAX_IMAGES = 12
"""Images of each finding."""
CODES_WITHOUT_IMAGES = {"image-missing", "image-unlisted"}


def add_sample_images(checked: CheckedDataset, album: Album, count: int = 12) -> None:
    """Add evenly spaced images with all their boxes; images without boxes only if no image has any."""
    entries = checked.selected
    with_boxes = np.unique(entries.image_rows[entries.valid])
    rows = evenly_spaced(with_boxes.tolist(), count) or evenly_spaced(list(range(len(entries.image_ids))), count)
    by_image = _boxes_by_image(entries, rows)
    # Sort by aspect ratio, so that the images of a row on the page have similar heights.
    rows.sort(key=lambda row: entries.sizes[row, 0] / max(1, entries.sizes[row, 1]))
    for row in rows:
        if album.is_full:
            album.num_omitted += 1
            continue
        image = load_image(entries, row)
        if image is None:
            continue
        small, scale = downscale(image, entries.sizes[row])
        own = by_image[row]
        draw_on(
            small,
            {
                "boxes": xywh_to_xyxy(entries.boxes[own]) * scale,
                "labels": [entries.category_rows[i] + 1 for i in own],
                "names": [_class_name(entries, i) for i in own],
            },
        )
        album.add(small, f"{entries.file_names[row]}: {len(own)} boxes", max_side=MAX_SIDE)


def add_finding_images(report: Report, found: Finding, album: Album) -> bool:
    """Add images of a finding's examples, with the reported boxes in red; False if none could be added."""
    if found.code in CODES_WITHOUT_IMAGES:
        return False
    sets = {checked.original.split: checked.normalized for checked in report.sets}
    pairs = found.code in ("image-twice", "image-alike", "leak-same", "leak-alike")
    entries = sets.get(found.split) or report.sets[-1].normalized
    others = sets.get(found.split) or report.sets[0].normalized
    # One image for all examples in it.
    by_image: dict[tuple[str, int | None], list[Example]] = {}
    for example in found.examples:
        if example.image:
            by_image.setdefault((example.image, example.image_id), []).append(example)
    added = False
    for examples in evenly_spaced(list(by_image.values()), MAX_IMAGES):
        if album.is_full:
            album.num_omitted += 1
            continue
        image = _draw_pair(entries, others, examples[0]) if pairs else _draw_boxes(entries, examples)
        if image is not None:
            more = f" (and {len(examples) - 1} more in it)" if len(examples) > 1 else ""
            added |= album.add(
                image, describe_example(examples[0]) + more, max_side=2 * MAX_SIDE if pairs else MAX_SIDE
            )
    return added


def _draw_boxes(entries: Entries, examples: Sequence[Example]) -> np.ndarray | None:
    """Draw the reported boxes in red, also beyond the image, and the other boxes in gray: uint8 [H, W, 3]."""
    row = _find_row(entries, examples[0].image or "", examples[0].image_id)
    image = None if row is None else load_image(entries, row)
    if row is None or image is None:
        return None
    small, scale = downscale(image, entries.sizes[row])
    numbers = [example.annotation for example in examples if example.annotation]
    own = np.flatnonzero((entries.image_rows == row) & np.isfinite(entries.boxes).all(axis=1))
    is_red = np.isin(entries.annotation_ids[own], numbers)
    red = xywh_to_xyxy(entries.boxes[own[is_red]]) * scale
    gray = xywh_to_xyxy(entries.boxes[own[~is_red][:MAX_CONTEXT_BOXES]]) * scale
    size = np.array(small.shape[1::-1])
    # Add a margin of at most a third of the image for boxes that extend beyond it.
    low = np.clip(-red[:, :2].min(axis=0, initial=0), 0, size // 3).astype(int)
    high = np.clip((red[:, 2:] - size).max(axis=0, initial=0), 0, size // 3).astype(int)
    small = cv2.copyMakeBorder(small, low[1], high[1], low[0], high[0], cv2.BORDER_CONSTANT, value=MARGIN_COLOR)
    limit = np.array(small.shape[1::-1]) - 1
    for boxes, color, line in ((gray, GRAY, 1), (red, FINDING_COLOR, 2)):
        corners = np.clip((boxes.reshape(-1, 2, 2) + low).round(), 0, limit).astype(int).tolist()
        for first, second in corners:
            cv2.rectangle(small, first, second, color, line)
    return small


def _draw_pair(entries: Entries, others: Entries, example: Example) -> np.ndarray | None:
    """The two images of a pair side by side: uint8 [H, W, 3]."""
    images = []
    for source, name, image_id in ((entries, example.image, example.image_id), (others, example.other, None)):
        row = _find_row(source, name or "", image_id)
        image = None if row is None else load_image(source, row)
        if row is None or image is None:
            return None
        images.append(downscale(image, source.sizes[row])[0])
    height = max(image.shape[0] for image in images)
    padded = [
        cv2.copyMakeBorder(image, 0, height - image.shape[0], 0, 6, cv2.BORDER_CONSTANT, value=(128, 128, 128))
        for image in images
    ]
    return np.concatenate(padded, axis=1)


def load_image(entries: Entries, row: int) -> np.ndarray | None:
    """Read an image like training does; of a corrupt image, the decodable part; None if nothing can be decoded."""
    path = entries.path(row)
    if path is None:
        return None
    size = (int(entries.sizes[row, 0]), int(entries.sizes[row, 1]))
    try:
        return read_image(path, size if min(size) > 0 else None)
    except UserError:
        pass
    try:
        data = read_file(path, "image", largest=largest_file())
        known = stored_size(data)
        if known is None or too_large(known):
            return None
        # simplejpeg returns the decodable part of a corrupt JPEG, OpenCV does not.
        if data[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(data, "RGB", strict=False)
        return decode_image(data)
    except (UserError, ValueError):
        return None


def downscale(image: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image with at most `MAX_SIDE` pixels per side, and factors [4] for xyxy boxes in pixels of `size` [2]."""
    scale = min(1.0, MAX_SIDE / max(image.shape[:2]))
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small), np.array([width, height] * 2) / np.maximum(1, np.concatenate([size, size]))


def _boxes_by_image(entries: Entries, rows: Sequence[int]) -> dict[int, list[int]]:
    result: dict[int, list[int]] = {row: [] for row in rows}
    for annotation in np.flatnonzero(
        np.isin(entries.image_rows, list(rows)) & entries.valid & (entries.category_rows >= 0)
    ).tolist():
        result[int(entries.image_rows[annotation])].append(annotation)
    return result


def _class_name(entries: Entries, annotation: int) -> str:
    return entries.category_names[entries.category_rows[annotation]]


def _find_row(entries: Entries, name: str, image_id: int | None) -> int | None:
    mask = entries.file_names == name
    if image_id is not None and (mask & (entries.image_ids == image_id)).any():
        mask &= entries.image_ids == image_id
    rows = np.flatnonzero(mask)
    return int(rows[0]) if len(rows) else None
