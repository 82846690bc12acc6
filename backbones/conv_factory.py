"""Builds the convolutions of VGG and ResNet, plain or as ghost modules, so that both variants share one definition."""

from torch import nn

from backbones.ghost import GhostModule


def make_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    ratio: int,
    cheap_kernel_size: int,
    stride: int = 1,
    relu: bool = True,
    bias: bool = False,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Convolution, batch norm and activation, as three modules.

    Three modules, so that the plain network has torchvision's keys. A ghost module has its own batch norms and
    activations: it is the first module, and the other two are `nn.Identity`.

    Args:
        ratio: s of the ghost module; 1 is the plain convolution.
        cheap_kernel_size: d of the ghost module.
        bias: of the plain convolution.

    Raises:
        ValueError: ratio is not a whole number above 0, or cheap_kernel_size is not odd (the map would shrink).
    """
    if not isinstance(ratio, int) or ratio < 1:
        raise ValueError(f"ratio must be a whole number, 1 (plain convolutions) or above, not {ratio}")
    if not isinstance(cheap_kernel_size, int) or cheap_kernel_size < 1 or cheap_kernel_size % 2 == 0:
        raise ValueError(f"kernel_size of the cheap operations must be odd (1, 3, 5, …), not {cheap_kernel_size}")
    if ratio == 1:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True) if relu else nn.Identity()
    ghost = GhostModule(
        in_channels,
        out_channels,
        kernel_size,
        ratio=ratio,
        cheap_kernel_size=cheap_kernel_size,
        stride=stride,
        relu=relu,
    )
    return ghost, nn.Identity(), nn.Identity()
