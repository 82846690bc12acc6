"""What every backbone is: an image batch in, an ordered dict of feature levels out, freezable by stage."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

LEVELS = ("c1", "c2", "c3", "c4", "c5")
"""Level cK has stride 2**K. Detectors use c2 to c5."""

SAFE_SIZE = 64
"""Pixels that the shorter side of an image needs for any network: two places in c5."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Base of all feature extractors.

    Attributes:
        out_levels: names of the levels that `forward` returns, e.g. ("c2", "c3", "c4", "c5").
        channels, strides: level -> int, measured by `measure` on a real forward pass, not declared.
        mean, std: what the network's weights expect of RGB in [0, 1]; normalisation belongs to the backbone.
        pretrained: whether weights were loaded. Only then may layers be frozen.
        classifier_prefixes: how the state-dict keys begin that a published classifier has beyond this network.
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
        """Yield (level, the modules computed to get from the level before to this one), from c1/c2 up to c5."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Extract features.

        Args:
            images: [N, 3, H, W] float32, normalised.

        Returns:
            level -> [N, C, H/stride, W/stride], sides rounded up, or down in a network whose pooling or patches do
            not pad (VGG, ConvNeXt).

        Raises:
            ValueError: the images are smaller than the network can shrink.
        """
        return self.extract(images)

    def extract(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """The features, also of a subclass whose `forward` goes on to classify."""
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
            if min(height, width) >= SAFE_SIZE:
                raise
            raise ValueError(
                f"images of {height}x{width} pixels are too small for this network, which shrinks them up to 32 "
                f"times ({str(error).splitlines()[0]}); enlarge them to {SAFE_SIZE} pixels or more"
            ) from error
        return features

    def measure(self, out_levels: Sequence[str]) -> None:
        """Set `out_levels`, and `channels` and `strides` from what a small image really gives."""
        known = [level for level, _ in self.stage_modules()]
        for level in out_levels:
            if level not in known:
                raise ValueError(f"unknown feature level {level!r}; this backbone has {', '.join(known)}")
        self.out_levels = tuple(level for level in known if level in out_levels)
        training = self.training
        self.eval()
        with torch.no_grad():
            size = SAFE_SIZE
            features = self.extract(torch.zeros(1, 3, size, size))
        self.train(training)
        self.channels = {level: x.shape[1] for level, x in features.items()}
        self.strides = {level: size // x.shape[2] for level, x in features.items()}

    def fuse(self) -> "Backbone":
        """Merge, in place, what training keeps apart and inference need not: parallel branches of a network that
        re-parameterises become one convolution each. The features stay the same. A network without such branches
        stays as it is. Afterwards it cannot be trained, and earlier state dicts do not fit. Returns itself.
        """
        return self.eval()

    def convert_keys(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under this network's own keys, if they come in another published layout that it knows."""
        return dict(state_dict)

    def freeze(self, stages: int = 0, bn: bool = False) -> None:
        """Stop the training of pretrained layers.

        Args:
            stages: 0 none; 1 the stem and everything up to c2; 2 up to c3; … 4 up to c5 (the whole network).
            bn: also keep every other batch norm of the backbone in evaluation mode with fixed scale and
                shift, as detection recipes do for small batches.

        Raises:
            ValueError: the weights were not loaded. Frozen random layers never learn, and a frozen random
                batch norm is no normalisation at all.
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


def initialize(network: nn.Module) -> None:
    """He initialisation of every convolution (as in torchvision's and mmdetection's from-scratch recipes)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
