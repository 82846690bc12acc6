"""Converts GhostNet weights in the layouts of PaddleClas and MindCV to the published PyTorch layout.

MindCV's network is the published one under other names. PaddleClas's has other squeeze-and-excite gates: a squeeze of
`channels // 4`, not rounded to a multiple of 4, and `clamp(x, 0, 1)` instead of the hard sigmoid. Both are special
cases of the published gate: clamp(x, 0, 1) = hardsigmoid(6x - 3), so the weights of the last layer are multiplied by 6
and its bias becomes 6b - 3; a narrower squeeze is padded with units of zero weights, whose output is zero and stays
zero in training. The converted network is an ordinary GhostNet that computes the same function, so configs and
checkpoints need no extra information.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from backbones.ghost import make_divisible
from backbones.ghostnet import STAGES

EPS = 1e-5
"""Epsilon of every batch norm, in all three frameworks."""

MINDSPORE_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
PADDLE_NAMES = {
    "_batch_norm.weight": "weight",
    "_batch_norm.bias": "bias",
    "_batch_norm._mean": "running_mean",
    "_batch_norm._variance": "running_var",
}


def detect_layout(state_dict: Mapping[str, Tensor]) -> str | None:
    """The GhostNet layout of these keys: "PaddleClas", "MindCV", or None for neither."""
    if any(key.startswith("_ghostbottleneck_0.") for key in state_dict):
        return "PaddleClas"
    if "conv_stem.weight" in state_dict and "bn1.gamma" in state_dict:
        return "MindCV"
    return None


def convert_to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict to the published layout; one of neither framework is returned unchanged.

    Tensors with other names keep them, so that the load report shows them as unexpected.

    Raises:
        ValueError: a GhostNet of PaddleClas at a width whose squeeze is wider than the published network's. This does
            not happen at the published widths 0.5, 1.0 and 1.3.
    """
    framework = detect_layout(state_dict)
    if framework == "PaddleClas":
        return _from_paddle(state_dict)
    if framework == "MindCV":
        return _from_mindcv(state_dict)
    return dict(state_dict)


def ghostnet_width(state_dict: Mapping[str, Tensor]) -> float | None:
    """The width of a GhostNet in the published layout, to two decimals; None if the last block is missing."""
    primary = state_dict.get("blocks.8.3.ghost1.primary_conv.0.weight")
    # 960 · width maps, rounded to a multiple of 4; half of them are primary.
    return None if primary is None or primary.ndim == 0 else round(2 * primary.shape[0] / STAGES[8][3][1], 2)


def _from_mindcv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, value in state_dict.items():
        # Names of version 0.3; earlier versions name the last block as in PyTorch.
        key = key.replace("blocks.9.features.0.", "blocks.9.0.conv.").replace("blocks.9.features.1.", "blocks.9.0.bn1.")
        module, _, name = key.rpartition(".")
        converted[f"{module}.{MINDSPORE_NAMES.get(name, name)}" if module else key] = value
    return converted


def _from_paddle(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rest = dict(state_dict)
    converted = {}

    def move(old: str, new: str) -> None:
        if old in rest:
            converted[new] = rest.pop(old)

    def move_conv_bn(old: str, conv: str, bn: str) -> None:
        move(f"{old}._conv.weight", f"{conv}.weight")
        for old_name, name in PADDLE_NAMES.items():
            move(f"{old}.{old_name}", f"{bn}.{name}")

    move_conv_bn("conv1", "conv_stem", "bn1")
    places = [(stage, block) for stage, blocks in enumerate(STAGES) for block in range(len(blocks))]
    for index, (stage, block) in enumerate(places):
        old, new = f"_ghostbottleneck_{index}", f"blocks.{stage}.{block}"
        for module in (1, 2):
            for part in ("primary_conv", "cheap_operation"):
                conv = f"{new}.ghost{module}.{part}"
                move_conv_bn(f"{old}.ghost_module_{module}.{part}", f"{conv}.0", f"{conv}.1")
        move_conv_bn(f"{old}.depthwise_conv", f"{new}.conv_dw", f"{new}.bn_dw")
        move_conv_bn(f"{old}.shortcut_depthwise", f"{new}.shortcut.0", f"{new}.shortcut.1")
        move_conv_bn(f"{old}.shortcut_conv", f"{new}.shortcut.2", f"{new}.shortcut.3")
        for layer, name in (("squeeze", "conv_reduce"), ("excitation", "conv_expand")):
            move(f"{old}.se_block.{layer}.weight", f"{new}.se.{name}.weight")
            move(f"{old}.se_block.{layer}.bias", f"{new}.se.{name}.bias")
        converted.update(_gate({k: v for k, v in converted.items() if k.startswith(f"{new}.se.")}))
    move_conv_bn("conv_last", "blocks.9.0.conv", "blocks.9.0.bn1")
    converted.update(_head(rest))
    move("fc_1.bias", "classifier.bias")
    if "fc_1.weight" in rest:
        converted["classifier.weight"] = rest.pop("fc_1.weight").t().contiguous()
    return converted | rest


def _gate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a gate of linear layers (weights [in, out]) and clamp(x, 0, 1) to one of 1x1 convolutions and
    hardsigmoid(x); see the module docstring."""
    converted = {}
    for key, value in tensors.items():
        if key.endswith("conv_expand.bias"):
            converted[key] = 6 * value - 3
            continue
        squeezed = value.shape[0] if key.endswith("conv_expand.weight") else value.shape[-1]
        # The number of channels is a multiple of 4; the published network rounds a quarter of it.
        added = make_divisible(squeezed, 4) - squeezed
        if added < 0:
            raise ValueError(
                f"{key} squeezes to {squeezed} channels, the published GhostNet to {squeezed + added}: "
                "PaddleClas's gates at this width do not fit into it (they do at 0.5, 1.0 and 1.3)"
            )
        if key.endswith("conv_reduce.bias"):
            converted[key] = torch.cat([value, value.new_zeros(added)])
        elif key.endswith("conv_reduce.weight"):
            weight = torch.cat([value, value.new_zeros(value.shape[0], added)], dim=1)
            converted[key] = weight.t()[:, :, None, None].contiguous()
        else:
            weight = torch.cat([6 * value, value.new_zeros(added, value.shape[1])])
            converted[key] = weight.t()[:, :, None, None].contiguous()
    return converted


def _head(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the batch norm of PaddleClas's last convolution into a bias; the published one has no batch norm."""
    names = ["fc_0._conv.weight", *(f"fc_0.{name}" for name in PADDLE_NAMES)]
    if any(name not in rest for name in names):
        return {}
    weight, scale, bias, mean, variance = (rest.pop(name).double() for name in names)
    scale = scale / (variance + EPS).sqrt()
    return {
        "conv_head.weight": (weight * scale[:, None, None, None]).float(),
        "conv_head.bias": (bias - mean * scale).float(),
    }
