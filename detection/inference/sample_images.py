"""Selects a few images from sources and reads them at one size, for tools that analyze a network."""

from collections.abc import Sequence

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.inference.image_urls import read_source
from detection.inference.sources import find_items


def sample_image_paths(sources: Sequence[str], count: int) -> list[str]:
    """Paths or URLs of at most `count` images, spread evenly over the images of the sources (files, folders, globs).

    Raises:
        UserError: a source does not exist, or there is no image.
    """
    paths = [item.source for item in find_items(sources) if item.kind == "image"]
    if not paths:
        raise UserError(f"no images in {', '.join(sources)}")
    chosen = min(count, len(paths))
    return [paths[i * len(paths) // chosen] for i in range(chosen)]


def read_images(paths: Sequence[str], size: int) -> list[np.ndarray]:
    """Read images and resize them to RGB uint8 [size, size, 3], without keeping the aspect ratio. Raises UserError."""
    return [cv2.resize(read_source(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths]
