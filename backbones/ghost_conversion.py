"""`ghostify`: replaces the convolutions of any network with ghost modules, in place (arXiv 1911.11907, section 3.1)."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backbones.cost import Cost, measure_cost
from backbones.file_limits import UnreadableFile
from backbones.ghost import GhostModule
from backbones.ghost_conv import GhostConv2d, check_arguments
from backbones.hooks import eval_mode
from backbones.torch_files import read_torch_file

PREDICTIONS = ("*cls_logits", "*bbox_reg", "*bbox_pred", "*bbox_ctrness")
"""The prediction layers of torchvision's detectors. Their outputs are not feature maps: filters cannot predict the
logits of one class from those of another, and no batch norm follows that could correct the scale."""


@dataclass
class LayerReport:
    """The result for one convolution.

    Attributes:
        reason: why it was kept; "" if it was replaced.
        before, after: its cost; None without an example input.
        error: of a fitted layer, on the calibration inputs: squared error divided by variance, over all channels
            (primary channels have no error); None if the weights are random.
    """

    name: str
    shape: str
    reason: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    before: Cost | None = None
    after: Cost | None = None
    error: float | None = None


@dataclass
class GhostReport:
    """The result of `ghostify`. `str()` returns a table.

    Attributes:
        layers: every convolution of the network, in the order of registration.
        before, after: cost of the whole network; None without an example input.
        recipe: arguments of `ghostify` that replace the same layers in a network of the same structure.
    """

    layers: list[LayerReport]
    parameters_before: int
    parameters_after: int
    before: Cost | None = None
    after: Cost | None = None
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def replaced(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.reason]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.reason]

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("whole network")])
        total = f"{len(self.replaced)} of {len(self.layers)} replaced"
        shapes = max(len(shape) for shape in ["convolution", total, *(layer.shape for layer in self.layers)])
        rows = [f"{'layer':<{width}}  {'convolution':<{shapes}} {'parameters':>23} {'multiply-adds':>23}"]
        for layer in self.layers:
            head = f"{layer.name:<{width}}  {layer.shape:<{shapes}} "
            if layer.reason:
                rows.append(f"{head}kept: {layer.reason}")
                continue
            row = head + _format_change(layer.parameters_before, layer.parameters_after)
            if layer.before and layer.after:
                row += " " + _format_change(layer.before.macs, layer.after.macs)
            rows.append(row if layer.error is None else f"{row}   fit error {layer.error:.3f}")
        row = f"{'whole network':<{width}}  {total:<{shapes}} " + _format_change(
            self.parameters_before, self.parameters_after
        )
        if self.before and self.after:
            row += " " + _format_change(self.before.macs, self.after.macs)
        return "\n".join([*rows, row])


def ghostify(
    model: nn.Module,
    ratio: int = 2,
    kernel_size: int = 3,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = PREDICTIONS,
    min_channels: int = 16,
    skip_first: bool = True,
    example: Any = None,
    calibration: Iterable[Any] | None = None,
) -> GhostReport:
    """Replace convolutions of `model` with `GhostConv2d`, in place, with the same input and output shapes.

    A convolution is replaced if its name matches and it is a plain `nn.Conv2d` (not a subclass) with one group and
    enough channels, not the first of the network, and more expensive than a depthwise filter. Also kept are
    convolutions with hooks or parametrizations (weight norm, pruning), with a weight that another module shares, behind
    a global pooling (squeeze-and-excite gates), and inside ghost modules, so a second call changes nothing. A module
    registered under several names is replaced under all of them. Device, dtype, `requires_grad` and training mode are
    preserved.

    Args:
        ratio: s in the paper, at least 2.
        kernel_size: d in the paper, odd: of the cheap depthwise filters.
        include, exclude: patterns of names in `model.named_modules()`, where `*` matches anything including dots:
            "layer3.*", "*.conv2". By default the prediction layers of torchvision's detectors are excluded.
        min_channels: convolutions with fewer output channels are kept.
        skip_first: keep the first convolution (in the order of registration), whose input is the image.
        example: an input of the model, or a tuple of its arguments, to count multiply-adds for the report. The model
            runs in evaluation mode; its state does not change.
        calibration: inputs like `example`: a few batches of the network's own data, normalized as it expects. With
            them, the weights are fitted to the original's (see `backbones.ghostify_init`). Without them they are
            random: primary weights have the standard deviation of the original weights, cheap weights preserve the
            variance of the maps. Biases are kept.

    Returns:
        The replaced and the kept layers with reasons, and the costs before and after.

    Raises:
        ValueError: bad ratio or kernel size, a pattern that matches no convolution, the model itself is a convolution
            (it cannot be replaced in place), no calibration inputs, or a layer that they do not reach.
    """
    check_arguments(ratio, kernel_size)
    if isinstance(model, nn.Conv2d):
        raise ValueError(
            "the model is itself a convolution, which cannot be replaced in place: wrap it in nn.Sequential"
        )
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no convolutions")
    for pattern in (*include, *exclude):
        if pattern not in PREDICTIONS and not any(fnmatchcase(name, pattern) for name in convolutions):
            raise ValueError(f"no convolution's name matches {pattern!r}; the first are {_first_names(convolutions)}")

    arguments = example if isinstance(example, tuple) else (example,)
    costs = None
    if example is not None:
        with eval_mode(model):
            costs = measure_cost(model, *arguments)

    reasons = _reasons_to_keep(model, convolutions, kernel_size)
    for index, (name, convolution) in enumerate(convolutions.items()):
        if not any(fnmatchcase(name, pattern) for pattern in include):
            reasons[name] = "not included"
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            reasons[name] = "excluded"
        elif index == 0 and skip_first:
            reasons[name] = "first convolution"
        elif name not in reasons and convolution.out_channels < max(2, min_channels):
            reasons[name] = f"{convolution.out_channels} channels, fewer than {max(2, min_channels)}"
    report = GhostReport(
        [
            LayerReport(
                name,
                describe_conv(convolution),
                reasons.get(name, ""),
                parameters_before=_count_parameters(convolution),
                parameters_after=_count_parameters(convolution),
            )
            for name, convolution in convolutions.items()
        ],
        _count_parameters(model),
        _count_parameters(model),
    )
    chosen = {name: m for name, m in convolutions.items() if name not in reasons and isinstance(m, nn.Conv2d)}
    report.recipe = {
        "ratio": ratio,
        "kernel_size": kernel_size,
        "include": list(chosen),
        "exclude": [],
        "min_channels": 2,
        "skip_first": False,
    }
    _replace_all(model, chosen, report, calibration)
    report.parameters_after = _count_parameters(model)
    if costs is not None:
        with eval_mode(model):
            costs_after = measure_cost(model, *arguments)
        report.before, report.after = costs[""], costs_after[""]
        for layer in report.layers:
            layer.before, layer.after = costs[layer.name], costs_after[layer.name]
    return report


def load_ghosted(model: nn.Module, path: str | os.PathLike[str]) -> GhostReport:
    """Apply the recipe in a file of the command ghostify to a plain network and load the weights.

    Raises:
        ValueError: the file is of another kind or of another network. (The model may have been changed already.)
    """
    try:
        content = read_torch_file(Path(path))
    except (OSError, UnreadableFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"ghostify", "state_dict"} <= set(content):
        raise ValueError(f"{path} was not written by the command ghostify: it has no recipe")
    try:
        report = ghostify(model, **content["ghostify"])
        model.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is of another network ({content.get('network')}): {error}") from error
    return report


def _replace_all(
    model: nn.Module, chosen: dict[str, nn.Conv2d], report: GhostReport, calibration: Iterable[Any] | None
) -> None:
    maps: dict[str, list[Tensor]] = {}
    if calibration is not None and chosen:
        # A late import, because only the fit needs SciPy, which is slow to import.
        from backbones.ghostify_init import fit_ghost_weights, record_outputs

        with eval_mode(model):
            maps = record_outputs(model, chosen, calibration)
    ratio, kernel_size = report.recipe["ratio"], report.recipe["kernel_size"]
    for layer in report.replaced:
        convolution = chosen[layer.name]
        ghost = _make_ghost_conv(convolution, ratio, kernel_size)
        if maps:
            layer.error = fit_ghost_weights(ghost, convolution, maps.pop(layer.name))
        else:
            _initialize(ghost, convolution)
        layer.parameters_after = _count_parameters(ghost)
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is convolution:
                    setattr(parent, name, ghost)


def describe_conv(convolution: nn.modules.conv._ConvNd) -> str:
    """A short description, like "64 → 128, 3x3 /2"."""
    kernel = "x".join(str(side) for side in convolution.kernel_size)
    stride = f" /{convolution.stride[0]}" if max(convolution.stride) > 1 else ""
    groups = f", {convolution.groups} groups" if convolution.groups > 1 else ""
    return f"{convolution.in_channels} → {convolution.out_channels}, {kernel}{stride}{groups}"


def _reasons_to_keep(
    model: nn.Module,
    convolutions: dict[str, nn.modules.conv._ConvNd],
    kernel_size: int,
) -> dict[str, str]:
    """name -> why this convolution cannot or should not become a ghost module, whether or not the patterns match it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    reasons = {}
    for name, convolution in convolutions.items():
        ancestors = [model.get_submodule(".".join(name.split(".")[:end])) for end in range(name.count(".") + 1)]
        others = [n for p in convolution.parameters() for n in users[id(p)] if n != name]
        filter_size = convolution.in_channels * math.prod(convolution.kernel_size)
        if any(is_lazy(p) for p in convolution.parameters()):
            reasons[name] = "not initialized: run the network once"
        elif nn.utils.parametrize.is_parametrized(convolution) or "weight" not in convolution._parameters:
            reasons[name] = "its weight is parametrized (weight norm, pruning, …)"
        elif type(convolution) is not nn.Conv2d:
            reasons[name] = f"a {type(convolution).__name__}, not a plain Conv2d"
        elif convolution._forward_hooks or convolution._forward_pre_hooks or convolution._backward_hooks:
            reasons[name] = "it has hooks, which would be lost"
        elif others:
            reasons[name] = f"its weight is also that of {others[0]}"
        elif any(isinstance(a, GhostModule | GhostConv2d) for a in ancestors):
            reasons[name] = "part of a ghost module"
        elif convolution.groups != 1:
            depthwise = convolution.groups == convolution.in_channels
            reasons[name] = "depthwise" if depthwise else f"{convolution.groups} groups"
        elif _behind_global_pooling(model, name):
            reasons[name] = "behind a global pooling: its maps are 1x1"
        elif filter_size <= kernel_size**2:
            reasons[name] = f"a cheap filter has {kernel_size**2} weights, its own have {filter_size}"
    return reasons


