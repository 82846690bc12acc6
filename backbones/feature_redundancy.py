"""Finds feature maps of a layer that a small filter can predict from other maps: the observation behind GhostNet.

Table 1 of arXiv 1911.11907 takes pairs of similar maps of ResNet-50's first residual block, learns a depthwise d x d
convolution from one to the other and reports its mean squared error for d = 1, 3, 5, 7. Here every ordered pair of maps
of a layer is fitted, in closed form.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.filter_fitting import channel_statistics, fit_filters, pairwise_errors
from backbones.hooks import eval_mode, forward_hooks

KERNEL_SIZES = (1, 3, 5, 7)


@dataclass(frozen=True)
class Pair:
    """A source map and a target map, with the filters that predict the target.

    Attributes:
        source, target: channels.
        errors: d -> mean squared error of the best d x d filter with bias, divided by the target's variance: 0 is
            exact, 1 is no better than a constant. It never grows with d, because a smaller filter is a larger one with
            zeros.
        filters: d -> float64 [d, d], as `conv2d` takes it.
        biases: d -> constant that is added.
    """

    source: int
    target: int
    errors: dict[int, float]
    filters: dict[int, Tensor]
    biases: dict[int, float]

    def predict(self, source_map: Tensor, kernel_size: int) -> Tensor:
        """Predict the target map from the source map: [H, W] -> float64 [H, W]."""
        padded = source_map.double()[None, None]
        weight = self.filters[kernel_size][None, None]
        return nn.functional.conv2d(padded, weight, padding=kernel_size // 2)[0, 0] + self.biases[kernel_size]


@dataclass(frozen=True)
class Redundancy:
    """The redundancy of a layer.

    Attributes:
        pairs: with the lowest error first; each map is in at most one pair, so there are at most C / 2.
        best: float64 [maps that are not dead]: for each map the error from its best source, ascending. Several maps may
            have the same source.
        dead: channels that are constant on these images; they are in no pair.
        ranked_by: the kernel size d whose error determines the order.
    """

    channels: int
    pairs: list[Pair]
    best: Tensor
    dead: list[int]
    ranked_by: int


def find_pairs(
    maps: Sequence[Tensor], kernel_sizes: Sequence[int] = KERNEL_SIZES, ranked_by: int | None = None
) -> Redundancy:
    """Fit all ordered pairs of maps and choose the best disjoint pairs.

    Filters have a bias, and errors are relative to the target's variance. So neither the scale nor the offset of a map
    matters, and errors of different maps, layers and networks can be compared. (The paper does not say how its maps
    were scaled.)

    Args:
        maps: [N, C, H, W] on the CPU from `record_feature_maps`; sizes may differ between images.
        kernel_sizes: odd numbers.
        ranked_by: one of `kernel_sizes`; default: 3 (the size in ghost modules) if it is one of them, else the first.

    Raises:
        ValueError: a kernel size is even, or fewer than two maps are not constant.
    """
    kernel_sizes = sorted(set(kernel_sizes))
    if not kernel_sizes or any(d < 1 or d % 2 == 0 for d in kernel_sizes):
        raise ValueError(f"kernel sizes must be odd and positive, not {kernel_sizes}")
    if ranked_by is None:
        ranked_by = 3 if 3 in kernel_sizes else kernel_sizes[0]
    elif ranked_by not in kernel_sizes:
        raise ValueError(f"cannot rank by d = {ranked_by}, which is not among {kernel_sizes}")
    statistics = channel_statistics(maps)
    dead = statistics.dead.nonzero()[:, 0].tolist()
    channels = len(statistics.mean)
    if channels - len(dead) < 2:
        raise ValueError(f"of {channels} maps, {len(dead)} are constant on these images: there is nothing to compare")
    errors = pairwise_errors(maps, ranked_by)
    errors.fill_diagonal_(torch.inf)
    errors[dead] = torch.inf
    errors[:, dead] = torch.inf
    best = errors.min(0).values
    chosen = _choose_disjoint_pairs(errors)
    sources, targets = [s for s, _ in chosen], [t for _, t in chosen]
    fits = {d: fit_filters(maps, sources, targets, d) for d in kernel_sizes}
    pairs = [
        Pair(
            source,
            target,
            {d: float(fit[2][k]) for d, fit in fits.items()},
            {d: fit[0][k] for d, fit in fits.items()},
            {d: float(fit[1][k]) for d, fit in fits.items()},
        )
        for k, (source, target) in enumerate(chosen)
    ]
    pairs.sort(key=lambda pair: pair.errors[ranked_by])
    return Redundancy(channels, pairs, best[best.isfinite()].sort().values, dead, ranked_by)


def _choose_disjoint_pairs(errors: Tensor) -> list[tuple[int, int]]:
    """Choose pairs greedily by lowest error; each map is used once, and pairs with infinite error are skipped."""
    channels = len(errors)
    free = [True] * channels
    chosen = []
    values, indices = errors.flatten().sort()
    for value, index in zip(values.tolist(), indices.tolist(), strict=True):
        source, target = divmod(index, channels)
        if value == torch.inf:
            break
        if free[source] and free[target]:
            free[source] = free[target] = False
            chosen.append((source, target))
    return chosen


def record_feature_maps(model: nn.Module, layer: str, inputs: Iterable[Any]) -> list[Tensor]:
    """The outputs of a layer in evaluation mode: [N, C, H, W] float32 on the CPU for each input.

    The forward pass stops at the layer; later layers are not computed.

    Raises:
        ValueError: the layer is unknown (the message lists the closest names) or does not run, or its maps have a
            single position.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}{hint}")
    maps: list[Tensor] = []

    def stop(name: str, args: tuple, output: Any) -> None:
        raise _StopForward(output)

    with forward_hooks({layer: modules[layer]}, stop), eval_mode(model):
        for batch in inputs:
            try:
                model(batch)
            except _StopForward as reached:
                maps.append(_check_feature_maps(reached.output, layer))
            else:
                raise ValueError(f"layer {layer!r} does not run when the network does")
    return maps


