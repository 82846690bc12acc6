"""`Entries`: annotations as they stand in a file, faults and all, in arrays parallel to the lists of the file.

`detection.data.formats.coco.read_coco` refuses a faulty file with its first fault; here all of them are to be found.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from detection.core.errors import UserError
from detection.data.formats.raw import printable
from detection.data.image_io import names_outside
from detection.doctor.findings import Example, Finding, finding

Describe = Callable[[int], str]


@dataclass(frozen=True)
class Entries:
    """n images, m annotations, k categories; row i is entry i of the file's list, however broken it is.

    Of VOC and YOLO sets the rows are in the order in which they were read.
    """

    split: str
    """train, val, or data for a set that stands alone"""
    source: str
    folder: Path | None
    """of the images"""
    file_names: np.ndarray
    """object (str) [n]; "" where there is none"""
    image_ids: np.ndarray
    """int64 [n]; -1 where there is none"""
    sizes: np.ndarray
    """int64 [n, 2], width and height; 0 where they are not given"""
    category_ids: np.ndarray
    """int64 [k]; -1 where there is none"""
    category_names: tuple[str, ...]
    annotation_ids: np.ndarray
    """int64 [m]; 0 where there is none"""
    images: np.ndarray
    """int64 [m], row of the image, or -1"""
    categories: np.ndarray
    """int64 [m], row of the category, or -1; the first one of an id that is there twice"""
    boxes: np.ndarray
    """float64 [m, 4], xywh in pixels as they should be; NaN where they are not four finite numbers"""
    areas: np.ndarray
    """float64 [m], NaN where they are not given"""
    crowd: np.ndarray
    """bool [m]"""
    faults: tuple[Finding, ...] = ()
    """found in reading"""
    format: str = "coco"
    good: np.ndarray = field(init=False)
    """bool [m]: annotations with a box, of an image whose size is known, no crowd"""

    def __post_init__(self) -> None:
        known = (self.images >= 0) & np.isfinite(self.boxes).all(axis=1)
        known[known] &= (self.sizes[self.images[known]] > 0).all(axis=1)
        object.__setattr__(self, "good", known & ~self.crowd)

    @property
    def broken(self) -> np.ndarray:
        """bool [m]: entries that could not be read."""
        return (self.images < 0) & (self.categories < 0) & (self.annotation_ids == 0)

    def changed(self, **fields: Any) -> "Entries":
        """A copy with other values."""
        return replace(self, **fields)

    @cached_property
    def outside(self) -> frozenset[int]:
        """Rows of images whose names lead out of the folder; of YOLO sets the folders are named one by one."""
        if self.folder is None or self.format == "yolo":
            return frozenset()
        return frozenset(names_outside(self.file_names.tolist(), self.folder))

    def path(self, row: int) -> Path | None:
        """Of an image, where it should be; None where it has no name, or one that leads out of the folder."""
        name = self.file_names[row]
        return self.folder / name if self.folder is not None and name and row not in self.outside else None

    def box_examples(self, rows: np.ndarray, describe: Describe | None = None) -> list[Example]:
        """Annotations as examples; rows without an image have none to show."""
        return [self._box_example(int(row), describe) for row in _few(rows)]

    def image_examples(self, rows: np.ndarray, describe: Describe | None = None) -> list[Example]:
        return [
            Example(str(self.file_names[row]), int(self.image_ids[row]), text=describe(row) if describe else "")
            for row in _few(rows)
        ]

    def box_finding(self, code: str, rows: np.ndarray, describe: Describe | None = None, **more: Any) -> Finding:
        return finding(code, self.split, len(rows), self.box_examples(rows, describe), **more)

    def image_finding(self, code: str, rows: np.ndarray, describe: Describe | None = None, **more: Any) -> Finding:
        return finding(code, self.split, len(rows), self.image_examples(rows, describe), **more)

    def _box_example(self, row: int, describe: Describe | None) -> Example:
        image = int(self.images[row])
        box = self.boxes[row]
        return Example(
            image=str(self.file_names[image]) if image >= 0 else None,
            image_id=int(self.image_ids[image]) if image >= 0 else None,
            annotation=int(self.annotation_ids[row]),
            box=(box[0].item(), box[1].item(), box[2].item(), box[3].item()) if np.isfinite(box).all() else None,
            text=describe(row) if describe else "",
        )


def _few(rows: np.ndarray, most: int = 100) -> list[int]:
    """Enough to choose examples from, from all over."""
    rows = np.asarray(rows)
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return rows.tolist()


def coco_entries(content: Any, source: str, split: str, folder: Path | None) -> Entries:
    """The content of a COCO file as a `Entries`, with the faults of its structure.

    Raises:
        UserError: it is no COCO file at all.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"annotation file {source} is not in COCO format: it has no list {key!r} at the top "
                "(expected are images, annotations and categories)"
            )
    notes = _Notes()
    images = _read_images(content["images"], notes)
    categories = _read_categories(content["categories"], notes)
    annotations = _read_annotations(
        content["annotations"], _rows_of(images["image_ids"]), _rows_of(categories["category_ids"]), notes
    )
    raw = Entries(split=split, source=source, folder=folder, **images, **categories, **annotations)
    return raw.changed(faults=tuple(_structure_faults(raw, notes)))


