"""Object detection with a GhostNet backbone: models, data, training, evaluation, prediction."""

from typing import TYPE_CHECKING, Any

from detection.config import Config, load_config
from detection.errors import UserError

if TYPE_CHECKING:
    from detection.inference.predict import Predictor
    from detection.models import build_model

__all__ = ["Config", "Predictor", "UserError", "build_model", "load_config"]


def __getattr__(name: str) -> Any:
    # These two need torch, which takes seconds to import; a tool's --help or a misspelt key should not wait.
    if name == "Predictor":
        from detection.inference.predict import Predictor

        return Predictor
    if name == "build_model":
        from detection.models import build_model

        return build_model
    raise AttributeError(f"module 'detection' has no attribute {name!r}")
