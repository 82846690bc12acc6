"""`RawAnnotations`: the rows of the files of a dataset, the layer between the formats and `Annotations`.

Each format has a parser (`coco.parse_coco`, `voc.parse_voc`, `yolo.parse_yolo`; `detect_format.read_raw` chooses one).
It returns a `RawAnnotations`: arrays of all entries that fit into arrays, and an `Issue` for each other entry and for
each fault. Training and evaluation call `to_annotations(raw)`, which raises a UserError for the first fatal issue; the
doctor lists all of `raw.problems` and `checks(raw)`. The parser itself raises UserError only if a file is not of its
format at all (absent, not JSON, without a list "images").
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detection.core.commands import command
from detection.core.errors import UserError
from detection.data.annotations import Annotations
from detection.data.image_io import names_outside, outside_message

MAX_ISSUES = 10_000
"""Further issues are only counted."""


@dataclass(frozen=True)
class Issue:
    """One fault of the files."""

    kind: str
    """One of: missing_key, bad_value, bad_box, unknown_image, unknown_category, duplicate_id, duplicate_name,
    bad_class, bad_line, bad_size, no_size, not_readable, no_labels, …"""
    message: str
    """Names the file, the entry, and what is expected; the message of the error of `to_annotations`."""
    fatal: bool = True
    """Whether `to_annotations` raises an error for it; otherwise it becomes a note."""
    image: str | None = None
    """File name of the image, if the fault is that of an image."""


class Issues:
    """A list of at most `MAX_ISSUES` issues; `count` includes the others."""

    def __init__(self) -> None:
        self.items: list[Issue] = []
        self.count = 0

    def add(self, kind: str, message: str, *, fatal: bool = True, image: str | None = None) -> None:
        self.count += 1
        if len(self.items) < MAX_ISSUES:
            self.items.append(Issue(kind, message, fatal, image))

    def __iter__(self) -> Iterator[Issue]:
        return iter(self.items)


@dataclass
class RawAnnotations:
    """The rows of the files of a dataset: n images and m boxes, in the order of the files.

    Nothing is resolved or checked: ids may be unknown or repeated, numbers may be negative or NaN. An entry that does
    not fit into these arrays (a bbox of three numbers) is left out and has a fatal issue.
    """

    source: str
    """The annotation file or folder, for messages."""
    format: str
    """coco, voc or yolo"""
    images: Path
    """Folder that `file_names` are relative to."""
    categories: list[tuple[int, str]]
    """(id, name) in the order of the file."""
    image_ids: np.ndarray
    """int64 [n]; VOC and YOLO: 1…n by file name"""
    file_names: np.ndarray
    """str [n]"""
    sizes: np.ndarray
    """int64 [n, 2], width and height; 0 where unknown"""
    box_images: np.ndarray
    """int64 [m], the image id that each annotation names"""
    box_categories: np.ndarray
    """int64 [m], category id"""
    boxes: np.ndarray
    """float64 [m, 4], xywh in pixels, 0-based"""
    areas: np.ndarray
    """float64 [m]; NaN where the file has none"""
    crowd: np.ndarray
    """int8 [m]: 1, 0, or -1 where the file has no value"""
    box_numbers: np.ndarray
    """int64 [m]. COCO: id of the annotation, or -1, -2, … for entry 1, 2, … of the file if it has no id. VOC: number of
    the object in its file. YOLO: line. See `place`."""
    label_files: np.ndarray | None = None
    """str [n], the file with the boxes of each image; None for COCO."""
    problems: Issues = field(default_factory=Issues)
    notes: list[str] = field(default_factory=list)
    """Assumptions of the reader, for messages."""

    def place(self, row: int) -> str:
        """Where box `row` is in the files, for messages: "annotation 7", "labels/a.txt, line 3"."""
        number = int(self.box_numbers[row])
        if self.label_files is None:
            return f"annotation {number}" if number >= 0 else f"annotation number {-number}"
        # Formats with a file for each image have the image ids 1…n.
        return f"{self.label_files[self.box_images[row] - 1]}, {'line' if self.format == 'yolo' else 'object'} {number}"


def checks(raw: RawAnnotations) -> Issues:
    """Find the fatal issues in the arrays."""
    found = Issues()
    for kind, ids in (("category", [i for i, _ in raw.categories]), ("image", raw.image_ids)):
        values, counts = np.unique(np.asarray(ids, np.int64), return_counts=True)
        for value in values[counts > 1].tolist():
            found.add("duplicate_id", f"{kind} id {value} is there more than once")
    ids_of: dict[str, list[int]] = {}
    for number, name in raw.categories:
        ids_of.setdefault(name, []).append(number)
    for name, numbers in ids_of.items():
        if len(numbers) > 1:
            # Classes are matched by name: of two with the same name, one would get all detections and the other none.
            message = f"categories {', '.join(map(str, numbers))} have the same name {name!r}: rename all but one"
            found.add("duplicate_name", message)
    names = raw.file_names.tolist()
    # A data.yaml of YOLO lists its folders one by one; they need not be below a common folder.
    for row in names_outside(names, raw.images) if raw.format != "yolo" else []:
        found.add("outside", outside_message(names[row], raw.images), image=names[row])
    for row in np.flatnonzero(~np.isin(raw.box_images, raw.image_ids)).tolist():
        message = f"{raw.place(row)} names image {raw.box_images[row]}, which the file does not have"
        found.add("unknown_image", message)
    category_ids = np.array([i for i, _ in raw.categories], np.int64)
    for row in np.flatnonzero(~np.isin(raw.box_categories, category_ids)).tolist():
        message = f"{raw.place(row)} names category {raw.box_categories[row]}, which the file does not have"
        found.add("unknown_category", message)
    for row in np.flatnonzero(~np.isfinite(raw.boxes).all(axis=1)).tolist():
        found.add("bad_box", f"{raw.place(row)} has a bbox that is not finite: {raw.boxes[row].tolist()}")
    for i in np.flatnonzero((raw.sizes < 1).any(axis=1)).tolist():
        name = str(raw.file_names[i])
        key = "width" if raw.sizes[i, 0] < 1 else "height"
        message = f"image {name} has {key} {raw.sizes[i].min()}; expected are its pixels"
        found.add("bad_size", message, image=name)
    return found


def to_annotations(raw: RawAnnotations) -> Annotations:
    """Convert to the arrays that training and evaluation use.

    Raises:
        UserError: there are fatal issues in `raw.problems` or `checks(raw)`; the message is the first one and their
            number.
    """
    fatal = [problem for problem in raw.problems if problem.fatal]
    count = len(fatal) + max(0, raw.problems.count - len(raw.problems.items))
    if not fatal:
        found = checks(raw)
        fatal, count = found.items, found.count
    if fatal:
        more = f" (and {count - 1} more such problems; {command('check_data')} lists them)" if count > 1 else ""
        raise UserError(f"{raw.source}: {fatal[0].message}{more}")
    if not len(raw.image_ids):
        raise UserError(f"annotation file {raw.source} has no images")
    if not raw.categories and raw.format != "voc":  # the classes of VOC are those of its boxes
        raise UserError(f"annotation file {raw.source} has no categories")

    order_of_images = np.argsort(raw.image_ids, kind="stable")
    image_rows = order_of_images[np.searchsorted(raw.image_ids[order_of_images], raw.box_images)]
    categories = sorted(raw.categories)
    category_ids = np.array([i for i, _ in categories], np.int64)
    labels = np.searchsorted(category_ids, raw.box_categories) + 1
    areas = raw.areas
    missing = np.isnan(areas)
    if missing.any():
        areas = np.where(missing, raw.boxes[:, 2] * raw.boxes[:, 3], areas)
    order = np.argsort(image_rows, kind="stable")
    return Annotations(
        source=raw.source,
        format=raw.format,
        images=str(raw.images),
        class_names=tuple(name for _, name in categories),
        category_ids=category_ids,
        image_ids=raw.image_ids,
        file_names=raw.file_names,
        sizes=raw.sizes,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image_rows, minlength=len(raw.image_ids)))]),
        boxes=raw.boxes[order],
        labels=labels[order],
        areas=areas[order],
        crowd=raw.crowd[order] == 1,
        notes=tuple(_notes(raw)),
    )


def _notes(raw: RawAnnotations) -> list[str]:
    notes = []
    if raw.format == "coco":
        no_area, no_crowd = int(np.isnan(raw.areas).sum()), int((raw.crowd < 0).sum())
        if no_area:
            notes.append(f"{no_area} annotations without area: width x height is taken")
        if no_crowd:
            notes.append(f"{no_crowd} annotations without iscrowd: taken as 0")
    told = [problem for problem in raw.problems if not problem.fatal]
    for kind in dict.fromkeys(problem.kind for problem in told):
        same = [problem.message for problem in told if problem.kind == kind]
        notes.append(same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""))
    return [*raw.notes, *notes]


def printable(text: str) -> str:
    """Replace lone surrogates (JSON's \\ud800), which can be neither printed nor drawn, by question marks."""
    return text.encode("utf-8", "replace").decode()
