"""Images for tools that look into a network: a few of many, all of one size."""

from collections.abc import Sequence

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.inference.image_urls import read_source
from detection.inference.sources import find_items


def sample_image_paths(sources: Sequence[str], count: int) -> list[str]:
    """Paths or URLs of at most `count` images, spread evenly over all that the sources (files, folders, globs) hold.

    Raises:
        UserError: a source does not exist, or there is no image.
    """
    paths = [item.source for item in find_items(sources) if item.kind == "image"]
    if not paths:
        raise UserError(f"no images in {', '.join(sources)}")
    chosen = min(count, len(paths))
    return [paths[i * len(paths) // chosen] for i in range(chosen)]


def read_images(paths: Sequence[str], size: int) -> list[np.ndarray]:
    """RGB uint8 [size, size, 3] each; the whole image, squeezed. Raises UserError for one that cannot be read."""
    return [cv2.resize(read_source(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths]
