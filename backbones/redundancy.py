"""Which feature maps of a layer are nearly a filter's image of others: the observation behind GhostNet.

Table 1 of arXiv 1911.11907 takes pairs of similar maps of ResNet-50's first residual block, learns a depthwise d x d
convolution from one to the other and gives its mean squared error for d = 1, 3, 5, 7. Here every ordered pair of a
layer's maps is fitted, in closed form.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.filter_fitting import fit_filters, map_statistics, pair_errors
from backbones.hooks import evaluation, watched

KERNEL_SIZES = (1, 3, 5, 7)


@dataclass(frozen=True)
class Pair:
    """A map and another that can be made of it.

    Attributes:
        source, target: channels.
        errors: d -> mean squared error of the best d x d filter (and constant), divided by the target's variance: 0 is
            exact, 1 no better than a constant. It never grows with d, as a smaller filter is a larger one with zeros.
        filters: d -> float64 [d, d], as `conv2d` takes it.
        constants: d -> what is added.
    """

    source: int
    target: int
    errors: dict[int, float]
    filters: dict[int, Tensor]
    constants: dict[int, float]

    def ghost(self, source_map: Tensor, kernel_size: int) -> Tensor:
        """The target as predicted from the source: [H, W] -> float64 [H, W]."""
        padded = source_map.double()[None, None]
        weight = self.filters[kernel_size][None, None]
        return nn.functional.conv2d(padded, weight, padding=kernel_size // 2)[0, 0] + self.constants[kernel_size]


@dataclass(frozen=True)
class Redundancy:
    """What was found in a layer.

    Attributes:
        pairs: best first; each map is in one pair at most, so that there are at most C / 2.
        best: float64 [live maps]: for each map the error from its best source (any number may share one), ascending.
        dead: channels that are constant on these images; they are in no pair.
        ranked_by: the d whose error the order goes by.
    """

    channels: int
    pairs: list[Pair]
    best: Tensor
    dead: list[int]
    ranked_by: int


def find_pairs(
    maps: Sequence[Tensor], kernel_sizes: Sequence[int] = KERNEL_SIZES, ranked_by: int | None = None
) -> Redundancy:
    """Fit all ordered pairs of maps and choose the best, in which no map occurs twice.

    Maps are compared as they are, with a free factor and constant, and errors are relative to the target's variance. So
    neither a map's scale nor its offset matter, and errors of different maps, layers and networks can be compared. (The
    paper does not say how its maps were scaled.)

    Args:
        maps: [N, C, H, W] on the CPU, as of `layer_maps`; sizes may differ from image to image.
        kernel_sizes: odd.
        ranked_by: one of them; by default 3 if it is among them (what ghost modules use), else the first.

    Raises:
        ValueError: even kernel sizes, fewer than two maps, or all of them dead.
    """
    kernel_sizes = sorted(set(kernel_sizes))
    if not kernel_sizes or any(d < 1 or d % 2 == 0 for d in kernel_sizes):
        raise ValueError(f"kernel sizes must be odd and positive, not {kernel_sizes}")
    if ranked_by is None:
        ranked_by = 3 if 3 in kernel_sizes else kernel_sizes[0]
    elif ranked_by not in kernel_sizes:
        raise ValueError(f"cannot rank by d = {ranked_by}, which is not among {kernel_sizes}")
    statistics = map_statistics(maps)
    dead = statistics.dead.nonzero()[:, 0].tolist()
    channels = len(statistics.mean)
    if channels - len(dead) < 2:
        raise ValueError(f"of {channels} maps, {len(dead)} are constant on these images: there is nothing to compare")
    errors = pair_errors(maps, ranked_by)
    errors.fill_diagonal_(torch.inf)
    errors[dead] = torch.inf
    errors[:, dead] = torch.inf
    best = errors.min(0).values
    chosen = _disjoint(errors)
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


def _disjoint(errors: Tensor) -> list[tuple[int, int]]:
    """Greedily the least error whose maps are both still free; pairs with infinite error never."""
    channels = len(errors)
    free = [True] * channels
    chosen = []
    values, places = errors.flatten().sort()
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        source, target = divmod(place, channels)
        if value == torch.inf:
            break
        if free[source] and free[target]:
            free[source] = free[target] = False
            chosen.append((source, target))
    return chosen


def layer_maps(model: nn.Module, layer: str, inputs: Iterable[Any]) -> list[Tensor]:
    """What a layer puts out, in evaluation mode: [N, C, H, W] float32 on the CPU for each input.

    The pass ends at the layer; what comes after it is not computed.

    Raises:
        ValueError: unknown layer (the nearest names are given), one that does not run, or maps of a single place.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}{hint}")
    maps: list[Tensor] = []

    def stop(name: str, args: tuple, output: Any) -> None:
        raise _Reached(output)

    with watched({layer: modules[layer]}, stop), evaluation(model):
        for batch in inputs:
            try:
                model(batch)
            except _Reached as reached:
                maps.append(_checked(reached.output, layer))
            else:
                raise ValueError(f"layer {layer!r} does not run when the network does")
    return maps


def list_layers(model: nn.Module, example: Tensor) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """name -> (class, (channels, height, width)) of each module that puts out feature maps, in the order of running."""
    found: dict[str, tuple[str, tuple[int, int, int]]] = {}
    modules = {name: module for name, module in model.named_modules() if name}

    def see(name: str, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            _, channels, height, width = output.shape
            found[name] = (type(modules[name]).__name__, (channels, height, width))

    with watched(modules, see), evaluation(model):
        model(example)
    return found


def default_layer(model: nn.Module, example: Tensor) -> str:
    """The first block that ends at a quarter of the image's side, or where it is widest.

    In ResNet-50, that is the first residual block itself, as in the paper. In a block that expands its maps and narrows
    them again (MobileNet, GhostNet, EfficientNet), it is the expansion: the narrow output has little redundancy. A
    block is a numbered child with layers of its own that is no plain sequence. In networks without blocks (VGG)
    it is the first activation, or other layer, at that size.

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
            # Convolution, norm and activation put out maps of one shape, one after the other: the last of them.
            return [name for name, shape in inside.items() if shape == widest][-1]
    activations = [name for name in early if "relu" in layers[name][0].lower() or "act" in layers[name][0].lower()]
    return (activations or early)[0]


class _Reached(Exception):
    """The layer has run; carries its output."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _checked(output: Any, layer: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 4:
        raise ValueError(f"layer {layer!r} does not put out feature maps [N, C, H, W]")
    if output.shape[1] < 2 or output.shape[2] * output.shape[3] < 2:
        shape = "x".join(map(str, output.shape[1:]))
        raise ValueError(f"layer {layer!r} puts out {shape}: there must be at least two maps of more than one place")
    return output.float().cpu().clone()
