"""`build_backbone`: builds a network by name as a feature extractor for levels c2–c5."""

import difflib
from collections.abc import Sequence

import torchvision

from backbones.base import Backbone
from backbones.ghost_resnet import GhostResNet50Features
from backbones.ghost_vgg import GhostVGG16Features
from backbones.ghostnet import GhostNetFeatures
from backbones.ghostnetv2 import GhostNetV2Features
from backbones.sequential_features import SequentialFeatures
from backbones.timm_features import TimmFeatures
from backbones.weights import load_weights, read_weights

NAMES = ("ghostnet", "ghostnetv2", "ghost_resnet50", "ghost_vgg16")
"""Networks of this package; networks of torchvision and timm keep their own names."""
DEFAULT_LEVELS = ("c2", "c3", "c4", "c5")
TORCHVISION_WITH_WIDTH = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")


def build_backbone(
    name: str,
    *,
    width: float = 1.0,
    weights: str | None = None,
    out_levels: Sequence[str] = DEFAULT_LEVELS,
    frozen_stages: int = 0,
    freeze_bn: bool = False,
) -> Backbone:
    """Build a feature extractor.

    Args:
        name: one of `NAMES`; a convolutional classifier of torchvision (`resnet50`, `mobilenet_v3_large`, …); or
            `timm/<name>`, one of timm.
        width: width multiplier (GhostNet's 0.5, 1.0, 1.1, 1.3, …; MobileNet's alpha). Networks without one accept
            only 1.
        weights: None (random), a path to a `.pth` or `.safetensors` file, "timm" (ImageNet weights
            from the hub, through the package timm) or "torchvision" (torchvision's default ImageNet weights for a
            network of torchvision). Loading is strict and the report is logged.
        out_levels: which of c1–c5 `forward` returns.
        frozen_stages: number of frozen stages of a *pretrained* network (1 = up to c2, … 4 = all).
        freeze_bn: freeze the batch norms of a *pretrained* network.

    Returns:
        A module: [N, 3, H, W] float32 -> OrderedDict level -> [N, C, H/stride, W/stride], with
        `.channels` and `.strides` (level -> int), `.mean`, `.std` and `.pretrained`.

    Raises:
        ValueError: unknown name or level, bad width, or a network without maps of strides 4, 8, 16 and 32.
        WeightsError: the file is missing, unreadable, or belongs to another network or width.
    """
    if width <= 0:
        raise ValueError(f"width must be positive, not {width}")
    backbone: Backbone
    if name == "ghostnet":
        backbone = GhostNetFeatures(width, out_levels)
    elif name == "ghostnetv2":
        backbone = GhostNetV2Features(width, out_levels)
    elif name in ("ghost_resnet50", "ghost_vgg16"):
        if width != 1:
            raise ValueError(f"{name} has only width 1")
        backbone = (GhostResNet50Features if name == "ghost_resnet50" else GhostVGG16Features)(out_levels=out_levels)
    elif name.startswith("timm/"):
        if width != 1:
            raise ValueError(f"{name} has no width to set; timm has a name for each width (timm/ghostnet_050)")
        backbone = TimmFeatures(name.removeprefix("timm/"), out_levels)
    elif name in torchvision_names():
        backbone = _torchvision_features(name, width, out_levels)
    else:
        close = difflib.get_close_matches(name, [*NAMES, *torchvision_names()], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown backbone {name!r}{hint}; known: {', '.join(NAMES)}, torchvision's classifiers "
            "(mobilenet_v2, mobilenet_v3_large, resnet50, …) and timm/<name>"
        )

    if weights is not None:
        state_dict, source = read_weights(weights, name, width)
        load_weights(backbone, state_dict, source)
        backbone.pretrained = True
        backbone.freeze(frozen_stages, freeze_bn)
    return backbone


def torchvision_names() -> list[str]:
    """All classifiers of the installed torchvision; unsupported ones raise an error when they are built."""
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_features(name: str, width: float, out_levels: Sequence[str]) -> Backbone:
    arguments: dict[str, float] = {}
    if width != 1:
        if name not in TORCHVISION_WITH_WIDTH:
            raise ValueError(f"{name} has no width to set; {', '.join(TORCHVISION_WITH_WIDTH)} have")
        arguments["width_mult"] = width
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = True  # the default; without it torchvision warns that the default will change
    backbone = SequentialFeatures(torchvision.models.get_model(name, weights=None, **arguments), name, out_levels)
    if name == "googlenet":  # torchvision's GoogLeNet converts ImageNet's normalization to this one
        backbone.mean = backbone.std = (0.5, 0.5, 0.5)
    return backbone
