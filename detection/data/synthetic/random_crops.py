"""Cuts many different images out of few photographs, for measurements with a dataset of the size of COCO."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.core.files import make_folder
from detection.core.outputs import begin_output
from detection.core.progress import progress_bar
from detection.data.image_io import images_below, read_image, write_jpeg

SHARE = (0.35, 0.6)
"""Range of the share of a photograph's width and height that an image shows; small, so that images differ."""
QUALITY = 80


def write_crops(folder: Path, photographs: Path, names: Sequence[str], sizes: np.ndarray, seed: int) -> None:
    """Write JPEG files `names` of `sizes` [n, 2] (width, height) into `folder`: random parts of photographs, resized.

    Raises:
        UserError: there are no photographs, one cannot be read, or a file cannot be written.
    """
    if not photographs.is_dir():
        raise UserError(f"there is no folder {photographs}")
    files = images_below(photographs)
    if not files:
        raise UserError(f"folder {photographs} has no images")
    make_folder(folder, "the folder of images")

    def write_those_of(number: int) -> int:
        rng = np.random.default_rng([seed, number])
        photograph = read_image(photographs / files[number], bgr=True)
        own = range(number, len(names), len(files))
        for i in own:
            part = _random_part(photograph, rng)
            image = cv2.resize(part, tuple(sizes[i].tolist()), interpolation=cv2.INTER_LINEAR)
            begin_output(folder / names[i])
            write_jpeg(folder / names[i], image, QUALITY)
        return len(own)

    # OpenCV releases the GIL while it reads, resizes and writes.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar(None, "images", len(names)) as bar,
    ):
        for count in pool.map(write_those_of, range(min(len(files), len(names)))):
            bar.update(count)


def _random_part(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spans = [max(1, int(side * rng.uniform(*SHARE))) for side in image.shape[:2]]
    top, left = (int(rng.integers(side - span + 1)) for side, span in zip(image.shape[:2], spans, strict=True))
    return image[top : top + spans[0], left : left + spans[1]]
