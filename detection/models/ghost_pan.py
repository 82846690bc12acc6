"""A light pyramid: top-down and bottom-up paths of ghost blocks."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from backbones import Backbone
from backbones.ghost import GhostModule
from detection.models.fpn import BackboneWithNeck
from detection.models.retinanet import PerLevelBatchNorm

STRIDES = (8, 16, 32)


class DepthwiseSeparable(nn.Sequential):
    """Depthwise k x k, then 1x1, each with batch norm and ReLU. [N, C, H, W] -> [N, out, H/stride, W/stride]."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=False),
            PerLevelBatchNorm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            PerLevelBatchNorm(out_channels),
            nn.ReLU(inplace=True),
        )


class GhostBlock(nn.Module):
    """Two ghost modules with a residual connection. [N, C, H, W] -> the same.

    Starts as the identity, like the blocks of the backbone (`backbones.ghost.zero_init_residual`).
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.ghost1 = GhostModule(channels, channels, cheap_kernel_size=kernel_size)
        self.ghost2 = GhostModule(channels, channels, cheap_kernel_size=kernel_size, relu=False)
        for norm in (self.ghost2.primary_conv[1], self.ghost2.cheap_operation[1]):
            nn.init.zeros_(norm.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ghost2(self.ghost1(x))


class GhostPAN(nn.Module):
    """Top-down, then bottom-up (PANet, arXiv 1803.01534), a ghost block wherever two levels meet.

    All levels have the same few channels, as in NanoDet-Plus's GhostPAN and PicoDet's CSP-PAN (arXiv 2111.00902).
    Filters are 3x3 instead of 5x5: the same AP at a lower cost (docs/ghostdet.md). Levels are added, not concatenated:
    twice the channels on the finest map would cost as much as the rest of the neck.

    Args:
        in_channels: of the maps, finest first, each half the size of the one before.
        channels: of all outputs.

    forward: maps, each exactly half as high and wide as the one before -> as many of the same sizes.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        steps = range(len(in_channels) - 1)
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, channels, 1, bias=False), PerLevelBatchNorm(channels), nn.ReLU(inplace=True))
            for c in in_channels
        )
        self.top_down = nn.ModuleList(GhostBlock(channels, kernel_size) for _ in steps)
        self.down = nn.ModuleList(DepthwiseSeparable(channels, channels, kernel_size, 2) for _ in steps)
        self.bottom_up = nn.ModuleList(GhostBlock(channels, kernel_size) for _ in steps)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        inner = [reduced[-1]]
        for block, finer in zip(self.top_down, reversed(reduced[:-1]), strict=True):
            # A factor instead of a size: in exported files the runtime then keeps its own memory layout.
            inner.insert(0, block(finer + F.interpolate(inner[0], scale_factor=2.0, mode="nearest")))
        outer = [inner[0]]
        for down, block, coarser in zip(self.down, self.bottom_up, inner[1:], strict=True):
            outer.append(block(coarser + down(outer[-1])))
        return outer


class BackboneWithPAN(BackboneWithNeck):
    """`body` (any `Backbone`) and a `GhostPAN` on its C3, C4 and C5.

    forward: [N, 3, H, W], sides multiples of 32 -> OrderedDict p3, p4, p5 -> [N, out_channels, H/stride, W/stride] of
    `STRIDES`.
    """

    def __init__(self, body: Backbone, out_channels: int) -> None:
        super().__init__(body)
        self.levels = ("c3", "c4", "c5")
        self.out_channels = out_channels
        self.fpn = GhostPAN([body.channels[level] for level in self.levels], out_channels)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        features = self.body(images)
        maps = self.fpn([features[level] for level in self.levels])
        return OrderedDict(zip(("p3", "p4", "p5"), maps, strict=True))
