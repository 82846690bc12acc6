"""Networks that turn images into feature maps. This package does not import `detection`."""

from backbones.base import Backbone
from backbones.classifier import build_classifier
from backbones.features import NAMES, build_backbone
from backbones.ghost import GhostBottleneck, GhostModule, SqueezeExcite
from backbones.ghost_conv import GhostConv2d
from backbones.ghost_conversion import GhostReport, ghostify, load_ghosted
from backbones.ghost_resnet import ghost_resnet50, ghost_resnet56
from backbones.ghost_vgg import ghost_vgg16
from backbones.ghostnet import GhostNet
from backbones.ghostnetv2 import GhostNetV2
from backbones.weights import LoadReport, WeightsError, load_weights, read_weights

__all__ = [
    "NAMES",
    "Backbone",
    "GhostBottleneck",
    "GhostConv2d",
    "GhostModule",
    "GhostNet",
    "GhostNetV2",
    "GhostReport",
    "LoadReport",
    "SqueezeExcite",
    "WeightsError",
    "build_backbone",
    "build_classifier",
    "ghost_resnet50",
    "ghost_resnet56",
    "ghost_vgg16",
    "ghostify",
    "load_ghosted",
    "load_weights",
    "read_weights",
]
