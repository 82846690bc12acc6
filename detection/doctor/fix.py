"""A mended copy of a set, as a COCO file, and the list of what was changed. Nothing is changed in place.

Only what is certain is mended; of the rest it is said that it was left.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection.core.outputs import write_output
from detection.doctor import box_checks
from detection.doctor.duplicates import same_files
from detection.doctor.entries import Entries, entries_from_coco
from detection.doctor.examine import CheckedSet, Report, check_set
from detection.doctor.findings import Finding
from detection.doctor.fix_images import ImagePlan, plan_images
from detection.doctor.image_checks import UNSEEN, Looks
from detection.doctor.read_sets import read_json


@dataclass(frozen=True)
class Change:
    """One thing that was done. `what` is a stable word; an image or annotation is named where it is about one."""

    what: str
    image: str | None = None
    annotation: int | None = None
    detail: str = ""


@dataclass
class Mended:
    """A mended set.

    Attributes:
        content: the COCO file's.
        changes: what was done, in the order in which it was.
        left: what could not be mended for certain, in words.
        remaining: what the doctor finds in the copy.
    """

    content: dict[str, Any]
    changes: list[Change]
    left: list[str]
    remaining: list[Finding] = field(default_factory=list)

    def summary(self) -> str:
        counts = Counter(change.what for change in self.changes)
        lines = [f"  {count:6d}  {what}" for what, count in counts.items()] or ["  nothing had to be changed"]
        lines += [f"  left as it is: {text}" for text in self.left]
        errors = [found for found in self.remaining if found.severity == "error"]
        lines += [f"  still an error: {found.message} ({found.code})" for found in errors]
        return "\n".join(lines)


def fix_report(report: Report, out: Path) -> list[tuple[Path, Mended]]:
    """Write mended copies: OUT.json, and OUT_val.json where there are two sets; beside each OUT.changes.json.

    Raises:
        UserError: the source can no longer be read, or a file cannot be written.
    """
    leaked = leaked_rows(report)
    written = []
    for number, checked in enumerate(report.sets):
        path, list_file = copies_of(out, number, checked.original.split)
        mended = mend(checked, leaked if number == 0 else ())
        text = json.dumps(mended.content)
        write_output(path, lambda file, text=text: file.write(text.encode()))
        changes = {"changes": [_short(asdict(change)) for change in mended.changes], "left": mended.left}
        text = json.dumps(changes, indent=1)
        write_output(list_file, lambda file, text=text: file.write(text.encode()))
        written.append((path, mended))
    return written


def copies_of(out: Path, number: int, split: str) -> tuple[Path, Path]:
    """Where the mended copy of the set with this number goes, and the list of its changes."""
    path = out if number == 0 else out.with_name(f"{out.stem}_{split}{out.suffix}")
    return path, path.with_suffix(".changes.json")


def leaked_rows(report: Report) -> list[int]:
    """Images of train whose file is in val, too, byte for byte."""
    if len(report.sets) < 2:
        return []
    all_entries = [checked.original for checked in report.sets]
    looks = [one for checked in report.sets for one in checked.images.looks]
    paths = [str(entries.path(row)) for entries in all_entries for row in range(len(entries.file_names))]
    groups = same_files(Looks(looks, report.sets[0].images.thumbs, 0.0, False), paths)
    first = len(all_entries[0].file_names)
    in_val = set(groups[first:].tolist()) - {-1}
    return [row for row in range(first) if groups[row] in in_val]


def mend(checked: CheckedSet, leaked: Sequence[int] = ()) -> Mended:
    """The mended content of a set.

    Args:
        leaked: rows of images to leave out, as they are in val.
    """
    entries = checked.original
    content = read_json(Path(entries.source)) if entries.format == "coco" else as_coco(entries)
    plan = plan_images(checked, leaked)
    changes = [Change(*entry) for entry in plan.changes]
    left = list(plan.left)
    category_rows, kept_categories = _plan_categories(entries, changes, left)
    plain, keep = _plan_annotations(checked, plan, category_rows, content, changes, left)
    changes += [
        Change("ids written as numbers", detail=f.detail) for f in entries.parse_findings if f.code == "id-text"
    ]
    result = dict(content)
    result["categories"] = [
        {**content["categories"][row], "id": int(entries.category_ids[row]), "name": entries.category_names[row]}
        for row in kept_categories
    ]
    result["images"] = [
        {
            **content["images"][row],
            "id": int(entries.image_ids[row]),
            "file_name": plan.names[row],
            "width": int(plan.sizes[row, 0]),
            "height": int(plan.sizes[row, 1]),
        }
        for row in np.flatnonzero(plan.keep).tolist()
    ]
    result["annotations"] = _annotations(checked.original, plain, keep, content["annotations"], plan, changes)
    mended = Mended(result, changes, left)
    mended.remaining = _recheck(checked, result, plan)
    return mended


def as_coco(entries: Entries) -> dict[str, Any]:
    """A set of another format as the content of a COCO file, row by row."""
    return {
        "images": [
            {"id": int(i), "file_name": str(name)}
            for i, name in zip(entries.image_ids, entries.file_names, strict=True)
        ],
        "annotations": [
            {"id": number, "bbox": box, "iscrowd": int(crowd)}
            for number, (box, crowd) in enumerate(zip(entries.boxes.tolist(), entries.crowd, strict=True), 1)
        ],
        "categories": [
            {"id": int(i), "name": name} for i, name in zip(entries.category_ids, entries.category_names, strict=True)
        ],
    }


def _plan_categories(entries: Entries, changes: list[Change], left: list[str]) -> tuple[np.ndarray, list[int]]:
    """Row of the category that each row's boxes go to (-1: none), and the rows that are kept."""
    target = np.arange(len(entries.category_ids))
    first_of: dict[str, int] = {}
    by_id: dict[int, int] = {}
    for row in np.argsort(entries.category_ids, kind="stable").tolist():
        name, number = entries.category_names[row], int(entries.category_ids[row])
        if number < 0 or not name:
            target[row] = -1
            changes.append(Change("category without id or name removed", detail=f"entry {row + 1}"))
        elif number in by_id and entries.category_names[by_id[number]] != name:
            left.append(f"category id {number} stands for {entries.category_names[by_id[number]]!r} and for {name!r}")
        elif name in first_of:
            target[row] = first_of[name]
            changes.append(Change("class with the name of another merged into it", detail=f"{name!r}, id {number}"))
        else:
            first_of[name] = row
        by_id.setdefault(number, row)
    return target, [row for row in range(len(target)) if target[row] == row]


