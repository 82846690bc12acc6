"""Backbone plus feature pyramid, in the shape that torchvision's detectors expect of a backbone."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from backbones import Backbone


class BackboneWithNeck(nn.Module):
    """Base class of a backbone with a feature pyramid: `body` (any `Backbone`) and `fpn`, which can be frozen."""

    fpn: Any

    def __init__(self, body: Backbone) -> None:
        super().__init__()
        self.body = body
        self._neck_frozen = False

    def freeze_neck(self) -> None:
        """Freeze the parameters of `fpn` and keep it in evaluation mode."""
        self._neck_frozen = True
        self.fpn.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "BackboneWithNeck":
        """As `nn.Module.train`, but a frozen neck stays in evaluation mode."""
        super().train(mode)
        if self._neck_frozen:
            self.fpn.eval()
        return self


class BackboneWithFPN(BackboneWithNeck):
    """`body` (any `Backbone`) and `fpn` on the given levels.

    forward: [N, 3, H, W] -> OrderedDict p3 … p7 (or p2 … p5, pool) -> [N, out_channels, H/stride, W/stride].

    Args:
        levels: backbone levels that enter the pyramid, e.g. ("c3", "c4", "c5").
        extra: "p6p7" – two strided convolutions on C5 (RetinaNet's paper, mmdetection's `on_input`), or
            "pool" – a subsampled P5 (Faster R-CNN's FPN).
    """

    def __init__(self, body: Backbone, levels: tuple[str, ...], out_channels: int, extra: str) -> None:
        super().__init__(body)
        self.levels = levels
        self.out_channels = out_channels
        if extra == "p6p7":
            extra_blocks = LastLevelP6P7(body.channels[levels[-1]], out_channels)
            # torchvision silently uses P5 instead of C5 if both have the same number of channels.
            extra_blocks.use_P5 = False
        elif extra == "pool":
            extra_blocks = LastLevelMaxPool()
        else:
            raise ValueError(f"extra must be 'p6p7' or 'pool', not {extra!r}")
        self.fpn = FeaturePyramidNetwork(
            [body.channels[level] for level in levels], out_channels, extra_blocks=extra_blocks
        )

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        features = self.body(images)
        return self.fpn(OrderedDict((level.replace("c", "p"), features[level]) for level in self.levels))
