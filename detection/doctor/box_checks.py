"""Faults of boxes."""

from collections.abc import Callable

import numpy as np

from detection.doctor.box_form import Form, as_xywh, box_form
from detection.doctor.box_pairs import overlaps, pairs_in_images
from detection.doctor.entries import Entries
from detection.doctor.findings import Finding, make_finding

SAME = 0.98
"""IoU from which two boxes are the same one."""
CROWD = 5
"""Boxes of its class within a box, from which on it looks like a region of many.

Measured on coco_mini and person with their crowd flags hidden: of 217 regions 77 % are found, and of what is found
87 % are regions (with 4: 80 % and 81 %; with 8: 59 % and 96 %). The others are people before an audience."""
THIN = 20.0


def check_boxes(entries: Entries) -> tuple[list[Finding], Entries]:
    """Findings, and the set with its boxes as xywh where they are certain to have been in another form."""
    found = []
    form = form_of(entries)
    if form.name != "xywh":
        rows = np.flatnonzero(entries.valid)[form.rows]
        sure = "all of them fit so" if form.certain else "not all of them fit so: look at them, --fix leaves them"
        found.append(entries.box_finding(f"box-{form.name}", rows, total=int(entries.valid.sum()), detail=sure))
        entries = in_pixels(entries, form) if form.certain else entries
    sizes = box_sizes(entries)
    for code, mask, describe in _geometry(entries, sizes):
        rows = np.flatnonzero(mask)
        # What a wrong form makes of boxes has been told of.
        if len(rows) and (form.name == "xywh" or form.certain):
            found.append(entries.box_finding(code, rows, describe, total=int(entries.valid.sum())))
    found += _pairs(entries)
    return found, entries


def form_of(entries: Entries) -> Form:
    """The form of all good boxes together; its rows count among them."""
    rows = np.flatnonzero(entries.valid)
    return box_form(entries.boxes[rows], entries.sizes[entries.image_rows[rows]], entries.areas[rows])


def in_pixels(entries: Entries, form: Form) -> Entries:
    """The set with its boxes (crowd regions too) as xywh."""
    boxes = entries.boxes.copy()
    rows = np.flatnonzero((entries.image_rows >= 0) & np.isfinite(boxes).all(axis=1))
    rows = rows[(entries.sizes[entries.image_rows[rows]] > 0).all(axis=1)]
    boxes[rows] = as_xywh(boxes[rows], entries.sizes[entries.image_rows[rows]], form.name)
    return entries.replace(boxes=boxes)


def box_sizes(entries: Entries) -> np.ndarray:
    """int [m, 2]: size of each annotation's image; zeros where it has none."""
    if not len(entries.sizes):  # annotations of no image at all
        return np.zeros((len(entries.image_rows), 2), entries.sizes.dtype)
    return np.where((entries.image_rows >= 0)[:, None], entries.sizes[entries.image_rows], 0)


def clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """xywh [m, 4] -> xyxy within their images."""
    limit = np.concatenate([sizes, sizes], axis=1)
    return np.clip(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), 0, limit)


def degenerate(entries: Entries) -> np.ndarray:
    """bool [m]: boxes without width or height."""
    with np.errstate(invalid="ignore"):
        return entries.valid & (entries.boxes[:, 2:] <= 0).any(axis=1)


def outside(entries: Entries) -> np.ndarray:
    """bool [m]: boxes of which nothing is in the image."""
    inner = clipped(entries.boxes, box_sizes(entries))
    with np.errstate(invalid="ignore"):
        return entries.valid & ~degenerate(entries) & ((inner[:, 2:] - inner[:, :2]) <= 0).any(axis=1)


def tiny(entries: Entries) -> np.ndarray:
    """bool [m]: boxes with less than a pixel in the image, which training drops (`detection.data.annotations`)."""
    inner = clipped(entries.boxes, box_sizes(entries))
    with np.errstate(invalid="ignore"):
        return (
            entries.valid & ~degenerate(entries) & ~outside(entries) & ((inner[:, 2:] - inner[:, :2]) < 1).any(axis=1)
        )


def beyond(entries: Entries) -> np.ndarray:
    """float [m]: by how many pixels a box reaches beyond its image, 0 for those that do not count here."""
    sizes = box_sizes(entries)
    over = np.concatenate([-entries.boxes[:, :2], entries.boxes[:, :2] + entries.boxes[:, 2:] - sizes], axis=1).max(
        axis=1, initial=0
    )
    return np.where(entries.valid & ~degenerate(entries) & ~outside(entries), over, 0)


