"""Write a fixed copy of a dataset as a COCO file, and a list of the changes. The source files are not changed.

Only faults with an unambiguous correction are fixed; the others are listed as unfixed.
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
from detection.doctor.duplicate_checks import group_identical_files
from detection.doctor.entries import Entries, entries_from_coco
from detection.doctor.findings import Finding
from detection.doctor.fix_images import ImagePlan, plan_images
from detection.doctor.image_checks import UNPROBED, ProbedImages
from detection.doctor.read_sets import read_json
from detection.doctor.run_checks import CheckedDataset, Report, check_set


@dataclass(frozen=True)
class Change:
    """One change: `what` is a fixed text; `image` and `annotation` identify what was changed."""

    what: str
    image: str | None = None
    annotation: int | None = None
    detail: str = ""


@dataclass
class RepairedDataset:
    """The fixed copy of a dataset.

    Attributes:
        content: content of the COCO file.
        changes: all changes, in order.
        unfixed: descriptions of faults without an unambiguous correction.
        remaining: findings in the copy.
    """

    content: dict[str, Any]
    changes: list[Change]
    unfixed: list[str]
    remaining: list[Finding] = field(default_factory=list)

    def summary(self) -> str:
        """Number of changes of each kind, unfixed faults and remaining errors, as lines of text."""
        counts = Counter(change.what for change in self.changes)
        lines = [f"  {count:6d}  {what}" for what, count in counts.items()] or ["  no changes"]
        lines += [f"  not changed: {text}" for text in self.unfixed]
        errors = [found for found in self.remaining if found.severity == "error"]
        lines += [f"  still an error: {found.message} ({found.code})" for found in errors]
        return "\n".join(lines)


def fix_report(report: Report, out: Path) -> list[tuple[Path, RepairedDataset]]:
    """Write the fixed copy OUT.json, with two splits also OUT_val.json, and the changes of each in OUT.changes.json.

    Raises:
        UserError: a source file can no longer be read, or a file cannot be written.
    """
    leaked = leaked_rows(report)
    written = []
    for number, checked in enumerate(report.sets):
        path, list_file = output_paths(out, number, checked.original.split)
        fixed = fix_set(checked, leaked if number == 0 else ())
        text = json.dumps(fixed.content)
        write_output(path, lambda file, text=text: file.write(text.encode()))
        changes = {"changes": [_without_empty(asdict(change)) for change in fixed.changes], "left": fixed.unfixed}
        text = json.dumps(changes, indent=1)
        write_output(list_file, lambda file, text=text: file.write(text.encode()))
        written.append((path, fixed))
    return written


def output_paths(out: Path, number: int, split: str) -> tuple[Path, Path]:
    """Paths of the fixed copy of a split, and of the list of its changes; `number` is 0 for the first split."""
    path = out if number == 0 else out.with_name(f"{out.stem}_{split}{out.suffix}")
    return path, path.with_suffix(".changes.json")


def leaked_rows(report: Report) -> list[int]:
    """Rows of train images whose identical file is also in val."""
    if len(report.sets) < 2:
        return []
    sets = [checked.original for checked in report.sets]
    probes = [probe for checked in report.sets for probe in checked.images.probes]
    paths = [str(entries.path(row)) for entries in sets for row in range(len(entries.file_names))]
    groups = group_identical_files(ProbedImages(probes, report.sets[0].images.thumbnails, 0.0, False), paths)
    first = len(sets[0].file_names)
    in_val = set(groups[first:].tolist()) - {-1}
    return [row for row in range(first) if groups[row] in in_val]


def fix_set(checked: CheckedDataset, leaked: Sequence[int] = ()) -> RepairedDataset:
    """Fix one split.

    Args:
        leaked: rows of images to remove because val has them as well.
    """
    entries = checked.original
    content = read_json(Path(entries.source)) if entries.format == "coco" else to_coco(entries)
    plan = plan_images(checked, leaked)
    changes = [Change(*entry) for entry in plan.changes]
    unfixed = list(plan.unfixed)
    category_rows, kept_categories = _plan_categories(entries, changes, unfixed)
    planned, keep = _plan_annotations(checked, plan, category_rows, content, changes, unfixed)
    changes += [
        Change("ids converted to numbers", detail=f.detail) for f in entries.parse_findings if f.code == "id-text"
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
    result["annotations"] = _build_annotations(checked.original, planned, keep, content["annotations"], plan, changes)
    fixed = RepairedDataset(result, changes, unfixed)
    fixed.remaining = _recheck(checked, result, plan)
    return fixed


def to_coco(entries: Entries) -> dict[str, Any]:
    """The content of a COCO file with one entry per row, for datasets in other formats."""
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


def _plan_categories(entries: Entries, changes: list[Change], unfixed: list[str]) -> tuple[np.ndarray, list[int]]:
    """The new category row of each row's boxes (-1: none), and the rows to keep."""
    target = np.arange(len(entries.category_ids))
    first_of: dict[str, int] = {}
    by_id: dict[int, int] = {}
    for row in np.argsort(entries.category_ids, kind="stable").tolist():
        name, number = entries.category_names[row], int(entries.category_ids[row])
        if number < 0 or not name:
            target[row] = -1
            changes.append(Change("category without id or name removed", detail=f"entry {row + 1}"))
        elif number in by_id and entries.category_names[by_id[number]] != name:
            unfixed.append(f"category id {number} is used by {entries.category_names[by_id[number]]!r} and {name!r}")
        elif name in first_of:
            target[row] = first_of[name]
            changes.append(Change("class merged into another one of the same name", detail=f"{name!r}, id {number}"))
        else:
            first_of[name] = row
        by_id.setdefault(number, row)
    return target, [row for row in range(len(target)) if target[row] == row]


