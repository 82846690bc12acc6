"""Detection in image files."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.core.crash_report import keep_trace
from detection.core.errors import UserError
from detection.core.interrupts import interrupts_at_checks
from detection.core.memory import is_out_of_memory
from detection.core.outputs import write_output
from detection.core.progress import progress_bar
from detection.inference.draw import draw_on
from detection.inference.image_urls import read_source
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import AsyncWriter, prefetch_map
from detection.inference.results import Summary, image_json
from detection.inference.sources import Item
from detection.inference.timing import DRAW, NETWORK, READ, RESIZE, WAIT_READ, WAIT_WRITE, WRITE, Timing

JPEG_QUALITY = 92
MAX_JPEG_SIDE = 65_500
"""Largest width or height of a JPEG, in pixels."""
MAX_NAME_BYTES = 230
"""Longest name of a result file without suffix, in bytes, that all usual file systems allow."""
READERS = min(4, os.cpu_count() or 1)
# May exceed the number of cores: writers mostly wait for the disk (detection.core.files.write_atomically).
WRITERS = 4
LoadedImage = tuple[Item, np.ndarray, Any]


def detect_images(
    predictor: Detector,
    items: Sequence[Item],
    out: Path,
    summary: Summary,
    *,
    batch_size: int,
    draw: bool,
) -> None:
    """Write out/NAME.jpg (with `draw`) and then out/NAME.json for each item, and update `summary`.

    While the network processes a batch, the next one is read and the previous one is drawn and written. On Ctrl-C the
    results of all processed batches are written.

    If reading, detection or drawing fails for an image, the reason is added to `summary.failed` and the others
    continue.

    Raises:
        UserError: results cannot be written (a full disk).
    """
    if not items:
        return
    timing = summary.images

    def read(item: Item) -> LoadedImage:
        if len(os.fsencode(Path(item.name).name)) > MAX_NAME_BYTES:
            raise UserError(f"image {item.shown}: its name is too long for the names of results; rename it")
        with timing.stage(READ):
            image = read_source(item.source, bgr=True)
        with timing.stage(RESIZE):
            return item, image, predictor.prepare(image, bgr=True)

    def write(item: Item, image: np.ndarray, detections: Detections) -> None:
        try:
            write_results(item, image, detections)
        except UserError:
            raise
        except Exception as error:
            fail(item, error)

    def write_results(item: Item, image: np.ndarray, detections: Detections) -> None:
        path = out / f"{item.name}.json"
        head = {"image": item.shown, "width": image.shape[1], "height": image.shape[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        if draw:
            with timing.stage(DRAW):
                draw_on(image, detections, bgr=True)
            with timing.stage(WRITE):
                _write_jpeg(out / f"{item.name}.jpg", image)
        with timing.stage(WRITE):
            text = image_json(head, detections).encode()
            write_output(path, lambda file: file.write(text))
        summary.add(timing, detections)

    def detect(batch: list[LoadedImage]) -> list[Detections | None]:
        try:
            with timing.stage(NETWORK):
                return [*predictor.detect([prepared for _, _, prepared in batch])]
        except Exception as error:
            if len(batch) == 1:
                fail(batch[0][0], error)
                return [None]
            # One by one, because the others of the batch may work.
            return [detections for loaded in batch for detections in detect([loaded])]

    def fail(item: Item, error: Exception) -> None:
        summary.failed.append(str(error) if isinstance(error, UserError) else _describe_error(item, error))

    bar = progress_bar(None, "images", len(items), unit="image")
    num_streams = predictor.num_streams
    with (
        interrupts_at_checks() as check,
        bar,
        timing.running(),
        AsyncWriter(threads=WRITERS, depth=2 * max(WRITERS, batch_size)) as writing,
        contextlib.closing(prefetch_map(read, items, threads=READERS, depth=2 * batch_size)) as loaded,
    ):
        batches = _batches(loaded, len(items), batch_size, timing, fail)
        with contextlib.closing(prefetch_map(detect, batches, threads=num_streams, depth=num_streams)) as results:
            for batch, future in results:
                check()
                for (item, image, _), detections in zip(batch, future.result(), strict=True):
                    if detections is None:
                        continue
                    with timing.stage(WAIT_WRITE):
                        writing.submit(write, item, image, detections)
                bar.update(len(batch))


def _batches(
    loaded: Iterator[tuple[Item, Future[LoadedImage]]],
    count: int,
    size: int,
    timing: Timing,
    fail: Callable[[Item, Exception], None],
) -> Iterator[list[LoadedImage]]:
    """Group loaded images into batches of `size`; call `fail` for those that cannot be read."""
    batch: list[LoadedImage] = []
    for number, (item, future) in enumerate(loaded, 1):
        try:
            with timing.stage(WAIT_READ):
                batch.append(future.result())
        except Exception as error:
            fail(item, error)
        if batch and (len(batch) == size or number == count):
            yield batch
            batch = []


def _describe_error(item: Item, error: Exception) -> str:
    if is_out_of_memory(error):
        return f"image {item.shown}: out of memory; lower --batch-size, or cut the image into tiles"
    reason = " ".join(str(error).split())[:300]
    return f"image {item.shown}: unexpected {type(error).__name__}: {reason} (the full trace is in {keep_trace(error)})"


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    longest = max(image.shape[:2])
    if longest > MAX_JPEG_SIDE:
        height, width = (max(1, round(side * MAX_JPEG_SIDE / longest)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    write_output(path, lambda file: file.write(data))
