"""`CocoEvaluator`: COCO's metrics of detections, computed by pycocotools or faster-coco-eval."""

import contextlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.config import EVAL_BACKENDS
from detection.core.errors import UserError, shorten
from detection.core.extras import BACKENDS, require
from detection.core.files import read_file
from detection.core.outputs import write_output
from detection.core.text import text_table
from detection.data.annotations import Annotations

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve metrics of pycocotools in its order. NaN where there is no ground truth."""

LARGEST = 1e9
"""Larger numbers in a detection are an error: areas and overlaps must stay finite."""
LARGEST_FILE = 1 << 30
"""Bytes. A larger results file is an error: in memory it takes ten times as much."""
Result = dict[str, Any]
"""A detection in COCO's results format: image_id, category_id (original ids), bbox [x, y, w, h], score."""


@dataclass(frozen=True)
class Evaluation:
    """The twelve metrics, and for each class (name, AP, AP50, ground-truth boxes without crowd)."""

    numbers: dict[str, float]
    per_class: list[tuple[str, float, float, int]]

    def table(self) -> str:
        """Both as text for the console."""
        metrics = [f"{name} {_text(value):>5}" for name, value in self.numbers.items()]
        lines = ["  ".join(metrics[:6]), "  ".join(metrics[6:])]
        cells = [(name, _text(ap), _text(ap50), str(boxes)) for name, ap, ap50, boxes in self.per_class]
        return "\n".join([*lines, "", text_table(("class", "AP", "AP50", "boxes"), cells, left=1)])

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""

        def clean(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            **{name: clean(value) for name, value in self.numbers.items()},
            "per_class": {
                name: {"AP": clean(ap), "AP50": clean(ap50), "boxes": boxes} for name, ap, ap50, boxes in self.per_class
            },
        }


class CocoEvaluator:
    """Computes COCO's metrics of detections on every image of the annotations, those without a detection included.

        evaluator = CocoEvaluator(annotations)
        evaluator.update(results)
        evaluation = evaluator.compute()

    The ground truth is prepared once; `reset` drops the detections for the next evaluation.

    Args:
        backend: one of `EVAL_BACKENDS`.

    Raises:
        UserError: the backend is unknown or not installed.
    """

    def __init__(self, annotations: Annotations, backend: str = EVAL_BACKENDS[0]) -> None:
        self.annotations = annotations
        self.results: list[Result] = []
        self._coco_class, self._evaluator_class = _backend(backend)
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = self._coco_class()
            self._truth.dataset = annotations.to_coco()
            self._truth.createIndex()

    def reset(self) -> None:
        self.results = []

    def update(self, results: Sequence[Result]) -> None:
        """Add detections. Raises UserError where one is malformed or of an unknown image or category."""
        check_results(self.annotations, results)
        self.results += results

    def compute(self) -> Evaluation:
        """The metrics of all detections that were added.

        Without detections, AP is 0. Without ground truth it is NaN (pycocotools' -1), which must never be averaged nor
        count as the best.
        """
        return summarize(self.annotations, self.run_cocoeval())

    def run_cocoeval(self) -> Any:
        """The evaluator (COCOeval, or its faster twin) after `accumulate` and `summarize`.

        Ids of its ground truth are rows of the annotations plus 1, those of its detections places in `results` plus 1.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            if self.results:
                # loadRes writes into the dicts that it is given.
                detections = self._truth.loadRes([dict(result) for result in self.results])
            else:
                # loadRes([]) raises IndexError.
                detections = self._coco_class()
                detections.dataset = {**self._truth.dataset, "annotations": []}
                detections.createIndex()
            # The default iouType is segm. Params take every image of the ground truth, also those without detections.
            coco = self._evaluator_class(self._truth, detections, iouType="bbox")
            coco.evaluate()
            coco.accumulate()
            coco.summarize()
        return coco


def evaluate_results(
    annotations: Annotations, results: Sequence[Result], backend: str = EVAL_BACKENDS[0]
) -> Evaluation:
    """One evaluation with a `CocoEvaluator`. Raises UserError, see there."""
    evaluator = CocoEvaluator(annotations, backend)
    evaluator.update(results)
    return evaluator.compute()


def summarize(annotations: Annotations, coco: Any) -> Evaluation:
    """The metrics of an evaluator that `CocoEvaluator.run_cocoeval` returned."""
    numbers = {name: _nan(value) for name, value in zip(METRICS, coco.stats, strict=True)}
    # precision is [IoU, recall, class, area, maxDets]; classes follow the sorted category ids.
    precision = coco.eval["precision"][:, :, :, 0, -1]
    per_class = []
    for k, name in enumerate(annotations.class_names):
        boxes = int(((annotations.labels == k + 1) & ~annotations.crowd).sum())
        per_class.append((name, _mean(precision[:, :, k]), _mean(precision[0, :, k]), boxes))
    return Evaluation(numbers, per_class)


def _backend(name: str) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a backend."""
    if name == EVAL_BACKENDS[0]:
        return COCO, COCOeval
    if name != EVAL_BACKENDS[1]:
        raise UserError(f"unknown evaluation backend {name!r}; known: {', '.join(EVAL_BACKENDS)}")
    require(f"eval.backend={name}", *BACKENDS[name])
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    return FasterCOCO, COCOeval_faster


def check_results(annotations: Annotations, results: Any, source: str = "predictions") -> None:
    """Raises UserError naming the first entry that is not a detection of these images and categories.

    pycocotools checks only the first entry; others fail an assertion or are silently wrong.
    """
    if not isinstance(results, list | tuple):
        raise UserError(f"{source}: expected is a list of detections (COCO results format)")
    images, categories = set(annotations.image_ids.tolist()), set(annotations.category_ids.tolist())
    for i, result in enumerate(results):
        where = f"{source}: entry {i + 1}"
        if not isinstance(result, dict):
            raise UserError(f"{where} is not an object with image_id, category_id, bbox and score")
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in result:
                raise UserError(f"{where} has no {key!r}; expected are image_id, category_id, bbox and score")
        for key in ("image_id", "category_id"):
            if not isinstance(result[key], int | float) or isinstance(result[key], bool):
                raise UserError(f"{where}: {key} {shorten(result[key])} is not a number")
        if result["image_id"] not in images:
            raise UserError(f"{where}: image_id {shorten(result['image_id'])} is not in {annotations.source}")
        if result["category_id"] not in categories:
            raise UserError(
                f"{where}: category_id {shorten(result['category_id'])} is not in {annotations.source}; "
                "detections carry the original category ids of the annotation file"
            )
        box = result["bbox"]
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(v) for v in box):
            raise UserError(
                f"{where}: bbox {shorten(box)} is not [x, y, width, height] in pixels, each a number "
                f"up to {LARGEST:.0e}"
            )
        if not _is_number(result["score"]):
            raise UserError(f"{where}: score {shorten(result['score'])} is not a number up to {LARGEST:.0e}")


def read_results(path: str | Path) -> Any:
    """The content of a COCO results file, for `check_results`. Raises UserError where it is absent or not JSON."""
    data = read_file(path, "predictions file", largest=LARGEST_FILE)
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(f"predictions file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise UserError(f"predictions file {path} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"predictions file {path} is not a list of detections: it is nested too deeply") from None


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a COCO results file, atomically. Raises UserError where it cannot be written."""
    write_output(path, lambda file: file.write(json.dumps(list(results)).encode()))


def _is_number(value: Any) -> bool:
    # NaN and infinity are not below any limit either.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan


def _nan(value: float) -> float:
    return math.nan if value < 0 else float(value)


def _text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