def _plan_annotations(
    checked: CheckedDataset,
    plan: ImagePlan,
    category_rows: np.ndarray,
    content: dict[str, Any],
    changes: list[Change],
    unfixed: list[str],
) -> tuple[Entries, np.ndarray]:
    """The entries with final boxes, image rows and category rows, and a mask (bool [m]) of the annotations to keep."""
    entries = checked.normalized
    form = box_checks.box_format_of(checked.original)
    if form.name != "xywh" and form.certain:
        changes.append(Change(f"all boxes converted from {form.name} to x, y, width, height"))
    elif form.name != "xywh":
        unfixed.append(f"{len(form.rows)} boxes look like {form.name}, but other boxes do not")
    boxes = entries.boxes.copy()
    for row in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():
        boxes[row] = polygon_box(content["annotations"][row])
        if np.isfinite(boxes[row]).all():
            changes.append(_annotation_change(entries, row, "box taken from the polygon"))
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
    fixed = entries.replace(boxes=boxes, image_rows=images, category_rows=categories, sizes=plan.sizes)
    keep = np.ones(len(boxes), bool)

    def drop(mask: np.ndarray, what: str) -> None:
        for row in np.flatnonzero(mask & keep).tolist():
            changes.append(_annotation_change(entries, row, what))
        keep[mask] = False

    # Annotations of removed images are covered by the change of their image.
    keep[(entries.image_rows >= 0) & (images < 0)] = False
    drop(images < 0, "annotation of an image that is not listed removed")
    drop(categories < 0, "annotation of a category that is not listed removed")
    drop(~np.isfinite(boxes).all(axis=1), "annotation without a box removed")
    if form.name != "xywh" and not form.certain:
        # Clipping would remove the evidence of the other format.
        return fixed, keep
    drop(box_checks.degenerate_mask(fixed), "box without width or height removed")
    drop(box_checks.outside_mask(fixed), "box outside its image removed")
    drop(box_checks.tiny_mask(fixed), "box of less than one pixel removed")
    over = (box_checks.pixels_outside(fixed) > 0) & keep
    if over.any():
        inner = box_checks.clip_to_image(boxes[over], box_checks.image_sizes_of_boxes(fixed)[over])
        boxes[over] = np.concatenate([inner[:, :2], inner[:, 2:] - inner[:, :2]], axis=1)
        changes += [
            _annotation_change(entries, row, "box clipped to its image") for row in np.flatnonzero(over).tolist()
        ]
        fixed = fixed.replace(boxes=boxes)
    kept = fixed.replace(image_rows=np.where(keep, images, -1))
    duplicates = box_checks.find_overlapping_boxes(kept).duplicates
    drop(np.isin(np.arange(len(boxes)), duplicates), "duplicate box removed")
    return fixed, keep


