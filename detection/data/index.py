"""COCO annotations in NumPy arrays: one file is read once, and no Python object per annotation is kept.

Lists of dicts in a dataset are copied page by page into every worker as reference counts are touched
(pytorch#13246); arrays are shared.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.errors import UserError

MIN_SIDE = 1.0
"""Boxes with a side below this many pixels, once clipped to the picture, are no training targets."""


@dataclass(frozen=True)
class AnnotationIndex:
    """All images and boxes of one annotation file. n images, m boxes, k classes.

    Boxes of image i are rows `offsets[i]:offsets[i + 1]`. They are kept as they stand in the file (xywh,
    unclipped), since evaluation must see them so; `training_boxes` gives what a detector learns from.
    """

    source: str
    class_names: tuple[str, ...]
    """By ascending category id; label 1 is the first (0 is background)."""
    category_ids: np.ndarray
    """int64 [k], original ids, ascending: label l stands for category_ids[l - 1]."""
    image_ids: np.ndarray
    """int64 [n]"""
    file_names: np.ndarray
    """str [n], relative to the images folder"""
    sizes: np.ndarray
    """int64 [n, 2], width and height in pixels"""
    offsets: np.ndarray
    """int64 [n + 1]"""
    boxes: np.ndarray
    """float64 [m, 4], xywh in pixels"""
    labels: np.ndarray
    """int64 [m], 1…k"""
    areas: np.ndarray
    """float64 [m], the annotation's own area in pixels"""
    crowd: np.ndarray
    """bool [m]"""
    notes: tuple[str, ...] = ()
    """What the file lacked and how that was read, for people."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def training_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float32 [b, 4] xyxy, clipped to the picture, and labels int64 [b]; no crowd, none degenerate."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        boxes = _clip(self.boxes[rows], self.sizes[i])
        keep = ~self.crowd[rows] & _large_enough(boxes)
        return boxes[keep].astype(np.float32), self.labels[rows][keep]

    def report(self) -> str:
        """One line for the log: counts, and what training will clip or drop (the first five dropped named)."""
        image_of_box = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        clipped = _clip(self.boxes, self.sizes[image_of_box])
        xyxy = _xyxy(self.boxes)
        bad = ~_large_enough(clipped) & ~self.crowd
        outside = (np.abs(clipped - xyxy).max(axis=1, initial=0) > 0.5) & ~bad & ~self.crowd
        empty = int((np.diff(self.offsets) == 0).sum())
        text = f"{self.source}: {len(self)} images, {len(self.boxes)} boxes, {len(self.class_names)} classes"
        extra = []
        if empty:
            extra.append(f"{empty} images without boxes (kept)")
        if self.crowd.any():
            extra.append(f"{int(self.crowd.sum())} crowd regions (evaluation only)")
        if outside.any():
            extra.append(f"{int(outside.sum())} boxes clipped to the picture")
        if bad.any():
            names = [
                f"{self.file_names[image_of_box[row]]} {self.boxes[row].tolist()}" for row in np.flatnonzero(bad)[:5]
            ]
            more = ", …" if bad.sum() > 5 else ""
            extra.append(f"{int(bad.sum())} degenerate boxes dropped from training ({', '.join(names)}{more})")
        unused = [n for i, n in enumerate(self.class_names, 1) if not (self.labels == i).any()]
        if unused:
            shown = ", ".join(unused[:5]) + (", …" if len(unused) > 5 else "")
            extra.append(f"{len(unused)} classes without a box ({shown})")
        return "; ".join([text, *extra, *self.notes])

    def to_coco(self) -> dict[str, Any]:
        """A COCO data set of plain Python values, for pycocotools; annotation ids are 1…m, unique and never 0."""
        annotations = []
        for i, image_id in enumerate(self.image_ids.tolist()):
            for row in range(self.offsets[i], self.offsets[i + 1]):
                annotations.append(
                    {
                        "id": row + 1,
                        "image_id": image_id,
                        "category_id": int(self.category_ids[self.labels[row] - 1]),
                        "bbox": self.boxes[row].tolist(),
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowd[row]),
                    }
                )
        return {
            "images": [
                {"id": image_id, "file_name": str(name), "width": int(w), "height": int(h)}
                for image_id, name, (w, h) in zip(self.image_ids.tolist(), self.file_names, self.sizes, strict=True)
            ],
            "annotations": annotations,
            "categories": [
                {"id": int(i), "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }


def read_coco(path: str | Path) -> AnnotationIndex:
    """Read a COCO detection file (instances_*.json).

    Raises:
        UserError: absent, not JSON, not COCO, an annotation of an unknown image or category, duplicate ids; the
            message names the file and the entry.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"annotation file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotation file {path} is not JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"annotation file {path} is not in COCO format: it has no list {key!r} at the top "
                "(expected are images, annotations and categories)"
            )
    return _index(content, str(path))


