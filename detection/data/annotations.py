"""Annotations in NumPy arrays, whatever format they were in: no Python object per annotation is kept.

Lists of dicts in a dataset are copied page by page into every worker as reference counts are touched
(pytorch#13246); arrays are shared.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from detection.core.boxes import clip_boxes, xywh_to_xyxy
from detection.core.errors import UserError
from detection.data.columns import ColumnFile, map_columns

MIN_SIDE = 1.0
"""Boxes with a side below this many pixels, once clipped to the image, are not trained on."""


COLUMNS = ("category_ids", "image_ids", "file_names", "sizes", "offsets", "boxes", "labels", "areas", "crowd")
"""Names of the arrays of an Annotations."""


@dataclass(frozen=True)
class ImageSets:
    """The data sets that the images of an Annotations come from. s sets, n images, k classes."""

    names: tuple[str, ...]
    of_image: np.ndarray
    """int64 [n], 0…s-1"""
    complete: np.ndarray
    """bool [s, k]: every object of the class in the images of the set has a box."""
    weights: tuple[float, ...]
    """How often an epoch has each image of the set."""


@dataclass(frozen=True)
class Annotations:
    """All images and boxes of one split of a data set. n images, m boxes, k classes.

    Boxes of image i are rows `offsets[i]:offsets[i + 1]`. They are kept as they stand in the file (xywh,
    unclipped), since evaluation must see them so; `training_boxes` gives what a detector learns from.
    """

    source: str
    """The annotation file or folder, for messages."""
    format: str
    """coco, voc or yolo"""
    images: str
    """The folder that `file_names` are relative to."""
    class_names: tuple[str, ...]
    """In the order of `category_ids`; label 1 is the first (0 is background)."""
    category_ids: np.ndarray
    """int64 [k], original ids, ascending (of several sets: see `combine`): label l stands for category_ids[l - 1]."""
    image_ids: np.ndarray
    """int64 [n]"""
    file_names: np.ndarray
    """str [n], relative to `images`, or absolute"""
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
    """What the file lacked and what was assumed instead, for messages."""
    sets: ImageSets | None = None
    """Where training images come from several sets, or from one with incomplete annotations."""
    mapped: ColumnFile | None = None
    """The file that the arrays are mapped from, if any. Another process opens it instead of receiving copies."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.mapped is not None:
            for name, array in self.mapped.columns.items():
                if state[name] is array:
                    del state[name]
            state["mapped"] = self.mapped.path, self.mapped.digest
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["mapped"] is not None:
            path, digest = state["mapped"]
            file = map_columns(path, check=False)
            if file.digest != digest:
                raise UserError(f"{state['source']}: its cache {path} was written anew meanwhile; start again")
            state = {**file.columns, **state, "mapped": file}
        self.__dict__.update(state)

    def training_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Objects of image i: boxes float32 [b, 4] xyxy, clipped to the image, and labels int64 [b]; none too small."""
        return self._clipped(i, crowd=False)

    def ignored_regions(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Crowd regions of image i, like `training_boxes`: what lies in them is neither object nor background."""
        return self._clipped(i, crowd=True)

    def _clipped(self, i: int, *, crowd: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(self.offsets[i], self.offsets[i + 1])
        boxes = clip_boxes(xywh_to_xyxy(self.boxes[rows]), self.sizes[i])
        keep = (self.crowd[rows] == crowd) & _large_enough(boxes)
        return boxes[keep].astype(np.float32), self.labels[rows][keep]

    def part(self, images: Sequence[int] | np.ndarray) -> "Annotations":
        """The annotations of some images only, in the order of `images` (rows)."""
        images = np.asarray(images, np.int64)
        counts = np.diff(self.offsets)[images]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[images] - offsets[:-1], counts)
        of_images = {name: getattr(self, name)[images] for name in ("image_ids", "file_names", "sizes")}
        of_boxes = {name: getattr(self, name)[rows] for name in ("boxes", "labels", "areas", "crowd")}
        sets = self.sets and replace(self.sets, of_image=self.sets.of_image[images])
        return replace(self, offsets=offsets, sets=sets, **of_images, **of_boxes)

    def fingerprint(self) -> str:
        """A digest of everything that training and evaluation use, except the pixels."""
        digest = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        for name in COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def report(self) -> str:
        """One line for the log: counts, and what training will clip or drop (the first five dropped named)."""
        image_of_box = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        xyxy = xywh_to_xyxy(self.boxes)
        clipped = clip_boxes(xyxy, self.sizes[image_of_box])
        bad = ~_large_enough(clipped) & ~self.crowd
        outside = (np.abs(clipped - xyxy).max(axis=1, initial=0) > 0.5) & ~bad & ~self.crowd
        empty = int((np.diff(self.offsets) == 0).sum())
        text = f"{self.source}: {len(self)} images, {len(self.boxes)} boxes, {len(self.class_names)} classes"
        extra = []
        if empty:
            extra.append(f"{empty} images without boxes (kept)")
        if self.crowd.any():
            extra.append(f"{int(self.crowd.sum())} crowd regions (ignored)")
        if outside.any():
            extra.append(f"{int(outside.sum())} boxes clipped to the image")
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


def _large_enough(xyxy: np.ndarray) -> np.ndarray:
    return ((xyxy[:, 2:] - xyxy[:, :2]) >= MIN_SIDE).all(axis=1)