def _behind_global_pooling(model: nn.Module, name: str) -> bool:
    """Whether its maps are 1x1 for any image: squeeze-and-excite gates, and pooled branches in a sequence.

    This looks at the structure. A forward pass would not do, because on a small image the last maps of a network are
    1x1 as well.
    """
    parts = name.split(".")
    for end in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:end]))
        if "squeezeex" in type(ancestor).__name__.lower() or parts[end] == "se":
            return True
        if isinstance(ancestor, nn.Sequential):
            before = list(ancestor)[: list(ancestor._modules).index(parts[end])]
            if any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1)) for m in before):
                return True
    return False


def _make_ghost_conv(convolution: nn.Conv2d, ratio: int, kernel_size: int) -> GhostConv2d:
    """A ghost module with the shape, device, dtype and training state of the convolution; its weights are not set."""
    ghost = GhostConv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        convolution.bias is not None,
        convolution.padding_mode,
        ratio=ratio,
        cheap_kernel_size=kernel_size,
        device=convolution.weight.device,
        dtype=convolution.weight.dtype,
    )
    for part in (ghost.primary, ghost.cheap):
        part.weight.requires_grad_(convolution.weight.requires_grad)
        if part.bias is not None and convolution.bias is not None:
            part.bias.requires_grad_(convolution.bias.requires_grad)
    ghost.train(convolution.training)
    return ghost


@torch.no_grad()
def _initialize(ghost: GhostConv2d, convolution: nn.Conv2d) -> None:
    if convolution.weight.is_meta:
        return
    # Keep the scale of the original initialization: small in a detection head, He in a backbone.
    nn.init.normal_(ghost.primary.weight, std=convolution.weight.float().std(correction=0).item())
    nn.init.normal_(ghost.cheap.weight, std=1 / ghost.cheap.kernel_size[0])
    if convolution.bias is not None and ghost.primary.bias is not None and ghost.cheap.bias is not None:
        count = ghost.primary.out_channels
        ghost.primary.bias.copy_(convolution.bias[:count])
        ghost.cheap.bias.zero_()[: len(convolution.bias) - count] = convolution.bias[count:]


def _count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _first_names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _format_change(before: int, after: int) -> str:
    return f"{_format_count(before):>9} → {_format_count(after):>7} {after / before - 1 if before else 0:>+4.0%}"


def _format_count(number: int) -> str:
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)
