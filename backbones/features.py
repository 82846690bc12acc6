"""`build_backbone`: any known network by name, as ordered features c2–c5."""

import difflib
from collections.abc import Iterator, Sequence

import torch
import torchvision
from torch import nn

from backbones.base import LEVELS, Backbone, initialize
from backbones.ghostnet import GhostNetFeatures
from backbones.weights import load_weights, read_weights

NAMES = ("ghostnet", "mobilenet_v2", "mobilenet_v3_large")
DEFAULT_LEVELS = ("c2", "c3", "c4", "c5")


class TorchvisionFeatures(Backbone):
    """A torchvision MobileNet's `features`, tapped at the last block of each stride.

    The last 1x1 convolution (to 1280 or 960 channels) belongs to the classifier and is left out, like
    GhostNet's `blocks.9`. Keys are torchvision's (`features.N.…`).
    """

    def __init__(self, features: nn.Sequential, out_levels: Sequence[str] = DEFAULT_LEVELS) -> None:
        super().__init__()
        self.features = features[:-1]
        initialize(self)
        self._taps = _last_of_each_stride(self.features)
        self.measure(out_levels)

    def stages(self) -> Iterator[tuple[str, list[nn.Module]]]:
        start = 0
        for level, end in self._taps.items():
            yield level, list(self.features[start : end + 1])
            start = end + 1


def _last_of_each_stride(features: nn.Sequential) -> dict[str, int]:
    """level -> index of its last module, found by watching where the map shrinks."""
    taps: dict[str, int] = {}
    size = 64
    x = torch.zeros(1, 3, size, size)
    features.eval()
    with torch.no_grad():
        for index, module in enumerate(features):
            x = module(x)
            taps[LEVELS[(size // x.shape[2]).bit_length() - 2]] = index
    features.train()
    return taps


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
        name: one of `NAMES`.
        width: multiplies the channels (GhostNet's 0.5, 1.0, 1.1, 1.3, …; MobileNet's alpha).
        weights: None (random), a path to a `.pth` or `.safetensors` file, or "timm" (ImageNet weights
            from the hub, through the package timm). The load is strict and its report is logged.
        out_levels: which of c1–c5 `forward` returns.
        frozen_stages: how many stages of *pretrained* layers are kept fixed (1 = up to c2, … 4 = all).
        freeze_bn: keep the batch norms of a *pretrained* network in evaluation mode.

    Returns:
        A module: [N, 3, H, W] float32 -> OrderedDict level -> [N, C, H/stride, W/stride], with
        `.channels` and `.strides` (level -> int), `.mean`, `.std` and `.pretrained`.

    Raises:
        ValueError: unknown name or level, bad width.
        WeightsError: the file is absent, unreadable, or belongs to another network or width.
    """
    if width <= 0:
        raise ValueError(f"width must be positive, not {width}")
    backbone: Backbone
    if name == "ghostnet":
        backbone = GhostNetFeatures(width, out_levels)
    elif name == "mobilenet_v2":
        backbone = TorchvisionFeatures(torchvision.models.mobilenet_v2(width_mult=width).features, out_levels)
    elif name == "mobilenet_v3_large":
        network = torchvision.models.mobilenet_v3_large(width_mult=width)
        backbone = TorchvisionFeatures(network.features, out_levels)
    else:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown backbone {name!r}{hint}; known: {', '.join(NAMES)}")

    if weights is not None:
        state_dict, source = read_weights(weights, name, width)
        load_weights(backbone, state_dict, source)
        backbone.pretrained = True
        backbone.freeze(frozen_stages, freeze_bn)
    return backbone