@dataclass
class _Notes:
    """Rows of entries with faults that the arrays do not show."""

    broken: dict[str, list[int]] = field(default_factory=lambda: {"images": [], "categories": [], "annotations": []})
    texts: dict[str, list[int]] = field(default_factory=lambda: {"images": [], "categories": [], "annotations": []})
    no_box: list[int] = field(default_factory=list)
    no_area: int = 0
    no_crowd: int = 0


def _whole(value: Any) -> int | None:
    """A whole number, also one in quotes or with a decimal point; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = int(value)
        return number if float(value) == number and abs(number) < 2**63 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _id(entry: dict[str, Any], key: str, kind: str, row: int, notes: _Notes) -> int | None:
    value = entry.get(key)
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    number = _whole(value)
    if number is not None:
        notes.texts[kind].append(row)
    return number


def _read_images(entries: list[Any], notes: _Notes) -> dict[str, Any]:
    names = np.full(len(entries), "", object)
    ids = np.full(len(entries), -1, np.int64)
    sizes = np.zeros((len(entries), 2), np.int64)
    for row, entry in enumerate(entries):
        number = _id(entry, "id", "images", row, notes) if isinstance(entry, dict) else None
        if number is None or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            notes.broken["images"].append(row)
            continue
        ids[row], names[row] = number, entry["file_name"]
        width, height = _whole(entry.get("width")), _whole(entry.get("height"))
        if width and height and min(width, height) > 0:
            sizes[row] = width, height
    return {"file_names": names, "image_ids": ids, "sizes": sizes}


def _read_categories(entries: list[Any], notes: _Notes) -> dict[str, Any]:
    ids = np.full(len(entries), -1, np.int64)
    names = []
    for row, entry in enumerate(entries):
        number = _id(entry, "id", "categories", row, notes) if isinstance(entry, dict) else None
        if number is None or entry.get("name") == "" or not isinstance(entry.get("name"), str | int | float):
            notes.broken["categories"].append(row)
            names.append("")
            continue
        ids[row] = number
        names.append(printable(str(entry["name"])))
    return {"category_ids": ids, "category_names": tuple(names)}


def _read_annotations(
    entries: list[Any], image_rows: dict[int, int], category_rows: dict[int, int], notes: _Notes
) -> dict[str, Any]:
    count = len(entries)
    ids, images, categories = np.zeros(count, np.int64), np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    boxes, areas, crowd = np.full((count, 4), np.nan), np.full(count, np.nan), np.zeros(count, bool)
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry or "category_id" not in entry:
            notes.broken["annotations"].append(row)
            continue
        ids[row] = _whole(entry.get("id")) or 0
        image, category = (_id(entry, key, "annotations", row, notes) for key in ("image_id", "category_id"))
        images[row] = -1 if image is None else image_rows.get(image, -1)
        categories[row] = -1 if category is None else category_rows.get(category, -1)
        box = entry.get("bbox")
        try:
            # NumPy would make four of one number.
            if len(box) == 4:  # type: ignore[arg-type]
                boxes[row] = box
            areas[row] = entry.get("area", np.nan)
        except (TypeError, ValueError, OverflowError):
            pass
        if not np.isfinite(boxes[row].sum()):
            boxes[row] = np.nan
            notes.no_box.append(row)
        notes.no_area += entry.get("area") is None
        if "iscrowd" in entry:
            crowd[row] = entry["iscrowd"] not in (0, None, False, "0")
        else:
            notes.no_crowd += 1
    return {
        "annotation_ids": ids,
        "images": images,
        "categories": categories,
        "boxes": boxes,
        "areas": areas,
        "crowd": crowd,
    }


def _rows_of(ids: np.ndarray) -> dict[int, int]:
    """The first row of each id."""
    rows: dict[int, int] = {}
    for row, value in enumerate(ids.tolist()):
        if value != -1:
            rows.setdefault(value, row)
    return rows


def _structure_faults(raw: Entries, notes: _Notes) -> list[Finding]:
    faults = []
    for kind in ("images", "categories", "annotations"):
        if notes.broken[kind]:
            needed = {
                "images": "id and file_name",
                "categories": "id and name",
                "annotations": "image_id and category_id",
            }
            numbers = [Example(text=f"{kind} entry number {row + 1}") for row in _few(np.array(notes.broken[kind]))]
            detail = f"of {kind}, which need {needed[kind]}"
            faults.append(finding("entry-broken", raw.split, len(notes.broken[kind]), numbers, detail=detail))
        if notes.texts[kind]:
            rows = sorted(set(notes.texts[kind]))
            numbers = [Example(text=f"{kind} entry number {row + 1}") for row in _few(np.array(rows))]
            faults.append(finding("id-text", raw.split, len(rows), numbers, detail=f"in {kind}"))
    if notes.no_box:
        faults.append(raw.box_finding("box-not-numbers", np.array(notes.no_box)))
    if notes.no_area:
        faults.append(finding("area-missing", raw.split, notes.no_area, total=len(raw.boxes)))
    if notes.no_crowd:
        faults.append(finding("crowd-missing", raw.split, notes.no_crowd, total=len(raw.boxes)))
    return faults
