"""Whether what a config names is there: a first look, before torch is imported, which takes seconds."""

import os
from collections.abc import Sequence

from detection.config import PUBLISHED, DetectionConfig
from detection.core.errors import UserError
from detection.core.files import open_regular_file, shown
from detection.data.formats.detect_format import images_folder
from detection.zoo.names import find_detector


def check_source_paths(
    config: DetectionConfig, splits: Sequence[str] = ("train", "val"), *, weights: bool = True
) -> None:
    """See whether annotations, images folders and weights of a config are there; reads none of them to the end.

    Raises:
        UserError: one is absent, or of no known format; the message names its key.
    """
    for split in splits:
        for key, source in config.data.sources(split).items():
            try:
                folder = images_folder(
                    source.annotations, images=source.images, format=source.format, split=source.split or split
                )
            except UserError as error:
                raise UserError(f"{key}.annotations: {error}") from None
            if not os.path.isdir(folder):
                way = "" if source.images else f"; if the images are in another one, name it with {key}.images=…"
                raise UserError(f"{key}.images: folder {shown(folder)} does not exist{way}")
    if weights and config.model.weights is not None:
        open_regular_file(find_detector(config.model.weights), "model.weights: checkpoint").close()
    elif weights:
        check_weights_file(config.model.backbone.weights, "model.backbone.weights")


def check_weights_file(weights: str | None, key: str) -> None:
    if weights is not None and weights not in PUBLISHED:
        open_regular_file(weights, f"{key}: weights file").close()
