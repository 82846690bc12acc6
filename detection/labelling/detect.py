"""Runs a detector on the images of a data set or a folder, and keeps its boxes in a journal."""

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.core.errors import UserError
from detection.core.files import shown
from detection.core.interrupts import interrupts_at_checks
from detection.core.memory import is_out_of_memory
from detection.core.progress import progress_bar
from detection.data.annotations import MIN_SIDE, Annotations
from detection.data.image_io import image_sizes, images_below, read_image
from detection.evaluation.journal import Journal
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import prefetch_map
from detection.models.postprocess import batched_nms_topk

NMS_THRESHOLD = 0.5
"""Detectors are evaluated with more overlap than this. Of labels, the lower of two such boxes is the same object."""
READERS = min(4, os.cpu_count() or 1)
Loaded = tuple[int, Any]
"""Row in the annotations; what `Detector.prepare` returned, or the error of the image."""


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
    index = Annotations(
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
    return index, failed


def detect_into_journal(
    predictor: Detector,
    index: Annotations,
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
    rows = [row for row in rows if int(index.image_ids[row]) not in journal.images]
    failed: list[str] = []
    bar = progress_bar(None, "label", len(rows), unit="image")
    with (
        interrupts_at_checks() as check,
        bar,
        contextlib.closing(_detections(predictor, index, rows, batch_size)) as batches,
    ):
        for batch in batches:
            check()
            done, results = [], []
            for row, found in batch:
                if isinstance(found, Exception):
                    failed.append(_describe(index, row, found))
                    continue
                done.append(int(index.image_ids[row]))
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


def _detections(
    predictor: Detector, index: Annotations, rows: Sequence[int], batch_size: int
) -> Generator[list[tuple[int, Detections | Exception]], None, None]:
    """Batches of (row, its detections or why there are none)."""

    def read(row: int) -> Any:
        width, height = index.sizes[row].tolist()
        image = read_image(Path(index.images) / str(index.file_names[row]), (width, height), bgr=True)
        return predictor.prepare(image, bgr=True)

    def detect(batch: list[tuple[int, Any]]) -> list[tuple[int, Detections | Exception]]:
        good = [(row, prepared) for row, prepared in batch if not isinstance(prepared, Exception)]
        found: dict[int, Detections | Exception] = {row: e for row, e in batch if isinstance(e, Exception)}
        try:
            detections = predictor.detect([prepared for _, prepared in good])
            found.update(zip((row for row, _ in good), detections, strict=True))
        except Exception as error:
            if len(good) == 1:
                found[good[0][0]] = error
            else:  # one by one, because the others of the batch may work
                found.update(pair for one in good for pair in detect([one]))
        return [(row, found[row]) for row, _ in batch]

    depth = max(2 * batch_size, READERS)
    streams = predictor.num_streams
    with contextlib.closing(prefetch_map(read, rows, threads=READERS, depth=depth)) as loaded:
        batches = _batches(loaded, batch_size)
        with contextlib.closing(prefetch_map(detect, batches, threads=streams, depth=streams)) as results:
            for _, future in results:
                yield future.result()


def _batches(loaded: Iterator[tuple[int, Future[Any]]], size: int) -> Iterator[list[Loaded]]:
    """Batches of (row, prepared image or the error of reading it)."""
    batch: list[Loaded] = []
    for row, future in loaded:
        error = future.exception()
        batch.append((row, error if isinstance(error, Exception) else future.result()))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _describe(index: Annotations, row: int, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    name = shown(Path(index.images) / str(index.file_names[row]))
    if is_out_of_memory(error):
        return f"image {name}: out of memory; lower --batch-size"
    return f"image {name}: unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"