def list_layers(model: nn.Module, example: Tensor) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """name -> (class, (channels, height, width)) of each module whose output is a feature map, in call order."""
    found: dict[str, tuple[str, tuple[int, int, int]]] = {}
    modules = {name: module for name, module in model.named_modules() if name}

    def record(name: str, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            _, channels, height, width = output.shape
            found[name] = (type(modules[name]).__name__, (channels, height, width))

    with forward_hooks(modules, record), eval_mode(model):
        model(example)
    return found


def default_layer(model: nn.Module, example: Tensor) -> str:
    """The first block with stride 4, or the widest layer inside it.

    In ResNet-50 this is the first residual block, as in the paper. In an inverted bottleneck (MobileNet, GhostNet,
    EfficientNet) it is the expansion, because the narrow output has little redundancy. A block is a numbered child with
    layers of its own that is not an `nn.Sequential`. In networks without blocks (VGG) it is the first activation, or
    other layer, with stride 4.

    Raises:
        ValueError: there is no such layer.
    """
    layers = list_layers(model, example)
    side = example.shape[-1] // 4
    early = [name for name, (_, (channels, _, width)) in layers.items() if width <= side and channels > 1]
    if not early:
        raise ValueError(f"{type(model).__name__} has no layer at a quarter of the image's side; name one")
    for block in early:
        module = model.get_submodule(block)
        if block.rpartition(".")[2].isdigit() and any(module.children()) and not isinstance(module, nn.Sequential):
            inside = {name: shape for name, (_, shape) in layers.items() if name.startswith(f"{block}.")}
            widest = max([layers[block][1], *inside.values()])
            if widest[0] == layers[block][1][0]:
                return block
            # Convolution, norm and activation have outputs of the same shape; take the last.
            return [name for name, shape in inside.items() if shape == widest][-1]
    activations = [name for name in early if "relu" in layers[name][0].lower() or "act" in layers[name][0].lower()]
    return (activations or early)[0]


class _StopForward(Exception):
    """Stops a forward pass after the layer; holds the layer's output."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _check_feature_maps(output: Any, layer: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 4:
        raise ValueError(f"the output of layer {layer!r} is not a feature map [N, C, H, W]")
    if output.shape[1] < 2 or output.shape[2] * output.shape[3] < 2:
        shape = "x".join(map(str, output.shape[1:]))
        raise ValueError(
            f"the output of layer {layer!r} is {shape}: at least two maps of more than one position are needed"
        )
    return output.float().cpu().clone()
