"""The matches between detections and objects that COCOeval finds, as arrays, and AP of any subset of them.

All analysis of a detector's mistakes uses these arrays: pycocotools matches the boxes once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask

from detection.data.annotations import Annotations
from detection.evaluation.coco_evaluator import CocoEvaluator, Evaluation, Result, summarize

RECALLS = np.linspace(0.0, 1.0, 101)
"""COCO's recall thresholds, at which precision is read and averaged."""


@dataclass(frozen=True)
class Matches:
    """Detections of one set of images against its ground truth. n detections, m objects, T IoU thresholds.

    Detections are sorted by class, then by descending score (ties as in COCOeval). Those beyond the 100 best of an
    image and class, which COCOeval ignores, are not included.
    """

    annotations: Annotations
    evaluation: Evaluation
    """The metrics of the evaluator."""
    precision: np.ndarray
    """float64 [T, 101, classes]: the evaluator's precision at `RECALLS`; -1 where a class has no object."""
    thresholds: np.ndarray
    """float64 [T]: 0.50, 0.55, … 0.95"""
    image: np.ndarray
    """int64 [n], row of the image in `annotations`"""
    label: np.ndarray
    """int64 [n], 1…classes"""
    score: np.ndarray
    """float64 [n]"""
    box: np.ndarray
    """float64 [n, 4], xywh"""
    truth: np.ndarray
    """int64 [T, n], row of the object that it was matched with; -1 for none"""
    ignored: np.ndarray
    """bool [T, n], neither right nor wrong: on a crowd region"""
    offsets: np.ndarray
    """int64 [classes + 1]: detections of label l are `offsets[l - 1]:offsets[l]`"""

    def __len__(self) -> int:
        return len(self.score)

    @property
    def counted(self) -> np.ndarray:
        """bool [m]: objects that count, that is, no crowd regions."""
        return ~self.annotations.crowd

    @property
    def image_of_object(self) -> np.ndarray:
        """int64 [m], row of its image in `annotations`"""
        return np.repeat(np.arange(len(self.annotations)), np.diff(self.annotations.offsets))

    def right(self, t: int = 0) -> np.ndarray:
        """bool [n]: true positives at threshold t."""
        return (self.truth[t] >= 0) & ~self.ignored[t]

    def wrong(self, t: int = 0) -> np.ndarray:
        """bool [n]: false positives at threshold t."""
        return (self.truth[t] < 0) & ~self.ignored[t]

    def found(self, t: int = 0) -> np.ndarray:
        """bool [m]: objects that some detection was matched with, whatever its score."""
        found = np.zeros(len(self.annotations.boxes), bool)
        found[self.truth[t][self.truth[t] >= 0]] = True
        return found

    def rows(self, label: int) -> slice:
        """The detections of a class."""
        return slice(int(self.offsets[label - 1]), int(self.offsets[label]))


def match(annotations: Annotations, results: Sequence[Result]) -> Matches:
    """Match detections with objects by pycocotools.

    Raises:
        UserError: a result of an image or category that the annotations do not have, or a malformed one.
    """
    evaluator = CocoEvaluator(annotations)
    evaluator.update(results)
    coco = evaluator.run_cocoeval()
    thresholds = np.asarray(coco.params.iouThrs)
    areas, images = len(coco.params.areaRng), len(coco.params.imgIds)
    parts: list[list[Any]] = [[], [], [], []]
    offsets = [0]
    for k in range(len(annotations.class_names)):
        # evalImgs is [class][area][image], flat; the first area is "all".
        looked_at = coco.evalImgs[k * areas * images : k * areas * images + images]
        taken = [e for e in looked_at if e is not None and e["dtIds"]]
        scores = np.concatenate([e["dtScores"] for e in taken]) if taken else np.zeros(0)
        # As accumulate() sorts them.
        order = np.argsort(-scores, kind="mergesort")
        if taken:
            parts[0].append(np.concatenate([e["dtIds"] for e in taken])[order] - 1)
            parts[1].append(np.concatenate([e["dtMatches"] for e in taken], axis=1)[:, order] - 1)
            parts[2].append(np.concatenate([e["dtIgnore"] for e in taken], axis=1)[:, order])
            parts[3].append(scores[order])
        offsets.append(offsets[-1] + len(scores))
    count = offsets[-1]
    empty = [np.zeros(0, np.int64), *[np.zeros((len(thresholds), 0))] * 2, np.zeros(0)]
    place, truth, ignored, score = (
        np.concatenate(part, axis=-1) if part else nothing for part, nothing in zip(parts, empty, strict=True)
    )
    row_of_image = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
    chosen = [results[i] for i in place.tolist()]
    return Matches(
        annotations=annotations,
        evaluation=summarize(annotations, coco),
        precision=coco.eval["precision"][:, :, :, 0, -1],
        thresholds=thresholds,
        image=np.array([row_of_image[result["image_id"]] for result in chosen], np.int64),
        label=np.repeat(np.arange(1, len(offsets)), np.diff(offsets)),
        score=score.astype(np.float64),
        box=np.array([result["bbox"] for result in chosen], np.float64).reshape(count, 4),
        truth=truth.astype(np.int64),
        ignored=ignored.astype(bool),
        offsets=np.array(offsets),
    )


