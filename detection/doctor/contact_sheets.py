"""Images with boxes for the page: examples of a set, and what findings are about."""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from detection.core.errors import UserError
from detection.core.files import read_file
from detection.core.html import Album
from detection.data.image_headers import largest_file, stored_size, too_large
from detection.data.image_io import decode_image, read_image
from detection.doctor.entries import Entries
from detection.doctor.examine import CheckedSet, Report
from detection.doctor.findings import Example, Finding, spread
from detection.doctor.text_report import describe_example
from detection.inference.draw import draw_on

SIDE = 420
OFFENDER = (255, 0, 60)
GREY = (150, 150, 150)
MARGIN = (225, 225, 225)
CONTEXT = 60
"""Other boxes of an image that are drawn beside the one in question."""
SHOWN = 12
UNSHOWN = {"image-missing", "image-unlisted"}


def example_sheet(checked: CheckedSet, album: Album, count: int = 12) -> None:
    """Images from all over the set, those with boxes first, with all their boxes."""
    entries = checked.selected
    full = np.unique(entries.image_rows[entries.valid])
    rows = spread(full.tolist(), count) or spread(list(range(len(entries.image_ids))), count)
    by_image = _boxes_by_image(entries, rows)
    # Images of like shape stand beside each other, so that rows have few holes.
    rows.sort(key=lambda row: entries.sizes[row, 0] / max(1, entries.sizes[row, 1]))
    for row in rows:
        if album.full:
            album.left_out += 1
            continue
        image = load(entries, row)
        if image is None:
            continue
        small, scale = shrink(image, entries.sizes[row])
        own = by_image[row]
        draw_on(
            small,
            {
                "boxes": xyxy(entries.boxes[own]) * scale,
                "labels": [entries.category_rows[i] + 1 for i in own],
                "names": [_name(entries, i) for i in own],
            },
        )
        album.add(small, f"{entries.file_names[row]}: {len(own)} boxes", max_side=SIDE)


def offender_sheet(report: Report, found: Finding, album: Album) -> bool:
    """The examples of a finding that can be seen, the boxes in question in red; False where there are none."""
    if found.code in UNSHOWN:
        return False
    sets = {checked.original.split: checked.normalized for checked in report.sets}
    pairs = found.code in ("image-twice", "image-alike", "leak-same", "leak-alike")
    own = sets.get(found.split) or report.sets[-1].normalized
    others = sets.get(found.split) or report.sets[0].normalized
    # One image for all examples that are in it.
    by_image: dict[tuple[str, int | None], list[Example]] = {}
    for example in found.examples:
        if example.image:
            by_image.setdefault((example.image, example.image_id), []).append(example)
    shown = False
    for examples in spread(list(by_image.values()), SHOWN):
        if album.full:
            album.left_out += 1
            continue
        image = _pair(own, others, examples[0]) if pairs else _single(own, examples)
        if image is not None:
            more = f" (and {len(examples) - 1} more in it)" if len(examples) > 1 else ""
            shown |= album.add(image, describe_example(examples[0]) + more, max_side=2 * SIDE if pairs else SIDE)
    return shown


def _single(entries: Entries, examples: Sequence[Example]) -> np.ndarray | None:
    """The image with the boxes in question in red, also where they reach beyond it, and the others in grey."""
    row = _row(entries, examples[0].image or "", examples[0].image_id)
    image = None if row is None else load(entries, row)
    if row is None or image is None:
        return None
    small, scale = shrink(image, entries.sizes[row])
    numbers = [example.annotation for example in examples if example.annotation]
    own = np.flatnonzero((entries.image_rows == row) & np.isfinite(entries.boxes).all(axis=1))
    is_red = np.isin(entries.annotation_ids[own], numbers)
    red, grey = xyxy(entries.boxes[own[is_red]]) * scale, xyxy(entries.boxes[own[~is_red][:CONTEXT]]) * scale
    size = np.array(small.shape[1::-1])
    # A margin, not wider than a third of the image, for what lies beyond it.
    low = np.clip(-red[:, :2].min(axis=0, initial=0), 0, size // 3).astype(int)
    high = np.clip((red[:, 2:] - size).max(axis=0, initial=0), 0, size // 3).astype(int)
    small = cv2.copyMakeBorder(small, low[1], high[1], low[0], high[0], cv2.BORDER_CONSTANT, value=MARGIN)
    limit = np.array(small.shape[1::-1]) - 1
    for boxes, color, line in ((grey, GREY, 1), (red, OFFENDER, 2)):
        corners = np.clip((boxes.reshape(-1, 2, 2) + low).round(), 0, limit).astype(int).tolist()
        for first, second in corners:
            cv2.rectangle(small, first, second, color, line)
    return small


def _pair(own: Entries, others: Entries, example: Example) -> np.ndarray | None:
    images = []
    for entries, name, number in ((own, example.image, example.image_id), (others, example.other, None)):
        row = _row(entries, name or "", number)
        image = None if row is None else load(entries, row)
        if row is None or image is None:
            return None
        images.append(shrink(image, entries.sizes[row])[0])
    height = max(image.shape[0] for image in images)
    padded = [
        cv2.copyMakeBorder(image, 0, height - image.shape[0], 0, 6, cv2.BORDER_CONSTANT, value=(128, 128, 128))
        for image in images
    ]
    return np.concatenate(padded, axis=1)


def load(entries: Entries, row: int) -> np.ndarray | None:
    """An image as training would see it; a damaged one as far as it can be decoded; None where there is nothing."""
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
        # What there is of it, which OpenCV refuses to show.
        if data[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(data, "RGB", strict=False)
        return decode_image(data)
    except (UserError, ValueError):
        return None


def shrink(image: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image at most `SIDE` pixels wide and high, and the factors [4] for boxes in pixels of `size`."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small), np.array([width, height] * 2) / np.maximum(1, np.concatenate([size, size]))


def xyxy(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _boxes_by_image(entries: Entries, rows: Sequence[int]) -> dict[int, list[int]]:
    result: dict[int, list[int]] = {row: [] for row in rows}
    for annotation in np.flatnonzero(
        np.isin(entries.image_rows, list(rows)) & entries.valid & (entries.category_rows >= 0)
    ).tolist():
        result[int(entries.image_rows[annotation])].append(annotation)
    return result


def _name(entries: Entries, annotation: int) -> str:
    return entries.category_names[entries.category_rows[annotation]]


def _row(entries: Entries, name: str, image_id: int | None) -> int | None:
    mask = entries.file_names == name
    if image_id is not None and (mask & (entries.image_ids == image_id)).any():
        mask &= entries.image_ids == image_id
    rows = np.flatnonzero(mask)
    return int(rows[0]) if len(rows) else None
