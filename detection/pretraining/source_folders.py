"""Check that the files and folders in a pre-training config exist."""

import os

from detection.core.errors import UserError
from detection.core.files import shown
from detection.data.source_paths import check_weights_file
from detection.pretraining.classification_config import ClassificationConfig


def check_pretraining_paths(config: ClassificationConfig) -> None:
    """As `check_source_paths`, for pre-training. Raises UserError."""
    for split in ("train", "val"):
        folder = getattr(config.data, split)
        if not os.path.isdir(folder):
            raise UserError(f"data.{split}: folder {shown(folder)} does not exist")
    check_weights_file(config.model.weights, "model.weights")
    if config.teacher is not None:
        check_weights_file(config.teacher.weights, "teacher.weights")
