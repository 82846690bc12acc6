"""GhostNet (arXiv 1911.11907): the published classifier, and its feature extractor for detection."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.base import Backbone, init_weights
from backbones.ghost import ConvBnAct, GhostBottleneck, make_divisible, zero_init_residual

# One entry for each block: depthwise kernel, expansion, output channels, squeeze-and-excite ratio, stride.
# One line for each stage, `blocks.0` to `blocks.8` of the published release (table 1 of the paper).
STAGES = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)
# The last block of each stride, as in the paper's detectors. timm's features_only takes the first block of a stride,
# which drops the 112-channel layers and four of the five last blocks.
LAST_BLOCKS = {"c1": 0, "c2": 2, "c3": 4, "c4": 6, "c5": 8}


class GhostNetFeatures(Backbone):
    """GhostNet without its classifier: stem and `blocks.0`–`blocks.8`, at any width.

    forward: [N, 3, H, W] float32 -> level -> [N, C, H/stride, W/stride]; at width 1.0 c2–c5 have
    24, 40, 112 and 160 channels.
    """

    classifier_prefixes = ("blocks.9.", "conv_head.", "classifier.")

    def __init__(self, width: float = 1.0, out_levels: Sequence[str] = ("c2", "c3", "c4", "c5")) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be positive, not {width}")
        self.width = width
        channels = make_divisible(16 * width, 4)
        self.conv_stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        stages = []
        for stage in STAGES:
            blocks = []
            for kernel_size, expansion, out, se_ratio, stride in stage:
                out_channels = make_divisible(out * width, 4)
                blocks.append(
                    GhostBottleneck(
                        channels,
                        make_divisible(expansion * width, 4),
                        out_channels,
                        kernel_size=kernel_size,
                        stride=stride,
                        se_ratio=se_ratio,
                    )
                )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        init_weights(self)
        zero_init_residual(self)
        self.set_out_levels(out_levels)

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        modules: list[nn.Module] = [self.conv_stem, self.bn1, self.act1]
        start = 0
        for level, end in LAST_BLOCKS.items():
            yield level, modules + list(self.blocks[start : end + 1])
            modules, start = [], end + 1


class GhostNet(GhostNetFeatures):
    """The ImageNet classifier; strict-loads the published checkpoint (512 keys).

    forward: [N, 3, H, W] float32, normalized with ImageNet's mean and std -> logits [N, num_classes].
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__(width)
        last = make_divisible(960 * width, 4)
        self.blocks.append(nn.Sequential(ConvBnAct(make_divisible(160 * width, 4), last)))
        self.conv_head = nn.Conv2d(last, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)
        self.dropout = dropout
        init_weights(self)
        zero_init_residual(self)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        x = self.blocks[9](self.extract(images)["c5"])
        x = F.relu(self.conv_head(x.mean((2, 3), keepdim=True)), inplace=True)
        x = F.dropout(torch.flatten(x, 1), self.dropout, self.training)
        return self.classifier(x)
