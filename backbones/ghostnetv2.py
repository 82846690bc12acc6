"""GhostNetV2 (arXiv 2211.12905): GhostNet with DFC attention along rows and columns in its expansions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.base import init_weights
from backbones.ghost import GhostBottleneck, GhostModule
from backbones.ghostnet import GhostNet, GhostNetFeatures

# The first two bottlenecks have no attention, as in the published networks.
FIRST_WITH_ATTENTION = 2


class AttentiveGhostModule(GhostModule):
    """A ghost module times DFC attention ("decoupled fully connected", section 3.2 of the paper).

    The gate is computed at half the size with filters along rows and then columns, so it has a larger receptive field
    than the ghost module. [N, in_channels, H, W] -> [N, out_channels, H, W]; H and W are at least 2.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.short_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, (1, 5), padding=(0, 2), groups=out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, (5, 1), padding=(2, 0), groups=out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.short_conv(F.avg_pool2d(x, 2)))
        return super().forward(x) * F.interpolate(gate, size=x.shape[2:], mode="nearest")


class GhostNetV2Features(GhostNetFeatures):
    """GhostNetV2 without its classifier: stem and `blocks.0`–`blocks.8`, at any width.

    forward: [N, 3, H, W] float32, H and W above 32 -> level -> [N, C, H/stride, W/stride], with GhostNet's channels.
    """

    def __init__(self, width: float = 1.0, out_levels: Sequence[str] = ("c2", "c3", "c4", "c5")) -> None:
        super().__init__(width, out_levels)
        _add_attention(self)


class GhostNetV2(GhostNet):
    """The ImageNet classifier; strict-loads the published checkpoints (widths 1.0, 1.3, 1.6) through `load_weights`.

    forward: [N, 3, H, W] float32, normalized with ImageNet's mean and std, H and W above 32 -> logits
    [N, num_classes].
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__(width, num_classes, dropout)
        _add_attention(self)


def _add_attention(network: GhostNetFeatures) -> None:
    """Add the attention, which is the only difference between versions 1 and 2."""
    bottlenecks = [module for module in network.blocks.modules() if isinstance(module, GhostBottleneck)]
    for bottleneck in bottlenecks[FIRST_WITH_ATTENTION:]:
        plain = bottleneck.ghost1
        first: nn.Conv2d = plain.primary_conv[0]  # type: ignore[assignment]
        bottleneck.ghost1 = AttentiveGhostModule(first.in_channels, plain.out_channels)
        init_weights(bottleneck.ghost1)
