"""Precision and recall against the score threshold, calibration, confusion matrix, and results for each image."""

from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from detection.evaluation.matches import Matches

CALIBRATED_FROM = 0.05
"""The calibration ignores detections of lower scores, which are the majority and are never drawn."""
BINS = 10
MATRIX_IOU = 0.5


@dataclass(frozen=True)
class ThresholdCurve:
    """Precision, recall and F1 of a class at IoU 0.5 against the score threshold, one entry for each different score.

    Attributes:
        threshold: float64 [s], falling: detections with at least this score are kept.
        best: the recommended threshold, which maximizes F1 and is not equal to any score. None if no detection is
            right.
    """

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best: float | None

    def at_best(self) -> tuple[float, float, float] | None:
        """Precision, recall and F1 at the recommended threshold."""
        if self.best is None:
            return None
        i = int(np.argmax(self.f1))
        return float(self.precision[i]), float(self.recall[i]), float(self.f1[i])


def threshold_curve(matches: Matches, label: int) -> ThresholdCurve:
    """The curve of a class; empty where it has neither detections nor objects."""
    rows = matches.rows(label)
    right, wrong, score = matches.right(0)[rows], matches.wrong(0)[rows], matches.score[rows]
    objects = int((matches.counted & (matches.annotations.labels == label)).sum())
    true, false = np.cumsum(right), np.cumsum(wrong)
    # The last one of each group of equal scores: a threshold keeps all of the group or none.
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(score) else np.zeros(0, int)
    true, false, threshold = true[last], false[last], score[last]
    precision = true / np.maximum(true + false, 1)
    recall = true / max(objects, 1)
    f1 = 2 * true / np.maximum(objects + true + false, 1)
    best = None
    if len(f1) and f1.max() > 0:
        i = int(np.argmax(f1))
        # Half way to the next lower score, so that rounding of scores changes nothing.
        below = threshold[i + 1] if i + 1 < len(threshold) else 0.0
        best = float((threshold[i] + below) / 2)
    return ThresholdCurve(threshold, precision, recall, f1, best)


def kept(matches: Matches, thresholds: list[float | None]) -> np.ndarray:
    """bool [n]: detections of at least their class's threshold; a class without one keeps none."""
    limits = np.array([np.inf, *(np.inf if value is None else value for value in thresholds)])
    return matches.score >= limits[matches.label]


@dataclass(frozen=True)
class Calibration:
    """Scores against the share of detections that are right (IoU 0.5), in `BINS` bins of equal width over [0, 1].

    Attributes:
        score: mean score of each bin; NaN where it is empty.
        precision: share that is right; NaN where it is empty.
        count: detections in each bin.
        error: the expected calibration error (arXiv 1706.04599; for detectors arXiv 2004.13546): the mean of
            |precision - score| over the bins, weighted by their counts; NaN without detections.
    """

    score: np.ndarray
    precision: np.ndarray
    count: np.ndarray
    error: float


def calibrate(matches: Matches) -> Calibration:
    """Calibration of all classes together, for scores from `CALIBRATED_FROM`, without detections on crowd regions."""
    chosen = (matches.score >= CALIBRATED_FROM) & ~matches.ignored[0]
    score, right = matches.score[chosen], matches.right(0)[chosen]
    bins = np.clip((score * BINS).astype(int), 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(bins, score, BINS) / count
        precision = np.bincount(bins, right, BINS) / count
    known = count > 0
    error = float((np.abs(precision - mean_score)[known] * count[known]).sum() / count.sum()) if known.any() else np.nan
    return Calibration(mean_score, precision, count, float(error))


def confusion_matrix(matches: Matches, thresholds: list[float | None]) -> np.ndarray:
    """The confusion matrix at the thresholds: int64 [classes + 1, classes + 1], rows are the ground truth.

    The last row is background (false positives without an object), the last column missed objects. COCOeval matches
    without regard to classes (useCats = 0): by descending score, each detection gets the free object with the highest
    IoU of at least 0.5. So the diagonal may differ slightly from the true positives of AP, where each class is matched
    by itself.
    """
    annotations, size = matches.annotations, len(matches.annotations.class_names) + 1
    matrix = np.zeros((size, size), np.int64)
    chosen = np.flatnonzero(kept(matches, thresholds))
    truth_label = np.full(len(chosen), size)
    found = np.zeros(len(annotations.boxes), bool)
    ignored = np.zeros(len(chosen), bool)
    evaluator = COCOeval(iouType="bbox")
    params = evaluator.params
    params.useCats, params.catIds, params.iouThrs = 0, [-1], np.array([MATRIX_IOU])
    order = np.argsort(matches.image[chosen], kind="stable")
    bounds = np.searchsorted(matches.image[chosen][order], np.arange(len(annotations) + 1))
    for i in range(len(annotations)):
        places = order[bounds[i] : bounds[i + 1]]
        objects = range(annotations.offsets[i], annotations.offsets[i + 1])
        params.maxDets = [max(1, len(places))]
        evaluator._gts[i, -1] = [
            {
                "id": row + 1,
                "bbox": annotations.boxes[row],
                "area": 1.0,
                "iscrowd": int(annotations.crowd[row]),
                "ignore": int(annotations.crowd[row]),
            }
            for row in objects
        ]
        evaluator._dts[i, -1] = [
            {
                "id": int(place) + 1,
                "bbox": matches.box[chosen[place]],
                "area": 1.0,
                "score": matches.score[chosen[place]],
            }
            for place in places
        ]
        evaluator.ious[i, -1] = evaluator.computeIoU(i, -1)
        decided = evaluator.evaluateImg(i, -1, params.areaRng[0], params.maxDets[0])
        if decided is None:
            continue
        at = np.array(decided["dtIds"], int) - 1
        got = decided["dtMatches"][0].astype(int) - 1
        ignored[at] = decided["dtIgnore"][0]
        truth_label[at[got >= 0]] = annotations.labels[got[got >= 0]]
        found[got[got >= 0]] = True
    taken_for = matches.label[chosen]
    np.add.at(matrix, (truth_label[~ignored] - 1, taken_for[~ignored] - 1), 1)
    missed = matches.counted & ~found
    np.add.at(matrix, (annotations.labels[missed] - 1, np.full(int(missed.sum()), size - 1)), 1)
    return matrix


@dataclass(frozen=True)
class ImageScores:
    """Results for each image at the recommended thresholds, IoU 0.5: int64 [images] each."""

    right: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """float64 [images]; 1 for an image without objects and without detections."""
        asked = 2 * self.right + self.wrong + self.missed
        return np.where(asked == 0, 1.0, 2 * self.right / np.maximum(asked, 1))


def score_images(matches: Matches, thresholds: list[float | None]) -> ImageScores:
    chosen, size = kept(matches, thresholds), len(matches.annotations)
    right, wrong = matches.right(0) & chosen, matches.wrong(0) & chosen
    found = np.zeros(len(matches.annotations.boxes), bool)
    found[matches.truth[0][right]] = True
    missed = matches.counted & ~found
    return ImageScores(
        np.bincount(matches.image[right], minlength=size),
        np.bincount(matches.image[wrong], minlength=size),
        np.bincount(matches.image_of_object[missed], minlength=size),
    )
