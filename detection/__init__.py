"""Object detection with a GhostNet backbone: models, data, training, evaluation, prediction."""

from typing import TYPE_CHECKING, Any

from detection.config import DetectionConfig
from detection.config_io import load_config
from detection.core.errors import UserError

if TYPE_CHECKING:
    from detection.inference.predictor import Predictor
    from detection.models.build import build_model

__all__ = ["DetectionConfig", "Predictor", "UserError", "build_model", "load_config"]


def __getattr__(name: str) -> Any:
    # These two need torch, which takes seconds to import; a tool's --help or a misspelt key should not wait.
    if name == "Predictor":
        from detection.inference.predictor import Predictor

        return Predictor
    if name == "build_model":
        from detection.models.build import build_model

        return build_model
    raise AttributeError(f"module 'detection' has no attribute {name!r}")
