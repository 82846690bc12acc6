"""The base class of all backbones: images in, an ordered dict of feature levels out; stages can be frozen."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

LEVELS = ("c1", "c2", "c3", "c4", "c5")
"""Level cK has stride 2**K. Detectors use c2 to c5."""

MIN_IMAGE_SIZE = 64
"""Shorter side of an image, in pixels, that is large enough for any network: two positions in c5."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Base class of all feature extractors.

    Attributes:
        out_levels: names of the levels that `forward` returns, e.g. ("c2", "c3", "c4", "c5").
        channels, strides: level -> int, measured by `set_out_levels` with a forward pass.
        mean, std: normalization of RGB in [0, 1] that the weights expect.
        pretrained: whether weights were loaded. Only then can layers be frozen.
        classifier_prefixes: prefixes of the state-dict keys of a published classifier that this network does not have.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    classifier_prefixes: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.out_levels: tuple[str, ...] = ()
        self.channels: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self.pretrained = False
        self._frozen_stages = 0
        self._freeze_bn = False

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        """Yield (level, the modules between the previous level and this one), from c1/c2 up to c5."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Extract features.

        Args:
            images: [N, 3, H, W] float32, normalized.

        Returns:
            level -> [N, C, H/stride, W/stride]. Sides are rounded up, or down in a network whose pooling or patches do
            not pad (VGG, ConvNeXt).

        Raises:
            ValueError: the images are too small for the strides of the network.
        """
        return self.extract(images)

    def extract(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """As `forward`, also in a subclass whose `forward` returns logits."""
        features: OrderedDict[str, Tensor] = OrderedDict()
        x = images
        try:
            for level, modules in self.stage_modules():
                for module in modules:
                    x = module(x)
                if level in self.out_levels:
                    features[level] = x
        except (RuntimeError, ValueError) as error:
            height, width = images.shape[-2:]
            if min(height, width) >= MIN_IMAGE_SIZE:
                raise
            raise ValueError(
                f"images of {height}x{width} pixels are too small for this network, whose strides go up to 32 "
                f"({str(error).splitlines()[0]}); enlarge them to {MIN_IMAGE_SIZE} pixels or more"
            ) from error
        return features

    def set_out_levels(self, out_levels: Sequence[str]) -> None:
        """Set `out_levels`, and measure `channels` and `strides` with a small image."""
        known = [level for level, _ in self.stage_modules()]
        for level in out_levels:
            if level not in known:
                raise ValueError(f"unknown feature level {level!r}; this backbone has {', '.join(known)}")
        self.out_levels = tuple(level for level in known if level in out_levels)
        training = self.training
        self.eval()
        with torch.no_grad():
            size = MIN_IMAGE_SIZE
            features = self.extract(torch.zeros(1, 3, size, size))
        self.train(training)
        self.channels = {level: x.shape[1] for level, x in features.items()}
        self.strides = {level: size // x.shape[2] for level, x in features.items()}

    def fuse(self) -> "Backbone":
        """Merge the parallel branches of a re-parameterizable network into single convolutions, in place.

        The features stay the same; a network without such branches does not change. Afterwards it cannot be trained,
        and earlier state dicts do not fit. Returns self.
        """
        return self.eval()

    def convert_keys(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the keys of another published layout to those of this network, if it is known."""
        return dict(state_dict)

    def freeze(self, stages: int = 0, bn: bool = False) -> None:
        """Freeze pretrained layers.

        Args:
            stages: 0: none; 1: the stem and all layers up to c2; 2: up to c3; … 4: up to c5 (the whole network).
            bn: also freeze every other batch norm of the backbone: evaluation mode, fixed scale and shift, as in
                detection recipes for small batches.

        Raises:
            ValueError: no weights were loaded. Frozen random layers never learn, and a frozen random batch norm does
                not normalize.
        """
        if not 0 <= stages <= 4:
            raise ValueError(f"frozen_stages must be between 0 and 4, not {stages}")
        if not self.pretrained and (stages or bn):
            raise ValueError("only pretrained layers can be frozen: this backbone has no weights loaded")
        self._frozen_stages, self._freeze_bn = stages, bn
        for module in self._frozen_modules():
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        if bn:
            for module in self._batch_norms(self):
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As `nn.Module.train`, but frozen layers and frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            if self._freeze_bn:
                for module in self._batch_norms(self):
                    module.eval()
        return self

    def _frozen_modules(self) -> Iterator[nn.Module]:
        frozen = LEVELS[: self._frozen_stages + 1] if self._frozen_stages else ()
        for level, modules in self.stage_modules():
            if level in frozen:
                yield from modules

    @staticmethod
    def _batch_norms(root: nn.Module) -> Iterator[nn.Module]:
        return (m for m in root.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def init_weights(network: nn.Module) -> None:
    """He initialization of every convolution (as in torchvision's and mmdetection's from-scratch recipes)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
