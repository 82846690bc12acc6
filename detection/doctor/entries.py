"""`Entries`: the annotations of a dataset exactly as its file lists them, valid or not, as arrays.

`detection.data.formats.coco.read_coco` stops at the first invalid entry. `Entries` keeps every entry, so that all
faults of a file can be reported.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from detection.core.errors import UserError
from detection.data.formats.raw import printable
from detection.data.image_io import names_outside
from detection.doctor.findings import Example, Finding, make_finding

DescribeRow = Callable[[int], str]


@dataclass(frozen=True)
class Entries:
    """n images, m annotations and k categories. Row i is entry i of the list in the file, even if the entry is invalid.

    For VOC and YOLO the rows follow the order in which the files were read.
    """

    split: str
    """"train", "val", or "data" for a single dataset; "train.0", "train.1", … of a list"""
    source: str
    """path of the annotations"""
    folder: Path | None
    """folder of the images"""
    file_names: np.ndarray
    """object (str) [n]; "" if missing"""
    image_ids: np.ndarray
    """int64 [n]; -1 if missing"""
    sizes: np.ndarray
    """int64 [n, 2], width and height of each image; 0 if missing"""
    category_ids: np.ndarray
    """int64 [k]; -1 if missing"""
    category_names: tuple[str, ...]
    annotation_ids: np.ndarray
    """int64 [m]; 0 if missing"""
    image_rows: np.ndarray
    """int64 [m], row of each annotation's image; -1 if the file does not list the image"""
    category_rows: np.ndarray
    """int64 [m], row of each annotation's category (the first row with its id); -1 if the file does not list it"""
    boxes: np.ndarray
    """float64 [m, 4], xywh in pixels; NaN unless the file has four finite numbers"""
    areas: np.ndarray
    """float64 [m]; NaN if missing"""
    crowd: np.ndarray
    """bool [m]"""
    parse_findings: tuple[Finding, ...] = ()
    """faults found while the file was parsed"""
    format: str = "coco"
    valid: np.ndarray = field(init=False)
    """bool [m]: annotations with a finite box, an image of known size, and no crowd flag"""

    @property
    def role(self) -> str:
        """ "train", "val" or "data" """
        return self.split.partition(".")[0]

    def __post_init__(self) -> None:
        known = (self.image_rows >= 0) & np.isfinite(self.boxes).all(axis=1)
        known[known] &= (self.sizes[self.image_rows[known]] > 0).all(axis=1)
        object.__setattr__(self, "valid", known & ~self.crowd)

    @property
    def unreadable(self) -> np.ndarray:
        """bool [m]: annotations without any usable id."""
        return (self.image_rows < 0) & (self.category_rows < 0) & (self.annotation_ids == 0)

    def replace(self, **fields: Any) -> "Entries":
        """A copy with the given fields replaced."""
        return dataclasses.replace(self, **fields)

    @cached_property
    def rows_outside_folder(self) -> frozenset[int]:
        """Rows of images whose file names point outside the image folder; always empty for YOLO."""
        # data.yaml of YOLO lists its image folders explicitly.
        if self.folder is None or self.format == "yolo":
            return frozenset()
        return frozenset(names_outside(self.file_names.tolist(), self.folder))

    def path(self, row: int) -> Path | None:
        """Path of an image; None if it has no name or its name points outside the image folder."""
        name = self.file_names[row]
        return self.folder / name if self.folder is not None and name and row not in self.rows_outside_folder else None

    def box_examples(self, rows: np.ndarray, describe: DescribeRow | None = None) -> list[Example]:
        """Examples for annotation rows; the image of an example is None if the file does not list it."""
        return [self._box_example(int(row), describe) for row in _subsample(rows)]

    def image_examples(self, rows: np.ndarray, describe: DescribeRow | None = None) -> list[Example]:
        """Examples for image rows."""
        return [
            Example(str(self.file_names[row]), int(self.image_ids[row]), text=describe(row) if describe else "")
            for row in _subsample(rows)
        ]

    def box_finding(self, code: str, rows: np.ndarray, describe: DescribeRow | None = None, **more: Any) -> Finding:
        """A finding about annotation rows; `more` as in `make_finding`."""
        return make_finding(code, self.split, len(rows), self.box_examples(rows, describe), **more)

    def image_finding(self, code: str, rows: np.ndarray, describe: DescribeRow | None = None, **more: Any) -> Finding:
        """A finding about image rows; `more` as in `make_finding`."""
        return make_finding(code, self.split, len(rows), self.image_examples(rows, describe), **more)

    def _box_example(self, row: int, describe: DescribeRow | None) -> Example:
        image = int(self.image_rows[row])
        box = self.boxes[row]
        return Example(
            image=str(self.file_names[image]) if image >= 0 else None,
            image_id=int(self.image_ids[image]) if image >= 0 else None,
            annotation=int(self.annotation_ids[row]),
            box=(box[0].item(), box[1].item(), box[2].item(), box[3].item()) if np.isfinite(box).all() else None,
            text=describe(row) if describe else "",
        )


