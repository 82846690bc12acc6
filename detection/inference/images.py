"""Detection in image files."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.core.interrupts import interrupts_at_checks
from detection.core.outputs import write_output
from detection.core.progress import progress_bar
from detection.inference.batching import describe_failure, detect_in_batches
from detection.inference.draw import draw_on
from detection.inference.image_urls import read_source
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import AsyncWriter
from detection.inference.results import Summary, image_json
from detection.inference.sources import Item
from detection.inference.timing import DRAW, READ, WAIT_WRITE, WRITE

JPEG_QUALITY = 92
MAX_JPEG_SIDE = 65_500
"""Largest width or height of a JPEG, in pixels."""
MAX_NAME_BYTES = 230
"""Longest name of a result file without suffix, in bytes, that all usual file systems allow."""
# May exceed the number of cores: writers mostly wait for the disk (detection.core.files.write_atomically).
WRITERS = 4


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

    def read(item: Item) -> np.ndarray:
        if len(os.fsencode(Path(item.name).name)) > MAX_NAME_BYTES:
            raise UserError(f"image {item.shown}: its name is too long for the names of results; rename it")
        with timing.stage(READ):
            return read_source(item.source, bgr=True)

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

    def fail(item: Item, error: Exception) -> None:
        summary.failed.append(describe_failure(item.shown, error))

    with (
        interrupts_at_checks() as check,
        progress_bar(None, "images", len(items), unit="image") as bar,
        timing.running(),
        AsyncWriter(threads=WRITERS, depth=2 * max(WRITERS, batch_size)) as writing,
        contextlib.closing(detect_in_batches(predictor, items, read, batch_size=batch_size, timing=timing)) as batches,
    ):
        for batch in batches:
            check()
            for item, image, found in batch:
                if isinstance(found, Exception):
                    fail(item, found)
                    continue
                with timing.stage(WAIT_WRITE):
                    writing.submit(write, item, image, found)
            bar.update(len(batch))


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    longest = max(image.shape[:2])
    if longest > MAX_JPEG_SIDE:
        height, width = (max(1, round(side * MAX_JPEG_SIDE / longest)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    write_output(path, lambda file: file.write(data))
