"""Ghost-VGG-16 (GhostNet's paper, arXiv 1911.11907) and, with ratio 1, VGG-16 itself."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from backbones.base import Backbone, init_weights
from backbones.conv_factory import make_conv

# VGG-16 (arXiv 1409.1556, configuration D): output channels of the convolutions, each line ending in a 2x2 pooling.
BLOCKS = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)


class GhostVGG16Features(Backbone):
    """The thirteen 3x3 convolutions of VGG-16, each with batch norm, each a ghost module.

    forward: [N, 3, H, W] float32 -> level -> [N, C, ceil(H/stride), ceil(W/stride)]. c1 to c4 are the ends of
    blocks 2 to 5 (conv2_2, conv3_3, conv4_3, conv5_3; 128, 256, 512, 512 channels), c5 is the last pooling.

    The first convolution is a ghost module as well, which gives exactly the paper's multiply-adds for every ratio and
    kernel size.

    Keys are torchvision's `features.N` of vgg16_bn; instead of `features.N.weight` the ghost network has
    `features.N.primary_conv` and `features.N.cheap_operation`. With ratio 1 the two networks are the same.

    Args:
        ratio: s; 1 is the plain VGG-16.
        kernel_size: d, of the cheap operations.
    """

    classifier_prefixes = ("classifier.",)

    def __init__(
        self, ratio: int = 2, kernel_size: int = 3, out_levels: Sequence[str] = ("c2", "c3", "c4", "c5")
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block in BLOCKS:
            for out_channels in block:
                # A bias before a batch norm has no effect, but torchvision's network and weights have it.
                layers += make_conv(
                    channels, out_channels, 3, ratio=ratio, cheap_kernel_size=kernel_size, bias=ratio == 1
                )
                channels = out_channels
            # Sizes are rounded up, as in strided convolutions; torchvision rounds down, which differs for odd sizes.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        init_weights(self)
        self.set_out_levels(out_levels)

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        pools = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        # A level ends before the pooling of the next level; the last level is only that pooling.
        ends = [*pools[1:], len(self.features)]
        start = 0
        for level, end in zip(("c1", "c2", "c3", "c4", "c5"), ends, strict=True):
            yield level, list(self.features[start:end])
            start = end


class GhostVGG16(GhostVGG16Features):
    """The CIFAR-10 classifier: the features, global average pooling, and two linear layers with 512 hidden units.

    This variant of VGG-16 has the paper's 15 M parameters and 313 M multiply-adds at 32 px. With a single linear layer,
    512 -> 10, every ghost network has 0.26 M parameters fewer than in the paper.

    forward: [N, 3, 32, 32] float32, normalized (other sizes work as well) -> logits [N, num_classes].
    """

    def __init__(self, num_classes: int = 10, ratio: int = 2, kernel_size: int = 3, dropout: float = 0.5) -> None:
        super().__init__(ratio, kernel_size)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.classifier(self.features(images).mean((2, 3)))


def ghost_vgg16(num_classes: int = 10, ratio: int = 2, kernel_size: int = 3) -> GhostVGG16:
    """Ghost-VGG-16 for CIFAR-10. [N, 3, 32, 32] float32 -> logits [N, num_classes].

    Args:
        ratio: s of the paper; it reports 2, 3, 4 and 5; 1 is the plain VGG-16 with batch norm.
        kernel_size: d of the paper, odd; it reports 1, 3, 5 and 7.

    Raises:
        ValueError: ratio or kernel_size out of range.
    """
    return GhostVGG16(num_classes, ratio, kernel_size)
