"""Runs a detector on the images of a data set or a folder, and keeps its boxes in a journal."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.core.errors import UserError
from detection.core.files import shown
from detection.core.interrupts import interrupts_at_checks
from detection.core.progress import progress_bar
from detection.data.annotations import MIN_SIDE, Annotations
from detection.data.image_io import image_sizes, images_below, read_image
from detection.evaluation.journal import Journal
from detection.inference.batching import describe_failure, detect_in_batches
from detection.inference.predictor import Detections, Detector
from detection.inference.timing import Timing
from detection.models.postprocess import batched_nms_topk

NMS_THRESHOLD = 0.5
"""Detectors are evaluated with more overlap than this. Of labels, the lower of two such boxes is the same object."""


def folder_annotations(folder: str | Path) -> tuple[Annotations, list[str]]:
    """The images of a folder and its subfolders as annotations without classes, and why others cannot be read.

    Raises:
        UserError: it is not a folder, or has no image that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"source {shown(folder)} is not a folder; expected: a folder of images")
    names = images_below(folder)
    sizes = image_sizes([str(folder / name) for name in names])
    failed = [str(size) for size in sizes if isinstance(size, UserError)]
    good = [(name, size) for name, size in zip(names, sizes, strict=True) if not isinstance(size, UserError)]
    if not good:
        raise UserError(f"folder {shown(folder)} has no images" + (f" that can be read: {failed[0]}" if failed else ""))
    annotations = Annotations(
        source=str(folder),
        format="folder",
        images=str(folder),
        class_names=(),
        category_ids=np.zeros(0, np.int64),
        image_ids=np.arange(1, len(good) + 1),
        file_names=np.array([name for name, _ in good]),
        sizes=np.array([size for _, size in good], np.int64),
        offsets=np.zeros(len(good) + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        areas=np.zeros(0),
        crowd=np.zeros(0, bool),
    )
    return annotations, failed


def detect_into_journal(
    predictor: Detector,
    annotations: Annotations,
    rows: Sequence[int],
    ids: dict[str, int],
    journal: Journal,
    *,
    batch_size: int,
) -> list[str]:
    """Detect on the images in `rows` that the journal does not have, and add the boxes of some classes to it.

    While the network processes a batch, the next one is read. Ctrl-C stops between two batches.

    Args:
        ids: class name -> category id of the boxes to keep.

    Returns:
        Why images could not be read or processed; they are not in the journal.
    """
    rows = [row for row in rows if int(annotations.image_ids[row]) not in journal.images]
    failed: list[str] = []

    def read(row: int) -> np.ndarray:
        width, height = annotations.sizes[row].tolist()
        return read_image(path_of(row), (width, height), bgr=True)

    def path_of(row: int) -> Path:
        return Path(annotations.images) / str(annotations.file_names[row])

    with (
        interrupts_at_checks() as check,
        progress_bar(None, "label", len(rows), unit="image") as bar,
        contextlib.closing(
            detect_in_batches(predictor, rows, read, batch_size=batch_size, timing=Timing("images"))
        ) as batches,
    ):
        for batch in batches:
            check()
            done, results = [], []
            for row, _, found in batch:
                if isinstance(found, Exception):
                    failed.append(describe_failure(shown(path_of(row)), found))
                    continue
                done.append(int(annotations.image_ids[row]))
                results += _results(done[-1], found, ids)
            journal.add(done, results)
            bar.update(len(batch))
    return failed


def _results(image_id: int, found: Detections, ids: dict[str, int]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, without second boxes of an object and boxes that are too small to train."""
    tensors = [torch.from_numpy(np.ascontiguousarray(found[name])) for name in ("boxes", "scores", "labels")]
    keep = batched_nms_topk(tensors[0], tensors[1], tensors[2], NMS_THRESHOLD, len(found["names"])).tolist()
    boxes, scores = found["boxes"].astype(np.float64)[keep], found["scores"][keep]
    names = [found["names"][row] for row in keep]
    sides = boxes[:, 2:] - boxes[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": ids[name],
            "bbox": [round(value, 2) for value in (*box[:2], *side)],
            "score": round(score, 4),
        }
        for box, side, name, score in zip(boxes.tolist(), sides.tolist(), names, scores.tolist(), strict=True)
        if name in ids and min(side) >= MIN_SIDE
    ]