def _build_annotations(
    entries: Entries, fixed: Entries, keep: np.ndarray, originals: list[Any], plan: ImagePlan, changes: list[Change]
) -> list[dict[str, Any]]:
    result = []
    used: set[int] = set()
    rows = np.flatnonzero(keep).tolist()
    next_id = int(entries.annotation_ids[rows].max(initial=0)) + 1
    for row in rows:
        entry = dict(originals[row]) if isinstance(originals[row], dict) else {}
        number = int(entries.annotation_ids[row])
        if number < 1 or number in used:
            if entries.format == "coco":
                changes.append(_annotation_change(entries, row, "annotation id replaced", f"{next_id}"))
            number, next_id = next_id, next_id + 1
        used.add(number)
        box = fixed.boxes[row].tolist()
        same = bool(np.array_equal(entries.boxes[row], fixed.boxes[row]))
        area = entries.areas[row] * float(np.prod(plan.scale[entries.image_rows[row]][:2]))
        if not (0 < area <= 1.05 * box[2] * box[3] + 1) and not fixed.crowd[row]:
            if entries.format == "coco":
                changes.append(
                    _annotation_change(entries, row, "area replaced", f"{entry.get('area')} -> {box[2] * box[3]:g}")
                )
            area = box[2] * box[3]
        if "iscrowd" not in entry:
            changes.append(_annotation_change(entries, row, "iscrowd 0 added"))
        scale = plan.scale[entries.image_rows[row]]
        if not (scale == 1).all() and entry.get("segmentation"):
            entry["segmentation"] = _scale_polygons(entry["segmentation"], scale)
        entry |= {
            "id": number,
            "image_id": int(entries.image_ids[fixed.image_rows[row]]),
            "category_id": int(entries.category_ids[fixed.category_rows[row]]),
            "bbox": entry["bbox"] if same and isinstance(entry.get("bbox"), list) else box,
            "area": float(area) if np.isfinite(area) else float(box[2] * box[3]),
            "iscrowd": int(fixed.crowd[row]),
        }
        result.append(entry)
    return result


def _scale_polygons(segmentation: Any, scale: np.ndarray) -> Any:
    """Scale polygons by factors [4]; an RLE mask cannot be scaled and becomes []."""
    if not isinstance(segmentation, list):
        return []
    return [
        [value * float(scale[i % 2]) for i, value in enumerate(part)] for part in segmentation if isinstance(part, list)
    ]


def polygon_box(entry: Any) -> list[float]:
    """Bounding box xywh of an annotation's polygons; NaN if it has none."""
    parts = entry.get("segmentation") if isinstance(entry, dict) else None
    try:
        points = np.concatenate([np.asarray(part, np.float64).reshape(-1, 2) for part in parts])  # type: ignore[union-attr]
        low, high = points.min(axis=0), points.max(axis=0)
    except (TypeError, ValueError):
        return [np.nan] * 4
    return [*low.tolist(), *(high - low).tolist()]


def _recheck(checked: CheckedDataset, content: dict[str, Any], plan: ImagePlan) -> list[Finding]:
    """Findings in the fixed copy; uses the existing probes of the images."""
    entries = checked.original
    copy = entries_from_coco(content, "the fixed copy", entries.split, entries.folder)
    rows = np.flatnonzero(plan.keep).tolist()
    # Images with a corrected file name have not been opened.
    probes = [UNPROBED if plan.names[row] != entries.file_names[row] else checked.images.probes[row] for row in rows]
    images = ProbedImages(probes, checked.images.thumbnails[rows], 0.0, checked.images.decoded)
    return check_set(copy, images)[0]


def _annotation_change(entries: Entries, row: int, what: str, detail: str = "") -> Change:
    image = int(entries.image_rows[row])
    return Change(
        what, str(entries.file_names[image]) if image >= 0 else None, int(entries.annotation_ids[row]), detail
    )


def _without_empty(change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in change.items() if value not in (None, "")}
