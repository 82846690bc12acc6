"""`build_classifier`: builds a network by name as a classifier, to pretrain a backbone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from backbones.features import build_backbone
from backbones.ghost_resnet import GhostResNet50, GhostResNet56
from backbones.ghost_vgg import GhostVGG16
from backbones.ghostnet import GhostNet
from backbones.ghostnetv2 import GhostNetV2
from backbones.weights import load_weights, read_weights

GHOST_NETWORKS = ("ghost_vgg16", "ghost_resnet50", "ghost_resnet56")
"""Networks with the arguments `ratio` and `kernel_size`."""
HEAD_PREFIXES = ("blocks.9.", "conv_head.", "classifier.", "fc.")
"""Prefixes of the state-dict keys that a detector's backbone does not have."""


class PooledClassifier(nn.Module):
    """A backbone, global average pooling of c5, dropout, a linear layer.

    [N, 3, H, W] float32, normalized with `.mean` and `.std` -> logits [N, num_classes]
    """

    def __init__(self, body: Backbone, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.body = body
        self.mean, self.std = body.mean, body.std
        self.dropout = dropout
        self.classifier = nn.Linear(body.channels["c5"], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.body(images)["c5"].mean((2, 3))
        return self.classifier(F.dropout(pooled, self.dropout, self.training))


def build_classifier(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    weights: str | None = None,
    dropout: float = 0.2,
    ratio: int | None = None,
    kernel_size: int | None = None,
) -> nn.Module:
    """Build a classifier whose backbone weights a detector can load (see `backbone_state`).

    Args:
        name: a name of `build_backbone`, or ghost_resnet56, which is only a classifier. The networks of the GhostNet
            papers are the published classifiers; others are a backbone with a linear layer.
        num_classes: at least 2.
        width: width multiplier, for networks that have one.
        weights: None (random), or as in `build_backbone`. The last layers of the classifier are loaded as well if the
            file has them for the same number of classes; otherwise they are random.
        dropout: before the last layer. The ghost ResNets have none.
        ratio, kernel_size: s and d of `GHOST_NETWORKS`; default: 2 and 3.

    Returns:
        A module: [N, 3, H, W] float32, normalized with `normalization(model)` -> logits [N, num_classes].

    Raises:
        ValueError: unknown name, or an argument that the network does not have.
        WeightsError: the file is missing, unreadable, or belongs to another network or width.
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, not {num_classes}")
    if name not in GHOST_NETWORKS and (ratio is not None or kernel_size is not None):
        raise ValueError(f"{name} has no ratio and kernel_size to set; {', '.join(GHOST_NETWORKS)} have")
    if name in GHOST_NETWORKS and width != 1:
        raise ValueError(f"{name} has only width 1; ratio makes it smaller")
    s, d = 2 if ratio is None else ratio, 3 if kernel_size is None else kernel_size
    model: nn.Module
    if name == "ghostnet":
        model = GhostNet(width, num_classes, dropout)
    elif name == "ghostnetv2":
        model = GhostNetV2(width, num_classes, dropout)
    elif name == "ghost_vgg16":
        model = GhostVGG16(num_classes, s, d, dropout)
    elif name == "ghost_resnet50":
        model = GhostResNet50(num_classes, s, d)
    elif name == "ghost_resnet56":
        model = GhostResNet56(num_classes, s, d)
    else:
        body = build_backbone(name, width=width, weights=weights, out_levels=("c5",))
        return PooledClassifier(body, num_classes, dropout)
    if weights is not None:
        state_dict, source = read_weights(weights, name, width)
        load_weights(model, _with_fitting_head(model, state_dict), source)
    return model


def _with_fitting_head(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict; its head is replaced by the model's random one if it is missing or has other shapes."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith(HEAD_PREFIXES)}
    if all(key in state_dict and state_dict[key].shape == value.shape for key, value in own.items()):
        return dict(state_dict)
    return {key: value for key, value in state_dict.items() if not key.startswith(HEAD_PREFIXES)} | own


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a classifier without its head; `load_weights` loads them into a backbone of the same name."""
    if isinstance(model, PooledClassifier):
        return model.body.state_dict()
    return {key: value for key, value in model.state_dict().items() if not key.startswith(HEAD_PREFIXES)}


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that the network expects; default: those of ImageNet."""
    return tuple(getattr(model, "mean", IMAGENET_MEAN)), tuple(getattr(model, "std", IMAGENET_STD))


def normalize(images: Tensor, model: nn.Module) -> Tensor:
    """Normalize [N, 3, H, W] float32 in [0, 1] as `model` expects."""
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype) for v in normalization(model))
    return (images - mean[:, None, None]) / std[:, None, None]
