"""Detection in picture files."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection import distributed
from detection.data.transforms import read_image
from detection.errors import UserError
from detection.files import write_atomically
from detection.inference.draw import draw_on
from detection.inference.predict import Detections, Detector
from detection.inference.results import Summary, picture_json
from detection.inference.sources import Item
from detection.inference.threads import WriteBehind, ahead
from detection.inference.timing import DRAW, NETWORK, READ, RESIZE, WAIT_READ, WAIT_WRITE, WRITE
from detection.progress import progress_bar

JPEG_QUALITY = 92
READERS = min(4, os.cpu_count() or 1)
# Also more than cores: most of the time they wait until the disk has the file (detection.files.write_atomically).
WRITERS = 4
Picture = tuple[Item, np.ndarray, Any]


def detect_images(
    predictor: Detector,
    items: Sequence[Item],
    out: Path,
    summary: Summary,
    *,
    batch_size: int,
    pictures: bool,
) -> None:
    """Write out/NAME.jpg (with `pictures`) and then out/NAME.json for each; count in `summary` what was done.

    While the network works on a batch, the next one is read and the one before is drawn and written. On Ctrl-C what
    the network has seen is written to the end.
    """
    if not items:
        return
    timing = summary.pictures

    def read(item: Item) -> Picture:
        with timing.stage(READ):
            image = read_image(item.source, bgr=True)
        with timing.stage(RESIZE):
            return item, image, predictor.prepare(image, bgr=True)

    def write(item: Item, image: np.ndarray, detections: Detections) -> None:
        path = out / f"{item.name}.json"
        head = {"image": item.source, "width": image.shape[1], "height": image.shape[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        if pictures:
            with timing.stage(DRAW):
                draw_on(image, detections, bgr=True)
            with timing.stage(WRITE):
                _write_jpeg(out / f"{item.name}.jpg", image)
        with timing.stage(WRITE):
            text = picture_json(head, detections).encode()
            write_atomically(path, lambda file: file.write(text))
        summary.add(timing, detections)

    def look(batch: list[Picture]) -> list[Detections]:
        with timing.stage(NETWORK):
            return predictor.detect([prepared for _, _, prepared in batch])

    # Of several processes the first one tells how far its share is; theirs are as large.
    bar = progress_bar(None, "pictures", len(items), unit="picture", disable=not distributed.is_main())
    lanes = predictor.lanes
    with (
        bar,
        timing.running(),
        WriteBehind(threads=WRITERS, depth=2 * max(WRITERS, batch_size)) as writing,
        contextlib.closing(ahead(read, items, threads=READERS, depth=2 * batch_size)) as reading,
    ):
        batches = _batches(reading, len(items), batch_size, summary)
        with contextlib.closing(ahead(look, batches, threads=lanes, depth=lanes)) as looking:
            for batch, future in looking:
                for (item, image, _), detections in zip(batch, future.result(), strict=True):
                    with timing.stage(WAIT_WRITE):
                        writing.submit(write, item, image, detections)
                bar.update(len(batch))


def _batches(
    reading: Iterator[tuple[Item, Future[Picture]]], count: int, size: int, summary: Summary
) -> Iterator[list[Picture]]:
    """What was read, `size` at a time; what cannot be read is passed over and noted."""
    batch: list[Picture] = []
    for number, (_, future) in enumerate(reading, 1):
        try:
            with summary.pictures.stage(WAIT_READ):
                batch.append(future.result())
        except UserError as error:
            summary.failed.append(str(error))
        if batch and (len(batch) == size or number == count):
            yield batch
            batch = []


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    write_atomically(path, lambda file: file.write(data))
