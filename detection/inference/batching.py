"""Detection on many images: read ahead, detect in batches, and an error of one image does not stop the others."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from detection.core.crash_report import keep_trace
from detection.core.errors import UserError
from detection.core.memory import is_out_of_memory
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import prefetch_map
from detection.inference.timing import NETWORK, RESIZE, WAIT_READ, Timing

READERS = min(4, os.cpu_count() or 1)
T = TypeVar("T")
Loaded = tuple[T, np.ndarray | None, Any]
"""Item; its image; what `Detector.prepare` returned, or the error of reading it."""
Detected = tuple[T, np.ndarray | None, Detections | Exception]
"""Item; its image, None if it could not be read; its detections, or why there are none."""


def detect_in_batches(
    detector: Detector, items: Iterable[T], read: Callable[[T], np.ndarray], *, batch_size: int, timing: Timing
) -> Generator[list[Detected[T]], None, None]:
    """Detect on the image of each item; yields batches in the order of the items.

    While the network processes a batch, the next one is read. Use `contextlib.closing` to stop early.

    Args:
        read: returns an image as uint8 [height, width, 3] in BGR order. It is called in several threads.
        timing: of the stages; what `read` does is measured by itself.
    """

    def load(item: T) -> tuple[np.ndarray, Any]:
        image = read(item)
        with timing.stage(RESIZE):
            return image, detector.prepare(image, bgr=True)

    def detect(prepared: Sequence[Any]) -> list[Detections | Exception]:
        try:
            with timing.stage(NETWORK):
                return [*detector.detect(prepared)] if prepared else []
        except Exception as error:
            if len(prepared) == 1:
                return [error]
            # One by one, because the others of the batch may work.
            return [result for one in prepared for result in detect([one])]

    def detect_batch(batch: list[Loaded[T]]) -> list[Detected[T]]:
        results = iter(detect([prepared for _, _, prepared in batch if not isinstance(prepared, Exception)]))
        return [
            (item, image, prepared if isinstance(prepared, Exception) else next(results))
            for item, image, prepared in batch
        ]

    streams = detector.num_streams
    depth = max(2 * batch_size, READERS)
    with contextlib.closing(prefetch_map(load, items, threads=READERS, depth=depth)) as loaded:
        batches = _batches(loaded, batch_size, timing)
        with contextlib.closing(prefetch_map(detect_batch, batches, threads=streams, depth=streams)) as results:
            for _, future in results:
                yield future.result()


def _batches(
    loaded: Iterator[tuple[T, Future[tuple[np.ndarray, Any]]]], size: int, timing: Timing
) -> Iterator[list[Loaded[T]]]:
    batch: list[Loaded[T]] = []
    for item, future in loaded:
        try:
            with timing.stage(WAIT_READ):
                batch.append((item, *future.result()))
        except Exception as error:
            batch.append((item, None, error))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def describe_failure(image: str, error: Exception) -> str:
    """One line that says why an image has no detections."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"image {image}: out of memory; lower --batch-size, or cut the image into tiles"
    reason = " ".join(str(error).split())[:300]
    return f"image {image}: unexpected {type(error).__name__}: {reason} (the full trace is in {keep_trace(error)})"