def average_precision(
    right: np.ndarray, wrong: np.ndarray, objects: np.ndarray | float, weight: np.ndarray | None = None
) -> np.ndarray:
    """COCO's AP of a class from its detections, sorted by falling score: the mean precision at 101 recalls.

    Args:
        right, wrong: bool [n], true and false positives; those that are neither are ignored.
        objects: [b], the number of objects (with their weights).
        weight: float [b, n], how often each detection counts in each of b resamples of the images; None: once.

    Returns:
        float64 [b] ([1] without weight); NaN where there is no object.
    """
    objects = np.atleast_1d(np.asarray(objects, np.float64))
    hits = np.flatnonzero(right)
    if weight is None:
        weight = np.ones((1, len(right)))
    precisions = np.zeros((len(weight), len(RECALLS)))
    if len(hits):
        # Precision increases only at hits, so no other places matter.
        true = np.cumsum(weight[:, hits], axis=1)
        claimed = np.cumsum(np.where(right | wrong, weight, 0.0), axis=1)[:, hits]
        # As in COCOeval; before the first hit that counts it is 0 / 0.
        precision = true / (claimed + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = true / objects[:, None]
        padded = np.concatenate([precision, np.zeros((len(weight), 1))], axis=1)
        for b in range(len(weight)):
            precisions[b] = padded[b, np.searchsorted(recall[b], RECALLS, side="left")]
    return np.where(objects > 0, precisions.mean(axis=1), np.nan)


def class_aps(
    matches: Matches, t: int = 0, *, objects: np.ndarray | None = None, detections: np.ndarray | None = None
) -> np.ndarray:
    """AP of each class at threshold t on a part of objects and detections, as COCOeval does it with its area ranges.

    Objects outside of the part are ignored, and so are detections that were matched with them, and those matched
    with nothing that are outside of the part themselves.

    Args:
        objects: bool [m]; None: all.
        detections: bool [n]; None: all.

    Returns:
        float64 [classes]; NaN for a class without objects in the part.
    """
    counted = matches.counted if objects is None else matches.counted & objects
    right, wrong = matches.right(t), matches.wrong(t)
    # -1, matched with nothing, picks the False at the end.
    right = right & np.append(counted, False)[matches.truth[t]]
    if detections is not None:
        wrong = wrong & detections
    totals = np.bincount(matches.annotations.labels[counted], minlength=len(matches.offsets))
    return np.array(
        [
            average_precision(right[matches.rows(k)], wrong[matches.rows(k)], totals[k])[0]
            for k in range(1, len(matches.offsets))
        ]
    )


def mean_ap(aps: np.ndarray) -> float:
    """Mean over the classes that have objects; NaN where none has."""
    known = aps[~np.isnan(aps)]
    return float(known.mean()) if known.size else float("nan")


def overlaps(matches: Matches) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image by image: rows of its detections [d], rows of its objects without crowd [g], and their IoU [d, g]."""
    order = np.argsort(matches.image, kind="stable")
    bounds = np.searchsorted(matches.image[order], np.arange(len(matches.annotations) + 1))
    counted = matches.counted
    for i in range(len(matches.annotations)):
        rows = order[bounds[i] : bounds[i + 1]]
        objects = np.arange(matches.annotations.offsets[i], matches.annotations.offsets[i + 1])
        objects = objects[counted[objects]]
        if len(rows) and len(objects):
            iou = mask.iou(matches.box[rows], matches.annotations.boxes[objects], [0] * len(objects))
        else:
            iou = np.zeros((len(rows), len(objects)))
        yield rows, objects, iou
