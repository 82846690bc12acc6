"""Analysis of one set of detections for reports: curves, calibration, mistakes and groups, from one matching."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.data.annotations import Annotations
from detection.evaluation.breakdown import Breakdown, break_down
from detection.evaluation.coco_evaluator import Result
from detection.evaluation.curves import (
    Calibration,
    ImageScores,
    ThresholdCurve,
    calibrate,
    confusion_matrix,
    score_images,
    threshold_curve,
)
from detection.evaluation.groups import Group, groups_by_crowdedness, groups_by_shape, groups_by_size
from detection.evaluation.matches import Matches, match


@dataclass(frozen=True)
class Analysis:
    """The parts are documented in the modules that compute them.

    Attributes:
        curves: one for each class.
        thresholds: the recommended one of each class, None where there is none; `confusion` and `images` are at these.
    """

    matches: Matches
    curves: list[ThresholdCurve]
    thresholds: list[float | None]
    confusion: np.ndarray
    breakdown: Breakdown
    calibration: Calibration
    by_size: list[Group]
    by_shape: list[Group]
    by_crowdedness: list[Group]
    images: ImageScores

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values; NaN is null."""
        names = self.matches.annotations.class_names
        numbers = self.matches.evaluation.to_json()
        for name, curve in zip(names, self.curves, strict=True):
            at_best = curve.at_best() or (None, None, None)
            numbers["per_class"][name] |= dict(
                zip(("threshold", "precision", "recall", "F1"), (curve.best, *at_best), strict=True)
            )
        calibration = {
            "expected_calibration_error": self.calibration.error,
            "score": self.calibration.score.tolist(),
            "precision": self.calibration.precision.tolist(),
            "count": self.calibration.count.tolist(),
        }
        file_names = self.matches.annotations.file_names.tolist()
        images = zip(
            file_names, *(a.tolist() for a in (self.images.right, self.images.wrong, self.images.missed)), strict=True
        )
        content = {
            "numbers": numbers,
            "AP_by_IoU": dict(zip(self.matches.thresholds.round(2).tolist(), self.by_threshold(), strict=True)),
            "confusion": {"classes": [*names, "background"], "counts": self.confusion.tolist()},
            "errors": {"AP50": self.breakdown.ap50, "costs": self.breakdown.costs, "counts": self.breakdown.counts},
            "calibration": calibration,
            "by_size": [asdict(group) for group in self.by_size],
            "by_shape": [asdict(group) for group in self.by_shape],
            "by_crowdedness": [asdict(group) for group in self.by_crowdedness],
            "images": {name: {"right": r, "wrong": w, "missed": m} for name, r, w, m in images},
        }
        return clean(content)

    def by_threshold(self) -> list[float]:
        """AP at each IoU threshold."""
        precision = self.matches.precision
        known = precision[0, 0] > -1
        return precision[:, :, known].mean(axis=(1, 2)).tolist() if known.any() else [math.nan] * len(precision)


def analyze(annotations: Annotations, results: Sequence[Result]) -> Analysis:
    """Match detections with objects and compute all parts.

    Raises:
        UserError: a result of an image or category that the annotations do not have, or a malformed one.
    """
    matches = match(annotations, results)
    curves = [threshold_curve(matches, label) for label in range(1, len(annotations.class_names) + 1)]
    thresholds = [curve.best for curve in curves]
    return Analysis(
        matches=matches,
        curves=curves,
        thresholds=thresholds,
        confusion=confusion_matrix(matches, thresholds),
        breakdown=break_down(matches),
        calibration=calibrate(matches),
        by_size=groups_by_size(matches),
        by_shape=groups_by_shape(matches),
        by_crowdedness=groups_by_crowdedness(matches),
        images=score_images(matches, thresholds),
    )


def clean(value: Any) -> Any:
    """Replace NaN and infinity by None at all depths, as JSON has neither."""
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
