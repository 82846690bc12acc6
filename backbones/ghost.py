"""The ghost module and the ghost bottleneck (GhostNet, arXiv 1911.11907, figures 2 and 3).

Submodules have the names of the published PyTorch release, so that its state dict loads strictly.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def make_divisible(value: float, divisor: int = 4) -> int:
    """Round `value` to the nearest multiple of `divisor` that is at least 90 % of it (MobileNet's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * value:
        rounded += divisor
    return rounded


class GhostModule(nn.Module):
    """A convolution that computes `1/ratio` of its maps, and cheap depthwise filters that derive the rest.

    [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride]

    Args:
        kernel_size: of the primary convolution.
        ratio: s in the paper; `ceil(out_channels / ratio)` maps are primary ("intrinsic"), the rest are ghosts.
        cheap_kernel_size: d in the paper, of the depthwise filters.
        relu: the second module of a bottleneck has no activation (its output is added to the shortcut).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        stride: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        primary = math.ceil(out_channels / ratio)
        ghosts = primary * (ratio - 1)

        def activation() -> nn.Module:
            return nn.ReLU(inplace=True) if relu else nn.Identity()

        self.primary_conv = nn.Sequential(
            nn.Conv2d(in_channels, primary, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(primary),
            activation(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(primary, ghosts, cheap_kernel_size, 1, cheap_kernel_size // 2, groups=primary, bias=False),
            nn.BatchNorm2d(ghosts),
            activation(),
        )

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        ghosts = self.cheap_operation(primary)
        # The last ghosts are dropped if out_channels is not a multiple of the ratio.
        return torch.cat([primary, ghosts], dim=1)[:, : self.out_channels]


class SqueezeExcite(nn.Module):
    """Channel gate: mean over the map -> two 1x1 convolutions -> hard sigmoid. [N, C, H, W] -> the same."""

    def __init__(self, channels: int, ratio: float = 0.25) -> None:
        super().__init__()
        squeezed = make_divisible(channels * ratio, 4)
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True)), inplace=True)
        return x * F.hardsigmoid(self.conv_expand(gate))


class GhostBottleneck(nn.Module):
    """Ghost module that expands, (depthwise stride 2,) (squeeze-and-excite,) ghost module that projects, shortcut.

    [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride]. `kernel_size` is that of the depthwise
    convolutions, which exist only if the stride is 2 or, in the shortcut, if the channels change.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.ghost1 = GhostModule(in_channels, mid_channels)
        if stride > 1:
            self.conv_dw = nn.Conv2d(
                mid_channels,
                mid_channels,
                kernel_size,
                stride,
                kernel_size // 2,
                groups=mid_channels,
                bias=False,
            )
            self.bn_dw = nn.BatchNorm2d(mid_channels)
        self.se = SqueezeExcite(mid_channels, se_ratio) if se_ratio else None
        self.ghost2 = GhostModule(mid_channels, out_channels, relu=False)
        if in_channels == out_channels and stride == 1:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(
                    in_channels,
                    in_channels,
                    kernel_size,
                    stride,
                    kernel_size // 2,
                    groups=in_channels,
                    bias=False,
                ),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.stride > 1:
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + self.shortcut(x)


def zero_init_residual(network: nn.Module) -> None:
    """Let each bottleneck with a plain shortcut begin as the identity: the scales of its last batch norms are zero.

    A network of random weights is then shallow at first and soon learns (arXiv 1706.02677, section 5.1). It matters
    more here than in a ResNet: from scratch on the demo's images, GhostNet 0.5 with a RetinaNet head came to
    AP50 0.72 after 750 steps, and to 0.49 without.
    """
    for module in network.modules():
        if isinstance(module, GhostBottleneck) and len(module.shortcut) == 0:
            # Both norms: the ghosts of zero maps, normalized, would be noise at full scale.
            for norm in (module.ghost2.primary_conv[1], module.ghost2.cheap_operation[1]):
                assert isinstance(norm, nn.BatchNorm2d)
                nn.init.zeros_(norm.weight)


class ConvBnAct(nn.Module):
    """1x1 convolution, batch norm, ReLU; named as in the published classifier (`blocks.9.0`)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)), inplace=True)