def _subsample(rows: np.ndarray, max_rows: int = 100) -> list[int]:
    """At most `max_rows` rows, evenly spaced; `make_finding` picks its examples from them."""
    rows = np.asarray(rows)
    if len(rows) > max_rows:
        rows = rows[np.linspace(0, len(rows) - 1, max_rows).astype(int)]
    return rows.tolist()


def entries_from_coco(content: Any, source: str, split: str, folder: Path | None) -> Entries:
    """Convert the parsed JSON of a COCO file to `Entries`; faults of its structure become `parse_findings`.

    Raises:
        UserError: the content is not in COCO format.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"annotation file {source} is not in COCO format: it has no top-level list {key!r} "
                "(expected: images, annotations and categories)"
            )
    issues = _ParseIssues()
    images = _read_images(content["images"], issues)
    categories = _read_categories(content["categories"], issues)
    annotations = _read_annotations(
        content["annotations"],
        _first_row_by_id(images["image_ids"]),
        _first_row_by_id(categories["category_ids"]),
        issues,
    )
    entries = Entries(split=split, source=source, folder=folder, **images, **categories, **annotations)
    return entries.replace(parse_findings=tuple(_parse_findings(entries, issues)))


@dataclass
class _ParseIssues:
    """Faults of entries that the arrays cannot represent: rows, or counts."""

    incomplete: dict[str, list[int]] = field(
        default_factory=lambda: {"images": [], "categories": [], "annotations": []}
    )
    text_ids: dict[str, list[int]] = field(default_factory=lambda: {"images": [], "categories": [], "annotations": []})
    no_box: list[int] = field(default_factory=list)
    no_area: int = 0
    no_crowd: int = 0


def _to_int(value: Any) -> int | None:
    """The value as an integer, also from "3" or 3.0; None if it is not a whole number."""
    if isinstance(value, bool):
        return None
    try:
        number = int(value)
        return number if float(value) == number and abs(number) < 2**63 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _read_id(entry: dict[str, Any], key: str, kind: str, row: int, issues: _ParseIssues) -> int | None:
    value = entry.get(key)
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    number = _to_int(value)
    if number is not None:
        issues.text_ids[kind].append(row)
    return number


def _read_images(entries: list[Any], issues: _ParseIssues) -> dict[str, Any]:
    names = np.full(len(entries), "", object)
    ids = np.full(len(entries), -1, np.int64)
    sizes = np.zeros((len(entries), 2), np.int64)
    for row, entry in enumerate(entries):
        number = _read_id(entry, "id", "images", row, issues) if isinstance(entry, dict) else None
        if number is None or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            issues.incomplete["images"].append(row)
            continue
        ids[row], names[row] = number, entry["file_name"]
        width, height = _to_int(entry.get("width")), _to_int(entry.get("height"))
        if width and height and min(width, height) > 0:
            sizes[row] = width, height
    return {"file_names": names, "image_ids": ids, "sizes": sizes}


def _read_categories(entries: list[Any], issues: _ParseIssues) -> dict[str, Any]:
    ids = np.full(len(entries), -1, np.int64)
    names = []
    for row, entry in enumerate(entries):
        number = _read_id(entry, "id", "categories", row, issues) if isinstance(entry, dict) else None
        if number is None or entry.get("name") == "" or not isinstance(entry.get("name"), str | int | float):
            issues.incomplete["categories"].append(row)
            names.append("")
            continue
        ids[row] = number
        names.append(printable(str(entry["name"])))
    return {"category_ids": ids, "category_names": tuple(names)}


def _read_annotations(
    entries: list[Any], image_rows: dict[int, int], category_rows: dict[int, int], issues: _ParseIssues
) -> dict[str, Any]:
    count = len(entries)
    ids, images, categories = np.zeros(count, np.int64), np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    boxes, areas, crowd = np.full((count, 4), np.nan), np.full(count, np.nan), np.zeros(count, bool)
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry or "category_id" not in entry:
            issues.incomplete["annotations"].append(row)
            continue
        ids[row] = _to_int(entry.get("id")) or 0
        image, category = (_read_id(entry, key, "annotations", row, issues) for key in ("image_id", "category_id"))
        images[row] = -1 if image is None else image_rows.get(image, -1)
        categories[row] = -1 if category is None else category_rows.get(category, -1)
        box = entry.get("bbox")
        try:
            # Check the length first: NumPy would broadcast a single number to all four columns.
            if len(box) == 4:  # type: ignore[arg-type]
                boxes[row] = box
            areas[row] = entry.get("area", np.nan)
        except (TypeError, ValueError, OverflowError):
            pass
        if not np.isfinite(boxes[row].sum()):
            boxes[row] = np.nan
            issues.no_box.append(row)
        issues.no_area += entry.get("area") is None
        if "iscrowd" in entry:
            crowd[row] = entry["iscrowd"] not in (0, None, False, "0")
        else:
            issues.no_crowd += 1
    return {
        "annotation_ids": ids,
        "image_rows": images,
        "category_rows": categories,
        "boxes": boxes,
        "areas": areas,
        "crowd": crowd,
    }


def _first_row_by_id(ids: np.ndarray) -> dict[int, int]:
    """Map each id to the first row that has it."""
    rows: dict[int, int] = {}
    for row, value in enumerate(ids.tolist()):
        if value != -1:
            rows.setdefault(value, row)
    return rows


def _parse_findings(entries: Entries, issues: _ParseIssues) -> list[Finding]:
    findings = []
    for kind in ("images", "categories", "annotations"):
        if issues.incomplete[kind]:
            required = {
                "images": "id and file_name",
                "categories": "id and name",
                "annotations": "image_id and category_id",
            }
            numbers = [
                Example(text=f"{kind} entry number {row + 1}") for row in _subsample(np.array(issues.incomplete[kind]))
            ]
            detail = f"{kind} require {required[kind]}"
            findings.append(
                make_finding("entry-broken", entries.split, len(issues.incomplete[kind]), numbers, detail=detail)
            )
        if issues.text_ids[kind]:
            rows = sorted(set(issues.text_ids[kind]))
            numbers = [Example(text=f"{kind} entry number {row + 1}") for row in _subsample(np.array(rows))]
            findings.append(make_finding("id-text", entries.split, len(rows), numbers, detail=f"in {kind}"))
    if issues.no_box:
        findings.append(entries.box_finding("box-not-numbers", np.array(issues.no_box)))
    if issues.no_area:
        findings.append(make_finding("area-missing", entries.split, issues.no_area, total=len(entries.boxes)))
    if issues.no_crowd:
        findings.append(make_finding("crowd-missing", entries.split, issues.no_crowd, total=len(entries.boxes)))
    return findings
