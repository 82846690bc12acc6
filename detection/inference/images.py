"""Detection in image files."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.core import distributed
from detection.core.crash_report import keep_trace
from detection.core.errors import UserError
from detection.core.interrupts import interrupts_at_checks
from detection.core.memory import is_out_of_memory
from detection.core.outputs import write_output
from detection.core.progress import progress_bar
from detection.inference.draw import draw_on
from detection.inference.image_urls import read_source
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import AsyncWriter, ahead
from detection.inference.results import Summary, image_json
from detection.inference.sources import Item
from detection.inference.timing import DRAW, NETWORK, READ, RESIZE, WAIT_READ, WAIT_WRITE, WRITE, Timing

JPEG_QUALITY = 92
JPEG_SIDE = 65_500
"""A JPEG has no more pixels in width or height."""
LONGEST_NAME = 230
"""Bytes of a name, without suffix, that result files can have in any usual file system."""
READERS = min(4, os.cpu_count() or 1)
# Also more than cores: most of the time they wait until the disk has the file (detection.core.files.write_atomically).
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
    """Write out/NAME.jpg (with `draw`) and then out/NAME.json for each; count in `summary` what was done.

    While the network works on a batch, the next one is read and the one before is drawn and written. On Ctrl-C what
    the network has seen is written to the end.

    An image that cannot be read, detected in or drawn is noted in `summary.failed`, whatever the reason, and the rest
    goes on.

    Raises:
        UserError: results cannot be written (a full disk).
    """
    if not items:
        return
    timing = summary.images

    def read(item: Item) -> LoadedImage:
        if len(os.fsencode(Path(item.name).name)) > LONGEST_NAME:
            raise UserError(f"image {item.shown} has too long a name for results beside it: rename it")
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

    def look(batch: list[LoadedImage]) -> list[Detections | None]:
        try:
            with timing.stage(NETWORK):
                return [*predictor.detect([prepared for _, _, prepared in batch])]
        except Exception as error:
            if len(batch) == 1:
                fail(batch[0][0], error)
                return [None]
            # The others of the batch may be all right.
            return [found for prepared in batch for found in look([prepared])]

    def fail(item: Item, error: Exception) -> None:
        summary.failed.append(str(error) if isinstance(error, UserError) else _unforeseen(item, error))

    # Of several processes the first one tells how far its share is; theirs are as large.
    bar = progress_bar(None, "images", len(items), unit="image", disable=not distributed.is_main())
    num_streams = predictor.num_streams
    with (
        interrupts_at_checks() as check,
        bar,
        timing.running(),
        AsyncWriter(threads=WRITERS, depth=2 * max(WRITERS, batch_size)) as writing,
        contextlib.closing(ahead(read, items, threads=READERS, depth=2 * batch_size)) as reading,
    ):
        batches = _batches(reading, len(items), batch_size, timing, fail)
        with contextlib.closing(ahead(look, batches, threads=num_streams, depth=num_streams)) as looking:
            for batch, future in looking:
                check()
                for (item, image, _), detections in zip(batch, future.result(), strict=True):
                    if detections is None:
                        continue
                    with timing.stage(WAIT_WRITE):
                        writing.submit(write, item, image, detections)
                bar.update(len(batch))


def _batches(
    reading: Iterator[tuple[Item, Future[LoadedImage]]],
    count: int,
    size: int,
    timing: Timing,
    fail: Callable[[Item, Exception], None],
) -> Iterator[list[LoadedImage]]:
    """What was read, `size` at a time; what cannot be read is passed over and noted."""
    batch: list[LoadedImage] = []
    for number, (item, future) in enumerate(reading, 1):
        try:
            with timing.stage(WAIT_READ):
                batch.append(future.result())
        except Exception as error:
            fail(item, error)
        if batch and (len(batch) == size or number == count):
            yield batch
            batch = []


def _unforeseen(item: Item, error: Exception) -> str:
    if is_out_of_memory(error):
        return f"image {item.shown}: memory ran out; lower --batch-size, or cut the image into tiles"
    reason = " ".join(str(error).split())[:300]
    return f"image {item.shown}: unexpected {type(error).__name__}: {reason} (the full trace is in {keep_trace(error)})"


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    longest = max(image.shape[:2])
    if longest > JPEG_SIDE:
        height, width = (max(1, round(side * JPEG_SIDE / longest)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    write_output(path, lambda file: file.write(data))