def _plan_annotations(
    checked: CheckedSet,
    plan: ImagePlan,
    category_rows: np.ndarray,
    content: dict[str, Any],
    changes: list[Change],
    left: list[str],
) -> tuple[Entries, np.ndarray]:
    """The annotations with their final boxes, images and categories; and which are kept, bool [m]."""
    entries = checked.normalized
    form = box_checks.form_of(checked.original)
    if form.name != "xywh" and form.certain:
        changes.append(Change(f"all boxes converted from {form.name} to x, y, width, height"))
    elif form.name != "xywh":
        left.append(f"{len(form.rows)} boxes look like {form.name}, but not all of them fit so")
    boxes = entries.boxes.copy()
    for row in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():
        boxes[row] = polygon_box(content["annotations"][row])
        if np.isfinite(boxes[row]).all():
            changes.append(_of(entries, row, "box taken from the polygon"))
    images = (
        np.where(entries.image_rows >= 0, plan.target[entries.image_rows], -1)
        if len(plan.target)
        else entries.image_rows
    )
    categories = (
        np.where(entries.category_rows >= 0, category_rows[entries.category_rows], -1)
        if len(category_rows)
        else entries.category_rows
    )
    known = images >= 0
    boxes[known] *= plan.scale[entries.image_rows[known]]
    moved = entries.replace(boxes=boxes, image_rows=images, category_rows=categories, sizes=plan.sizes)
    keep = np.ones(len(boxes), bool)

    def drop(mask: np.ndarray, what: str) -> None:
        for row in np.flatnonzero(mask & keep).tolist():
            changes.append(_of(entries, row, what))
        keep[mask] = False

    # Those of images that were left out are told of with their images.
    keep[(entries.image_rows >= 0) & (images < 0)] = False
    drop(images < 0, "annotation of an image that is not listed removed")
    drop(categories < 0, "annotation of a category that is not listed removed")
    drop(~np.isfinite(boxes).all(axis=1), "annotation without a box removed")
    if form.name != "xywh" and not form.certain:
        # Whoever clips boxes that are in another form loses what shows it.
        return moved, keep
    drop(box_checks.degenerate(moved), "box without width or height removed")
    drop(box_checks.outside(moved), "box outside of its image removed")
    drop(box_checks.tiny(moved), "box of less than a pixel removed")
    over = (box_checks.beyond(moved) > 0) & keep
    if over.any():
        inner = box_checks.clipped(boxes[over], box_checks.box_sizes(moved)[over])
        boxes[over] = np.concatenate([inner[:, :2], inner[:, 2:] - inner[:, :2]], axis=1)
        changes += [_of(entries, row, "box clipped to its image") for row in np.flatnonzero(over).tolist()]
        moved = moved.replace(boxes=boxes)
    second = box_checks.doubles(moved.replace(image_rows=np.where(keep, images, -1)))[0]
    drop(np.isin(np.arange(len(boxes)), second), "second copy of a box removed")
    return moved, keep