Check = tuple[str, np.ndarray, Callable[[int], str] | None]


def _geometry(entries: Entries, sizes: np.ndarray) -> list[Check]:
    over = beyond(entries)
    far = over > np.maximum(2.0, 0.02 * sizes.max(axis=1, initial=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = entries.boxes[:, 2] / entries.boxes[:, 3]
        thin = entries.valid & ~degenerate(entries) & ((ratio > THIN) | (ratio < 1 / THIN))

    # A polygon's area cannot be above its box's; a pixel is left for rounding.
    area = entries.boxes[:, 2] * entries.boxes[:, 3]
    with np.errstate(invalid="ignore"):
        wrong_area = entries.valid & (area > 0) & ((entries.areas <= 0) | (entries.areas > 1.05 * area + 1))

    def image(row: int) -> str:
        return f"image {sizes[row, 0]}x{sizes[row, 1]}"

    return [
        ("box-degenerate", degenerate(entries), None),
        ("box-outside", outside(entries), image),
        ("area-wrong", wrong_area, lambda row: f"area {entries.areas[row]:g}, box {area[row]:g}"),
        ("box-tiny", tiny(entries), image),
        ("box-beyond", far, lambda row: f"by {over[row]:.1f} pixels"),
        ("box-beyond-slightly", (over > 0.5) & ~far, lambda row: f"by {over[row]:.1f} pixels"),
        ("box-aspect", thin, lambda row: f"{entries.boxes[row, 2]:.1f} x {entries.boxes[row, 3]:.1f}"),
    ]


def doubles(entries: Entries) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes that are there twice, and those that look like a region of many.

    Returns:
        rows of second boxes [a], of the same class; pairs of rows [b, 2] with different classes; rows of boxes around
        many of their class [c]; and how many boxes of its class each box of the set has in it [m].
    """
    rows = np.flatnonzero(entries.valid & ~degenerate(entries) & (entries.category_rows >= 0))
    rows = rows[np.argsort(entries.image_rows[rows], kind="stable")]
    boxes = np.concatenate([entries.boxes[rows, :2], entries.boxes[rows, :2] + entries.boxes[rows, 2:]], axis=1)
    area = entries.boxes[rows, 2] * entries.boxes[rows, 3]
    category = entries.category_rows[rows]
    second, shared = [], []
    within = np.zeros(len(entries.boxes), np.int64)
    for left, right in pairs_in_images(entries.image_rows[rows]):
        common = overlaps(boxes, left, right)
        touching = common > 0
        left, right, common = left[touching], right[touching], common[touching]
        same_class = category[left] == category[right]
        equal = common >= SAME * (area[left] + area[right] - common)
        second.append(rows[right[equal & same_class]])
        shared.append(np.stack([rows[left[equal & ~same_class]], rows[right[equal & ~same_class]]], axis=1))
        for big, small in ((left, right), (right, left)):
            inside = same_class & (common >= 0.9 * area[small]) & (area[small] < 0.4 * area[big])
            np.add.at(within, rows[big[inside]], 1)
    twice = np.unique(np.concatenate([np.zeros(0, np.int64), *second]))
    return twice, np.concatenate([np.zeros((0, 2), np.int64), *shared]), np.flatnonzero(within >= CROWD), within


def _pairs(entries: Entries) -> list[Finding]:
    twice, shared, regions, within = doubles(entries)
    total = int(entries.valid.sum())
    names = entries.category_names
    found = []
    if len(twice):
        found.append(
            entries.box_finding("box-twice", twice, lambda row: names[entries.category_rows[row]], total=total)
        )
    if len(shared):
        other = dict(shared.tolist())
        examples = entries.box_examples(
            shared[:, 0],
            lambda row: f"{names[entries.category_rows[row]]} and {names[entries.category_rows[other[row]]]}",
        )
        found.append(make_finding("box-two-classes", entries.split, len(shared), examples, total=total))
    if len(regions):
        regions = regions[np.argsort(-within[regions], kind="stable")]
        examples = entries.box_examples(
            regions, lambda row: f"{within[row]} boxes of {names[entries.category_rows[row]]!r} in it"
        )
        # Who flags some has thought of it; who flags none has not, or lost the flags in a conversion.
        flags = f"{int(entries.crowd.sum())} boxes have the flag" if entries.crowd.any() else "no box has the flag"
        found.append(
            make_finding(
                "crowd-unflagged",
                entries.split,
                len(regions),
                examples,
                total=total,
                detail=flags,
                severity="note" if entries.crowd.any() else "warning",
            )
        )
    return found
