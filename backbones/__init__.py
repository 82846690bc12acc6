"""Networks that turn images into features. Knows nothing of detection."""

from backbones.base import Backbone
from backbones.features import NAMES, build_backbone
from backbones.ghost import GhostBottleneck, GhostModule, SqueezeExcite
from backbones.ghost_resnet import ghost_resnet50, ghost_resnet56
from backbones.ghost_vgg import ghost_vgg16
from backbones.ghostnet import GhostNet
from backbones.weights import LoadReport, WeightsError, load_weights, read_weights

__all__ = [
    "NAMES",
    "Backbone",
    "GhostBottleneck",
    "GhostModule",
    "GhostNet",
    "LoadReport",
    "SqueezeExcite",
    "WeightsError",
    "build_backbone",
    "ghost_resnet50",
    "ghost_resnet56",
    "ghost_vgg16",
    "load_weights",
    "read_weights",
]
