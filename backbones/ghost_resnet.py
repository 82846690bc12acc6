"""Ghost-ResNet-50 and Ghost-ResNet-56 (arXiv 1911.11907) and, with ratio 1, the ResNets themselves.

The Ghost-ResNet-50 file in the authors' repository is defective: it creates unused weights, and its convolutions have
biases and no batch norm. Here, as the paper describes, every convolution of torchvision's ResNet except the first is a
ghost module with batch norms.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.base import Backbone, init_weights
from backbones.conv_factory import make_conv
from backbones.ghost import GhostModule


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolution and a shortcut. [N, in_channels, H, W] -> [N, 4 * width, H/stride, W/stride].

    Names are torchvision's. In a ghost network `bn1`, … are `nn.Identity`, because ghost modules have their own norms.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, ratio: int, kernel_size: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        layer = partial(make_conv, ratio=ratio, cheap_kernel_size=kernel_size)
        self.conv1, self.bn1, self.act1 = layer(in_channels, width, 1)
        self.conv2, self.bn2, self.act2 = layer(width, width, 3, stride=stride)
        self.conv3, self.bn3, _ = layer(width, out_channels, 1, relu=False)
        self.downsample: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            conv, bn, _ = layer(in_channels, out_channels, 1, stride=stride, relu=False)
            self.downsample = nn.Sequential(conv, bn)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters. [N, in_channels, H, W] -> [N, width, H/stride, W/stride].

    If the stride is 2, the shortcut takes every second pixel and pads the new channels with zeros (option A of arXiv
    1512.03385, with which ResNet-56 has the 0.85 M parameters of both papers).
    """

    def __init__(self, in_channels: int, width: int, *, stride: int, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, width - in_channels
        layer = partial(make_conv, ratio=ratio, cheap_kernel_size=kernel_size)
        self.conv1, self.bn1, self.act1 = layer(in_channels, width, 3, stride=stride)
        self.conv2, self.bn2, _ = layer(width, width, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + x, inplace=True)


class GhostResNet50Features(Backbone):
    """ResNet-50 without its classifier; all convolutions except the first 7x7 one are ghost modules.

    forward: [N, 3, H, W] float32 -> level -> [N, C, ceil(H/stride), ceil(W/stride)]; c2 to c5 are `layer1` to `layer4`
    with 256, 512, 1024 and 2048 channels. With ratio 1 keys and outputs are those of torchvision's resnet50.

    Args:
        ratio: s; 1 is the plain ResNet-50.
        kernel_size: d, of the cheap operations.
    """

    classifier_prefixes = ("fc.",)

    def __init__(
        self, ratio: int = 2, kernel_size: int = 3, out_levels: Sequence[str] = ("c2", "c3", "c4", "c5")
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(Bottleneck, 64, 64, 3, 1, ratio, kernel_size)
        self.layer2 = _layer(Bottleneck, 256, 128, 4, 2, ratio, kernel_size)
        self.layer3 = _layer(Bottleneck, 512, 256, 6, 2, ratio, kernel_size)
        self.layer4 = _layer(Bottleneck, 1024, 512, 3, 2, ratio, kernel_size)
        init_weights(self)
        self.set_out_levels(out_levels)

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        yield "c1", [self.conv1, self.bn1, self.relu]
        yield "c2", [self.maxpool, self.layer1]
        yield "c3", [self.layer2]
        yield "c4", [self.layer3]
        yield "c5", [self.layer4]


class GhostResNet50(GhostResNet50Features):
    """The ImageNet classifier. forward: [N, 3, H, W] float32, normalized -> logits [N, num_classes].

    `ghost_classifier` makes the last layer a ghost module as well (see `ghost_resnet50`).
    """

    def __init__(
        self, num_classes: int = 1000, ratio: int = 2, kernel_size: int = 3, ghost_classifier: bool = False
    ) -> None:
        super().__init__(ratio, kernel_size)
        self.fc: nn.Module
        if ghost_classifier and ratio > 1:
            # On a single pixel a larger cheap filter would only use its center.
            self.fc = GhostModule(2048, num_classes, 1, ratio=ratio, cheap_kernel_size=1, relu=False)
            init_weights(self.fc)
        else:
            self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        x = self.extract(images)["c5"].mean((2, 3))
        if isinstance(self.fc, GhostModule):
            return torch.flatten(self.fc(x[:, :, None, None]), 1)
        return self.fc(x)


class GhostResNet56(nn.Module):
    """The CIFAR-10 classifier of 3 x 9 basic blocks; the first convolution is plain, all others are ghost modules.

    Its maps have strides 1, 2 and 4, so it cannot be the backbone of a detector.

    forward: [N, 3, 32, 32] float32, normalized (other sizes work as well) -> logits [N, num_classes].
    """

    def __init__(self, num_classes: int = 10, ratio: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(BasicBlock, 16, 16, 9, 1, ratio, kernel_size)
        self.layer2 = _layer(BasicBlock, 16, 32, 9, 2, ratio, kernel_size)
        self.layer3 = _layer(BasicBlock, 32, 64, 9, 2, ratio, kernel_size)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _layer(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    depth: int,
    stride: int,
    ratio: int,
    kernel_size: int,
) -> nn.Sequential:
    """`depth` blocks; the first has the stride and changes the number of channels."""
    first = block(in_channels, width, stride=stride, ratio=ratio, kernel_size=kernel_size)
    channels = width * getattr(block, "expansion", 1)
    rest = (block(channels, width, stride=1, ratio=ratio, kernel_size=kernel_size) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def ghost_resnet50(
    num_classes: int = 1000, ratio: int = 2, kernel_size: int = 3, ghost_classifier: bool = False
) -> GhostResNet50:
    """Ghost-ResNet-50 for ImageNet. [N, 3, H, W] float32 -> logits [N, num_classes].

    Args:
        ratio: s of the paper, which reports 2 and 4; 1 is the plain ResNet-50.
        kernel_size: d of the paper, odd.
        ghost_classifier: also make the classifier a ghost module. Only this gives the paper's 13.0 M (s=2) and 6.5 M
            (s=4) parameters: the linear classifier of the authors' file alone has 2.05 M. It makes `ratio` classes
            share one direction of the features, so it is useful to compare numbers, not to classify.

    Raises:
        ValueError: ratio or kernel_size out of range.
    """
    return GhostResNet50(num_classes, ratio, kernel_size, ghost_classifier)


def ghost_resnet56(num_classes: int = 10, ratio: int = 2, kernel_size: int = 3) -> GhostResNet56:
    """Ghost-ResNet-56 for CIFAR-10. [N, 3, 32, 32] float32 -> logits [N, num_classes].

    Args:
        ratio: s of the paper; 1 is the plain ResNet-56.
        kernel_size: d of the paper, odd. The paper's 0.43 M and 63 M are those of d=1; d=3 costs 0.44 M and 65 M.

    Raises:
        ValueError: ratio or kernel_size out of range.
    """
    return GhostResNet56(num_classes, ratio, kernel_size)
