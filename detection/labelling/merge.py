"""Annotations of a data set together with the boxes that a detector adds."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from detection.checkpoint import Classes
from detection.core.boxes import SAME_OBJECT, xywh_to_xyxy
from detection.core.errors import UserError
from detection.core.text import did_you_mean
from detection.data.annotations import Annotations

CLASS_LISTS = ("data", "detector")


@dataclass(frozen=True)
class MergedClasses:
    """The classes of a data set and of a detector, by name."""

    names: tuple[str, ...]
    """By ascending category id."""
    ids: tuple[int, ...]
    added: tuple[str, ...]
    """Classes that the detector adds."""
    new_id: dict[int, int]
    """Category id in the data -> category id of the same class in `ids`."""

    @property
    def id_of_added(self) -> dict[str, int]:
        """Name of each added class -> its category id."""
        return {name: number for name, number in zip(self.names, self.ids, strict=True) if name in self.added}


@dataclass(frozen=True)
class AddedBoxes:
    """m boxes that a detector adds; all arrays have one row for each."""

    image_ids: np.ndarray
    """int64 [m]"""
    category_ids: np.ndarray
    """int64 [m]"""
    boxes: np.ndarray
    """float64 [m, 4], xywh in pixels"""
    scores: np.ndarray
    """float64 [m]"""
    doubtful: np.ndarray
    """bool [m]: whether training must ignore the box. Its score is below the threshold, or it lies where the data have
    an object of another class."""
    source: str
    """Name of the detector."""

    @staticmethod
    def of(results: Sequence[dict[str, Any]], data: Annotations, score: float, source: str) -> "AddedBoxes":
        """From detections in COCO's results format, in the order of image ids and descending scores.

        Args:
            data: the annotations of the data.
            score: lowest score of boxes that are not doubtful.
        """
        results = sorted(results, key=lambda result: (result["image_id"], -result["score"]))
        image_ids = np.array([result["image_id"] for result in results], np.int64)
        boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        scores = np.array([result["score"] for result in results], np.float64)
        return AddedBoxes(
            image_ids=image_ids,
            category_ids=np.array([result["category_id"] for result in results], np.int64),
            boxes=boxes,
            scores=scores,
            doubtful=(scores < score) | _on_annotations(image_ids, boxes, data),
            source=source,
        )

    def counts(self, classes: MergedClasses) -> list[tuple[str, int, int, int]]:
        """For each added class (name, boxes, doubtful boxes, images with either)."""
        counts = []
        for name, number in classes.id_of_added.items():
            of_class = self.category_ids == number
            doubtful = int((of_class & self.doubtful).sum())
            images = len(np.unique(self.image_ids[of_class]))
            counts.append((name, int(of_class.sum()) - doubtful, doubtful, images))
        return counts


def _on_annotations(image_ids: np.ndarray, boxes: np.ndarray, data: Annotations) -> np.ndarray:
    """bool [m]: whether a box has an IoU above `SAME_OBJECT` with an annotation of its image, crowd regions excepted.

    Args:
        image_ids: int64 [m], ascending.
        boxes: float64 [m, 4], xywh.
    """
    found = np.zeros(len(boxes), bool)
    row_of = {int(image_id): row for row, image_id in enumerate(data.image_ids)}
    ids, starts = np.unique(image_ids, return_index=True)
    for image_id, start, end in zip(ids.tolist(), starts, [*starts[1:], len(boxes)], strict=True):
        row, mine = row_of[image_id], slice(start, end)
        rows = np.arange(data.offsets[row], data.offsets[row + 1])
        rows = rows[~data.crowd[rows]]
        if len(rows):
            pairs = [torch.from_numpy(xywh_to_xyxy(some)) for some in (boxes[mine], data.boxes[rows])]
            found[mine] = (box_iou(pairs[0], pairs[1]).amax(dim=1) > SAME_OBJECT).numpy()
    return found


def merge_classes(
    data: Annotations, detector: Classes, chosen: Collection[str] | None = None, order: str = CLASS_LISTS[0]
) -> MergedClasses:
    """The union of the classes of `data` and of a detector.

    Args:
        chosen: of the detector's classes; None: all.
        order: "data": the classes of the data with their ids, then those of the detector that the data lack with the
            next ids. "detector": the classes of the detector with its ids, then those that only the data have.

    Raises:
        UserError: an unknown class in `chosen`, or the detector has no class that the data lack.
    """
    for name in chosen or ():
        if name not in detector.names:
            hint = did_you_mean(name, detector.names)
            raise UserError(f"unknown class {name!r}{hint}; classes of the detector: {', '.join(detector.names)}")
    own = dict(zip(data.class_names, data.category_ids.tolist(), strict=True))
    offered = dict(zip(detector.names, detector.ids, strict=True))
    added = tuple(name for name in offered if name not in own and (chosen is None or name in chosen))
    if not added:
        raise UserError(
            f"{data.source} has annotations of all classes that the detector would add "
            f"({', '.join(list(chosen or offered)[:5])}, …): there is nothing to label"
        )
    if order == "detector" or not own:
        first = {name: number for name, number in offered.items() if name in own or name in added}
    else:
        first = dict(own)
    following = max(first.values(), default=0) + 1
    rest = [name for name in (*own, *added) if name not in first]
    merged = first | {name: number for number, name in enumerate(rest, following)}
    merged = dict(sorted(merged.items(), key=lambda item: item[1]))
    return MergedClasses(
        tuple(merged), tuple(merged.values()), added, {number: merged[name] for name, number in own.items()}
    )


def merge_annotations(data: Annotations, classes: MergedClasses, added: AddedBoxes) -> Annotations:
    """The annotations of the data and the added boxes, doubtful ones as crowd regions."""
    row_of = {int(image_id): row for row, image_id in enumerate(data.image_ids)}
    added_rows = np.array([row_of[i] for i in added.image_ids.tolist()], np.int64)
    own_rows = np.repeat(np.arange(len(data)), np.diff(data.offsets))
    ids = np.array(classes.ids, np.int64)
    own_ids = np.array([0, *(classes.new_id[i] for i in data.category_ids.tolist())], np.int64)[data.labels]
    rows = np.concatenate([own_rows, added_rows])
    order = np.argsort(rows, kind="stable")
    labels = np.searchsorted(ids, np.concatenate([own_ids, added.category_ids])) + 1
    return replace(
        data,
        class_names=classes.names,
        category_ids=ids,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(data)))]),
        boxes=np.concatenate([data.boxes, added.boxes])[order],
        labels=labels[order],
        areas=np.concatenate([data.areas, added.boxes[:, 2] * added.boxes[:, 3]])[order],
        crowd=np.concatenate([data.crowd, added.doubtful])[order],
    )
