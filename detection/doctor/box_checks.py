"""Checks of bounding boxes: format, geometry, duplicates, and crowd regions without a flag."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from detection.core.boxes import clip_boxes, xywh_to_xyxy
from detection.doctor.box_format import BoxFormat, detect_box_format, to_xywh
from detection.doctor.box_pairs import intersection_areas, pairs_in_images
from detection.doctor.entries import Entries
from detection.doctor.findings import Finding, make_finding

DUPLICATE_IOU = 0.98
MIN_BOXES_IN_CROWD = 5
"""Boxes of the same class inside a box from which on the box looks like a crowd region.

Measured on coco_mini and person with their iscrowd flags hidden: recall 77 % of 217 crowd regions, precision 87 % (with
4: 80 % and 81 %; with 8: 59 % and 96 %). The false positives are people in front of an audience."""
MAX_ASPECT_RATIO = 20.0


def check_boxes(entries: Entries) -> tuple[list[Finding], Entries]:
    """Check all boxes. Also returns the entries with boxes converted to xywh if their format is certain."""
    findings = []
    form = box_format_of(entries)
    if form.name != "xywh":
        rows = np.flatnonzero(entries.valid)[form.rows]
        detail = (
            "all boxes have this format"
            if form.certain
            else "only some boxes have this format: inspect them, --fix does not change them"
        )
        findings.append(entries.box_finding(f"box-{form.name}", rows, total=int(entries.valid.sum()), detail=detail))
        entries = convert_to_xywh(entries, form) if form.certain else entries
    sizes = image_sizes_of_boxes(entries)
    for code, mask, describe in _geometry_checks(entries, sizes):
        rows = np.flatnonzero(mask)
        # With an uncertain format, geometry errors are only consequences of it.
        if len(rows) and (form.name == "xywh" or form.certain):
            findings.append(entries.box_finding(code, rows, describe, total=int(entries.valid.sum())))
    findings += _check_overlaps(entries)
    return findings, entries


def box_format_of(entries: Entries) -> BoxFormat:
    """The common format of all valid boxes; its `rows` index the valid boxes."""
    rows = np.flatnonzero(entries.valid)
    return detect_box_format(entries.boxes[rows], entries.sizes[entries.image_rows[rows]], entries.areas[rows])


def convert_to_xywh(entries: Entries, form: BoxFormat) -> Entries:
    """Convert all finite boxes in images of known size, including crowd regions, to xywh in pixels."""
    boxes = entries.boxes.copy()
    rows = np.flatnonzero((entries.image_rows >= 0) & np.isfinite(boxes).all(axis=1))
    rows = rows[(entries.sizes[entries.image_rows[rows]] > 0).all(axis=1)]
    boxes[rows] = to_xywh(boxes[rows], entries.sizes[entries.image_rows[rows]], form.name)
    return entries.replace(boxes=boxes)


def image_sizes_of_boxes(entries: Entries) -> np.ndarray:
    """int [m, 2]: width and height of each annotation's image; zeros if it has none."""
    if not len(entries.sizes):  # the file lists no images
        return np.zeros((len(entries.image_rows), 2), entries.sizes.dtype)
    return np.where((entries.image_rows >= 0)[:, None], entries.sizes[entries.image_rows], 0)


