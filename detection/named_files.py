"""Whether what a config names is there: a first look, before torch is imported, which takes seconds."""

import os
from collections.abc import Sequence

from detection.cli import PUBLISHED
from detection.config import Config
from detection.data.formats import images_folder
from detection.errors import UserError
from detection.files import open_regular_file, shown
from detection.pretraining.config import PretrainConfig


def check_named_files(config: Config, splits: Sequence[str] = ("train", "val"), *, weights: bool = True) -> None:
    """See whether annotations, images folders and weights of a config are there; reads none of them to the end.

    Raises:
        UserError: one is absent, or of no known format; the message names its key.
    """
    for split in splits:
        source = getattr(config.data, split)
        key = f"data.{split}"
        try:
            folder = images_folder(
                source.annotations, images=source.images, format=source.format, split=source.split or split
            )
        except UserError as error:
            raise UserError(f"{key}.annotations: {error}") from None
        if not os.path.isdir(folder):
            way = "" if source.images else f"; if the images are in another one, name it with {key}.images=…"
            raise UserError(f"{key}.images: folder {shown(folder)} does not exist{way}")
    if weights:
        _check_weights(config.model.backbone.weights, "model.backbone.weights")


def check_named_pretraining_files(config: PretrainConfig) -> None:
    """As `check_named_files`, of a pre-training. Raises UserError."""
    for split in ("train", "val"):
        folder = getattr(config.data, split)
        if not os.path.isdir(folder):
            raise UserError(f"data.{split}: folder {shown(folder)} does not exist")
    _check_weights(config.model.weights, "model.weights")
    if config.teacher is not None:
        _check_weights(config.teacher.weights, "teacher.weights")


def _check_weights(weights: str | None, key: str) -> None:
    if weights is not None and weights not in PUBLISHED:
        open_regular_file(weights, f"{key}: weights file").close()