def _annotations(
    entries: Entries, plain: Entries, keep: np.ndarray, originals: list[Any], plan: ImagePlan, changes: list[Change]
) -> list[dict[str, Any]]:
    result = []
    used: set[int] = set()
    rows = np.flatnonzero(keep).tolist()
    following = int(entries.annotation_ids[rows].max(initial=0)) + 1
    for row in rows:
        entry = dict(originals[row]) if isinstance(originals[row], dict) else {}
        number = int(entries.annotation_ids[row])
        if number < 1 or number in used:
            if entries.format == "coco":
                changes.append(_of(entries, row, "annotation given an id of its own", f"{following}"))
            number, following = following, following + 1
        used.add(number)
        box = plain.boxes[row].tolist()
        same = bool(np.array_equal(entries.boxes[row], plain.boxes[row]))
        area = entries.areas[row] * float(np.prod(plan.scale[entries.image_rows[row]][:2]))
        if not (0 < area <= 1.05 * box[2] * box[3] + 1) and not plain.crowd[row]:
            if entries.format == "coco":
                changes.append(_of(entries, row, "area written", f"{entry.get('area')} -> {box[2] * box[3]:g}"))
            area = box[2] * box[3]
        if "iscrowd" not in entry:
            changes.append(_of(entries, row, "iscrowd 0 written"))
        scale = plan.scale[entries.image_rows[row]]
        if not (scale == 1).all() and entry.get("segmentation"):
            entry["segmentation"] = _scaled(entry["segmentation"], scale)
        entry |= {
            "id": number,
            "image_id": int(entries.image_ids[plain.image_rows[row]]),
            "category_id": int(entries.category_ids[plain.category_rows[row]]),
            "bbox": entry["bbox"] if same and isinstance(entry.get("bbox"), list) else box,
            "area": float(area) if np.isfinite(area) else float(box[2] * box[3]),
            "iscrowd": int(plain.crowd[row]),
        }
        result.append(entry)
    return result


def _scaled(segmentation: Any, scale: np.ndarray) -> Any:
    """Polygons of an image that was resized; a mask cannot be, and is left out."""
    if not isinstance(segmentation, list):
        return []
    return [
        [value * float(scale[i % 2]) for i, value in enumerate(part)] for part in segmentation if isinstance(part, list)
    ]


def polygon_box(entry: Any) -> list[float]:
    """xywh around an annotation's polygons; NaN where it has none."""
    parts = entry.get("segmentation") if isinstance(entry, dict) else None
    try:
        points = np.concatenate([np.asarray(part, np.float64).reshape(-1, 2) for part in parts])  # type: ignore[union-attr]
        low, high = points.min(axis=0), points.max(axis=0)
    except (TypeError, ValueError):
        return [np.nan] * 4
    return [*low.tolist(), *(high - low).tolist()]


def _recheck(checked: CheckedSet, content: dict[str, Any], plan: ImagePlan) -> list[Finding]:
    """What the doctor says of the copy; its images have been looked at already."""
    entries = checked.original
    copy = entries_from_coco(content, "the mended copy", entries.split, entries.folder)
    rows = np.flatnonzero(plan.keep).tolist()
    # An image that is there under another name has not been opened.
    looks = [UNSEEN if plan.names[row] != entries.file_names[row] else checked.images.looks[row] for row in rows]
    seen = Looks(looks, checked.images.thumbs[rows], 0.0, checked.images.decoded)
    return check_set(copy, seen)[0]


def _of(entries: Entries, row: int, what: str, detail: str = "") -> Change:
    image = int(entries.image_rows[row])
    return Change(
        what, str(entries.file_names[image]) if image >= 0 else None, int(entries.annotation_ids[row]), detail
    )


def _short(change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in change.items() if value not in (None, "")}