def clip_to_image(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert boxes [m, 4] from xywh to xyxy and clip them to image sizes [m, 2]."""
    return clip_boxes(xywh_to_xyxy(boxes), sizes)


def degenerate_mask(entries: Entries) -> np.ndarray:
    """bool [m]: boxes with zero or negative width or height."""
    with np.errstate(invalid="ignore"):
        return entries.valid & (entries.boxes[:, 2:] <= 0).any(axis=1)


def outside_mask(entries: Entries) -> np.ndarray:
    """bool [m]: boxes that do not intersect their image."""
    inner = clip_to_image(entries.boxes, image_sizes_of_boxes(entries))
    with np.errstate(invalid="ignore"):
        empty = ((inner[:, 2:] - inner[:, :2]) <= 0).any(axis=1)
        return entries.valid & ~degenerate_mask(entries) & empty


def tiny_mask(entries: Entries) -> np.ndarray:
    """bool [m]: boxes with less than one pixel inside the image; training drops them (`detection.data.annotations`)."""
    inner = clip_to_image(entries.boxes, image_sizes_of_boxes(entries))
    with np.errstate(invalid="ignore"):
        below_one_pixel = ((inner[:, 2:] - inner[:, :2]) < 1).any(axis=1)
        return entries.valid & ~degenerate_mask(entries) & ~outside_mask(entries) & below_one_pixel


def pixels_outside(entries: Entries) -> np.ndarray:
    """float [m]: by how many pixels each box extends beyond its image; 0 for degenerate and outside boxes."""
    sizes = image_sizes_of_boxes(entries)
    over = np.concatenate([-entries.boxes[:, :2], entries.boxes[:, :2] + entries.boxes[:, 2:] - sizes], axis=1).max(
        axis=1, initial=0
    )
    return np.where(entries.valid & ~degenerate_mask(entries) & ~outside_mask(entries), over, 0)


GeometryCheck = tuple[str, np.ndarray, Callable[[int], str] | None]
"""Code, mask of the boxes (bool [m]), and a function that describes the box of a row."""


def _geometry_checks(entries: Entries, sizes: np.ndarray) -> list[GeometryCheck]:
    over = pixels_outside(entries)
    far = over > np.maximum(2.0, 0.02 * sizes.max(axis=1, initial=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = entries.boxes[:, 2] / entries.boxes[:, 3]
        thin = entries.valid & ~degenerate_mask(entries) & ((ratio > MAX_ASPECT_RATIO) | (ratio < 1 / MAX_ASPECT_RATIO))

    # The area of a polygon cannot exceed that of its box; 5 % and one pixel allow for rounding.
    area = entries.boxes[:, 2] * entries.boxes[:, 3]
    with np.errstate(invalid="ignore"):
        wrong_area = entries.valid & (area > 0) & ((entries.areas <= 0) | (entries.areas > 1.05 * area + 1))

    def image(row: int) -> str:
        return f"image {sizes[row, 0]}x{sizes[row, 1]}"

    return [
        ("box-degenerate", degenerate_mask(entries), None),
        ("box-outside", outside_mask(entries), image),
        ("area-wrong", wrong_area, lambda row: f"area {entries.areas[row]:g}, box {area[row]:g}"),
        ("box-tiny", tiny_mask(entries), image),
        ("box-beyond", far, lambda row: f"by {over[row]:.1f} pixels"),
        ("box-beyond-slightly", (over > 0.5) & ~far, lambda row: f"by {over[row]:.1f} pixels"),
        ("box-aspect", thin, lambda row: f"{entries.boxes[row, 2]:.1f} x {entries.boxes[row, 3]:.1f}"),
    ]


class OverlappingBoxes(NamedTuple):
    """Boxes of a dataset that duplicate or contain others.

    Attributes:
        duplicates: int64 [a], rows of boxes that equal an earlier box of the same class.
        two_classes: int64 [b, 2], pairs of rows of equal boxes with different classes.
        crowds: int64 [c], rows of boxes that contain at least `MIN_BOXES_IN_CROWD` boxes of their class.
        contained: int64 [m], number of boxes of its class that each box contains.
    """

    duplicates: np.ndarray
    two_classes: np.ndarray
    crowds: np.ndarray
    contained: np.ndarray


def find_overlapping_boxes(entries: Entries) -> OverlappingBoxes:
    """Compare all pairs of boxes in the same image."""
    rows = np.flatnonzero(entries.valid & ~degenerate_mask(entries) & (entries.category_rows >= 0))
    rows = rows[np.argsort(entries.image_rows[rows], kind="stable")]
    boxes = np.concatenate([entries.boxes[rows, :2], entries.boxes[rows, :2] + entries.boxes[rows, 2:]], axis=1)
    area = entries.boxes[rows, 2] * entries.boxes[rows, 3]
    category = entries.category_rows[rows]
    duplicates, two_classes = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    contained = np.zeros(len(entries.boxes), np.int64)
    for left, right in pairs_in_images(entries.image_rows[rows]):
        intersection = intersection_areas(boxes, left, right)
        touching = intersection > 0
        left, right, intersection = left[touching], right[touching], intersection[touching]
        same_class = category[left] == category[right]
        equal = intersection >= DUPLICATE_IOU * (area[left] + area[right] - intersection)
        duplicates.append(rows[right[equal & same_class]])
        two_classes.append(np.stack([rows[left[equal & ~same_class]], rows[right[equal & ~same_class]]], axis=1))
        for big, small in ((left, right), (right, left)):
            inside = same_class & (intersection >= 0.9 * area[small]) & (area[small] < 0.4 * area[big])
            np.add.at(contained, rows[big[inside]], 1)
    crowds = np.flatnonzero(contained >= MIN_BOXES_IN_CROWD)
    return OverlappingBoxes(np.unique(np.concatenate(duplicates)), np.concatenate(two_classes), crowds, contained)


def _check_overlaps(entries: Entries) -> list[Finding]:
    duplicates, two_classes, crowds, contained = find_overlapping_boxes(entries)
    total = int(entries.valid.sum())

    def class_name(row: int) -> str:
        return entries.category_names[entries.category_rows[row]]

    findings = []
    if len(duplicates):
        findings.append(entries.box_finding("box-twice", duplicates, class_name, total=total))
    if len(two_classes):
        other = dict(two_classes.tolist())
        examples = entries.box_examples(
            two_classes[:, 0], lambda row: f"{class_name(row)} and {class_name(other[row])}"
        )
        findings.append(make_finding("box-two-classes", entries.split, len(two_classes), examples, total=total))
    if len(crowds):
        crowds = crowds[np.argsort(-contained[crowds], kind="stable")]
        examples = entries.box_examples(crowds, lambda row: f"contains {contained[row]} boxes of {class_name(row)!r}")
        # A file without any flag probably lost them in a conversion; a file with flags probably has them all.
        has_flags = bool(entries.crowd.any())
        findings.append(
            make_finding(
                "crowd-unflagged",
                entries.split,
                len(crowds),
                examples,
                total=total,
                detail=f"{int(entries.crowd.sum())} boxes have the flag" if has_flags else "no box has the flag",
                severity="note" if has_flags else "warning",
            )
        )
    return findings