def _index(content: dict[str, Any], source: str) -> AnnotationIndex:
    categories = sorted(
        (_entry(c, ("id", "name"), "category", i, source) for i, c in enumerate(content["categories"])),
        key=lambda c: c["id"],
    )
    images = [
        _entry(im, ("id", "file_name", "width", "height"), "image", i, source) for i, im in enumerate(content["images"])
    ]
    category_ids = _unique_ids(categories, "category", source)
    image_ids = _unique_ids(images, "image", source)
    if not images:
        raise UserError(f"annotation file {source} has no images")
    if not categories:
        raise UserError(f"annotation file {source} has no categories")
    row_of_image = {int(v): i for i, v in enumerate(image_ids)}
    label_of = {int(v): i + 1 for i, v in enumerate(category_ids)}

    count = len(content["annotations"])
    image_rows = np.empty(count, np.int64)
    labels = np.empty(count, np.int64)
    boxes = np.empty((count, 4), np.float64)
    areas = np.empty(count, np.float64)
    crowd = np.zeros(count, bool)
    no_area = no_crowd = 0
    for row, annotation in enumerate(content["annotations"]):
        _entry(annotation, ("image_id", "category_id", "bbox"), "annotation", row, source)
        name = f"annotation {annotation.get('id', f'number {row + 1}')}"
        try:
            image_rows[row] = row_of_image[annotation["image_id"]]
            labels[row] = label_of[annotation["category_id"]]
            boxes[row] = annotation["bbox"]
            areas[row] = annotation.get("area", np.nan)
        except KeyError as error:
            kind = "image" if annotation["image_id"] not in row_of_image else "category"
            raise UserError(f"{source}: {name} names {kind} {error}, which the file does not have") from None
        except (TypeError, ValueError):
            raise UserError(
                f"{source}: {name} has bbox {annotation['bbox']!r}, area {annotation.get('area')!r}; "
                "expected are four numbers [x, y, width, height] in pixels and one number"
            ) from None
        if not np.isfinite(boxes[row]).all():
            raise UserError(f"{source}: {name} has a bbox that is not finite: {annotation['bbox']}")
        no_area += "area" not in annotation
        no_crowd += "iscrowd" not in annotation
        crowd[row] = bool(annotation.get("iscrowd", 0))
    missing = np.isnan(areas)
    areas[missing] = boxes[missing, 2] * boxes[missing, 3]
    notes = []
    if no_area:
        notes.append(f"{no_area} annotations without area: width x height is taken")
    if no_crowd:
        notes.append(f"{no_crowd} annotations without iscrowd: taken as 0")

    order = np.argsort(image_rows, kind="stable")
    return AnnotationIndex(
        source=source,
        class_names=tuple(str(c["name"]) for c in categories),
        category_ids=category_ids,
        image_ids=image_ids,
        file_names=np.array([str(im["file_name"]) for im in images]),
        sizes=_sizes(images, source),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image_rows, minlength=len(images)))]),
        boxes=boxes[order],
        labels=labels[order],
        areas=areas[order],
        crowd=crowd[order],
        notes=tuple(notes),
    )


def _entry(entry: Any, keys: tuple[str, ...], kind: str, row: int, source: str) -> dict[str, Any]:
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            name = entry.get("id", f"number {row + 1}") if isinstance(entry, dict) else f"number {row + 1}"
            raise UserError(f"{source} is not in COCO format: {kind} {name} has no {key!r}")
    return entry


def _unique_ids(entries: list[dict[str, Any]], kind: str, source: str) -> np.ndarray:
    ids = [entry["id"] for entry in entries]
    for value in ids:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{source}: {kind} id {value!r} is not a whole number")
    if len(set(ids)) != len(ids):
        twice = next(value for value in ids if ids.count(value) > 1)
        raise UserError(f"{source}: {kind} id {twice} is there more than once")
    return np.array(ids, np.int64)


def _sizes(images: list[dict[str, Any]], source: str) -> np.ndarray:
    for image in images:
        for key in ("width", "height"):
            if not isinstance(image[key], int | float) or image[key] < 1:
                raise UserError(f"{source}: image {image['file_name']} has {key} {image[key]!r}")
    return np.array([(im["width"], im["height"]) for im in images], np.int64).reshape(-1, 2)


def _xyxy(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _clip(xywh: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """xywh [m, 4] -> xyxy clipped to width and height ([2] or [m, 2])."""
    limit = np.concatenate([sizes, sizes], axis=-1)
    return np.clip(_xyxy(xywh), 0, limit)


def _large_enough(xyxy: np.ndarray) -> np.ndarray:
    return ((xyxy[:, 2:] - xyxy[:, :2]) >= MIN_SIDE).all(axis=1)
