"""`GhostConv2d`: a ghost module (arXiv 1911.11907, section 3.1) that replaces a convolution."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn


class GhostConv2d(nn.Module):
    """A drop-in replacement for `nn.Conv2d`: a convolution computes `ceil(out_channels / ratio)` maps, and d x d
    depthwise filters compute the others from these.

    [N, in_channels, H, W] -> [N, out_channels, H', W'], as the convolution with the same arguments (also unbatched).

    The module is linear, like a convolution. The paper's module (`backbones.ghost.GhostModule`) has batch norm and ReLU
    after both parts, because it replaces convolution, norm and ReLU together. Here the norm and the activation of the
    network follow (or no activation, at the end of a residual branch). A nonlinear module could not be fitted to the
    original weights by least squares. So the only difference is the ReLU between the primary maps and the cheap
    filters, which this module lacks.

    Cheap filters always use zero padding; `padding_mode` applies to the primary convolution.

    Args:
        kernel_size … padding_mode: of the primary convolution, as for `nn.Conv2d`; groups are 1.
        bias: of both parts.
        ratio: s in the paper, at least 2; at most out_channels are used.
        cheap_kernel_size: d in the paper, odd.

    Attributes:
        order: int64 [out_channels], a buffer: output channel i is entry order[i] of [primary maps, ghosts]. If it is
            not 0, 1, 2, … (fitted weights choose which channels are primary), the forward pass copies its output once
            more.
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(f"a ghost module needs at least 2 output channels, not {out_channels}")
        check_arguments(ratio, cheap_kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.ratio = min(ratio, out_channels)
        primary = math.ceil(out_channels / self.ratio)
        ghosts = primary * (self.ratio - 1)
        self.primary = nn.Conv2d(
            in_channels,
            primary,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.cheap = nn.Conv2d(
            primary,
            ghosts,
            cheap_kernel_size,
            padding=cheap_kernel_size // 2,
            groups=primary,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.register_buffer("order", torch.arange(out_channels, device=device))
        self.permuted = False

    def set_order(self, order: Tensor) -> None:
        """Set `order`, int64 [out_channels]."""
        self.order.copy_(order)
        self.permuted = not torch.equal(order.cpu(), torch.arange(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        # Channels are dimension -3, as a convolution also takes a single image [C, H, W].
        maps = torch.cat([primary, self.cheap(primary)], -3)
        if self.permuted:
            return maps.index_select(-3, self.order)
        # The last ghosts are dropped if out_channels is not a multiple of the ratio.
        return maps.narrow(-3, 0, self.out_channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.order.is_meta:
            self.set_order(self.order.clone())

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, ratio={self.ratio}, permuted={self.permuted}"


def check_arguments(ratio: int, kernel_size: int) -> None:
    """Raises ValueError for a ratio below 2 or a cheap kernel size that is not odd."""
    if ratio < 2:
        raise ValueError(f"ratio must be at least 2, not {ratio}: a ghost module of ratio 1 is a plain convolution")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"the kernel size of cheap filters must be odd, not {kernel_size}")
